"""Two kinds of pictures on which a code book collapses easily: black lines on white, flat logos.

python tests/drawings.py logos OUT     # 400 pictures of 64 × 64 pixels; or lines
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 64


def lines(rng: random.Random) -> Image.Image:
    """Three to eight black strokes on white."""
    image = Image.new("RGB", (4 * SIDE, 4 * SIDE), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 8)):
        points = [(rng.randrange(4 * SIDE), rng.randrange(4 * SIDE)) for _ in range(3)]
        draw.line(points, "black", rng.randint(8, 16), joint="curve")
    return image.reduce(4)


def logo(rng: random.Random) -> Image.Image:
    """Flat shapes in one to four colours on a background of another."""
    colors = [tuple(rng.choice((20, 90, 160, 235)) for _ in "rgb") for _ in range(5)]
    image = Image.new("RGB", (4 * SIDE, 4 * SIDE), colors[0])
    draw = ImageDraw.Draw(image)
    for k in range(rng.randint(1, 4)):
        x, y = (rng.randint(SIDE, 3 * SIDE) for _ in "xy")
        w, h = (rng.randint(SIDE // 2, 3 * SIDE // 2) for _ in "wh")
        box = (x - w, y - h, x + w, y + h)
        if rng.random() < 0.5:
            draw.ellipse(box, colors[k + 1])
        else:
            draw.rectangle(box, colors[k + 1])
    return image.reduce(4)


KINDS = {"lines": lines, "logos": logo}


def write(kind: str, folder: Path, count: int = 400) -> None:
    folder.mkdir(parents=True)
    for k in range(count):
        KINDS[kind](random.Random(k)).save(folder / f"{k:03}.png")


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
