"""`explain(model)` prints which layers use the fused operations on a device, and why the others do not."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
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

Found = tuple[str, nn.Module, str]  # kind, module, why it runs eagerly ('' = fused)


def explain(model: nn.Module, device: torch.device | str | None = None) -> None:
    """Prints `explanation(model, device)`, to read or to paste into a bug report."""
    print(explanation(model, device))


def explanation(model: nn.Module, device: torch.device | str | None = None) -> str:
    """Count, implementation in a training step, and reason against the fused operation for each kind of layer.

    `model` is or contains a ConvNeXtV2 or an FCMAE; `device`, by default the model's and 'cuda' if there is one, need
    not be present. The text holds for the model's image size and dtype under the current autocast, hooks and backend.
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
    from .. import __version__

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return (
        f"timm_convnextv2 {__version__}, timm {timm.__version__}, torch {torch.__version__}, triton {triton}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )


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
    names = {module: path for path, module in model.named_modules()}
    for kind in KINDS:
        reasons: dict[str, list[nn.Module]] = {}
        for _, module, why in (layer for layer in found if layer[0] == kind):
            reasons.setdefault(why, []).append(module)
        # MinkowskiEngine only replaces the packed convolution
        fused = "fused" if name == "minkowski" and kind != KINDS[2] else name
        for why, modules in sorted(reasons.items(), key=lambda item: bool(item[0])):
            where = f" ({names[modules[0]]})" if why and len(reasons) > 1 else ""
            lines.append(f"  {kind:29} {len(modules):3}  {f'eager: {why}' if why else fused}{where}")
        if not reasons:
            lines.append(f"  {kind:29}   0")
    return lines


@dataclass(frozen=True)
class _Inputs:
    """Makes inputs of a model's layers: device and shape, but no memory. With a layout they are packed maps."""

    size: tuple[int, ...]  # height and width of the image
    layout: PackedLayout | None
    device: torch.device
    dtype: torch.dtype

    def at(self, channels: int, reduction: int) -> torch.Tensor:
        """The map of `size` divided by `reduction`."""
        height, width = self.size[0] // reduction, self.size[1] // reduction
        if self.layout is not None:
            width //= self.layout.grid[1]
            height = self.layout.num_visible * width
        with FakeTensorMode():
            return torch.empty(1, channels, height, width, device=self.device, dtype=self.dtype)


def _layers(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[Found]:
    """Every layer of these kinds, for an image of the model's size."""
    packed: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FCMAE):
            packed.add(module.encoder)
            grid = module.grid(*module.img_size)
            layout = PackedLayout(random_mask(1, grid, module.mask_ratio), num_visible(grid, module.mask_ratio))
            inputs = _Inputs(module.img_size, layout, device, dtype)
            yield from _of_encoder(module.encoder, inputs)
            for block in module.decoder.modules():
                if isinstance(block, ConvNeXtV2Block):
                    yield from _of_block(block, replace(inputs, layout=None), module.stride)
        elif isinstance(module, ConvNeXtV2) and module not in packed:
            size = (module.pretrained_cfg or {}).get("input_size", (3, 224, 224))[-2:]
            yield from _of_encoder(module, _Inputs(size, None, device, dtype))


def _of_encoder(encoder: ConvNeXtV2, inputs: _Inputs) -> Iterator[Found]:
    """The layers of all stages."""
    reduction = encoder.feature_info[0]["reduction"]
    yield from _norms(encoder.stem, inputs.at(encoder.feature_info[0]["num_chs"], reduction))
    for stage, info in zip(encoder.stages, encoder.feature_info, strict=True):
        for conv in stage.downsample.modules():
            if isinstance(conv, nn.Conv2d):
                x = inputs.at(conv.in_channels, reduction)
                yield from _norms(stage.downsample, x)
                why = conv.why_eager(x) if isinstance(conv, PatchConv2d) else "its patches overlap or have gaps"
                yield "downsampling", conv, why
        reduction = info["reduction"]
        for block in stage.blocks:
            yield from _of_block(block, inputs, reduction)


def _norms(parts: nn.Module, x: torch.Tensor) -> Iterator[Found]:
    """The norm among `parts`, for an input like `x`."""
    for norm in parts.children():
        if isinstance(norm, LayerNorm2d):
            yield KINDS[4], norm, norm.why_eager(x)
        elif not isinstance(norm, nn.Conv2d) and any(True for _ in norm.parameters()):
            yield KINDS[4], norm, "it is not a LayerNorm with weight and bias, or it is timm's fast one"


def _of_block(block: ConvNeXtV2Block, inputs: _Inputs, reduction: int) -> Iterator[Found]:
    """Mixer and token MLP of a block."""
    conv = block.conv_dw
    x = inputs.at(conv.in_channels, reduction)
    if inputs.layout is not None:
        yield KINDS[2], conv, inputs.layout.why_eager(x, conv)
    else:
        adopted = isinstance(conv, DepthwiseConv2d)
        yield KINDS[1], conv, conv.why_eager(x) if adopted else "it is not a plain depthwise convolution"
    yield KINDS[0], block.mlp, block.why_eager(inputs.at(conv.out_channels, reduction))
