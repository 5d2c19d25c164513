"""The examples: other tools on exported weights, with this package imported and with stock timm alone."""

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import tifffile
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_convnextv2  # noqa: F401  registers the models
from timm_convnextv2.checkpoint import export_encoder, export_fcmae
from timm_convnextv2.data import EmbeddedSource, MissingPackageError, load_image

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as when one of them is started
import common  # noqa: E402
import detection  # noqa: E402
import embed  # noqa: E402
import segmentation  # noqa: E402

DIMS = [8, 16, 24, 32]
REPOSITORY, COMMIT = "someone/encoder", "0123456789abcdef0123456789abcdef01234567"


def make_encoder(folder, patch_size=1, **kwargs):
    """A small encoder with weights that no initialisation gives, exported to `folder`."""
    torch.manual_seed(0)
    size = dict(depths=(1, 1, 1, 1), dims=DIMS, decoder_dim=16, patch_size=patch_size, img_size=32 * patch_size)
    model = timm.create_model("fcmae_convnextv2_atto", **(size | kwargs))
    for value in model.parameters():
        with torch.no_grad():  # weights that pass on what the images differ in, biases that are not zero
            value += torch.randn_like(value) * (0.1 if value.ndim == 1 else 1.5 / value[0].numel() ** 0.5)
    export_encoder(model, folder, mean=[0.4] * model.in_chans, std=[0.3] * model.in_chans)
    return model.encoder.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


@pytest.fixture(scope="module", params=[1, 4], ids=["patch 1", "patch 4"])
def exported(request, root):
    """(name for timm, the encoder itself, stride of its first map)."""
    folder = root / f"patch{request.param}"
    return f"local-dir:{folder}", make_encoder(folder, patch_size=request.param), request.param


@pytest.fixture(scope="module")
def small(root):
    make_encoder(root / "small")
    return f"local-dir:{root / 'small'}"


@pytest.fixture(scope="module")
def two_channels(root):
    make_encoder(root / "two", in_chans=2)
    return f"local-dir:{root / 'two'}"


@torch.no_grad()
def maps_of(model, images):
    return model.forward_intermediates(images, intermediates_only=True)


# --- loading


def test_features_only_has_the_exported_weights(exported):
    name, encoder, first = exported
    backbone = common.load_model(name, features_only=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = backbone(images)
    assert backbone.feature_info.channels() == DIMS
    assert backbone.feature_info.reduction() == [first, 2 * first, 4 * first, 8 * first]
    for ours, expected in zip(maps, maps_of(encoder, images), strict=True):
        assert torch.equal(ours, expected)


STOCK = """
import sys
import timm, torch
from common import load_model
from detection import build_detector
from segmentation import build_segmenter

names, images, result = sys.argv[2:], torch.load(sys.argv[1]), {}
torch.set_num_threads(1)
for name in names:
    backbone, whole = load_model(name, features_only=True), load_model(name, num_classes=0)
    with torch.no_grad():
        maps = backbone(images)
        own = whole.forward_intermediates(images, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(maps, own, strict=True))
    result[name] = maps
with torch.no_grad():
    detector = build_detector(names[-1], 3, out_channels=8, min_size=64, max_size=64).eval()
    assert len(detector(list(images))) == 2
    assert build_segmenter(names[-1], 5, channels=8)(images).shape == (2, 5, 64, 64)
assert not any(module.startswith("timm_convnextv2") for module in sys.modules)
torch.save(result, sys.argv[1])
"""


def test_stock_timm_alone_from_a_folder_and_from_the_hub(root, tmp_path):
    """What the Hub's cache looks like after a download, by hand: a snapshot, and the branch that points to it."""
    encoder = make_encoder(root / "stock", patch_size=4)
    repository = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(root / "stock", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    images = torch.rand(2, 3, 64, 64)
    torch.save(images, tmp_path / "maps.pt")
    names = [f"local-dir:{root / 'stock'}", f"hf-hub:{REPOSITORY}", f"hf-hub:{REPOSITORY}@{COMMIT}"]
    subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "maps.pt"), *names],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES)},
        check=True,
    )
    result = torch.load(tmp_path / "maps.pt")
    assert list(result) == names
    for maps in result.values():
        for theirs, expected in zip(maps, maps_of(encoder, images), strict=True):
            torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)  # the two add in another order


@pytest.mark.parametrize("kwargs", [dict(features_only=True), dict(num_classes=0)], ids=["maps", "pooled"])
def test_weights_that_were_not_loaded_are_noticed(small, monkeypatch, kwargs):
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: create_model(name, **more))
    with pytest.raises(ValueError, match="it was not loaded"):
        common.load_model(small, **kwargs)


def test_a_classifier_with_a_missing_tensor_is_noticed(tmp_path):
    """timm itself loads such weights without `strict`, because of the head that it drops."""
    classifier = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=DIMS, num_classes=7)
    timm.models.save_for_hf(classifier, tmp_path, safe_serialization=True)
    name, weights = f"local-dir:{tmp_path}", tmp_path / "model.safetensors"
    common.load_model(name, features_only=True)
    stored = safetensors.torch.load_file(weights)
    del stored["stages.2.downsample.1.weight"]
    safetensors.torch.save_file(stored, weights)
    timm.create_model(name, pretrained=True, features_only=True)
    with pytest.raises(ValueError, match=r"have no stages\.2\.downsample\.1\.weight"):
        common.load_model(name, features_only=True)


def spoil(folder, how):
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif how == "config of something else":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    elif how == "foreign architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architecture": "convnextv9"}))
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "half the weights":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif how == "other sizes":
        make_encoder(folder.parent / "other", dims=[8, 16, 24, 40])
        shutil.copy(folder.parent / "other" / "model.safetensors", folder)


@pytest.mark.parametrize(
    "how",
    [
        "no config",
        "config is no JSON",
        "config of something else",
        "foreign architecture",
        "no weights",
        "half the weights",
        "other sizes",
    ],
)
def test_a_folder_that_is_no_model_is_refused_by_name(small, tmp_path, how):
    folder = tmp_path / "folder"
    shutil.copytree(small.removeprefix("local-dir:"), folder)
    spoil(folder, how)
    with pytest.raises(ValueError, match=f"'local-dir:{folder}' cannot be loaded"):
        common.load_model(f"local-dir:{folder}", features_only=True)


def test_names_that_are_refused():
    for name in ("convnextv2_atto", "some/folder", ""):
        with pytest.raises(ValueError, match="expected local-dir:FOLDER or hf-hub:USER/NAME"):
            common.load_model(name)
    with pytest.raises(ValueError, match="'hf-hub:someone/absent' cannot be loaded"):
        common.load_model("hf-hub:someone/absent")


def test_a_pretraining_model_is_refused(tmp_path):
    model = timm.create_model("fcmae_convnextv2_atto", depths=(1, 1, 1, 1), dims=DIMS, decoder_dim=16)
    export_fcmae(model, tmp_path)
    for kwargs in (dict(num_classes=0), dict(features_only=True)):
        with pytest.raises(ValueError, match=f"The model 'local-dir:{tmp_path}' (is a FCMAE|cannot be loaded)"):
            common.load_model(f"local-dir:{tmp_path}", **kwargs)


# --- detection


def some_targets(classes):
    return [dict(boxes=detection.masks_to_boxes(mask[None] > 0), labels=mask.max()[None]) for mask in classes]


def test_pyramid_is_built_on_the_maps_of_features_only(exported):
    name, encoder, first = exported
    detector = detection.build_detector(name, 2, out_channels=16).eval()
    height, width = 8 * first * 3 + 5, 8 * first * 4  # the last rows make no whole patch
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        body, pyramid = detector.backbone.body(images), detector.backbone(images)
    for ours, expected in zip(body.values(), maps_of(encoder, images), strict=True):
        assert torch.equal(ours, expected)
    strides = [first, 2 * first, 4 * first, 8 * first, 16 * first]
    assert list(pyramid) == ["0", "1", "2", "3", "pool"]
    for level, stride in zip(pyramid.values(), strides, strict=True):
        assert level.shape[:2] == (2, 16)
        assert level.shape[3] == width // stride
    assert detector.rpn.anchor_generator.sizes == tuple((8 * stride,) for stride in strides)
    assert (detector.transform.min_size, detector.transform.max_size) == ((200 * first,), 336 * first)
    assert detector.transform.size_divisible == 8 * first
    assert (detector.transform.image_mean, detector.transform.image_std) == ([0.4] * 3, [0.3] * 3)


@pytest.mark.parametrize("frozen", [False, True])
def test_detector_trains_what_it_should(small, frozen):
    detector = detection.build_detector(small, 2, frozen=frozen, out_channels=16, min_size=32, max_size=48)
    images, classes = common.draw(2, 32, 3)
    losses = detector(list(images), some_targets(classes))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    for name, parameter in detector.backbone.named_parameters():
        if name.startswith("body") and frozen:
            assert parameter.grad is None, name
        elif name.startswith(("body.stem", "fpn.inner")):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("frozen", [False, True])
def test_detector_can_learn(small, frozen):
    """One picture by heart."""
    detector = detection.build_detector(small, 2, frozen=frozen, out_channels=16, min_size=32, max_size=32)
    images, classes = common.draw(1, 32, 3)
    targets = some_targets(classes)
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(8):
        losses.append(sum(detector(list(images), targets).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_detector_takes_other_channels_and_images_of_several_odd_sizes(two_channels):
    sizes = dict(min_size=24, max_size=40)
    detector = detection.build_detector(two_channels, 4, out_channels=8, box_score_thresh=0.0, **sizes).eval()
    images = [torch.rand(2, 33, 47), torch.rand(2, 51, 29)]
    with torch.inference_mode():
        found = detector(images)
    for image, boxes in zip(images, found, strict=True):
        height, width = image.shape[-2:]
        assert len(boxes["boxes"])
        assert (boxes["boxes"] >= 0).all()
        assert (boxes["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
        assert set(boxes["labels"].tolist()) <= {1, 2, 3, 4}


def test_detector_refuses_strides_that_roi_align_would_round(tmp_path):
    make_encoder(tmp_path, patch_size=3)
    with pytest.raises(ValueError, match=r"strides \[3, 6, 12, 24\].*powers of two"):
        detection.build_detector(f"local-dir:{tmp_path}", 2)


# --- segmentation


@pytest.mark.parametrize("size", [(64, 64), (37, 50), (1, 33), (65, 31)], ids=str)
def test_segmenter_answers_at_the_size_of_the_image(exported, size):
    segmenter = segmentation.build_segmenter(exported[0], 5, channels=8)
    assert segmenter(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def test_segmenter_sees_the_last_pixels_and_no_padding_where_none_is_needed(exported):
    name, encoder, first = exported
    segmenter = segmentation.build_segmenter(name, 3, channels=8).eval()
    image = torch.rand(1, 3, 8 * first + 1, 8 * first + 1)
    changed = image.clone()
    changed[..., -1] = 1 - changed[..., -1]
    with torch.no_grad():
        assert not torch.equal(segmenter(image), segmenter(changed))
    seen = []
    segmenter.backbone.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    whole = torch.rand(1, 3, 16 * first, 8 * first)
    with torch.no_grad():
        segmenter(whole)
    for ours, expected in zip(seen, maps_of(encoder, (whole - 0.4) / 0.3), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_segmenter_trains_what_it_should(two_channels, frozen):
    segmenter = segmentation.build_segmenter(two_channels, 3, frozen=frozen, channels=8)
    images, classes = common.draw(4, 29, 2)
    optimizer = torch.optim.AdamW([p for p in segmenter.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(torch.nn.functional.cross_entropy(segmenter(images), classes))
        optimizer.zero_grad()
        losses[-1].backward()
        for name, parameter in segmenter.named_parameters():
            if name.startswith("backbone") and frozen:
                assert parameter.grad is None, name
            elif name.startswith(("backbone.stem", "pyramid", "head")):
                assert parameter.grad.abs().sum() > 0, name
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("in_chans", [1, 2, 3])
def test_pictures_of_the_examples(in_chans):
    images, classes = common.draw(12, 40, in_chans)
    assert images.shape == (12, in_chans, 40, 40)
    assert 0 <= images.min() and images.max() <= 1
    assert {mask.max().item() for mask in classes} == {1, 2}
    for image, mask in zip(images, classes, strict=True):
        assert 100 < (mask > 0).sum() < 600
        assert (image[:, mask > 0] == (0.0 if mask.max() == 1 else 1.0)).all()


@pytest.mark.parametrize(
    "module, printed",
    [(detection, "new picture with a "), (segmentation, "IoU on 32 new pictures: background 0.")],
    ids=["detection", "segmentation"],
)
@pytest.mark.parametrize("fixture", ["small", "two_channels"])
def test_examples_run(module, printed, fixture, request, monkeypatch, capsys):
    arguments = ["--model", request.getfixturevalue(fixture), "--steps", "2", "--batch-size", "2", "--img-size", "32"]
    monkeypatch.setattr(sys, "argv", ["example", *arguments, "--frozen", "--device", "cpu"])
    module.main()
    out = capsys.readouterr().out
    assert "step 2/2  loss " in out and printed in out


# --- embeddings


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five pictures in nested folders, larger and smaller than the model's 32 pixels, some not square."""
    folder, source = tmp_path_factory.mktemp("pictures"), EmbeddedSource(5, size=48)
    for i, name in enumerate(["b.png", "a.bmp", "sub/c.tif", "sub/deep/d, e.png", "z/f.webp"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(source[i].permute(1, 2, 0).numpy())
        picture.resize([(48, 48), (40, 64), (20, 24), (32, 32), (70, 50)][i]).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


ORDER = ["a.bmp", "b.png", "sub/c.tif", "sub/deep/d, e.png", "z/f.webp"]


def read(output):
    """The matrix, the names of its rows, and the skipped images with their reasons."""
    matrix = np.load(output) if output.suffix == ".npy" else safetensors.numpy.load_file(output)["embeddings"]
    tables = []
    for end in (".csv", ".skipped.csv"):
        path = output.with_name(output.name + end)
        with open(path, newline="", encoding="utf-8") if path.exists() else open(os.devnull) as f:
            tables.append(list(csv.DictReader(f)))
    return matrix, [row["file"] for row in tables[0]], {row["file"]: row["reason"] for row in tables[1]}


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_embeddings_are_those_of_the_model(small, pictures, tmp_path, suffix):
    output = tmp_path / "deep" / f"out{suffix}"
    assert embed.embed(small, pictures, output, batch_size=2) == (5, {})
    matrix, files, skipped = read(output)
    assert (matrix.shape, matrix.dtype) == ((5, 32), np.float32)
    assert files == ORDER and not skipped
    model = timm.create_model(small, pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(model))
    for row, file in zip(torch.from_numpy(matrix.copy()), files, strict=True):
        image = transform(Image.open(pictures / file).convert("RGB"))[None]
        with torch.no_grad():
            features = model(image)[0]
        # Pillow and torch round differently when they resize; the picture of the right size is cropped only
        torch.testing.assert_close(row, features, rtol=0, atol=0.05)
    assert np.abs(matrix - matrix.mean(0)).max() > 0.5  # or the tolerance would say nothing
    assert sorted(p.name for p in output.parent.iterdir()) == [output.name, f"{output.name}.csv"]
    assert output.stat().st_mode == output.with_name(f"{output.name}.csv").stat().st_mode


def test_embeddings_without_resizing_are_exact(root, tmp_path):
    """In floats, as 16-bit and many channels are: what the model gives for the normalised array itself."""
    make_encoder(root / "five", in_chans=5)
    folder = root / "five"
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 1.0
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "images").mkdir()
    array = np.random.default_rng(0).random((3, 5, 32, 32), dtype=np.float32)
    bands = (array[1] * 65535).astype(np.uint16)
    np.save(tmp_path / "images" / "0.npy", array[0])
    tifffile.imwrite(tmp_path / "images" / "1.tif", bands, photometric="minisblack", planarconfig="separate")
    np.save(tmp_path / "images" / "2.npy", array[2].transpose(1, 2, 0))
    embed.embed(f"local-dir:{folder}", tmp_path / "images", tmp_path / "out.npy", batch_size=3)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    images = torch.from_numpy(np.stack([array[0], bands / np.float32(65535), array[2]]))
    with torch.no_grad():
        expected = model((images - 0.4) / 0.3)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), expected, rtol=1e-5, atol=1e-5)


def test_grey_16_bit_is_not_clipped(root, tmp_path):
    make_encoder(root / "grey", in_chans=1)
    (tmp_path / "images").mkdir()
    grey = EmbeddedSource(1, size=48, in_chans=1)[0][0].numpy()
    Image.fromarray(grey).save(tmp_path / "images" / "8.png")
    tifffile.imwrite(tmp_path / "images" / "16.tif", grey.astype(np.uint16) * 257)
    embed.embed(f"local-dir:{root / 'grey'}", tmp_path / "images", tmp_path / "out.npy")
    sixteen, eight = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(sixteen, eight, atol=0.05)


def test_embeddings_are_repeatable_whatever_the_workers(small, pictures, tmp_path):
    for name, workers in (("a", 0), ("b", 0), ("c", 2)):
        embed.embed(small, pictures, tmp_path / f"{name}.npy", batch_size=2, workers=workers)
    first = (tmp_path / "a.npy").read_bytes()
    assert first == (tmp_path / "b.npy").read_bytes() == (tmp_path / "c.npy").read_bytes()


def test_embeddings_at_another_size(small, pictures, tmp_path, monkeypatch):
    seen = set()
    load = embed.load_model

    def spy(*args, **kwargs):
        model = load(*args, **kwargs)
        model.register_forward_pre_hook(lambda module, inputs: seen.add((*inputs[0].shape[1:], module.training)))
        return model

    monkeypatch.setattr(embed, "load_model", spy)
    embed.embed(small, pictures, tmp_path / "out.npy", img_size=40)
    assert seen == {(3, 40, 40, False)}


@pytest.fixture
def partly_bad(pictures, tmp_path):
    folder = tmp_path / "partly bad"
    shutil.copytree(pictures, folder)
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:100])
    (folder / "sub" / "deep" / "x\n.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_bad_images_are_skipped_and_listed(small, pictures, partly_bad, tmp_path, batch_size, suffix):
    output = tmp_path / f"out{suffix}"
    rows, reasons = embed.embed(small, partly_bad, output, batch_size=batch_size, max_bad_images=0.5)
    matrix, files, skipped = read(output)
    assert rows == len(matrix) == 4
    assert files == [file for file in ORDER if file != "b.png"]
    assert list(skipped) == ["b.png", "sub/deep/x\n.png"]
    assert list(skipped.values()) == list(reasons.values())
    assert "b.png: cannot be decoded" in skipped["b.png"]
    embed.embed(small, pictures, tmp_path / "all.npy", batch_size=batch_size)
    np.testing.assert_allclose(matrix, np.load(tmp_path / "all.npy")[[0, 2, 3, 4]], atol=1e-5)
    embed.embed(small, pictures, output, overwrite=True)  # now none is bad: the old list goes
    assert read(output)[2] == {} and len(read(output)[0]) == 5


def test_too_many_bad_images_stop_and_write_nothing(small, partly_bad, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)2 of 6 images.*nothing was written:.*b\.png: cannot be decoded"):
        embed.embed(small, partly_bad, tmp_path / "out" / "out.npy", max_bad_images=0.2)
    assert not list((tmp_path / "out").iterdir())


def test_bad_images_alone_are_no_result(small, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="None of 1 images tried"):
        embed.embed(small, tmp_path / "images", tmp_path / "out.npy", max_bad_images=1.0)
    monkeypatch.setattr(embed, "check_readable", lambda source: [])  # it tries some of many only
    with pytest.raises(ValueError, match="1 of 1 images cannot be decoded"):
        embed.embed(small, tmp_path / "images", tmp_path / "out.npy", max_bad_images=1.0)


def test_a_failure_leaves_the_old_output_alone(small, pictures, tmp_path, monkeypatch):
    output = tmp_path / "out" / "out.npy"
    embed.embed(small, pictures, output)
    before = {p.name: p.read_bytes() for p in output.parent.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        embed.embed(small, pictures, output, overwrite=True)
    assert {p.name: p.read_bytes() for p in output.parent.iterdir()} == before


def test_a_missing_package_is_no_bad_image(small, pictures, tmp_path, monkeypatch):
    def load(path, in_chans):
        if path.endswith("b.png"):
            raise MissingPackageError("run `pip install tifffile`")
        return load_image(path, in_chans)

    monkeypatch.setattr("timm_convnextv2.data.sources.load_image", load)
    monkeypatch.setattr(embed, "check_readable", lambda source: [])
    with pytest.raises(MissingPackageError, match="pip install tifffile"):
        embed.embed(small, pictures, tmp_path / "out.npy", max_bad_images=1.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(output="out.pt"), r"expected a file whose name ends in \.npy or \.safetensors"),
        (dict(output="folder.npy"), "expected a file"),
        (dict(output="there.npy"), r"there\.npy' or its \.csv exists.*--overwrite"),
        (dict(output="table.npy"), r"table\.npy' or its \.csv exists"),
        (dict(output="pictures/out.npy"), "lies among the images"),
        (dict(data_dir="absent"), "does not exist"),
        (dict(data_dir="folder.npy"), "No image below"),
        (dict(data_dir="there.npy"), "is a file, expected a folder"),
        (dict(model="local-dir:absent"), "'local-dir:absent' cannot be loaded"),
        (dict(img_size=4), "--img-size 4 is smaller than the model's stride, 8"),
        (dict(device="nowhere"), "--device nowhere cannot be used"),
        (dict(batch_size=0), "batch_size"),
        (dict(max_bad_images=2), "--max-bad-images is a share"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_embed_refuses(small, pictures, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.npy").mkdir()
    Path("there.npy").touch()
    Path("table.npy.csv").touch()
    Path("pictures").symlink_to(pictures)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        embed.embed(**dict(model=small, data_dir="pictures", output="out.npy") | changes)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def start(script):
    """The script as from the shell, in this process; returns its exit status."""
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    except SystemExit as e:
        return e.code
    return 0


def test_embed_from_the_shell(small, partly_bad, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.safetensors"
    command = ["embed.py", "--model", small, "--data-dir", str(partly_bad), "--output", str(output), "--workers", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", "--max-bad-images", "0.5"])
    assert start("embed.py") == 0
    out, err = capsys.readouterr()
    assert out == f"{output}: 4 rows; 2 images skipped\n"
    assert err.startswith(f"skipped: {partly_bad}/b.png: cannot be decoded")
    assert start("embed.py") == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: '{output}' or its .csv exists. Choose another --output") and not out


@pytest.mark.parametrize("script", ["detection.py", "segmentation.py"])
def test_a_wrong_model_is_one_message(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--model", "local-dir:absent"])
    assert start(script) == 2
    assert capsys.readouterr().err.startswith("error: The model 'local-dir:absent' cannot be loaded (FileNotFoundError")
