"""`convnextv2_*` in timm's registry: pretrained configs, weight filter, entrypoints.

They replace timm's own entries of the same names and keep every pretrained tag that timm knows. The published weights
are CC-BY-NC 4.0.
"""

from typing import Any

from timm.models import build_model_with_cfg
from timm.models import convnext as timm_convnext
from timm.models.convnext import checkpoint_filter_fn
from torch import nn

from ..hub_errors import HUB_ERRORS, hub_error
from ..models.convnextv2 import ConvNeXtV2
from ..models.variants import VARIANTS, layer_decay_type, register_variants
from ..models.weights import check_weights
from .foreign import official_names


def filter_weights(state_dict: dict[str, Any], model: ConvNeXtV2) -> dict[str, Any]:
    """timm's filter for names of timm, the official dense format, transformers or MMPretrain, or of a whole FCMAE.

    Raises:
        ValueError: The weights do not cover or fit the model, where timm may only warn; the head may be new, the stem's
            channels are adapted.
    """
    if any(name.startswith("encoder.stem.") for name in state_dict):
        state_dict = {k.removeprefix("encoder."): v for k, v in state_dict.items() if k.startswith("encoder.")}
    named = official_names(state_dict)
    try:
        loaded = checkpoint_filter_fn(named, model)
    # timm looks unknown names up in the model, assumes tensors, and reshapes to the model's width
    except (KeyError, AttributeError, RuntimeError):
        loaded = named
    what = f"The weights are not those of this ConvNeXt V2 (the first names: {sorted(state_dict)[:3]})"
    remedy = (
        "Expected: a convnextv2_* or fcmae_convnextv2_* of the same size, in the names of timm, the official code, "
        "transformers or MMPretrain. Convert the official MinkowskiEngine checkpoints with "
        "timm_convnextv2.checkpoint.convert_official first."
    )
    check_weights(loaded, model.state_dict(), what, optional=("head.",), resized=("stem.0.weight",), remedy=remedy)
    return loaded


def build_model(model_cls: type, variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """`timm.models.build_model_with_cfg`, with one HubError if neither the Hub nor its cache has the weights."""
    try:
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    except HUB_ERRORS as e:
        from timm.models._builder import resolve_pretrained_cfg

        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not pretrained or not cfg.hf_hub_id or cfg.file or cfg.state_dict:
            raise
        name = f"{variant}.{cfg.tag}" if cfg.tag else variant
        overlay = "pretrained_cfg_overlay=dict(file='model.safetensors')"
        instead = f"pass its weights: timm.create_model('{name}', pretrained=True, {overlay})"
        raise hub_error(e, cfg.hf_hub_id, "weights", instead) from e


def _create_convnextv2(variant: str, pretrained: bool = False, **kwargs) -> ConvNeXtV2:
    if kwargs.get("pretrained_cfg", "") == "fcmae":
        # as in timm: the fcmae weights have neither classifier nor `head.norm`
        kwargs.setdefault("pretrained_strict", False)
    features = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    options = {"pretrained_filter_fn": filter_weights, "feature_cfg": features, **kwargs}
    model: Any = build_model(ConvNeXtV2, variant, pretrained, **options)
    if isinstance(model, ConvNeXtV2):  # not if `features_only` wraps it
        model.layer_decay_type = layer_decay_type(variant)
    return model


# `register_model` looks for this name: every tag that timm knows
default_cfgs = {f"convnextv2_{name}": timm_convnext.default_cfgs[f"convnextv2_{name}"] for name in VARIANTS}

register_variants(__name__, "convnextv2_", _create_convnextv2)
