"""Feature collapse: how similar the channels within a block are (ConvNeXt V2, section 3.2 and figure 4).

Source: https://arxiv.org/abs/2301.00808. Its authors published no code for this analysis.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from ..layers import PointwiseConv2d
from ..models import FCMAE
from .extract import evaluating

DEAD = 1e-6


class BlockCollapse(NamedTuple):
    """How similar the channels of a block are, at the input of its second Linear."""

    block: str
    depth: float  # 0 (first block) to 1 (last)
    distance: float  # mean (1 - cosine) / 2 of live channels; 0: equal up to scale, 0.5: independent, NaN: all dead
    dead: float  # fraction of channels whose norm is below 1e-6 of the image's largest


def channel_distance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean pairwise cosine distance `[B]` of the live channels of `[B, positions, C]`, and the fraction of dead ones.

    `d = (1 - ||sum_i x_i||^2 / C^2) / 2`, where `x_i` is channel i scaled to norm 1: the mean of `(1 - cosine) / 2`
    over all C x C pairs, in time linear in C. It is infinity if `x` has NaN or infinity.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = x.norm(dim=1)  # [B, C]
    live = norm > DEAD * norm.amax(1, keepdim=True)
    scale = torch.where(live, 1 / norm, 0)
    total = torch.einsum("bnc,bc->bn", x, scale)
    count = live.sum(1)
    distance = ((1 - total.square().sum(1) / count**2) / 2).clamp_min(0)
    return distance.masked_fill(~norm.isfinite().all(1), torch.inf), 1 - count / x.shape[2]


def blocks_of(model: nn.Module) -> dict[str, Any]:
    """The ConvNeXt V1 or V2 blocks of a backbone by name, in running order; a `ValueError` if it has none."""
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, ConvNeXtBlock) and hasattr(m.mlp, "fc2")}
    if not blocks:
        kinds = Counter(type(m).__name__ for m in model.modules())
        found = (f"{n} {kind}" for kind, n in kinds.items() if kind.endswith(("Block", "Bottleneck")))
        has = f"{type(model).__name__} has {', '.join(found) or 'no blocks'}"
        raise ValueError(f"{has}, expected the blocks of ConvNeXt V1 or V2: collapse is measured in them.")
    return blocks


def collapse(
    model: nn.Module, images: Tensor, masks: Tensor | None = None, *, batch_size: int = 8, amp: bool = False
) -> list[BlockCollapse]:
    """Measures how similar the channels of each block are: after GRN in V2, after GELU in V1, averaged over images.

    The model is a ConvNeXt V1 or V2, or an FCMAE, whose encoder is measured. Images are `[N, C, H, W]`, normalised for
    it, on any device. With `masks`, bool `[N, h, w]`, True = removed, an FCMAE computes and measures visible patches
    only. `batch_size` changes results by rounding only; `amp` computes in bfloat16, but distances in float32.
    """
    encoder: Any = model.encoder if isinstance(model, FCMAE) else model
    blocks = blocks_of(encoder)
    if masks is not None and not isinstance(model, FCMAE):
        raise ValueError(f"Masks need an FCMAE, but the model is a {type(model).__name__}. Leave them out.")
    if not len(images):
        raise ValueError("There are no images to measure collapse on.")
    measured: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in blocks}

    def measure(name: str, x: Tensor) -> None:
        measured[name].append(channel_distance(x.flatten(1, 2)))

    device = next(encoder.parameters()).device
    with evaluating(model), _second_inputs(blocks, measure):
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                if isinstance(model, FCMAE) and masks is not None:
                    model.forward_encoder(part, model.visible(part, masks[start : start + batch_size]))
                else:
                    encoder.forward_features(part)
    found: list[BlockCollapse] = []
    for i, (name, parts) in enumerate(measured.items()):
        distance, dead = (torch.cat(values) for values in zip(*parts, strict=True))
        if distance.isinf().any():
            raise ValueError(f"Block {name} gives NaN or infinity: the model has diverged.")
        depth = i / max(len(blocks) - 1, 1)
        found.append(BlockCollapse(name, depth, float(distance.nanmean()), float(dead.mean())))
    return found


@contextmanager
def _second_inputs(blocks: dict[str, Any], measure: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `measure(name, x)` with the input `[B, H, W, C]` of each block's second Linear."""
    with ExitStack() as hooks:  # they disable the fused token MLP (`ops.dispatch.why_eager`), which hides that input
        for name, block in blocks.items():
            fc2 = block.mlp.fc2
            # timm's blocks with 1x1 convolutions keep [B, C, H, W]; ours apply them to tokens
            first = isinstance(fc2, nn.Conv2d) and not isinstance(fc2, PointwiseConv2d)

            def hook(_: nn.Module, inputs: Any, name: str = name, first: bool = first) -> None:
                measure(name, inputs[0].permute(0, 2, 3, 1) if first else inputs[0])

            hooks.callback(fc2.register_forward_pre_hook(hook).remove)
        yield


def channel_maps(
    model: nn.Module, images: Tensor, block: str | None = None, channels: int | Sequence[int] = 64, *,
    batch_size: int = 8
) -> tuple[str, Tensor]:  # fmt: skip
    """The name of a block, and maps of single channels at the input of its second Linear, as in the paper's figure 3.

    By default the block is the last one of the last stage but one, whose maps still resolve positions. `channels` is
    their number, from the first, or their indices. Maps are float32 `[N, channels, h, w]` on the CPU.
    """
    encoder: Any = model.encoder if isinstance(model, FCMAE) else model
    blocks = blocks_of(encoder)
    if block is None:
        stages = list(dict.fromkeys(_stage(name) for name in blocks))
        block = [name for name in blocks if _stage(name) == stages[-2:][0]][-1]
    if block not in blocks:
        raise ValueError(f"There is no block '{block}'; there are: {', '.join(blocks)}.")
    width = blocks[block].mlp.fc2.weight.shape[1]
    chosen = list(range(min(channels, width))) if isinstance(channels, int) else list(channels)
    if not chosen or min(chosen) < 0 or max(chosen) >= width:
        raise ValueError(f"The channels are {chosen}, and block '{block}' has 0 to {width - 1}.")
    found: list[Tensor] = []
    device = next(encoder.parameters()).device

    def keep(_: str, x: Tensor) -> None:
        found.append(x[..., chosen].permute(0, 3, 1, 2).float().cpu())

    with evaluating(encoder), _second_inputs({block: blocks[block]}, keep):
        for part in images.split(batch_size):
            encoder.forward_features(part.to(device))
    return block, torch.cat(found)


def _stage(name: str) -> str:
    return name.rpartition(".blocks.")[0]
