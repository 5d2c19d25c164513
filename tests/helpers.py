"""What several tests share: places, comparison of nested state, programs in processes of their own."""

import atexit
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "train_scripts"
FORKS = Path(__file__).with_name("forks.py")
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


def environment(**more: str) -> dict[str, str]:
    """For programs that tests start: one thread, and this clone's package wherever they start."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


@functools.cache
def quick_python() -> str:
    """A `python` that starts programs with torch and timm in a moment: see `forks`.

    This one where that cannot be, or the environment has REAL_PYTHON.

    Not for what is tested in the start itself: what is imported, or read from the environment by an import.
    """
    if not hasattr(os, "pidfd_open") or os.environ.get("REAL_PYTHON"):
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="forks"))
    server = subprocess.Popen(
        [sys.executable, FORKS, "serve", folder / "socket"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(PYTHONPATH=""), start_new_session=True,
    )  # fmt: skip
    assert server.stdout and server.stdout.readline() == b"ready\n"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    start = shlex.join([sys.executable, "-I", "-S", str(FORKS), "run", str(folder / "socket")])
    (folder / "python").write_text(f'#!/bin/sh\nexec {start} "$@"\n')
    (folder / "python").chmod(0o755)
    return str(folder / "python")


def shell(text: str, folder: Path, timeout: float = 100) -> subprocess.CompletedProcess:
    """Runs what was printed, with `python` meaning this one."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "python").unlink(missing_ok=True)
    (folder / "bin" / "python").symlink_to(quick_python())
    text = text.replace(f"{sys.executable} ", "python ")  # where the environment is not activated
    env = environment(PATH=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return subprocess.run(text, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def torchrun(*arguments: object, processes: int = 2, timeout: float = 100) -> subprocess.CompletedProcess:
    """Runs a script or `-m module` in several processes on this machine."""
    start = [quick_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = environment(PYTHON_EXEC=quick_python())  # what torchrun starts the processes with
    return subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, env=env)
