"""lab.figures: what it prints and draws."""

import sys
from pathlib import Path

from PIL import Image
from scripts import call

from lab import figures

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
