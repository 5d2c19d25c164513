"""Weights that travel: a whole FCMAE and train.py's classifiers as timm folders, and the licence they carry."""

import argparse
import contextlib
import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers import Runs, hub_cache, run_python
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, update_summary
from torch import nn

import timm_convnextv2
from timm_convnextv2.checkpoint import export_encoder, export_fcmae, export_finetuned, load_checkpoint, to_official
from timm_convnextv2.checkpoint.provenance import Origin, origin_of_config, read_config, resolve_license
from timm_convnextv2.commands import publish
from timm_convnextv2.models import ConvNeXtV2

BODY = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20))
FCMAE = dict(decoder_dim=16, img_size=64, **BODY)
NC = "cc-by-nc-4.0"


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# --- the whole FCMAE


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(in_chans=5, img_size=(32, 48), patch_size=1, decoder_dim=12, decoder_depth=2, norm_pix_loss=False),
        dict(mask_ratio=0.75, kernel_sizes=(7, 5, 3, 3), conv_mlp=False, drop_path_rate=0.1),
    ],
    ids=["plain", "wide", "odd"],
)
def test_fcmae_comes_back_whole(options, tmp_path, caplog):
    """Encoder, decoder, mask token and options, through `local-dir:` and through an overlay: the same loss."""
    model = timm.create_model("fcmae_convnextv2_atto", **{**FCMAE, **options}).eval()
    chans = model.in_chans
    folder = export_fcmae(model, tmp_path / "fcmae", mean=[0.1] * chans, std=[0.2] * chans, info={"Epochs": 3})
    modes = {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()}
    assert modes.keys() == {"README.md", "config.json", "model.safetensors"}
    assert len({*modes.values()}) == 1  # safetensors lets only the owner read
    images = torch.randn(2, chans, *model.img_size)
    mask = timm_convnextv2.random_mask(2, model.grid(*model.img_size), model.mask_ratio)
    expected = model(images, mask)
    overlay = dict(file=str(folder / "model.safetensors"))
    for again in (
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        timm.create_model("fcmae_convnextv2_atto", pretrained=True, pretrained_cfg_overlay=overlay).eval(),
    ):
        assert equal(again.state_dict(), model.state_dict())
        assert torch.equal(again(images, mask).pred, expected.pred)
        assert torch.equal(again(images, mask).loss, expected.loss)
        for name in ("img_size", "mask_ratio", "norm_pix_loss"):
            assert getattr(again, name) == getattr(model, name)
        assert tuple(timm.data.resolve_model_data_config(again)["mean"]) == (0.1,) * chans
        assert export_encoder(again, tmp_path / "encoder") and "license" not in config_of(tmp_path / "encoder")
    assert "decoder" not in caplog.text


@pytest.mark.parametrize("moves", range(4))
@pytest.mark.parametrize("before", ["nothing", "an earlier export", "another model"])
def test_a_crash_between_two_moves_leaves_no_config_of_other_weights(before, moves, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    model, new = (timm.create_model("fcmae_convnextv2_atto", **{**FCMAE, "img_size": size}) for size in (64, 96))
    if before != "nothing":
        export_encoder(new if before == "an earlier export" else model, tmp_path / "out", info={"Epochs": "1 of 2"})
    done, replace = [], os.replace

    def killed(source, target):
        if len(done) == moves:
            raise Killed
        done.append(Path(target).name)
        replace(source, target)

    weights = {name: value + 1 for name, value in new.state_dict().items()}
    monkeypatch.setattr(os, "replace", killed)
    with contextlib.suppress(Killed):
        export_encoder(new, tmp_path / "out", state_dict=weights, info={"Epochs": "2 of 2"})
    assert len(done) == min(moves, 3)
    if before == "an earlier export":  # a run overwrites its export many times, and it can always be opened
        assert (tmp_path / "out" / "config.json").is_file()
    else:
        assert (tmp_path / "out" / "config.json").is_file() == (moves > 1)
    if (tmp_path / "out" / "config.json").is_file():
        opened = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0)
        assert opened.pretrained_cfg["input_size"] == (3, 96, 96)
        stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(value, stored[name]) for name, value in opened.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(in_chans=1), "in_chans=3 in the file, 1 requested"),
        (dict(patch_size=1, img_size=64), "patch_size=4 in the file, 1 requested"),
        (dict(decoder_dim=8), "decoder_dim=16 in the file, 8 requested"),
        (dict(decoder_depth=2), "decoder_depth=1 in the file, 2 requested"),
        (dict(depths=(1, 1, 2, 1)), "stages.2.blocks.1"),
    ],
)
def test_other_shapes_than_the_published_are_told(asked, message, tmp_path):
    folder = export_fcmae(timm.create_model("fcmae_convnextv2_atto", **FCMAE), tmp_path)
    overlay = dict(file=str(folder / "model.safetensors"))
    with pytest.raises(ValueError, match=message):
        timm.create_model(f"local-dir:{folder}", pretrained=True, **asked)
    with pytest.raises(ValueError, match=message):
        timm.create_model("fcmae_convnextv2_atto", pretrained=True, pretrained_cfg_overlay=overlay, **asked)
    resized = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=96, mask_ratio=0.5)
    assert resized.img_size == (96, 96)  # what does not shape the weights may change
    with pytest.raises(ValueError, match="convnextv2_atto.*fcmae_convnextv2_pico"):
        timm.create_model("fcmae_convnextv2_pico", pretrained=True, pretrained_cfg_overlay=overlay)


def test_an_encoder_folder_starts_an_fcmae_with_a_fresh_decoder(tmp_path, caplog):
    model = timm.create_model("fcmae_convnextv2_atto", in_chans=4, **FCMAE)
    folder = export_encoder(model, tmp_path, license="mit")
    overlay = dict(file=str(folder / "model.safetensors"))
    again = timm.create_model("fcmae_convnextv2_atto", pretrained=True, pretrained_cfg_overlay=overlay, decoder_dim=8)
    body = lambda m: {k: v for k, v in m.encoder.state_dict().items() if "head" not in k}  # noqa: E731
    assert equal(body(again), body(model)) and again.in_chans == 4
    assert "random weights" in caplog.text and "published" not in caplog.text
    assert config_of(export_encoder(again, tmp_path / "again"))["pretrained_cfg"]["license"] == "mit"


def test_fcmae_of_the_hub_brings_options_licence_and_origin(tmp_path):
    """By an overlay, where timm reads no config.json, and by its own name. Only a cache is there, no network."""
    model = timm.create_model("fcmae_convnextv2_atto", in_chans=2, **FCMAE)
    folder = export_fcmae(model, tmp_path / "fcmae", mean=[0.3] * 2, std=[0.2] * 2, license="mit")
    hub_cache(folder, tmp_path / "cache", "me/whole")
    overlay, cache = dict(hf_hub_id="me/whole"), dict(cache_dir=tmp_path / "cache")
    for again in (
        timm.create_model("fcmae_convnextv2_atto", pretrained=True, pretrained_cfg_overlay=overlay, **cache),
        timm.create_model("hf-hub:me/whole", pretrained=True, **cache),
    ):
        assert equal(again.state_dict(), model.state_dict())
        config = config_of(export_encoder(again, tmp_path / "encoder"))
        assert config["pretrained_cfg"]["license"] == "mit" and config["training"]["base_model"] == "me/whole"
        assert config["pretrained_cfg"]["mean"] == [0.3, 0.3] and "origin_url" not in config["pretrained_cfg"]
        assert (
            "started from [me/whole](https://huggingface.co/me/whole)" in (tmp_path / "encoder/README.md").read_text()
        )
    with pytest.raises(RuntimeError, match="config.json.*me/absent"):
        timm.create_model(
            "fcmae_convnextv2_atto", pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id="me/absent"), **cache
        )


@pytest.mark.parametrize("export", [export_fcmae, export_encoder])
def test_folder_of_other_weights_and_again(export, tmp_path):
    """An average in its wrappers; weights that do not fit are refused and leave the folder as it was."""
    model = timm.create_model("fcmae_convnextv2_atto", **FCMAE)
    whole = export is export_fcmae
    own, prefix = (model.state_dict(), "") if whole else (model.encoder.state_dict(), "encoder.")
    ema = {f"{'module' if whole else '_orig_mod'}.{k}": v + 1 for k, v in model.state_dict().items()}
    folder = export(model, tmp_path / "out")
    assert export(model, folder, state_dict=ema) == folder
    (folder / "notes.txt").write_text("mine")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert equal(weights, {k: v + 1 for k, v in own.items()})
    for bad, message in (
        ({k: v for k, v in ema.items() if "stages.3" not in k}, r"'(encoder\.)?stages\.3\.\S+' is missing"),
        (ema | {f"{prefix}extra": torch.ones(1)}, "'extra' is .* missing in the model"),
        (ema | {f"module.{prefix}{list(own)[0]}": torch.ones(3)}, rf"'{re.escape(list(own)[0])}' is \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            export(model, folder, state_dict=bad)
    with pytest.raises(ValueError, match="mean.* 2 "):
        export(model, folder, mean=(0.1, 0.2))
    with pytest.raises(ValueError, match="timm.create_model"):
        export(timm_convnextv2.FCMAE(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), decoder_dim=8), folder)
    assert equal(weights, safetensors.torch.load_file(folder / "model.safetensors"))
    assert (folder / "notes.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]


# --- checkpoints of train.py


def make_run(folder, model="convnextv2_atto", *, epochs=2, ema=True, **options):
    """The output folder of a run of timm's train.py, written by what train.py writes it with.

    Returns:
        The folder, and the state dicts of its best epoch, plain and averaged.
    """
    args = argparse.Namespace(
        **{
            **dict(
                model=model, pretrained=False, pretrained_path=None, initial_checkpoint="", resume="", num_classes=3,
                gp=None, img_size=None, in_chans=None, input_size=None, crop_pct=None, mean=None, std=None,
                interpolation="", model_kwargs=BODY, drop=0.0, drop_path=0.1, data=None, data_dir="/data/pets",
                dataset="", val_split="validation", opt="adamw", lr=1e-3, opt_betas=[0.9, 0.999], weight_decay=0.05,
                layer_decay=0.9, batch_size=8, grad_accum_steps=1, world_size=2, epochs=epochs, warmup_epochs=0,
                aa=None, mixup=0.8, cutmix=0.0, reprob=0.0, smoothing=0.1, model_ema=ema, model_ema_decay=0.5,
                model_ema_force_cpu=False, seed=42,
            ),
            **options,
        }
    )  # fmt: skip
    folder.mkdir(parents=True)
    net = timm.create_model(
        args.model, pretrained=args.pretrained, in_chans=args.in_chans or 3, num_classes=args.num_classes,
        drop_path_rate=args.drop_path, global_pool=args.gp, **args.model_kwargs,
    )  # fmt: skip
    task = ClassificationTask(net, nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(net, opt="adamw", lr=1e-3)
    if ema:
        task.setup_ema(decay=0.5)
    saver = CheckpointSaver(net, optimizer, args, checkpoint_dir=str(folder), recovery_dir=str(folder), task=task)
    best = {}
    for epoch in range(epochs):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        task.update_ema(step=epoch + 10)  # in the first steps it is the weights themselves
        top1 = 60.0 if epoch == 0 else 50.0
        measured, file = {"loss": 0.9, "top1": top1, "top5": 95.5}, str(folder / "summary.csv")
        update_summary(epoch, {"loss": 1.0}, measured, filename=file, lr=1e-3, write_header=epoch == 0)
        saver.save_checkpoint(epoch, metric=top1)
        if epoch == 0:
            best = {**task.get_checkpoint_state(), **(task.get_checkpoint_state(ema=True) if ema else {})}
            best = {k: {n: t.clone() for n, t in v.items()} for k, v in best.items()}
            assert not ema or not equal(best["state_dict"], best["state_dict_ema"])
    (folder / "args.yaml").write_text(yaml.safe_dump(vars(args)))
    return folder, best


STOCK = """
import sys, timm, torch
for folder in sys.argv[1:]:
    for kwargs in ({}, dict(num_classes=0), dict(features_only=True), dict(num_classes=9)):
        timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.save({"state": model.state_dict(), "data": timm.data.resolve_model_data_config(model)}, f"{folder}/seen.pt")
assert "timm_convnextv2" not in sys.modules
"""


def test_classifiers_travel_to_stock_timm_and_back(tmp_path):
    """train.py's checkpoint -> folder -> timm without this package -> ours, value for value."""
    start = export_encoder(timm.create_model("fcmae_convnextv2_atto", in_chans=4, **FCMAE), tmp_path / "start")
    cases = {
        "scratch": make_run(tmp_path / "run1", input_size=[3, 64, 48], crop_pct=1.0, mean=[0.5] * 3, std=[0.25] * 3),
        "local": make_run(
            tmp_path / "run2", f"local-dir:{start}", pretrained=True, in_chans=4, model_kwargs={}, gp="max", ema=False
        ),
        "plain": make_run(tmp_path / "run3", "convnextv2_nano.fcmae", img_size=96, interpolation="bilinear"),
    }
    for name, (run, best) in cases.items():
        folder = export_finetuned(run, tmp_path / name, ema=False if name == "plain" else None)
        key = "state_dict_ema" if name == "scratch" else "state_dict"
        assert equal(safetensors.torch.load_file(folder / "model.safetensors"), best[key])
        assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    run = run_python("-c", STOCK, *(tmp_path / name for name in cases))
    assert run.returncode == 0, run.stderr
    for name, (_, best) in cases.items():
        ours = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
        seen = torch.load(tmp_path / name / "seen.pt", weights_only=True)
        assert isinstance(ours, ConvNeXtV2)
        assert equal(ours.state_dict(), seen["state"])
        assert equal(seen["state"], best["state_dict_ema" if name == "scratch" else "state_dict"])
        cases[name] = (seen["data"], config_of(tmp_path / name))

    data, config = cases["scratch"]
    assert data["input_size"] == (3, 64, 48) and list(data["mean"]) == [0.5] * 3 and data["crop_pct"] == 1.0
    assert config["architecture"] == "convnextv2_atto" and config["num_classes"] == 3
    assert not {"license", "tag", "origin_url", "label_names"} & config["pretrained_cfg"].keys()
    assert config["training"]["metrics"] | {"loss": 0} == {
        "top1": 60.0, "top5": 95.5, "loss": 0, "dataset": "pets", "split": "validation", "dataset_id": None
    }  # fmt: skip
    data, config = cases["local"]
    assert data["input_size"] == (4, 64, 64) and config["model_args"]["global_pool"] == "max"
    data, config = cases["plain"]
    assert data["input_size"] == (3, 96, 96) and data["interpolation"] == "bilinear"
    assert config["training"]["metrics"] is None  # those of summary.csv are the average's
    assert "license" not in config["pretrained_cfg"]  # named a published tag, and was trained from scratch


def test_card_of_a_classifier(tmp_path):
    """With the metrics of the last row of an epoch that a resumed run repeated, and the warmup before its epochs."""
    run, _ = make_run(tmp_path / "run", dataset="hfds/timm/oxford-iiit-pet")
    set_args(run / "model_best.pth.tar", epochs=260, warmup_epochs=40, warmup_prefix=True, cooldown_epochs=0)
    header, first, second = (run / "summary.csv").read_text().splitlines()
    again = [header, first, second, header, first.replace("60.0", "70.0"), second]
    (run / "summary.csv").write_text("\n".join(again) + "\n")
    folder = export_finetuned(run, tmp_path / "out", license="mit", info={"Recipe": "smoke", "Seed": 7})
    card = (folder / "README.md").read_text()
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    assert data.library_name == "timm" and data.license == "mit" and data.pipeline_tag == "image-classification"
    assert data.datasets == ["timm/oxford-iiit-pet"]
    assert [(r.metric_name, r.metric_value) for r in data.eval_results] == [
        ("Top-1 accuracy (%)", 70.0),
        ("Top-5 accuracy (%)", 95.5),
    ]
    for row in (
        "| Recipe | smoke |",
        "| Seed | 7 |",
        "| Epochs | 1 of 300, 40 of them warmup |",
        "16 images per update",
        "layer decay 0.9",
        "moving average (0.5)",
        "| Started from | random weights |",
    ):
        assert row in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(folder))
    assert len(code.strip().splitlines()) == 3
    scope = {}
    exec(code, scope)
    assert scope["model"].num_classes == 3


def test_which_checkpoint_is_taken(tmp_path):
    run, best = make_run(tmp_path / "run", epochs=2)
    last = load_checkpoint(run / "last.pth.tar")["state_dict_ema"]
    weights = lambda path, **kw: safetensors.torch.load_file(  # noqa: E731
        export_finetuned(path, tmp_path / "out", **kw) / "model.safetensors"
    )
    assert equal(weights(run / "last.pth.tar"), last)
    assert equal(weights(run, ema=False), best["state_dict"])
    (run / "model_best.pth.tar").unlink()
    assert equal(weights(run), last)

    wrapped = load_checkpoint(run / "last.pth.tar")  # saved by hand, still in its wrappers
    wrapped["state_dict_ema"] = {f"_orig_mod.module.{k}": v for k, v in last.items()}
    torch.save(wrapped, tmp_path / "wrapped.pth.tar")
    assert equal(weights(tmp_path / "wrapped.pth.tar"), last)
    (run / "last.pth.tar").rename(run / "recovery-0-1.pth.tar")
    with pytest.raises(ValueError, match="recovery-0-1.pth.tar"):
        export_finetuned(run, tmp_path / "out")
    with pytest.raises(ValueError, match="timm folder already"):
        export_finetuned(tmp_path / "out", tmp_path / "out2")


def test_what_is_no_classifier_of_ours_is_refused(tmp_path):
    run, _ = make_run(tmp_path / "run", ema=False, epochs=1)
    good = load_checkpoint(run / "last.pth.tar")
    path, out = tmp_path / "bad.pth.tar", tmp_path / "out"

    def refused(message, **kwargs):
        with pytest.raises(ValueError, match=message):
            export_finetuned(path, out, **kwargs)
        assert not out.exists()

    with pytest.raises(ValueError, match="last.pth.tar.*--model-ema"):
        export_finetuned(run / "last.pth.tar", out, ema=True)
    for change, message in (
        (lambda c: c["state_dict"].pop("head.fc.bias"), r"'head\.fc\.bias' is missing in the weights"),
        (lambda c: c["state_dict"].update({"extra": torch.ones(1)}), "'extra' is .* and missing in the model"),
        (lambda c: vars(c["args"]).update(num_classes=5), r"'head\.fc\.weight' is .* and \[5, 20\]"),
        (lambda c: vars(c["args"]).update(model="resnet18", model_kwargs={}), "resnet18.*ConvNeXt V2"),
        (lambda c: vars(c["args"]).update(model="nonsense"), "nonsense.*cannot be"),
        (lambda c: vars(c["args"]).update(model_kwargs={"nonsense": 1}), "cannot be.*nonsense"),
        (lambda c: c.pop("args"), "bad.pth.tar.*no options"),
        (lambda c: c.pop("state_dict"), "bad.pth.tar.*no weights"),
        (lambda c: c.update(args={"model": "fcmae_convnextv2_atto", "mask_ratio": 0.6}), "pretraining run"),
    ):
        content = {**good, "state_dict": dict(good["state_dict"]), "args": argparse.Namespace(**vars(good["args"]))}
        change(content)
        torch.save(content, path)
        refused(message)
    torch.save({**good, "x": Runs(tmp_path / "executed")}, path)
    refused(r"bad\.pth\.tar.*not executed.*system")
    assert not (tmp_path / "executed").exists()
    path.write_bytes((run / "last.pth.tar").read_bytes()[:1000])
    refused(r"bad\.pth\.tar")


# --- origin and licence


@pytest.fixture
def published(tmp_path):
    """A file as the Hub has it for `convnextv2_atto.fcmae`, but small: no classifier, no `head.norm`."""
    weights = timm.create_model("convnextv2_atto", num_classes=0, **BODY).state_dict()
    path = tmp_path / "published.safetensors"
    safetensors.torch.save_file({k: v for k, v in weights.items() if not k.startswith("head.")}, path)
    return path


def test_the_licence_goes_along_the_whole_chain(published, tmp_path):
    """Published -> FCMAE pretraining -> encoder and FCMAE folders -> more pretraining, and finetuning -> finetuning."""
    licence = lambda folder: config_of(folder)["pretrained_cfg"].get("license")  # noqa: E731
    first = timm.create_model(
        "fcmae_convnextv2_atto", pretrained=True, pretrained_cfg_overlay=dict(file=str(published)), **FCMAE
    )
    encoder, whole = export_encoder(first, tmp_path / "encoder"), export_fcmae(first, tmp_path / "fcmae")
    second = timm.create_model(f"local-dir:{whole}", pretrained=True)
    encoder2 = export_encoder(second, tmp_path / "encoder2")
    run, _ = make_run(tmp_path / "run", f"local-dir:{encoder2}", pretrained=True, model_kwargs={}, epochs=1)
    finetuned = export_finetuned(run, tmp_path / "finetuned")
    run2, _ = make_run(tmp_path / "run2", f"local-dir:{finetuned}", pretrained=True, model_kwargs={}, epochs=1)
    finetuned2 = export_finetuned(run2, tmp_path / "finetuned2")
    run3, _ = make_run(tmp_path / "run3", initial_checkpoint=str(run2 / "last.pth.tar"), epochs=1)
    finetuned3 = export_finetuned(run3, tmp_path / "finetuned3")
    for folder in (encoder, whole, encoder2, finetuned, finetuned2, finetuned3):
        config = config_of(folder)
        assert licence(folder) == config["training"]["inherited_license"] == NC, folder
        assert config["training"]["base_model"] == "timm/convnextv2_atto.fcmae"
        assert "facebookresearch/ConvNeXt-V2" in config["pretrained_cfg"]["origin_url"]
        card = (folder / "README.md").read_text()
        assert f"license: {NC}" in card and "apache" not in card
    timm.models.save_for_hf(first.encoder, tmp_path / "hand", safe_serialization=True)
    assert licence(tmp_path / "hand") == licence(export_encoder(first, encoder, license=NC)) == NC
    for refused in (
        lambda: export_encoder(second, tmp_path / "x", license="mit"),
        lambda: export_fcmae(second, tmp_path / "x", license="mit"),
        lambda: export_finetuned(run2, tmp_path / "x", license="apache-2.0"),
        lambda: export_finetuned(run3, tmp_path / "x", license="apache-2.0"),
    ):
        with pytest.raises(ValueError, match=NC):
            refused()
    assert not (tmp_path / "x").exists()

    # architecture of a derived folder, trained from scratch: the user's own
    run4, _ = make_run(tmp_path / "run4", f"local-dir:{encoder}", model_kwargs={}, epochs=1)
    assert licence(export_finetuned(run4, tmp_path / "own")) is None
    assert licence(export_finetuned(run4, tmp_path / "own", license="mit")) == "mit"


@pytest.mark.parametrize(
    "path", ["registered", "weights_of_a_folder", "renamed_weights", "resumed_with_itself", "moved"]
)
def test_origins_of_a_run(path, published, tmp_path):
    run, _ = make_run(tmp_path / "run", "convnextv2_atto.fcmae", epochs=1)
    args, expected = {"pretrained": True}, (NC, "timm/convnextv2_atto.fcmae")
    if "weights" in path:
        folder = export_encoder(timm.create_model("fcmae_convnextv2_atto", **FCMAE), tmp_path / "e", license="mit")
        file = folder / ("mine.safetensors" if path == "renamed_weights" else "model.safetensors")
        (folder / "model.safetensors").rename(file)
        args["pretrained_path"], expected = str(file), ("mit", None)
    elif path == "moved":
        args["resume"] = "gone/run/last.pth.tar"  # its own, under the name that the folder had
    elif path == "resumed_with_itself":
        args["resume"] = str(run / "last.pth.tar")
    set_args(run / "last.pth.tar", **args)
    config = config_of(export_finetuned(run / "last.pth.tar", tmp_path / "out"))
    assert (config["pretrained_cfg"].get("license"), config["training"]["base_model"]) == expected


@pytest.mark.parametrize(
    "kind, key",
    [
        *(("timm", key) for key in ("resume", "initial_checkpoint", "pretrained_path")),
        ("official", "resume"), ("from random weights", "pretrained_path"), ("from others", "initial_checkpoint"),
        ("from others, stated", "resume"),
    ],
)  # fmt: skip
def test_files_without_a_config_hand_on_a_licence_or_it_is_asked_for(kind, key, published, tmp_path, capsys):
    """By every road into the run, on export and on publishing."""
    file, expected = published, None
    if kind == "official":
        weights = timm.create_model("convnextv2_atto", num_classes=0, **BODY).state_dict()
        file, expected = tmp_path / "official.pth", NC
        torch.save({"model": to_official(weights)}, file)
    elif kind.startswith("from"):  # a checkpoint of pretraining without the encoder beside it
        settings = {"mask_ratio": 0.6, "pretrained": "others" in kind, "license": "mit" if "stated" in kind else ""}
        file, expected = tmp_path / "moved.pth.tar", settings["license"] or None
        torch.save({"state_dict": {"encoder.stem.0.weight": torch.zeros(1)}, "args": settings}, file)
    run, _ = make_run(tmp_path / "run", "convnextv2_atto.fcmae", epochs=1)
    for path in run.glob("*.pth.tar"):
        set_args(path, pretrained=True, **{key: str(file)})
    target = ["--output", str(tmp_path / "staged")]
    if kind in ("timm", "from others"):
        with pytest.raises(ValueError, match=f"'{file}'.*config.json.*--license"):
            export_finetuned(run, tmp_path / "out")
        assert publish.main([str(run), "me/x", "--dry-run", *target]) == 2
        assert "--license ID" in capsys.readouterr().err
        expected = "apache-2.0"
        assert publish.main([str(run), "me/x", "--license", expected, "--dry-run", *target]) == 0
        config = config_of(tmp_path / "staged")
    else:
        config = config_of(export_finetuned(run, tmp_path / "out"))
        if expected:
            with pytest.raises(ValueError, match=expected):
                export_finetuned(run, tmp_path / "out", license="apache-2.0")
    assert config["pretrained_cfg"].get("license") == expected


def set_args(path, **args):
    """Changes the options in a checkpoint."""
    checkpoint = load_checkpoint(path)
    vars(checkpoint["args"]).update(args)
    torch.save(checkpoint, path)


@pytest.mark.parametrize("key", ["resume", "initial_checkpoint", "pretrained_path"])
def test_a_licence_is_not_lost_with_a_file(key, tmp_path):
    run, _ = make_run(tmp_path / "run", "convnextv2_atto.fcmae", epochs=1)
    set_args(run / "last.pth.tar", pretrained=True, **{key: "gone/other.pth.tar"})
    with pytest.raises(ValueError, match=r"'gone/other.pth.tar' \(--"):
        export_finetuned(run / "last.pth.tar", tmp_path / "out", license="mit")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tmp.pth.tar", "checkpoint-0.pth.tar"])
def test_a_run_that_resumed_itself_from_a_file_that_train_script_replaced(name, tmp_path):
    """tmp.pth.tar of a killed run is overwritten by the resumed one, older checkpoints are removed."""
    start = export_encoder(timm.create_model("fcmae_convnextv2_atto", **FCMAE), tmp_path / "start", license="mit")
    run, _ = make_run(tmp_path / "run", f"local-dir:{start}", pretrained=True, model_kwargs={}, epochs=1)
    set_args(run / "last.pth.tar", resume=str(run / name))
    (run / name).unlink(missing_ok=True)
    folder = export_finetuned(run / "last.pth.tar", tmp_path / "out")
    assert config_of(folder)["pretrained_cfg"]["license"] == "mit"


def test_a_start_folder_that_moved(tmp_path, monkeypatch):
    """Refused with what to do; a copy of its config.json in the run is enough."""
    start = export_encoder(timm.create_model("fcmae_convnextv2_atto", **FCMAE), tmp_path / "start", license="mit")
    monkeypatch.chdir(tmp_path)
    run, best = make_run(tmp_path / "run", "local-dir:start", pretrained=True, model_kwargs={}, epochs=1)
    start.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="local-dir:start.*config.json.*run"):
        export_finetuned(run, tmp_path / "out")
    (run / "config.json").write_text((tmp_path / "elsewhere/config.json").read_text())
    folder = export_finetuned(run, tmp_path / "out")
    assert equal(safetensors.torch.load_file(folder / "model.safetensors"), best["state_dict_ema"])
    assert config_of(folder)["pretrained_cfg"]["license"] == "mit"


def test_a_start_on_the_hub_without_network(tmp_path):
    run, _ = make_run(tmp_path / "run", epochs=1)
    set_args(run / "last.pth.tar", model="hf-hub:me/encoder", pretrained=True)
    with pytest.raises(RuntimeError, match="config.json of 'me/encoder'.*run"):
        export_finetuned(run / "last.pth.tar", tmp_path / "out")
    start = export_encoder(timm.create_model("fcmae_convnextv2_atto", **FCMAE), tmp_path / "start", license="mit")
    (run / "config.json").write_text((start / "config.json").read_text())
    config = config_of(export_finetuned(run / "last.pth.tar", tmp_path / "out"))
    assert config["pretrained_cfg"]["license"] == "mit" and config["training"]["base_model"] == "me/encoder"


def test_origins_of_folders_of_others(tmp_path):
    """timm's repositories on the Hub leave the licence out of config.json."""
    hub = {"architecture": "convnextv2_tiny", "pretrained_cfg": {"tag": "fcmae_ft_in1k"}}
    url = "https://github.com/facebookresearch/ConvNeXt-V2"
    assert origin_of_config(hub) == Origin(NC, None, url)
    name = "timm/convnextv2_tiny.fcmae_ft_in1k"
    assert origin_of_config({"architecture": "convnextv2_tiny", "pretrained_cfg": {}}, f"{name}@main") == Origin(
        NC, name, url
    )
    assert origin_of_config({"architecture": "convnextv2_tiny", "pretrained_cfg": {"tag": "mine"}}) == Origin()
    for text, message in (
        ("{}", "names no architecture"),
        ('{"architecture": "resnet50"}', "resnet50"),
        ('{"architectures": ["BertModel"]}', "timm's format"),
        ("[1]", "timm's format"),
        ("{", "JSON"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / "config.json")


@pytest.mark.parametrize("license", ["MIT License", "", "-", "Apache 2.0", "my-own", "other"])
def test_licences_are_ids_of_the_hub(license, tmp_path):
    assert resolve_license("openrail++", None) == "openrail++"
    assert resolve_license(None, "dinov3-license") == resolve_license("dinov3-license", "dinov3-license")
    with pytest.raises(ValueError, match="license=") as error:
        resolve_license(license, None)
    assert license != "Apache 2.0" or "apache-2.0" in str(error.value)
    with pytest.raises(ValueError, match="licen[cs]e"):
        export_encoder(timm.create_model("fcmae_convnextv2_atto", **FCMAE), tmp_path / "out", license=license)
    assert not (tmp_path / "out").exists()
