"""Rows of features of any model, and the images that they are of."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from encoders import make_encoder
from PIL import Image
from timm.models.convnext import ConvNeXt

from timm_convnextv2.data.samples.batches import preprocessing
from timm_convnextv2.features import extract_features, image_batches, open_labelled
from timm_convnextv2.features.baselines import border, histogram, shrunk
from timm_convnextv2.features.extract import extract_many

IMAGES = [torch.randn(3, 3, 32, 32), torch.randn(2, 3, 32, 32)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def test_mean_of_the_last_map_and_plain_layer_norm(encoder):
    rows = extract_features(encoder, IMAGES)
    x = encoder.forward_features(torch.cat(IMAGES)).mean((2, 3))
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert rows.shape == (5, 32) and rows.dtype == torch.float32 and not rows.requires_grad
    assert torch.allclose(rows, expected, atol=1e-5)


def test_are_the_pre_logits_of_a_head_that_was_not_trained():
    model = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), ls_init_value=None).eval()
    images = torch.cat(IMAGES)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.allclose(extract_features(model, IMAGES), expected, atol=1e-5)


def test_modes_stay_as_they_were(encoder):
    model = copy.deepcopy(encoder).train()
    model.stages[1].eval()
    before = [m.training for m in model.modules()]
    assert torch.equal(extract_features(model, IMAGES), extract_features(encoder, IMAGES))
    assert [m.training for m in model.modules()] == before and not all(before) and any(before)
    with pytest.raises(RuntimeError):
        extract_features(model, [torch.randn(1, 5, 32, 32)])
    assert [m.training for m in model.modules()] == before


def test_of_an_fcmae_are_those_of_its_encoder():
    model = timm.create_model(
        "fcmae_convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), decoder_dim=8, patch_size=1, img_size=32
    )
    assert torch.equal(extract_features(model, IMAGES), extract_features(model.encoder, IMAGES))


SMALL = {
    "vit_tiny_patch16_224": dict(img_size=32, depth=1, embed_dim=24, num_heads=2),
    "swin_tiny_patch4_window7_224": dict(img_size=32, window_size=2, depths=(1, 1), num_heads=(1, 2), embed_dim=16),
    "resnet10t": {},
}


@pytest.mark.parametrize("name", SMALL)
def test_of_other_models_of_timm(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name]).eval()
    images = torch.cat(IMAGES)
    with torch.no_grad():
        if name == "resnet10t":
            x = model.forward_features(images).mean((2, 3))
            expected = F.layer_norm(x, x.shape[1:], eps=1e-6)
        else:
            expected = model.forward_head(model.forward_features(images), pre_logits=True)
    rows = extract_features(model, IMAGES)
    assert rows.shape == (5, model.num_features) and torch.allclose(rows, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder", "one pixel", *SMALL])
def test_of_all_stages_are_mean_and_deviation_of_each_map(encoder, name):
    """By hooks and NumPy; a map of one pixel has the deviation 0."""
    torch.manual_seed(0)
    ours = name in ("encoder", "one pixel")
    model = encoder if ours else timm.create_model(name, **SMALL[name]).eval()
    side = 8 if name == "one pixel" else 37 if name == "encoder" else 32
    images, maps = torch.randn(3, 3, side, side), []
    if ours:
        hooks = [stage.register_forward_hook(lambda *a: maps.append(a[2].numpy())) for stage in model.stages]
        extract_features(model, [images])
        for hook in hooks:
            hook.remove()
    else:
        with torch.no_grad():
            maps = [m.numpy() for m in model.forward_intermediates(images, intermediates_only=True)]
    expected = []
    for m in maps:
        for row in (m.mean((2, 3)), m.std((2, 3))):
            expected.append((row - row.mean(1, keepdims=True)) / np.sqrt(row.var(1, keepdims=True) + 1e-6))
    rows = extract_features(model, [images[:2], images[2:]], all_stages=True)
    assert rows.shape == (3, 2 * sum(m.shape[1] for m in maps)) and rows.dtype == torch.float32
    np.testing.assert_allclose(rows.numpy(), np.concatenate(expected, 1), atol=2e-3 if name == "one pixel" else 1e-4)
    assert rows.isfinite().all()


def test_all_stages_of_an_fcmae_and_of_a_model_without_maps(encoder):
    model = timm.create_model(
        "fcmae_convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), decoder_dim=8, patch_size=1, img_size=32
    )
    rows = extract_features(model, IMAGES, all_stages=True)
    assert rows.shape == (5, 112) and torch.equal(rows, extract_features(model.encoder, IMAGES, all_stages=True))
    with pytest.raises(ValueError, match="Linear gives no maps of its stages: leave out --all-stages"):
        extract_features(torch.nn.Linear(2, 2), IMAGES, all_stages=True)


def test_batches_go_to_devices_in_turn_and_rows_keep_their_order(encoder):
    batches, seen = [torch.randn(n, 3, 32, 32) for n in (2, 1, 3, 2, 1)], []
    rows = extract_features(encoder, batches, devices=("cpu", "cpu", "cpu"), progress=seen.append)
    assert torch.allclose(rows, extract_features(encoder, [torch.cat(batches)]), atol=1e-5) and seen == [2, 1, 3, 2, 1]
    with torch.device("meta"):
        assert extract_features(encoder, batches[:1], devices=["cpu"]).device.type == "cpu"


def test_bfloat16_is_near(encoder):
    rows, plain = extract_features(encoder, IMAGES, amp=True), extract_features(encoder, IMAGES)
    assert rows.dtype == torch.float32 and not torch.equal(rows, plain) and torch.allclose(rows, plain, atol=0.2)


def test_pixels_are_means_of_areas():
    image = torch.arange(32 * 32.0).view(1, 1, 32, 32)
    rows, frame = extract_many([shrunk, border], [image, image + 1])
    assert rows.shape == (2, 64) and frame.shape == (2, 60)
    assert rows[0, 0] == image[0, 0, :4, :4].mean() and rows[1, 63] == image[0, 0, 28:, 28:].mean() + 1
    inside = image.clone()
    inside[..., 2:-2, 2:-2] = 7  # all but a sixteenth
    assert torch.equal(border(inside), frame[:1]) and not torch.equal(border(inside.roll(2, -1)), frame[:1])


def test_histogram_is_of_each_channel():
    image = torch.rand(2, 3, 17, 23) * torch.tensor([1.0, 1.0, 3.0]).view(3, 1, 1)
    low, high = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    rows = histogram(image, low, high).unflatten(1, (3, 16))
    for channel in range(2):
        expected = np.histogram(image[1, channel], bins=16, range=(0, 1))[0] / (17 * 23)
        assert rows[1, channel].square().numpy() == pytest.approx(expected, abs=1e-6)
    assert rows[:, 2, 15].square().mean() > 0.5  # values beyond the range are in the last bin


def test_no_images():
    with pytest.raises(ValueError, match="no images"):
        extract_many([timm.create_model("resnet10t"), shrunk], [])


def test_images_of_a_source_in_order_whatever_the_workers(tmp_path):
    for i in range(6):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (40, 32), (40 * i, 0, 0)).save(tmp_path / f"class{i % 2}" / f"{i}.png")
    source = open_labelled(tmp_path).train.source
    config = dict(input_size=(3, 32, 32), interpolation="bicubic", crop_pct=1.0, crop_mode="center")
    transform = preprocessing({**config, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    batches = list(image_batches(source, transform, 3, 0))
    assert [len(batch) for batch in batches] == [3, 1]
    assert [round(float(x) * 255 / 40) for x in torch.cat(batches)[:, 0, 0, 0]] == [
        int(source.name(i)[-5]) for i in range(4)
    ]
    assert torch.equal(torch.cat(batches), torch.cat(list(image_batches(source, transform, 2, 2))))
    (tmp_path / source.paths[2]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot be decoded.*\n.*\.png: cannot be decoded"):
        list(image_batches(source, transform, 3, 0))
