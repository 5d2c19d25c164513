"""The images that a run draws: loss curve and reconstructions."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from timm_convnextv2.data.display import check_bands, display_of
from timm_convnextv2.models.fcmae import FCMAEOutput, normalize_target, patchify
from timm_convnextv2.models.masking import random_mask
from timm_convnextv2.report import images as images_module
from timm_convnextv2.report.images import save_figure, save_loss_curve, save_reconstructions


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
@pytest.mark.parametrize("shape, bands", [((3, 3, 16, 24), None), ((1, 1, 24, 16), None), ((2, 12, 16, 16), (4, 3, 2))])
def test_reconstructions_put_the_target_back(tmp_path, columns, norm_pix_loss, shape, bands):
    """Of 12-bit values of 65,535, which would be black: each shown channel uses the range of brightness."""
    scale = torch.linspace(0.01, 0.06, shape[1]).view(-1, 1, 1)
    images = torch.rand(shape) * scale
    chosen = [b - 1 for b in bands or (1, 2, 3)[: 3 if shape[1] >= 3 else 1]]
    low, high = torch.quantile(images[:, chosen].transpose(0, 1).flatten(1), torch.tensor([0.02, 0.98]), dim=1)
    shown = ((images[:, chosen] - low.view(-1, 1, 1)) / (high - low).view(-1, 1, 1)).clamp(0, 1)
    shown = (shown if shape[1] > 1 else shown.expand(-1, 3, -1, -1)).permute(0, 2, 3, 1).numpy()
    masks = random_mask(shape[0], (shape[2] // 8, shape[3] // 8), 0.5)
    model = Oracle(norm_pix_loss).train()
    titles = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_module, "save_figure", lambda *args: (titles.append(args[2]), save_figure(*args)))
        save_reconstructions(tmp_path / "x.png", model, (images - 0.02) / 0.3, masks, "a title", bands)
    original, masked, prediction, composite = columns()[:, 0]
    gap = masks.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    for image in (original, composite):
        assert np.abs(image - shown).max() < 1e-3
    assert original.min() == 0 and original.max() == 1 and 0.4 < original.mean() < 0.6
    assert np.abs(prediction - shown)[gap].max() < 1e-3
    assert np.ptp(prediction[~gap]) == 0  # visible patches are not predicted, and left blank
    assert np.ptp(masked[gap]) == 0 and np.abs(masked - shown)[~gap].max() < 1e-3
    assert model.training and model.modes == [(False, False)]
    which = "channels 4, 3, 2" if bands else "channels 1, 2, 3" if shape[1] > 1 else "channel 1"
    picture = pixels(tmp_path / "x.png")
    assert picture.shape[1] > 800 and len(np.unique(picture)) > 50 and not list(tmp_path.glob("*.part"))
    assert titles == [f"a title; {which}, percentiles 2 to 98"]


@pytest.mark.parametrize("values", [(0, 1), (0.3, 0.3)])
def test_images_of_one_or_two_values_are_shown(values):
    """Drawings whose 2nd and 98th percentiles are equal, and constant images."""
    image = torch.full((1, 30, 30), float(values[0]))
    image[:, 0, :3] = values[1]
    shown = display_of([image]).rgb(image)
    assert shown.shape == (30, 30, 3) and torch.isfinite(shown).all()
    assert shown.unique().tolist() == ([0, 1] if values[1] == 1 else [0])


@pytest.mark.parametrize("bands", [(4, 3), (0, 1, 2), (13,)])
def test_bands_that_are_not_there(bands):
    with pytest.raises(ValueError, match=f"--show-bands {' '.join(map(str, bands))}: .* 1 to 12"):
        check_bands(bands, 12)
