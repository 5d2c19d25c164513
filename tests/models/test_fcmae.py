"""FCMAE: equal to the plain reference, blind to what is masked, and a good citizen of timm."""

import copy
import re
from contextlib import nullcontext
from itertools import product

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import timm_convnextv2
from timm_convnextv2 import FCMAE, FCMAETask, random_mask
from timm_convnextv2.models.fcmae import normalize_target, patchify, unpatchify
from timm_convnextv2.models.reference import reference_forward
from timm_convnextv2.ops import use_backend
from timm_convnextv2.registry import VARIANTS

TOY = dict(depths=(1, 2, 1, 1), dims=(8, 12, 16, 20), decoder_dim=16)


def make(name="atto", seed=0, dtype=torch.float64, **kwargs):
    """A model with every parameter away from its initial value: GRN's start at zero and would hide mistakes."""
    torch.manual_seed(seed)
    model = timm.create_model(f"fcmae_convnextv2_{name}", **kwargs).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def toy(**kwargs):
    return make(**{**TOY, "img_size": 64, **kwargs})


def gradients(model, loss):
    """Gradient of every parameter that pretraining trains."""
    named = {k: p for k, p in model.named_parameters() if not k.startswith("encoder.head.")}
    return dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))


def assert_equals_reference(model, images, mask, rtol=1e-7, atol=1e-10):
    """Loss, prediction, and the gradient of every parameter and pixel, against dense convolutions with masks."""
    results = []
    for forward in (lambda x: model(x, mask), lambda x: reference_forward(model, x, mask)):
        torch.manual_seed(7)  # drop path
        x = images.clone().requires_grad_()
        loss, pred, _ = forward(x)
        (pixels,) = torch.autograd.grad(loss, x, retain_graph=True)
        results.append({"loss": loss, "pred": pred, "pixels": pixels, **gradients(model, loss)})
    fast, plain = results
    for name, value in plain.items():
        assert value.abs().max() > 0, f"{name} is all zero: the comparison shows nothing"
        tolerance = atol * max(1.0, float(value.detach().abs().max()))
        torch.testing.assert_close(fast[name], value, rtol=rtol, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    torch.manual_seed(7)
    only_loss = model(images, mask, return_pred=False)
    assert only_loss.pred is None
    torch.testing.assert_close(only_loss.loss, plain["loss"], rtol=rtol, atol=atol)


@pytest.mark.parametrize("name, narrow", [("atto", 1), ("nano", 4), ("tiny", 6), ("small", 8)])
def test_every_depth_equals_the_reference(name, narrow):
    """Narrow layers from nano on; `test_every_variant_has_its_published_shape` builds them whole, without memory."""
    model = make(name, img_size=64, decoder_dim=32, dims=tuple(d // narrow for d in VARIANTS[name]["dims"]))
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    mask = torch.tensor([[[True, False], [False, True]]])
    assert_equals_reference(model, images, mask)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_its_published_shape(name):
    with torch.device("meta"):
        model = timm.create_model(f"fcmae_convnextv2_{name}")
        out = model(torch.randn(2, 3, 224, 224), timm_convnextv2.models.PackedLayout(random_mask(2, (7, 7), 0.6), 19))
    args = VARIANTS[name]
    assert tuple(len(s.blocks) for s in model.encoder.stages) == args["depths"]
    assert tuple(i["num_chs"] for i in model.encoder.feature_info) == args["dims"]
    published = dict(atto=3.7, femto=5.2, pico=9.1, nano=15.6, tiny=28.6, small=50.3, base=89, large=198, huge=660)
    classifier = 1000 * args["dims"][-1] + 1000
    params = sum(p.numel() for p in model.encoder.parameters()) + classifier
    assert params / 1e6 == pytest.approx(published[name], rel=0.01)
    assert out.pred.shape == (2, 49, 32 * 32 * 3) and out.loss.shape == () and out.mask.shape == (2, 7, 7)


SHAPES = [
    ((96, 96), {}), ((64, 128), dict(in_chans=1)), ((160, 32), dict(in_chans=12)), ((96, 64), dict(patch_size=2)),
    ((24, 40), dict(patch_size=1, in_chans=12)), ((48, 16), dict(patch_size=1)), ((64, 96), dict(conv_mlp=False)),
    ((96, 64), dict(kernel_sizes=3)), ((64, 96), dict(kernel_sizes=(9, 5, 3, 3), decoder_depth=2)),
    ((64, 64), dict(norm_pix_loss=False)), ((64, 96), dict(drop_path_rate=0.5)),
    ((64, 96), dict(use_grn=False, ls_init_value=1e-6)),  # ConvNeXt V1
]  # fmt: skip


@pytest.mark.parametrize(("size", "kwargs"), SHAPES, ids=str)
def test_shapes_equal_the_reference(size, kwargs):
    model = toy(img_size=size, mask_ratio=0.5, **kwargs)
    assert model.stride == {1: 8, 2: 32, 4: 32}[kwargs.get("patch_size", 4)]
    batch = 4 if "drop_path_rate" in kwargs else 2  # else a block may be dropped for all images
    images = torch.randn(batch, kwargs.get("in_chans", 3), *size, dtype=torch.float64)
    assert_equals_reference(model, images, model(images).mask)


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.6, 0.8, 0.95])
def test_ratios_equal_the_reference(ratio):
    """On a 5x6 grid; the mask is drawn by the model, with the count that the ratio says."""
    model = toy(img_size=(40, 48), patch_size=1, mask_ratio=ratio)
    images = torch.randn(3, 3, 40, 48, dtype=torch.float64)
    drawn = model(images).mask
    assert ((~drawn).flatten(1).sum(1) == int(30 * (1 - ratio))).all()
    assert_equals_reference(model, images, drawn)


def test_gradient_checkpointing_changes_nothing():
    images, mask = torch.randn(2, 3, 64, 64, dtype=torch.float64), random_mask(2, (2, 2), 0.5)
    results = []
    for enable in (False, True):
        model = toy(drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        assert all(stage.grad_checkpointing == enable for stage in model.encoder.stages)
        calls = []
        model.encoder.stages[1].blocks[0].norm.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        torch.manual_seed(5)
        loss = model(images, mask).loss
        results.append(gradients(model, loss) | {"loss": loss})
        assert len(calls) == 1 + enable
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_close_to_float64(dtype):
    """float32, and autocast: the loss and the direction of the whole gradient."""
    model = toy(img_size=(64, 96))
    images, mask = torch.randn(4, 3, 64, 96), random_mask(4, (2, 3), 0.5)
    exact = model(images.double(), mask).loss
    truth = torch.cat([g.flatten() for g in gradients(model, exact).values()])
    low = copy.deepcopy(model).float()
    with nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype):
        out = low(images, mask)
    assert out.loss.dtype == torch.float32
    assert out.pred.dtype == dtype
    found = torch.cat([g.flatten() for g in gradients(low, out.loss).values()]).double()
    rtol, angle = {torch.float32: (1e-5, 1e-9), torch.bfloat16: (2e-2, 5e-3), torch.float16: (5e-3, 5e-4)}[dtype]
    assert out.loss.item() == pytest.approx(exact.item(), rel=rtol)
    assert 1 - F.cosine_similarity(found, truth, dim=0) < angle
    assert float(found.norm()) == pytest.approx(float(truth.norm()), rel=max(rtol, 1e-4) * 2)


def test_patchify_order_is_row_column_channel():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # patch 4 of image 1 is rows 2-3, columns 2-3
    expected = [int(images[1, ch, r, c]) for r in (2, 3) for c in (2, 3) for ch in range(3)]
    assert patches[1, 4].tolist() == expected
    assert torch.equal(unpatchify(patches, (2, 3), 2), images)


def test_targets_use_the_unbiased_variance():
    patch = torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=torch.float64)  # mean 3, squares 4 + 1 + 0 + 9 = 14, / 3
    normal, mean, std = normalize_target(patch)
    assert mean.item() == 3 and std.item() == pytest.approx((14 / 3 + 1e-6) ** 0.5, rel=1e-12)
    torch.testing.assert_close(normal * std + mean, patch)
    assert normalize_target(torch.full((1, 4), 0.5))[0].abs().max() == 0  # flat patches stay finite


@pytest.mark.parametrize("norm", [True, False])
def test_loss_by_hand(norm):
    """Prediction forced to known numbers; loss summed pixel by pixel over the removed patches only."""
    model = toy(norm_pix_loss=norm, in_chans=2, patch_size=1, img_size=(16, 24))
    nn.init.zeros_(model.pred.weight)
    images = torch.randn(2, 2, 16, 24, dtype=torch.float64)
    mask = torch.tensor([[[1, 0, 1], [0, 0, 1]], [[0, 1, 1], [1, 0, 0]]]).bool()
    squares = []
    for b, r, c in mask.nonzero().tolist():
        patch = images[b, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
        if norm:
            mean = patch.sum() / 128
            patch = (patch - mean) / (((patch - mean) ** 2).sum() / 127 + 1e-6) ** 0.5
        for i, j, ch in product(range(8), range(8), range(2)):
            squares.append((model.pred.bias[(i * 8 + j) * 2 + ch] - patch[ch, i, j]) ** 2)
    expected = sum(squares) / len(squares)
    assert len(squares) == 6 * 128
    torch.testing.assert_close(model(images, mask).loss, expected)
    torch.testing.assert_close(reference_forward(model, images, mask).loss, expected)


def test_grn_sums_over_the_visible_tokens_of_one_image():
    """GRN's input and output inside the packed encoder, against the formula on each image's own tokens."""
    model = toy(in_chans=1)
    images = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    mask = torch.tensor([[[0, 1], [1, 1]], [[1, 1], [0, 1]]]).bool()
    grn, seen = model.encoder.stages[3].blocks[0].mlp.grn, {}
    grn.register_forward_hook(lambda module, args, out: seen.update(x=args[0].detach(), out=out.detach()))
    model(images, mask)
    assert seen["x"].shape == (2, 1, 1, 80)  # one visible patch per image, one token per patch, 4 x 20 channels
    for x, out in zip(seen["x"].view(2, 80), seen["out"].view(2, 80), strict=True):
        norms = x.abs()
        expected = x + grn.weight * x * norms / (norms.sum() / 80 + 1e-6) + grn.bias
        torch.testing.assert_close(out, expected.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kwargs", [{}, dict(patch_size=1), dict(patch_size=2), dict(conv_mlp=False, kernel_sizes=5)])
@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
def test_nothing_masked_is_the_dense_model(kwargs, grid):
    model = toy(**kwargs)
    images = torch.randn(2, 3, grid[0] * model.stride, grid[1] * model.stride, dtype=torch.float64)
    layout = model.visible(images, torch.zeros(2, *grid, dtype=torch.bool))
    features = model.forward_encoder(images, layout)
    dense = model.encoder.forward_features(images)
    torch.testing.assert_close(features, dense.flatten(2).transpose(1, 2))
    upstream = torch.randn_like(features)
    named = [p for k, p in model.encoder.named_parameters() if not k.startswith("head.")]
    grads = (torch.autograd.grad(out, named, upstream) for out in (features, dense.flatten(2).transpose(1, 2)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(96, 96), (64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_pixels_cannot_reach_the_encoder(size, dtype):
    """Bit for bit: features, and their gradients by parameter and by visible pixel, whatever lies under the mask."""
    model = toy(img_size=size, dtype=torch.float32)
    images = torch.randn(3, 3, *size)
    mask = random_mask(3, (size[0] // 32, size[1] // 32), 0.5)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1).expand_as(images)
    upstream = None

    def run(x):
        nonlocal upstream
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = model.forward_encoder(x, model.visible(x, mask))
        upstream = torch.randn_like(features) if upstream is None else upstream
        named = [p for k, p in model.encoder.named_parameters() if not k.startswith("head.")]
        return features, *torch.autograd.grad(features, (*named, x), upstream)

    first = run(images)
    assert first[-1][~hidden].abs().min() > 0 and not first[-1][hidden].any()
    for fill in (0.0, 1e30, float("inf"), float("nan"), None):
        changed = torch.where(hidden, torch.randn_like(images) if fill is None else fill, images)
        for before, after in zip(first, run(changed), strict=True):
            assert torch.equal(before, after)
    seen = run(torch.where(hidden, images, images + 1))  # the test can fail
    assert not torch.equal(first[0], seen[0])


def test_a_loss_needs_a_visible_and_a_masked_patch():
    model = toy(img_size=64)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for mask in (torch.zeros(2, 2, 2).bool(), torch.ones(2, 2, 2).bool()):
        with pytest.raises(ValueError, match="at least one visible and one masked patch"):
            model(images, mask)
    model.mask_ratio = 0.9
    with pytest.raises(ValueError, match="mask_ratio=0.9 leaves 0 of 4"):
        model(images)


def test_given_masks_and_images_are_checked():
    model = toy()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="torch.bool"):  # other masks: test_masking.py
        model(images, torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="no images"):
        model(images[:0])
    for bad in (images[:, :1], images[0], (images * 255).to(torch.uint8)):
        with pytest.raises(ValueError, match=r"float \[B, 3, H, W\].*in_chans"):
            model(bad)


SIZES = [
    ((40, 40), {}), ((224, 100), {}), ((33, 65), {}), (20, dict(mask_ratio=0.95)), ((45, 70), dict(patch_size=1)),
    ((31, 33), dict(patch_size=2)), ((1, 1), {}),
]  # fmt: skip


@pytest.mark.parametrize(("size", "kwargs"), SIZES, ids=str)
def test_sizes_named_in_the_message_work(size, kwargs):
    options = {**TOY, "device": "meta", **kwargs}
    with pytest.raises(ValueError, match="multiple of the encoder's stride") as error:
        timm.create_model("fcmae_convnextv2_atto", img_size=size, **options)
    named = re.search(r"nearest that work: ([^.]*)\.", str(error.value))[1].split(" or ")
    assert len(set(named)) == len(named)
    h, w = (size, size) if isinstance(size, int) else size
    for text in named:
        near = tuple(map(int, text.split("x")))
        model = timm.create_model("fcmae_convnextv2_atto", img_size=near, **options)
        assert max(abs(near[0] - h), abs(near[1] - w)) < (5 if "mask_ratio" in kwargs else 2) * model.stride
        model = timm.create_model("fcmae_convnextv2_atto", img_size=near, **{**TOY, **kwargs})
        with pytest.raises(ValueError, match="nearest that work"):
            model(torch.randn(1, 3, h, w))
        model(torch.randn(1, 3, *near))


MISTAKES = [
    (dict(num_classes=10), "num_classes=10"), (dict(features_only=True), "use 'convnextv2_atto'"),
    (dict(output_stride=16), "output_stride=32"), (dict(stem_type="overlap"), "stem_type='patch'"),
    (dict(mask_ratio=1.0), "mask_ratio"), (dict(decoder_depth=0), "decoder_depth=0"), (dict(img_size=32), "1 patch"),
    (dict(img_size=100), "96x96 or 128x128"), (dict(img_size=192, patch_size=8), "too large"),
    (dict(kernel_sizes=4), "odd"),
]  # fmt: skip


@pytest.mark.parametrize(("kwargs", "message"), MISTAKES)
def test_options_that_cannot_be_meant(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("fcmae_convnextv2_atto", **kwargs)


def test_defaults_are_the_papers():
    model = timm.create_model("fcmae_convnextv2_atto")
    assert (model.img_size, model.in_chans, model.stride, model.mask_ratio) == ((224, 224), 3, 32, 0.6)
    assert len(model.decoder) == 1 and model.proj.out_channels == 512 and model.norm_pix_loss
    out = model(torch.randn(1, 3, 224, 224))
    assert (~out.mask).sum() == 19 and out.pred.shape == (1, 49, 3072)
    assert out.loss.item() == pytest.approx(1, abs=0.15)  # a fresh prediction of normalised pixels


def test_every_parameter_is_initialised(monkeypatch):
    """torch's own initialisation replaced by NaN: what is left of it was never set. Then the published values."""

    def nan(module):
        for p in module.parameters(recurse=False):
            nn.init.constant_(p, float("nan"))

    for cls in (nn.Linear, nn.Conv2d):
        monkeypatch.setattr(cls, "reset_parameters", nan)
    assert nn.Linear(2, 2).weight.isnan().all() and nn.Conv2d(1, 1, 1).bias.isnan().all()
    for name in ("atto", "tiny"):
        model = timm.create_model(f"fcmae_convnextv2_{name}", decoder_depth=2, dims=(24, 32, 40, 48), decoder_dim=128)
        grn = {k for k, m in model.named_modules() if type(m).__name__ == "GlobalResponseNorm"}
        assert len(grn) == sum(VARIANTS[name]["depths"]) + 2
        for key, p in model.named_parameters():
            module = key.rpartition(".")[0]
            assert p.isfinite().all(), key
            if key == "mask_token" or p.ndim > 1:
                assert p.std().item() == pytest.approx(0.02, rel=0.2), key
                assert abs(p.mean().item()) < 0.1 * 0.02 + 0.1 / p.numel() ** 0.5, key
            elif key.endswith("bias") or module in grn:
                assert not p.any(), key
            else:
                assert (p == 1).all(), key


def test_task_gives_timm_what_it_expects():
    task = FCMAETask(toy(dtype=torch.float32), verbose=False)
    images, mask = torch.randn(2, 3, 64, 64), random_mask(2, (2, 2), 0.5)
    out = task(images, mask)
    assert isinstance(out, dict) and torch.equal(out["mask"], mask)
    out["loss"].backward()
    left = {k for k, p in task.trainable_module.named_parameters() if p.grad is None}
    assert left == {"encoder.head.norm.weight", "encoder.head.norm.bias"}  # frozen: DDP would wait for them
    assert not any(task.trainable_module.get_parameter(k).requires_grad for k in left)
    drawn = task(images)
    assert drawn["mask"].shape == (2, 2, 2) and drawn["loss"].requires_grad

    state = task.get_checkpoint_state()
    assert state.keys() == {"state_dict"}
    fresh = FCMAETask(toy(dtype=torch.float32, seed=9))
    assert not torch.equal(fresh(images, mask)["loss"], out["loss"])
    fresh.load_checkpoint_state(state["state_dict"])
    assert torch.equal(fresh(images, mask)["loss"], out["loss"])


def test_task_compiles():
    """The compiled model, its checkpoint and its EMA are those of the plain one; no graph break in the forward."""
    torch._dynamo.reset()
    plain, task = (FCMAETask(toy(dtype=torch.float32, depths=(1, 1, 1, 1))) for _ in range(2))
    task.setup_ema()
    task.compile(backend="aot_eager", fullgraph=True)
    for seed in range(2):
        torch.manual_seed(seed)
        images, mask = torch.randn(2, 3, 64, 64), random_mask(2, (2, 2), 0.5)
        losses = [t(images, mask)["loss"] for t in (plain, task)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    for a, b in zip(plain.trainable_module.parameters(), task.trainable_module.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    task.update_ema()
    for ema in (False, True):
        (state,) = task.get_checkpoint_state(ema=ema).values()
        assert state.keys() == plain.trainable_module.state_dict().keys()


@pytest.mark.parametrize("size", ["atto", "tiny"])
@pytest.mark.parametrize("name", ["convnextv2", "fcmae_convnextv2"])
def test_constructors_have_the_defaults_of_create_model(name, size):
    """Whoever builds the exported classes gets the paper's network, tiny without arguments; version 1 is by asking."""
    build = FCMAE if name == "fcmae_convnextv2" else timm_convnextv2.ConvNeXtV2
    with torch.device("meta"):
        model, created = build(**(VARIANTS[size] if size == "atto" else {})), timm.create_model(f"{name}_{size}")
        first = build(use_grn=False, ls_init_value=1e-6).state_dict()
    assert str(model) == str(created)
    plain = {k: v for k, v in vars(model).items() if not k.startswith("_") and isinstance(v, int | float | str | tuple)}
    assert plain == {k: v for k, v in vars(created).items() if k in plain}
    assert any(key.endswith(".gamma") for key in first) and not any("grn" in key for key in first)


# --- transforms of torch.func, and gradients of gradients

SMALL = dict(img_size=32, patch_size=1, depths=(1, 1, 1, 1), decoder_dim=8)


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_gradients_of_gradients(backend):
    model, images, mask = toy(**SMALL), torch.randn(2, 3, 32, 32, dtype=torch.float64), random_mask(2, (4, 4), 0.8)
    model.encoder.head.requires_grad_(False)
    parameters = {k: v for k, v in model.named_parameters() if v.requires_grad}

    def loss(values):
        return functional_call(model, values, (images, mask), {"return_pred": False}).loss

    def squares(gradients):
        return sum((g**2).sum() for g in gradients)

    values = {k: v.detach() for k, v in parameters.items()}
    once, expected = grad(loss)(values), grad(lambda p: squares(grad(loss)(p).values()))(values)
    with use_backend(backend):
        first = torch.autograd.grad(loss(parameters), [*parameters.values()], create_graph=True)
        found = torch.autograd.grad(squares(first), [*parameters.values()])
    for (name, value), here, twice in zip(expected.items(), first, found, strict=True):
        torch.testing.assert_close(here, once[name])
        torch.testing.assert_close(twice, value, msg=name)


def test_forward_mode_and_vmap():
    """`jvp` is the derivative along a direction, and `vmap` with one mask a loop over the images."""
    model, images, mask = toy(**SMALL), torch.randn(3, 3, 32, 32, dtype=torch.float64), random_mask(1, (4, 4), 0.5)

    def loss(image):
        return model(image[None], mask, return_pred=False).loss

    direction = torch.randn_like(images[0])
    gradient = grad(loss)(images[0])
    torch.testing.assert_close(jvp(loss, (images[0],), (direction,))[1], (gradient * direction).sum())
    torch.testing.assert_close(vmap(loss)(images), torch.stack([loss(image) for image in images]))
    torch.testing.assert_close(vmap(grad(loss))(images)[0], gradient)
