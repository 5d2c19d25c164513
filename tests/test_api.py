"""The functions of `timm_convnextv2`: each gives what the command of its name writes, and refuses as it does."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from real import NETWORK, call
from safetensors.torch import load_file
from torch import Tensor

import timm_convnextv2 as tcx
from timm_convnextv2.api import Run
from timm_convnextv2.commands import compare as command
from timm_convnextv2.commands.main import main
from timm_convnextv2.config import from_keywords, words_of
from timm_convnextv2.pretraining.config import PretrainConfig
from timm_convnextv2.runs import loop
from timm_convnextv2.runs.world import World

TINY = dict(model_kwargs=dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)), decoder_dim=8, patch_size=1, img_size=32)
SHORT = dict(epochs=2, batch_size=4, device="cpu", workers=0)
WORDS = ["--epochs", "2", "--batch-size", "4", "--device", "cpu", "--workers", "0"]
ONE = dict(device="cpu", workers=0)


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory) -> Run:
    """One tiny pretraining of 8 updates."""
    output = tmp_path_factory.mktemp("api")
    return tcx.pretrain(demo / "validation", **TINY, **SHORT, output=output, experiment="mine")


def test_pretrain_is_the_command(run, demo, tmp_path):
    call("pretrain", *NETWORK, *WORDS, "--data-dir", demo / "validation", "--output", tmp_path, "--experiment", "mine")
    own, other = (load_file(folder / "encoder/model.safetensors") for folder in (run.folder, tmp_path / "mine"))
    assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
    assert run.report.is_file() and run.settings["epochs"] == 2
    assert {**yaml.safe_load((tmp_path / "mine/args.yaml").read_text()), "output": ""} == {**run.settings, "output": ""}
    assert [row["epoch"] for row in run.summary] == [1, 2] and 0 < run.summary[1]["train_loss"] < 2
    assert run.encoder is run.encoder and tcx.open_run(run.folder) == run


def test_the_recorded_command_repeats_the_call(run):
    head = (run.folder / "args.yaml").read_text().splitlines()[1]
    words = json.loads(head.removeprefix("# command: "))
    assert "--model-kwargs 'depths=(1, 1, 1, 1)' 'dims=(8, 12, 16, 20)' --decoder-dim 8" in words
    assert f"--data-dir {run.settings['data_dir'][0]} " in words and words.endswith("--experiment mine")


def test_words_of_keywords():
    given = {"amp": True, "norm_pix_loss": False, "lr": 1e-5, "scale": (0.5, 1), "seed": None}
    values = from_keywords(PretrainConfig, given)
    assert words_of(PretrainConfig, values) == "--amp --no-norm-pix-loss --lr 1e-05 --scale 0.5 1.0".split()


def test_embed_gives_the_rows_of_the_command(run, demo, tmp_path):
    images, output = demo / "validation", tmp_path / "rows.npy"
    call("embed --device cpu --workers 0 --batch-size 5 --output", output, "--model", run.folder, "--data-dir", images)
    rows, names, skipped = run.encoder.embed(images, batch_size=5, workers=0)
    assert np.array_equal(rows, np.load(output)) and not skipped
    assert names == (tmp_path / "rows.npy.csv").read_text().split()[1:]
    files = [images / name for name in (names[3], names[0])]
    some = run.encoder.embed(files, workers=2, batch_size=1)
    np.testing.assert_allclose(some.rows, rows[[3, 0]], atol=1e-5)
    assert some.names == [str(file) for file in files]
    assert np.array_equal(run.encoder.embed(files[0]).rows, some.rows[:1])
    encoder = run.encoder
    with torch.no_grad():
        by_hand = encoder.model(encoder.transform(encoder.load_image(files[0]))[None])
    np.testing.assert_allclose(by_hand.numpy(), some.rows[:1], atol=1e-5)


def test_load_image_applies_the_record_of_pixels(tmp_path, run, demo):
    folder = shutil.copytree(run.folder / "encoder", tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    config["training"]["pixels"] = {"divide": 510.0}
    (folder / "config.json").write_text(json.dumps(config))
    image = next((demo / "validation").rglob("*.png"))
    plain, divided = run.encoder.load_image(image), tcx.open_encoder(f"local-dir:{folder}").load_image(image)
    assert plain.dtype == torch.uint8
    torch.testing.assert_close(divided, plain / 510)


def test_embed_skips_and_refuses(run, demo, tmp_path):
    good = next((demo / "validation").rglob("*.png"))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"none")
    embed = run.encoder.embed
    rows, names, skipped = embed([bad, good], workers=0, max_bad_images=0.5)
    assert len(rows) == 1 and names == [str(good)] and skipped[0][:2] == (0, str(bad))
    with pytest.raises(ValueError, match="1 of 2 images cannot be decoded, more than --max-bad-images 0.01 allows"):
        embed([bad, good], workers=0)
    for images, text in [([], "No images given"), (tmp_path / "none", "none"), (bad, "cannot be")]:
        with pytest.raises(ValueError, match=text):
            embed(images)
    with pytest.raises(ValueError, match="--batch-size must be at least 1, got 0"):
        embed(good, batch_size=0)


def test_evaluate_gives_what_the_command_writes(run, demo, tmp_path):
    words = ["--data-dir", demo, "--no-probe", "-k", "3", "--device", "cpu", "-j", "0", "--output", tmp_path / "a"]
    call("evaluate", run.folder, *words)
    found = tcx.evaluate(run, demo, probe=False, k=3, **ONE)
    written = json.loads((tmp_path / "a/evaluation.json").read_text())
    for result in [*found["results"], *written["results"]]:
        result.pop("images_per_second", None)
    assert json.loads(json.dumps(found)) == written
    assert list(found["results"][-1]["measures"]) == ["knn_3", "ridge", "rank"]


def test_collapse_gives_what_the_command_writes(run, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("collapse --device cpu --num-images 4 --output out", run.folder, "--data-dir", demo)
    found = tcx.collapse([run], demo, num_images=4, device="cpu")
    rows = [line.split(",") for line in Path("out/collapse.csv").read_text().splitlines()[1:]]
    assert [[name, *map(str, block)] for name, blocks in found.items() for block in blocks] == rows
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing that was not asked for


def test_compare_starts_what_the_command_starts(tmp_path, monkeypatch):
    """With the same config and words for `finetune`; returns what was written, and raises what was printed."""
    started = []

    def start(config, rest):
        started.append((config, rest))
        Path(config.output, "compare.json").write_text(json.dumps({"n": len(started)}))

    monkeypatch.setattr(command, "start", start)
    words = "compare --data-dir d --encoder e --also a b --epochs 9 --seeds 0 3 --batch-size 8 --output"
    call(words, tmp_path)
    options = dict(encoder=Path("e"), also=["a", "b"], epochs=9, seeds=(0, 3), output=tmp_path)
    assert tcx.compare("d", **options, finetune=["--batch-size", "8"]) == {"n": 2}
    assert started[0] == started[1]
    assert tcx.compare("d", **options, dry_run=True) == {}

    def failing(config, rest):
        log = tmp_path / "log"
        log.write_text("it is broken")
        raise subprocess.CalledProcessError(3, ["finetune x", str(log)])

    monkeypatch.setattr(command, "start", failing)
    with pytest.raises(RuntimeError, match="(?s)'finetune x' failed with status 3; its last lines:\nit is broken"):
        tcx.compare("d", **options)


def test_detector_finds_what_the_command_finds(detected, tmp_path):
    folder = detected[0]
    images, output = folder.parent / "images/validation", tmp_path / "found.json"
    call(
        "detect predict --device cpu -j 0 --min-score 0.02 -b 1 --output",
        output,
        "--model",
        folder,
        "--data-dir",
        images,
    )
    written = json.loads(output.read_text())
    detector = tcx.open_detector(folder, "cpu")
    found = detector.predict(images, min_score=0.02, batch_size=1, workers=0)
    assert [one.name for one in found] == [image["file_name"] for image in written["images"]]
    assert sum(len(one.boxes) for one in found) == len(written["annotations"]) > 0
    names = {category["id"]: category["name"] for category in written["categories"]}
    for one, image in zip(found, written["images"], strict=True):
        own = [a for a in written["annotations"] if a["image_id"] == image["id"]]
        assert one.classes == [names[a["category_id"]] for a in own]
        assert one.scores.tolist() == pytest.approx([a["score"] for a in own])
        size = one.boxes[:, 2:] - one.boxes[:, :2]
        assert torch.cat([one.boxes[:, :2], size], 1).flatten().tolist() == pytest.approx(
            [v for a in own for v in a["bbox"]], abs=0.006
        )
        assert one.masks is not None and one.masks.shape == (len(own), image["height"], image["width"])
    assert detector.classes == list(names.values())


def test_segmenter_finds_what_the_command_finds(segmented, tmp_path):
    from PIL import Image

    folder = segmented[0]
    images = folder.parent / "images/validation/images"
    call(
        "segment predict --device cpu -j 0 --window 24 --output",
        tmp_path / "m",
        "--model",
        folder,
        "--data-dir",
        images,
    )
    segmenter = tcx.open_segmenter(folder, "cpu")
    found = segmenter.predict(images, workers=0, window=24)
    assert len(found) == 16
    for one in found:
        with Image.open((tmp_path / "m" / one.name).with_suffix(".png")) as mask:
            assert np.array_equal(np.asarray(mask), one.classes.numpy())
    assert "\n".join([*segmenter.classes, ""]) == (tmp_path / "m/classes.txt").read_text()
    with pytest.raises(ValueError, match="There is no option 'windw'. Did you mean 'window'?"):
        segmenter.predict(images, windw=24)


REFUSED = [
    # what a call says, the call, and the words whose message is the same ('' if the command line has no such mistake)
    ("There is no option 'epoch'. Did you mean 'epochs'?", lambda d: tcx.pretrain(d, epoch=5), ""),
    ("There is no option 'verbose'.", lambda d: tcx.evaluate("x", d, verbose=1), ""),
    (
        "argument --epochs: invalid int value: 'five'",
        lambda d: tcx.pretrain(d, epochs="five"),
        "pretrain --epochs five",
    ),
    ("--epochs must be at least 1, got 0.", lambda d: tcx.pretrain(d, epochs=0), "pretrain --epochs 0"),
    ("argument --amp takes true or false, got 1.", lambda d: tcx.pretrain(d, amp=1), ""),
    ("argument --keep-best: invalid choice: 'x'", lambda d: tcx.pretrain(d, keep_best="x"), "pretrain --keep-best x"),
    ("use the command: timm-convnextv2 pretrain --replay", lambda d: tcx.pretrain(replay="bad-step-1.json"), ""),
    ("is not the folder of a run: it has no args.yaml", tcx.open_run, ""),
    ("has no model: there is no config.json in it", tcx.open_encoder, "embed {d} --output x.npy --model {d}"),
    ("'{d}'", tcx.open_detector, ""),
    ("'{d}'", tcx.open_segmenter, ""),
    ("Nothing to compare. Give --encoder MODEL", lambda d: tcx.compare(d), "compare --data-dir {d}"),
    ("argument --models: expected at least one argument", lambda d: tcx.evaluate([], d), ""),
    ("--num-images must be at least 1", lambda d: tcx.collapse("x", d, num_images=0), "collapse x --num-images 0"),
]


@pytest.mark.parametrize("text, act, words", REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_a_mistake_is_the_commands_error(text, act, words, tmp_path, capsys):
    with pytest.raises(ValueError) as caught:
        act(str(tmp_path))
    said = str(caught.value)
    assert text.format(d=tmp_path) in said
    if words:
        assert main(words.format(d=tmp_path).split()) == 2
        assert capsys.readouterr().err == f"timm-convnextv2 {words.split()[0]}: error: {said}\n"


def test_dry_run_trains_nothing(demo, tmp_path, capsys):
    assert tcx.pretrain(demo / "validation", **TINY, **SHORT, output=tmp_path / "runs", dry_run=True) is None
    assert "updates of 4 images" in capsys.readouterr().out and not (tmp_path / "runs").exists()


def test_a_config_file_lies_below_keywords(demo, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("epochs: 3\nbatch-size: 2\n")
    tcx.pretrain(demo / "validation", **TINY, **SHORT | {"batch_size": None}, config=tmp_path / "c.yaml", dry_run=True)
    assert "16 updates of 2 images" in capsys.readouterr().out


def test_slow_mixed_precision_is_told(slow_bfloat16, run, demo, capsys):
    tcx.pretrain(demo / "validation", **TINY, **SHORT | {"device": "cpu"}, amp=True, dry_run=True)
    assert "warning: --amp: " in capsys.readouterr().err
    tcx.collapse(run, demo, amp=True, device="cpu", num_images=2)
    assert "warning: --amp: " in capsys.readouterr().err


def test_a_stopped_run_raises_and_resumes(demo, tmp_path, monkeypatch, run):
    """Ctrl-C, as a notebook sends it, ends the cell; the same call with resume='auto' continues to the same weights."""
    how = dict(**TINY, **SHORT, output=tmp_path, experiment="mine")
    update = loop.Trainer.update

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGINT)
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "update", interrupted)
        with pytest.raises(
            KeyboardInterrupt, match="(?s)Stopped by SIGINT in epoch 1 of 2.*experiment='mine', resume='auto'"
        ):
            tcx.pretrain(demo / "validation", **how)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = tcx.pretrain(demo / "validation", **how, resume="auto")
    own, other = (load_file(one.folder / "encoder/model.safetensors") for one in (run, again))
    assert all(torch.equal(own[key], other[key]) for key in own)


def test_a_loss_that_is_not_finite_says_how_to_repeat_it(demo, tmp_path):
    with pytest.raises(RuntimeError, match="(?s)The loss is .* Usual remedies, .* --replay .*bad-step"):
        tcx.pretrain(demo / "validation", **TINY, **SHORT, lr=1e30, warmup_epochs=0, output=tmp_path, experiment="mine")


def test_a_thread_may_pretrain():
    """Signals are for the main thread; Python refuses handlers elsewhere."""
    failed, world = [], World("cpu")
    thread = threading.Thread(target=world.watch_signals)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", failed.append)
        thread.start()
        thread.join()
    world.close()
    assert not failed


def test_dir_shows_what_is_for_users():
    assert dir(tcx) == sorted(tcx.__all__) and "pretrain" in dir(tcx)
    assert not {"registry", "importlib", "TYPE_CHECKING", "config", "commands"} & {*dir(tcx)}
    for name in dir(tcx):
        assert getattr(tcx, name).__doc__ or name == "__version__", f"{name} has no docstring"
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        tcx.pretrian  # noqa: B018


def first_snippet(page: str) -> str:
    text = (Path(tcx.__file__).parents[1] / page).read_text(encoding="utf-8")
    return text.split("```python\n")[1].split("```")[0]


def test_the_first_snippet_of_docs_python_runs(demo, tmp_path, monkeypatch):
    """The README has some of its lines."""
    code, given = first_snippet("docs/python.md"), 'output="runs"'
    own, readme = (
        [line.partition("  #")[0] for line in text.splitlines()] for text in (code, first_snippet("README.md"))
    )
    assert given in code and {*readme} - {'rows, names, skipped = run.encoder.embed("images")'} <= {*own}
    for words, fewer in ((given, f"{given}, **tiny"), ('"labelled")', '"labelled", workers=0, probe=False)')):
        code = code.replace(words, fewer)
    monkeypatch.chdir(tmp_path)
    for name, folder in (("images", demo / "validation"), ("labelled", demo)):
        (tmp_path / name).symlink_to(folder)
    scope: dict = {"tiny": {**TINY, **SHORT, "epochs": 1}}
    exec(compile(code, "docs/python.md", "exec"), scope)
    assert len(scope["rows"]) == len(scope["names"]) == 16 and scope["found"]["results"] and scope["blocks"]


SNIPPET = """
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
import timm_convnextv2 as tcx

run = tcx.pretrain("images", model="atto", epochs=100)
assert_type(run.report, Path)
encoder = run.encoder
assert_type(encoder.load_image("x.tif"), torch.Tensor)
assert_type(encoder.embed("images").names, list[str])
assert_type(tcx.pretrain("images", dry_run=True), None)
assert_type(tcx.open_detector("x").predict("images")[0].classes, list[str])
assert_type(tcx.open_segmenter("x").predict("images")[0].classes, torch.Tensor)
assert_type(tcx.evaluate([run], "labelled"), dict[str, Any])
tcx.open_encoder("x").embedd("y")  # error
"""


@pytest.mark.slow
def test_an_editor_knows_the_types(tmp_path):
    """pyright finds the one mistake of a snippet and no other."""
    if (pyright := shutil.which("pyright", path=str(Path(sys.executable).parent))) is None:
        pytest.skip("needs pyright")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    root = Path(tcx.__file__).parents[1]
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(root)]}))
    words = [pyright, "--outputjson", "--pythonpath", sys.executable, "snippet.py"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    if not done.stdout.startswith("{"):
        pytest.skip("pyright does not start here")  # it downloads Node.js on first use
    errors = [(e["range"]["start"]["line"], e["message"]) for e in json.loads(done.stdout)["generalDiagnostics"]]
    assert [line for line, _ in errors] == [SNIPPET.splitlines().index('tcx.open_encoder("x").embedd("y")  # error')], (
        errors
    )


def test_forward_features_of_fcmae_names_the_encoder():
    model = tcx.FCMAE(img_size=32, patch_size=1, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), decoder_dim=8)
    with pytest.raises(ValueError, match=r"`model\.encoder\.forward_features\(images\)`"):
        model.forward_features(torch.zeros(1, 3, 32, 32))
    assert isinstance(model.encoder.forward_features(torch.zeros(1, 3, 32, 32)), Tensor)
