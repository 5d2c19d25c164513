"""Which backend runs, and why not the fused operations."""

import contextlib
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import timm_convnextv2  # noqa: F401  (registers the models)
from timm_convnextv2.models.masking import random_mask
from timm_convnextv2.models.packing import PackedLayout
from timm_convnextv2.ops import backend, dispatch, set_backend, use_backend


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    """As it is where nobody has chosen a backend."""
    monkeypatch.delenv("TIMM_CONVNEXTV2_BACKEND", raising=False)


def test_default_backend_and_the_choice(monkeypatch):
    assert backend() == backend("cpu") == "fused" and backend("cuda") == "eager"
    monkeypatch.setenv("TIMM_CONVNEXTV2_BACKEND", "eager")
    assert backend() == "eager"
    with use_backend("fused"):
        assert backend() == "fused" == backend("cuda")
        with contextlib.suppress(KeyError), use_backend("eager"):
            assert backend() == "eager"
            raise KeyError
        assert backend() == "fused"
    assert backend() == "eager"
    monkeypatch.setenv("TIMM_CONVNEXTV2_BACKEND", "fastest")
    with pytest.raises(ValueError, match="TIMM_CONVNEXTV2_BACKEND.*'fastest'.*eager.*fused.*triton"):
        backend()
    with pytest.raises(ValueError, match="set_backend.*'minkowsky'"):
        set_backend("minkowsky")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a CUDA GPU says")
def test_triton_without_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("timm_convnextv2.ops.dispatch.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="not installed"):
        set_backend("triton")
    monkeypatch.setattr("timm_convnextv2.ops.dispatch.find_spec", lambda name: object())
    with pytest.raises(RuntimeError, match="needs a CUDA GPU.*TRITON_INTERPRET=1"):
        set_backend("triton")
    monkeypatch.setenv("TIMM_CONVNEXTV2_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="TIMM_CONVNEXTV2_BACKEND"):
        timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1))(torch.randn(1, 3, 64, 64))


def test_import_needs_no_optional_engine():
    code = "import sys; sys.modules['triton'] = sys.modules['MinkowskiEngine'] = None; import timm_convnextv2"
    subprocess.run([sys.executable, "-c", code], check=True)


class Subclass(torch.Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


X, WEIGHT = torch.ones(1, 2), nn.Parameter(torch.ones(2))


def hooked() -> nn.Module:
    module = nn.ReLU()
    module.register_full_backward_hook(lambda *_: None)
    return module


CASES = [
    (X, WEIGHT, nn.ReLU(), ""), (X, None, nn.ReLU(), ""), (X.as_subclass(Subclass), WEIGHT, nn.ReLU(), "Subclass"),
    (X, nn.Parameter(torch.ones(2).as_subclass(Subclass)), nn.ReLU(), "parameter is a Subclass"),
    (X, WEIGHT.double(), nn.ReLU(), "dtype"), (X.long(), WEIGHT, nn.ReLU(), "floating-point"),
    (X[:0], WEIGHT, nn.ReLU(), "empty"), (X, WEIGHT, hooked(), "ReLU has hooks"),
]  # fmt: skip


@pytest.mark.parametrize("x, weight, module, reason", CASES)
def test_why_eager_of_tensors_and_modules(x, weight, module, reason):
    found = dispatch.why_eager(x, (weight,), (module,))
    assert reason in found and bool(found) == bool(reason)


def test_why_eager_of_who_looks_on():
    def why() -> str:
        return dispatch.why_eager(X, (WEIGHT,))

    with use_backend("eager"):
        assert "'eager'" in why()
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in why()
    with Mode():
        assert "Mode" in why()
    with torch.device("cpu"):
        assert why() == ""
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.why_eager(X, (WEIGHT.double(),)) == ""
    seen = []
    torch.func.vmap(lambda x: seen.append(dispatch.why_eager(x)) or x)(X)
    assert "torch.func" in seen[0]


def test_layers_add_reasons_of_their_own():
    model = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    block, x = model.stages[0].blocks[0], torch.randn(1, 8, 16, 16)
    conv, layout = block.conv_dw, PackedLayout(random_mask(1, (4, 4), 0.75), 4)
    packed = torch.randn(1, 8, 32, 8)
    assert block.why_eager(x) == conv.why_eager(x) == layout.why_eager(packed, conv) == ""
    assert "wider" in model.stages[1].downsample[1].why_eager(x)
    with torch.no_grad():
        assert "no gradient" in conv.why_eager(x)
    assert "float64" in conv.double().why_eager(x.double())
    conv.float().register_full_backward_hook(lambda *_: None)
    assert "hooks" in layout.why_eager(packed, conv)
    full = PackedLayout(random_mask(1, (4, 4), 0.1), 14)
    block.conv_dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert "visible" in full.why_eager(torch.randn(1, 8, 14, 1), block.conv_dw)
    assert "depthwise" in layout.why_eager(packed, nn.Conv2d(8, 8, 3, padding=1))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed")
def test_fsdp2_on_blocks_and_stages():
    """Parameters are plain tensors only while their module is called; then the fused operations run as usual."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options = dict(img_size=64, patch_size=1, depths=(1, 1, 1, 1), dims=(8, 16, 16, 16), decoder_dim=16)
    model = timm.create_model("fcmae_convnextv2_atto", **options)
    images, mask = torch.randn(2, 3, 64, 64), random_mask(2, (8, 8), 0.6)
    want = model(images, mask).loss
    want.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for stage in model.encoder.stages:
            for block in stage.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(stage, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            loss = model(images, mask).loss
            loss.backward()
        assert torch.equal(loss, want)
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert (p.grad is None) == (grad is None)
            if grad is not None:
                torch.testing.assert_close(p.grad.full_tensor(), grad)
    finally:
        torch.distributed.destroy_process_group()
    ran = {event.key: event.count for event in profiler.key_averages()}
    assert ran["timm_convnextv2::token_mlp"] == 5  # four blocks and the decoder's
