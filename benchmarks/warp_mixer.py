"""The convolution of visible patches on WarpConvNet, NVIDIA's library for sparse voxels, for `benchmarks.official`.

**It has not run on a GPU**, and nothing else runs it. Tests compare it with our plain path by a stand-in of the two
functions that it calls, written from the library's source (1.8.2; paths below are in its folder `warpconvnet`):

- `generate_kernel_map` (geometry/coords/search/torch_discrete.py) finds which tokens are neighbours;
- `spatially_sparse_depthwise_conv` (nn/functional/sparse_conv_depth.py) convolves and has the gradients. It is what
  `SparseDepthwiseConv2d` (nn/modules/sparse_conv_depth.py) calls. For each size, its first call times two
  implementations and keeps the faster. Both add up the taps in the type of their input, so in bfloat16 under autocast.
"""

from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from timm_convnextv2.models.packing import PackedLayout
from timm_convnextv2.ops.dispatch import autocast_dtype

__all__ = ["warp_mix", "why_not"]

SEARCH = "warpconvnet.geometry.coords.search.torch_discrete"
CONVOLUTION = "warpconvnet.nn.functional.sparse_conv_depth"
# setup.py leaves the CUDA code out where it does not see torch, as in pip's isolated build
INSTALL = (
    "With CUDA's compiler and a PyTorch for CUDA: `pip install setuptools wheel ninja pybind11 'setuptools-scm<10'`, "
    "then `MAX_JOBS=4 pip install --no-build-isolation warpconvnet`."
)

_maps: WeakKeyDictionary[PackedLayout, dict[tuple[int, int], Any]] = WeakKeyDictionary()


def why_not(device: torch.device, batch: int) -> str:
    """Why the mixer cannot run on `device` with `batch` images; '' where it can."""
    if device.type != "cuda":
        return "WarpConvNet needs CUDA"
    if batch > 512:  # PackedHashTable.BATCH_MAX is 511 (geometry/coords/search/packed_hashmap.py)
        return "WarpConvNet tells 512 images apart at most"
    try:
        for name in ("warpconvnet", SEARCH, CONVOLUTION):
            import_module(name)
    except (ImportError, AttributeError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "warpconvnet"
        return f"WarpConvNet {'is not installed' if absent else f'cannot be imported ({error})'}. {INSTALL}"
    return ""


def _kernel_map(layout: PackedLayout, p: int, k: int) -> Any:
    """The pairs of tokens that each tap of a `k` x `k` kernel joins, found once for all blocks of a stage.

    Coordinates are image, row and column, int32 `[T, 3]`. Their rows are what the map counts: the hash table returns
    the "original insertion index" (geometry/coords/search/_packed_base.py), so the order of tokens stays ours. Taps
    are row-major and centred, and a tap joins an output to the input at `output + tap` (`packed_kernel_map_size` in
    csrc/include/cuhash/kernel_map.cuh), as in `nn.Conv2d`.
    """
    maps = _maps.setdefault(layout, {})
    if (p, k) not in maps:
        where = layout.coordinates(p)
        maps[p, k] = import_module(SEARCH).generate_kernel_map(where, where, (1, 1), (k, k))
    return maps[p, k]


def _convolve(x: torch.Tensor, rows: torch.Tensor, kernel_map: Any) -> torch.Tensor:
    """Tokens `[T, C]` convolved with a kernel `[k * k, C]` of the same type.

    The gradient must come contiguous: `implicit_fma` (csrc/bindings/fma_bindings.cpp) would add the taps of any other
    to a copy that is dropped, without an error.
    """
    with torch.autocast(x.device.type, enabled=False):
        out = import_module(CONVOLUTION).spatially_sparse_depthwise_conv(x, rows, kernel_map, len(x))
    if out.requires_grad:
        out.register_hook(torch.Tensor.contiguous)
    return out


def warp_mix(layout: PackedLayout, x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """`PackedLayout.mix` on WarpConvNet, to be patched in its place; values, gradients and types are the same.

    Args:
        layout: Whose method it is.
        x: Packed map `[B, C, K * p, p]`.
        conv: Depthwise convolution of stride 1 that keeps the spatial size.

    Returns:
        Packed map of the same shape.

    Raises:
        ImportError: WarpConvNet cannot be imported; `why_not` says what to do.
    """
    B, C, _, p = x.shape
    dtype = autocast_dtype(x) or x.dtype
    tokens = x.permute(0, 2, 3, 1).contiguous().view(-1, C).to(dtype)
    rows = conv.weight.flatten(1).t().to(dtype).contiguous()
    out = _convolve(tokens, rows, _kernel_map(layout, p, conv.kernel_size[0]))
    if conv.bias is not None:
        out = out + conv.bias.to(dtype)
    return out.view(B, -1, p, C).permute(0, 3, 1, 2)
