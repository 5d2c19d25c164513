"""Samples of large JPEGs, decoded at full size against reduced: time, and what the pictures lose.

    python -m benchmarks.decode

For each size, photograph-like JPEGs are drawn (the demo data's objects, under 1/f texture and sensor noise)
and saved at several qualities with and without chroma subsampling. Both candidates read the same files with the same
seeds; the time is that of a whole sample: decode, crop, resize, normalise, mask. PSNR is between the two results in
[0, 1], before normalisation, over the samples that were decoded reduced. For the choice of `MIN_OVERSAMPLING` it is
also given for crops that keep just the factor in question, at each reduction.
Prints ratios of times taken in turn within this run, and writes them with their conditions to `benchmarks/results/`.
"""

import argparse
import io
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import conditions, ratio, time_in_turn, write_csv
from timm_convnextv2.data import DemoSource, FolderSource, PretrainDataset, PretrainTransform
from timm_convnextv2.data.formats.decode import decode
from timm_convnextv2.data.formats.pillow import Choose, Reduced
from timm_convnextv2.data.samples.transform import MIN_OVERSAMPLING

KINDS = ((75, "4:2:0"), (90, "4:2:0"), (90, "4:4:4"), (95, "4:2:0"))  # quality, chroma


def photograph(size: int, index: int) -> Image.Image:
    """A square RGB picture of `size` pixels with the spectrum of a photograph, and noise as of a sensor."""
    rng = np.random.default_rng(index)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1
    noise = rng.standard_normal((size, size), dtype=np.float32)
    texture = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(size, size))
    texture *= 25 / texture.std()
    picture = DemoSource(8, size, objects=True)[index % 8].permute(1, 2, 0).numpy() + texture[..., None]
    picture += 2 * rng.standard_normal((size, size, 3), dtype=np.float32)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, size: int, count: int) -> None:
    """Writes `count` photographs in each of `KINDS` as JPEG."""
    for index in range(count):
        picture = photograph(size, index)
        for quality, chroma in KINDS:
            name = f"{index}_{quality}_{chroma.replace(':', '')}.jpg"
            picture.save(folder / name, quality=quality, subsampling=chroma)


class Full(FolderSource):
    """The folder without reduced decoding."""

    def read(self, i: int, choose: Choose | None = None, seed: int | None = None) -> torch.Tensor | Reduced:
        """Ignores `choose`."""
        return super().read(i)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]; 120 for equal ones."""
    return -10 * (a - b).square().mean().clamp_min(1e-12).log10().item()


def psnr_at(content: bytes, factor: float, interpolation: str, seed: int) -> Iterator[float]:
    """PSNR of a JPEG reduced by 2, 4 and 8, for outputs that leave the crop `factor` times as many pixels."""
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
    crop = PretrainTransform(8)
    torch.manual_seed(seed)
    _, _, height, width = crop._box((height, width))
    full = decode(content, 3, "x.jpg")
    for reduction in (2, 4, 8):
        out = (int(height / reduction / factor), int(width / reduction / factor))
        transform = PretrainTransform(out, mean=(0,) * 3, std=(1,) * 3, interpolation=interpolation)
        results = []
        for picture in (full, decode(content, 3, "x.jpg", lambda _, r=reduction: r)):
            torch.manual_seed(seed)
            results.append(transform(picture))
        yield psnr(*results)


def summary(values: list[float]) -> dict[str, str]:
    """Median and minimum as columns."""
    return {"psnr_median_db": f"{statistics.median(values):.1f}", "psnr_min_db": f"{min(values):.1f}"}


def compare(size: int, img_size: int, count: int, rounds: int) -> dict[str, str]:
    """Times and PSNR of both candidates on squares of `size` pixels, as a row of the table."""
    with tempfile.TemporaryDirectory() as name:
        write_photographs(Path(name), size, count)
        options = (PretrainTransform(img_size, mean=(0,) * 3, std=(1,) * 3), (7, 7), 0.6)
        full, reduced = (PretrainDataset(source(name), *options) for source in (Full, FolderSource))
        keys = [(epoch, i) for epoch in range(2) for i in range(len(full))]
        values = [psnr(full[key][0], reduced[key][0]) for key in keys]
        steps: dict[str, Any] = {
            "full": lambda: [full[key] for key in keys],
            "reduced": lambda: [reduced[key] for key in keys],
        }
        seconds = time_in_turn(steps, rounds, warmup=1)
    changed = [value for value in values if value < 100] or values
    middle, low, high = ratio(seconds["full"], seconds["reduced"])
    return {
        "case": f"{size} px", "ratio": f"{middle:.2f}", "min": f"{low:.2f}", "max": f"{high:.2f}",
        **{f"{which}_ms": f"{1e3 * statistics.median(times) / len(keys):.1f}" for which, times in seconds.items()},
        "share_reduced": f"{sum(value < 100 for value in values) / len(values):.2f}", **summary(changed),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[500, 1000, 2000, 4000], metavar="PIXELS")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--count", type=int, default=3, help="pictures per size, each in four kinds of JPEG")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader's worker
    rows: list[dict[str, str]] = []

    def add(row: dict[str, str]) -> None:
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    for size in args.sizes:
        add(compare(size, args.img_size, args.count, args.rounds))
    with tempfile.TemporaryDirectory() as name:
        write_photographs(Path(name), 2003, 1)  # divisible by no reduction
        contents = [path.read_bytes() for path in sorted(Path(name).iterdir())]
    for interpolation in ("bicubic", "bilinear"):
        for factor in (1, 1.25, 1.5, 2, 3):
            values = [v for c in contents for s in range(4) for v in psnr_at(c, factor, interpolation, s)]
            chosen = " (chosen)" if factor == MIN_OVERSAMPLING else ""
            add(
                {
                    **dict.fromkeys(rows[0], ""),
                    "case": f"oversampling {factor}{chosen} {interpolation}",
                    **summary(values),
                }
            )
    about = {
        **conditions(torch.device("cpu"), 1),
        "inputs": f"{args.img_size} px from JPEGs of {args.count} pictures x {len(KINDS)} kinds, {args.rounds} rounds "
        "in turn; ratio = full / reduced time per sample; PSNR is of the samples that were decoded reduced",
    }
    print(write_csv("decode", rows, about))


if __name__ == "__main__":
    main()
