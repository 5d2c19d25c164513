"""Triton's kernels to test, and what ran: fixtures, which `conftest` makes known to all tests.

Interpreted on CPU everywhere, compiled where there is a CUDA GPU.
"""

import importlib.util
import sys
from pathlib import Path

import numpy
import pytest
import torch

from timm_convnextv2 import ops

# of kernels, not launched themselves
HELPERS = {"token_mlp": ("_gelu_place", "_gelu_tile", "_normal_cdf"), "depthwise": ("_window_corner",)}


def release(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(map(int, version.split(".")[:2]))


def load(name: str, interpret: bool, patch: pytest.MonkeyPatch):
    """A copy of the package of its own: triton.jit decides when it decorates whether a kernel is interpreted."""
    origin = importlib.util.find_spec("timm_convnextv2.ops.triton").origin
    spec = importlib.util.spec_from_file_location(name, origin, submodule_search_locations=[str(Path(origin).parent)])
    module = importlib.util.module_from_spec(spec)
    parts = (".launch", ".layernorm", ".token_mlp", ".depthwise")
    for part in ("", *parts):
        patch.setitem(sys.modules, name + part, module)
    for part in parts:
        del sys.modules[name + part]
    with pytest.MonkeyPatch.context() as while_it_loads:
        while_it_loads.setenv("TRITON_INTERPRET", str(int(interpret)))
        spec.loader.exec_module(module)
    return module


class Kernels:
    """The functions of a set of kernels, with the device to test them on."""

    def __init__(self, module, device: str, interpreted: bool) -> None:
        self.module, self.device, self.interpreted = module, device, interpreted

    def __getattr__(self, name: str):
        return getattr(self.module, name)


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)])
def kernels(request):
    """Triton's."""
    triton = pytest.importorskip("triton", reason="needs triton, which PyTorch brings along on Linux only")
    tl = triton.language
    interpret = request.param == "interpreter"
    if interpret and release(triton.__version__) < (3, 6) and release(numpy.__version__) >= (2, 4):
        pytest.skip("the interpreter needs triton 3.6, or numpy before 2.4")
    if not interpret and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    with pytest.MonkeyPatch.context() as patch:
        module = load(f"triton_kernels_{request.param}", interpret, patch)
        if interpret:
            # tl.sum is itself decorated, when triton is imported: then nobody may have asked for the interpreter
            patch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
            for part, names in HELPERS.items():
                for name in names:  # called as they are: the interpreter would set itself up anew at each call
                    file = getattr(module, part)
                    patch.setattr(file, name, getattr(file, name).fn)
        yield Kernels(module, "cpu" if interpret else "cuda", interpret)


@pytest.fixture
def as_backend(kernels, monkeypatch):
    """Makes 'triton' the backend, with these kernels."""
    monkeypatch.setitem(sys.modules, ops.__name__ + ".triton", kernels.module)
    if kernels.interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ops.use_backend("triton"):
        yield kernels


def nodes(loss: torch.Tensor) -> set[str]:
    """Names of the operations behind a loss."""
    found, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [n for n, _ in node.next_functions]
    return {n.name() for n in found}
