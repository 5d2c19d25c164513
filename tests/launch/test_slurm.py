"""launch/slurm.sh, on a cluster of two nodes that are this machine: `srun` and `scontrol` stand in for SLURM's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, environment

SCRIPT = ROOT / "launch" / "slurm.sh"
NODES = 2
# starts what it is given once a node, passes TERM on, and fails where one of them fails
SRUN = f"""#!{sys.executable}
import signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
nodes = [subprocess.Popen(command) for _ in range({NODES})]
signal.signal(signal.SIGTERM, lambda *_: [node.send_signal(signal.SIGTERM) for node in nodes])
sys.exit(max(abs(node.wait()) for node in nodes))
"""
# prints its arguments instead
PRINTING = """#!/bin/sh
for word in "$@"; do echo "$word"; done
exit $STATUS
"""
SCONTROL = f"""#!/bin/sh
if [ "$1" = requeue ]; then echo "$2" >> "$REQUEUED"; else printf 'localhost\\n%.0s' {" ".join("x" * NODES)}; fi
"""


def cluster(folder: Path, srun: str, **more: str) -> dict[str, str]:
    """The environment of a job."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return environment(
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}", PYTHON=sys.executable, REQUEUED=str(folder / "requeued"),
        SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_NUM_NODES=str(NODES), **more,
    )  # fmt: skip


@pytest.mark.parametrize("status", [0, 3])
def test_what_it_starts(tmp_path, status):
    env = cluster(tmp_path, PRINTING, STATUS=str(status), SLURM_GPUS_ON_NODE="8", SLURM_RESTART_COUNT="2")
    options = ["--data-dir", "two words", "--experiment", "x"]
    done = subprocess.run(["bash", str(SCRIPT), *options], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == status and not done.stderr
    words = done.stdout.splitlines()
    assert words[words.index("torch.distributed.run") + 1 :] == [
        "--nnodes", "2", "--nproc-per-node", "8", "--rdzv-id", f"{os.getpid()}-2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"localhost:{20000 + os.getpid() % 20000}",
        "-m", "timm_convnextv2", "pretrain", *options, "--resume", "auto",
    ]  # fmt: skip
    assert not (tmp_path / "requeued").exists()


def test_a_run_needs_a_name(tmp_path):
    env = cluster(tmp_path, PRINTING, STATUS="0")
    done = subprocess.run(["bash", str(SCRIPT), "--amp"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--experiment NAME" in done.stderr and not done.stdout


@pytest.mark.slow
def test_two_nodes_stop_are_requeued_and_resume(tmp_path):
    """Two agents of torchrun on loopback, a process each, with gloo."""
    from runs import DATA, SMALL, load

    options = [*DATA, *SMALL, "--epochs", "60", "--log-interval", "1", "--output", str(tmp_path), "--experiment", "r"]
    options += ["--global-batch-size", "16"]
    env, log = cluster(tmp_path, SRUN, SLURM_GPUS_ON_NODE="1"), tmp_path / "out"
    with open(log, "w") as out:
        job = subprocess.Popen(["bash", str(SCRIPT), *options], env=env, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        while "epoch 2/60" not in log.read_text():
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: does
        assert job.wait(200) == 0, log.read_text()
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())] and "Stopped by SIGTERM" in log.read_text()
    done = load(tmp_path / "r")["progress"]
    assert done["epoch"] < 60 and done["world_size"] == NODES
    env["SLURM_RESTART_COUNT"] = "1"
    options[options.index("60")] = str(done["epoch"] + 2)  # not all of them
    again = subprocess.run(["bash", str(SCRIPT), *options], env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "Resumed from" in again.stdout and "Done: the encoder is in" in again.stdout
    assert load(tmp_path / "r")["progress"]["epoch"] == done["epoch"] + 2
