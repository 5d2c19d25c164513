"""What pretraining measures on the images before it starts: --mean auto, --std auto, --clip-percentiles."""

import argparse
from collections.abc import Callable
from typing import Any

from ..data import Pixels
from ..data.measure import Measured, measure_pixels, measured_options
from ..report import ImageProgress
from ..source_options import pixels_of
from .distributed import World
from .options import AUTO

__all__ = ["resolve_auto"]


def resolve_auto(
    args: argparse.Namespace, before: dict[str, Any] | None, open_source: Callable[[Pixels], Any], world: World
) -> str:
    """Sets what is to be measured: `mean`, `std`, `clip_low` and `clip_high`, the same on all processes.

    The first process measures; a run that is resumed takes what was measured at its start.

    Args:
        args: Of `parse_options`; changed.
        before: The settings of the run that is resumed; None for a new one.
        open_source: Opens the images with a record.
        world: The processes of the run.

    Returns:
        Where the numbers are from, in a line; '' where nothing was to be measured.

    Raises:
        ValueError: The images cannot be measured.
    """
    limits = args.clip_percentiles is not None and args.clip_low is None
    wanted = [name for name in ("mean", "std") if getattr(args, name) == AUTO]
    if not wanted and not limits:
        return ""
    if before is not None and _keep(args, before, wanted, limits):
        return f"{_listed(wanted, limits)}: as measured when the run began"
    found = error = None
    if world.primary:
        try:
            found = _measure(args, open_source, limits)
        except ValueError as e:  # the others must not wait
            error = str(e)
    found, error = world.share((found, error))
    if found is None:
        raise ValueError(error)
    values, source = found
    for name, value in values.items():
        if name in wanted or limits and name.startswith("clip"):
            setattr(args, name, value)
    return f"{_listed(wanted, limits)}: {source}"


def _keep(args: argparse.Namespace, before: dict[str, Any], wanted: list[str], limits: bool) -> bool:
    """Takes the numbers of a run that is resumed, if it has them for the same channels."""
    if before.get("in_chans") != args.in_chans:
        return False
    names = [*wanted, *(("clip_low", "clip_high") if limits else ())]
    if not all(isinstance(before.get(name), list) for name in names):
        return False
    if limits and before.get("clip_percentiles") != args.clip_percentiles:
        return False
    for name in names:
        setattr(args, name, before[name])
    return True


def _measure(
    args: argparse.Namespace, open_source: Callable[[Pixels], Any], limits: bool
) -> tuple[dict[str, Any], str]:
    bar = ImageProgress(None)
    try:
        found, pixels = measure_pixels(
            open_source,
            pixels_of(args),
            tuple(args.clip_percentiles) if limits else None,
            seed=args.seed,
            workers=args.workers,
            tick=bar.update,
        )
    finally:
        bar.close()
    _check_share(found, args.max_bad_images)
    low, high = (None if values is None else list(values) for values in (pixels.clip_low, pixels.clip_high))
    mean, std = measured_options(found.pixels)
    values = {"mean": mean, "std": std, "clip_low": low, "clip_high": high}
    return values, found.source + (f"; {len(found.bad)} left out, the first: {found.bad[0]}" if found.bad else "")


def _check_share(found: Measured, max_bad_images: float) -> None:
    """Refuses where what was measured is not what the run will see."""
    tried = found.pixels.images + len(found.bad)
    if found.total is not None and len(found.bad) > max(1, max_bad_images * found.total):
        raise ValueError(
            f"{len(found.bad)} of {tried} images tried cannot be read, more than --max-bad-images {max_bad_images:g} "
            f"of {found.total}, for example: {found.bad[0]}."
        )


def _listed(wanted: list[str], limits: bool) -> str:
    names = [f"--{name} {AUTO}" for name in wanted] + ["--clip-percentiles"] * limits
    return ", ".join(names)
