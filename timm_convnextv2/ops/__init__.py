"""Numerics. Nothing in here imports the rest of the package."""

from .grn import GlobalResponseNorm
from .token_mlp import PointwiseConv2d, TokenMlp

__all__ = ["GlobalResponseNorm", "PointwiseConv2d", "TokenMlp"]
