"""Curves of runs: what is drawn of their logs, logs that are no logs, and no matplotlib."""

import json
import sys

import pytest
from PIL import Image

import engine.log as curves
from engine.cli import start
from engine.log import going_on

DVAE = {"stage": "dvae", "step": 50, "loss": 1.0, "psnr": 20.0, "lr": 0.1, "kl_weight": 0, "tau": 1}
PRIOR = {"stage": "prior", "step": 50, "text_loss": 5.0, "image_loss": 4.0, "lr": 0.1}


def write_log(run, *entries):
    run.mkdir(exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return run


def drawn(monkeypatch, runs, tmp_path):
    """The axes that draw_curves saves, by the first words of their titles."""
    kept, save = [], curves.save
    monkeypatch.setattr(
        curves, "save", lambda figure, path: (kept.append(figure), save(figure, path))
    )
    curves.draw_curves(runs, tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").width == round(kept[0].get_figwidth() * 80) <= 1000
    return {axis.get_title().split(",")[0]: axis for axis in kept[0].axes}


def points(axis):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axis.lines]


def test_a_panel_for_each_quantity_that_a_run_has(monkeypatch, tmp_path):
    settings = {"stage": "prior", "step": 0, "settings": {"lr": 0.1}}
    a = write_log(tmp_path / "a", DVAE, {**DVAE, "step": 100, "psnr": 21.0})
    b = write_log(tmp_path / "b", DVAE, settings, {**PRIOR, "log2_scales": [13.0, 12.0]}, PRIOR)
    alone = drawn(monkeypatch, [a], tmp_path)
    assert {title.split(":")[0] for title in alone} == {"dVAE"} and len(alone) == 5
    assert points(alone["dVAE: PSNR"]) == [([50, 100], [20.0, 21.0])]
    both = drawn(monkeypatch, [a, b], tmp_path)
    assert len(both) == 5 + 3 + 1
    assert points(both["dVAE: loss"]) == [([50, 100], [1.0, 1.0]), ([50], [1.0])]
    assert points(both[f"{b}: scales"]) == [([50], [13.0]), ([50], [12.0])]


def test_the_picture_of_a_short_run_is_written(tmp_path):
    """One point in each curve, and a value that a logarithmic axis cannot show."""
    run = write_log(tmp_path / "a", {**DVAE, "lr": 0.0})
    curves.draw_curves([run, run], tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").width > 800


def test_without_matplotlib_training_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = write_log(tmp_path / "a", DVAE)
    for _ in range(3):
        with going_on(run / "curves.png"):
            curves.draw_curves([run], run / "curves.png")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (run / "curves.png").exists()
    assert "curves need matplotlib: pip install matplotlib, then python -m engine.log RUN" in error


def test_curves_are_a_png(tmp_path, monkeypatch):
    run = write_log(tmp_path / "a", DVAE)
    monkeypatch.setattr("sys.argv", ["log.py", str(run), "-o", str(tmp_path / "c.jpg")])
    with pytest.raises(ValueError, match="such as cube.png"):
        curves.main()


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "holds no log.jsonl"),
        ("", "is empty"),
        (json.dumps(DVAE) + '\n{"stage": "dvae", "st', "damaged at line 2"),
        ("[1, 2]\n", "damaged at line 1"),
        ('{"stage": "dvae", "step": 1, "loss": "low"}\n', "damaged at line 1"),
        ('{"stage": "dvae", "step": 1, "seconds": 2.0}\n', "nothing to draw"),
    ],
)
def test_one_line_for_a_log_that_cannot_be_drawn(tmp_path, monkeypatch, capsys, text, message):
    run = tmp_path / "run"
    run.mkdir()
    if text is not None:
        (run / "log.jsonl").write_text(text)
    monkeypatch.setattr("sys.argv", ["log.py", str(run), "-o", str(tmp_path / "c.png")])
    with pytest.raises(SystemExit) as end:
        start(curves.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert error.startswith("log.py: ") and not (tmp_path / "c.png").exists()
