"""Where weights come from, as far as the files tell: the licence that stays with them, and their base model on the Hub.

A licence travels in `pretrained_cfg["license"]` of a timm folder's `config.json`, and so through timm's factory. What
timm has no field for is in the section `training` of that file, which timm ignores (see `checkpoint.card`).
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError


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


WEIGHTS = "model.safetensors"


OFFICIAL_LICENSE = "cc-by-nc-4.0"  # of all weights that the authors published


_HTTP_ERRORS: Any = HfHubHTTPError.__bases__


# Ids of licences that the Hub knows: https://huggingface.co/docs/hub/repositories-licenses, as of June 2026
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1
    ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3
    llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
    """.split()
)


class Origin(NamedTuple):
    """What weights hand on to those that are trained from them.

    Attributes:
        license: Licence by its id on the Hub; None where nothing states one.
        base_model: The model on the Hub that training started from, `user/name`; None where there is none.
        url: Home of the code that made the published weights, where they are the origin.
        unstated: File of weights that others may have made, where nothing states its licence; None where there is none.
    """

    license: str | None = None
    base_model: str | None = None
    url: str | None = None
    unstated: str | None = None


def is_ours(architecture: object) -> bool:
    """Whether timm, with this package, has a ConvNeXt V2 or an FCMAE of this name."""
    name = str(architecture)
    return name.startswith(("convnextv2_", "fcmae_convnextv2_")) and "." not in name and timm.is_model(name)


def read_config(path: str | Path, ours: bool = True) -> dict[str, Any]:
    """The `config.json` of a timm folder.

    Args:
        path: Of the file.
        ours: Take a ConvNeXt V2 or FCMAE only; else any architecture.

    Raises:
        ValueError: No such file, or not one in timm's format.
        ConfigError: (a ValueError) A value has another type than its key wants.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"'{path.parent}' is no timm folder: it has no {path.name}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"'{path}' cannot be read as JSON: {e}") from e
    name = config.get("architecture") if isinstance(config, dict) else None
    if not is_ours(name) and (ours or not isinstance(name, str)):
        what = f"names the architecture {name!r}" if name else "names no architecture"
        raise ValueError(
            f"'{path}' is not {'of a ConvNeXt V2 ' * ours}in timm's format: it {what}, and convnextv2_* or "
            "fcmae_convnextv2_* was expected. The export functions of timm_convnextv2.checkpoint write such files."
        )
    check_config(config, str(path), ours=is_ours(name))
    return config


def config_beside(pretrained_cfg: dict[str, Any], cache_dir: str | Path | None = None) -> dict[str, Any] | None:
    """The `config.json` of the timm folder that the weights of a timm `pretrained_cfg` lie in, if there is one.

    Args:
        pretrained_cfg: With a `file` (weights, or a folder of `local-dir:`), or an `hf_hub_id`.
        cache_dir: As in `timm.create_model`.

    Raises:
        ConfigError: (a ValueError) It is there, and a value has another type than its key wants.
        OSError, huggingface_hub.errors.HfHubHTTPError: The Hub cannot be reached.
    """
    file, hub_id = pretrained_cfg.get("file"), pretrained_cfg.get("hf_hub_id")
    try:
        if file:
            file = Path(file)
            if not file.is_dir() and file.name != WEIGHTS:  # any other file has no folder of its own
                return None
            return read_config((file if file.is_dir() else file.parent) / "config.json")
        if hub_id:
            name, _, revision = hub_id.partition("@")
            return read_config(hf_hub_download(name, "config.json", revision=revision or None, cache_dir=cache_dir))
    except LocalEntryNotFoundError:  # no network: that says nothing about the repository
        raise
    except ConfigError:  # it is there, and without it licence and options would be lost
        raise
    except (ValueError, EntryNotFoundError):
        return None
    except (OSError, HfHubHTTPError):
        raise
    except _HTTP_ERRORS as e:  # of the HTTP library: the connection broke in mid-download
        raise ConnectionError(f"{type(e).__name__}: {e}") from e
    return None


def origin_of_config(config: dict[str, Any], hub_id: str | None = None) -> Origin:
    """What weights in a timm folder hand on.

    Args:
        config: The folder's `config.json`, or a `pretrained_cfg` alone.
        hub_id: The folder's name on the Hub, if it came from there.
    """
    cfg = config.get("pretrained_cfg", config)
    license, url = cfg.get("license"), cfg.get("origin_url")
    hub_id = hub_id.partition("@")[0] if hub_id else None
    if license is None:  # a published model: config.json in timm's repositories on the Hub may leave the licence out
        tagged = f"{config.get('architecture') or cfg.get('architecture')}.{cfg.get('tag')}"
        published = hub_id.removeprefix("timm/") if hub_id and hub_id.startswith("timm/") else tagged
        if published in timm.list_models("convnextv2_*", pretrained=True):
            known: Any = timm.get_pretrained_cfg(published)
            license, url = known.license, known.origin_url
    return Origin(license, hub_id or training_of(config).get("base_model"), url)


def origin_of_file(path: Path, names: Iterable[str], run: Mapping[str, Any] | None = None) -> Origin:
    """What the weights in a file hand on.

    The licence is the one in the `config.json` that belongs to the file. Without one, weights under the official names
    have that of the published ones, and what a pretraining run of this package made from random weights is its own. Of
    all others it is unstated.

    Args:
        path: Of the file; its `config.json` lies beside it, that of a pretraining run in its `encoder/`.
        names: Of the tensors in it.
        run: Settings of the pretraining run that it is a checkpoint of; None for other files.

    Raises:
        ConfigError: (a ValueError) The `config.json` has a value of another type than its key wants.
    """
    folder = path.parent if run is None else path.parent / "encoder"
    config = config_beside({"file": folder / WEIGHTS})
    origin = origin_of_config(config) if config else Origin()
    if origin.license:
        return origin
    if any(name.removeprefix("module.").removeprefix("encoder.").startswith("downsample_layers.") for name in names):
        return origin._replace(license=OFFICIAL_LICENSE)
    if run is not None and (run.get("license") or not run.get("pretrained")):
        return origin._replace(license=run.get("license") or None)
    if run is None and config and training_of(config):  # made by this package, from weights that had no licence either
        return origin
    return origin._replace(unstated=str(path))


def pixels_of_model(name: str) -> dict[str, Any]:
    """The record of how stored values became pixels, see `data.Pixels`; empty where they did so in the usual way.

    Args:
        name: Of a model for timm's factory; a folder or a repository of the Hub has a record, others have none.

    Raises:
        ConfigError, OSError, huggingface_hub.errors.HfHubHTTPError: See `config_beside`.
    """
    source, _, place = name.partition(":")
    if source not in ("local-dir", "hf-hub", "hf_hub"):
        return {}
    config = config_beside({"file": place} if source == "local-dir" else {"hf_hub_id": place})
    return training_of(config or {}).get("pixels") or {}


def training_of(config: dict[str, Any]) -> dict[str, Any]:
    """The section `training` of a `config.json`, empty where this package did not write it."""
    training = config.get("training")
    return training if isinstance(training, dict) else {}


def resolve_license(asked: str | None, inherited: str | None, unstated: str | None = None) -> str | None:
    """The licence of weights: the one that they inherited stays, else the one asked for.

    Args:
        asked: What the user names.
        inherited: That of the weights training started from, see `Origin`.
        unstated: The file that they came from, where nothing states its licence; then one must be asked for.

    Raises:
        ValueError: Another licence than the inherited one is asked for, or something that is no licence's id; or none
            is known.
    """
    if unstated and not inherited and not asked:
        raise ValueError(
            f"'{unstated}' has no config.json beside it that states the licence of these weights, which stays with "
            f"what is trained from them. State it: --license ID, which is {OFFICIAL_LICENSE} for the published "
            "ConvNeXt V2 weights."
        )
    if asked == "other" and inherited != "other":
        raise ValueError(
            "license='other' says nothing by itself: the Hub wants a name and the text with it. Export without a "
            "licence, add the text as a file LICENSE, and write into the README's first lines `license: other`, "
            "`license_name` and `license_link`. Or name one that the Hub knows, such as mit, apache-2.0 or cc-by-4.0."
        )
    if asked is not None and asked not in LICENSES and asked != inherited:
        near = difflib.get_close_matches(asked.lower().replace(" ", "-"), LICENSES, n=1, cutoff=0.6)
        raise ValueError(
            f"license='{asked}' is not the id of a licence on the Hugging Face Hub."
            + (f" Did you mean '{near[0]}'?" if near else "")
            + " Examples: mit, apache-2.0, cc-by-4.0, cc-by-nc-4.0; all: "
            "https://huggingface.co/docs/hub/repositories-licenses"
        )
    if inherited and asked not in (None, inherited):
        raise ValueError(
            f"license='{asked}', but training started from weights under {inherited}, which stays. Leave license "
            "out, or train from scratch (pretrained=False). If those weights are your own, give them the new licence "
            "first: 'license' in their config.json."
        )
    return inherited or asked
