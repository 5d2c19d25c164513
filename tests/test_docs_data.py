"""The commands of the guides run as written on images of each kind, up to an encoder that timm opens."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
from dicom_files import draw
from PIL import Image

from timm_convnextv2.commands import main as cli
from timm_convnextv2.commands.pretrain import parse_options
from timm_convnextv2.pretraining import loop, measures

ROOT = Path(__file__).parents[1]
GUIDES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs/guides").glob("*.md")}
# the same runs in seconds
SMALLER = {
    "check": ["--img-size", "32", "-j", "0"],
    "stats": ["-j", "0"],
    "embed": ["-j", "0"],
    "pretrain": shlex.split(
        "--model fcmae_convnextv2_atto --model-kwargs depths=[1,1,1,1] dims=[8,12,16,20] --decoder-dim 8 --patch-size 1"
        " --img-size 32 --batch-size 8 --epochs 1 --workers 0 --device cpu"
    ),
}


def commands(text: str) -> list[list[str]]:
    """The words of this package's commands in the shell blocks of a page."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", "")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["timm-convnextv2"]]


# -------------------------------------------------------------------------------------------- images of each guide


def write_tiff(path: str, image: np.ndarray, **options) -> None:
    tifffile = pytest.importorskip("tifffile")
    Path(path).parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, image, photometric="minisblack", **options)


def waves(seed: int, bands: int, height: int, width: int) -> np.ndarray:
    """Smooth bands with noise, float `[bands, height, width]`, about 0 to 1."""
    y, x = np.mgrid[:height, :width] / 96
    drawn = [np.sin(6 * x * (1 + seed % 3) + b) * np.cos(5 * y + seed) for b in range(bands)]
    return 0.5 + 0.4 * np.stack(drawn) + np.random.default_rng(seed).normal(0, 0.04, (bands, height, width))


def draw_microscopy() -> None:
    for i in range(6):
        cell = (4095 * waves(i, 2, 96, 128)).clip(0, 4095).astype(np.uint16)
        write_tiff(f"cells/{i}.ome.tif", cell, metadata={"axes": "CYX"})
        write_tiff(f"tiles/{i}.ome.tif", cell[:, :64, :64].copy(), metadata={"axes": "CYX"})


def draw_satellite() -> None:
    tags = [
        (33550, "d", 3, (10.0, 10.0, 0.0), True),  # metres per pixel
        (33922, "d", 6, (0.0, 0.0, 0.0, 399960.0, 5000040.0, 0.0), True),  # place of the first pixel
        (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), True),  # EPSG 32633
        (42113, "s", 0, "0", True),  # nodata
    ]
    for i, (height, width) in enumerate([(200, 260), (180, 140), (220, 190)]):
        scene = 800 + 3000 * waves(i, 12, height, width)
        scene[:, np.add(*np.mgrid[:height, :width]) < 48] = 0  # a corner without data
        options = dict(planarconfig="separate", compression="zlib", extratags=tags)
        write_tiff(f"scenes/{i}.tif", scene.clip(0, 10000).astype(np.uint16), tile=(64, 64), **options)
        write_tiff(f"tiles/{i}.tif", scene[:, -64:, -64:].clip(0, 10000).astype(np.uint16), **options)


def draw_slides() -> None:
    for i in range(3):
        slide = np.full((256, 320, 3), 240, np.uint8)  # half of it is glass
        slide[:, :160] = (255 * waves(i, 3, 256, 160)).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        Path("slides").mkdir(exist_ok=True), Path("tiles").mkdir(exist_ok=True)
        pytest.importorskip("tifffile").imwrite(f"slides/{i}.svs", slide, photometric="rgb", tile=(64, 64))
        Image.fromarray(slide[:64, :64]).save(f"tiles/{i}.png")


def draw_x_rays() -> None:
    pytest.importorskip("pydicom")
    Path("x-rays").mkdir()
    for i in range(16):
        stored = (4095 * waves(i, 1, 80, 72)[0].clip(0, 1)).astype(np.uint16)
        inverted = dict(x=4095 - stored, photometric="MONOCHROME1") if i % 2 else dict(x=stored)
        draw(Path(f"x-rays/{i:02d}.dcm"), **inverted, WindowCenter=2000, WindowWidth=3600)


def draw_frames() -> None:
    for camera, count in (("gate", 24), ("yard", 8)):
        Path("frames", camera).mkdir(parents=True)
        for i in range(count):
            frame = (255 * waves(i + count, 3, 48, 64)).clip(0, 255).astype(np.uint8)
            Image.fromarray(frame.transpose(1, 2, 0)).save(f"frames/{camera}/{i:06d}.jpg")


def draw_pages() -> None:
    Path("pages").mkdir(), Path("crops").mkdir()
    for i in range(4):
        page = np.full((160, 120), 255, np.uint8)
        for row in range(12, 150, 8):  # lines of text
            page[row : row + 4, 10:110] = np.random.default_rng([i, row]).choice([0, 255], (4, 100))
        Image.fromarray(page).save(f"pages/{i}.png")
        Image.fromarray(page[:64, :64]).save(f"crops/{i}.png")


DRAWN = {
    "microscopy": draw_microscopy,
    "satellite": draw_satellite,
    "slides-and-scenes": draw_slides,
    "xray-dicom": draw_x_rays,
    "camera-traps": draw_frames,
    "documents": draw_pages,
}


def test_every_guide_is_run():
    assert set(GUIDES) == set(DRAWN)


@pytest.mark.parametrize("guide", DRAWN)
def test_the_commands_of_a_guide_lead_to_an_encoder(guide, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for module, name in ((loop, "save_loss_curve"), (loop, "write_report"), (measures, "save_reconstructions")):
        monkeypatch.setattr(module, name, lambda *_: None)  # drawing takes longer than the runs
    DRAWN[guide]()
    found = commands(GUIDES[guide])
    assert [words[0] for words in found] in (["check", "stats", "pretrain", "embed"], ["check", "pretrain", "embed"])
    for words in found:
        windows = ["--window-size", "64"] if "--window-size" in words else []
        assert cli.main([*words, *SMALLER[words[0]], *windows]) == 0, (words, capsys.readouterr())
    features = np.load(found[-1][-1])
    assert len(features) >= 3 and np.isfinite(features).all()
    pretrain = next(words for words in found if words[0] == "pretrain")
    model = timm.create_model(f"local-dir:output/{pretrain[-1]}/encoder", pretrained=True, num_classes=2)
    config = parse_options(pretrain[1:])[0]
    assert model.stem[0].weight.shape[1] == config.crops.in_chans


def test_the_table_of_the_readme_holds_whole_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [shlex.split(line) for line in re.findall(r"\| `timm-convnextv2 pretrain ([^`]+)` \|", text)]
    assert len(rows) == 8
    for words in rows:
        parse_options(words)
