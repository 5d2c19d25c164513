"""What importing timm_convnextv2 adds to importing timm: `python -m benchmarks.import_time`."""

import statistics
import subprocess
import sys
import time

import torch

from benchmarks.measure import conditions, write_csv


def seconds(code: str) -> float:
    """Wall time of a fresh interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    codes = {"timm": "import timm", "both": "import timm, timm_convnextv2"}
    runs: dict[str, list[float]] = {name: [] for name in codes}
    for index in range(10):
        for name, code in codes.items():
            taken = seconds(code)
            if index:
                runs[name].append(taken)
    added = [b - a for a, b in zip(runs["timm"], runs["both"], strict=True)]
    row = {
        "measure": "seconds added to `import timm`", "median": f"{statistics.median(added):.3f}",
        "min": f"{min(added):.3f}", "max": f"{max(added):.3f}", "goal": "<= 0.2",
        "import_timm_s": f"{statistics.median(runs['timm']):.3f}",
    }  # fmt: skip
    print(row)
    print(write_csv("import_time", [row], conditions(torch.device("cpu"), torch.get_num_threads())))


if __name__ == "__main__":
    main()
