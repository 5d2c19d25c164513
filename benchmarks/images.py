"""Two sets of real, labelled images from Debian's packages, for benchmarks: clip art and photographs.

    python -m benchmarks.images FOLDER --cache CACHE [--sets clipart photographs] [--sizes 64 32]

Needs Debian or Ubuntu (`apt-get update` first). `apt-get download` puts the packages in CACHE and `dpkg-deb -x` unpacks
them there; nothing is installed. Each package states its licences in CACHE/PACKAGE/usr/share/doc/PACKAGE/copyright: the
clip art is in the public domain, the photographs are under several free licences. The images are not distributed.

Writes FOLDER/SET-SIZE/train/CLASS/*.png, FOLDER/SET-SIZE/validation/CLASS/*.png and FOLDER/SET-SIZE/about.json, which
holds the counts of images, the reasons for which files were left out, and the versions of the packages. All sizes hold
the same images in the same split.

clipart: drawings on white, centred on a square. The class is the top folder. Left out: `unsorted` and `special`, which
are no classes; `shapes/stars`, 1,378 figures of one generator; links, which give a drawing a second class; drawings
that look the same (one is kept, or none if their classes differ); small classes. Near-duplicates, drawings whose
perceptual hashes differ by a few bits, stay on one side of the split, and so do the drawings that they chain together.

photographs: the class is the photograph, and the images are square windows of it that do not overlap. Training windows
are from the left 60 % and validation windows from the right 30 %, with nothing in between, so that a texture has to be
recognised and not a place. Left out: drawn and rendered wallpapers (all of those in `gnome-backgrounds`), and windows
that are nearly flat.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = ["Drawing", "near_groups", "perceptual_hash", "read_clipart", "split_drawings", "square", "windows"]

CLIPART = "openclipart-png"
NO_CLASSES = {"unsorted": "no class", "special": "no class", "shapes/stars": "series of one generator"}
# Photographs in the packages of Debian 12, by file name, or by folder if the name is a size.
PHOTOGRAPHS = {
    "lomiri-wallpapers-16.04": (
        "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace "
        "Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi analogpattern_by_Peter_Nerlich free_by_Peter_Nerlich "
        "friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi "
        "picosdeeuropa_by_Aitzol_Berasategi seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi"
    ).split(),
    "lomiri-wallpapers-20.04": ["Kleiber_by_Lukas_Baubkus"],
    "mate-backgrounds": (
        "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower"
    ).split(),
    "plasma-workspace-wallpapers": (
        "BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am"
    ).split(),
}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".jxl", ".avif", ".svg"}
HASH_SIZE = 64  # side of the images that are hashed and compared
MAX_PIXELS = 50_000_000  # a few drawings have 100 million pixels and more
TOO_LARGE = "more than 50 million pixels"
MIN_SIDE = 16
FLAT = 4.0  # standard deviation, of 255
SHORT_SIDE = 1024  # of a photograph, before windows of the largest size are cut
LEFT, RIGHT = 0.6, 0.3
MIN_WINDOWS = {"train": 60, "validation": 24}

Split = dict[str, dict[str, list[tuple[str, Image.Image]]]]  # part -> class -> name and image at the largest size


class Drawing(NamedTuple):
    """A drawing of the clip art.

    Attributes:
        name: Path below the top folder, without suffix, unique and safe as a file name.
        label: The top folder.
        image: RGB, square, at the largest size that is written.
        hash: Its perceptual hash, bool `[63]`.
    """

    name: str
    label: str
    image: Image.Image
    hash: np.ndarray


# ------------------------------------------------------------------------------------------------------------ packages


def unpack(package: str, cache: Path) -> tuple[Path, str]:
    """Downloads and unpacks a Debian package, unless the cache has it; returns its folder and its version."""
    folder, note = cache / package, cache / f"{package}.version"
    if folder.is_dir() and note.is_file():
        return folder, note.read_text(encoding="utf-8").strip()
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise ValueError(f"{program} was not found. The images come from Debian's packages: use Debian or Ubuntu.")
    part = cache / f"{package}.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    part.mkdir(parents=True)
    _call(["apt-get", "download", package], part, f"Cannot download {package}. Run `apt-get update` and try again.")
    (archive,) = part.glob("*.deb")
    _call(["dpkg-deb", "-x", archive.name, "files"], part, f"Cannot unpack {archive.name}.")
    version = _call(["dpkg-deb", "-f", archive.name, "Version"], part, f"Cannot read {archive.name}.").strip()
    note.write_text(version + "\n", encoding="utf-8")
    os.replace(part / "files", folder)
    shutil.rmtree(part)
    return folder, version


def _call(words: Sequence[str], folder: Path, failure: str) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{failure} {words[0]} ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def open_image(path: Path) -> Image.Image | str:
    """An image whose pixels are not decoded yet, or the reason to leave the file out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked here
        try:
            image = Image.open(path)
        except Image.DecompressionBombError:
            return TOO_LARGE
        except OSError:
            return "format that Pillow cannot read"
    return TOO_LARGE if image.width * image.height > MAX_PIXELS else image


# ------------------------------------------------------------------------------------------------------------ clip art


def square(image: Image.Image, size: int) -> Image.Image:
    """The whole image on white, centred on a square of `size` pixels, RGB."""
    rgba = image.convert("RGBA")
    paper = Image.new("RGBA", rgba.size, "white")
    paper.alpha_composite(rgba)
    factor = size / max(rgba.size)
    sides = (max(1, round(rgba.width * factor)), max(1, round(rgba.height * factor)))
    small = paper.convert("RGB").resize(sides, Image.Resampling.LANCZOS if factor > 1 else Image.Resampling.BOX)
    out = Image.new("RGB", (size, size), "white")
    out.paste(small, ((size - sides[0]) // 2, (size - sides[1]) // 2))
    return out


def is_flat(image: Image.Image) -> bool:
    """Whether an image is blank, or nearly so."""
    return float(np.asarray(image, dtype=np.float32).std()) < FLAT


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """bool `[63]`: which of the lowest frequencies of the grey image, but the mean, are above their median."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    cosines = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))
    low = (cosines @ grey @ cosines.T).ravel()[1:]
    return low > np.median(low)


def near_groups(hashes: np.ndarray, bits: int) -> list[list[int]]:
    """Groups of near-duplicates: pairs of images whose hashes differ by at most `bits` are in one group.

    Args:
        hashes: bool `[N, 63]`.
        bits: Largest number of bits by which near-duplicates differ.

    Returns:
        Numbers of the images of each group, in ascending order; an image without near-duplicates is a group.
    """
    signs = np.where(hashes, 1, -1).astype(np.float32)
    waiting = np.ones(len(signs), dtype=bool)
    groups = []
    for first in range(len(signs)):
        if not waiting[first]:
            continue
        waiting[first] = False
        group = [first]
        for i in group:  # grows while it is read
            rest = np.flatnonzero(waiting)
            found = rest[(signs.shape[1] - signs[rest] @ signs[i]) / 2 <= bits]
            waiting[found] = False
            group += found.tolist()
        groups.append(sorted(group))
    return groups


def read_clipart(root: Path, size: int, min_images: int) -> tuple[list[Drawing], Counter[str]]:
    """The drawings below a folder of top folders, in the order of their names, and how many were left out and why."""
    left: Counter[str] = Counter()
    alike: defaultdict[bytes, list[Drawing]] = defaultdict(list)
    for path in sorted(root.rglob("*.png")):
        parts = path.relative_to(root).with_suffix("").parts
        if len(parts) < 2:
            left["no class"] += 1
            continue
        reason = NO_CLASSES.get(parts[0]) or NO_CLASSES.get("/".join(parts[:2]))
        if path.is_symlink():
            left["link to another drawing"] += 1
        elif reason:
            left[reason] += 1
        elif isinstance(image := open_image(path), str):
            left[image] += 1
        elif max(image.size) < MIN_SIDE:
            left["less than 16 pixels"] += 1
        else:
            drawn = square(image, max(size, HASH_SIZE))
            small = drawn.resize((HASH_SIZE, HASH_SIZE), Image.Resampling.BOX)
            if is_flat(small):
                left["blank"] += 1
                continue
            kept = drawn if drawn.width == size else drawn.resize((size, size), Image.Resampling.BOX)
            alike[small.tobytes()].append(Drawing("-".join(parts[1:]), parts[0], kept, perceptual_hash(small)))
    drawings = []
    for same in alike.values():
        if len({drawing.label for drawing in same}) > 1:
            left["same drawing in several classes"] += len(same)
            continue
        drawings.append(same[0])
        left["duplicate"] += len(same) - 1
    counts = Counter(drawing.label for drawing in drawings)
    left["small class"] = sum(n for n in counts.values() if n < min_images)
    return [drawing for drawing in drawings if counts[drawing.label] >= min_images], +left


def split_drawings(drawings: Sequence[Drawing], share: float, bits: int, seed: int) -> Split:
    """Splits each class, so that near-duplicates stay on one side.

    Args:
        drawings: The drawings.
        share: Largest share of a class in the part `validation`, above 0 and below 1.
        bits: Largest number of bits by which the hashes of near-duplicates differ.
        seed: Of the order in which groups of near-duplicates are put into `validation` until it is full.
    """
    groups = near_groups(np.stack([drawing.hash for drawing in drawings]), bits)
    random.Random(seed).shuffle(groups)
    room = {label: share * n for label, n in Counter(drawing.label for drawing in drawings).items()}
    parts: Split = {part: {label: [] for label in sorted(room)} for part in ("train", "validation")}
    for group in groups:
        needed = Counter(drawings[i].label for i in group)
        fits = all(room[label] >= n for label, n in needed.items())
        for i in group:
            name, label, image, _ = drawings[i]
            room[label] -= fits
            parts["validation" if fits else "train"][label].append((name, image))
    for part in parts.values():
        for images in part.values():
            images.sort(key=lambda pair: pair[0])
    return parts


# --------------------------------------------------------------------------------------------------------- photographs


def windows(image: Image.Image, size: int, start: float, end: float) -> Iterator[tuple[str, Image.Image]]:
    """Windows of `size` pixels, which do not overlap, between two shares of the width; named by row and column."""
    first, last = round(start * image.width), round(end * image.width)
    for row, top in enumerate(range(0, image.height - size + 1, size)):
        for column, left in enumerate(range(first, last - size + 1, size)):
            yield f"{row:02d}-{column:02d}", image.crop((left, top, left + size, top + size))


def find_photographs(folders: dict[str, Path]) -> tuple[dict[str, Path], Counter[str]]:
    """The largest file of each photograph, by name, and how many files were left out and why."""
    left: Counter[str] = Counter()
    found: dict[str, tuple[int, Path]] = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            name = next((p for p in (path.stem, *reversed(path.parts)) if p in PHOTOGRAPHS[package]), None)
            if path.is_symlink():
                left["link to another file"] += 1
            elif name is None:
                left["not a photograph"] += 1
            elif isinstance(image := open_image(path), str):
                left[image] += 1
            else:
                pixels = image.width * image.height
                left["smaller copy"] += name in found
                if name not in found or pixels > found[name][0]:
                    found[name] = (pixels, path)
    return {name: path for name, (_, path) in sorted(found.items())}, +left


def cut_photographs(photographs: dict[str, Path], size: int) -> tuple[Split, Counter[str]]:
    """The windows of each photograph, and how many photographs and windows were left out and why."""
    left: Counter[str] = Counter()
    parts: Split = {"train": {}, "validation": {}}
    for name, path in photographs.items():
        image = Image.open(path)
        factor = SHORT_SIDE / min(image.size)
        if factor > 1:
            left["small photograph"] += 1
            continue
        sides = (round(image.width * factor), round(image.height * factor))
        image = image.convert("RGB").resize(sides, Image.Resampling.LANCZOS)
        found = {
            "train": list(windows(image, size, 0, LEFT)),
            "validation": list(windows(image, size, 1 - RIGHT, 1)),
        }
        kept = {part: [pair for pair in pairs if not is_flat(pair[1])] for part, pairs in found.items()}
        if any(len(kept[part]) < n for part, n in MIN_WINDOWS.items()):
            left["photograph with few windows that are not flat"] += 1
            continue
        for part, pairs in kept.items():
            left["flat window"] += len(found[part]) - len(pairs)
            parts[part][name] = pairs
    return parts, +left


# ------------------------------------------------------------------------------------------------------------- writing


def write(folder: Path, parts: Split, sizes: Sequence[int], about: dict) -> None:
    """Writes `FOLDER-SIZE` for each size, whole or not at all."""
    counts = {part: {label: len(images) for label, images in classes.items()} for part, classes in parts.items()}
    about = {**about, "images": {part: sum(n.values()) for part, n in counts.items()}, "classes": counts}
    for size in sizes:
        target = folder.with_name(f"{folder.name}-{size}")
        unfinished = folder.with_name(f"{target.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        for part, classes in parts.items():
            for label, images in classes.items():
                place = unfinished / part / label
                place.mkdir(parents=True)
                for name, image in images:
                    small = image if image.width == size else image.resize((size, size), Image.Resampling.BOX)
                    small.save(place / f"{name}.png")
        text = json.dumps({"size": size, **about}, indent=2, ensure_ascii=False)
        (unfinished / "about.json").write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, target)
        told = ", ".join(f"{n} for {part}" for part, n in about["images"].items())
        print(f"{target.name}: {len(counts['train'])} classes, {told}", flush=True)


def build(args: argparse.Namespace) -> None:
    """Builds the sets that the options name."""
    size = max(args.sizes)
    if "clipart" in args.sets:
        folder, version = unpack(CLIPART, args.cache)
        drawings, left = read_clipart(folder / "usr/share/openclipart/png", size, args.min_images)
        if not drawings:
            raise ValueError(f"No class has {args.min_images} images: choose a smaller --min-images.")
        parts = split_drawings(drawings, args.validation_share, args.near_bits, args.seed)
        if empty := [label for label, images in parts["validation"].items() if not images]:
            raise ValueError(f"No validation images in {', '.join(empty)}: choose a larger --validation-share.")
        about = dict(packages={CLIPART: version}, left_out=dict(left), near_bits=args.near_bits, seed=args.seed)
        write(args.folder / "clipart", parts, args.sizes, about)
    if "photographs" in args.sets:
        unpacked = {package: unpack(package, args.cache) for package in PHOTOGRAPHS}
        photographs, left = find_photographs({package: folder for package, (folder, _) in unpacked.items()})
        parts, more = cut_photographs(photographs, size)
        if len(parts["train"]) < 2:
            raise ValueError(f"{len(parts['train'])} photographs in the packages have windows of {size} pixels.")
        about = dict(packages={name: version for name, (_, version) in unpacked.items()}, left_out=dict(left + more))
        write(args.folder / "photographs", parts, args.sizes, about)


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for a mistake in the options, before anything is written."""
    if not 0 < args.validation_share < 1:
        raise ValueError(f"--validation-share is {args.validation_share}, expected a share above 0 and below 1.")
    if not 0 <= args.near_bits < 63:
        raise ValueError(f"--near-bits is {args.near_bits}, expected 0 to 62 of the 63 bits.")
    if args.min_images < 2:
        raise ValueError(f"--min-images is {args.min_images}, expected at least 2.")
    if wrong := [size for size in args.sizes if not 8 <= size <= SHORT_SIDE // 8]:
        raise ValueError(f"--sizes has {wrong[0]}, expected 8 to {SHORT_SIDE // 8} pixels.")
    for name in args.sets:
        for size in args.sizes:
            if (target := args.folder / f"{name}-{size}").exists():
                raise ValueError(f"{target} exists: remove it, or name another folder.")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="where the sets are written")
    add("--cache", type=Path, required=True, metavar="CACHE", help="where the packages are downloaded and unpacked")
    add("--sets", nargs="+", choices=["clipart", "photographs"], default=["clipart", "photographs"])
    add("--sizes", type=int, nargs="+", default=[64, 32], metavar="N", help="sides of the images in pixels")
    add("--min-images", type=int, default=30, metavar="N", help="clip art: leave out classes with fewer images")
    add("--validation-share", type=float, default=0.25, metavar="X", help="clip art: largest share of each class")
    add("--near-bits", type=int, default=6, metavar="N", help="clip art: hashes of near-duplicates differ by so many")
    add("--seed", type=int, default=0, help="of the clip art's split")
    args = parser.parse_args()
    args.sizes = sorted(set(args.sizes), reverse=True)
    try:
        check_options(args)
        args.folder.mkdir(parents=True, exist_ok=True)
        build(args)
    except (ValueError, OSError) as error:
        print(f"images: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
