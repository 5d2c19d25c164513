"""Checkpoints in and out: the official formats <-> ours, safe loading, export to a timm folder.

Official formats (https://github.com/facebookresearch/ConvNeXt-V2), with stage S, block B:

- *sparse*: a pretraining checkpoint of the MinkowskiEngine code, encoder and decoder. Encoder kernels are `[k * k, C]`
  (depthwise) and `[k * k, Cin, Cout]` with the spatial index column-major, biases `[1, C]`, GRN `[1, 4C]`.
- *dense*: the classifier, or the encoder alone (the published `*_fcmae.pt`); GRN `[1, 1, 1, 4C]`.

Ours are timm's names and shapes. Both directions read one table, `_table`, so that a round trip is exact.
"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models import clean_state_dict
from timm.models._hub import save_config_for_hf
from torch import Tensor

from .convnextv2 import VARIANTS
from .fcmae import FCMAE

__all__ = ["convert_official", "export_encoder", "load_checkpoint", "to_official"]


class _Form(NamedTuple):
    """How one tensor is written on the two sides."""

    to_ours: Callable[[Tensor], Tensor]
    to_official: Callable[[Tensor], Tensor]


def _unroll(kernel: Tensor) -> Tensor:
    """`[k * k, ...]`, spatial index column-major, as `[..., k, k]` with all axes reversed (row before column)."""
    k = math.isqrt(kernel.shape[0])
    return kernel.reshape(k, k, *kernel.shape[1:]).permute(*reversed(range(kernel.ndim + 1)))


def _roll(weight: Tensor) -> Tensor:
    """The inverse of `_unroll`."""
    return weight.permute(*reversed(range(weight.ndim))).flatten(0, 1)


_SAME = _Form(lambda v: v, lambda v: v)
_DEPTHWISE = _Form(lambda v: _unroll(v).unsqueeze(1), lambda v: _roll(v.squeeze(1)))  # [k*k, C] - [C, 1, k, k]
_KERNEL = _Form(_unroll, _roll)  # [k*k, Cin, Cout] - [Cout, Cin, k, k]
_ROW = _Form(lambda v: v.reshape(-1), lambda v: v.reshape(1, -1))  # [1, C] - [C]
_GRN = _Form(lambda v: v.reshape(-1), lambda v: v.reshape(1, 1, 1, -1))  # [1, 1, 1, C] - [C]
_LINEAR = _Form(lambda v: v, lambda v: v.flatten(1))  # [Cout, Cin] - the same
_CONV_1X1 = _Form(lambda v: v[..., None, None], lambda v: v.flatten(1))  # [Cout, Cin] - [Cout, Cin, 1, 1]

_Row = tuple[str, str, _Form]  # official name, our name, form


def _affine(official: str, ours: str, weight: _Form = _SAME, bias: _Form = _SAME) -> Iterator[_Row]:
    yield f"{official}.weight", f"{ours}.weight", weight
    yield f"{official}.bias", f"{ours}.bias", bias


def _block(official: str, ours: str, sparse: bool, mlp: _Form) -> Iterator[_Row]:
    ln, linear = (".ln", ".linear") if sparse else ("", "")
    if sparse:
        yield f"{official}.dwconv.kernel", f"{ours}.conv_dw.weight", _DEPTHWISE
        yield f"{official}.dwconv.bias", f"{ours}.conv_dw.bias", _ROW
    else:
        yield from _affine(f"{official}.dwconv", f"{ours}.conv_dw")
    yield from _affine(f"{official}.norm{ln}", f"{ours}.norm")
    yield from _affine(f"{official}.pwconv1{linear}", f"{ours}.mlp.fc1", mlp)
    yield f"{official}.grn.gamma", f"{ours}.mlp.grn.weight", _ROW if sparse else _GRN
    yield f"{official}.grn.beta", f"{ours}.mlp.grn.bias", _ROW if sparse else _GRN
    yield from _affine(f"{official}.pwconv2{linear}", f"{ours}.mlp.fc2", mlp)


def _table(
    depths: Sequence[int],
    mlp: _Form,
    decoder_depth: int | None = None,
    norm: bool = False,
    head: bool = False,
) -> Iterator[_Row]:
    """Every tensor of a checkpoint: the sparse format where `decoder_depth` is given, else the dense one."""
    sparse = decoder_depth is not None
    prefix = "encoder." if sparse else ""
    yield from _affine(f"{prefix}downsample_layers.0.0", f"{prefix}stem.0")
    yield from _affine(f"{prefix}downsample_layers.0.1", f"{prefix}stem.1")
    for s, depth in enumerate(depths):
        if s > 0:
            official, ours = f"{prefix}downsample_layers.{s}", f"{prefix}stages.{s}.downsample"
            yield from _affine(f"{official}.0.ln" if sparse else f"{official}.0", f"{ours}.0")
            if sparse:
                yield f"{official}.1.kernel", f"{ours}.1.weight", _KERNEL
                yield f"{official}.1.bias", f"{ours}.1.bias", _ROW
            else:
                yield from _affine(f"{official}.1", f"{ours}.1")
        for b in range(depth):
            yield from _block(f"{prefix}stages.{s}.{b}", f"{prefix}stages.{s}.blocks.{b}", sparse, mlp)
    if norm:
        yield from _affine("norm", "head.norm")
    if head:
        yield from _affine("head", "head.fc")
    if sparse:
        yield from _affine("proj", "proj")
        yield "mask_token", "mask_token", _SAME
        for b in range(decoder_depth):
            yield from _block(f"decoder.{b}", f"decoder.{b}", False, _LINEAR)
        yield from _affine("pred", "pred")


def _count(names: Sequence[str], pattern: str) -> int:
    """How many different indices `names` have where `pattern` has its group."""
    return len({m[1] for m in (re.match(pattern, name) for name in names) if m})


def _check_names(found: set[str], expected: set[str], what: str) -> None:
    for names, text in ((found - expected, "unknown"), (expected - found, "missing")):
        if names:
            raise ValueError(
                f"Not {what}: {len(names)} {text} name{'s' if len(names) > 1 else ''}, the first: '{min(names)}'."
            )


def _looks_like(state_dict: dict[str, Any]) -> str:
    """What a dictionary that is not an official ConvNeXt V2 checkpoint seems to be."""
    names = [str(name) for name in state_dict]
    clean = set(clean_state_dict(dict.fromkeys(names)))
    if not names:
        return "it is empty"
    if {"state_dict", "state_dict_ema"} & clean:
        return "it looks like a timm training checkpoint, with the weights in its 'state_dict'"
    if "stem.0.weight" in clean or "encoder.stem.0.weight" in clean:
        return "it has timm's names already and needs no conversion"
    if clean != set(names):
        return "its names begin with a DDP or torch.compile prefix; take it off with timm.models.clean_state_dict"
    if "cls_token" in clean or "patch_embed.proj.weight" in clean:
        return "it looks like a vision transformer (MAE?)"
    if "stages.0.0.gamma" in clean:
        return "it looks like ConvNeXt V1, with layer scale instead of GRN"
    return f"its first names are {', '.join(repr(name) for name in names[:3])}"


def convert_official(state_dict: dict[str, Any], conv_mlp: bool | None = None) -> dict[str, Tensor]:
    """Official weights under our (timm's) names and shapes, ready for a strict `load_state_dict`.

    Args:
        state_dict: A sparse (pretraining) or dense (classifier, encoder alone) official checkpoint, or the whole file
            with the weights in its 'model'.
        conv_mlp: Whether the target writes its token MLPs as 1x1 convolutions, weights `[Cout, Cin, 1, 1]`. Known
            from the stem's width for the published sizes (atto to nano: yes).

    Returns:
        Weights of an `FCMAE` for the sparse format, else of a `ConvNeXtV2`. `head.norm`, which pretraining does not
        have, starts fresh (ones and zeros). Tensors may share memory with those that were given. The published
        weights are CC-BY-NC 4.0 in any format: give `export_encoder` that licence for what is trained from them.

    Raises:
        ValueError: Not an official checkpoint (says what it looks like), an unknown or a missing name, a shape that
            does not fit, or a stem of a width that no published size has and no `conv_mlp`.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"Not an official ConvNeXt V2 checkpoint: a {type(state_dict).__name__}, not a dictionary.")
    if isinstance(state_dict.get("model"), dict):
        state_dict = state_dict["model"]
    stem = "downsample_layers.0.0.weight"
    sparse = f"encoder.{stem}" in state_dict
    prefix = "encoder." if sparse else ""
    if not sparse and stem not in state_dict or f"{prefix}stages.0.0.gamma" in state_dict:
        raise ValueError(f"Not an official ConvNeXt V2 checkpoint: {_looks_like(state_dict)}.")

    width = state_dict[prefix + stem].shape[0]
    if conv_mlp is None:
        known = {args["dims"][0]: args.get("conv_mlp", False) for args in VARIANTS.values()}
        if width not in known:
            raise ValueError(
                f"The stem is {width} wide, and the published sizes have {sorted(known)}: pass conv_mlp, the one of "
                "the model that takes the weights."
            )
        conv_mlp = known[width]

    names = list(state_dict)
    table = list(
        _table(
            [_count(names, rf"{prefix}stages\.{s}\.(\d+)\.") for s in range(4)],
            _CONV_1X1 if conv_mlp else _LINEAR,
            decoder_depth=_count(names, r"decoder\.(\d+)\.") if sparse else None,
            norm="norm.weight" in state_dict and not sparse,
            head="head.weight" in state_dict and not sparse,
        )
    )
    _check_names(set(names), {official for official, _, _ in table}, "an official ConvNeXt V2 checkpoint")
    converted = {}
    for official, ours, form in table:
        try:
            converted[ours] = form.to_ours(state_dict[official]).contiguous()
        except (RuntimeError, AttributeError, IndexError) as e:
            came = getattr(state_dict[official], "shape", type(state_dict[official]).__name__)
            raise ValueError(f"'{official}' of the official checkpoint does not have a shape that fits: {came}.") from e
    if f"{prefix}head.norm.weight" not in converted:
        like = state_dict[prefix + stem]
        last = converted[f"{prefix}stages.3.downsample.1.bias"].shape[0]
        converted[f"{prefix}head.norm.weight"] = like.new_ones(last)
        converted[f"{prefix}head.norm.bias"] = like.new_zeros(last)
    return converted


def to_official(state_dict: dict[str, Tensor], sparse: bool = True) -> dict[str, Tensor]:
    """The reverse of `convert_official`, for the published architecture (any depths, widths and kernel sizes).

    Args:
        state_dict: Weights of an `FCMAE`, or of a `ConvNeXtV2` (always written in the dense format).
        sparse: For an `FCMAE`: True writes the pretraining checkpoint of the MinkowskiEngine code, decoder included;
            False the encoder alone in the dense format, as the published `*_fcmae.pt` have it.

    Returns:
        Official names and shapes. `head.norm` of an `FCMAE` takes no part in pretraining and is left out.

    Raises:
        ValueError: A name that the official architecture does not have (a `patch_size` of 2 adds some), or a missing
            one.
    """
    if "encoder.stem.0.weight" in state_dict:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith("encoder.head.norm.")}
        if not sparse:
            state_dict = {k[len("encoder.") :]: v for k, v in state_dict.items() if k.startswith("encoder.")}
    elif "stem.0.weight" in state_dict:
        sparse = False
    else:
        raise ValueError("Weights of an FCMAE or of a ConvNeXtV2 were expected; there is no stem.0.weight in these.")
    prefix = "encoder." if sparse else ""
    names = list(state_dict)
    table = list(
        _table(
            [_count(names, rf"{prefix}stages\.{s}\.blocks\.(\d+)\.") for s in range(4)],
            _LINEAR,
            decoder_depth=_count(names, r"decoder\.(\d+)\.") if sparse else None,
            norm="head.norm.weight" in state_dict,
            head="head.fc.weight" in state_dict,
        )
    )
    _check_names(set(names), {ours for _, ours, _ in table}, "weights that the official code has a place for")
    return {official: form.to_official(state_dict[ours]).contiguous() for official, ours, form in table}


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a PyTorch or safetensors file to the CPU; nothing in it is ever executed.

    Args:
        path: `*.safetensors`, or a file of `torch.save`, which may hold tensors, plain data and an
            `argparse.Namespace` (as training checkpoints of timm and of the official code do).

    Raises:
        ValueError: No such file, a truncated or foreign file, one whose pickle asks for code, or one that does not
            hold a dictionary. Names the file.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"Checkpoint '{path}' {what}.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        wanted = re.search(r"(?:GLOBAL|global:) (?!GLOBAL)([\w.]+)", str(e))
        if wanted:
            raise ValueError(
                f"Checkpoint '{path}' was refused and not executed: besides tensors and plain data it asks for code, "
                f"{wanted[1]}. Save the state dict alone, best as safetensors."
            ) from e
        raise ValueError(
            f"Checkpoint '{path}' was not read: it is damaged, or not a file of torch.save. Nothing in it was executed."
        ) from e
    except (RuntimeError, EOFError, OSError, ValueError, IndexError, KeyError, SafetensorError) as e:
        raise ValueError(
            f"Checkpoint '{path}' ({path.stat().st_size} bytes) cannot be read: it is truncated, or in another format. "
            f"Copy or download it again. ({type(e).__name__}: {str(e).partition('. ')[0]})"
        ) from e
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint '{path}' holds a {type(content).__name__}; a dictionary of weights was expected.")
    return content


_README = """---
library_name: timm
pipeline_tag: image-feature-extraction
{license_line}tags:
- timm
- image-feature-extraction
- convnextv2
- fcmae
- self-supervised-learning
---
# {architecture}, pretrained with FCMAE

ConvNeXt V2 encoder without classifier, pretrained by [FCMAE](https://arxiv.org/abs/2301.00808) with
`timm_convnextv2` {version}. It is an ordinary [timm](https://github.com/huggingface/pytorch-image-models) model: to
use it, nothing but timm is needed.

```python
import timm
model = timm.create_model("local-dir:path/to/this/folder", pretrained=True, num_classes=10)  # or "hf-hub:user/name"
config = timm.data.resolve_model_data_config(model)  # image size, mean and std of the pretraining
```

`num_classes=0` gives features `[B, {num_features}]`, `features_only=True` the maps of the four stages.

## How it was made

| | |
| --- | --- |
{rows}

## Licence

{license_text}
"""


def _readme(model: FCMAE, license: str | None, rows: dict[str, Any]) -> str:
    from . import __version__

    if license is None:
        text = "Not stated: ask whoever trained the weights."
    elif "license" in model.encoder.pretrained_cfg:
        text = f"{license}. Pretraining started from published weights under this licence, and it stays."
    else:
        text = f"{license}."
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows.items()]
    return _README.format(
        license_line=f"license: {license}\n" if license else "",
        architecture=model.encoder.pretrained_cfg["architecture"],
        version=__version__,
        num_features=model.num_features,
        rows="\n".join(f"| {name} | {value} |" for name, value in cells),
        license_text=text,
    )


def export_encoder(
    model: FCMAE,
    folder: str | os.PathLike,
    *,
    state_dict: dict[str, Tensor] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    img_size: tuple[int, int] | None = None,
    license: str | None = None,
    info: dict[str, Any] | None = None,
) -> Path:
    """Writes the encoder as a timm folder: `config.json`, `model.safetensors`, `README.md`.

    Stock timm opens it as `timm.create_model("local-dir:FOLDER", pretrained=True, ...)`, with a classifier, headless
    or as `features_only`. The files are written beside the folder and moved into it one by one when all are complete;
    other files in the folder stay. In distributed training call it on one rank.

    Args:
        model: From `timm.create_model("fcmae_convnextv2_*", ...)`.
        folder: Where to; it and its parents are made if needed.
        state_dict: Weights of the whole FCMAE to export instead of the model's own (their EMA, a checkpoint);
            prefixes of DDP and torch.compile are taken off.
        mean: Normalisation of the images, one value or one a channel; that of `model.encoder.pretrained_cfg` if None.
        std: Likewise.
        img_size: Image size (H, W) of the pretraining; `model.img_size` if None.
        license: Licence of the weights, by its id on the Hugging Face Hub. None states none. Weights that started from
            the published ones (`pretrained=True`) keep theirs, cc-by-nc-4.0.
        info: How the weights were made (data, epochs, settings), for a table in the README.

    Returns:
        The folder.

    Raises:
        ValueError: A model that timm's factory did not make, weights that do not fit, a licence that contradicts the
            one the weights started from, or a mean or std of another length than 1 and the number of channels.
    """
    encoder = model.encoder
    cfg = getattr(encoder, "pretrained_cfg", None)
    if cfg is None:
        raise ValueError(
            "A timm folder names an architecture, and this FCMAE was not made under one: use "
            "timm.create_model('fcmae_convnextv2_tiny', depths=..., dims=..., ...) instead of FCMAE(...)."
        )
    inherited = cfg.get("license")
    if inherited and license not in (None, inherited):
        raise ValueError(
            f"license='{license}', but pretraining started from weights under {inherited}, which stays. Leave license "
            "out, or pretrain from scratch (pretrained=False)."
        )
    license = license or inherited

    own = encoder.state_dict()
    weights = own
    if state_dict is not None:
        state_dict = clean_state_dict(state_dict)
        weights = {k[len("encoder.") :]: v for k, v in state_dict.items() if k.startswith("encoder.")}
        _check_names(set(weights), set(own), "weights of this FCMAE's encoder")
        for name, value in own.items():
            if weights[name].shape != value.shape:
                raise ValueError(
                    f"encoder.{name} is {list(weights[name].shape)} in state_dict and {list(value.shape)} in the model."
                )
    # safetensors wants contiguous tensors, channels_last weights are not
    weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    img_size = tuple(img_size or model.img_size)
    data = {"input_size": (model.in_chans, *img_size)}
    for key, value in (("mean", mean), ("std", std)):
        if value is not None:
            if len(value) not in (1, model.in_chans):
                raise ValueError(f"{key} has {len(value)} values, the model {model.in_chans} channels.")
            data[key] = tuple(float(v) for v in value)

    folder = Path(folder).resolve()  # of a link, the target: a file moves only within its file system
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # what timm.models.save_for_hf writes, without a second copy of the model for other weights
        save_config_for_hf(
            encoder,
            temporary / "config.json",
            model_config={"pretrained_cfg": {"license": license} if license else {}},
            data_config=data,
        )
        safetensors.torch.save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((temporary / "config.json").read_text())
        rows = {
            "Parameters": f"{sum(v.numel() for v in weights.values()) / 1e6:.1f} M",
            "Image size": f"{img_size[0]} x {img_size[1]}, {model.in_chans} channels",
            "Mean, standard deviation": f"{config['pretrained_cfg']['mean']}, {config['pretrained_cfg']['std']}",
            **(info or {}),
        }
        (temporary / "README.md").write_text(_readme(model, license, rows), encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "config.json", "README.md"):
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
