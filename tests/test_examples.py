"""The examples: other tools on exported weights, with this package imported and with stock timm alone."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from encoders import make_encoder, maps_of

from timm_convnextv2.commands.main import main

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as when one of them is started
import common  # noqa: E402
import detection  # noqa: E402
import segmentation  # noqa: E402


@pytest.fixture(scope="module")
def two_channels(root):
    make_encoder(root / "two", in_chans=2)
    return f"local-dir:{root / 'two'}"


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
    start_of = "error: The model 'local-dir:absent' cannot be loaded (ValueError: 'absent' is not the folder of a model"
    assert capsys.readouterr().err.startswith(start_of)


SMALLER = {
    "--train 800 --validation 400": "--train 16 --validation 16", "epochs=16": "epochs=2", "[40, 1.0]": "[8, 1.0]",
    "batch_size=32": "batch_size=8", "decoder_dim=128": "decoder_dim=16", "[24, 48, 96, 192]": "[8, 16, 24, 32]",
}  # fmt: skip


def test_the_notebook(tmp_path, monkeypatch, capsys):
    """Its cells in order, with less data; as in Jupyter, a line that begins with ! is a command."""
    cells = json.loads((EXAMPLES / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for words, fewer in SMALLER.items():
        assert words in text
        text = text.replace(words, fewer)
    shown = []
    notebook = SimpleNamespace(Image=lambda path: path.read_bytes(), display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    monkeypatch.chdir(tmp_path)
    done = {}
    text = re.sub(r"^!timm-convnextv2 (.*)$", lambda line: f"command({line[1]!r})", text, flags=re.MULTILINE)
    exec(text, {"command": lambda line: done.update({line: main(shlex.split(line))})})
    assert len(done) == 4 and not any(done.values())
    assert shown[0].startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "shuffled labels" in out and "Dry run, nothing was sent." in out


def test_the_notebook_is_the_tutorial():
    """Every setting of the tutorial's run stands in the notebook, with the same value."""
    notebook = (EXAMPLES / "tutorial.ipynb").read_text(encoding="utf-8")
    page = (EXAMPLES.parent / "docs/tutorial.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"timm-convnextv2 pretrain --data-dir (.*?)```", page, flags=re.DOTALL)
    options = re.findall(r"--([a-z-]+) ([\d.e-]+)", command)
    assert len(options) >= 6
    for name, value in options:
        assert re.search(rf"{name.replace('-', '_')}=\(?{re.escape(value)}[,)]", notebook), name
