"""Builds models through timm's factory, with one clear error if the Hub does not deliver."""

import re
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from timm.models import build_model_with_cfg
from torch import nn

# as in checkpoint.provenance, which is not imported here: it would make `import timm_convnextv2` slow
HUB_ERRORS: Any = (OSError, HfHubHTTPError, *HfHubHTTPError.__bases__)


def build_model(model_cls: type, variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """`timm.models.build_model_with_cfg`, with one RuntimeError if neither the Hub nor its cache has them."""
    try:
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    except HUB_ERRORS as e:
        from timm.models._builder import resolve_pretrained_cfg

        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not pretrained or not cfg.hf_hub_id or cfg.file or cfg.state_dict:
            raise
        raise hub_error(e, cfg.hf_hub_id, "weights", f"{variant}.{cfg.tag}" if cfg.tag else variant) from e


def hub_error(error: Exception, hub_id: str, what: str, name: str) -> RuntimeError:
    """The error for a failed download of `what` from `hub_id`, `user/name[@revision]`, for timm's model `name`."""
    repo, _, revision = hub_id.partition("@")
    cause = error.__cause__ or error
    status = getattr(getattr(error, "response", getattr(cause, "response", None)), "status_code", None)
    reason = f"{type(cause).__name__}: {cause}".partition("\n")[0].rstrip(".: ")
    reason = re.sub(r"\?[^\s']*", "", reason)  # signed addresses of large files give access without a token
    if isinstance(error, RevisionNotFoundError):
        remedy = f"It has no revision '{revision or 'main'}'. Name an existing branch, tag or commit."
    elif isinstance(error, EntryNotFoundError) and status == 404:
        remedy = "It has no model.safetensors, or the Hub did not respond: see the log above."
    elif status in (401, 403, 404):
        remedy = "Check the name. A private or gated repository needs `hf auth login`, or a token in HF_TOKEN."
    else:
        remedy = (
            f"Try again later. Without network, download https://huggingface.co/{repo} elsewhere and pass its weights: "
            f"timm.create_model('{name}', pretrained=True, pretrained_cfg_overlay=dict(file='model.safetensors')), or "
            "set HF_HOME to a folder whose hub cache holds the repository."
        )
    return RuntimeError(
        f"Could not get the {what} of '{hub_id}' from the Hugging Face Hub or its local cache ({reason}). {remedy}"
    )
