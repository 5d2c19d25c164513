"""Small real images for benchmarks: characters of the fonts that are installed, drawn as notMNIST was.

    python -m benchmarks.glyphs FOLDER [--fonts /usr/share/fonts]

Debian's font packages (`apt-get install fonts-freefont-ttf fonts-lato ...`) are free: each states its licence in
/usr/share/doc/PACKAGE/copyright, most the SIL Open Font License. The images are drawn here and not distributed.

Writes FOLDER/unlabelled (letters and digits of seven tenths of the font families), FOLDER/labelled/train (A to J of the
same families) and FOLDER/labelled/validation (A to J of the other families, which no training ever saw). Each image is
a character in a random grey on another, slightly turned, scaled and shifted.
"""

import argparse
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

__all__ = ["CLASSES", "find_fonts", "write_glyphs"]

CLASSES = "ABCDEFGHIJ"
CHARACTERS = string.ascii_letters + string.digits


def find_fonts(folder: Path) -> dict[str, list[Path]]:
    """Fonts that have all letters and digits, by family; a character a font lacks is drawn like any other it lacks."""
    families: dict[str, list[Path]] = {}
    for path in sorted([*folder.rglob("*.ttf"), *folder.rglob("*.otf")]):
        try:
            font = ImageFont.truetype(str(path), 24)
            masks: list[Any] = [font.getmask(c) for c in CHARACTERS]
            drawn = {bytes(mask) + bytes(mask.size) for mask in masks}
            name = str(font.getname()[0])
        except (OSError, ValueError):
            continue
        if len(drawn) > 55:  # some fonts draw capitals for small letters: fewer are symbols, or none of these at all
            families.setdefault(name, []).append(path)
    return families


def draw(character: str, font_path: Path, size: int, rng: random.Random) -> Image.Image | None:
    """A character on a square of `size` pixels; None where the font draws nothing."""
    big = 4 * size
    font = ImageFont.truetype(str(font_path), int(big * rng.uniform(0.6, 0.95)))
    left, top, right, bottom = font.getbbox(character)
    if right - left < 2 or bottom - top < 2:
        return None
    background, ink = rng.sample(range(256), 2)
    if abs(background - ink) < 60:
        ink = (background + 128) % 256
    image = Image.new("L", (big, big), background)
    x = (big - (right - left)) / 2 - left + rng.uniform(-0.08, 0.08) * big
    y = (big - (bottom - top)) / 2 - top + rng.uniform(-0.08, 0.08) * big
    ImageDraw.Draw(image).text((x, y), character, font=font, fill=ink)
    image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=background)
    return image.resize((size, size), Image.Resampling.BOX)


def _images(fonts: list[Path], characters: str, size: int, rng: random.Random) -> Iterator[tuple[str, Image.Image]]:
    """Images of random characters and fonts, without end: each pair once before any is drawn again."""
    while True:
        pairs = [(c, f) for c in characters for f in fonts]
        rng.shuffle(pairs)
        for character, font in pairs:
            image = draw(character, font, size, rng)
            if image is not None:
                yield character, image


def write_glyphs(
    root: Path,
    fonts: dict[str, list[Path]],
    *,
    unlabelled: int,
    train: int,
    validation: int,
    size: int = 32,
    seed: int = 0,
) -> None:
    """Writes the three sets; the first N images of a set are those of a smaller one."""
    rng = random.Random(seed)
    names = sorted(fonts)
    rng.shuffle(names)
    cut = round(0.7 * len(names))
    seen, unseen = ([f for name in part for f in fonts[name]] for part in (names[:cut], names[cut:]))
    for folder, files, characters, count in (
        ("unlabelled", seen, CHARACTERS, unlabelled),
        ("labelled/train", seen, CLASSES, train),
        ("labelled/validation", unseen, CLASSES, validation),
    ):
        each = {c: 0 for c in characters}
        most = -(-count // len(characters))
        for i, (character, image) in enumerate(_images(files, characters, size, rng)):
            if sum(each.values()) >= count:
                break
            if each[character] >= most:
                continue
            each[character] += 1
            place = root / folder / ("" if folder == "unlabelled" else character)
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i:06d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"))
    parser.add_argument("--unlabelled", type=int, default=8000)
    parser.add_argument("--train", type=int, default=1600)
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    fonts = find_fonts(args.fonts)
    if len(fonts) < 10:
        parser.error(f"{len(fonts)} font families in {args.fonts}; install more of Debian's fonts-* packages.")
    write_glyphs(
        args.folder, fonts, unlabelled=args.unlabelled, train=args.train, validation=args.validation, size=args.size,
        seed=args.seed,
    )  # fmt: skip
    print(f"{sum(map(len, fonts.values()))} fonts of {len(fonts)} families")


if __name__ == "__main__":
    main()
