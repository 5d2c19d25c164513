"""timm's scripts, which are not part of timm's wheel: finding and importing them; train.py also by a download."""

import ast
import hashlib
import http.client
import importlib.util
import os
import re
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from timm.utils.distributed import world_info_from_env

TIMM_RAW = "https://raw.githubusercontent.com/huggingface/pytorch-image-models"
CACHE = "timm_convnextv2"  # folder in torch.hub's
# what a script has at its top level
NEEDED = {
    "train.py": ("main", "parser", "config_parser"),
    "validate.py": ("main", "parser", "create_loader"),
    "inference.py": ("main", "parser", "create_loader"),
}

# sha256 of train.py by timm's version; only a file that is listed here is run without being asked for.
# To add one, look at the file at timm's tag, then: "1.0.31": "<first word that `sha256sum train.py` prints>",
SHA256: dict[str, str] = {}


def script_url(version: str, base_url: str = TIMM_RAW, name: str = "train.py") -> str:
    """Where a script of a timm version is published."""
    return f"{base_url}/v{version}/{name}"


def matching_script(name: str = "train.py") -> str:
    """The remedy where a script does not suit the installed timm."""
    version = timm.__version__
    return f"Give the {name} of timm {version} with --timm-train: {script_url(version, name=name)}"


def check_source(source: str, name: str = "train.py") -> str:
    """Why a text is not timm's script of that name, whole; empty if it is."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as e:
        return f"it is not Python ({e})"
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    missing = [needed for needed in NEEDED[name] if needed not in names]
    if missing:
        return f"it has no {', no '.join(missing)}"
    if not isinstance(tree.body[-1], ast.If):  # `if __name__ == "__main__"`: a file cut off may be Python up to there
        return "its end is missing"
    return ""


def check_file(path: Path, name: str = "train.py") -> str:
    """Why a file is not timm's script of that name, whole; empty if it is."""
    try:
        return check_source(path.read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as e:
        return str(e)


# ----------------------------------------------------------------------------------------------------------- download


def download_train_script(version: str, base_url: str = TIMM_RAW, timeout: float = 20.0) -> Path:
    """timm's train.py of a version, from the cache or downloaded into it, and in both cases verified.

    Only the first process of a node downloads; the others wait for the file.

    Args:
        version: Of timm; names the git tag.
        base_url: Of the repository's raw files.
        timeout: Seconds to wait for the server, each time.

    Raises:
        ValueError: No network, no such file, or it came incomplete: says how to provide it otherwise. Or the file is
            not one that may be run unasked, see `verify_download`.
    """
    url = script_url(version, base_url)
    target = Path(torch.hub.get_dir()) / CACHE / f"train-{version}.py"
    if check_file(target):
        first = world_info_from_env()[0] == 0
        problem = _download(url, target, timeout) if first else _wait_for(target, 2 * timeout)
        if problem:
            raise ValueError(
                f"timm's train.py is needed and not part of its package; the download of {url} failed ({problem}). "
                f"Provide it in one of three ways: save that file anywhere and give --timm-train PATH or set "
                f"TIMM_TRAIN=PATH; or install timm from a clone of its repository (pip install -e CLONE); or save the "
                f"file as {target}."
            )
    verify_download(target, version)
    return target


def _download(url: str, target: Path, timeout: float) -> str:
    """Puts a train.py in its place, whole; returns what went wrong, empty if nothing did."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            source = response.read()
        problem = check_source(source.decode("utf-8"))
        if not problem:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as part:
                part.write(source)
            os.replace(part.name, target)
        return problem
    except (OSError, http.client.HTTPException, UnicodeDecodeError) as e:
        return f"{type(e).__name__}: {e}"


def _wait_for(target: Path, seconds: float) -> str:
    """Waits for the file that the first process of the node downloads; returns a problem, empty if it came."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
        if not check_file(target):
            return ""
    return "the first process of this node did not get it"


def verify_download(path: Path, version: str) -> None:
    """Compares a downloaded train.py with the digest that is pinned for its timm version, at each use.

    Raises:
        ValueError: The digests differ, and the file was removed; or none is pinned, and the user has to look at it.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = SHA256.get(version)
    if pinned is None:
        raise ValueError(
            f"timm's train.py is needed and not part of its package. It was downloaded to {path} (sha256 {digest}) "
            f"and not run, since no digest is pinned for timm {version}. Look at it, and if it is timm's, give "
            f"--timm-train {path} or set TIMM_TRAIN={path}."
        )
    if digest != pinned:
        if world_info_from_env()[0] == 0:
            path.unlink(missing_ok=True)
        raise ValueError(
            f"{path} was refused and removed: its sha256 is {digest}, and timm {version}'s train.py has {pinned}. "
            "The same command downloads it again; or give a file that you trust with --timm-train PATH."
        )


# ------------------------------------------------------------------------------------------------------ find and load


def find_train_script(option: str | None = None, **download: Any) -> Path:
    """Where timm's train.py is: the option, TIMM_TRAIN, beside an editable timm, the cache or a download.

    Args:
        option: Value of --timm-train, the file or the folder of a clone.
        download: See `download_train_script`.

    Raises:
        ValueError: It is not where option or variable say, or not to be had.
    """
    for source, value in (("--timm-train", option), ("TIMM_TRAIN", os.environ.get("TIMM_TRAIN"))):
        if not value:
            continue
        path = Path(value) / "train.py" if Path(value).is_dir() else Path(value)
        if not path.is_file():
            raise ValueError(f"{source} is {value}, where there is no train.py. Give the path of timm's train.py.")
        return path.resolve()
    beside = Path(timm.__file__).resolve().parents[1] / "train.py"
    if not check_file(beside):
        return beside
    return download_train_script(timm.__version__, **download)


def find_script(name: str, option: str | None = None) -> Path:
    """Where validate.py or inference.py of timm is: beside train.py, which the option, TIMM_TRAIN or timm tells.

    Args:
        name: 'validate.py' or 'inference.py'.
        option: Value of --timm-train: a script of timm, or the folder of a clone.

    Raises:
        ValueError: It is not there; says how to provide it.
    """
    for source, value in (("--timm-train", option), ("TIMM_TRAIN", os.environ.get("TIMM_TRAIN"))):
        if not value:
            continue
        path = Path(value) / name if Path(value).is_dir() else Path(value).with_name(name)
        if not path.is_file():
            raise ValueError(
                f"{source} is {value}, and there is no {name} there. Save {script_url(timm.__version__, name=name)} "
                f"beside it, or give the folder of a clone of timm."
            )
        return path.resolve()
    beside = Path(timm.__file__).resolve().parents[1] / name
    if not check_file(beside, name):
        return beside
    raise ValueError(
        f"timm's {name} is needed and not part of its package. Save {script_url(timm.__version__, name=name)} "
        "anywhere and give its path with --timm-train PATH, or set TIMM_TRAIN=PATH; or install timm from a clone of "
        "its repository (pip install -e CLONE)."
    )


def script_version(path: Path) -> str:
    """Version of the timm repository that a train.py belongs to; empty where nothing tells it."""
    beside = path.parent / "timm" / "version.py"
    if beside.is_file():
        found = re.search(r"__version__ = ['\"](.+?)['\"]", beside.read_text(encoding="utf-8"))
        return found[1] if found else ""
    return path.stem.removeprefix("train-") if path.parent.name == CACHE else ""


def script_path(script: ModuleType) -> Path:
    """The file of an imported train.py."""
    return Path(str(script.__file__))


def load_train_script(path: Path) -> ModuleType:
    """Imports train.py; its main() does not run.

    Raises:
        ValueError: It is another script, or made for another timm.
    """
    return load_script(path, "train.py")


def load_script(path: Path, name: str) -> ModuleType:
    """Imports one of timm's scripts; its main() does not run.

    Args:
        path: The file.
        name: What it must be, such as 'train.py'.

    Raises:
        ValueError: It is another script, made for another timm, or needs a package that is missing.
    """
    problem = check_file(path, name)
    if problem:
        raise ValueError(f"{path} is not timm's {name}: {problem}.")
    spec = importlib.util.spec_from_file_location(f"timm_{Path(name).stem}_script", path)
    assert spec and spec.loader  # a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as e:
        package = (e.name or "").partition(".")[0]
        if package and package != "timm" and isinstance(e, ModuleNotFoundError):
            raise ValueError(f"timm's {name} needs the package {package}; run `pip install {package}`.") from e
        raise ValueError(
            f"{path} does not go with the installed timm {timm.__version__} ({e}). {matching_script(name)}"
        ) from e
    return module


def allow_processes_on_cpu(script: ModuleType) -> None:
    """Lets train.py train in several processes without GPUs.

    It names the device to DistributedDataParallel, which takes such names for GPUs only and refuses `cpu`.

    Raises:
        ValueError: It has no `ClassificationTask`, from before timm.task.
    """
    if not hasattr(script, "ClassificationTask"):
        raise ValueError(f"{script_path(script)} is too old to train in several processes on CPU. {matching_script()}")

    class Task(script.ClassificationTask):
        def prepare_distributed(self, device_ids: list | None = None, **kwargs: Any) -> Any:
            return super().prepare_distributed(device_ids=None, **kwargs)

    vars(script)["ClassificationTask"] = Task
