"""
FID and IS against blur and against the number of candidates, as in Fig. 9 (3.1).

    python -m lab.fid                                   # the newest run, else pretrained/tiny
    python -m lab.fid --prompts 500 --candidates 64

In the place of Inception stands the judge of the toy world: its features are the means over the
positions of its last layer, its classes the pairs of colour and shape. So the numbers compare with
each other, and with nobody else's. Samples and pictures of the data are blurred alike, for a dVAE
cannot make the highest frequencies; the paper's radii of 0 to 8 are those of 256 × 256 pixels.
Fewer pictures have a larger FID: see that of other pictures of the data. The unseen pairs are five,
so that wrong ones raise the IS.
"""

import math
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from data.loader import images_to
from data.toy import toy_world
from engine.cli import Parser, check_output, start
from engine.log import COLORS, save, subplots
from lab.judge import (  # fmt: skip
    SIZE,
    Judge,
    blur,
    draw_candidates,
    open_run,
    prompts_of,
    reliable_judge,
    single_objects,
)
from sample import find_run

RADII = range(9)  # standard deviations in pixels at 256 × 256
REFERENCE = 2000  # pictures of the data


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians that have the means and covariances of features a [n, d] and b [m, d]:
    |μ_a − μ_b|² + tr(C_a + C_b − 2 (C_a C_b)^½) (Heusel et al. 2017)."""
    a, b = a.double(), b.double()
    C_a, C_b = a.T.cov(), b.T.cov()
    # (C_a C_b)^½ has the trace of (C_a^½ C_b C_a^½)^½, which is symmetric
    values, vectors = torch.linalg.eigh(C_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    of_product = torch.linalg.eigvalsh(root @ C_b @ root).clamp(min=0).sqrt()
    between = (a.mean(0) - b.mean(0)).square().sum()
    return (between + C_a.trace() + C_b.trace() - 2 * of_product.sum()).item()


def inception_score(p: Tensor) -> float:
    """exp of the mean KL(p(y | x) ‖ p(y)) over pictures x, of p(y | x) [n, classes]: 1 where all
    look alike, at most the number of classes (Salimans et al. 2016)."""
    kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
    return kl.sum(1).mean().exp().item()


@torch.inference_mode()
def look(judge: Judge, images: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """What the judge sees of blurred images [n, 3, 32, 32]: features [n, 128], and probabilities of
    the pairs of colour and shape [n, 40]."""
    sigma = radius * SIZE / 256
    if sigma:
        images = blur(images, sigma, half=math.ceil(4 * sigma))
    trunk = judge.trunk(images)
    color, shape = judge.color(trunk).softmax(1), judge.shape(trunk).softmax(1)
    pairs = color[:, :, None] * shape[:, None]
    return trunk.unflatten(1, (-1, 16)).mean(2), pairs.flatten(1)


def pictures_of(split: str, first: int, count: int) -> Tensor:
    """One-object pictures of a split, from the `first` of them on: [count, 3, 32, 32]."""
    scenes = islice(single_objects(split, 0), first, first + count)
    pixels = [torch.from_numpy(toy_world(index, SIZE, split)[0]) for index, _ in scenes]
    return images_to(torch.device("cpu"), torch.stack(pixels))


@torch.inference_mode()
def best_pictures(run, split: str, prompts: int, sizes: list[int], seed: int) -> Tensor:
    """Of the captions of `prompts` one-object scenes: for each N of `sizes`, the last the largest,
    the best of the first N candidates by the reranker, [sizes, prompts, 3, 32, 32]."""
    captions, *_ = prompts_of(split, prompts)
    drawn = draw_candidates(run, captions, sizes[-1], seed)
    best = [images[[int(scores[:n].argmax()) for n in sizes]] for images, scores in drawn]
    return torch.stack(best, dim=1)


def measure(judge: Judge, images: Tensor, radius: float, reference: Tensor) -> tuple[float, float]:
    """FID and IS of blurred images, the FID against features of a reference blurred alike."""
    features, p = look(judge, images, radius)
    return frechet_distance(features, reference), inception_score(p)


def plot(axes: tuple, what: str, xs, scores: list[tuple], name: str, color: str) -> None:
    """FID on the first of the axes and IS on the second, and both as a line of text."""
    for axis, label, values in zip(axes, ("FID", "IS"), zip(*scores)):
        axis.plot(xs, values, "o-", color=color, label=name, markersize=3)
        axis.set(xlabel=what, ylabel=label)
        row = "  ".join(f"{x}: {value:.3g}" for x, value in zip(xs, values))
        print(f"{what}; {name}; {label}  {row}")


def main() -> None:
    parser = Parser(description="FID and IS against blur and candidates, as in Fig. 9 (3.1).")
    parser.add_argument("--run-dir", metavar="DIR", type=Path, help="default: the newest run")
    parser.add_argument("--prompts", type=int, default=200, help="of each kind (default 200)")
    parser.add_argument("--candidates", type=int, default=64, metavar="N", help="a power of 2")
    parser.add_argument("--seed", type=int, default=0, help="of the samples; default 0")
    parser.add_argument("-o", "--out", type=Path, default=Path("fig9.png"), metavar="FILE")
    args = parser.parse_args()
    run_dir = args.run_dir or find_run()
    run = open_run(run_dir, args.prompts, args.candidates)
    check_output(args.out, ".png")
    figure, axes = subplots(6)
    judge = reliable_judge()
    sizes = [2**k for k in range(args.candidates.bit_length())]
    for column, (kind, split) in enumerate((("seen", "val"), ("unseen", "unseen"))):
        others = pictures_of(split, args.prompts, REFERENCE)
        references = [look(judge, others, radius)[0] for radius in RADII]
        own = pictures_of(split, 0, args.prompts)
        samples = best_pictures(run, split, args.prompts, sizes, args.seed)
        with torch.inference_mode():
            decoded = run.dvae.decode(run.dvae.encode(own))
        shown = {
            f"best of {sizes[-1]}": samples[-1],
            "one sample": samples[0],
            "pictures through the dVAE": decoded,
            "other pictures": own,
        }
        panels = axes[column], axes[3 + column]
        for color, (name, images) in zip(COLORS, shown.items()):
            scores = [measure(judge, images, *pair) for pair in zip(RADII, references)]
            plot(panels, f"{kind} pairs, blur radius", RADII, scores, name, color)
        scores = [measure(judge, images, 0, references[0]) for images in samples]
        plot((axes[2], axes[5]), "candidates N", sizes, scores, f"{kind} pairs", COLORS[column])
    for axis in axes[2::3]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, map(str, sizes))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper left", ncols=4, frameon=False)
    axes[2].legend()
    save(figure, args.out)
    print(f"{args.out}: FID above IS, {args.prompts} captions of each kind, one-object pictures")


if __name__ == "__main__":
    start(main)
