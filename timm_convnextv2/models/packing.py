"""The packed layout, with which dense modules run on visible patches only.

A *packed map* holds the visible patches of each image, stacked vertically in row-major grid order, as
`[B, C, K * p, p]` in channels-last memory; `p` is the side of a patch in the current feature map. Everything that does
not cross patch borders (stem, downsampling, LayerNorm, token MLP, GRN's per-image sums, drop path) runs on it unchanged
and exactly. Only the depthwise convolution reads beyond its patch: `PackedLayout.mix` restores the neighbourhood.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import is_plain_depthwise
from ..ops import window_depthwise
from ..ops.dispatch import backend, transformed, why_eager


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(0, rows)


def _scatter(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    return x.new_zeros(num_rows, *x.shape[1:]).index_copy(0, rows, x)


class _GatherRows(torch.autograd.Function):
    """`x[rows]` for unique rows. The gradient is a plain copy; autograd's would be an atomic add."""

    @staticmethod
    def forward(x: Tensor, rows: Tensor) -> Tensor:
        return _gather(x, rows)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, rows = inputs
        ctx.save_for_backward(rows)
        ctx.num_rows = x.shape[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows,) = ctx.saved_tensors
        return _ScatterRows.apply(grad.contiguous(), rows, ctx.num_rows), None


class _ScatterRows(torch.autograd.Function):
    """The transpose of `_GatherRows`: puts rows of `x` at `rows` of `num_rows` rows, zeros elsewhere."""

    @staticmethod
    def forward(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, rows, x)  # in place, without a second copy

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows,) = ctx.saved_tensors
        return _GatherRows.apply(grad.contiguous(), rows), None, None


def _nhwc(x: Tensor) -> Tensor:
    """`[B, C, H, W]` as contiguous `[B, H, W, C]`: a view if the memory is channels-last already."""
    return x.permute(0, 2, 3, 1).contiguous()


class PackedLayout:
    """Which patches of a batch are visible: packs images and features, unpacks tokens, feeds the mixer.

    Args:
        mask: Bool `[B, h, w]`, True = removed, with the same number of visible patches in each image (`check_mask`).
        num_visible: That number, `K`.
        device: Device of the features; by default the mask's.

    Attributes:
        ids: Visible patches in row-major order, int64 `[B, K]` into the `h * w` patches.
        masked_ids: Removed patches in the same order, `[B, h * w - K]`.
    """

    def __init__(self, mask: Tensor, num_visible: int, device: torch.device | None = None) -> None:
        self.batch_size, self.grid, self.num_visible = len(mask), tuple(mask.shape[1:]), num_visible
        # stable sort: visible (False) patches first, both parts in row-major order
        order = mask.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
        # an asynchronous copy to the CPU could be read before it is complete
        later = device is not None and torch.device(device).type != "cpu"
        order = order.to(device, non_blocking=later)
        self.mask = mask.to(device, non_blocking=later)
        self.ids = order[:, :num_visible]
        self.masked_ids = order[:, num_visible:]
        self._rows: dict[int, Tensor] = {}
        self._windows: dict[tuple[int, int], Tensor] = {}
        self._coordinates: dict[int, Tensor] = {}

    def _patches(self, images: Tensor, ids: Tensor, stride: int) -> Tensor:
        """Chosen patches of `[B, C, H, W]`, as `[B, n, stride, stride, C]`."""
        h, w = self.grid
        x = images.reshape(images.shape[0], images.shape[1], h, stride, w, stride).permute(0, 2, 4, 3, 5, 1)
        batch = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
        return x[batch, ids // w, ids % w]

    def pack(self, images: Tensor, stride: int) -> Tensor:
        """Visible patches of `[B, C, H, W]` as a packed map `[B, C, K * stride, stride]`, channels-last."""
        x = self._patches(images, self.ids, stride)
        return x.reshape(x.shape[0], -1, stride, x.shape[-1]).permute(0, 3, 1, 2)

    def masked_patches(self, images: Tensor, stride: int) -> Tensor:
        """Removed patches of `[B, C, H, W]`, pixels in (row, column, channel) order: `[B, h*w - K, stride^2 * C]`."""
        return self._patches(images, self.masked_ids, stride).flatten(2)

    def rows(self, p: int) -> Tensor:
        """Positions of a packed map's rows of `p` tokens in the dense map's `[B, h, p, w]` rows: `[B * K * p]`."""
        if p not in self._rows:
            h, w = self.grid
            ids = self.ids.unsqueeze(-1)
            batch = torch.arange(self.batch_size, device=ids.device).view(-1, 1, 1)
            row = torch.arange(p, device=ids.device)
            self._rows[p] = (((batch * h + ids // w) * p + row) * w + ids % w).flatten()
        return self._rows[p]

    def mix(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Submanifold `conv` of a packed map `[B, C, K * p, p]`: zero at removed positions before, dropped after."""
        B, C, _, p = x.shape
        h, w = self.grid
        if not self.why_eager(x, conv):
            patches = _nhwc(x).view(-1, p, p, C)
            engine = backend(x.device) == "minkowski"
            where = self.coordinates(p) if engine else self.windows(p, int(conv.padding[0]))
            out = window_depthwise(patches, conv.weight, conv.bias, where)
            return out.reshape(B, -1, p, C).permute(0, 3, 1, 2)
        rows = self.rows(p)
        # a compiler cannot trace vmap and jvp through the autograd functions
        plain = transformed()
        gather, scatter = (_gather, _scatter) if plain else (_GatherRows.apply, _ScatterRows.apply)
        dense = scatter(_nhwc(x).view(-1, p * C), rows, B * h * p * w)
        dense = conv(dense.view(B, h * p, w * p, C).permute(0, 3, 1, 2))
        out = gather(_nhwc(dense).view(B * h * p * w, -1), rows)
        return out.view(B, -1, p, dense.shape[1]).permute(0, 3, 1, 2)

    def why_eager(self, x: Tensor, conv: Any) -> str:
        """Why `conv` runs on the whole map with zeros; '' if it runs on windows of the visible patches."""
        if not is_plain_depthwise(conv):
            return "it is not a depthwise convolution of stride 1 with zero padding"
        reason = why_eager(x, (conv.weight, conv.bias), (conv,))
        if reason or backend(x.device) in ("triton", "minkowski"):  # their kernels read a patch's border in place
            return reason
        p, patches = x.shape[3], self.grid[0] * self.grid[1]
        side = p + 2 * conv.padding[0]
        # Gathering windows reads more positions than a patch has. An output costs about as much as reading six, as
        # measured on CPU for forward and both gradients of a 7x7 kernel.
        if self.num_visible * (6 * p**2 + side**2) >= patches * 6 * p**2:
            return "so many patches are visible that their windows cost more than the whole map"
        return ""

    def coordinates(self, p: int) -> Tensor:
        """Image, row and column of each token of a packed map, for `ops.window_depthwise`: int32 `[T, 3]`."""
        if p not in self._coordinates:
            ids, inner = self.ids[..., None, None], torch.arange(p, device=self.ids.device)
            batch = torch.arange(self.batch_size, device=ids.device).view(-1, 1, 1, 1)
            row, column = ids // self.grid[1] * p + inner.view(-1, 1), ids % self.grid[1] * p + inner
            where = torch.stack(torch.broadcast_tensors(batch, row, column), dim=-1)
            self._coordinates[p] = where.flatten(0, -2).to(torch.int32)
        return self._coordinates[p]

    def windows(self, p: int, border: int) -> Tensor:
        """Tokens of each visible patch and its border, for `ops.window_depthwise`: int64 `[B * K, side, side]`."""
        if (p, border) not in self._windows:
            h, w = self.grid
            count = self.ids.numel()
            slot = self.ids.new_full((self.batch_size, h * w), count)  # number of the packed patch at each position
            slot.scatter_(1, self.ids, torch.arange(count, device=self.ids.device).view_as(self.ids))
            near = torch.arange(-border, p + border, device=self.ids.device)
            y = (self.ids // w * p).view(-1, 1, 1) + near.view(-1, 1)
            x = (self.ids % w * p).view(-1, 1, 1) + near
            inside = (y >= 0) & (y < h * p) & (x >= 0) & (x < w * p)
            row, column = (y // p).clamp(0, h - 1), (x // p).clamp(0, w - 1)
            batch = torch.arange(self.batch_size, device=self.ids.device).repeat_interleave(self.num_visible)
            patch = slot[batch.view(-1, 1, 1), row * w + column]
            token = patch * p**2 + y % p * p + x % p
            self._windows[p, border] = torch.where(inside & (patch < count), token, count * p**2)
        return self._windows[p, border]

    def unpack(self, tokens: Tensor, fill: Tensor) -> Tensor:
        """Tokens `[B, K, C]` at their positions in the grid, `fill` `[C]` elsewhere: `[B, h * w, C]`."""
        B, _, C = tokens.shape
        dense = fill.to(tokens.dtype).expand(B, self.grid[0] * self.grid[1], C)
        return dense.scatter(1, self.ids.unsqueeze(-1).expand(-1, -1, C), tokens)

    def take_masked(self, tokens: Tensor) -> Tensor:
        """The removed positions of `[B, h * w, C]`: `[B, h * w - K, C]`."""
        return tokens.gather(1, self.masked_ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
