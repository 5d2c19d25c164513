"""Ours against the official code running on MinkowskiEngine, where both are there."""

import os
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from benchmarks.official_model import official_fcmae, official_loss, whole_grid
from timm_convnextv2 import random_mask
from timm_convnextv2.checkpoint import to_official
from timm_convnextv2.ops import use_backend
from timm_convnextv2.ops.minkowski import engine

CHECKOUT = os.environ.get("OFFICIAL_CONVNEXTV2")
SHAPE = dict(depths=(1, 2, 1, 1), dims=(8, 12, 16, 20), conv_mlp=False, decoder_dim=24, img_size=96)


def both(grn: float):
    """A model with every parameter away from its start, GRN's by `grn`, and the official one with its weights."""
    if not CHECKOUT:
        pytest.skip("OFFICIAL_CONVNEXTV2=/path/to/ConvNeXt-V2 is not set: a clone of facebookresearch/ConvNeXt-V2")
    try:
        engine()
    except RuntimeError as error:
        pytest.skip(str(error))
    model = timm.create_model("fcmae_convnextv2_atto", **SHAPE).double()
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=grn if "grn.weight" in name else 0.1)
    return model, official_fcmae(Path(CHECKOUT), model).double()


def masks(batch: int) -> torch.Tensor:
    mask = random_mask(batch, (3, 3), 0.6)
    return mask if whole_grid(mask) else masks(batch)


@pytest.mark.minkowski
@pytest.mark.parametrize("backend", ["fused", "minkowski"])
def test_loss_and_gradients_equal_the_official_code(backend):
    """For one image: the official GRN sums over the batch, ours over each image, as the published weights' training."""
    model, official = both(grn=0.5)
    images, mask = torch.randn(1, 3, 96, 96, dtype=torch.float64), masks(1)
    with use_backend(backend):
        loss = model(images, mask, return_pred=False).loss
        loss.backward()
    theirs = official_loss(official, images, mask)
    theirs.backward()
    torch.testing.assert_close(loss, theirs)
    grads = to_official({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    found = dict(official.named_parameters())
    assert set(grads) == set(found)
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, found[name].grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.minkowski
def test_batches_differ_by_grn_alone():
    images, mask = torch.randn(3, 3, 96, 96, dtype=torch.float64), masks(3)
    for grn, same in ((0.0, True), (0.5, False)):
        model, official = both(grn)
        ours, theirs = model(images, mask).loss, official_loss(official, images, mask)
        assert torch.allclose(ours, theirs, rtol=1e-9) == same


def test_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(ValueError, match="no checkout of github.com/facebookresearch/ConvNeXt-V2"):
        official_fcmae(tmp_path, timm.create_model("fcmae_convnextv2_atto", **SHAPE, device="meta"))
