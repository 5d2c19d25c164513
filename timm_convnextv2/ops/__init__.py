"""Numerics. Nothing in here imports the rest of the package."""

from .backends import backend, set_backend, use_backend
from .depthwise import is_plain_depthwise, window_depthwise
from .grn import GlobalResponseNorm
from .token_mlp import PointwiseConv2d, TokenMlp

__all__ = [
    "GlobalResponseNorm",
    "PointwiseConv2d",
    "TokenMlp",
    "backend",
    "is_plain_depthwise",
    "set_backend",
    "use_backend",
    "window_depthwise",
]
