"""`run_command`: sets a run up, trains, and reports how it ended."""

import contextlib
import multiprocessing
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from ..console import PROGRAM, invocation, refused, say, unbroken_output
from .errors import DataError, NotFiniteError, NotSavedError, worker_died
from .group import leave_group
from .lock import release_locks
from .loop import Run, train
from .world import World, leave


@unbroken_output(OSError)  # output that cannot be written is no reason to stop training
def run_command(name: str, device: str, set_up: Callable[[World], Run | None]) -> int:
    """Sets a run up and trains. A mistake in settings or data is one message.

    `set_up` opens and checks everything; it returns None if there is nothing to train (--dry-run). Returns exit status
    0, 1 if the run could not finish, 2 for a mistake, 130 after Ctrl-C.
    """
    world, run, others = None, None, {*multiprocessing.active_children()}
    try:
        world = World(device, name)
        run = set_up(world)
        if run is None:
            return 0
        train(run)
    except Exception as e:
        return ended_by(name, e, world, run)
    except KeyboardInterrupt:
        if run is not None:
            raise
        say("Stopped before training.", error=True)
        return 130
    finally:
        _clean(world, others)
    say(stopped(run, resume_command(name, run.folder.path.name)) if run.stop else run.done())
    return {"SIGINT": 130, "images": 1}.get(run.stop, 0)  # as a shell has it, so that `pretrain && finetune` ends


def _clean(world: World | None, others: set[BaseProcess]) -> None:
    """Frees everything that a run holds; `others` are child processes that are not its own."""
    release_locks()
    end_workers({*multiprocessing.active_children()} - others)
    if world is not None:
        world.close()
    leave_group()


def call_run(name: str, device: str, set_up: Callable[[World], Run | None]) -> Run | None:
    """The same for a call from Python: errors are raised, and a run that stops early is one. None after a dry run."""
    world, others = None, {*multiprocessing.active_children()}
    try:
        world = World(device, name)
        run = set_up(world)
        if run is None:
            return None
        train(run)
    except NotFiniteError as e:
        assert run is not None
        raise RuntimeError(not_finite(e, run)) from e
    finally:
        _clean(world, others)
    if run.stop:
        same = f"the same call and experiment={run.folder.path.name!r}, resume='auto'"
        raise (DataError if run.stop == "images" else KeyboardInterrupt)(stopped(run, same))
    say(run.done())
    return run


def ended_by(name: str, error: Exception, world: World | None, run: Run | None) -> int:
    """Reports a fatal error once, from the process that raised it; returns the exit status, or raises a bug again."""
    if world is None:
        if not isinstance(error, ValueError | RuntimeError):
            raise error
        return refused(name, error)
    if not isinstance(error, ValueError) and world.is_consequence(error):
        leave(1)  # threads that wait for the other processes would wait forever
    if run is None and isinstance(error, ValueError | RuntimeError):
        world.report(f"{PROGRAM} {name}: error: {error}")
        return 2
    if run is not None and isinstance(error, NotFiniteError):  # all processes found it at once
        if world.primary:
            world.report(f"{PROGRAM} {name}: error: {not_finite(error, run)}")
        else:
            with contextlib.suppress(RuntimeError):
                world.wait()  # or torchrun would end rank 0 while it writes
        return 1
    reason = worker_died(error) or (str(error) if isinstance(error, DataError | NotSavedError) else "")
    if not reason and world.distributed:  # before torchrun ends this process, which it does once another one ends
        world.report(f"Process {world.rank} of {world.size} failed:\n{''.join(traceback.format_exception(error))}")
        return 1
    if not reason or run is None:
        raise error
    whole = "" if isinstance(error, NotSavedError) else f" {run.folder.last_whole}"  # NotSavedError names it already
    resume = resume_command(name, run.folder.path.name)
    world.report(f"{PROGRAM} {name}: error: {reason}{whole} Resume with\n  {resume}")
    return 1


def not_finite(error: NotFiniteError, run: Run) -> str:
    """Records how to repeat an update whose loss is not finite; returns the message about it."""
    record, limit = run.record_bad_step(error, weights=True), run.limits.max_bad_steps
    skipped = f" More than --max-bad-steps {limit} updates had such a loss." if limit else ""
    return (
        f"{error}{skipped} Update {error.number + 1} was not made and the last checkpoint is whole. Usual remedies, "
        f"then --resume auto: --amp-dtype bfloat16 or no --amp, --clip-grad 1, {run.remedy}.{run.repeat(record)}"
    )


def stopped(run: Run, resume: str) -> str:
    """Where and why a run stopped early, and with what it resumes."""
    progress, plan = run.progress, run.plan
    where = f"after epoch {progress.epoch} of {plan.epochs}"
    if progress.update:
        size = plan.updates_in(progress.epoch)
        where = f"in epoch {progress.epoch + 1} of {plan.epochs}, update {progress.update} of {size}"
    if run.stop != "images":
        return f"Stopped by {run.stop} {where}; everything is saved. Resume with\n  {resume}"
    names = "\n".join(f"  {why}" for why in progress.bad_images.values())
    return (
        f"Stopped {where}, everything saved: {len(progress.bad_images)} of {progress.num_images} images cannot be "
        f"decoded, more than --max-bad-images {run.limits.max_bad_images:g}:\n{names}\nFix or remove these files, or "
        f"raise the limit, then resume with\n  {resume}"
    )


def end_workers(workers: set[BaseProcess]) -> None:
    """Kills data workers that ignore SIGTERM and would block the exit."""
    if not workers:
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error when a worker ends
    for worker in workers:
        worker.kill()
        worker.join(timeout=5)
    signal.signal(signal.SIGCHLD, handler)


def start_command(name: str, words: list[str] | None = None) -> str:
    """The command, such as 'detect train', that starts a run as this process does; `words` replace its options."""
    command = name.partition(" ")[0]
    return shlex.join([*invocation(command, distributed=True), *(_own_words(command) if words is None else words)])


def _own_words(command: str) -> list[str]:
    """The words of this process after the command's name."""
    if sys.argv[1:2] == [command] and Path(sys.argv[0]).name != f"{command}.py":  # the console command or the module
        return sys.argv[2:]
    return sys.argv[1:]


def resume_command(name: str, experiment: str) -> str:
    """The command that resumes a run of this process, ready to paste."""
    words, skip = [], False
    for word in _own_words(name.partition(" ")[0]):
        if skip or word == "--overwrite":
            skip = False
        elif word in ("--resume", "--experiment"):
            skip = True
        elif not word.startswith(("--resume=", "--experiment=")):
            words.append(word)
    return start_command(name, [*words, "--experiment", experiment, "--resume", "auto"])
