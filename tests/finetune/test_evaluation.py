"""validate and predict with a stand-in for timm's scripts: what is refused, and what the scripts get."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from folders import write_images, write_model

from timm_convnextv2.commands import predict, validate


def seen():
    return json.loads(Path("seen.json").read_text())


def test_classes_are_matched_by_name(model, data, capsys):
    assert validate.main([str(model), "--data-dir", str(data), "--device", "cpu"]) == 0
    found = seen()
    assert found["args"]["model"] == f"local-dir:{model}" and found["targets"] == [0] * 4 + [1] * 4 + [2] * 4
    assert found["args"]["in_chans"] is None and found["args"]["mean"] is None
    write_images(Path("one") / "validation", classes=("b",), n=2)
    assert validate.main([str(model), "--data-dir", "one", "--device", "cpu"]) == 0
    assert seen()["targets"] == [1, 1]  # by its folder alone it would be class 0
    assert "1 of the model's 3 classes" in capsys.readouterr().out
    assert validate.main([str(model), "one/validation", "--device", "cpu"]) == 0  # the folder itself
    assert seen()["targets"] == [1, 1]


def test_device_is_one_that_is_there(model, data, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert validate.main([str(model), "--data-dir", str(data)]) == 0
    assert seen()["args"]["device"] == "cpu" and "--device cpu: PyTorch sees no" in capsys.readouterr().out


def test_amp_on_a_slow_cpu(model, data, slow_bfloat16, capsys):
    for words, warns in ([], False), (["--amp"], True):
        assert validate.main([str(model), "--data-dir", str(data), "--device", "cpu", *words]) == 0
        assert seen()["args"]["amp"] is warns and ("warning: --amp: this CPU" in capsys.readouterr().err) == warns


def test_channels_that_only_the_model_has(model, tmp_path):
    for label in "ab":
        (tmp_path / "bands" / label).mkdir(parents=True)
        np.save(tmp_path / "bands" / label / "0.npy", np.zeros((9, 9, 5), "u1"))
    folder = write_model(tmp_path / "five", in_chans=5)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]  # timm's own save averages
    (folder / "config.json").write_text(json.dumps(config))
    assert predict.main([str(folder), "--data-dir", str(tmp_path / "bands"), "--device", "cpu"]) == 0
    args = seen()["args"]
    assert args["in_chans"] == 5 and args["mean"] == [0.2] * 5 and args["std"] is None


def test_predict_skips_and_names_corrupt_images(model, data, tmp_path, capsys):
    """One bad file must not throw away the others, nor shift their names; files of one name stay apart."""
    shutil.copytree(data / "validation", tmp_path / "copy")
    for name in ("a/1.png", "c/0.png", "c/1.png", "c/2.png", "c/3.png"):  # the last batch has only bad ones
        (tmp_path / "copy" / name).write_bytes(b"junk")
    words = [str(model), "--data-dir", str(tmp_path / "copy"), "--device", "cpu"]
    assert validate.main(words) == 0
    capsys.readouterr()
    assert predict.main(words) == 1
    err = capsys.readouterr().err
    assert err.count("skipped: ") == 5 and f"skipped: {tmp_path}/copy/a/1.png: cannot be decoded" in err
    assert "5 of 12 images have no result" in err
    assert seen()["filenames"] == ["a/0.png", "a/2.png", "a/3.png", "b/0.png", "b/1.png", "b/2.png", "b/3.png"]
    assert seen()["batches"] == [3, 4]
    assert predict.main([*words, "--max-bad-images", "0.4"]) == 2
    assert "5 of 12 images cannot be decoded, more than --max-bad-images 0.4 allows" in capsys.readouterr().err


@pytest.mark.parametrize("labelled", [True, False])
def test_images_to_predict_have_no_classes(labelled, model, tmp_path, capsys):
    """Folders by session within a class are a mistake for `validate` alone; so are folders without images."""
    for label in "ab":
        write_images(tmp_path / "sets" / "validation" / label, classes=("s1", "s2"), n=1)
    write_images(tmp_path / "one" / "c", classes=("s1",), n=1)
    (tmp_path / "sets" / "validation" / "notes").mkdir()
    (tmp_path / "sets" / "validation" / "notes" / "x.txt").touch()
    command = validate.main if labelled else predict.main
    assert command([str(model), "--data-dir", "sets", "--device", "cpu"]) == (2 if labelled else 0)
    out, err = capsys.readouterr()
    if not labelled:
        assert "validation: 4 images\n" in out and "classes" not in out and "no images in" not in out and not err
        assert command([str(model), "--data-dir", "one/c/s1", "--device", "cpu"]) == 0
        assert "one/c/s1: 1 image\n" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "cores", "processes", "expected"), [
    ((), 1, 1, 1), ((), 3, 1, 3), ((), 64, 1, 4), ((), 8, 4, 2), ((), 1, 2, 1), (("--workers", "7"), 1, 1, 7),
    (("-j", "4"), 2, 1, 4),
])  # fmt: skip
def test_data_workers_are_no_more_than_cores(model, data, monkeypatch, given, cores, processes, expected):
    monkeypatch.setattr("timm_convnextv2.finetune.options.usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert validate.main([str(model), "--data-dir", str(data), "--device", "cpu", *given]) == 0
    assert seen()["args"]["workers"] == expected


MISTAKES = {
    "no model": ([], "--model is needed"),
    "no data": (["--model", "convnextv2_atto"], "--data-dir is needed"),
    "two models": (["x", "--model", "y"], "both name a model"),
    "unknown option": (["--no-such"], "unrecognized arguments: --no-such"),
    "encoder": (["ENCODER", "--data-dir", "DATA"], "no classifier"),
    "other classes": (["MODEL", "--data-dir", "OTHER"], "1 class that the model does not have: z. The model's: a, b"),
    "wrong channels": (["MODEL", "--data-dir", "DATA", "--in-chans", "5"], "has 3 channels"),
    "mode": (["MODEL", "--data-dir", "DATA", "--input-img-mode", "L"], "--input-img-mode L"),
    "checkpoint": (["MODEL", "--data-dir", "DATA", "--checkpoint", "gone.pth"], "'gone.pth' does not exist"),
    "no folder": (["MODEL", "--data-dir", "gone"], "gone does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_message(mistake, model, encoder, data, tmp_path, capsys):
    words, expected = MISTAKES[mistake]
    write_images(tmp_path / "validation", classes=("a", "z"), n=1)
    paths = {"ENCODER": encoder, "MODEL": model, "DATA": data, "OTHER": tmp_path}
    words = [str(paths.get(word, word)) for word in words]
    assert validate.main([*words, *(["--device", "cpu"] * bool(words))]) == 2
    err = capsys.readouterr().err
    assert err.startswith("timm-convnextv2 validate: error: ") and expected in err and err.count("error:") == 1
