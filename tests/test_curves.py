"""Ticks of any range, points where the axes say, logs that are no logs."""

import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

import engine.log as curves
from engine.log import Axis, Panel, Series, layout, log_ticks, plot, tick_label, ticks

values = st.floats(-1e12, 1e12).filter(lambda v: v == 0 or abs(v) > 1e-12)


def mantissa(value):
    """The leading digits of a number: 0.002 -> 2."""
    return float(f"{value:.12e}".split("e")[0])


@given(values, values)
def test_ticks_are_few_nice_even_and_cover_the_range(a, b):
    low, high = min(a, b), max(a, b)
    assume(high - low > 1e-9 * max(abs(low), abs(high)) or low == high)
    found = ticks(low, high)
    assert 3 <= len(found) <= 8 and found == sorted(set(found))
    step = (found[-1] - found[0]) / (len(found) - 1)
    # as far as numbers so much larger than the step can tell
    error = 1e-14 * max(abs(found[0]), abs(found[-1]))
    assert found[0] <= low + error + 2e-9 * step and found[-1] >= high - error - 2e-9 * step
    assert all(abs(found[0] + k * step - v) <= error + 1e-9 * step for k, v in enumerate(found))
    if error < 1e-3 * step:
        exact = min((1, 2, 5, 10), key=lambda m: abs(m - mantissa(step)))
        assert mantissa(step) == pytest.approx(exact, rel=0.01)
    if low < high:
        assert found[1] > low and found[-2] < high or len(found) == 3  # no empty ends


@given(st.floats(1e-30, 1e30), st.floats(1, 1e40))
def test_log_ticks_are_few_nice_and_cover_the_range(low, ratio):
    high = min(low * ratio, 1e60)
    found = log_ticks(low, high)
    assert 3 <= len(found) <= 8 and found == sorted(set(found))
    assert found[0] <= low and found[-1] >= high
    assert {mantissa(v) for v in found} <= {1, 2, 5}
    assert found[1] > low and (found[-2] < high or len(found) == 3)


def test_ticks_by_example():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0, 12_500) == [0, 2000, 4000, 6000, 8000, 10_000, 12_000, 14_000]
    assert ticks(0.1, 0.3) == [0.1, 0.15, 0.2, 0.25, 0.3]
    assert log_ticks(1 / 16, 1) == [0.05, 0.1, 0.2, 0.5, 1]
    assert log_ticks(3e-5, 0.5) == [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]
    labels = [tick_label(v) for v in (0, -0.05, 2000, 12_000, 3e6, 2e-5, 1e-12, 5e12)]
    assert labels == ["0", "-0.05", "2000", "12k", "3M", "2e-5", "1e-12", "5e12"]


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 1), (2, 1), (1, math.inf)])
def test_a_logarithmic_axis_refuses_what_it_cannot_show(low, high):
    with pytest.raises(ValueError, match="logarithmic"):
        log_ticks(low, high)


def test_axes_map_linearly_and_logarithmically():
    linear, log = Axis([0, 7], False, {}), Axis([1, 100], True, {})
    assert [linear.at(v) for v in (0, 3.5, 7)] == [0, 0.5, 1]
    assert [log.at(v) for v in (1, 10, 100)] == pytest.approx([0, 0.5, 1])
    own = Axis([1, 4], False, {1.0: "one", 4.0: "four"})
    assert own.ticks == {1.0: "one", 4.0: "four"} and 0 < own.at(1) < own.at(4) < 1


@pytest.mark.parametrize("log", [False, True])
def test_the_points_of_a_series_are_where_the_axes_say(tmp_path, log):
    """In a grid of three panels, the last one: its points and nothing but its points."""
    x, y = [1, 30, 400], [0.02, 1.0, 0.3]
    plain = Panel("first", "x", "y", [Series("a", [0, 1], [5, 6])])
    panel = Panel("last", "x", "y", [Series("", x, y, "#D55E00", dots=True)], log_x=log, log_y=log)
    plot([plain, plain, panel], tmp_path / "p.png", columns=2)
    (width, height), frames = layout([plain, plain, panel], 2)
    picture = Image.open(tmp_path / "p.png").convert("RGB")
    assert picture.size == (width, height)
    orange = {
        (i, j)
        for i in range(width)
        for j in range(height)
        if sum(abs(a - b) for a, b in zip(picture.getpixel((i, j)), (0xD5, 0x5E, 0))) < 60
    }
    spots = [frames[2].at(a, b) for a, b in zip(x, y)]
    for px, py in spots:
        assert (int(px), int(py)) in orange
    assert min(i for i, _ in orange) == pytest.approx(spots[0][0], abs=4)
    assert max(i for i, _ in orange) == pytest.approx(spots[2][0], abs=4)
    assert min(j for _, j in orange) == pytest.approx(spots[1][1], abs=4)
    assert max(j for _, j in orange) == pytest.approx(spots[0][1], abs=4)
    # the frames of a picture lie apart and inside
    assert frames[0].left + curves.WIDTH < frames[1].left and frames[0].left == frames[2].left
    assert frames[0].top + curves.HEIGHT < frames[2].top < height - curves.HEIGHT


def test_what_is_no_number_is_left_out(tmp_path):
    panel = Panel("gap", "x", "y", [Series("", [0, 1, 2], [1.0, math.nan, 3.0])])
    plot([panel], tmp_path / "gap.png")
    with pytest.raises(ValueError, match="'empty' has no finite points"):
        plot([Panel("empty", "x", "y", [Series("", [0], [math.inf])])], tmp_path / "no.png")


DVAE = {"stage": "dvae", "step": 50, "loss": 1.0, "psnr": 20.0, "lr": 0.1, "kl_weight": 0, "tau": 1}
PRIOR = {"stage": "prior", "step": 50, "text_loss": 5.0, "image_loss": 4.0, "lr": 0.1}


def write_log(run, *entries):
    run.mkdir(exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return run


def titles(monkeypatch, runs, tmp_path):
    """The panels that draw_curves plots, instead of the picture."""
    drawn = []
    monkeypatch.setattr(curves, "plot", lambda panels, path: drawn.extend(panels))
    curves.draw_curves(runs, tmp_path / "c.png")
    return {panel.title.split(",")[0]: panel for panel in drawn}


def test_a_panel_for_each_quantity_that_a_run_has(monkeypatch, tmp_path):
    a = write_log(tmp_path / "a", DVAE, {**DVAE, "step": 100, "psnr": 21.0})
    b = write_log(tmp_path / "b", DVAE, {**PRIOR, "log2_scales": [13.0, 12.0]}, PRIOR)
    alone = titles(monkeypatch, [a], tmp_path)
    assert {title.split(":")[0] for title in alone} == {"dVAE"} and len(alone) == 5
    psnr = alone["dVAE: PSNR"].series[0]
    assert (psnr.name, psnr.x, psnr.y) == ("a", [50, 100], [20.0, 21.0])
    both = titles(monkeypatch, [a, b], tmp_path)
    assert len(both) == 5 + 3 + 1
    assert [s.name for s in both["dVAE: loss"].series] == ["a", "b"]
    assert [s.y for s in both["b: scales"].series] == [[13.0], [12.0]]


def test_the_picture_of_a_short_run_is_written(tmp_path):
    """One point in each curve, and a value that a logarithmic axis cannot show."""
    run = write_log(tmp_path / "a", {**DVAE, "lr": 0.0})
    curves.draw_curves([run, run], tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").width > 2 * curves.WIDTH


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
    monkeypatch.setattr("sys.argv", ["training.py"])
    with pytest.raises(SystemExit) as end:
        curves.main([str(run), "-o", str(tmp_path / "c.png")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert error.startswith("training.py: ") and not (tmp_path / "c.png").exists()
