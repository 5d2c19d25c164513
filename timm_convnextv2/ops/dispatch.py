"""Which implementation of the numerics runs: `backend()` tells, `TIMM_CONVNEXTV2_BACKEND` or `set_backend` forces."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch.autograd import forward_ad

__all__ = ["BACKENDS", "ENV", "autocast_dtype", "backend", "set_backend", "use_backend", "watched"]

ENV = "TIMM_CONVNEXTV2_BACKEND"
BACKENDS = {
    "reference": "plain PyTorch operations, what compilers and exporters see",
    "torch": "a fused token MLP with a backward of its own, and convolutions around visible patches, in PyTorch calls",
    "triton": "the same with Triton kernels; needs a CUDA GPU, or TRITON_INTERPRET=1",
}

_forced: str | None = None


def _check(name: str, source: str) -> str:
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
    return name


def backend(device: torch.device | str = "cpu") -> str:
    """What runs on `device`: 'reference', 'torch' or 'triton'.

    A choice forced by `set_backend` comes first, then the environment variable `TIMM_CONVNEXTV2_BACKEND`. By default
    the CPU takes 'torch'. CUDA takes 'reference': no other has been measured there yet.

    Raises:
        ValueError: An unknown name was forced.
        RuntimeError: 'triton' was forced and cannot run.
    """
    name = _forced or os.environ.get(ENV)
    if name:
        name = name if name == "torch" or name == "reference" else _check(name, "set_backend" if _forced else ENV)
        return name
    return "torch" if torch.device(device).type == "cpu" else "reference"


def set_backend(name: str | None) -> None:
    """Forces a backend for this process; None gives the choice back to the environment variable and the default.

    Raises:
        ValueError: Unknown name.
        RuntimeError: 'triton' cannot run here.
    """
    global _forced
    _forced = None if name is None else _check(name, "set_backend")


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The type that autocast wants matrix products and convolutions of `x` in; None where it is off."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # asked about 'meta', it raises
        return torch.get_autocast_dtype(device)
    return None


def watched() -> bool:
    """Whether an exporter, a tracer, `torch.func` or forward-mode differentiation looks on: they want plain ops."""
    return (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for a `with` block. What a forward has run in it is differentiated the same way."""
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)
