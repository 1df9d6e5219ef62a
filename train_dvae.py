"""
Stage one: train the dVAE on images (2.1, A.2).

    python train_dvae.py --tiny                     # the toy world, 7 to 24 minutes on a CPU
    python train_dvae.py --tiny --data my_photos    # a folder of images

Writes into --run-dir (default runs/<preset>): dvae.pt, the averaged weights; dvae_state.pt, all
that --resume needs; log.jsonl; dvae.png, originals over reconstructions.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.optim import AdamW

from data.files import open_dataset
from data.listings import preprocess_dvae
from data.sheets import sheet, to_images
from dvae import DVAE, DVAEConfig
from engine.cli import check_ranges, choose, start, trainer_parser
from engine.codes import CodesInUse
from engine.run import Run
from scale import fast


@dataclass
class DVAETraining:
    """How to train a dVAE; the defaults are the paper's (A.2), but for how often it is logged and
    evaluated. All three schedules are half cosines: with a linear τ training typically diverged.

    β = 6.6 in place of the bound's 1: it promotes codebook usage, and so a smaller reconstruction
    error at the end. The authors speculate that with a small β the relaxation's noise makes the
    optimiser give up codes early (footnote 4).
    """

    image_size: int = 256  # pixels along each side (A.2)
    batch_size: int = 512  # images in an update, of all processes: 64 GPUs × 8 (A.2)
    steps: int = 3_000_000  # updates (A.2); if set, the schedules that are not set stretch with it
    lr: float = 1e-4  # step size at the start of its half cosine (A.2)
    lr_end: float = 1.25e-6  # step size at its end, and from there on (A.2)
    lr_steps: int = 1_200_000  # updates of that half cosine (A.2)
    warmup_steps: int = 0  # first updates, in which the step size also grows; not the paper's
    beta1: float = 0.9  # of AdamW's running mean (A.2)
    beta2: float = 0.999  # of AdamW's running variance (A.2)
    eps: float = 1e-8  # AdamW's ε (A.2)
    weight_decay: float = 1e-4  # AdamW's (A.2)
    ema: float = 0.999  # decay of the averaged weights, at every update, less at first (A.2)
    kl_weight: float = 6.6  # β, to which the KL term's weight grows from 0 (A.2)
    kl_steps: int = 5000  # updates in which it grows; 0: as large from the start (A.2)
    min_usage: float = 0.0  # while this share of codes is not in use, β is × 4; not the paper's
    tau_start: float = 1.0  # τ of the relaxation at the start (A.2)
    tau_end: float = 1 / 16  # τ at the end, where relaxed and true bound meet (2.1, A.2)
    tau_steps: int = 150_000  # updates from one τ to the other (A.2)
    log_every: int = 50  # updates from one entry of log.jsonl to the next
    eval_every: int = 500  # updates from one checkpoint and look at held-out images to the next

    def __post_init__(self) -> None:
        check_ranges(self)
        if not (self.tau_start > 0 and self.tau_end > 0):
            raise ValueError(f"tau goes from {self.tau_start} to {self.tau_end}; expected above 0")


PRESETS = {
    "tiny": dict(n_hid=32, n_init=64, n_groups=3, blocks_per_group=1, vocab_size=256,
                 input_gain=8, min_ln_b=-1.0, image_size=32, batch_size=8, steps=17_000, lr=4e-3,
                 lr_end=5e-5, lr_steps=17_000, warmup_steps=200, kl_weight=1.0, kl_steps=0,
                 min_usage=0.5, tau_steps=17_000, eval_every=1000),
    "emoji": dict(n_hid=48, n_init=96, n_groups=3, blocks_per_group=1, vocab_size=512,
                  input_gain=8, min_ln_b=-1.0, image_size=32, batch_size=8, steps=16_000, lr=3e-3,
                  lr_end=4e-5, lr_steps=16_000, warmup_steps=200, ema=0.998, kl_weight=1.5,
                  kl_steps=0, min_usage=0.25, tau_steps=16_000, eval_every=2000),
    "small": dict(n_hid=64, n_init=128, n_groups=4, blocks_per_group=2, vocab_size=1024,
                  input_gain=8, min_ln_b=-1.0, image_size=64, batch_size=128, steps=30_000,
                  lr=1e-3, lr_end=2e-5, lr_steps=30_000, warmup_steps=200, kl_weight=2.0,
                  kl_steps=0, min_usage=0.5, tau_steps=20_000),
    "base": dict(n_hid=128, min_ln_b=-1.0, batch_size=256, steps=500_000, lr=3e-4, lr_end=3e-6,
                 lr_steps=500_000, min_usage=0.25, tau_steps=50_000),
    "paper": dict(),
}  # fmt: skip


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at `steps` along half a cosine, then `end` (A.2)."""
    if step >= steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def prepare(img, captions, rng, notes, size: int) -> list[Tensor]:
    """Listing 1: uint8 [size, size, 3]. Called for each sample by data.loader.Samples; captions
    and notes are for stage two."""
    return [torch.from_numpy(preprocess_dvae(img, size, rng))]


@torch.no_grad()
def evaluate(model: DVAE, images: Tensor, micro_batch: int, tau: float) -> dict[str, float]:
    """Of held-out images [M, 3, H, W]: PSNR in dB through argmax tokens (mean over the images), the
    number of codes in use in them, and the relaxed and the true bound, which meet at tau = 1/16
    (2.1)."""
    psnr, elb, relaxed, used = [], [], [], []
    for x in images.split(micro_batch):
        tokens = model.encode(x)
        used.append(tokens.unique())
        mse = (model.decode(tokens) - x).square().mean((1, 2, 3))
        psnr.append(-10 * torch.log10(mse))
        elb.append(model.elb(x) * len(x))
        relaxed.append(model.elb(x, tau) * len(x))
    return {
        "val_psnr": torch.cat(psnr).mean().item(),
        "codes": len(torch.cat(used).unique()),
        "elb": sum(elb).item() / len(images),
        "relaxed_elb": sum(relaxed).item() / len(images),
    }


@torch.no_grad()
def reconstructions(model: DVAE, images: Tensor) -> Image.Image:
    """Originals [M, 3, H, W], each over what its tokens decode to."""
    pairs = torch.cat([images, model.decode(model.encode(images))], 2)
    return sheet(to_images(pairs))


def main() -> None:
    parser = trainer_parser("Stage one: train the dVAE.", PRESETS, DVAEConfig, DVAETraining)
    args = parser.parse_args()
    with Run("dvae", args) as run:
        config = choose(DVAEConfig, run.values, args)
        hp = choose(DVAETraining, run.values, args)
        if hp.image_size % config.factor:
            raise ValueError(f"--image-size {hp.image_size} is not a multiple of {config.factor}")
        train, val = open_dataset(run.data, hp.image_size, run.val, False, args.filters)
        prepare_image = partial(prepare, size=hp.image_size)
        batches = run.batches(train, prepare_image, hp.batch_size)
        (val_images,) = run.held_out(val, prepare_image, 512)

        model = run.begin(DVAE, config, hp)
        fast.upsample_late(model.decoder)
        ema = run.average(model, hp.ema)
        # Weight decay on everything: our reading, for the paper exempts nothing.
        adamw = AdamW(
            model.parameters(), hp.lr, (hp.beta1, hp.beta2), hp.eps, hp.weight_decay, fused=True
        )
        in_use = CodesInUse(model.encoder, config.vocab_size)  # of the model, not of its average
        run.track(model, adamw, ema, about={"image_size": hp.image_size}, in_use=in_use)

        for step in run.steps(hp.steps):
            # all three schedules are half cosines (A.2)
            lr = cosine(step, hp.lr_steps, hp.lr, hp.lr_end)
            # not the paper's, and off by default: larger step sizes than its need a linear warm-up
            lr *= min(1, (step + 1) / (hp.warmup_steps + 1))
            # β; the size rule, 1/192 for a factor of 8, 1/48 for 4, is inside the loss (A.2)
            kl_weight = cosine(step, hp.kl_steps, 0, hp.kl_weight)
            if in_use.count < hp.min_usage * config.vocab_size:
                kl_weight *= 4  # not the paper's, and off by default: see CodesInUse
            tau = cosine(step, hp.tau_steps, hp.tau_start, hp.tau_end)

            for (images,) in run.passes(batches):
                run.backward(run.loss(model, images, tau, kl_weight))  # the relaxed bound (2.1)
            run.update(adamw, lr, kl_weight=kl_weight, tau=tau)
            ema.update_parameters(model)  # 0.999 (A.2), less at first: see engine/run.py
            in_use.end_update(step, hp.batch_size, run.world)

            if run.due():
                run.save()
                scores = evaluate(ema.module, val_images, run.micro_batch, tau)
                run.report(scores)
                is_early = step + 1 - hp.eval_every < max(200, hp.steps / 10) <= step + 1
                if is_early and in_use.count < config.vocab_size / 4:
                    run.say(
                        f"warning: only {in_use.count} of {config.vocab_size} codes are in use in "
                        "training; they seldom come back: begin again with twice the --kl-weight"
                    )
                run.picture("dvae.png", reconstructions(ema.module, val_images[:16]))
    run.say(
        f"{run.dir}/dvae.pt: {run.scores['val_psnr']:.1f} dB on held-out images, "
        f"{run.scores['codes']} of {config.vocab_size} codes in use; see {run.dir}/dvae.png\n"
        f"next: python train_prior.py --run-dir {run.dir}"
    )


if __name__ == "__main__":
    start(main)
