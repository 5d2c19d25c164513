"""The recipe of a run: the one that is named, or the one that suits the images."""

import csv

import pytest
import yaml
from runs import SMALL, command, image_folder, run

from timm_convnextv2.commands.pretrain import main, parse_options

NONE = (None, 224, 4)


@pytest.mark.parametrize(
    ("size", "words", "expected"),
    [
        (32, "", ("small-images", 32, 1)),
        (45, "", ("small-images", 40, 1)),
        (90, "", ("small-images", 64, 1)),
        (12, "", ("small-images", 16, 1)),
        (97, "", NONE),
        (200, "--img-size 64", ("small-images", 64, 1)),
        (200, "--input-size 3 64 128", ("small-images", 224, 1)),
        (200, "--window-size 48", ("small-images", 48, 1)),
        (32, "--img-size 224", (None, 224, 4)),
        (32, "--patch-size 2", (None, 224, 2)),
        (32, "--recipe paper", ("paper", 224, 4)),
        (200, "--recipe small-images", ("small-images", 64, 1)),
        (200, "--recipe small-images --img-size 48 --patch-size 2", ("small-images", 48, 2)),
    ],
)
def test_recipe_follows_the_images_unless_options_decide(tmp_path, size, words, expected):
    images = image_folder(tmp_path / "images", 3, size)
    (images / "00-broken.png").write_bytes(b"no image")
    config, _ = parse_options([str(images), *words.split()])
    assert (config.recipe, config.crops.img_size, config.network.patch_size) == expected
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path"], *[[str(path)] for path in images.iterdir()]])
    config, _ = parse_options(["--data-list", str(tmp_path / "list.csv"), *words.split()])
    assert (config.recipe, config.crops.img_size, config.network.patch_size) == expected


def test_a_run_says_its_recipe_and_repeats_it(tmp_path, capsys):
    data = [str(image_folder(tmp_path / "images", 4, 24)), "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    small = [word for word in SMALL if word != "patch_size=1"]
    assert main(command(tmp_path / "a", data=[*data, "--recipe", "small-images", *small])) == 0
    assert "Recipe small-images" in (said := capsys.readouterr().out) and "img_size 24" in said
    settings = yaml.safe_load((tmp_path / "a" / "args.yaml").read_text())
    assert (settings["recipe"], settings["img_size"]) == ("small-images", 24)
    run(tmp_path / "b", "--config", str(tmp_path / "a" / "args.yaml"), data=[])
    again = yaml.safe_load((tmp_path / "b" / "args.yaml").read_text())
    assert {k for k in settings if settings[k] != again[k]} <= {"experiment", "output", "command", "device"}


def test_a_file_of_options_is_a_recipe(tmp_path):
    images = image_folder(tmp_path / "images", 3, 200)
    (tmp_path / "mine.yaml").write_text("# mine\nlr_base: 1e-3\nepochs: 7\n")
    config, _ = parse_options([str(images), "--recipe", str(tmp_path / "mine.yaml"), "--epochs", "9"])
    assert (config.schedule.lr_base, config.schedule.epochs) == (1e-3, 9)
    (tmp_path / "mine.yaml").write_text("lr_bas: 1e-3\n")
    with pytest.raises(ValueError, match=r"mine.*lr_bas.*lr_base"):
        parse_options([str(images), "--recipe", str(tmp_path / "mine.yaml")])
    with pytest.raises(ValueError, match=r"--recipe smal .*small-images.*paper"):
        parse_options([str(images), "--recipe", "smal"])
