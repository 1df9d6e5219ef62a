"""The toy world keeps its promises, Listings 1 and 2 the paper's ranges; every kind of source
gives the same pictures, in an order that no number of processes changes."""

import csv
import io
import json
import pickle
import random
import re
import tarfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

import data.files as sources
import engine.cli
import lab.data
from data import toy
from data.files import open_dataset, open_pictures, read_image
from data.listings import area_resize, preprocess_dvae, preprocess_prior
from data.loader import Samples, micro_batches
from data.toy import toy_scene, toy_world


def pairs_in(caption):
    return set(re.findall(rf"\b({'|'.join(toy.COLORS)}) ({'|'.join(toy.SHAPES)})\b", caption))


@pytest.mark.parametrize("split", toy.SPLITS)
def test_captions_say_what_is_drawn(split):
    for index in range(2000):
        scene = toy_scene(index, split)
        drawn = [(thing.color, thing.shape) for thing in scene.things]
        assert pairs_in(scene.caption) == set(drawn)
        if len(drawn) == 2:
            (first, second) = scene.things
            relation = next(r for r in toy.RELATIONS if r in scene.caption)
            assert scene.caption.index(first.shape) < scene.caption.index(relation)
            holds = {
                "to the left of": first.x < second.x,
                "to the right of": first.x > second.x,
                "above": first.y < second.y,
                "below": first.y > second.y,
            }
            assert holds[relation]


def test_unseen_pairs_are_unseen():
    assert len(toy.UNSEEN_PAIRS) >= len(toy.PAIRS) / 10
    assert ("red", "cube") not in toy.UNSEEN_PAIRS
    for split in ("train", "val"):
        for index in range(3000):
            scene = toy_scene(index, split)
            drawn = {(thing.color, thing.shape) for thing in scene.things}
            assert not (drawn | pairs_in(scene.caption)) & toy.UNSEEN_PAIRS
    for index in range(300):
        thing = toy_scene(index, "unseen").things[0]
        assert (thing.color, thing.shape) in toy.UNSEEN_PAIRS


def test_every_attribute_occurs():
    scenes = [toy_scene(index, "train") for index in range(2000)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {(t.color, t.shape) for t in things} == set(toy.SEEN_PAIRS)
    assert {t.size for t in things} == set(toy.SIZES)
    assert {s.background for s in scenes} == set(toy.BACKGROUNDS)
    assert {len(s.things) for s in scenes} == {1, 2}
    assert len({s.caption for s in scenes}) > 1000


def test_toy_pictures_are_deterministic_and_noise_is_noise():
    noisy, caption = toy_world(7, 32, "train")
    again, same = toy_world(7, 32, "train")
    assert (noisy == again).all() and caption == same
    assert noisy.shape == (32, 32, 3) and noisy.dtype == np.uint8
    differences = []
    for index in range(50):
        noisy = toy_world(index, 32, "val")[0].astype(float)
        clean = toy_world(index, 32, "val", noise=False)[0].astype(float)
        inside = (clean > 40) & (clean < 215)  # where 8 bits do not clip
        differences.append((noisy - clean)[inside])
    spread = np.concatenate(differences).std() / 255
    assert spread == pytest.approx(toy.SENSOR_NOISE, rel=0.05)
    assert toy_world(3, 64, "train")[0].shape == (64, 64, 3)
    with pytest.raises(ValueError, match="unknown"):
        toy_scene(0, "test")


def test_the_object_has_its_color():
    """In the middle of a large object in the middle, the named colour's hue is found."""
    found = 0
    for index in range(400):
        scene = toy_scene(index, "train")
        thing = scene.things[0]
        if len(scene.things) == 1 and thing.size == "large":
            pixels = toy_world(index, 32, "train", noise=False)[0].astype(float)
            x, y = round(thing.x * 32), round(thing.y * 32)
            seen = pixels[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
            expected = np.array(toy.COLORS[thing.color], float)
            cosine = seen @ expected / np.linalg.norm(seen) / np.linalg.norm(expected)
            assert cosine > 0.9, (scene.caption, seen)
            found += 1
    assert found > 50


def marked_image(width, height):
    """Each pixel's red and green say where it is."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))


def extent(out, width, height):
    """(left, right, top, bottom) of an output in pixels of the marked image, and mirroring."""
    xs, ys = out[..., 0].mean(0) / 255 * (width - 1), out[..., 1].mean(1) / 255 * (height - 1)
    return min(xs[0], xs[-1]), max(xs[0], xs[-1]), ys[0], ys[-1], xs[0] > xs[-1]


def test_listing_1():
    """Square crop anywhere, scale 9/8 to 12/8 of the target, crop, mirrored half of the time."""
    rng, size, (width, height) = random.Random(0), 64, (300, 200)
    img, scales, flips, lefts = marked_image(width, height), [], 0, []
    for _ in range(600):
        out = preprocess_dvae(img, size, rng)
        assert out.shape == (size, size, 3) and out.dtype == np.uint8
        left, right, top, bottom, mirrored = extent(out, width, height)
        scales.append(200 / (bottom - top) * (size - 1) / size)  # t / size
        flips += mirrored
        lefts.append(left)
    assert min(scales) == pytest.approx(9 / 8, abs=0.03)
    assert max(scales) == pytest.approx(12 / 8, abs=0.03)
    assert 240 < flips < 360
    assert min(lefts) < 10 and max(lefts) > 300 - 200 / 1.5 - 30


def test_listing_2():
    """Square crop from the middle quarter of the slack, scale 1 to 9/8, never mirrored."""
    rng, size, (width, height) = random.Random(0), 64, (360, 200)
    img, scales, lefts, rights = marked_image(width, height), [], [], []
    for _ in range(600):
        left, right, top, bottom, mirrored = extent(preprocess_prior(img, size, rng), width, height)
        assert not mirrored
        scales.append(200 / (bottom - top) * (size - 1) / size)
        lefts.append(left)
        rights.append(right)
    assert min(scales) == pytest.approx(1, abs=0.03)
    assert max(scales) == pytest.approx(9 / 8, abs=0.03)
    # slack 160: the square starts at 60 to 99, and ends 200 pixels later
    assert 58 < min(lefts) < 66 and 285 < max(rights) < 301
    tall = [
        extent(preprocess_prior(marked_image(200, 360), size, rng), 200, 360) for _ in range(99)
    ]
    assert all(60 - 2 < top and bottom < 301 for _, _, top, bottom, _ in tall)
    # with no slack the square is the image
    square = preprocess_prior(marked_image(64, 64), 64, rng)
    assert (square == np.asarray(marked_image(64, 64))).all()


class Recorder(random.Random):
    """Keeps the least and the largest number that each draw could give, and the one it gave."""

    def __init__(self, seed):
        super().__init__(seed)
        self.bounds, self.drawn = [], []

    def randint(self, a, b):
        self.bounds.append((a, b))
        self.drawn.append(a + int((b - a + 1) * self.random()))
        return self.drawn[-1]

    def randrange(self, start, stop):
        return self.randint(start, stop - 1)


# (width, height), the target size, and the scales t of Listings 1 and 2
@pytest.mark.parametrize(
    "shape, size, t_dvae, t_prior",
    [
        ((640, 480), 256, (288, 384), (256, 288)),  # 9/8 and 12/8 of the target
        ((300, 330), 256, (288, 300), (256, 288)),  # the short side is the most
        ((270, 1000), 256, (270, 270), (256, 270)),  # and the least: 256 < 270 < 288
        ((256, 256), 256, (256, 256), (256, 256)),
        ((45, 39), 36, (39, 39), (36, 39)),  # 40.5 and 54, rounded to even
        ((20, 27), 32, (32, 32), (32, 32)),  # enlarged first
    ],
)
def test_bounds_of_the_listings(shape, size, t_dvae, t_prior):
    short, slack = min(shape), abs(shape[0] - shape[1])
    for seed in range(20):
        rng = Recorder(seed)
        preprocess_dvae(Image.new("RGB", shape), size, rng)
        *square, t, x, y = rng.bounds
        assert square == [(0, shape[0] - short), (0, shape[1] - short)] and t == t_dvae
        assert x == y == (0, rng.drawn[2] - size)
        rng = Recorder(seed)
        preprocess_prior(Image.new("RGB", shape), size, rng)
        offset, t, x, y = rng.bounds
        first = 3 * slack // 8
        assert offset == (first, max(first, 5 * slack // 8 - 1)) and t == t_prior
        assert x == y == (0, rng.drawn[1] - size)


def covered(first, last, s):
    """(source pixel, how much of it) of each pixel that [first, last) meets, the last one again
    and again past the end."""
    for pixel in range(int(first), s + int(last) + 1):
        share = min(pixel + 1, last) - max(pixel, first)
        if share > 0:
            yield min(pixel, s - 1), share


def slow_area_resize(pixels, t):
    """Over the rectangle of each output pixel, in fractions."""
    s = len(pixels)
    k = Fraction(s - 1, t - 1) if t > 1 else Fraction(s)
    means = np.zeros((t, t, 3))
    for i, j, c in np.ndindex(t, t, 3):
        total = Fraction(0)
        for y, height in covered(i * k, (i + 1) * k, s):
            for x, width in covered(j * k, (j + 1) * k, s):
                total += height * width * Fraction(float(pixels[y, x, c]))
        means[i, j, c] = total / k**2
    return means


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(
    "s, t", [(2, 2), (3, 2), (4, 3), (7, 7), (9, 1), (11, 10), (13, 3), (9, 5), (1, 1), (5, 8)]
)
def test_area_resize_is_the_mean_over_rectangles(s, t, dtype):
    pixels = (256 * np.random.default_rng(s).random((s, s, 3))).astype(dtype)
    resized = area_resize(pixels, t)
    assert resized.dtype == np.float32 and resized.shape == (t, t, 3)
    assert np.allclose(resized, slow_area_resize(pixels, t), rtol=1e-6, atol=0)
    if s == t:
        assert (resized == pixels).all()


@pytest.mark.parametrize(
    "row, expected",
    [
        # k = 2/1: [0, 2) and [2, 4), where pixel 2 is read twice. Without align_corners k would be
        # 3/2, the means those of [0, 1.5) and [1.5, 3): 33 and 167.
        ([0, 100, 200], [50, 200]),
        # k = 3/2: [0, 1.5), [1.5, 3), [3, 4.5)
        ([0, 100, 200, 60], [100 / 3, 500 / 3, 60]),
        ([0, 100, 200], [100]),
    ],
)
def test_area_resize_by_hand(row, expected):
    pixels = np.array([[[value] * 3 for value in row]] * len(row), np.uint8)
    for resized in (area_resize(pixels, len(expected)),
                    area_resize(pixels.swapaxes(0, 1), len(expected)).swapaxes(0, 1)):  # fmt: skip
        assert np.allclose(resized, np.array(expected)[None, :, None])


@pytest.mark.parametrize("preprocess", [preprocess_dvae, preprocess_prior])
def test_listings_step_by_step(preprocess):
    """Each pixel of an output, from what was drawn."""
    noise = np.random.default_rng(0).integers(0, 256, (19, 13, 3), np.uint8)
    mirrored = set()
    for seed in range(4):
        rng = Recorder(seed)
        out = preprocess(Image.fromarray(noise), 8, rng)
        *square, t, x, y = rng.drawn
        square = noise[square[-1] :][:13]
        expected = slow_area_resize(square, t)[y : y + 8, x : x + 8]
        flipped = np.abs(out - expected).max() > 1
        expected = expected[:, ::-1] if flipped else expected
        assert np.abs(out - expected).max() < 0.5001  # in floats a half may round either way
        mirrored.add(flipped)
    assert mirrored == ({True, False} if preprocess is preprocess_dvae else {False})


@pytest.mark.parametrize("preprocess", [preprocess_dvae, preprocess_prior])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "F"])
def test_other_modes_are_refused(preprocess, mode):
    with pytest.raises(ValueError, match=f"RGB, got {mode}:"):
        preprocess(Image.new(mode, (9, 9)), 4, random.Random(0))


@pytest.mark.parametrize("preprocess", [preprocess_dvae, preprocess_prior])
@pytest.mark.parametrize("shape", [(1, 1), (5, 90), (31, 32), (32, 32), (33, 47), (400, 36)])
def test_any_image_gives_the_target_size(preprocess, shape):
    for seed in range(5):
        out = preprocess(Image.new("RGB", shape, "red"), 32, random.Random(seed))
        assert out.shape == (32, 32, 3)
        assert (out == (255, 0, 0)).all()


# ----------------------------------------------------------------------------- one picture


def encoded(img, kind, **options):
    buffer = io.BytesIO()
    img.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(mode, color, kind="PNG", **options):
    return encoded(Image.new(mode, (6, 5), color), kind, **options)


def floats(value):
    return encoded(Image.fromarray(np.full((5, 6), value, np.float32)), "TIFF")


def palette(**options):
    img = Image.new("P", (6, 5), 1)
    img.putpalette([9, 9, 9, 200, 100, 0])
    return encoded(img, "PNG", **options)


def film(kind):
    frames = [Image.new("RGB", (6, 5), color) for color in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


def over_white(color, alpha):
    return tuple(round(Fraction(c * alpha + 255 * (255 - alpha), 255)) for c in color)


PICTURES = {
    "rgb": (flat("RGB", (10, 20, 30)), (10, 20, 30)),
    "grey": (flat("L", 77), (77, 77, 77)),
    "one bit": (flat("1", 1), (255, 255, 255)),
    "grey and alpha": (flat("LA", (100, 128)), over_white((100, 100, 100), 128)),
    "alpha": (flat("RGBA", (200, 0, 90, 64)), over_white((200, 0, 90), 64)),
    "alpha in webp": (flat("RGBA", (9, 9, 9, 0), "WEBP", lossless=True), (255, 255, 255)),
    "palette": (palette(), (200, 100, 0)),
    "transparent palette": (palette(transparency=1), (255, 255, 255)),
    "palette with alphas": (palette(transparency=bytes([0, 64])), over_white((200, 100, 0), 64)),
    "transparent colour": (flat("RGB", (1, 2, 3), transparency=(1, 2, 3)), (255, 255, 255)),
    "16 bits": (flat("I;16", 25700), (100, 100, 100)),  # 25700 = 100 / 255 * 65535
    "16 bits, white": (flat("I;16", 65535), (255, 255, 255)),
    "32 bits": (flat("I", 25700, "TIFF"), (100, 100, 100)),
    "32 bits, too much": (flat("I", -5, "TIFF"), (0, 0, 0)),
    "floats to 1": (floats(0.2), (51, 51, 51)),
    "floats to 255": (floats(51.0), (51, 51, 51)),
    "no numbers": (floats(float("nan")), (0, 0, 0)),
    "cmyk": (flat("CMYK", (50, 100, 0, 51), "TIFF"), (205 * 0.8, 155 * 0.8, 255 * 0.8)),
    "cmyk jpeg": (flat("CMYK", (50, 100, 0, 51), "JPEG"), (205 * 0.8, 155 * 0.8, 255 * 0.8)),
    "animated gif": (film("GIF"), (255, 0, 0)),
    "animated webp": (film("WEBP"), (255, 0, 0)),
    "animated png": (film("PNG"), (255, 0, 0)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_mode_becomes_rgb(name):
    content, expected = PICTURES[name]
    img = read_image(content)
    assert img.mode == "RGB" and img.size == (6, 5)
    assert np.abs(np.asarray(img) - np.array(expected, float)).max() <= (2 if "jpeg" in name else 1)


def test_pictures_are_upright():
    """For each EXIF orientation the sides where the first row and the first column belong."""
    sides = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left", 5: "left top",
             6: "right top", 7: "right bottom", 8: "left bottom"}  # fmt: skip
    stored = np.zeros((2, 3, 3), np.uint8)
    stored[0], stored[:, 0, 1] = (255, 0, 0), 255  # red is the first row, green the first column
    for orientation, (row, column) in ((k, v.split()) for k, v in sides.items()):
        exif = Image.Exif()
        exif[0x0112] = orientation
        shown = np.asarray(read_image(encoded(Image.fromarray(stored), "PNG", exif=exif)))
        assert shown.shape == ((2, 3, 3) if row in ("top", "bottom") else (3, 2, 3))
        edges = {"top": shown[0], "bottom": shown[-1], "left": shown[:, 0], "right": shown[:, -1]}
        assert (edges[row][:, 0] == 255).all() and (shown[..., 0] == 255).sum() == 3 * 1
        assert (edges[column][:, 1] == 255).all() and (shown[..., 1] == 255).sum() == 2


# ----------------------------------------------------------------------------- sources


def write_tar(path, members):
    """`members`: names and bytes."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def small_world(root, count=12):
    """The same pictures and captions in every kind of source: {kind: spec}."""
    root.mkdir()
    folder, members = root / "photos", []
    rows = []
    for k in range(count):
        name, words = f"{'ab'[k % 2]}/{k:02}", [f"picture {k}", f'"{k}" it is, Größe {k}']
        pixels = np.random.default_rng(k).integers(0, 256, (20 + k, 30, 3), np.uint8)
        content = encoded(Image.fromarray(pixels), "PNG")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(content)
        text = f"{words[0]}\r\n\n  {words[1]}\t \n"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
        members.append([(f"{name}.png", content), (f"{name}.txt", text.encode())])
        rows += [(f"{name}.png", word) for word in words]
    order = sorted(range(count), key=lambda k: members[k][0][0])
    rows = [row for k in order for row in rows[2 * k : 2 * k + 2]]
    (folder / "a.tsv").write_text("".join(f"{name}\t{word}\n" for name, word in rows))
    (folder / "b.tsv").write_text("".join(f"{word}\t{name}\n" for name, word in rows))
    with open(folder / "c.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("Title", "n", "filepath")])
        csv.writer(file).writerows((word, 0, name) for name, word in rows)
    lines = [json.dumps({"image": name, "caption": word, "id": 3}) for name, word in rows]
    (folder / "d.jsonl").write_text("\n".join(lines))
    for k in range(4):
        three = [part for j in order[3 * k : 3 * k + 3] for part in members[j]]
        write_tar(root / f"{k:03}.tar", three)
    specs = {"folder": folder, "braces": root / "{000..003}.tar", "glob": root / "*.tar"}
    specs |= {name: folder / name for name in ("a.tsv", "b.tsv", "c.csv", "d.jsonl")}
    return {kind: str(spec) for kind, spec in specs.items()}


def content_of(dataset):
    return [(np.asarray(img).tobytes(), captions) for img, captions in map(dataset.__getitem__,
            range(len(dataset)))]  # fmt: skip


def test_every_source_gives_the_same(tmp_path):
    specs = small_world(tmp_path / "data")
    train, val = open_dataset(specs["folder"], 32)
    assert len(train) == 11 and len(val) == 1
    expected = content_of(train), content_of(val)
    words = sorted(captions for _, captions in expected[0] + expected[1])
    assert words == sorted([f"picture {k}", f'"{k}" it is, Größe {k}'] for k in range(12))
    names = {f"{'ab'[k % 2]}/{k:02}": k for k in range(12)}
    apart = names[min(names, key=lambda name: zlib.crc32(name.encode()))]
    assert expected[1][0][1][0] == f"picture {apart}"  # held out by a hash of its name
    for spec in specs.values():
        train, val = open_dataset(spec, 32)
        assert (content_of(train), content_of(val)) == expected, spec
        assert [train.captions_of(i) for i in range(11)] == [words for _, words in expected[0]]
        silent, _ = open_dataset(spec, 32, captions=False)
        assert [pixels for pixels, _ in content_of(silent)] == [p for p, _ in expected[0]]
        assert silent[0][1] == []
    train, val = open_dataset(specs["folder"], 32, val=specs["glob"])
    assert len(train) == len(val) == 12


def test_img2dataset_shards(tmp_path):
    """The caption is in the .txt, or else in the .json; without one a picture is left out."""
    picture = flat("RGB", "red", "JPEG")
    about = {"caption": "from json", "url": "http://x", "width": 6, "exif": "{}"}
    members = [("./0000.jpg", picture), ("./0000.json", json.dumps(about).encode()),
               ("./0000.txt", b"from text"), ("1.jpg", picture), ("1.json", b'{"caption": null}'),
               ("2.webp", picture), ("2.json", json.dumps(about).encode()), ("3.jpg", picture),
               ("4.txt", b"no picture"), ("5.cls", b"7")]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    tars = sources.open_pictures(str(tmp_path / "0.tar"), True, False)
    assert [tars.captions_of(i) for i in range(len(tars))] == [["from text"], [], ["from json"]]
    assert tars.counts() == "3 pictures, 1 without a caption"
    with pytest.raises(ValueError, match=r"^unreadable: .*0.tar/1.jpg cannot be read \(its"):
        tars[1]
    assert len(sources.open_pictures(str(tmp_path / "0.tar"), False, False)) == 4


def numbered_shards(root, sizes):
    """Shards of pictures whose colour is their number; their number in all."""
    k = 0
    for shard, size in enumerate(sizes):
        color = [(j // 256, j % 256, 0) for j in range(k, k + size)]
        members = [(f"{k + j}.png", flat("RGB", color[j])) for j in range(size)]
        write_tar(root / f"{shard:02}.tar", members)
        k += size
    return k


def number_of(img, captions, rng, notes):
    red, green, _ = img.getpixel((0, 0))
    return [torch.tensor([red * 256 + green, rng.randrange(10**9)])]


def test_tars_over_ranks_and_workers(tmp_path):
    """Two ranks with two workers each: no sample twice in an epoch, fewer than a batch left out,
    the same steps as one process; each rank reads its own shards."""
    n, batch_size = numbered_shards(tmp_path, [40, 25, 7, 1, 38, 30, 33, 29]), 8
    tars = sources.open_pictures(str(tmp_path / "*.tar"), False, False)
    samples, per_epoch = Samples(tars, number_of, seed=3), n // batch_size

    def steps(rank, size, micro_batch, workers, start=0):
        batches = micro_batches(
            samples, start, 2 * per_epoch, batch_size, micro_batch, rank, size, workers
        )
        return torch.cat([tensors[0] for tensors, _ in batches]).view(-1, batch_size // size, 2)

    ranks = [steps(rank, 2, 2, workers=2) for rank in (0, 1)]
    both = torch.cat(ranks, 1)
    alone = steps(0, 1, 8, workers=0)
    assert (both.sort(1).values == alone.sort(1).values).all()
    assert (steps(0, 1, 8, workers=0, start=9) == alone[9:]).all()
    left_out = []
    for epoch in both[..., 0].split(per_epoch):
        seen = epoch.flatten().tolist()
        assert len(set(seen)) == len(seen) > n - batch_size
        left_out.append(set(range(n)) - set(seen))
    assert left_out[0] != left_out[1]
    first, second = (part[:per_epoch, :, 0].flatten().tolist() for part in ranks)
    shard = np.repeat(np.arange(8), [40, 25, 7, 1, 38, 30, 33, 29])
    shared = set(shard[first]) & set(shard[second])
    assert len(shared) <= 4  # the two or so in which one of the four groups of lanes ends


def test_epochs_differ(tmp_path, monkeypatch):
    """In the order of the shards, and in what is left out even of a single one."""
    sizes = [9, 8, 10, 7]
    numbered_shards(tmp_path, sizes)
    tars = sources.open_pictures(str(tmp_path / "*.tar"), False, False)
    one = sources.open_pictures(str(tmp_path / "02.tar"), False, False)
    left_out = [set(range(10)) - set(one.order(seed, 4).tolist()) for seed in range(30)]
    assert {len(some) for some in left_out} == {2} and len(set().union(*left_out)) == 10
    monkeypatch.setattr(sources, "WINDOW", 1)  # nothing is shuffled within a shard
    shard, orders = np.repeat(range(4), sizes), set()
    for seed in range(30):
        order = tars.order(seed, 1)
        assert sorted(order) == list(range(sum(sizes)))
        orders.add(tuple(dict.fromkeys(shard[order].tolist())))
    assert len(orders) > 6


def test_a_small_tar_is_cycled(tmp_path):
    numbered_shards(tmp_path, [3])
    tars = sources.open_pictures(str(tmp_path / "00.tar"), False, False)
    samples = Samples(tars, number_of, seed=0)
    epochs = np.array([samples.item(position, 8) for position in range(12)]).reshape(4, 3)
    assert (np.sort(epochs) == range(3)).all()


class Dawdler(io.BufferedReader):
    """Leaves others time to move a shared place between finding it and reading there."""

    def seek(self, *where):
        place = super().seek(*where)
        time.sleep(0.002)
        return place


def test_tars_are_read_by_many_at_once(tmp_path, monkeypatch):
    """By threads, and by processes forked off after the shard was opened."""
    n = numbered_shards(tmp_path, [80])
    tars = pickle.loads(pickle.dumps(sources.open_pictures(str(tmp_path / "*.tar"), False, False)))
    monkeypatch.setattr(sources, "open", lambda path, _: Dawdler(io.FileIO(path)), raising=False)
    color = [tars[k][0].getpixel((0, 0)) for k in range(n)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda k: tars[k][0].getpixel((0, 0)), range(n))) == color
    samples = Samples(tars, number_of, seed=0)
    ranks = [micro_batches(samples, 0, 2, 40, 5, rank, 2, workers=2) for rank in (0, 1)]
    pairs = list(zip(*ranks))  # from four processes
    found = [int(k) for pair in pairs for tensors, _ in pair for k in tensors[0][:, 0]]
    assert sorted(found) == list(range(n))


def test_shards_must_be_there_and_whole(tmp_path):
    numbered_shards(tmp_path, [5, 5, 5])
    spec = str(tmp_path / "{00..02}.tar")
    assert len(sources.open_pictures(spec, False, False)) == 15
    with pytest.raises(ValueError, match="holds 15 images and no captions"):
        open_dataset(spec, 32)
    whole = (tmp_path / "01.tar").read_bytes()
    end = whole.rindex(b"IEND")
    end += -end % 512  # of the last body; two empty blocks follow
    for length in (0, 100, 512, 700, end - 512, end - 1, end):
        (tmp_path / "01.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"01.tar is not a whole \.tar"):
            open_dataset(spec, 32)
    (tmp_path / "01.tar").write_bytes(whole[:end] + bytes(512))
    assert len(sources.open_pictures(spec, False, False)) == 15
    (tmp_path / "01.tar").write_bytes(whole[:2048] + b"x" + whole[2049:])  # a bit of a header
    with pytest.raises(ValueError, match="01.tar is not a whole"):
        open_dataset(spec, 32)
    (tmp_path / "01.tar").unlink()
    with pytest.raises(ValueError, match="01.tar does not exist"):
        open_dataset(spec, 32)
    for odd in ("*.gz.tar", "{5..3}.tar"):
        with pytest.raises(ValueError, match="shard"):
            open_dataset(str(tmp_path / odd), 32)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        (
            "a.tsv",
            "x.png\tone\nnone.png\ttwo\nno.png\tthree",
            r"line 2: no file 'none.png'.*2 such",
        ),
        ("a.tsv", "path\tcaption\nhttp://x/y.jpg\tone", "line 2: .*img2dataset"),
        ("a.csv", "one,two\nthree,four", "names no files"),
        ("a.csv", "", "is empty"),
        ("a.csv", "path,n\nx.png,3", "no captions"),
        ("a.csv", "path,caption\nx.png,one\nx.png,red, large", "line 3: 3 values for 2 columns"),
        ("a.csv", 'path,caption\nx.png,"one\nx.png,two', "line 3: unexpected end"),
        ("a.tsv", "path\tcaption\nx.png\tone\ttwo", "line 2: 3 values .* holds a tab"),
        ("a.jsonl", '{"path": "x.png"}\n\n[3]', "line 3: expected an object"),
        ("a.jsonl", '{"path": "x.png", ', "line 1: expected an object"),
        ("a.jsonl", '{"caption": "one"}', "line 1: no file ''"),
    ],
)
def test_bad_tables_are_refused(name, content, expected, tmp_path):
    (tmp_path / "x.png").write_bytes(flat("RGB", "red"))
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=expected):
        open_dataset(str(tmp_path / name), 32)


def test_columns_that_are_empty_or_hold_lists(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("path,file,caption,text\n,a.png,,red\nb.png,x,blue,y\n")
    table = open_pictures(str(tmp_path / "t.csv"), True, False)
    assert [table.captions_of(k) for k in (0, 1)] == [["red"], ["blue"]]
    rows = [{"path": "a.png", "captions": ["one", " ", 3, "two"]}, {"path": "b.png", "text": []}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = open_pictures(str(tmp_path / "t.jsonl"), True, False)
    assert len(table) == 1 and table.captions_of(0) == ["one", "two"]


def test_an_empty_text_in_a_tar_leaves_the_json(tmp_path):
    parts = {"a.png": b"", "a.txt": b"", "a.json": b'{"caption": "red"}'}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    parts["a.png"] = (tmp_path / "a.png").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert open_pictures(str(tmp_path / "a.tar"), True, False).captions_of(0) == ["red"]


def test_captions_of_any_encoding(tmp_path):
    (tmp_path / "x.png").write_bytes(flat("RGB", "red"))
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfpath,caption\nx.png,"Gr\xfc\xdfe,\r\n\x00ok"\n')
    (tmp_path / "a.jsonl").write_bytes(
        rb'{"path": "x.png", "text": "\ud83d\u0007 half \ufeffpair"}'
    )
    for name, caption in (("a.csv", "Gr\ufffd\ufffde, ok"), ("a.jsonl", "\ufffd  half  pair")):
        table = sources.open_pictures(str(tmp_path / name), True, False)
        assert table[0][1] == table.captions_of(0) == [caption]


def test_folders(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        open_dataset(str(tmp_path / "nowhere"), 32)
    (tmp_path / "0.tar").touch()
    with pytest.raises(ValueError, match=r"no images.*NAME/\*\.tar"):
        open_dataset(str(tmp_path), 32)
    (tmp_path / "sub").mkdir()
    for k in range(40):
        path = tmp_path / ("sub" if k % 2 else ".") / f"{k}.png"
        Image.new("L" if k % 3 else "RGBA", (20 + k, 30)).save(path)
    with pytest.raises(ValueError, match="no captions"):
        open_dataset(str(tmp_path), 32)
    train, val = open_dataset(str(tmp_path), 32, captions=False)
    assert len(train) == 38 and len(val) == 2 and not set(train.index) & set(val.index)
    for k in range(30):
        (tmp_path / ("sub" if k % 2 else ".") / f"{k}.txt").write_text("one\n\n two \n")
    train, val = open_dataset(str(tmp_path), 32)
    assert len(train) + len(val) == 30 and train.counts() == "30 pictures, 10 without a caption"
    img, captions = train[0]
    assert img.mode == "RGB" and captions == ["one", "two"]
    train.path(train.index[0]).write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="cannot be read"):
        train[0]


DATED = (
    "photographed on 03/05/2007",
    "Photographed in 1994",
    "photographed on Thursday, May 3rd, 2007",
    "view photographed in May 2007",
    "in this photo taken on the 3rd of May 2007",
    "Pictured on 2007-05-03.",
    "barn: DSC_0042.jpg",
)
UNDATED = (
    "a red barn photographed on a hill",
    "two deer photographed on deck at night",
    "a marble cup photographed on marble",
    "a red barn on a hill by the river, photographed on 3 May 2007",
    "the moon over the harbour, pictured in Sept. 1999",
    "a red barn on a hill (barn.jpg)",
    "the image 1 shows a red cube",
)


def test_filters(tmp_path):
    """Of Appendix C, with why on every one they drop."""
    cases = {"a red cube": None, "cube": "caption too short", "12 34 cube": "caption too short",
             "Фото кошки на окне": "caption not English", "IMG_1234.jpg": "caption is boilerplate",
             "DSC 0042": "caption is boilerplate", "a café in Zürich": None,
             "¿?": "caption too short",
             "a view, photographed on 3 May 2007": "caption is boilerplate"}  # fmt: skip
    cases |= dict.fromkeys(DATED, "caption is boilerplate") | dict.fromkeys(UNDATED)
    shapes = {(20, 10): None, (10, 20): None, (21, 10): "aspect ratio", (10, 21): "aspect ratio"}
    pairs = [(caption, (9, 9), why) for caption, why in cases.items()]
    pairs += [("a red cube", shape, why) for shape, why in shapes.items()]
    for k, (caption, shape, _) in enumerate(pairs):
        Image.new("RGB", shape).save(tmp_path / f"{k:02}.png")
        (tmp_path / f"{k:02}.txt").write_text(caption, encoding="utf-8")
    (tmp_path / "99.png").write_bytes(flat("RGB", "red"))
    (tmp_path / "99.txt").write_text("IMG_1\na good one\n")
    pictures = sources.open_pictures(str(tmp_path), True, True)
    found = Counter()
    for i, (caption, _, why) in enumerate(pairs):
        if why:
            with pytest.raises(ValueError, match=rf"^filtered: {why}: .*{i:02}\.png$"):
                pictures[i]
            found[why] += 1
        else:
            assert pictures[i][1] == [caption]
        assert pictures.captions_of(i) == ([] if why and "caption" in why else [caption])
    assert found == Counter(filter(None, [*cases.values(), *shapes.values()]))
    assert pictures[len(pairs)][1] == ["a good one"]
    unfiltered = sources.open_pictures(str(tmp_path), True, False)
    assert [unfiltered[i][1] for i in range(len(pairs))] == [[caption] for caption, *_ in pairs]
    assert sources.MIN_WORDS == 2


def test_a_look_at_a_data_set(tmp_path, monkeypatch, capsys):
    specs = small_world(tmp_path / "data")
    (tmp_path / "data/photos/a/00.png").write_bytes(b"no picture")
    sheet = tmp_path / "sheet.png"

    def look(*args):
        monkeypatch.setattr("sys.argv", ["lab.data", *args])
        engine.cli.start(lab.data.main)
        return capsys.readouterr().out.splitlines()

    counts, fault, rate, written = look(specs["folder"], "-o", str(sheet), "--filters")
    assert counts.endswith("photos: 12 pictures") and fault.startswith("unreadable: ")
    assert rate.startswith("11 pictures read, 1 passed over, ") and written.startswith(str(sheet))
    assert Image.open(sheet).width > 8 * 32
    for path in (tmp_path / "data/photos/a").glob("*.txt"):
        path.unlink()
    told, counts, *_ = look(str(tmp_path / "data/photos/a"), "-o", str(sheet))
    assert "only stage one can use it" in told and counts.endswith(" pictures")
    for args in (["nowhere"], ["--image-size", "0"], ["-o", str(tmp_path / "no/sheet.png")]):
        with pytest.raises(SystemExit) as end:
            look(*args)
        assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
