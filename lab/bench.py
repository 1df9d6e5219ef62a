"""
How fast this code is: against the machine's limit, and against others where they are installed.

    python -m lab.bench                        # a table, in a few minutes on two cores
    python -m lab.bench --peers                # beside dalle-pytorch, tokenizers, dense attention
    python -m lab.bench --only prior generate-8 --threads 1
    python -m lab.bench --device cuda          # the base preset, in bfloat16

The limit of a piece of work is what its matrix products would take at the rate of a large product
(on a CPU with AVX-512 a 1 × 1 convolution, as in training), or its bytes at the read bandwidth,
whichever is longer; both are measured between the rounds of the same line, and the operations and
bytes are counted below: those that the masks ask for, not those that the code spends. BPE has no
such limit.

Each line is a process of its own. All who do the same work take turns, and a ratio is the median
over the rounds of their time over ours. Memory is what the process grew by at its peak with our
code in it alone. Models have random weights. Nothing here asserts a time.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bpe import BPE
from dvae import DVAE, DVAEConfig
from engine.cli import Parser, Stop, start
from scale import fast
from transformer import (  # fmt: skip
    Attention,
    Transformer,
    TransformerConfig,
    attention_mask,
    layer_kind,
    pad_text,
)

try:
    import dalle_pytorch
    from dalle_pytorch.dalle_pytorch import gumbel_sample, top_k
except ImportError:
    dalle_pytorch = None
try:
    import tokenizers
except ImportError:
    tokenizers = None

CPU_CONFIG = TransformerConfig(n_layer=4, n_head=8)  # d 512, 256 text tokens, a 32 × 32 grid
CUDA_CONFIG = TransformerConfig(n_layer=24, n_head=16)  # the base preset: d 1024


@dataclass
class Work:
    """One line of the table. Each contestant is called once a round and returns its seconds."""

    what: str
    unit: str
    units: float  # done in a call
    ours: Callable[[], float]
    peers: Callable[[], dict[str, Callable[[], float]]] = dict
    ops: float = 0  # multiplications and additions in matrix products
    bytes: float = 0  # that must be read
    rounds: int = 5
    also: Callable[[dict[str, float]], dict[str, float]] = lambda seconds: {}  # further ratios


# ---- operations and bytes ------------------------------------------------------------------------


def pairs(c: TransformerConfig, first: int = 0, last: int | None = None) -> int:
    """(query, key) pairs that the masks of all layers allow, for the image cells first .. last."""
    total = 0
    for i in range(1, c.n_layer + 1):
        # The last cell's row of the mask has all distances that a position sees.
        last_row = attention_mask(layer_kind(i, c.n_layer), 0, c.grid, c.kernel)[-1]
        back = last_row.flip(0).nonzero()[:, 0]
        cells = torch.arange(c.grid**2)[first:last]
        total += c.text_len * len(cells) + int((back <= cells[:, None]).sum())
    return total


def forward_ops(c: TransformerConfig, batch: int) -> float:
    """Of one forward pass: 2 for each weight and position, 4 · d for each query and key."""
    T, N, d = c.text_len, c.grid**2, c.d_model
    matrices = 12 * d * d * c.n_layer * (T + N)
    heads = d * ((T - 1) * (c.text_vocab + T) + N * c.image_vocab)
    attention = 2 * d * (pairs(c) + c.n_layer * T * (T + 1) // 2)
    return 2.0 * batch * (matrices + heads + attention)


def token_cost(c: TransformerConfig, batch: int, first: int, last: int) -> tuple[float, float]:
    """Mean operations and numbers read for drawing one of the cells first .. last of each image.

    The weights and the text are read once for the whole batch, the image's keys and values for
    each of its images.
    """
    weights = 12 * c.d_model**2 * c.n_layer + c.d_model * c.image_vocab
    seen = pairs(c, first, last) / (last - first)
    text = c.text_len * c.n_layer
    ops = 2.0 * batch * (weights + 2 * c.d_model * seen)
    return ops, weights + 2 * c.d_model * (text + batch * (seen - text))


# ---- the clock and the machine -------------------------------------------------------------------


def clock(device: str) -> float:
    """The time, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object], device: str = "cpu") -> Callable[[], float]:
    def run() -> float:
        start = clock(device)
        work()
        return clock(device) - start

    return run


def probes(device: str) -> dict[str, Callable[[], float]]:
    """What shows the limits: seconds for an operation and for a byte."""
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    linear = nn.Linear(2048, side, bias=False, device=device, dtype=dtype).requires_grad_(False)
    fast.use_convolutions(linear)
    x = torch.randn(16, side // 16, 2048, device=device, dtype=dtype)
    y = torch.zeros(2 ** (30 if device == "cuda" else 26), device=device)  # more than caches hold
    product, read = timed(lambda: linear(x), device), timed(lambda: y.sum(), device)
    return {
        "op": lambda: product() / (2 * side**2 * 2048),
        "byte": lambda: min(read() for _ in range(3)) / (4 * len(y)),
    }


def memory(device: str) -> float:
    """The peak so far, in MB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def measure(build: Callable[[], Work], device: str, with_peers: bool) -> dict:
    """A line of the table as plain data."""
    before = memory(device)
    work = build()
    work.ours()
    grown = memory(device) - before
    peers = work.peers() if with_peers else {}
    contestants = {"ours": work.ours, **peers, **probes(device)}
    rounds = [{name: run() for name, run in contestants.items()} for _ in range(work.rounds)]
    ours = median(r["ours"] for r in rounds)
    op, byte = (min(r[name] for r in rounds) for name in ("op", "byte"))
    limits = {"matrix products": work.ops * op, "reading": work.bytes * byte}
    limit = max(limits, key=limits.get)
    ratios = [{n: r[n] / r["ours"] for n in peers} for r in rounds]
    if with_peers:
        ratios = [ratio | work.also(r) for ratio, r in zip(ratios, rounds)]
    return {
        "what": work.what,
        "figure": work.units / ours,
        "unit": work.unit,
        "seconds": ours,
        "limit": limit if limits[limit] else None,
        "at_limit": work.units / limits[limit] if limits[limit] else None,
        "percent": 100 * limits[limit] / ours,
        "gflops": 1e-9 / op,
        "gb_per_s": 1e-9 / byte,
        "memory": grown,
        "ratios": {n: median(r[n] for r in ratios) for n in ratios[0]},
    }


# ---- BPE -----------------------------------------------------------------------------------------


def corpus(megabytes: float) -> list[str]:
    """Captions of made-up words, as frequent as words are: the r-th one 1/r as often as the first.

    Of 100,000 words some 75,000 different ones occur in 20 MB.
    """
    rng = random.Random(0)
    syllables = [a + b + c for a in "bcdfghklmnprstvwz" for b in "aeiou" for c in ["", *"lnrst"]]
    known = ["".join(rng.choices(syllables, k=rng.choice([1, 2, 2, 3, 4]))) for _ in range(100_000)]
    weights = [1 / r for r in range(1, len(known) + 1)]
    chosen = iter(rng.choices(known, weights, k=int(megabytes * 1e6 / 6)))
    captions, size = [], 0
    while size < megabytes * 1e6 and (words := [word for word, _ in zip(chosen, range(12))]):
        captions.append(" ".join(words))
        size += len(captions[-1]) + 1
    return captions


def peer_tokenizer(captions: list[str], vocab_size: int) -> "tokenizers.Tokenizer":
    """Byte-level BPE by the `tokenizers` library; the made-up words are of a to z alone."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[a-z]+|."), "isolated")
    to_letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, to_letters])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def bpe_training(device: str) -> Work:
    captions = corpus(20)
    ours = timed(lambda: BPE.train(captions, 16384))
    work = Work("BPE training, vocabulary 16,384 on 20 MB", "MB/s", 20, ours, rounds=1)
    if tokenizers:
        work.peers = lambda: {"tokenizers": timed(lambda: peer_tokenizer(captions, 16384))}
    return work


def bpe_encoding(device: str, dropout: float = 0.0) -> Work:
    captions = corpus(2)
    bpe, rng = BPE.train(captions, 8192), random.Random(0)
    captions = captions[:10_000]
    what = "BPE encoding" + (f", dropout {dropout}" if dropout else "")
    work = Work(what, "captions/s", len(captions), None)
    work.ours = timed(lambda: [bpe.encode(caption, dropout, rng) for caption in captions])

    def peers() -> dict[str, Callable[[], float]]:
        peer = peer_tokenizer(corpus(2), 8192)
        peer.model.dropout = dropout or None
        return {"tokenizers": timed(lambda: [peer.encode(caption).ids for caption in captions])}

    work.peers = peers if tokenizers else dict
    return work


# ---- the dVAE ------------------------------------------------------------------------------------


def dvae(device: str, training: bool, config: DVAEConfig | None = None) -> Work:
    """The peer is the same network with the usual layout of its tensors, in place of channels_last;
    other packages have other networks."""
    cuda = device == "cuda"
    config = config or DVAEConfig(n_hid=128 if cuda else 64, n_init=64)
    shape = (32, 3, 256, 256) if cuda else (4, 3, 128, 128)
    images = torch.rand(shape, device=device)

    def contestant(layout: torch.memory_format) -> Callable[[], float]:
        model = DVAE(config).to(device, memory_format=layout)
        fast.upsample_late(model.decoder)  # as the trainer has it
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=cuda):
                if training:
                    optimizer.zero_grad()
                    model.loss(images, 1.0, 6.6)[0].backward()
                    optimizer.step()
                else:
                    with torch.inference_mode():
                        model.encode(images)

        return timed(step, device)

    n, side = shape[0], shape[2]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        twin = DVAE(config)
        logits = twin.encoder(torch.empty(shape))
        if training:
            twin.decoder(logits)
    ops = counter.get_total_flops() * (3 if training else 1)
    what = f"dVAE {'training step' if training else 'encoding'}, n_hid {config.n_hid}, {side} px"
    work = Work(what, "images/s", n, contestant(torch.channels_last), ops=ops)
    work.peers = lambda: {"contiguous layout": contestant(torch.contiguous_format)}
    return work


# ---- the prior -----------------------------------------------------------------------------------


def peer_dalle(config: TransformerConfig, kinds: list[str], **kw) -> nn.Module:
    """dalle-pytorch's model of the same sizes; its dVAE is not used."""
    vae = dalle_pytorch.DiscreteVAE(
        image_size=8 * config.grid, num_layers=3, num_tokens=config.image_vocab,
        codebook_dim=8, hidden_dim=8,
    )  # fmt: skip
    return dalle_pytorch.DALLE(
        dim=config.d_model, vae=vae, num_text_tokens=config.text_vocab,
        text_seq_len=config.text_len, depth=config.n_layer, heads=config.n_head,
        dim_head=config.d_head, attn_types=kinds, **kw,
    )  # fmt: skip


def prior_data(c: TransformerConfig, batch: int, device: str) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, c.text_vocab, (c.text_len // 2,))
    text = pad_text(ids, c.text_len, c.text_vocab).expand(batch, -1)
    return text.to(device), torch.randint(0, c.image_vocab, (batch, c.grid**2)).to(device)


def prior_step(device: str, config: TransformerConfig | None = None) -> Work:
    cuda = device == "cuda"
    c, batch = config or (CUDA_CONFIG if cuda else CPU_CONFIG), 16 if cuda else 2
    text, image = prior_data(c, batch, device)

    def contestant(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], float]:
        trained = [p for p in model.train().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=cuda):
                value = loss(model)
            value.backward()
            optimizer.step()

        return timed(step, device)

    def our_loss(model: Transformer) -> Tensor:
        return model.loss(text, image)[0]

    model = Transformer(c).to(device)
    fast.use_blocks(model)
    fast.use_convolutions(model)
    what = f"prior training step, d {c.d_model}, {c.n_layer} layers, grid {c.grid}, batch {batch}"
    units, ops = batch * (c.text_len + c.grid**2), 3 * forward_ops(c, batch)
    work = Work(what, "tokens/s", units, contestant(model, our_loss), ops=ops, rounds=3)

    def peers() -> dict[str, Callable[[], float]]:
        dense = Transformer(c).to(device)
        fast.use_convolutions(dense)
        found = {"dense": contestant(dense, our_loss)}
        if dalle_pytorch and not cuda:
            kinds = ["axial_row", "axial_col", "axial_row", "conv_like"]
            words = text.clamp(max=c.text_vocab - 1)
            found["dalle-pytorch"] = contestant(
                peer_dalle(c, kinds), lambda model: model(words, image, return_loss=True)
            )
        return found

    work.peers = peers
    return work


def grid(device: str, size: int) -> Work:
    config = CUDA_CONFIG if device == "cuda" else CPU_CONFIG
    work = prior_step(device, replace(config, grid=size))
    work.peers = dict
    return work


def attention(device: str, kind: str, config: TransformerConfig | None = None) -> Work:
    """The whole resblock, forward and backward; the peers without its two matrices are the
    attention alone, where the time of the matrices is taken from both sides."""
    c, batch = config or (CUDA_CONFIG if device == "cuda" else CPU_CONFIG), 2
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    block = Attention(c, kind).to(device, dtype)
    S = c.text_len + c.grid**2
    fast.use_convolutions(block)
    x = torch.randn(batch, S, c.d_model, device=device, dtype=dtype, requires_grad=True)

    def contestant(forward: Callable[[Tensor], Tensor]) -> Callable[[], float]:
        return timed(lambda: forward(x).backward(x.detach()), device)

    def peers() -> dict[str, Callable[[], float]]:
        matrices = contestant(lambda x: block.out(block.qkv(block.norm(x))[..., : c.d_model]))
        return {"dense": contestant(block), "its matrices": matrices}

    seen = int(attention_mask(kind, c.text_len, c.grid, c.kernel).sum())
    ops = 3 * 2.0 * batch * (4 * c.d_model**2 * S + 2 * c.d_model * seen)
    what = f"attention layer, {kind}, forward and backward"
    ours = contestant(lambda x: fast.attend_in_blocks(block, x))
    work = Work(what, "tokens/s", batch * S, ours, peers, ops)

    def without_matrices(seconds: dict[str, float]) -> dict[str, float]:
        alone = {name: seconds[name] - seconds["its matrices"] for name in ("ours", "dense")}
        return {"dense, both without matrices": alone["dense"] / alone["ours"]}

    work.also = without_matrices
    return work


class Enough(Exception):
    pass


def generation(device: str, batch: int, config: TransformerConfig | None = None):
    """Tokens of all images together; `batch` candidates of one prompt.

    A stretch in the middle of the image is drawn, after all before it has been read at once: time
    grows with the position at most linearly, so its mean over the image is that in the middle. The
    figure is from the median over the tokens of the stretch.
    """
    cuda = device == "cuda"
    c = config or (CUDA_CONFIG if cuda else CPU_CONFIG)
    N = c.grid**2
    m = N // 4 if cuda or batch == 1 else N // 16
    first = (N - m) // 2
    text, image = prior_data(c, batch, device)
    prefix, uniforms = image[:1, :first].expand(batch, -1), torch.rand(batch, N).to(device)
    dtype = torch.bfloat16 if cuda else torch.float32

    def median_step(times: list[float]) -> float:
        return median(b - a for a, b in zip(times[1:], times[2:]))

    def drawing(generate: Callable, count: int, waits: bool = True) -> list[float]:
        """When each of the first tokens was there; the first has what is known read before it."""
        times = []

        def progress(k: int, _: Tensor) -> None:
            if waits or k in (first + 3, first + count):
                times.append(clock(device))
            if k == first + count:
                raise Enough

        with suppress(Enough):
            generate(model, text, prefix, uniforms, progress=progress)
        return times

    def ours() -> float:
        times = drawing(fast.generate, m, waits=not cuda)
        return (times[-1] - times[-2]) / (m - 3) if cuda else median_step(times)

    @torch.inference_mode()
    def peer(model: nn.Module) -> float:
        cache, times, drawn = {}, [], prefix
        words = text.clamp(max=c.text_vocab - 1)
        for _ in range(6):
            logits = model(words, drawn, cache=cache)[:, -1]
            token = gumbel_sample(top_k(logits, thres=0.5)) - model.num_text_tokens
            drawn = torch.cat([drawn, token[:, None].clamp(min=0)], dim=1)
            times.append(clock(device))
        return median_step(times)

    model = Transformer(c).to(device, dtype).eval()
    ops, numbers = token_cost(c, batch, first, first + m)
    what = f"generation, batch {batch}, tokens {first + 1} to {first + m} of {N}"
    work = Work(what, "tokens/s", batch, ours, ops=ops, rounds=3)
    work.bytes = numbers * torch.finfo(dtype).bits / 8

    def peers() -> dict[str, Callable[[], float]]:
        found = {"dense, cached": lambda: median_step(drawing(Transformer.generate, 16))}
        if batch > 8:  # the others would take minutes and many GB
            return found
        found["dense, uncached"] = timed(lambda: drawing(Transformer.generate, 1), device)
        if dalle_pytorch and not cuda:
            for end in ("conv_like", "axial_row"):  # with static masks; conv_like has no cache
                kinds = ["axial_row", "axial_col", "axial_row", end]
                other = peer_dalle(c, kinds, optimize_for_inference=True).eval()
                found[f"dalle-pytorch ending in {end}"] = lambda other=other: peer(other)
        return found

    work.peers = peers
    return work


# ---- the table -----------------------------------------------------------------------------------

WORKS = {
    "bpe-train": bpe_training,
    "bpe-encode": bpe_encoding,
    "bpe-dropout": lambda device: bpe_encoding(device, 0.1),
    "dvae-train": lambda device: dvae(device, training=True),
    "dvae-encode": lambda device: dvae(device, training=False),
    "prior": prior_step,
    "row": lambda device: attention(device, "row"),
    "column": lambda device: attention(device, "column"),
    "conv": lambda device: attention(device, "conv"),
    "generate-1": lambda device: generation(device, 1),
    "generate-8": lambda device: generation(device, 8),
    "generate-64": lambda device: generation(device, 64),
    "grid-16": lambda device: grid(device, 16),
    "grid-32": lambda device: grid(device, 32),
    "grid-64": lambda device: grid(device, 64),
}


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def show(line: dict) -> None:
    print(f"{line['what']}\n    {number(line['figure'])} {line['unit']}", end="")
    if line["limit"]:
        print(f", {line['percent']:.0f}% of {number(line['at_limit'])} by {line['limit']}", end="")
    print(f"; {line['memory']:,.0f} MB")
    for name, ratio in line["ratios"].items():
        print(f"    {ratio:.2f} × the time: {name}")
    sys.stdout.flush()


def main() -> None:
    parser = Parser(description="How fast, against the machine and others.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=WORKS, help=", ".join(WORKS))
    parser.add_argument("--peers", action="store_true", help="beside others, where installed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N",
        help="of a CPU; default: its cores")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads < 1:
        raise ValueError(f"--threads {args.threads}: expected at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine or this PyTorch has none")
    torch.set_num_threads(args.threads)
    if args.child:
        torch.manual_seed(0)
        line = measure(lambda: WORKS[args.only[0]](args.device), args.device, args.peers)
        print(json.dumps(line))
        return

    gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
    print(f"PyTorch {torch.__version__}, {gpu or f'{args.threads} threads'}\n", flush=True)
    for name, module in (("dalle-pytorch", dalle_pytorch), ("tokenizers", tokenizers)):
        if args.peers and module is None:
            print(f"{name}, which some lines are measured beside, is not installed")
    threads = {"OMP_NUM_THREADS": str(args.threads), "RAYON_NUM_THREADS": str(args.threads)}
    lines, env = {}, {**os.environ, **threads}
    for name in args.only or WORKS:
        command = [sys.executable, "-m", "lab.bench", "--child", "--only", name]
        command += ["--device", args.device, "--threads", str(args.threads)]
        command += ["--peers"] * args.peers
        child = subprocess.run(command, capture_output=True, text=True, env=env)
        if child.returncode:
            raise Stop(f"{name} failed: {child.stderr.strip() or child.returncode}", 1)
        lines[name] = json.loads(child.stdout.splitlines()[-1])
        show(lines[name])
    grids = [lines[name] for name in ("grid-16", "grid-32", "grid-64") if name in lines]
    for a, b in zip(grids, grids[1:]):
        time_ratio, memory_ratio = b["seconds"] / a["seconds"], b["memory"] / a["memory"]
        print(f"{b['what']}: {time_ratio:.2f} × the time and {memory_ratio:.2f} × the memory")
    rate = median(line["gflops"] for line in lines.values())
    bandwidth = median(line["gb_per_s"] for line in lines.values())
    print(
        f"\nthe machine: {rate:,.0f} GFLOP/s in matrix products, {bandwidth:,.0f} GB/s in reading"
    )


if __name__ == "__main__":
    start(main)
