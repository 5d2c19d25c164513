"""One run at a time in a folder: who holds it, who is refused, and when it is free again."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import environment
from runs import at_update, command, load, rows, run, snapshot

from timm_convnextv2.commands.pretrain import main
from timm_convnextv2.files import this_process
from timm_convnextv2.runs import lock
from timm_convnextv2.runs.lock import LOCK, Lock, LockLostError, release_locks

# Holds the folder that it is given, in a process of its own that starts quickly, without torch: the file counts.
HOLD = (
    "import json, sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
    "import importlib.util as u\n"
    "spec = u.spec_from_file_location('host', sys.argv[2] + '/timm_convnextv2/files.py')\n"
    "host = u.module_from_spec(spec); spec.loader.exec_module(host)\n"
    "content = dict(host.this_process()._asdict(), command='the other', since='2026-01-01 00:00:00', token='x')\n"
    "Path(sys.argv[1], '.lock').write_text(json.dumps(content)); print('held', flush=True); time.sleep(600)\n"
)


@pytest.fixture
def other(tmp_path):
    """A process that holds the folder `r`."""
    folder = tmp_path / "r"
    folder.mkdir()
    root = str(lock.__file__).partition("/timm_convnextv2/")[0]
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder, root], stdout=subprocess.PIPE, env=environment())
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_second_run_is_refused_and_a_dead_one_is_not(tmp_path, no_images, capsys, other):
    out, before = tmp_path / "r", snapshot(tmp_path)
    for options in ([], ["--resume", "auto"], ["--overwrite"]):
        run(out, *options, status=2)
        message = capsys.readouterr().err
        assert message.count("error:") == 1 and f"{out} is in use by process {other.pid} on" in message
        assert "since 2026-01-01 00:00:00 (the other)" in message and "another --experiment" in message
    assert snapshot(tmp_path) == before
    other.send_signal(signal.SIGKILL)
    time.sleep(0.2)  # not waited for: a zombie is dead
    run(out)  # only its lock is there: that is an empty folder
    assert not (out / LOCK).exists() and len(rows(out)) == 1


def test_a_number_that_is_used_again_is_another_process(tmp_path, other):
    path = tmp_path / "r" / LOCK
    holder = json.loads(path.read_text())
    path.write_text(json.dumps({**holder, "start": "1"}))
    Lock(tmp_path / "r").release()


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"system": "before the restart"}, {"pid": "?"}, None])
def test_holder_that_cannot_be_asked_is_dead_after_five_minutes(tmp_path, change, side):
    path = tmp_path / LOCK
    holder = {**this_process()._asdict(), "token": "x", "command": "c", "since": "s"}
    path.write_text("{" if change is None else json.dumps(holder | change))
    os.utime(path, (time.time() - lock.STALE + 30,) * 2)
    with pytest.raises(ValueError, match="is in use by") as refusal:
        Lock(tmp_path)
    far = change is None or "host" in change  # it may be on another machine, which the message says how to free
    assert bool(re.search(r"free again 5 minutes after .*, \d+ seconds ago", str(refusal.value))) == far
    # a time in the future: the clock of the file system was set back
    os.utime(path, (time.time() + side * (lock.STALE + 30),) * 2)
    Lock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_who_lives_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    held = Lock(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / LOCK).stat().st_mtime > 0
    held.check()
    held.release()


@pytest.mark.parametrize("act", ["taken", "gone"])
def test_a_run_whose_folder_was_taken_over_writes_no_more(tmp_path, no_images, capsys, monkeypatch, act):
    def take():
        path = tmp_path / "r" / LOCK
        path.write_text(json.dumps({"token": "x", "pid": 1, "host": "elsewhere"})) if act == "taken" else path.unlink()

    at_update(monkeypatch, 5, take)
    out = run(tmp_path / "r", epochs=2, status=1)
    message = capsys.readouterr().err
    assert "The lock" in message and "The last whole checkpoint is" in message and "after epoch 1" in message
    assert load(out)["progress"]["epoch"] == 1 and (out / LOCK).exists() == (act == "taken")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError, SystemExit])
def test_lock_is_given_back_after_errors(tmp_path, no_images, monkeypatch, error):
    def fail():
        assert (tmp_path / "r" / LOCK).exists()
        raise error("a bug")

    at_update(monkeypatch, 1, fail)
    with pytest.raises(error):
        main(command(tmp_path / "r"))
    assert not (tmp_path / "r" / LOCK).exists()


def _race(folder, start, won):
    start.wait()
    try:
        held = Lock(folder)
    except ValueError:
        return
    with won.get_lock():
        won.value += 1
    time.sleep(0.5)
    try:
        held.check()
    except LockLostError:
        with won.get_lock():
            won.value -= 1
    os._exit(0)


@pytest.mark.parametrize("before", ["free", "dead"])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_one_of_many_gets_it(tmp_path, monkeypatch, before, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    if before == "dead":
        holder = {**this_process()._asdict(), "start": "1", "token": "x"}
        (tmp_path / LOCK).write_text(json.dumps(holder))
    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(6), context.Value("i", 0)
    processes = [context.Process(target=_race, args=(tmp_path, start, won)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert won.value <= 1 if before == "dead" and not links else won.value == 1


def test_forked_copy_does_not_give_it_back(tmp_path):
    held = Lock(tmp_path)
    if (pid := os.fork()) == 0:
        release_locks()
        os._exit(0)
    os.waitpid(pid, 0)
    held.check()
    release_locks()
    assert not list(tmp_path.iterdir())
