"""Plain definitions in ordinary PyTorch operations; every fast path is tested against them.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); `timm.layers.GlobalResponseNormMlp`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def stats_dtype(x: Tensor) -> torch.dtype:
    """Type in which statistics of `x` are accumulated: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last axis of `[..., C]`, computed in float32 (float64 for float64), returned in `dtype`."""
    full = stats_dtype(x)
    return F.layer_norm(x.to(full), x.shape[-1:], weight.to(full), bias.to(full), eps).to(dtype)


def spatial_norm(x: Tensor, dim: tuple[int, int]) -> Tensor:
    """L2 norm over two axes, kept as size 1, accumulated and returned in float32 (float64 for float64)."""
    if x.is_cuda:
        return torch.linalg.vector_norm(x, ord=2, dim=dim, keepdim=True, dtype=stats_dtype(x))
    # On CPU vector_norm is vectorised over the last axis only: this takes a quarter of its time. The clamp keeps the
    # gradient of an all-zero channel at zero, as vector_norm does.
    return x.to(stats_dtype(x)).square().sum(dim=dim, keepdim=True).clamp(min=1e-30).sqrt()


def norm_ratio(g: Tensor, eps: float, channel_dim: int = -1) -> Tensor:
    """GRN's `n = g / (mean_c g + eps)` of the norms `g`."""
    return g / (g.mean(dim=channel_dim, keepdim=True) + eps)


def global_response_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dim: tuple[int, int], channel_dim: int
) -> Tensor:
    """GRN in plain operations: the reference, and the form that compilers and exporters see.

    Args:
        x: `[B, H, W, C]` with `dim=(1, 2)`, `channel_dim=-1`; or `[B, C, H, W]` with `(2, 3)` and `1`.
        weight: Broadcasts against `x`, as `bias` does.
    """
    scale = 1 + weight * norm_ratio(spatial_norm(x, dim), eps, channel_dim)
    return torch.addcmul(bias.to(x.dtype), x, scale.to(x.dtype))


def token_mlp(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor,
    grn_weight: Tensor, grn_bias: Tensor, w2: Tensor, b2: Tensor, norm_eps: float = 1e-6,
    grn_eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """`[B, T, C]` to `[B, T, C]`: the reference of `fused_token_mlp`, without drop path and residual."""
    x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    x = F.gelu(F.linear(x, w1, b1)).unsqueeze(1)
    x = global_response_norm(x, grn_weight, grn_bias, grn_eps, (1, 2), -1)
    return F.linear(x.squeeze(1), w2, b2)


def differentiable_gradients(
    form: Callable[..., Tensor], tensors: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of `form(*tensors)` that can be differentiated again; None where not `wanted`."""
    with torch.autocast(grad.device.type, enabled=False):
        out = form(*tensors)
        leaves = [t for t, want in zip(tensors, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(out, leaves, grad.to(out.dtype), create_graph=True))
    return [next(found) if want else None for want in wanted]
