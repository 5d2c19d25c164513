"""Help, completion and mistakes in options: at once, without torch, and complete."""

import subprocess
import sys

import pytest
from helpers import environment, run_python

from timm_convnextv2.commands import main as cli
from timm_convnextv2.commands.base import own_options, parser_of
from timm_convnextv2.commands.table import COMMANDS
from timm_convnextv2.config import entries

LIGHT = """
import sys
sys.argv = ["timm-convnextv2"]
from timm_convnextv2.commands.main import main
from timm_convnextv2.commands.table import COMMANDS
def call(*words):
    try: return main([*words])
    except SystemExit as e: return e.code
assert call("--help") == call("--version") == call("detect", "--help") == call("--print-completion", "bash") == 0
assert call("nothing") == call("detect") == call("detect", "nothing") == call("pretrain", "--epochs", "0") == 2
for name, command in COMMANDS.items():
    assert call(*name.split(), "--help") == call(*name.split(), "--help-all") == 0
    assert command.passes_on or call(*name.split(), "--no-such-option") == 2, name
heavy = {"torch", "timm", "torchvision", "numpy", "matplotlib", "PIL", "yaml"} & {*sys.modules}
assert not heavy, heavy
import timm_convnextv2
assert timm_convnextv2.FCMAE.__name__ == "FCMAE"
assert timm_convnextv2.checkpoint.load_model and timm_convnextv2.data.DemoSource(1)[0].any()
optional = {"matplotlib", "pyarrow", "datasets", "tifffile", "webdataset"} & {*sys.modules}
assert not optional, optional
try: timm_convnextv2.nothing
except AttributeError as e: assert str(e) == "module 'timm_convnextv2' has no attribute 'nothing'"
else: raise AssertionError
"""


def test_options_are_read_without_torch_and_the_package_without_optional_parts():
    run = subprocess.run([sys.executable, "-c", LIGHT], env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_text_and_a_default(name, capsys):
    known = entries(COMMANDS[name].config)
    assert all(len(entry.option.help) > 8 for entry in known.values())
    assert {*COMMANDS[name].main.split()} <= {*known} and len(COMMANDS[name].main.split()) <= 9
    for words in (["--help"], ["--help-all"]):
        with pytest.raises(SystemExit):
            own_options(name, words)
    short, long = (" ".join(text.split()) for text in capsys.readouterr().out.split("usage: ")[1:])
    assert f"timm-convnextv2 {name} {COMMANDS[name].example.splitlines()[0]}" in short
    for entry in known.values():
        shown = entry.option.metavar if entry.option.positional else entry.flag
        assert str(shown) in long, entry.name
        assert entry.name not in COMMANDS[name].main.split() or str(shown) in short
    options = [entry for entry in known.values() if not entry.option.positional]
    assert long.count("(default:") + long.count("(required)") >= len(options)


@pytest.mark.parametrize(
    "words, near",
    [
        ("pretrain --data x", "Did you mean '--data-dir' or '--data-list' or '--dataset'?"),
        ("embed --modle x --output y", "Did you mean '--model'?"),
        ("check x --show-band 1", "Did you mean '--show-bands'?"),
        ("detect trian", "Did you mean 'train'? Expected train, eval or predict"),
        ("check --show-bands IMAGES", "invalid int value: 'IMAGES'"),
    ],
)
def test_a_near_miss_is_suggested(words, near, capsys):
    assert cli.main(words.split()) == 2
    assert near in capsys.readouterr().err


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion(shell, capsys):
    assert cli.main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("pretrain", "detect", "predict", "img-size", "help-all"))
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_an_unknown_shell(capsys):
    assert cli.main(["--print-completion", "cmd"]) == 2
    assert "takes bash, zsh, fish, got 'cmd'" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["train_scripts", "elsewhere"])
def test_a_script_of_the_user_gets_the_models(folder, tmp_path):
    script = tmp_path / folder / "mine.py"
    script.parent.mkdir()
    script.write_text("import timm, timm_convnextv2\nprint(timm.is_model('fcmae_convnextv2_atto'))\n")
    run = run_python(script)
    assert run.stdout.strip() == "True", run.stderr


@pytest.mark.parametrize(
    "word, number",
    [
        ("-1.7e-2", -0.017), ("-1e-05", -1e-5), ("-1E5", -1e5), ("-.5e+1", -5), ("-3.", -3), ("-2", -2), ("-0.5", -0.5),
    ],
)  # fmt: skip
def test_negative_numbers_are_values(word, number):
    args = parser_of("pretrain").parse_args(["--mean", word, "0.5", word, "-b", "4", "--std", "1", "2", "3"])
    assert args.mean == [number, 0.5, number] and args.batch_size == 4 and args.std == [1, 2, 3]


@pytest.mark.parametrize("word", ["-x", "-e5", "-1e", "-1.2.3", "--5"])
def test_other_words_are_still_options(word):
    with pytest.raises(ValueError):
        parser_of("pretrain").parse_args(["--mean", word])
