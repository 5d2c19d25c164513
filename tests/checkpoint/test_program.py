"""`export`: the file computes what the model does, says what to feed it, and is not written otherwise."""

import json

import pytest
import timm
import torch
from encoders import make_encoder
from timm.models import save_for_hf
from tiny import SIZES, tiny_detector

from timm_convnextv2.checkpoint import program
from timm_convnextv2.commands.main import main
from timm_convnextv2.transfer import create_backbone
from timm_convnextv2.transfer.detection.detector import export_detector
from timm_convnextv2.transfer.segmentation.segmenter import build_segmenter, export_segmenter

MEAN, STD, NAMES = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3), ["a", "b", "c"]


def write_classifier(folder):
    model = timm.create_model("convnextv2_atto", num_classes=3, **SIZES).eval()
    cfg = dict(input_size=(3, 64, 64), mean=MEAN, std=STD, num_classes=3, label_names=NAMES, license="mit")
    save_for_hf(model, folder, model_config=dict(pretrained_cfg=cfg), model_args=SIZES, safe_serialization=True)
    return lambda images: [model(normalized(images))]


def write_encoder(folder):
    encoder = make_encoder(folder)
    return lambda images: [encoder((images - 0.4) / 0.3)]


def write_maps(folder):
    encoder = make_encoder(folder)
    return lambda images: encoder.forward_intermediates((images - 0.4) / 0.3, intermediates_only=True)


def write_segmenter(folder):
    backbone = create_backbone("convnextv2_atto", pretrained=False, **SIZES)
    model = build_segmenter(backbone, 3, channels=8, auxiliary_channels=4, classes=NAMES).eval()
    export_segmenter(model, folder)
    return lambda images: [model(images)]


def write_detector(folder):
    model = tiny_detector(3).eval()
    export_detector(model, folder, classes=NAMES)
    body = model.backbone.body
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (body.mean, body.std))
    return lambda images: body((images - mean) / std)


def normalized(images):
    return (images - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def run_torch(path):
    extra = {program.METADATA: ""}
    found = torch.export.load(path, extra_files=extra)
    assert "timm_convnextv2" not in str(found.graph)  # operations of PyTorch alone
    return found.module(), json.loads(extra[program.METADATA])


def run_onnx(path):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    stated = json.loads(session.get_modelmeta().custom_metadata_map[program.METADATA])
    assert names == [*stated["outputs"]]
    return lambda images: tuple(map(torch.from_numpy, session.run(names, {"images": images.numpy()}))), stated


@pytest.mark.parametrize(
    "write, form, words, shape",
    [
        (write_classifier, "torch", "--dynamic batch size", (3, 3, 96, 70)),
        (write_classifier, "onnx", "--dynamic batch --img-size 64", (3, 3, 64, 64)),
        (write_encoder, "torch", "", (1, 3, 32, 32)),
        (write_maps, "torch", "--outputs maps --batch-size 2", (2, 3, 32, 32)),
        (write_segmenter, "torch", "--img-size 70", (1, 3, 70, 70)),
        (write_detector, "torch", "--img-size 64", (1, 3, 64, 64)),
    ],
)
def test_the_file_computes_what_the_model_does(write, form, words, shape, tmp_path, capsys):
    if form == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"the package {package} is not installed")
    model = write(tmp_path / "model")
    path = tmp_path / f"x{'.onnx' if form == 'onnx' else '.pt2'}"
    line = ["export", str(tmp_path), "--format", form, "--output", str(path), *words.split()]
    assert main(line) == 0, capsys.readouterr().err
    call, stated = {"torch": run_torch, "onnx": run_onnx}[form](path)
    images = torch.rand(shape)
    with torch.no_grad():
        expected, found = model(images), call(images)
    found = found if isinstance(found, tuple) else (found,)
    for name, a, b in zip(stated["outputs"], found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        assert list(a.shape[1:2]) == stated["outputs"][name][1:2]
    assert stated.get("classes") == (NAMES if write in (write_classifier, write_segmenter) else None)
    if write is write_classifier:
        assert (stated["mean"], stated["std"], stated["license"]) == ([*MEAN], [*STD], "mit")
    out = capsys.readouterr().out
    assert "mean and std are applied inside" in out and all(f"output {name}: " in out for name in stated["outputs"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_encoder(root / "encoder"), write_segmenter(root / "segmenter"), write_classifier(root / "classifier")
    return root


@pytest.mark.parametrize(
    "words, said",
    [
        ("encoder --outputs logits", "has no classifier. Finetune it first"),
        ("segmenter --outputs maps", "is a segmenter, of which --outputs logits"),
        ("segmenter --dynamic size", "--dynamic size: the pyramid pooling"),
        ("classifier --dynamic size --img-size 32", "--dynamic size needs images of 64 pixels or more, got 32"),
        ("classifier --output x.onnx", "--output x.onnx must end in .pt2 for --format torch"),
        ("nothing", "nothing' does not exist"),
    ],
)
def test_mistakes(words, said, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, *rest = words.split()
    assert main(["export", str(models / name), "--format", "torch", *rest]) == 2
    err = capsys.readouterr().err
    assert any(part in err for part in said.split("|")) and not [*tmp_path.iterdir()], err


def test_missing_packages_are_named_before_the_model_is_opened(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "installed", lambda package: package != "onnxruntime")
    assert main(["export", str(tmp_path / "none")]) == 2
    said = "--format onnx needs the packages onnxruntime: run `pip install 'timm_convnextv2[onnx]'`"
    assert said in capsys.readouterr().err


def test_another_result_is_an_error_and_leaves_the_old_file(models, tmp_path, monkeypatch, capsys):
    make, load = program._FORMS["torch"]
    monkeypatch.setitem(program._FORMS, "torch", (make, lambda path: lambda x: [v * 1.001 for v in load(path)(x)]))
    path = tmp_path / "x.pt2"
    path.write_text("old")
    words = ["export", str(models / "classifier"), "--format", "torch", "--output", str(path)]
    assert main(words) == 2 and "exists. Pass --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 2
    assert "differs from the model by 1.0e-03 of its largest output" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "old"
