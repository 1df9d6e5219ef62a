"""
An independent judge of the toy world: are the colour and the shape what the caption says?

A small convolutional network learns colour and shape from fresh renders of single objects, all
pairs alike, blurred and noisy at random, since a model's pictures are. Then it measures a run, on
pairs of colour and shape that training held and on pairs of which it held neither picture nor
caption (3.3): what the dVAE makes of renders, and one sample for each of many one-object captions.

    python -m lab.judge                        # the newest run, else pretrained/tiny
    python -m lab.judge --run-dir runs/tiny --prompts 200
    python -m lab.judge --candidates 64        # also the best of N by clip.pt: a table, rerank.png
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data.loader import derive, images_to
from data.toy import COLORS, SHAPES, Scene, render, toy_scene, toy_world
from engine.checkpoint import Models, check_holds, load_run
from engine.cli import Parser, Stop, check_output, start
from engine.log import COLORS as LINES
from engine.log import PALE, save, subplots
from sample import encode_prompt, find_run, uniforms_of
from scale import fast

SIZE = 32  # pixels, of the toy world the judge knows
FRESH = 10**12  # no model trains on toy pictures this far out
STEPS, BATCH = 600, 64
CPU = torch.device("cpu")


def single_objects(split: str, first: int) -> Iterator[tuple[int, Scene]]:
    """The one-object scenes of a split from index `first` on, endlessly, with their indices."""
    for index in itertools.count(first):
        scene = toy_scene(index, split)
        if len(scene.things) == 1:
            yield index, scene


def labels_of(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """The numbers [B] of the colours and of the shapes of what comes first in each scene."""
    things = [scene.things[0] for scene in scenes]
    colors = torch.tensor([list(COLORS).index(thing.color) for thing in things])
    return colors, torch.tensor([SHAPES.index(thing.shape) for thing in things])


def renders(first: int) -> Iterator[tuple[Tensor, Scene]]:
    """Endless (float [3, H, W] without sensor noise, the scene it shows)."""
    scenes = {split: single_objects(split, first) for split in ("train", "unseen")}
    for k in itertools.count():  # of the pairs an eighth are unseen, and so are of these scenes
        _, scene = next(scenes["unseen" if k % 8 == 0 else "train"])
        pixels = torch.from_numpy(render(scene, SIZE)).permute(2, 0, 1).float() / 255
        yield pixels, scene


def blur(x: Tensor, sigma: float, half: int = 2) -> Tensor:
    """Gaussian blur of [B, 3, H, W] with a kernel of `half` pixels to each side of its middle."""
    t = torch.exp(-(torch.arange(-half, half + 1.0) ** 2) / (2 * sigma**2))
    kernel = (t[:, None] * t / t.sum() ** 2).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(x, (half,) * 4, mode="replicate"), kernel, groups=3)


class Judge(nn.Module):
    """[B, 3, 32, 32] in [0, 1] to logits over colours [B, 8] and shapes [B, 5]."""

    def __init__(self):
        super().__init__()
        layers = []
        for n_in, n_out, stride in ((3, 32, 1), (32, 64, 2), (64, 96, 2), (96, 128, 2)):
            layers += [nn.Conv2d(n_in, n_out, 3, stride, 1), nn.BatchNorm2d(n_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.color = nn.Linear(128 * 16, len(COLORS))
        self.shape = nn.Linear(128 * 16, len(SHAPES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.color(features), self.shape(features)


def right(judge: Judge, images: Tensor, colors: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [B] each: is the colour right, is the shape."""
    with torch.inference_mode():
        color, shape = judge(images)
    return color.argmax(1) == colors, shape.argmax(1) == shapes


def batch_of(source: Iterator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    pixels, scenes = zip(*itertools.islice(source, count))
    return torch.stack(pixels), *labels_of(scenes)


def train_judge() -> Judge:
    torch.manual_seed(0)
    judge, source = Judge(), renders(FRESH)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    for _ in tqdm(range(STEPS), desc="judge"):
        x, colors, shapes = batch_of(source, BATCH)
        x = blur(x, 0.3 + 0.7 * torch.rand(()).item())
        x = x + 0.05 * torch.rand(()) * torch.randn_like(x)
        color, shape = judge(x)
        loss = F.cross_entropy(color, colors) + F.cross_entropy(shape, shapes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def reliable_judge() -> Judge:
    """A trained judge, tried on renders that it has not seen. Stop where it is often wrong."""
    judge = train_judge()
    x, colors, shapes = batch_of(renders(2 * FRESH), 2000)
    for kind, images in (("sharp", x), ("blurred", blur(x, 0.7))):
        color, shape = right(judge, images, colors, shapes)
        accuracy = (color & shape).float().mean().item()
        print(f"judge: {accuracy:.2%} right on 2000 {kind} renders it has not seen")
        if accuracy < 0.99:
            raise Stop("a judge that is wrong this often measures nothing", 1)
    return judge


def open_run(run_dir: Path, prompts: int, candidates: int | None) -> Models:
    """A run's models, as `load_run` gives them. ValueError where they cannot be judged so."""
    run = load_run(run_dir)
    if run.dvae.config.factor * run.prior.config.grid != SIZE or run.about.get("data") != "toy":
        raise ValueError(f"expected a run on the toy world, of {SIZE} × {SIZE} pixels")
    if prompts < (least := 1 if candidates is None else 2):  # a deviation, or a covariance
        raise ValueError(f"--prompts is {prompts}; expected {least} or more")
    if candidates is not None:
        if candidates < 1 or candidates.bit_count() > 1:
            raise ValueError(f"--candidates is {candidates}; expected a power of 2")
        check_holds(run_dir, "clip.pt")
    return run


@torch.inference_mode()
def judge_dvae(judge: Judge, dvae, split: str) -> tuple[float, float, int]:
    """Of 512 pictures of a split through argmax tokens: mean PSNR in dB against the renders without
    sensor noise; the share of those of one object whose colour and shape are still right, as would
    be those of a prior that drew just their tokens; and the number of codes in use."""
    scenes = [toy_scene(index, split) for index in range(512)]
    clean = [render(scene, SIZE) for scene in scenes]
    noisy = [toy_world(index, SIZE, split)[0] for index in range(512)]
    noisy, clean = (images_to(CPU, torch.from_numpy(np.stack(x))) for x in (noisy, clean))
    tokens = dvae.encode(noisy)
    images = dvae.decode(tokens)
    psnr = -10 * torch.log10((images - clean).square().mean((1, 2, 3)))
    color, shape = right(judge, images, *labels_of(scenes))
    single = torch.tensor([len(scene.things) == 1 for scene in scenes])
    return psnr.mean().item(), (color & shape)[single].float().mean().item(), len(tokens.unique())


def prompts_of(split: str, count: int) -> tuple[list[str], Tensor, Tensor]:
    """Captions of `count` one-object scenes, and the colours and shapes [count] they name."""
    scenes = [scene for _, scene in itertools.islice(single_objects(split, 0), count)]
    return [scene.caption for scene in scenes], *labels_of(scenes)


@torch.inference_mode()
def judge_prompts(judge: Judge, run, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """One sample at temperature 1 for each of `count` one-object captions: whether the colour is
    right, and the shape, both bool [count]."""
    bpe, dvae, prior, *_ = run
    captions, colors, shapes = prompts_of(split, count)
    texts = torch.stack([encode_prompt(caption, bpe, prior) for caption in captions])
    grid = prior.config.grid
    uniforms = uniforms_of(seed, range(count), grid**2)
    tokens = fast.generate(prior, texts, uniforms=uniforms)
    images = dvae.decode(tokens.view(-1, grid, grid))
    return right(judge, images, colors, shapes)


def best_of(scores: Tensor, good: Tensor, n: int) -> Tensor:
    """Of `candidates` per prompt, scored and good or not, both [prompts, candidates]: the share of
    the disjoint groups of n whose best by score is good, [prompts]."""
    groups = scores.unflatten(1, (-1, n)).argmax(2, keepdim=True)
    return good.unflatten(1, (-1, n)).gather(2, groups).float().mean((1, 2))


@torch.inference_mode()
def draw_candidates(
    run, captions: list[str], candidates: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each caption the pictures [candidates, 3, H, W] and the reranker's scores of them."""
    bpe, dvae, prior, clip, _ = run
    grid = prior.config.grid
    together = max(1, 256 // candidates)  # captions drawn at once
    for first in tqdm(range(0, len(captions), together), desc="candidates"):
        some = captions[first : first + together]
        text = torch.stack([encode_prompt(caption, bpe, prior) for caption in some])
        seeds = [derive(seed, "prompt", first + k) for k in range(len(some))]
        uniforms = torch.cat([uniforms_of(s, range(candidates), grid**2) for s in seeds])
        tokens = fast.generate(prior, text.repeat_interleave(candidates, 0), uniforms=uniforms)
        for caption, of_one in zip(some, tokens.split(candidates)):
            images = dvae.decode(of_one.view(-1, grid, grid))
            embedding = clip.encode_text(clip.pad(bpe.encode(caption))[None])
            yield images, (clip.encode_image(images) @ embedding.T)[:, 0]


def judge_candidates(
    judge: Judge, run, split: str, count: int, candidates: int, seed: int
) -> tuple[Tensor, Tensor]:
    """`candidates` samples for each of `count` one-object captions: the reranker's scores, and
    whether colour and shape are right, bool, both [count, candidates]."""
    captions, colors, shapes = prompts_of(split, count)
    scores, good = [], []
    for k, (images, score) in enumerate(draw_candidates(run, captions, candidates, seed)):
        color, shape = right(judge, images, colors[k], shapes[k])
        good.append(color & shape)
        scores.append(score)
    return torch.stack(scores), torch.stack(good)


def rerank(judge: Judge, run, prompts: int, candidates: int, seed: int, axis) -> list[list[float]]:
    """Accuracy against the number N of candidates of which the best is taken, as in Fig. 9c, drawn
    on the axes. Rows of N and, in per cent of seen and then of unseen pairs, the share that is
    right, its standard error, and the share of which any of the N is."""
    sizes = [2**k for k in range(candidates.bit_length())]
    rows = [[n] for n in sizes]
    for kind, split, color in (("seen", "val", LINES[0]), ("unseen", "unseen", LINES[1])):
        scores, good = judge_candidates(judge, run, split, prompts, candidates, seed)
        for row, n in zip(rows, sizes):
            share, any_right = (100 * best_of(x, good, n) for x in (scores, good.float()))
            row += share.mean().item(), share.std().item() / prompts**0.5, any_right.mean().item()
        means, errors, possible = zip(*(row[-3:] for row in rows))
        axis.errorbar(sizes, means, errors, None, "o-", color=color, label=f"{kind} pairs")
        axis.plot(sizes, possible, color=color, **PALE)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, map(str, sizes))
    axis.set(title=f"{prompts} captions each; pale: any of N", xlabel="candidates N")
    axis.set_ylabel("colour and shape right, %")
    axis.legend()
    return rows


def main() -> None:
    parser = Parser(description="Measure a run on the toy world.")
    parser.add_argument("--run-dir", metavar="DIR", type=Path, help="default: the newest run")
    parser.add_argument("--prompts", type=int, default=200, help="of each kind (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples; default 0")
    parser.add_argument("--candidates", type=int, metavar="N", help="a power of 2, such as 64")
    parser.add_argument("-o", "--out", type=Path, default=Path("rerank.png"), metavar="FILE",
        help="the table of --candidates as a picture; default rerank.png")  # fmt: skip
    args = parser.parse_args()
    run_dir = args.run_dir or find_run()
    run = open_run(run_dir, args.prompts, args.candidates)
    if args.candidates is not None:
        check_output(args.out, ".png")
        figure, (axis,) = subplots(1)
    judge = reliable_judge()
    for split in ("val", "unseen"):
        psnr, share, codes = judge_dvae(judge, run.dvae, split)
        print(
            f"dVAE of {run_dir}: {psnr:.2f} dB on 512 {split} pictures, {codes} of "
            f"{run.dvae.config.vocab_size} codes in use, colour and shape still right {share:.1%}"
        )
    for kind, split in (("seen", "val"), ("unseen", "unseen")):
        color, shape = judge_prompts(judge, run, split, args.prompts, args.seed)
        color, shape, both = (x.float().mean().item() for x in (color, shape, color & shape))
        print(
            f"{args.prompts} one-object prompts of {kind} pairs, one sample each: "
            f"colour and shape right {both:.1%} (colour {color:.1%}, shape {shape:.1%})"
        )
    if args.candidates is not None:
        rows = rerank(judge, run, args.prompts, args.candidates, args.seed, axis)
        print("best of   seen pairs, any   unseen pairs, any   (colour and shape right, %)")
        for row in rows:
            print("{:>4}{:9.1f} ± {:3.1f}   {:5.1f}{:9.1f} ± {:3.1f}   {:5.1f}".format(*row))
        save(figure, args.out)
        print(f"{args.out}: accuracy against the number of candidates")


if __name__ == "__main__":
    start(main)
