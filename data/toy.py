"""
The toy world: small rendered scenes, "a red cube to the left of a blue sphere".

It is endless and needs no download. Its pictures have the light, soft gradients and sensor noise
of photographs, and everything in them is known, so that a model trained on them can be judged
exactly. An eighth of the colour-shape pairs never appears in training: they test whether a model
combines what it knows from elsewhere (3.3).
"""

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 38, 38),
    "orange": (240, 128, 20),
    "yellow": (240, 214, 40),
    "green": (40, 152, 58),
    "cyan": (52, 198, 208),
    "blue": (40, 72, 210),
    "purple": (120, 42, 168),
    "pink": (246, 134, 186),
}
SHAPES = ("cube", "sphere", "cylinder", "cone", "pyramid")
SIZES = {"small": 0.19, "large": 0.27}  # radius as a share of the image's side
SYNONYMS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
BACKGROUNDS = {
    "white": (226, 224, 220),
    "grey": (142, 146, 150),
    "black": (44, 44, 48),
    "brown": (166, 134, 104),
}
# where a single object stands, as shares of the image's side
PLACES = {
    "in the middle": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
}
RELATIONS = {  # where the first and the second of two objects stand
    "to the left of": ((0.25, 0.5), (0.75, 0.5)),
    "to the right of": ((0.75, 0.5), (0.25, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "below": ((0.5, 0.75), (0.5, 0.25)),
}
# One pair for each shape, no colour twice: no training picture or caption holds any of these.
UNSEEN_PAIRS = {
    ("green", "cube"),
    ("orange", "sphere"),
    ("blue", "cylinder"),
    ("pink", "cone"),
    ("yellow", "pyramid"),
}
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
SEEN_PAIRS = [pair for pair in PAIRS if pair not in UNSEEN_PAIRS]
SPLITS = ("train", "val", "unseen")
SENSOR_NOISE = 0.05  # standard deviation, in units of the full range


@dataclass
class Thing:
    color: str
    shape: str
    size: str
    x: float  # centre and radius, as shares of the image's side
    y: float
    radius: float


@dataclass
class Scene:
    things: list[Thing]
    background: str
    light: float  # exposure of the whole picture, about 1
    caption: str


def toy_scene(index: int, split: str) -> Scene:
    """What toy picture `index` of a split shows, and its caption.

    'train' and 'val' are different draws from the same distribution, over the seen pairs of
    colour and shape; in 'unseen' the first thing of every scene is an unseen pair.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: expected one of {', '.join(SPLITS)}")
    rng = random.Random(index * len(SPLITS) + SPLITS.index(split))
    relation = rng.choice(list(RELATIONS)) if rng.random() < 0.35 else None
    place = rng.choice(list(PLACES))
    spots = RELATIONS[relation] if relation else [PLACES[place]]
    things = []
    for k, (x, y) in enumerate(spots):
        pairs = SEEN_PAIRS
        if split == "unseen":
            pairs = sorted(UNSEEN_PAIRS) if k == 0 else PAIRS
        color, shape = rng.choice(pairs)
        size = rng.choice(list(SIZES))
        radius = SIZES[size] * rng.uniform(0.98, 1.02) * (0.85 if relation else 1)
        things.append(
            Thing(color, shape, size, x + rng.gauss(0, 0.006), y + rng.gauss(0, 0.006), radius)
        )
    background = rng.choice(list(BACKGROUNDS))
    light = rng.uniform(0.92, 1.08)

    # The grammar. Colour and shape are always named, the rest now and then.
    def noun(thing: Thing) -> str:
        size = rng.choice(SYNONYMS[thing.size]) + " " if rng.random() < 0.4 else ""
        return f"{size}{thing.color} {thing.shape}"

    def phrase(thing: Thing) -> str:
        words = noun(thing)
        return f"an {words}" if words[0] in "aeiou" else f"a {words}"

    opening = rng.choice(["", "", "", "a picture of ", "there is ", "we see "])
    if relation:
        caption = f"{opening}{phrase(things[0])} {relation} {phrase(things[1])}"
    elif not opening and rng.random() < 0.15:
        caption = f"one {noun(things[0])}"
    else:
        caption = f"{opening}{phrase(things[0])}"
    if not relation and rng.random() < 0.5:
        caption += f" {place}"
    if rng.random() < 0.3:
        caption += f" on a {background} background"
    return Scene(things, background, light, caption)


def shade(color, k: float) -> tuple[int, int, int]:
    """A colour in the light `k`: below 1 darker, above 1 mixed with white."""
    if k <= 1:
        return tuple(int(c * k) for c in color)
    return tuple(int(c + (255 - c) * (k - 1)) for c in color)


# the light on ten strips of a round body: (left edge of the strip in [-1, 1), brightness)
SIDE_LIGHT = [(i / 5 - 1, 1.22 - 0.82 * abs((i + 0.5) / 10 - 0.28) ** 0.9) for i in range(10)]


def draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, side: float) -> None:
    """Draw one solid, lit from the upper left, on a canvas of `side` pixels."""
    color, r = COLORS[thing.color], thing.radius * side
    cx, cy = thing.x * side, thing.y * side

    def at(*points):
        return [(cx + r * x, cy + r * y) for x, y in points]

    def disc(x, y, rx, ry, k):
        box = (cx + r * (x - rx), cy + r * (y - ry), cx + r * (x + rx), cy + r * (y + ry))
        draw.ellipse(box, fill=shade(color, k))

    if thing.shape == "sphere":
        for i in range(8):
            t = i / 7
            disc(-0.36 * t, -0.36 * t, 1 - 0.86 * t, 1 - 0.86 * t, 0.5 + 0.95 * t**0.8)
    elif thing.shape == "cube":
        draw.polygon(at((0, -1), (0.9, -0.55), (0, -0.1), (-0.9, -0.55)), shade(color, 1.4))
        draw.polygon(at((-0.9, -0.55), (0, -0.1), (0, 1), (-0.9, 0.55)), shade(color, 0.95))
        draw.polygon(at((0.9, -0.55), (0, -0.1), (0, 1), (0.9, 0.55)), shade(color, 0.52))
    elif thing.shape == "cylinder":
        for x, k in SIDE_LIGHT:
            bottom = 0.72 + 0.24 * (1 - (x + 0.1) ** 2) ** 0.5
            x0, x1 = 0.72 * x, 0.72 * (x + 0.2)
            draw.polygon(at((x0, -0.7), (x1, -0.7), (x1, bottom), (x0, bottom)), shade(color, k))
        disc(0, -0.7, 0.72, 0.26, 1.45)
    elif thing.shape == "cone":
        for x, k in SIDE_LIGHT:
            bottom = 0.62 + 0.3 * (1 - (x + 0.1) ** 2) ** 0.5
            x0, x1 = 0.88 * x, 0.88 * (x + 0.2)
            draw.polygon(at((0, -1.05), (x1, bottom), (x0, bottom)), shade(color, k))
    elif thing.shape == "pyramid":
        draw.polygon(at((0, -1.05), (-1, 0.5), (-0.15, 0.92)), shade(color, 1.3))
        draw.polygon(at((0, -1.05), (-0.15, 0.92), (1, 0.5)), shade(color, 0.55))


@lru_cache
def empty_canvas(backdrop: tuple[int, int, int], side: int) -> Image.Image:
    """The backdrop alone, of side × side pixels. The same image each time: to be copied."""
    corners = [shade(backdrop, k) for k in (1.08, 1.0, 0.88, 0.8)]
    gradient = Image.new("RGB", (2, 2))
    gradient.putdata(corners)
    # the middle half of the bilinear enlargement, where the gradient runs
    return gradient.resize((side, side), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))


def render(scene: Scene, image_size: int, noise_seed: int | None = None) -> np.ndarray:
    """Draw a scene at four times the size and reduce it: uint8 [H, W, 3].

    The backdrop darkens towards the bottom and the right, things cast a shadow, and with a
    `noise_seed` Gaussian sensor noise is added.
    """
    side = 4 * image_size
    backdrop = BACKGROUNDS[scene.background]
    canvas = empty_canvas(backdrop, side).copy()
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        r = thing.radius * side
        for grow, k in ((1.12, 0.74), (0.98, 0.6)):
            x, y = thing.x * side + 0.12 * r, thing.y * side + 0.78 * r
            box = (x - grow * r, y - 0.3 * grow * r, x + grow * r, y + 0.3 * grow * r)
            draw.ellipse(box, fill=shade(backdrop, k))
    for thing in scene.things:
        draw_thing(draw, thing, side)
    pixels = np.asarray(canvas.reduce(4), np.float32) * np.float32(scene.light)
    if noise_seed is not None:
        generator = np.random.default_rng(noise_seed)
        noise = generator.standard_normal(pixels.shape, np.float32)
        pixels = pixels + noise * np.float32(255 * SENSOR_NOISE)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def toy_world(
    index: int, image_size: int, split: str, noise: bool = True
) -> tuple[np.ndarray, str]:
    """Toy picture `index` of a split: (uint8 [H, W, 3], caption). Deterministic and endless.

    With `noise=False` it is the same picture without the sensor noise.
    """
    scene = toy_scene(index, split)
    seed = index * len(SPLITS) + SPLITS.index(split)
    return render(scene, image_size, seed if noise else None), scene.caption


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
