"""How many directions features use."""

import torch
from torch import Tensor

from .extract import check_finite


def rankme(features: Tensor) -> float:
    """RankMe: the exponential of the entropy of the normalised singular values, 1 to `min(N, D)`.

    It compares runs of one method only, such as two runs of FCMAE with other settings: the authors show no relation
    across methods, and none is known.

    Source: https://arxiv.org/abs/2210.02885, equation 1.

    Args:
        features: `[N, D]`; the number depends on N where N is not well above D.

    Returns:
        The effective rank; 0 where all features are 0.

    Raises:
        ValueError: NaN or infinity.
    """
    check_finite(features)
    x = features.to("cpu", torch.float64)
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    values = torch.where(values > values.max() * 1e-14, values, 0).sqrt()  # what rounding leaves of zeros
    if not values.sum():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())
