"""Which implementation of the numerics runs, and why not the fused one.

`backend()` tells which, `TIMM_CONVNEXTV2_BACKEND` or `set_backend` forces another. `why_eager` is the one rule of what
must be true of a tensor, its weights and the modules for a fused operation to take their place. A layer adds only what
concerns itself.
"""

import functools
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .engine import engine

ENV = "TIMM_CONVNEXTV2_BACKEND"
BACKENDS = {
    "eager": "plain PyTorch operations, what compilers and exporters see",
    "fused": "a fused token MLP with a backward of its own, and convolutions around visible patches, in PyTorch calls",
    "triton": "the same with Triton kernels; needs a CUDA GPU, or TRITON_INTERPRET=1",
    "minkowski": "as 'fused', with MinkowskiEngine's convolution of visible patches; it has to be built",
}
_RENAMED = {"reference": "eager", "torch": "fused"}
_KERNELS = {"fused": "torch_kernels", "triton": "triton"}
_PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)

_forced: str | None = None


@functools.cache
def _renamed(name: str, source: str) -> str:
    """The new name of a backend; warns once a process."""
    new = _RENAMED[name]
    warnings.warn(
        f"{source} asks for the backend '{name}', which is called '{new}' now.", category=FutureWarning, stacklevel=4
    )
    return new


def _check(name: str, source: str) -> str:
    if name in _RENAMED:
        return _renamed(name, source)
    if name not in BACKENDS:
        known = ", ".join(f"{key} ({what})" for key, what in BACKENDS.items())
        raise ValueError(f"{source} asks for the backend '{name}'. There are: {known}.")
    if name == "triton":
        if find_spec("triton") is None:
            raise RuntimeError(f"{source} asks for 'triton', which is not installed. `pip install triton` (Linux).")
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"{source} asks for 'triton', which needs a CUDA GPU; PyTorch sees none. TRITON_INTERPRET=1 runs its "
                "kernels on CPU, slowly, to check them."
            )
    if name == "minkowski" and not torch.compiler.is_compiling():  # which would trace the import
        try:
            engine()
        except RuntimeError as error:
            raise RuntimeError(f"{source} asks for 'minkowski'. {error}") from error
    return name


def backend(device: torch.device | str = "cpu") -> str:
    """What runs on `device`: 'eager', 'fused', 'triton' or 'minkowski'.

    A choice forced by `set_backend` comes first, then the environment variable `TIMM_CONVNEXTV2_BACKEND`. By default
    the CPU takes 'fused'. CUDA takes 'eager': no other has been measured there yet.

    Raises:
        ValueError: An unknown name was forced.
        RuntimeError: 'triton' or 'minkowski' was forced and cannot run.
    """
    name = _forced or os.environ.get(ENV)
    if name:
        return name if name == "fused" or name == "eager" else _check(name, "set_backend" if _forced else ENV)
    return "fused" if torch.device(device).type == "cpu" else "eager"


def set_backend(name: str | None) -> None:
    """Forces a backend for this process; None gives the choice back to the environment variable and the default.

    Raises:
        ValueError: Unknown name.
        RuntimeError: 'triton' or 'minkowski' cannot run here.
    """
    global _forced
    _forced = None if name is None else _check(name, "set_backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for a `with` block. What a forward has run in it is differentiated the same way."""
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def kernels_name(device: torch.device) -> str:
    """Whose kernels a fused operation on `device` takes: 'triton' where that is the backend, else 'fused'."""
    return "triton" if backend(device) == "triton" else "fused"


def kernels(name: str) -> ModuleType:
    """The kernels of a backend: `ops.torch_kernels` or `ops.triton`, which have the same functions."""
    return import_module(f"{__package__}.{_KERNELS[name]}")


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The type that autocast wants matrix products and convolutions of `x` in; None where it is off."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # asked about 'meta', it raises
        return torch.get_autocast_dtype(device)
    return None


def dispatch_mode_active() -> bool:
    """Whether something looks at the operations that run, as `FlopCounterMode` does; a compiler does not count."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation looks at the operations that run."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _onlooker() -> str:
    """Who looks on and wants plain operations: an exporter, a tracer, a transform; '' for nobody."""
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if not torch.compiler.is_compiling() and torch._C._len_torch_function_stack() > 0:
        for mode in _get_current_function_mode_stack():
            if type(mode) is not DeviceContext:  # of `with torch.device(...)`
                return f"the mode {type(mode).__name__} of __torch_function__"
    return ""


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def why_eager(x: torch.Tensor, weights: Iterable[torch.Tensor | None] = (), skipped: Iterable[nn.Module] = ()) -> str:
    """Why plain PyTorch operations must run on `x`; '' where a fused operation may.

    Args:
        x: The input.
        weights: Parameters that the operation reads.
        skipped: Modules that it takes the place of, so that their hooks would not run.
    """
    if type(x) not in _PLAIN:
        return f"the input is a {type(x).__name__}, no plain tensor"
    if backend(x.device) == "eager":
        return "the backend is 'eager'"
    onlooker = _onlooker()
    if onlooker:
        return f"{onlooker} looks on"
    if x.numel() == 0 or not x.is_floating_point():
        return "the input is empty or no floating-point tensor"
    converts = autocast_dtype(x) is not None
    for weight in weights:
        if weight is not None:
            if type(weight) not in _PLAIN:
                return f"a parameter is a {type(weight).__name__}, no plain tensor"
            if weight.dtype != x.dtype and not converts:
                return "the input has another dtype than a parameter"
    for module in skipped:
        if _hooked(module):
            return f"its {type(module).__name__} has hooks"
    return ""
