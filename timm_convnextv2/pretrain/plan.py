"""How long a run is and how fast it learns: updates, images per update, peak learning rate, warmup."""

from typing import NamedTuple


class Plan(NamedTuple):
    """The arithmetic of a run.

    Attributes:
        epochs: Epochs.
        updates_per_epoch: Optimizer updates of an epoch.
        images_per_update: Over all processes.
        lr: Peak learning rate.
        warmup_updates: Updates until it is reached.
    """

    epochs: int
    updates_per_epoch: int
    images_per_update: int
    lr: float
    warmup_updates: int

    @property
    def updates(self) -> int:
        """Of the whole run."""
        return self.epochs * self.updates_per_epoch


def make_plan(
    *,
    epochs: int,
    batches_per_epoch: int,
    batch_size: int,
    grad_accum_steps: int,
    world_size: int,
    num_images: int,
    lr: float | None,
    lr_base: float,
    lr_base_size: int,
    warmup_epochs: float,
) -> Plan:
    """Counts updates and scales the learning rate with the images of an update (paper, appendix A.1).

    Args:
        epochs: Epochs.
        batches_per_epoch: Batches of an epoch, per process.
        batch_size: Images per batch and process.
        grad_accum_steps: Batches per update.
        world_size: Processes.
        num_images: Images of the data set, for the message.
        lr: The peak rate itself; None scales `lr_base`.
        lr_base: Rate for `lr_base_size` images per update.
        lr_base_size: See there.
        warmup_epochs: Epochs of linear warmup.

    Raises:
        ValueError: The data set has less than one update.
    """
    images = batch_size * grad_accum_steps * world_size
    updates = batches_per_epoch // grad_accum_steps
    if not updates:
        raise ValueError(
            f"An update takes {images} images ({batch_size} x {grad_accum_steps} steps x {world_size} processes), "
            f"but the data set has {num_images}. Lower --grad-accum-steps or --batch-size."
        )
    rate = lr if lr is not None else lr_base * images / lr_base_size
    return Plan(epochs, updates, images, rate, round(warmup_epochs * updates))


def split_batch(global_batch_size: int, most: int, world_size: int) -> tuple[int, int]:
    """How the images of an update are shared: the fewest steps whose batch is not too large.

    Args:
        global_batch_size: Images per update over all processes.
        most: Images that a process may take at once.
        world_size: Processes.

    Returns:
        Images per process and step; steps per update.

    Raises:
        ValueError: They cannot be shared equally, or only in batches of less than half of `most`.
    """
    each, rest = divmod(global_batch_size, world_size)
    steps = next((n for n in range(-(-each // most), each + 1) if n and not each % n), 0) if not rest else 0
    if not steps or each // steps < min(each, (most + 1) // 2):
        step = most * world_size
        near = sorted({max(1, global_batch_size // step) * step, -(-global_batch_size // step) * step})
        raise ValueError(
            f"--global-batch-size {global_batch_size} cannot be shared by {world_size} "
            f"process{'es' * (world_size != 1)} in equal batches of about --batch-size {most}. Choose "
            f"{' or '.join(map(str, near))}, another --batch-size, or another number of processes."
        )
    return each // steps, steps
