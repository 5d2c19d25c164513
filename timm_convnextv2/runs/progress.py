"""Progress of a run, as a bar or as lines."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm


def draws_bars() -> bool:
    """True on a terminal and in a notebook, where tqdm's bar is a widget."""
    return sys.stderr.isatty() or "ipykernel.zmqshell" in sys.modules


class ImageProgress:
    """A bar on a terminal or in a notebook, elsewhere a line every `interval` seconds; `total` is None if unknown."""

    def __init__(self, total: int | None, enabled: bool = True, interval: float = 5.0) -> None:
        self.total, self.enabled, self.interval = total, enabled, interval
        self.done, self.start = 0, time.perf_counter()
        self.shown_at = self.start
        self.bar = tqdm(total=total, unit="image", dynamic_ncols=True) if enabled and draws_bars() else None

    def update(self, images: int) -> None:
        """Counts images."""
        self.done += images
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(images)
        elif self.enabled and now - self.shown_at >= self.interval:
            self.shown_at = now
            of = f"/{self.total}" if self.total is not None else ""
            rate = self.done / (now - self.start)
            print(f"{self.done}{of} images  {rate:.1f} images/s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self.bar is not None:
            self.bar.close()


def with_progress(make: Callable[[Callable[[int], None]], Any], enabled: bool = True) -> Any:
    """Returns the result of `make`, which reports images through the function that it is called with."""
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


class ProgressBar:
    """A bar on a terminal or in a notebook, elsewhere a line every `interval` updates; `total`, `done` count those."""

    def __init__(self, total: int, done: int, epochs: int, interval: int, enabled: bool = True) -> None:
        self.total, self.first, self.done, self.epochs = total, done, done, epochs
        self.interval, self.enabled, self.start = interval, enabled, time.perf_counter()
        drawn = enabled and draws_bars()
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if drawn else None

    def note(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.enabled:
            print(text, flush=True)

    def step(self) -> bool:
        """Counts one update; whether its numbers are to be shown."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        return self.done % self.interval == 0 or self.done == self.total

    def show(self, epoch: int, loss: float, lr: float, images_per_s: float, data_wait: float) -> None:
        """Shows the epoch (from 0), loss and rate of the last update, and speed and data wait since the last call."""
        if not self.enabled:
            return
        text = f"loss {loss:.4f}  lr {lr:.2e}  {images_per_s:.1f} images/s  data wait {data_wait:.0%}"
        if self.bar is not None:
            self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
            self.bar.set_postfix_str(text)
            return
        left = (time.perf_counter() - self.start) / (self.done - self.first) * (self.total - self.done)
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        print(f"epoch {epoch + 1}/{self.epochs}  step {self.done}/{self.total}  {text}  left {clock}", flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self.bar is not None:
            self.bar.close()


class Stopwatch:
    """Speed of an epoch, and since the last lap."""

    def __init__(self, images_per_update: int) -> None:
        self.images_per_update = images_per_update
        self.start = self.lap_start = (time.perf_counter(), 0, 0.0)
        self.updates, self.waited = 0, 0.0

    def count(self, waited: float) -> None:
        """Counts an update that waited so many seconds for data."""
        self.updates, self.waited = self.updates + 1, self.waited + waited

    def _since(self, start: float, updates: int, waited: float) -> tuple[float, float, float]:
        seconds = max(time.perf_counter() - start, 1e-9)
        images = (self.updates - updates) * self.images_per_update
        return images / seconds, (self.waited - waited) / seconds, seconds

    def lap(self) -> tuple[float, float]:
        """Images per second and share of waiting since the last lap; a new one begins."""
        speed, wait, _ = self._since(*self.lap_start)
        self.lap_start = (time.perf_counter(), self.updates, self.waited)
        return speed, wait

    def totals(self) -> dict[str, float]:
        """Images per second, share of waiting, and seconds since the start."""
        speed, wait, seconds = self._since(*self.start)
        return {"images_per_s": round(speed, 1), "data_wait": round(wait, 4), "seconds": round(seconds, 1)}
