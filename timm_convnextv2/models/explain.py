"""`explain(model)` prints which layers use the fused operations on a device, and why the others do not."""

import platform
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import timm
import torch
from timm.layers import GlobalResponseNormMlp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..layers import DepthwiseConv2d, LayerNorm2d, PatchConv2d
from ..ops.dispatch import ENV, backend
from .convnextv2 import ConvNeXtV2, ConvNeXtV2Block
from .fcmae import FCMAE
from .masking import num_visible, random_mask
from .packing import PackedLayout

KINDS = (
    "token MLP", "depthwise convolution, dense", "depthwise convolution, packed", "downsampling",
    "norm, stem and downsampling",
)  # fmt: skip

Found = tuple[str, str, str]  # kind, name of the module, why it runs eagerly ('' = fused)


def explain(model: nn.Module, device: torch.device | str | None = None) -> None:
    """Prints `explanation(model, device)`, to read or to paste into a bug report."""
    print(explanation(model, device))


def explanation(model: nn.Module, device: torch.device | str | None = None) -> str:
    """Count, implementation in a training step, and reason against the fused operation for each kind of layer.

    The layers decide for inputs of the model's image size and dtype, under the current autocast, hooks and backend. No
    forward runs, and the GPU in question need not be present.

    Args:
        model: A ConvNeXtV2, an FCMAE, or a model that contains one.
        device: By default the model's device, and also 'cuda' if there is one.
    """
    parameter = next(iter(model.parameters()), None)
    here = torch.device("cpu") if parameter is None else parameter.device
    devices = [torch.device(device)] if device is not None else [here]
    if device is None and here.type != "cuda" and torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    dtype = torch.float32 if parameter is None else parameter.dtype
    lines = [_versions(), f"{type(model).__name__}: {dtype} on {here}, {'training' if model.training else 'eval'} mode"]
    for where in devices:
        lines += _on_device(model, where, dtype)
    return "\n".join(lines)


def _versions() -> str:
    def installed(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} not installed"

    from .. import __version__

    known = [
        f"timm_convnextv2 {__version__}",
        f"timm {timm.__version__}",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    ]
    return ", ".join([*known, installed("triton"), f"{platform.system()} {platform.machine()}"])


def _on_device(model: nn.Module, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The lines of one device."""
    try:
        name = backend(device)
    except (ValueError, RuntimeError) as error:
        return [f"on {device}: {error}"]
    found = list(_layers(model, device, dtype))
    if not found:
        stock = any(type(module) is GlobalResponseNormMlp for module in model.modules())
        hint = "; timm.create_model('convnextv2_...') after `import timm_convnextv2` makes one of ours" if stock else ""
        return [f"on {device}: no layer of this model is one of timm_convnextv2, so PyTorch runs it as it is{hint}"]
    lines = [f"on {device}: backend '{name}' ({ENV} or ops.set_backend forces another)"]
    for kind in KINDS:
        reasons = Counter(why for what, _, why in found if what == kind)
        for why, count in sorted(reasons.items(), key=lambda item: bool(item[0])):
            first = next(module for what, module, reason in found if (what, reason) == (kind, why))
            # MinkowskiEngine only replaces the packed convolution
            fused = "fused" if name == "minkowski" and kind != KINDS[2] else name
            runs = fused if not why else f"eager: {why}"
            where = f" ({first})" if why and len(reasons) > 1 else ""
            lines.append(f"  {kind:29} {count:3}  {runs}{where}")
        if not reasons:
            lines.append(f"  {kind:29}   0")
    return lines


def _layers(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[Found]:
    """Every layer of these kinds, for an image of the model's size."""
    packed: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, FCMAE):
            packed.add(module.encoder)
            height, width = module.img_size
            grid = module.grid(height, width)
            layout = PackedLayout(random_mask(1, grid, module.mask_ratio), num_visible(grid, module.mask_ratio))
            yield from _of_encoder(module.encoder, _join(name, "encoder"), (height, width), layout, device, dtype)
            for path, block in module.decoder.named_modules():
                if isinstance(block, ConvNeXtV2Block):
                    yield from _of_block(block, _join(name, "decoder", path), grid, None, device, dtype)
        elif isinstance(module, ConvNeXtV2) and module not in packed:
            size = (module.pretrained_cfg or {}).get("input_size", (3, 224, 224))[-2:]
            yield from _of_encoder(module, name, size, None, device, dtype)


def _of_encoder(
    encoder: ConvNeXtV2, name: str, size: tuple[int, int], layout: PackedLayout | None, device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Found]:  # fmt: skip
    """The layers of all stages, for images of `size`."""
    reduction = encoder.feature_info[0]["reduction"]
    x = _map(size, reduction, layout, encoder.feature_info[0]["num_chs"], device, dtype)
    yield from _norms(encoder.stem, _join(name, "stem"), x)
    for i, (stage, info) in enumerate(zip(encoder.stages, encoder.feature_info, strict=True)):
        for path, conv in stage.downsample.named_modules():
            if isinstance(conv, nn.Conv2d):
                x = _map(size, reduction, layout, conv.in_channels, device, dtype)
                yield from _norms(stage.downsample, _join(name, f"stages.{i}.downsample"), x)
                why = conv.why_eager(x) if isinstance(conv, PatchConv2d) else "its patches overlap or have gaps"
                yield "downsampling", _join(name, f"stages.{i}.downsample", path), why
        reduction = info["reduction"]
        shape = (size[0] // reduction, size[1] // reduction)
        for j, block in enumerate(stage.blocks):
            where = _join(name, f"stages.{i}.blocks.{j}")
            if layout is None:
                yield from _of_block(block, where, shape, None, device, dtype)
            else:
                p = shape[0] // layout.grid[0]
                yield from _of_block(block, where, (layout.num_visible * p, p), layout, device, dtype)


def _norms(parts: nn.Module, name: str, x: torch.Tensor) -> Iterator[Found]:
    """The norm among `parts`, for an input like `x`."""
    for path, norm in parts.named_children():
        if isinstance(norm, LayerNorm2d):
            yield KINDS[4], _join(name, path), norm.why_eager(x)
        elif not isinstance(norm, nn.Conv2d) and any(True for _ in norm.parameters()):
            yield KINDS[4], _join(name, path), "it is not a LayerNorm with weight and bias, or it is timm's fast one"


def _of_block(
    block: ConvNeXtV2Block, name: str, shape: tuple[int, int], layout: PackedLayout | None, device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Found]:  # fmt: skip
    """Mixer and token MLP of a block on a map of `shape`."""
    conv = block.conv_dw
    x = _tensor((1, conv.in_channels, *shape), device, dtype)
    if layout is not None:
        yield KINDS[2], f"{name}.conv_dw", layout.why_eager(x, conv)
    else:
        adopted = isinstance(conv, DepthwiseConv2d)
        yield KINDS[1], f"{name}.conv_dw", conv.why_eager(x) if adopted else "it is not a plain depthwise convolution"
    yield KINDS[0], f"{name}.mlp", block.why_eager(_tensor((1, conv.out_channels, *shape), device, dtype))


def _map(
    size: tuple[int, int], reduction: int, layout: PackedLayout | None, channels: int, device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    height, width = size[0] // reduction, size[1] // reduction
    if layout is not None:
        width //= layout.grid[1]
        height = layout.num_visible * width
    return _tensor((1, channels, height, width), device, dtype)


def _tensor(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor with device and shape but without memory."""
    with FakeTensorMode():
        return torch.empty(shape, device=device, dtype=dtype)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
