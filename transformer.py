"""
The prior of DALL·E: one stream of text and image tokens, one sparse transformer (2.2, B.1).

A caption of up to 255 tokens and a 32 × 32 grid of image tokens make a stream of T + N = 256 + 1024
positions, each of which predicts one token from what came before it (Fig. 10):

    position        0       1     …    T − 1      T        T + 1   …   T + N − 1
    holds         start    y_1    …     pad     start      z_1     …    z_{N−1}
                 of text                       of image
    predicts       y_1     y_2    …      –       z_1       z_2     …     z_N

A text position attends to itself and the text before it. Image positions attend to all of the text
and, by the kind of the layer, to the row, the column or the neighbourhood before them (Fig. 11).

Not here: training at scale (2.4, 2.5), which wraps around the resblocks from outside, the paper's
block-sparse GPU kernels, and a quicker `generate`, which is in scale/fast.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of the prior; the defaults are the paper's 12-billion model (2.2, B.1). It has no
    dropout: the BPE's is the only one."""

    n_layer: int = 64  # layers, each of an attention and an MLP resblock (B.1)
    n_head: int = 62  # attention heads; d = n_head · d_head = 3968 (B.1)
    d_head: int = 64  # numbers in a head (B.1)
    text_len: int = 256  # T: start-of-text and at most T − 1 tokens (2.2)
    grid: int = 32  # G: an image is G × G = N tokens, as the dVAE says (2)
    text_vocab: int = 16384  # pieces of the BPE (2.2)
    image_vocab: int = 8192  # codes of the dVAE (2.2)
    kernel: int = 11  # side of the convolutional mask, odd (Fig. 11)

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


# Cached and not a buffer, which would be empty in a model that was built on `meta`.
@lru_cache
@torch.inference_mode(False)
def attention_mask(
    kind: str, text_len: int, grid: int, kernel: int = 11, device: torch.device | str = "cpu"
) -> Tensor:
    """Fig. 11 as bool [S, S], S = text_len + grid²: True where position i may attend to j.

    The same tensor for the same arguments: not to be written to. ValueError for an unknown kind, a
    negative text_len, a grid below 1, or a kernel that is not odd and positive.
    """
    if text_len < 0 or grid < 1 or kernel < 1 or kernel % 2 == 0:
        want = "text_len ≥ 0, grid ≥ 1, an odd kernel ≥ 1"
        raise ValueError(f"expected {want}, got {text_len}, {grid}, {kernel}")
    position = torch.arange(text_len + grid * grid, device=device)
    i, j = position[:, None], position
    d = i - j  # how far j is behind i, in raster order
    if kind == "row":  # itself and the G before it: the figure's "previous 5" counts itself
        near = d <= grid
    elif kind == "column":
        near = d % grid == 0
    elif kind == "conv":
        # Our reading of "causal convolutional": a centred kernel without its future half, which
        # wraps around row ends as the row mask does. d = r · G + c, 0 ≤ r ≤ h, −h ≤ c ≤ h.
        h = (kernel - 1) // 2
        r, c = torch.arange(h + 1, device=device), torch.arange(-h, h + 1, device=device)
        near = torch.isin(d, r[:, None] * grid + c)
    else:
        raise ValueError(f"kind must be 'row', 'column' or 'conv', got {kind!r}")
    return (d >= 0) & ((i < text_len) | (j < text_len) | near)


# ---- the resblocks (B.1) -------------------------------------------------------------------------


class Attention(nn.Module):
    """An attention resblock without its identity path: x [B, S, d] -> what is added to x."""

    def __init__(self, config: TransformerConfig, kind: str) -> None:
        super().__init__()
        self.config, self.kind = config, kind
        self.norm = nn.LayerNorm(config.d_model)
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, cache: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """x holds the S positions that follow those in `cache`, or the first S.

        cache: at first an empty list; it keeps keys and values of all so far, [B, H, positions, D]
        for H = n_head heads of D = d_head numbers.
        """
        (B, S, d), c = x.shape, self.config
        qkv = self.qkv(self.norm(x)).view(B, S, 3, c.n_head, c.d_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, S, D]
        if cache is not None:
            cache.append((k, v))
            k, v = (torch.cat(t, dim=2) for t in zip(*cache))
            cache[:] = [(k, v)]
        mask = attention_mask(self.kind, c.text_len, c.grid, c.kernel, x.device)
        end = k.shape[2]
        # One softmax over text and image keys: better than one for each (footnote 7).
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[end - S : end, :end])
        return self.out(y.transpose(1, 2).reshape(B, S, d))


class MLP(nn.Module):
    """An MLP resblock without its identity path. GELU by the error function: our reading, where
    Child et al. have x·σ(1.702x) (B.1)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.up = nn.Linear(config.d_model, 4 * config.d_model)
        self.out = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(self.norm(x))))


# ---- tokens in, tokens out -----------------------------------------------------------------------


def pad_text(ids: Sequence[int] | Tensor, text_len: int, text_vocab: int) -> Tensor:
    """Start-of-text, a caption's ids, then a pad for each position left: long [text_len] (2.2).

    Each position i has a learned pad of its own, id text_vocab + i. Position 0 needs none, so its
    id stands for start-of-text. ValueError for more than text_len − 1 ids or unknown ones.

    >>> pad_text([5, 7], text_len=5, text_vocab=100).tolist()
    [100, 5, 7, 103, 104]
    """
    ids = torch.as_tensor(ids)
    ids = ids if ids.numel() else ids.long()
    if ids.dtype != torch.long or ids.ndim != 1 or ((ids < 0) | (ids >= text_vocab)).any():
        raise ValueError(f"ids must be a list of integers from 0 to {text_vocab - 1}, got {ids}")
    if len(ids) > text_len - 1:
        raise ValueError(f"a caption has at most {text_len - 1} tokens, got {len(ids)}")
    text = text_vocab + torch.arange(text_len)
    text[1 : len(ids) + 1] = ids
    return text


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """In nats; 0 where there are no targets, as in a text of start-of-text alone."""
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total / max(1, targets.numel())


def sample_token(
    logits: Tensor, u: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """logits [B, V], u [B, 1] -> tokens [B], where the cumulative distribution passes u."""
    if temperature < 1e-38:  # what float32 cannot divide by
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # no infinity − infinity
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    p = logits.softmax(dim=-1)
    if top_p is not None:
        ranked = p.sort(dim=-1, descending=True).values
        enough = ranked.cumsum(dim=-1) - ranked >= top_p  # the likelier ones hold top_p
        p = p.masked_fill(p < ranked.masked_fill(enough, 1).amin(dim=-1, keepdim=True), 0)
    mass = p.cumsum(dim=-1)
    # u < 1, so u · total rounds to less than the total: a token without probability is never met.
    return (mass <= u * mass[:, -1:]).sum(dim=-1)


def check_draw(
    config: TransformerConfig, text, prefix, uniforms, temperature, top_k, top_p, guidance
) -> None:
    """ValueError for arguments that `Transformer.generate` does not take."""
    B, T, N, n = len(text), config.text_len, config.grid**2, prefix.shape[-1]
    shapes = [list(t.shape) for t in (text, prefix, uniforms)]
    if shapes != [[B, T], [B, n], [B, N]] or n > N:
        want = f"text [B, {T}], prefix [B, at most {N}], uniforms [B, {N}]"
        raise ValueError(f"expected {want}, got {shapes}")
    ends = {"text": config.text_vocab + T, "prefix": config.image_vocab, "uniforms": 1}
    for (name, end), values in zip(ends.items(), (text, prefix, uniforms)):
        if ((values < 0) | (values >= end)).any():
            raise ValueError(f"{name} must be at least 0 and below {end}")
    fits = temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
    if not fits or not math.isfinite(guidance or 0):
        want = "temperature ≥ 0, top_k ≥ 1, 0 < top_p ≤ 1, a finite guidance"
        raise ValueError(f"expected {want}, got {temperature}, {top_k}, {top_p}, {guidance}")


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
        self.norm = nn.LayerNorm(d)  # before the heads, as Child et al. have it (B.1)
        self.text_head = nn.Linear(d, config.text_vocab + T, bias=False)
        self.image_head = nn.Linear(d, config.image_vocab, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal, of standard deviation 0.5/√d_in, embeddings 0.02: our reading, where Child et al.
        have 0.125/√d_in (B.1). What joins the identity path is divided by √(2 n_layer), as theirs.

        A model built on `meta` needs it after `to_empty(device=…)`.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            block.out.weight /= math.sqrt(len(self.blocks))

    def embed(self, text: Tensor, image: Tensor) -> Tensor:
        """The stream of Fig. 10, for text [B, T] and the first n tokens of an image: [B, T + n, d].

        Pads have a position embedding like any token. The figure seems to leave it out, which is
        the same family of functions: each pad is at one position only.
        """
        text = self.text_token(text) + self.text_position.weight
        before = F.pad(image[:, :-1], (1, 0), value=self.config.image_vocab)
        return torch.cat([text, self.embed_image(before)], dim=1)

    def embed_image(self, before: Tensor, first: int = 0) -> Tensor:
        """before [B, n]: the tokens that come before the cells first, first + 1, …: [B, n, d]."""
        cell = torch.arange(first, first + before.shape[1], device=before.device)
        row, column = cell // self.config.grid, cell % self.config.grid
        return self.image_token(before) + (self.image_row(row) + self.image_column(column))

    def logits(self, head: nn.Linear, x: Tensor) -> Tensor:
        """In 32 bits, under autocast too (D.2)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = head(self.norm(x.to(head.weight.dtype)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, T], image [B, N] -> logits for text[:, 1:] and for image, in float32.

        They are [B, T − 1, text_vocab + T] and [B, N, image_vocab]. ValueError for other shapes.
        """
        T, N = self.config.text_len, self.config.grid**2
        if text.shape != (len(image), T) or image.shape != (len(text), N):
            got = f"{list(text.shape)} and {list(image.shape)}"
            raise ValueError(f"expected text [B, {T}] and image [B, {N}], got {got}")
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
        uniforms [B, N] in [0, 1): the draws, by default torch.rand. Token k of a row is where the
            cumulative distribution passes uniforms[row, k].
        temperature divides the logits (0: take the likeliest). Beyond the paper: top_k keeps the k
            likeliest tokens, then top_p the fewest that hold this much probability, with ties.
        guidance S (Ho & Salimans 2022): logits of the empty caption + S · (the caption's − those),
            both fed the same tokens, for a model that saw empty captions in training.
        progress(k, tokens [B, N]) is called once the first k tokens are there.

        ValueError for what does not fit the above.
        """
        B, N = len(text), self.config.grid**2
        prefix = text.new_empty(B, 0) if prefix is None else prefix
        uniforms = torch.rand(B, N, device=text.device) if uniforms is None else uniforms
        check_draw(self.config, text, prefix, uniforms, temperature, top_k, top_p, guidance)
        n = prefix.shape[1]
        tokens, streams = F.pad(prefix, (0, N - n)), 1
        if guidance is not None:
            empty = pad_text([], self.config.text_len, self.config.text_vocab).to(text.device)
            text, streams = torch.cat([text, empty.expand(B, -1)]), 2
        caches = [[] for _ in self.blocks[0::2]]  # of each attention resblock
        for k in range(n, N):
            known = tokens[:, :k].repeat(streams, 1)
            if k == n:  # all positions until this cell's
                x = self.embed(text, F.pad(known, (0, 1)))
            else:  # this cell's alone, which is fed the token before it
                x = self.embed_image(known[:, -1:], first=k)
            for attention, mlp, cache in zip(self.blocks[0::2], self.blocks[1::2], caches):
                x = x + attention(x, cache)
                x = x + mlp(x)
            logits = self.logits(self.image_head, x[:, -1])
            if guidance is not None:
                captioned, plain = logits.chunk(2)
                logits = plain + guidance * (captioned - plain)
            tokens[:, k] = sample_token(logits, uniforms[:, k, None], temperature, top_k, top_p)
            if progress is not None:
                progress(k + 1, tokens)
        return tokens
