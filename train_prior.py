"""
Stage two: train the transformer on the stream of text and image tokens (2.2, B.2).

    python train_prior.py                    # goes on where train_dvae.py ended
    torchrun --nproc_per_node=8 train_prior.py --run-dir runs/base

Takes the dVAE of --run-dir (default: the newest run that holds one) with its preset and data,
trains the BPE on the captions if the run has none, and writes prior.pt, the averaged weights;
prior_state.pt, all that --resume needs; log.jsonl; samples.png, drawn from held-out captions.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bpe import BPE
from data.files import open_dataset
from data.listings import preprocess_prior
from data.loader import words_of
from data.sheets import sheet, to_images
from dvae import DVAE, DVAEConfig
from engine.checkpoint import load_model
from engine.cli import check_ranges, choose, start, trainer_parser
from engine.run import Run
from scale import fast
from scale.adamw import AdamW
from scale.formats import matrices
from transformer import Transformer, TransformerConfig, pad_text


@dataclass
class PriorTraining:
    """How to train the prior; the defaults are the paper's (B.2), but for those of the plateau
    rule, of bpe_captions, logging and evaluation, which it does not give.

    The rule of a plateau is our reading: see `Halving`.
    """

    batch_size: int = 1024  # pairs in an update, of all processes (B.2)
    steps: int = 430_000  # updates (B.2); if set, the schedules that are not set stretch with it
    lr: float = 4.5e-4  # step size after the warm-up (B.2)
    warmup_steps: int = 5000  # updates in which the step size grows from 0 (B.2)
    plateau_steps: int = 5000  # updates whose mean loss is compared with the best; our reading
    plateau_threshold: float = 0.002  # share it must be better by, or lr is halved; our reading
    plateau_halvings: int = 5  # most times that lr is halved (B.2)
    beta1: float = 0.9  # of AdamW's running mean (B.2)
    beta2: float = 0.96  # of AdamW's running variance (B.2)
    eps: float = 1e-8  # AdamW's ε (B.2)
    weight_decay: float = 4.5e-2  # AdamW's (B.2)
    clip: float = 4.0  # largest norm of the gradient, with PowerSGD the decompressed one (B.2, E)
    variance_clip: float = 5.0  # most that Adam's running variance may be (B.2)
    ema: float = 0.99  # decay of the averaged weights, less at first (B.2)
    ema_every: int = 25  # updates from one averaging to the next (B.2)
    bpe_dropout: float = 0.1  # probability that a merge is left out (2.2, B.2)
    bpe_captions: int = 1_000_000  # first samples, whose captions train the BPE; not the paper's
    caption_dropout: float = 0.0  # share of captions left empty, for guidance; not the paper's
    log_every: int = 50  # updates from one entry of log.jsonl to the next
    eval_every: int = 500  # updates from one checkpoint and look at held-out pairs to the next

    def __post_init__(self) -> None:
        check_ranges(self)


PRESETS = {
    "tiny": dict(n_layer=4, n_head=8, d_head=16, text_len=40, text_vocab=512, kernel=5,
                 batch_size=64, steps=1900, lr=3e-3, warmup_steps=100, plateau_steps=150, ema=0.97,
                 plateau_threshold=0.025, ema_every=5, bpe_captions=20_000, eval_every=250),
    "emoji": dict(n_layer=6, n_head=6, d_head=32, text_len=40, text_vocab=1024, kernel=5,
                  batch_size=32, steps=8000, lr=2e-3, warmup_steps=100, plateau_steps=500,
                  plateau_threshold=0.025, ema=0.98, ema_every=10, bpe_captions=20_000),
    "small": dict(n_layer=12, n_head=8, d_head=64, text_len=64, text_vocab=4096, kernel=5,
                  batch_size=128, steps=30_000, lr=1e-3, warmup_steps=500, plateau_steps=1000,
                  plateau_threshold=0.005, bpe_captions=100_000),
    "base": dict(n_layer=24, n_head=16, batch_size=512, steps=200_000),
    "paper": dict(),
}  # fmt: skip


class Halving:
    """The step size halves when the training loss appears to plateau, at most five times (B.2).

    Our reading: the mean loss of every `plateau_steps` updates is compared with the best one so
    far; when it is not better by the share `plateau_threshold`, the step size is halved.
    """

    def __init__(self) -> None:
        self.best, self.halvings = math.inf, 0
        self.total, self.count = 0.0, 0  # of the losses since the last comparison

    def see(self, loss: float, done: int, hp: PriorTraining) -> None:
        """The loss of update number `done`; NaN where it was skipped."""
        if not math.isnan(loss):
            self.total, self.count = self.total + loss, self.count + 1
        if done % hp.plateau_steps == 0:
            if done >= hp.warmup_steps and self.count:
                mean = self.total / self.count
                if mean < self.best * (1 - hp.plateau_threshold):
                    self.best = mean
                else:
                    self.halvings = min(self.halvings + 1, hp.plateau_halvings)
            self.total, self.count = 0.0, 0


def prepare(
    img, captions, rng, notes, size: int, bpe: BPE, text_len: int, dropout=0.0, caption_dropout=0.0
) -> list[Tensor]:
    """Listing 2 and one of the captions: uint8 [size, size, 3], long [text_len]."""
    pixels = torch.from_numpy(preprocess_prior(img, size, rng))
    ids = bpe.encode(rng.choice(captions), dropout, rng)
    if caption_dropout and rng.random() < caption_dropout:
        ids = []
    if len(ids) > text_len - 1:
        notes.append("cut")
    return [pixels, pad_text(ids[: text_len - 1], text_len, bpe.vocab_size)]


def captions_of(dataset, count: int) -> Iterator[str]:
    """The captions of the first `count` samples."""
    for index in range(min(count, len(dataset))):
        yield from dataset.captions_of(index)


def frequent_words(captions: Iterator[str]) -> list[str]:
    """The words of the captions, the most frequent first: what sample.py compares a prompt with."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    return [word for word, _ in counts.most_common(100_000)]


def find_bpe(run: Run, args: argparse.Namespace, vocab_size: int, captions: Iterator[str]) -> BPE:
    """The BPE of the weights to fine-tune, or of the run, or one trained on the captions."""
    paths = [run.dir / "bpe.json"]
    if args.init_from and not args.resume:
        paths.insert(0, args.init_from.parent / "bpe.json")
    path = run.world.share(lambda: next((p for p in paths if p.exists()), None))
    if path is None:
        bpe = BPE(run.world.share(lambda: BPE.train(captions, vocab_size).merges))
    else:
        bpe = BPE.load(path)
        if args.text_vocab and args.text_vocab < bpe.vocab_size:
            raise ValueError(f"--text-vocab {args.text_vocab}: {path} has {bpe.vocab_size}")
    run.say(f"BPE {path}" if path else f"BPE of {bpe.vocab_size} pieces trained on its captions")
    return bpe


@torch.no_grad()
def tokens_and_nats(dvae: DVAE, images: Tensor, chunk: int) -> tuple[Tensor, float]:
    """Of images [M, 3, H, W] the tokens [M, N], and −ln p(x | z) in nats per 8-bit value, mean."""
    chunks = images.split(chunk)
    tokens = torch.cat([dvae.encode(x).flatten(1) for x in chunks])
    return tokens, sum(dvae.distortion(x).item() * len(x) for x in chunks) / len(images)


@torch.no_grad()
def evaluate(model: Transformer, text: Tensor, image: Tensor, chunk: int) -> dict[str, float]:
    """Means in nats per token over held-out text [M, T] and image tokens [M, N]: the two parts of
    the loss, and the text's for real tokens and for pads. val_nats is −ln p(y, z) of a pair."""
    of_text, of_image = [], []
    for texts, images in zip(text.split(chunk), image.split(chunk)):
        text_logits, image_logits = model(texts, images)
        of_text.append(F.cross_entropy(text_logits.mT, texts[:, 1:], reduction="none"))
        of_image.append(F.cross_entropy(image_logits.mT, images, reduction="none"))
    of_text, of_image = torch.cat(of_text), torch.cat(of_image)
    is_pad = text[:, 1:] >= model.config.text_vocab

    def mean(nats: Tensor) -> float:  # 0 of none, as where no caption leaves a pad
        return nats.sum().item() / max(1, nats.numel())

    return {
        "val_text_loss": mean(of_text),
        "val_real_text_loss": mean(of_text[~is_pad]),
        "val_pad_loss": mean(of_text[is_pad]),
        "val_image_loss": of_image.mean().item(),
        "val_nats": (of_text.sum() + of_image.sum()).item() / len(text),
    }


@torch.no_grad()
def draw_samples(model: Transformer, dvae: DVAE, text: Tensor, bpe: BPE) -> Image.Image:
    """Held-out captions [M, T], each below one sample at temperature 1, always the same draws."""
    grid = model.config.grid
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(text), grid**2, generator=generator).to(text.device)
    images = dvae.decode(fast.generate(model, text, uniforms=uniforms).view(-1, grid, grid))
    captions = [bpe.decode(ids[ids < bpe.vocab_size].tolist()) for ids in text]
    return sheet(to_images(images), captions)


def main() -> None:
    parser = trainer_parser(
        "Stage two: train the prior.", PRESETS, TransformerConfig, PriorTraining, shards=True
    )
    tokens_help = "from q: default argmax; samples regularise a model too large for its data"
    parser.add_argument(
        "--tokens", choices=("argmax", "sample"), help=f"{tokens_help} (footnote 6)"
    )
    args = parser.parse_args()
    with Run("prior", args) as run:
        # ---- stage one, fixed from here on; its tokens and the BPE's pieces are what is modelled
        dvae = load_model(run.dir / "dvae.pt", DVAE, DVAEConfig, run.dvae)
        dvae.requires_grad_(False).to(run.device)
        sizes = {
            "grid": run.image_size // dvae.config.factor,
            "image_vocab": dvae.config.vocab_size,
        }
        for name, value in sizes.items():
            if getattr(args, name) not in (None, value):
                raise ValueError(f"--{name} {getattr(args, name)}: the dVAE's is {value}")
        hp = choose(PriorTraining, run.values, args)
        config = choose(TransformerConfig, run.values | sizes, args)
        train, val = open_dataset(run.data, run.image_size, run.val, filters=args.filters)
        bpe = find_bpe(run, args, config.text_vocab, captions_of(train, hp.bpe_captions))
        config = replace(config, text_vocab=bpe.vocab_size)
        pair = partial(prepare, size=run.image_size, bpe=bpe, text_len=config.text_len)
        noisy_pair = partial(pair, dropout=hp.bpe_dropout, caption_dropout=hp.caption_dropout)
        batches = run.batches(train, noisy_pair, hp.batch_size)
        val_images, val_text = run.held_out(val, pair, 512)

        model = run.begin(Transformer, config, hp)
        fast.use_blocks(model)
        run.keep_bpe(bpe)
        ema = run.average(model, hp.ema)
        # Weight decay on everything: our reading, for the paper exempts nothing.
        adamw = AdamW(
            model.parameters(),
            lr=hp.lr,
            betas=(hp.beta1, hp.beta2),
            eps=hp.eps,
            weight_decay=hp.weight_decay,
            variance_clip=hp.variance_clip,
            in_16_bits=[p for _, p in matrices(model)] if args.moments == 16 else [],
        )
        halving = Halving()
        about = {"image_size": run.image_size, "caption_dropout": hp.caption_dropout}
        about["words"] = run.world.share(
            lambda: frequent_words(captions_of(train, hp.bpe_captions))
        )
        run.track(model, adamw, ema, about, halving=halving)
        val_tokens, of_pixels = tokens_and_nats(dvae, val_images, run.micro_batch)

        for step in run.steps(hp.steps):
            # linear warm-up to 4.5e-4 over 5,000 updates, then halved on plateaus (B.2)
            lr = hp.lr * min(1, (step + 1) / max(1, hp.warmup_steps)) / 2**halving.halvings

            for images, text in run.passes(batches):
                # argmax, no noise (2.2), or, with --tokens sample, drawn from q (footnote 6)
                tokens = dvae.encode(images, sample=args.tokens == "sample").flatten(1)
                run.backward(run.loss(model, text, tokens))  # 1/8 text + 7/8 image (2.2)
            loss = run.update(adamw, lr, clip=hp.clip)  # to 4, which only the warm-up exceeds (B.2)
            halving.see(loss, step + 1, hp)
            # 0.99 every 25 updates (B.2), less at first: see moving_average in engine/run.py; by
            # the step's number, whether it was skipped or not: our reading
            if (step + 1) % hp.ema_every == 0 or step == 0:
                ema.update_parameters(model)

            if run.due():
                run.save()
                scores = evaluate(ema.module, val_text, val_tokens, run.micro_batch)
                # −ln p(x, y) is at most (Eq. 1) the nats of text and tokens and of pixels given
                # tokens, as far as density times width is the probability of an 8-bit value
                nats = scores.pop("val_nats") / val_images[0].numel() + of_pixels
                run.report(scores | {"val_joint_bits": nats / math.log(2)})
                if not run.mesh:
                    run.picture("samples.png", draw_samples(ema.module, dvae, val_text[:16], bpe))
    run.say(
        f"{run.dir}/prior.pt: {run.scores['val_image_loss']:.3f} nats per image token "
        f"on held-out pictures; see {run.dir}/{'curves' if run.mesh else 'samples'}.png\n"
        f'next: python sample.py "a red cube" --run-dir {run.dir}\n'
        f"or, to choose among candidates: python train_clip.py --run-dir {run.dir}"
    )


if __name__ == "__main__":
    start(main)
