"""Near-duplicates that were planted are found, shown and left out."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import call

from clip import CLIP, CLIPConfig
from data.files import middle_square, open_dataset
from engine import checkpoint
from lab import overlap

PLANTED = {0: 7, 3: 2, 5: 11}  # validation picture: training picture


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve training and six validation pictures of a few random colours, three of these darkened
    and compressed copies of training pictures; a reranker of random weights; a damaged file."""
    root, rng = tmp_path_factory.mktemp("overlap"), np.random.default_rng(0)
    torch.manual_seed(0)
    config = CLIPConfig(16, 4, 32, text_vocab=300, text_len=8, d_text=8, n_layer=2, d_head=8)
    clip = CLIP(config).eval()
    checkpoint.save(root / "clip.pt", {"config": asdict(config), "model": clip.state_dict()})
    for name in ("train", "val"):
        (root / name).mkdir()

    def picture():
        small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        return small.resize((40, 32), Image.Resampling.BICUBIC)

    for i in range(12):
        picture().save(root / f"train/{i:02}.png")
        (root / f"train/{i:02}.txt").write_text(f"picture {i}\nnumber {i}")
    for j in range(6):
        copied = j in PLANTED and Image.open(root / f"train/{PLANTED[j]:02}.png")
        img = copied.point(lambda v: 0.97 * v) if copied else picture()
        img.save(root / f"val/{j}.jpg", quality=90)
    (root / "train/99.png").write_bytes(b"no picture")
    return root, clip


def by_loops(clip, folder):
    """The features of each picture, one after the other, as lists of numbers."""
    rows = []
    for path in sorted(p for p in folder.iterdir() if p.suffix != ".txt" and p.stem != "99"):
        pixels = np.array(middle_square(path, 16, 1)).transpose(2, 0, 1)[None] / 255
        with torch.no_grad():
            rows.append(clip.encode_image(torch.tensor(pixels, dtype=torch.float32))[0].tolist())
    return rows


def cosine(a, b):
    length = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b)) / length


def test_the_nearest_are_those_of_the_double_loop(pictures, monkeypatch):
    root, clip = pictures
    monkeypatch.setattr(overlap, "BATCH", 5)  # several batches, the last one short
    (train, items), (val, _) = (
        overlap.features(clip, data)
        for data in open_dataset(str(root / "train"), 16, str(root / "val"), captions=False)
    )
    assert items == list(range(12))
    a, b = by_loops(clip, root / "train"), by_loops(clip, root / "val")
    cosines = torch.tensor([[cosine(x, y) for y in b] for x in a])
    best, which, of_train = overlap.nearest(train, val)
    torch.testing.assert_close(best, cosines.amax(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(of_train, cosines.amax(1), atol=1e-5, rtol=0)
    assert which.tolist() == cosines.argmax(0).tolist()
    assert {j: int(which[j]) for j in PLANTED} == PLANTED
    assert set(best.argsort(descending=True)[:3].tolist()) == set(PLANTED)
    # the sheet begins with them, and with a threshold has pairs on both of its sides
    assert set(overlap.to_show(best, None)[:3]) == set(PLANTED)
    monkeypatch.setattr(overlap, "SHOWN", 2)
    between = best.sort(descending=True)[0][2:4]
    shown = overlap.to_show(best, between.mean().item())
    assert best[shown].tolist() == between.tolist()


@pytest.mark.parametrize("swapped", [False, True])
def test_the_table_has_all_but_them(pictures, tmp_path, swapped):
    """Given the other way round, the table is that of the validation pictures."""
    root, clip = pictures
    specs = [root / "train", root / "val"][:: -1 if swapped else 1]
    best = torch.tensor(
        [max(cosine(x, y) for x in by_loops(clip, root / "train"))
         for y in by_loops(clip, root / "val")]
    ).sort(descending=True)[0]  # fmt: skip
    threshold, out = best[2:4].mean().item(), tmp_path / "near.png"
    code, said, _ = call(overlap, *specs, "--run-dir", root, "--threshold", threshold, "-o", out)
    assert code == 0 and out.stat().st_size > 0
    spec = str(tmp_path / "near.tsv")
    table, _ = open_dataset(spec, 16, spec, captions=not swapped)
    names = {table.path(k).resolve() for k in range(len(table))}
    if swapped:
        assert names == {root / f"val/{j}.jpg" for j in range(6) if j not in PLANTED}
        assert "25.0% of the pictures" in said  # three of twelve
    else:
        kept = [i for i in range(12) if i not in PLANTED.values()]
        assert names == {root / f"train/{i:02}.png" for i in kept}
        assert table.captions_of(0) == [f"picture {kept[0]}", f"number {kept[0]}"]
        assert "50.0% of the pictures" in said  # three of six


def test_what_has_no_end_or_no_files(pictures, tmp_path):
    root, _ = pictures
    code, _, error = call(overlap, "toy", root / "val", "--run-dir", root, "-o", tmp_path / "a.png")
    assert code == 2 and "no end" in error and error.count("\n") == 1
