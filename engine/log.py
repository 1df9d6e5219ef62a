"""
What is seen of a run: log.jsonl, the bar, and the curves.

    python -m engine.log runs/tiny                  # curves.png from its log.jsonl
    python -m engine.log runs/a runs/b -o both.png  # several runs in one picture
"""

import json
import math
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from engine import checkpoint
from engine.cli import Parser, start
from scale.parallel import World

# ---- log.jsonl -----------------------------------------------------------------------------------

given_up: set[Path] = set()  # what has failed once and been said


@contextmanager
def going_on(path: Path):
    """Around the writing of what a run can do without: a failure is said, once for each file, and
    training goes on."""
    try:
        yield
    except (OSError, ValueError) as error:
        if path not in given_up:
            message = f"warning: {path} cannot be written; going on without ({error})"
            tqdm.write(message, file=sys.stderr)
        given_up.add(path)


class Log:
    """log.jsonl, written by rank 0: one object per logged step and stage, before the first of them
    the `settings`. Starting at a step drops what an earlier run of the stage logged after it."""

    def __init__(self, run_dir: Path, stage: str, start: int, world: World, settings=None):
        self.path, self.stage, self.begin = run_dir / "log.jsonl", stage, time.time()
        self.start, self.settings = start, settings
        self.is_main = world.is_main
        if self.is_main and self.path.exists():
            with going_on(self.path):
                kept = [line for line in self.path.open("rb") if self.precedes(line, start)]
                checkpoint.write(self.path, lambda file: file.writelines(kept))

    def precedes(self, line: bytes, start: int) -> bool:
        try:
            entry = json.loads(line)
            return entry["stage"] != self.stage or entry["step"] <= start
        except (ValueError, KeyError, TypeError):
            return False  # the torn last line of a killed run

    def write(self, step: int, **values) -> None:
        if self.settings:
            settings, self.settings = self.settings, None
            self.write(self.start, **settings)
        if self.is_main:
            seconds = round(time.time() - self.begin, 1)
            entry = {"stage": self.stage, "step": step, "seconds": seconds, **values}
            line = json.dumps(entry).encode() + b"\n"
            with going_on(self.path), open(self.path, "ab", buffering=0) as file:
                size = file.tell()
                if file.write(line) < len(line):
                    file.truncate(size)  # half a line would spoil the next one
                    raise OSError("no room is left")


# ---- the bar -------------------------------------------------------------------------------------

SHOWN = ("loss", "skipped_updates", "psnr", "text_loss", "image_loss", "val_psnr", "codes",
         "val_image_loss", "images_per_second")  # fmt: skip


class Bar:
    """The bar of rank 0, the means of the metrics between two logged steps, and what is counted."""

    def __init__(self, world: World, start: int, steps: int, batch_size: int):
        self.world, self.start, self.steps, self.batch_size = world, start, steps, batch_size
        self.bar = tqdm(total=steps, initial=start, disable=not world.is_main, mininterval=0.5)
        self.sums: dict[str, Tensor] = {}
        self.shown: dict[str, float] = {}
        self.count, self.since_taken = 0, 0
        self.begin = self.since = time.time()
        self.paused_at = 0.0
        self.noted: Counter = Counter()
        self.skipped: set[str] = set()

    def note(self, notes: list[str]) -> None:
        """Count what loading has to say: `unreadable: …`, `filtered: reason: …` of a sample that
        was passed over, of which the first few are named; or `cut`, of a caption."""
        for note in notes:
            if note == "cut":
                self.noted["cut"] += 1
            elif note not in self.skipped and len(self.skipped) < 10_000:
                self.skipped.add(note)
                self.noted[re.match(r"filtered: [^:]*|[^:]*", note)[0]] += 1
                if len(self.skipped) <= 5:
                    self.bar.write(f"skipped: {note}", file=sys.stderr)

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1

    def step(self, done: int) -> None:
        self.bar.update()
        self.since_taken += 1
        if done - self.start == 20 and self.world.is_main:
            rest = (time.time() - self.begin) / 20 * (self.steps - done) / 60
            self.bar.write(f"about {rest:.0f} minutes to go")

    def pause(self) -> None:
        """What follows, up to `resume`, does not count in the speed."""
        self.paused_at = time.time()

    def resume(self) -> None:
        if self.paused_at:
            self.since += time.time() - self.paused_at
            self.paused_at = 0

    def take(self) -> dict[str, float]:
        """The means since the last call, averaged over the processes, and the speed."""
        means = torch.stack([total.float() / self.count for total in self.sums.values()])
        values = dict(zip(self.sums, self.world.mean(means).tolist()))
        rate = self.since_taken * self.batch_size / (time.time() - self.since)
        values["images_per_second"] = rate
        self.sums, self.count, self.since_taken, self.since = {}, 0, 0, time.time()
        self.show(**values)
        return values

    def show(self, **values: float) -> None:
        self.shown |= values
        shown = {name: f"{self.shown[name]:.4g}" for name in SHOWN if name in self.shown}
        self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Say the counts of all processes. For all ranks to call."""
        self.bar.close()
        noted = sum(self.world.gather(self.noted), Counter())
        cut = noted.pop("cut", 0)
        if self.world.is_main:
            for kind, count in noted.most_common():
                print(f"{count} skipped, {kind}")
            if cut:
                print(f"{cut} captions were cut to the model's text length")


# ---- curves --------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FINE = 3  # everything is drawn this many times larger and reduced, against jagged edges
WIDTH, HEIGHT = 300, 190  # pixels of a plot without its labels
LINE, TEXT = 18, 13  # pixels: the height of a line of text, the size of its font


@dataclass
class Series:
    """A line through points; `spread` holds a (low, high) for each of them, drawn as a bar.

    Without a name it is not in the legend. A pale one is thin and stays behind the others.
    """

    name: str
    x: list[float]
    y: list[float]
    color: str = COLORS[0]
    spread: list[tuple[float, float]] = field(default_factory=list)
    pale: bool = False
    dots: bool = False


@dataclass
class Panel:
    """Series over common axes. `x_ticks` puts labels of one's own, of a line or more, at places
    of one's own."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False
    x_ticks: dict[float, str] = field(default_factory=dict)
    width: int = WIDTH


# ----------------------------------------------------------------------------- axes


def ticks(low: float, high: float) -> list[float]:
    """3 to 8 multiples of 1, 2 or 5 × 10^k, evenly spaced, from at most `low` to at least `high`.

    ValueError unless low <= high, both finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"expected finite low <= high, got {low} and {high}")
    if high - low < 1e-9 * max(abs(low), abs(high)) or high == low:  # a constant
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    exponent = math.floor(math.log10(high - low)) - 1
    while True:
        for mantissa in (1, 2, 5):
            # dividing by whole numbers gives 0.3, where multiplying by 0.1 does not
            up, down = mantissa * 10 ** max(exponent, 0), 10 ** max(-exponent, 0)
            first, last = low * down / up, high * down / up
            # 1.1 · 50 is a little more than 55
            slack = 1e-9 + 4e-16 * max(abs(first), abs(last))
            first, last = math.floor(first + slack), math.ceil(last - slack)
            if last - first <= 7:
                last = max(last, first + 2)
                return [k * up / down for k in range(first, last + 1)]
        exponent += 1


def log_ticks(low: float, high: float) -> list[float]:
    """3 to 8 ticks for a logarithmic axis, from at most `low` to at least `high`: 1, 2, 5, 10, …
    or, over many decades, every power of ten or every n-th. ValueError unless 0 < low <= high."""
    if not 0 < low <= high < math.inf:
        raise ValueError(f"a logarithmic axis needs finite 0 < low <= high, got {low} and {high}")

    def rung(k: int, per_decade: int, stride: int) -> float:
        exponent, place = divmod(k * stride, per_decade)
        return float(f"{(1, 2, 5)[place]}e{exponent}")

    for per_decade, stride in [(3, 1), *((1, n) for n in range(1, 100))]:
        k = math.floor(math.log10(low) * per_decade / stride) + 1
        while rung(k, per_decade, stride) > low:
            k -= 1
        found = [rung(k, per_decade, stride)]
        while found[-1] < high or len(found) < 3:
            k += 1
            found.append(rung(k, per_decade, stride))
        if len(found) <= 8:
            return found
    raise AssertionError("a float spans fewer decades")


def tick_label(value: float) -> str:
    """Short: 0.05, 20k, 3M, 1e-5."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1e9 and abs(value) >= 1e4:
            return f"{value / unit:g}{letter}"
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


class Axis:
    """Ticks {value: label}, and where between the two ends a value lies."""

    def __init__(self, values: list[float], log: bool, given: dict[float, str]):
        self.log = log
        if given:
            self.ticks = given
            ends = [self.map(v) for v in [*given, *values]]
            margin = (max(ends) - min(ends)) * 0.06 or 1
            self.low, self.high = min(ends) - margin, max(ends) + margin
            return
        places = (log_ticks if log else ticks)(min(values), max(values))
        self.ticks = {v: tick_label(v) for v in places}
        self.low, self.high = self.map(places[0]), self.map(places[-1])

    def map(self, value: float) -> float:
        return math.log(value) if self.log else value

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        return (self.map(value) - self.low) / (self.high - self.low)


# ----------------------------------------------------------------------------- drawing


@lru_cache
def font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(TEXT * FINE)


def width_of(text: str) -> float:
    """In pixels of the finished picture."""
    return max(font().getlength(line) for line in text.split("\n")) / FINE


def legend_rows(panel: Panel) -> list[list[Series]]:
    """The named series, as many in a row as fit above the plot."""
    rows, used = [[]], 0.0
    for series in panel.series:
        width = width_of(series.name) + 36
        if series.name and rows[-1] and used + width > panel.width:
            rows, used = [*rows, []], 0.0
        if series.name:
            rows[-1].append(series)
            used += width
    return [row for row in rows if row]


class Frame:
    """Where a panel's plot stands in the picture, and where in the picture a point stands."""

    def __init__(self, panel: Panel):
        self.panel = panel
        points = [(x, y) for s in panel.series for x, y in zip(s.x, s.y) if math.isfinite(y)]
        if not points:
            raise ValueError(f"the panel {panel.title!r} has no finite points to draw")
        spread = [y for s in panel.series for ends in s.spread for y in ends]
        self.x = Axis([x for x, _ in points], panel.log_x, panel.x_ticks)
        self.y = Axis([y for _, y in points] + spread, panel.log_y, {})
        self.legend = legend_rows(panel)
        tick_width = max(width_of(label) for label in self.y.ticks.values())
        overhang = max(width_of(label) for label in self.x.ticks.values()) / 2
        self.before = max(LINE + 8 + tick_width, overhang) + 8
        self.above = 6 + LINE * (1 + len(self.legend)) + 8
        self.width = self.before + panel.width + overhang + 12
        self.below = 5 + LINE * max(1 + label.count("\n") for label in self.x.ticks.values())
        self.height = self.above + HEIGHT + self.below + LINE + 7
        self.left = self.top = 0.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of the finished picture."""
        return self.left + self.x.at(x) * self.panel.width, self.top + (1 - self.y.at(y)) * HEIGHT


def layout(panels: list[Panel], columns: int) -> tuple[tuple[int, int], list[Frame]]:
    """The size of the picture, and a frame for each panel, row by row, plots aligned."""
    frames = [Frame(panel) for panel in panels]
    rows = [frames[k : k + columns] for k in range(0, len(frames), columns)]
    left = 0.0
    for c in range(min(columns, len(frames))):
        column = [row[c] for row in rows if c < len(row)]
        for frame in column:
            frame.left = left + max(f.before for f in column)
        left = max(f.left - f.before + f.width for f in column)
    top = 0.0
    for row in rows:
        for frame in row:
            frame.top = top + max(f.above for f in row)
        top += max(f.above for f in row) + max(f.height - f.above for f in row)
    return (math.ceil(left), math.ceil(top)), frames


def fade(color: str, share: float = 0.6) -> str:
    """The colour mixed with this share of white."""
    parts = [int(color[k : k + 2], 16) for k in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * share):02x}" for c in parts)


class Pen:
    """Draws on the large picture, told places and lengths of the finished one."""

    def __init__(self, size: tuple[int, int]):
        self.picture = Image.new("RGB", (size[0] * FINE, size[1] * FINE), "white")
        self.draw = ImageDraw.Draw(self.picture)

    def line(self, points: list, color: str, width: float) -> None:
        flat = [(x * FINE, y * FINE) for x, y in points]
        self.draw.line(flat, color, round(width * FINE), joint="curve")

    def dot(self, x: float, y: float, r: float, color: str) -> None:
        self.draw.ellipse([FINE * v for v in (x - r, y - r, x + r, y + r)], color)

    def text(self, x: float, y: float, text: str, anchor: str, color: str = "#333333") -> None:
        self.draw.text((x * FINE, y * FINE), text, color, font(), anchor, align="center")

    def text_upwards(self, x: float, y: float, text: str) -> None:
        """Centred on (x, y)."""
        size = math.ceil(font().getlength(text)), LINE * FINE
        label = Image.new("RGB", size, "white")
        ImageDraw.Draw(label).text((size[0] / 2, size[1] / 2), text, "#333333", font(), "mm")
        label = label.rotate(90, expand=True)
        corner = round(x * FINE - label.width / 2), round(y * FINE - label.height / 2)
        self.picture.paste(label, corner)


def draw_panel(pen: Pen, frame: Frame) -> None:
    panel, left, top = frame.panel, frame.left, frame.top
    right, bottom = left + panel.width, top + HEIGHT
    pen.text(left, top - frame.above + 6, panel.title, "la", "#000000")
    for r, row in enumerate(frame.legend):
        x, y = left, top - 8 - LINE * (len(frame.legend) - r - 0.5)
        for series in row:
            pen.line([(x, y), (x + 18, y)], series.color, 2)
            if series.dots:
                pen.dot(x + 9, y, 3, series.color)
            pen.text(x + 22, y, series.name, "lm")
            x += width_of(series.name) + 36

    for value, label in frame.x.ticks.items():
        x = left + frame.x.at(value) * panel.width
        pen.line([(x, top), (x, bottom)], "#e4e4e4", 0.7)
        pen.text(x, bottom + 5, label, "ma")
    for value, label in frame.y.ticks.items():
        y = top + (1 - frame.y.at(value)) * HEIGHT
        pen.line([(left, y), (right, y)], "#e4e4e4", 0.7)
        pen.text(left - 6, y, label, "rm")
    pen.line([(left, top), (left, bottom), (right, bottom)], "#888888", 1)
    pen.text((left + right) / 2, bottom + frame.below + 3, panel.x_label, "ma")
    pen.text_upwards(left - frame.before + LINE / 2 + 4, (top + bottom) / 2, panel.y_label)

    for series in sorted(panel.series, key=lambda s: not s.pale):
        color = fade(series.color) if series.pale else series.color
        points = list(zip(series.x, series.y))
        for finite, piece in groupby(points, key=lambda point: math.isfinite(point[1])):
            if finite:
                pen.line([frame.at(*point) for point in piece], color, 1.3 if series.pale else 1.8)
        for x, ends in zip(series.x, series.spread):
            (x, low), (_, high) = (frame.at(x, end) for end in ends)
            pen.line([(x, low), (x, high)], color, 1.3)
            for y in (low, high):
                pen.line([(x - 3, y), (x + 3, y)], color, 1.3)
        for x, y in points if series.dots or len(points) == 1 else []:
            if math.isfinite(y):
                pen.dot(*frame.at(x, y), 3, color)


def plot(panels: list[Panel], path: str | Path, columns: int = 3) -> None:
    """Write the panels as one picture, row by row.

    ValueError where a panel has nothing finite to draw or a logarithmic axis meets a value that
    is not above 0; OSError where the picture cannot be written.
    """
    size, frames = layout(panels, columns)
    pen = Pen(size)
    for frame in frames:
        draw_panel(pen, frame)
    picture = pen.picture.reduce(FINE)
    picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


# ----------------------------------------------------------------------------- curves of runs

# stage: (title, unit, field of the log, field drawn pale beside it, logarithmic)
CURVES = {
    "dvae": [
        ("dVAE: loss", "nats per pixel value", "loss", None, False),
        ("dVAE: PSNR, pale: training, relaxed", "dB", "val_psnr", "psnr", False),
        ("dVAE: codes in use", "codes", "codes", None, False),
        ("dVAE: true ELB, pale: relaxed", "nats per pixel value", "elb", "relaxed_elb", False),
        ("dVAE: temperature of the relaxation", "tau", "tau", None, True),
        ("dVAE: weight of the KL term", "beta", "kl_weight", None, False),
        ("dVAE: step size", "step size", "lr", None, True),
    ],
    "prior": [
        ("prior: text loss, pale: training", "nats per token", "val_text_loss", "text_loss", False),
        ("prior: image loss, pale: training", "nats per token", "val_image_loss", "image_loss",
         False),
        ("prior: step size", "step size", "lr", None, True),
    ],
    "clip": [
        ("CLIP: loss, pale: training", "nats", "val_loss", "loss", False),
        ("CLIP: captions found, pale: training", "share", "val_captions_found", "accuracy", False),
        ("CLIP: step size", "step size", "lr", None, True),
    ],
}  # fmt: skip


def read_log(run_dir: Path) -> dict[tuple[str, str], tuple[list, list]]:
    """What log.jsonl holds for each (stage, field): steps and values.

    ValueError, one line, where it is missing, empty or damaged.
    """
    path = run_dir / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{run_dir} holds no log.jsonl: expected the directory of a run")
    found: dict[tuple[str, str], tuple[list, list]] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
            stage, step = entry.pop("stage"), int(entry.pop("step"))
            if "settings" in entry:
                continue
            values = {k: [float(x) for x in v] if isinstance(v, list) else float(v)
                      for k, v in entry.items()}  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged at line {number}: expected one JSON object with stage and step"
            ) from error
        for name, value in values.items():
            steps, column = found.setdefault((stage, name), ([], []))
            steps.append(step)
            column.append(value)
    if not found:
        raise ValueError(f"{path} is empty: nothing was logged yet")
    return found


def rainbow(share: float) -> str:
    """Fig. 12's colours, from dark violet at 0 to yellow at 1."""
    stops = ((68, 1, 84), (33, 145, 140), (253, 231, 37))
    k = min(int(2 * share), 1)
    return "#" + "".join(
        f"{round(a + (b - a) * (2 * share - k)):02x}" for a, b in zip(stops[k], stops[k + 1])
    )


def scale_panel(name: str, steps: list[int], rows: list[list[float]]) -> Panel:
    """Fig. 12: log2 of the gradient scale of each resblock (2.4, D)."""
    lines = list(zip(*rows))
    series = [
        Series("", steps, list(line), rainbow(k / max(1, len(lines) - 1)))
        for k, line in enumerate(lines)
    ]
    return Panel(f"{name}: scales, first resblock dark, last light", "step", "log2 scale", series)


def draw_curves(run_dirs: list[str | Path], out: str | Path) -> None:
    """Draw the logs of some runs over each other; a panel for each quantity that one of them has.

    ValueError, one line, where a log is missing, empty or damaged; OSError where `out` cannot be
    written.
    """
    runs = [Path(run_dir) for run_dir in run_dirs]
    logs = [read_log(run) for run in runs]
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    panels = []
    for stage, rows in CURVES.items():
        for title, unit, main_field, pale_field, log_y in rows:
            series = []
            for k, (name, log) in enumerate(zip(names, logs)):
                color = COLORS[k % len(COLORS)]
                for key, pale in ((main_field, False), (pale_field, True)):
                    if (stage, key) in log:
                        x, y = log[stage, key]
                        label = "" if pale and (stage, main_field) in log else name
                        series.append(Series(label, x, y, color, pale=pale))
            if log_y:
                log_y = all(y > 0 for s in series for y in s.y)
            if any(math.isfinite(y) for s in series for y in s.y):
                panels.append(Panel(title, "step", unit, series, log_y=log_y))
        for name, log in zip(names, logs):
            if (stage, "log2_scales") in log:
                panels.append(scale_panel(name, *log[stage, "log2_scales"]))
    if not panels:
        raise ValueError(f"{runs[0]}/log.jsonl holds nothing to draw: expected the log of a run")
    plot(panels, out)


def main() -> None:
    parser = Parser(description="Draw the curves of runs over each other.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument("-o", "--out", metavar="FILE", default="curves.png")
    args = parser.parse_args()
    draw_curves(args.runs, args.out)
    print(f"{args.out}: {', '.join(args.runs)}")


if __name__ == "__main__":
    start(main)
