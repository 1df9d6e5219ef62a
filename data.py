"""
Data sets and the paper's augmentations.

A data set is the toy world, or pictures from a folder, a table or tar shards. An image is a PIL
image until an augmentation turns it into uint8 [size, size, 3]; a batch of those becomes float
[B, 3, H, W] in [0, 1] in the trainer. Every function that draws at random takes the generator it
draws from.

    python data.py               # writes toy.png, a sheet of toy pictures with their captions
    python data.py my_photos     # counts a data set, and writes a sheet of it into data.png
"""

import argparse
import copy
import os
import random
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from sources import TABLE_SUFFIXES, Folder, Pictures, Table, Tars
from toy import (  # noqa: F401  the toy world belongs to what this file offers
    COLORS,
    SHAPES,
    SPLITS,
    UNSEEN_PAIRS,
    Scene,
    render,
    toy_scene,
    toy_world,
)

HELD_OUT = 0.05  # the share kept for validation where no other data is named

# ----------------------------------------------------------------------------- data sets


class ToyWorld:
    """The toy world as a data set: item i is (PIL image, [caption])."""

    name = "toy"
    shuffle = False  # its indices are random already

    def __init__(self, image_size: int, split: str):
        self.image_size, self.split = image_size, split

    def __len__(self) -> int:
        return 2**31  # endless for every practical purpose

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        pixels, caption = toy_world(index, self.image_size, self.split)
        return Image.fromarray(pixels), [caption]

    def captions_of(self, index: int) -> list[str]:
        return [toy_scene(index, self.split).caption]

    def counts(self) -> str:
        return "endless pictures"


def split(pictures: Pictures) -> tuple[Pictures, Pictures]:
    """(train, val): a fixed share is held out, chosen by a hash of each name, at least one."""
    if len(pictures) < 2:
        raise ValueError(f"{pictures.name} holds 1 usable image: at least 2 are needed")
    names = (os.path.splitext(pictures.files[k])[0] for k in range(len(pictures)))
    hashes = [zlib.crc32(name.encode("utf-8", "surrogateescape")) for name in names]
    ranked = np.argsort(hashes, kind="stable")
    n_val = max(1, round(HELD_OUT * len(ranked)))
    train, val = copy.copy(pictures), copy.copy(pictures)
    train.index, val.index = np.sort(ranked[n_val:]), np.sort(ranked[:n_val])
    return train, val


def open_pictures(spec: str, captions: bool, filters: bool) -> Pictures:
    if spec.lower().endswith(".tar"):
        return Tars(spec, captions, filters)
    if spec.lower().endswith(TABLE_SUFFIXES):
        return Table(Path(spec), captions, filters)
    return Folder(Path(spec), captions, filters)


def open_dataset(
    spec: str,
    image_size: int,
    val: str | None = None,
    captions: bool = True,
    filters: bool = False,
) -> tuple[ToyWorld | Pictures, ToyWorld | Pictures]:
    """(train, val) data sets of a spec: `toy`, a folder of images, a table (.tsv .csv .jsonl) of
    image paths and captions, or WebDataset shards such as `shards/{000..031}.tar` or `*.tar`.

    Without `val`, a spec of its own, a fixed share of the data is held out. With `filters`,
    captions and images that the paper would drop (C) are passed over. ValueError where the spec
    names nothing usable.
    """
    if spec == "toy":
        train, held_out = ToyWorld(image_size, "train"), ToyWorld(image_size, "val")
    elif val:
        train, held_out = open_pictures(spec, captions, filters), None
    else:
        train, held_out = split(open_pictures(spec, captions, filters))
    if val == "toy":
        held_out = ToyWorld(image_size, "val")
    elif val:
        held_out = open_pictures(val, captions, filters)
    return train, held_out


# ----------------------------------------------------------------------------- augmentation


def crop_square(img: Image.Image, x: int, y: int, size: int) -> Image.Image:
    """The square at (x, y) whose side is the image's short side, at least `size` pixels wide.

    Our reading: a smaller image, where the paper's listings would fail, is enlarged (bicubic).
    ValueError for a mode other than RGB.
    """
    if img.mode != "RGB":
        raise ValueError(f"expected an image in mode RGB, got {img.mode}: convert it first")
    s = min(img.size)
    img = img.crop((x, y, x + s, y + s))
    return img if s >= size else img.resize((size, size), Image.Resampling.BICUBIC)


def crop(img: Image.Image, size: int, rng: random.Random) -> Image.Image:
    x, y = rng.randint(0, img.width - size), rng.randint(0, img.height - size)
    return img.crop((x, y, x + size, y + size))


def area_resize(img: Image.Image, t: int) -> Image.Image:
    """To t × t by averaging over areas, rounded to 8 bits: Pillow's BOX filter."""
    return img if img.size == (t, t) else img.resize((t, t), Image.Resampling.BOX)


def preprocess_dvae(img: Image.Image, size: int, rng: random.Random) -> np.ndarray:
    """Listing 1, for the dVAE: uint8 [size, size, 3]."""
    s = min(img.size)
    img = crop_square(img, rng.randint(0, img.width - s), rng.randint(0, img.height - s), size)
    s = img.width
    t = rng.randint(min(s, round(9 / 8 * size)), min(s, round(12 / 8 * size)))
    img = crop(area_resize(img, t), size, rng)
    if rng.random() < 0.5:
        img = ImageOps.mirror(img)
    return np.asarray(img)


def preprocess_prior(img: Image.Image, size: int, rng: random.Random) -> np.ndarray:
    """Listing 2, for the prior: uint8 [size, size, 3].

    The square is cut from the middle quarter of the long side's slack, the scale varies less
    than in Listing 1, and nothing is mirrored, since an image may contain text.
    """
    slack = max(img.size) - min(img.size)
    first = 3 * slack // 8
    offset = rng.randrange(first, max(first + 1, 5 * slack // 8))
    x, y = (offset, 0) if img.width > img.height else (0, offset)
    img = crop_square(img, x, y, size)
    img = area_resize(img, rng.randint(size, min(img.width, round(9 / 8 * size))))
    return np.asarray(crop(img, size, rng))


# ----------------------------------------------------------------------------- pictures


def sheet(
    rows: list[list[np.ndarray]], captions: list[list[str]] | None = None, scale: int = 1
) -> Image.Image:
    """Rows of equal-sized uint8 [H, W, 3] images as one picture, each enlarged `scale` times,
    each with its caption below it where there are captions. The first row is the longest."""
    height, width = rows[0][0].shape[:2]
    cell_w, cell_h = width * scale + 4, height * scale + 4
    text_h = 62 if captions else 0  # four lines
    picture = Image.new("RGB", (len(rows[0]) * cell_w, len(rows) * (cell_h + text_h)), "white")
    draw = ImageDraw.Draw(picture)
    for r, row in enumerate(rows):
        for c, pixels in enumerate(row):
            img = Image.fromarray(pixels).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            x, y = c * cell_w + 2, r * (cell_h + text_h) + 2
            picture.paste(img, (x, y))
            if captions:
                wrapped = textwrap.wrap(captions[r][c], width * scale // 6)
                draw.multiline_text((x, y + height * scale), "\n".join(wrapped[:4]), "black")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description="Count a data set and draw a sheet of it.")
    parser.add_argument("spec", nargs="?", default="toy", help="toy (default), folder, table, tars")
    parser.add_argument("--split", choices=SPLITS, default="train", help="of the toy world")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (default 32)")
    parser.add_argument("--filters", action="store_true", help="pass over what the paper drops (C)")
    parser.add_argument("-o", "--out", help="default toy.png or data.png")
    args = parser.parse_args()
    out = args.out or ("toy.png" if args.spec == "toy" else "data.png")
    size, rng = args.image_size, random.Random(0)
    try:
        if args.spec == "toy":
            pictures = ToyWorld(size, args.split)
        else:
            pictures = open_pictures(args.spec, True, args.filters)
        print(f"{pictures.name}: {pictures.counts()}")
        cells, faults, began = [], [], time.perf_counter()
        for i in range(min(400, len(pictures))):
            try:
                img, captions = pictures[i]
                cells.append((preprocess_prior(img, size, rng), captions[0]))
            except ValueError as error:
                faults.append(str(error))
        rate = len(cells) / (time.perf_counter() - began)
        for fault in faults[:5]:
            print(fault)
        if not cells:
            raise ValueError(f"no usable picture among the first {len(faults)} of {args.spec}")
        rows = [[pixels for pixels, _ in cells[r : r + 8]] for r in range(0, 40, 8)]
        captions = [[caption for _, caption in cells[r : r + 8]] for r in range(0, 40, 8)]
        rows = [row for row in rows if row]
        sheet(rows, captions, max(1, 128 // size)).save(out)
    except (OSError, ValueError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(cells)} pictures read, {len(faults)} passed over, {rate:.0f} a second on one core")
    print(f"{out}: the first {min(40, len(cells))} of them")


if __name__ == "__main__":
    main()
