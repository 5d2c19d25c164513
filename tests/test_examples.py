"""The examples: other tools on exported weights, with this package imported and with stock timm alone."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from encoders import make_encoder, maps_of

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as when one of them is started
import common  # noqa: E402
import detection  # noqa: E402
import segmentation  # noqa: E402

REPOSITORY, COMMIT = "someone/encoder", "0123456789abcdef0123456789abcdef01234567"


def backbone_of(name):
    return timm.create_model(name, pretrained=True, features_only=True)


@pytest.fixture(scope="module")
def two_channels(root):
    make_encoder(root / "two", in_chans=2)
    return f"local-dir:{root / 'two'}"


STOCK = """
import sys
import timm, torch

names, images, result = sys.argv[2:], torch.load(sys.argv[1]), {}
torch.set_num_threads(1)
for name in names:
    backbone = timm.create_model(name, pretrained=True, features_only=True)
    whole = timm.create_model(name, pretrained=True, num_classes=0)
    with torch.no_grad():
        maps = backbone(images)
        own = whole.forward_intermediates(images, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(maps, own, strict=True))
    result[name] = maps
assert not any(module.startswith("timm_convnextv2") for module in sys.modules)
torch.save(result, sys.argv[1])
"""


def test_stock_timm_alone_from_a_folder_and_from_the_hub(root, tmp_path):
    """What the Hub's cache looks like after a download, by hand: a snapshot, and the branch that points to it."""
    encoder = make_encoder(root / "stock", patch_size=4)
    repository = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(root / "stock", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    images = torch.rand(2, 3, 64, 64)
    torch.save(images, tmp_path / "maps.pt")
    names = [f"local-dir:{root / 'stock'}", f"hf-hub:{REPOSITORY}", f"hf-hub:{REPOSITORY}@{COMMIT}"]
    subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "maps.pt"), *names],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES)},
        check=True,
    )
    result = torch.load(tmp_path / "maps.pt")
    assert list(result) == names
    for maps in result.values():
        for theirs, expected in zip(maps, maps_of(encoder, images), strict=True):
            torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)  # the two add in another order


# --- detection


def some_targets(classes):
    return [dict(boxes=detection.masks_to_boxes(mask[None] > 0), labels=mask.max()[None]) for mask in classes]


def test_pyramid_is_built_on_the_maps_of_features_only(exported):
    name, encoder, first = exported
    detector = detection.build_detector(name, 2, boxes_only=True, out_channels=16).eval()
    height, width = 8 * first * 3 + 5, 8 * first * 4  # the last rows make no whole patch
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        body, pyramid = detector.backbone.body(images), detector.backbone(images)
    for ours, expected in zip(body, maps_of(encoder, images), strict=True):
        assert torch.equal(ours, expected)
    strides = [first, 2 * first, 4 * first, 8 * first, 16 * first]
    assert list(pyramid) == ["0", "1", "2", "3", "pool"]
    for level, stride in zip(pyramid.values(), strides, strict=True):
        assert level.shape[:2] == (2, 16)
        assert level.shape[3] == width // stride
    assert detector.rpn.anchor_generator.sizes == tuple((8 * stride,) for stride in strides)
    assert (detector.transform.min_size, detector.transform.max_size) == ((200 * first,), 336 * first)
    assert detector.transform.size_divisible == 8 * first
    assert (detector.transform.image_mean, detector.transform.image_std) == ([0.4] * 3, [0.3] * 3)


@pytest.mark.parametrize("frozen", [False, True])
def test_detector_trains_what_it_should(small, frozen):
    detector = detection.build_detector(
        small, 2, boxes_only=True, frozen=frozen, out_channels=16, min_size=32, max_size=48
    )
    images, classes = common.draw(2, 32, 3)
    losses = detector(list(images), some_targets(classes))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    for name, parameter in detector.backbone.named_parameters():
        if name.startswith("body") and frozen:
            assert parameter.grad is None, name
        elif name.startswith(("body.model.stem", "fpn.inner")):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("frozen", [False, True])
def test_detector_can_learn(small, frozen):
    """One image by heart."""
    detector = detection.build_detector(small, 2, boxes_only=True, frozen=frozen, out_channels=16, img_size=32)
    images, classes = common.draw(1, 32, 3)
    targets = some_targets(classes)
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(8):
        losses.append(sum(detector(list(images), targets).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_detector_takes_other_channels_and_images_of_several_odd_sizes(two_channels):
    sizes = dict(min_size=24, max_size=40)
    detector = detection.build_detector(
        two_channels, 4, boxes_only=True, out_channels=8, box_score_thresh=0.0, **sizes
    ).eval()
    images = [torch.rand(2, 33, 47), torch.rand(2, 51, 29)]
    with torch.inference_mode():
        found = detector(images)
    for image, boxes in zip(images, found, strict=True):
        height, width = image.shape[-2:]
        assert len(boxes["boxes"])
        assert (boxes["boxes"] >= 0).all()
        assert (boxes["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
        assert set(boxes["labels"].tolist()) <= {1, 2, 3, 4}


def test_detector_refuses_strides_that_roi_align_would_round(tmp_path):
    make_encoder(tmp_path, patch_size=3)
    with pytest.raises(ValueError, match=r"strides \[3, 6, 12, 24\].*powers of two"):
        detection.build_detector(f"local-dir:{tmp_path}", 2)


# --- both; the segmenter itself is tested in transfer/test_segmentation.py


@pytest.mark.parametrize("in_chans", [1, 2, 3])
def test_images_of_the_examples(in_chans):
    images, classes = common.draw(12, 40, in_chans)
    assert images.shape == (12, in_chans, 40, 40)
    assert 0 <= images.min() and images.max() <= 1
    assert {mask.max().item() for mask in classes} == {1, 2}
    for image, mask in zip(images, classes, strict=True):
        assert 100 < (mask > 0).sum() < 600
        assert (image[:, mask > 0] == (0.0 if mask.max() == 1 else 1.0)).all()


@pytest.mark.parametrize(
    "module, printed",
    [(detection, "new image with a "), (segmentation, "IoU on 32 new images: background 0.")],
    ids=["detection", "segmentation"],
)
@pytest.mark.parametrize("fixture", ["small", "two_channels"])
def test_examples_run(module, printed, fixture, request, monkeypatch, capsys):
    arguments = ["--model", request.getfixturevalue(fixture), "--steps", "2", "--batch-size", "2", "--img-size", "32"]
    monkeypatch.setattr(sys, "argv", ["example", *arguments, "--frozen", "--device", "cpu"])
    module.main()
    out = capsys.readouterr().out
    assert "step 2/2  loss " in out and printed in out


def start(script):
    """The script as from the shell, in this process; returns its exit status."""
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    except SystemExit as e:
        return e.code
    return 0


@pytest.mark.parametrize("script", ["detection.py", "segmentation.py"])
def test_a_wrong_model_is_one_message(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--model", "local-dir:absent"])
    assert start(script) == 2
    start_of = "error: The model 'local-dir:absent' cannot be loaded (ValueError: 'absent' is not a timm folder"
    assert capsys.readouterr().err.startswith(start_of)
