"""MinkowskiEngine as the mixer, against dense convolutions with masks and the other backends.

A stand-in of what its documentation says runs everywhere; the engine itself where it is built (-m minkowski).
"""

import collections.abc
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from test_fcmae import assert_equals_reference, toy
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_convnextv2 import random_mask
from timm_convnextv2.models.explain import explanation
from timm_convnextv2.models.packing import PackedLayout
from timm_convnextv2.ops import backend, minkowski, set_backend, use_backend
from timm_convnextv2.ops.minkowski import engine


class StandIn(SimpleNamespace):
    """As much of MinkowskiEngine as is called, from its documentation.

    It orders tokens as it likes, as its GPU code does. The first axis of a kernel runs fastest.
    """

    class CoordinateMapType:
        CPU, CUDA = range(2)

    class CoordinateManager:
        def __init__(self, D, coordinate_map_type):
            assert D == 2

        def insert_and_map(self, coordinates, stride):
            assert coordinates.dtype == torch.int32 and coordinates.shape[1] == 3 and stride == 1
            order = torch.arange(len(coordinates)).flip(0)
            self.coordinates = coordinates[order]
            return self, (order.int(), order.argsort().int())

        def kernel_map(self, source, target, stride, kernel_size, dilation):
            assert source is target is self and stride == dilation == 1
            place = {tuple(c): i for i, c in enumerate(self.coordinates.tolist())}
            pairs = {}
            near = range(-(kernel_size // 2), kernel_size // 2 + 1)
            for tap, (second, first) in enumerate(product(near, near)):
                found = [(place.get((b, y + first, x + second)), i) for (b, y, x), i in place.items()]
                found = [pair for pair in found if pair[0] is not None]
                if found:  # a tap that joins none is left out
                    pairs[tap] = torch.tensor(found, dtype=torch.int32).t()
            return pairs

    class SparseTensor:
        def __init__(self, features, coordinate_map_key, coordinate_manager):
            assert features.ndim == 2 and coordinate_map_key is coordinate_manager
            self.F, self.manager = features, coordinate_manager

    class MinkowskiChannelwiseConvolution(nn.Module):
        def __init__(self, channels, kernel_size, bias, dimension):
            super().__init__()
            self.size = kernel_size
            self.kernel = nn.Parameter(torch.full((kernel_size**2, channels), torch.nan))
            self.bias = nn.Parameter(torch.full((1, channels), torch.nan))

        def forward(self, x):
            assert self.kernel.shape == (self.size**2, x.F.shape[1])
            out = self.bias.expand_as(x.F)
            for tap, (source, target) in x.manager.kernel_map(x.manager, x.manager, 1, self.size, 1).items():
                out = out.index_add(0, target.long(), x.F[source.long()] * self.kernel[tap])
            return StandIn.SparseTensor(out, x.manager, x.manager)


def clear() -> None:
    for cache in (engine, minkowski._module):
        cache.cache_clear()
    minkowski._maps.clear()


@pytest.fixture(params=["stand-in", pytest.param("the engine", marks=pytest.mark.minkowski)])
def me(request, monkeypatch):
    """The backend 'minkowski', on the stand-in or on the engine."""
    monkeypatch.delenv("TIMM_CONVNEXTV2_BACKEND", raising=False)
    clear()
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "MinkowskiEngine", StandIn())
    try:
        with use_backend("minkowski"):
            yield request.param
    except RuntimeError as error:
        if "cannot be imported" not in str(error):
            raise
        pytest.skip(str(error))
    finally:
        clear()


CASES = [(7, 1, 5, (3, 4), 0.6), (7, 4, 3, (2, 3), 0.5), (5, 2, 1, (3, 3), 0.3), (1, 2, 2, (2, 2), 0.5)]


@pytest.mark.parametrize("k, p, C, grid, ratio", CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_mixer(me, k, p, C, grid, ratio, bias):
    """Values and gradients, also of gradients, of a kernel that is not symmetric, against the map with zeros."""
    conv = nn.Conv2d(C, C, k, padding=k // 2, groups=C, bias=bias).double()
    mask = random_mask(3, grid, ratio)
    layout = PackedLayout(mask, int((~mask[0]).sum()))
    shape = (3, C, layout.num_visible * p, p)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    grad, found = torch.randn_like(x), {}
    for name in ("eager", "minkowski"):
        with use_backend(name):
            out = layout.mix(x, conv)
            first = torch.autograd.grad(out, [x, *conv.parameters()], grad, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, conv.weight])
            plain = torch.autograd.grad(layout.mix(x, conv), [x, *conv.parameters()], grad)
        assert (len(minkowski._maps) > 0) == (name == "minkowski")
        found[name] = [out, *first, *second, *plain]
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kwargs", [dict(mask_ratio=0.5), dict(patch_size=1, img_size=(24, 40), in_chans=5)], ids=str)
def test_fcmae_equals_the_reference_and_runs_on_the_engine(me, kwargs, monkeypatch):
    calls, real = [], minkowski.window_conv
    monkeypatch.setattr(minkowski, "window_conv", lambda *args: calls.append(1) or real(*args))
    model = toy(**kwargs)
    images = torch.randn(2, model.in_chans, *model.img_size, dtype=torch.float64)
    layout = model.visible(images)
    model(images, layout).loss.backward()
    assert len(calls) == 2 * 5 and len(minkowski._maps) == 4  # forward and backward of five blocks, in four stages
    assert_equals_reference(model, images, layout.mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(me, dtype):
    conv, layout = nn.Conv2d(4, 4, 5, padding=2, groups=4), PackedLayout(random_mask(2, (2, 3), 0.5), 3)
    x = torch.randn(2, 4, 6, 2)
    want = layout.mix(x, conv)
    with torch.autocast("cpu", dtype):
        out = layout.mix(x.requires_grad_(), conv)
    assert out.dtype == dtype
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.05)
    assert conv.weight.grad.dtype == torch.float32


def test_compile_keeps_it(me):
    conv, layout = nn.Conv2d(4, 4, 3, padding=1, groups=4), PackedLayout(random_mask(2, (2, 3), 0.5), 3)
    x = torch.randn(2, 4, 6, 2).to(memory_format=torch.channels_last)
    compiled = torch.compile(lambda x: layout.mix(x, conv), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layout.mix(x, conv))
    compiled(x).sum().backward()
    assert conv.weight.grad.abs().sum() > 0


def test_operation_passes_opcheck(me):
    where = PackedLayout(random_mask(1, (2, 2), 0.5), 2).coordinates(2)
    x, weight = torch.randn(2, 2, 2, 3, requires_grad=True), torch.randn(3, 1, 3, 3, requires_grad=True)
    bias = torch.randn(3, requires_grad=True)
    torch.library.opcheck(torch.ops.timm_convnextv2.window_depthwise, (x, weight, bias, where, "minkowski"))


def test_what_is_said_of_it(me):
    text = explanation(toy().float())
    assert backend() == "minkowski" and "backend 'minkowski'" in text
    packed = next(line.split() for line in text.splitlines() if "packed" in line)
    assert packed[-2:] == ["5", "minkowski"]
    assert all("minkowski" not in line for line in text.splitlines() if "MLP" in line or "dense" in line)


def test_without_the_engine(monkeypatch):
    clear()
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    with pytest.raises(RuntimeError, match="set_backend.*setuptools<65.*--cpu_only --blas=openblas"):
        set_backend("minkowski")
    assert backend() != "minkowski"
    monkeypatch.setenv("TIMM_CONVNEXTV2_BACKEND", "minkowski")
    with pytest.raises(RuntimeError, match="TIMM_CONVNEXTV2_BACKEND.*'minkowski'"):
        backend()
    assert "cannot be imported" in explanation(toy())


def test_a_build_for_the_cpu_alone_says_so(monkeypatch):
    clear()
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", SimpleNamespace(is_cuda_available=lambda: False))
    with FakeTensorMode():
        coordinates = torch.empty(4, 3, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="CPU.*--force_cuda"):
        minkowski._map(coordinates)
    clear()


def test_a_name_that_python_took_away_is_lent_for_the_import(tmp_path, monkeypatch):
    """`from collections import Sequence` works in the engine's import, and nowhere else."""
    clear()
    (tmp_path / "MinkowskiEngine.py").write_text("from collections import Sequence\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "MinkowskiEngine", raising=False)
    here = hasattr(collections, "Sequence")
    assert engine().Sequence is collections.abc.Sequence and hasattr(collections, "Sequence") == here
    del sys.modules["MinkowskiEngine"]
    clear()


@pytest.mark.minkowski
def test_the_engine_orders_taps_as_the_stand_in(me):
    """So that what the stand-in shows holds for the engine, whether this is it or not."""
    real, layout = engine(), PackedLayout(random_mask(2, (2, 3), 0.5), 3)
    found = []
    for module in (real, StandIn()):
        manager = module.CoordinateManager(D=2, coordinate_map_type=module.CoordinateMapType.CPU)
        key, (order, back) = manager.insert_and_map(layout.coordinates(2), 1)
        order = order.long() if len(back) else torch.arange(len(layout.coordinates(2)))
        pairs = manager.kernel_map(key, key, 1, 5, 1)
        found.append({(tap, *order[pair].tolist()) for tap, two in pairs.items() for pair in two.long().t()})
    assert found[0] == found[1] and len(found[0]) > 100
