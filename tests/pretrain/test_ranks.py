"""Several processes: one dies, fails, or knows other facts; the others end soon and leave the cause to it."""

import time

import pytest
from helpers import assert_same, torchrun
from runs import command, load, patched

FAULTS = {
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "process 1 of 2"),
    "is stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", "process 1 of 2"),
    "meets a bug": ("raise KeyError('a bug')", "KeyError: 'a bug'"),
    "loses a worker": (
        "[os.kill(w.pid, signal.SIGKILL) for w in multiprocessing.active_children()]",
        "DataLoader worker",
    ),
    "cannot read on": ("raise DataError('x.jpg needs a package')", "pretrain: error: x.jpg needs a package"),
}


def start(tmp_path, act="pass", before="", *more):
    script = patched(tmp_path, act, rank=1, before=before)
    options = command(tmp_path / "r", "--batch-size", "4", "--workers", "2", *more, epochs=99)
    result, stamp = torchrun(script, *options, timeout=120), tmp_path / "fault"
    return result, time.time() - stamp.stat().st_mtime if stamp.exists() else None


# a start of two processes with workers takes 10 s, and more where one hangs
@pytest.mark.parametrize("fault", [pytest.param(f, marks=[pytest.mark.slow] * (f != "is killed")) for f in FAULTS])
def test_one_process(tmp_path, fault):
    act, words = FAULTS[fault]
    shorter = "world.PATIENCE = 5" if fault == "is stopped" else ""
    result, seconds = start(tmp_path, act, shorter)
    assert result.returncode, result.stdout
    own = result.stderr.partition("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")[0]
    # torchrun gives a process that is stopped 30 s to end
    assert words in own and seconds < (60 if fault != "is stopped" else 90), result.stderr
    assert own.count("Traceback") == (fault == "meets a bug") + own.count("torch/distributed/run.py") // 2, own
    for of_others in ("Connection closed", "gloo", "Timed out", "NCCL"):
        assert of_others not in own


@pytest.mark.slow
@pytest.mark.parametrize(
    "fact, before",
    [
        ("the package versions", "setup.VERSIONS += ' ' + os.environ['RANK']"),
        ("--epochs", "sys.argv += ['--epochs', '1' + os.environ['RANK']]"),
        ("the number of images", "sys.argv += ['--num-images', '3' + os.environ['RANK']]"),
    ],
)
def test_processes_that_disagree(tmp_path, fact, before):
    result, _ = start(tmp_path, before=before)
    assert result.returncode and result.stderr.count("timm-convnextv2 pretrain: error: ") == 1
    assert "Process 1 has another value of " in result.stderr and not (tmp_path / "r").exists()
    if fact != "the number of images":
        assert f"another value of {fact}" in result.stderr


@pytest.mark.slow
def test_average_accumulation_and_compilation_together(tmp_path):
    """Two processes with all that wraps a model; stopped within an epoch and resumed, they end as without the stop."""
    more = ["--model-ema", "--grad-accum-steps", "2", "--torchcompile", "aot_eager", "--epochs", "2"]
    options = ["--batch-size", "4", "--workers", "1", *more]
    for name in ("whole", "r"):
        script = patched(tmp_path, "os.kill(os.getpid(), signal.SIGTERM)" if name == "r" else "pass", rank=1)
        result = torchrun(script, *command(tmp_path / name, *options, epochs=2), timeout=200)
        assert result.returncode == 0, result.stderr
    assert load(tmp_path / "r")["progress"]["update"] == 1
    result = torchrun(patched(tmp_path), *command(tmp_path / "r", *options, "--resume", "auto", epochs=2), timeout=200)
    assert result.returncode == 0, result.stderr
    for part in ("state_dict", "state_dict_ema"):
        assert_same(load(tmp_path / "r")[part], load(tmp_path / "whole")[part])
