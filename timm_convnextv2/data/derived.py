"""A source that is made of another one's images."""

from typing import Any

from torch.utils.data import Dataset

__all__ = ["DerivedSource"]


class DerivedSource(Dataset):
    """Parts of another source's images: channels, and how stored values become pixels, are that source's.

    Attributes:
        source: The other source.
    """

    source: Any

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.source.in_chans

    @in_chans.setter
    def in_chans(self, value: int) -> None:
        self.source.in_chans = value

    @property
    def nodata(self) -> Any:
        """The record of pixels, or the value of those without data."""
        return self.source.nodata

    @nodata.setter
    def nodata(self, value: Any) -> None:
        self.source.nodata = value
