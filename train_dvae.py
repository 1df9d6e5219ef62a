"""
Stage one: train the dVAE on images (2.1, A.2).

    python train_dvae.py --tiny                     # the toy world, minutes on a CPU
    python train_dvae.py --tiny --data my_photos    # a folder of images

Writes into --run-dir (default runs/<preset>): dvae.pt, the averaged weights; dvae_state.pt, all
that --resume needs; log.jsonl; dvae.png, originals over reconstructions.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import engine.run as training
from data.files import open_dataset
from data.listings import preprocess_dvae
from data.sheets import sheet
from dvae import DVAE, DVAEConfig, load_dvae
from engine import checkpoint, run_state
from engine.run import announce, cosine, images_to
from lab import plan
from scale.parallel import all_finite, averaging, clip_gradients, replicate


@dataclass
class DVAETraining:
    """How to train a dVAE; the defaults are the paper's (A.2), but for how often it is logged and
    evaluated. All three schedules are half cosines: with a linear τ training typically diverged.

    β = 6.6 is more than a bound allows (it is one at β = 1). It promotes codebook usage; the
    authors speculate that with a small β the relaxation's noise makes the optimiser give up codes
    early (footnote 4), and so the reconstruction error at the end is larger.
    """

    image_size: int = 256
    batch_size: int = 512
    steps: int = 3_000_000
    lr: float = 1e-4
    lr_end: float = 1.25e-6
    lr_steps: int = 1_200_000
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    ema: float = 0.999
    kl_weight: float = 6.6
    kl_steps: int = 5000
    tau_start: float = 1.0
    tau_end: float = 1 / 16
    tau_steps: int = 150_000
    log_every: int = 50
    eval_every: int = 500

    def __post_init__(self) -> None:
        training.check_ranges(self)
        if not (self.tau_start > 0 and self.tau_end > 0):
            raise ValueError(f"tau goes from {self.tau_start} to {self.tau_end}; expected above 0")


PRESETS = {
    "tiny": dict(n_hid=32, n_init=64, n_groups=3, blocks_per_group=1, vocab_size=256,
                 image_size=32, batch_size=16, steps=12_500, lr=4e-3, lr_end=5e-5, lr_steps=12_500,
                 warmup_steps=200, ema=0.998, kl_weight=0.8, kl_steps=1250, tau_steps=9400),
    "small": dict(n_hid=64, n_init=128, n_groups=4, blocks_per_group=2, vocab_size=1024,
                  image_size=64, batch_size=128, steps=30_000, lr=1e-3, lr_end=2e-5,
                  lr_steps=30_000, warmup_steps=200, kl_weight=2.0, kl_steps=2000,
                  tau_steps=20_000),
    "base": dict(n_hid=128, batch_size=256, steps=500_000, lr=3e-4, lr_end=3e-6,
                 lr_steps=500_000, tau_steps=50_000),
    "paper": dict(),
}  # fmt: skip


def prepare(img, captions, rng, size: int) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(preprocess_dvae(img, size, rng)))]


@torch.no_grad()
def evaluate(model: DVAE, images: torch.Tensor, micro_batch: int, tau: float) -> dict[str, float]:
    """Of held-out uint8 [M, H, W, 3]: PSNR in dB through argmax tokens (mean over the images),
    the share of the vocabulary in use, and the relaxed and the true bound (2.1)."""
    device = next(model.parameters()).device
    psnr, elb, relaxed = [], [], []
    used = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    for chunk in images.split(micro_batch):
        x = images_to(device, chunk)
        tokens = model.encode(x)
        used[tokens.flatten()] = True
        mse = (model.decode(tokens) - x).square().mean((1, 2, 3))
        psnr.append(-10 * torch.log10(mse))
        elb.append(model.elb(x) * len(x))
        relaxed.append(model.elb(x, tau) * len(x))
    return {
        "val_psnr": torch.cat(psnr).mean().item(),
        "codes": used.sum().item(),
        "elb": sum(elb).item() / len(images),
        "relaxed_elb": sum(relaxed).item() / len(images),
    }


@torch.no_grad()
def draw_reconstructions(model: DVAE, images: torch.Tensor, path) -> None:
    """Up to 16 originals, uint8 [M, H, W, 3], each over what its tokens decode to."""
    images = images[:16]
    x = images_to(next(model.parameters()).device, images)
    decoded = model.decode(model.encode(x)).permute(0, 2, 3, 1).mul(255).round()
    decoded = decoded.to("cpu", torch.uint8).numpy()
    rows = []
    for k in range(0, len(images), 8):
        rows += [list(images[k : k + 8].numpy()), list(decoded[k : k + 8])]
    picture = sheet(rows, scale=max(1, 128 // images.shape[1]))
    checkpoint.write(path, lambda file: picture.save(file, "PNG"))


def print_plan(args: argparse.Namespace) -> None:
    """Parameters, operations and memory of a run on --plan GPUs."""
    preset = PRESETS[args.preset or "small"]
    config, hp = (
        training.choose(DVAEConfig, preset, args),
        training.choose(DVAETraining, preset, args),
    )
    micro_batch = training.check_batches(hp.batch_size, args.micro_batch, args.plan)
    data = args.data or "toy"
    model, cost = plan.dvae_cost(config, hp.image_size, micro_batch)
    print(
        plan.table(
            model,
            cost,
            gpus=args.plan,
            shards=1,
            batch_size=hp.batch_size,
            micro_batch=micro_batch,
            steps=hp.steps,
            tokens=(hp.image_size // config.factor) ** 2,
            images=len(open_dataset(data, hp.image_size, captions=False)[0]),
            bits=32 if args.dtype == "fp32" else 16,
            gpu_memory=args.gpu_memory,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Stage one: train the dVAE.")
    training.add_arguments(parser, PRESETS, DVAEConfig, DVAETraining)
    training.add_plan(parser)
    args = parser.parse_args()
    if args.plan is not None:
        with training.door():
            print_plan(args)
        return

    # ---- what to run
    with training.door():
        world = training.launch(args.device)
        preset = args.preset or ("small" if world.device.type == "cuda" else "tiny")
        config = training.choose(DVAEConfig, PRESETS[preset], args)
        hp = training.choose(DVAETraining, PRESETS[preset], args)
        if hp.image_size % config.factor:
            raise ValueError(f"--image-size {hp.image_size} is not a multiple of {config.factor}")
        micro_batch = training.check_batches(hp.batch_size, args.micro_batch, world.size)
        spec = args.data or "toy"
        train, val = open_dataset(spec, hp.image_size, args.val, False, args.filters)
        prepare_image = partial(prepare, size=hp.image_size)
        samples = training.Samples(train, prepare_image, args.seed)
        val_images = training.held_out(training.Samples(val, prepare_image, 0), 512, world)[0]
        run_dir = args.run_dir or Path("runs") / preset
        state_path = run_dir / "dvae_state.pt"
        run = {**asdict(hp), "data": spec, "seed": args.seed}
        state = run_state.to_resume(
            state_path, run, config, args.resume, world, "n_averaged", "scaler"
        )
        if args.init_from:
            model = load_dvae(args.init_from)
            checkpoint.check_config(args.init_from, asdict(model.config), config)
        world.wait()  # until every rank has read what is now moved away
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            if not state:
                states = [f for stage in ("dvae", "prior", "clip") for f in run_state.names(stage)]
                checkpoint.set_aside(run_dir, *states, "dvae.pt", "bpe.json", "prior.pt", "clip.pt")

    with training.safely(world, micro_batch):
        # ---- model and optimizer
        interrupt = training.Interrupt(world)
        if not args.init_from:
            torch.manual_seed(args.seed)
            model = DVAE(config)
        model = model.to(world.device, memory_format=torch.channels_last).train()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(hp.ema))
        optimizer = torch.optim.AdamW(
            model.parameters(), hp.lr, (hp.beta1, hp.beta2), hp.eps, hp.weight_decay, fused=True
        )
        # one scale for the whole loss, as in the paper; it does nothing but for fp16 (A.2)
        scaler = torch.amp.GradScaler(world.device.type, enabled=args.dtype == "fp16")
        start = 0
        if state:
            run_state.restore(state, model, average, optimizer)
            for group in optimizer.param_groups:
                group.update(betas=(hp.beta1, hp.beta2), eps=hp.eps, weight_decay=hp.weight_decay)
            if state.about["scaler"]:
                scaler.load_state_dict(state.about["scaler"])
            start = state.about["step"]
        loss_of = replicate(model, world.device)
        log = training.Log(run_dir, "dvae", start, world)
        batches = training.micro_batches(
            samples, world, start, hp.steps, hp.batch_size, micro_batch, args.workers
        )
        accumulate = hp.batch_size // (micro_batch * world.size)
        n_params = sum(p.numel() for p in model.parameters())
        announce(
            world,
            f"dVAE {preset}: {n_params:,} parameters, {config.vocab_size} codes on a grid of "
            f"{hp.image_size // config.factor} × {hp.image_size // config.factor}; data "
            f"{train.name} ({train.counts()}) at {hp.image_size} × {hp.image_size}; "
            f"steps {start} to {hp.steps} of {hp.batch_size} "
            f"images on {world.size} × {world.device.type}, {args.dtype}; into {run_dir}",
        )

        about = {"config": asdict(config), "preset": preset, "data": spec}
        about["image_size"] = hp.image_size

        def save(step: int) -> None:
            weights = {"model": average.module.state_dict(), "step": step}
            if world.is_main:
                checkpoint.save(run_dir / "dvae.pt", about | weights)
            state = {
                "config": asdict(config),
                "run": run,
                "n_averaged": int(average.n_averaged),
                "scaler": scaler.state_dict(),
                "step": step,
            }
            tensors = run_state.tensors_of(model, average, optimizer)
            run_state.save_state(state_path, state, tensors, sharded=False)

        # ---- the loop
        progress = training.Progress(world, start, hp.steps, hp.batch_size, "images")
        updates = training.Updates(args.dtype)
        for step in range(start, hp.steps):
            lr = cosine(step, hp.lr_steps, hp.lr, hp.lr_end)
            lr *= min(1, (step + 1) / (hp.warmup_steps + 1))
            kl_weight = cosine(step, hp.kl_steps, 0, hp.kl_weight)
            tau = cosine(step, hp.tau_steps, hp.tau_start, hp.tau_end)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for k in range(accumulate):
                (pixels,), skipped = next(batches)
                progress.skip(skipped)
                torch.manual_seed(training.derive(args.seed, "noise", step, world.rank, k))
                images = images_to(world.device, pixels)
                with averaging(loss_of, k == accumulate - 1):
                    with training.autocast(world, args.dtype):
                        loss, metrics = loss_of(images, tau, kl_weight)
                    scaler.scale(loss / accumulate).backward()
                progress.add(metrics)
            scaler.unscale_(optimizer)
            finite = clip_gradients(model, math.inf).isfinite().item()  # nothing is clipped here
            if finite:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if finite:
                average.update_parameters(model)
            updates.count(finite, step)

            # ---- log, save, look
            done = step + 1
            progress.step(done)
            stop = interrupt.agreed() if done < hp.steps else 0
            save_now = done % hp.eval_every == 0 or done == hp.steps or stop
            if done % hp.log_every == 0 or save_now:
                values = progress.take() | updates.take()
                log.write(done, **values, lr=lr, kl_weight=kl_weight, tau=tau)
            if save_now and updates.may_save(all_finite(model), done, hp.steps):
                with progress.paused():
                    save(done)
                    if world.is_main and not stop:
                        scores = evaluate(average.module, val_images, micro_batch, tau)
                        log.write(done, **scores)
                        progress.show(**scores)
                        log.draw()
                        with training.going_on(run_dir / "dvae.png"):
                            draw_reconstructions(average.module, val_images, run_dir / "dvae.png")
            if stop:
                progress.stop(done, stop)
    progress.close()
    if world.is_main:
        print(
            f"{run_dir}/dvae.pt: {progress.shown['val_psnr']:.1f} dB on held-out images, "
            f"{progress.shown['codes']:.0f} of {config.vocab_size} codes in use; "
            f"see {run_dir}/dvae.png\nnext: python train_prior.py --run-dir {run_dir}"
        )
    training.shut_down(world)


if __name__ == "__main__":
    main()
