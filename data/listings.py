"""
The paper's augmentations (Listings 1 and 2): a PIL image becomes uint8 [size, size, 3].

Every function that draws at random takes the generator it draws from.
"""

import random

import numpy as np
from PIL import Image


def preprocess_dvae(img: Image.Image, size: int, rng: random.Random) -> np.ndarray:
    """Listing 1, for the dVAE: an RGB image to uint8 [size, size, 3].

    A square from anywhere, reduced to 9/8 to 12/8 of the target; a crop of it, mirrored half of
    the time. ValueError for a mode other than RGB.
    """
    s = min(img.size)
    x, y = rng.randint(0, img.width - s), rng.randint(0, img.height - s)
    pixels = crop_square(img, x, y, size)
    s = len(pixels)
    t = rng.randint(min(s, round(9 / 8 * size)), min(s, round(12 / 8 * size)))
    pixels = random_crop(to_8_bits(area_resize(pixels, t)), size, rng)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def preprocess_prior(img: Image.Image, size: int, rng: random.Random) -> np.ndarray:
    """Listing 2, for the prior: an RGB image to uint8 [size, size, 3].

    The square is cut from the middle quarter of the long side's slack, the scale varies less
    than in Listing 1, and nothing is mirrored, since an image may contain text.
    """
    slack = max(img.size) - min(img.size)
    first = 3 * slack // 8
    offset = rng.randrange(first, max(first + 1, 5 * slack // 8))
    x, y = (offset, 0) if img.width > img.height else (0, offset)
    pixels = crop_square(img, x, y, size)
    s = len(pixels)
    t = rng.randint(size, min(s, round(9 / 8 * size)))
    pixels = random_crop(to_8_bits(area_resize(pixels, t)), size, rng)
    return np.ascontiguousarray(pixels)


def crop_square(img: Image.Image, x: int, y: int, size: int) -> np.ndarray:
    """The square at (x, y) whose side s is the image's short side: uint8 [s, s, 3].

    Our reading: an image with s < size, where the paper's listings would fail, is enlarged to
    the target first (bicubic). ValueError for a mode other than RGB.
    """
    if img.mode != "RGB":
        raise ValueError(f"expected an image in mode RGB, got {img.mode}: convert it first")
    s = min(img.size)
    img = img.crop((x, y, x + s, y + s))
    return np.asarray(img if s >= size else img.resize((size, size), Image.Resampling.BICUBIC))


def area_resize(pixels: np.ndarray, t: int) -> np.ndarray:
    """resize_images(…, AREA, align_corners=True): [s, s, 3] to float32 [t, t, 3], unrounded.

    Output pixel i is the mean of the source over [i·k, (i + 1)·k) with k = (s − 1)/(t − 1),
    pixels covered in part counted in part; what lies past the last pixel reads the last pixel.
    A single output pixel has no corners to align and is the mean of all: k = s.
    """
    if t == len(pixels):
        return pixels.astype(np.float32)
    for _ in range(2):  # the mean over a rectangle: first down the rows, then along them
        s = len(pixels)
        covered, whole = (s - 1, t - 1) if t > 1 else (s, 1)  # k = covered / whole, in integers
        edges = covered * np.arange(t + 1)  # i·k, in units of 1 / whole of a source pixel
        left, right = edges[:-1], edges[1:]
        first, last = left // whole, (right - 1) // whole  # the source pixels under output i
        mean = np.zeros((t, *pixels.shape[1:]), np.float32)
        for j in (first + tap for tap in range((last - first).max() + 1)):
            overlap = np.minimum(right, (j + 1) * whole) - np.maximum(left, j * whole)
            weight = (overlap.clip(0) / covered).astype(np.float32)
            mean += weight[:, None, None] * pixels[j.clip(max=s - 1)]
        pixels = mean.swapaxes(0, 1)
    return pixels


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Listings 1 and 2: clip(rint(x), 0, 255)."""
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def random_crop(pixels: np.ndarray, size: int, rng: random.Random) -> np.ndarray:
    height, width, _ = pixels.shape
    x, y = rng.randint(0, width - size), rng.randint(0, height - size)
    return pixels[y : y + size, x : x + size]
