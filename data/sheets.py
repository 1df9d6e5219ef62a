"""
Pictures to look at: a model's pixels as images, and many images with their captions on one sheet.
"""

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, LINE, MOST_LINES = 8, 16, 6  # pixels, pixels, lines of a caption


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Float [B, 3, H, W] in [0, 1] to PIL images."""
    pixels = pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(x) for x in pixels.cpu().numpy()]


def sheet(
    pictures: list[Image.Image | np.ndarray], captions: list[str] | None = None, columns: int = 8
) -> Image.Image:
    """Pictures of one size as one, `columns` in a row, each with its caption below it.

    pictures: PIL images or uint8 arrays [H, W, 3], at least one. Each is enlarged a whole number
    of times, to a width of at least 128 pixels, or 256 where there are up to four columns.
    captions: one for each picture; six lines of it are shown.
    """
    images = [x if isinstance(x, Image.Image) else Image.fromarray(x) for x in pictures]
    columns = min(columns, len(images))
    scale = -(-(256 if columns <= 4 else 128) // images[0].width)
    width, height = images[0].width * scale, images[0].height * scale
    labels = [textwrap.wrap(text, width // 7)[:MOST_LINES] for text in captions or []]
    below = LINE * max(map(len, labels), default=0)
    step, rows = height + below + GAP, -(-len(images) // columns)

    whole = Image.new("RGB", (columns * (width + GAP) - GAP, rows * step - GAP), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(LINE - 4)
    corners = [(k % columns * (width + GAP), k // columns * step) for k in range(len(images))]
    for (x, y), image in zip(corners, images):
        whole.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
    for (x, y), label in zip(corners, labels):
        for i, line in enumerate(label):
            pen.text((x, y + height + i * LINE), line, "black", font)
    return whole
