"""The names of image files from an index, against listing their folders: time, and what memory it takes.

    python -m benchmarks.file_index

On real (empty) files, `open` opens an index as every process does, `open and check` also looks whether its folders have
changed, as the first one does, and `write` lists, asks for the sizes and writes, which happens once. At ten million
generated names there is nothing to list: there the index is opened in a process of its own, which then reads names at
random places, as training does; memory is what that adds to the process.
Prints ratios of times taken in turn within this run, and writes them with their conditions to `benchmarks/results/`.
"""

import argparse
import multiprocessing
import pickle
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import conditions, ratio, time_in_turn, write_csv
from timm_convnextv2.data import ImagePaths, create_source
from timm_convnextv2.data.paths.find import find_files
from timm_convnextv2.data.paths.index import Index, write_index
from timm_convnextv2.data.paths.listing import Listing, list_files, origins_of
from timm_convnextv2.data.paths.lists import FileNames
from timm_convnextv2.runs.group import Processes

PER_FOLDER = 1000


def make_files(root: Path, count: int) -> None:
    """Empty files, a thousand a folder."""
    for folder in range(-(-count // PER_FOLDER)):
        (root / f"{folder:06d}").mkdir()
        for i in range(min(PER_FOLDER, count - folder * PER_FOLDER)):
            (root / f"{folder:06d}" / f"{i:08d}.jpg").touch()


def compare(count: int, rounds: int) -> list[dict[str, str]]:
    """Index against listing, on files that are there."""
    with tempfile.TemporaryDirectory() as name:
        root, index = Path(name) / "images", Path(name) / "index"
        root.mkdir()
        make_files(root, count)
        origins = origins_of(root)
        find = partial(find_files, ImagePaths((str(root),), None, str(index)), "", 1.0, Processes(), progress=False)
        steps = {
            "list": lambda: list_files(origins),
            "open": lambda: Index(index).listing(origins),
            "open and check": find,
            "write": lambda: (index.unlink(missing_ok=True), find()),
        }
        steps["write"]()
        seconds = time_in_turn(steps, rounds, warmup=1)
    rows = []
    for which in ("open", "open and check", "write"):
        middle, low, high = ratio(seconds["list"], seconds[which])
        rows.append(
            {
                "case": f"{count} files, {which}",
                "seconds": f"{statistics.median(seconds[which]):.4g}",
                "list_seconds": f"{statistics.median(seconds['list']):.3g}",
                "ratio": f"{middle:.3g}", "min": f"{low:.3g}", "max": f"{high:.3g}",
            }
        )  # fmt: skip
    return rows


def generated(count: int) -> FileNames:
    """Names such as 000123/00123456.jpg."""
    block = np.empty((count, 19), np.uint8)
    block[:, 6], block[:, 15:] = ord("/"), np.frombuffer(b".jpg", np.uint8)
    numbers = np.arange(count)
    for columns, values in ((range(5, -1, -1), numbers // PER_FOLDER), (range(14, 6, -1), numbers)):
        for column in columns:
            values, digit = np.divmod(values, 10)
            block[:, column] = ord("0") + digit
    return FileNames(block.reshape(-1), np.arange(count + 1, dtype=np.int64) * 19)


def resident() -> int:
    """Bytes of this process in memory."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def open_there(index: str, root: str, reads: int, pipe) -> None:
    """Opens an index in this process and tells what that took."""
    origins = origins_of(root)
    before, start = resident(), time.perf_counter()
    source: Any = create_source(root, listing=Index(index).listing(origins))
    source.name(len(source) - 1)
    seconds, opened = time.perf_counter() - start, resident()
    start = time.perf_counter()
    for i in np.random.default_rng(0).integers(0, len(source), reads).tolist():
        source.path(i)
    pipe.send((seconds, (time.perf_counter() - start) / reads, before, opened, resident(), len(pickle.dumps(source))))


def open_generated(count: int, rounds: int, reads: int) -> dict[str, str]:
    """An index of generated names."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as root:
        origins, index = origins_of(root), str(Path(root) / "index")
        stamps = [(f"{root}/{i:06d}", 0) for i in range(count // PER_FOLDER)]
        start = time.perf_counter()
        write_index(index, Listing(origins, [generated(count)], stamps=stamps), np.zeros(count, np.int64))
        written = time.perf_counter() - start
        size = Path(index).stat().st_size
        told = []
        for _ in range(rounds):
            here, there = context.Pipe()
            process = context.Process(target=open_there, args=(index, root, reads, there))
            process.start()
            told.append(here.recv())
            process.join()
    seconds, read, before, opened, after, pickled = (list(values) for values in zip(*told, strict=True))

    def added(later: list[int]) -> str:
        return f"{max(b - a for a, b in zip(before, later, strict=True)) / 2**20:.1f}"

    return {
        "case": f"{count} generated names, open", "seconds": f"{statistics.median(seconds):.4g}",
        "seconds_max": f"{max(seconds):.4g}", "mib_opened": added(opened),
        "mib_after_reads": added(after),
        "us_per_read": f"{1e6 * statistics.median(read):.1f}", "bytes_pickled": str(max(pickled)),
        "file_mib": f"{size / 2**20:.0f}", "write_seconds": f"{written:.3g}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=200_000, help="empty files that are made and listed")
    parser.add_argument("--names", type=int, default=10_000_000, help="generated names")
    parser.add_argument("--reads", type=int, default=100_000, help="names read at random positions")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*compare(args.files, args.rounds), open_generated(args.names, args.rounds, args.reads)]
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key, "") for key in columns} for row in rows]
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items() if value), flush=True)
    about = {
        **conditions(torch.device("cpu"), 1),
        "inputs": f"{args.files} empty files in folders of {PER_FOLDER} on a local disk, in the cache; {args.names} "
        f"names of 19 bytes; {args.rounds} rounds in turn; ratio = time to list the folders / time of the case; memory "
        f"is what a process adds, after opening and after {args.reads} names read at random, the largest of the rounds",
    }
    print(write_csv("file_index", rows, about))


if __name__ == "__main__":
    main()
