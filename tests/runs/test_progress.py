"""Progress on a terminal and in plain lines, and the stopwatch."""

import io
import re
import sys

import pytest

from timm_convnextv2.runs import progress as progress_module
from timm_convnextv2.runs.progress import ProgressBar, Stopwatch


class Terminal(io.StringIO):
    def isatty(self):
        return True


def go(progress, updates, data_wait=0.25):
    for i in range(updates):
        if progress.step():
            progress.show(epoch=i // 4, loss=0.5, lr=1e-3, images_per_s=12.34, data_wait=data_wait)
    progress.note("a note")
    progress.close()


def test_plain_lines(capsys):
    go(ProgressBar(total=10, done=3, epochs=3, interval=3), 7)
    lines, err = capsys.readouterr()
    lines = lines.splitlines()
    assert [line.split()[3] for line in lines[:-1]] == ["6/10", "9/10", "10/10"] and lines[-1] == "a note" and not err
    pattern = r"epoch 1/3  step 6/10  loss 0\.5000  lr 1\.00e-03  12\.3 images/s  data wait 25%  left 0:00:00"
    assert re.fullmatch(pattern, lines[0])


@pytest.mark.parametrize("seconds, left", [(10, "0:00:20"), (1800, "1:00:00"), (180000, "100:00:00")])
def test_time_left(capsys, monkeypatch, seconds, left):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: clock[0])
    progress = ProgressBar(total=7, done=2, epochs=1, interval=1)  # 5 to go, the first two of them in `seconds`
    clock[0] = seconds / 2
    assert progress.step()
    progress.show(0, 1.0, 0.1, 1.0, 0.0)
    clock[0] = seconds * 4 / 3
    assert progress.step()
    progress.show(0, 1.0, 0.1, 1.0, 0.0)
    assert capsys.readouterr().out.splitlines()[1].endswith(f"left {left}")


def test_bars_are_drawn_in_a_notebook(monkeypatch):
    assert not progress_module.draws_bars()
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", object())
    assert progress_module.draws_bars()


def test_bar_on_a_terminal(capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = ProgressBar(total=10, done=3, epochs=3, interval=1)
    progress.bar.mininterval = 0
    go(progress, 7)
    drawn, printed = terminal.getvalue(), capsys.readouterr().out
    assert "3/10" in drawn and "10/10" in drawn and "epoch 2/3" in drawn and "data wait 25%" in drawn
    assert "a note" in printed + drawn and "step" not in printed and progress.bar.disable


def test_stopwatch(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: clock[0])
    watch = Stopwatch(images_per_update=4)
    for second, waited in ((1, 0.5), (2, 0.0)):
        clock[0] = second
        watch.count(waited)
    assert watch.lap() == (4.0, 0.25)
    clock[0] = 4
    watch.count(1.0)
    assert watch.lap() == (2.0, 0.5)
    assert watch.totals() == {"images_per_s": 3.0, "data_wait": 0.375, "seconds": 4}


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_silence_where_not_enabled(capsys, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    progress = ProgressBar(total=4, done=0, epochs=1, interval=1, enabled=False)
    go(progress, 4)
    assert progress.done == 4 and capsys.readouterr().out == sys.stderr.getvalue() == ""
