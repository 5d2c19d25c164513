"""Masks: random ones, checks of given ones, and the number of visible patches.

A *patch* is `stride x stride` pixels; the *grid* `(h, w)` is the image size in patches; a *mask* is bool `[B, h, w]`
with **True = removed**; every image of a batch keeps the same number `K` of patches.
"""

import math

import torch
from torch import Tensor


def num_visible(grid: tuple[int, int], mask_ratio: float) -> int:
    """Number of patches `K = int(h * w * (1 - mask_ratio))` that each image keeps (official `gen_random_mask`)."""
    total = grid[0] * grid[1]
    if not 0.0 < mask_ratio < 1.0:
        raise ValueError(f"mask_ratio must lie strictly between 0 and 1, got {mask_ratio}. The paper uses 0.6.")
    if total < 2:
        raise ValueError(
            f"A {grid[0]}x{grid[1]} grid has {total} patch: masked pretraining needs at least 2, one to see and one "
            "to predict. Use larger images or a smaller stem `patch_size`."
        )
    visible = int(total * (1 - mask_ratio))
    if not 1 <= visible < total:
        # rounded down, so that the suggested ratio works as typed
        largest = math.floor(1e4 * (1 - 1 / total)) / 1e4
        if int(total * (1 - largest)) < 1:  # 10 * (1 - 0.9) is 0.9999999999999998
            largest = round(largest - 1e-4, 4)
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves {visible} of {total} patches visible on a {grid[0]}x{grid[1]} grid; "
            f"each image needs at least one visible and one masked patch. Ratios above 0 and up to {largest} can "
            "give that here."
        )
    return visible


def random_mask(
    batch_size: int,
    grid: tuple[int, int],
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A random bool mask `[B, h, w]`, True = removed, that removes the same number of patches from each image.

    `grid` is the image size in patches; the generator is one of `device`, by default PyTorch's own.
    """
    keep = num_visible(grid, mask_ratio)
    total = grid[0] * grid[1]
    order = torch.rand(batch_size, total, generator=generator, device=device).argsort(dim=1)
    mask = torch.ones(batch_size, total, dtype=torch.bool, device=device)
    mask.scatter_(1, order[:, :keep], False)
    return mask.view(batch_size, *grid)


def random_channels(count: int, in_chans: int, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Channels removed with probability `p`, never all of an image's: bool `[count, in_chans]`, True = removed."""
    if not 0 <= p < 1:
        raise ValueError(f"The share of channels to remove must lie in [0, 1), got {p}.")
    if in_chans < 2:
        raise ValueError(f"Channels can be removed from images that have several; these have {in_chans}.")
    drawn = torch.rand(count, in_chans, generator=generator)
    return (drawn < p) & (drawn < drawn.amax(dim=1, keepdim=True))


def check_mask(mask: Tensor, batch_size: int, grid: tuple[int, int]) -> int:
    """The number `K` of visible patches per image of a mask; a ValueError if dtype, shape or counts are wrong."""
    shape = (batch_size, *grid)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask must be a torch.bool tensor (True = removed), got {came}. Convert it with `mask.bool()`."
        )
    if tuple(mask.shape) != shape:
        raise ValueError(f"mask must have shape [B, h, w] = {list(shape)} for these images, got {list(mask.shape)}.")
    counts = (~mask).flatten(1).sum(1)
    least, most = int(counts.min()), int(counts.max())  # in older PyTorch tolist() fails under torch.func
    if least < most:
        raise ValueError(
            f"Every image of a batch must keep the same number of patches, got {least} to {most} visible. "
            "Draw masks with `timm_convnextv2.random_mask`, or equalise the counts."
        )
    return least
