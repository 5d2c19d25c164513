"""Plain definitions in ordinary PyTorch operations; every fast path is tested against them.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); `timm.layers.GlobalResponseNormMlp`.
"""

import torch
import torch.nn.functional as F


def stats_dtype(x: torch.Tensor) -> torch.dtype:
    """Type in which statistics of `x` are accumulated: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """LayerNorm over the last axis of `[..., C]`, computed in float32 (float64 for float64), returned in `dtype`."""
    full = stats_dtype(x)
    return F.layer_norm(x.to(full), x.shape[-1:], weight.to(full), bias.to(full), eps).to(dtype)


def spatial_norm(x: torch.Tensor, dim: tuple[int, int]) -> torch.Tensor:
    """L2 norm over two axes, kept as size 1, accumulated and returned in float32 (float64 for float64)."""
    if x.is_cuda:
        return torch.linalg.vector_norm(x, ord=2, dim=dim, keepdim=True, dtype=stats_dtype(x))
    # On CPU vector_norm is vectorised over the last axis only: this takes a quarter of its time. The clamp keeps the
    # gradient of an all-zero channel at zero, as vector_norm does.
    return x.to(stats_dtype(x)).square().sum(dim=dim, keepdim=True).clamp(min=1e-30).sqrt()


def norm_ratio(g: torch.Tensor, eps: float, channel_dim: int = -1) -> torch.Tensor:
    """GRN's `n = g / (mean_c g + eps)` of the norms `g`."""
    return g / (g.mean(dim=channel_dim, keepdim=True) + eps)


def global_response_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dim: tuple[int, int], channel_dim: int
) -> torch.Tensor:
    """GRN in plain operations: the reference, and the form that compilers and exporters see.

    Args:
        x: `[B, H, W, C]` with `dim=(1, 2)`, `channel_dim=-1`; or `[B, C, H, W]` with `(2, 3)` and `1`.
        weight: Broadcasts against `x`, as `bias` does.
    """
    scale = 1 + weight * norm_ratio(spatial_norm(x, dim), eps, channel_dim)
    return torch.addcmul(bias.to(x.dtype), x, scale.to(x.dtype))


def token_mlp(
    x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor,
    grn_weight: torch.Tensor, grn_bias: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor, norm_eps: float = 1e-6,
    grn_eps: float = 1e-6,
) -> torch.Tensor:  # fmt: skip
    """`[B, T, C]` to `[B, T, C]`: the reference of `fused_token_mlp`, whose parameters have the same shapes.

    Drop path and residual are left out.
    """
    x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    x = F.gelu(F.linear(x, w1, b1)).unsqueeze(1)
    x = global_response_norm(x, grn_weight, grn_bias, grn_eps, (1, 2), -1)
    return F.linear(x.squeeze(1), w2, b2)
