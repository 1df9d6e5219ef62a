"""
The reranker: train CLIP on the pictures and captions of a run (2.6).

    python train_clip.py                    # goes on where train_prior.py ended
    torchrun --nproc_per_node=8 train_clip.py --run-dir runs/base

Takes the BPE of --run-dir (default: the newest run that holds one) and the preset and data of its
dVAE, and writes clip.pt; clip_state.pt, all that --resume needs; log.jsonl; clip.png, the cosines
of held-out pictures and captions.
"""

import argparse
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import engine.run as training
from bpe import BPE
from clip import CLIP, CLIPConfig, contrastive_loss, load_clip, pad_text
from data.files import open_dataset
from data.listings import preprocess_prior
from engine import checkpoint, run_state
from engine.run import announce, cosine, images_to
from scale.parallel import all_finite, clip_gradients, replicate


@dataclass
class CLIPTraining:
    """How to train CLIP; the defaults are its paper's, of ViT-B/32 (CLIP, Tables 18 and 20)."""

    batch_size: int = 32_768
    steps: int = 390_625  # 32 epochs of 400 million pairs
    lr: float = 5e-4
    warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    log_every: int = 50
    eval_every: int = 500

    def __post_init__(self) -> None:
        training.check_ranges(self)


PRESETS = {
    "tiny": dict(image_size=32, patch=4, d_image=64, d_text=64, n_layer=2, d_head=32, d_embed=64,
                 text_len=24, batch_size=128, steps=1200, lr=2e-3, warmup_steps=60),
    "small": dict(image_size=64, patch=8, d_image=256, d_text=256, n_layer=6, d_embed=256,
                  text_len=64, batch_size=512, steps=20_000, lr=1e-3, warmup_steps=500),
    "base": dict(batch_size=4096, steps=100_000),
    "paper": dict(),
}  # fmt: skip


def prepare(img, captions, rng, size: int, bpe: BPE, text_len: int) -> list:
    """uint8 [size, size, 3]; long [text_len]; whether the caption had to be cut."""
    pixels = torch.from_numpy(np.array(preprocess_prior(img, size, rng)))
    ids = bpe.encode(rng.choice(captions))
    return [pixels, pad_text(ids, text_len, bpe.vocab_size), torch.tensor(len(ids) > text_len - 1)]


def decayed(model: nn.Module) -> list[dict]:
    """The parameters in two groups: weights decay, gains, biases and the temperature do not."""
    split: dict[bool, list] = {True: [], False: []}
    for p in model.parameters():
        split[p.ndim > 1].append(p)
    return [{"params": split[True]}, {"params": split[False], "weight_decay": 0.0}]


@torch.no_grad()
def evaluate(model: CLIP, images: Tensor, text: Tensor, chunk: int) -> tuple[dict, Tensor]:
    """Of M held-out pairs: the loss over all of them in nats; how often the nearest of the M
    captions is the picture's own, and the other way around; and the cosines [M, M].

    Captions of the same words count as one: each of them is right for the pictures of them all.
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


def draw_cosines(images: Tensor, captions: list[str], cosines: Tensor, path: Path) -> None:
    """Pictures, uint8 [n, H, W, 3], over a table of their cosines with each caption."""
    cell, left, line = 72, 440, 24
    picture = Image.new("RGB", (left + cell * len(images), cell + line * len(captions)), "white")
    pen = ImageDraw.Draw(picture)
    for column, pixels in enumerate(images.numpy()):
        img = Image.fromarray(pixels).resize((cell - 4, cell - 4), Image.Resampling.NEAREST)
        picture.paste(img, (left + cell * column + 2, 2))
    low, high = cosines.aminmax()
    for row, caption in enumerate(captions):
        y = cell + line * row
        pen.text((4, y + 6), caption[:72], "black")
        for column, value in enumerate(cosines[:, row].tolist()):
            shade = round(255 - 150 * (value - low.item()) / (high - low).clamp_min(1e-9).item())
            x = left + cell * column
            pen.rectangle((x, y, x + cell - 2, y + line - 2), (shade, shade, 255))
            pen.text((x + 20, y + 6), f"{value:.2f}", "black")
    checkpoint.write(path, lambda file: picture.save(file, "PNG"))


def main() -> None:
    parser = argparse.ArgumentParser(description="The reranker: train CLIP.")
    training.add_arguments(parser, PRESETS, CLIPConfig, CLIPTraining)
    args = parser.parse_args()

    # ---- what to run
    with training.door():
        world = training.launch(args.device)
        run_dir = args.run_dir or world.share(lambda: training.newest_run("bpe.json", "dvae.pt"))
        if run_dir is None:
            raise ValueError("no run holds a bpe.json and a dvae.pt; start with train_dvae.py")
        for name, script in (("dvae.pt", "train_dvae.py"), ("bpe.json", "train_prior.py")):
            if not (run_dir / name).is_file():
                command = f"python {script} --run-dir {run_dir}"
                raise ValueError(f"{run_dir} holds no {name}; train it with: {command}")
        about = checkpoint.load(run_dir / "dvae.pt")
        bpe = BPE.load(run_dir / "bpe.json")
        preset, spec = args.preset or about.get("preset"), args.data or about.get("data")
        if preset not in PRESETS or not spec or "image_size" not in about:
            raise ValueError(f"{run_dir}/dvae.pt does not say how it was trained: make it again")
        size = about["image_size"]
        hp = training.choose(CLIPTraining, PRESETS[preset], args)
        if args.text_vocab not in (None, bpe.vocab_size):
            raise ValueError(f"--text-vocab {args.text_vocab}: the BPE has {bpe.vocab_size} pieces")
        config = training.choose(CLIPConfig, PRESETS[preset], args)
        config = replace(config, text_vocab=bpe.vocab_size)
        # Gradients of parts of a batch do not add up to that of a contrastive loss, in which every
        # pair meets every other: a process takes its share in one pass.
        micro_batch = training.check_batches(hp.batch_size, args.micro_batch, world.size)
        if micro_batch * world.size != hp.batch_size:
            raise ValueError(
                f"--micro-batch {micro_batch}: every pair of the batch meets every other in one "
                f"pass of {hp.batch_size // world.size} per process; set --batch-size instead"
            )
        train, val = open_dataset(spec, size, args.val, filters=args.filters)
        announce(
            world,
            f"taking {run_dir}'s BPE, preset {preset}, data {train.name} ({train.counts()})",
        )
        run = {**asdict(hp), "data": spec, "seed": args.seed}
        state_path = run_dir / "clip_state.pt"
        state = run_state.to_resume(state_path, run, config, args.resume, world, "scaler")
        if args.init_from:
            model = load_clip(args.init_from)
            checkpoint.check_config(args.init_from, asdict(model.config), config)
        else:
            torch.manual_seed(args.seed)
            model = CLIP(config)
        options = dict(size=size, bpe=bpe, text_len=config.text_len)
        samples = training.Samples(train, partial(prepare, **options), args.seed)
        val_samples = training.Samples(val, partial(prepare, **options), 0)
        val_pixels, val_text, _ = training.held_out(val_samples, 512, world)
        world.wait()  # until every rank has read what is now moved away
        if world.is_main and not state:
            checkpoint.set_aside(run_dir, *run_state.names("clip"), "clip.pt")

    with training.safely(world, micro_batch, "--batch-size"):
        # ---- model and optimizer
        interrupt = training.Interrupt(world)
        model = model.to(world.device).train()
        optimizer = torch.optim.AdamW(
            decayed(model), hp.lr, (hp.beta1, hp.beta2), hp.eps, hp.weight_decay, fused=True
        )
        scaler = torch.amp.GradScaler(world.device.type, enabled=args.dtype == "fp16")
        start = 0
        if state:
            run_state.restore(state, model, None, optimizer)
            for group in optimizer.param_groups:
                group.update(betas=(hp.beta1, hp.beta2), eps=hp.eps)
            optimizer.param_groups[0]["weight_decay"] = hp.weight_decay
            if state.about["scaler"]:
                scaler.load_state_dict(state.about["scaler"])
            start = state.about["step"]
        loss_of = replicate(model, world.device)

        val_images, val_text = images_to(world.device, val_pixels), val_text.to(world.device)
        shown = min(12, len(val_text))
        shown_captions = [
            bpe.decode(ids[ids < bpe.vocab_size].tolist()) for ids in val_text[:shown]
        ]
        log = training.Log(run_dir, "clip", start, world)
        batches = training.micro_batches(
            samples, world, start, hp.steps, hp.batch_size, micro_batch, args.workers
        )
        n_params = sum(p.numel() for p in model.parameters())
        announce(
            world,
            f"CLIP {preset}: {n_params:,} parameters, {config.n_layer} layers in each encoder, "
            f"patches of {config.patch} × {config.patch} in {config.image_size} × "
            f"{config.image_size} pixels; "
            f"steps {start} to {hp.steps} of {hp.batch_size} pairs on {world.size} × "
            f"{world.device.type}, {args.dtype}; into {run_dir}",
        )

        about = {"config": asdict(config), "preset": preset, "data": spec}

        def save(step: int) -> None:
            if world.is_main:
                weights = {"model": model.state_dict(), "step": step}
                checkpoint.save(run_dir / "clip.pt", about | weights)
            state = {
                "config": asdict(config),
                "run": run,
                "scaler": scaler.state_dict(),
                "step": step,
            }
            tensors = run_state.tensors_of(model, None, optimizer)
            run_state.save_state(state_path, state, tensors, sharded=False)

        # ---- the loop
        progress = training.Progress(world, start, hp.steps, hp.batch_size, "images")
        updates = training.Updates(args.dtype)
        for step in range(start, hp.steps):
            lr = cosine(step, hp.steps, hp.lr, 0) * min(1, (step + 1) / (hp.warmup_steps + 1))
            for group in optimizer.param_groups:
                group["lr"] = lr
            (pixels, text, was_cut), skipped = next(batches)
            progress.skip(skipped)
            progress.cut += int(was_cut.sum())
            images = images_to(world.device, pixels)
            with training.autocast(world, args.dtype):
                loss, metrics = loss_of(images, text.to(world.device, non_blocking=True))
            scaler.scale(loss).backward()
            progress.add(metrics)
            scaler.unscale_(optimizer)
            finite = clip_gradients(model, math.inf).isfinite().item()  # nothing is clipped here
            if finite:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            updates.count(finite, step)

            # ---- log, save, look
            done = step + 1
            progress.step(done)
            stop = interrupt.agreed() if done < hp.steps else 0
            save_now = done % hp.eval_every == 0 or done == hp.steps or stop
            if done % hp.log_every == 0 or save_now:
                values = progress.take() | updates.take()
                log.write(done, **values, lr=lr)
            if save_now and updates.may_save(all_finite(model), done, hp.steps):
                with progress.paused():
                    save(done)
                    if world.is_main and not stop:
                        scores, cosines = evaluate(model, val_images, val_text, micro_batch)
                        log.write(done, **scores)
                        progress.show(**scores)
                        log.draw()
                        part = cosines[:shown, :shown].cpu()
                        path = run_dir / "clip.png"
                        with training.going_on(path):
                            draw_cosines(val_pixels[:shown], shown_captions, part, path)
            if stop:
                progress.stop(done, stop)
    progress.close()
    if world.is_main:
        scores = progress.shown
        print(
            f"{run_dir}/clip.pt: among {len(val_text)} held-out pairs {scores['val_loss']:.2f} nats"
            f", {scores['val_captions_found']:.1%} of the captions and "
            f"{scores['val_pictures_found']:.1%} of the pictures found; see {run_dir}/clip.png\n"
            f'next: python sample.py "a red cube" --candidates 32 --run-dir {run_dir}'
        )
    training.shut_down(world)


if __name__ == "__main__":
    main()
