"""The model of the training step in `benchmarks`: what it counts against what PyTorch counts."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_convnextv2  # noqa: F401  (registers the models)
from benchmarks.roofline import GPU, forward_flops, is_model, seconds
from benchmarks.step_model import Kernel, counted, fcmae_kernels, masked_dense_step, total
from benchmarks.triton_kernels import load_sizes, occupancy
from timm_convnextv2.models.explain import explanation
from timm_convnextv2.models.reference import reference_forward
from timm_convnextv2.ops import use_backend

# many small patches and few of them visible, so that windows are convolved in every stage
SHAPE = dict(
    img_size=(80, 40), patch_size=1, mask_ratio=0.95, depths=(1, 2, 1, 1), dims=(8, 12, 16, 20), decoder_dim=24
)


@pytest.fixture
def model():
    return timm.create_model("fcmae_convnextv2_atto", **SHAPE)


def step_flops(model, batch: int, forward) -> tuple[int, int]:
    """FLOPs of the forward, and of forward and backward, as PyTorch counts."""
    images = torch.randn(batch, 3, *model.img_size)
    mask = model.visible(images).mask
    with FlopCounterMode(display=False) as counter:
        loss = forward(model, images, mask)
        ahead = counter.get_total_flops()
        loss.backward()
    return ahead, counter.get_total_flops()


def test_flops_are_those_that_pytorch_counts(model):
    with use_backend("fused"):
        assert not any("eager" in line for line in explanation(model).splitlines() if "packed" in line)
        ahead, both = step_flops(model, 3, lambda m, x, mask: m(x, mask, return_pred=False).loss)
    kernels = [k for k in fcmae_kernels(model, 3) if is_model(k)]
    assert sum(k.flops for k in kernels) == both
    assert forward_flops(kernels) == ahead


def test_flops_of_dense_with_masks(model):
    """Matrix products; PyTorch's count of a depthwise weight gradient is too large by the number of channels."""
    _, both = step_flops(model, 2, lambda m, x, mask: reference_forward(m, x, mask).loss)
    kernels = masked_dense_step(model, 2, autocast=False)
    depthwise = [k for k in kernels if k.unit == "vector" and "convolution" in k.name]
    assert len(depthwise) == 2 * 6
    dense = fcmae_kernels(model, 2, visible=50, optimizer=False)
    ours = [k for k in dense if k.name.startswith("depthwise")]
    assert sum(k.flops for k in depthwise) == sum(k.flops for k in ours)
    products = total(kernels, "tensor")[0]
    assert 0 < products < both
    # the reference predicts the visible patches, too
    more = 3 * 2.0 * 2 * 2 * SHAPE["decoder_dim"] * 8**2 * 3
    assert products == pytest.approx(total(dense, "tensor")[0] + more, rel=1e-9)


def test_bytes_of_matrix_products(model):
    """Of the plain operations under autocast, within what the casts of gradients to float32 make."""
    images = torch.randn(3, 3, *model.img_size)
    layout = model.visible(images)

    def step() -> None:
        with use_backend("eager"), torch.autocast("cpu", torch.bfloat16):
            loss = model(images, layout, return_pred=False).loss
        loss.backward()

    found = sum(k.bytes for k in counted(step) if k.name in ("mm", "addmm", "bmm", "baddbmm"))
    assert found > 0
    names = ("Linear", "projection", "prediction")
    ours = [k for k in fcmae_kernels(model, 3) if k.unit == "tensor" and k.name.startswith(("first", "second", *names))]
    bare = sum(k.bytes for k in ours)
    assert bare == pytest.approx(found, rel=0.25)


@pytest.mark.parametrize("what", ["linear", "expanded", "view", "empty"])
def test_counted_bytes(what):
    x, w = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4)
    if what == "linear":
        found = counted(lambda: F.linear(x, w).sum().backward())
        assert [k.name for k in found][:1] == ["mm"] and found[0].flops == 2 * 6 * 4 * 5
        assert found[0].bytes == 4 * (6 * 4 + 4 * 5 + 6 * 5) and found[0].unit == "tensor"
        assert sum(k.flops for k in found if k.name == "mm") == 2 * 2 * 6 * 4 * 5
    elif what == "expanded":
        (found,) = counted(lambda: torch.add(w, w.new_ones(()).expand(5, 4)))[-1:]
        assert found.bytes == 4 * (5 * 4 * 2 + 1) and found.unit == "vector"
    elif what == "view":
        assert counted(lambda: w.view(-1).t().detach()) == []
    else:
        assert counted(lambda: torch.empty_like(w)) == []


def test_grouped_convolution_counts_its_groups():
    conv = nn.Conv2d(8, 8, 7, padding=3, groups=8)
    x = torch.randn(2, 8, 9, 5, requires_grad=True)
    once = 2 * 2 * 8 * 9 * 5 * 49
    found = [k for k in counted(lambda: conv(x).sum().backward()) if "convolution" in k.name]
    assert [k.flops for k in found] == [once, 2 * once] and {k.unit for k in found} == {"vector"}


def test_lists_grow_with_what_they_describe(model):
    small, large = (total(fcmae_kernels(model, n, optimizer=False)) for n in (4, 8))
    assert all(1.5 < b / a <= 2 for a, b in zip(small, large, strict=True))  # weights do not grow
    assert total(fcmae_kernels(model, 4, visible=50))[0] > total(fcmae_kernels(model, 4))[0]
    adam = fcmae_kernels(model, 4)[-1]
    assert adam.part == "AdamW" and adam.bytes == 28 * sum(p.numel() for p in model.parameters())


def test_layer_norm_of_the_token_mlp_moves_14_bytes_a_number():
    """Beside two statistics a row in each of three kernels, and sums of weight and bias gradients."""
    model = timm.create_model("fcmae_convnextv2_atto", device="meta")
    found = [k for k in fcmae_kernels(model, 64) if k.part == "LayerNorm"]
    numbers = sum(k.flops for k in found if k.name == "LayerNorm") / 8
    rows = 64 * 19 * sum(n * p**2 for n, p in zip((2, 2, 6, 2), (8, 4, 2, 1), strict=True))
    sums = sum(k.bytes for k in found) - 14 * numbers - 3 * 8 * rows
    assert 0 < sums < 14 * numbers / 6


def test_layer_norms_of_stem_and_downsampling_move_the_types_that_autocast_leaves():
    """The stem's gives float32, which the first stage hands to the next layer; `tests/ops/test_layer_norm.py` looks."""
    model = timm.create_model("fcmae_convnextv2_atto", device="meta")
    found = [
        k for k in fcmae_kernels(model, 64) if k.name.startswith("LayerNorm") and k.part in ("stem", "downsampling")
    ]
    numbers = [64 * 19 * p**2 * C for p, C in ((8, 40), (8, 40), (4, 80), (2, 160))]
    assert [k.flops for k in found] == [n * per for n in numbers for per in (8, 16)]
    moved = [(2 + 4, 4 + 2 + 2), (4 + 2, 2 + 4 + 4), (2 + 2, 2 + 2 + 2), (2 + 2, 2 + 2 + 2)]  # forward, backward
    for i, n in enumerate(numbers):
        rows = 64 * 19 * (8, 8, 4, 2)[i] ** 2
        forward, backward = (found[2 * i + j].bytes - moved[i][j] * n - 8 * rows for j in (0, 1))
        assert forward == 0 and 0 < backward < 0.3 * moved[i][1] * n  # sums of a program's rows


def test_a_float32_residual_stream_moves_more():
    model = timm.create_model("fcmae_convnextv2_atto", device="meta")
    found = sum(k.bytes for k in fcmae_kernels(model, 64) if k.part == "residual")
    T, C = 64 * 19 * 64, 40
    half = (2 * 2 + 2 + 3 * 2) * T * C  # of a block: shortcut and bias, bias gradient, sum of both gradients
    full = (2 * 4 + 2 + 3 * 4 + (2 + 2 * 4) + 3 * (2 + 4)) * T * C
    later = sum(depth * half // 2**s for s, depth in enumerate((2, 2, 6, 2)) if s)  # a quarter of the tokens, twice C
    assert found == 2 * full + later


def test_seconds_take_what_takes_longest():
    gpu, half = GPU(100.0, 10.0, 1.0), GPU(0.5, 0.5, 0.5)
    kernels = [Kernel("a", "mm", 200, 1, "tensor"), Kernel("a", "add", 1, 3), Kernel("b", "conv", 40, 1)]
    assert seconds(kernels, gpu) == {"a": 2 + 3, "b": 4}
    assert seconds(kernels, gpu, half) == {"a": 4 + 6, "b": 8}
    assert seconds(kernels, gpu, launch=5) == {"a": 10, "b": 5}


def test_loads_and_occupancy_are_read():
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v2.b64 { %rd2 }, [ %rd3 ];
    ld.global.b16 %rs1, [ %rd4 ];  ld.shared.v4.b32 %r9, [%r8];  ld.param.b64 %rd1, [p];
    """
    assert load_sizes(ptx) == {16: 2, 2: 1}
    assert occupancy(32, 0, 4) == 1 and occupancy(102, 0, 4) == 0.25 and occupancy(255, 0, 8) == 0.125
    assert occupancy(16, 81 * 1024, 4) == 2 * 4 / 64
