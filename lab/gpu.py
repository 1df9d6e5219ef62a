"""
What only a GPU shows, in one command: are its numbers those of a CPU?

    python -m lab.gpu                                # the best device; base on a GPU, else tiny
    python -m lab.gpu --preset tiny --device cpu     # what of it a CPU can do

Losses and gradients in 32 bits against the CPU's, and in 16 bits against those; drawing with the
captured step, and at 16 bits; training sharded among one process and two; the memory of an update
against lab.plan. Each line is a difference and the most that it may be; at the end stands the first
that is larger, with exit code 1. Weights and tokens are random, but for drawing, with what is in
pretrained/tiny.
"""

import argparse
import copy
import json
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from data.toy import toy_scene
from dvae import DVAE
from engine.checkpoint import DTYPES, load_run
from engine.cli import Parser, Stop, pick_device, start
from lab.plan import memory_of, prior_cost, sizes_of
from sample import SHIPPED, encode_prompt, uniforms_of
from scale import fast
from scale.adamw import AdamW
from scale.gradient_scales import GradientScales
from scale.parallel import Loss, World, fill, launch, shard, shut_down
from transformer import Transformer, TransformerConfig

# Relative differences of losses and of gradients: of 8, 8 and 11 bits of significand and of 24,
# after the layers of the base preset. Our own guesses, until a GPU has been seen.
MOST = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 0.1), "fp16": (2e-3, 0.03)}
BATCH, UPDATES = 4, 3


def new_prior(config: TransformerConfig) -> tuple[Transformer, list[Tensor]]:
    """A prior of random weights, text [BATCH, T] and image tokens [BATCH, N]."""
    torch.manual_seed(0)
    text = torch.randint(config.text_vocab, (BATCH, config.text_len))
    text[:, 0] = config.text_vocab  # start-of-text
    image = torch.randint(config.image_vocab, (BATCH, config.grid**2))
    return Transformer(config), [text, image]


def loss_and_gradient(
    model: nn.Module, batch: list[Tensor], device: torch.device, dtype: str
) -> tuple[Tensor, Tensor]:
    """On a device, in a precision, as in a run: the loss and all gradients in a row, on the CPU."""
    model, batch = copy.deepcopy(model).to(device), [x.to(device) for x in batch]
    scales, factor = None, 1.0
    if isinstance(model, Transformer):
        fast.use_blocks(model)
        scales = GradientScales(model.blocks) if dtype == "fp16" else None
    elif dtype == "fp16":
        factor = 2.0**10  # one scale for the whole loss (A.2)
    torch.manual_seed(1)
    with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
        loss, _ = model.loss(*batch)
    (loss * factor).backward()
    if scales:
        scales.finish(0)
    grads = [p.grad.flatten() / factor for p in model.parameters()]
    return loss.detach().cpu(), torch.cat(grads).cpu()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def precisions(name: str, model: nn.Module, batch: list[Tensor], device: torch.device, base):
    """Rows of a model in each precision, against its loss and gradient `base`, or where there is
    none against those of 32 bits on the device, for its noise is its own."""
    for dtype, most in MOST.items():
        found = loss_and_gradient(model, batch, device, dtype)
        base = base or found
        for part, value, expected, limit in zip(("loss", "gradient"), found, base, most):
            yield f"{name}, {dtype}: {part}", relative(value, expected), limit


def drawing(device: torch.device):
    """Rows of drawing: the fast form's tokens against the readable one's, in 32 bits; and in 16 the
    nats per token, in 32 bits, of what was drawn, against those of what 32 bits draw."""
    bpe, _, prior, *_ = load_run(SHIPPED, str(device))
    captions = [toy_scene(k, "val").caption for k in range(16)]
    text = torch.stack([encode_prompt(caption, bpe, prior) for caption in captions]).to(device)
    uniforms = uniforms_of(0, range(len(text)), prior.config.grid**2).to(device)
    tokens = fast.generate(prior, text, uniforms=uniforms)
    readable = prior.generate(text, uniforms=uniforms)
    yield "drawing, fast form: tokens", (tokens != readable).float().mean().item(), 0.05
    with torch.inference_mode():
        nats = prior.loss(text, tokens)[1]["image_loss"].item()
        for dtype in ("bf16", "fp16"):
            *_, half, _, _ = load_run(SHIPPED, str(device), dtype)
            with torch.autocast(device.type, DTYPES[dtype]):
                drawn = fast.generate(half, text, uniforms=uniforms)
            found = prior.loss(text, drawn)[1]["image_loss"].item()
            yield f"drawing, {dtype}: nats per token", abs(found - nats), 0.1


def train(config: TransformerConfig, world: World, sharded: bool) -> list[float]:
    """The losses of a few updates of a new prior in 32 bits, whose batch the processes share."""
    model, batch = new_prior(config)
    text, image = (x[world.rank :: world.size].to(world.device) for x in batch)
    if sharded:
        weights = model.state_dict()
        with torch.device("meta"):
            model = Transformer(config)
        names = ("machine", "gpu")
        mesh = init_device_mesh(world.device.type, (1, world.size), mesh_dim_names=names)
        shard(model, mesh, world.device)
        fill(model, weights)
    fast.use_blocks(model)
    loss_of, losses = Loss(model.to(world.device)), []
    adamw = AdamW(model.parameters(), 1e-3, (0.9, 0.96), 1e-8, 0.045)
    for _ in range(UPDATES):
        loss, _ = loss_of(text, image)
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(world.mean(loss.detach()).item())
    return losses


def in_process(
    rank: int, size: int, port: int, device: str, config: TransformerConfig, out: Path
) -> None:
    """`train` sharded, as process `rank` of `size`; the first writes the losses."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = launch(torch.device(device))
    losses = train(config, world, sharded=True)
    if world.is_main:
        out.write_text(json.dumps(losses))
    shut_down(world)


def training(config: TransformerConfig, device: torch.device):
    """Rows of a few updates: sharded against a single process, and the memory against the plan."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    alone = torch.tensor(train(config, World(0, 1, device), sharded=False))
    if device.type == "cuda":
        planned = memory_of(*prior_cost(config, BATCH, again=False), shards=1, bits=32)
        total = sum(planned.values()) - planned["averaged parameters"]
        peak = torch.cuda.max_memory_allocated(device)
        yield f"memory of an update, {peak / 2**30:.2f} GB: plan", abs(peak / total - 1), 0.25
    for size in (1, 2):
        if device.type == "cuda" and torch.cuda.device_count() < size:
            print(f"left out: FSDP2 on {size} processes, for here is one GPU")
            continue
        with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
            free.bind(("127.0.0.1", 0))
            port, out = free.getsockname()[1], Path(folder) / "losses.json"
            free.close()
            mp.spawn(in_process, (size, port, device.type, config, out), nprocs=size)
            losses = torch.tensor(json.loads(out.read_text()))
        yield f"FSDP2 on {size} process(es): losses", relative(losses, alone), 1e-4


def rows(preset: str, device: torch.device):
    """(what, difference, at most) of everything, one after the other."""
    config, of_dvae, size = sizes_of(preset, argparse.Namespace())
    prior, batch = new_prior(config)
    base = loss_and_gradient(prior, batch, torch.device("cpu"), "fp32")
    yield from precisions("prior", prior, batch, device, base)
    tau, kl_weight = torch.tensor(1.0), torch.tensor(6.6)
    images = torch.rand(BATCH, 3, size, size)
    yield from precisions("dVAE", DVAE(of_dvae), [images, tau, kl_weight], device, None)
    yield from drawing(device)
    yield from training(config, device)


def main() -> None:
    parser = Parser(description="What only a GPU shows: are its numbers those of a CPU?")
    parser.add_argument("--preset", choices=("tiny", "small", "base"), help="base on a GPU")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best one there")
    args = parser.parse_args()
    device = pick_device(args.device)
    preset, first = args.preset or ("base" if device.type == "cuda" else "tiny"), None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{preset} on {name}, torch {torch.__version__}")
    print(f"{'':<44}{'difference':>12}{'at most':>10}")
    for what, difference, most in rows(preset, device):
        right = difference <= most  # not where it is NaN
        print(f"{what:<44}{difference:>12.2g}{most:>10.2g}{'' if right else '   <--'}", flush=True)
        if not right:
            first = first or f"{what} differs by {difference:.2g}; expected at most {most:.2g}"
    if first:
        raise Stop(first)
    print("all as on a CPU")


if __name__ == "__main__":
    start(main)
