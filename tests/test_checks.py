"""Checks that several commands share: class names, outputs, devices."""

from pathlib import Path

import pytest
import torch

from timm_convnextv2.commands import base, detect, pretrain, segment
from timm_convnextv2.commands.table import COMMANDS
from timm_convnextv2.config import entries, flat, words_of
from timm_convnextv2.console import check_same_classes
from timm_convnextv2.files import check_free, claim_folder, write_csv, write_json
from timm_convnextv2.runs import device
from timm_convnextv2.runs.device import check_device, keep_amp

CPU = Path("/proc/cpuinfo")


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


@pytest.mark.skipif(not CPU.is_file() or "flags" not in CPU.read_text(), reason="/proc/cpuinfo lists no flags of x86")
def test_pytorch_tells_whether_the_cpu_has_bfloat16():
    flags = set(CPU.read_text().split())
    if "avx512_bf16" in flags:
        assert has_bfloat16()
    elif not {"avx512bw", "avx_ne_convert"} & flags:
        assert not has_bfloat16()


def test_slow_mixed_precision(slow_bfloat16, monkeypatch):
    for devices in ("cpu", "cuda:0, cpu"):
        assert keep_amp(devices, asked=True) and not keep_amp(devices, asked=False)
    assert keep_amp("cuda:0", asked=False) and keep_amp("mps", asked=False)
    monkeypatch.setattr(device, "_has_bfloat16", lambda: True)
    assert keep_amp("cpu", asked=False)


NEEDED = {"data_dir": "x", "model": "atto", "output": "x"}
WITH_AMP = [name for name, command in COMMANDS.items() if "amp" in entries(command.config)]


def configured(name, *words):
    """The config with which a command starts."""
    cls = COMMANDS[name].config
    words = [*words_of(cls, {key: value for key, value in NEEDED.items() if key in entries(cls)}), *words]
    words += ["x"] if "models" in entries(cls) else []
    if name == "pretrain":
        return pretrain.parse_options(words)[0]
    if " " in name:
        group, action = name.split()
        return {"detect": detect, "segment": segment}[group].COMMAND.parse([action, *words])[1]
    found = []
    assert base.run(name, found.append, words) == 0
    return found[0]


@pytest.mark.parametrize("name", WITH_AMP)
def test_every_command_tells_of_slow_mixed_precision(slow_bfloat16, capsys, name):
    """Asked for, it is kept with a warning, but none on a GPU."""
    assert flat(configured(name, "--amp", "--device", "cpu"))["amp"]
    assert capsys.readouterr().err.startswith("warning: --amp: this CPU")
    assert flat(configured(name, "--amp", "--device", "cuda"))["amp"] and not capsys.readouterr().err
    assert not flat(configured(name, "--device", "cpu"))["amp"] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name, option", [("pretrain", "--config"), ("detect train", "--recipe")])
def test_slow_mixed_precision_of_a_file_is_left_out(slow_bfloat16, capsys, tmp_path, name, option):
    (tmp_path / "mine.yaml").write_text("amp: true\n")
    words = [option, str(tmp_path / "mine.yaml"), "--device"]
    assert not flat(configured(name, *words, "cpu"))["amp"]
    assert capsys.readouterr().out.startswith("--no-amp: this CPU")
    assert (
        flat(configured(name, *words, "cuda"))["amp"] and not flat(configured(name, *words, "cuda", "--no-amp"))["amp"]
    )
    assert capsys.readouterr() == ("", "")


def test_cells_are_no_formulas(tmp_path):
    cells = ["=1+1", "+a", "-cmd|x", "@b", "\tc", "a=b", "-1.5e-3", "-2", -3, 0.5, None]
    write_csv(tmp_path / "x.csv", ["name"], [[cell] for cell in cells])
    read = (tmp_path / "x.csv").read_text().splitlines()
    assert read == ["name", "'=1+1", "'+a", "'-cmd|x", "'@b", "'\tc", "a=b", "-1.5e-3", "-2", "-3", "0.5", '""']


@pytest.mark.parametrize("name", ["x" * 250 + ".json", "é" * 125 + ".json"])
def test_the_longest_names_of_a_file_system(tmp_path, name):
    write_json(tmp_path / name, [1])
    assert [path.name for path in tmp_path.iterdir()] == [name]
