"""Mutation testing: makes one small change at a time and asks whether the tests notice.

    python -m tools.mutate                      # all mutations of tools/mutations.yaml
    python -m tools.mutate --only rank --keep   # those whose name contains 'rank'; print pytest's output

Each mutation names a file, a text that stands in it exactly once, its replacement, and the tests that must fail then.
They run in a copy of the checkout, so that nothing here changes. A mutation that survives is a test that is missing, or
has a `survives:` line that explains why no test can see it. This is a tool for developers and no part of CI: the forty
mutations take about a quarter of an hour on one core.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = Path(__file__).with_name("mutations.yaml")


def load(path: Path = MUTATIONS) -> list[dict[str, Any]]:
    """Reads the mutations and checks that each text stands exactly once in its file.

    Raises:
        ValueError: A file or text is missing, or the text is ambiguous. Names the mutation.
    """
    mutations = yaml.safe_load(path.read_text(encoding="utf-8"))
    for mutation in mutations:
        file = ROOT / mutation["file"]
        count = file.read_text(encoding="utf-8").count(mutation["old"]) if file.is_file() else 0
        if count != 1:
            raise ValueError(f"{mutation['name']}: '{mutation['old']}' stands {count} times in {mutation['file']}.")
    return mutations


def run(mutation: dict[str, Any], checkout: Path, keep: bool) -> str:
    """Applies a mutation in a copy, runs its tests, restores the file; returns 'killed', 'survived' or 'timeout'."""
    file = checkout / mutation["file"]
    before = file.read_text(encoding="utf-8")
    file.write_text(before.replace(mutation["old"], mutation["new"]), encoding="utf-8")
    words = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", *mutation["tests"].split()]
    how: Any = dict(cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, text=True)
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", *words], timeout=mutation.get("seconds", 300), **how)
    except subprocess.TimeoutExpired:
        return "timeout"  # the tests did not pass, which counts as noticed
    finally:
        file.write_text(before, encoding="utf-8")
    if keep:
        print(done.stdout[-3000:])
    if done.returncode not in (0, 1):  # nothing was collected, or pytest failed
        raise RuntimeError(f"{mutation['name']}: pytest ended with {done.returncode}.\n{done.stdout}{done.stderr}")
    return "killed" if done.returncode else "survived"


def main() -> int:
    """Runs the mutations; returns 1 if one survives without an explanation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="run mutations whose name contains TEXT")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave the first N mutations of the file out")
    parser.add_argument("--keep", action="store_true", help="print the end of pytest's output")
    args = parser.parse_args()
    mutations = [mutation for mutation in load()[args.skip :] if args.only in mutation["name"]]
    unexplained = 0
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", ".venv*", "__pycache__", "output"))
        for mutation in mutations:
            start = time.perf_counter()
            result = run(mutation, checkout, args.keep)
            explained = mutation.get("survives", "")
            unexplained += result == "survived" and not explained
            print(
                f"{result:9}{time.perf_counter() - start:5.0f} s  {mutation['name']}  {explained}".rstrip(), flush=True
            )
    print(f"{len(mutations)} mutations, {unexplained} survived without an explanation")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
