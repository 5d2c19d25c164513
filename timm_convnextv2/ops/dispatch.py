"""Which implementation of the numerics runs, and why not the fused one.

`backend()` names it; `TIMM_CONVNEXTV2_BACKEND` or `set_backend` forces another. `why_eager` is the one rule for a fused
operation to replace modules; a layer adds only conditions of its own.
"""

import os
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

from .minkowski import engine

ENV = "TIMM_CONVNEXTV2_BACKEND"
BACKENDS = {
    "eager": "plain PyTorch operations, as compilers and exporters see them",
    "fused": "a fused token MLP with its own backward, and convolutions around visible patches, in PyTorch calls",
    "triton": "the same with Triton kernels; needs a CUDA GPU, or TRITON_INTERPRET=1",
    "minkowski": "like 'fused', with MinkowskiEngine's convolution of visible patches; it must be built from source",
}
_KERNELS = {"fused": "torch_kernels", "triton": "triton", "minkowski": "minkowski"}
_PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)

_forced: str | None = None


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        known = ", ".join(f"{key} ({what})" for key, what in BACKENDS.items())
        raise ValueError(f"{source} asks for the backend '{name}'. There are: {known}.")
    if torch.compiler.is_compiling():  # which cannot trace the checks below
        return name
    if name == "triton":
        if find_spec("triton") is None:
            raise RuntimeError(f"{source} asks for 'triton', which is not installed. `pip install triton` (Linux).")
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"{source} asks for 'triton', which needs a CUDA GPU; PyTorch sees none. TRITON_INTERPRET=1 runs its "
                "kernels on CPU, slowly, to check them."
            )
    if name == "minkowski":
        try:
            engine()
        except RuntimeError as error:
            raise RuntimeError(f"{source} asks for 'minkowski'. {error}") from error
    return name


def backend(device: torch.device | str = "cpu") -> str:
    """The backend of `device`: 'eager', 'fused', 'triton' or 'minkowski'.

    `set_backend` has precedence over the environment variable `TIMM_CONVNEXTV2_BACKEND`. The default is 'fused' on CPU
    and 'eager' on CUDA, where no other has been measured yet. A ValueError names an unknown backend that was forced, a
    RuntimeError one that cannot run.
    """
    name = _forced or os.environ.get(ENV)
    if name:
        return name if name == "fused" or name == "eager" else _check(name, "set_backend" if _forced else ENV)
    return "fused" if torch.device(device).type == "cpu" else "eager"


def set_backend(name: str | None) -> None:
    """Forces a backend for this process; None restores the default. Raises as `backend` does."""
    global _forced
    _forced = None if name is None else _check(name, "set_backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for a `with` block. A forward inside it keeps its backend for the backward."""
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def kernels_name(device: torch.device) -> str:
    """Name of the kernels for a fused operation on `device`: 'triton' if that is the backend, else 'fused'."""
    return "triton" if backend(device) == "triton" else "fused"


def kernels(name: str) -> ModuleType:
    """The kernels of a backend: modules with the same functions; `ops.minkowski` has only those of the convolution."""
    return import_module(f"{__package__}.{_KERNELS[name]}")


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The type to which autocast converts `x` for matrix products and convolutions; None if autocast is off."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # is_autocast_enabled raises for 'meta'
        return torch.get_autocast_dtype(device)
    return None


def dispatch_mode_active() -> bool:
    """Whether a dispatch mode such as `FlopCounterMode` intercepts operations; a compiler does not count."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _interceptor() -> str:
    """The exporter, tracer or transform that needs plain operations; '' if there is none."""
    for name, active in (
        ("torch.export", torch.compiler.is_exporting()),
        ("torch.jit.trace", torch.jit.is_tracing()),
        ("a torch.func transform", torch._C._are_functorch_transforms_active()),
        ("forward-mode differentiation", forward_ad._current_level >= 0),
    ):
        if active:
            return name
    if not torch.compiler.is_compiling() and torch._C._len_torch_function_stack() > 0:
        for mode in _get_current_function_mode_stack():
            if type(mode) is not DeviceContext:  # `with torch.device(...)` sets one; it changes no operation
                return f"the mode {type(mode).__name__} of __torch_function__"
    return ""


def _hooked(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def why_eager(x: torch.Tensor, weights: Iterable[torch.Tensor | None] = (), skipped: Iterable[nn.Module] = ()) -> str:
    """Why plain PyTorch operations must run on `x`; '' if a fused operation may.

    Args:
        x: The input.
        weights: Parameters that the operation reads.
        skipped: Modules that it replaces, whose hooks would not run.
    """
    if type(x) not in _PLAIN:
        return f"the input is a {type(x).__name__}, no plain tensor"
    if backend(x.device) == "eager":
        return "the backend is 'eager'"
    interceptor = _interceptor()
    if interceptor:
        return f"{interceptor} is active"
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
