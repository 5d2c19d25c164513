"""The registered `convnextv2_*` models against stock timm's, which `timm.models.convnext` still builds.

Weights are never the initial ones (GRN would be an identity): `randomize` fills every parameter.
"""

import copy
import io
import json
import shutil
import subprocess
import sys
from itertools import product

import pytest
import timm
import torch
from helpers import environment, hub_cache
from safetensors.torch import save_file
from timm.models import convnext as stock_module
from torch import nn

import timm_convnextv2
from timm_convnextv2 import ConvNeXtV2
from timm_convnextv2.checkpoint import to_official
from timm_convnextv2.models import ConvNeXtV2Block
from timm_convnextv2.ops import use_backend
from timm_convnextv2.registry import VARIANTS

NAMES = [f"convnextv2_{size}" for size in VARIANTS]
LIGHT = NAMES[:5]
SMALL = dict(depths=(1, 2, 2, 1), dims=(8, 16, 24, 32), num_classes=5)
FORWARD_TOL, GRAD_TOL = 5e-6, 2e-5  # of the largest magnitude; measured 4e-7 and 3e-6


def stock(name: str, **kwargs) -> nn.Module:
    return getattr(stock_module, name)(**kwargs)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        bound = 1.0 if ".grn." in name else 0.15
        p.uniform_(-bound, bound, generator=generator)
        if p.ndim == 1 and name.endswith("weight") and ".grn." not in name:
            p.add_(1)  # norms keep their gain, so that gradients reach the stem
    return model


def small_pair(name: str = "convnextv2_atto", **kwargs) -> tuple[nn.Module, nn.Module]:
    """Ours and stock's, equal random weights, a few thousand parameters."""
    kwargs = {**SMALL, **kwargs}
    ours, theirs = timm.create_model(name, **kwargs), stock(name, **kwargs)
    theirs.load_state_dict(randomize(ours).state_dict(), strict=True)
    return ours, theirs


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, f"{tuple(a.shape)} instead of {tuple(b.shape)}"
    assert torch.isfinite(a).all()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-8)).item()


def assert_same_features(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        assert error(ours(x), theirs(x)) < FORWARD_TOL
        assert error(ours.forward_features(x), theirs.forward_features(x)) < FORWARD_TOL
        final, levels = ours.forward_intermediates(x)
        final_stock, levels_stock = theirs.forward_intermediates(x)
        assert len(levels) == len(levels_stock) == 4
        for a, b in zip([final, *levels], [final_stock, *levels_stock], strict=True):
            assert error(a, b) < FORWARD_TOL


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, seed: int | None = None) -> None:
    """Output, and gradients of every parameter and of the input; frees gradients as it goes."""
    outputs, x_grads = [], []
    weight = None
    own = dict(ours.named_parameters())
    seen = set()
    hooks = []
    for name, p in theirs.named_parameters():

        def compare(p, name=name):
            assert error(own[name].grad, p.grad) < GRAD_TOL, name
            own[name].grad = p.grad = None
            seen.add(name)

        hooks.append(p.register_post_accumulate_grad_hook(compare))
    for model in (ours, theirs):
        if seed is not None:
            torch.manual_seed(seed)
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = model(leaf)
        if weight is None:
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        (out * weight).sum().backward()
        outputs.append(out.detach())
        x_grads.append(leaf.grad)
    for hook in hooks:
        hook.remove()
    assert error(*outputs) < FORWARD_TOL
    assert error(*x_grads) < GRAD_TOL
    unused = {k for k, p in own.items() if p.grad is None} - seen
    assert seen | unused == set(own) and seen
    assert not unused or all(k.startswith(("head", "norm_pre")) for k in unused)


# ---------------------------------------------------------------------------------------------- registry and import

REGISTRY_SCRIPT = """
import json, sys, warnings
warnings.simplefilter("error")
with warnings.catch_warnings():
    warnings.simplefilter("default")  # timm's and torch's own are not ours to judge
    import timm
import timm.models._registry as registry

def snapshot():
    names = timm.list_models("convnextv2_*")
    tags = timm.list_models("convnextv2_*", include_tags=True)
    return dict(
        models=[m for m in timm.list_models() if not m.startswith("fcmae_")],
        pretrained=[m for m in timm.list_pretrained() if not m.startswith("fcmae_")],
        with_tags=tags,
        cfgs={t: timm.get_pretrained_cfg(t).to_dict() for t in [*names, *tags]},
        arch_cfgs={n: list(timm.models.get_arch_pretrained_cfgs(n)) for n in names},
        is_pretrained={t: timm.is_model_pretrained(t) for t in [*names, *tags]},
        default_order={n: list(registry._model_default_cfgs[n].tags) for n in names},
    )

stock = snapshot()
modules = set(sys.modules)
import timm_convnextv2
added = sorted(set(sys.modules) - modules)
after = snapshot()
import importlib
import timm_convnextv2
entrypoints = {n: id(timm.model_entrypoint(n)) for n in timm.list_models(["convnextv2_*", "fcmae_*"])}
second = snapshot()
importlib.reload(timm_convnextv2)
unchanged = {n: id(timm.model_entrypoint(n)) for n in timm.list_models(["convnextv2_*", "fcmae_*"])} == entrypoints
for name in ("convnextv2", "fcmae"):
    importlib.reload(sys.modules[f"timm_convnextv2.registry.{name}"])
reloaded = snapshot()
print(json.dumps(dict(
    stock=stock, after=after, second=second, reloaded=reloaded, added=added, entrypoints_unchanged=unchanged,
    fcmae=timm.list_models("fcmae_*"), classes={n: timm.model_entrypoint(n).__module__ for n in entrypoints},
), default=str))
"""


@pytest.fixture(scope="module")
def registry() -> dict:
    command = [sys.executable, "-c", REGISTRY_SCRIPT]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return {**json.loads(result.stdout.splitlines()[-1]), "stderr": result.stderr}


def test_import_prints_no_warning(registry):
    # warnings are errors in that process; logged ones would be on stderr
    assert "overwriting" not in registry["stderr"].lower()
    assert "timm_convnextv2" not in registry["stderr"]


@pytest.mark.parametrize(
    "key", ["models", "pretrained", "with_tags", "cfgs", "arch_cfgs", "is_pretrained", "default_order"]
)
def test_what_timm_lists_stays_as_it_is(registry, key):
    assert registry["stock"][key]
    assert registry["after"][key] == registry["stock"][key]


@pytest.mark.parametrize("when", ["second", "reloaded"])
def test_importing_again_changes_nothing(registry, when):
    assert registry["entrypoints_unchanged"]
    assert registry[when] == registry["stock"]


def test_all_names_are_ours(registry):
    assert registry["fcmae"] == sorted(f"fcmae_{name}" for name in NAMES)
    assert set(registry["classes"]) == {*NAMES, *registry["fcmae"]}
    # timm files models under the last part of their module's name
    assert {n: m.rpartition(".")[2] for n, m in registry["classes"].items()} == {
        n: "fcmae" if n.startswith("fcmae_") else "convnextv2" for n in registry["classes"]
    }
    assert all(module.startswith("timm_convnextv2.") for module in registry["classes"].values())


def test_import_adds_no_heavy_module(registry):
    added = {name.partition(".")[0] for name in registry["added"]}
    assert "timm_convnextv2" in added
    heavy = {"matplotlib", "tifffile", "triton", "datasets", "MinkowskiEngine"}
    assert not added & heavy
    assert added <= {"timm_convnextv2", "timm", "torch"}, "everything else that it needs, timm has imported already"


# ------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", NAMES)
def test_same_names_shapes_and_strict_loading(name):
    """All nine at their true sizes, on the meta device."""
    ours = timm.create_model(name, device="meta")
    theirs = stock(name, device="meta")
    assert type(ours) is ConvNeXtV2 and isinstance(ours, timm.models.ConvNeXt)
    assert type(theirs) is timm.models.ConvNeXt
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(theirs_state)
    assert [v.shape for v in ours_state.values()] == [v.shape for v in theirs_state.values()]
    assert all(p.is_meta for p in ours.parameters())
    ours.load_state_dict(theirs_state, strict=True, assign=True)
    theirs.load_state_dict(ours_state, strict=True, assign=True)


def full_pair(name: str, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Both at true size with shared random weights, each loaded strictly from the other."""
    ours = randomize(timm.create_model(name, device="meta", **kwargs).to_empty(device="cpu"))
    theirs = stock(name, device="meta", **kwargs)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours, theirs


@pytest.mark.parametrize("name", NAMES)
def test_same_numbers_as_stock(name):
    """At true width; from tiny on one block a stage, as all of huge takes half a minute and 8 GB. True depths are in
    the narrow test below, true shapes in `test_same_names_shapes_and_strict_loading`.
    """
    light = name in LIGHT
    ours, theirs = full_pair(name, **({} if light else dict(depths=(1, 1, 1, 1))))
    x = torch.randn(2, 3, 96, 64) if light else torch.randn(1, 3, 32, 64)
    modes = [(True, torch.channels_last), (False, torch.contiguous_format)]
    for train, memory_format in modes if light else modes[:1]:  # the narrow test has all four of each
        ours.train(train), theirs.train(train)
        y = x.contiguous(memory_format=memory_format)
        assert_same_features(ours, theirs, y)
        assert_same_gradients(ours, theirs, y)


def narrow() -> list:
    """All four of mode and memory layout for one size of each depth."""
    sizes = {tuple(shape["depths"]): size for size, shape in VARIANTS.items()}.values()
    return list(product(sizes, (torch.contiguous_format, torch.channels_last), (False, True)))


@pytest.mark.parametrize("size, memory_format, train", narrow())
def test_same_numbers_as_stock_narrow(size, memory_format, train):
    """Each variant's true depths, narrow: every level and gradient, in both modes and both memory layouts."""
    name = f"convnextv2_{size}"
    ours, theirs = small_pair(name, depths=VARIANTS[size]["depths"], dims=(8, 16, 24, 32))
    ours.train(train), theirs.train(train)
    x = torch.randn(2, 3, 32, 64).contiguous(memory_format=memory_format)
    assert_same_features(ours, theirs, x)
    assert_same_gradients(ours, theirs, x)


# --------------------------------------------------------------------------------- everything that stock timm offers

CONV, LINEAR = "convnextv2_atto", "convnextv2_tiny"
OPTIONS = {
    "plain": {},
    "num_classes=0": dict(num_classes=0),
    "num_classes=1": dict(num_classes=1),
    "output_stride=8": dict(output_stride=8),
    "output_stride=16": dict(output_stride=16),
    "drop_rate": dict(drop_rate=0.5),
    "drop_path_rate": dict(drop_path_rate=0.5),
    "max pool": dict(global_pool="max"),
    "catavgmax pool": dict(global_pool="avgmax"),
    "no pool": dict(global_pool="", num_classes=0),
    "kernel_sizes": dict(kernel_sizes=(3, 5, 7, 9)),
    "conv_mlp": dict(conv_mlp=True),
    "linear mlp": dict(conv_mlp=False),
    "act relu": dict(act_layer="relu"),
    "act class": dict(act_layer=nn.SiLU),
    "act gelu_tanh": dict(act_layer="gelu_tanh"),
    "rmsnorm": dict(norm_layer="rmsnorm"),
    "simplenorm": dict(norm_layer="simplenorm"),
    "layernorm2d": dict(norm_layer="layernorm2d", norm_eps=1e-3),
    "batchnorm2d": dict(norm_layer="batchnorm2d", conv_mlp=True),
    "no grn": dict(use_grn=False),
    "layer scale": dict(ls_init_value=0.1),
    "no grn, layer scale": dict(use_grn=False, ls_init_value=0.1),
    "no conv bias": dict(conv_bias=False),
    "stem overlap": dict(stem_type="overlap_tiered"),
    "patch_size=2": dict(patch_size=2),
    "head_norm_first": dict(head_norm_first=True),
    "head_hidden_size": dict(head_hidden_size=12),
    "head_init_scale": dict(head_init_scale=0.01),
}


@pytest.mark.parametrize("name", [CONV, LINEAR])
@pytest.mark.parametrize("option", OPTIONS)
def test_option_as_in_stock(option, name):
    kwargs = {**SMALL, **OPTIONS[option]}
    torch.manual_seed(3)
    ours, drawn = timm.create_model(name, **kwargs), torch.rand(3)
    torch.manual_seed(3)
    theirs, drawn_by_stock = stock(name, **kwargs), torch.rand(3)
    assert torch.equal(drawn, drawn_by_stock)  # as many random numbers were taken
    assert type(ours) is ConvNeXtV2
    initial = theirs.state_dict()
    assert ours.state_dict().keys() == initial.keys()
    assert all(torch.equal(v, initial[k]) for k, v in ours.state_dict().items())
    assert ours.feature_info == theirs.feature_info
    theirs.load_state_dict(randomize(ours).state_dict(), strict=True)
    # float64: the exact gradient of a bias before batch norm is zero, and would be compared with its own rounding
    ours.double().eval(), theirs.double().eval()
    x = torch.randn(4, 3, 64, 96, dtype=torch.float64)
    assert_same_features(ours, theirs, x)
    ours.train(), theirs.train()
    assert_same_gradients(ours, theirs, x, seed=11)
    for (key, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):  # batch norm's running statistics
        assert error(a.float(), b.float()) < FORWARD_TOL, key
    if option in ("drop_rate", "drop_path_rate"):
        with torch.no_grad():
            assert not torch.equal(ours(x), ours(x)), "the random option does nothing"


@pytest.mark.parametrize("in_chans", range(1, 14))
def test_in_chans(in_chans):
    ours, theirs = small_pair(in_chans=in_chans)
    assert ours.stem[0].weight.shape[1] == in_chans
    assert_same_gradients(ours, theirs, torch.randn(2, in_chans, 32, 32))


@pytest.mark.parametrize("name", [CONV, LINEAR])
@pytest.mark.parametrize("feature_cls", [None, "getter", "hook", "dict", "fx"])
@pytest.mark.parametrize("out_indices", [None, (1, 3), (0,), (-2, -1)])
def test_features_only(out_indices, feature_cls, name):
    kwargs = dict(SMALL, features_only=True)
    kwargs.pop("num_classes")
    kwargs |= {k: v for k, v in dict(feature_cls=feature_cls, out_indices=out_indices).items() if v is not None}
    ours, theirs = timm.create_model(name, **kwargs), stock(name, **kwargs)
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    theirs.load_state_dict(randomize(ours).state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 32)
    a, b = (m(x) for m in (ours, theirs))
    a, b = (list(o.values()) if isinstance(o, dict) else o for o in (a, b))
    assert len(a) == (4 if out_indices is None else len(out_indices))
    for level, level_stock in zip(a, b, strict=True):
        assert error(level, level_stock) < FORWARD_TOL


@pytest.mark.parametrize("output_stride", [8, 16])
def test_features_only_with_output_stride(output_stride):
    ours = timm.create_model(CONV, features_only=True, output_stride=output_stride, **SMALL)
    assert [f.shape[-1] for f in ours(torch.randn(1, 3, 64, 64))] == [
        64 // min(s, output_stride) for s in (4, 8, 16, 32)
    ]


@pytest.mark.parametrize("num_classes,pool", [(0, None), (3, None), (0, "max"), (3, "max"), (0, "")])
def test_reset_classifier(num_classes, pool):
    models = small_pair()
    for model in models:
        torch.manual_seed(5)
        model.reset_classifier(num_classes, pool)
    x = torch.randn(2, 3, 64, 64)
    assert models[0].num_classes == num_classes
    assert error(models[0](x), models[1](x)) < FORWARD_TOL
    assert models[0](x).shape == ((2, num_classes) if num_classes else (2, 32, 2, 2) if pool == "" else (2, 32))
    assert type(models[0].get_classifier()) is type(models[1].get_classifier())


@pytest.mark.parametrize("name", [CONV, LINEAR])
def test_grad_checkpointing(name):
    ours, theirs = small_pair(name)
    calls = []
    ours.stages[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 32, 32)
    assert_same_gradients(ours, theirs, x)
    assert len(calls) == 1
    ours.set_grad_checkpointing(True)
    with use_backend("eager"):
        assert_same_gradients(ours, theirs, x)
    assert len(calls) == 3, "checkpointing did not recompute the block"
    assert_same_gradients(ours, theirs, x)
    assert len(calls) == 4, "the fused token MLP recomputes within"


@pytest.mark.parametrize("indices,prune_head", [((0, 1), True), (1, True), ((1, 3), False), ((2,), False)])
def test_prune_intermediate_layers(indices, prune_head):
    ours, theirs = small_pair()
    kept = ours.prune_intermediate_layers(indices, prune_head=prune_head)
    assert kept == theirs.prune_intermediate_layers(indices, prune_head=prune_head)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 3, 32, 32)
    for a, b in zip(
        ours.forward_intermediates(x, indices=kept, intermediates_only=True),
        theirs.forward_intermediates(x, indices=kept, intermediates_only=True),
        strict=True,
    ):
        assert error(a, b) < FORWARD_TOL
    assert error(ours(x), theirs(x)) < FORWARD_TOL


def through_a_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", [CONV, LINEAR])
@pytest.mark.parametrize("clone", [copy.deepcopy, through_a_file])
def test_copies(clone, name):
    model, theirs = small_pair(name)
    other = clone(model)
    assert type(other) is ConvNeXtV2 and other is not model
    assert all(type(block) is ConvNeXtV2Block for stage in other.stages for block in stage.blocks)
    with torch.no_grad():
        x = torch.randn(1, 3, 32, 32)
        expected = model(x)
        assert torch.equal(other(x), expected)
        other.stem[0].weight.zero_()
        assert torch.equal(model(x), expected) and not torch.equal(other(x), expected)
    assert_same_gradients(model, theirs, x)


# ------------------------------------------------------------------------------------------ compile, export, autocast


@pytest.mark.parametrize("name", [CONV, LINEAR])
def test_compile_without_graph_break(name):
    torch.compiler.reset()
    model, theirs = small_pair(name, depths=(1, 1, 1, 1), drop_path_rate=0.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 32, 32)
    assert_same_features(model, theirs, x)
    out = compiled(x)
    out.square().sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    theirs(x).square().sum().backward()
    assert error(out, theirs(x)) < FORWARD_TOL
    for key, p in theirs.named_parameters():
        assert error(grads[key], p.grad) < GRAD_TOL, key


def test_compile_with_inductor():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler (g++ or clang++)")
    torch.compiler.reset()
    model, theirs = small_pair(depths=(1, 1, 1, 1))
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        out = torch.compile(model.eval(), fullgraph=True)(x)
        assert error(out, theirs.eval()(x)) < FORWARD_TOL


@pytest.mark.parametrize("name", [CONV, LINEAR])
def test_export(name):
    model, theirs = small_pair(name)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model.eval(), (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    x = torch.randn(3, 3, 32, 32)
    assert error(program.module()(x), theirs.eval()(x)) < FORWARD_TOL


@pytest.mark.filterwarnings("ignore")  # deprecated in PyTorch, still offered
@pytest.mark.parametrize("name", [CONV, LINEAR])
def test_torchscript(name):
    model = randomize(timm.create_model(name, scriptable=True, **SMALL)).eval()
    theirs = stock(name, **SMALL).eval()
    theirs.load_state_dict(model.state_dict())
    scripted = torch.jit.script(model)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    with torch.no_grad():
        for shape in ((2, 3, 32, 32), (1, 3, 64, 96)):
            x = torch.randn(shape)
            assert error(scripted(x), theirs(x)) < FORWARD_TOL


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [CONV, LINEAR])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
def test_onnx(dynamo, name, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
    if dynamo:
        pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    from onnx.reference import ReferenceEvaluator

    model = randomize(timm.create_model(name, exportable=True, **SMALL)).eval()
    theirs = stock(name, **SMALL).eval()
    theirs.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 32)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), str(file), dynamo=dynamo, opset_version=18 if dynamo else 17)
    program = onnx.load(file)
    onnx.checker.check_model(program)
    out = ReferenceEvaluator(program).run(None, {program.graph.input[0].name: x.numpy()})[0]
    assert error(torch.from_numpy(out), theirs(x).detach()) < 1e-5


@pytest.mark.parametrize("name", [CONV, LINEAR])
@pytest.mark.parametrize("dtype,tol", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_autocast(dtype, tol, name):
    model, theirs = small_pair(name)
    x = torch.randn(4, 3, 64, 64)
    expected = theirs(x)
    expected.sum().backward()
    with torch.autocast("cpu", dtype):
        out = model(x)
    assert error(out.float(), expected) < tol
    out.float().sum().backward()
    for (key, a), b in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert error(a.grad, b.grad) < 8 * tol, key


# -------------------------------------------------------------------------------------------------- published weights


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> dict:
    """A hub cache with the two kinds of published atto weights, filled by stock timm's models."""
    cache = tmp_path_factory.mktemp("cache")
    finetuned = randomize(stock(CONV), 1).state_dict()
    encoder = randomize(stock(CONV, num_classes=0), 2).state_dict()
    # as published: pretrained weights have neither classifier nor `head.norm`
    encoder = {k: v for k, v in encoder.items() if not k.startswith("head.")}
    cfg = dict(architecture=CONV, num_classes=1000, pretrained_cfg=dict(tag="fcmae_ft_in1k", input_size=[3, 224, 224]))
    folder = tmp_path_factory.mktemp("folder")
    (folder / "config.json").write_text(json.dumps(cfg))
    for name, state in (("fcmae_ft_in1k", finetuned), ("fcmae", encoder)):
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
        hub_cache(folder, cache, f"timm/convnextv2_atto.{name}")
    return dict(cache=cache, finetuned=finetuned, encoder=encoder)


def assert_covers(state, published, prefix: str = "", but: tuple[str, ...] = ()) -> None:
    """Every published tensor is in `state`, except those that start with one of `but`."""
    checked = 0
    for key, value in published.items():
        if not key.startswith(but):
            assert torch.equal(state[prefix + key], value), key
            checked += 1
    assert checked > 100


# name, options, the published part, and what does not come from it as it is
WRAPPER, TAGGED = "fcmae_convnextv2_atto", f"{CONV}.fcmae"
PRETRAINED = {
    "plain": (CONV, {}, "finetuned", ()),
    "tag": (f"{CONV}.fcmae_ft_in1k", {}, "finetuned", ()),
    "hf-hub": (f"hf-hub:timm/{CONV}.fcmae_ft_in1k", {}, "finetuned", ()),
    "fcmae": (TAGGED, {}, "encoder", ()),
    "fcmae num_classes": (TAGGED, dict(num_classes=10), "encoder", ()),
    "num_classes": (CONV, dict(num_classes=10), "finetuned", ("head.fc.",)),
    "in_chans": (CONV, dict(in_chans=1), "finetuned", ("stem.0.weight",)),
    "features_only": (CONV, dict(features_only=True), "finetuned", ("head.",)),
    "wrapper": (WRAPPER, {}, "encoder", ()),
    "wrapper in_chans": (WRAPPER, dict(in_chans=1), "encoder", ("stem.0.weight",)),
}


@pytest.mark.parametrize("case", PRETRAINED)
def test_pretrained_from_the_hub_cache(hub, case, caplog):
    name, options, part, but = PRETRAINED[case]
    model, published = timm.create_model(name, pretrained=True, cache_dir=hub["cache"], **options), hub[part]
    state, prefix = model.state_dict(), "encoder." if name == WRAPPER else ""
    if case == "features_only":
        state = {k.replace("stages_", "stages.").replace("stem_", "stem."): v for k, v in state.items()}
    else:
        assert type(model).__name__ == ("FCMAE" if prefix else "ConvNeXtV2")
    assert_covers(state, published, prefix, but)
    if "in_chans" in options:  # timm's rule
        expected = published["stem.0.weight"].sum(1, keepdim=True)
        torch.testing.assert_close(state[prefix + "stem.0.weight"], expected)
    if "num_classes" in options:
        assert state["head.fc.weight"].shape == (10, 320)
    if case == "fcmae":
        assert "head.fc.weight" not in state
        assert torch.equal(state["head.norm.weight"], torch.ones(320))  # not published: its initial value
    if case == "wrapper":
        assert state["mask_token"].any() and sum("decoder" in r.getMessage() for r in caplog.records) == 1


def test_no_weights_were_published_for_small():
    with pytest.raises(RuntimeError, match="convnextv2_small"):
        timm.create_model("convnextv2_small", pretrained=True)


def remedy_of(message: str) -> str:
    """The call that an error message recommends."""
    start = message.index("timm.create_model(")
    depth = 0
    for i, char in enumerate(message[start:], start):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if char == ")" and depth == 0:
            return message[start : i + 1]
    raise AssertionError(message)


@pytest.mark.parametrize(
    "name, repo, weights",
    [
        (CONV, "timm/convnextv2_atto.fcmae_ft_in1k", "finetuned"),
        (TAGGED, "timm/convnextv2_atto.fcmae", "encoder"),
        (WRAPPER, "timm/convnextv2_atto.fcmae", "encoder"),
    ],
)
def test_unreachable_weights_give_one_error_whose_remedy_works(hub, name, repo, weights, tmp_path):
    """Offline and in no cache; `tests/checkpoint/test_hub.py` has the other reasons."""
    with pytest.raises(RuntimeError) as error:
        timm.create_model(name, pretrained=True, cache_dir=tmp_path / "empty")
    message = str(error.value)
    assert "\n" not in message
    for part in (f"'{repo}'", f"https://huggingface.co/{repo} ", "offline", "HF_HOME", "pretrained=False"):
        assert part in message, part
    # the recommended call, as it is printed, with the user's path
    file = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in hub[weights].items()}, file)
    call = remedy_of(message)
    assert "/path/to/model.safetensors" in call
    model = eval(call.replace("/path/to/model.safetensors", str(file)), {"timm": timm, "dict": dict})
    assert_covers(model.state_dict(), hub[weights], prefix="encoder." if name == WRAPPER else "")


def test_a_wrong_file_is_not_taken_for_a_hub_problem(tmp_path):
    with pytest.raises(FileNotFoundError):
        timm.create_model(CONV, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "none.safetensors")))


BODY = {k: v for k, v in SMALL.items() if k != "num_classes"}


@pytest.mark.parametrize("options", [dict(), dict(num_classes=5), dict(features_only=True), dict(in_chans=1)], ids=str)
@pytest.mark.parametrize("size", ["atto", "tiny"])
def test_weights_of_a_whole_fcmae_are_taken(size, options, tmp_path):
    fcmae = timm.create_model(f"fcmae_convnextv2_{size}", decoder_dim=8, **BODY)
    file = tmp_path / "model.safetensors"
    save_file(fcmae.state_dict(), file)
    model = timm.create_model(
        f"convnextv2_{size}",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(file), num_classes=-1),
        **BODY,
        **options,
    )
    found = {k.replace("stem_", "stem.").replace("stages_", "stages."): v for k, v in model.state_dict().items()}
    skip = ("head.", "stem.0.weight") if "in_chans" in options else ("head.",)
    names = [k for k in fcmae.encoder.state_dict() if not k.startswith(skip)]
    assert len(names) > 60
    for name in names:
        torch.testing.assert_close(found[name], fcmae.encoder.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("change", ["decoder only", "foreign", "other depth", "sparse"])
@pytest.mark.parametrize("num_classes", [1000, 5])
def test_weights_that_leave_a_part_random_are_refused(change, num_classes, tmp_path):
    weights = timm.create_model("fcmae_convnextv2_atto", decoder_dim=8, **BODY).state_dict()
    if change == "decoder only":
        weights = {k: v for k, v in weights.items() if not k.startswith("encoder.")}
    elif change == "foreign":
        weights = {"conv1.weight": torch.zeros(8, 3, 7, 7), "fc.weight": torch.zeros(5, 8)}
    elif change == "other depth":
        weights = {k: v for k, v in weights.items() if not k.startswith("encoder.stages.3.blocks.0.mlp")}
    else:
        weights = to_official(weights)
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    overlay = dict(file=str(file), num_classes=-1)  # as train.py's --pretrained-path does it
    with pytest.raises(ValueError, match=r"ConvNeXt V2.* \d+ of .*\d+ tensors"):
        timm.create_model(CONV, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **BODY)


def test_package_names():
    assert set(timm_convnextv2.__all__) >= {"ConvNeXtV2", "FCMAE", "FCMAEOutput", "random_mask", "__version__"}
