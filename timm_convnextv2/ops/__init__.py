"""Numerics. Nothing in here imports the rest of the package."""

from .grn import GlobalResponseNorm
from .token_mlp import TokenMlp

__all__ = ["GlobalResponseNorm", "TokenMlp"]
