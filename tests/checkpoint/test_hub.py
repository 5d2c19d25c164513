"""Traffic with the Hugging Face Hub, against a server on loopback: publish, download, cache, and what goes wrong.

What huggingface_hub does by itself is tested where our users rely on it; the rest is `push_to_hub`, `build_model` and
`publish`.
"""

import itertools
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from hub_server import HubServer, card_metadata
from huggingface_hub import constants, file_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import _http

import timm_convnextv2
from timm_convnextv2 import checkpoint
from timm_convnextv2.commands import pretrain, publish
from timm_convnextv2.commands.main import main
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.hub import push_to_hub, upload

# huggingface_hub calls its HTTP library in a way that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), patch_size=1)
TINY_FCMAE = dict(TINY, decoder_dim=16, img_size=32)
REPO = "owner/model"
WEIGHTS, LFS = "model.safetensors", "/storage/"  # the file, and where its content travels
FOREVER = math.inf


class Clock:
    """`time` without waiting: what huggingface_hub would have slept is added up instead."""

    def __init__(self):
        self.waited = 0.0

    def sleep(self, seconds):
        self.waited += seconds

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running server that this process takes for the Hub, logged in as the owner of `owner/*`, with an empty cache.

    conftest.py keeps all tests offline by an environment variable, which huggingface_hub has read when it was imported.
    """
    with HubServer() as server:
        values = dict(
            ENDPOINT=server.endpoint,
            HUGGINGFACE_CO_URL_TEMPLATE=server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            HF_HUB_OFFLINE=False,
            HF_HUB_CACHE=str(tmp_path / "cache"),
            HF_TOKEN_PATH=str(tmp_path / "token"),
            HF_HUB_DISABLE_XET=True,
            HF_HUB_DISABLE_TELEMETRY=True,
            HF_HUB_ETAG_TIMEOUT=0.1,
            HF_HUB_DOWNLOAD_TIMEOUT=0.1,
            DOWNLOAD_CHUNK_SIZE=1000,  # 10 MB: an interrupted download goes on from the last full chunk
        )
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.1)
        monkeypatch.setattr(upload, "_SILENCE", 0.1)
        server.clock = Clock()
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", server.clock)
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        _http.close_session()
        yield server
        _http.close_session()
    unknown = [f"{r.method} {r.path}" for r in server.requests if r.status == 501]
    assert not unknown, f"tests/hub_server.py does not know these requests: {unknown}"


@pytest.fixture(scope="module")
def fcmae():
    """A small FCMAE, no two of whose values are the same."""
    torch.manual_seed(1)
    model = timm.create_model("fcmae_convnextv2_atto", **TINY_FCMAE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def exported(fcmae, tmp_path_factory):
    """Its two timm folders, as {path: content}."""
    root = tmp_path_factory.mktemp("exported")
    folders = {
        "encoder": checkpoint.export_encoder(fcmae, root / "encoder", license="mit"),
        "fcmae": checkpoint.export_fcmae(fcmae, root / "fcmae", license="mit"),
    }
    return {name: files_of(folder) for name, folder in folders.items()}


@pytest.fixture
def folder(exported, tmp_path):
    """An exported encoder on the disk."""
    path = tmp_path / "folder"
    path.mkdir()
    for name, content in exported["encoder"].items():
        (path / name).write_bytes(content)
    return path


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def published(server, repo_id=REPO, revision="main"):
    """What a repository has besides what the Hub put there."""
    return {k: v for k, v in server.files(repo_id, revision).items() if k != ".gitattributes"}


def assert_published(server, folder, revision="main", **more):
    """A revision has the folder's files (and `more`); the card's code loads from the Hub instead of a folder."""
    expected, arrived = files_of(folder), published(server, REPO, revision)
    card, sent = arrived.pop("README.md").decode(), expected.pop("README.md").decode()
    assert arrived == {**expected, **more}
    assert card_metadata(card) == card_metadata(sent)
    assert f"hf-hub:{REPO}" + (f"@{revision}" if revision != "main" else "") in card
    assert "local-dir:" not in card


def cached():
    """Files of the cache that a user of it could find, by name."""
    return sorted(p.name for p in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/*"))


def assert_same(state_dict, content):
    """Values equal those of a safetensors file, exactly."""
    expected = safetensors.torch.load(content)
    assert state_dict.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state_dict[name], value), name


def shift(content, by=1.0):
    """A safetensors file with other values."""
    return safetensors.torch.save({k: v + by for k, v in safetensors.torch.load(content).items()}, {"format": "pt"})


def load_encoder(repo_id=REPO, **kwargs):
    return timm.create_model(f"hf-hub:{repo_id}", pretrained=True, **kwargs)


def load_fcmae(repo_id=REPO):
    overlay = dict(hf_hub_id=repo_id)
    return timm.create_model("fcmae_convnextv2_atto", pretrained=True, pretrained_cfg_overlay=overlay, **TINY_FCMAE)


# -- publishing


@pytest.mark.parametrize("private", [None, False, True])
def test_push_makes_a_repository_with_the_folder(hub, folder, private):
    url = push_to_hub(folder, REPO, private=private, commit_message="Four epochs more")
    repo = hub.repos[REPO]
    assert repo.private is bool(private)
    assert_published(hub, folder)
    (commit,) = hub.commits(REPO)
    assert url == f"{hub.endpoint}/{REPO}/commit/{commit.oid}"
    assert commit.message == "Four epochs more"
    assert [path for path, file in commit.files.items() if file.lfs] == [WEIGHTS]


def test_push_to_a_branch_leaves_main_alone(hub, folder):
    for more in ("", "\nMore.\n"):
        (folder / "README.md").write_text((folder / "README.md").read_text() + more)
        url = push_to_hub(folder, REPO, revision="runs/a")
        assert_published(hub, folder, "runs/a")
    assert published(hub) == {} and len(hub.commits(REPO, "runs/a")) == 2
    assert url.endswith(hub.commits(REPO, "runs/a")[-1].oid)


@pytest.mark.parametrize("private", [True, False])
def test_push_to_a_repository_of_the_other_visibility(hub, folder, private):
    hub.add(REPO, {"notes.md": b"mine"}, private=not private)
    with pytest.raises(ValueError, match=REPO):
        push_to_hub(folder, REPO, private=private)
    assert published(hub) == {"notes.md": b"mine"}
    assert not hub.log("PUT")
    push_to_hub(folder, REPO)  # not said: as it is
    assert hub.repos[REPO].private is not private
    assert_published(hub, folder, **{"notes.md": b"mine"})  # and what only the repository has stays


@pytest.mark.parametrize("kind", ["encoder", "fcmae"])
def test_model_card_arrives_and_the_hub_accepts_it(hub, exported, tmp_path, kind):
    for name, content in exported[kind].items():
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / name).write_bytes(content)
    push_to_hub(tmp_path / kind, REPO)
    assert {r.status for r in hub.log("POST", "validate-yaml")} == {200}
    metadata = card_metadata(published(hub)["README.md"].decode())
    assert metadata["library_name"] == "timm"
    assert metadata["license"] == "mit"
    card = huggingface_hub.model_info(REPO).card_data  # as the site reads it
    assert card.license == "mit"
    assert "timm" in card.tags


@pytest.mark.parametrize(
    "token, repo_id", [(None, REPO), ("hf_wrong", REPO), ("hf_reader", REPO), ("hf_owner", "elsewhere/model")]
)
def test_push_that_is_not_allowed(hub, folder, token, repo_id, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RuntimeError, match=re.escape(repo_id)) as error:
        push_to_hub(folder, repo_id, token=token)
    assert "token" in str(error.value)
    assert not hub.repos
    assert not hub.log("PUT")
    assert not token or token not in str(error.value)


def test_push_with_a_token_that_is_given(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    push_to_hub(folder, REPO, token="hf_owner")
    assert {r.headers["authorization"] for r in hub.requests if r.server == "hub"} == {"Bearer hf_owner"}
    assert not any("authorization" in r.headers for r in hub.requests if r.server == "storage")


PUSHING = {  # every step of a push, and a word of the message
    "create": ("POST", "repos/create"), "branch": ("POST", "/branch/"), "card": ("POST", "validate-yaml"),
    "preupload": ("POST", "/preupload/"), "batch": ("POST", "/objects/batch"), "upload": ("PUT", LFS),
    "verify": ("POST", "/objects/verify"), "commit": ("POST", "/commit/"),
}  # fmt: skip


@pytest.mark.parametrize(
    "step, how", [*itertools.product(PUSHING, (500, 403, "cut", "silent", "lost")), ("commit", 401), ("commit", 404)]
)
def test_push_gives_up_when_a_fault_goes_on(hub, folder, step, how):
    """One message with the cause; nothing is published by halves; the same call again succeeds, with one commit."""
    words = {"cut": (hub.cut, 20), "silent": (hub.fall_silent, 0.2), "lost": (hub.lose_answer,)}
    fault, *more = words.get(how, (hub.fail, how))
    fault(*PUSHING[step], *more, times=FOREVER)
    with pytest.raises(RuntimeError, match=f"{REPO}.*{how if isinstance(how, int) else 'call again'}") as error:
        push_to_hub(folder, REPO, revision="v1")
    assert "\n" not in str(error.value) and "signature=" not in str(error.value)
    assert how not in (401, 403) or "token" in str(error.value)
    assert hub.clock.waited < 120
    done = step == "commit" and how == "lost"  # what is there is whole
    if REPO in hub.repos and not done:
        assert all(not published(hub, revision=branch) for branch in hub.repos[REPO].branches)
    hub.heal()
    push_to_hub(folder, REPO, revision="v1")
    assert_published(hub, folder, "v1")
    assert len(hub.commits(REPO, "v1")) == 1 and not published(hub)


# -- downloading


def test_whole_way_push_and_load(hub, folder, fcmae):
    push_to_hub(folder, REPO, private=True, revision="v1")
    push_to_hub(folder, "owner/other")
    for name in (f"{REPO}@v1", "owner/other"):
        assert_same(load_encoder(name).state_dict(), files_of(folder)[WEIGHTS])
    assert all(
        torch.equal(v, fcmae.encoder.state_dict()[k]) for k, v in load_encoder(f"{REPO}@v1").state_dict().items()
    )


def test_revisions_are_kept_apart(hub, exported):
    files = exported["fcmae"]
    changed = {WEIGHTS: shift(files[WEIGHTS])}
    hub.add(REPO, files)
    hub.add(REPO, changed, branch="v2/more")
    assert_same(load_fcmae(f"{REPO}@v2/more").state_dict(), changed[WEIGHTS])
    for model in (load_fcmae(), load_encoder()):  # by an overlay, and by the repository's own config.json
        assert isinstance(model, timm_convnextv2.FCMAE) and model.img_size == (32, 32)
        assert_same(model.state_dict(), files[WEIGHTS])


# -- who may not, and what is not there


@pytest.mark.parametrize(
    "access, token, status",
    [
        ("private", None, 401),
        ("private", "hf_stranger", 404),
        ("gated", "hf_stranger", 403),
        ("public", "hf_wrong", 401),
    ],
)
def test_model_that_one_may_not_read(hub, exported, access, token, status, monkeypatch):
    hub.add(REPO, exported["fcmae"], **({} if access == "public" else {access: True}))
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(RuntimeError, match=f"'{REPO}'.*{status}.*HF_TOKEN"):
        load_fcmae()
    assert not cached()
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    assert_same(load_fcmae().state_dict(), exported["fcmae"][WEIGHTS])


def test_what_is_not_there(hub, exported):
    hub.add(REPO, exported["fcmae"])
    with pytest.raises(RuntimeError, match="'owner/absent'.*404.*HF_TOKEN"):
        load_fcmae("owner/absent")
    with pytest.raises(RuntimeError, match=f"'{REPO}@v9'.*404"):
        load_fcmae(f"{REPO}@v9")
    with pytest.raises(RepositoryNotFoundError, match="owner/absent"):
        load_encoder("owner/absent")
    hub.add("owner/empty", {"README.md": b"# Nothing yet"})
    with pytest.raises(RuntimeError, match="'owner/empty'.*404.*model.safetensors"):
        load_fcmae("owner/empty")
    assert hub.clock.waited == 0
    assert not cached()


# -- when the Hub or the line fails


@pytest.mark.parametrize("fault", ["hub", "storage", "cut", "stopped"])
def test_a_fault_that_goes_on_is_one_clear_error(hub, exported, fault):
    """And half a file is never taken for a whole one."""
    hub.add(REPO, exported["fcmae"])
    {
        "hub": lambda: hub.fail("HEAD", WEIGHTS, 503, times=FOREVER),
        "storage": lambda: hub.fail("GET", LFS, 503, times=FOREVER),
        "cut": lambda: (hub.cut("GET", LFS, after=5500), hub.cut("GET", LFS, after=0, times=FOREVER)),
        "stopped": hub.stop,
    }[fault]()
    with pytest.raises(RuntimeError, match=f"'{REPO}'") as error:
        load_fcmae()
    assert "signature=" not in str(error.value)  # a link to the content that works without a token
    assert ("HF_HOME" in str(error.value)) == (fault != "hub")
    assert hub.clock.waited < 120 and WEIGHTS not in cached()
    hub.heal()
    hub.start() if fault == "stopped" else None
    assert_same(load_fcmae().state_dict(), exported["fcmae"][WEIGHTS])


# -- every command that reads from the Hub


def full_disk(monkeypatch):
    """The cache's disk is full after a part of a file."""

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:100])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    get = file_download.http_get
    monkeypatch.setattr(file_download, "http_get", lambda url, file, **more: get(url, Full(file), **more))


READING = {  # a fault of the Hub, and the remedy
    "500": (lambda hub, env: hub.fail("HEAD", "", 500, times=FOREVER), "Try again later"),
    "storage 500": (lambda hub, env: hub.fail("GET", LFS, 500, times=FOREVER), "Try again later"),
    "invalid token": (lambda hub, env: env.setenv("HF_TOKEN", "hf_wrong"), "401.*token in HF_TOKEN"),
    "gated": (lambda hub, env: (setattr(hub.repos[REPO], "gated", True), env.setenv("HF_TOKEN", "hf_stranger")),
              "403.*gated repository"),
    "no repository": (lambda hub, env: env.setenv("HF_TOKEN", "hf_stranger"), "404.*Check the name"),
    "cut config": (lambda hub, env: hub.cut("GET", "config.json", after=10, times=FOREVER), "Try again later"),
    "cut weights": (lambda hub, env: hub.cut("GET", LFS, after=0, times=FOREVER), "Try again later"),
    "truncated weights": (lambda hub, env: hub.shorten("GET", LFS, 900, times=FOREVER), "size.*Try again later"),
    "silent": (lambda hub, env: hub.fall_silent("HEAD", "", 0.2, times=FOREVER), "Timeout.*Try again later"),
    "silent storage": (lambda hub, env: hub.fall_silent("GET", LFS, 0.2, times=FOREVER), "Timeout.*Try again later"),
    "page": (lambda hub, env: hub.show_page("HEAD", "", times=FOREVER), "Try again later"),
    "page for weights": (lambda hub, env: hub.show_page("GET", LFS, times=FOREVER), "size.*Try again later"),
    "full disk": (lambda hub, env: full_disk(env), "No space left.*set HF_HOME"),
    "down": (lambda hub, env: hub.stop(), "Connect.*Try again later"),
}  # fmt: skip
MODEL = ["--model", f"hf-hub:{REPO}", "--device", "cpu", "--workers", "0"]
TRAIN = ["--timm-train", Path(__file__).parents[1] / "finetune/stand_in_train.py", "--batch-size", 4]
READERS = {
    "pretrain": lambda data, out: [*MODEL, "--pretrained", "--data-dir", data / "train/images", "--output", out],
    "embed": lambda data, out: [*MODEL, "--data-dir", data / "train/images", "--output", out / "e.npy"],
    "detect train": lambda data, out: [*MODEL, "--data-dir", data, "--output", out],
    "segment predict": lambda data, out: [*MODEL, "--data-dir", data / "train/images", "--output", out],
    "finetune": lambda data, out: [
        *MODEL, "--recipe", "smoke", "--data-dir", data / "classes", "--output", out, *TRAIN],
    "compare": lambda data, out: [
        "--encoder", f"hf-hub:{REPO}", "--recipe", "smoke", "--data-dir", data / "classes", "--output", out,
        *TRAIN[:2]],
    "evaluate": lambda data, out: [f"hf-hub:{REPO}", "--data-dir", data / "classes", "--output", out],
}  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("labelled"), size=32, train=8, validation=8, coco=True)
    write_folder(root / "classes", size=32, train=16, validation=8)
    return root


def cases():
    """Every reader and fault; those that differ little from another are slow."""
    for reader, fault in itertools.product(READERS, READING):
        if reader in ("finetune", "compare") and ("storage" in fault or "weights" in fault):
            continue  # timm's script downloads the weights itself
        quick = reader == "embed" or fault in ("500", "cut weights", "full disk")
        yield pytest.param(reader, fault, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize("reader, fault", [*cases()])
def test_commands_say_in_one_message_what_went_wrong(
    hub, exported, labelled, capsys, monkeypatch, tmp_path, reader, fault
):
    """Exit status 2, no output, and nothing in the cache that is later taken for a whole file."""
    hub.add(REPO, exported["encoder"])
    hub.repos[REPO].private = fault != "gated"
    arrange, said = READING[fault]
    with monkeypatch.context() as patch:
        arrange(hub, patch)
        words = [*reader.split(), *READERS[reader](labelled, tmp_path / "runs")]
        assert main([str(word) for word in words]) == 2
    err = capsys.readouterr().err
    assert re.search(rf"^timm-convnextv2 {reader}: error: .*'{REPO}'.*{said}", err, re.MULTILINE), err
    assert err.count("error: ") == 1 and "Traceback" not in err and "signature=" not in err
    # compare keeps the links to its images and the log of the finetuning that failed
    left = {path.relative_to(tmp_path / "runs").parts[0] for path in tmp_path.glob("runs/**/*")}
    assert left == ({"data", "dry-run.log", ".lock"} & left if reader == "compare" else set())
    assert hub.clock.waited < 200
    hub.heal()
    hub.start() if fault == "down" else None
    assert_same(load_encoder().state_dict(), exported["encoder"][WEIGHTS])


# -- in a process of its own, with nothing but the environment


def environment(server, home):
    """What a user would set."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    return {
        **own,
        **{"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_owner", "NO_PROXY": "127.0.0.1"},
        **{"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    }


FROM_THE_ENVIRONMENT = """
import sys, timm
assert "timm_convnextv2" not in sys.modules
model = timm.create_model("hf-hub:owner/model@v1", pretrained=True, num_classes=3)
timm.models.save_for_hf(model, sys.argv[1], safe_serialization=True)

import timm_convnextv2
from timm_convnextv2.hub import push_to_hub
print(push_to_hub(sys.argv[1], "owner/finetuned", private=True, commit_message="From the environment"))
"""


def test_stock_timm_and_push_with_the_environment_alone(exported, tmp_path):
    with HubServer() as server:
        server.add(REPO, exported["encoder"], branch="v1", private=True)
        server.fail("HEAD", "", 503)
        command = [sys.executable, "-c", FROM_THE_ENVIRONMENT, str(tmp_path / "model")]
        env = environment(server, tmp_path / "home")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (commit,) = server.commits("owner/finetuned")
        assert done.stdout.split()[-1] == f"{server.endpoint}/owner/finetuned/commit/{commit.oid}"
        assert commit.message == "From the environment"
        assert server.repos["owner/finetuned"].private
        assert [r.status for r in server.log("HEAD", "config.json")] == [503, 200]
        expected = safetensors.torch.load(exported["encoder"][WEIGHTS])
        arrived = safetensors.torch.load(published(server, "owner/finetuned")[WEIGHTS])
        assert arrived.keys() - expected.keys() == {"head.fc.weight", "head.fc.bias"}
        assert all(torch.equal(arrived[name], value) for name, value in expected.items())
        assert (tmp_path / "home" / "hub").is_dir()


# -- the scripts, in this process


FAULTS = {  # a fault, by a part of the message
    "HF_TOKEN": lambda hub, env: env.delenv("HF_TOKEN"),
    "403": lambda hub, env: env.setenv("HF_TOKEN", "hf_stranger"),
    "503": lambda hub, env: hub.fail("POST", "/preupload/", 503, times=FOREVER),
    "network": lambda hub, env: hub.stop(),
}


@pytest.mark.parametrize("said", FAULTS)
def test_publish_says_in_one_message_what_went_wrong(hub, folder, capsys, monkeypatch, said):
    FAULTS[said](hub, monkeypatch)
    assert publish.main([str(folder), REPO]) == 2
    err = capsys.readouterr().err
    assert re.search(rf"^timm-convnextv2 publish: error: .*{REPO}.*{said}", err, re.MULTILINE), err
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", ["encoder", "fcmae"])
def test_pretraining_goes_on_from_the_hub(hub, exported, capsys, tmp_path, kind):
    hub.add(REPO, exported[kind], private=True, branch="v1")
    options = ["--model", f"hf-hub:{REPO}@v1", "--pretrained", "--device", "cpu", "--workers", "0"]
    assert pretrain.main([*options, "--output", str(tmp_path), "--dry-run"]) == 0, capsys.readouterr().err
    assert len(hub.log("GET", LFS)) == 1
    assert not any("/resolve/main/" in r.path for r in hub.requests)
