"""Features of frozen models: one row for each image."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.samples.batches import map_batches
from ..models import FCMAE

EPS = 1e-6  # of timm's ConvNeXt
BAD_NAMED = 5


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def image_batches(source: Any, transform: Callable, batch_size: int = 64, workers: int = 0) -> Iterator[Tensor]:
    """The images of a source in order, as batches float32 `[B, C, H, W]`.

    Args:
        source: Map-style, see `timm_convnextv2.data`.
        transform: Decoded image to `[C, H, W]`, see `data.batches.preprocessing`.
        batch_size: Images at a time.
        workers: Processes that decode; 0: this one.

    Raises:
        ValueError: Images that cannot be decoded: a label must not lose its image.
    """
    numbers = range(-(-len(source) // batch_size))
    for batch in map_batches(source, transform, batch_size, numbers, workers):
        bad = [str(item.error) for item in batch.items or () if item.error is not None]
        if bad:
            shown = "\n".join(bad[:BAD_NAMED])
            raise ValueError(f"Images cannot be decoded; repair them or take them out, with their labels:\n{shown}")
        yield torch.stack([item.image for item in batch.items or () if item.image is not None])


def extract_features(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    devices: Sequence[str | torch.device] = ("cpu",),
    amp: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """Rows of features: the global mean of the last stage's map, and LayerNorm without parameters.

    That is what timm's pre-logits are for a ConvNeXt whose head was not trained. Models that give no map `[B, C, h, w]`
    (tokens of a ViT, channels-last maps of a Swin) give timm's own pre-logits.

    Args:
        model: A model of timm, or an FCMAE, whose encoder then runs on whole images. It stays in the mode and on the
            device that it is in where that is the only one asked for; each other device gets a copy.
        batches: Images `[B, C, H, W]`, normalised for this model.
        devices: Where batches are computed, in turn.
        amp: Compute in bfloat16; the rows are float32 all the same.
        progress: Called with the number of images of each batch.

    Returns:
        float32 `[N, D]` on the CPU, in the order of the images.

    Raises:
        ValueError: There are no images, or the model gives no row for each image.
    """
    network: nn.Module = model.encoder if isinstance(model, FCMAE) else model
    rows: list[Tensor] = []
    waiting: deque[Tensor] = deque()  # on their devices, so that these compute at the same time
    with evaluating(network):
        copies = [(_on(network, torch.device(device)), torch.device(device)) for device in devices]
        for i, images in enumerate(batches):
            copied, device = copies[i % len(copies)]
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                waiting.append(_rows(copied, images.to(device)))
            if len(waiting) >= len(copies):
                rows.append(waiting.popleft().cpu())
            if progress is not None:
                progress(len(images))
    rows += [row.cpu() for row in waiting]
    if not rows:
        raise ValueError("There are no images to compute features of.")
    return torch.cat(rows)


def _on(network: nn.Module, device: torch.device) -> nn.Module:
    """The network itself where it is on this device, else a copy that is."""
    here = next((p.device for p in network.parameters()), device)
    same = here.type == device.type and (device.index is None or here.index == device.index)
    return network if same else copy.deepcopy(network).to(device)


def _rows(network: Any, images: Tensor) -> Tensor:
    """float32 `[B, D]`."""
    x = network.forward_features(images)
    channels_first = getattr(network, "output_fmt", "NCHW") == "NCHW" and x.ndim == 4
    if channels_first and x.shape[1] == network.num_features:
        x = x.float().mean((2, 3))
        return F.layer_norm(x, x.shape[1:], eps=EPS)
    x = network.forward_head(x, pre_logits=True)
    if x.ndim != 2:
        raise ValueError(f"{type(network).__name__} gives {list(x.shape)} for a batch, expected a row for each image.")
    return x.float()


def pixel_features(batches: Iterable[Tensor], size: int = 8) -> Tensor:
    """The baseline without a model: images shrunk to `size` x `size` by averaging areas, `[N, C * size * size]`.

    Args:
        batches: Images `[B, C, H, W]`.
        size: Side in pixels.
    """
    rows = [F.adaptive_avg_pool2d(images.float(), size).flatten(1).cpu() for images in batches]
    if not rows:
        raise ValueError("There are no images to compute features of.")
    return torch.cat(rows)


def check_finite(features: Tensor, what: str = "features") -> None:
    """Refuses NaN and infinity, which every measure would turn into a number that means nothing.

    Raises:
        ValueError: There is one; or features are not `[N, D]`.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"The {what} are {list(features.shape)}, expected [N, D] with at least one row.")
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise ValueError(
            f"The {what} of {bad} of {len(features)} images have NaN or infinity: the model has diverged, or images "
            "have values that it was not trained on."
        )
