"""Checks of weights: they fit a model, tensor by tensor, and are finite."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check_weights(
    weights: Mapping[str, Any],
    expected: Mapping[str, Any],
    what: str,
    *,
    optional: tuple[str, ...] = (),
    resized: tuple[str, ...] = (),
    remedy: str = "",
) -> None:
    """Raises a ValueError for tensors (or shapes) that are missing, unknown or of another shape than the model's.

    Args:
        what: Begins the message, such as a path; `remedy` ends it.
        optional: Prefixes of names to skip, such as a new classifier's.
        resized: Names whose shape may differ, such as a stem whose channels timm adapts.
    """

    def shape(side: Mapping[str, Any], name: str) -> str:
        if name not in side:
            return "missing"
        value = side[name]
        value = getattr(value, "shape", value)
        return str(list(value)) if isinstance(value, tuple | list) else f"a {type(value).__name__}, not a tensor,"

    names = [*expected, *sorted(name for name in weights if name not in expected)]
    wrong = []
    for name in names:
        came, wanted = shape(weights, name), shape(expected, name)
        if came == wanted or name.startswith(optional) or name in resized and "missing" not in (came, wanted):
            continue
        wrong.append(f"'{name}' is {came} in the weights and {wanted} in the model")
    if wrong:
        found = sum(name in weights for name in expected)
        raise ValueError(
            f"{what}: found {found} of the model's {len(expected)} tensors, {len(wrong)} differ; the first: "
            f"{wrong[0]}. {remedy}".rstrip()
        )


def first_not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or an infinity; None if all values are finite."""
    for name, value in weights.items():
        # torch.isfinite does not take 8-bit floats
        if value.is_floating_point() and not torch.isfinite(value.float() if value.itemsize == 1 else value).all():
            return name
    return None
