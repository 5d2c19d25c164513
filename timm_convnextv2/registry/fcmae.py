"""`fcmae_convnextv2_*` in timm's registry: configs, weight filter, options of a start folder, entrypoints."""

import inspect
import logging
from typing import Any

import torch
from timm.models import generate_default_cfgs
from timm.models.convnext import ConvNeXt

from ..models.fcmae import FCMAE
from ..models.variants import VARIANTS, layer_decay_type, register_variants, variant_options
from ..models.weights import check_weights
from .convnextv2 import build_model, filter_weights
from .convnextv2 import default_cfgs as encoder_cfgs

_logger = logging.getLogger(__name__)


def _provenance() -> Any:
    from ..checkpoint import provenance  # on use: `import timm_convnextv2` must not import cards and the Hub's client

    return provenance


def _fcmae_cfg(name: str) -> dict:
    """Pretrained cfg of `fcmae_convnextv2_{name}`: the published encoder, if there is one."""
    published = encoder_cfgs[f"convnextv2_{name}"].cfgs.get("fcmae")
    cfg = {"input_size": (3, 224, 224), "interpolation": "bicubic"}
    if published is not None:
        cfg = {**published.to_dict(), "url": None, "hf_hub_id": f"timm/convnextv2_{name}.fcmae"}
    return {**cfg, "num_classes": 0, "first_conv": "encoder.stem.0", "classifier": None}


def _options_of(state_dict: dict[str, torch.Tensor]) -> dict[str, int]:
    """The options of an FCMAE that follow from the shapes of its weights."""
    stem = state_dict["encoder.stem.0.weight"]
    return {
        "in_chans": stem.shape[1],
        "patch_size": stem.shape[-1],
        "decoder_dim": state_dict["mask_token"].shape[1],
        "decoder_depth": len({k.split(".")[1] for k in state_dict if k.startswith("decoder.")}),
    }


def _filter_fn(state_dict: dict[str, torch.Tensor], model: FCMAE) -> dict[str, torch.Tensor]:
    """Whole FCMAE weights: those of an FCMAE unchanged, an encoder's with a fresh decoder.

    Raises:
        ValueError: The weights do not cover the encoder, or belong to an FCMAE of another shape.
    """
    own = model.state_dict()
    if "encoder.stem.0.weight" in state_dict and "mask_token" in state_dict:
        there, here = _options_of(state_dict), _options_of(own)
        options = "; ".join(f"{k}={v} in the file, {here[k]} requested" for k, v in there.items() if v != here[k])
        what = f"The FCMAE weights do not fit the requested model ({options or 'same options'})"
        remedy = "Leave these options out for the model as it was trained; an encoder alone adapts to other in_chans."
        check_weights(state_dict, own, what, remedy=remedy)
        return state_dict
    loaded = filter_weights(state_dict, model.encoder)
    loaded = {f"encoder.{k}": v for k, v in loaded.items() if not k.startswith("head.")}
    name = model.pretrained_cfg.get("hf_hub_id") or ""
    which = "the published encoder. No decoder was published" if name.startswith("timm/") else "an encoder alone"
    _logger.warning(f"Loaded {which}: the decoder starts from random weights.")
    return {**own, **loaded}


def _create_fcmae(
    variant: str, pretrained: bool = False, start_config: dict[str, Any] | None = None, **kwargs
) -> FCMAE:
    """`start_config` is the config.json beside the weights, if the caller has read it."""
    if kwargs.pop("features_only", False):
        raise ValueError(f"features_only=True needs a backbone: use '{variant.removeprefix('fcmae_')}'.")
    overlay = kwargs.get("pretrained_cfg_overlay")
    if pretrained and overlay:
        # timm does not read the config.json beside these weights
        start_config = start_config or _provenance().config_beside(overlay, kwargs.get("cache_dir"))
        kwargs = _with_options_of(start_config, variant, kwargs) if start_config else kwargs
    options = {"pretrained_filter_fn": _filter_fn, "kwargs_filter": ("global_pool",), **kwargs}
    model: Any = build_model(FCMAE, variant, pretrained, **options)
    if pretrained and model.pretrained_cfg.get("file") and start_config is None:
        start_config = _provenance().config_beside(model.pretrained_cfg)  # timm itself parsed a `local-dir:` name
    _describe_encoder(model, variant.removeprefix("fcmae_"), pretrained, start_config, kwargs)
    return model


def _with_options_of(config: dict[str, Any], variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Adds a config.json's model options (unless given), normalisation, licence and origin to `kwargs`."""
    overlay = kwargs["pretrained_cfg_overlay"]
    if config["architecture"] not in (variant, variant.removeprefix("fcmae_")):
        raise ValueError(
            f"The weights in {overlay.get('file') or overlay.get('hf_hub_id')} belong to a {config['architecture']}, "
            f"expected {variant}."
        )
    kwargs, own = dict(kwargs), variant_options(variant.rpartition("_")[2])
    for key, value in config.get("model_args", {}).items():
        given = key in kwargs and not (key in own and kwargs[key] == own[key])
        if key not in ("num_classes", "global_pool") and not given:
            kwargs[key] = tuple(value) if isinstance(value, list) else value
    cfg, origin = config.get("pretrained_cfg", {}), _provenance().origin_of_config(config)
    about = {k: cfg[k] for k in ("input_size", "interpolation", "crop_pct", "mean", "std") if k in cfg}
    about |= {"license": origin.license, "origin_url": origin.url, "tag": cfg.get("tag"), "hf_hub_id": None}
    kwargs["pretrained_cfg_overlay"] = {**about, **overlay}
    return kwargs


def _describe_encoder(
    model: FCMAE, name: str, pretrained: bool, start_config: dict[str, Any] | None, kwargs: dict[str, Any]
) -> None:
    """Sets the attributes that timm's factory would set on `model.encoder`, for `timm.models.save_for_hf`.

    `_model_args` holds the options that differ from the variant `name`. Licence and origin are set only if weights
    were loaded.
    """
    model.encoder.layer_decay_type = layer_decay_type(name)
    source = model.pretrained_cfg
    keep = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
    if pretrained:
        keep += ("license", "origin_url", "paper_name", "paper_ids")
    encoder: Any = model.encoder
    encoder.pretrained_cfg = encoder.default_cfg = {
        **{k: source[k] for k in keep if k in source},
        "architecture": name,
        "num_classes": 0,
        "input_size": (model.in_chans, *model.img_size),
        "fixed_input_size": False,
        "pool_size": model.grid(*model.img_size),
        "first_conv": "stem.0",
        "classifier": "head.fc",
    }
    if pretrained:
        model.base_model = (source.get("hf_hub_id") or "").partition("@")[0] or None
        if source.get("file") and start_config:
            model.base_model = _provenance().origin_of_config(start_config).base_model
    own = variant_options(name.rpartition("_")[2])
    options = inspect.signature(ConvNeXt.__init__).parameters.keys() - {"device", "dtype"}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items() if k in options}
    encoder._model_args = {k: v for k, v in given.items() if k not in own or v != own[k]}


_TAGS = {name: "untrained" if name == "small" else "fcmae" for name in VARIANTS}  # small was never published
default_cfgs = generate_default_cfgs({f"fcmae_convnextv2_{n}.{tag}": _fcmae_cfg(n) for n, tag in _TAGS.items()})
register_variants(__name__, "fcmae_convnextv2_", _create_fcmae)
