"""What is wrong with an image, or with what reads it."""

__all__ = ["ImageError", "MissingPackageError", "wrong_channels"]


class ImageError(ValueError):
    """One image cannot be used. Pretraining replaces it by another one and reports it."""


class MissingPackageError(ValueError):
    """An optional package that the data needs is not installed. Never skipped: this is not the image's fault."""

    def __str__(self) -> str:
        # from a data worker it comes with the worker's traceback before it
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


def wrong_channels(found: str, in_chans: int) -> ImageError:
    """The error of an image that does not have the channels asked for."""
    return ImageError(
        f"has {found}, expected {in_chans} channel{'s' * (in_chans != 1)}; set --in-chans to what the images have, "
        "or convert them (more than 3 channels: multi-band TIFF or .npy)"
    )
