"""
The paper's claims again, in miniature: each on the toy world, within 20 minutes on two CPU cores.

    python -m lab.claims relaxation     # or kl-weight, rerank, unseen, underflow

Prints what the paper says beside what was measured here, and whether it holds at this size, and
writes both as docs/claims/NAME.json and NAME.png. Models that have to be trained for a claim
are kept under runs/claims; a rerun trains only those that are missing.

What is not here: the paper's own size. A claim that fails in a model a thousandth as wide is not
refuted by that, nor is one proved that holds.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.loader import images_to
from data.toy import COLORS as HUES
from data.toy import SHAPES, UNSEEN_PAIRS, toy_world
from engine.checkpoint import load_run
from engine.cli import Parser, start
from engine.log import COLORS, PALE, save, subplots
from lab.judge import judge_prompts, prompts_of, train_judge
from lab.judge import rerank as best_of_candidates
from sample import SHIPPED, encode_prompt
from transformer import Transformer

HERE = Path(__file__).resolve().parent.parent
RUNS = Path("runs/claims")
SEEDS, STEPS = (0, 1, 2), 1000


class Outcome(NamedTuple):
    """What a claim's measurement came to."""

    columns: list[str]
    rows: list[list]
    verdict: str
    figure: object  # matplotlib's


# ----------------------------------------------------------------------------- runs


def evaluation(run_dir: Path, step: int) -> dict:
    """What a run logged of its validation at this step; nothing where it did not get there."""
    try:
        entry = json.loads((run_dir / "log.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return entry if entry["step"] == step and any("val" in name for name in entry) else {}


def train(script: str, options: dict[Path, list[str]], steps: int, jobs: int = 2) -> list[dict]:
    """Train a model in each of these directories with its options, `jobs` at a time, one thread
    each, and return their evaluations at the end. What is finished is not trained again.

    ValueError with the last words of a run that failed.
    """
    missing = [run for run in options if not evaluation(run, steps)]
    if len(missing) < len(options):
        print(f"{len(options) - len(missing)} of {len(options)} runs are there: not trained again")

    def one(run: Path) -> None:
        command = [sys.executable, str(HERE / script), "--tiny", "--workers", "0"]
        command += ["--steps", str(steps), "--run-dir", str(run), *options[run]]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            words = done.stderr.strip().splitlines() or ["no word"]
            raise ValueError(f"{' '.join(command[1:])} ended with {done.returncode}: {words[-1]}")

    with ThreadPoolExecutor(jobs) as pool:
        for _ in tqdm(pool.map(one, missing), total=len(missing), desc="runs", disable=not missing):
            pass
    return [evaluation(run, steps) for run in options]


def sweep(betas: list[float], taus: list[float]) -> list[list[dict]]:
    """Short trainings of a small dVAE for each KL weight and final temperature: for each of them
    the evaluations at the end, a seed each. The averaging is short, since the runs are, and the
    weight is as given, however few codes are in use."""
    runs, options = [(b, t, s) for b in betas for t in taus for s in SEEDS], {}
    for beta, tau, seed in runs:
        run = RUNS / "dvae" / f"kl-weight-{beta:g}-tau-end-{tau:g}-seed-{seed}"
        options[run] = ["--n-hid", "16", "--ema", "0.98", "--kl-weight", str(beta)]
        options[run] += ["--min-usage", "0", "--tau-end", str(tau), "--seed", str(seed)]
    entries = train("train_dvae.py", options, STEPS)
    return [entries[k : k + len(SEEDS)] for k in range(0, len(entries), len(SEEDS))]


def over_seeds(axis, values: list[list[float]], color: str, name: str | None = None) -> None:
    """A point for each place: the mean over the seeds, with a bar from the least to the most."""
    means = [mean(v) for v in values]
    bars = [
        [m - min(v) for m, v in zip(means, values)],
        [max(v) - m for m, v in zip(means, values)],
    ]
    axis.errorbar(range(len(values)), means, bars, None, "o-", color=color, label=name, capsize=3)


# ----------------------------------------------------------------------------- stage one


def relaxation() -> Outcome:
    """With the temperature tau of the relaxation annealed to 1/16, the relaxed validation ELB is
    close to the true one, whose codes are drawn from q (2.1)."""
    figure, (left, right) = subplots(2)
    taus = {1.0: "1", 0.25: "1/4", 0.0625: "1/16"}
    found = sweep([1.0], list(taus))
    true, relaxed = ([[e[k] for e in seeds] for seeds in found] for k in ("elb", "relaxed_elb"))
    gaps = [[e["relaxed_elb"] - e["elb"] for e in seeds] for seeds in found]
    rows = [
        [label, mean(t), mean(r), mean(g), min(g), max(g)]
        for label, t, r, g in zip(taus.values(), true, relaxed, gaps)
    ]
    wide, closed = mean(gaps[0]), mean(gaps[-1])
    verdict = (
        f"{'holds' if abs(closed) < 0.05 * wide else 'does not hold'} here: the gap is {wide:.3f} "
        f"nats per pixel value with tau = 1 and {closed:.4f} with 1/16, {closed / wide:.1%} of it"
    )
    over_seeds(left, relaxed, COLORS[1], "relaxed")
    over_seeds(left, true, COLORS[0], "true")
    left.legend()
    over_seeds(right, gaps, COLORS[2])
    for axis, title in ((left, "validation ELB (beta = 1), 3 seeds"), (right, "the gap")):
        axis.set_xticks(range(len(taus)), taus.values())
        axis.set(title=title, xlabel="tau at the end of training", ylabel="nats per pixel value")
    columns = ["tau", "true ELB", "relaxed ELB", "gap", "least gap", "most gap"]
    return Outcome(columns, rows, verdict, figure)


def kl_weight() -> Outcome:
    """A larger KL weight, beta = 6.6 instead of the bound's 1, brings more codes into use and in
    the end a smaller reconstruction error (2.1, A.2)."""
    figure, (left, right) = subplots(2)
    betas = [0.0, 1.0, 6.6]
    found = sweep(betas, [1 / 16])
    codes, psnr = ([[e[k] for e in seeds] for seeds in found] for k in ("codes", "val_psnr"))
    rows = [
        [beta, mean(c), min(c), max(c), mean(p), min(p), max(p)]
        for beta, c, p in zip(betas, codes, psnr)
    ]

    def holds(low: list[float], high: list[float]) -> str:
        if min(high) > max(low):
            return "holds here for every seed"
        return "undecided here, seeds overlap" if max(high) > min(low) else "does not hold here"

    verdicts = [
        f"{what}: {holds(v[1], v[2])}, {mean(v[1]):{form}} with beta = 1 and {mean(v[2]):{form}} "
        f"with 6.6 after {STEPS} steps"
        for what, v, form in (("codes in use", codes, ".0f"), ("PSNR in dB", psnr, ".1f"))
    ]
    over_seeds(left, codes, COLORS[0])
    left.set(title="codes in use, of 256; 3 seeds", ylabel="codes")
    over_seeds(right, psnr, COLORS[1])
    right.set(title="PSNR through argmax tokens", ylabel="dB")
    for axis in (left, right):
        axis.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axis.set_xlabel("beta")
    columns = ["beta", "codes", "least", "most", "PSNR in dB", "least", "most"]
    return Outcome(columns, rows, "; ".join(verdicts), figure)


# ----------------------------------------------------------------------------- drawing


def rerank() -> Outcome:
    """Of N candidates the one that a contrastive model likes best is kept; quality rises clearly
    up to about N = 32, with diminishing returns after that (2.6, Fig. 9c)."""
    figure, (axis,) = subplots(1)
    rows = best_of_candidates(train_judge(), load_run(SHIPPED), 100, 64, 0, axis)
    _, seen, _, _, unseen, _, _ = zip(*rows)  # of 1, 2, 4, …, 64
    early, late = unseen[3] - unseen[0], unseen[6] - unseen[3]
    verdict = (
        f"{'holds' if early > max(1, late) else 'does not hold'} here, on unseen "
        f"pairs: N = 1, 8, 32, 64 give {unseen[0]:.1f}, {unseen[3]:.1f}, {unseen[5]:.1f}, "
        f"{unseen[6]:.1f}% right; on seen pairs {seen[0]:.1f}, {seen[3]:.1f}, {seen[5]:.1f}, "
        f"{seen[6]:.1f}%"
    )
    columns = ["N", "seen", "± seen", "seen, any", "unseen", "± unseen", "unseen, any"]
    return Outcome(columns, rows, verdict, figure)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share, in per cent."""
    z, p = 1.96, hits / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return tuple(100 * x / (1 + z**2 / n) for x in (middle - half, middle + half))


def unseen() -> Outcome:
    """The model combines what it knows in ways that the training data did not: objects and styles
    that it never saw together (3.3)."""
    figure, (axis,) = subplots(1, width=8)
    run, judge = load_run(SHIPPED), train_judge()
    rows = []
    for kind, split in (("seen pairs", "val"), ("unseen pairs", "unseen")):
        _, colors, shapes = prompts_of(split, 500)
        good = torch.stack(judge_prompts(judge, run, split, 500, seed=0)).all(0)
        parts = {kind: good}
        for color, shape in sorted(UNSEEN_PAIRS) if split == "unseen" else []:
            here = (colors == list(HUES).index(color)) & (shapes == SHAPES.index(shape))
            parts[f"{color} {shape}"] = good[here]
        for name, part in parts.items():
            hits, n = int(part.sum()), len(part)
            rows.append([name, 100 * hits / n, *wilson(hits, n), n])
    chance = 100 / (len(HUES) * len(SHAPES))
    verdict = (
        f"{'holds' if rows[1][2] > 10 * chance else 'does not hold'} here: {rows[1][1]:.0f}% of "
        f"unseen pairs are drawn right at the first try, against {rows[0][1]:.0f}% of seen ones "
        f"and {chance:.1f}% by blind guessing"
    )
    for x, (_, share, low, high, _) in enumerate(rows):
        bars = [[share - low], [high - share]]
        axis.errorbar(x, share, bars, None, "o", color=COLORS[min(x, 1)], capsize=3)
    axis.set_xticks(range(len(rows)), [row[0].replace(" ", "\n") for row in rows])
    axis.set(title="colour and shape right at the first try, 95% intervals", ylabel="% of captions")
    return Outcome(["pair", "% right", "from", "to", "captions"], rows, verdict, figure)


# ----------------------------------------------------------------------------- 16 bits

LARGEST, LEAST = 65504.0, 2.0**-24  # of float16; what is below half of LEAST becomes zero
TOLERATED = 0.01  # the share of flushed values in a resblock that is said to do no harm


class Range(NamedTuple):
    """What float16 would have to hold in the backward of one resblock."""

    activations: Tensor  # |gradients| of what its linear layers give, flat, without zeros
    largest: float  # of these, and of the gradients of its matrices

    def flushed(self, scale: float) -> float:
        """The share of activation gradients that become zero in float16 when scaled."""
        return (self.activations.double() * scale).half().eq(0).double().mean().item()

    def highest(self) -> float:
        """The largest power of two by which nothing overflows."""
        return 2.0 ** math.floor(math.log2(LARGEST / self.largest))

    def lowest(self) -> float:
        """The least scale that flushes no more than the tolerated share."""
        k = math.ceil(TOLERATED * len(self.activations))
        return LEAST / 2 / self.activations.kthvalue(k).values.item()


def gradient_ranges(model: Transformer, text: Tensor, image: Tensor) -> list[Range]:
    """The gradients of each resblock, computed in 32 bits."""
    found: list[list[Tensor]] = [[] for _ in model.blocks]
    for block, parts in zip(model.blocks, found):
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.register_full_backward_hook(
                    lambda _, inner, outer, parts=parts: parts.append(outer[0].abs().flatten())
                )
    model.loss(text, image)[0].backward()
    ranges = []
    for block, parts in zip(model.blocks, found):
        matrices = [p.grad.abs().max() for p in block.parameters() if p.ndim == 2]
        activations = torch.cat(parts)
        largest = max([activations.max(), *matrices]).item()
        ranges.append(Range(activations[activations > 0], largest))
    return ranges


def toy_tokens(run: tuple, model: Transformer, count: int) -> tuple[Tensor, Tensor]:
    """Text [count, T] and image tokens [count, N] of the toy world."""
    items = [toy_world(k, 32, "train") for k in range(count)]
    pixels = torch.stack([torch.from_numpy(picture) for picture, _ in items])
    text = torch.stack([encode_prompt(caption, run.bpe, model) for _, caption in items])
    return text, run.dvae.encode(images_to(torch.device("cpu"), pixels)).flatten(1)


def underflow() -> Outcome:
    """Activation gradients shrink from the early resblocks to the late ones. In a deep model they
    underflow in float16 under any one scale of the loss; with a scale for each resblock they do
    not (2.4, D, Fig. 4)."""
    figure, (largest, flushed, serving) = subplots(3)
    run_dir = RUNS / "underflow"
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("dvae.pt", "bpe.json"):
        shutil.copy(SHIPPED / name, run_dir)
    options = ["--n-layer", "32", "--n-head", "2", "--batch-size", "8"]
    train("train_prior.py", {run_dir: options}, 300)
    run = load_run(run_dir)
    torch.manual_seed(0)
    rows, found = [], {}
    for name, model in (("fresh", Transformer(run.prior.config)), ("trained", run.prior)):
        ranges = gradient_ranges(model, *toy_tokens(run, model, 16))
        highest = [r.highest() for r in ranges]
        scales = {  # their own ones within the bounds of D
            "none": [1.0] * len(ranges),
            "one": [min(highest)] * len(ranges),
            "own": [min(max(scale, 2.0**7), 2.0**24) for scale in highest],
        }
        shares = {
            kind: [100 * r.flushed(scale) for r, scale in zip(ranges, row)]
            for kind, row in scales.items()
        }
        rows += [
            [name, kind, math.log2(min(scales[kind])), math.log2(max(scales[kind])), mean(row),
             max(row)]
            for kind, row in shares.items()
        ]  # fmt: skip
        lowest = [r.lowest() for r in ranges]
        found[name] = ranges, shares, highest, lowest
    ranges, shares, highest, lowest = found["trained"]
    shrink = mean([r.largest for r in ranges[:2]]) / mean([r.largest for r in ranges[-2:]])
    spare = [math.log2(min(high) / max(low)) for _, _, high, low in found.values()]
    verdict = (
        f"shrinking {'holds' if shrink > 2 else 'does not hold'} here, {shrink:.0f} times from "
        f"the first layer to the last after 300 steps; underflow under one scale "
        f"{'holds' if spare[1] < 0 else 'does not hold'} at this size: the best one flushes "
        f"{max(shares['one']):.2f}% in the worst resblock, own scales {max(shares['own']):.2f}%, "
        f"and it could be 2^{spare[1]:.1f} times smaller before one loses {TOLERATED:.0%} (2^"
        f"{spare[0]:.1f} times in the fresh model)"
    )

    def draw(axis, name: str, values: list[float], color: str) -> None:
        axis.plot(range(0, len(values), 2), values[0::2], color=color, label=name)
        axis.plot(range(1, len(values), 2), values[1::2], color=color, **PALE)

    draw(largest, "fresh", [r.largest for r in found["fresh"][0]], COLORS[2])
    draw(largest, "after 300 steps", [r.largest for r in ranges], COLORS[0])
    largest.set(title="largest gradient; pale: MLP", ylabel="|gradient|", yscale="log")
    names = {"none": "no scale", "one": "one scale", "own": "their own"}
    for (kind, row), color in zip(shares.items(), COLORS):
        draw(flushed, names[kind], row, color)
    flushed.set(title="flushed to zero in float16; pale: MLP", ylabel="% of values")
    draw(serving, "highest", [math.log2(v) for v in highest], COLORS[1])
    draw(serving, f"lowest, {TOLERATED:.0%} flushed", [math.log2(v) for v in lowest], COLORS[5])
    serving.set(title="scales that serve a resblock; pale: MLP", ylabel="log2 scale")
    for axis in (largest, flushed, serving):
        axis.set_xlabel("resblock")
        axis.legend()
    columns = ["model", "scales", "log2 from", "to", "flushed %", "worst resblock %"]
    return Outcome(columns, rows, verdict, figure)


# ----------------------------------------------------------------------------- the door

CLAIMS = {
    "relaxation": relaxation,
    "kl-weight": kl_weight,
    "rerank": rerank,
    "unseen": unseen,
    "underflow": underflow,
}


def table(columns: list[str], rows: list[list]) -> str:
    """Aligned text."""
    cells = [columns, *([f"{x:.4g}" if isinstance(x, float) else str(x) for x in r] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in cells)


def main() -> None:
    parser = Parser(description="Re-run one claim of the paper in miniature.")
    parser.add_argument("claim", choices=CLAIMS, metavar="NAME", help=", ".join(CLAIMS))
    parser.add_argument("-o", "--out", metavar="DIR", type=Path, default=Path("docs/claims"),
        help="default docs/claims")  # fmt: skip
    args = parser.parse_args()
    says = " ".join(CLAIMS[args.claim].__doc__.split())
    print(f"the paper: {says}\n")
    args.out.mkdir(parents=True, exist_ok=True)
    found = CLAIMS[args.claim]()
    save(found.figure, args.out / f"{args.claim}.png")
    result = {"claim": args.claim, "paper": says, "verdict": found.verdict}
    result |= {"columns": found.columns, "rows": found.rows}
    path = args.out / f"{args.claim}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(found.columns, found.rows))
    print(f"\n{found.verdict}\nsee {args.out / args.claim}.png and .json")


if __name__ == "__main__":
    start(main)
