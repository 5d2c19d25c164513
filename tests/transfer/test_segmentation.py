"""The segmenter: shapes, the published size, losses, its folder; windows, scales and measures."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import maps_of
from helpers import assert_same
from tiny import SIZES

from timm_convnextv2.transfer import create_backbone
from timm_convnextv2.transfer.config import Averaging
from timm_convnextv2.transfer.segmentation.metrics import Confusion, predict, slide
from timm_convnextv2.transfer.segmentation.segmenter import Segmenter, build_segmenter, export_segmenter, open_segmenter


def tiny(num_classes=3, **more):
    torch.manual_seed(0)
    backbone = create_backbone("convnextv2_atto", in_chans=more.pop("in_chans", None), pretrained=False, **SIZES)
    return build_segmenter(backbone, num_classes, channels=8, auxiliary_channels=4, **more)


# ConvNeXt's table of UPerNet, in millions; with 150 classes and the auxiliary head, without which T would have 59
@pytest.mark.parametrize("size, published", [("tiny", 60), ("small", 82), ("base", 122), ("large", 235)])
def test_published_number_of_parameters(size, published):
    with torch.device("meta"):
        model = build_segmenter(create_backbone(f"convnext_{size}", pretrained=False), 150)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == published
    if size == "tiny":
        assert model.auxiliary is not None
        assert round(sum(p.numel() for n, p in model.named_parameters() if "auxiliary" not in n) / 1e6) == 59


def test_it_normalises_sees_the_last_pixels_and_pads_only_where_needed(exported):
    name, encoder, first = exported
    model = build_segmenter(name, 3, channels=8).eval()
    seen = []
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    whole, odd = torch.rand(1, 3, 16 * first, 8 * first), torch.rand(1, 3, 8 * first + 1, 8 * first + 1)
    changed = odd.clone()
    changed[..., -1] = 1 - changed[..., -1]
    with torch.no_grad():
        model(whole)
        logits = model(odd)
        assert logits.shape == (1, 3, *odd.shape[-2:]) and not torch.equal(logits, model(changed))
    for ours, expected in zip(seen[:4], maps_of(encoder, (whole - 0.4) / 0.3), strict=True):
        torch.testing.assert_close(ours, expected)


def test_losses_leave_out_ignored_pixels():
    model = tiny(ignore_index=9)
    model.head.classifier[0].p = model.auxiliary[1].p = 0.0
    images, targets = torch.rand(2, 3, 32, 48), torch.randint(0, 3, (2, 32, 48))
    targets[:, :, 20:] = 9
    losses = model(images, targets)
    logits = {}
    for name, module in (("loss_seg", model.head), ("loss_aux", model.auxiliary)):
        module.register_forward_hook(lambda m, i, out, name=name: logits.__setitem__(name, out))
    model(images, targets)
    for name, weight in (("loss_seg", 1.0), ("loss_aux", 0.4)):
        full = F.interpolate(logits[name], size=(32, 64), mode="bilinear")[..., :48]
        expected = weight * F.cross_entropy(full[..., :20], targets[..., :20])
        torch.testing.assert_close(losses[name], expected, rtol=1e-4, atol=1e-5)
    nothing = model(images, torch.full_like(targets, 9))
    assert [loss.item() for loss in nothing.values()] == [0, 0]
    with pytest.raises(ValueError, match="batch of one image"):
        model(images[:1], targets[:1])
    with pytest.raises(ValueError, match="needs images and targets; call eval"):
        model(images)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_trains(frozen):
    model = tiny(in_chans=2, frozen=frozen)
    targets = (torch.arange(64) < 40).long().expand(2, 64, 64)
    images = (torch.rand(2, 2, 64, 64) + targets[:, None]) / 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(sum(model(images, targets).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        for name, parameter in model.named_parameters():
            if frozen and name.startswith("backbone"):
                assert parameter.grad is None, name
            elif name.startswith(("backbone.model.stem", "norms", "head", "auxiliary")):
                assert parameter.grad.abs().sum() > 0, name
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_folder(tmp_path):
    model = tiny(in_chans=2, classes=["sea", "land", "sky"], ignore_index=7)
    model(torch.rand(2, 2, 64, 64), torch.randint(0, 3, (2, 64, 64)))  # batch statistics that are not the initial ones
    model.eval()
    export_segmenter(model, tmp_path / "run/model", metrics=dict(miou=0.5))
    opened = open_segmenter(tmp_path / "run")
    images = torch.rand(1, 2, 40, 40)
    with torch.no_grad():
        assert torch.equal(opened(images), model(images))
    assert (opened.classes, opened.ignore_index) == (["sea", "land", "sky"], 7)
    assert_same(opened.state_dict(), model.state_dict())
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["metrics"]["miou"] == 0.5 and "| miou | 0.5000 |" in (tmp_path / "run/model/README.md").read_text()
    (tmp_path / "run/model/config.json").write_text(json.dumps({**config, "classes": ["sea", "land"]}))
    with pytest.raises(ValueError, match="cannot be loaded .* size mismatch"):
        open_segmenter(tmp_path / "run")
    with pytest.raises(ValueError, match="is not a segmenter: .*it has no config.json"):
        open_segmenter(tmp_path)


def test_wrong_classes():
    with pytest.raises(ValueError, match="num_classes is 1, expected at least 2"):
        tiny(1)
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        Segmenter(tiny().backbone, 3, classes=["a", "b"])


# --- windows and scales


def test_a_window_that_covers_the_image_is_the_whole_image():
    model, images = tiny().eval(), torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        whole = model(images)
        assert torch.equal(slide(model, images, 56), whole) and torch.equal(slide(model, images, 100), whole)
        torch.testing.assert_close(predict(model, images), whole.softmax(1))
        torch.testing.assert_close(predict(model, images, Averaging(window=64)), whole.softmax(1))
        assert not torch.allclose(slide(model, images, 32), whole)


def pointwise(images):
    return torch.cat([images, 2 * images], dim=1)


@pytest.mark.parametrize("window, stride", [(7, None), (7, 7), (5, 1), (30, 11)])
def test_windows_cover_every_pixel(window, stride):
    images = torch.rand(2, 3, 23, 30)
    torch.testing.assert_close(slide(pointwise, images, window, stride), pointwise(images))


def test_windows_are_those_of_the_plain_definition():
    seen = []
    slide(lambda x: seen.append(tuple(x.shape[-2:])) or x, torch.rand(1, 1, 10, 6), 6, 4)
    assert seen == [(6, 6)] * 2  # rows 0..6 and 4..10
    with pytest.raises(ValueError, match="stride is 8, expected 1 to --window, which is 6"):
        Averaging(window=6, stride=8)


def test_scales_and_flips_are_means_of_probabilities():
    model, images = tiny().eval(), torch.rand(1, 3, 40, 64)
    with torch.no_grad():
        found = predict(model, images, Averaging(scales=(1.0, 0.5), flip=True))
        small = F.interpolate(images, size=(20, 32), mode="bilinear")
        expected = []
        for x in (images, small):
            for flipped in (False, True):
                logits = model(x.flip(-1)).flip(-1) if flipped else model(x)
                expected.append(F.interpolate(logits, size=(40, 64), mode="bilinear").softmax(1))
        torch.testing.assert_close(found, torch.stack(expected).mean(0))
        assert predict(model, images, size=(80, 128)).shape == (1, 3, 80, 128)
    with pytest.raises(ValueError, match="scales are"):
        Averaging(scales=())


# --- measures


def test_measures_equal_a_plain_confusion_matrix():
    rng = np.random.default_rng(0)
    targets, found = rng.integers(0, 4, (6, 9, 11)), rng.integers(0, 4, (6, 9, 11))  # the fifth class is in neither
    found[targets == 2] = 2
    targets[rng.random(targets.shape) < 0.2] = 255
    plain = np.zeros((5, 5))
    for t, f in zip(targets.ravel(), found.ravel(), strict=True):
        if t != 255:
            plain[t, f] += 1
    parts = []
    for rank in range(2):  # two processes, batches of odd sizes
        part = Confusion(5)
        for i in range(rank, 6, 2):
            part.add(torch.from_numpy(found[i]), torch.from_numpy(targets[i]))
        parts.append(part.counts)
    confusion = Confusion(5)
    confusion.counts = sum(parts)
    assert np.array_equal(confusion.counts.numpy(), plain)
    iou = [plain[c, c] / (plain[c].sum() + plain[:, c].sum() - plain[c, c]) for c in range(4)]
    measured = confusion.measures()
    assert measured["iou"][:4] == pytest.approx(iou) and measured["iou"][4] is None
    assert measured["miou"] == pytest.approx(np.mean(iou))
    assert measured["accuracy"] == pytest.approx(np.trace(plain) / plain.sum())
    assert measured["mean_accuracy"] == pytest.approx(np.mean([plain[c, c] / plain[c].sum() for c in range(4)]))
    nothing = Confusion(2)
    nothing.add(torch.zeros(3, 3), torch.full((3, 3), 255))
    with pytest.raises(ValueError, match="No pixel has a class"):
        nothing.measures()
