"""The command publish, and continuing from what it writes: run folders and timm folders in, what would be sent out."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers import Runs
from huggingface_hub import ModelCard
from test_export import FCMAE, NC, config_of, equal, make_run

from timm_convnextv2.checkpoint import export_encoder, export_finetuned, load_checkpoint
from timm_convnextv2.commands import pretrain
from timm_convnextv2.commands.pretrain import parse_options
from timm_convnextv2.hub import push_to_hub
from timm_convnextv2.pretraining.start import create_model

SENT = ["README.md", "config.json", "model.safetensors"]
IMAGES = ["loss.png", "reconstructions.png"]


def fcmae_of(argv):
    """The options and the model that pretraining makes of a command line."""
    config, start = parse_options(argv)
    return config, create_model(config.network, config.crops, start=start)


@pytest.fixture
def pretrained(pretrained):
    """The folder of a pretraining run that kept a moving average."""
    return pretrained[0]


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def test_pretraining_run(pretrained, run_publish, tmp_path):
    """The encoder and the whole model, with licence, images, and code that names the repository."""
    before = names(pretrained), names(pretrained / "encoder")
    status, out, _ = run_publish(
        pretrained, "me/enc", "--license", "mit", "--dry-run", "--output", tmp_path / "enc", "--revision", "v1",
        "--dataset", "imagenet-1k", "--base-model", "you/base",
    )  # fmt: skip
    assert status == 0 and names(tmp_path / "enc") == sorted(SENT + IMAGES)
    assert str(tmp_path / "enc" / "README.md") in out and "bytes  model.safetensors" in out and "me/enc" in out
    text = (tmp_path / "enc/README.md").read_text()
    card = ModelCard(text).data
    assert (card.license, card.datasets, card.base_model) == ("mit", ["imagenet-1k"], "you/base")
    assert '"hf-hub:me/enc@v1"' in text and "path/to" not in text and "user/name" not in text
    assert "| Last training loss |" in text and all(f"({name})" in text for name in IMAGES)
    assert config_of(tmp_path / "enc")["pretrained_cfg"]["license"] == "mit"
    weights = load_checkpoint(pretrained / "last.pth.tar")["state_dict_ema"]
    sent = safetensors.torch.load_file(tmp_path / "enc/model.safetensors")
    assert equal(sent, {k[8:]: v for k, v in weights.items() if k.startswith("encoder.")})

    status, _, err = run_publish(
        pretrained, "me/all", "--part", "fcmae", "--license", "mit", "--dry-run", "--output", tmp_path / "all",
        "--dataset", "imagenet-1k",
    )  # fmt: skip
    assert status == 0, err
    assert names(tmp_path / "all") == sorted(SENT + IMAGES)
    assert equal(safetensors.torch.load_file(tmp_path / "all/model.safetensors"), weights)
    text = (tmp_path / "all/README.md").read_text()
    assert ModelCard(text).data.datasets == ["imagenet-1k"] and "| Last training loss |" in text
    model = timm.create_model(f"local-dir:{tmp_path / 'all'}", pretrained=True)
    assert equal(model.state_dict(), weights) and model.img_size == (32, 32) and model.stride == 8
    assert before == (names(pretrained), names(pretrained / "encoder"))
    for file in (tmp_path / "enc/model.safetensors", tmp_path / "all/model.safetensors"):  # not shared with the run
        assert not file.is_symlink() and file.stat().st_nlink == 1


def test_default_output_and_again(pretrained, run_publish):
    """Beside FOLDER; a second dry run replaces the first; a folder with anything else in it is left alone."""
    target = pretrained.with_name("pretrained-publish")
    for license in ("mit", "apache-2.0"):
        status, out, _ = run_publish(pretrained, "me/enc", "--license", license, "--dry-run")
        assert status == 0 and str(target) in out
        assert f"license: {license}" in (target / "README.md").read_text()
    (target / "notes.txt").write_text("mine")
    status, _, err = run_publish(pretrained, "me/enc", "--license", "mit", "--dry-run")
    assert status == 2 and "pretrained-publish' is not empty" in err
    assert "license: apache-2.0" in (target / "README.md").read_text()
    (target / "notes.txt").unlink()
    status, _, err = run_publish(target, "me/enc", "--dry-run", "--output", pretrained / "encoder")
    assert status == 2 and "encoder' is not empty" in err  # never a model of the user


def test_a_published_base_model_binds_the_licence(pretrained, run_publish, tmp_path):
    options = ("--base-model", "timm/convnextv2_atto.fcmae", "--dry-run", "--output", str(tmp_path / "out"))
    status, _, err = run_publish(pretrained, "me/enc", "--license", "mit", *options)
    assert status == 2 and "cc-by-nc-4.0" in err
    assert run_publish(pretrained, "me/enc", *options)[0] == 0
    assert "license: cc-by-nc-4.0" in (tmp_path / "out/README.md").read_text()


def test_pretraining_goes_on_from_what_was_published(pretrained, run_publish, capsys, caplog, tmp_path):
    """Options, normalisation and licence come from the folder; weights from its file; differing shapes are refused."""
    fcmae = tmp_path / "fcmae"
    assert run_publish(pretrained, "a/b", "--part", "fcmae", "--license", "mit", "--dry-run", "--output", fcmae)[0] == 0
    common = ["--epochs", "1", "--num-images", "8", "--batch-size", "4", "--output", str(tmp_path)]
    common += ["--model", f"local-dir:{fcmae}"]
    config, model = fcmae_of([*common, "--pretrained"])
    crops, network = config.crops, config.network
    assert (crops.img_size, network.patch_size, network.decoder_dim, crops.in_chans) == (32, 1, 8, 3)
    assert equal(model.state_dict(), safetensors.torch.load_file(fcmae / "model.safetensors"))

    assert pretrain.main([*common, "--pretrained", "--dry-run"]) == 0
    assert pretrain.main([*common, "--pretrained", "--experiment", "again", "--lr", "0"]) == 0
    assert "decoder" not in caplog.text
    last = load_checkpoint(tmp_path / "again/last.pth.tar")["state_dict"]
    assert equal(last, model.state_dict())  # with lr 0 nothing moves
    config = config_of(tmp_path / "again/encoder")
    assert config["pretrained_cfg"]["license"] == config["training"]["inherited_license"] == "mit"
    assert config["training"]["table"]["Started from"] == "fcmae"
    status, _, err = run_publish(tmp_path / "again", "a/b", "--license", "bsd-3-clause", "--dry-run")
    assert status == 2 and "under mit" in err
    assert run_publish(tmp_path / "again", "a/b", "--part", "fcmae", "--dry-run")[0] == 0  # mit, without asking

    _, again = fcmae_of([*common, "--pretrained", "--img-size", "64"])
    assert again.img_size == (64, 64)
    for options, message in (
        ([], "add --pretrained"),
        (["--pretrained", "--decoder-dim", "16"], "decoder_dim=8 in the file, 16 requested"),
        (["--pretrained", "--patch-size", "4", "--img-size", "64"], "patch_size=1 in the file, 4 requested"),
        (["--pretrained", "--license", "apache-2.0"], "under mit"),
        (["--pretrained", "--model", f"local-dir:{tmp_path}"], "no config.json"),
        (["--pretrained", "--model", "hf-hub:nobody/nothing"], "nobody/nothing.*config.json"),
    ):
        assert pretrain.main([*common, "--experiment", "bad", *options]) == 2
        err = capsys.readouterr().err
        assert err.startswith("timm-convnextv2 pretrain: error:") and "Traceback" not in err
        assert re.search(message, err), err
    assert not (tmp_path / "bad").exists()


def test_finetuning_run(run_publish, tmp_path):
    """The best checkpoint, or RUN/model where it is newer; metrics in the card; no licence without being told."""
    run, best = make_run(tmp_path / "run")
    status, _, err = run_publish(run, "me/pets", "--dry-run")
    assert status == 2 and err.startswith("timm-convnextv2 publish: error: Nothing states the licence")
    assert "--license" in err
    assert not (tmp_path / "run-publish").exists()
    out = tmp_path / "out"
    assert run_publish(run, "me/pets", "--license", "mit", "--dry-run", "--output", out)[0] == 0
    assert names(out) == SENT
    assert equal(safetensors.torch.load_file(out / "model.safetensors"), best["state_dict_ema"])
    card = (out / "README.md").read_text()
    assert "Top-1 accuracy (%) | 60.0" in card and "hf-hub:me/pets" in card and "license: mit" in card

    export_finetuned(run, run / "model", ema=False, info={"Recipe": "smoke"})
    assert run_publish(run, "me/pets", "--license", "mit", "--dry-run", "--output", out)[0] == 0
    assert equal(safetensors.torch.load_file(out / "model.safetensors"), best["state_dict"])
    assert "| Recipe | smoke |" in (out / "README.md").read_text()
    os.utime(run / "model/config.json", (1, 1))
    assert run_publish(run, "me/pets", "--license", "mit", "--dry-run", "--output", out)[0] == 0
    assert equal(safetensors.torch.load_file(out / "model.safetensors"), best["state_dict_ema"])


def test_derived_weights_keep_their_licence(run_publish, tmp_path):
    model = timm.create_model("fcmae_convnextv2_atto", **FCMAE)
    model.encoder.pretrained_cfg["license"] = NC  # as a model that started from the published weights has it
    folder = export_encoder(model, tmp_path / "encoder")
    run, _ = make_run(tmp_path / "run", f"local-dir:{folder}", pretrained=True, model_kwargs={})
    for source in (folder, run):
        status, _, err = run_publish(source, "me/x", "--license", "mit", "--dry-run")
        assert status == 2 and f"{NC}" in err
        assert run_publish(source, "me/x", "--dry-run", "--output", tmp_path / "out")[0] == 0
        assert f"license: {NC}" in (tmp_path / "out/README.md").read_text()
    # a folder of timm's own save_for_hf, whose card would say apache-2.0
    timm.models.save_for_hf(model.encoder, tmp_path / "hand", safe_serialization=True)
    (tmp_path / "hand/README.md").write_text("---\nlicense: apache-2.0\n---\n# mine\n")
    status, _, err = run_publish(tmp_path / "hand", "me/x", "--dry-run")
    assert status == 2 and "apache-2.0" in err and NC in err


def test_a_card_edited_by_hand_stays(run_publish, tmp_path):
    folder = export_encoder(timm.create_model("fcmae_convnextv2_atto", **FCMAE), tmp_path / "encoder")
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text + "\nPhotographs of my cats.\n")
    status, out, _ = run_publish(
        folder, "me/cats", "--license", "mit", "--dataset", "me/photos", "--dry-run", "--output", tmp_path / "out"
    )
    assert status == 0 and "edited by hand" in out
    sent = (tmp_path / "out/README.md").read_text()
    assert "Photographs of my cats." in sent and "hf-hub:me/cats" in sent
    assert (ModelCard(sent).data.license, ModelCard(sent).data.datasets) == ("mit", ["me/photos"])


def _change_config(folder, change):
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def _weights(folder):
    """Copies: the tensors of load_file are the file itself, which is overwritten."""
    return {k: v.clone() for k, v in safetensors.torch.load_file(folder / "model.safetensors").items()}


def _change_weights(folder, change):
    weights = _weights(folder)
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def _replace_in(path, old, new):
    path.write_text(path.read_text().replace(old, new))


SPOILED = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "foreign config": (lambda f: (f / "config.json").write_text('{"architectures": ["BertModel"]}'), "config.json'"),
    "other size": (
        lambda f: _change_config(f, lambda c: c.update(architecture="convnextv2_tiny", model_args={})),
        "model.safetensors'",
    ),
    "unknown option": (lambda f: _change_config(f, lambda c: c["model_args"].update(nonsense=1)), "config.json'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "half of the weights": (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors'"),
    "one tensor short": (
        lambda f: _change_weights(f, lambda w: w.pop("stem.0.bias")),
        r"1 differ.*'\S+' is missing",
    ),
    "a pickle beside": (
        lambda f: torch.save({"x": Runs(f.parent / "executed")}, f / "pytorch_model.bin"),
        "pytorch_model.bin",
    ),
    "a pickle instead": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin"),
    "a pickle named safetensors": (lambda f: torch.save(_weights(f), f / "model.safetensors"), "model.safetensors'"),
    "not a number": (lambda f: _change_weights(f, lambda w: w["stem.0.bias"].fill_(np.nan)), "'stem.0.bias'.*finite"),
    "infinite": (lambda f: _change_weights(f, lambda w: w["stem.0.bias"].fill_(np.inf)), "'stem.0.bias'.*finite"),
    "a card that is no YAML": (lambda f: _replace_in(f / "README.md", "tags:\n-", "tags: [timm\n-"), "README.md"),
    "another licence in the card": (
        lambda f: _replace_in(f / "README.md", "license: mit", "license: apache-2.0"),
        "README.md'.*apache-2.0.*mit",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_no_export_is_not_sent(how, run_publish, monkeypatch, tmp_path):
    """The same message from the command and `push_to_hub`, without a request (there is a token, and no network)."""
    monkeypatch.setattr("timm_convnextv2.hub.upload.HfApi", None)
    folder = export_encoder(timm.create_model("fcmae_convnextv2_atto", **FCMAE), tmp_path / "encoder", license="mit")
    spoil, message = SPOILED[how]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        push_to_hub(folder, "me/x", token="hf_x")
    status, _, err = run_publish(folder, "me/x", "--license", "mit", "--dry-run")
    assert status == 2 and err.startswith("timm-convnextv2 publish: error:") and "Traceback" not in err
    assert not (tmp_path / "encoder-publish").exists() and not (tmp_path / "executed").exists()


def test_code_in_a_checkpoint_is_refused_by_name(pretrained, run_publish, tmp_path):
    run, _ = make_run(tmp_path / "run", epochs=1)
    content = load_checkpoint(run / "model_best.pth.tar")
    torch.save({**content, "x": Runs(tmp_path / "executed")}, run / "model_best.pth.tar")
    status, _, err = run_publish(run, "me/x", "--license", "mit", "--dry-run")
    assert status == 2 and "model_best.pth.tar" in err and "system" in err and "not executed" in err
    whole = tmp_path / "whole"
    (whole / "encoder").mkdir(parents=True)
    torch.save({**content, "x": Runs(tmp_path / "executed")}, whole / "last.pth.tar")
    (whole / "encoder/config.json").write_text((pretrained / "encoder/config.json").read_text())
    status, _, err = run_publish(whole, "me/x", "--part", "fcmae", "--license", "mit", "--dry-run")
    assert status == 2 and "last.pth.tar" in err and "system" in err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/absent", "me/x"], "absent' does not exist"),
        (["{tmp}/file", "me/x"], "file' is not a folder"),
        (["{tmp}/empty", "me/x"], "nothing to publish"),
        (["{run}", "me/x", "--part", "head"], "--part"),
        (["{run}", "me/x/y", "--license", "mit"], "REPO 'me/x/y'"),
        (["{run}", "me/x", "--license", "mit", "--base-model", "../x"], "--base-model '../x'"),
        (["{run}", "me/x", "--license", "My Own"], "not the id of a licence"),
        (["{run}", "me/x", "--license", "mit", "--output", "{tmp}/o"], "--output is for --dry-run"),
        (["{run}/encoder", "me/x", "--license", "mit", "--part", "fcmae"], "no decoder"),
        (["{run}", "me/x", "--license", "mit"], "HF_HUB_OFFLINE"),
        (["{run}"], "REPO"),
    ],
)
def test_mistakes_are_one_message(arguments, message, pretrained, run_publish, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    status, _, err = run_publish(*(a.format(tmp=tmp_path, run=pretrained) for a in arguments))
    assert status == 2 and err.startswith("timm-convnextv2 publish: error:") and message in err
    assert err.count("error:") == 1 and "Traceback" not in err
    assert names(tmp_path) == ["empty", "file"]


def test_run_folders_are_not_timm_folders(pretrained):
    for folder, message in ((pretrained, "encoder/"), (pretrained / "absent", "absent' ")):
        with pytest.raises(ValueError, match=message):
            push_to_hub(folder, "me/x", token="hf_x")
