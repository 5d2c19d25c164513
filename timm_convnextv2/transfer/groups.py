"""Parameter groups of a detector or segmenter: layer decay in the backbone, none above it."""

from typing import Any

from torch import nn

from .backbone import Backbone


def parameter_groups(
    model: nn.Module,
    backbone: Backbone,
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    layer_decay_type: str = "group",
) -> list[dict[str, Any]]:
    """Groups for an optimizer, with `lr_scale` beside `weight_decay` and `params`.

    A parameter of the backbone's layer i, of L layers, learns at `layer_decay ** (L - i)` of the rate, everything else
    (pyramid, heads) at the rate itself; vectors and scalars (biases, norms) have no weight decay. Source: the official
    code's `LearningRateDecayOptimizerConstructor` for mmdetection and mmsegmentation, `layer_wise`.

    Args:
        model: It contains the backbone.
        backbone: See there.
        weight_decay: Of matrices and filters.
        layer_decay: Share of the rate that the next lower layer learns at; 1 for the same everywhere.
        layer_decay_type: See `Backbone.layer_ids`.

    Returns:
        One group for each scale and weight decay, with the names of its parameters as `names`; frozen ones are absent.

    Raises:
        ValueError: The backbone is not of this model, the decay is not in (0, 1], or the backbone knows no layers.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}, expected a share above 0 and at most 1.")
    prefix = next((name for name, module in model.named_modules() if module is backbone), None)
    if prefix is None:
        raise ValueError("The backbone is not a part of the model.")
    prefix = f"{prefix}." if prefix else ""
    scales: dict[str, float] = {}
    if layer_decay < 1:
        ids, top = backbone.layer_ids(layer_decay_type)
        scales = {prefix + name: layer_decay ** (top - layer) for name, layer in ids.items()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decay = scales.get(name, 1.0), 0.0 if parameter.ndim <= 1 else weight_decay
        group = groups.setdefault((scale, decay), dict(params=[], names=[], lr_scale=scale, weight_decay=decay))
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
