"""
The reranker: train CLIP on the pictures and captions of a run (2.6).

    python train_clip.py                    # goes on where train_prior.py ended
    torchrun --nproc_per_node=8 train_clip.py --run-dir runs/base

Takes the BPE of --run-dir (default: the newest run that holds one) and the preset and data of its
prior, or else of its dVAE, and writes clip.pt; clip_state.pt, all that --resume needs; log.jsonl;
clip.png, held-out pictures over the captions that it finds nearest.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import AdamW

from bpe import BPE
from clip import CLIP, CLIPConfig, contrastive_loss, pad_text
from data.files import open_dataset
from data.listings import preprocess_prior
from data.sheets import sheet, to_images
from engine.cli import check_ranges, choose, start, trainer_parser
from engine.run import Run


@dataclass
class CLIPTraining:
    """How to train CLIP; the defaults are its paper's, of ViT-B/32 (CLIP, Tables 18 and 20)."""

    batch_size: int = 32_768  # pairs in an update, each of which meets every other (CLIP, Table 18)
    steps: int = 390_625  # updates: 32 epochs of 400 million pairs (CLIP, Table 18)
    lr: float = 5e-4  # step size at the start of its half cosine (CLIP, Table 20)
    warmup_steps: int = 2000  # updates in which the step size grows (CLIP, Table 18)
    beta1: float = 0.9  # of AdamW's running mean (CLIP, Table 18)
    beta2: float = 0.98  # of AdamW's running variance (CLIP, Table 18)
    eps: float = 1e-6  # AdamW's ε (CLIP, Table 18)
    weight_decay: float = 0.2  # AdamW's, of the weights alone (CLIP, Table 18)
    log_every: int = 50  # updates from one entry of log.jsonl to the next
    eval_every: int = 500  # updates from one checkpoint and look at held-out pairs to the next

    def __post_init__(self) -> None:
        check_ranges(self)


PRESETS = {
    "tiny": dict(image_size=32, patch=4, d_image=64, d_text=64, n_layer=2, d_head=32, d_embed=64,
                 text_len=40, batch_size=64, steps=800, lr=1e-3, warmup_steps=40,
                 eval_every=400),
    "emoji": dict(image_size=32, patch=8, d_image=96, d_text=96, n_layer=3, d_head=32, d_embed=96,
                  text_len=32, batch_size=512, steps=700, lr=1e-3, warmup_steps=40, eval_every=350),
    "small": dict(image_size=64, patch=8, d_image=256, d_text=256, n_layer=6, d_embed=256,
                  text_len=64, batch_size=512, steps=20_000, lr=1e-3, warmup_steps=500),
    "base": dict(batch_size=4096, steps=100_000),
    "paper": dict(),
}  # fmt: skip


def prepare(img, captions, rng, notes, size: int, bpe: BPE, text_len: int) -> list[Tensor]:
    """DALL·E's Listing 2, not CLIP's crops, and one of the captions: uint8 [size, size, 3], long
    [text_len]."""
    pixels = torch.from_numpy(preprocess_prior(img, size, rng))
    ids = bpe.encode(rng.choice(captions))
    if len(ids) > text_len - 1:
        notes.append("cut")
    return [pixels, pad_text(ids, text_len, bpe.vocab_size)]


def decay_groups(model: nn.Module) -> list[dict]:
    """The parameters in two groups: vectors do not decay, nor does the temperature."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]


@torch.no_grad()
def evaluate(model: CLIP, images: Tensor, text: Tensor, chunk: int) -> tuple[dict, Tensor]:
    """Of M held-out pairs: the loss over all of them in nats; how often the nearest of the M
    captions is the picture's own, and the other way around; and the cosines [M, M].

    In the shares, not in the loss, captions of the same words count as one, right for the pictures
    of them all.
    """
    image = torch.cat([model.encode_image(x) for x in images.split(chunk)])
    caption = torch.cat([model.encode_text(x) for x in text.split(chunk)])
    loss, _ = contrastive_loss(image, caption, image, caption, model.scale())
    cosines = image @ caption.T
    same = (text[:, None] == text).all(dim=2)

    def right(nearest: Tensor) -> float:
        return same[torch.arange(len(same)), nearest].float().mean().item()

    scores = {
        "val_loss": loss.item(),
        "val_captions_found": right(cosines.argmax(1)),
        "val_pictures_found": right(cosines.argmax(0)),
    }
    return scores, cosines


def nearest_captions(images: Tensor, text: Tensor, cosines: Tensor, bpe: BPE) -> Image.Image:
    """The first 16 held-out pictures, each over the caption that is nearest among all."""
    found = text[cosines[:16].argmax(1)]
    captions = [bpe.decode(ids[ids < bpe.vocab_size].tolist()) for ids in found]
    return sheet(to_images(images[:16]), captions)


def main() -> None:
    parser = trainer_parser("The reranker: train CLIP.", PRESETS, CLIPConfig, CLIPTraining)
    args = parser.parse_args()
    with Run("clip", args) as run:
        bpe = BPE.load(run.dir / "bpe.json")
        if args.text_vocab not in (None, bpe.vocab_size):
            raise ValueError(f"--text-vocab {args.text_vocab}: the BPE has {bpe.vocab_size} pieces")
        beside = args.init_from and args.init_from.parent / "bpe.json"
        if beside and beside.is_file() and BPE.load(beside).merges != bpe.merges:
            raise ValueError(
                f"{args.init_from} reads other pieces than those of {run.dir}/bpe.json"
            )
        hp = choose(CLIPTraining, run.values, args)
        config = replace(choose(CLIPConfig, run.values, args), text_vocab=bpe.vocab_size)
        train, val = open_dataset(run.data, run.image_size, run.val, filters=args.filters)
        pair = partial(prepare, size=run.image_size, bpe=bpe, text_len=config.text_len)
        batches = run.batches(train, pair, hp.batch_size)
        # Gradients of parts of a batch do not add up to that of a contrastive loss, in which every
        # pair meets every other: a process takes its share in one pass.
        if run.accumulate > 1:
            raise ValueError(
                f"--micro-batch {run.micro_batch}: every pair of the batch meets every other in "
                f"one pass of {hp.batch_size // run.world.size}; set --batch-size instead"
            )
        val_images, val_text = run.held_out(val, pair, 512)

        model = run.begin(CLIP, config, hp)
        adamw = AdamW(
            decay_groups(model), hp.lr, (hp.beta1, hp.beta2), hp.eps, hp.weight_decay, fused=True
        )
        run.track(model, adamw)

        for step in run.steps(hp.steps):
            lr = hp.lr * (1 + math.cos(math.pi * step / hp.steps)) / 2  # a half cosine (CLIP 2.5)
            lr *= min(1, (step + 1) / (hp.warmup_steps + 1))
            for images, text in run.passes(batches):
                run.backward(run.loss(model, images, text))
            run.update(adamw, lr)

            if run.due():
                run.save()
                scores, cosines = evaluate(model, val_images, val_text, run.micro_batch)
                run.report(scores)
                run.picture("clip.png", nearest_captions(val_images, val_text, cosines, bpe))
    run.say(
        f"{run.dir}/clip.pt: among {len(val_text)} held-out pairs {run.scores['val_loss']:.2f} nats"
        f", {run.scores['val_captions_found']:.1%} of the captions and "
        f"{run.scores['val_pictures_found']:.1%} of the pictures found; see {run.dir}/clip.png\n"
        f'next: python sample.py "a red cube" --candidates 32 --run-dir {run.dir}'
    )


if __name__ == "__main__":
    start(main)
