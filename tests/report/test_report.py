import csv
import io
import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_convnextv2 import report
from timm_convnextv2.models.fcmae import FCMAEOutput, normalize_target, patchify
from timm_convnextv2.models.masking import num_visible, random_mask
from timm_convnextv2.models.memory import memory_estimate, peak_memory
from timm_convnextv2.models.packing import PackedLayout
from timm_convnextv2.ops import use_backend
from timm_convnextv2.ops.dispatch import ENV
from timm_convnextv2.report import ProgressBar, Stopwatch, check_logs, save_loss_curve, save_reconstructions


class Terminal(io.StringIO):
    def isatty(self):
        return True


def go(progress, updates, data_wait=0.25):
    for i in range(updates):
        if progress.step():
            progress.show(epoch=i // 4, loss=0.5, lr=1e-3, images_per_s=12.34, data_wait=data_wait)
    progress.note("a note")
    progress.close()


def test_plain_lines(capsys):
    go(ProgressBar(total=10, done=3, epochs=3, interval=3), 7)
    lines, err = capsys.readouterr()
    lines = lines.splitlines()
    assert [line.split()[3] for line in lines[:-1]] == ["6/10", "9/10", "10/10"] and lines[-1] == "a note" and not err
    pattern = r"epoch 1/3  step 6/10  loss 0\.5000  lr 1\.00e-03  12\.3 images/s  data wait 25%  left 0:00:00"
    assert re.fullmatch(pattern, lines[0])


@pytest.mark.parametrize("seconds, left", [(10, "0:00:20"), (1800, "1:00:00"), (180000, "100:00:00")])
def test_time_left(capsys, monkeypatch, seconds, left):
    clock = [0.0]
    monkeypatch.setattr(report.progress.time, "perf_counter", lambda: clock[0])
    progress = ProgressBar(total=7, done=2, epochs=1, interval=1)  # 5 to go, the first two of them in `seconds`
    clock[0] = seconds / 2
    assert progress.step()
    progress.show(0, 1.0, 0.1, 1.0, 0.0)
    clock[0] = seconds * 4 / 3
    assert progress.step()
    progress.show(0, 1.0, 0.1, 1.0, 0.0)
    assert capsys.readouterr().out.splitlines()[1].endswith(f"left {left}")


def test_bar_on_a_terminal(capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = ProgressBar(total=10, done=3, epochs=3, interval=1)
    progress.bar.mininterval = 0
    go(progress, 7)
    drawn, printed = terminal.getvalue(), capsys.readouterr().out
    assert "3/10" in drawn and "10/10" in drawn and "epoch 2/3" in drawn and "data wait 25%" in drawn
    assert "a note" in printed + drawn and "step" not in printed and progress.bar.disable


def test_stopwatch(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(report.progress.time, "perf_counter", lambda: clock[0])
    watch = Stopwatch(images_per_update=4)
    for second, waited in ((1, 0.5), (2, 0.0)):
        clock[0] = second
        watch.count(waited)
    assert watch.lap() == (4.0, 0.25)
    clock[0] = 4
    watch.count(1.0)
    assert watch.lap() == (2.0, 0.5)
    assert watch.totals() == {"images_per_s": 3.0, "data_wait": 0.375, "seconds": 4}


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_silence_where_not_enabled(capsys, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    progress = ProgressBar(total=4, done=0, epochs=1, interval=1, enabled=False)
    go(progress, 4)
    assert progress.done == 4 and capsys.readouterr().out == sys.stderr.getvalue() == ""


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
    return lambda calls=1: np.stack(drawn).reshape(calls, 4, -1, *drawn[0].shape).swapaxes(0, 1)


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


@pytest.mark.parametrize(
    "options, batch_size",
    [
        (dict(img_size=64), 4),
        (dict(img_size=(64, 96), in_chans=5, decoder_depth=2), 2),
        (dict(img_size=32, patch_size=1, mask_ratio=0.75), 8),
        (dict(img_size=64, checkpointing=True), 4),
    ],
)
@pytest.mark.parametrize("name", ["eager", "fused"])
def test_memory_estimate(options, batch_size, name, monkeypatch):
    """Against what a real step keeps, each storage once."""
    options = dict(options)
    checkpointing = options.pop("checkpointing", False)
    model = timm.create_model("fcmae_convnextv2_atto", **options)
    model.set_grad_checkpointing(checkpointing)
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    images = torch.rand(batch_size, model.in_chans, *model.img_size)
    grid = model.grid(*model.img_size)
    layout = PackedLayout(random_mask(batch_size, grid, model.mask_ratio), num_visible(grid, model.mask_ratio))
    monkeypatch.setenv(ENV, name)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(images, layout, return_pred=False).loss
    counted = sum(x.untyped_storage().nbytes() for x in kept.values()) / 2**30
    loss.backward()
    fixed, step = memory_estimate(model, batch_size)
    assert counted <= 1.05 * step and step < 1.4 * counted  # the CPU's own operations keep less
    assert memory_estimate(model, 2 * batch_size)[1] == pytest.approx(2 * step)
    assert memory_estimate(model, batch_size, amp=True)[1] == pytest.approx(step / 2)

    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer.step()
    state = [x for values in optimizer.state.values() for x in values.values() if x.ndim]
    exact = sum(x.nbytes for x in (*parameters, *(p.grad for p in parameters), *state)) / 2**30
    assert fixed == pytest.approx(exact, rel=0.01)
    assert memory_estimate(model, batch_size, ema=True)[0] == pytest.approx(fixed * 5 / 4)


def test_memory_estimate_leaves_the_model_alone():
    model = timm.create_model("fcmae_convnextv2_atto", img_size=64, decoder_dim=16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    memory_estimate(model, 2)
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) and after[k].device.type == "cpu" for k, v in before.items())
    assert model.training and all(p.grad is None for p in model.parameters())


# of a model this small, stem and decoder keep a large part
@pytest.mark.parametrize("name, share", [("eager", 0.3), ("fused", 0.7)])
def test_memory_estimate_shows_what_checkpointing_saves(name, share):
    model = timm.create_model("fcmae_convnextv2_atto", img_size=64)
    with use_backend(name):
        plain = memory_estimate(model, 2)[1]
        model.set_grad_checkpointing()
        assert memory_estimate(model, 2)[1] < share * plain


def test_memory_estimate_asks_the_backend_of_the_device(monkeypatch):
    """The fused operations keep less than half; the model's device is asked, not the meta device."""
    model = timm.create_model("fcmae_convnextv2_atto", img_size=64)
    fused, plain = memory_estimate(model, 2)[1], memory_estimate(model, 2, device="cuda")[1]
    assert fused < 0.6 * plain
    monkeypatch.setenv(ENV, "eager")
    assert memory_estimate(model, 2)[1] == plain


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_peak_memory_grows():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(int((before + 0.1) * 2**30) // 4)
    after = peak_memory(torch.device("cpu"))
    assert before > 0.05 and after >= before + 0.09 and block.numel()


@pytest.mark.parametrize("wandb, tensorboard, package", [(True, False, "wandb"), (False, True, "tensorboard")])
def test_check_logs(monkeypatch, wandb, tensorboard, package):
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    check_logs(False, False)
    with pytest.raises(ValueError, match=f"--log-{package} needs .* pip install {package}"):
        check_logs(wandb, tensorboard)
