#!/usr/bin/env python3
"""Embeddings of a folder of images: one row of features for each image, as .npy or .safetensors.

    python examples/embed.py --model local-dir:output/embedded/encoder --data-dir IMAGES --output embeddings.npy
    python examples/embed.py --model hf-hub:USER/NAME --data-dir IMAGES --output embeddings.safetensors

IMAGES may be flat or nested: png, jpeg, tif, 16-bit, many channels as .npy, ...; they are resized, cropped and
normalised as the model's config says. Written are, when all is done, whole or not at all:

    embeddings.npy              float32 [N, num_features]; as .safetensors the same under the name "embeddings"
    embeddings.npy.csv          column "file": the image of each row, below IMAGES; the order is fixed
    embeddings.npy.skipped.csv  columns "file" and "reason": images that cannot be decoded and have no row, if any

Rows go to the disk as they come, so that memory does not limit the number of images; at the end the disk holds the
result twice for a moment. On the same machine, the same command gives the same bytes.
"""

import argparse
import csv
import os
import shutil
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from common import load_model
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from timm_convnextv2.data import FolderSource, ImageError, MissingPackageError, check_readable


class Images(Dataset):
    """`(i, image)` of a source, preprocessed; in place of an image that cannot be decoded, the error."""

    def __init__(self, source: FolderSource, config: dict[str, Any]) -> None:
        self.source = source
        # timm's resizing and cropping, on tensors: these may be 16-bit or have many channels; scaling comes after
        geometry = {k: config[k] for k in ("input_size", "interpolation", "crop_pct", "crop_mode")}
        scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
        self.transform = v2.Compose([create_transform(**geometry, normalize=False), *scale])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor | Exception]:
        try:
            image = self.source[i]
        except (ImageError, MissingPackageError, OSError) as e:
            return i, e
        return i, self.transform(image)


@torch.inference_mode()
def embed(
    model: str,
    data_dir: str | os.PathLike,
    output: str | os.PathLike,
    *,
    batch_size: int = 64,
    img_size: int | None = None,
    device: str = "cpu",
    workers: int = 0,
    max_bad_images: float = 0.01,
    overwrite: bool = False,
) -> tuple[int, dict[int, str]]:
    """Writes the embeddings of all images below `data_dir`; the arguments are the options of the script.

    Returns:
        Number of rows; the images that were skipped, as `{number in the source: reason}`.

    Raises:
        ValueError: An output that must not be written, a model, folder or device that cannot be used, or more bad
            images than allowed.
    """
    root, output = Path(data_dir), Path(output)
    names, bad = (output.with_name(output.name + end) for end in (".csv", ".skipped.csv"))
    if output.suffix not in (".npy", ".safetensors") or output.is_dir():
        raise ValueError(f"The output is '{output}', expected a file whose name ends in .npy or .safetensors.")
    if output.suffix == ".npy" and root.resolve() in output.resolve().parents:
        raise ValueError(f"'{output}' lies among the images, where .npy files count as images. Write it elsewhere.")
    if (output.exists() or names.exists()) and not overwrite:
        raise ValueError(f"'{output}' or its .csv exists. Choose another --output, or replace both with --overwrite.")
    if not 0 <= max_bad_images <= 1:
        raise ValueError(f"--max-bad-images is a share between 0 and 1, got {max_bad_images}.")
    network = load_model(model, num_classes=0).eval()
    in_chans, stride = network.pretrained_cfg["input_size"][0], network.feature_info[-1]["reduction"]
    config = resolve_model_data_config(network, args={"in_chans": in_chans, "img_size": img_size})
    if min(config["input_size"][1:]) < stride:
        raise ValueError(f"--img-size {img_size} is smaller than the model's stride, {stride} pixels.")
    try:
        network = network.to(device)
    except (AssertionError, RuntimeError) as e:
        raise ValueError(f"--device {device} cannot be used: {e}") from e
    source = FolderSource(root, in_chans)
    check_readable(source)

    def name(i: int) -> str:
        return os.path.relpath(source.path(i), root)

    skipped: dict[int, str] = {}
    loader = DataLoader(Images(source, config), batch_size, num_workers=workers, collate_fn=list)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        raw, *parts = (Path(folder) / part for part in ("raw", bad.name, names.name, output.name))
        with open(raw, "wb") as file:
            for batch in tqdm(loader, disable=None):  # a bar on a terminal only
                for i, image in batch:
                    if isinstance(image, MissingPackageError):
                        raise image
                    if isinstance(image, Exception):
                        skipped[i] = str(image)
                if len(skipped) > max_bad_images * len(source) or len(skipped) == len(source):
                    raise ValueError(
                        f"{len(skipped)} of {len(source)} images cannot be decoded, --max-bad-images allows a share of "
                        f"{max_bad_images}; nothing was written:\n" + "\n".join(list(skipped.values())[:10])
                    )
                images = [image for i, image in batch if i not in skipped]
                if images:
                    network(torch.stack(images).to(device)).cpu().numpy().tofile(file)
        matrix = np.memmap(raw, np.float32, "r").reshape(len(source) - len(skipped), -1)
        if output.suffix == ".npy":
            np.save(parts[2], matrix)
        else:
            safetensors.numpy.save_file({"embeddings": matrix}, parts[2])
            shutil.copymode(raw, parts[2])  # safetensors makes files that only their owner can read
        for part, header, rows in (
            (parts[0], ("file", "reason"), ((name(i), reason) for i, reason in skipped.items())),
            (parts[1], ("file",), ((name(i),) for i in range(len(source)) if i not in skipped)),
        ):
            # file names may have bytes that are not UTF-8
            with open(part, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(chain([header], rows))
        for file in (output, bad):  # nothing old beside something new, whenever this is cut off
            file.unlink(missing_ok=True)
        for part, file in zip(parts, (bad, names, output), strict=True):
            if file != bad or skipped:
                os.replace(part, file)
    return len(matrix), skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="local-dir:FOLDER or hf-hub:USER/NAME")
    parser.add_argument("--data-dir", required=True, help="folder with images anywhere below it")
    parser.add_argument("--output", required=True, help="file to write, .npy or .safetensors")
    parser.add_argument("-b", "--batch-size", type=int, default=64, help="images at a time")
    parser.add_argument("--img-size", type=int, help="side of the square crops in pixels (default: the model's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-j", "--workers", type=int, default=4, help="processes that decode images; 0: this one")
    parser.add_argument("--max-bad-images", type=float, default=0.01, help="stop when a larger share is unreadable")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    args = vars(parser.parse_args())
    rows, skipped = embed(**args)
    for reason in skipped.values():
        print(f"skipped: {reason}", file=sys.stderr)
    print(f"{args['output']}: {rows} rows; {len(skipped)} images skipped")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
