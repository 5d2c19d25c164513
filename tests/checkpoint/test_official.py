"""Checkpoints: the official formats against a slow implementation of their own, safe loading, the exported folder."""

import argparse
import json
import pickle

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from helpers import Runs, run_python
from torch import nn

import timm_convnextv2  # noqa: F401  registers the models
from timm_convnextv2.checkpoint import convert_official, export_encoder, load_checkpoint, to_official

DEPTHS, DIMS, DECODER_DIM, KERNEL = (1, 2, 1, 1), (8, 12, 16, 20), 24, 7
TOY = dict(depths=DEPTHS, dims=DIMS, conv_mlp=False, decoder_dim=DECODER_DIM, img_size=64)


def _affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _dense_block(name, dim):
    return {
        **_affine(f"{name}.dwconv", dim, 1, KERNEL, KERNEL),
        **_affine(f"{name}.norm", dim),
        **_affine(f"{name}.pwconv1", 4 * dim, dim),
        f"{name}.grn.gamma": (1, 1, 1, 4 * dim),
        f"{name}.grn.beta": (1, 1, 1, 4 * dim),
        **_affine(f"{name}.pwconv2", dim, 4 * dim),
    }


def _fill(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def official_sparse(in_chans=3, depths=DEPTHS, dims=DIMS, decoder_dim=DECODER_DIM, decoder_depth=1, seed=0):
    """A pretraining checkpoint as the MinkowskiEngine code writes it, with random values."""
    shapes = {
        **_affine("encoder.downsample_layers.0.0", dims[0], in_chans, 4, 4),
        **_affine("encoder.downsample_layers.0.1", dims[0]),
    }
    for s, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if s:
            shapes |= _affine(f"encoder.downsample_layers.{s}.0.ln", dims[s - 1])
            shapes[f"encoder.downsample_layers.{s}.1.kernel"] = (4, dims[s - 1], dim)
            shapes[f"encoder.downsample_layers.{s}.1.bias"] = (1, dim)
        for b in range(depth):
            name = f"encoder.stages.{s}.{b}"
            shapes |= {f"{name}.dwconv.kernel": (KERNEL**2, dim), f"{name}.dwconv.bias": (1, dim)}
            shapes |= _affine(f"{name}.norm.ln", dim) | _affine(f"{name}.pwconv1.linear", 4 * dim, dim)
            shapes |= {f"{name}.grn.gamma": (1, 4 * dim), f"{name}.grn.beta": (1, 4 * dim)}
            shapes |= _affine(f"{name}.pwconv2.linear", dim, 4 * dim)
    shapes |= _affine("proj", decoder_dim, dims[-1], 1, 1)
    shapes["mask_token"] = (1, decoder_dim, 1, 1)
    for b in range(decoder_depth):
        shapes |= _dense_block(f"decoder.{b}", decoder_dim)
    shapes |= _affine("pred", 32 * 32 * in_chans, decoder_dim, 1, 1)
    return _fill(shapes, seed)


def official_dense(head=5, depths=DEPTHS, dims=DIMS, seed=1):
    """A classifier of the official code, or with `head=None` the encoder alone as in the published files."""
    shapes = {**_affine("downsample_layers.0.0", dims[0], 3, 4, 4), **_affine("downsample_layers.0.1", dims[0])}
    for s, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if s:
            shapes |= _affine(f"downsample_layers.{s}.0", dims[s - 1])
            shapes |= _affine(f"downsample_layers.{s}.1", dim, dims[s - 1], 2, 2)
        for b in range(depth):
            shapes |= _dense_block(f"stages.{s}.{b}", dim)
    if head is not None:
        shapes |= _affine("norm", dims[-1]) | _affine("head", head, dims[-1])
    return _fill(shapes, seed)


# --- the slow implementation: tokens in a dictionary, loops over kernel positions, nothing shared with the package


def _layer_norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def _token_mlp(x, w, name, linear=""):
    """`x` `[tokens of one image, C]`: Linear, GELU, GRN over these tokens, Linear."""
    x = F.gelu(x @ w[f"{name}.pwconv1{linear}.weight"].T + w[f"{name}.pwconv1{linear}.bias"])
    g = x.pow(2).sum(0).sqrt()
    x = x + w[f"{name}.grn.gamma"].flatten() * (x * (g / (g.mean() + 1e-6))) + w[f"{name}.grn.beta"].flatten()
    return x @ w[f"{name}.pwconv2{linear}.weight"].T + w[f"{name}.pwconv2{linear}.bias"]


def slow_sparse_encoder(w, image, mask):
    """Features of one image `[C, H, W]` by (row, column) of the visible patches, from official sparse weights."""
    x = F.conv2d(image[None], w["encoder.downsample_layers.0.0.weight"], w["encoder.downsample_layers.0.0.bias"], 4)
    x = _layer_norm(x[0].permute(1, 2, 0), w, "encoder.downsample_layers.0.1")
    tokens = {(r, c): x[r, c] for r in range(x.shape[0]) for c in range(x.shape[1]) if not mask[r // 8, c // 8]}
    for s, depth in enumerate(DEPTHS):
        if s:
            name, coarse = f"encoder.downsample_layers.{s}", {}
            for (r, c), v in tokens.items():
                v = _layer_norm(v, w, f"{name}.0.ln") @ w[f"{name}.1.kernel"][(c % 2) * 2 + r % 2]  # column-major
                coarse[r // 2, c // 2] = coarse.get((r // 2, c // 2), w[f"{name}.1.bias"][0]) + v
            tokens = coarse
        for b in range(depth):
            name, mixed = f"encoder.stages.{s}.{b}", {}
            for r, c in tokens:
                mixed[r, c] = w[f"{name}.dwconv.bias"][0]
                for i in range(KERNEL):
                    for j in range(KERNEL):
                        neighbour = tokens.get((r + i - KERNEL // 2, c + j - KERNEL // 2))
                        if neighbour is not None:  # column-major
                            mixed[r, c] = mixed[r, c] + w[f"{name}.dwconv.kernel"][j * KERNEL + i] * neighbour
            x = _layer_norm(torch.stack(list(mixed.values())), w, f"{name}.norm.ln")
            x = _token_mlp(x, w, name, ".linear")
            tokens = {place: v + y for (place, v), y in zip(tokens.items(), x, strict=True)}
    return tokens


def slow_loss(w, image, mask):
    """The pretraining loss of one image, from official sparse weights."""
    h, w_ = mask.shape
    features = slow_sparse_encoder(w, image, mask)
    x = w["mask_token"].repeat(1, 1, h, w_)
    for (r, c), v in features.items():
        x[0, :, r, c] = w["proj.weight"].flatten(1) @ v + w["proj.bias"]
    for b in range(1):
        name = f"decoder.{b}"
        y = F.conv2d(x, w[f"{name}.dwconv.weight"], w[f"{name}.dwconv.bias"], padding=3, groups=x.shape[1])
        y = _layer_norm(y[0].flatten(1).T, w, f"{name}.norm")
        x = x + _token_mlp(y, w, name).T.view_as(x)
    pred = F.conv2d(x, w["pred.weight"], w["pred.bias"])
    losses = []
    for r, c in mask.nonzero().tolist():
        patch = image[:, r * 32 : r * 32 + 32, c * 32 : c * 32 + 32]
        pixels = torch.stack([patch[:, i, j] for i in range(32) for j in range(32)]).flatten()
        mean = pixels.sum() / pixels.numel()
        var = (pixels - mean).pow(2).sum() / (pixels.numel() - 1)
        losses.append((pred[0, :, r, c] - (pixels - mean) / (var + 1e-6).sqrt()).pow(2).mean())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("conv_mlp", [False, True])
@pytest.mark.parametrize("mask", [[[0, 1], [1, 0]], [[0, 0], [1, 0]], [[1, 0, 0]]])
def test_official_sparse_weights_give_the_official_numbers(mask, conv_mlp):
    weights = official_sparse()
    mask = torch.tensor(mask).bool()
    model = timm.create_model("fcmae_convnextv2_atto", **{**TOY, "conv_mlp": conv_mlp})
    model.load_state_dict(convert_official(weights, conv_mlp=conv_mlp))
    model.double()
    weights = {k: v.double() for k, v in weights.items()}
    image = torch.randn(3, 32 * mask.shape[0], 32 * mask.shape[1], dtype=torch.float64)

    features = model.forward_encoder(image[None], model.visible(image[None], mask[None]))[0]
    expected = slow_sparse_encoder(weights, image, mask)
    assert list(expected) == [tuple(place) for place in (~mask).nonzero().tolist()]
    torch.testing.assert_close(features, torch.stack(list(expected.values())))
    torch.testing.assert_close(model(image[None], mask[None]).loss, slow_loss(weights, image, mask))


@pytest.mark.parametrize("name", ["atto", "nano", "tiny"])
def test_published_sizes_need_no_hint(name):
    """The MLP's shape follows from the stem's width: 4-D weights for atto to nano, 2-D from tiny."""
    args = timm_convnextv2.registry.VARIANTS[name]
    weights = official_sparse(depths=args["depths"], dims=args["dims"], decoder_dim=512)
    model = timm.create_model(f"fcmae_convnextv2_{name}", device="meta")
    model.load_state_dict(convert_official({"model": weights, "epoch": 3}), assign=True)
    back = to_official(model.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) for k in weights)


def test_round_trips_are_exact():
    for weights in (official_sparse(in_chans=2, decoder_depth=2), official_dense(), official_dense(head=None)):
        ours = convert_official(weights, conv_mlp=True)
        dense = "head" not in " ".join(weights) and "proj.weight" not in weights
        back = to_official(ours)
        if dense:  # the fresh final norm of the published encoder-only files comes back as theirs
            assert back.pop("norm.weight").eq(1).all() and back.pop("norm.bias").eq(0).all()
        assert back.keys() == weights.keys()
        for name, value in weights.items():
            assert back[name].shape == value.shape and torch.equal(back[name], value), name
        again = convert_official(to_official(ours), conv_mlp=True)
        assert again.keys() == ours.keys() and all(torch.equal(again[k], ours[k]) for k in ours)


def test_dense_weights_load_strictly_and_agree_with_timm():
    """The classifier's and the published encoder's names; the numbers are compared with timm's own conversion."""
    for head, classes in ((5, 5), (None, 0)):
        weights = official_dense(head)
        model = timm.create_model("convnextv2_tiny", depths=DEPTHS, dims=DIMS, num_classes=classes)
        theirs = timm.models.convnext.checkpoint_filter_fn(dict(weights), model)
        ours = convert_official(weights, conv_mlp=False)
        model.load_state_dict(ours)
        assert {k for k in ours if k not in theirs} == (
            {"head.norm.weight", "head.norm.bias"} if head is None else set()
        )
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_sparse_pretraining_finetunes_densely():
    """The encoder alone, written densely, is the encoder of the sparse checkpoint."""
    sparse = official_sparse()
    dense = to_official(convert_official(sparse, conv_mlp=False), sparse=False)
    expected = official_dense(head=None)
    assert {k: v.shape for k, v in dense.items()} == {k: v.shape for k, v in expected.items()}
    kernel, weight = sparse["encoder.stages.1.1.dwconv.kernel"], dense["stages.1.1.dwconv.weight"]
    assert all(
        torch.equal(weight[:, 0, row, column], kernel[column * 7 + row]) for row in range(7) for column in range(7)
    )
    kernel, weight = sparse["encoder.downsample_layers.2.1.kernel"], dense["downsample_layers.2.1.weight"]
    assert all(
        torch.equal(weight[:, :, row, column].T, kernel[column * 2 + row]) for row in (0, 1) for column in (0, 1)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"encoder.stages.2.0.extra": torch.ones(1)}, "unknown.*encoder.stages.2.0.extra"),
        (lambda w: w | {"optimizer.x": torch.ones(1)}, "unknown.*optimizer.x"),
        (lambda w: {k: v for k, v in w.items() if k != "encoder.stages.1.1.grn.beta"}, "missing.*stages.1.1.grn.beta"),
        (lambda w: {k: v for k, v in w.items() if "stages.1.0" not in k}, "stages.1"),
        (lambda w: {k: v for k, v in w.items() if k != "pred.bias"}, "missing.*pred.bias"),
        (lambda w: w | {"encoder.stages.0.0.dwconv.kernel": torch.ones(48, 8)}, "stages.0.0.dwconv.kernel.*shape"),
        (lambda w: w | {"mask_token": "text"}, "mask_token.*shape"),
        (lambda w: {}, "empty"),
        (lambda w: {"state_dict": w, "arch": "x"}, "timm training checkpoint"),
        (lambda w: convert_official(w, conv_mlp=True), "timm's names"),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, "DDP"),
        (lambda w: {"cls_token": torch.ones(1, 1, 8), "blocks.0.norm1.weight": torch.ones(8)}, "vision transformer"),
        (lambda w: official_dense() | {"stages.0.0.gamma": torch.ones(8)}, "ConvNeXt V1"),
        (lambda w: {"layer1.0.conv1.weight": torch.ones(1)}, "layer1.0.conv1.weight"),
        (lambda w: [1], "list"),
    ],
)
def test_what_is_not_official_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        convert_official(change(official_sparse()), conv_mlp=False)


def test_unknown_widths_need_the_hint_and_foreign_parts_have_no_place():
    with pytest.raises(ValueError, match="8 wide.*conv_mlp"):
        convert_official(official_sparse())
    with pytest.raises(ValueError, match="stem.0.weight"):
        to_official({"layer1.weight": torch.ones(1)})
    extra = timm.create_model("convnextv2_atto", depths=DEPTHS, dims=DIMS, patch_size=2, num_classes=0)
    with pytest.raises(ValueError, match="stages.0.downsample"):
        to_official(extra.state_dict())


# --- files


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle0", "pickle2", "pickle5"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_named_and_never_run(kind, tmp_path):
    path, proof = tmp_path / "trap.pt", tmp_path / "executed"
    content = {"weight": torch.ones(1), "x": Runs(proof)}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps({"x": Runs(proof)}, protocol=int(kind[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"trap\.pt.*not (executed|read)"):
        load_checkpoint(path)
    assert not proof.exists()
    if kind in ("zip", "legacy"):
        with pytest.raises(ValueError, match="system"):
            load_checkpoint(path)
        pickle.loads(pickle.dumps(Runs(proof)))
        assert proof.exists()  # the trap works where it is sprung


@pytest.mark.parametrize("suffix", ["zip.pt", "legacy.pt", "safetensors"])
def test_files_load_whole_or_not_at_all(suffix, tmp_path):
    weights = {"a.weight": torch.randn(64, 16), "b": torch.arange(3)}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        content = {"model": weights, "args": argparse.Namespace(lr=0.1), "epoch": 2}
        torch.save(content, path, _use_new_zipfile_serialization=suffix == "zip.pt")
    loaded = load_checkpoint(str(path))
    loaded = loaded if suffix == "safetensors" else loaded["model"]
    assert all(torch.equal(loaded[k], v) for k, v in weights.items())

    whole, part = path.read_bytes(), tmp_path / f"part.{suffix}"
    for size in (0, 1, 3, 40, len(whole) // 10, len(whole) // 2, len(whole) - 1):
        part.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="part"):
            load_checkpoint(part)


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match="absent.pt'"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="is a folder"):
        load_checkpoint(tmp_path)
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="tensor.pt'.*Tensor"):
        load_checkpoint(tmp_path / "tensor.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match="module.pt'.*Linear"):
        load_checkpoint(tmp_path / "module.pt")
    (tmp_path / "page.pt").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="page.pt"):
        load_checkpoint(tmp_path / "page.pt")


# --- export

EXPORTS = {
    "plain": dict(img_size=64),
    "wide": dict(img_size=(64, 96), in_chans=12, patch_size=1, kernel_sizes=(7, 5, 3, 3), depths=(1, 1, 1, 1)),
    "grey": dict(in_chans=1, patch_size=2, img_size=(96, 64), depths=(1, 1, 2, 1), dims=(16, 24, 32, 40)),
    "by_hand": dict(
        in_chans=4, img_size=(64, 128), depths=(1, 1, 1, 1), norm_eps=1e-5, head_norm_first=True, conv_mlp=False
    ),
}

STOCK = """
import json, sys, timm, torch
root = sys.argv[1]
torch.set_num_threads(1)
for name, case in torch.load(f"{root}/cases.pt", weights_only=True).items():
    for kwargs in (dict(num_classes=0), dict(num_classes=7), dict(features_only=True)):
        for pretrained in (False, True):
            model = timm.create_model(f"local-dir:{root}/{name}", pretrained=pretrained, **kwargs).eval()
            with torch.no_grad():
                out = model(case["x"])
                if kwargs.get("features_only"):
                    assert len(out) == 4, name
                    expected = case["maps"]  # before `norm_pre`, where there is one
                elif kwargs.get("num_classes"):
                    assert out.shape == (1, 7), name
                    out, expected = [model.forward_features(case["x"])], case["features"]
                else:
                    out, expected = [out], case["head"]
                assert torch.allclose(out[-1], expected, atol=1e-4) == pretrained, (name, kwargs, pretrained)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == tuple(case["x"].shape[1:]), data
    assert torch.allclose(torch.tensor(data["mean"]), torch.tensor(case["mean"])), data
    # one more channel count and a step of training, as timm's train.py would
    model = timm.create_model(f"local-dir:{root}/{name}", pretrained=True, num_classes=2, in_chans=3)
    model(torch.randn(1, 3, 64, 64)).sum().backward()
assert "timm_convnextv2" not in sys.modules
print("stock timm", timm.__version__)
"""


def _randomise(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))


def test_stock_timm_opens_the_folder(tmp_path):
    """Every use of an exported folder, in a process that never imports this package."""
    cases = {}
    for name, kwargs in EXPORTS.items():
        torch.manual_seed(0)
        model = timm.create_model("fcmae_convnextv2_atto", decoder_dim=16, **kwargs).eval()
        _randomise(model)
        chans = model.in_chans
        if name == "by_hand":
            timm.models.save_for_hf(model.encoder, tmp_path / name, safe_serialization=True)
            mean = [0.449] * chans  # timm's own reduction of ImageNet's
        else:
            mean = [0.1 * (c + 1) for c in range(chans)]
            std = [0.5]
            model.to(memory_format=torch.channels_last)  # weights that safetensors would refuse
            assert export_encoder(model, tmp_path / name, mean=mean, std=std, license="mit").name == name
        x = torch.randn(1, chans, *model.img_size)
        with torch.no_grad():
            cases[name] = {
                "x": x,
                "maps": model.encoder.stages(model.encoder.stem(x)),
                "features": model.encoder.forward_features(x),
                "head": model.encoder(x),
                "mean": mean,
            }
    torch.save(cases, tmp_path / "cases.pt")
    (tmp_path / "stock.py").write_text(STOCK)
    run = run_python("stock.py", tmp_path, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "stock timm" in run.stdout


def test_config_and_card(tmp_path):
    model = timm.create_model(
        "fcmae_convnextv2_atto", decoder_dim=16, img_size=(64, 48), patch_size=1, drop_path_rate=0.2
    )
    numbers, info = dict(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)), {"Images": "12 | 3", "Epochs": 5}
    folder = export_encoder(model, tmp_path / "deep" / "out", **numbers, license="mit", info=info)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "convnextv2_atto" and config["num_classes"] == 0
    assert config["model_args"] == {"patch_size": 1, "in_chans": 3, "global_pool": "avg"} and config["num_classes"] == 0
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"] == [3, 64, 48] and cfg["mean"] == [0.5] * 3 and cfg["std"] == [0.2] * 3
    assert cfg["num_classes"] == 0 and cfg["license"] == "mit"
    assert not {"url", "hf_hub_id", "tag", "file", "origin_url"} & cfg.keys()
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert weights.keys() == model.encoder.state_dict().keys() and "head.norm.weight" in weights

    card = (folder / "README.md").read_text()
    front = card.split("---\n")[1].splitlines()
    assert "library_name: timm" in front and "license: mit" in front and "- fcmae" in front
    assert "| Images | 12 \\| 3 |" in card and "| Epochs | 5 |" in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(folder))
    scope = {}
    exec(code, scope)  # the card's own lines
    assert scope["config"]["input_size"] == (3, 64, 48)
    assert torch.equal(scope["model"].stem[0].weight, model.encoder.stem[0].weight)


def test_a_failed_export_leaves_the_old_folder(tmp_path, monkeypatch):
    model = timm.create_model("fcmae_convnextv2_atto", decoder_dim=16, img_size=64)
    folder = export_encoder(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    _randomise(model)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        export_encoder(model, folder, license="mit")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
