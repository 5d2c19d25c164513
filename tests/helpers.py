"""What several tests share: folders, tar files, comparison of nested state, programs in their own processes."""

import atexit
import functools
import io
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "train_scripts"
RECIPES = ROOT / "timm_convnextv2" / "finetune" / "recipes"


def assert_same(a, b, where="", **tolerance) -> None:
    """Nested containers of tensors are equal, bit for bit where no tolerance is given."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}", **tolerance)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{i}", **tolerance)
    elif isinstance(a, torch.Tensor):
        assert torch.allclose(a, b, **tolerance) if tolerance else torch.equal(a, b), where
    else:
        assert a == b, where


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch '{self.path}'",))


def hub_cache(folder, cache, repo_id):
    """Puts a timm folder into a cache of huggingface_hub, as a download would have."""
    root, commit = cache / f"models--{repo_id.replace('/', '--')}", "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(commit)
    shutil.copytree(folder, root / "snapshots" / commit)


def environment(**more: str) -> dict[str, str]:
    """For programs that tests start: one thread, and this clone's package wherever they start."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def write_tar(path, files):
    """A tar file of `{name: bytes}`."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@functools.cache
def python() -> str:
    """An interpreter for programs that tests start; each run is a fork of one that has imported torch (`warm.py`)."""
    if sys.platform != "linux":
        return sys.executable
    folder, warm = Path(tempfile.mkdtemp(prefix="warm")), Path(__file__).with_name("warm.py")
    words = [sys.executable, str(warm), "serve", str(folder / "socket")]
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment())

    def end() -> None:
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder)

    atexit.register(end)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-S", "-E", str(warm), "run", words[-1]])} "$@"\n')
    path.chmod(0o755)
    return str(path)


def run_python(
    *words: object, timeout: float = 100, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess:
    """Runs `python WORDS...`; `more` are variables of its environment."""
    line = [python(), *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment(**more))


def shell(text: str, folder: Path, timeout: float = 100) -> subprocess.CompletedProcess:
    """Runs what was printed, with `python` meaning this one."""
    env = environment(PATH=f"{Path(python()).parent}{os.pathsep}{os.environ['PATH']}")
    return subprocess.run(text, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def torchrun(*words: object, processes: int = 2, timeout: float = 100) -> subprocess.CompletedProcess:
    """Runs a script or `-m module` in several processes on this machine."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return run_python(*start, *words, timeout=timeout, PYTHON_EXEC=python())
