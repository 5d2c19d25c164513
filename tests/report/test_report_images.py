"""The images that a run draws: loss curve and reconstructions."""

import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_convnextv2.models.fcmae import FCMAEOutput, normalize_target, patchify
from timm_convnextv2.models.masking import random_mask
from timm_convnextv2.report.images import save_loss_curve, save_reconstructions


def pixels(path):
    image = Image.open(path)
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def write_summary(path, losses):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, ["epoch", "train_loss", "lr"])
        writer.writeheader()
        writer.writerows(dict(epoch=i, train_loss=loss, lr=0.1 / (i + 1)) for i, loss in enumerate(losses))
    return path


@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_loss_curve(tmp_path, epochs):
    summary = write_summary(tmp_path / "summary.csv", [1 / (i + 1) for i in range(epochs)])
    save_loss_curve(summary, tmp_path / "loss.png")
    blue = (np.abs(pixels(tmp_path / "loss.png") - (0x1F, 0x5F, 0xA8)).max(-1) < 40).nonzero()
    assert len(blue[0]) > 5 and not list(tmp_path.glob("*.part"))
    if epochs > 1:  # falls, from the left to the right
        assert blue[0][blue[1].argmin()] < blue[0][blue[1].argmax()] - 100
        assert np.ptp(blue[1]) > 400


@pytest.fixture
def columns(monkeypatch):
    """The pictures that are drawn, by column."""
    from matplotlib.axes import Axes

    drawn = []
    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, x, **kw: (drawn.append(np.asarray(x)), imshow(self, x, **kw))[1])
    return lambda calls=1: np.stack(drawn).reshape(calls, -1, 4, *drawn[0].shape).transpose(2, 0, 1, 3, 4, 5)


class Oracle(torch.nn.Module):
    """Predicts the exact target."""

    def __init__(self, norm_pix_loss, stride=8):
        super().__init__()
        self.mask_token, self.norm_pix_loss, self.stride = torch.nn.Parameter(torch.zeros(1)), norm_pix_loss, stride
        self.modes = []

    def forward(self, images, mask):
        self.modes.append((self.training, torch.is_grad_enabled()))
        pred = patchify(images, self.stride)
        return FCMAEOutput(torch.tensor(0.0), normalize_target(pred)[0] if self.norm_pix_loss else pred, mask)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize(
    "shape, mean, std",
    [
        ((3, 3, 16, 24), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)),
        ((1, 1, 24, 16), (0.3,), (0.5,)),
        ((2, 5, 16, 16), (0.1, 0.2, 0.3, 0.4, 0.5), (0.2,) * 5),
    ],
)
def test_reconstructions_put_the_target_back(tmp_path, columns, norm_pix_loss, shape, mean, std):
    images = torch.rand(shape) * 0.5
    images[0, :, 0, 0] = -1e-6  # black, rounded, must not stretch the range
    shown = (images if shape[1] > 1 else images.expand(-1, 3, -1, -1))[:, :3].permute(0, 2, 3, 1).numpy()
    normalised = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    masks = random_mask(shape[0], (shape[2] // 8, shape[3] // 8), 0.5)
    model = Oracle(norm_pix_loss).train()
    save_reconstructions(tmp_path / "x.png", model, normalised, masks, mean, std, "a title")
    original, masked, prediction, composite = columns()[:, 0]
    gap = masks.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    for picture in (original, composite):
        assert np.abs(picture - shown).max() < 1e-5
    assert np.abs(prediction - shown)[gap].max() < 1e-5
    assert np.ptp(prediction[~gap]) == 0  # what was visible is not predicted, and left blank
    assert np.ptp(masked[gap]) == 0 and np.abs(masked - shown)[~gap].max() < 1e-5
    assert model.training and model.modes == [(False, False)]
    picture = pixels(tmp_path / "x.png")
    assert picture.shape[1] > 800 and len(np.unique(picture)) > 50 and not list(tmp_path.glob("*.part"))


def test_reconstructions_of_a_model(tmp_path, columns):
    """Of a real model: the prediction differs from the original, and only the composite keeps what was visible."""
    model = timm.create_model("fcmae_convnextv2_atto", img_size=64, patch_size=2, decoder_dim=16)
    images, masks = torch.rand(2, 3, 64, 96), random_mask(2, (2, 3), 0.6)
    for _ in range(2):
        save_reconstructions(tmp_path / "x.png", model, images, masks, (0.0,) * 3, (1.0,) * 3)
    drawn = columns(calls=2)
    gap = masks.repeat_interleave(32, 1).repeat_interleave(32, 2).numpy()
    assert np.array_equal(drawn[:, 0], drawn[:, 1])
    original, _, prediction, composite = drawn[:, 0]
    assert np.abs(composite - original)[~gap].max() < 1e-6 and np.array_equal(composite[gap], prediction[gap])
    assert np.abs(prediction - original)[gap].mean() > 0.05


@pytest.mark.parametrize("low, high", [(-3.0, 5.0), (0.0, 100.0)])
def test_reconstructions_of_unscaled_images(tmp_path, columns, low, high):
    images = torch.rand(1, 3, 16, 16) * (high - low) + low
    masks = random_mask(1, (2, 2), 0.5)
    save_reconstructions(tmp_path / "x.png", Oracle(False), images, masks, (0.0,) * 3, (1.0,) * 3)
    original = columns()[0]
    assert original.min() == 0 and original.max() == 1 and np.unique(original).size > 100
