"""What is wrong with an image, or with what reads it."""

from importlib.util import find_spec


class ImageError(ValueError):
    """One image cannot be used. Pretraining replaces it by another one and reports it."""


class EmptyError(ImageError):
    """One image, or the window that was read of it, has no data at all."""


class MissingPackageError(ValueError):
    """An optional package that the data needs is not installed. Never skipped: this is not the image's fault."""

    def __str__(self) -> str:
        # from a data worker it comes with the worker's traceback before it
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


def installed(package: str) -> bool:
    """Whether an optional package is there, without importing it."""
    return find_spec(package) is not None


def wrong_channels(found: str, in_chans: int) -> ImageError:
    """The error of an image that does not have the channels asked for."""
    return ImageError(
        f"has {found}, expected {in_chans} channel{'s' * (in_chans != 1)}; set --in-chans to what the images have, "
        "or convert them (more than 3 channels: multi-band TIFF or .npy)"
    )


def refuse_page(page: int | str | None, total: int) -> bool:
    """Whether to go to a page of a file whose pages are images of their own.

    Raises:
        ImageError: It has no such page, or all of several are asked for as channels.
    """
    if page == "channels" and total > 1:
        raise ImageError(f"has {total} pages, which are channels in TIFF, DICOM and OME-Zarr only (--pages channels)")
    if page is not None and page != "channels" and not 0 <= int(page) < total:
        raise ImageError(f"has {total} page{'s' * (total != 1)}, and page {page} is asked for (the first is 0)")
    return isinstance(page, int) and page > 0
