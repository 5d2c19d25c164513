"""Removed channels: nothing of them goes in, nothing of them is asked for."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from test_fcmae import gradients, toy

from timm_convnextv2 import FCMAETask, random_mask
from timm_convnextv2.models.masking import random_channels
from timm_convnextv2.models.reference import reference_forward
from timm_convnextv2.pretraining.trainer import Place, removed_channels
from timm_convnextv2.runs.group import Processes


def batch(in_chans=5, size=(64, 96)):
    images = torch.randn(3, in_chans, *size, dtype=torch.float64)
    channels = torch.zeros(3, in_chans, dtype=torch.bool)
    channels[0, 1:] = channels[1, ::2] = True
    return images, random_mask(3, (size[0] // 32, size[1] // 32), 0.6), channels


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_equals_the_reference(norm_pix_loss):
    model = toy(in_chans=5, norm_pix_loss=norm_pix_loss)
    images, mask, channels = batch()
    ours, plain = model(images, mask, channels=channels), reference_forward(model, images, mask, channels)
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(ours.pred, plain.pred, rtol=1e-7, atol=1e-10)
    found, expected = (gradients(model, out.loss) for out in (ours, plain))
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)


def test_what_a_removed_channel_holds_does_not_matter():
    model = toy(in_chans=5)
    images, mask, channels = batch()
    other = torch.where(channels[:, :, None, None], float("nan"), images)
    losses = [model(x, mask, return_pred=False, channels=channels).loss for x in (images, other)]
    assert torch.equal(*losses) and losses[0].isfinite()
    none = model(images, mask, channels=torch.zeros_like(channels)).loss
    torch.testing.assert_close(none, FCMAETask(model, verbose=False)(images, mask)["loss"], rtol=1e-10, atol=0)
    changed = images.clone()
    changed[0, 0, ::2] *= -1  # one that stays
    assert not torch.equal(model(changed, mask, channels=channels).loss, losses[0])


@pytest.mark.parametrize("channels", [torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 5)])
def test_channels_that_do_not_fit(channels):
    images, mask, _ = batch()
    with pytest.raises(ValueError, match=r"bool \[B, in_chans\] = \[3, 5\]"):
        toy(in_chans=5)(images, mask, channels=channels)


def test_share_of_removed_channels():
    drawn = random_channels(4000, 12, 0.3, torch.Generator().manual_seed(0))
    assert abs(drawn.double().mean().item() - 0.3) < 0.01 and not drawn.all(dim=1).any()
    assert not random_channels(500, 2, 0.99).all(dim=1).any()  # one always stays
    for in_chans, p, words in ((1, 0.5, "several"), (3, 1.0, r"\[0, 1\)")):
        with pytest.raises(ValueError, match=words):
            random_channels(4, in_chans, p)


def test_a_stem_with_some_of_its_filters_is_the_encoder_without_the_other_channels():
    """As docs/pretraining.md says for images that lack some."""
    page = (ROOT / "docs/pretraining.md").read_text()
    (text,) = re.findall(r"```python\n(model = timm.*?bands = .*?)```", page, flags=re.S)
    whole = toy(in_chans=12).encoder.eval()
    code = text.replace('"local-dir:runs/mine/encoder", pretrained=True, num_classes=0', "")
    names = {"timm": SimpleNamespace(create_model=lambda: copy.deepcopy(whole)), "torch": torch}
    exec(code, names)
    images, bands = torch.randn(2, 12, 64, 64, dtype=torch.float64), names["bands"]
    lacking = torch.zeros_like(images)
    lacking[:, bands] = images[:, bands]
    features = names["model"].eval().forward_features(images[:, bands])
    torch.testing.assert_close(features, whole.forward_features(lacking))


@pytest.mark.parametrize("steps, batch_size, size", [(1, 4, 3), (2, 2, 3), (3, 4, 1), (12, 1, 1)])
def test_processes_and_steps_remove_what_one_batch_would(steps, batch_size, size):
    """Image `i` of a step is that of process `i % size`, see `EpochBatchSampler`."""
    joint = removed_channels(0.5, 12, 6, Place(3, 17, 0, 1), Processes())
    shared = torch.full_like(joint, False)
    for step in range(steps):
        for rank in range(size):
            own = removed_channels(0.5, batch_size, 6, Place(3, 17, step, steps), Processes(rank, size))
            places = torch.arange(batch_size) * size + rank + step * batch_size * size
            shared[places] = own
    assert torch.equal(shared, joint)
    assert not torch.equal(joint, removed_channels(0.5, 12, 6, Place(3, 18, 0, 1), Processes()))
    assert removed_channels(0.0, 12, 6, Place(3, 17, 0, 1), Processes()) is None
