"""`config.json` of a timm folder, and the provenance of weights: their licence and their base model on the Hub.

A licence travels in `pretrained_cfg["license"]` of a timm folder's `config.json`, and so through timm's factory. Values
for which timm has no field are in the section `training` of that file, which timm ignores (see `checkpoint.card`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..config import read_json
from ..console import closest
from ..data import Pixels
from ..data.formats.pixels import STANDARDIZE
from ..hub_errors import HUB_ERRORS, hub_error

WEIGHTS = "model.safetensors"
OFFICIAL_LICENSE = "cc-by-nc-4.0"  # of all weights that the authors published


# ----------------------------------------------------------------------------------------------- types of config.json


class ConfigError(ValueError):
    """A value in a `config.json` has the wrong type. The message names the file, the key, the value and the type."""


_Test = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: int = 1, most: int = 2**31 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _list(test: _Test, length: int | None = None) -> _Test:
    """A test for a list that is not empty, of this length if given."""
    return lambda v: isinstance(v, list) and len(v) == (length or len(v) or 1) and all(map(test, v))


def _table(test: _Test = lambda _: True) -> _Test:
    return lambda v: isinstance(v, dict) and all(map(test, v.values()))


_strings = _table(lambda v: isinstance(v, str))
# the types by the words for them in messages
_TYPES: dict[str, _Test] = {
    "a string without a line break": _line,
    "true or false": lambda v: isinstance(v, bool),
    "a number": _number,
    "a number above 0": _positive,
    "a number from 0 to 1": lambda v: _number(v) and 0 <= v <= 1,
    "a number, or 'nan', 'inf' or '-inf'": lambda v: _number(v) or v in ("nan", "inf", "-inf"),
    "a whole number from 0": lambda v: _whole(v, 0),
    "a whole number from 1": _whole,
    "a whole number from 0, or 'channels'": lambda v: v == "channels" or _whole(v, 0),
    "a whole number, or 2: height, width": lambda v: _whole(v) or _list(_whole, 2)(v),
    "a whole number, or 4, one per stage": lambda v: _whole(v) or _list(_whole, 4)(v),
    "2 whole numbers: height, width": _list(_whole, 2),
    "3 whole numbers: channels, height, width": _list(_whole, 3),
    # a model is built before its weights are compared: larger ones would fill the memory first
    "a whole number from 0 to 128": lambda v: _whole(v, 0, 128),
    "a whole number from 1 to 8192": lambda v: _whole(v, 1, 8192),
    "4 whole numbers from 1 to 128, one per stage": _list(lambda v: _whole(v, 1, 128), 4),
    "4 whole numbers from 1 to 8192, one per stage": _list(lambda v: _whole(v, 1, 8192), 4),
    "a list of numbers, one per channel": _list(_number),
    "a list of numbers above 0, one per channel": _list(_positive),
    "a list of numbers or null, one per class": lambda v: v == [] or _list(lambda w: w is None or _number(w))(v),
    "'channel' or 'image'": lambda v: v in STANDARDIZE,
    "'file', or a centre and a width": lambda v: v == "file" or _list(_number, 2)(v),
    "a string or a list of strings": lambda v: isinstance(v, str) or _list(_line)(v),
    "a list of strings": lambda v: v == [] or _list(_line)(v),
    "a list or a table of strings": lambda v: v == [] or _list(lambda w: isinstance(w, str))(v) or _strings(v),
    "a table": _table(),
    "a table of strings": _strings,
    "a table of strings and numbers": _table(lambda v: isinstance(v, str | int | float | None)),
}
_LABELS = {"label_names": "a list or a table of strings", "label_descriptions": "a table of strings"}
# per section: keys and the words for their type
_SECTIONS = {
    "": _LABELS
    | {
        "architecture global_pool": "a string without a line break",
        "num_classes": "a whole number from 0",
        "num_features": "a whole number from 1",
        "model_args pretrained_cfg": "a table",
    },
    "pretrained_cfg": _LABELS  # the part of timm's PretrainedCfg that this package or timm's factory and transforms use
    | {
        "input_size test_input_size min_input_size": "3 whole numbers: channels, height, width",
        "pool_size test_pool_size": "2 whole numbers: height, width",
        "crop_pct test_crop_pct": "a number above 0",
        "fixed_input_size custom_load": "true or false",
        "interpolation crop_mode license origin_url tag paper_name": "a string without a line break",
        "architecture hf_hub_id hf_hub_filename url file source description": "a string without a line break",
        "first_conv classifier paper_ids": "a string or a list of strings",
        "mean": "a list of numbers, one per channel",
        "std": "a list of numbers above 0, one per channel",
        "num_classes label_offset": "a whole number from 0",
    },
    "model_args": {  # of the models in this package
        "depths": "4 whole numbers from 1 to 128, one per stage",
        "dims": "4 whole numbers from 1 to 8192, one per stage",
        "patch_size in_chans decoder_dim output_stride": "a whole number from 1 to 8192",
        "decoder_depth": "a whole number from 0 to 128",
        "num_classes": "a whole number from 0",
        "global_pool": "a string without a line break",
        "drop_path_rate drop_rate mask_ratio": "a number from 0 to 1",
        "norm_pix_loss conv_mlp conv_bias use_grn head_norm_first": "true or false",
        "img_size": "a whole number, or 2: height, width",
        "ls_init_value": "a number",
        "kernel_sizes": "a whole number, or 4, one per stage",
    },
    "training": {  # see `checkpoint.card`
        "made_with": "a table of strings",
        "table": "a table of strings and numbers",
        "base_model inherited_license": "a string without a line break",
        "datasets": "a list of strings",
        "metrics pixels": "a table",
    },
    "training.metrics": {"top1 top5 loss": "a number", "dataset dataset_id split": "a string without a line break"},
    "training.pixels": {  # see `data.Pixels`
        "nodata": "a number, or 'nan', 'inf' or '-inf'",
        "divide": "a number above 0",
        "clip_low clip_high": "a list of numbers, one per channel",
        "pages": "a whole number from 0, or 'channels'",
        "dicom_window": "'file', or a centre and a width",
        "standardize": "'channel' or 'image'",
    },
}
MODEL_ARGS = _SECTIONS["model_args"]
# timm leaves these keys out when they are unset; null would reach its factory as a value
_NOT_NULL = set(
    "architecture model_args pretrained_cfg num_classes input_size fixed_input_size mean std interpolation crop_pct "
    f"crop_mode custom_load {' '.join(MODEL_ARGS)}".split()
)


def _refuse(where: str | Path, key: str, value: Any, expected: str) -> NoReturn:
    text = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
    raise ConfigError(
        f"'{where}' has {key} = {text} ({type(value).__name__}), expected {expected}. Correct it, or export the model "
        "again."
    )


def check_types(
    where: str | Path, values: dict[str, Any], section: dict[str, str], prefix: str, needed: str = ""
) -> None:
    """Checks the values of one table; null is allowed if timm allows it, and `needed` keys must be there."""
    for keys, expected in section.items():
        for key in keys.split():
            value = values.get(key)
            unset = key not in values or value is None and key not in _NOT_NULL
            if (not unset or key in needed.split()) and not _TYPES[expected](value):
                _refuse(where, f"{prefix}{key}", value, expected)


def check_training(where: str | Path, config: dict[str, Any], chans: int | None = None) -> None:
    """Checks the section `training` of any `config.json`; its record of pixels must suit the channels."""
    training = training_of(config)
    check_types(where, training, _SECTIONS["training"], "training.")
    check_types(where, training.get("metrics") or {}, _SECTIONS["training.metrics"], "training.metrics.")
    pixels = training.get("pixels") or {}
    check_types(where, pixels, _SECTIONS["training.pixels"], "training.pixels.")
    known = " ".join(_SECTIONS["training.pixels"]).split()
    for key in pixels.keys() - set(known):  # an unknown preparation of pixels must not be ignored
        _refuse(where, f"training.pixels.{key}", pixels[key], f"one of {', '.join(known)}")
    try:
        Pixels.from_record(pixels).check(chans or len(pixels.get("clip_low") or [0]))
    except ValueError as e:
        raise ConfigError(f"'{where}' has training.pixels = {pixels}: {e}") from e


# -------------------------------------------------------------------------------------------------- reading config.json


def is_ours(architecture: object) -> bool:
    """Whether timm has a ConvNeXt V2 or an FCMAE of this name."""
    name = str(architecture)
    return name.startswith(("convnextv2_", "fcmae_convnextv2_")) and "." not in name and timm.is_model(name)


def training_of(config: dict[str, Any]) -> dict[str, Any]:
    """The section `training` of a `config.json`; empty if this package did not write it."""
    training = config.get("training")
    return training if isinstance(training, dict) else {}


def read_object(path: Path) -> dict[str, Any]:
    """The object in the `config.json` of a folder of a model; a ValueError without one."""
    if not path.is_file():
        missing = f"it has no {path.name}" if path.parent.is_dir() else "it does not exist"
        raise ValueError(f"'{path.parent}' is not the folder of a model: {missing}.")
    try:
        config = read_json(path)
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"'{path}' cannot be read as JSON: {e}") from e
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' holds a {type(config).__name__}, expected an object in timm's format.")
    return config


def read_config(path: str | Path, ours: bool = True) -> dict[str, Any]:
    """Reads and checks the `config.json` of a timm folder; with `ours` only that of a ConvNeXt V2 or an FCMAE.

    Raises:
        ValueError: The file is missing or not in timm's format.
        ConfigError: (a ValueError) A value has the wrong type.
    """
    return check_config(read_object(Path(path)), path, ours)


def check_config(config: dict[str, Any], path: str | Path, ours: bool = True) -> dict[str, Any]:
    """The content of a `config.json`, if it is in timm's format; see `read_config`."""
    name = config.get("architecture")
    if not is_ours(name) and (ours or not isinstance(name, str)):
        found = f"names the architecture {name!r}" if name else "names no architecture"
        expected = "convnextv2_* or fcmae_convnextv2_*" if ours else "one"
        raise ValueError(f"'{path}' does not describe a model in timm's format: it {found}, expected {expected}.")
    check_types(path, config, _SECTIONS[""], "")
    nested = "pretrained_cfg" in config  # timm's first format was flat
    cfg = config["pretrained_cfg"] if nested else config
    check_types(path, cfg, _SECTIONS["pretrained_cfg"], "pretrained_cfg." if nested else "")
    if is_ours(name):
        check_types(path, config.get("model_args", {}), MODEL_ARGS, "model_args.")
    chans = (cfg.get("input_size") or [None])[0]
    for key in ("mean", "std"):
        values = cfg.get(key)
        if values is not None and chans is not None and len(values) not in (1, 3, chans):
            _refuse(path, f"pretrained_cfg.{key}", values, f"one number, or {chans}, one per channel")
    check_training(path, config, chans)
    return config


def config_beside(pretrained_cfg: dict[str, Any], cache_dir: str | Path | None = None) -> dict[str, Any] | None:
    """The `config.json` beside the `file` or in the `hf_hub_id` of a timm `pretrained_cfg`; None without one.

    Raises:
        ConfigError: (a ValueError) A value has the wrong type: ignoring the file would lose licence and options.
        HubError: (a RuntimeError) The Hub does not deliver.
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
    except ConfigError:
        raise
    except LocalEntryNotFoundError as e:  # without a network nothing is known about the repository
        raise hub_error(e, hub_id or "", "config.json") from e
    except (ValueError, EntryNotFoundError):
        return None
    except HUB_ERRORS as e:
        if file:
            raise
        raise hub_error(e, hub_id or "", "config.json") from e
    return None


# ------------------------------------------------------------------------------------------------ licence and origin

# Ids of licences on the Hub: https://huggingface.co/docs/hub/repositories-licenses, as of June 2026
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
    """The provenance that weights pass on to weights trained from them."""

    license: str | None = None  # licence by its id on the Hub; None if nothing states one
    base_model: str | None = None  # the model on the Hub that training started from, `user/name`
    url: str | None = None  # home of the code behind the published weights, if training started from those
    unstated: str | None = None  # file of weights of unknown authors without a stated licence


def origin_of_config(config: dict[str, Any], hub_id: str | None = None) -> Origin:
    """The provenance of weights by their `config.json` or `pretrained_cfg`, and their name on the Hub if any."""
    cfg = config.get("pretrained_cfg", config)
    license, url = cfg.get("license"), cfg.get("origin_url")
    hub_id = hub_id.partition("@")[0] if hub_id else None
    if license is None:  # the config.json of timm's own repositories on the Hub may lack the licence
        tagged = f"{config.get('architecture') or cfg.get('architecture')}.{cfg.get('tag')}"
        published = hub_id.removeprefix("timm/") if hub_id and hub_id.startswith("timm/") else tagged
        if published in timm.list_models("convnextv2_*", pretrained=True):
            known: Any = timm.get_pretrained_cfg(published)
            license, url = known.license, known.origin_url
    return Origin(license, hub_id or training_of(config).get("base_model"), url)


def origin_of_file(path: Path, names: Iterable[str], run: Mapping[str, Any] | None = None) -> Origin:
    """The provenance of the weights in a file, by the `config.json` beside it.

    Without one, weights whose `names` are the official ones have the licence of the published weights, and a
    pretraining run that started from random weights states its own. `run` has the settings of the pretraining run that
    wrote the file, whose `config.json` lies in `encoder/`; None for other files.
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
    if run is None and config and training_of(config):  # this package exported it, from weights without a licence
        return origin
    return origin._replace(unstated=str(path))


def resolve_license(asked: str | None, inherited: str | None, unstated: str | None = None) -> str | None:
    """The licence of weights: the inherited one if there is one, otherwise the one that the user asks for.

    `unstated` is the file of the weights training started from if nothing states its licence; then one must be asked.

    Raises:
        ValueError: The licence contradicts the inherited one or is not an id of the Hub; or none is known.
    """
    if unstated and not inherited and not asked:
        raise ValueError(
            f"'{unstated}' has no config.json beside it that states the licence of these weights, which also applies "
            f"to weights trained from them. State it: --license ID ({OFFICIAL_LICENSE} for the published weights)."
        )
    if asked == "other" and inherited != "other":
        raise ValueError(
            "license='other' is not enough: the Hub needs a name and the text. Export without a licence, add the text "
            "as LICENSE, and `license: other`, `license_name`, `license_link` to the README's head. Or name a licence "
            "that the Hub lists, such as mit, apache-2.0 or cc-by-4.0."
        )
    if asked is not None and asked not in LICENSES and asked != inherited:
        raise ValueError(
            f"license='{asked}' is not the id of a licence on the Hugging Face Hub."
            f"{closest(asked.lower().replace(' ', '-'), LICENSES)} Examples: mit, apache-2.0, cc-by-4.0; all: "
            "https://huggingface.co/docs/hub/repositories-licenses"
        )
    if inherited and asked not in (None, inherited):
        raise ValueError(
            f"license='{asked}', but training started from weights under {inherited}, which still applies. Leave the "
            "licence out or train from scratch. If those weights are yours, change it in their config.json first."
        )
    return inherited or asked
