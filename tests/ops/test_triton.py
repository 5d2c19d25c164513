"""Triton kernels against float64 references and against their twins in PyTorch calls.

Interpreted on CPU everywhere, compiled where there is a CUDA GPU.
"""

import inspect
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from kernels import nodes, release
from test_token_mlp import assert_same, both, make, plain

from timm_convnextv2 import ops
from timm_convnextv2.models.masking import random_mask
from timm_convnextv2.models.packing import PackedLayout
from timm_convnextv2.ops import torch_kernels
from timm_convnextv2.ops.token_mlp import fused_token_mlp

triton = pytest.importorskip("triton", reason="needs triton, which PyTorch brings along on Linux only")
tl = triton.language
VERSION = release(triton.__version__)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT32 = 2e-6  # relative error allowed to a sum in float32
# images, tokens, channels; 1025 tokens are five parts of a sum, 257 leave one token to the last part
SHAPES = [(3, 63, 160), (2, 257, 3), (2, 1, 1), (1, 20, 1408), (1, 1025, 4), (2, 1, 352), (3, 19, 128)]
# rows, channels; 601 rows are several programs, the last one not full, 2816 channels are the widest model's
ROWS = [((3, 63), 40), ((601,), 3), ((2, 9), 160), ((33, 1), 1), ((5,), 2816), ((17, 2), 31)]
# side of a patch, kernel, channels, grid
PATCHES = [
    (1, 7, 40, (3, 4)), (2, 3, 40, (3, 3)), (3, 5, 2, (3, 2)), (8, 3, 72, (2, 2)), (1, 3, 352, (2, 3)),
    (1, 1, 1, (1, 2)), (1, 11, 3, (4, 5)), (2, 7, 1, (4, 3)), (4, 7, 40, (2, 3)), (8, 7, 3, (2, 2)),
]  # fmt: skip


def in_all_dtypes(cases: list, few: int = 3) -> list:
    """The first few in every dtype, the others in float32: the interpreter is slow. In the long form all in all."""
    pairs = [(i < few or dtype == torch.float32, case, dtype) for i, case in enumerate(cases) for dtype in DTYPES]
    return [pytest.param(case, dtype, marks=() if quick else pytest.mark.slow) for quick, case, dtype in pairs]


def normal(kernels, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(kernels.device, dtype)


def check_rounded(kernels, out: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """`out` is the exact value but for float32 arithmetic and one rounding to `dtype`."""
    assert out.dtype == dtype and out.shape == exact.shape and out.is_contiguous()
    unit = torch.finfo(dtype).eps / 2
    if kernels.interpreted and dtype == torch.bfloat16:
        unit *= 2  # the interpreter cuts off instead of rounding
    if exact.numel():
        subnormal = unit * torch.finfo(dtype).smallest_normal  # half the distance of the smallest numbers
        error = (out.double() - exact).abs() - unit * exact.abs() - subnormal
        assert error.max() <= FLOAT32 * exact.abs().max()


def check_sum(out: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """`out` is `exact` but for float32 arithmetic on terms whose absolute values sum up to `bound`."""
    assert out.dtype == torch.float32 and out.shape == exact.shape
    assert ((out.double() - exact).abs() <= FLOAT32 * bound).all()


def check_token_mlp(kernels, h, grad, scale, bias, pull) -> None:
    """All functions on one input; `scale` and `pull` are `[B, 1, F]`."""
    dtype = h.dtype
    x, dy, s, beta, p = (t.double() for t in (h, grad, scale, bias, pull))
    a, leaf = F.gelu(x), x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(leaf).sum(), leaf)
    kept = [t.clone() for t in (h, scale, bias, pull)]

    check_sum(kernels.token_mlp.gelu_square_sum(h), a.square().sum(1), (a * x).abs().sum(1))
    check_sum(kernels.gelu_norms(h, None), a.square().sum(1, keepdim=True).sqrt(), a.abs().sum(1, keepdim=True) + 1)
    check_rounded(kernels, kernels.gelu_scale(h, None, scale, bias), a * s + beta, dtype)
    per_image = (bias * scale).contiguous()
    check_rounded(kernels, kernels.gelu_scale(h, None, scale, per_image), a * s + per_image.double(), dtype)

    d_scale, activation = kernels.gelu_reductions(h, None, grad, scale, bias, True)
    check_sum(d_scale, (dy * a).sum(1, keepdim=True), (dy * x).abs().sum(1, keepdim=True))
    check_rounded(kernels, activation, a * s + beta, dtype)
    d_scale_alone, nothing = kernels.gelu_reductions(h, None, grad, scale, bias, False)
    assert nothing is None and torch.equal(d_scale_alone, d_scale)

    exact = slope * (dy * s + p * a)
    memory = grad.clone()
    dh, db = kernels.gelu_backward(h, None, memory, scale, pull)
    check_rounded(kernels, dh, exact, dtype)
    check_sum(db, exact.sum((0, 1)), ((1 + x.abs()) * ((dy * s).abs() + (p * x).abs())).sum((0, 1)))
    assert (dh.data_ptr() == memory.data_ptr()) == (grad.dtype == dtype) and dh.device == h.device
    assert all(torch.equal(t, k) for t, k in zip((h, scale, bias, pull), kept, strict=True)), "inputs changed"


@pytest.mark.parametrize("shape,dtype", in_all_dtypes(SHAPES), ids=str)
def test_token_mlp(kernels, shape, dtype):
    B, T, C = shape
    h, grad = 2 * normal(kernels, B, T, C, dtype=dtype), normal(kernels, B, T, C, dtype=dtype)
    bias = normal(kernels, C, dtype=dtype)
    check_token_mlp(kernels, h, grad, normal(kernels, B, 1, C), bias, normal(kernels, B, 1, C))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_mlp_of_zeros(kernels, dtype):
    h, grad = torch.zeros(2, 40, 33, dtype=dtype, device=kernels.device), normal(kernels, 2, 40, 33, dtype=dtype)
    row, bias = normal(kernels, 2, 1, 33), normal(kernels, 33, dtype=dtype)
    check_token_mlp(kernels, h, grad, row, bias, row)


def test_large_activations_in_float16(kernels):
    """The squares overflow float16, and so does the square root of their sum."""
    h = (30000 * (1 + 0.5 * torch.rand(2, 300, 40))).to(kernels.device, torch.float16)
    assert torch.isinf(F.gelu(h.double()).square().sum(1).sqrt().half()).all()
    h[:, :, ::4] *= -1
    grad, row, bias = normal(kernels, 2, 300, 40, dtype=torch.float16), normal(kernels, 2, 1, 40), normal(kernels, 40)
    check_token_mlp(kernels, h, grad, row / 1e4, bias, row / 1e8)


def test_half_activations_with_float32_gradient(kernels):
    h, grad = normal(kernels, 2, 20, 40, dtype=torch.bfloat16), normal(kernels, 2, 20, 40)
    check_token_mlp(kernels, h, grad, normal(kernels, 2, 1, 40), normal(kernels, 40), normal(kernels, 2, 1, 40))


def check_layer_norm(kernels, x, weight, bias, eps: float, dtype: torch.dtype) -> None:
    """Values, statistics and gradients against F.layer_norm in float64, and whether the flags are heeded."""
    given = [t.double().requires_grad_() for t in (x, weight, bias)]
    x64, w64, _ = given
    exact = F.layer_norm(x64, x.shape[-1:], *given[1:], eps)
    mean64 = x64.detach().mean(-1, keepdim=True)
    rstd64 = (x64.detach().var(-1, keepdim=True, correction=0) + eps).rsqrt()
    grad = normal(kernels, *x.shape, dtype=dtype)
    kept = [t.clone() for t in (x, weight, bias, grad)]

    tokens, mean, rstd = kernels.layer_norm(x, weight, bias, eps, dtype)
    check_rounded(kernels, tokens, exact.detach(), dtype)
    check_sum(mean, mean64, x64.detach().abs().mean(-1, keepdim=True))
    check_sum(rstd, rstd64, rstd64)

    d_x, d_weight, d_bias = torch.autograd.grad(exact, given, grad.double())
    dx, dw, db = kernels.layer_norm_backward(grad, x, mean, rstd, weight, True, True)
    normalised, dy = ((x64.detach() - mean64) * rstd64).abs(), grad.double().abs()
    rows = tuple(range(x.ndim - 1))
    check_sum(dw, d_weight, (dy * (normalised + mean64.abs() * rstd64)).sum(rows))
    check_sum(db, d_bias, dy.sum(rows))
    # terms that cancel: of one channel, the gradient is zero and they are as large as rstd
    size = ((dy * w64.detach().abs()) * rstd64).max()
    unit = torch.finfo(x.dtype).eps * (1 if kernels.interpreted and x.dtype == torch.bfloat16 else 0.5)
    subnormal = unit * torch.finfo(x.dtype).smallest_normal
    assert dx.dtype == x.dtype and dx.shape == x.shape and dx.is_contiguous()
    assert ((dx.double() - d_x).abs() <= unit * d_x.abs() + subnormal + 4 * FLOAT32 * size).all()

    alone = kernels.layer_norm_backward(grad, x, mean, rstd, weight, True, False)
    assert torch.equal(alone[0], dx) and alone[1:] == (None, None)
    nothing, *alone = kernels.layer_norm_backward(grad, x, mean, rstd, weight, False, True)
    assert nothing is None and torch.equal(alone[0], dw) and torch.equal(alone[1], db)
    assert kernels.layer_norm_backward(grad, x, mean, rstd, weight, False, False) == (None, None, None)
    assert all(torch.equal(t, k) for t, k in zip((x, weight, bias, grad), kept, strict=True)), "inputs changed"


@pytest.mark.parametrize("case,dtype", in_all_dtypes(ROWS), ids=str)
def test_layer_norm(kernels, case, dtype):
    rows, C = case
    x, weight, bias = (normal(kernels, *shape, dtype=dtype) for shape in ((*rows, C), (C,), (C,)))
    check_layer_norm(kernels, x, weight, bias, 1e-6, dtype)


@pytest.mark.parametrize("given,out", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_layer_norm_from_one_type_to_another(kernels, given, out):
    """As under autocast, whose parameters are float32; values far from zero, and rows that overflow float16."""
    weight, bias = normal(kernels, 40), normal(kernels, 40)
    check_layer_norm(kernels, normal(kernels, 2, 19, 40, dtype=given) + 4, weight, bias, 1e-3, out)
    x = 30000 * normal(kernels, 3, 5, 40).clamp(-2, 2)
    check_layer_norm(kernels, x.half(), weight, bias, 1e-6, torch.float16)


@pytest.mark.parametrize("rows", [0, 3])
def test_layer_norm_without_tokens_and_of_zeros(kernels, rows):
    weight, bias, x = normal(kernels, 40), normal(kernels, 40), torch.zeros(2, rows, 40, device=kernels.device)
    tokens, mean, rstd = kernels.layer_norm(x, weight, bias, 1e-6, x.dtype)
    assert torch.equal(tokens, bias.expand_as(x)) and mean.shape == rstd.shape == (2, rows, 1) and not mean.any()
    dx, *sums = kernels.layer_norm_backward(x, x, mean, rstd, weight, True, True)
    assert dx.shape == x.shape and not dx.any() and all(torch.equal(s, torch.zeros_like(weight)) for s in sums)


def packed(kernels, p: int, k: int, C: int, grid: tuple[int, int], dtype: torch.dtype):
    """PackedLayout patches of two images, patches `[N, p, p, C]` with their gradient, weight, bias and index."""
    visible = PackedLayout(
        random_mask(2, grid, 0.45), math.floor(grid[0] * grid[1] * 0.55), torch.device(kernels.device)
    )
    N = visible.ids.numel()
    x, grad = (normal(kernels, N, p, p, C, dtype=dtype) for _ in range(2))
    weight, bias = normal(kernels, C, 1, k, k, dtype=dtype), normal(kernels, C, dtype=dtype)
    return visible, x, grad, weight, bias, visible.windows(p, k // 2)


def dense_depthwise(
    visible: PackedLayout, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same on the whole map: zeros at removed patches before, removed patches dropped after."""
    p, C, k = x.shape[1], x.shape[-1], weight.shape[-1]
    h, w = visible.grid
    B, K = visible.ids.shape
    places = [(b, i // w * p, i % w * p) for b, row in enumerate(visible.ids.tolist()) for i in row]
    dense = x.new_zeros(B, h * p, w * p, C)
    for (b, y, z), patch in zip(places, x, strict=True):
        dense[b, y : y + p, z : z + p] = patch
    out = F.conv2d(dense.permute(0, 3, 1, 2), weight, bias, padding=k // 2, groups=C).permute(0, 2, 3, 1)
    return torch.stack([out[b, y : y + p, z : z + p] for b, y, z in places])


@pytest.mark.parametrize("case,dtype", in_all_dtypes(PATCHES), ids=str)
def test_depthwise(kernels, case, dtype):
    p, k, C, grid = case
    visible, x, grad, weight, bias, index = packed(kernels, p, k, C, grid, dtype)
    given = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = dense_depthwise(visible, *given)
    d_x, d_weight, d_bias = torch.autograd.grad(exact, given, grad.double())
    check_rounded(kernels, kernels.window_conv(x, weight, bias, index), exact.detach(), dtype)
    check_rounded(kernels, kernels.window_conv_input_grad(grad, weight, index), d_x, dtype)
    sizes = [t.detach().abs().requires_grad_() for t in given]
    _, weight_bound, bias_bound = torch.autograd.grad(dense_depthwise(visible, *sizes), sizes, grad.double().abs())
    weight_grad, bias_grad = kernels.window_conv_weight_grad(x, grad, index, k)
    check_sum(weight_grad, d_weight, weight_bound)
    check_sum(bias_grad, d_bias, bias_bound)


def test_depthwise_without_bias_and_with_float32_weights(kernels):
    visible, x, _, weight, _, index = packed(kernels, 2, 7, 40, (3, 3), torch.bfloat16)
    weight = weight.float() + 1e-3 * normal(kernels, 40, 1, 7, 7)
    exact = dense_depthwise(visible, x.double(), weight.double(), None)
    check_rounded(kernels, kernels.window_conv(x, weight, None, index), exact, torch.bfloat16)


def test_depthwise_of_large_values_in_float16(kernels):
    """Products and their sum overflow float16; gradients of the weight come in float32."""
    visible, x, grad, weight, _, index = packed(kernels, 4, 3, 40, (2, 3), torch.float16)
    x, grad = 1000 * x.abs(), 1000 * grad.abs()
    weight64 = weight.double().requires_grad_()
    exact = torch.autograd.grad(dense_depthwise(visible, x.double(), weight64, None), weight64, grad.double())[0]
    assert torch.isinf(exact.half()).all()
    check_sum(kernels.window_conv_weight_grad(x, grad, index, 3)[0], exact, exact)


@pytest.mark.parametrize("shape", [(2, 0, 160), (0, 63, 160)], ids=str)
def test_empty_inputs(kernels, shape):
    B, T, C = shape
    h, row, bias = normal(kernels, *shape), normal(kernels, B, 1, C), normal(kernels, C)
    assert torch.equal(kernels.gelu_norms(h, None), torch.full_like(row, 1e-15))
    assert kernels.gelu_scale(h, None, row, bias).shape == shape
    d_scale, activation = kernels.gelu_reductions(h, None, h, row, bias, True)
    dh, db = kernels.gelu_backward(h, None, h, row, row)
    assert torch.equal(d_scale, torch.zeros_like(row)) and torch.equal(db, torch.zeros_like(bias))
    assert dh.shape == activation.shape == shape
    x, weight, bias = normal(kernels, 0, 2, 2, 3), normal(kernels, 3, 1, 7, 7), normal(kernels, 3)
    index = torch.zeros(0, 8, 8, dtype=torch.int64, device=kernels.device)
    assert kernels.window_conv(x, weight, bias, index).shape == x.shape
    assert kernels.window_conv_input_grad(x, weight, index).shape == x.shape
    sums = kernels.window_conv_weight_grad(x, x, index, 7)
    assert all(torch.equal(s, torch.zeros_like(t)) for s, t in zip(sums, (weight, bias), strict=True))


def test_the_same_numbers_every_time(kernels):
    h, row, bias = normal(kernels, 1, 600, 40), normal(kernels, 1, 1, 40), normal(kernels, 40)
    statistics = kernels.layer_norm(h, bias, bias, 1e-6, h.dtype)[1:]
    _, x, grad, _, _, index = packed(kernels, 4, 3, 40, (2, 3), torch.float32)

    def sums():
        return [
            kernels.gelu_norms(h, None), *kernels.gelu_reductions(h, None, h, row, bias, True),
            *kernels.gelu_backward(h, None, h.clone(), row, row), *kernels.window_conv_weight_grad(x, grad, index, 3),
            *kernels.layer_norm_backward(h, h, *statistics, bias, True, True),
        ]  # fmt: skip

    assert all(torch.equal(a, b) for a, b in zip(sums(), sums(), strict=True))


def test_refuses_what_it_would_misread(kernels):
    h, row, bias = normal(kernels, 2, 6, 8), normal(kernels, 2, 1, 8), normal(kernels, 8)
    _, x, grad, weight, _, index = packed(kernels, 2, 3, 5, (2, 3), torch.float32)
    k, short = kernels, bias[:4]
    for name, call in (
        ("h", lambda: k.gelu_norms(h.double(), None)),
        ("h", lambda: k.gelu_norms(h.transpose(1, 2).contiguous().transpose(1, 2), None)),
        ("scale", lambda: k.gelu_scale(h, None, row[:1], bias)),
        ("bias", lambda: k.gelu_reductions(h, None, h, row, short, True)),
        ("grad", lambda: k.gelu_backward(h, None, h[:, :3].contiguous(), row, row)),
        ("weight", lambda: k.layer_norm(h, short, bias, 1e-6, h.dtype)),
        ("x", lambda: k.layer_norm(h.double(), bias, bias, 1e-6, h.dtype)),
        ("rstd", lambda: k.layer_norm_backward(h, h, h[..., :1].contiguous(), row, bias, True, True)),
        ("index", lambda: k.window_conv(x, weight, None, index.int())),
        ("index", lambda: k.window_conv_weight_grad(x, grad, index, 5)),
        ("odd", lambda: k.window_conv_weight_grad(x, grad, index[:, 1:, 1:].contiguous(), 2)),
        ("weight", lambda: k.window_conv(x, weight[:4].contiguous(), None, index)),
    ):
        with pytest.raises(ValueError, match=rf"(^|\W){name}\W"):
            call()


def test_twins_have_the_same_functions(kernels):
    own = [f for f in vars(torch_kernels).values() if getattr(f, "__module__", "") == torch_kernels.__name__]
    assert {f.__name__ for f in own if f.__name__[0] != "_"} | {"KEEPS_ACTIVATION"} == set(kernels.__all__)
    for name in set(kernels.__all__) - {"KEEPS_ACTIVATION"}:
        ours, theirs = (list(inspect.signature(getattr(k, name)).parameters) for k in (kernels.module, torch_kernels))
        assert ours == theirs, name
    assert torch_kernels.KEEPS_ACTIVATION and not kernels.KEEPS_ACTIVATION
    assert kernels.gelu(torch.zeros(1, 1, 1)) is None


TOLERANCES = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize(
    "B,T,C,dtype,path",
    [*((3, 63, 40, dtype, True) for dtype in DTYPES), (3, 63, 40, DTYPES[0], False), (2, 300, 8, DTYPES[0], False)],
)
def test_fused_token_mlp(as_backend, B, T, C, dtype, path):
    tol = TOLERANCES[dtype]
    device = as_backend.device
    keep = torch.tensor([1.25, 0, 1.25], device=device)[:B] if path else None
    tensors = [t.detach().to(device, dtype).requires_grad_() for t in make(B, T, C)]
    grad = torch.randn(B, T, C, device=device)
    ours, again = both(tensors, keep, grad, [fused_token_mlp, partial(fused_token_mlp, recompute=True)])
    exact = both([t.detach().double().requires_grad_() for t in tensors], keep, grad.double(), [plain])[0]
    assert_same(ours, exact, tol)
    assert_same(again, exact, tol)


@pytest.mark.parametrize("amp", [False, True])
def test_pretraining_and_dense_model(as_backend, amp):
    """Both kinds of model take the kernels and have the reference's loss and gradients."""
    device, used = as_backend.device, []
    sizes = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), img_size=64, decoder_dim=16)
    fcmae = timm.create_model("fcmae_convnextv2_atto", **sizes).to(device)
    for p in fcmae.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, std=0.3)
    images = torch.randn(1, 3, 64, 64, device=device)
    masks = random_mask(1, fcmae.grid(64, 64), 0.5).to(device)
    for model, args in ((fcmae, (images, masks)), (fcmae.encoder, (images,))):
        found = {}
        for name in ("triton", "eager"):
            model.zero_grad()
            with ops.use_backend(name), torch.autocast(device, torch.bfloat16, enabled=amp):
                out = model(*args)
                loss = out.loss if hasattr(out, "loss") else model.forward_features(images).square().mean()
            used.append("token_mlp" in str(nodes(loss)))
            loss.backward()
            found[name] = loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        (ours, our_grads), (theirs, their_grads) = found.values()
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if amp else 1e-5, atol=0)
        assert our_grads.keys() == their_grads.keys()
        size = sum(g.norm() ** 2 for g in their_grads.values()).sqrt()
        for name, g in our_grads.items():
            assert (g - their_grads[name]).norm() <= (5e-2 if amp else 1e-4) * size, name
    assert used == [True, False, True, False]


def compiled(dtype: torch.dtype, arch: int, channels: int, **options) -> dict[str, dict]:
    """The resources of each kernel; needs no GPU."""
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this build of triton has no CUDA backend")
    from benchmarks.triton_kernels import compile_all, resources

    return {name: resources(kernel) for name, kernel in compile_all(dtype, arch, channels, **options)}


COMPILED = [(torch.float32, 100, 40), (torch.bfloat16, 80, 384)]  # the others are slow: a case takes five seconds
COMPILED += [(dtype, arch, C) for arch in (80, 90, 100) for dtype in DTYPES for C in (1, 40, 384)]
COMPILED = [pytest.param(*c, marks=pytest.mark.slow if i > 1 else ()) for i, c in enumerate(dict.fromkeys(COMPILED))]
# before triton 3.6 the interpreter changes the language for the whole process
interprets = not isinstance(getattr(tl, "sum", None), triton.JITFunction)
compiles = pytest.mark.skipif(interprets or VERSION < (3, 6), reason="needs triton 3.6, without TRITON_INTERPRET")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@compiles
@pytest.mark.parametrize("dtype,arch,C", COMPILED)
def test_compiles_for_cuda_without_spilling_registers(dtype, arch, C, monkeypatch, tmp_path):
    """The interpreter accepts what the compiler refuses, and CI has no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = compiled(dtype, arch, C)
    assert set(found) == {
        "layer_norm", "layer_norm_backward", "gelu_square_sum", "gelu_scale", "gelu_reductions", "gelu_backward",
        "depthwise", "depthwise turned", "depthwise_weight_grad",
    }  # fmt: skip
    spilled = {name: kernel["spilled bytes"] for name, kernel in found.items()}
    if VERSION >= (3, 9) and arch == 90:  # with 384 channels
        assert spilled.pop("gelu_backward") <= 16
    assert not any(spilled.values()), spilled
    assert all(16 <= kernel["registers"] <= 255 and kernel["occupancy"] >= 0.1 for kernel in found.values())
    for name, kernel in found.items():  # the widest loads there are
        if C % 8 == 0:
            assert kernel["bytes x loads"].startswith("16x"), name


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@compiles
def test_spilled_registers_are_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = compiled(torch.float32, 90, 128, maxnreg=24)
    assert found["gelu_backward"]["spilled bytes"] > 0 and found["gelu_backward"]["registers"] <= 24
