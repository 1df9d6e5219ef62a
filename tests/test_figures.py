"""lab.figures: what it prints and draws."""

import sys
from pathlib import Path

from PIL import Image
from scripts import call

from data.toy import toy_world
from lab import figures
from sample import draw

SHIPPED = Path(__file__).resolve().parent.parent / "pretrained/tiny"


def test_the_layers_add_up_to_the_paper():
    code, said, _ = call(figures, "layers")
    assert code == 0 and "53,786,240" in said and "43,829,766" in said
    assert "8192 × 32 × 32" in said and "6 × 256 × 256" in said


def test_a_photo_beside_its_reconstruction(tmp_path):
    photo, out = tmp_path / "photo.png", tmp_path / "both.png"
    Image.new("L", (45, 39), 90).save(photo)
    call(figures, "photo", photo, "--run-dir", SHIPPED, "-o", out)
    assert Image.open(out).size == (88, 36)
    Image.new("L", (45, 3)).save(photo)
    code, _, said = call(figures, "photo", photo, "--run-dir", SHIPPED, "-o", out)
    assert code == 2 and "at least 4 × 4" in said and said.count("\n") == 1


def test_figure_1_for_the_toy_world_and_for_a_folder(tmp_path):
    """The upper halves are the pictures themselves."""
    out = tmp_path / "fig1.png"
    call(figures, "originals", "--run-dir", SHIPPED, "-o", out)
    assert Image.open(out).size == (8 * 136 - 8, 256)
    upper = Image.open(out).crop((0, 0, 128, 128)).resize((32, 32), Image.Resampling.NEAREST)
    assert upper.tobytes() == Image.fromarray(toy_world(0, 32, "val")[0]).tobytes()
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(3):
        Image.new("RGB", (60 + k, 40), (80 * k, 90, 30)).save(photos / f"{k}.png")
    (photos / "0.jpg").write_bytes(b"none")
    code, said, _ = call(figures, "originals", photos, "--run-dir", SHIPPED, "-o", out)
    assert code == 0 and "unreadable" in said
    assert Image.open(out).size == (3 * 264 - 8, 512)
    assert Image.open(out).getpixel((264, 9)) == (80, 90, 30)


def test_figure_6_has_the_best_of_the_first_n(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "SIZES", (1, 2, 4))
    drawn = []

    def keep(*args, **options):
        drawn.extend(draw(*args, **options))
        return drawn

    monkeypatch.setattr(figures, "draw", keep)
    prompts, out = ["a red cube", "a blue sphere"], tmp_path / "fig6.png"
    call(figures, "best", *prompts, "--run-dir", SHIPPED, "-o", out)
    for column, prompt in enumerate(prompts):
        own = [x for x in drawn if x.info["prompt"] == prompt]
        for row, n in enumerate((1, 2, 4)):
            best = max((x for x in own if x.info["candidate"] < n), key=lambda x: x.info["score"])
            corner = column * 264, row * 264
            shown = Image.open(out).crop((*corner, corner[0] + 256, corner[1] + 256))
            assert shown.resize((32, 32), Image.Resampling.NEAREST).tobytes() == best.tobytes()


def test_a_curve_needs_matplotlib(tmp_path, monkeypatch):
    out = tmp_path / "curve.png"
    assert call(figures, "logit-laplace", "-o", out)[0] == 0
    assert Image.open(out).size[0] > 100
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, said = call(figures, "logit-laplace", "-o", out)
    assert code == 2 and "pip install matplotlib" in said and said.count("\n") == 1


def test_figure_11_and_the_twelve_billion(tmp_path):
    code, said, _ = call(figures, "masks", "-o", tmp_path / "masks.png")
    assert code == 0 and "12,092,178,432" in said and "row column row row" in said
    assert Image.open(tmp_path / "masks.png").size > (700, 700)
