"""Builds models through timm's factory, with one clear error if the Hub does not deliver."""

from timm.models import build_model_with_cfg
from torch import nn

from ..hub_errors import HUB_ERRORS, hub_error


def build_model(model_cls: type, variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """`timm.models.build_model_with_cfg`, with one HubError if neither the Hub nor its cache has them."""
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
