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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import engine.run as training
import train_dvae
from bpe import BPE
from data.files import Pictures, open_dataset
from data.listings import preprocess_prior
from data.sheets import sheet
from data.toy import ToyWorld
from dvae import DVAE, DVAEConfig, load_dvae, load_openai
from engine import checkpoint, run_state
from engine.run import announce, images_to
from lab import plan
from scale.gradient_scales import GradientScales
from scale.parallel import (
    Loss,
    all_finite,
    averaging,
    checkpoint_activations,
    clip_gradients,
    fill,
    machine_mesh,
    replicate,
    shard,
)
from scale.powersgd import PowerSGD
from transformer import Transformer, TransformerConfig, load_transformer, pad_text


@dataclass
class PriorTraining:
    """How to train the prior; the defaults are the paper's (B.2), but for those of the plateau
    rule, of bpe_captions, logging and evaluation, which it does not give.

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
    clip: float = 4.0  # of the decompressed gradient (E); it only triggers in warm-up
    ema: float = 0.99
    ema_every: int = 25
    bpe_dropout: float = 0.1
    bpe_captions: int = 1_000_000
    caption_dropout: float = 0.0  # not the paper's: for guidance in sampling
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


def prepare(
    img, captions, rng, size: int, bpe: BPE, text_len: int, dropout=0.0, caption_dropout=0.0
) -> list:
    """uint8 [size, size, 3]; long [text_len]; whether the caption had to be cut."""
    pixels = torch.from_numpy(np.array(preprocess_prior(img, size, rng)))
    ids = bpe.encode(rng.choice(captions), dropout, rng)
    if caption_dropout and rng.random() < caption_dropout:
        ids = []
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
    path = world.share(lambda: next((p for p in paths if p.exists()), None))
    if path:
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


def powersgd(model: Transformer, rank: int, mesh: DeviceMesh | None, seed: int) -> PowerSGD:
    """Between the machines of a mesh, or between all processes: the matrices of the resblocks are
    compressed, embeddings, unembeddings, gains and biases are not (E)."""
    matrices = [(n, p) for n, p in model.blocks.named_parameters() if p.ndim == 2]
    compressed = {id(p) for _, p in matrices}
    others = [p for p in model.parameters() if id(p) not in compressed]
    if mesh is None:
        return PowerSGD(matrices, others, rank, seed=seed)
    gpu = mesh["gpu"]
    return PowerSGD(
        matrices, others, rank, mesh["machine"].get_group(), gpu.size(), gpu.get_local_rank(), seed
    )


def captions_of(dataset: ToyWorld | Pictures, count: int) -> Iterator[str]:
    """The captions of the first `count` samples."""
    for index in range(min(count, len(dataset))):
        yield from dataset.captions_of(index)


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
    return {
        "val_text_loss": of_text.mean().item(),
        "val_real_text_loss": of_text[~is_pad].mean().item(),
        "val_pad_loss": of_text[is_pad].mean().item(),
        "val_image_loss": of_image.mean().item(),
        "val_nats": (of_text.sum() + of_image.sum()).item() / len(text),
    }


@torch.no_grad()
def draw_samples(model: Transformer, dvae: DVAE, text: Tensor, captions, path) -> None:
    """16 held-out captions, each above one sample at temperature 1, always the same draws."""
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(text), model.config.grid**2, generator=generator).to(text.device)
    grid = (-1, model.config.grid, model.config.grid)
    images = dvae.decode(model.generate(text, uniforms=uniforms).view(grid))
    images = images.permute(0, 2, 3, 1).mul(255).round().to("cpu", torch.uint8).numpy()
    rows = [list(images[k : k + 8]) for k in range(0, len(images), 8)]
    names = [captions[k : k + 8] for k in range(0, len(images), 8)]
    picture = sheet(rows, names, scale=max(1, 128 // images.shape[1]))
    checkpoint.write(path, lambda file: picture.save(file, "PNG"))


def print_plan(args: argparse.Namespace) -> None:
    """Parameters, operations and memory of a run on --plan GPUs, of which --shard (8, as in the
    paper, where no number is given) hold the model together."""
    preset = args.preset or "small"
    dvae = training.choose(DVAEConfig, train_dvae.PRESETS[preset], args)
    size = training.choose(train_dvae.DVAETraining, train_dvae.PRESETS[preset], args).image_size
    fits = {"grid": size // dvae.factor, "image_vocab": dvae.vocab_size}
    config = training.choose(TransformerConfig, PRESETS[preset] | fits, args)
    hp = training.choose(PriorTraining, PRESETS[preset], args)
    micro_batch = training.check_batches(hp.batch_size, args.micro_batch, args.plan)
    shards = 1 if args.shard is None else args.shard or min(8, args.plan)
    if shards < 1 or args.plan % shards:
        raise ValueError(f"--shard {shards} does not divide --plan {args.plan}")
    model, cost = plan.prior_cost(config, micro_batch, args.checkpoint_activations)
    print(
        plan.table(
            model,
            cost,
            gpus=args.plan,
            shards=shards,
            batch_size=hp.batch_size,
            micro_batch=micro_batch,
            steps=hp.steps,
            tokens=config.text_len + config.grid**2,
            images=len(open_dataset(args.data or "toy", size)[0]),
            bits=32 if args.dtype == "fp32" else 16,
            gpu_memory=args.gpu_memory,
            powersgd_rank=args.powersgd_rank,
            again=args.checkpoint_activations,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Stage two: train the prior.")
    training.add_arguments(parser, PRESETS, TransformerConfig, PriorTraining)
    parser.add_argument("--openai-dvae", nargs=2, metavar=("ENC", "DEC"), help="released files")
    parser.add_argument(
        "--shard",
        type=int,
        nargs="?",
        const=0,
        metavar="GPUS",
        help="shard the model among the GPUs of a machine (2.5), or among this many",
    )
    parser.add_argument(
        "--powersgd-rank",
        type=int,
        metavar="R",
        help="compress what machines send each other to this rank (E)",
    )
    parser.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="keep only the resblocks' inputs, compute the rest again (2.4)",
    )
    training.add_plan(parser)
    args = parser.parse_args()
    if args.plan is not None:
        with training.door():
            print_plan(args)
        return

    # ---- what to run
    with training.door():
        world = training.launch(args.device)
        if args.openai_dvae:
            dvae, about = adopt_openai(args)
            run_dir = args.run_dir or Path("runs") / f"openai-{about['preset']}"
        else:
            run_dir = args.run_dir or world.share(lambda: training.newest_run("dvae.pt"))
            if run_dir is None:
                raise ValueError("no run holds a dvae.pt yet; train it with: python train_dvae.py")
            if not (run_dir / "dvae.pt").is_file():
                command = f"python train_dvae.py --run-dir {run_dir}"
                raise ValueError(f"{run_dir} holds no dvae.pt; train it with: {command}")
            about, dvae = checkpoint.load(run_dir / "dvae.pt"), load_dvae(run_dir / "dvae.pt")
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
        micro_batch = training.check_batches(hp.batch_size, args.micro_batch, world.size)
        mesh = machine_mesh(world.device, args.shard) if args.shard is not None else None
        if mesh and 4 * config.d_model % mesh["gpu"].size():
            raise ValueError(
                f"--shard {mesh['gpu'].size()} does not divide {4 * config.d_model}, 4d"
            )
        if args.powersgd_rank is not None:
            machines, gpus = (
                (mesh["machine"].size(), mesh["gpu"].size()) if mesh else (world.size, 1)
            )
            if machines == 1 or args.powersgd_rank < 1 or args.powersgd_rank % gpus:
                raise ValueError(
                    f"--powersgd-rank {args.powersgd_rank} on {machines} machine(s) of {gpus}: "
                    f"expected several machines, and a multiple of {gpus}"
                )
        train, val = open_dataset(spec, size, args.val, filters=args.filters)
        bpe, origin = find_bpe(run_dir, args, hp, config, train, world)
        announce(
            world,
            f"taking {'OpenAI' if args.openai_dvae else run_dir}'s dVAE, preset {preset}, "
            f"data {train.name} ({train.counts()}), {origin}",
        )
        config = replace(config, text_vocab=bpe.vocab_size)
        run = {**asdict(hp), "data": spec, "seed": args.seed}
        state_path = run_dir / "prior_state.pt"
        state = run_state.to_resume(
            state_path, run, config, args.resume, world, "n_averaged", "plateau", "window", "scales"
        )
        if args.init_from:
            model = load_transformer(args.init_from)
            checkpoint.check_config(args.init_from, asdict(model.config), config)
        options = dict(size=size, bpe=bpe, text_len=config.text_len)
        samples = training.Samples(
            train,
            partial(
                prepare,
                dropout=hp.bpe_dropout,
                caption_dropout=hp.caption_dropout,
                **options,
            ),
            args.seed,
        )
        val_samples = training.Samples(val, partial(prepare, **options), 0)
        val_pixels, val_text, _ = training.held_out(val_samples, 512, world)
        world.wait()  # until every rank has read what is now moved away
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            if not state:
                checkpoint.set_aside(run_dir, *run_state.names("prior"), "prior.pt")
            if args.openai_dvae and not state:
                checkpoint.set_aside(run_dir, *run_state.names("dvae"), "dvae.pt")
                checkpoint.save(run_dir / "dvae.pt", about)
            bpe.save(run_dir / "bpe.json")

    with training.safely(world, micro_batch):
        # ---- model and optimizer
        interrupt = training.Interrupt(world)
        if not args.init_from and (world.is_main or not mesh):
            torch.manual_seed(args.seed)
            model = Transformer(config)
        if mesh:  # rank 0's host alone holds the whole
            weights = model.state_dict() if world.is_main else {}
            with torch.device("meta"):
                model = Transformer(config)
        model = model.to("meta" if mesh else world.device).train()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(hp.ema))
        if mesh:  # (2.5)
            among = mesh["gpu"] if args.powersgd_rank else mesh
            for sharded in (model, average.module):
                shard(sharded, among, world.device)
                fill(sharded, weights)
            del weights
        scales = GradientScales(model.blocks) if args.dtype == "fp16" else None  # (2.4)
        if args.checkpoint_activations:
            checkpoint_activations(model.blocks)
        compressor = None
        if args.powersgd_rank:  # (E)
            compressor = powersgd(model, args.powersgd_rank, mesh, args.seed)
        # Weight decay on everything: our reading, for the paper exempts nothing.
        optimizer = torch.optim.AdamW(
            model.parameters(), hp.lr, (hp.beta1, hp.beta2), hp.eps, hp.weight_decay, fused=True
        )
        plateau = halving(optimizer, hp)
        start = 0
        window = torch.zeros(2, device=world.device)  # the sum of the losses, and how many
        if state:
            run_state.restore(state, model, average, optimizer, compressor)
            plateau.load_state_dict(state.about["plateau"])
            plateau.threshold = hp.plateau_threshold
            plateau.min_lrs = [hp.lr / 2**hp.plateau_halvings]
            for group in optimizer.param_groups:
                group.update(betas=(hp.beta1, hp.beta2), eps=hp.eps, weight_decay=hp.weight_decay)
                group["lr"] *= hp.lr / state.about["run"]["lr"]
            if scales and state.about["scales"]:
                scales.load_state_dict(state.about["scales"])
            start = state.about["step"]
            window += torch.tensor(state.about["window"], device=world.device)
            state = None  # its tensors are as large as the run's
        loss_of = Loss(model) if mesh or compressor else replicate(model, world.device)

        @torch.no_grad()
        def tokens_of(pixels: torch.Tensor) -> torch.Tensor:
            return dvae.encode(images_to(world.device, pixels)).flatten(1)

        val_text = val_text.to(world.device)
        chunks = val_pixels.split(micro_batch)
        val_image = torch.cat([tokens_of(chunk) for chunk in chunks])
        distortion = sum(
            len(c) * dvae.distortion(images_to(world.device, c)).item() for c in chunks
        )
        distortion /= len(val_pixels)
        shown = min(16, len(val_text))
        shown_captions = [
            bpe.decode(ids[ids < bpe.vocab_size].tolist()) for ids in val_text[:shown]
        ]
        log = training.Log(run_dir, "prior", start, world)
        batches = training.micro_batches(
            samples, world, start, hp.steps, hp.batch_size, micro_batch, args.workers
        )
        accumulate = hp.batch_size // (micro_batch * world.size)
        positions = config.text_len + grid**2
        n_params = sum(p.numel() for p in model.parameters())
        announce(
            world,
            f"prior {preset}: {n_params:,} parameters, {config.n_layer} layers, "
            f"d = {config.d_model}, {config.text_len} text and {grid} × {grid} image tokens, "
            f"{bpe.vocab_size} pieces of text; steps {start} to {hp.steps} of {hp.batch_size} "
            f"samples on {world.size} × {world.device.type}, {args.dtype}; into {run_dir}",
        )

        about = {"config": asdict(config), "preset": preset, "data": spec, "image_size": size}
        about["caption_dropout"] = hp.caption_dropout

        def save(step: int) -> None:
            weights = run_state.whole(average.module) if mesh else average.module.state_dict()
            if world.is_main:
                checkpoint.save(run_dir / "prior.pt", about | {"model": weights, "step": step})
            state = {
                "config": asdict(config),
                "run": run,
                "n_averaged": int(average.n_averaged),
                "plateau": plateau.state_dict(),
                "window": window.tolist(),
                "scales": scales and scales.state_dict(),
                "errors": compressor is not None,
                "step": step,
            }
            tensors = run_state.tensors_of(model, average, optimizer, compressor)
            run_state.save_state(state_path, state, tensors, sharded=mesh is not None)

        # ---- the loop
        progress = training.Progress(world, start, hp.steps, hp.batch_size * positions, "tokens")
        updates = training.Updates(args.dtype)
        for step in range(start, hp.steps):
            if step < hp.warmup_steps:
                for group in optimizer.param_groups:
                    group["lr"] = hp.lr * (step + 1) / hp.warmup_steps
            step_loss = torch.zeros((), device=world.device)
            for k in range(accumulate):
                (pixels, text, was_cut), skipped = next(batches)
                progress.skip(skipped)
                progress.cut += int(was_cut.sum())
                text = text.to(world.device, non_blocking=True)
                image = tokens_of(pixels)
                with averaging(loss_of, k == accumulate - 1 and not compressor):
                    with training.autocast(world, args.dtype, mesh is not None):
                        loss, metrics = loss_of(text, image)
                    (loss / accumulate).backward()
                step_loss += loss.detach() / accumulate
                progress.add(metrics)
            finite = scales is None or scales.finish(step)
            if compressor:
                compressor.average_gradients()
            norm = clip_gradients(model, hp.clip)
            finite = finite and norm.isfinite().item()
            if finite:
                optimizer.step()
                window += torch.stack([world.mean(step_loss), torch.ones_like(step_loss)])
            optimizer.zero_grad()
            updates.count(finite, step)

            done = step + 1
            if done % hp.ema_every == 0 or average.n_averaged == 0:  # the first starts it
                average.update_parameters(model)
            if done % hp.plateau_steps == 0:
                if done >= hp.warmup_steps and window[1] > 0:
                    plateau.step((window[0] / window[1]).item())
                window.zero_()

            # ---- log, save, look
            progress.step(done)
            stop = interrupt.agreed() if done < hp.steps else 0
            save_now = done % hp.eval_every == 0 or done == hp.steps or stop
            if done % hp.log_every == 0 or save_now:
                values = progress.take() | updates.take()
                if scales:
                    values["log2_scales"] = scales.scales.log2().tolist()
                log.write(done, **values, lr=optimizer.param_groups[0]["lr"])
            if save_now and updates.may_save(all_finite(model), done, hp.steps):
                with progress.paused():
                    save(done)
                    if not stop:
                        scores = evaluate(average.module, val_text, val_image, micro_batch)
                        if mesh:
                            average.module.reshard()  # the root stays gathered after a forward
                        nats = scores.pop("val_nats") / val_pixels[0].numel() + distortion
                        scores["val_bits_per_dim"] = nats / math.log(2)
                        log.write(done, **scores)
                        progress.show(**scores)
                        log.draw()
                    if not stop and world.is_main and not mesh:
                        with training.going_on(run_dir / "samples.png"):
                            draw_samples(
                                average.module,
                                dvae,
                                val_text[:shown],
                                shown_captions,
                                run_dir / "samples.png",
                            )
            if stop:
                progress.stop(done, stop)
    progress.close()
    if world.is_main:
        print(
            f"{run_dir}/prior.pt: {progress.shown['val_image_loss']:.3f} nats per image token "
            f"on held-out pictures; see {run_dir}/{'curves' if mesh else 'samples'}.png\n"
            f'next: python sample.py "a red cube" --run-dir {run_dir}'
        )
    training.shut_down(world)


if __name__ == "__main__":
    main()
