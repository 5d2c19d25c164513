"""`--keep-best`: when the encoder is better than it has ever been in this run."""

import math
from typing import Any

__all__ = ["KEEP_BEST", "Best"]

# what may decide, and whether more of it is better
KEEP_BEST = {"knn": True, "ridge": True, "loss": False}


class Best:
    """The best value of a measure so far.

    Args:
        name: One of `KEEP_BEST`.
        rows: Of summary.csv, where a run is resumed.
    """

    def __init__(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.name = name
        self.value = -math.inf
        for row in rows:
            self.improves({name: row.get(f"eval_{name}") or ""})

    def improves(self, measured: dict[str, float | str]) -> bool:
        """Whether an epoch is the best so far, which is kept in mind; False where the measure was not due."""
        found = measured.get(self.name, "")
        if found == "" or not math.isfinite(float(found)):
            return False
        value = float(found) if KEEP_BEST[self.name] else -float(found)
        better = value > self.value
        self.value = max(value, self.value)
        return better
