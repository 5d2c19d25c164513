"""Progress of a run, as a bar or as lines."""

import sys
import time

__all__ = ["Progress"]


class Progress:
    """Progress of a whole run: a bar on a terminal, plain lines elsewhere, silence where not enabled.

    Args:
        total: Updates in the run.
        done: Updates done before (resumed runs).
        epochs: Epochs in the run.
        interval: Updates between plain lines.
        enabled: False on all ranks but the first.
    """

    def __init__(self, total: int, done: int, epochs: int, interval: int, enabled: bool = True) -> None:
        self.total, self.first, self.done, self.epochs = total, done, done, epochs
        self.interval, self.enabled = interval, enabled
        self.start = time.perf_counter()
        self.bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def note(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.enabled:
            print(text, flush=True)

    def update(self, epoch: int, loss: float, lr: float, images_per_s: float, data_wait: float) -> None:
        """Counts one update; `data_wait` is the share of the time spent waiting for data."""
        self.done += 1
        if not self.enabled:
            return
        text = f"loss {loss:.4f}  lr {lr:.2e}  {images_per_s:.1f} images/s  data wait {data_wait:.0%}"
        if self.bar is not None:
            self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.done % self.interval == 0 or self.done == self.total:
            left = (time.perf_counter() - self.start) / (self.done - self.first) * (self.total - self.done)
            clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
            print(f"epoch {epoch + 1}/{self.epochs}  step {self.done}/{self.total}  {text}  left {clock}", flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self.bar is not None:
            self.bar.close()
