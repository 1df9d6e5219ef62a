"""
The figures of a run on any data, measured as its trainers do.

    python -m lab.evaluate runs/tiny                     # on the held-out part of its own data
    python -m lab.evaluate runs/tiny --data my_photos    # on all of another data set

What the run has no model for yet is left out, and so is what needs captions where there are none.
"""

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import train_clip
import train_dvae
import train_prior
from bpe import BPE
from clip import CLIP, CLIPConfig
from data.files import open_dataset
from data.loader import Samples, held_out, images_to
from dvae import DVAE, DVAEConfig
from engine.checkpoint import check_holds, check_one_run, load, load_model
from engine.cli import Parser, pick_device, start
from transformer import Transformer, TransformerConfig

CHUNK = 32  # samples at once


@torch.no_grad()
def evaluate(
    run_dir: Path, spec: str | None = None, count: int = 512, device: str | None = None
) -> Iterator[tuple[str, str, float, str]]:
    """(model, what, figure, unit) of a run, over `count` samples of a data set or all there are.

    spec: as `data.files.open_dataset` takes it. Of the run's own data, and of the toy world, what
    was held out is measured, of others all. ValueError for a run or data that cannot be read.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected 1 or more samples")
    check_holds(run_dir, "dvae.pt")
    device = pick_device(device)

    def read(name: str, Model: type, Config: type) -> tuple[nn.Module | None, dict]:
        """A model of the run, where it has one, and what its file says of how it was trained."""
        if not (run_dir / name).is_file():
            return None, {}
        about = load(run_dir / name)
        return load_model(run_dir / name, Model, Config, about).to(device), about

    # all of them first: what is damaged or not of one run is to be known before any is measured
    dvae, of_dvae = read("dvae.pt", DVAE, DVAEConfig)
    prior, of_prior = read("prior.pt", Transformer, TransformerConfig)
    clip, of_clip = read("clip.pt", CLIP, CLIPConfig)
    if prior is not None or clip is not None:
        check_holds(run_dir, "bpe.json")
        bpe = BPE.load(run_dir / "bpe.json")
        check_one_run(run_dir, bpe, dvae, prior, clip)
    size = of_dvae.get("image_size")
    if size is None:
        raise ValueError(f"{run_dir}/dvae.pt does not say its image size: make it again")

    def samples(about: dict, prepare: Callable, captions: bool) -> list[Tensor]:
        data, val = about.get("data"), about.get("val")
        filters = about.get("run", {}).get("filters", False)
        if spec is not None and os.path.realpath(spec) != os.path.realpath(data or ""):
            data, val, filters = spec, spec, False
        if data is None:
            raise ValueError(f"{run_dir} does not say what it was trained on: give --data")
        _, dataset = open_dataset(data, size, val, captions, filters)
        pixels, *text = held_out(Samples(dataset, prepare, 0), count)[0]
        return [images_to(device, pixels), *(ids.to(device) for ids in text)]

    (images,) = samples(of_dvae, partial(train_dvae.prepare, size=size), captions=False)
    scores = train_dvae.evaluate(dvae, images, CHUNK, tau=1 / 16)
    yield "dVAE", f"PSNR of {len(images)} pictures", scores["val_psnr"], "dB"
    yield "dVAE", "codes in use", scores["codes"], f"of {dvae.config.vocab_size}"
    yield "dVAE", "the bound at β = 1 (Eq. 1)", scores["elb"], "nats per pixel value"

    if prior is not None:
        pair = partial(train_prior.prepare, size=size, bpe=bpe, text_len=prior.config.text_len)
        images, text = samples(of_prior, pair, captions=True)
        tokens, of_pixels = train_prior.tokens_and_nats(dvae, images, CHUNK)
        scores = train_prior.evaluate(prior, text, tokens, CHUNK)
        joint = (scores["val_nats"] / images[0].numel() + of_pixels) / math.log(2)
        yield "prior", f"text of {len(images)} pairs", scores["val_text_loss"], "nats per token"
        yield "prior", "  its words", scores["val_real_text_loss"], "nats per token"
        yield "prior", "  its pads", scores["val_pad_loss"], "nats per token"
        yield "prior", "image", scores["val_image_loss"], "nats per token"
        yield "prior", "pixels, image and text (Eq. 1)", joint, "bits per pixel value"

    if clip is not None:
        pair = partial(train_clip.prepare, size=size, bpe=bpe, text_len=clip.config.text_len)
        images, text = samples(of_clip, pair, captions=True)
        scores, _ = train_clip.evaluate(clip, images, text, CHUNK)
        yield "CLIP", f"loss among {len(images)} pairs", scores["val_loss"], "nats"
        yield "CLIP", "captions found", 100 * scores["val_captions_found"], "%"
        yield "CLIP", "pictures found", 100 * scores["val_pictures_found"], "%"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the directory of a run")
    parser.add_argument("--data", metavar="SPEC", help="folder, table, tars, toy; default: its own")
    parser.add_argument("--count", metavar="N", type=int, default=512, help="samples; default 512")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best one there")
    args = parser.parse_args()
    measured = None
    try:
        for model, what, figure, unit in evaluate(args.run, args.data, args.count, args.device):
            measured = f"{figure:9}" if isinstance(figure, int) else f"{figure:9.3f}"
            print(f"{model:5}  {what:30}  {measured}  {unit}")
    except ValueError as error:
        if not (measured and args.data):
            raise
        print(f"the rest needs captions: {error}")


if __name__ == "__main__":
    start(main)
