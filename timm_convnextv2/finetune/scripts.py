"""timm's scripts train.py, validate.py and inference.py, which its wheel lacks: found, imported and run."""

import ast
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import timm

TIMM_RAW = "https://raw.githubusercontent.com/huggingface/pytorch-image-models"
# top-level names that we use of each script
NEEDED = {
    "train.py": ("main", "parser", "config_parser"),
    "validate.py": ("main", "parser", "create_loader"),
    "inference.py": ("main", "parser", "create_loader"),
}


def _url(name: str) -> str:
    """Address of the installed timm version's script."""
    return f"{TIMM_RAW}/v{timm.__version__}/{name}"


def matching_script(name: str = "train.py") -> str:
    """The remedy if a script does not fit the installed timm."""
    return f"Give the {name} of timm {timm.__version__} with --timm-train: {_url(name)}"


def kept_script(name: str) -> Path:
    """Where a script of the installed timm is looked for last: in the user's folder for caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "timm_convnextv2" / f"timm-{timm.__version__}" / name


def find_script(name: str, option: str | None = None) -> Path:
    """Path of one of timm's scripts: by --timm-train, by TIMM_TRAIN, in timm's clone, or where it was fetched to."""
    for source, value in (("--timm-train", option), ("TIMM_TRAIN", os.environ.get("TIMM_TRAIN"))):
        if not value:
            continue
        path = Path(value)
        if path.is_dir():
            path /= name
        elif name != "train.py":  # TIMM_TRAIN names train.py; that file may have another name
            path = path.with_name(name)
        if path.is_file():
            return path.resolve()
        remedy = f"Fetch it (curl -fL --create-dirs -o {shlex.quote(str(path))} {_url(name)}), or give a clone of timm."
        raise ValueError(f"{source} is {value}, but there is no {name} there. {remedy}")
    kept = kept_script(name)
    for place in (Path(timm.__file__).resolve().parents[1] / name, kept):
        if not script_problem(place, name):
            return place
    raise ValueError(
        f"timm's {name} is needed and is not part of timm's package. Fetch it once for timm {timm.__version__}:\n"
        f"  curl -fL --create-dirs -o {shlex.quote(str(kept))} {_url(name)}\n"
        "It is found there from then on. Or give its path with --timm-train PATH or TIMM_TRAIN=PATH, or install timm "
        "from a clone (pip install -e CLONE)."
    )


def script_problem(path: Path, name: str) -> str:
    """Why a file is not timm's script of that name, or not all of it; empty if it is."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as e:  # UnicodeDecodeError is a ValueError
        return f"it is not Python ({e})" if path.is_file() else str(e)
    # functions and imports have a name, variables an id
    names = {getattr(node, "name", getattr(node, "id", "")) for node in ast.walk(tree)}
    if missing := [needed for needed in NEEDED[name] if needed not in names]:
        return f"it has no {', no '.join(missing)}"
    # a file that was cut off between two functions is still Python, but lacks `if __name__ == "__main__"`
    return "" if isinstance(tree.body[-1], ast.If) else "its end is missing"


def script_version(script: ModuleType) -> str:
    """Version of the clone of timm that an imported script lies in; empty if it lies elsewhere."""
    beside = script_path(script).parent / "timm" / "version.py"
    found = beside.is_file() and re.search(r"__version__ = ['\"](.+?)['\"]", beside.read_text(encoding="utf-8"))
    return found[1] if found else ""


def script_path(script: ModuleType) -> Path:
    return Path(str(script.__file__))


def load_script(name: str, option: str | None = None) -> ModuleType:
    """Finds and imports one of timm's scripts; its main() does not run. `option` is the value of --timm-train."""
    path = find_script(name, option)
    if problem := script_problem(path, name):
        raise ValueError(f"{path} is not timm's {name}: {problem}.")
    spec = importlib.util.spec_from_file_location(f"timm_{Path(name).stem}_script", path)
    assert spec and spec.loader  # holds for every file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as e:
        package = (e.name or "").partition(".")[0]
        if package and package != "timm" and isinstance(e, ModuleNotFoundError):
            raise ValueError(f"timm's {name} needs the package {package}; run `pip install {package}`.") from e
        what = f"{path} does not fit the installed timm {timm.__version__} ({e})."
        raise ValueError(f"{what} {matching_script(name)}") from e
    return module


def run_script(script: ModuleType, words: list[str]) -> None:
    """Runs main() of an imported script with a command line of its own."""
    before = sys.argv
    sys.argv = [str(script_path(script)), *words]
    try:
        script.main()
    finally:
        sys.argv = before


def allow_processes_on_cpu(script: ModuleType) -> None:
    """Lets train.py run in several processes without GPUs."""
    if not hasattr(script, "ClassificationTask"):
        raise ValueError(f"{script_path(script)} is too old to train in several processes on CPU. {matching_script()}")

    # train.py passes the device to DistributedDataParallel, which accepts GPUs only
    class Task(script.ClassificationTask):
        def prepare_distributed(self, device_ids: list | None = None, **kwargs: Any) -> Any:
            return super().prepare_distributed(device_ids=None, **kwargs)

    vars(script)["ClassificationTask"] = Task
