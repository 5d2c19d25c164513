"""The kernels of the fused operations in Triton: the twin of `ops.torch_kernels`, with the same functions and shapes.

Plain functions from tensors to tensors, without autograd. Inputs are contiguous and float32, bfloat16 or float16; all
arithmetic in registers is float32 and a result is rounded once. Every reduction is deterministic: programs write
partial sums, which torch adds up; no atomics.

The block sizes follow from bytes and from the registers that the compiler takes for sm_90; `benchmarks.triton_kernels`
records these. No time was taken on a GPU yet.
"""

from .depthwise import window_conv, window_conv_input_grad, window_conv_weight_grad
from .layernorm import layer_norm, layer_norm_backward
from .token_mlp import KEEPS_ACTIVATION, gelu, gelu_backward, gelu_norms, gelu_reductions, gelu_scale

__all__ = [
    "KEEPS_ACTIVATION",
    "gelu",
    "gelu_backward",
    "gelu_norms",
    "gelu_reductions",
    "gelu_scale",
    "layer_norm",
    "layer_norm_backward",
    "window_conv",
    "window_conv_input_grad",
    "window_conv_weight_grad",
]
