"""
A caption becomes a picture (2.6): the prior draws image tokens, the dVAE's decoder paints them,
and a contrastive model chooses among the candidates.

    python sample.py "a red cube" "a blue sphere"                  two pictures, side by side
    python sample.py "a red cube" --candidates 64 --top 4          draw 64, keep the best 4 (2.6)
    python sample.py "a red cube" --image photo.png --keep-rows 3  continue a photo (3.3, G)

The PNG keeps how it was drawn, as JSON under the text key `dalle`. In Python:

    from sample import draw
    draw("a red cube")[0].show()
"""

import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bpe import BPE
from data.files import middle_square
from data.loader import derive, images_to, words_of
from data.sheets import sheet, to_images
from dvae import DVAE
from engine.checkpoint import DTYPES, load_run, write_picture
from engine.cli import Parser, Stop, check_output, newest_run, pick_device, start
from scale import fast
from transformer import Transformer, pad_text

SHIPPED = Path(__file__).resolve().parent / "pretrained/tiny"
GREY = 230  # of what is not drawn yet


def find_run() -> Path:
    """The newest directory under runs/ that holds all three files, else the shipped one."""
    return newest_run("prior.pt", "dvae.pt", "bpe.json") or SHIPPED


# ---- a caption becomes text tokens ---------------------------------------------------------------


def encode_prompt(prompt: str, bpe: BPE, prior: Transformer) -> Tensor:
    """The text part of the stream, long [T]. ValueError for an empty or too long prompt, or one
    with bytes that were no UTF-8."""
    if any("\ud800" <= c <= "\udfff" for c in prompt):  # what Python makes of such bytes
        raise ValueError(f"the prompt {prompt!r} holds bytes that are no UTF-8 text")
    ids, most = bpe.encode(prompt.strip()), prior.config.text_len - 1
    if not ids:
        raise ValueError('the prompt is empty: say what to draw, such as "a red cube"')
    if len(ids) > most:
        few = "shorten it, or use words of the training captions, which take fewer"
        raise ValueError(f"the prompt has {len(ids)} tokens, this model reads {most}: {few}")
    return pad_text(ids, prior.config.text_len, prior.config.text_vocab)


# ---- drawing (2.6) -------------------------------------------------------------------------------


def uniforms_of(seed: int, candidates: range, n: int) -> Tensor:
    """Uniforms [candidates, n] in [0, 1): a stream for each candidate, from its own number, so
    that a candidate is the same however many are drawn beside it."""
    rows = []
    for candidate in candidates:
        generator = torch.Generator().manual_seed(derive(int(seed), "candidate", candidate))
        rows.append(torch.rand(n, generator=generator))
    return torch.stack(rows)


@torch.inference_mode()
def draw(
    prompt: str | list[str],
    candidates: int = 1,
    run_dir: str | Path | None = None,
    top: int | None = None,
    watch: Callable[[list[Image.Image]], None] | None = None,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    image: str | Path | Image.Image | None = None,
    keep_rows: int | None = None,
    batch_size: int = 16,
    dtype: str = "fp32",
    device: str | None = None,
) -> list[Image.Image]:
    """Draw pictures of a prompt, or of each of several, one prompt after the other.

    candidates: drawn for each prompt; 512 in the paper (2.6). top: how many of them are kept, those
        with the largest cosines by clip.pt, best first; by default all, in the order drawn.
    watch(images) is called after each row of the grid with all candidates, grey where not drawn.
    temperature: 1 in the paper (2.6); 0 takes the likeliest token each time. top_k, top_p and
        guidance came later: see `Transformer.generate`.
    image, keep_rows: the picture to continue, and how many rows of its tokens are kept (3.3, G).
    batch_size: candidates drawn at once. dtype: of the prior's resblocks; 16 bits pay on GPUs only.

    Each image's .info holds its prompt, candidate and score (the cosine, or None), and options:
    draw(**options) draws the same again. Where a picture is continued, `continues` is that picture
    and what is kept of it. ValueError, before anything is drawn, for prompts that the model cannot
    read, files that are not there, numbers out of range. A warning names words that are not among
    the 100,000 most frequent of the captions that the BPE was trained on. Ctrl-C raises
    KeyboardInterrupt(the images as far as drawn).
    """
    options = {k: v for k, v in locals().items() if k not in ("watch", "device")}
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("there is no prompt to draw")
    for name in ("candidates", "batch_size"):
        if options[name] < 1:
            raise ValueError(f"{name} is {options[name]}; expected 1 or more")
    if top is not None and not 1 <= top <= candidates:
        raise ValueError(f"top is {top}; expected 1 to {candidates}, the candidates")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if (image is None) != (keep_rows is None):
        raise ValueError("image and keep_rows belong together: which picture, how much of it")
    device, run_dir = pick_device(device), Path(run_dir or find_run())
    bpe, dvae, prior, clip, about = load_run(run_dir, str(device), dtype)
    clip = clip if candidates > 1 else None  # one needs no choice
    if clip is None and candidates > 1 and top:
        script = f"python train_clip.py --run-dir {run_dir}"
        raise ValueError(f"{run_dir} holds no clip.pt, which chooses the top {top}: {script}")
    if guidance is not None and not (guidance >= 0 and about.get("caption_dropout")):
        raise ValueError(
            f"guidance is {guidance}; expected a number from 0 (1: none), and in {run_dir} a prior "
            "that saw empty captions: train_prior.py --caption-dropout 0.1"
        )

    text = torch.stack([encode_prompt(p, bpe, prior) for p in prompts]).to(device)  # [P, T]
    known = set(about.get("words", ()))  # those of the training captions
    unseen = dict.fromkeys(w for p in prompts for w in words_of(p) if known and w not in known)
    if unseen:
        warnings.warn(f"rare or never seen in training: {', '.join(unseen)}", stacklevel=3)
    P, C, grid = len(prompts), candidates, prior.config.grid
    prefix, info = text.new_empty(0), {"options": options}
    if image is not None:
        prefix, info["continues"] = top_rows(image, keep_rows, dvae, grid)
    if clip is not None:
        captions = torch.stack([clip.pad(bpe.encode(p.strip())) for p in prompts])
        captions = clip.encode_text(captions.to(device))  # [P, E], of length 1
    if run_dir.is_relative_to(Path.cwd()):
        run_dir = run_dir.relative_to(Path.cwd())
    options |= {"prompt": prompts, "run_dir": run_dir.as_posix()}

    uniforms = uniforms_of(seed, range(C), grid**2).to(device)  # [C, N]
    tokens = torch.full((P * C, grid**2), -1, device=device)  # −1: not drawn yet
    tokens[:, : len(prefix)] = prefix
    batches = torch.arange(P * C, device=device).split(batch_size)  # row = prompt · C + candidate
    images, stopped = [], False
    precision = torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32")
    total = len(batches) * (grid**2 - len(prefix))
    bar = tqdm(total=total, unit="token", disable=None, leave=False)

    def on_token(k: int, so_far: Tensor) -> None:
        """Token k of each row in `rows`, the batch of the loop below, is there."""
        tokens[rows, k - 1] = so_far[:, k - 1]
        bar.update()
        if watch is not None and k % grid == 0:
            begun = images + pictures(rows)
            blank = Image.new("RGB", begun[0].size, (GREY,) * 3)
            watch(begun + [blank] * (P * C - len(begun)))

    def pictures(rows: Tensor) -> list[Image.Image]:
        """Of these rows, as far as they are drawn, with the reranker's scores."""
        pixels = paint(dvae, tokens[rows].view(-1, grid, grid))
        found, scores = to_images(pixels), [None] * len(rows)
        if clip is not None and tokens[rows].min() >= 0:
            scores = (clip.encode_image(pixels) * captions[rows // C]).sum(1).tolist()  # cosines
        for row, x, score in zip(rows.tolist(), found, scores):
            x.info = info | {"prompt": prompts[row // C], "candidate": row % C, "score": score}
        return found

    try:
        for rows in batches:  # (2.6)
            of_prompt, kept = text[rows // C], prefix.expand(len(rows), -1)
            with precision:
                fast.generate(
                    prior, of_prompt, kept, uniforms[rows % C],
                    temperature, top_k, top_p, guidance, on_token,
                )  # fmt: skip
            images += pictures(rows)
    except KeyboardInterrupt:
        stopped = True
        # the batch under way has begun and is not among the images yet
        if len(images) == rows[0] and tokens[rows[0], len(prefix)] >= 0:
            images += pictures(rows)
    finally:
        bar.close()
    if top is not None:
        groups = [images[k : k + C] for k in range(0, len(images), C)]
        images = [x for group in groups for x in best(group, top)]
    if stopped:
        raise KeyboardInterrupt(images)
    return images


def best(candidates: list[Image.Image], top: int) -> list[Image.Image]:
    """The candidates that fit their caption best, the largest cosine first (2.6): in the paper the
    best of 512. What is unfinished comes last."""

    def score(x: Image.Image) -> float:
        return -math.inf if x.info["score"] is None else x.info["score"]

    return sorted(candidates, key=score, reverse=True)[:top]


def paint(dvae: DVAE, tokens: Tensor) -> Tensor:
    """The pictures [B, 3, H, W] of tokens [B, h, w], grey where these are −1."""
    there, f = (tokens >= 0)[:, None], dvae.config.factor
    there = there.repeat_interleave(f, 2).repeat_interleave(f, 3)
    return dvae.decode(tokens.clamp(min=0)).where(there, GREY / 255)


# ---- continuing a picture (3.3, G) ---------------------------------------------------------------


def top_rows(
    image: str | Path | Image.Image, keep_rows: int, dvae: DVAE, grid: int
) -> tuple[Tensor, list[Image.Image]]:
    """The tokens [keep_rows · grid] of the top of a picture, 15 of 32 rows in G; and to look at,
    the picture and what is kept of it. ValueError for one that cannot be read."""
    if not 0 < keep_rows < grid:
        raise ValueError(f"keep_rows is {keep_rows}; expected 1 to {grid - 1} token rows")
    original = middle_square(image, grid * dvae.config.factor, grid)
    device = next(dvae.parameters()).device
    tokens = dvae.encode(images_to(device, torch.from_numpy(np.array(original))[None]))
    kept = dvae.decode(tokens)
    kept[:, :, keep_rows * dvae.config.factor :] = GREY / 255
    return tokens[0, :keep_rows].flatten(), [original, *to_images(kept)]


# ---- python sample.py ----------------------------------------------------------------------------


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help='what to draw, such as "a red cube"')
    add("--prompts", metavar="FILE", type=Path, help="more prompts, one in each line")
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
    add("--gif", metavar="FILE", type=Path, help="show how the pictures appear, row by row")
    add("--batch-size", metavar="N", type=int, default=16, help="candidates drawn at once")
    add("--device", help="cuda, mps or cpu; default: the best one there")
    add("--dtype", choices=DTYPES, default="fp32", help="of the resblocks; 16 bits on GPUs only")
    add("-o", "--out", metavar="FILE", type=Path, default="sample.png", help="default sample.png")
    add("--run-dir", metavar="DIR", type=Path, help="default: the newest run, else the shipped one")
    return parser


def parse(argv: list[str] | None = None) -> dict:
    """The command line: what `draw` is to be given, and `out` and `gif`."""
    args = vars(make_parser().parse_intermixed_args(argv))
    if file := args.pop("prompts"):
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {file} is no UTF-8 text ({error})") from error
        args["prompt"] += [line.strip() for line in lines if line.strip()]
    if not args["prompt"]:
        raise ValueError('there is no prompt: say what to draw, such as "a red cube"')
    return args


def page(images: list[Image.Image], each: int, prompts: int, captioned: bool) -> Image.Image:
    """`each` pictures of each prompt on a sheet, a row for a prompt, first the picture that it
    continues. A near-square where nothing is continued and there is one prompt or one picture of
    each, and where a side would be above 32 pictures, for which WebP has no room."""
    before = images[0].info.get("continues", [])
    rows = [before + images[k : k + each] for k in range(0, len(images), each)]
    cells, captions = sum(rows, []), []
    for x in cells if captioned else ():
        score, prompt = x.info.get("score"), x.info.get("prompt", "")
        caption = "" if score is None else f"{score:.3f} "
        captions.append(caption + prompt if prompts > 1 else caption)
    in_rows = (before or min(prompts, each) > 1) and max(len(rows), len(rows[0])) <= 32
    return sheet(cells, captions, len(rows[0]) if in_rows else math.ceil(len(cells) ** 0.5))


def main() -> None:
    warnings.showwarning = lambda message, *_: print(f"sample.py: {message}", file=sys.stderr)
    args = parse()
    out, gif, prompts, each = args.pop("out"), args.pop("gif"), args["prompt"], args["candidates"]
    check_output(out)
    if gif:
        check_output(gif, ".gif")
        if (count := len(prompts) * each) > 128:
            raise ValueError(f"--gif would show {count} pictures in each frame; expected up to 128")
    if args["dtype"] != "fp32" and pick_device(args["device"]).type == "cpu":
        raise ValueError(f"--dtype {args['dtype']} is for GPUs; on a CPU fp32 is faster: leave it")
    args["run_dir"] = args["run_dir"] or find_run()
    print(f"drawing from {args['run_dir']}")

    frames, stopped = [], False

    def watch(images: list[Image.Image]) -> None:
        frames.append(page(images, each, len(prompts), captioned=False))

    try:
        images = draw(**args, watch=watch if gif else None)
    except KeyboardInterrupt as stop:
        images, stopped = stop.args[0] if stop.args else [], True
        if not images:
            raise
    pictures = [{k: x.info[k] for k in ("prompt", "candidate", "score")} for x in images]
    record = {"options": images[0].info["options"], "pictures": pictures}
    whole = page(images, args["top"] or each, len(prompts), captioned=True)
    write_picture(out, whole, json.dumps(record, default=str))
    if frames:
        times = [150] * (len(frames) - 1) + [2000]  # ms
        film = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
        write_picture(gif, frames[0], **film)
    if stopped:
        raise Stop(f"stopped; {out} keeps what was drawn", 130)
    kept = f", the best {args['top']} of {each} kept" if args["top"] else ""
    print(f"{out}: {len(prompts) * each} drawn with seed {args['seed']}{kept}")


if __name__ == "__main__":
    start(main)
