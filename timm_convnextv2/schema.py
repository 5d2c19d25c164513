"""Types of what is read in a timm folder's `config.json`: anybody may have written it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["ConfigError", "check_config"]


class ConfigError(ValueError):
    """A `config.json` holds a value of another type than is expected there. Names the file, the key and both."""


class _Kind(NamedTuple):
    """What a value must be.

    Attributes:
        word: For the message.
        test: Whether it is.
    """

    word: str
    test: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _all(test: Callable[[Any], bool], lengths: range = range(1, 10**6)) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) in lengths and all(map(test, value))


_TEXT = _Kind("a string", lambda v: isinstance(v, str))
_NAME = _Kind("a string without a line break", lambda v: isinstance(v, str) and v.isprintable())
_FLAG = _Kind("true or false", lambda v: isinstance(v, bool))
_TABLE = _Kind("a table", lambda v: isinstance(v, dict))
_COUNT = _Kind("a whole number from 1", _is_count)
_FROM_ZERO = _Kind("a whole number from 0", lambda v: _is_count(v, 0))
_SHARE = _Kind("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
_POSITIVE = _Kind("a number above 0", lambda v: _is_number(v) and v > 0)
_SIZE = _Kind("3 whole numbers: channels, height, width", _all(_is_count, range(3, 4)))
_PAIR = _Kind("2 whole numbers: height, width", _all(_is_count, range(2, 3)))
_SIDE = _Kind("a whole number, or 2: height, width", lambda v: _is_count(v) or _PAIR.test(v))
_MEAN = _Kind("a list of numbers, one a channel", _all(_is_number))
_STD = _Kind("a list of numbers above 0, one a channel", _all(_POSITIVE.test))
_STAGES = _Kind("4 whole numbers, one a stage", _all(_is_count, range(4, 5)))
_NAMES = _Kind("a string or a list of strings", lambda v: isinstance(v, str) or _all(_NAME.test)(v))
_NAME_LIST = _Kind("a list of strings", lambda v: _all(_NAME.test, range(10**6))(v))
_LABELS = _Kind("a list or a table of strings", lambda v: _texts(v) or isinstance(v, list) and all(map(_is_text, v)))
_TEXTS = _Kind("a table of strings", lambda v: _texts(v))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


_Keys = dict[str, _Kind]

_TOP: _Keys = {
    "architecture": _NAME,
    "num_classes": _FROM_ZERO,
    "num_features": _COUNT,
    "global_pool": _NAME,
    "label_names": _LABELS,
    "label_descriptions": _TEXTS,
    "model_args": _TABLE,
    "pretrained_cfg": _TABLE,
}
# of timm's PretrainedCfg, what is used here or by timm where it makes a model and its transforms
_CFG: _Keys = {
    **dict.fromkeys(("input_size", "test_input_size", "min_input_size"), _SIZE),
    **dict.fromkeys(("pool_size", "test_pool_size"), _PAIR),
    **dict.fromkeys(("crop_pct", "test_crop_pct"), _POSITIVE),
    **dict.fromkeys(("fixed_input_size", "custom_load"), _FLAG),
    **dict.fromkeys(("interpolation", "crop_mode", "license", "origin_url", "tag", "paper_name"), _NAME),
    **dict.fromkeys(("architecture", "hf_hub_id", "hf_hub_filename", "url", "file", "source", "description"), _NAME),
    **dict.fromkeys(("first_conv", "classifier", "paper_ids"), _NAMES),
    "mean": _MEAN,
    "std": _STD,
    "num_classes": _FROM_ZERO,
    "label_offset": _FROM_ZERO,
    "label_names": _LABELS,
    "label_descriptions": _TEXTS,
}
_ARGS: _Keys = {  # of our models
    "depths": _STAGES,
    "dims": _STAGES,
    "patch_size": _COUNT,
    "in_chans": _COUNT,
    "num_classes": _FROM_ZERO,
    "global_pool": _NAME,
    "drop_path_rate": _SHARE,
    "drop_rate": _SHARE,
    "mask_ratio": _SHARE,
    "decoder_depth": _FROM_ZERO,
    "decoder_dim": _COUNT,
    "norm_pix_loss": _FLAG,
    "img_size": _SIDE,
    "ls_init_value": _Kind("a number", _is_number),
    "output_stride": _COUNT,
    "kernel_sizes": _Kind("a whole number, or 4", lambda v: _is_count(v) or _STAGES.test(v)),
    **dict.fromkeys(("conv_mlp", "conv_bias", "use_grn", "head_norm_first"), _FLAG),
}
_TRAINING: _Keys = {  # see `checkpoint.card`
    "made_with": _TEXTS,
    "table": _Kind("a table of strings and numbers", lambda v: isinstance(v, dict) and all(map(_is_cell, v.values()))),
    "base_model": _NAME,
    "datasets": _NAME_LIST,
    "metrics": _TABLE,
    "inherited_license": _NAME,
    "pixels": _TABLE,
}
_PIXELS: _Keys = {  # see `data.Pixels`
    "nodata": _Kind("a number, or 'nan', 'inf' or '-inf'", lambda v: _is_number(v) or v in ("nan", "inf", "-inf")),
    "divide": _POSITIVE,
    "clip_low": _MEAN,
    "clip_high": _MEAN,
    "pages": _Kind("a page's number, or 'channels'", lambda v: v == "channels" or _is_count(v, 0)),
    "dicom_window": _Kind(
        "'file', or a centre and a width",
        lambda v: v == "file" or isinstance(v, list) and len(v) == 2 and all(map(_is_number, v)),
    ),
}
_METRICS: _Keys = {
    **dict.fromkeys(("top1", "top5", "loss"), _Kind("a number", _is_number)),
    **dict.fromkeys(("dataset", "dataset_id", "split"), _NAME),
}
# Where nothing is given these are left out; null would reach timm as a value.
_NOT_NULL = ("architecture", "model_args", "pretrained_cfg", "num_classes", "input_size", "fixed_input_size", "mean")
_NOT_NULL += ("std", "interpolation", "crop_pct", "crop_mode", "custom_load", *_ARGS)


def _is_cell(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)


def check_config(config: dict[str, Any], where: str, ours: bool) -> None:
    """Every value that is used has the type that its key wants; null where timm allows it.

    Args:
        config: A `config.json` in timm's format.
        where: Its path, for the message.
        ours: It is of a ConvNeXt V2 or FCMAE: `model_args` are checked too. Those of others are theirs.

    Raises:
        ConfigError: A value has another type.
    """
    _check(config, _TOP, "", where)
    if "pretrained_cfg" in config:
        _check(config["pretrained_cfg"], _CFG, "pretrained_cfg.", where)
    else:  # timm's first format
        _check(config, _CFG, "", where)
    if ours:
        _check(config.get("model_args", {}), _ARGS, "model_args.", where)
    training = config.get("training")
    if isinstance(training, dict):  # anything else is not of this package, see `provenance.training_of`
        _check(training, _TRAINING, "training.", where)
        _check(training.get("metrics") or {}, _METRICS, "training.metrics.", where)
        _check_pixels(training.get("pixels") or {}, config.get("pretrained_cfg", config), where)
    _check_channels(config.get("pretrained_cfg", config), where)


def _check(values: dict[str, Any], keys: _Keys, prefix: str, where: str) -> None:
    for key, kind in keys.items():
        value = values.get(key)
        missing = key not in values or value is None and key not in _NOT_NULL
        if not missing and not kind.test(value):
            _refuse(where, f"{prefix}{key}", value, kind.word)


def _check_channels(cfg: dict[str, Any], where: str) -> None:
    """Mean and standard deviation are of the channels of the image."""
    chans = (cfg.get("input_size") or [None])[0]
    for key in ("mean", "std"):
        values = cfg.get(key)
        if values is not None and chans is not None and len(values) not in (1, 3, chans):
            _refuse(where, f"pretrained_cfg.{key}", values, f"one number, or {chans}, one a channel")


def _check_pixels(pixels: dict[str, Any], cfg: dict[str, Any], where: str) -> None:
    """Limits come in pairs, in order, and are of the channels of the image; what is not known is not left out."""
    _check(pixels, _PIXELS, "training.pixels.", where)
    for key in pixels.keys() - _PIXELS.keys():
        _refuse(where, f"training.pixels.{key}", pixels[key], f"one of {', '.join(_PIXELS)}")
    chans = (cfg.get("input_size") or [None])[0]
    low, high = (pixels.get(key) for key in ("clip_low", "clip_high"))
    if low is None and high is None:
        return
    if low is None or high is None or len(low) != len(high) or not all(a < b for a, b in zip(low, high, strict=True)):
        _refuse(where, "training.pixels.clip_high", high, f"a number above each of clip_low = {low}")
    elif chans is not None and len(low) not in (1, chans):
        _refuse(where, "training.pixels.clip_low", low, f"one number, or {chans}, one a channel")


def _refuse(where: str, key: str, value: Any, expected: str) -> None:
    text = repr(value)
    text = text if len(text) < 80 else f"{text[:77]}..."
    raise ConfigError(
        f"'{where}' has {key} = {text} ({type(value).__name__}), expected {expected}. Correct it, or export the model "
        "again."
    )
