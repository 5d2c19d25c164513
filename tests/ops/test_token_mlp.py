"""The fused token MLP against the plain one: values, gradients, and everywhere that it must step aside."""

import pytest
import timm
import torch
from timm.models import convnext
from torch.utils.flop_counter import FlopCounterMode

import timm_convnextv2  # noqa: F401  (registers the models)
from timm_convnextv2 import layers
from timm_convnextv2.ops import functional, use_backend
from timm_convnextv2.ops import token_mlp as fused_mlp
from timm_convnextv2.ops.token_mlp import fused_token_mlp

NAMES = ("out", "x", "shortcut", "norm_weight", "norm_bias", "w1", "b1", "grn_weight", "grn_bias", "w2", "b2")


def make(B: int, T: int, C: int, dtype=torch.float64, out_chans: int | None = None) -> list[torch.Tensor]:
    """x, shortcut and the eight parameters, random, none at its initial zero."""
    wide, out_chans = 4 * C, out_chans or C
    shapes = [(B, T, C), (B, T, out_chans), (C,), (C,), (wide, C), *[(wide,)] * 3, (out_chans, wide), (out_chans,)]
    scales = [1, 1, 1, 1, C**-0.5, 1, 1, 1, wide**-0.5, 1]
    return [(torch.randn(s) * k).to(dtype).requires_grad_() for s, k in zip(shapes, scales, strict=True)]


def plain(x, shortcut, keep, *parameters):
    out = functional.token_mlp(x, *parameters)
    return shortcut + (out if keep is None else out * keep.view(-1, 1, 1).to(out.dtype))


def both(tensors, keep=None, grad=None, forms=(fused_token_mlp, plain)):
    """`(fused, plain)`, each the output and the gradients of all tensors."""
    results = []
    for fn in forms:
        out = fn(tensors[0], tensors[1], keep, *tensors[2:])
        grad = torch.randn_like(out) if grad is None else grad
        results.append([out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))])
    return results


def assert_same(ours, theirs, tol: float) -> None:
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all(), name
        size = b.double().norm().clamp(min=1e-30)
        if name == "x" and b.shape[-1] == 1:
            size = 1e3  # LayerNorm of one channel divides by sqrt(eps): the gradient is zero and noise of that size
        error = (a.double() - b.double()).norm() / size
        assert error <= tol, f"{name}: relative error {error:.2e}"


@pytest.fixture(params=["one chunk", "chunks"])
def chunks(request, monkeypatch):
    """Also with chunks of very few images, the last one smaller."""
    if request.param == "chunks":
        monkeypatch.setattr(fused_mlp, "CHUNK_BYTES", 1)
        monkeypatch.setattr(fused_mlp, "MIN_ROWS", 126)


# tokens and channels on both sides of the rule that folds GRN's scale into the weight
@pytest.mark.parametrize(
    "B,T,C", [(5, 63, 8), (5, 63, 40), (3, 1, 40), (1, 63, 352), (2, 3137, 1), (5, 16, 4), (3, 1, 1)]
)
@pytest.mark.parametrize("path", [False, True])
def test_equals_the_plain_form_in_float64(B, T, C, path, chunks):
    keep = torch.tensor([1.25, 0, 1.25, 1.25, 0], dtype=torch.float64)[:B] if path else None
    assert_same(*both(make(B, T, C), keep), 1e-12)


@pytest.mark.parametrize("T,C", [(63, 40), (400, 40)])
def test_equals_the_plain_form_in_float32(T, C, chunks):
    tensors = make(5, T, C, torch.float32)
    ours, _ = both(tensors, grad=(grad := torch.randn(5, T, C)))
    exact = both([t.detach().double().requires_grad_() for t in tensors], grad=grad.double())[1]
    assert_same(ours, exact, 5e-6)


@pytest.mark.parametrize("dtype,tol", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("path", [False, True])
def test_half_precision_is_as_exact_as_the_plain_form(dtype, tol, autocast, path, chunks):
    keep = torch.tensor([1.25, 0, 1.25]) if path else None
    tensors = make(3, 63, 40, torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        ours, theirs = both(tensors, keep, grad=(grad := torch.randn(3, 63, 40)))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    exact = both([t.detach().double().requires_grad_() for t in tensors], keep, grad=grad.double())[1]
    assert_same(ours, exact, tol)


@pytest.mark.parametrize("magnitude", [0, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("T", [64, 900])
def test_zero_and_very_large_activations(magnitude, dtype, T):
    """All-zero maps have finite gradients; sums of squares beyond float16 do not overflow."""
    tensors = make(2, T, 4, dtype)
    with torch.no_grad():
        tensors[5].fill_(magnitude)  # b1: what GELU sees
        tensors[4].zero_()
        tensors[8] /= max(magnitude, 1)
    ours = both(tensors, grad=torch.randn(2, T, 4) / 512)[0]  # a parameter's gradient in float16 can overflow
    assert all(torch.isfinite(t).all() for t in ours)
    if magnitude == 0:
        constant = tensors[8] @ tensors[7] + tensors[9]
        torch.testing.assert_close(ours[0], (tensors[1] + constant).detach(), rtol=2e-2, atol=2e-2)


def test_gradcheck_and_second_derivative(chunks):
    tensors = make(2, 9, 2)
    keep = torch.tensor([2.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, s, *p: fused_token_mlp(x, s, keep, *p), tensors)
    tensors = make(1, 3, 2)
    assert torch.autograd.gradgradcheck(lambda x, s, *p: fused_token_mlp(x, s, None, *p), tensors)


@pytest.mark.parametrize(
    "frozen", [range(10), [0], [0, 1], range(2, 10), [2, 3, 4, 5], [6, 7, 8, 9], [0, 1, 2, 3, 4, 5]]
)
def test_frozen_tensors_have_no_gradient_and_change_no_other(frozen, chunks):
    tensors = make(5, 63, 8)
    want = both(tensors, grad=(grad := torch.randn(5, 63, 8, dtype=torch.float64)))[1]
    for i in frozen:
        tensors[i] = tensors[i].detach()
    out = fused_token_mlp(tensors[0], tensors[1], None, *tensors[2:])
    torch.testing.assert_close(out, want[0])
    rest = [i for i in range(10) if i not in frozen]
    assert out.requires_grad == bool(rest)
    if rest:
        grads = torch.autograd.grad(out, [tensors[i] for i in rest], grad)
        for i, g in zip(rest, grads, strict=True):
            torch.testing.assert_close(g, want[1 + i], msg=NAMES[1 + i])


def test_non_contiguous_inputs_and_gradient():
    tensors = make(3, 63, 8)
    with torch.no_grad():
        tensors[0] = tensors[0].transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
        tensors[1] = torch.randn(3, 1, 8, dtype=torch.float64).expand(3, 63, 8).requires_grad_()
        tensors[4] = tensors[4].t().contiguous().t().requires_grad_()
    grad = torch.randn(8, 63, 3, dtype=torch.float64).transpose(0, 2)
    assert_same(*both(tensors, grad=grad), 1e-12)
    assert_same(*both(tensors, grad=torch.ones(1, 1, 8, dtype=torch.float64).expand(3, 63, 8)), 1e-12)


def test_registered_operation_passes_torch_library_opcheck():
    tensors = make(3, 63, 8)
    for recompute in (False, True):
        args = (*tensors[:2], None, *tensors[2:], 1e-6, 1e-6, torch.float64, True, recompute, "fused")
        torch.library.opcheck(torch.ops.timm_convnextv2.token_mlp, args)


def recomputing(*args):
    return fused_token_mlp(*args, recompute=True)


@pytest.mark.parametrize("T,C", [(63, 40), (63, 8), (1, 1)])
def test_recomputing_changes_nothing(T, C, chunks):
    keep = torch.tensor([1.25, 0, 1.25, 1.25, 0], dtype=torch.float64)
    assert_same(*both(make(5, T, C), keep, forms=(recomputing, fused_token_mlp)), 1e-14)
    assert torch.autograd.gradgradcheck(lambda x, s, *p: recomputing(x, s, None, *p), make(1, 3, 2))


@pytest.mark.parametrize("recompute", [False, True])
def test_keeps_only_its_input_the_norms_and_unless_recomputed_the_preactivation(recompute):
    tensors = make(2, 49, 16, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_token_mlp(tensors[0], tensors[1], None, *tensors[2:], recompute=recompute)
    parameters = {t.data_ptr() for t in tensors[2:]}
    sizes = sorted(t.numel() for t in kept if t.data_ptr() not in parameters)
    assert sizes == sorted([2 * 49 * 16, 0 if recompute else 2 * 49 * 64, 2 * 64])


@pytest.fixture
def calls(monkeypatch):
    """Counts uses of the fused operation."""
    seen = []

    def counted(*args):
        seen.append(args[0].shape)
        return fused_token_mlp(*args)

    monkeypatch.setattr(layers.token_mlp, "fused_token_mlp", counted)
    return seen


STEPS_ASIDE = {
    "hook": lambda block: block.mlp.fc1.register_forward_hook(lambda *a: None),
    "pre-hook on the norm": lambda block: block.norm.register_forward_pre_hook(lambda *a: None),
    "another activation": lambda block: setattr(block.mlp, "act", torch.nn.ReLU()),
    "tanh gelu": lambda block: setattr(block.mlp, "act", torch.nn.GELU(approximate="tanh")),
    "another norm": lambda block: setattr(block, "norm", torch.nn.BatchNorm2d(8)),
    "another linear": lambda block: setattr(block.mlp, "fc1", torch.nn.Sequential(block.mlp.fc1)),
    "dropout": lambda block: setattr(block.mlp.drop1, "p", 0.5),
    "another drop path": lambda block: setattr(block, "drop_path", torch.nn.Dropout(0.1)),
    "parametrisation": lambda block: torch.nn.utils.parametrizations.weight_norm(block.mlp.fc1),
    "layer scale": lambda block: setattr(block, "gamma", torch.nn.Parameter(torch.ones(8))),
}


@pytest.mark.parametrize("why", STEPS_ASIDE)
def test_steps_aside_where_a_module_in_between_was_changed(why, calls):
    model = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    STEPS_ASIDE[why](model.stages[0].blocks[0])
    assert torch.isfinite(model(torch.randn(2, 3, 64, 64))).all()
    assert len(calls) == 3


def test_steps_aside_for_transforms_tracers_and_exporters(calls):
    model = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.func.vmap(lambda x: model(x[None]))(images)
    with torch.autograd.forward_ad.dual_level():
        model(torch.autograd.forward_ad.make_dual(images, images))
    torch.jit.trace(model, images, check_trace=False)
    torch.jit.script(model)(images)
    program = torch.export.export(model, (images,))
    assert not calls
    assert "timm_convnextv2" not in str(program.graph)
    model(images)
    assert len(calls) == 4


def flops(model: torch.nn.Module, images: torch.Tensor, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        out = model(images).sum()
        if backward:
            out.backward()
    return counter.get_total_flops()


def test_flops_are_counted():
    """Forward as stock timm's; backward twice that, but for the stem, whose input needs no gradient."""
    shape, images = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), torch.randn(2, 3, 64, 64)
    model, stock = timm.create_model("convnextv2_atto", **shape), convnext.convnextv2_atto(**shape)
    for name in ("eager", "fused"):
        with use_backend(name):
            assert flops(model, images) == flops(stock, images) > 0
            with torch.no_grad():
                assert flops(model, images) == flops(stock, images)
    # (PyTorch's formula of a depthwise weight gradient counts one without groups, so the plain form's are no reference)
    stem = 2 * 2 * 16 * 16 * 8 * 3 * 4 * 4
    assert flops(model, images, backward=True) == 3 * flops(stock, images) - stem


@pytest.mark.parametrize("size", ["atto", "tiny"])
def test_counters_by_exact_type_count_stock_timms_model(size):
    """As docs/python.md says: thop has rules for nn.Conv2d and nn.Linear, not for their subclasses."""
    shape, images, counted = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), torch.randn(1, 3, 64, 64), []
    for model in (timm.create_model(f"convnextv2_{size}", **shape), getattr(convnext, f"convnextv2_{size}")(**shape)):
        macs = []
        for module in model.modules():
            if type(module) in (torch.nn.Conv2d, torch.nn.Linear):
                module.register_forward_hook(lambda m, _, y, macs=macs: macs.append(y.numel() * m.weight[0].numel()))
        counted.append((flops(model, images), 2 * sum(macs)))
    (total, ours), (again, theirs) = counted
    assert ours < total == again == theirs
