"""Modules with timm's parameters and names, which run the operations of `ops` where they can."""

from .depthwise import DepthwiseConv2d, is_plain_depthwise
from .grn import GlobalResponseNorm
from .layer_norm import LayerNorm, LayerNorm2d
from .patch_conv import PatchConv2d
from .token_mlp import PointwiseConv2d, TokenMlp

__all__ = [
    "DepthwiseConv2d",
    "GlobalResponseNorm",
    "LayerNorm",
    "LayerNorm2d",
    "PatchConv2d",
    "PointwiseConv2d",
    "TokenMlp",
    "is_plain_depthwise",
]
