"""
What is quicker than the readable form: the same parameters, the same draws.

In training `upsample_late`, `use_blocks` and `use_convolutions` change how a dVAE's decoder, a
prior's attention and linear layers compute, not what.

`generate` draws what `Transformer.generate` draws. That one keeps keys and values of the whole
stream for every row and masks what a position may not see; here

- the text of a prompt is read and kept once for all of its candidates;
- a layer keeps as many image positions as its mask reaches back, in a ring, and reads of them
  those that the mask allows;
- on a CPU, matrices are laid out once for all steps;
- on CUDA, a step is one captured graph, and Python is not waited for.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvae import Decoder
from transformer import Attention, Transformer, attention_mask, check_draw, pad_text, sample_token

# ---- training: the dVAE's decoder ----------------------------------------------------------------


def upsample_late(decoder: Decoder) -> None:
    """Let a decoder upsample behind the 1 × 1 convolutions that follow: nearest-neighbour
    upsampling commutes with them and with the ReLU, and so they have a quarter of the pixels."""
    groups = [g for name, g in decoder.blocks.named_children() if name.startswith("group")]
    for before, after in zip(groups, groups[1:]):
        upsample, before.resample, block = before.resample, nn.Identity(), after.block_1
        for conv in (block.id_path, block.res_path.conv_1):
            conv.register_forward_hook(lambda _, __, y, upsample=upsample: upsample(y))


# ---- training: attention in blocks ---------------------------------------------------------------

# Image positions. Smaller blocks read the text's keys more often, larger ones more keys that the
# mask hides. The authors' kernels had blocks of 32 (openai/DALL-E, issue 28).
BLOCK = 128


def use_blocks(model: Transformer) -> None:
    """Let the attention of a model leave out the blocks that its masks hide."""
    if model.config.grid**2 > BLOCK:
        for block in model.blocks[0::2]:
            block.forward = MethodType(attend_in_blocks, block)


def attend_in_blocks(
    block: Attention, x: Tensor, cache: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """As `Attention.forward`: BLOCK image positions at a time read the text, and the blocks from
    the first that one of them sees to their own."""
    if cache is not None:
        return Attention.forward(block, x, cache)
    (B, S, d), c = x.shape, block.config
    T, G = c.text_len, c.grid

    def in_order(x: Tensor) -> Tensor:
        """Columns become rows, by transposing the grid, and back (Fig. 11c)."""
        if block.kind != "column":
            return x
        image = x[:, T:].unflatten(1, (G, G)).transpose(1, 2).flatten(1, 2)
        return torch.cat([x[:, :T], image], dim=1)

    qkv = block.qkv(block.norm(in_order(x))).view(B, S, 3, c.n_head, c.d_head)
    text, image = qkv.permute(2, 0, 3, 1, 4).split([T, G * G], dim=3)  # [3, B, H, positions, D]
    image = image.split(BLOCK, dim=3)
    y = [F.scaled_dot_product_attention(*text, is_causal=True)]
    for i, (first, mask) in enumerate(block_masks(block.kind, T, G, c.kernel, x.device)):
        _, k, v = torch.cat([text, *image[first : i + 1]], dim=3)
        y.append(F.scaled_dot_product_attention(image[i][0], k, v, attn_mask=mask))
    y = torch.cat(y, dim=2).transpose(1, 2).reshape(B, S, d)
    return in_order(block.out(y))


@lru_cache
@torch.inference_mode(False)
def block_masks(
    kind: str, text_len: int, grid: int, kernel: int, device: torch.device
) -> list[tuple[int, Tensor]]:
    """For each block of image positions: the first block that it reads, and which position may
    attend to which key of the text and of these blocks, bool [positions, keys]."""
    mask, T = attention_mask(kind, text_len, grid, kernel), text_len
    if kind == "column":
        image = torch.arange(T, len(mask)).view(grid, grid).T.flatten()
        order = torch.cat([torch.arange(T), image])
        mask = mask[order][:, order]
    found = []
    for i, rows in enumerate(mask[T:].split(BLOCK)):
        image = rows[:, T:].split(BLOCK, dim=1)
        first = min(j for j, block in enumerate(image) if block.any())
        seen = torch.cat([rows[:, :T], *image[first : i + 1]], dim=1)
        found.append((first, seen.to(device)))
    return found


# ---- training: linear layers on a CPU ------------------------------------------------------------


def use_convolutions(model: nn.Module) -> None:
    """Let the linear layers of a model on a CPU with AVX-512 be 1 × 1 convolutions. These PyTorch
    has from oneDNN, which computes with 512 bits at a time; matrix products it has from MKL, which
    on AMD's CPUs computes with 256. On Intel's untried. One thread gains from 16 samples on."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.is_cpu:
                module.forward = MethodType(linear_as_convolution, module)


def linear_as_convolution(linear: nn.Linear, x: Tensor) -> Tensor:
    """x [B, S, d_in], as B pictures of 1 × S, to [B, S, d_out]."""
    if x.ndim != 3 or not x.numel():
        return nn.Linear.forward(linear, x)
    pictures = x[:, None].permute(0, 3, 1, 2)  # channels last in memory, as x is
    y = F.conv2d(pictures, linear.weight[:, :, None, None], linear.bias)
    return y.permute(0, 2, 3, 1)[:, 0]


# ---- drawing -------------------------------------------------------------------------------------


class Cache(NamedTuple):
    """What a layer keeps of the stream while images are drawn, of C candidates for P prompts."""

    text: Tensor  # [2, P, H, T, D]: keys and values of the text, shared by the candidates
    ring: Tensor  # [2, P · H · C, size, D]: of the last image positions; k is in slot k % size
    slots: Tensor | None  # [N, R]: where in the ring position k reads; None: everywhere
    bias: Tensor  # [N, R]: −inf where there is no position yet


@torch.inference_mode()
def generate(
    model: Transformer,
    text: Tensor,
    prefix: Tensor | None = None,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    progress: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """As `Transformer.generate`, where the arguments are explained: long [B, N].

    Equal rows of text and prefix side by side, as repeat_interleave makes them, are candidates of
    one prompt.
    """
    c = model.config
    B, T, N = len(text), c.text_len, c.grid**2
    prefix = text.new_empty(B, 0) if prefix is None else prefix
    uniforms = torch.rand(B, N, device=text.device) if uniforms is None else uniforms
    check_draw(c, text, prefix, uniforms, temperature, top_k, top_p, guidance)
    n = prefix.shape[1]
    tokens, streams = F.pad(prefix, (0, N - n)), 1
    if guidance is not None:
        empty = pad_text([], T, c.text_vocab).to(text.device).expand(B, T)
        text, prefix, streams = torch.cat([text, empty]), prefix.repeat(2, 1), 2
    caches = read_prompts(model, text, prefix) if n < N else []
    positions = (model.image_row.weight[:, None] + model.image_column.weight).flatten(0, 1)
    before = tokens[:, n - 1].clone() if n else tokens.new_full((B,), c.image_vocab)
    k = tokens.new_tensor([n])

    def step() -> None:
        """Draw token k and count k up: all on the device and in place, without waiting."""
        x = model.image_token(before.repeat(streams)) + positions.index_select(0, k)
        for attention, mlp, cache in zip(model.blocks[0::2], model.blocks[1::2], caches):
            x = x + attend(attention, x, k, cache)
            x = x + mlp(x)
        logits = model.logits(model.image_head, x)
        if guidance is not None:
            captioned, plain = logits.chunk(2)
            logits = plain + guidance * (captioned - plain)
        before.copy_(sample_token(logits, uniforms.index_select(1, k), temperature, top_k, top_p))
        tokens.index_copy_(1, k, before[:, None])
        k.add_(1)

    with packed_linears(model, streams * B):
        for drawn in range(n + 1, N + 1):
            if drawn == n + 2:
                step = captured(step, k.device)
            step()
            if progress is not None:
                progress(drawn, tokens)
    return tokens


def read_prompts(model: Transformer, text: Tensor, prefix: Tensor) -> list[Cache]:
    """Run text and prefix once and keep, for each layer, what `attend` reads."""
    n, c = prefix.shape[1], model.config
    T, G, N = c.text_len, c.grid, c.grid**2
    prompts, which = torch.unique(torch.cat([text, prefix], 1), dim=0, return_inverse=True)
    # The rows are groups of C candidates: as many as divide every run of the same prompt.
    C = math.gcd(*which.unique_consecutive(return_counts=True)[1].tolist())
    which = which[::C]

    x = model.embed(prompts[:, :T], F.pad(prompts[:, T:], (0, 1)))
    cell = torch.arange(N, device=x.device)
    caches = []
    for attention, mlp in zip(model.blocks[0::2], model.blocks[1::2]):
        x = x + attention(x, keep := [])
        x = x + mlp(x)
        kv = torch.stack(keep[0])[:, which]  # [2, P, H, T + n + 1, D]
        # The last cell's row of the mask has all distances that a position sees.
        back = attention_mask(attention.kind, 0, G, c.kernel, x.device)[-1].flip(0).nonzero()[:, 0]
        size = int(back[-1]) + 1
        past = cell[max(0, n - size) : n]
        ring = kv.new_zeros(*kv.shape[:3], C, size, c.d_head)
        ring[..., past % size, :] = kv[..., None, T + past, :]
        reached = cell[:, None] - back
        slots, order = (reached % size).sort(dim=1)
        bias = kv.new_zeros(reached.shape).masked_fill(reached.gather(1, order) < 0, -math.inf)
        everywhere = len(back) == size
        of_text = kv[..., :T, :].contiguous()
        caches.append(Cache(of_text, ring.flatten(1, 3), None if everywhere else slots, bias))
    return caches


def attend(block: Attention, x: Tensor, k: Tensor, cache: Cache) -> Tensor:
    """The attention resblock for image position k [1] alone: x [B, d] -> what is added to x."""
    _, P, H, T, D = cache.text.shape
    q, new = block.qkv(block.norm(x)).view(P, -1, 3, H * D).split([1, 2], dim=2)
    q = q.view(P, -1, H, D).transpose(1, 2) * D**-0.5  # [P, H, C, D]
    new = new.view(P, -1, 2, H, D).permute(2, 0, 3, 1, 4).flatten(1, 3)  # [2, P · H · C, D]
    cache.ring.index_copy_(2, k % cache.ring.shape[2], new.unsqueeze(2))
    keys, values = cache.ring
    if cache.slots is not None:
        slots = cache.slots.index_select(0, k)[0]
        keys, values = keys.index_select(1, slots), values.index_select(1, slots)
    near = (q.reshape(-1, 1, D) @ keys.transpose(1, 2)).view(*q.shape[:3], -1)
    near = near + cache.bias.index_select(0, k)
    weights = torch.cat([q @ cache.text[0].transpose(2, 3), near], dim=-1).softmax(dim=-1)
    to_text, near = weights.split([T, near.shape[-1]], dim=-1)
    y = to_text @ cache.text[1] + (near.reshape(len(keys), 1, -1) @ values).view(q.shape)
    return block.out(y.transpose(1, 2).reshape(x.shape))


@contextmanager
def packed_linears(model: Transformer, rows: int) -> Iterator[None]:
    """Within it, matrices on a CPU lie as oneDNN wants them for products with so many rows: they
    are laid out once, for all steps."""
    linears = []
    if torch.backends.mkldnn.is_available():
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        linears = [m for m in linears if m.weight.is_cpu and m.weight.dtype == torch.float32]
        # small ones gain with many rows only
        linears = [m for m in linears if m.weight.numel() >= 2**18 or rows >= 64]
    before = [vars(linear).get("forward") for linear in linears]  # a convolution, in training
    try:
        for linear in linears:
            packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight, rows)
            linear.forward = partial(packed_product, packed, linear.bias)
        yield
    finally:
        for linear, forward in zip(linears, before):
            vars(linear).pop("forward", None)
            if forward:
                linear.forward = forward


def packed_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x [rows, d_in] -> x · weightᵀ + bias, [rows, d_out], the weight packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """On CUDA, a step that has run before and keeps its buffers, as one graph: without Python."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
