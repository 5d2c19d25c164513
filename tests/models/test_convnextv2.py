"""The registered `convnextv2_*` models against stock timm's, which `timm.models.convnext` still builds.

Weights are never the initial ones (GRN would be an identity): `randomize` fills every parameter.
"""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import timm
import torch
from helpers import environment, hub_cache
from safetensors.torch import save_file
from timm.models import convnext as stock_module
from torch import nn

from timm_convnextv2 import ConvNeXtV2
from timm_convnextv2.checkpoint import to_official
from timm_convnextv2.ops import use_backend
from timm_convnextv2.registry import VARIANTS

NAMES = [f"convnextv2_{size}" for size in VARIANTS]
SMALL = dict(depths=(1, 2, 2, 1), dims=(8, 16, 24, 32), num_classes=5)
BODY = {k: v for k, v in SMALL.items() if k != "num_classes"}
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
    """Output, and gradients of every parameter and of the input."""
    found = []
    for model in (ours, theirs):
        if seed is not None:
            torch.manual_seed(seed)
        model.zero_grad()
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = model(leaf)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        (out * weight).sum().backward()
        found.append({"output": out.detach(), "x": leaf.grad, **{k: p.grad for k, p in model.named_parameters()}})
        model.zero_grad()
    assert sum(grad is not None for grad in found[1].values()) > 3
    for name, grad in found[1].items():
        if grad is None:
            assert found[0][name] is None and name.startswith(("head", "norm_pre")), name
        else:
            assert error(found[0][name], grad) < (FORWARD_TOL if name == "output" else GRAD_TOL), name


REGISTRY_SCRIPT = """
import json, sys, warnings
warnings.simplefilter("error")
with warnings.catch_warnings():
    warnings.simplefilter("default")  # timm's and torch's own are not ours to judge
    import timm
import timm.models._registry as registry

def snapshot():
    tags = timm.list_models("convnextv2_*", include_tags=True)
    names = timm.list_models("convnextv2_*")
    return dict(
        models=[m for m in timm.list_models() if not m.startswith("fcmae_")],
        pretrained=[m for m in timm.list_pretrained() if not m.startswith("fcmae_")],
        cfgs={t: [timm.get_pretrained_cfg(t).to_dict(), timm.is_model_pretrained(t)] for t in [*names, *tags]},
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


def test_import_prints_no_warning_and_adds_no_heavy_module(registry):
    # warnings are errors in that process; logged ones would be on stderr
    assert "overwriting" not in registry["stderr"].lower() and "timm_convnextv2" not in registry["stderr"]
    added = {name.partition(".")[0] for name in registry["added"]}
    assert "timm_convnextv2" in added and added <= {"timm_convnextv2", "timm", "torch"}


def test_import_changes_nothing_that_timm_lists(registry):
    """Nor do a second import and a reload."""
    assert all(registry["stock"].values()) and registry["entrypoints_unchanged"]
    assert registry["after"] == registry["second"] == registry["reloaded"] == registry["stock"]


def test_all_names_are_ours(registry):
    assert registry["fcmae"] == sorted(f"fcmae_{name}" for name in NAMES)
    assert set(registry["classes"]) == {*NAMES, *registry["fcmae"]}
    # timm files models under the last part of their module's name
    assert {n: m.rpartition(".")[2] for n, m in registry["classes"].items()} == {
        n: "fcmae" if n.startswith("fcmae_") else "convnextv2" for n in registry["classes"]
    }
    assert all(module.startswith("timm_convnextv2.") for module in registry["classes"].values())


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


@pytest.mark.parametrize("size", {shape["depths"]: size for size, shape in VARIANTS.items()}.values())
@pytest.mark.parametrize("memory_format, train", [(torch.contiguous_format, False), (torch.channels_last, True)])
def test_same_numbers_as_stock(size, memory_format, train):
    """Each true depth, narrow: every level and gradient, in both modes and both memory layouts."""
    ours, theirs = small_pair(f"convnextv2_{size}", depths=VARIANTS[size]["depths"], dims=(8, 16, 24, 32))
    ours.train(train), theirs.train(train)
    x = torch.randn(2, 3, 32, 64).contiguous(memory_format=memory_format)
    assert_same_features(ours, theirs, x)
    assert_same_gradients(ours, theirs, x)


CONV, LINEAR = "convnextv2_atto", "convnextv2_tiny"
# those that the token MLP reads are tested with both kinds of it, the others with one
IN_BLOCKS = [
    {}, dict(drop_path_rate=0.5), dict(act_layer="relu"), dict(norm_layer="rmsnorm"), dict(use_grn=False),
    dict(ls_init_value=0.1), dict(conv_bias=False), dict(kernel_sizes=(3, 5, 7, 9)),
]  # fmt: skip
OUTSIDE = [
    dict(num_classes=0), dict(num_classes=1), dict(output_stride=8), dict(output_stride=16), dict(drop_rate=0.5),
    dict(global_pool="max"), dict(global_pool="avgmax"), dict(global_pool="", num_classes=0), dict(conv_mlp=False),
    dict(act_layer=nn.SiLU), dict(act_layer="gelu_tanh"), dict(norm_layer="simplenorm"), dict(in_chans=12),
    dict(norm_layer="layernorm2d", norm_eps=1e-3), dict(norm_layer="batchnorm2d", conv_mlp=True),
    dict(use_grn=False, ls_init_value=0.1), dict(stem_type="overlap_tiered"), dict(patch_size=2), dict(in_chans=1),
    dict(head_norm_first=True), dict(head_hidden_size=12), dict(head_init_scale=0.01),
]  # fmt: skip


@pytest.mark.parametrize(
    "options, name",
    [*product(IN_BLOCKS, [CONV, LINEAR]), *((o, (CONV, LINEAR)[i % 2]) for i, o in enumerate(OUTSIDE))],
    ids=str,
)
def test_option_as_in_stock(options, name):
    kwargs = {**SMALL, **options}
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
    x = torch.randn(2, kwargs.get("in_chans", 3), 32, 64, dtype=torch.float64)
    assert_same_features(ours, theirs, x)
    ours.train(), theirs.train()
    assert_same_gradients(ours, theirs, x, seed=11)
    for (key, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):  # batch norm's running statistics
        assert error(a.float(), b.float()) < FORWARD_TOL, key
    if "drop_rate" in options or "drop_path_rate" in options:
        with torch.no_grad():
            assert not torch.equal(ours(x), ours(x)), "the random option does nothing"


LEVELS = [(None, {}), ((1, 3), {}), ((-2, -1), dict(output_stride=16))]
CLASSES = [None, "getter", "hook", "dict", "fx"]


@pytest.mark.parametrize("level, feature_cls", [(i % 3, c) for i, c in enumerate(CLASSES * 2)])
def test_features_only(level, feature_cls):
    (out_indices, options), name = LEVELS[level], LINEAR if level == 1 else CONV
    kwargs = dict(BODY, features_only=True, **options)
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


@pytest.mark.parametrize("name, backend", [(CONV, "eager"), (LINEAR, "fused")])
def test_compile_without_graph_break(name, backend, monkeypatch):
    """`test_task_compiles` has the fused operation in the other kind of token MLP."""
    monkeypatch.setenv("TIMM_CONVNEXTV2_BACKEND", backend)
    torch.compiler.reset()
    model, theirs = small_pair(name, depths=(1, 1, 1, 1), drop_path_rate=0.0)
    model.compile(backend="aot_eager", fullgraph=True)
    assert_same_gradients(model, theirs, torch.randn(2, 3, 32, 32))


def exported(model, x, folder):
    batch = torch.export.Dim("batch", min=1, max=8)
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()


def scripted(model, x, folder):
    torch.jit.save(torch.jit.script(model), folder / "model.pt")
    return torch.jit.load(folder / "model.pt")


def onnx(model, x, folder, dynamo=True):
    package = pytest.importorskip("onnx", reason="the package onnx is not installed")
    if dynamo:
        pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    torch.onnx.export(model, (x,), str(folder / "x.onnx"), dynamo=dynamo, opset_version=18 if dynamo else 17)
    program = package.load(folder / "x.onnx")
    package.checker.check_model(program)
    session = runtime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {program.graph.input[0].name: x.numpy()})[0])


FORMS = {
    "export": (exported, {}), "torchscript": (scripted, dict(scriptable=True)),
    "onnx": (onnx, dict(exportable=True)), "legacy onnx": (partial(onnx, dynamo=False), dict(exportable=True)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated in PyTorch, still offered
@pytest.mark.parametrize("form, name", [*product(FORMS, [CONV]), ("export", LINEAR), ("torchscript", LINEAR)])
def test_exported_and_compiled_forms(form, name, tmp_path):
    make, options = FORMS[form]
    model = randomize(timm.create_model(name, **{**SMALL, **options})).eval()
    theirs = stock(name, **{**SMALL, "depths": options.get("depths", SMALL["depths"])}).eval()
    theirs.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        run = make(model, x, tmp_path)
        for y in (x, torch.randn(3, 3, 64, 32)) if form in ("export", "torchscript") else (x,):
            assert error(run(y), theirs(y)) < 1e-5


@pytest.mark.slow  # inductor's first kernel takes 15 s
@pytest.mark.parametrize("name", [CONV, LINEAR])
def test_inductor(name):
    """One downsampling and one block; `test_compile_without_graph_break` compiles the whole model."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler (g++ or clang++)")
    if torch.__version__ < "2.9":
        pytest.skip("needs PyTorch 2.9: before, inductor's code may corrupt memory, with stock timm's model too")
    torch.compiler.reset()
    model, theirs = small_pair(name, depths=(1, 1, 1, 1))
    stage, x = model.eval().stages[1], torch.randn(2, 8, 8, 4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert error(torch.compile(stage, fullgraph=True)(x), theirs.eval().stages[1](x)) < 1e-5


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
PRETRAINED = [
    (CONV, {}, "finetuned", ()), (f"{CONV}.fcmae_ft_in1k", {}, "finetuned", ()),
    (f"hf-hub:timm/{CONV}.fcmae_ft_in1k", {}, "finetuned", ()), (TAGGED, {}, "encoder", ()),
    (TAGGED, dict(num_classes=10), "encoder", ()), (CONV, dict(num_classes=10), "finetuned", ("head.fc.",)),
    (CONV, dict(features_only=True), "finetuned", ("head.",)),
    (CONV, dict(in_chans=1), "finetuned", ("stem.0.weight",)),
    (WRAPPER, {}, "encoder", ()), (WRAPPER, dict(in_chans=1), "encoder", ("stem.0.weight",)),
]  # fmt: skip


@pytest.mark.parametrize("name, options, part, but", PRETRAINED, ids=str)
def test_pretrained_from_the_hub_cache(hub, name, options, part, but, caplog):
    model, published = timm.create_model(name, pretrained=True, cache_dir=hub["cache"], **options), hub[part]
    state, prefix = model.state_dict(), "encoder." if name == WRAPPER else ""
    if "features_only" in options:
        state = {k.replace("stages_", "stages.").replace("stem_", "stem."): v for k, v in state.items()}
    assert_covers(state, published, prefix, but)
    if "in_chans" in options:  # timm's rule
        expected = published["stem.0.weight"].sum(1, keepdim=True)
        torch.testing.assert_close(state[prefix + "stem.0.weight"], expected)
    if "num_classes" in options:
        assert state["head.fc.weight"].shape == (10, 320)
    if name == TAGGED and not options:
        assert "head.fc.weight" not in state
        assert torch.equal(state["head.norm.weight"], torch.ones(320))  # not published: its initial value
    if name == WRAPPER and not options:
        assert state["mask_token"].any() and sum("decoder" in r.getMessage() for r in caplog.records) == 1


def test_no_weights_were_published_for_small():
    with pytest.raises(RuntimeError, match="convnextv2_small"):
        timm.create_model("convnextv2_small", pretrained=True)


@pytest.mark.parametrize("name, weights", [(CONV, "finetuned"), (TAGGED, "encoder"), (WRAPPER, "encoder")])
def test_unreachable_weights_give_one_error_whose_remedy_works(hub, name, weights, tmp_path):
    """Offline and in no cache; `tests/checkpoint/test_hub.py` has the other reasons."""
    repo = "timm/convnextv2_atto.fcmae" + ("_ft_in1k" if name == CONV else "")
    with pytest.raises(RuntimeError) as error:
        timm.create_model(name, pretrained=True, cache_dir=tmp_path / "empty")
    message = str(error.value)
    assert "\n" not in message
    for part in (f"'{repo}'", f"https://huggingface.co/{repo} ", "offline", "HF_HOME"):
        assert part in message, part
    # the recommended call, as it is printed, with the user's path
    file = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in hub[weights].items()}, file)
    call = re.search(r"timm\.create_model\(.*?\)\)", message)[0]
    assert "'model.safetensors'" in call
    model = eval(call.replace("model.safetensors", str(file)), {"timm": timm, "dict": dict})
    assert_covers(model.state_dict(), hub[weights], prefix="encoder." if name == WRAPPER else "")


def test_a_wrong_file_is_not_taken_for_a_hub_problem(tmp_path):
    with pytest.raises(FileNotFoundError):
        timm.create_model(CONV, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "none.safetensors")))


@pytest.mark.parametrize(
    "size, options",
    [("atto", {}), ("tiny", dict(num_classes=5)), ("atto", dict(features_only=True)), ("tiny", dict(in_chans=1))],
    ids=str,
)
def test_weights_of_a_whole_fcmae_are_taken(size, options, tmp_path):
    fcmae = timm.create_model(f"fcmae_convnextv2_{size}", decoder_dim=8, **BODY)
    file = tmp_path / "model.safetensors"
    save_file(fcmae.state_dict(), file)
    overlay = dict(file=str(file), num_classes=-1)
    model = timm.create_model(f"convnextv2_{size}", pretrained=True, pretrained_cfg_overlay=overlay, **BODY, **options)
    found = {k.replace("stem_", "stem.").replace("stages_", "stages."): v for k, v in model.state_dict().items()}
    skip = ("head.", "stem.0.weight") if "in_chans" in options else ("head.",)
    names = [k for k in fcmae.encoder.state_dict() if not k.startswith(skip)]
    assert len(names) > 60
    for name in names:
        torch.testing.assert_close(found[name], fcmae.encoder.state_dict()[name], rtol=0, atol=0)


CHANGES = [("decoder only", 1000), ("foreign", 1000), ("foreign", 5), ("other depth", 5), ("sparse", 1000)]


@pytest.mark.parametrize("change, num_classes", CHANGES)
def test_weights_that_leave_a_part_random_are_refused(change, num_classes, tmp_path):
    whole = timm.create_model("fcmae_convnextv2_atto", decoder_dim=8, **BODY).state_dict()
    weights = {
        "decoder only": {k: v for k, v in whole.items() if not k.startswith("encoder.")},
        "foreign": {"conv1.weight": torch.zeros(8, 3, 7, 7), "fc.weight": torch.zeros(5, 8)},
        "other depth": {k: v for k, v in whole.items() if not k.startswith("encoder.stages.3.blocks.0.mlp")},
        "sparse": to_official(whole),
    }
    save_file(weights[change], tmp_path / "model.safetensors")
    overlay = dict(file=str(tmp_path / "model.safetensors"), num_classes=-1)  # as train.py's --pretrained-path does it
    with pytest.raises(ValueError, match=r"ConvNeXt V2.* \d+ of .*\d+ tensors"):
        timm.create_model(CONV, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **BODY)
