"""
The paper's augmentations (Listings 1 and 2): a PIL image becomes uint8 [size, size, 3].

Every function that draws at random takes the generator it draws from.
"""

import random

import numpy as np
from PIL import Image, ImageOps


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
