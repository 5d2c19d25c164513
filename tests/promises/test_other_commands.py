"""The promises of docs/reliability.md that every other command that writes keeps: the table commands x faults.

Each command runs in a forked process, in which a fault happens when a file gets its final name.
"""

import contextlib
import copy
import csv
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import make_encoder
from PIL import Image
from runs import snapshot
from safetensors.torch import load_file
from tiny import SIZES, tiny_detector

from timm_convnextv2.checkpoint import program
from timm_convnextv2.commands import compare as compare_command
from timm_convnextv2.commands.main import main
from timm_convnextv2.data import DemoSource
from timm_convnextv2.features import compare
from timm_convnextv2.runs.lock import LOCK
from timm_convnextv2.transfer import build_segmenter, create_backbone, export_detector, export_segmenter

# file names: bytes that are not UTF-8, a line break, a formula, an option, markup
HOSTILE = [os.fsdecode(b"caf\xe9.png"), "a\nb.png", "=1+1.png", "-x.png", "@SUM(A1).png", "<b>&amp;'\".png"]
FAST = ["--device", "cpu", "--workers", "0"]


class Place:
    """Inputs that all commands read: images with hostile names, an encoder, a run."""

    def __init__(self, root: Path, run: Path) -> None:
        self.run, self.encoder = run, root / "encoder"
        self.images, self.labelled, source = root / "images", root / "labelled", DemoSource(12, 32)
        make_encoder(self.encoder)
        self.detector = export_detector(tiny_detector(2), root / "detector", classes=["a", "b"])
        backbone = create_backbone("convnextv2_atto", pretrained=False, **SIZES)
        segmenter = build_segmenter(backbone, 2, classes=["a", "b"], channels=8, auxiliary_channels=0)
        self.segmenter = export_segmenter(segmenter, root / "segmenter")
        for folder in [self.images, *(self.labelled / split / c for split in ("train", "validation") for c in "ab")]:
            folder.mkdir(parents=True)
            for i, name in enumerate([*HOSTILE, "plain.png"]):
                Image.fromarray(source[i].permute(1, 2, 0).numpy()).save(folder / name, format="png")

    @property
    def model(self) -> str:
        return f"local-dir:{self.encoder}"


def finetuned(command: str, words: list, log: Path) -> float:
    """What a finetuning of `compare` leaves, without its minutes."""
    run = log.with_suffix("")
    run.mkdir()
    log.write_text("")
    (run / "summary.csv").write_text("epoch,eval_top1\n0,40\n1,60\n")
    return 1.0


def exporter() -> tuple[Callable, Callable]:
    """A form of `export` without the seconds of torch.export: its file has the metadata only."""
    models = []
    return lambda model, *rest: models.append(model) or rest[-1].encode(), lambda path: lambda x: [models[0](x)]


# the words of each command that writes `out`, a folder that exists
TABLE: dict[str, Callable[[Place, Path], list]] = {
    "embed": lambda p, out: ["--model", p.model, "--data-dir", p.images, "--output", out / "e.npy", *FAST],
    "evaluate": lambda p, out: [
        p.model, "--data-dir", p.labelled, "--output", out, "--no-probe", "--no-baselines", *FAST],
    "collapse": lambda p, out: [
        p.model, "--data-dir", p.images, "--num-images", 2, "--output", out, "--device", "cpu"],
    "stats": lambda p, out: [p.images, "--workers", 0, "--output", out / "s.json"],
    "check": lambda p, out: [p.images, "--workers", 0, "--index", out / "index", "--output", out / "c.json"],
    "report": lambda p, out: [p.run, "--output", out / "r.html"],
    "publish": lambda p, out: [p.run, "me/it", "--license", "mit", "--dry-run", "--output", out],
    "detect predict": lambda p, out: [
        "--model", p.detector, "--data-dir", p.images, "--output", out / "d.json", *FAST],
    "segment predict": lambda p, out: ["--model", p.segmenter, "--data-dir", p.images, "--output", out, *FAST],
    "export": lambda p, out: [p.model, "--format", "torch", "--output", out / "m.pt2"],
    "compare": lambda p, out: ["--data-dir", p.labelled, "--encoder", p.model, "--epochs", 2, "--seeds", 0,
                               "--output", out],
}  # fmt: skip
FOUND = {"check": 1}  # exit status: there are findings
AGAIN = {"compare": ["--resume"], "report": [], "publish": []}  # words with which the output is written once more
LOCKED = ("embed", "compare")
WORKERS = ("embed", "evaluate", "stats", "check", "detect predict", "segment predict")


def fork(words: list, fault: Callable[[], object] = lambda: None, seconds: int = 60) -> tuple[int, str]:
    """Runs a command in a forked process after `fault`; its exit status (negative: the signal), and what it printed."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        status = 70
        try:
            signal.alarm(seconds)
            for number in (1, 2):
                os.dup2(write, number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", errors="backslashreplace") for number in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            compare.call, compare_command._check_finetuning = finetuned, lambda *_: None
            program._FORMS["torch"] = exporter()
            fault()
            status = main([os.fspath(word) if isinstance(word, Path) else str(word) for word in words])
        except SystemExit as e:
            status = e.code
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(status)
    os.close(write)
    with open(read, errors="backslashreplace") as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def at_rename(act: Callable[[], object], number: int | None = None) -> Callable[[], None]:
    """A fault: calls `act` before the `number`-th file (from 0; None: each) gets its final name."""

    def arrange() -> None:
        replace, count = os.replace, iter(range(10**6))

        def wrapped(*args, **kwargs):
            if next(count) == number or number is None:
                act()
            return replace(*args, **kwargs)

        os.replace = wrapped

    return arrange


def visible(folder: Path) -> list[Path]:
    return [
        p for p in sorted(folder.rglob("*")) if p.is_file() and not p.relative_to(folder).parts[0].endswith(".parts")
    ]


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*")]


def read(path: Path) -> object:
    """A file as its readers read it, without times; an error if it is torn."""
    if path.suffix == ".json":
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        return re.sub(r'"images_per_second": [\d.]+|"seconds": \{[^}]*\}', "", text)
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
            return image.size
    if path.suffix == ".npy":
        return np.load(path).tobytes()
    if path.suffix == ".safetensors":
        return {name: value.numpy().tobytes() for name, value in load_file(path).items()}
    if path.suffix == ".html":
        text = path.read_text(encoding="utf-8")
        assert text.rstrip().endswith("</html>")
        return len(text)
    return len(path.read_bytes())  # an index has the time in it


def contents(folder: Path) -> dict[Path, object]:
    return {path.relative_to(folder): read(path) for path in visible(folder)}


@pytest.fixture(scope="module")
def place(tmp_path_factory, pretrained):
    return Place(tmp_path_factory.mktemp("inputs"), pretrained[0])


class Command:
    """A command of the table, and what it writes undisturbed."""

    def __init__(self, name: str, place: Place, whole: Path) -> None:
        self.name, self.place, self.whole = name, place, whole
        self.status = FOUND.get(name, 0)
        with open(whole.with_suffix(".renames"), "wb", buffering=0) as file:
            status, text = fork(self.words(whole), at_rename(lambda: file.write(b".")))
            self.renames = file.tell()
        assert status == self.status, text
        self.contents = contents(whole)
        assert self.contents and not hidden(whole)

    def words(self, out: Path, *more) -> list:
        return [*self.name.split(), *TABLE[self.name](self.place, out), *more]

    @property
    def again(self) -> list[str]:
        """Words that let the same command write once more."""
        return AGAIN.get(self.name, ["--overwrite"])

    def ends_well(self, out: Path, *more) -> None:
        status, text = fork(self.words(out, *more))
        assert status == self.status, text
        assert contents(out) == self.contents and not hidden(out)


@pytest.fixture(scope="module", params=TABLE)
def command(request, place, tmp_path_factory):
    return Command(request.param, place, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def assert_one_message(name: str, text: str, *words: str) -> None:
    assert text.count("error: ") == 1 and f"timm-convnextv2 {name}: error: " in text and "Traceback" not in text, text
    assert all(word in text for word in words), text


# ------------------------------------------------------------------------------------------------------- the faults


@pytest.mark.parametrize("where", ["first", "last", pytest.param("between", marks=pytest.mark.slow)])
def test_killed(command, tmp_path, where):
    """What is there is whole, and the same command once more ends as if nothing had been; no part file stays.

    It is killed when its first or last file gets its name; with -m slow also at each between.
    """
    last = command.renames - 1
    numbers = {"first": [0], "last": [last], "between": [*range(1, last)]}[where]
    if not numbers:
        pytest.skip(f"{command.name} writes no files between its first and its last")
    for number in numbers:
        (out := tmp_path / str(number)).mkdir()
        status, text = fork(command.words(out), at_rename(lambda: os.kill(os.getpid(), signal.SIGKILL), number))
        assert status == -signal.SIGKILL, text
        contents(out)  # each file is whole, or this is an error
        command.ends_well(out, *command.again)
    print(f"\n{command.name}: {len(numbers)} kills, no loss")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(command, out, number):
    """The command ends with the status of the signal, without a traceback or a part file."""
    status, text = fork(command.words(out), at_rename(lambda: os.kill(os.getpid(), number), command.renames - 1))
    assert status == 128 + number and "Traceback" not in text, text
    assert not [path for path in hidden(out) if path.name != LOCK]
    contents(out)
    command.ends_well(out, *command.again)


@pytest.mark.parametrize("how", ["full disk", "removed", "read-only"])
def test_output_that_cannot_be_written(command, out, how):
    """One message, exit status 2, nothing left over; the old output stays."""
    shutil.copytree(command.whole, out, dirs_exist_ok=True)
    before, where, fault = snapshot(out), out, lambda: None
    if how == "full disk":

        def fault():
            resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
    elif how == "removed":
        fault = at_rename(lambda: shutil.rmtree(out), 0)
    else:
        where = Path("/proc/none")  # no process may create a folder there
    status, text = fork(command.words(where, *command.again), fault)
    assert status == 2
    assert_one_message(command.name, text, {"full disk": "too large"}.get(how, "No such file"))
    if how != "removed":
        assert {path: seen for path, seen in snapshot(out).items() if path in before} == before
        assert {*contents(out)} == {*command.contents} or command.name == "compare"  # which keeps its logs
        assert not hidden(out)


def test_closed_pipe(command, out):
    """Nobody reads what it prints: the files are written all the same."""

    def gone():
        os.dup2(os.pipe()[1], 1)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    status, text = fork(command.words(out), gone)
    assert status == command.status and contents(out) == command.contents, text


def test_second_process(command, out):
    """A lock refuses it; without one both end well and the files are whole."""
    inner = out.parent / "inner"

    def second():
        status, text = fork(command.words(out, *command.again))
        inner.write_text(f"{status}\n{text}")

    status, text = fork(command.words(out), at_rename(second, 0))
    other, _, said = inner.read_text().partition("\n")
    assert status == command.status and contents(out) == command.contents, text
    assert not hidden(out)
    if command.name in LOCKED:
        assert other == "2"
        assert_one_message(command.name, said, "is in use by process")
    else:
        # the files that `publish` is still writing are in its way
        assert int(other) == (2 if command.name == "publish" else command.status), said


@pytest.mark.parametrize("name", LOCKED)
@pytest.mark.parametrize("hours", [-1, 1])
def test_lock_of_another_machine(place, out, name, hours):
    """An hour without a sign of life, or a sign from the future: its clock was set back. The folder is free."""
    folder = out / "e.npy.parts" if name == "embed" else out
    folder.mkdir(exist_ok=True)
    holder = dict(host="far", system="x", pid=1, start="1", command="x", since="x", token="x")
    (folder / LOCK).write_text(json.dumps(holder))
    words = [name, *TABLE[name](place, out), *AGAIN.get(name, [])]
    status, text = fork(words)
    assert status == 2 and "is in use by process 1 on far" in text, text
    os.utime(folder / LOCK, (time.time() + 3600 * hours,) * 2)
    status, text = fork(words)
    assert status == 0 and not (folder / LOCK).exists(), text


@pytest.mark.parametrize("name", WORKERS)
def test_killed_worker(place, out, name):
    """One message, with the remedy."""

    def kill_workers():
        load = torch.utils.data.DataLoader.__iter__

        def wrapped(self):
            found = load(self)
            for worker in getattr(found, "_workers", []):
                os.kill(worker.pid, signal.SIGKILL)
            return found

        torch.utils.data.DataLoader.__iter__ = wrapped

    words = [word if word != 0 else 1 for word in TABLE[name](place, out)]
    words = [*words, "--workers", "1"] if "--workers" in words else words
    status, text = fork([*name.split(), *words, "--workers", "1"], kill_workers)
    assert status == 2
    assert_one_message(name, text, "lower --workers")
    assert not visible(out) or name == "check"  # the index is whole before
    assert not hidden(out)


# ------------------------------------------------------------------------------------------------------- hostile names


def test_names_arrive(place, tmp_path):
    """In tables without formulas, in JSON, in a page without markup of theirs."""
    embedded, checked = tmp_path / "embed", tmp_path / "check"
    for name, folder in (("embed", embedded), ("check", checked)):
        folder.mkdir()
        fork([name, *TABLE[name](place, folder)])
    with open(embedded / "e.npy.csv", newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    assert len(rows) == 7 and not [row for row in rows if row[0][0] in "=+-@"]
    assert "'=1+1.png" in [row[0] for row in rows]
    found = json.loads((checked / "c.json").read_text())
    assert found["files"] == 7 and any("=1+1.png" in one["file"] for one in found["findings"])


DEFAULTS = {
    "check": ["check.json", "check.png"],
    "stats": ["stats.json", "stats.png"],
    "collapse": ["collapse/collapse.csv", "collapse/collapse.png", "collapse/channels.png"],
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_command_replaces_its_default_files_only(place, tmp_path, monkeypatch, name):
    """A second run needs no --overwrite; files of others, and files that the user names, stay."""
    monkeypatch.chdir(tmp_path)
    words = [*map(str, [*name.split(), *TABLE[name](place, tmp_path)])]
    at = words.index("--output")
    words = [word for i, word in enumerate(words) if i not in (at, at + 1)]
    files, done = DEFAULTS[name], FOUND.get(name, 0)
    for _ in range(2):
        status, said = fork(words)
        assert status == done, said
    for file in files:
        os.utime(file, (0, 0))
    assert fork(words)[0] == done and all(os.stat(file).st_mtime > 0 for file in files)
    named = str(Path(files[0]).parent) if name == "collapse" else files[0]
    status, said = fork([*words, "--output", named])
    assert status == 2 and "--overwrite" in said
    for file in files:
        own = Path(file).read_bytes()
        Path(file).write_bytes(b"mine")
        status, said = fork(words)
        assert status == 2 and Path(file).name in said and Path(file).read_bytes() == b"mine"
        Path(file).write_bytes(own)


@pytest.mark.parametrize("name", [name for name in TABLE if name not in ("report", "publish", "export", "compare")])
def test_a_misspelt_folder_is_named_before_an_output_that_exists(place, tmp_path, name):
    wrong = copy.copy(place)
    wrong.images = wrong.labelled = tmp_path / "misspelt"
    out = tmp_path / "out"
    out.mkdir()
    for file in ("e.npy", "s.json", "c.json", "d.json", "evaluation.json", "collapse.csv", "x.png"):
        (out / file).write_text("before")
    status, said = fork([*name.split(), *TABLE[name](wrong, out)])
    assert status == 2 and "misspelt" in said and "--overwrite" not in said, said
