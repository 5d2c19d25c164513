"""Reading recipes."""

import pytest
from helpers import RECIPES

from timm_convnextv2.commands.finetune import main
from timm_convnextv2.recipes import load_recipe, recipe_names


def test_list_recipes(capsys):
    assert main(["--list-recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(p.stem for p in RECIPES.glob("*.yaml"))
    assert all(len(line.split()) > 5 for line in lines)


def test_recipe_and_its_header(recipe_file):
    recipe = load_recipe("finetune-1k-tiny", RECIPES)
    assert recipe.path == RECIPES / "finetune-1k-tiny.yaml" and recipe.name == "finetune-1k-tiny"
    assert recipe.description == "ConvNeXt V2 tiny: finetune on ImageNet-1K at 224 px after FCMAE pretraining"
    assert recipe.global_batch == 1024 and recipe.values["pretrained"] and recipe.values["epochs"] == 260
    scratch = recipe.from_scratch()
    assert scratch.values == {**recipe.values, "pretrained": False} and scratch.path == recipe.path
    path = recipe_file(epochs=3)
    path.write_text(f"# Mine\n\n# Global batch: 2,048\n{path.read_text()}# Global batch: 7\n")
    mine = load_recipe(str(path), RECIPES)
    assert (mine.name, mine.description, mine.global_batch, mine.values) == ("mine", "Mine", 2048, {"epochs": 3})


def test_unknown_recipe_lists_all(refused):
    message = refused(recipe="finetune-1k-tinny")
    assert "Did you mean 'finetune-1k-tiny'?" in message and all(n in message for n in recipe_names(RECIPES))


@pytest.mark.parametrize(
    "text, words", [("", "NoneType"), ("- a\n", "list"), ("a: [", "cannot be read"), (None, "none")]
)
def test_recipe_file_that_is_none(refused, tmp_path, text, words):
    path = tmp_path / "none.yaml"
    if text is not None:
        path.write_text(text)
    assert words in refused(recipe=path)
