"""Checkpoints that a failed or killed finetuning leaves behind: named in a message, and resumed."""

import random
import shutil
import signal
import subprocess
import time

import pytest
import timm
import torch
from helpers import environment, python

from timm_convnextv2.commands.finetune import main
from timm_convnextv2.finetune.checkpoints import after_failure, newest_whole


def save(path, epoch):
    torch.save({"epoch": epoch, "state_dict": {"x": torch.zeros(9)}, "optimizer": {}}, path)
    time.sleep(0.01)  # another time of change


def test_failure_names_the_whole_checkpoint(command, encoder, tmp_path, capsys):
    folder = tmp_path / "out" / "x"
    with pytest.raises(RuntimeError, match="failed writing"):
        main(command("--seed", "17"))
    message = capsys.readouterr().err
    assert message.count("train.py failed (RuntimeError).") == 1
    assert f"The last whole checkpoint is {folder / 'last.pth.tar'} (after epoch 3 of 10)." in message
    assert "Removed tmp.pth.tar (0.0 MiB)" in message
    assert f"--experiment x --resume {folder / 'last.pth.tar'}." in message
    assert not (folder / "tmp.pth.tar").exists()
    content = torch.load(folder / "last.pth.tar", weights_only=False)  # the stand-in trains no model
    content["state_dict"] = timm.create_model(f"local-dir:{encoder}", num_classes=3).state_dict()
    torch.save(content, folder / "last.pth.tar")
    assert main(command("--resume", str(folder / "last.pth.tar"))) == 0
    with pytest.raises(SystemExit):
        main(command("--seed", "13", experiment="nothing saved"))
    assert "has no whole checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["torn last", "between two renames", "only an epoch's"])
def test_newest_whole_one(tmp_path, state):
    """What a SIGKILL leaves at each moment of timm's saver, which takes `last` away before the new one has its name."""
    save(tmp_path / "checkpoint-0.pth.tar", 0)
    if state == "between two renames":
        save(tmp_path / "tmp.pth.tar", 1)
        assert newest_whole(tmp_path) == (tmp_path / "tmp.pth.tar", 2)
        assert "after epoch 2 of 9" in after_failure(tmp_path, 9, "x") and (tmp_path / "tmp.pth.tar").exists()
        return
    if state == "torn last":  # a copy of a file system without links
        (tmp_path / "last.pth.tar").write_bytes((tmp_path / "checkpoint-0.pth.tar").read_bytes()[:-50])
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-0.pth.tar", 1)


def test_killed_while_the_first_checkpoint_was_written(run, refused, tmp_path):
    """The same command starts anew; it used to say that all checkpoints are corrupt."""
    folder = tmp_path / "out" / "x"
    folder.mkdir(parents=True)
    save(tmp_path / "whole", 0)
    (folder / "tmp.pth.tar").write_bytes((tmp_path / "whole").read_bytes()[:-50])
    run()
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.copy(tmp_path / "whole", folder / "tmp.pth.tar")  # killed before the first checkpoint got its name
    assert f"Resume it: --resume {folder / 'tmp.pth.tar'}." in refused()


def test_corrupt_checkpoint_is_not_resumed_from(run, refused, tmp_path):
    run()
    folder = tmp_path / "out" / "x"
    shutil.copy(folder / "last.pth.tar", folder / "checkpoint-2.pth.tar")
    data = bytearray((folder / "last.pth.tar").read_bytes())
    data[len(data) // 2] ^= 255
    (folder / "last.pth.tar").write_bytes(data[:-10])
    message = refused("--resume", str(folder / "last.pth.tar"))
    assert f"Whole beside it: {folder / 'checkpoint-2.pth.tar'}" in message
    assert f"Resume it: --resume {folder / 'checkpoint-2.pth.tar'}." in refused()
    torch.save({"x": 1}, folder / "x.pth.tar")
    assert "is not a checkpoint of train.py" in refused("--resume", str(folder / "x.pth.tar"))


@pytest.fixture
def words(timm_train, encoder, data, tmp_path):
    given = ["-m", "timm_convnextv2", "finetune", "--recipe", "smoke", "--model", f"local-dir:{encoder}"]
    given += ["--data-dir", str(data), "--output", str(tmp_path), "--experiment", "r", "--timm-train", str(timm_train)]
    given += "--epochs 4 --warmup-epochs 0 --batch-size 8 --workers 0 --device cpu".split()
    return [python(), *given]


def finish(words, folder, *more):
    result = subprocess.run([*words, *more], capture_output=True, text=True, timeout=200, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Done: " in result.stdout and (folder / "model/model.safetensors").exists()


@pytest.mark.timm_train
def test_killed_and_resumed(words, tmp_path):
    """At a random moment after the first checkpoint."""
    folder = tmp_path / "r"
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    end = time.monotonic() + 100
    while not (folder / "last.pth.tar").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(random.random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    result = subprocess.run(words, capture_output=True, text=True, timeout=100, env=environment())
    found = newest_whole(folder)
    assert result.returncode == 2 and found and f"--resume {found[0]}." in result.stderr
    finish(words, folder, "--resume", str(found[0]))
    epochs = [line.partition(",")[0] for line in (folder / "summary.csv").read_text().splitlines()]
    assert {"0", "1", "2", "3"} <= set(epochs)


@pytest.mark.timm_train
def test_full_disk(words, tmp_path):
    """The second checkpoint does not fit."""
    folder, script = tmp_path / "r", tmp_path / "one.py"
    script.write_text(
        "import sys, torch\n"
        "from timm_convnextv2.commands.finetune import main\n"
        "save, count = torch.save, iter(range(9))\n"
        "def full(content, path):\n"
        "    if next(count) < 1: return save(content, path)\n"
        "    open(path, 'wb').write(bytes(5000))\n"
        "    raise RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed')\n"
        "torch.save = full\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    broken = [words[0], str(script), *words[3:]]
    result = subprocess.run(broken, capture_output=True, text=True, timeout=200, env=environment())
    assert result.returncode == 1 and "train.py failed (RuntimeError)" in result.stderr
    assert f"The last whole checkpoint is {folder / 'last.pth.tar'} (after epoch 1 of 4)." in result.stderr
    assert not (folder / "tmp.pth.tar").exists()
    finish(words, folder, "--resume", str(folder / "last.pth.tar"))
