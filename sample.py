"""
A caption becomes a picture (2.6): the prior draws image tokens, the dVAE's decoder paints them.

    python sample.py "a red cube"
    python sample.py "a red cube above a blue sphere" --candidates 8 -o cubes.png

Takes the model of --run-dir; by default of the newest run that holds all three of bpe.json,
dvae.pt and prior.pt, else the one shipped in pretrained/tiny. In Python:

    from sample import draw
    draw("a red cube")[0].show()
"""

import argparse
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from bpe import BPE
from dvae import DVAE, load_dvae
from training import derive, fail, newest_run, pick_device
from transformer import Transformer, load_transformer, pad_text

FILES = ("bpe.json", "dvae.pt", "prior.pt")
SHIPPED = Path(__file__).resolve().parent / "pretrained/tiny"


def find_run() -> Path:
    """The newest directory under runs/ that holds all three files, else the shipped one."""
    return newest_run("prior.pt", "dvae.pt", "bpe.json") or SHIPPED


@lru_cache(maxsize=1)
def load_run(run_dir: Path, device: str) -> tuple[BPE, DVAE, Transformer]:
    """The three models of a run. ValueError where a file is missing or they do not fit."""
    for name, script in zip(FILES, ("train_prior.py", "train_dvae.py", "train_prior.py")):
        if not (run_dir / name).is_file():
            raise ValueError(
                f"{run_dir} holds no {name}; train it with: python {script} --run-dir {run_dir}"
            )
    bpe = BPE.load(run_dir / "bpe.json")
    dvae = load_dvae(run_dir / "dvae.pt").to(device)
    prior = load_transformer(run_dir / "prior.pt").to(device)
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


def encode_prompt(prompt: str, bpe: BPE, prior: Transformer) -> torch.Tensor:
    """The text part of the stream, long [T]. ValueError for an empty or too long prompt."""
    ids, most = bpe.encode(prompt.strip()), prior.config.text_len - 1
    if not ids:
        raise ValueError('the prompt is empty: say what to draw, such as "a red cube"')
    if len(ids) > most:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and this model reads {most}: shorten it, or use "
            "words that the model was trained on, which take fewer tokens"
        )
    return pad_text(ids, prior.config.text_len, prior.config.text_vocab)


def draws(seed: int, candidates: range, n: int) -> torch.Tensor:
    """Uniforms [candidates, n] in [0, 1): a stream for each candidate, from its own number, so
    that a candidate is the same however many are drawn beside it."""
    rows = []
    for candidate in candidates:
        generator = torch.Generator().manual_seed(derive(seed, "candidate", candidate))
        rows.append(torch.rand(n, generator=generator))
    return torch.stack(rows)


@torch.inference_mode()
def draw(
    prompt: str,
    candidates: int = 1,
    run_dir: str | Path | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 16,
    device: str | None = None,
    progress: bool = False,
) -> list[Image.Image]:
    """Draw `candidates` pictures of a prompt, PIL images of the size the model was trained on.

    ValueError for a prompt the model cannot read, a run without its files, numbers out of range.
    """
    if candidates < 1 or batch_size < 1:
        raise ValueError(f"candidates and batch_size are {candidates}, {batch_size}; expected >= 1")
    bpe, dvae, prior = load_run(Path(run_dir or find_run()), str(pick_device(device)))
    text = encode_prompt(prompt, bpe, prior).to(prior.text_token.weight.device)
    grid = prior.config.grid
    images = []
    batches = [
        range(first, min(first + batch_size, candidates))
        for first in range(0, candidates, batch_size)
    ]
    total = len(batches) * grid**2
    with tqdm(total=total, unit="token", disable=not progress, leave=False, delay=0.5) as bar:
        for batch in batches:
            tokens = prior.generate(
                text.expand(len(batch), -1),
                uniforms=draws(seed, batch, grid**2).to(text.device),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                progress=lambda *_: bar.update(),
            )
            pixels = dvae.decode(tokens.view(-1, grid, grid)).mul(255).round().to(torch.uint8)
            images += [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).cpu().numpy()]
    return images


def contact_sheet(images: list[Image.Image]) -> Image.Image:
    """The pictures side by side, each enlarged to at least 256 pixels, a near-square of them."""
    scale = -(-256 // images[0].width)
    side, gap = images[0].width * scale, 8
    columns = round(len(images) ** 0.5 + 0.49)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + gap) - gap), "white")
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        large = image.resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(large, (column * (side + gap), row * (side + gap)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a picture of a caption.")
    parser.add_argument("prompt", help='such as "a red cube"')
    parser.add_argument("--run-dir", metavar="DIR", type=Path, help="default: the newest run")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, default=Path("sample.png"))
    parser.add_argument("--candidates", metavar="N", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1 (2.6)")
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest, to this mass")
    parser.add_argument("--batch-size", type=int, default=16, help="candidates drawn at once")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best one there")
    parser.error = fail
    args = parser.parse_args()
    try:
        if Image.registered_extensions().get(args.out.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"--out {args.out}: expected the name of a picture, such as cube.png")
        if not args.out.absolute().parent.is_dir():
            raise ValueError(f"--out {args.out}: the folder {args.out.parent} does not exist")
        run_dir = args.run_dir or find_run()
        print(f"drawing from {run_dir}")
        images = draw(
            args.prompt, args.candidates, run_dir, args.seed, args.temperature, args.top_k,
            args.top_p, args.batch_size, args.device, progress=True,
        )  # fmt: skip
        contact_sheet(images).save(args.out)
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped", 130)
    print(f"{args.out}: {args.prompt!r}, {len(images)} drawn with seed {args.seed}")


if __name__ == "__main__":
    main()
