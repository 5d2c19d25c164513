"""What becomes of stored values before mean and standard deviation: one record, for every command."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Stored:
    """Asks the decoder for what was stored: nodata comes as NaN instead of as a mean, and this says what the type was.

    Attributes:
        kind: Type of the last image's values, such as 'uint16'; '' before the first.
        unit: What its stored values were divided by.
        largest: The largest value that the type holds, divided likewise; None for floats.
    """

    def __init__(self) -> None:
        self.kind, self.unit, self.largest = "", 1.0, None

    def note(self, kind: str, unit: float, largest: float | None) -> None:
        """Sets the attributes."""
        self.kind, self.unit, self.largest = kind, unit, largest


class Pixels(NamedTuple):
    """How stored values become the pixels that mean and standard deviation are of.

    Attributes:
        nodata: Stored value of pixels that are no data, replaced by the mean of their channel; see `load_image`.
        divide: What stored values are divided by; None for the largest value of unsigned and signed integer types, and
            1 for floats.
        clip_low: Smallest value after the division, one or one a channel; smaller ones become it.
        clip_high: Largest likewise.
        stored: For measurements, see `Stored`; no part of the record.
        page: Which page of a file of several is the image: a number from 0, or 'channels': all of them are its
            channels. None: as `load_image` says.
        dicom_window: Which values of DICOM become 0 and 1: a centre and a width, or 'file': those that the file names.
            None: all that its bits hold, or, where the file rescales, the rescaled values as they are.
    """

    nodata: float | None = None
    divide: float | None = None
    clip_low: tuple[float, ...] | None = None
    clip_high: tuple[float, ...] | None = None
    stored: Stored | None = None
    page: int | str | None = None
    dicom_window: str | tuple[float, float] | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing differs from the usual scale."""
        return self._replace(page=None, dicom_window=None) == PLAIN

    def check(self, in_chans: int) -> "Pixels":
        """Itself, if it suits images of so many channels.

        Raises:
            ValueError: A divisor that is not above 0, limits of other channels or out of order.
        """
        if self.divide is not None and not (math.isfinite(self.divide) and self.divide > 0):
            raise ValueError(f"divide must be a number above 0, got {self.divide}.")
        if self.dicom_window is not None and self.dicom_window != "file":
            width = self.dicom_window[1] if len(self.dicom_window) == 2 else 0
            if isinstance(width, str) or not width > 0:
                raise ValueError(
                    f"dicom_window is 'file' or a centre and a width above 0, got {self.dicom_window} (--dicom-window)."
                )
        if self.dicom_window is not None and self.divide is not None:
            raise ValueError("dicom_window already gives 0 to 1: leave out divide (--dicom-window, --divide).")
        if (self.clip_low is None) != (self.clip_high is None):
            raise ValueError(
                "clip limits come in pairs: give both the low and the high ones (--clip-low, --clip-high)."
            )
        for name, values in (("clip_low", self.clip_low), ("clip_high", self.clip_high)):
            if values is not None and len(values) not in (1, in_chans):
                raise ValueError(f"{name} has {len(values)} values for {in_chans} channels: one, or one a channel.")
        if self.clip_low is not None and self.clip_high is not None:
            low, high = (values * (in_chans // len(values)) for values in (self.clip_low, self.clip_high))
            for c, (a, b) in enumerate(zip(low, high, strict=True), 1):
                if not a < b:
                    raise ValueError(f"clip limits are out of order in channel {c}: {a:g} is not below {b:g}.")
        return self

    def clip(self, image: Any) -> Any:
        """A decoded image `[C, H, W]` with its values within the limits, as float32; itself where there are none."""
        if self.clip_low is None or self.clip_high is None:
            return image
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        low, high = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.clip_low, self.clip_high))
        return torch.minimum(torch.maximum(image, low), high)

    def record(self) -> dict[str, Any]:
        """For a JSON or YAML file: what is set, by name; empty where nothing is. NaN and infinity are text."""
        values: dict[str, Any] = {}
        if self.nodata is not None:
            values["nodata"] = self.nodata if math.isfinite(self.nodata) else str(self.nodata)
        if self.divide is not None:
            values["divide"] = self.divide
        if self.clip_low is not None and self.clip_high is not None:
            values |= {"clip_low": list(self.clip_low), "clip_high": list(self.clip_high)}
        if self.page is not None:
            values["pages"] = self.page
        if self.dicom_window is not None:
            values["dicom_window"] = self.dicom_window if self.dicom_window == "file" else [*self.dicom_window]
        return values

    @classmethod
    def from_record(cls, record: dict[str, Any] | None) -> "Pixels":
        """The inverse of `record`; takes the section `pixels` of a config.json, None where it has none."""
        record = record or {}

        def limits(name: str) -> tuple[float, ...] | None:
            values: Sequence[float] | None = record.get(name)
            return None if values is None else tuple(map(float, values))

        nodata, divide = (None if record.get(k) is None else float(record[k]) for k in ("nodata", "divide"))
        window = record.get("dicom_window")
        if window is not None and not isinstance(window, str):
            window = window[0] if len(window) == 1 else (float(window[0]), float(window[1]))
        page = one_page(record.get("pages"))
        return cls(nodata, divide, limits("clip_low"), limits("clip_high"), page=page, dicom_window=window)

    def __str__(self) -> str:
        """In words, for messages and the model card; '' where nothing is set."""
        parts = [] if self.nodata is None else [f"{self.nodata:g} is nodata"]
        parts += [] if self.divide is None else [f"divided by {self.divide:g}"]
        if self.clip_low is not None and self.clip_high is not None:
            low, high = (" ".join(f"{v:.4g}" for v in values) for values in (self.clip_low, self.clip_high))
            parts.append(f"clipped to [{low}] .. [{high}]")
        if self.page is not None:
            parts.append(
                "all pages of a file are channels" if self.page == "channels" else f"page {self.page} of a file"
            )
        if self.dicom_window == "file":
            parts.append("DICOM in the window that each file names")
        elif self.dicom_window is not None:
            parts.append("DICOM in the window with centre {:g} and width {:g}".format(*self.dicom_window))
        return ", ".join(parts)


PLAIN = Pixels()  # immutable, so a safe default of parameters


def one_page(pages: Any) -> int | str | None:
    """The page that `Pixels.page` takes, of the words of `--pages` or a record; None where they are several samples."""
    if isinstance(pages, list | tuple):
        if len(pages) != 1:
            return None
        pages = pages[0]
    if pages is None or pages == "all":
        return None
    return 0 if pages == "first" else "channels" if pages == "channels" else int(pages)
