"""The toy world keeps its promises; Listings 1 and 2 keep the paper's ranges."""

import random
import re

import numpy as np
import pytest
from PIL import Image

import data
from data import preprocess_dvae, preprocess_prior, toy_scene, toy_world


def pairs_in(caption):
    return set(re.findall(rf"\b({'|'.join(data.COLORS)}) ({'|'.join(data.SHAPES)})\b", caption))


@pytest.mark.parametrize("split", data.SPLITS)
def test_captions_say_what_is_drawn(split):
    for index in range(2000):
        scene = toy_scene(index, split)
        drawn = [(thing.color, thing.shape) for thing in scene.things]
        assert pairs_in(scene.caption) == set(drawn)
        if len(drawn) == 2:
            (first, second) = scene.things
            relation = next(r for r in data.RELATIONS if r in scene.caption)
            assert scene.caption.index(first.shape) < scene.caption.index(relation)
            holds = {
                "to the left of": first.x < second.x,
                "to the right of": first.x > second.x,
                "above": first.y < second.y,
                "below": first.y > second.y,
            }
            assert holds[relation]


def test_unseen_pairs_are_unseen():
    assert len(data.UNSEEN_PAIRS) >= len(data.PAIRS) / 10
    assert ("red", "cube") not in data.UNSEEN_PAIRS
    for split in ("train", "val"):
        for index in range(3000):
            scene = toy_scene(index, split)
            drawn = {(thing.color, thing.shape) for thing in scene.things}
            assert not (drawn | pairs_in(scene.caption)) & data.UNSEEN_PAIRS
    for index in range(300):
        thing = toy_scene(index, "unseen").things[0]
        assert (thing.color, thing.shape) in data.UNSEEN_PAIRS


def test_every_attribute_occurs():
    scenes = [toy_scene(index, "train") for index in range(2000)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {(t.color, t.shape) for t in things} == set(data.SEEN_PAIRS)
    assert {t.size for t in things} == set(data.SIZES)
    assert {s.background for s in scenes} == set(data.BACKGROUNDS)
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
    assert spread == pytest.approx(data.SENSOR_NOISE, rel=0.05)
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
            expected = np.array(data.COLORS[thing.color], float)
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


@pytest.mark.parametrize("preprocess", [preprocess_dvae, preprocess_prior])
@pytest.mark.parametrize("shape", [(1, 1), (5, 90), (31, 32), (32, 32), (33, 47), (400, 36)])
def test_any_image_gives_the_target_size(preprocess, shape):
    for seed in range(5):
        out = preprocess(Image.new("RGB", shape, "red"), 32, random.Random(seed))
        assert out.shape == (32, 32, 3)
        assert (out == (255, 0, 0)).all()


def test_folders(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        data.open_dataset(str(tmp_path / "nowhere"), 32)
    with pytest.raises(ValueError, match="no images"):
        data.open_dataset(str(tmp_path), 32)
    (tmp_path / "sub").mkdir()
    for k in range(40):
        path = tmp_path / ("sub" if k % 2 else ".") / f"{k}.png"
        Image.new("L" if k % 3 else "RGBA", (20 + k, 30)).save(path)
    with pytest.raises(ValueError, match="no captions"):
        data.open_dataset(str(tmp_path), 32)
    train, val = data.open_dataset(str(tmp_path), 32, captions=False)
    assert len(train) == 38 and len(val) == 2
    assert not set(train.files) & set(val.files)
    for k in range(30):
        (tmp_path / ("sub" if k % 2 else ".") / f"{k}.txt").write_text("one\n\n two \n")
    train, val = data.open_dataset(str(tmp_path), 32)
    assert len(train) + len(val) == 30
    img, captions = train[0]
    assert img.mode == "RGB" and captions == ["one", "two"]
    train.files[0].write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="cannot be read"):
        train[0]
