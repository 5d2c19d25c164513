"""How stored values become pixels, before mean and standard deviation: one record for every command."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from ...console import count

if TYPE_CHECKING:  # options are read without torch
    from torch import Tensor

CHANNELS = "channels"  # all pages are the channels of one image
STD_FLOOR = 1e-3  # a quarter of a grey level of 8 bits: noise of a constant image is not amplified
STANDARDIZE = ("channel", "image")


class Pixels(NamedTuple):
    """How stored values become the pixels that mean and std refer to."""

    # stored value that means "no data"; such pixels get the mean of their channel, see `load_image`
    nodata: float | None = None
    divide: float | None = None  # divisor of stored values; None: the largest value of integer types, and 1 for floats
    # smallest value after the division, one or one per channel; smaller ones are raised to it
    clip_low: tuple[float, ...] | None = None
    clip_high: tuple[float, ...] | None = None  # largest value, one or one per channel; larger ones are lowered to it
    # the page of a multi-page file that is the image: a number from 0, or 'channels': all pages are its channels.
    # None: see `load_image`
    page: int | str | None = None
    # DICOM values that become 0 to 1: centre and width, or 'file' for the window that each file names. None: the full
    # range of the stored bits, or the rescaled values if the file rescales
    dicom_window: str | tuple[float, float] | None = None
    # 'channel': each channel of each image gets mean 0 and variance 1; 'image': all channels together
    standardize: str | None = None

    @property
    def plain(self) -> bool:
        """Whether values keep the usual scale and nothing counts as nodata."""
        return self._replace(page=None, dicom_window=None) == PLAIN

    def check(self, in_chans: int) -> "Pixels":
        """Returns itself if it suits images with `in_chans` channels."""
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}.")
        divide, window, limits = self.divide, self.dicom_window, (self.clip_low, self.clip_high)
        if divide is not None and not (math.isfinite(divide) and divide > 0):
            raise ValueError(f"divide must be a number above 0, got {divide}.")
        if window is not None and window != "file" and not (len(window) == 2 and float(window[1]) > 0):
            raise ValueError(f"dicom_window is 'file' or a centre and a width above 0, got {window} (--dicom-window).")
        if window is not None and divide is not None:
            raise ValueError("dicom_window already gives 0 to 1: leave out divide (--dicom-window, --divide).")
        if self.standardize not in (None, *STANDARDIZE):
            raise ValueError(f"standardize is 'channel' or 'image', got {self.standardize!r} (--standardize).")
        if (limits[0] is None) != (limits[1] is None):
            raise ValueError("clip limits come in pairs: give both low and high ones (--clip-low, --clip-high).")
        for name, values in zip(("clip_low", "clip_high"), limits, strict=True):
            if values is not None and len(values) not in (1, in_chans):
                raise ValueError(
                    f"{name} has {count(len(values), 'value')} for {count(in_chans, 'channel')}, expected 1 or "
                    f"{in_chans}."
                )
        low, high = ((values or ()) * (in_chans // len(values or (0,))) for values in limits)
        for c, (a, b) in enumerate(zip(low, high, strict=True), 1):
            if not a < b:
                raise ValueError(f"clip limits are out of order in channel {c}: {a:g} is not below {b:g}.")
        return self

    def clip(self, image: Any) -> Any:
        """A decoded image `[C, H, W]` with its values within the limits, as float32; itself if there are no limits."""
        if self.clip_low is None or self.clip_high is None:
            return image
        image = image if image.is_floating_point() else image.float() / 255
        low, high = (image.new_tensor(v).view(-1, 1, 1) for v in (self.clip_low, self.clip_high))
        return image.maximum(low).minimum(high)

    def standardized(self, image: "Tensor", keep_gaps: bool = False) -> "Tensor":
        """A decoded image `[C, H, W]` or window with mean 0 and variance 1, float32; itself without `standardize`.

        NaN, which decoding leaves for nodata if `standardize` is set, does not count and becomes 0, or stays with
        `keep_gaps`. The standard deviation has the floor `STD_FLOOR`, in units of the pixels; a constant image is 0.
        """
        if self.standardize is None:
            return image
        x = image.double() / (1 if image.is_floating_point() else 255)  # sums of floats with large offsets cancel
        over = (1, 2) if self.standardize == "channel" else (0, 1, 2)
        x -= x.nanmean(over, keepdim=True)
        std = x.square().nanmean(over, keepdim=True).sqrt().clamp(min=STD_FLOOR)
        x = (x / std).float()
        return x if keep_gaps else x.nan_to_num(nan=0.0)

    def record(self) -> dict[str, Any]:
        """The values that are set, by name, for a JSON or YAML file; NaN and infinity become text."""
        values = {k: [*v] if isinstance(v, tuple) else v for k, v in self._asdict().items() if v is not None}
        if self.nodata is not None and not math.isfinite(self.nodata):
            values["nodata"] = str(self.nodata)
        return {"pages" if name == "page" else name: value for name, value in values.items()}

    @classmethod
    def from_record(cls, record: dict[str, Any] | None) -> "Pixels":
        """The inverse of `record`; None, for a config.json without section `pixels`, gives the defaults."""
        record = record or {}
        nodata, divide = (None if record.get(k) is None else float(record[k]) for k in ("nodata", "divide"))
        low, high = (record.get(k) and tuple(map(float, record[k])) for k in ("clip_low", "clip_high"))
        window = record.get("dicom_window")
        if window is not None and not isinstance(window, str):
            window = window[0] if len(window) == 1 else (float(window[0]), float(window[1]))
        return cls(nodata, divide, low, high, one_page(record.get("pages")), window, record.get("standardize"))

    def __str__(self) -> str:
        """In words, for messages and the model card; '' if nothing is set."""
        parts = [] if self.nodata is None else [f"{self.nodata:g} is nodata"]
        parts += [] if self.divide is None else [f"divided by {self.divide:g}"]
        if self.clip_low is not None and self.clip_high is not None:
            low, high = (" ".join(f"{v:.4g}" for v in values) for values in (self.clip_low, self.clip_high))
            parts.append(f"clipped to [{low}] .. [{high}]")
        if self.page is not None:
            parts.append("all pages are channels" if self.page == "channels" else f"page {self.page} of a file")
        if self.dicom_window == "file":
            parts.append("DICOM in the window that each file names")
        elif self.dicom_window is not None:
            parts.append("DICOM in the window with centre {:g} and width {:g}".format(*self.dicom_window))
        if self.standardize is not None:
            parts.append(f"each {'channel of each ' * (self.standardize == 'channel')}image to mean 0 and variance 1")
        return ", ".join(parts)


PLAIN = Pixels()  # immutable, so a safe default of parameters


def one_page(pages: Any) -> int | str | None:
    """`Pixels.page` from the words of `--pages` or a record; None if each page is an image of its own."""
    if isinstance(pages, list | tuple):
        if len(pages) != 1:
            return None
        pages = pages[0]
    if pages is None or pages == "all":
        return None
    return 0 if pages == "first" else "channels" if pages == "channels" else int(pages)
