"""Numerics. Nothing in here imports the rest of the package."""

from .grn import GlobalResponseNorm

__all__ = ["GlobalResponseNorm"]
