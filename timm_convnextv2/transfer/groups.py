"""Parameter groups of a detector or segmenter: layer decay in the backbone, the full learning rate above it."""

from typing import Any

from torch import nn

from .backbone import Backbone


def parameter_groups(
    model: nn.Module, backbone: Backbone, *, weight_decay: float, layer_decay: float = 1.0,
    layer_decay_type: str = "group"
) -> list[dict[str, Any]]:  # fmt: skip
    """Groups for an optimizer, with `lr_scale` and `names` beside `weight_decay` and `params`; no frozen parameters.

    Layer i of L in the backbone learns at `layer_decay ** (L - i)` of the rate, everything else at the full rate;
    vectors and scalars (biases, norms) have no weight decay. Source: `layer_wise` of the official code's
    `LearningRateDecayOptimizerConstructor` for mmdetection and mmsegmentation.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}, expected a number above 0 and at most 1.")
    prefix = next((name for name, module in model.named_modules() if module is backbone), None)
    if prefix is None:
        raise ValueError("The backbone is not a part of the model.")
    scales: dict[str, float] = {}
    if layer_decay < 1:
        ids, top = backbone.layer_ids(layer_decay_type)
        scales = {f"{prefix}.{name}".lstrip("."): layer_decay ** (top - layer) for name, layer in ids.items()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decay = scales.get(name, 1.0), 0.0 if parameter.ndim <= 1 else weight_decay
        group = groups.setdefault((scale, decay), dict(params=[], names=[], lr_scale=scale, weight_decay=decay))
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
