"""Functions: plain definitions, custom operations, kernels. Nothing in here imports the rest of the package."""

from .depthwise import depthwise_conv, window_depthwise
from .dispatch import backend, set_backend, use_backend
from .layer_norm import fused_layer_norm
from .token_mlp import fused_token_mlp

__all__ = [
    "backend",
    "depthwise_conv",
    "fused_layer_norm",
    "fused_token_mlp",
    "set_backend",
    "use_backend",
    "window_depthwise",
]
