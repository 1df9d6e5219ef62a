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
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine import checkpoint
from engine.cli import Parser, check_output, start
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
    the `settings`. Starting at a step drops what the stage logged after it; what a new run of the
    stage drops is kept as log.jsonl.old, or .old2 and so on."""

    def __init__(self, run_dir: Path, stage: str, start: int, world: World, settings=None):
        self.path, self.stage, self.begin = run_dir / "log.jsonl", stage, time.time()
        self.start, self.settings = start, settings
        self.is_main = world.is_main
        seen = settings and self.is_main
        self.shipped = shipped_values(stage, settings["settings"]) if seen else {}
        if self.is_main and self.path.exists():
            with going_on(self.path):
                lines = self.path.read_bytes().splitlines(keepends=True)
                kept, dropped = [], []
                for line in lines:
                    (kept if self.precedes(line, start) else dropped).append(line)
                if start == 0 and dropped:
                    old = run_dir / ("log.jsonl" + checkpoint.free_suffix(run_dir, "log.jsonl"))
                    checkpoint.write(old, lambda file: file.writelines(dropped))
                checkpoint.write(self.path, lambda file: file.writelines(kept))

    def precedes(self, line: bytes, start: int) -> bool:
        try:
            entry = json.loads(line)
            return entry["stage"] != self.stage or start > 0 and entry["step"] <= start
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


PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
MAIN_SCORES = {"dvae": ("val_psnr", "codes"), "prior": ("val_image_loss",), "clip": ("val_loss",)}


def shipped_values(stage: str, settings: dict) -> dict[int, dict]:
    """What the shipped run of the preset logged of a stage at each step; {} where none is there, or
    it had another number of steps, or data of another name."""
    path, values = PRETRAINED / settings["preset"] / "log.jsonl", {}
    try:
        for entry in map(json.loads, path.read_text("utf-8").splitlines()):
            if entry["stage"] == stage:
                values.setdefault(entry["step"], {}).update(entry)
        theirs = values[0]["settings"]
        same = all(theirs[name] == settings[name] for name in ("preset", "steps"))
        same = same and Path(theirs["data"]).name == Path(settings["data"]).name
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that somebody is rewriting
        return {}
    return values if same else {}


def beside_shipped(stage: str, step: int, scores: dict, shipped: dict[int, dict]) -> str:
    """A line with the main scores of a look and the shipped run's at the same step, or ""."""
    names = [name for name in MAIN_SCORES[stage] if name in shipped.get(step, {})]
    ours = ", ".join(f"{name} {scores[name]:.4g}" for name in names)
    theirs = ", ".join(f"{shipped[step][name]:.4g}" for name in names)
    return f"step {step}: {ours}; the shipped run had {theirs}" if names else ""


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
        self.begin = self.since = time.perf_counter()
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
            rest = (time.perf_counter() - self.begin) / 20 * (self.steps - done) / 60
            self.bar.write(f"about {rest:.0f} minutes to go")

    def resume(self) -> None:
        """What came after the last `take`, such as a look, does not count in the speed."""
        if not self.since_taken:
            self.since = time.perf_counter()

    def take(self) -> dict[str, float]:
        """The means since the last call, averaged over the processes, and the speed."""
        means = torch.stack([total.float() / self.count for total in self.sums.values()])
        values = dict(zip(self.sums, self.world.mean(means).tolist()))
        rate = self.since_taken * self.batch_size / (time.perf_counter() - self.since)
        values["images_per_second"] = rate
        self.sums, self.count, self.since_taken, self.since = {}, 0, 0, time.perf_counter()
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
PALE = dict(linewidth=1, alpha=0.4)

CURVES = [  # stage, title, unit, fields of the log, of which the second one is drawn pale
    ("dvae", "dVAE: loss, pale: reconstruction", "nats per pixel value", ["loss", "recon"]),
    ("dvae", "dVAE: PSNR, pale: training, relaxed", "dB", ["val_psnr", "psnr"]),
    ("dvae", "dVAE: codes in use", "codes", ["codes"]),
    ("dvae", "dVAE: true ELB, pale: relaxed", "nats per pixel value", ["elb", "relaxed_elb"]),
    ("dvae", "dVAE: temperature of the relaxation", "τ", ["tau"]),
    ("dvae", "dVAE: weight of the KL term", "β", ["kl_weight"]),
    ("dvae", "dVAE: step size", "step size", ["lr"]),
    ("prior", "prior: text loss, pale: training", "nats per token", ["val_text_loss", "text_loss"]),
    ("prior", "prior: image loss, pale: training", "nats per token",
     ["val_image_loss", "image_loss"]),
    ("prior", "prior: step size", "step size", ["lr"]),
    ("clip", "CLIP: loss, pale: training", "nats", ["val_loss", "loss"]),
    ("clip", "CLIP: captions found, pale: training", "share", ["val_captions_found", "accuracy"]),
    ("clip", "CLIP: step size", "step size", ["lr"]),
]  # fmt: skip


def subplots(count: int, width: float = 4) -> tuple:
    """A matplotlib Figure and its Axes, three in a row, each `width` × 2.8 inches of 80 pixels.
    ValueError where matplotlib is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "curves need matplotlib: pip install matplotlib, then python -m engine.log RUN"
        raise ValueError(message) from error
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    size = width * columns, 2.8 * rows
    figure = Figure(size, dpi=80)
    edges = dict(left=0.9 / size[0], bottom=0.6 / size[1], top=1 - 0.6 / size[1])  # in inches
    figure.subplots_adjust(right=0.985, wspace=0.35, hspace=0.5, **edges)
    axes = [figure.add_subplot(rows, columns, k + 1) for k in range(count)]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.locator_params(axis="x", nbins=6)
    return figure, axes


def save(figure, path: Path) -> None:
    """As a PNG. OSError as in `checkpoint.write`."""
    checkpoint.write(path, lambda file: figure.savefig(file, format="png"))


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


def draw_curves(run_dirs: list[str | Path], path: Path) -> None:
    """Draw the logs of some runs over each other; a panel for each quantity that one of them has,
    and for each run the gradient scales of its resblocks, if it has them (Fig. 12).

    ValueError, one line, where a log is missing, empty or damaged, and where matplotlib is not
    there; OSError where `path` cannot be written.
    """
    logs = {str(run_dir): read_log(Path(run_dir)) for run_dir in run_dirs}
    found = {key for log in logs.values() for key in log}
    panels = [row for row in CURVES if any((row[0], field) in found for field in row[3])]
    scales = {run: log["prior", "log2_scales"] for run, log in logs.items()
              if ("prior", "log2_scales") in log}  # fmt: skip
    if not panels:
        raise ValueError(f"{run_dirs[0]}/log.jsonl holds nothing to draw: expected a run's log")
    figure, axes = subplots(len(panels) + len(scales))

    lines = {}
    for axis, (stage, title, unit, fields) in zip(axes, panels):
        axis.set_title(title, y=1)  # where matplotlib looks for a place it takes a third longer
        is_log = fields[0] in ("tau", "lr")
        axis.set(xlabel="step", ylabel=unit, yscale="log" if is_log else "linear")
        for k, (run, log) in enumerate(logs.items()):
            for field, style in zip(fields, ({}, PALE)):
                if (stage, field) in log:
                    steps, values = log[stage, field]
                    marker = "." if len(steps) == 1 else None
                    color = COLORS[k % len(COLORS)]
                    (line,) = axis.plot(steps, values, marker=marker, color=color, **style)
                    lines.setdefault(run, line)
    for axis, (run, (steps, rows)) in zip(axes[len(panels) :], scales.items()):
        for k in range(len(rows[0])):
            color = (0.9 * k / len(rows[0]), 0.3, 0.6)
            axis.plot(steps, [row[k] for row in rows], color=color, linewidth=0.8)
        axis.set_title(f"{run}: scales, first blue, last red", y=1)
        axis.set(xlabel="step", ylabel="log2 scale")
    figure.legend(lines.values(), lines, loc="upper center", ncols=3, frameon=False)
    save(figure, Path(path))


def main() -> None:
    parser = Parser(description="Draw the curves of runs over each other.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, default=Path("curves.png"),
        help="default curves.png")  # fmt: skip
    args = parser.parse_args()
    check_output(args.out, ".png")
    draw_curves(args.runs, args.out)
    print(f"{args.out}: {', '.join(args.runs)}")


if __name__ == "__main__":
    start(main)
