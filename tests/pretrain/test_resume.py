"""Stopping and resuming: a run ends as it would have without the stop."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from helpers import assert_same, environment, python, shell, torchrun
from runs import SCRIPT, assert_same_end, at_update, command, kill, load, patched, rows, run, steady, stop
from safetensors.torch import load_file

from timm_convnextv2.commands.pretrain import main
from timm_convnextv2.runs import end, summary
from timm_convnextv2.runs import world as distributed


@pytest.mark.parametrize(
    "case, stops",
    [
        ("plain", [0, 2, 1]),  # again and again, also after the last of an epoch
        ("ema", [5]),
        ("accum", [1, 3]),
        ("float16", [2]),
    ],
)
def test_stopped_run_ends_as_an_uninterrupted_one(tmp_path, no_images, capsys, whole, case, stops):
    expected, options = whole(case)
    capsys.readouterr()
    out, done = tmp_path / "r", 0
    for i, update in enumerate(stops):
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        stop(out, update, *options, "--resume", "auto", number=number, epochs=2)
        done += update + 1
        printed = capsys.readouterr().out
        inside, after = f"in epoch {done // 4 + 1} of 2, update {done % 4} of 4", f"after epoch {done // 4} of 2"
        where = inside if done % 4 else after
        assert f"Stopped by {number.name} {where}" in printed and "--resume auto" in printed
        assert load(out)["progress"]["epoch"] == done // 4 and load(out)["progress"]["update"] == done % 4
        assert (out / "encoder/config.json").exists()
    run(out, *options, "--resume", "auto", epochs=2)
    here, there = load(out), load(expected)
    for state in (here, there):
        state["args"] = {k: v for k, v in state["args"].items() if k not in ("output", "experiment")}
    assert ("state_dict_ema" in here) == (case == "ema" or "--model-ema" in options)
    assert_same(here, there)
    assert steady(out) == steady(expected)
    assert_same(load_file(out / "encoder/model.safetensors"), load_file(expected / "encoder/model.safetensors"))


def test_stopped_between_epochs(tmp_path, no_images, monkeypatch, whole):
    expected, options = whole("plain")
    with monkeypatch.context() as patch:
        trim = summary.add_row
        patch.setattr(summary, "add_row", lambda *args: (trim(*args), os.kill(os.getpid(), signal.SIGTERM))[0])
        out = run(tmp_path / "r", *options, epochs=2)
    assert load(out)["progress"]["epoch"] == 1
    run(out, *options, "--resume", "auto", epochs=2)
    assert_same_end(out, expected)


@pytest.mark.parametrize(
    "update, option, expected",
    [(6, [], (1, 0)), (7, ["--recovery-interval", "2"], (1, 2)), (7, ["--checkpoint-minutes", "1e-9"], (1, 3))],
)
def test_killed_run_resumes_from_its_checkpoint(tmp_path, no_images, whole, update, option, expected):
    """An epoch that was not saved leaves no trace in the summary."""
    there, options = whole("plain")
    kill(tmp_path / "r", update, *options, *option, epochs=2)
    progress = load(tmp_path / "r")["progress"]
    assert (progress["epoch"], progress["update"]) == expected
    assert (tmp_path / "r/encoder/model.safetensors").exists()
    run(tmp_path / "r", *options, *option, "--resume", "auto", epochs=2)
    assert_same_end(tmp_path / "r", there)


def test_second_signal_ends_at_once_where_python_does_not_run(tmp_path):
    """As in a collective: the main thread waits in C for what never comes, and signals do not wake it."""
    wait = "libc.pthread_mutex_lock(lock); libc.pthread_mutex_lock(lock)"
    script = tmp_path / "one.py"
    script.write_text(
        "import ctypes\n"
        "from timm_convnextv2.runs.world import World\n"
        "World('cpu').watch_signals()\n"
        "lock, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)\n"
        f"print('ready', flush=True)\n{wait}\n"
    )
    process = subprocess.Popen([python(), script], stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    # by the thread; or by the system, where the first came before Python had entered C
    assert process.wait(timeout=20) in (128 + signal.SIGTERM, -signal.SIGTERM)


def test_printed_command_finishes_the_run(tmp_path, no_images, monkeypatch, capsys, whole):
    expected, options = whole("plain")
    args = [*command(tmp_path / "a run", *options, epochs=2), "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *args])
        at_update(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(args) == 0
    line = re.search(r"Resume with\n  (.*)\n", capsys.readouterr().out)[1]
    assert shlex.split(line)[1] == str(SCRIPT) and line.endswith("--experiment 'a run' --resume auto")
    result = shell(line, tmp_path)
    assert result.returncode == 0 and "Done" in result.stdout, result.stderr
    assert_same(load(tmp_path / "a run")["state_dict"], load(expected)["state_dict"])
    assert len(rows(tmp_path / "a run")) == 2


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--data-dir", "a b", "--overwrite"], "--data-dir 'a b' --experiment x --resume auto"),
        (["--resume", "auto", "--experiment=x"], "--experiment x --resume auto"),
        (["--resume=q", "--experiment", "x", "--amp"], "--amp --experiment x --resume auto"),
    ],
)
@pytest.mark.parametrize("started", ["a clone's script", "console command", "module"])
def test_resume_command(monkeypatch, argv, expected, started):
    """The command line of today, with what resumes, started as it was."""
    script, module = str(SCRIPT), str(SCRIPT.parents[1] / "timm_convnextv2/pretraining/__main__.py")
    console = ["/bin/timm-convnextv2", "pretrain"]
    program = {"a clone's script": [script], "console command": console, "module": [module]}
    monkeypatch.setattr(sys, "argv", [*program[started], *argv])
    for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found, clone = shlex.split(end.resume_command("pretrain", "x")), started == "a clone's script"
    start = found[: -len(shlex.split(expected))]
    assert found[len(start) :] == shlex.split(expected)
    assert start[-1] == script if clone else start[-1] in ("pretrain", "timm_convnextv2.pretrain")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = script if clone else "-m timm_convnextv2 pretrain"
    assert end.resume_command("pretrain", "x") == f"torchrun --nproc-per-node 2 {words} {expected}"


def test_ctrl_c_in_a_terminal(tmp_path):
    """SIGINT for the whole process group, workers too, as a terminal sends it."""
    process = subprocess.Popen(
        [python(), SCRIPT, *command(tmp_path / "r", "--log-interval", "1", "--workers", "2", epochs=999)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment(),
    )  # fmt: skip
    for line in process.stdout:
        if " step 2/" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "Error" not in err  # triton tells of its own leaks at the end
    assert "Stopped by SIGINT " in out and "arning" not in out  # no word of a report
    progress = load(tmp_path / "r")["progress"]
    inside = f"in epoch {progress['epoch'] + 1} of 999, update {progress['update']} of 4"
    assert (inside if progress["update"] else f"after epoch {progress['epoch']} of 999") in out
    assert progress["epoch"] * 4 + progress["update"] >= 2


def test_a_second_signal_stops_at_once_but_not_that_of_a_closed_terminal():
    before = [signal.getsignal(number) for number in distributed.SIGNALS]
    watcher = distributed.World("cpu")
    for name, times in (("SIGHUP", 2), ("SIGTERM", 1)):
        watcher.watch_signals()
        for _ in range(times):
            os.kill(os.getpid(), signal.Signals[name])
        assert watcher.stop == name
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # whichever comes second
        watcher.close()
    assert [signal.getsignal(number) for number in distributed.SIGNALS] == before


@pytest.mark.parametrize("more", [{}, {"SLURM_PROCID": "0"}], ids=["salloc", "sbatch"])
def test_slurm_without_srun_is_one_message(monkeypatch, more):
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_NTASKS": "4", **more}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="SLURM_NTASKS=4 .*unset SLURM_NTASKS.*torchrun"):
        distributed.World("cpu")


def test_all_processes_stop_where_one_is_asked(tmp_path):
    """A signal that reaches one process of two: both stop after the same update, and the run resumes to its end."""
    script = patched(tmp_path, "os.kill(os.getpid(), signal.SIGTERM)", number=1, rank=1)
    options = command(tmp_path / "r", "--batch-size", "4", epochs=2)
    result = torchrun(script, *options)
    assert result.returncode == 0 and "Stopped by a signal in epoch 1 of 2, update 2 of 4" in result.stdout
    assert load(tmp_path / "r")["progress"]["update"] == 2
