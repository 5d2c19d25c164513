"""config.json from strangers: a value of another type is one error that names its key, wherever the file is read."""

import json
import random
import shutil

import pytest
import timm
from encoders import make_encoder
from mutations import ODD, damage_content, within

from timm_convnextv2.checkpoint import export_encoder
from timm_convnextv2.checkpoint.card import render_card
from timm_convnextv2.checkpoint.provenance import ConfigError, config_beside, read_config
from timm_convnextv2.commands.pretrain import parse_options
from timm_convnextv2.finetune.model import check_folder_weights, create_meta_model
from timm_convnextv2.pretraining.start import create_model

SIZES = [pytest.param(50, id="50"), pytest.param(500, id="500", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A timm folder with every section that this package writes."""
    folder = tmp_path_factory.mktemp("config") / "encoder"
    make_encoder(folder)
    config = json.loads((folder / "config.json").read_text())
    config["training"] |= {"datasets": ["a/b"], "metrics": {"top1": 81.0, "top5": 95.0, "dataset": "d", "split": "v"}}
    pixels = {"nodata": "nan", "divide": 255.0, "clip_low": [0.0], "clip_high": [1.0]}
    config["training"] |= {"base_model": "me/base", "inherited_license": "mit", "pixels": pixels}
    config["pretrained_cfg"] |= {"license": "mit", "test_input_size": [3, 64, 64], "paper_ids": ["1"], "tag": "t"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(render_card(config))
    return folder


def start(folder, work):
    """As pretraining opens a model to start from."""
    config, opened = parse_options(
        ["--model", f"local-dir:{folder}", "--pretrained", "--dataset", "demo", "--decoder-dim", "8"]
    )
    model = create_model(config.network, config.crops, start=opened)
    mean, std = config.crops.normalization
    export_encoder(model, work / "again", mean=mean, std=std)


def preflight(folder, work):
    check_folder_weights(folder, create_meta_model(f"local-dir:{folder}", need_weights=True, num_classes=10))


READERS = [start, preflight]  # and `publish`, in transfer/test_publish_transfer.py


@pytest.mark.parametrize("reader", READERS)
def test_the_folder_is_read(folder, tmp_path, reader):
    reader(folder, tmp_path)


def mutated(folder, work, config):
    copy = work / "encoder"
    shutil.rmtree(work, ignore_errors=True)
    copy.mkdir(parents=True)
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    shutil.copy(folder / "README.md", copy)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("count", SIZES)
def test_mutated_configs(folder, tmp_path, count):
    """ValueError or RuntimeError (a model that cannot be built), which the commands print; never anything else."""
    config = json.loads((folder / "config.json").read_text())
    refusals = 0
    for seed in range(count):
        changed, what = damage_content(config, random.Random(seed), odd=ODD)
        copy = mutated(folder, tmp_path / "work", changed)
        for reader in READERS:
            try:
                with within(20):
                    reader(copy, tmp_path / "work")
            except (ValueError, RuntimeError) as e:
                refusals += 1
                assert str(e), what
            except Exception as e:
                raise AssertionError(f"{seed}, {what}, {reader.__name__}: {type(e).__name__}: {e}") from e
    assert refusals > count // 2


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("pretrained_cfg", -1, "a table"),
        ("pretrained_cfg.mean", 3.5, "a list of numbers, one per channel"),
        ("pretrained_cfg.std", [0.1, 0, 0.1], "a list of numbers above 0, one per channel"),
        ("pretrained_cfg.input_size", ["3", "32", "32"], "3 whole numbers"),
        ("pretrained_cfg.license", ["mit"], "a string"),
        ("training.table", "many", "a table of strings and numbers"),
        ("training.metrics", 81.2, "a table"),
        ("training.metrics.top1", "81", "a number"),
        ("global_pool", True, "a string"),
        ("num_classes", "10", "a whole number from 0"),
        ("num_classes", None, "a whole number from 0"),
        ("model_args", [1], "a table"),
        ("model_args.depths", [20000, 1, 1, 1], "4 whole numbers from 1 to 128"),
        ("model_args.dims", [8, 16, 24, 10**6], "4 whole numbers from 1 to 8192"),
        ("model_args.patch_size", True, "a whole number from 1"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_the_message_names_the_key(folder, tmp_path, reader, key, value, expected):
    config = json.loads((folder / "config.json").read_text())
    *parents, last = key.split(".")
    place = config
    for name in parents:
        place = place[name]
    place[last] = value
    copy = mutated(folder, tmp_path / "work", config)
    with pytest.raises(ConfigError) as error:
        reader(copy, tmp_path / "work")
    message = str(error.value)
    assert f"{copy / 'config.json'}' has {key} = {value!r} ({type(value).__name__}), expected {expected}" in message


def test_a_damaged_config_does_not_lose_the_licence(folder, tmp_path):
    """Beside weights, a config.json that is ours and wrong is an error; that of another library is none of ours."""
    config = json.loads((folder / "config.json").read_text())
    copy = mutated(folder, tmp_path / "work", config | {"pretrained_cfg": "lost"})
    with pytest.raises(ConfigError, match="pretrained_cfg"):
        config_beside({"file": copy / "model.safetensors"})
    (copy / "config.json").write_text('{"model_type": "bert"}')
    assert config_beside({"file": copy / "model.safetensors"}) is None


@pytest.mark.parametrize("name", ["convnextv2_atto.fcmae", "convnextv2_tiny.fcmae_ft_in1k"])
def test_published_configs_pass(tmp_path, name):
    """What timm itself says of the published models has these types."""
    cfg = timm.get_pretrained_cfg(name).to_dict()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architecture": cfg.pop("architecture"), "num_classes": 0, "pretrained_cfg": cfg}))
    assert read_config(path)["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
