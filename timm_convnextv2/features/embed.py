"""Writes a file of features, one row per image, in parts that several processes share."""

import hashlib
import os
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import check_limits
from ..console import say
from ..data import StreamOrder, TimmStream, check_readable, create_source
from ..data.config import as_list
from ..data.paths.find import check_places, find_files
from ..data.samples.batches import map_batches, stream_batches
from ..data.sources.source import Source
from ..runs.group import on_primary, processes
from ..runs.progress import ImageProgress
from .config import EmbedImages, Extraction
from .encoder import Encoder, open_encoder
from .extract import EXTRACTION, Limit, choose_rows, embed_batches
from .rows import Parts, check_output, write_output

_STREAM_BATCHES_PER_PART = 16


def embed(
    model: str, images: EmbedImages, output: str | os.PathLike, extraction: Extraction = EXTRACTION, *,
    max_bad_images: float = 0.01, resume: bool = False, overwrite: bool = False, progress: bool = False,
) -> tuple[int, dict[int, str]]:  # fmt: skip
    """Writes one row of pooled features per image, and beside it the names of rows and of skipped images.

    Under torchrun every process calls it and computes its share; all of them must see the folder of `output`, a `.npy`,
    `.safetensors` or `.parquet`. Each process reads the whole of a stream. If more than the fraction `max_bad_images`
    of the images cannot be decoded, finished parts stay, to resume from.

    Args:
        resume: Continue a stopped run, if there is one.
        overwrite: Replace an existing output and, without `resume`, the parts of a stopped run.
        progress: Report images/s on stderr, from rank 0.

    Returns:
        Number of rows; the skipped images, as `{index in the data set: reason}`.
    """
    output, parts, batch_size = Path(output), Parts(Path(output)), extraction.batch_size
    with processes() as group, closing(parts):
        on_primary(group, lambda: check_places(images.paths, images.data_set.dataset))
        on_primary(group, lambda: check_output(output, overwrite=overwrite or resume and parts.joining()))
        check_limits(extraction)
        if not 0 <= max_bad_images <= 1:
            raise ValueError(f"--max-bad-images is a fraction from 0 to 1, got {max_bad_images}.")
        encoder = open_encoder(model, extraction.img_size, extraction.nodata, extraction.device)
        rows_of = choose_rows([encoder.model], extraction.all_stages)
        # rows are numbered by one listing, so that no process may have its own
        listing = find_files(
            images.paths, images.data_set.dataset, max_bad_images, group, progress=progress, copies=False
        )
        order = StreamOrder(batch_size, whole=True)
        how: dict[str, Any] = {"order": order, "listing": listing}
        source = create_source(images.paths, images.data_set, encoder.in_chans, encoder.pixels, **how)
        if progress and (note := str(source.left)):
            say(note, error=True)
        _check_outside(output, source)
        total = None if isinstance(source, TimmStream) else len(source)
        limit = Limit(max_bad_images, total)

        def claim() -> tuple[set[int], int]:
            if isinstance(source, Source):
                check_readable(source)
                if progress and (warning := encoder.scale_warning(source)):
                    say(warning, error=True)
            run = _record(model, encoder, images, source, extraction)
            parts.claim(run, resume=resume, overwrite=overwrite)
            if (corrupt := parts.drop_corrupt()) and progress:
                say(f"{corrupt} corrupt parts in '{parts.folder}' are computed again.", error=True)
            return parts.finished(), sum(1 for _ in parts.skipped())

        finished, bad = on_primary(group, claim)
        if not parts.folder.is_dir():
            raise ValueError(f"Process {group.rank} does not see '{parts.folder}'. Put --output on a shared disk.")
        # enough batches per part for few files, few enough to share among processes and to lose little work
        per_part = _STREAM_BATCHES_PER_PART if total is None else max(1, min(32, total // batch_size // 64))
        share = _Share(group.rank, group.size, finished, per_part)
        how = {"transform": encoder.transform, "batch_size": batch_size, "workers": extraction.workers}
        if isinstance(source, TimmStream):
            batches = stream_batches(source, wanted=share.wants, **how)
        else:
            wanted = [n for n in range(-(-len(source) // batch_size)) if share.wants(n)]
            batches = map_batches(source, numbers=wanted, **how)
        seen = 0
        with closing(ImageProgress(share.images(total, batch_size), enabled=progress and group.primary)) as bar:
            try:
                for number, count, part in embed_batches(
                    batches, encoder.model, limit, amp=extraction.amp, per_part=per_part, bad=bad, rows_of=rows_of,
                    progress=bar.update,
                ):  # fmt: skip
                    seen += count
                    if part.names or part.skipped:
                        parts.write(number, part)
            except (ValueError, OSError) as e:
                group.print_error(e)
                if group.size == 1 and not parts.finished():  # nothing to resume from
                    parts.remove()
                raise
        stated = source.reader.num_samples if isinstance(source, TimmStream) else None
        if stated and seen != stated:  # the reader skips corrupt shards and only logs them
            raise ValueError(
                f"The stream gave {seen} images, expected {stated}. Repair the shards or correct --num-images, then "
                "resume with --resume: finished rows stay."
            )
        group.gather([])  # waits for the parts of all processes
        return on_primary(group, lambda: _join(output, parts, limit, total or seen, batch_size * share.per_part))


def _record(
    model: str, encoder: Encoder, images: EmbedImages, source: Source | TimmStream, extraction: Extraction
) -> dict[str, Any]:
    """Everything that determines the rows; a run resumes only with the same values."""
    places = {"data_dir": as_list(images.paths.data_dir), "data_list": as_list(images.paths.data_list)}
    record: dict[str, Any] = {name: [os.path.abspath(one) for one in place] for name, place in places.items()}
    record |= {"model": model, "weights": encoder.digest(), **encoder.settings}
    record |= {name: getattr(images.data_set, name) for name in ("dataset", "split", "input_key")}
    record |= {"images": None if isinstance(source, TimmStream) else len(source), "names": _digest_of_names(source)}
    pixels = {key: str(value) for key, value in encoder.pixels.record().items()}  # as text: NaN is not equal to itself
    record |= {"pixels": pixels, "batch_size": extraction.batch_size, "amp": extraction.amp}
    record["all_stages"] = extraction.all_stages
    return record | {"device": torch.device(extraction.device).type}


def _check_outside(output: Path, source: Source | TimmStream) -> None:
    """Refuses an array among the images, which the next run would read as an image."""
    for folder in source.folders() if output.suffix == ".npy" and isinstance(source, Source) else []:
        if Path(folder).resolve() in output.resolve().parents:
            raise ValueError(f"'{output}' lies among the images, where .npy files count as images. Write it elsewhere.")


class _Share(NamedTuple):
    """The batches of this process: every `world_size`-th part, unless an earlier run finished it."""

    rank: int
    world_size: int
    finished: set[int]
    per_part: int

    def wants(self, batch: int) -> bool:
        part = batch // self.per_part
        return part % self.world_size == self.rank and part not in self.finished

    def images(self, total: int | None, batch_size: int) -> int | None:
        starts = enumerate(range(0, total or 0, batch_size))
        return total and sum(min(batch_size, total - start) for n, start in starts if self.wants(n))


def _digest_of_names(source: Source | TimmStream) -> str | None:
    """Detects images that are added or removed while a run is stopped; only for files, which are quick to list."""
    if isinstance(source, TimmStream) or not source.has_files:
        return None
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(os.fsencode(os.path.abspath(source.path(i))) + b"\0")
    return digest.hexdigest()


def _join(output: Path, parts: Parts, limit: Limit, images: int, part_size: int) -> tuple[int, dict[int, str]]:
    """Writes the output from the parts of all processes."""
    limit.check([reason for _, _, reason in parts.skipped()], images, last=True)
    numbers = range(-(-images // part_size))
    missing = set(numbers) - parts.finished()
    if missing:
        raise ValueError(f"'{parts.folder}' has lost part {min(missing)}. Run the command again with --resume.")
    return write_output(output, parts, numbers)
