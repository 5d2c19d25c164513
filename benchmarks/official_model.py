"""The official FCMAE on MinkowskiEngine, from a checkout of https://github.com/facebookresearch/ConvNeXt-V2.

Nothing of it is kept here. Its depthwise convolution is in an engine of its own (a fork, with CUDA kernels); on the
released engine 0.5.4 `MinkowskiChannelwiseConvolution` takes that place, which has the same parameters.
"""

import sys
import types
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_convnextv2 import FCMAE
from timm_convnextv2.checkpoint import to_official
from timm_convnextv2.ops.minkowski import engine

__all__ = ["SIZES", "official_fcmae", "official_loss", "whole_grid"]

SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
PACKAGE = "official_convnextv2"


def _fcmae_module(checkout: Path) -> Any:
    """The checkout's `models/fcmae.py`.

    Raises:
        ValueError: There is none.
        RuntimeError: MinkowskiEngine is missing.
    """
    if not (checkout / "models/fcmae.py").is_file():
        raise ValueError(f"{checkout} is no checkout of github.com/facebookresearch/ConvNeXt-V2: no models/fcmae.py.")
    me = engine()
    if not hasattr(me, "MinkowskiDepthwiseConvolution"):
        me.MinkowskiDepthwiseConvolution = me.MinkowskiChannelwiseConvolution
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(checkout / "models")]
        sys.modules[PACKAGE] = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that timm moved
        return import_module(f"{PACKAGE}.fcmae")


def official_fcmae(checkout: Path, model: FCMAE) -> nn.Module:
    """The official model with the shape and the weights of ours.

    Args:
        checkout: Of the official repository.
        model: With a stem of 4x4, square images and the published architecture.
    """
    stages: Any = model.encoder.stages
    official = _fcmae_module(checkout).FCMAE(
        img_size=model.img_size[0],
        in_chans=model.in_chans,
        depths=[len(stage.blocks) for stage in stages],
        dims=[info["num_chs"] for info in model.encoder.feature_info],
        decoder_depth=len(model.decoder),
        decoder_embed_dim=model.proj.out_channels,
        norm_pix_loss=model.norm_pix_loss,
    )
    official.load_state_dict(to_official(model.state_dict()))
    return official


def official_loss(official: Any, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Its loss with our mask, bool `[B, h, w]`, True = removed, in place of one that it draws."""
    draw: Callable = lambda x, ratio: mask.flatten(1).to(x.dtype)  # noqa: E731
    official.gen_random_mask = draw
    return official(images)[0]


def whole_grid(mask: torch.Tensor) -> bool:
    """Whether a visible patch lies in the last row and in the last column, by which the engine knows the image's size.

    In a large batch this is always so; the official decoder cannot reshape the map otherwise.
    """
    visible = (~mask).any(dim=0)
    return bool(visible[-1].any() and visible[:, -1].any())
