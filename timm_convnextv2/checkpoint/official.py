"""The official formats <-> ours.

Official formats (https://github.com/facebookresearch/ConvNeXt-V2), with stage S, block B:

- *sparse*: a pretraining checkpoint of the MinkowskiEngine code, encoder and decoder. Encoder kernels are `[k * k, C]`
  (depthwise) and `[k * k, Cin, Cout]` with the spatial index column-major, biases `[1, C]`, GRN `[1, 4C]`.
- *dense*: the classifier, or the encoder alone (the published `*_fcmae.pt`); GRN `[1, 1, 1, 4C]`.

Our format has timm's names and shapes. Both directions use the same `_table`, so that a round trip is exact.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from timm.models import clean_state_dict
from torch import Tensor

from ..models.variants import VARIANTS


class _Form(NamedTuple):
    """The conversions of one tensor."""

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


def _affine(official: str, ours: str, weight: _Form = _SAME) -> Iterator[_Row]:
    yield f"{official}.weight", f"{ours}.weight", weight
    yield f"{official}.bias", f"{ours}.bias", _SAME


def _conv(official: str, ours: str, kernel: _Form | None) -> Iterator[_Row]:
    """A convolution of the sparse format by the form of its `kernel`, or with None of the dense one."""
    if kernel is None:
        yield from _affine(official, ours)
    else:
        yield f"{official}.kernel", f"{ours}.weight", kernel
        yield f"{official}.bias", f"{ours}.bias", _ROW


def _block(official: str, ours: str, sparse: bool, mlp: _Form) -> Iterator[_Row]:
    ln, linear = (".ln", ".linear") if sparse else ("", "")
    yield from _conv(f"{official}.dwconv", f"{ours}.conv_dw", _DEPTHWISE if sparse else None)
    yield from _affine(f"{official}.norm{ln}", f"{ours}.norm")
    yield from _affine(f"{official}.pwconv1{linear}", f"{ours}.mlp.fc1", mlp)
    yield f"{official}.grn.gamma", f"{ours}.mlp.grn.weight", _ROW if sparse else _GRN
    yield f"{official}.grn.beta", f"{ours}.mlp.grn.bias", _ROW if sparse else _GRN
    yield from _affine(f"{official}.pwconv2{linear}", f"{ours}.mlp.fc2", mlp)


def _table(
    depths: Sequence[int], mlp: _Form, decoder_depth: int | None = None, norm: bool = False, head: bool = False
) -> Iterator[_Row]:
    """Every tensor of a checkpoint: in the sparse format if `decoder_depth` is given, otherwise in the dense one."""
    sparse = decoder_depth is not None
    prefix = "encoder." if sparse else ""
    yield from _affine(f"{prefix}downsample_layers.0.0", f"{prefix}stem.0")
    yield from _affine(f"{prefix}downsample_layers.0.1", f"{prefix}stem.1")
    for s, depth in enumerate(depths):
        if s > 0:
            official, ours = f"{prefix}downsample_layers.{s}", f"{prefix}stages.{s}.downsample"
            yield from _affine(f"{official}.0.ln" if sparse else f"{official}.0", f"{ours}.0")
            yield from _conv(f"{official}.1", f"{ours}.1", _KERNEL if sparse else None)
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


def _table_of(names: set[str], side: int, what: str, mlp: _Form) -> list[_Row]:
    """The rows for exactly these names, which are official (`side` 0) or ours (1); a ValueError if others are there."""

    def count(pattern: str) -> int:
        return len({m[1] for m in (re.match(pattern, name) for name in names) if m})

    sparse = any(name.startswith("encoder.") for name in names)
    stage = f"{'encoder.' if sparse else ''}stages\\.{{}}\\.{'blocks.' if side else ''}(\\d+)\\."
    norm, head = (("norm", "head"), ("head.norm", "head.fc"))[side]
    table = list(
        _table(
            [count(stage.format(s)) for s in range(4)],
            mlp,
            decoder_depth=count(r"decoder\.(\d+)\.") if sparse else None,
            norm=f"{norm}.weight" in names and not sparse,
            head=f"{head}.weight" in names and not sparse,
        )
    )
    expected = {row[side] for row in table}
    for wrong, text in ((names - expected, "unknown"), (expected - names, "missing")):
        if wrong:
            plural = "s" if len(wrong) > 1 else ""
            raise ValueError(f"Not {what}: {len(wrong)} {text} name{plural}, the first: '{min(wrong)}'.")
    return table


_PREFIXED = "its names have a DDP or torch.compile prefix; remove it with timm.models.clean_state_dict"
# guesses at weights that are not official: a name, once DDP's and torch.compile's prefixes are gone, and its meaning
_LOOKS_LIKE = {
    "state_dict": "it looks like a timm training checkpoint, with the weights in its 'state_dict'",
    "stem.0.weight": "it already has timm's names and needs no conversion",
    "encoder.stem.0.weight": "it already has timm's names and needs no conversion",
    "stages.0.0.gamma": "it looks like ConvNeXt V1, with layer scale instead of GRN",
    "downsample_layers.0.0.weight": _PREFIXED,
    "encoder.downsample_layers.0.0.weight": _PREFIXED,
    "cls_token": "it looks like a vision transformer (MAE?)",
}


def convert_official(state_dict: dict[str, Any], conv_mlp: bool | None = None) -> dict[str, Tensor]:
    """Official weights under our (timm's) names and shapes, ready for a strict `load_state_dict`.

    Args:
        state_dict: A sparse or dense official checkpoint, or the whole file with the weights in its 'model'.
        conv_mlp: The target's token MLPs are 1x1 convolutions, `[Cout, Cin, 1, 1]`. By default this follows from the
            stem's width (atto to nano: yes).

    Returns:
        Weights of an `FCMAE` for the sparse format, otherwise of a `ConvNeXtV2`; `head.norm`, which pretraining lacks,
        is ones and zeros. The published weights are CC-BY-NC 4.0: pass that licence to `export_encoder`.

    Raises:
        ValueError: Not an official checkpoint, an unknown or missing name, a shape that does not fit, or an
            unpublished stem width without `conv_mlp`.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"Not an official ConvNeXt V2 checkpoint: a {type(state_dict).__name__}, not a dictionary.")
    if isinstance(state_dict.get("model"), dict):
        state_dict = state_dict["model"]
    stem = "downsample_layers.0.0.weight"
    sparse = f"encoder.{stem}" in state_dict
    prefix = "encoder." if sparse else ""
    if not sparse and stem not in state_dict or f"{prefix}stages.0.0.gamma" in state_dict:
        clean = clean_state_dict(dict.fromkeys(map(str, state_dict)))
        first = f"its first names are {', '.join(map(repr, [*clean][:3]))}" if clean else "it is empty"
        guess = next((text for name, text in _LOOKS_LIKE.items() if name in clean), first)
        raise ValueError(f"Not an official ConvNeXt V2 checkpoint: {guess}.")

    width = state_dict[prefix + stem].shape[0]
    if conv_mlp is None:
        known = {args["dims"][0]: args.get("conv_mlp", False) for args in VARIANTS.values()}
        if width not in known:
            raise ValueError(
                f"The stem is {width} wide, but the published sizes have {sorted(known)}: pass the conv_mlp of the "
                "model that will load the weights."
            )
        conv_mlp = known[width]

    mlp = _CONV_1X1 if conv_mlp else _LINEAR
    table = _table_of(set(state_dict), 0, "an official ConvNeXt V2 checkpoint", mlp)
    converted = {}
    for official, ours, form in table:
        try:
            converted[ours] = form.to_ours(state_dict[official]).contiguous()
        except (RuntimeError, AttributeError, IndexError) as e:
            shape = getattr(state_dict[official], "shape", type(state_dict[official]).__name__)
            raise ValueError(f"'{official}' of the official checkpoint has the wrong shape: {shape}.") from e
    if f"{prefix}head.norm.weight" not in converted:
        like = state_dict[prefix + stem]
        last = converted[f"{prefix}stages.3.downsample.1.bias"].shape[0]
        converted[f"{prefix}head.norm.weight"] = like.new_ones(last)
        converted[f"{prefix}head.norm.bias"] = like.new_zeros(last)
    return converted


def to_official(state_dict: dict[str, Tensor], sparse: bool = True) -> dict[str, Tensor]:
    """The reverse of `convert_official`, for the published architecture (any depths, widths and kernel sizes).

    Weights of a `ConvNeXtV2` are written in the dense format; those of an `FCMAE` as a pretraining checkpoint of the
    MinkowskiEngine code, or with `sparse=False` as the encoder alone in the dense format, in both cases without
    `head.norm`, which pretraining does not use. ValueError if names are missing or unknown to the official
    architecture (a `patch_size` of 2 adds some).
    """
    if "encoder.stem.0.weight" in state_dict:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith("encoder.head.norm.")}
        if not sparse:
            state_dict = {k[len("encoder.") :]: v for k, v in state_dict.items() if k.startswith("encoder.")}
    elif "stem.0.weight" not in state_dict:
        raise ValueError("Expected weights of an FCMAE or a ConvNeXtV2, but they have no stem.0.weight.")
    table = _table_of(set(state_dict), 1, "weights of the official architecture", _LINEAR)
    return {official: form.to_official(state_dict[ours]).contiguous() for official, ours, form in table}
