"""Options as frozen dataclasses: command line over file over defaults, limits, and one value that never changes."""

from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest

from timm_convnextv2.config import add_options, build, evolve, flat, option, part, read_yaml, words_given
from timm_convnextv2.console import CommandParser


@dataclass(frozen=True)
class Schedule:
    epochs: int = option(800, "passes over the images", at_least=1)
    lr: float | None = option(None, "peak learning rate", above=0)
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's betas")
    share: float = option(0.5, "a share", at_least=0, at_most=1)


@dataclass(frozen=True)
class Config:
    data_dir: tuple[str, ...] = option((), "folders")
    mean: tuple[float | str, ...] | None = option(
        None, "per channel, or auto", parse=lambda w: w if w == "auto" else float(w)
    )
    flip: bool = option(True, "flip half of the images")
    amp: bool = option(False, "mixed precision", negatable=True)
    warmup: bool | None = option(None, "shorter average at first")
    compile: str | None = option(None, "backend", const="inductor")
    dtype: str = option("bfloat16", "of AMP", choices=("bfloat16", "float16"))
    model_kwargs: dict[str, Any] = option({}, "more of create_model's")
    resume: str = option("", "resume", recorded=False)
    schedule: Schedule = part(Schedule, "schedule")


def parse(*words: str, yaml: str = "", tmp_path: Any = None) -> Config:
    parser = CommandParser(prog="x")
    add_options(parser, Config)
    layers = [words_given(parser, words)]
    if yaml:
        path = tmp_path / "c.yaml"
        path.write_text(yaml)
        layers.insert(0, read_yaml(Config, path))
    return build(Config, *layers)


def test_defaults_file_and_command_line(tmp_path):
    assert parse() == Config()
    file = "epochs: 10\nlr: 1e-3\nmean: [0.1, auto]\namp: true\nflip: false\ncompile: true\n"
    file += "model-kwargs: {a: 1}\nshare: null\n"
    got = parse("--epochs", "20", "--flip", yaml=file, tmp_path=tmp_path)
    assert (got.schedule.epochs, got.schedule.lr, got.schedule.share, got.mean) == (20, 1e-3, 0.5, (0.1, "auto"))
    assert (got.amp, got.flip, got.compile, got.model_kwargs) == (True, True, "inductor", {"a": 1})


def test_words_of_each_kind():
    words = "--data-dir a b --betas .8 .9 --no-warmup --compile --model-kwargs n=3 s=x t=(1,2) --no-amp --resume auto"
    got = parse(*words.split())
    assert got.data_dir == ("a", "b") and got.schedule.betas == (0.8, 0.9) and got.warmup is False
    assert got.compile == "inductor" and got.resume == "auto" and not got.amp
    assert got.model_kwargs == {"n": 3, "s": "x", "t": (1, 2)}
    assert parse("--compile", "eager").compile == "eager"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--epochs 0", ["--epochs", "1", "0"]),
        ("--lr 0", ["--lr", "above 0"]),
        ("--lr nan", ["--lr", "nan"]),
        ("--share 1.5", ["--share", "at most 1", "1.5"]),
        ("--dtype int8", ["--dtype", "int8", "bfloat16"]),
        ("--epochs many", ["--epochs", "many"]),
        ("--epoch 3", ["--epoch"]),
        ("--model-kwargs a", ["--model-kwargs", "'a'"]),
    ],
)
def test_refused_on_the_command_line(words, parts):
    with pytest.raises(ValueError) as e:
        parse(*words.split())
    assert all(text in str(e.value) for text in parts)


@pytest.mark.parametrize(
    ("yaml", "parts"),
    [
        ("epoch: 3", ["'epoch'", "Did you mean 'epochs'"]),
        ("epochs: many", ["'epochs'", "many"]),
        ("epochs: 0", ["--epochs", "at least 1"]),
        ("amp: 3", ["'amp'", "true or false", "3"]),
        ("model_kwargs: 3", ["'model_kwargs'", "mapping"]),
        ("dtype: int8", ["'dtype'", "'int8'"]),
        ("betas: [1]", ["'betas'", "2"]),
        ("- a", ["list"]),
        ("a: [", ["cannot be read"]),
    ],
)
def test_refused_in_a_file(tmp_path, yaml, parts):
    with pytest.raises(ValueError) as e:
        parse(yaml=yaml, tmp_path=tmp_path)
    assert all(text in str(e.value) for text in parts)


def test_it_never_changes_and_resolves_into_a_second_value():
    config = parse()
    with pytest.raises(FrozenInstanceError):
        config.amp = True  # pyright: ignore
    other = evolve(config, lr=1e-4, amp=True)
    assert (config.schedule.lr, other.schedule.lr, other.amp) == (None, 1e-4, True)
    assert other.schedule.epochs == config.schedule.epochs
    with pytest.raises(TypeError, match="nothing"):
        evolve(config, nothing=1)


def test_record_goes_back_through_a_file():
    record = flat(parse("--resume", "auto", "--lr", "0.1"))
    assert "resume" not in record and record["lr"] == 0.1 and record["betas"] == [0.9, 0.95]
    assert build(Config, record) == parse("--lr", "0.1")


def test_help_has_texts_and_defaults():
    parser = CommandParser(prog="x")
    add_options(parser, Config)
    text = " ".join(parser.format_help().split())
    assert "passes over the images (default: 800)" in text and "(default: 0.9 0.95)" in text and "schedule:" in text
