"""
The prior of DALL·E: one stream of text and image tokens, one sparse transformer (2.2, B.1).

A caption of up to 255 tokens and a 32 × 32 grid of image tokens make a stream of T + N = 256 + 1024
positions, each of which predicts one token from what came before it (Fig. 10):

    position        0       1     …    T − 1      T        T + 1   …   T + N − 1
    holds         start    y_1    …     pad     start      z_1     …    z_{N−1}
                 of text                       of image
    predicts       y_1     y_2    …      –       z_1       z_2     …     z_N

Text attends to the text before it. Image positions attend to all of the text and, by the kind of
the layer, to the row, the column or the neighbourhood before them (Fig. 11). Each kind is a set of
distances in raster order, `distances` below; from it come the dense mask, the blocks that training
computes and the few keys that generation reads for a token.

Left out: training at scale (2.4, 2.5), which wraps around the resblocks from outside, and the
paper's block-sparse GPU kernels, for which dense attention over gathered blocks stands in.

    python transformer.py [-o fig11.png]     # draws Fig. 11 and counts the 12 billion weights
"""

import argparse
import itertools
import math
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of the prior; the defaults are the paper's 12-billion model (2.2, B.1)."""

    n_layer: int = 64
    n_head: int = 62
    d_head: int = 64
    text_len: int = 256  # T: start-of-text and at most T − 1 tokens
    grid: int = 32  # G: an image is G × G = N tokens
    text_vocab: int = 16384
    image_vocab: int = 8192
    kernel: int = 11  # of the convolutional mask

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, to have a centre, got {self.kernel}")

    @property
    def d_model(self) -> int:
        return self.n_head * self.d_head


# ---- which positions see which (Fig. 11) ---------------------------------------------------------


def layer_kind(i: int, n_layer: int) -> str:
    """The mask of layer i = 1 .. n_layer: row, column, row, row, …, and conv at the end (B.1)."""
    if not 1 <= i <= n_layer:
        raise ValueError(f"layers are numbered 1 to {n_layer}, got {i}")
    if i == n_layer:
        return "conv"
    return "column" if (i - 2) % 4 == 0 else "row"


def distances(kind: str, grid: int, kernel: int) -> list[int]:
    """How far back in raster order an image position sees; the first is 0, itself.

    A row is the token itself and the G before it, since the "previous 5" of the figure's 4 × 4 grid
    must count the token itself. "Causal convolutional" is, in our reading, a centred kernel without
    its future half that wraps around row ends in raster order, since B.1 likens its wrapping to the
    row mask's. ValueError for a grid below 1 or a kernel that is not odd and positive.
    """
    if grid < 1 or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"expected a grid ≥ 1 and an odd kernel ≥ 1, got {grid} and {kernel}")
    if kind == "row":
        return list(range(grid + 1))
    if kind == "column":
        return list(range(0, grid * grid, grid))
    if kind == "conv":
        h = (kernel - 1) // 2
        around = {r * grid + c for r in range(h + 1) for c in range(-h, h + 1)}
        return sorted(d for d in around if 0 <= d < grid * grid)
    raise ValueError(f"kind must be 'row', 'column' or 'conv', got {kind!r}")


def attention_mask(kind: str, text_len: int, grid: int, kernel: int = 11) -> Tensor:
    """Fig. 11 as bool [S, S], S = text_len + grid²: True where row i may attend to column j.

    The dense reference for pictures, tests and small code; the model computes the same in blocks.
    """
    if text_len < 0:
        raise ValueError(f"expected text_len ≥ 0, got {text_len}")
    i = torch.arange(text_len + grid * grid)
    back = i[:, None] - i
    near = torch.isin(back, torch.tensor(distances(kind, grid, kernel)))
    is_text = i < text_len
    return (back >= 0) & (is_text[:, None] | is_text | near)


# A cached function and not buffers: a model built on `meta` has no masks to fill in afterwards.
@lru_cache
@torch.inference_mode(False)
def attention_blocks(
    kind: str, text_len: int, grid: int, kernel: int, rows: int, device: torch.device
) -> tuple[Tensor, ...]:
    """How the attention of the first `rows` rows of the grid is cut into dense blocks.

    A block is a few neighbouring rows or, after transposing the grid, columns (Fig. 11c). Returns
    where in the stream the queries [n, Q] and the keys [n, K] of the n blocks are, the keys being
    all of the text and whatever one of the queries sees; which query sees which key, bool
    [n, 1, Q, K]; and the order that puts text and queries back into the stream, [S].
    """
    order, line = torch.arange(rows * grid), grid
    if kind == "column":
        order, line = order.view(rows, grid).T.flatten(), rows
    # About 128 queries in a block: with fewer, the text's keys are copied too often; with more,
    # most pairs in a block are masked.
    sizes = [size for size in range(line, len(order) + 1, line) if len(order) % size == 0]
    size = max(size for size in sizes if size <= max(128, line))
    queries = order.view(-1, size)
    back = torch.tensor(distances(kind, grid, kernel))
    near = [torch.unique(block[:, None] - back) for block in queries]
    near = [keys[keys >= 0] for keys in near]
    near = nn.utils.rnn.pad_sequence(near, batch_first=True, padding_value=len(order))
    seen = torch.isin(queries[:, :, None] - near[:, None], back)  # nobody sees the padding: future
    seen = F.pad(seen, (text_len, 0), value=True)[:, None]
    text = torch.arange(text_len)
    keys = torch.cat([text.expand(len(near), -1), text_len + near.clamp(max=len(order) - 1)], dim=1)
    restore = torch.cat([text, text_len + order.argsort()])
    return tuple(t.to(device) for t in (text_len + queries, keys, seen, restore))


# ---- the resblocks (B.1) -------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear, but the few rows of a step of drawing read the weights at memory speed on CPU.

    The plain product of one row gets a third of that, on one core; the same product as a batch of
    smaller ones, the vector a column of a transposed matrix, gets nearly all. For more rows oneDNN
    is up to twice as fast as the plain product, once the weights are laid out in its own blocks.
    """

    packed: Tensor | None = None

    def pack(self, rows: int) -> None:
        """Lay out the weights as they are now for products with so many rows; 0: no more."""
        fits = self.weight.is_cpu and self.weight.dtype == torch.float32
        fits = fits and rows > 2 and torch.backends.mkldnn.is_available()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows) if fits else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if self.packed is not None and x.dtype == torch.float32:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if x.device.type != "cpu" or rows not in (1, 2):
            return super().forward(x)
        parts = math.gcd(self.out_features, 16)
        weight = self.weight.view(parts, -1, self.in_features)
        y = weight @ x.reshape(rows, -1).t().expand(parts, -1, -1)
        y = y.flatten(0, 1).t().reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Cache(NamedTuple):
    """What a layer keeps of the stream while images are drawn, of C candidates for P prompts."""

    text: Tensor  # [2, P, H, T, D]: keys and values of the text, shared by the candidates
    ring: Tensor  # [2, P · H · C, size, D]: of the last image positions; k is in slot k % size
    slots: Tensor | None  # [N, R]: where in the ring position k reads; None: everywhere
    bias: Tensor  # [N, R]: −inf where there is no position yet


class Attention(nn.Module):
    """An attention resblock without its identity path: x [B, S, d] -> what is added to x."""

    def __init__(self, config: TransformerConfig, kind: str) -> None:
        super().__init__()
        self.config, self.kind = config, kind
        self.norm = nn.LayerNorm(config.d_model)
        self.qkv = Linear(config.d_model, 3 * config.d_model)
        self.out = Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, keep: list[Tensor] | None = None) -> Tensor:
        """x: the text and whole rows of the grid. `keep` receives keys and values [S, 2, B · d]."""
        (B, S, d), T, G = x.shape, self.config.text_len, self.config.grid
        if (S - T) % G or not T < S <= T + G * G:
            raise ValueError(f"expected {T} positions of text and 1 to {G} rows of {G}, got {S}")
        queries, keys, seen, restore = attention_blocks(
            self.kind, T, G, self.config.kernel, (S - T) // G, x.device
        )
        # Positions come first, so that gathering a block copies whole rows of a matrix; of the ways
        # to gather, F.embedding has the quick and deterministic backward.
        qkv = self.qkv(self.norm(x)).view(B, S, 3, d).permute(2, 1, 0, 3)
        q, k, v = qkv.reshape(3, S, B * d).unbind()
        if keep is not None:
            keep.append(torch.stack([k, v], dim=1))

        def heads(t: Tensor) -> Tensor:
            """[n, positions, B · d] -> [n, B · H, positions, D]"""
            return t.unflatten(-1, (-1, self.config.d_head)).transpose(1, 2)

        text = (heads(t[None, :T]) for t in (q, k, v))
        y_text = F.scaled_dot_product_attention(*text, is_causal=True)
        image = (heads(F.embedding(i, t)) for i, t in ((queries, q), (keys, k), (keys, v)))
        # One softmax over text and image keys: better than one for each (footnote 7).
        y_image = F.scaled_dot_product_attention(*image, attn_mask=seen)
        y = torch.cat([y.transpose(1, 2).reshape(-1, B * d) for y in (y_text, y_image)])
        return self.out(F.embedding(restore, y).view(S, B, d).transpose(0, 1))

    def step(self, x: Tensor, k: Tensor, cache: Cache) -> Tensor:
        """The same for image position k [1] alone, with what is cached of the others: x [B, d]."""
        _, P, H, T, D = cache.text.shape
        q, new = self.qkv(self.norm(x)).view(P, -1, 3, H * D).split([1, 2], dim=2)
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
        return self.out(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """An MLP resblock without its identity path; GELU is our reading, as in Child et al. 2019."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.up = Linear(config.d_model, 4 * config.d_model)
        self.out = Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(self.norm(x))))


# ---- tokens in, tokens out -----------------------------------------------------------------------


def check_tokens(
    name: str, tokens: Tensor, length: int | None, vocab: int, start: int | None = None
) -> None:
    """ValueError unless tokens are long [B, length], B ≥ 1, in [0, vocab); None: of any length.

    With `start` they are text: `start` comes first, and start + i is at position i alone.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tokens).__name__}")
    fits = tokens.dtype == torch.long and tokens.ndim == 2 and len(tokens) > 0
    if not fits or length not in (None, tokens.shape[1]):
        want = f"torch.int64 of shape [B, {'n' if length is None else length}]"
        got = f"{tokens.dtype} of shape {list(tokens.shape)}"
        raise ValueError(f"{name} must be {want}, got {got}")
    bad = (tokens < 0) | (tokens >= vocab)
    if start is not None:
        own = start + torch.arange(tokens.shape[1], device=tokens.device)
        bad |= (tokens != own) & ((tokens >= start) | (own == start))
    if bad.any():
        got = f"{tokens.min().item()} to {tokens.max().item()}"
        order = "" if start is None else f" as pad_text makes it, {start} + i at position i alone"
        raise ValueError(f"{name} must be in 0 to {vocab - 1}{order}, got {got}")


def pad_text(ids: Sequence[int] | Tensor, text_len: int, text_vocab: int) -> Tensor:
    """Start-of-text, a caption's ids, then a pad for each position left: long [text_len] (2.2).

    Each position i has a learned pad of its own, id text_vocab + i. Position 0 needs none, so its
    id stands for start-of-text. ValueError for more than text_len − 1 ids or unknown ones.

    >>> pad_text([5, 7], text_len=5, text_vocab=100).tolist()
    [100, 5, 7, 103, 104]
    """
    ids = torch.as_tensor(ids)
    ids = ids if ids.numel() else ids.long()
    check_tokens("ids", ids[None], None, text_vocab)
    if len(ids) > text_len - 1:
        raise ValueError(f"a caption has at most {text_len - 1} tokens, got {len(ids)}")
    text = text_vocab + torch.arange(text_len)
    text[1 : len(ids) + 1] = ids
    return text


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """In nats; 0 where there are no targets, as in a text of start-of-text alone."""
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total / max(1, targets.numel())


def sample(
    logits: Tensor, u: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """logits [B, V], u [B, 1] -> tokens [B], where the cumulative distribution passes u."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -math.inf)
    p = logits.softmax(dim=-1)
    if top_p is not None:
        ranked = p.sort(dim=-1, descending=True).values
        enough = ranked.cumsum(dim=-1) - ranked >= top_p  # the likelier ones suffice
        p = p.masked_fill(p < ranked.masked_fill(enough, 1).amin(dim=-1, keepdim=True), 0)
    mass = p.cumsum(dim=-1)
    # u < 1, so u · total rounds to less than the total: a token without probability is never met.
    return (mass <= u * mass[:, -1:]).sum(dim=-1)


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """On CUDA, a step that has run before and keeps its buffers, as one graph: without Python."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# ---- the whole -----------------------------------------------------------------------------------


class Transformer(nn.Module):
    """p(text, image) as one autoregressive stream (2.2).

    text [B, T] is made by `pad_text`, image [B, N] is in raster order, both long. `blocks` are the
    2 · n_layer resblocks (128 in 2.4), attention and MLP in turn. Each returns what is added to the
    identity path, so that gradient scales (Fig. 4), checkpointing and sharding go around a block.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        d, T, G = config.d_model, config.text_len, config.grid
        self.text_token = nn.Embedding(config.text_vocab + T, d)  # pads and start-of-text come last
        self.text_position = nn.Embedding(T, d)
        self.image_token = nn.Embedding(config.image_vocab + 1, d)  # start-of-image comes last
        self.image_row = nn.Embedding(G, d)
        self.image_column = nn.Embedding(G, d)
        self.blocks = nn.ModuleList()
        for i in range(1, config.n_layer + 1):
            self.blocks += [Attention(config, layer_kind(i, config.n_layer)), MLP(config)]
        self.norm = nn.LayerNorm(d)  # our reading, as pre-norm transformers since GPT-2 have it
        self.text_head = Linear(d, config.text_vocab + T, bias=False)
        self.image_head = Linear(d, config.image_vocab, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initialisation: our reading, for the paper names none.

        A model built on `meta` needs it after `to_empty(device=…)`.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.normal_(block.out.weight, std=0.02 / math.sqrt(len(self.blocks)))

    def image_positions(self) -> Tensor:
        """[N, d]: row and column embeddings, broadcast over the grid."""
        return (self.image_row.weight[:, None] + self.image_column.weight).flatten(0, 1)

    def embed(self, text: Tensor, image: Tensor) -> Tensor:
        """The stream of the text and the image's first n tokens: [B, T + n, d]."""
        before = F.pad(image[:, :-1], (1, 0), value=self.config.image_vocab)
        text = self.text_token(text) + self.text_position.weight
        image = self.image_token(before) + self.image_positions()[: image.shape[1]]
        return torch.cat([text, image], dim=1)

    def logits(self, head: nn.Linear, x: Tensor) -> Tensor:
        """In 32 bits, under autocast too (D.2)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = head(self.norm(x.to(head.weight.dtype)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, T], image [B, N] -> logits for text[:, 1:] and for image, in float32.

        They are [B, T − 1, text_vocab + T] and [B, N, image_vocab]. ValueError for other shapes or
        dtypes, for tokens outside the vocabulary, and for start-of-text or a pad out of its place.
        """
        T, N = self.config.text_len, self.config.grid**2
        check_tokens("text", text, T, self.config.text_vocab + T, self.config.text_vocab)
        check_tokens("image", image, N, self.config.image_vocab)
        if len(text) != len(image):
            raise ValueError(f"expected an image for each text, got {len(image)} for {len(text)}")
        x = self.embed(text, image)
        for block in self.blocks:
            x = x + block(x)
        return self.logits(self.text_head, x[:, : T - 1]), self.logits(self.image_head, x[:, T:])

    def loss(self, text: Tensor, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """1/8 text + 7/8 image cross-entropy in nats, each averaged over its own tokens (2.2).

        Pads count as text: our reading, for the paper says only that they are learned and not
        masked out (logits of −∞ were the other option).

        The metrics are loss, text_loss and image_loss, detached scalars.
        """
        text_logits, image_logits = self(text, image)
        text_loss = mean_cross_entropy(text_logits, text[:, 1:])
        image_loss = mean_cross_entropy(image_logits, image)
        loss = text_loss / 8 + image_loss * 7 / 8
        metrics = {"loss": loss, "text_loss": text_loss, "image_loss": image_loss}
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.inference_mode()
    def generate(
        self,
        text: Tensor,
        prefix: Tensor | None = None,
        uniforms: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        progress: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw an image for each text [B, T], token by token (2.6): long [B, N].

        prefix [B, n]: the first n image tokens, 0 ≤ n ≤ N, such as the top of a picture (3.3, G).
        uniforms [B, N] in [0, 1): the draws. Token k of a row is where the cumulative distribution
            passes uniforms[row, k], whatever the other rows are. By default torch.rand.
        temperature divides the logits (0: take the likeliest). Then top_k keeps the k likeliest
            tokens and top_p the fewest that hold this much probability, and ties with the last.
            These two are beyond the paper, as is guidance.
        guidance S: logits of the empty caption, pad_text([]), + S · (the caption's − those); both
            streams are fed the same tokens. Classifier-free guidance is later than the paper (Ho &
            Salimans 2022), and the model must have seen empty captions in training.
        progress(k, tokens [B, N]) is called once the first k tokens are there.

        Equal rows of text and prefix side by side, as repeat_interleave makes them, are candidates
        of one prompt, which is run and kept once. ValueError for what does not fit the above.
        """
        T, N = self.config.text_len, self.config.grid**2
        check_tokens("text", text, T, self.config.text_vocab + T, self.config.text_vocab)
        B = len(text)
        prefix = text.new_empty(B, 0) if prefix is None else prefix
        uniforms = torch.rand(B, N, device=text.device) if uniforms is None else uniforms
        check_tokens("prefix", prefix, None, self.config.image_vocab)
        n = prefix.shape[1]
        if n > N or len(prefix) != B:
            raise ValueError(f"prefix must be [{B}, at most {N}], got {list(prefix.shape)}")
        if uniforms.shape != (B, N) or not ((uniforms >= 0) & (uniforms < 1)).all():
            raise ValueError(f"uniforms must be [{B}, {N}] in [0, 1), got {list(uniforms.shape)}")
        if not temperature >= 0 or not (top_k is None or isinstance(top_k, int) and top_k >= 1):
            raise ValueError(
                f"expected temperature ≥ 0, an integer top_k ≥ 1; got {temperature}, {top_k}"
            )
        if not (top_p is None or 0 < top_p <= 1):
            raise ValueError(f"expected 0 < top_p ≤ 1, got {top_p}")
        if not (guidance is None or math.isfinite(guidance)):
            raise ValueError(f"expected a finite guidance, got {guidance}")

        tokens, streams = F.pad(prefix, (0, N - n)), 1
        if guidance is not None:
            empty = pad_text([], T, self.config.text_vocab).to(text.device).expand(B, T)
            text, prefix, streams = torch.cat([text, empty]), prefix.repeat(2, 1), 2
        layers = self.read_prompts(text, prefix) if n < N else []
        positions = self.image_positions()
        before = tokens[:, n - 1] if n else tokens.new_full((B,), self.config.image_vocab)
        before, k = before.clone(), tokens.new_tensor([n])

        def step() -> None:
            """Draw token k and count k up: all on the device and in place, without waiting."""
            x = self.image_token(before.repeat(streams)) + positions.index_select(0, k)
            for attention, mlp, cache in layers:
                x = x + attention.step(x, k, cache)
                x = x + mlp(x)
            logits = self.logits(self.image_head, x)
            if guidance is not None:
                captioned, plain = logits.chunk(2)
                logits = plain + guidance * (captioned - plain)
            before.copy_(sample(logits, uniforms.index_select(1, k), temperature, top_k, top_p))
            tokens.index_copy_(1, k, before[:, None])
            k.add_(1)

        linears = [m for m in self.modules() if isinstance(m, Linear)]
        try:
            for linear in linears:
                linear.pack(streams * B)
            for drawn in range(n + 1, N + 1):
                if drawn == n + 2:
                    step = captured(step, k.device)
                step()
                if progress is not None:
                    progress(drawn, tokens)
        finally:
            for linear in linears:
                linear.pack(0)
        return tokens

    def read_prompts(self, text: Tensor, prefix: Tensor) -> list[tuple]:
        """Run text and prefix once and keep, for each layer, what `Attention.step` reads."""
        n, c = prefix.shape[1], self.config
        T, G = c.text_len, c.grid
        prompts, which = torch.unique(torch.cat([text, prefix], 1), dim=0, return_inverse=True)
        # The rows are groups of C candidates: as many as divide every run of the same prompt.
        C = math.gcd(*which.unique_consecutive(return_counts=True)[1].tolist())
        which = which[::C]

        x = self.embed(prompts[:, :T], F.pad(prompts[:, T:], (0, (n // G + 1) * G - n)))
        layers = []
        for attention, mlp in zip(self.blocks[0::2], self.blocks[1::2]):
            x = x + attention(x, keep := [])
            x = x + mlp(x)
            kv = keep[0].view(x.shape[1], 2, -1, c.n_head, c.d_head)[:, :, which]
            kv = kv.permute(1, 2, 3, 0, 4)  # [2, P, H, T + n, D]
            # The ring holds as many positions as the mask reaches back.
            back = torch.tensor(distances(attention.kind, G, c.kernel), device=x.device)
            size = int(back[-1]) + 1
            past = torch.arange(max(0, n - size), n, device=x.device)
            ring = kv.new_zeros(*kv.shape[:3], C, size, c.d_head)
            ring[..., past % size, :] = kv[..., None, T + past, :]
            reached = torch.arange(G * G, device=x.device)[:, None] - back
            slots, order = (reached % size).sort(dim=1)
            bias = kv.new_zeros(reached.shape).masked_fill(reached.gather(1, order) < 0, -math.inf)
            everywhere = slots.shape[1] == size
            of_text = kv[..., :T, :].contiguous()
            cache = Cache(of_text, ring.flatten(1, 3), None if everywhere else slots, bias)
            layers.append((attention, mlp, cache))
        return layers


def load_transformer(path: str | Path) -> Transformer:
    """The model of a prior.pt, on the CPU. ValueError where the file is something else."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself checks no sums
            if damaged := archive.testzip():
                raise ValueError(f"its part {damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read as a prior checkpoint ({reason})") from error
    try:
        with torch.device("meta"):
            model = Transformer(TransformerConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"], assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a prior checkpoint of this project ({reason})") from error
    return model.eval()


# ---- python transformer.py -----------------------------------------------------------------------


def draw_masks(cell: int = 16) -> Image.Image:
    """Fig. 11: each square is a row i that may (dark) or may not (light) attend to a column j."""
    T, G = 6, 4
    size = cell * (T + G * G)
    transposed = torch.cat([torch.arange(T), T + torch.arange(G * G).view(G, G).T.flatten()])
    column = attention_mask("column", T, G)
    panels = {
        "(a) row": attention_mask("row", T, G),
        "(b) column": column,
        "(c) column, image states transposed": column[transposed][:, transposed],
        "(d) convolutional, kernel 3": attention_mask("conv", T, G, kernel=3),
    }
    picture = Image.new("RGB", (2 * size + 3 * cell, 2 * size + 6 * cell), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(cell)
    for p, (title, mask) in enumerate(panels.items()):
        left, top = cell + p % 2 * (size + cell), 2 * cell + p // 2 * (size + 3 * cell)
        pen.text((left, top - 1.5 * cell), title, "black", font)
        for i, j in itertools.product(range(len(mask)), repeat=2):
            dark, light = ("#3f72b5", "#dfe8f5") if j < T else ("#3d9a62", "#e0f1e6")
            x, y = left + j * cell, top + i * cell
            pen.rectangle((x, y, x + cell, y + cell), dark if mask[i, j] else light, "white")
        edge = T * cell
        pen.line((left, top + edge, left + size, top + edge), "black", 2)
        pen.line((left + edge, top, left + edge, top + size), "black", 2)
    return picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw Fig. 11 and count the 12 billion weights.")
    parser.add_argument("-o", "--out", default="fig11.png", metavar="FILE")
    out = parser.parse_args().out
    try:
        draw_masks().save(out)
    except (OSError, ValueError) as error:
        print(f"transformer.py: cannot write {out}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{out}: the masks of Fig. 11 (blue: text keys, green: image keys)\n")

    config = TransformerConfig()
    with torch.device("meta"):
        model = Transformer(config)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    everything = sum(p.numel() for p in model.parameters())
    print(f"{config.n_layer} layers, {config.n_head} heads, d = {config.d_model} (B.1)")
    print(f"{matrices:>15,} weights in the matrices of the {len(model.blocks)} resblocks")
    print(f"{everything:>15,} with embeddings, heads, gains and biases\n")
    print("layers:", *(layer_kind(i, config.n_layer) for i in range(1, config.n_layer + 1)))
