"""Windows of large images against decoding them whole, and the memory that windows of a huge image take.

    python -m benchmarks.windows

A sample is what pretraining makes of an image: read, crop, resize to 224, normalise, mask. Both candidates crop the
same drawn images; one reads a window of 512 x 512 pixels first, the other decodes the image. Their times are taken in
turn.

Then an image of 30,000 x 30,000 x 4 values of 8 bits, 3.6 GB, is generated in each of three formats, and windows of it
are read and a model is pretrained on them, in processes that may allocate at most 2 GiB (RLIMIT_DATA, which counts what
is allocated, not what is mapped from libraries). The files are deleted after it.
Writes ratios and peaks of memory with their conditions to `benchmarks/results/`.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
import zarr
from PIL import Image

from benchmarks.measure import conditions, ratio, time_in_turn, write_csv
from timm_convnextv2.commands.pretrain import main as pretrain
from timm_convnextv2.data import FolderSource, PretrainDataset, PretrainTransform, WindowOptions
from timm_convnextv2.data.sources.windows import WindowSource

WINDOW, HUGE, LIMIT = 512, 30_000, 2 * 2**30
SHOWN = 200  # windows of the huge image


def noise(size: int, channels: int) -> np.ndarray:
    """A smooth image with noise, `[size, size, channels]` uint8."""
    rng = np.random.default_rng(size)
    y, x = np.mgrid[:size, :size].astype(np.float32) / 40
    waves = [np.sin(x * (1 + c / 3)) * np.cos(y + c) for c in range(channels)]
    image = 128 + 90 * np.stack(waves, -1) + 4 * rng.standard_normal((size, size, channels), dtype=np.float32)
    return image.clip(0, 255).astype(np.uint8)


def write_zarr(path: Path, x: np.ndarray) -> None:
    """An OME-Zarr image in chunks of 512 x 512."""
    group = zarr.open_group(str(path), mode="w")
    group.create_array("0", shape=(x.shape[2], *x.shape[:2]), chunks=(1, 512, 512), dtype=x.dtype)[...] = np.moveaxis(
        x, 2, 0
    )
    axes = [{"name": name} for name in "cyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}


PLAIN: dict[str, Any] = dict(photometric="minisblack", planarconfig="contig")
TILED: dict[str, Any] = dict(tile=(256, 256))
# name: channels, writer
FORMATS: dict[str, tuple[int, Callable[[Path, np.ndarray], Any]]] = {
    "TIFF, tiles, deflate": (4, lambda p, x: tifffile.imwrite(p / "x.tif", x, compression="zlib", **PLAIN, **TILED)),
    "TIFF, tiles, JPEG": (
        3, lambda p, x: tifffile.imwrite(p / "x.tif", x, compression="jpeg", photometric="rgb", **TILED)),
    "TIFF, strips, deflate": (
        4, lambda p, x: tifffile.imwrite(p / "x.tif", x, compression="zlib", rowsperstrip=16, **PLAIN)),
    "TIFF, uncompressed": (4, lambda p, x: tifffile.imwrite(p / "x.tif", x, **PLAIN)),
    ".npy": (4, lambda p, x: np.save(p / "x.npy", x)),
    "OME-Zarr": (4, lambda p, x: write_zarr(p / "x.zarr", x)),
    "PNG (decoded whole)": (3, lambda p, x: Image.fromarray(x).save(p / "x.png", compress_level=1)),
}  # fmt: skip


def sampler(source: Any, channels: int) -> Callable[[], object]:
    """Makes the next sample of a source at each call."""
    transform = PretrainTransform(224, mean=[0.5] * channels, std=[0.25] * channels)
    dataset = PretrainDataset(source, transform, (7, 7), 0.6)
    epochs = iter(range(10**9))
    return lambda: dataset[next(epochs), 0]


def compare(sizes: list[int], rounds: int) -> list[dict[str, str]]:
    """Samples from windows and from whole images, in turn."""
    rows = []
    for size in sizes:
        for name, (channels, write) in FORMATS.items():
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), noise(size, channels))
                whole = FolderSource(folder, channels)
                windows = WindowSource(FolderSource(folder, channels), WindowOptions(WINDOW, 1))
                candidates = {"whole": sampler(whole, channels), "windows": sampler(windows, channels)}
                seconds = time_in_turn(candidates, rounds)
            middle, low, high = ratio(seconds["whole"], seconds["windows"])
            rows.append({
                "case": f"{name}, {size} x {size} x {channels}", "ratio": f"{middle:.1f}", "min": f"{low:.1f}",
                "max": f"{high:.1f}", "whole_ms": f"{1000 * statistics.median(seconds['whole']):.1f}",
                "windows_ms": f"{1000 * statistics.median(seconds['windows']):.2f}", "peak_mib": "",
            })  # fmt: skip
            print(rows[-1])
    return rows


def write_huge(path: Path, kind: str) -> None:
    """The huge image from a few random tiles; nothing larger than a row of tiles is in memory."""
    tiles = noise(1024, 4).reshape(4, 256, 4, 256, 4).swapaxes(1, 2).reshape(16, 256, 256, 4)
    side = -(-HUGE // 256)
    shape = (HUGE, HUGE, 4)
    if kind == ".npy":
        row = np.concatenate([tiles[i % 16] for i in range(side)], 1)[:, :HUGE].tobytes()
        with open(path, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(HUGE // 256):
                file.write(row)
            file.write(row[: HUGE % 256 * HUGE * 4])
        return
    packed = [t.tobytes() if kind == "TIFF, tiles" else zlib.compress(t.tobytes(), 1) for t in tiles]
    stream = (packed[i % 16] for i in range(side**2))
    options: dict[str, Any] = {} if kind == "TIFF, tiles" else {"compression": "zlib"}
    tifffile.imwrite(path, stream, shape=shape, dtype=np.uint8, bigtiff=True, **PLAIN, **TILED, **options)


def peak() -> float:
    """The most memory that this process had, in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024


def limited(task: str, folder: str, queue: Any) -> None:
    """Does a task within the limit, and tells its time and the peak of its memory, or its error."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        if task == "windows":
            source = WindowSource(FolderSource(folder, 4), WindowOptions(WINDOW, SHOWN))
            sample = sampler(source, 4)
            for _ in range(SHOWN):
                sample()
            done = SHOWN
        elif task == "whole":
            Image.MAX_IMAGE_PIXELS = None
            FolderSource(folder, 4)[0]
            done = 1
        else:
            words = [
                "--data-dir",
                folder,
                "--in-chans",
                "4",
                "--window-size",
                str(WINDOW),
                "--windows-per-image",
                "128",
            ]
            words += ["--model", "fcmae_convnextv2_atto", "--img-size", "128", "--batch-size", "16", "--epochs", "1"]
            words += ["--workers", "0", "--device", "cpu", "--output", f"{folder}-run", "--experiment", "a"]
            if pretrain(words) != 0:
                raise RuntimeError("the run failed")
            done = 128
        queue.put((1000 * (time.perf_counter() - start) / done, peak(), ""))
    except (MemoryError, ValueError, RuntimeError) as error:
        queue.put((0.0, peak(), f"{type(error).__name__}: {error}"))


def huge() -> list[dict[str, str]]:
    """Windows of the huge image, and a run on them, within the limit."""
    rows = []
    context = multiprocessing.get_context("spawn")
    names = {"TIFF, tiles, deflate": "x.tif", "TIFF, tiles": "x.tif", ".npy": "x.npy"}
    for kind, name in names.items():
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "huge"
            folder.mkdir()
            write_huge(folder / name, kind)
            for task in ("windows", "whole", "pretrain"):
                queue = context.Queue()
                process = context.Process(target=limited, args=(task, str(folder), queue))
                process.start()
                ms, most, error = queue.get()
                process.join()
                if (task == "whole") != bool(error):
                    raise RuntimeError(f"{task} of {kind}: {error or 'did not need more than the limit'}")
                rows.append({
                    "case": f"{kind}, {HUGE} x {HUGE} x 4, limit 2 GiB: {task}" + (" (out of memory)" if error else ""),
                    "ratio": "", "min": "", "max": "", "whole_ms": "", "windows_ms": "" if error else f"{ms:.2f}",
                    "peak_mib": f"{most:.0f}",
                })  # fmt: skip
                print(rows[-1], error[:300])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 8000])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*compare(args.sizes, args.rounds), *huge()]
    about = {
        **conditions(torch.device("cpu"), 1),
        "inputs": f"samples of 224 px from windows of {WINDOW} px or from whole images, {args.rounds} rounds in turn; "
        f"ratio = whole / windows time per sample; huge: {SHOWN} windows, and 128 in a run of pretraining (its time "
        "includes the start), peak = resident size of the process",
    }
    print(write_csv("windows", rows, about))


if __name__ == "__main__":
    main()
