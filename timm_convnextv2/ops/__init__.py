"""Numerics. Nothing in here imports the rest of the package."""

from .backends import backend, set_backend, use_backend
from .depthwise import DepthwiseConv2d, is_plain_depthwise, window_depthwise
from .grn import GlobalResponseNorm
from .patch_conv import PatchConv2d
from .token_mlp import PointwiseConv2d, TokenMlp

__all__ = [
    "DepthwiseConv2d",
    "GlobalResponseNorm",
    "PatchConv2d",
    "PointwiseConv2d",
    "TokenMlp",
    "backend",
    "is_plain_depthwise",
    "set_backend",
    "use_backend",
    "window_depthwise",
]
