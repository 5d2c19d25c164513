"""Features of frozen models: one row per image."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import MissingPackageError
from ..data.formats.errors import listed
from ..data.samples.batches import Batch, map_batches
from ..data.sources.source import Source
from ..models import FCMAE
from .config import Computation, Extraction, Scoring

COMPUTATION, EXTRACTION, SCORING = Computation(), Extraction(), Scoring()  # the defaults of functions
EPS = 1e-6  # as in timm's ConvNeXt
BAD_NAMED = 5
_SEEN_BEFORE_STREAM_LIMIT = 1000  # the fraction of bad images in a stream is known only after some images
_NO_ROWS = np.empty((0, 0), np.float32)
RowsOf = Callable[[Any, Tensor], Tensor]  # of a model and images


class Embedded(NamedTuple):
    """Consecutive images: rows float32 `[N, D]`, their names, and skipped images as (index, name, reason)."""

    rows: np.ndarray
    names: list[str]
    skipped: list[tuple[int, str, str]]


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
        raise ValueError(f"{remedy}\n{listed(reasons, BAD_NAMED)}")


def extract_features(
    model: nn.Module, batches: Iterable[Tensor], *, devices: Sequence[str | torch.device] = ("cpu",), amp: bool = False,
    all_stages: bool = False, progress: Callable[[int], Any] | None = None
) -> Tensor:  # fmt: skip
    """Rows of features `[N, D]` on the CPU: the global mean of the last stage's map, and LayerNorm without parameters.

    This equals timm's pre-logits for a ConvNeXt whose head is untrained. For models without a map `[B, C, h, w]`
    (tokens of a ViT, channels-last maps of a Swin), the rows are timm's pre-logits. With `all_stages` rows are the mean
    and the standard deviation of each stage's (or block's) map, each after such a LayerNorm.

    Batches are images `[B, C, H, W]`, normalised for this model; `devices` compute them in turn, each on a copy of the
    model unless it is there already. `amp` computes in bfloat16. `progress` is called with the number of images of each
    batch.
    """
    rows_of = choose_rows([model], all_stages)
    return extract_many([model], batches, devices=devices, amp=amp, rows_of=rows_of, progress=progress)[0]


def extract_many(
    models: Sequence[nn.Module | Callable[[Tensor], Tensor]], batches: Iterable[Tensor], *,
    devices: Sequence[str | torch.device] = ("cpu",), amp: bool = False, rows_of: RowsOf | None = None,
    progress: Callable[[int], Any] | None = None
) -> list[Tensor]:  # fmt: skip
    """`extract_features` of several models, and rows of plain functions of images, from one pass over the batches.

    `rows_of` is what `choose_rows` gives, by default the mean of the last map.
    """
    networks = [model.encoder if isinstance(model, FCMAE) else model for model in models]
    columns: list[list[Tensor]] = [[] for _ in networks]
    with ExitStack() as stack:
        for network in networks:
            if isinstance(network, nn.Module):
                stack.enter_context(evaluating(network))
        copies = [[_on(network, torch.device(device)) for network in networks] for device in devices]
        for i, images in enumerate(batches):
            placed = images.to(devices[i % len(devices)])
            for column, network in zip(columns, copies[i % len(devices)], strict=True):
                if isinstance(network, nn.Module):
                    column.append(compute_rows(network, placed, amp, rows_of or mean_of_last_map))
                else:
                    column.append(network(images))
                if i + 1 >= len(devices):  # the newest rows stay on their devices, so that these compute meanwhile
                    column[-len(devices)] = column[-len(devices)].cpu()
            if progress is not None:
                progress(len(images))
    if not all(columns):
        raise ValueError("There are no images to compute features of.")
    return [torch.cat([row.cpu() for row in column]) for column in columns]


def _on(network: Any, device: torch.device) -> Any:
    """The network, or a copy if it is on another device; functions are returned unchanged."""
    if not isinstance(network, nn.Module):
        return network
    here = next((p.device for p in network.parameters()), device)
    same = here.type == device.type and (device.index is None or here.index == device.index)
    return network if same else copy.deepcopy(network).to(device)


def compute_rows(network: nn.Module, images: Tensor, amp: bool, rows_of: RowsOf | None = None) -> Tensor:
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
        return _normalised(x.float().mean((2, 3)))
    return network.forward_head(x, pre_logits=True)


def statistics_of_maps(network: Any, images: Tensor) -> Tensor:
    """The mean over the map hides how much it varies: on small drawings and textures that tells more of the class."""
    found = []
    for x in network.forward_intermediates(images, intermediates_only=True):
        variance, mean = torch.var_mean(x.float(), (2, 3), correction=0)  # a map may be one pixel
        found += [_normalised(mean), _normalised(variance.sqrt())]
    return torch.cat(found, dim=1)


def _normalised(rows: Tensor) -> Tensor:
    return F.layer_norm(rows, rows.shape[1:], eps=EPS)


def choose_rows(models: Sequence[nn.Module], all_stages: bool) -> RowsOf | None:
    """Which rows `--all-stages` means, None for the default; refuses models without maps."""
    for model in models if all_stages else ():
        if not hasattr(model.encoder if isinstance(model, FCMAE) else model, "forward_intermediates"):
            raise ValueError(f"{type(model).__name__} gives no maps of its stages: leave out --all-stages.")
    return statistics_of_maps if all_stages else None


class Limit(NamedTuple):
    """The largest fraction of images that may be undecodable; `total` is None for a stream."""

    share: float
    total: int | None

    def check(self, reasons: list[str], seen: int, *, before: int = 0, last: bool = False) -> None:
        """Refuses too many bad images: those of this run (`reasons`) and `before`, the number of earlier runs."""
        total, bad = self.total or seen, before + len(reasons)
        if self.total is None and not last and seen < _SEEN_BEFORE_STREAM_LIMIT:
            return
        if bad > self.share * total or bad == total:
            what = f"{bad} of {total} images cannot be decoded, more than --max-bad-images {self.share} allows"
            raise ValueError(f"{what}; nothing was written:\n{listed(reasons, 10)}")


def embed_batches(
    batches: Iterable[Batch], network: nn.Module, limit: Limit, *, amp: bool = False, per_part: int = 1, bad: int = 0,
    rows_of: RowsOf | None = None, progress: Callable[[int], Any] | None = None,
) -> Iterator[tuple[int, int, Embedded]]:  # fmt: skip
    """Number, images read, and content of each part of `per_part` batches; `bad` counts bad images of earlier runs."""
    seen, reasons = 0, []
    device = next(network.parameters()).device
    for number, group in groupby(batches, key=lambda batch: batch.number // per_part):
        before, rows, names, skipped = seen, [], [], []
        for batch in group:
            seen += batch.count
            if batch.items is None:
                continue
            images = []
            for item in batch.items:
                if isinstance(item.error, MissingPackageError):
                    raise item.error
                if item.image is None:
                    skipped.append((item.index, item.name, str(item.error)))
                    reasons.append(str(item.error))
                else:
                    names.append(item.name)
                    images.append(item.image)
            limit.check(reasons, seen, before=bad)
            if images:
                with torch.inference_mode():
                    rows.append(compute_rows(network, torch.stack(images).to(device), amp, rows_of).cpu().numpy())
            if progress is not None:
                progress(batch.count)
        yield number, seen - before, Embedded(np.concatenate(rows or [_NO_ROWS]), names, skipped)


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
