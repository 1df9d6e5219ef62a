"""
A caption becomes a picture (2.6): the prior draws image tokens, the dVAE's decoder paints them,
and a contrastive model chooses among the candidates.

    python sample.py "a red cube"
    python sample.py "a red cube above a blue sphere" --candidates 64 --top 4 -o cubes.png

Takes the model of --run-dir; by default of the newest run that holds all three of bpe.json,
dvae.pt and prior.pt, else the one shipped in pretrained/tiny. In Python:

    from sample import draw
    draw("a red cube")[0].show()

A PNG keeps under the text key `dalle` a JSON object: the run, the options, and for each picture
its prompt, the number of its candidate and its score. `--repeat FILE` draws it again from that.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bpe import BPE
from clip import CLIP, CLIPConfig
from data.files import middle_square
from data.loader import derive, images_to
from data.sheets import sheet, terminal, to_images
from dvae import DVAE, DVAEConfig
from engine.checkpoint import load, load_model, write_picture
from engine.cli import Stop, check_output, newest_run, pick_device, start
from scale import fast
from transformer import Transformer, TransformerConfig, pad_text

FILES = ("bpe.json", "dvae.pt", "prior.pt")
SHIPPED = Path(__file__).resolve().parent / "pretrained/tiny"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLANK = 0.9  # the grey of what is not drawn yet


# ---- the models of a run -------------------------------------------------------------------------


def find_run() -> Path:
    """The newest directory under runs/ that holds all three files, else the shipped one."""
    return newest_run("prior.pt", "dvae.pt", "bpe.json") or SHIPPED


@lru_cache(maxsize=1)
def load_run(run_dir: Path, device: str, dtype: str = "fp32") -> tuple[BPE, DVAE, Transformer]:
    """The three models of a run, the matrices of the prior's resblocks in `dtype`: for autocast to
    it, under which gains, biases, embeddings and logits stay in 32 bits (D.2). ValueError where a
    file is missing or they do not fit."""
    for name, script in zip(FILES, ("train_prior.py", "train_dvae.py", "train_prior.py")):
        if not (run_dir / name).is_file():
            raise ValueError(
                f"{run_dir} holds no {name}; train it with: python {script} --run-dir {run_dir}"
            )
    bpe = BPE.load(run_dir / "bpe.json")
    dvae = load_model(run_dir / "dvae.pt", DVAE, DVAEConfig).to(device)
    prior = load_model(run_dir / "prior.pt", Transformer, TransformerConfig)
    for p in prior.blocks.parameters():
        if p.ndim == 2:
            p.data = p.data.to(DTYPES[dtype])
    prior.to(device)
    if (prior.config.text_vocab, prior.config.image_vocab) != (
        bpe.vocab_size,
        dvae.config.vocab_size,
    ):
        raise ValueError(
            f"the files in {run_dir} are not of one run: prior.pt has {prior.config.text_vocab} "
            f"text and {prior.config.image_vocab} image tokens, bpe.json {bpe.vocab_size}, "
            f"dvae.pt {dvae.config.vocab_size}"
        )
    return bpe, dvae, prior


@lru_cache(maxsize=1)
def load_reranker(run_dir: Path, device: str) -> CLIP | None:
    """The contrastive model of a run, or None where it has none. ValueError for one of another."""
    path = run_dir / "clip.pt"
    if not path.is_file():
        return None
    clip, vocab = load_model(path, CLIP, CLIPConfig), BPE.load(run_dir / "bpe.json").vocab_size
    if clip.config.text_vocab != vocab:
        raise ValueError(
            f"the files in {run_dir} are not of one run: clip.pt has {clip.config.text_vocab} text "
            f"tokens, bpe.json {vocab}"
        )
    return clip.to(device)


def encode_prompt(prompt: str, bpe: BPE, prior: Transformer) -> Tensor:
    """The text part of the stream, long [T]. ValueError for an empty or too long prompt, or one
    with bytes that were no UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the prompt {prompt!r} holds bytes that are no UTF-8 text") from None
    ids, most = bpe.encode(prompt.strip()), prior.config.text_len - 1
    if not ids:
        raise ValueError('the prompt is empty: say what to draw, such as "a red cube"')
    if len(ids) > most:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and this model reads {most}: shorten it, or use "
            "words that the model was trained on, which take fewer tokens"
        )
    return pad_text(ids, prior.config.text_len, prior.config.text_vocab)


def similarity(clip: CLIP, bpe: BPE, prompts: list[str], images: Tensor) -> Tensor:
    """How well images [B, 3, H, W] fit each prompt, by the reranker: cosines [prompts, B]."""
    texts = torch.stack([clip.pad(bpe.encode(prompt.strip())) for prompt in prompts])
    return clip.encode_text(texts.to(images.device)) @ clip.encode_image(images).T


# ---- drawing (2.6) -------------------------------------------------------------------------------


def draws(seed: int, candidates: range, n: int) -> Tensor:
    """Uniforms [candidates, n] in [0, 1): a stream for each candidate, from its own number, so
    that a candidate is the same however many are drawn beside it."""
    rows = []
    for candidate in candidates:
        generator = torch.Generator().manual_seed(derive(seed, "candidate", candidate))
        rows.append(torch.rand(n, generator=generator))
    return torch.stack(rows)


class Picture(NamedTuple):
    prompt: str
    candidate: int
    image: Image.Image
    score: float | None  # the reranker's cosine; None without one, or where it is not finished


@dataclass
class Drawing:
    """Candidates for some prompts: what is asked for, checked, and as far as it is drawn.

    ValueError for prompts the model cannot read, a run without its files, a picture that cannot
    be read, numbers out of range: before anything is drawn.
    """

    prompts: list[str]
    candidates: int = 1  # drawn for each prompt; 512 in the paper (2.6)
    run_dir: str | Path | None = None  # the newest run by default
    top: int | None = None  # kept of them, best first; by default all, in the order of their number
    seed: int = 0
    temperature: float = 1.0  # (2.6); 0 takes the likeliest token each time
    # beyond the paper, all three:
    top_k: int | None = None  # draw among the k likeliest tokens
    top_p: float | None = None  # draw among the likeliest that hold this probability together
    guidance: float | None = None  # the factor by which the caption's say is extrapolated
    image: str | Path | Image.Image | None = None  # the picture to continue (3.3, G)
    keep_rows: int | None = None  # token rows of it that are kept; the top 15 of 32 in G
    batch_size: int = 16  # candidates at once
    dtype: str = "fp32"  # of the prior's resblocks; bf16 and fp16 on a GPU
    device: str | None = None  # the best one by default

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there is no prompt to draw")
        for name in ("candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.top is not None and not 1 <= self.top <= self.candidates:
            raise ValueError(f"top is {self.top}; expected 1 to {self.candidates}, the candidates")
        if (self.image is None) != (self.keep_rows is None):
            raise ValueError("image and keep_rows belong together: which picture, how much of it")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype} is unknown; expected one of {', '.join(DTYPES)}")
        device = pick_device(self.device)
        if self.dtype != "fp32" and device.type == "cpu":
            raise ValueError(f"dtype {self.dtype} is for GPUs; on a CPU fp32 is faster: leave it")
        self.run_dir = Path(self.run_dir or find_run())
        if self.guidance is not None:
            if not 0 <= self.guidance < math.inf:
                raise ValueError(f"guidance is {self.guidance}; expected a number from 0 (1: none)")
            if not load(self.run_dir / "prior.pt").get("caption_dropout"):
                raise ValueError(
                    f"guidance needs a prior that saw empty captions, and that of {self.run_dir} "
                    "did not: train one with train_prior.py --caption-dropout 0.1"
                )
        self.bpe, self.dvae, self.prior = load_run(self.run_dir, str(device), self.dtype)
        self.texts = torch.stack([encode_prompt(p, self.bpe, self.prior) for p in self.prompts])
        self.texts = self.texts.to(device)
        self.clip = load_reranker(self.run_dir, str(device)) if self.candidates > 1 else None
        if self.clip is None and self.top not in (None, self.candidates):
            raise ValueError(
                f"{self.run_dir} holds no clip.pt, which chooses the top {self.top} of "
                f"{self.candidates}: python train_clip.py --run-dir {self.run_dir}"
            )
        P, C, grid = len(self.prompts), self.candidates, self.prior.config.grid
        self.tokens = torch.full((P, C, grid**2), -1, device=device)  # −1: not drawn yet
        size = self.dvae.config.factor * grid
        self.blank = Image.new("RGB", (size, size), (round(255 * BLANK),) * 3)
        self.images = [[self.blank] * C for _ in range(P)]
        self.scores: list[list[float | None]] = [[None] * C for _ in range(P)]
        self.originals, self.prefix = [], self.texts.new_empty(0)
        if self.image is not None:
            self.keep(grid)

    @torch.inference_mode()
    def keep(self, grid: int) -> None:
        """Read the picture to continue, and the tokens of its top rows (3.3, G)."""
        if not 0 < self.keep_rows < grid:
            raise ValueError(f"keep_rows is {self.keep_rows}; expected 1 to {grid - 1} token rows")
        original = middle_square(self.image, self.dvae.config.factor * grid, grid)
        pixels = images_to(self.texts.device, torch.from_numpy(np.array(original))[None])
        tokens = self.dvae.encode(pixels).flatten(1)
        seen = self.dvae.decode(tokens.view(-1, grid, grid))  # as the dVAE sees it
        seen[:, :, self.keep_rows * self.dvae.config.factor :] = BLANK
        self.prefix = tokens[0, : self.keep_rows * grid]
        self.originals = [original, *to_images(seen)]

    def batches(self) -> list[tuple[range, range]]:
        """(prompts, candidates) of each batch: as many whole prompts as fit, or a part of one, so
        that every prompt of a batch has as many rows and the model can keep its keys once."""
        P, C, B = len(self.prompts), self.candidates, self.batch_size
        if C <= B:
            return [(range(p, min(p + B // C, P)), range(C)) for p in range(0, P, B // C)]
        parts = [range(c, min(c + B, C)) for c in range(0, C, B)]
        return [(range(p, p + 1), part) for p in range(P) for part in parts]

    @torch.inference_mode()
    def draw(self, progress: bool = False, watch: Callable[[], None] | None = None) -> None:
        """Draw everything. `watch` is called after each row of the grid. What there is when it is
        interrupted stays."""
        grid, n = self.prior.config.grid, len(self.prefix)
        batches, is_16_bit = self.batches(), self.dtype != "fp32"
        total = len(batches) * (grid**2 - n)
        with tqdm(total=total, unit="token", disable=not progress, leave=False, delay=0.5) as bar:
            for prompts, candidates in batches:
                P, C = len(prompts), len(candidates)
                here = self.tokens[prompts.start : prompts.stop, candidates.start : candidates.stop]

                def seen(k: int, tokens: Tensor, batch=(prompts, candidates), here=here) -> None:
                    here[..., :k] = tokens[:, :k].view(*here.shape[:2], k)
                    bar.update()
                    if watch is not None and k % grid == 0:
                        with torch.autocast(here.device.type, enabled=False):
                            self.paint(*batch)
                        watch()

                try:
                    with torch.autocast(here.device.type, DTYPES[self.dtype], enabled=is_16_bit):
                        fast.generate(
                            self.prior,
                            self.texts[prompts.start : prompts.stop].repeat_interleave(C, 0),
                            self.prefix.expand(P * C, -1),
                            draws(self.seed, candidates, grid**2).to(here.device).repeat(P, 1),
                            temperature=self.temperature,
                            top_k=self.top_k,
                            top_p=self.top_p,
                            guidance=self.guidance,
                            progress=seen,
                        )
                finally:
                    self.paint(prompts, candidates)

    def paint(self, prompts: range, candidates: range) -> None:
        """Decode these candidates as far as they are drawn, and score those that are finished."""
        grid, f = self.prior.config.grid, self.dvae.config.factor
        for p in prompts:
            tokens = self.tokens[p, candidates.start : candidates.stop]
            if tokens[0, len(self.prefix)] < 0:
                continue
            tokens = tokens.view(-1, grid, grid)
            missing = (tokens < 0)[:, None].repeat_interleave(f, 2).repeat_interleave(f, 3)
            pixels = self.dvae.decode(tokens.clamp(min=0)).masked_fill(missing, BLANK)
            self.images[p][candidates.start : candidates.stop] = to_images(pixels)
            if self.clip is not None and not missing.any():
                scores = similarity(self.clip, self.bpe, [self.prompts[p]], pixels)[0].tolist()
                self.scores[p][candidates.start : candidates.stop] = scores

    def pictures(self, top: int | None = None, undrawn: bool = False) -> list[list[Picture]]:
        """What is drawn for each prompt: the `top` with the best scores, best first, or all; with
        `undrawn` also what is not, in grey, and no scores: a sheet of them keeps its size."""
        rows = []
        for prompt, images, scores in zip(self.prompts, self.images, self.scores):
            scores = [None] * len(images) if undrawn else scores
            found = zip([prompt] * len(images), range(len(images)), images, scores)
            row = [Picture(*x) for x in found if undrawn or x[2] is not self.blank]
            if top is not None and self.clip is not None:
                row.sort(key=lambda x: math.inf if x.score is None else -x.score)
                row = row[:top]
            rows.append(row)
        return rows

    def sheet(self, rows: list[list[Picture]]) -> Image.Image:
        """The pictures as one, captions below them where there are several, and scores: a row for
        each prompt, or a near-square where there is one prompt or one picture of each."""
        table = []
        for prompt, row in zip(self.prompts, rows):
            labels = ["" if x.score is None else f"{x.score:.3f}" for x in row]
            cells = [(picture.image, label) for picture, label in zip(row, labels)]
            if self.originals:
                cells = [*zip(self.originals, (prompt, f"the top {self.keep_rows} rows")), *cells]
            elif row and len(rows) > 1:
                cells[0] = (row[0].image, f"{labels[0]} {prompt}")
            table.append(cells)
        width = max(map(len, table))
        if not self.originals and 1 in (len(table), width):
            cells = sum(table, [])
            return sheet(*zip(*cells), round(len(cells) ** 0.5 + 0.49))
        nothing = (Image.new("RGB", self.blank.size, "white"), "")
        cells = sum((row + [nothing] * (width - len(row)) for row in table), [])
        return sheet(*zip(*cells), width)

    def record(self, pictures: list[Picture]) -> str:
        """What a PNG keeps: JSON of the run, the options and the pictures."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        options["run_dir"] = os.path.relpath(self.run_dir)
        if self.image is not None:
            options["image"] = "" if isinstance(self.image, Image.Image) else str(self.image)
        shown = [{"prompt": x.prompt, "candidate": x.candidate, "score": x.score} for x in pictures]
        return json.dumps({"options": options, "pictures": shown})


def draw(
    prompt: str | list[str],
    candidates: int = 1,
    run_dir: str | Path | None = None,
    progress: bool = False,
    **options,
) -> list[Image.Image]:
    """Draw pictures of a prompt, or of each of several: PIL images of the size the model was
    trained on, `candidates` of each, or the `top` of them. Their .info["dalle"] tells, as JSON,
    how to draw them again.

    options: see the fields of Drawing, such as seed=1, top=4, image="cat.png", keep_rows=4.
    ValueError for a prompt the model cannot read, a run without its files, numbers out of range.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    drawing = Drawing(prompts, candidates, run_dir, **options)
    drawing.draw(progress)
    pictures = sum(drawing.pictures(drawing.top), [])
    for picture in pictures:
        picture.image.info["dalle"] = drawing.record([picture])
    return [picture.image for picture in pictures]


# ---- the other way: captions for a picture -------------------------------------------------------


class Description(NamedTuple):
    caption: str
    image: float  # ln p(image tokens | caption) in nats per token
    text: float  # ln p(caption) in nats per token, pads included as in the loss (2.2)
    cosine: float | None  # by the reranker, where the run has one


@torch.inference_mode()
def describe(
    captions: list[str],
    image: str | Path | Image.Image,
    run_dir: str | Path | None = None,
    batch_size: int = 16,
    device: str | None = None,
) -> list[Description]:
    """How likely a picture is under each caption, the likeliest first. ValueErrors as in draw."""
    if not captions:
        raise ValueError("there is no caption to score")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    run_dir, device = Path(run_dir or find_run()), pick_device(device)
    bpe, dvae, prior = load_run(run_dir, str(device))
    clip = load_reranker(run_dir, str(device))
    texts = torch.stack([encode_prompt(c, bpe, prior) for c in captions]).to(device)
    grid = prior.config.grid
    square = np.array(middle_square(image, dvae.config.factor * grid, grid))
    pixels = images_to(device, torch.from_numpy(square)[None])
    tokens = dvae.encode(pixels).flatten(1)

    def mean_log_prob(logits: Tensor, targets: Tensor) -> list[float]:
        chosen = logits.log_softmax(-1).gather(-1, targets[..., None])
        return chosen[..., 0].mean(1).tolist()

    image_scores, text_scores = [], []
    for batch in texts.split(batch_size):
        text_logits, image_logits = prior(batch, tokens.expand(len(batch), -1))
        image_scores += mean_log_prob(image_logits, tokens.expand(len(batch), -1))
        text_scores += mean_log_prob(text_logits, batch[:, 1:])
    cosines = [None] * len(texts)
    if clip is not None:
        cosines = similarity(clip, bpe, captions, pixels)[:, 0].tolist()
    found = map(Description, captions, image_scores, text_scores, cosines)
    return sorted(found, key=lambda description: -description.image)


# ---- python sample.py ----------------------------------------------------------------------------


def fail(message: str, code: int = 2) -> None:
    raise Stop(message, code)


EXAMPLES = """examples:
  sample.py "a red cube" "a blue sphere"                      two pictures, side by side
  sample.py "a red cube" --candidates 64 --top 4              draw 64, keep the best 4 (2.6)
  sample.py --prompts captions.txt --each -o out.png          also out-00.png, out-01.png, …
  sample.py "a red cube" --image photo.png --keep-rows 3      continue a photo (3.3)
  sample.py "a red cube" --watch --gif cube.gif --preview     see it being drawn
  sample.py "a red cube" "a blue cube" --describe photo.png   which caption fits?
  sample.py --repeat out.png -o again.png                     the same once more
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Draw pictures of captions.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail
    add = parser.add_argument
    add("prompt", nargs="*", help='what to draw, such as "a red cube"')
    add("--prompts", metavar="FILE", type=Path, help="more prompts, one in each line")
    add("--run-dir", metavar="DIR", help="default: the newest run, else the shipped one")
    add("-o", "--out", metavar="FILE", type=Path, default=Path("sample.png"))
    add("--each", action="store_true", help="also every picture by itself, in its own size")

    group = parser.add_argument_group("drawing")
    add = group.add_argument
    add("--candidates", metavar="N", type=int, default=1, help="drawn for each prompt")
    add("--top", metavar="K", type=int, help="keep the K that clip.pt likes best, best first")
    add("--seed", type=int, default=0, help="the same seed gives the same pictures")
    add("--temperature", type=float, default=1.0, help="default: 1 (2.6); 0: the likeliest")
    add("--top-k", metavar="N", type=int, help="draw among the N likeliest tokens")
    add("--top-p", metavar="P", type=float, help="draw among the likeliest, to this probability")
    add("--guidance", metavar="S", type=float, help="follow the caption S times as much; later "
        "than the paper; for a prior trained with --caption-dropout")  # fmt: skip
    add("--image", metavar="FILE", type=Path, help="continue this picture (3.3, G) …")
    add("--keep-rows", metavar="R", type=int, help="… below its top R rows of tokens")
    add("--batch-size", metavar="N", type=int, default=16, help="candidates drawn at once")
    add("--device", help="cuda, mps or cpu; default: the best one there")
    add("--dtype", choices=DTYPES, default="fp32", help="of the resblocks; 16 bits on GPUs only")
    add("--repeat", metavar="FILE", type=Path, help="a PNG drawn before, with its own options")

    group = parser.add_argument_group("looking")
    add = group.add_argument
    add("--watch", action="store_true", help="rewrite --out as rows of the pictures appear")
    add("--gif", metavar="FILE", type=Path, help="keep that as an animation")
    add("--preview", action="store_true", help="show the pictures in a 24-bit-colour terminal")
    add("--describe", metavar="FILE", type=Path, help="draw nothing: how likely is this picture "
        "under each prompt, in nats per token, and what is its cosine by clip.pt?")  # fmt: skip
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, or that of the picture to repeat. ValueError for contradictions."""
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    own = {"out", "each", "watch", "gif", "preview", "device"}
    kept = {"describe": {"prompt", "prompts", "run_dir", "batch_size", "device"}, "repeat": own}
    for mode, allowed in kept.items():
        for name, value in vars(args).items() if getattr(args, mode) else ():
            if value != parser.get_default(name) and name not in allowed | {mode} and value != []:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"--{mode} FILE and {option} exclude each other: leave one out")
    if args.repeat:
        repeated = parser.parse_args(recall(args.repeat))
        args = argparse.Namespace(**vars(repeated) | {name: getattr(args, name) for name in own})
    if args.prompts:
        try:
            lines = args.prompts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {args.prompts} is no UTF-8 text ({error})") from error
        args.prompt += [line.strip() for line in lines if line.strip()]
    if not args.prompt:
        raise ValueError('there is no prompt: say what to draw, such as "a red cube"')
    return args


def recall(path: Path) -> list[str]:
    """The command line that a PNG was drawn with. ValueError where it keeps none."""
    options = [field.name for field in fields(Drawing) if field.name not in ("prompts", "device")]
    try:
        with Image.open(path) as file:
            found = json.loads(file.text["dalle"])["options"]
        argv = [f"--{o.replace('_', '-')}={found[o]}" for o in options if found[o] is not None]
        return [*argv, "--", *map(str, found["prompts"])]
    except Exception as error:  # whatever a foreign file makes Pillow raise
        reason = getattr(error, "strerror", None) or repr(error)
        raise ValueError(f"{path} is not a PNG that sample.py has drawn ({reason})") from error


def paint_all(args: argparse.Namespace) -> None:
    """Draw what the command line asks for, write the pictures, and say what they are."""
    check_output(args.out)
    if args.gif:
        check_output(args.gif, ".gif")
    kept = len(args.prompt) * (args.top or args.candidates) if args.each else 0
    parts = [args.out.with_name(f"{args.out.stem}-{k:02}{args.out.suffix}") for k in range(kept)]
    for path in parts:
        if path.exists():
            check_output(path)
    names = {field.name for field in fields(Drawing)} - {"prompts"}
    options = {name: value for name, value in vars(args).items() if name in names}
    drawing, frames, stopped = Drawing(args.prompt, **options), [], False
    print(f"drawing from {drawing.run_dir}")

    def watch() -> None:
        sheet = drawing.sheet(drawing.pictures(undrawn=True))
        if args.watch:
            write_picture(args.out, sheet)
        if args.gif:
            frames.append(sheet)

    try:
        drawing.draw(True, watch if args.watch or args.gif else None)
    except KeyboardInterrupt:
        stopped = True
    rows = drawing.pictures(args.top)
    pictures = sum(rows, [])
    if not pictures:
        raise KeyboardInterrupt
    write_picture(args.out, drawing.sheet(rows), drawing.record(pictures))
    for path, picture in zip(parts, pictures):
        write_picture(path, picture.image, drawing.record([picture]))
    if frames:
        times = [150] * (len(frames) - 1) + [2000]  # ms
        film = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
        write_picture(args.gif, frames[0], **film)
    if args.preview:
        cells = [(picture.image, "") for picture in pictures]
        small = sheet(*zip(*cells), min(4, len(cells)))
        print(terminal(small, shutil.get_terminal_size().columns))
    for picture in pictures if drawing.clip else ():
        score = "unfinished" if picture.score is None else f"{picture.score:.3f}"
        print(f"{picture.prompt!r}, candidate {picture.candidate}: {score}")
    if stopped:
        fail(f"stopped; {args.out} keeps what was drawn", 130)
    named = repr(args.prompt[0]) if len(rows) == 1 else f"{len(rows)} prompts"
    kept = "" if args.top is None else f", the best {args.top} of {args.candidates} kept"
    drawn = len(rows) * args.candidates
    print(f"{args.out}: {named}, {drawn} drawn with seed {args.seed}{kept}")


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a character
    try:
        args = parse(sys.argv[1:])
        if not args.describe:
            return paint_all(args)
        found = describe(args.prompt, args.describe, args.run_dir, args.batch_size, args.device)
        print("image|caption  caption  cosine  (nats per token, the likeliest first)")
        for caption, image, text, cosine in found:
            cosine = "–" if cosine is None else f"{cosine:.3f}"
            print(f"{image:13.3f}  {text:7.3f}  {cosine:>6}  {caption}")
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped", 130)
    except torch.OutOfMemoryError:
        fail(f"out of memory with --batch-size {args.batch_size}: try {args.batch_size // 2 or 1}")


if __name__ == "__main__":
    start(main)
