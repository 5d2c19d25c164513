"""`embed`: from a model and images to a file of rows, in parts that several processes share."""

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..checkpoint.files import model_pixels
from ..console import say
from ..data import (
    DataSet,
    ImagePaths,
    MissingPackageError,
    StreamOrder,
    TimmStream,
    check_readable,
    create_source,
)
from ..data.paths.index import check_index_option, find_images, open_index
from ..data.paths.places import Dirs, Listing, as_list, places_of
from ..data.samples.batches import Batch, map_batches, preprocessing, stream_batches
from ..runs.progress import ImageProgress
from .network import digest, features, load_network
from .rows import Part, Parts, Processes, check_output, processes, write_output

_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
_STREAM_BATCHES_PER_PART = 16
_SEEN_BEFORE_A_STREAM_IS_JUDGED = 1000


def embed(
    model: str,
    data_dir: Dirs,
    output: str | os.PathLike,
    *,
    data_list: Dirs = None,
    index: str | os.PathLike | None = None,
    dataset: str = "",
    split: str = "train",
    input_key: str | None = None,
    download: bool = False,
    num_samples: int | None = None,
    nodata: float | None = None,
    batch_size: int = 64,
    img_size: int | None = None,
    device: str = "cpu",
    workers: int = 0,
    amp: bool = False,
    max_bad_images: float = 0.01,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[int, dict[int, str]]:
    """Writes one row of pooled features for each image; see the package for the files.

    Under torchrun every process calls it and computes its share; the folder of `output` is one that all of them see.

    Args:
        model: A model of timm with pretrained weights, `local-dir:FOLDER` or `hf-hub:USER/NAME`.
        data_dir: Folders with images anywhere below them, tar files, patterns; or the root of `dataset`.
        output: File to write, `.npy`, `.safetensors` or `.parquet`.
        data_list: Lists of images, see `timm_convnextv2.data.create_source`.
        index: Index of the images, see `timm_convnextv2.data.find.find_images`.
        dataset: As in `timm_convnextv2.data.create_source`, streams included. A stream is read whole by each process.
        split: Split of `dataset`.
        input_key: Field of `dataset` that holds the image.
        download: Download `dataset` first.
        num_samples: Images of the embedded data set; those of a stream, where it does not say.
        nodata: Stored value of pixels that are no data, see `timm_convnextv2.data.load_image`; the model's if None.
        batch_size: Images at a time.
        img_size: Side of the square crops in pixels; the model's if None.
        device: Where the model runs; 'cuda' is the GPU of this process.
        workers: Processes (of a stream: threads) that decode images; 0: this one.
        amp: Compute in bfloat16; the rows are float32 all the same.
        max_bad_images: Share of images that may be undecodable, 0..1.
        resume: Resume a run that was stopped, if there is one.
        overwrite: Replace an output that exists and, without `resume`, what a run that was stopped left.
        progress: Report images/s on stderr, on the first process.

    Returns:
        Number of rows; the images that were skipped, as `{number in the data set: reason}`.

    Raises:
        ValueError: An output that must not be written, a model, data set or device that cannot be used, parts of
            another run, or more bad images than `max_bad_images` (finished parts stay, to resume from).
        OSError: The output cannot be written.
    """
    output = Path(output)
    parts = Parts(output)
    with processes() as group:
        group.first(lambda: check_output(output, overwrite=overwrite or resume and parts.joining()))
        _check_numbers(batch_size, workers, max_bad_images)
        check_index_option(dataset, index)
        network, config = load_network(model, img_size, device)
        pixels = model_pixels(model, config["input_size"][0], nodata)
        listing = None if dataset else listed(group, data_dir, data_list, index, max_bad_images, progress)
        source = create_source(
            ImagePaths.of(data_dir, data_list),
            DataSet(dataset, split, num_samples, download, input_key),
            config["input_size"][0],
            pixels,
            order=StreamOrder(batch_size, whole=True),
            listing=listing,
        )
        if progress and (note := str(source.left)):
            say(note, error=True)
        _check_place(output, source)
        total = None if isinstance(source, TimmStream) else len(source)
        limit = _Limit(max_bad_images, total)

        def claim() -> tuple[set[int], int]:
            if not isinstance(source, TimmStream):
                check_readable(source)
            places = [os.path.abspath(place) for place in as_list(data_dir)]
            place = places if len(places) > 1 else places[0] if places else None
            data = {"data_dir": place, "dataset": dataset, "split": split, "input_key": input_key}
            data |= {"data_list": [os.path.abspath(place) for place in as_list(data_list)]} if data_list else {}
            data |= {"images": total, "names": _digest_of_names(source)}
            images = {key: config[key] for key in _PREPROCESSING}
            record = pixels.record()
            images["nodata"] = None if pixels.nodata is None else str(record.pop("nodata"))
            images |= {"pixels": record} if record else {}
            computed = {"batch_size": batch_size, "device": torch.device(device).type, "amp": amp}
            run = {"model": model, "weights": digest(network), **data, **images, **computed}
            parts.claim(run, resume=resume, overwrite=overwrite)
            return parts.finished(), sum(1 for _ in parts.skipped())

        finished, bad = group.first(claim)
        if not parts.folder.is_dir():
            raise ValueError(
                f"Process {group.rank} does not see '{parts.folder}': --output needs a shared file system."
            )
        share = _Share(group.rank, group.size, finished, _per_part(total, batch_size))
        batches = _batches(source, preprocessing(config), batch_size, share, workers)
        bar = ImageProgress(share.images(total, batch_size), enabled=progress and group.rank == 0)
        try:
            seen = _compute(batches, share, partial(features, network, amp=amp), parts, limit, bad, bar)
        except (ValueError, OSError) as e:
            group.tell(e)
            if group.size == 1 and not parts.finished():  # nothing to resume from
                parts.remove()
            raise
        finally:
            bar.close()
        if isinstance(source, TimmStream):
            _check_complete(seen, source.reader.num_samples)
        group.wait()
        return group.first(lambda: _join(output, parts, limit, total or seen, batch_size * share.per_part))


def listed(
    group: Processes,
    data_dir: Dirs,
    data_list: Dirs,
    index: str | os.PathLike | None,
    max_bad_images: float,
    progress: bool,
) -> Listing:
    """The image files, found by the first process for all."""
    places = places_of(data_dir, data_list)

    def find() -> Listing | None:
        bar = ImageProgress(None, enabled=progress)
        tell = partial(say, error=True) if progress else lambda text: None
        try:
            found = find_images(
                data_dir, data_list, index=index, max_missing=max_bad_images, tick=bar.update, tell=tell
            )
        finally:
            bar.close()
        return found if index is None else None

    found = group.first(find)
    if index is not None:
        return open_index(index, places)
    assert found is not None
    return found.at(places)


def _check_numbers(batch_size: int, workers: int, max_bad_images: float) -> None:
    if not 0 <= max_bad_images <= 1:
        raise ValueError(f"--max-bad-images is a share between 0 and 1, got {max_bad_images}.")
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size is at least 1 and workers at least 0, got {batch_size} and {workers}.")


def _check_place(output: Path, source: Any) -> None:
    """An array among the images would be an image of the next run."""
    for folder in source.folders() if output.suffix == ".npy" else []:
        if Path(folder).resolve() in output.resolve().parents:
            raise ValueError(f"'{output}' lies among the images, where .npy files count as images. Write it elsewhere.")


def _check_complete(seen: int, stated: int | None) -> None:
    """Readers of streams skip what is damaged in a shard, and only log it."""
    if stated and seen != stated:
        raise ValueError(
            f"The stream gave {seen} images, and {stated} are stated. Repair the shards, or correct --num-samples; the "
            "finished rows stay: resume with --resume."
        )


class _Share(NamedTuple):
    """Which batches this process computes: whole parts, every `world_size`-th, that no run before has finished."""

    rank: int
    world_size: int
    finished: set[int]
    per_part: int

    def wants(self, batch: int) -> bool:
        """Whether this process computes the batch of this number."""
        part = batch // self.per_part
        return part % self.world_size == self.rank and part not in self.finished

    def images(self, total: int | None, batch_size: int) -> int | None:
        """How many images that are."""
        if total is None:
            return None
        starts = range(0, total, batch_size)
        return sum(min(batch_size, total - start) for n, start in enumerate(starts) if self.wants(n))


class _Limit(NamedTuple):
    """How many images may be undecodable."""

    share: float
    total: int | None

    def check(self, reasons: list[str], seen: int, *, before: int = 0, last: bool = False) -> None:
        """Refuses too many bad images.

        Args:
            reasons: Of the bad images that are known here.
            seen: Images that were seen, which counts where the total is not known.
            before: Bad images of runs before.
            last: All images were seen.
        """
        total = self.total or seen
        if self.total is None and not last and seen < _SEEN_BEFORE_A_STREAM_IS_JUDGED:
            return
        bad = before + len(reasons)
        if bad > self.share * total or bad == total:
            raise ValueError(
                f"{bad} of {total} images cannot be decoded, --max-bad-images allows a share of {self.share}; nothing "
                "was written:\n" + "\n".join(reasons[:10])
            )


def _batches(source: Any, transform: Callable, batch_size: int, share: _Share, workers: int) -> Iterable[Batch]:
    if isinstance(source, TimmStream):
        return stream_batches(source, transform, batch_size, share.wants, workers)
    numbers = [n for n in range(-(-len(source) // batch_size)) if share.wants(n)]
    return map_batches(source, transform, batch_size, numbers, workers)


def _per_part(total: int | None, batch_size: int) -> int:
    """Batches per part: so many that there are few files, so few that processes can share them and little is lost."""
    if total is None:
        return _STREAM_BATCHES_PER_PART
    return max(1, min(32, total // batch_size // 64))


def _compute(
    batches: Iterable[Batch],
    share: _Share,
    rows_of: Callable[[list[torch.Tensor]], np.ndarray],
    parts: Parts,
    limit: _Limit,
    bad: int,
    bar: ImageProgress,
) -> int:
    """Writes the parts of this process; returns how many images went by.

    Args:
        batches: Those of this process, or a whole stream.
        share: Groups batches to parts.
        rows_of: Images to rows.
        parts: Where to.
        limit: Of bad images.
        bad: Bad images of runs before.
        bar: Counts images.
    """
    seen, reasons = 0, []
    for number, group in groupby(batches, key=lambda batch: batch.number // share.per_part):
        rows, names, skipped = [], [], []
        for batch in group:
            seen += batch.count
            if batch.items is None:
                continue
            for item in batch.items:
                if isinstance(item.error, MissingPackageError):
                    raise item.error
                if item.error is not None:
                    skipped.append((item.index, item.name, str(item.error)))
                    reasons.append(str(item.error))
            limit.check(reasons, seen, before=bad)
            images = [item.image for item in batch.items if item.image is not None]
            names += [item.name for item in batch.items if item.image is not None]
            if images:
                rows.append(rows_of(images))
            bar.update(batch.count)
        if names or skipped:
            parts.write(number, Part(np.concatenate(rows) if rows else np.empty((0, 0), np.float32), names, skipped))
    return seen


def _digest_of_names(source: Any) -> str | None:
    """Notices images that come or go while a run is stopped; of files only, other sources are slow to ask."""
    if not source.has_files:
        return None
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(os.fsencode(os.path.abspath(source.path(i))) + b"\0")
    return digest.hexdigest()


def _join(output: Path, parts: Parts, limit: _Limit, images: int, part_size: int) -> tuple[int, dict[int, str]]:
    """Writes the output from the parts of all processes."""
    limit.check([reason for _, _, reason in parts.skipped()], images, last=True)
    numbers = range(-(-images // part_size))
    missing = set(numbers) - parts.finished()
    if missing:
        raise ValueError(f"'{parts.folder}' has lost part {min(missing)}. Run the command again with --resume.")
    return write_output(output, parts, numbers)
