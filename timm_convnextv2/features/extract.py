"""Features of frozen models: one row per image."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.samples.batches import map_batches
from ..data.sources.source import Source
from ..models import FCMAE

EPS = 1e-6  # as in timm's ConvNeXt
BAD_NAMED = 5


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module returns to its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def image_batches(source: Source, transform: Callable, batch_size: int = 64, workers: int = 0) -> Iterator[Tensor]:
    """The images of a source in order, as batches float32 `[B, C, H, W]`; `workers` processes decode, 0 is this one.

    An image that cannot be decoded is a `ValueError`: images are not skipped, because labels refer to them.
    """
    numbers = range(-(-len(source) // batch_size))
    for batch in map_batches(source, transform, batch_size, numbers, workers):
        refuse_bad([str(item.error) for item in batch.items or () if item.error is not None])
        yield torch.stack([item.image for item in batch.items or () if item.image is not None])


def refuse_bad(reasons: Sequence[str]) -> None:
    """Raises a `ValueError` that lists the first labelled images that cannot be decoded, if there are any."""
    if reasons:
        remedy = "Images cannot be decoded. Fix or remove them, with their labels:"
        raise ValueError("\n".join([remedy, *reasons[:BAD_NAMED]]))


def extract_features(
    model: nn.Module, batches: Iterable[Tensor], *, devices: Sequence[str | torch.device] = ("cpu",), amp: bool = False,
    progress: Callable[[int], Any] | None = None
) -> Tensor:  # fmt: skip
    """Rows of features `[N, D]` on the CPU: the global mean of the last stage's map, and LayerNorm without parameters.

    This equals timm's pre-logits for a ConvNeXt whose head is untrained. For models without a map `[B, C, h, w]`
    (tokens of a ViT, channels-last maps of a Swin), the rows are timm's pre-logits. Batches are images `[B, C, H, W]`,
    normalised for this model; `devices` compute them in turn, each on a copy of the model unless it is there already.
    `amp` computes in bfloat16. `progress` is called with the number of images of each batch.
    """
    network: nn.Module = model.encoder if isinstance(model, FCMAE) else model
    rows: list[Tensor] = []
    with evaluating(network):
        copies = [(_on(network, torch.device(device)), torch.device(device)) for device in devices]
        for i, images in enumerate(batches):
            copied, device = copies[i % len(copies)]
            rows.append(compute_rows(copied, images.to(device), amp, mean_of_last_map))
            if i + 1 >= len(copies):  # the newest rows stay on their devices, so that these compute at the same time
                rows[-len(copies)] = rows[-len(copies)].cpu()
            if progress is not None:
                progress(len(images))
    return _joined([row.cpu() for row in rows])


def pixel_features(batches: Iterable[Tensor], size: int = 8) -> Tensor:
    """The baseline without a model: images `[B, C, H, W]`, averaged to `size` x `size`, as `[N, C * size * size]`."""
    return _joined([F.adaptive_avg_pool2d(images.float(), size).flatten(1).cpu() for images in batches])


def _joined(rows: list[Tensor]) -> Tensor:
    if not rows:
        raise ValueError("There are no images to compute features of.")
    return torch.cat(rows)


def _on(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, or a copy if it is on another device."""
    here = next((p.device for p in network.parameters()), device)
    same = here.type == device.type and (device.index is None or here.index == device.index)
    return network if same else copy.deepcopy(network).to(device)


def compute_rows(
    network: nn.Module, images: Tensor, amp: bool, rows_of: Callable[[Any, Tensor], Tensor] | None = None
) -> Tensor:
    """One row per image `[B, C, H, W]`, float32 `[B, D]`: `rows_of(network, images)` or `network(images)`."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        rows = rows_of(network, images) if rows_of else network(images)
    if rows.ndim != 2:
        raise ValueError(f"{type(network).__name__} gives {list(rows.shape)} for a batch, expected one row per image.")
    return rows.float()


def mean_of_last_map(network: Any, images: Tensor) -> Tensor:
    x = network.forward_features(images)
    channels_first = getattr(network, "output_fmt", "NCHW") == "NCHW" and x.ndim == 4
    if channels_first and x.shape[1] == network.num_features:
        x = x.float().mean((2, 3))
        return F.layer_norm(x, x.shape[1:], eps=EPS)
    return network.forward_head(x, pre_logits=True)


def check_features(train: Tensor, labels: Tensor, test: Tensor) -> None:
    """Raises a `ValueError` unless features `[N, D]` and `[M, D]` are finite and fit N labels."""
    check_finite(train, "training features")
    check_finite(test, "test features")
    if len(labels) != len(train) or test.shape[1] != train.shape[1]:
        shapes = f"features {list(train.shape)}, labels {list(labels.shape)} and test features {list(test.shape)}"
        raise ValueError(f"Training {shapes} do not fit: expected [N, D], N labels and [M, D].")


def check_finite(features: Tensor, what: str = "features") -> None:
    """Raises a `ValueError` for NaN, for infinity, and for features that are not `[N, D]`."""
    if features.ndim != 2 or not len(features):
        raise ValueError(f"The {what} are {list(features.shape)}, expected [N, D] with at least one row.")
    if bad := int((~features.isfinite()).any(1).sum()):
        remedy = "the model has diverged, or images have values outside its training data"
        raise ValueError(f"The {what} of {bad} of {len(features)} images have NaN or infinity: {remedy}.")
