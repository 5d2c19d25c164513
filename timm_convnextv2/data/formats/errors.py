"""Errors of images, and of the packages that read them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from ...console import count

REMEDY = 60  # characters of a text that is worth giving once


class ImageError(ValueError):
    """One image cannot be used. Pretraining replaces it by another one and reports it."""


class EmptyError(ImageError):
    """One image, or the window that was read from it, contains nothing but nodata."""


class WorkerError(ValueError):
    """An error whose message stays one line when a data worker raises it."""

    def __str__(self) -> str:
        # PyTorch puts the worker's traceback before the message
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class MissingPackageError(WorkerError):
    """An optional package that the data needs is not installed. Never skipped, because the image is not at fault."""


class UnreadableError(WorkerError):
    """A file cannot be used; names the file and the reason."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns errors of a file into an `UnreadableError` whose message begins with `what`."""
    try:
        yield
    except MissingPackageError:
        raise
    except (ValueError, OSError) as e:
        raise UnreadableError(f"{what} cannot be used: {' '.join(str(e).split())}") from e


def installed(package: str) -> bool:
    """Whether an optional package is installed; does not import it."""
    return find_spec(package) is not None


def wrong_channels(found: str, in_chans: int, channels: int | None) -> ImageError:
    """The error for an image, described as `found`, without the requested channels; None: how many is not known."""
    of = count(channels or 0, "channel")
    model = (
        f"give a model of {of}, which pretrain and finetune make with --in-chans {channels}, or " if channels else ""
    )
    return ImageError(
        f"has {found}, expected {count(in_chans, 'channel')}, as the model takes: {model}convert the images (more than "
        "3 channels are multi-band TIFF or .npy)"
    )


def channels_of(shape: tuple[int, ...]) -> int | None:
    """The channels of an array without named axes; None if it is no image."""
    return {2: 1, 3: min(shape, default=0)}.get(len(shape))


def listed(messages: Sequence[str], most: int) -> str:
    """The first messages about images, a line each; a remedy, after the last colon, is given once."""
    lines, seen = [], set[str]()
    for message in messages[:most]:
        text, _, end = message.rpartition(": ")
        lines.append(text if end in seen else message)
        seen |= {end} if len(end) > REMEDY else set()
    return "\n".join(lines)


def refuse_page(page: int | str | None, total: int) -> bool:
    """Whether to seek to a page of a file whose pages are separate images."""
    if page == "channels" and total > 1:
        raise ImageError(f"has {total} pages, which are channels in TIFF, DICOM and OME-Zarr only (--pages channels)")
    if page is not None and page != "channels" and not 0 <= int(page) < total:
        raise ImageError(f"has {total} page{'s' * (total != 1)}, got page {page} (the first is 0)")
    return isinstance(page, int) and page > 0
