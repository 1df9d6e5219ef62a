"""
The other way around: how likely is a picture under each of some captions?

    python -m lab.describe photo.png "a red cube" "a blue cube"

The prior gives a likelihood to image tokens and to captions (2.2), the reranker a cosine (2.6).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.files import middle_square
from data.loader import images_to
from engine.checkpoint import load_run
from engine.cli import Parser, pick_device, start
from sample import encode_prompt, find_run


class Description(NamedTuple):
    caption: str
    image: float  # ln p(image tokens | caption) in nats per token
    text: float  # ln p(caption) in nats per token, pads included as in the loss (2.2)
    cosine: float | None  # by the reranker, where the run has one


@torch.inference_mode()
def describe(
    image: str | Path | Image.Image,
    captions: list[str],
    run_dir: str | Path | None = None,
    device: str | None = None,
) -> list[Description]:
    """How likely a picture is under each caption, the likeliest first. ValueError for a picture or
    a caption that cannot be read, and for a run without its files."""
    if not captions:
        raise ValueError("there is no caption to score")
    device = pick_device(device)
    bpe, dvae, prior, clip, _ = load_run(Path(run_dir or find_run()), str(device))
    texts = torch.stack([encode_prompt(c, bpe, prior) for c in captions]).to(device)
    grid = prior.config.grid
    square = np.array(middle_square(image, dvae.config.factor * grid, grid))
    pixels = images_to(device, torch.from_numpy(square)[None])
    tokens = dvae.encode(pixels).flatten(1)

    def mean_log_prob(logits: Tensor, targets: Tensor) -> list[float]:
        return (-F.cross_entropy(logits.mT, targets, reduction="none")).mean(1).tolist()

    image_scores, text_scores = [], []
    for batch in texts.split(16):
        of_image = tokens.expand(len(batch), -1)
        text_logits, image_logits = prior(batch, of_image)
        image_scores += mean_log_prob(image_logits, of_image)
        text_scores += mean_log_prob(text_logits, batch[:, 1:])
    cosines = [None] * len(texts)
    if clip is not None:
        ids = torch.stack([clip.pad(bpe.encode(c.strip())) for c in captions]).to(device)
        cosines = (clip.encode_text(ids) @ clip.encode_image(pixels).T)[:, 0].tolist()
    found = map(Description, captions, image_scores, text_scores, cosines)
    return sorted(found, key=lambda description: -description.image)


def main() -> None:
    parser = Parser(description="How likely is a picture under each of some captions?")
    add = parser.add_argument
    add("picture", type=Path, help="a file")
    add("caption", nargs="+", help='such as "a red cube"')
    add("--run-dir", metavar="DIR", type=Path, help="default: the newest run, else the shipped one")
    add("--device", help="cuda, mps or cpu; default: the best one there")
    args = parser.parse_args()
    found = describe(args.picture, args.caption, args.run_dir, args.device)
    print("image|caption  caption  cosine  (nats per token, the likeliest first)")
    for caption, image, text, cosine in found:
        cosine = "–" if cosine is None else f"{cosine:.3f}"
        print(f"{image:13.3f}  {text:7.3f}  {cosine:>6}  {caption}")


if __name__ == "__main__":
    start(main)
