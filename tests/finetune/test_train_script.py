"""Finding, downloading, verifying and importing timm's train.py."""

import hashlib
import os
import re
import socket
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch

from timm_convnextv2.commands import finetune as launcher
from timm_convnextv2.commands.finetune import main
from timm_convnextv2.finetune import train_script


@pytest.fixture
def server():
    """A loopback HTTP server; `answers` maps paths to (status, body, bytes sent of it, seconds before)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            status, body, sent, delay = server.answers.get(self.path, (404, b"", None, 0))
            time.sleep(delay)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body[:sent])
            except OSError:  # the client left
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.answers, server.requests = {}, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}/timm"
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("TIMM_TRAIN", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(train_script, "SHA256", {})
    return tmp_path / "hub" / "timm_convnextv2" / f"train-{timm.__version__}.py"


PAGE = f"/timm/v{timm.__version__}/train.py"


@pytest.fixture
def pinned(cache, stand_in, monkeypatch):
    """The digest of the stand-in, pinned for the installed timm."""
    digest = hashlib.sha256(stand_in.encode()).hexdigest()
    monkeypatch.setitem(train_script.SHA256, timm.__version__, digest)
    return digest


def test_order_of_the_places(tmp_path, monkeypatch, server, cache, pinned, stand_in):
    server.answers[PAGE] = (200, stand_in.encode(), None, 0)
    assert train_script.find_train_script(base_url=server.url) == cache

    clone = tmp_path / "clone"
    (clone / "timm").mkdir(parents=True)
    monkeypatch.setattr(timm, "__file__", str(clone / "timm" / "__init__.py"))
    (clone / "train.py").write_text("print('of another project')\n")
    assert train_script.find_train_script(base_url=server.url) == cache
    (clone / "train.py").write_text(stand_in)
    assert train_script.find_train_script(base_url=server.url) == clone / "train.py"

    for name in ("variable", "option"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text(stand_in)
    monkeypatch.setenv("TIMM_TRAIN", str(tmp_path / "variable" / "train.py"))
    assert train_script.find_train_script(base_url=server.url) == tmp_path / "variable" / "train.py"
    option = str(tmp_path / "option")  # a clone's folder
    assert train_script.find_train_script(option, base_url=server.url) == tmp_path / "option" / "train.py"


def test_download_is_cached(server, cache, pinned, stand_in):
    server.answers[PAGE] = (200, stand_in.encode(), None, 0)
    for _ in range(2):
        assert train_script.download_train_script(timm.__version__, base_url=server.url) == cache
    assert server.requests == [PAGE] and cache.read_text() == stand_in and list(cache.parent.iterdir()) == [cache]
    assert train_script.script_version(cache) == timm.__version__
    cache.write_text(stand_in[:2000])  # a cache that something cut off is no train.py
    train_script.download_train_script(timm.__version__, base_url=server.url)
    assert cache.read_text() == stand_in


DOWNLOADS = {
    "not there": lambda source: (404, b"", None, 0),
    "server error": lambda source: (503, b"busy", None, 0),
    "cut off by the connection": lambda source: (200, source, 3000, 0),
    "cut off in a line": lambda source: (200, source[: source.index(b'"data"') + 3], None, 0),
    "cut off between lines": lambda source: (200, source[: source.index(b"\n\nif __name__")], None, 0),
    "a login page": lambda source: (200, b"<html>please log in</html>", None, 0),
    "not text": lambda source: (200, bytes(range(256)), None, 0),
    "slow": lambda source: (200, source, None, 1.5),
}


@pytest.mark.parametrize("case", DOWNLOADS)
def test_bad_download_is_refused_with_three_ways(server, cache, pinned, stand_in, case):
    server.answers[PAGE] = DOWNLOADS[case](stand_in.encode())
    with pytest.raises(ValueError) as e:
        train_script.download_train_script(timm.__version__, base_url=server.url, timeout=0.5)
    message = str(e.value)
    assert f"{server.url}/v{timm.__version__}/train.py" in message and "\n" not in message
    assert all(way in message for way in ("--timm-train", "TIMM_TRAIN=", "pip install -e", str(cache)))
    assert not cache.exists() and not list(cache.parent.glob("*"))


def test_no_network(refused, cache, monkeypatch):
    monkeypatch.delenv("TIMM_TRAIN", raising=False)
    with socket.socket() as taken:  # bound and not listening: refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(launcher, "find_train_script", partial(train_script.find_train_script, base_url=url))
        assert "refused" in refused()


def altered(source):
    """Still a whole train.py."""
    return source.replace("def main():", "def main():\n    raise SystemExit('of somebody else')")


def test_download_with_another_digest_is_refused_and_removed(server, cache, pinned, stand_in):
    server.answers[PAGE] = (200, altered(stand_in).encode(), None, 0)
    with pytest.raises(ValueError, match="refused and removed") as e:
        train_script.find_train_script(base_url=server.url)
    came = hashlib.sha256(altered(stand_in).encode()).hexdigest()
    assert all(word in str(e.value) for word in (str(cache), came, pinned, "--timm-train")) and "\n" not in str(e.value)
    assert not list(cache.parent.iterdir())


@pytest.mark.parametrize("local_rank", [0, 1])
def test_cached_file_is_verified_at_each_use(server, cache, pinned, stand_in, monkeypatch, local_rank):
    server.answers[PAGE] = (200, stand_in.encode(), None, 0)
    assert train_script.find_train_script(base_url=server.url) == cache
    cache.write_text(altered(stand_in))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(ValueError, match="refused and removed"):
        train_script.find_train_script(base_url=server.url)
    assert cache.exists() == (local_rank == 1)  # one process removes it
    monkeypatch.delenv("LOCAL_RANK")
    cache.unlink(missing_ok=True)
    assert train_script.find_train_script(base_url=server.url) == cache
    assert cache.read_text() == stand_in and server.requests == [PAGE, PAGE]


def test_download_without_a_digest_is_not_run_unasked(command, cache, server, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TIMM_TRAIN", raising=False)
    server.answers[PAGE] = (200, stand_in.encode(), None, 0)
    find = partial(train_script.find_train_script, base_url=server.url)
    monkeypatch.setattr(launcher, "find_train_script", find)
    monkeypatch.delitem(sys.modules, "timm_train_script", raising=False)
    for _ in range(2):
        assert main(command()) == 2
        message = capsys.readouterr().err
        assert "no digest is pinned" in message and message.count("\n") == 1
        assert hashlib.sha256(stand_in.encode()).hexdigest() in message and f"timm {timm.__version__}" in message
    assert server.requests == [PAGE] and cache.read_text() == stand_in
    assert "timm_train_script" not in sys.modules and not (tmp_path / "out").exists()
    words = re.search(r"--timm-train \S+", message)[0].split()
    assert main(command(*words)) == 0 and (tmp_path / "out" / "x" / "seen.json").exists()


def test_only_the_first_process_of_a_node_downloads(server, cache, pinned, stand_in, monkeypatch):
    server.answers[PAGE] = (200, stand_in.encode(), None, 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="the first process of this node did not get it"):
        train_script.download_train_script(timm.__version__, base_url=server.url, timeout=0.1)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(train_script.download_train_script(timm.__version__, base_url=server.url))
    )
    thread.start()
    time.sleep(0.2)
    assert not server.requests
    cache.parent.mkdir(parents=True)
    cache.write_text(stand_in[:2000])  # of an earlier run that was cut off
    time.sleep(0.3)
    assert not found
    (cache.parent / "part").write_text(stand_in)
    os.replace(cache.parent / "part", cache)
    thread.join(10)
    assert found == [cache]


@pytest.mark.parametrize("kind", ["--timm-train", "TIMM_TRAIN"])
def test_path_that_is_not_there(refused, monkeypatch, tmp_path, kind):
    if kind == "TIMM_TRAIN":
        monkeypatch.setenv(kind, str(tmp_path / "nowhere.py"))
        assert f"{kind} is {tmp_path / 'nowhere.py'}" in refused()
    else:
        assert f"{kind} is {tmp_path / 'nowhere.py'}" in refused(kind, str(tmp_path / "nowhere.py"))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: "x = 1\n", "it has no main"),
        (lambda s: s[:3000], "is not Python"),
        (lambda s: s.replace("import yaml", "from timm.task import NoSuchTask"), "does not go with the installed timm"),
        (lambda s: s.replace('"--device-modules"', '"--other-modules"'), "too old"),
        (lambda s: s.replace('("smoothing", float, 0.1),', ""), "'smoothing'"),
    ],
)
def test_script_that_cannot_be_used(refused, train, stand_in, change, words):
    train.write_text(change(stand_in))
    message = refused()
    assert words in message and str(train) in message


@pytest.mark.parametrize("version", ["0.0.1", timm.__version__])
def test_version_of_the_script(run, train, capsys, version):
    (train.parent / "timm").mkdir()
    (train.parent / "timm" / "version.py").write_text(f"__version__ = '{version}'\n")
    run()
    out, err = capsys.readouterr()
    assert f"timm {version}" in out
    assert ("is of timm 0.0.1" in err) == (version == "0.0.1")


def test_processes_on_cpu(command, train, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command("--dry-run")) == 0
    task = sys.modules["timm_train_script"].ClassificationTask()
    assert task.prepare_distributed(device_ids=[torch.device("cpu")], broadcast_buffers=False) == (
        None,
        dict(broadcast_buffers=False),
    )
    train.write_text(stand_in.replace("class ClassificationTask", "class Other"))
    assert main(command("--dry-run")) == 2
    assert "several processes on CPU" in capsys.readouterr().err
