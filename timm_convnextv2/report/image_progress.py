"""Images and images per second, as a bar or as lines."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

__all__ = ["ImageProgress", "with_progress"]


class ImageProgress:
    """A bar on a terminal, a line every ten seconds elsewhere, both on stderr; silence where not enabled.

    Args:
        total: Images of this process; None where they are not known.
        enabled: False on all processes but the first.
        interval: Seconds between plain lines.
    """

    def __init__(self, total: int | None, enabled: bool = True, interval: float = 10.0) -> None:
        self.total, self.enabled, self.interval = total, enabled, interval
        self.done, self.start = 0, time.perf_counter()
        self.told = self.start
        self.bar = tqdm(total=total, unit="image", dynamic_ncols=True) if enabled and sys.stderr.isatty() else None

    def update(self, images: int) -> None:
        """Counts images."""
        self.done += images
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(images)
        elif self.enabled and now - self.told >= self.interval:
            self.told = now
            of = f"/{self.total}" if self.total is not None else ""
            rate = self.done / (now - self.start)
            print(f"{self.done}{of} images  {rate:.1f} images/s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self.bar is not None:
            self.bar.close()


def with_progress(make: Callable[[Callable[[int], None]], Any], enabled: bool = True) -> Any:
    """What `make` returns, while it tells of images by the function that it is called with."""
    bar = None

    def tick(images: int) -> None:
        nonlocal bar
        bar = bar or ImageProgress(None, enabled)
        bar.update(images)

    try:
        return make(tick)
    finally:
        if bar is not None:
            bar.close()
