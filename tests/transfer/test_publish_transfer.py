"""Detectors and segmenters on the Hub: the card with their metrics, the licence that stays, loading them from there."""

import json
import random
import re
import shutil

import pytest
import torch
from encoders import make_encoder
from huggingface_hub import ModelCard
from mutations import ODD, damage_content, within
from test_hub import hub  # noqa: F401  a fixture
from tiny import BACKBONE, SEGMENTER, SHORT, SIZES, tiny_detector

from timm_convnextv2.commands.main import main
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.transfer import (
    build_segmenter,
    create_backbone,
    export_detector,
    export_segmenter,
    open_detector,
    open_segmenter,
)

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
METRICS = {
    "detection": {"box_ap": 0.4125, "box_ap50": 0.7, "mask_ap": 0.25, "mask_ap_large": -1.0},
    "segmentation": {"miou": 0.5125, "accuracy": 0.9, "mean_accuracy": 0.6, "iou": [0.6, 0.425, None]},
}
OPEN = {"detection": open_detector, "segmentation": open_segmenter}


def make(folder, task, **about):
    """Exports a tiny detector or segmenter."""
    about = dict(metrics=METRICS[task], dataset="my cells", info={"Length": "9 updates"}) | about
    if task == "detection":
        return export_detector(tiny_detector(2), folder, **{"classes": ["cell", "speck"]} | about)
    backbone = create_backbone("convnextv2_atto", pretrained=False, **SIZES)
    model = build_segmenter(backbone, 3, classes=["sea", "land", "ice"], channels=8, auxiliary_channels=0)
    return export_segmenter(model, folder, **about)


@pytest.fixture(params=list(METRICS))
def folder(request, tmp_path):
    return make(tmp_path / "model", request.param), request.param


def test_the_card_states_the_metrics(folder, run_publish, tmp_path):
    place, task = folder
    words = ("me/it", "--license", "mit", "--dataset", "me/cells", "--dry-run", "--output", tmp_path / "out")
    status, out, err = run_publish(place, *words)
    assert status == 0, err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    text = (tmp_path / "out/README.md").read_text()
    card = ModelCard(text).data
    detection = task == "detection"
    assert (card.license, card.datasets) == ("mit", ["me/cells"])
    assert card.pipeline_tag == ("object-detection" if detection else "image-segmentation")
    stated = {r.metric_name: r.metric_value for r in card.eval_results}
    expected = {"box AP": 0.4125, "mask AP": 0.25} if detection else {}
    assert stated == (expected or {"mIoU": 0.5125, "pixel accuracy": 0.9, "mean accuracy": 0.6})
    assert {r.dataset_name for r in card.eval_results} == {"my cells"}
    for said in ("| Length | 9 updates |", "validation images of my cells", "open_", '"hf-hub:me/it"', "\n\nmit, "):
        assert said in text
    assert ("| box_ap50 | 0.7000 |" if detection else "| IoU of land | 0.4250 |") in text
    assert "ap_large" not in text and "IoU of ice" not in text and "path/to" not in text
    assert json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]["license"] == "mit"
    OPEN[task](tmp_path / "out")
    assert run_publish(place, *words[:3], "--dry-run", "--output", tmp_path / "out")[0] == 0  # again, over its own


@pytest.mark.parametrize("task", METRICS)
def test_the_licence_of_the_encoder_stays(tmp_path, run_publish, task):
    """From an encoder whose config.json states that of the published weights."""
    make_encoder(tmp_path / "encoder", patch_size=4, dims=[8, 12, 16, 20])
    config = json.loads((tmp_path / "encoder/config.json").read_text())
    config["pretrained_cfg"]["license"] = "cc-by-nc-4.0"
    config["training"] |= {"inherited_license": "cc-by-nc-4.0", "base_model": "timm/convnextv2_atto.fcmae"}
    (tmp_path / "encoder/config.json").write_text(json.dumps(config))
    name = f"local-dir:{tmp_path / 'encoder'}"
    if task == "detection":
        from timm_convnextv2.transfer import build_detector

        detector = build_detector(create_backbone(name), 1, boxes_only=True, out_channels=8)
        export_detector(detector, tmp_path / "model", classes=["cell"])
    else:
        export_segmenter(build_segmenter(name, 2, channels=8, auxiliary_channels=0), tmp_path / "model")
    again = OPEN[task](tmp_path / "model")  # the licence survives another export
    backbone = again.backbone.body if task == "detection" else again.backbone
    assert (backbone.origin.license, backbone.origin.base_model) == ("cc-by-nc-4.0", "timm/convnextv2_atto.fcmae")
    status, _, err = run_publish(tmp_path / "model", "me/it", "--license", "mit", "--dry-run")
    assert status == 2 and "cc-by-nc-4.0" in err
    assert run_publish(tmp_path / "model", "me/it", "--dry-run", "--output", tmp_path / "out")[0] == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "license: cc-by-nc-4.0" in text and "huggingface.co/timm/convnextv2_atto.fcmae" in text
    assert create_backbone(name, pretrained=False).origin.license is None  # random weights are nobody's


def test_published_and_loaded(folder, hub, run_publish):  # noqa: F811  the fixture
    place, task = folder
    assert run_publish(place, "owner/it", "--license", "mit")[0] == 0
    assert sorted(hub.files("owner/it")) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    model, there = OPEN[task](place), OPEN[task]("hf-hub:owner/it")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), there.state_dict().values(), strict=True))
    with pytest.raises(RuntimeError, match="files of 'owner/none'.*404"):
        OPEN[task]("hf-hub:owner/none")


def test_what_cannot_be_published(folder, run_publish, tmp_path):
    place, task = folder
    status, _, err = run_publish(place, "me/it", "--dry-run")
    assert status == 2 and "Nothing states the licence" in err
    status, _, err = run_publish(place, "me/it", "--license", "mit", "--part", "fcmae", "--dry-run")
    assert status == 2 and "has no decoder" in err
    config = json.loads((place / "config.json").read_text())
    other = {**config, "classes": [*config["classes"], "more"]}
    other["detector"] = dict(config.get("detector", {}), num_classes=3)
    for wrong, said in ((other, "size mismatch"), ({**config, "metrics": 3}, "metrics = 3")):
        (place / "config.json").write_text(json.dumps(wrong))
        status, _, err = run_publish(place, "me/it", "--license", "mit", "--dry-run")
        assert status == 2 and said in err and err.count("error:") == 1
    assert not (tmp_path / "model-publish").exists()


def test_a_run_is_published_with_its_images(tmp_path, run_publish):
    """The whole way, from a run to a card with its table, its image and its metrics; an edited card keeps its text."""
    data = write_folder(tmp_path / "data", size=32, train=8, validation=8, masks=True)
    words = ["segment", "train", *BACKBONE, *SEGMENTER, *SHORT, "-j", 0, "--data-dir", data]
    words += ["--output", tmp_path, "--experiment", "run", "--epochs", 1]
    assert main([str(word) for word in words]) == 0
    run = tmp_path / "run"
    assert run_publish(run, "me/it", "--license", "mit", "--dry-run")[0] == 0
    text = (tmp_path / "run-publish/README.md").read_text()
    assert (tmp_path / "run-publish/predictions.png").stat().st_size and "(predictions.png)" in text
    assert "data: 8 images, 8 to validate" in text and "| mIoU |" not in text and "| miou | 0." in text
    assert str(tmp_path) not in text  # no folder of this machine
    edited = run / "model/README.md"
    edited.write_text(edited.read_text() + "\nBeware of fog.\n")
    status, out, _ = run_publish(run / "model", "me/it", "--license", "mit", "--dry-run", "--output", tmp_path / "o")
    assert status == 0 and "edited by hand" in out and "Beware of fog." in (tmp_path / "o/README.md").read_text()
    shutil.rmtree(run / "model")
    status, _, err = run_publish(run, "me/it", "--license", "mit", "--dry-run")
    assert status == 2


@pytest.mark.parametrize("count", [70, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["encoder", "detection", "segmentation"])
def test_publish_refuses_mutated_configs(tmp_path, capsys, task, count):
    """Exit status 0 or 2, with one message; no traceback."""
    whole = tmp_path / "whole"
    make_encoder(whole) if task == "encoder" else make(whole, task)
    config, statuses = json.loads((whole / "config.json").read_text()), []
    for seed in range(count):
        changed, what = damage_content(config, random.Random(seed), odd=ODD)
        copy = tmp_path / str(seed)
        copy.mkdir()
        for name in ("model.safetensors", "README.md"):
            (copy / name).symlink_to(whole / name)
        (copy / "config.json").write_text(json.dumps(changed))
        words = [str(copy), "me/x", "--license", "mit", "--dry-run", "--output", str(tmp_path / "out")]
        with within(20):
            try:
                statuses.append(main(["publish", *words]))
            except Exception as e:
                raise AssertionError(f"{seed}, {what}: {type(e).__name__}: {e}") from e
    assert {*statuses} == {0, 2}


def test_hostile_text_stays_text_in_cards(tmp_path):
    """Class, data set and table names of others make no heading, link, tag or table of their own."""
    evil = "a\n# Heading\n\n<script>x</script> [y](http://evil.org) `code` | http://evil.org"
    for folder in (
        make(tmp_path / "a", "detection", info={evil: evil}, dataset=evil, classes=[evil, "b"]),
        make_encoder(tmp_path / "b", info={evil: evil}) and tmp_path / "b",
    ):
        text = ModelCard((folder / "README.md").read_text()).text
        assert "&lt;script>" in text and r"\[y\]" in text and r"\|" in text
        assert not re.search(r"^# Heading|<script|y\]\(|http://evil|[^\\]`code", text, re.M)
