"""`benchmarks.images`: what is left out of the clip art, how it is split, and where the windows are from."""

import random
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks import images
from benchmarks.images import near_groups, perceptual_hash, read_clipart, split_drawings, square, windows


def drawing(seed: int, size: int = 96) -> Image.Image:
    """Random shapes on a transparent ground."""
    rng = random.Random(seed)
    image = Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, side = rng.uniform(0, 0.7), rng.uniform(0, 0.7), rng.uniform(0.2, 0.4)
        box = [round(size * v) for v in (x, y, x + side, y + side)]
        rng.choice([draw.ellipse, draw.rectangle])(box, fill=(*(rng.randrange(160) for _ in range(3)), 255))
    return image


def save(image: Image.Image, path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def root(tmp_path):
    """Two classes of 12 drawings, the first of which is there in three sizes; and files to leave out."""
    folder = tmp_path / "png"
    for i in range(12):
        save(drawing(i), folder / f"animals/birds/{i}.png")
        save(drawing(100 + i), folder / f"tools/{i}.png")
    save(drawing(0, size=200), folder / "animals/large.png")
    save(drawing(0, size=64), folder / "animals/small.png")
    return folder


def names(drawings) -> set[str]:
    return {f"{d.label}/{d.name}" for d in drawings}


def test_files_are_left_out_for_a_reason(root):
    before, left = read_clipart(root, 64, 5)
    assert len(before) == 26 and not left
    save(drawing(5), root / "animals/the-same.png")
    save(drawing(200), root / "animals/ambiguous.png")
    save(drawing(200), root / "tools/ambiguous.png")
    save(Image.new("RGBA", (90, 90)), root / "tools/blank.png")
    save(drawing(201, size=12), root / "tools/tiny.png")
    save(drawing(202), root / "special/a.png")
    save(drawing(203), root / "shapes/stars/a.png")
    save(drawing(204), root / "rare/a.png")
    (root / "tools/broken.png").write_bytes(b"no image")
    (root / "tools/link.png").symlink_to(root / "animals/birds/3.png")
    after, left = read_clipart(root, 64, 5)
    assert names(after) == names(before)
    assert left == {
        "duplicate": 1,
        "same drawing in several classes": 2,
        "blank": 1,
        "less than 16 pixels": 1,
        "no class": 1,
        "series of one generator": 1,
        "small class": 1,
        "format that Pillow cannot read": 1,
        "link to another drawing": 1,
    }


def test_too_many_pixels_are_not_decoded(root, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 150 * 150)
    drawings, left = read_clipart(root, 64, 5)
    assert "animals/large" not in names(drawings) and left == {images.TOO_LARGE: 1}


def test_transparent_ground_is_white_and_nothing_is_cut_off():
    image = Image.new("RGBA", (100, 50), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 50, 50))
    pixels = np.asarray(square(image, 32))
    assert pixels.shape == (32, 32, 3)
    assert (pixels[:8] == 255).all() and (pixels[24:] == 255).all() and (pixels[:, :16] == 255).all()
    assert (pixels[8:24, 16:] == (255, 0, 0)).all()


def test_hash_knows_a_drawing_again_in_another_size_and_colour():
    hashes = [perceptual_hash(square(drawing(i), 64)) for i in range(20)]
    for i, own in enumerate(hashes):
        image = square(drawing(i, size=150), 64)
        faded = Image.blend(image, Image.new("RGB", image.size, "white"), 0.4)
        others = [int((own != other).sum()) for j, other in enumerate(hashes) if j != i]
        assert (own != perceptual_hash(image)).sum() <= 6 and (own != perceptual_hash(faded)).sum() <= 6
        assert min(others) > 6


@pytest.mark.parametrize("bits", [0, 3])
def test_groups_are_the_connected_components(bits):
    rng = np.random.default_rng(0)
    hashes = rng.random((40, 63)) < 0.5
    hashes[10:] = hashes[:10].repeat(3, axis=0)
    for row in hashes[10:]:
        row[rng.integers(0, 63, size=3)] ^= True
    near = (hashes[:, None] != hashes[None]).sum(-1) <= bits
    reached = np.linalg.matrix_power(near.astype(float), 40) > 0
    groups = near_groups(hashes, bits)
    assert sorted(i for group in groups for i in group) == list(range(40))
    for group in groups:
        assert np.flatnonzero(reached[group[0]]).tolist() == group
    assert (max(map(len, groups)) > 1) == (bits > 0)


def sides(parts) -> dict[str, str]:
    return {f"{label}/{name}": part for part, found in parts.items() for label in found for name, _ in found[label]}


@pytest.mark.parametrize("seed", range(6))
def test_near_duplicates_stay_on_one_side(root, seed):
    drawings, _ = read_clipart(root, 64, 5)
    parts = split_drawings(drawings, 0.3, 6, seed)
    side = sides(parts)
    assert side.keys() == names(drawings)
    assert side["animals/birds-0"] == side["animals/large"] == side["animals/small"]
    for label, n in {"animals": 14, "tools": 12}.items():
        assert 1 <= len(parts["validation"][label]) <= 0.3 * n


def test_the_split_depends_on_the_seed_alone(root):
    drawings, _ = read_clipart(root, 64, 5)
    first = sides(split_drawings(drawings, 0.3, 6, 0))
    assert first == sides(split_drawings(read_clipart(root, 64, 5)[0], 0.3, 6, 0))
    assert first != sides(split_drawings(drawings, 0.3, 6, 1))


def test_a_group_that_does_not_fit_is_trained_on(root):
    drawings, _ = read_clipart(root, 64, 5)
    alike = [d._replace(hash=drawings[0].hash) if d.label == "animals" else d for d in drawings]
    parts = split_drawings(alike, 0.3, 6, 0)
    assert not parts["validation"]["animals"] and len(parts["train"]["animals"]) == 14
    assert parts["validation"]["tools"]


def test_windows_of_the_two_sides_do_not_touch():
    """Each pixel says its place, so that a window says where it is from."""
    columns, rows = np.meshgrid(np.arange(250), np.arange(140))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))
    seen = np.zeros((140, 250), int)
    for start, end, count in ((0, 0.6, 4 * 4), (0.7, 1, 4 * 2)):
        found = list(windows(image, 32, start, end))
        assert len(found) == len({name for name, _ in found}) == count
        for _, window in found:
            x, y = np.asarray(window)[..., 0], np.asarray(window)[..., 1]
            assert x.shape == (32, 32) and start * 250 <= x.min() and x.max() < end * 250
            seen[y, x] += 1
    assert seen.max() == 1 and not seen[:, 150:175].any()


def test_sizes_hold_the_same_images(root, tmp_path):
    drawings, left = read_clipart(root, 64, 5)
    images.write(tmp_path / "clipart", split_drawings(drawings, 0.3, 6, 0), [64, 32], {"left_out": dict(left)})
    files = [
        sorted(p.relative_to(tmp_path / f"clipart-{n}") for p in (tmp_path / f"clipart-{n}").rglob("*.png"))
        for n in (64, 32)
    ]
    assert files[0] == files[1] and len(files[0]) == 26
    for n in (64, 32):
        with Image.open(tmp_path / f"clipart-{n}" / files[0][0]) as image:
            assert image.size == (n, n) and image.mode == "RGB"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--validation-share", "1"], "--validation-share is 1.0, expected a share above 0 and below 1."),
        (["--near-bits", "63"], "--near-bits is 63, expected 0 to 62 of the 63 bits."),
        (["--min-images", "1"], "--min-images is 1, expected at least 2."),
        (["--sizes", "64", "4"], "--sizes has 4, expected 8 to 128 pixels."),
        (["--sets", "clipart"], "clipart-64 exists: remove it, or name another folder."),
    ],
)
def test_mistakes_are_told_before_anything_is_downloaded(tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "sets/clipart-64").mkdir(parents=True)
    folders = [str(tmp_path / "sets"), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", ["images", *folders, *words])
    assert images.main() == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
