"""What all commands share: the parser, the way to refuse, and how the user calls a command here."""

import argparse
import difflib
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from timm.utils.distributed import world_info_from_env

PROGRAM = "timm-convnextv2"
PACKAGE = "timm_convnextv2"


class CommandParser(argparse.ArgumentParser):
    """`ArgumentParser` without abbreviations, whose errors are a `ValueError`: told as any other mistake, and once."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        # argparse takes -0.017 for a number but -1.7e-2 for an option
        self._negative_number_matcher = re.compile(r"-(\d+(_\d+)*\.?\d*|\.\d+)([eE][+-]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        """Raises the message as a `ValueError`."""
        raise ValueError(message)


def say(text: str, error: bool = False) -> None:
    """Prints on the first process only; errors on the first of each node, which may have folders of its own."""
    local_rank, rank, _ = world_info_from_env()
    if (local_rank if error else rank) == 0:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def refused(command: str, error: Exception) -> int:
    """Prints a mistake in settings or data as one message; returns exit status 2."""
    say(f"{PROGRAM} {command}: error: {error}", error=True)
    return 2


def closest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' where a known word resembles it, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def invocation(command: str, distributed: bool = False) -> list[str]:
    """The words that start a command where the user is: the script of a clone, the console command, or the module.

    Args:
        command: Its name, such as 'pretrain'.
        distributed: Start it as this process was started, under torchrun where that is so.
    """
    script = Path(sys.argv[0])
    if script.parent.name == "train_scripts" and (script.parent / f"{command}.py").is_file():
        words = [str(script.with_name(f"{command}.py"))]
    else:
        words = ["-m", PACKAGE, command]
    if distributed and "LOCAL_WORLD_SIZE" in os.environ:
        return ["torchrun", *_nodes(), "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], *words]
    if words[0] == "-m" and shutil.which(PROGRAM):
        return [PROGRAM, command]
    if script.name == PROGRAM:  # called by its path, of an environment that is not activated
        return [str(script), command]
    return [interpreter(), *words]


def interpreter() -> str:
    """'python' where that is this interpreter, else its whole path: of an environment that is not activated."""
    here, found = os.path.abspath(sys.executable), shutil.which("python")
    return "python" if found and os.path.abspath(found) == here else here


def _nodes() -> list[str]:
    """torchrun's options for several nodes; nothing for one."""
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    if nodes == "1":
        return []
    # torchrun tells its processes the first node's name, but not the port of the rendezvous: 29500 is its default
    endpoint = f"{os.environ.get('MASTER_ADDR', 'HEAD')}:29500"
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-id", job, "--rdzv-endpoint", endpoint]
