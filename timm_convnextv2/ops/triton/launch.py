"""Input checks and block sizes that the launchers share."""

import torch
import triton

NUM_WARPS = 4

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(**tensors: torch.Tensor | None) -> None:
    """Raises a ValueError for inputs that a kernel would misread."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    device = next(iter(given.values())).device
    for name, tensor in given.items():
        dtypes = (torch.int64,) if name == "index" else _DTYPES
        if tensor.dtype not in dtypes or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous {' or '.join(map(str, dtypes))} tensor on {device}, got {tensor.dtype} "
                f"on {tensor.device} with strides {tensor.stride()}."
            )


def same(name: str, got: tuple, expected: tuple) -> None:
    if tuple(got) != tuple(expected):
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(got)}.")


def channel_block(channels: int, sizes: tuple[int, ...]) -> int:
    """The size that leaves the fewest lanes idle, the larger one of equals."""
    return min(sizes, key=lambda size: triton.cdiv(channels, size) * size)
