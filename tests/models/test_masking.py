"""Masks: how many, which, checked; and the mixer of the packed layout by its definition."""

import re

import pytest
import torch
from torch import nn

from timm_convnextv2 import random_mask
from timm_convnextv2.models.masking import check_mask, num_visible
from timm_convnextv2.models.packing import PackedLayout


@pytest.mark.parametrize("grid", [(7, 7), (1, 2), (2, 5), (14, 14)])
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.6, 0.9, 0.95])
def test_count_is_exact(grid, ratio):
    total = grid[0] * grid[1]
    keep = int(total * (1 - ratio))
    if 1 <= keep < total:
        assert num_visible(grid, ratio) == keep
        mask = random_mask(5, grid, ratio)
        assert mask.shape == (5, *grid) and mask.dtype == torch.bool
        assert ((~mask).flatten(1).sum(1) == keep).all()


def largest_ratio(grid, ratio: float) -> float:
    """The ratio that the error message about another one names."""
    with pytest.raises(ValueError, match=f"{int(grid[0] * grid[1] * (1 - ratio))} of {grid[0] * grid[1]} ") as error:
        num_visible(grid, ratio)
    return float(re.search(r"up to ([\d.]+) can", str(error.value))[1])


def test_the_largest_ratio_named_works_and_a_larger_one_does_not():
    """On every grid up to 2600 patches: 10 * (1 - 0.9) < 1 in floating point, so rounding down is not enough."""
    for total in range(2, 2600):
        largest = largest_ratio((1, total), 1 - 0.5 / total)
        assert num_visible((1, total), largest) >= 1, total
        with pytest.raises(ValueError):
            num_visible((1, total), largest + 2e-4)


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 1.5, float("nan")])
def test_ratios_outside_0_to_1_and_a_single_patch(ratio):
    with pytest.raises(ValueError, match="between 0 and 1"):
        num_visible((7, 7), ratio)
    with pytest.raises(ValueError, match="1x1"):
        random_mask(2, (1, 1), 0.5)


def test_masks_are_reproducible():
    def draw(seed):
        return random_mask(8, (7, 7), 0.6, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert len({tuple(m.flatten().tolist()) for m in draw(0)}) == 8  # the images of a batch differ


def test_masks_are_uniform():
    """Every patch, and every pair of patches, is removed as often as chance says (5 standard deviations)."""
    n, total, gone = 20000, 12, 8
    mask = random_mask(n, (3, 4), 0.6, generator=torch.Generator().manual_seed(0)).flatten(1).double()
    assert (mask.sum(1) == gone).all()
    single, pair = gone / total, gone * (gone - 1) / (total * (total - 1))
    counts = mask.T @ mask / n
    assert (counts.diag() - single).abs().max() < 5 * (single * (1 - single) / n) ** 0.5
    off = counts[~torch.eye(total, dtype=torch.bool)]
    assert (off - pair).abs().max() < 5 * (pair * (1 - pair) / n) ** 0.5


def test_given_masks_are_checked():
    mask = random_mask(3, (2, 4), 0.5)
    assert check_mask(mask, 3, (2, 4)) == 4
    for bad, message in (
        (mask.float(), "torch.bool.*float32.*mask.bool"),
        (mask.tolist(), "torch.bool.*list"),
        (mask[:2], r"\[3, 2, 4\].*\[2, 2, 4\]"),
        (mask.transpose(1, 2), r"\[3, 2, 4\].*\[3, 4, 2\]"),
        (mask.flatten(1), r"\[3, 2, 4\].*\[3, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            check_mask(bad, 3, (2, 4))
    mask[1] = True
    mask[1, 0, 0] = False
    with pytest.raises(ValueError, match="1 to 4"):
        check_mask(mask, 3, (2, 4))


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (4, 1)])
@pytest.mark.parametrize(("p", "kernel"), [(4, 7), (2, 7), (1, 7), (2, 3), (1, 5)])
def test_mixer_is_the_submanifold_convolution_by_definition(grid, p, kernel):
    """Sum over the visible neighbours in a loop, one visible token at a time; forward and gradients."""
    torch.manual_seed(0)
    B, C, half = 2, 3, kernel // 2
    mask = random_mask(B, grid, 0.4)
    layout = PackedLayout(mask, num_visible(grid, 0.4))
    conv = nn.Conv2d(C, C, kernel, padding=half, groups=C).double()
    x = torch.randn(B, C, grid[0] * p, grid[1] * p, dtype=torch.float64, requires_grad=True)
    out = layout.mix(layout.pack(x, p), conv)

    visible = (~mask).repeat_interleave(p, 1).repeat_interleave(p, 2)
    slow = torch.zeros_like(x)
    for b, r, c in visible.nonzero().tolist():
        value = conv.bias
        for i in range(kernel):
            for j in range(kernel):
                y, z = r + i - half, c + j - half
                if 0 <= y < x.shape[2] and 0 <= z < x.shape[3] and visible[b, y, z]:
                    value = value + conv.weight[:, 0, i, j] * x[b, :, y, z]
        slow = slow.index_put((torch.tensor(b), torch.arange(C), torch.tensor(r), torch.tensor(c)), value)
    torch.testing.assert_close(out, layout.pack(slow, p))

    upstream = torch.randn_like(out)
    sources = (x, conv.weight, conv.bias)
    fast_grads = torch.autograd.grad(out, sources, upstream)
    slow_grads = torch.autograd.grad(layout.pack(slow, p), sources, upstream)
    for fast, plain in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(fast, plain)
