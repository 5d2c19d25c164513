"""Several processes: one dies, fails, or knows other facts; the others end soon and leave the cause to it."""

import time

import pytest
from helpers import torchrun
from runs import command

PROGRAM = """
import multiprocessing, os, signal, sys, time
from timm_convnextv2.pretrain import main, batches, distributed, loop, peers
from timm_convnextv2.pretrain.trainer import Trainer
update = Trainer.update
def wrapped(self, batches, number):
    if number == 2 and self.world.rank == 1:
        {act}
    return update(self, batches, number)
Trainer.update = wrapped
{before}
if __name__ == '__main__': sys.exit(main())
"""
FAULTS = {
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "process 1 of 2"),
    "is stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", "process 1 of 2"),
    "meets a bug": ("raise KeyError('a bug')", "KeyError: 'a bug'"),
    "loses a worker": (
        "[os.kill(w.pid, signal.SIGKILL) for w in multiprocessing.active_children()]",
        "DataLoader worker",
    ),
    "waits for its data": ("raise batches.DataError('x.jpg needs a package')", "pretrain: x.jpg needs a package"),
}


def start(tmp_path, act="pass", before="", *more):
    script = tmp_path / "one.py"
    script.write_text(PROGRAM.format(act=act, before=before))
    begin = time.monotonic()
    options = command(tmp_path / "r", "--batch-size", "4", "--workers", "2", *more, epochs=99)
    result = torchrun(script, *options, timeout=90)
    return result, time.monotonic() - begin


@pytest.mark.parametrize("fault", FAULTS)
def test_one_process(tmp_path, fault):
    act, words = FAULTS[fault]
    shorter = "peers.PATIENCE = 5" if fault == "is stopped" else ""
    result, seconds = start(tmp_path, act, shorter)
    assert result.returncode, result.stdout
    own = result.stderr.partition("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")[0]
    assert words in own and seconds < 60, result.stderr
    assert own.count("Traceback") == (fault == "meets a bug") + own.count("torch/distributed/run.py") // 2, own
    for of_others in ("Connection closed", "gloo", "Timed out", "NCCL"):
        assert of_others not in own


@pytest.mark.parametrize(
    "fact, before",
    [
        ("the package versions", "loop.VERSIONS += ' ' + os.environ['RANK']"),
        ("--epochs", "sys.argv += ['--epochs', '1' + os.environ['RANK']]"),
        ("the number of images", "sys.argv += ['--train-num-samples', '3' + os.environ['RANK']]"),
    ],
)
def test_processes_that_disagree(tmp_path, fact, before):
    result, _ = start(tmp_path, before=before)
    assert result.returncode and result.stderr.count("timm-convnextv2 pretrain: error: ") == 1
    assert "Process 1 has another value of " in result.stderr and not (tmp_path / "r").exists()
    if fact != "the number of images":
        assert f"another value of {fact}" in result.stderr
