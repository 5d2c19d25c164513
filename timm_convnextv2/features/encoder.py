"""Frozen models by the names that a user gives, and the images that they take."""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import chain
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from ..checkpoint.loading import load_model, model_name, model_pixels, model_window
from ..config import check_limits
from ..console import say
from ..data import ImageError, Pixels, check_readable, load_image
from ..data.samples.batches import map_batches, preprocessing
from ..data.sources.open import open_images
from ..data.sources.source import Source
from ..runs.device import check_device
from ..runs.progress import ImageProgress
from .extract import EXTRACTION, Embedded, Limit, choose_rows, embed_batches

SIZES_TRIED = 8
_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


@dataclass(frozen=True)
class Encoder:
    """A frozen model without classifier, in evaluation mode.

    `config` is timm's data config of its images; `pixels` is how stored values become pixels, as in its training.

        encoder = timm_convnextv2.open_encoder("runs/mine")
        rows, names, skipped = encoder.embed("images")  # float32 [N, D], N names
        encoder.model(encoder.transform(encoder.load_image("image.tif"))[None])  # the same by hand, [1, D]
    """

    name: str
    model: nn.Module
    config: dict[str, Any]
    pixels: Pixels
    window: int | None = None  # side in pixels of the windows that it was trained on; None: whole images

    @property
    def in_chans(self) -> int:
        return self.config["input_size"][0]

    @property
    def transform(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Decoded image to float32 `[C, H, W]`."""
        return preprocessing(self.config)

    def load_image(self, path: str | os.PathLike) -> torch.Tensor:
        """Decodes an image as in training: `[C, h, w]`, uint8, or float32 that is already scaled."""
        return load_image(path, self.in_chans, self.pixels)

    def embed(
        self, images: str | os.PathLike | Sequence[str | os.PathLike], *, batch_size: int = EXTRACTION.batch_size,
        workers: int = EXTRACTION.workers, amp: bool = False, all_stages: bool = False, max_bad_images: float = 0.01,
        progress: bool = True,
    ) -> Embedded:  # fmt: skip
        """One row of pooled features per image, as the command `embed` writes them: `rows, names, skipped`.

        `images` are files, or folders, `.tar` files and patterns such as 'scans/**/*.png'; rows have their order.
        `workers` processes decode; `amp` computes in bfloat16; for `all_stages` see `extract_features`. A `ValueError`
        says that more than the fraction `max_bad_images` cannot be decoded.
        """
        rows_of = choose_rows([self.model], all_stages)
        check_limits(replace(EXTRACTION, batch_size=batch_size, workers=workers))
        source = open_images(images, self.in_chans, self.pixels)
        check_readable(source)
        if progress and (warning := self.scale_warning(source)):
            say(warning, error=True)
        numbers = range(-(-len(source) // batch_size))
        batches = map_batches(source, self.transform, batch_size, numbers, min(workers, len(numbers) - 1))
        limit = Limit(max_bad_images, len(source))
        with closing(ImageProgress(len(source), enabled=progress)) as bar:
            how: dict[str, Any] = {"amp": amp, "rows_of": rows_of, "progress": bar.update}
            parts = [part for _, _, part in embed_batches(batches, self.model, limit, **how)]
        rows, names, skipped = zip(*parts, strict=True)
        return Embedded(np.concatenate([part for part in rows if len(part)]), [*chain(*names)], [*chain(*skipped)])

    def scale_warning(self, source: Source) -> str:
        """A warning if the model knows windows and the first images are at least twice as large; else ''."""
        sides = []
        for i in range(min(SIZES_TRIED, len(source)) if self.window else 0):
            with suppress(ImageError, OSError):  # reported when all images are read
                sides.append(min(source[i].shape[-2:]))
        side = median(sides) if sides else 0
        if not self.window or side < 2 * self.window:
            return ""
        return (
            f"warning: {self.name} was trained on windows of {self.window} px, and these images have {side:g} px: what "
            f"they show is {side / self.window:.1f} times smaller than in training. Give tiles of {self.window} px."
        )

    @property
    def settings(self) -> dict[str, Any]:
        return {key: self.config[key] for key in _PREPROCESSING}

    def with_random_weights(self, seed: int) -> nn.Module:
        """The same architecture with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return timm.create_model(self.name, pretrained=False, num_classes=0).eval()

    def digest(self) -> str:
        sha = hashlib.sha256()
        for key, value in self.model.state_dict().items():
            sha.update(key.encode())
            sha.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return sha.hexdigest()


def open_encoder(
    name: str | os.PathLike, img_size: int | None = None, nodata: float | None = None, device: str = EXTRACTION.device
) -> Encoder:
    """Loads a model on its device, by default the GPU of this process if there is one.

    Args:
        name: A size (atto), a name of timm with weights, the folder of a run, `local-dir:FOLDER`, `hf-hub:USER/NAME`.
        img_size: Side of its square inputs in pixels, by default the model's.
        nodata: Stored value meaning "no data", by default that of its training.
    """
    return open_frozen(name, img_size, nodata, device, num_classes=0)


def open_frozen(
    name: str | os.PathLike, img_size: int | None, nodata: float | None = None, device: str = EXTRACTION.device,
    **kwargs: Any,
) -> Encoder:  # fmt: skip
    """`open_encoder` with the classifier, if the model has one; `kwargs` go to `timm.create_model`."""
    name = model_name(os.fspath(name))
    network = load_model(name, **kwargs).eval()
    cfg: Any = network.pretrained_cfg
    config = resolve_model_data_config(network, args={"in_chans": cfg["input_size"][0], "img_size": img_size})
    (height, width), size = cfg["input_size"][1:], tuple(config["input_size"][1:])
    if cfg.get("fixed_input_size") and size != (height, width):
        raise ValueError(f"--img-size {img_size}: '{name}' takes images of {height} x {width} only. Leave it out.")
    info: Any = getattr(network, "feature_info", None)
    stride = info[-1]["reduction"] if info else 1
    if min(size) < stride:
        raise ValueError(f"--img-size {img_size} is smaller than the model's stride, {stride} pixels.")
    own_device = check_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
    pixels = model_pixels(name, config["input_size"][0], nodata)
    return Encoder(name, network.to(own_device), config, pixels, model_window(name))
