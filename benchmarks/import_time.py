"""What importing timm_convnextv2 adds to importing timm, in fresh interpreters: `python -m benchmarks.import_time`."""

import statistics
import subprocess
import sys

import torch

from benchmarks.measure import conditions, write_csv

CODE = """
import time, timm
start = time.perf_counter()
import timm_convnextv2
print(time.perf_counter() - start)
"""


def main() -> None:
    runs = [float(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(8)][1:]
    row = {
        "measure": "seconds added to `import timm`", "median": f"{statistics.median(runs):.3f}",
        "min": f"{min(runs):.3f}", "max": f"{max(runs):.3f}", "goal": "<= 0.2",
    }  # fmt: skip
    print(row)
    print(write_csv("import_time", [row], conditions(torch.device("cpu"), torch.get_num_threads())))


if __name__ == "__main__":
    main()
