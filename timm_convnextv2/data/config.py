"""Options on which images to read and how stored values become pixels, shared by all commands."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import option
from .formats.pixels import CHANNELS, STANDARDIZE, Pixels, one_page

ERROR = 0.02  # standard error of the mean that `stats` reaches, in standard deviations of the pixels
Dirs = str | os.PathLike | Sequence[str | os.PathLike] | None


def as_list(value: Dirs) -> list[str]:
    """One path or several as a list."""
    if value is None:
        return []
    return [os.fspath(value)] if isinstance(value, str | os.PathLike) else [os.fspath(v) for v in value]


@dataclass(frozen=True)
class ImagePaths:
    """The locations of image files."""

    data_dir: tuple[str, ...] | None = option(
        None,
        "folders with images anywhere below, .tar files, patterns such as 'a/**/*.png' (quoted); root of --dataset",
        metavar="DIR",
        words="IMAGES",
    )
    data_list: tuple[str, ...] | None = option(
        None,
        ".txt (one path per line), .csv, .parquet (columns path, weight); relative to it, or to --data-dir",
        metavar="FILE",
    )
    index: str | None = option(
        None, "index of the image names: written if it does not exist, shared by all processes", metavar="FILE"
    )

    @classmethod
    def of(cls, data_dir: Dirs, data_list: Dirs = None) -> "ImagePaths":
        """Takes one path or several."""
        dirs, lists = (None if given is None else tuple(as_list(given)) for given in (data_dir, data_list))
        return cls(dirs, lists)


@dataclass(frozen=True)
class DataSet:
    """A data set that timm opens, or the demo data set; '' for image files."""

    dataset: str = option("", "timm's hfds/, hfids/, wds/, tfds/, torch/...; or 'demo'", metavar="NAME")
    split: str = option("train", "split of --dataset; for wds/ the names of the shards", metavar="NAME")
    num_images: int | None = option(
        None, "images of a stream that does not state its size, or of the demo data", metavar="N"
    )
    dataset_download: bool = option(False, "let --dataset download itself")
    input_key: str | None = option(None, "image column of --dataset", metavar="NAME")


def page_word(word: str) -> int | str:
    """A word of --pages: a number, 'all', 'first' or 'channels'."""
    return word if word in ("all", "first", CHANNELS) else int(word)


def _window_word(word: str) -> float | str:
    return word if word == "file" else float(word)


@dataclass(frozen=True)
class PixelOptions:
    """How stored values become pixels; `to_pixels` makes the record."""

    nodata: float | None = option(None, 'stored value meaning "no data"; gets the mean of the others', metavar="V")
    divide: float | None = option(None, "divisor of stored values (default: 255, 65535, floats 1)", metavar="X")
    clip_percentiles: tuple[float, float] | None = option(
        None, "clip each channel to these percentiles of the pixels, measured, e.g. 1 99", metavar=("LO", "HI")
    )
    clip_low: tuple[float, ...] | None = option(
        None, "smallest value after the division, one or one per channel; smaller ones are raised to it", metavar="X"
    )
    clip_high: tuple[float, ...] | None = option(None, "largest value; larger ones are lowered to it", metavar="X")
    dicom_window: tuple[float | str, ...] | None = option(
        None,
        "DICOM values to map to 0..1: 'file' (stored in each) or centre and width",
        metavar="X",
        parse=_window_word,
    )
    standardize: str | None = option(
        None, "bring each channel of each image, or each image, to mean 0 and variance 1", choices=STANDARDIZE
    )
    pages: tuple[int | str, ...] | None = option(
        None,
        "of TIFF, stacks, DICOM: all, numbers from 0 (each an image), first, channels",
        metavar="P",
        parse=page_word,
    )

    @classmethod
    def of(cls, pixels: Pixels) -> "PixelOptions":
        """The options that make this record."""
        window = (pixels.dicom_window,) if isinstance(pixels.dicom_window, str) else pixels.dicom_window
        pages = None if pixels.page is None else (pixels.page,)
        limits = pixels.clip_low, pixels.clip_high
        return cls(pixels.nodata, pixels.divide, None, *limits, window, pixels.standardize, pages)

    def to_pixels(self, in_chans: int | None = None) -> Pixels:
        """The record, checked against `in_chans` if given; --clip-percentiles adds its limits after measuring."""
        if self.clip_percentiles is not None and not 0 <= self.clip_percentiles[0] < self.clip_percentiles[1] <= 100:
            raise ValueError(
                "--clip-percentiles {:g} {:g}: expected 0 <= LO < HI <= 100.".format(*self.clip_percentiles)
            )
        page, window = one_page(check_pages(self.pages)), _window(self.dicom_window)
        pixels = Pixels(self.nodata, self.divide, self.clip_low, self.clip_high, page, window, self.standardize)
        return pixels if in_chans is None else pixels.check(in_chans)


def check_limits(pixels: PixelOptions) -> None:
    """Refuses limits that are measured and named."""
    if pixels.clip_percentiles is not None and (pixels.clip_low is not None or pixels.clip_high is not None):
        raise ValueError("--clip-percentiles measures the limits that --clip-low and --clip-high name: choose one.")


def check_pages(pages: Sequence[int | str] | None) -> Sequence[int | str] | None:
    """Returns the words of --pages; refuses words beside numbers, and negative numbers."""
    numbers = [page for page in pages or () if isinstance(page, int)]
    if pages and (min(numbers, default=0) < 0 or len(pages) > 1 and len(numbers) < len(pages)):
        raise ValueError(f"--pages takes all, first, channels, or numbers from 0 up, got {' '.join(map(str, pages))}.")
    return pages


def _window(words: Sequence[float | str] | None) -> str | tuple[float, float] | None:
    if words is None or list(words) == ["file"]:
        return None if words is None else "file"
    if len(words) != 2 or "file" in words:
        raise ValueError(f"--dicom-window takes 'file', or a centre and a width, got {' '.join(map(str, words))}.")
    return float(words[0]), float(words[1])


@dataclass(frozen=True)
class WindowOptions:
    """Which windows to read instead of whole images."""

    window_size: int | None = option(
        None, "read windows of S x S pixels, drawn by area, instead of whole images", metavar="S", at_least=1
    )
    windows_per_image: float | None = option(
        None, "windows per image and epoch, on average (default: as many as cover it)", metavar="N", above=0
    )
    min_content: float = option(0.0, "redraw a window if less than this fraction has content", metavar="X", at_least=0)
    content_std: float = option(
        0.01, "cells of 16 x 16 pixels have content above this standard deviation of pixels", metavar="X", at_least=0
    )


@dataclass(frozen=True)
class DemoOptions:
    """Which images to write, and with which annotations."""

    size: int = option(56, "height and width in pixels", metavar="N", at_least=8)
    train: int = option(160, "training images, a multiple of 8", metavar="N", at_least=8)
    validation: int = option(800, "validation images, a multiple of 8", metavar="N", at_least=8)
    seed: int = option(0, "seed of the images; no seed gives images of pretraining", metavar="S", at_least=0)
    coco: bool = option(False, "write FOLDER/{train,validation}.json with boxes and masks, images in images/")
    masks: bool = option(False, "write {train,validation}/masks/*.png (background 0), images in images/, classes.txt")


# fmt: off
@dataclass(frozen=True)
class Splitting:
    """How labelled images become training and test images."""

    validation_share: float = option(
        0.25, "fraction of the images to test on if --data-dir has no validation/", metavar="X")
    groups: str | None = option(
        None, "column of the CSV: images of one patient, slide or video are on one side of the split", metavar="COLUMN")
    group_by: str | None = option(
        None, "the same for folders CLASS/GROUP/IMAGE, and for the folders of a CSV's images",
        choices=("parent-folder",))
# fmt: on
