"""How many directions features use."""

import torch
from torch import Tensor

from .extract import check_finite


def rankme(features: Tensor) -> float:
    """RankMe of features `[N, D]`: the exponential of the entropy of the normalised singular values, 1 to `min(N, D)`.

    It compares runs of one method only, such as two FCMAE runs with different settings, and depends on N unless N is
    well above D. 0 if all features are 0. Source: https://arxiv.org/abs/2210.02885, equation 1.
    """
    check_finite(features)
    x = features.to("cpu", torch.float64)
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    values = torch.where(values > values.max() * 1e-14, values, 0).sqrt()  # zeros up to rounding
    if not values.sum():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())
