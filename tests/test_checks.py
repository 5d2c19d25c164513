"""Checks that several commands share: class names, outputs, devices."""

import pytest
import torch

from timm_convnextv2.commands.base import fit_amp
from timm_convnextv2.commands.table import COMMANDS
from timm_convnextv2.config import build, entries, flat
from timm_convnextv2.console import check_same_classes
from timm_convnextv2.files import check_free, claim_folder, write_csv, write_json
from timm_convnextv2.runs import device
from timm_convnextv2.runs.device import check_device, slow_amp


@pytest.mark.parametrize(
    "here, there, ordered, words",
    [
        (["ant", "dog"], ["ant", "cat"], True, ["only HERE has dog (1)", "only THERE has cat (1)"]),
        (["ant", "cat", "dog"], ["ant", "dog", "cat"], True, ["order differs at 2", "1 ('cat' and 'dog')"]),
        ([f"c{i}" for i in range(9)], ["c0"], False, ["(9)", "c1, c2, c3, c4, c5, ... (8)"]),
    ],
)
def test_classes_that_differ(here, there, ordered, words):
    with pytest.raises(ValueError) as error:
        check_same_classes(here, there, ("HERE", "THERE"), ordered=ordered, remedy="Fix it.")
    assert all(word in str(error.value) for word in [*words, "Fix it."])


def test_classes_that_are_the_same():
    check_same_classes(["a", "b"], ["a", "b"], ("x", "y"), remedy="")
    check_same_classes(["a", "b"], ["b", "a"], ("x", "y"), ordered=False, remedy="")


def test_outputs(tmp_path):
    folder = claim_folder(tmp_path / "a/b", overwrite=False)
    write_json(folder / "x.json", [1])
    assert (folder / "x.json").read_text() == "[1]"
    claim_folder(folder, ["y.json"], overwrite=False)
    for names, found in (([], "not empty"), (["x.json", "y.json"], "has x.json")):
        with pytest.raises(ValueError, match=f"{found}.*--overwrite"):
            claim_folder(folder, names, overwrite=False)
        assert claim_folder(folder, names, overwrite=True) == folder
    with pytest.raises(ValueError, match="is a file"):
        claim_folder(folder / "x.json", overwrite=True)
    with pytest.raises(ValueError, match="x.json' exists.*--overwrite"):
        check_free(folder / "x.json", overwrite=False)
    assert check_free(folder / "x.json", overwrite=True) == check_free(str(folder / "x.json"), overwrite=True)


def test_devices(monkeypatch):
    assert check_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert check_device("cuda") == torch.device("cuda") and check_device("cuda:0").index == 0
    for name in ("cuda:1", "tpu9"):
        with pytest.raises(ValueError, match=f"--device {name}"):
            check_device(name)


has_bfloat16 = device._has_bfloat16  # the real one; tests replace it


def test_pytorch_tells_whether_the_cpu_has_bfloat16():
    assert has_bfloat16() in (True, False)


def test_slow_mixed_precision(slow_bfloat16, monkeypatch):
    assert "bfloat16" in slow_amp("cpu") and slow_amp("cpu") == slow_amp("cuda:0, cpu")
    assert not slow_amp("cuda:0") and not slow_amp("mps")
    monkeypatch.setattr(device, "_has_bfloat16", lambda: True)
    assert not slow_amp("cpu")


NEEDED = {"data_dir": "x", "model": "x", "models": ("x",), "output": "x"}
WITH_AMP = [name for name, command in COMMANDS.items() if "amp" in entries(command.config)]


@pytest.mark.parametrize("name", WITH_AMP)
def test_every_command_tells_of_slow_mixed_precision(slow_bfloat16, capsys, name):
    """Asked for, it is kept with a warning; of a file, it is switched off with a note; a GPU has neither."""
    cls = COMMANDS[name].config
    needed = {key: value for key, value in NEEDED.items() if key in entries(cls)}

    def fitted(given, **more):
        config = fit_amp(build(cls, needed, {"amp": True, "device": "cpu"}, more), given)
        return flat(config)["amp"], *capsys.readouterr()

    on, out, err = fitted({"amp": True})
    assert on and not out and err.startswith("warning: --amp: this CPU")
    on, out, err = fitted({})
    assert not on and out.startswith("--no-amp: this CPU") and not err
    assert fitted({}, device="cuda") == (True, "", "") and fitted({}, amp=False) == (False, "", "")


def test_cells_are_no_formulas(tmp_path):
    cells = ["=1+1", "+a", "-cmd|x", "@b", "\tc", "a=b", "-1.5e-3", "-2", -3, 0.5, None]
    write_csv(tmp_path / "x.csv", ["name"], [[cell] for cell in cells])
    read = (tmp_path / "x.csv").read_text().splitlines()
    assert read == ["name", "'=1+1", "'+a", "'-cmd|x", "'@b", "'\tc", "a=b", "-1.5e-3", "-2", "-3", "0.5", '""']


@pytest.mark.parametrize("name", ["x" * 250 + ".json", "é" * 125 + ".json"])
def test_the_longest_names_of_a_file_system(tmp_path, name):
    write_json(tmp_path / name, [1])
    assert [path.name for path in tmp_path.iterdir()] == [name]
