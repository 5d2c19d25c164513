"""Length and learning rate of a run: updates, images per update, peak learning rate, warmup."""

from ..runs.plan import Plan
from .config import Schedule


def make_plan(schedule: Schedule, batches_per_epoch: int, num_images: int, world_size: int) -> Plan:
    """Counts updates and scales the learning rate with the images of an update (paper, appendix A.1).

    Refuses a data set that is too small for one update. `batches_per_epoch` counts those of one process.
    """
    batch, steps = schedule.batch_size, schedule.grad_accum_steps
    images, updates = batch * steps * world_size, batches_per_epoch // steps
    if not updates:
        raise ValueError(
            f"An update takes {images} images ({batch} x {steps} steps x {world_size} processes), but the data set "
            f"has {num_images}. Lower --grad-accum-steps or --batch-size."
        )
    lr = schedule.lr if schedule.lr is not None else schedule.lr_base * images / schedule.lr_base_size
    return Plan(schedule.epochs * updates, updates, images, lr, round((schedule.warmup_epochs or 0) * updates))


def split_batch(global_batch_size: int, most: int, world_size: int) -> tuple[int, int]:
    """Splits the images of an update into the fewest equal steps with at most `most` images per process.

    Refuses steps of less than half of `most`.

    Returns:
        Images per process and step; steps per update.
    """
    each, rest = divmod(global_batch_size, world_size)
    steps = next((n for n in range(-(-each // most), each + 1) if n and not each % n), 0) if not rest else 0
    if not steps or each // steps < min(each, (most + 1) // 2):
        step = most * world_size
        near = sorted({max(1, global_batch_size // step) * step, -(-global_batch_size // step) * step})
        raise ValueError(
            f"--global-batch-size {global_batch_size} cannot be split between {world_size} "
            f"process{'es' * (world_size != 1)} in equal batches of about --batch-size {most}. Choose "
            f"{' or '.join(map(str, near))}, another --batch-size, or another number of processes."
        )
    return each // steps, steps
