"""Results per class of a finetuned classifier, and its surest mistakes and hits."""

from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torchvision.transforms import v2

from timm_convnextv2.data.formats.pixels import PLAIN
from timm_convnextv2.finetune.classes import describe_classes
from timm_convnextv2.finetune.folders import FolderReader
from timm_convnextv2.report.classes import ClassResult, of_confusion, read_classes


def transform_of(mean, std):
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


@pytest.fixture
def classifier(data, tmp_path):
    """A classifier whose predictions differ between images, in a timm folder."""
    torch.manual_seed(1)
    shape = dict(patch_size=1, depths=[1, 1, 1, 1], dims=[8, 8, 16, 16])
    model = timm.create_model("convnextv2_atto", num_classes=3, **shape).eval()
    split = FolderReader(data / "validation")
    images = [transform_of((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))(Image.open(split.samples[i][0])) for i in (0, 5, 10)]
    with torch.no_grad():  # the class of the nearest of three images
        rows = model.forward_head(model.forward_features(torch.stack(images)), pre_logits=True)
        weight = 1e3 * (rows - rows.mean(0))
        model.head.fc.weight.copy_(weight), model.head.fc.bias.copy_(-(weight * rows).sum(1) / 2)
    cfg = dict(input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), num_classes=3)
    about = dict(model_config=dict(pretrained_cfg=cfg), model_args=shape)
    save_for_hf(model, tmp_path / "model", **about, safe_serialization=True)
    return model


def test_counts_are_those_of_the_model(classifier, data, tmp_path, capsys):
    split = FolderReader(data / "validation")
    options = SimpleNamespace(device="cpu", batch_size=5, workers=0)
    plan = SimpleNamespace(splits=[split, split], options=options, pixels=PLAIN, folder=tmp_path)
    describe_classes(plan, tmp_path / "model", 3)
    config = resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True))
    transform, counts = create_transform(**config), torch.zeros(3, 3, dtype=torch.int64)
    for path, label in split.samples:
        with torch.no_grad():
            counts[label, classifier(transform(Image.open(path))[None]).argmax()] += 1
    assert (counts.sum(0) > 0).sum() > 1  # not one prediction for all
    results = read_classes(tmp_path)
    own = [float(counts[i, i]) / 4 for i in range(3)]
    assert results == of_confusion("accuracy", "images", counts, ["a", "b", "c"], own)
    assert results.confusion == counts.tolist()
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["epoch-0003.png"]
    assert "cannot be decoded" not in capsys.readouterr().err
    (tmp_path / "torn.png").write_bytes(b"no image")
    split.samples.append((str(tmp_path / "torn.png"), 0))
    try:
        describe_classes(plan, tmp_path / "model", 3)
    finally:
        split.samples.pop()
    assert "warning: 1 validation images cannot be decoded" in capsys.readouterr().err
    assert read_classes(tmp_path) == results


def test_the_most_frequent_mistake():
    counts = torch.tensor([[5, 0, 0], [1, 1, 2], [0, 0, 0]])
    found = of_confusion("accuracy", "images", counts, ["x", "y", "z"], [1.0, 0.25, None])
    assert found.classes == [
        ClassResult("x", 5, 1.0, ""), ClassResult("y", 4, 0.25, "z (50 %)"), ClassResult("z", 0, None, ""),
    ]  # fmt: skip
    many = torch.eye(21, dtype=torch.int64)
    assert of_confusion("accuracy", "images", many, list(map(str, range(21))), [1.0] * 21).confusion is None
