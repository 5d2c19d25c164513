"""A data folder, a model and a stand-in for timm's train.py, shared by the tests of finetuning."""

import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from folders import write_images, write_model
from PIL import ImageOps
from timm.models import save_for_hf

from timm_convnextv2.commands.finetune import main
from timm_convnextv2.finetune import launch


@pytest.fixture(scope="session")
def stand_in():
    """Source of a train.py in miniature."""
    return Path(__file__).with_name("stand_in_train.py").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_images(root / "train")
    write_images(root / "validation", n=4)
    return root


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A timm folder of a tiny ConvNeXt V2 without classifier, as pretraining exports."""
    folder = tmp_path_factory.mktemp("run") / "encoder"
    shape = dict(patch_size=1, depths=[1, 1, 2, 1], dims=[8, 8, 16, 16])
    torch.manual_seed(0)
    model = timm.create_model("convnextv2_atto", num_classes=0, **shape)
    cfg = dict(input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), num_classes=0, license="mit")
    save_for_hf(model, folder, model_config=dict(pretrained_cfg=cfg), model_args=shape, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def timm_train():
    """The real train.py, for tests that are marked `timm_train`."""
    path = os.environ.get("TIMM_TRAIN")
    if not path:
        pytest.skip("TIMM_TRAIN=/path/to/timm's/train.py is not set")
    return Path(path).resolve()


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A classifier in the folder of a run, out/x; stand-ins for validate.py and inference.py are in TIMM_TRAIN."""
    (tmp_path / "timm").mkdir()
    for name in ("validate.py", "inference.py"):
        shutil.copy(Path(__file__).with_name("stand_in_validate.py"), tmp_path / "timm" / name)
    monkeypatch.setenv("TIMM_TRAIN", str(tmp_path / "timm" / "train.py"))
    monkeypatch.chdir(tmp_path)
    return write_model(tmp_path / "out/x/model")


@pytest.fixture
def train(stand_in, tmp_path, monkeypatch):
    """The stand-in given as TIMM_TRAIN, and an export that only notes its call; no report."""
    path = tmp_path / "timm" / "train.py"
    path.parent.mkdir()
    path.write_text(stand_in)
    monkeypatch.setenv("TIMM_TRAIN", str(path))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def export_finetuned(source, folder, **_):
        folder.mkdir()
        (folder / "exported").write_text(str(source))
        return folder

    monkeypatch.setattr(launch, "export_finetuned", export_finetuned)
    monkeypatch.setattr(launch, "describe_classes", lambda *_: None)  # which runs the exported model
    monkeypatch.setattr(launch, "write_report", lambda *_: None)
    monkeypatch.setattr(ImageOps, "posterize", lambda image, bits: image)  # as Pillow before 13, for any bits
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def command(train, data, encoder, tmp_path):
    def make(*more, recipe="smoke", experiment="x", model=f"local-dir:{encoder}", data=data, device="cpu"):
        words = ["--recipe", str(recipe), "--data-dir", str(data), "--output", str(tmp_path / "out")]
        words += ["--model", model] if model else []
        words += ["--experiment", experiment] if experiment else []
        words += ["--device", device] if device else []
        return [*words, "--batch-size", "8", *more]

    return make


@pytest.fixture
def run(command, tmp_path):
    """Runs the launcher and gives what train.py got."""

    def run(*more, **kwargs):
        assert main(command(*more, **kwargs)) == 0
        return json.loads((tmp_path / "out" / kwargs.get("experiment", "x") / "seen.json").read_text())

    return run


@pytest.fixture
def refused(command, tmp_path, capsys):
    """Runs the launcher, which must refuse in one line and leave nothing; gives the message."""

    def refused(*more, **kwargs):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()  # warnings of earlier runs
        assert main(command(*more, **kwargs)) == 2
        out, err = capsys.readouterr()
        assert err.startswith("timm-convnextv2 finetune: error: ") and err.count("\n") == 1 and "Traceback" not in err
        assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in p.parts] == before
        return err

    return refused


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe; gives its path."""

    def write(**values):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write
