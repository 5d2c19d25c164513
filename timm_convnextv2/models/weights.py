"""The one check that weights are those of a model, tensor by tensor: on loading, finetuning, export and publishing.

And the one check that they are numbers.
"""

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
    """Compares names and shapes.

    Args:
        weights: The tensors that came, or their shapes, by name.
        expected: Those of the model, likewise.
        what: Names the weights at the start of the message, such as a path.
        optional: Beginnings of names that are not compared: a classifier that will be new.
        resized: Names whose shape may differ: a stem whose channels timm adapts.
        remedy: What to do, at the end of the message.

    Raises:
        ValueError: A tensor is missing, unknown or of another shape; counts them and names the first.
    """

    def shape(side: Mapping[str, Any], name: str) -> str:
        if name not in side:
            return "missing"
        value = side[name]
        value = getattr(value, "shape", value)
        return str(list(value)) if isinstance(value, tuple | list) else f"no tensor but a {type(value).__name__}"

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
            f"{what}: {found} of the model's {len(expected)} tensors are there, {len(wrong)} differ; the first: "
            f"{wrong[0]}. {remedy}".rstrip()
        )


def first_not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or an infinity; None where all numbers are finite."""
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value.float() if value.itemsize == 1 else value).all():
            return name
    return None
