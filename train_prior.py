"""
Stage two: train the transformer on the stream of text and image tokens (2.2, B.2).

    python train_prior.py                    # goes on where train_dvae.py ended
    torchrun --nproc_per_node=8 train_prior.py --run-dir runs/base

Takes the dVAE of --run-dir (default: the newest run that holds one) with its preset and data,
trains the BPE on the captions if the run has none, and writes prior.pt, the averaged weights;
prior_state.pt, all that --resume needs; log.jsonl; samples.png, drawn from held-out captions.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import training
from bpe import BPE
from data import Folder, ToyWorld, open_dataset, preprocess_prior, sheet
from dvae import DVAE, load_dvae, load_openai
from scaling import GradientScales
from training import images_to
from transformer import Transformer, TransformerConfig, load_transformer, pad_text


@dataclass
class PriorTraining:
    """How to train the prior; the defaults are the paper's (B.2).

    The paper halves the step size "each time the training loss appeared to plateau", five times.
    Our reading: the mean loss of every `plateau_steps` updates is compared with the best one so
    far; when it has not fallen by the share `plateau_threshold`, the step size is halved.
    """

    batch_size: int = 1024
    steps: int = 430_000
    lr: float = 4.5e-4
    warmup_steps: int = 5000
    plateau_steps: int = 5000
    plateau_threshold: float = 0.002
    plateau_halvings: int = 5
    beta1: float = 0.9
    beta2: float = 0.96
    eps: float = 1e-8
    weight_decay: float = 4.5e-2
    clip: float = 4.0
    ema: float = 0.99
    ema_every: int = 25
    bpe_dropout: float = 0.1
    bpe_captions: int = 1_000_000
    log_every: int = 50
    eval_every: int = 500

    def __post_init__(self) -> None:
        training.check_ranges(self)


PRESETS = {
    "tiny": dict(n_layer=4, n_head=4, d_head=32, text_len=24, text_vocab=512, kernel=5,
                 batch_size=32, steps=3800, lr=2e-3, warmup_steps=100, plateau_steps=300,
                 plateau_threshold=0.025, ema=0.97, ema_every=5, bpe_captions=20_000),
    "small": dict(n_layer=12, n_head=8, d_head=64, text_len=64, text_vocab=4096, kernel=5,
                  batch_size=128, steps=30_000, lr=1e-3, warmup_steps=500, plateau_steps=1000,
                  plateau_threshold=0.005, bpe_captions=100_000),
    "base": dict(n_layer=24, n_head=16, batch_size=512, steps=200_000),
    "paper": dict(),
}  # fmt: skip


def prepare(img, captions, rng, size: int, bpe: BPE, text_len: int, dropout: float) -> list:
    """uint8 [size, size, 3]; long [text_len]; whether the caption had to be cut."""
    pixels = torch.from_numpy(np.array(preprocess_prior(img, size, rng)))
    ids = bpe.encode(rng.choice(captions), dropout, rng)
    text = pad_text(ids[: text_len - 1], text_len, bpe.vocab_size)
    return [pixels, text, torch.tensor(len(ids) > text_len - 1)]


def adopt_openai(args: argparse.Namespace) -> tuple[DVAE, dict]:
    """OpenAI's released dVAE in place of one of our own, and what its dvae.pt is to say."""
    dvae = load_openai(*args.openai_dvae)
    grid = TransformerConfig.grid if args.grid is None else args.grid
    return dvae, {
        "config": asdict(dvae.config),
        "model": dvae.state_dict(),
        "preset": args.preset or "small",
        "data": args.data or "toy",
        "image_size": dvae.config.factor * grid,
        "step": 0,
    }


def find_bpe(run_dir: Path, args, hp, config, train, world) -> tuple[BPE, str]:
    """The BPE of the weights to fine-tune, or of the run, or one trained on the captions; and a
    word on where it is from."""
    paths = [run_dir / "bpe.json"]
    if args.init_from and not args.resume:
        paths.insert(0, args.init_from.parent / "bpe.json")
    for path in paths:
        if path.exists():
            bpe = BPE.load(path)
            if args.text_vocab and args.text_vocab < bpe.vocab_size:
                raise ValueError(f"--text-vocab {args.text_vocab}: {path} has {bpe.vocab_size}")
            return bpe, f"BPE {path}"
    captions = captions_of(train, hp.bpe_captions)
    merges = world.share(lambda: BPE.train(captions, config.text_vocab).merges)
    return BPE(merges), f"BPE of {256 + len(merges)} pieces trained on its captions"


def halving(optimizer: torch.optim.Optimizer, hp: PriorTraining) -> ReduceLROnPlateau:
    """Halves the step size when the loss it is told has stopped falling (B.2)."""
    return ReduceLROnPlateau(
        optimizer,
        factor=0.5,
        patience=0,
        threshold=hp.plateau_threshold,
        min_lr=hp.lr / 2**hp.plateau_halvings,
    )


def captions_of(dataset: ToyWorld | Folder, count: int) -> Iterator[str]:
    """The captions of the first `count` samples."""
    for index in range(min(count, len(dataset))):
        yield from dataset.captions_of(index)


@torch.no_grad()
def evaluate(model: Transformer, text: torch.Tensor, image: torch.Tensor, chunk: int) -> dict:
    """Mean losses in nats per token over held-out text [M, T] and image tokens [M, N]."""
    sums: dict[str, float] = {}
    for texts, images in zip(text.split(chunk), image.split(chunk)):
        _, metrics = model.loss(texts, images)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value.item() * len(texts)
    return {f"val_{name}": total / len(text) for name, total in sums.items()}


@torch.no_grad()
def draw_samples(model: Transformer, dvae: DVAE, text: torch.Tensor, captions, path) -> None:
    """16 held-out captions, each above one sample at temperature 1, always the same draws."""
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(text), model.config.grid**2, generator=generator).to(text.device)
    grid = (-1, model.config.grid, model.config.grid)
    images = dvae.decode(model.generate(text, uniforms=uniforms).view(grid))
    images = images.permute(0, 2, 3, 1).mul(255).round().to("cpu", torch.uint8).numpy()
    rows = [list(images[k : k + 8]) for k in range(0, len(images), 8)]
    names = [captions[k : k + 8] for k in range(0, len(images), 8)]
    sheet(rows, names, scale=max(1, 128 // images.shape[1])).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Stage two: train the prior.")
    training.add_arguments(parser, PRESETS, TransformerConfig, PriorTraining)
    parser.add_argument("--openai-dvae", nargs=2, metavar=("ENC", "DEC"), help="released files")
    args = parser.parse_args()

    # ---- what to run
    with training.door():
        world = training.launch(args.device)
        if args.openai_dvae:
            dvae, about = adopt_openai(args)
            run_dir = args.run_dir or Path("runs") / f"openai-{about['preset']}"
        else:
            run_dir = args.run_dir or training.newest_run("dvae.pt")
            if run_dir is None:
                raise ValueError("no run holds a dvae.pt yet; train it with: python train_dvae.py")
            if not (run_dir / "dvae.pt").is_file():
                command = f"python train_dvae.py --run-dir {run_dir}"
                raise ValueError(f"{run_dir} holds no dvae.pt; train it with: {command}")
            about, dvae = training.load(run_dir / "dvae.pt"), load_dvae(run_dir / "dvae.pt")
        dvae = dvae.requires_grad_(False).to(world.device)
        preset, spec = args.preset or about.get("preset"), args.data or about.get("data")
        if preset not in PRESETS or not spec or "image_size" not in about:
            raise ValueError(f"{run_dir}/dvae.pt does not say how it was trained: make it again")
        size = about["image_size"]
        grid = size // dvae.config.factor
        for name, value in (("grid", grid), ("image_vocab", dvae.config.vocab_size)):
            if getattr(args, name) not in (None, value):
                raise ValueError(f"--{name} {getattr(args, name)}: the dVAE's is {value}")
            setattr(args, name, value)
        hp = training.choose(PriorTraining, PRESETS[preset], args)
        config = training.choose(TransformerConfig, PRESETS[preset], args)
        micro_batch = training.check_batches(hp.batch_size, args.micro_batch, world)
        train, val = open_dataset(spec, size, args.val)
        bpe, origin = find_bpe(run_dir, args, hp, config, train, world)
        training.announce(
            world,
            f"taking {'OpenAI' if args.openai_dvae else run_dir}'s dVAE, preset {preset}, "
            f"data {train.name}, {origin}",
        )
        config = replace(config, text_vocab=bpe.vocab_size)
        run = {**asdict(hp), "data": spec, "seed": args.seed}
        state_path = run_dir / "prior_state.pt"
        state = training.load_state(
            state_path, run, args.resume, world, "plateau", "window", "scales"
        )
        if state:
            training.check_config(state_path, state["config"], config)
        if args.init_from:
            model = load_transformer(args.init_from)
            training.check_config(args.init_from, asdict(model.config), config)
        options = dict(size=size, bpe=bpe, text_len=config.text_len)
        samples = training.Samples(
            train, partial(prepare, dropout=hp.bpe_dropout, **options), args.seed
        )
        val_samples = training.Samples(val, partial(prepare, dropout=0.0, **options), 0)
        val_pixels, val_text, _ = training.held_out(val_samples, 512, world)
        world.wait()  # until every rank has read what is now moved away
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            if not state:
                training.set_aside(run_dir, "prior.pt", "prior_state.pt")
            if args.openai_dvae and not state:
                training.set_aside(run_dir, "dvae.pt", "dvae_state.pt")
                training.save(run_dir / "dvae.pt", about)
            bpe.save(run_dir / "bpe.json")

    # ---- model and optimizer
    interrupt = training.Interrupt(world)
    if not args.init_from:
        torch.manual_seed(args.seed)
        model = Transformer(config)
    model = model.to(world.device).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(hp.ema))
    optimizer = torch.optim.AdamW(
        model.parameters(), hp.lr, (hp.beta1, hp.beta2), hp.eps, hp.weight_decay, fused=True
    )
    plateau = halving(optimizer, hp)
    scales = GradientScales(model.blocks) if args.dtype == "fp16" else None  # (2.4)
    start, window = 0, torch.zeros((), device=world.device)
    if state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        plateau.load_state_dict(state["plateau"])
        for group in optimizer.param_groups:
            group.update(betas=(hp.beta1, hp.beta2), eps=hp.eps, weight_decay=hp.weight_decay)
            group["lr"] *= hp.lr / state["run"]["lr"]
        if scales and state["scales"]:
            scales.load_state_dict(state["scales"])
        start, window = state["step"], state["window"].to(world.device)

    @torch.no_grad()
    def tokens_of(pixels: torch.Tensor) -> torch.Tensor:
        return dvae.encode(images_to(world.device, pixels)).flatten(1)

    val_text = val_text.to(world.device)
    val_image = torch.cat([tokens_of(chunk) for chunk in val_pixels.split(micro_batch)])
    shown = min(16, len(val_text))
    shown_captions = [bpe.decode(ids[ids < bpe.vocab_size].tolist()) for ids in val_text[:shown]]
    log = training.Log(run_dir, "prior", start, world)
    batches = training.micro_batches(
        samples, world, start, hp.steps, hp.batch_size, micro_batch, args.workers
    )
    accumulate = hp.batch_size // (micro_batch * world.size)
    positions = config.text_len + grid**2
    n_params = sum(p.numel() for p in model.parameters())
    training.announce(
        world,
        f"prior {preset}: {n_params:,} parameters, {config.n_layer} layers, d = {config.d_model}, "
        f"{config.text_len} text and {grid} × {grid} image tokens, {bpe.vocab_size} pieces of "
        f"text; steps {start} to {hp.steps} of {hp.batch_size} samples on {world.size} × "
        f"{world.device.type}, {args.dtype}; into {run_dir}",
    )

    about = {"config": asdict(config), "preset": preset, "data": spec, "image_size": size}

    def save(step: int) -> None:
        weights = {"model": average.module.state_dict(), "step": step}
        training.save(run_dir / "prior.pt", about | weights)
        state = {
            "config": asdict(config),
            "run": run,
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "plateau": plateau.state_dict(),
            "window": window,
            "scales": scales and scales.state_dict(),
            "step": step,
        }
        training.save(state_path, state)

    # ---- the loop
    progress = training.Progress(world, start, hp.steps, hp.batch_size * positions, "tokens")
    for step in range(start, hp.steps):
        if step < hp.warmup_steps:
            for group in optimizer.param_groups:
                group["lr"] = hp.lr * (step + 1) / hp.warmup_steps
        step_loss = torch.zeros((), device=world.device)
        for _ in range(accumulate):
            (pixels, text, was_cut), skipped = next(batches)
            progress.skip(skipped)
            progress.cut += int(was_cut.sum())
            image = tokens_of(pixels)
            with training.autocast(world, args.dtype):
                loss, metrics = model.loss(text.to(world.device), image)
            (loss / accumulate).backward()
            step_loss += loss.detach() / accumulate
            progress.add(metrics)
        window += world.mean(step_loss)
        world.average_gradients(model)
        finite = scales is None or scales.finish(step)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), hp.clip)
        if finite and norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        if done % hp.ema_every == 0 or average.n_averaged == 0:
            average.update_parameters(model)
        if done % hp.plateau_steps == 0:
            if done >= hp.warmup_steps:
                plateau.step(window.item() / hp.plateau_steps)
            window.zero_()

        # ---- log, save, look
        progress.step(done)
        stop = interrupt.agreed() if done < hp.steps else 0
        save_now = done % hp.eval_every == 0 or done == hp.steps or stop
        if done % hp.log_every == 0 or save_now:
            values = progress.take()
            progress.check(values, done)
            if scales:
                values["log2_scales"] = scales.scales.log2().tolist()
            log.write(done, **values, lr=optimizer.param_groups[0]["lr"])
        if save_now and world.is_main:
            with progress.paused():
                save(done)
                if not stop:
                    scores = evaluate(average.module, val_text, val_image, micro_batch)
                    log.write(done, **scores)
                    progress.show(**scores)
                    draw_samples(
                        average.module,
                        dvae,
                        val_text[:shown],
                        shown_captions,
                        run_dir / "samples.png",
                    )
        if stop:
            progress.close()
            training.shut_down(world)
            training.fail(f"stopped after step {done} of {hp.steps}; go on with --resume", stop)
    progress.close()
    if world.is_main:
        print(
            f"{run_dir}/prior.pt: {progress.shown['val_image_loss']:.3f} nats per image token "
            f"on held-out pictures; see {run_dir}/samples.png\n"
            f'next: python sample.py "a red cube" --run-dir {run_dir}'
        )
    training.shut_down(world)


if __name__ == "__main__":
    main()
