"""
CLIP, the contrastive model that reranks DALL·E's candidates (2.6).

Two encoders, of pictures and of captions, meet in one space (Radford et al. 2021, "Learning
Transferable Visual Models From Natural Language Supervision"): of all pairs in a batch, those that
belong together are to have the largest cosine. The cosine of a candidate and its caption is the
score by which candidates are ranked. "CLIP 2.4" below means section 2.4 of that paper. Start at
`CLIP.loss`.

What is not here: the training loop (train_clip.py); CLIP's ResNets; its GELU approximation
x · sigmoid(1.702 x), for which the exact GELU stands; its start-of-text token, which a causal
encoder that is read at its end does not need.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

MAX_SCALE = 100.0  # logits are never scaled by more, for stability (CLIP 2.5)


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both encoders; the defaults are those of ViT-B/32 (CLIP, Tables 18 and 20)."""

    image_size: int = 224  # pixels along each side (CLIP, Table 20)
    patch: int = 32  # pixels along each side of a patch (CLIP, Table 20)
    d_image: int = 768  # width of the encoder of images (CLIP, Table 20)
    text_vocab: int = 49406  # pieces of the BPE, without start and end of text (CLIP, Table 18)
    text_len: int = 77  # a caption's tokens and the end of text (CLIP 2.4)
    d_text: int = 512  # width of the encoder of captions (CLIP, Table 20)
    n_layer: int = 12  # layers of each encoder (CLIP, Table 20)
    d_head: int = 64  # numbers in an attention head (CLIP, Table 20)
    d_embed: int = 512  # numbers of the embeddings that are compared (CLIP, Table 20)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, part in (("image_size", "patch"), ("d_image", "d_head"), ("d_text", "d_head")):
            whole, divisor = getattr(self, name), getattr(self, part)
            if whole % divisor:
                raise ValueError(f"{name} must be a multiple of {part} = {divisor}, got {whole}")


# ---- pieces --------------------------------------------------------------------------------------


def pad_text(ids: Sequence[int] | Tensor, text_len: int, text_vocab: int) -> Tensor:
    """A caption's ids, at most text_len - 1 of them, then the end of text, id text_vocab, at each
    position left: long [text_len]. A longer caption is cut. ValueError for unknown ids.

    >>> pad_text([5, 7], text_len=5, text_vocab=100).tolist()
    [5, 7, 100, 100, 100]
    """
    ids = torch.as_tensor(ids)
    ids = ids if ids.numel() else ids.long()
    if ids.ndim != 1 or ids.dtype != torch.long or ((ids < 0) | (ids >= text_vocab)).any():
        raise ValueError(f"expected a list of ids from 0 to {text_vocab - 1}, got {ids.tolist()}")
    ids = ids[: text_len - 1]
    return F.pad(ids, (0, text_len - len(ids)), value=text_vocab)


class Resblock(nn.Module):
    """Attention, then an MLP, each normalised first and added to x [B, S, d]."""

    def __init__(self, d: int, d_head: int, causal: bool) -> None:
        super().__init__()
        self.d_head, self.causal = d_head, causal
        self.norm_1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.norm_2 = nn.LayerNorm(d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, -1, self.d_head))  # [B, S, 3, H, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class ImageEncoder(nn.Module):
    """A vision transformer: images [B, 3, H, W] in [0, 1] -> [B, d_embed], at the class token."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        d, self.size = config.d_image, config.image_size
        self.patches = nn.Conv2d(3, d, config.patch, config.patch, bias=False)
        self.class_token = nn.Parameter(torch.empty(d))
        self.position = nn.Parameter(torch.empty(1 + (config.image_size // config.patch) ** 2, d))
        self.norm_in = nn.LayerNorm(d)
        blocks = [Resblock(d, config.d_head, causal=False) for _ in range(config.n_layer)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.d_embed, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (self.size, self.size):
            size = (self.size, self.size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        x = self.patches(4 * images - 2).flatten(2).transpose(1, 2)  # mean about 0, variance 1
        x = torch.cat([self.class_token.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        x = self.blocks(self.norm_in(x + self.position))
        return self.head(self.norm(x[:, 0]))


class TextEncoder(nn.Module):
    """A causal transformer: text [B, T] -> [B, d_embed], read where the text ends.

    The padding behind the end is never seen, for attention looks back only.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        d, self.end = config.d_text, config.text_vocab
        self.token = nn.Embedding(config.text_vocab + 1, d)  # the end of text comes last
        self.position = nn.Parameter(torch.empty(config.text_len, d))
        blocks = [Resblock(d, config.d_head, causal=True) for _ in range(config.n_layer)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.d_embed, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.blocks(self.token(text) + self.position)
        ends = (text == self.end).int().argmax(dim=1)  # the first one
        return self.head(self.norm(x[torch.arange(len(x), device=x.device), ends]))


def contrastive_loss(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor, first: int = 0
) -> tuple[Tensor, Tensor]:
    """The mean of two cross-entropies in nats: each picture chooses its caption among all of them,
    each caption its picture; and the share of pictures that choose right (CLIP, Fig. 3).

    image and text [B, d_embed] are the rows first .. first + B - 1 of all_image and all_text
    [M, d_embed], all of them normalised.
    """
    own = torch.arange(first, first + len(image), device=image.device)
    to_text, to_image = scale * image @ all_text.T, scale * text @ all_image.T  # [B, M]
    loss = (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2
    return loss, (to_text.argmax(dim=1) == own).float().mean()


def normalised(x: Tensor) -> Tensor:
    """To length 1, in 32 bits under autocast too."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


# ---- the whole -----------------------------------------------------------------------------------


class CLIP(nn.Module):
    """Two encoders and the temperature between them (CLIP 2.3-2.5)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # of 1 / temperature
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As CLIP's released code starts its text encoder, for both of them; biases are 0."""
        image, text, c = self.image_encoder, self.text_encoder, self.config
        for encoder, d in ((image, c.d_image), (text, c.d_text)):
            for block in encoder.blocks:
                nn.init.normal_(block.qkv.weight, std=d**-0.5)
                nn.init.normal_(block.up.weight, std=(2 * d) ** -0.5)
                for out in (block.out, block.down):
                    nn.init.normal_(out.weight, std=(2 * d * c.n_layer) ** -0.5)
                for linear in (block.qkv, block.up, block.out, block.down):
                    nn.init.zeros_(linear.bias)
            nn.init.normal_(encoder.head.weight, std=d**-0.5)
        nn.init.normal_(image.class_token, std=c.d_image**-0.5)
        nn.init.normal_(image.position, std=c.d_image**-0.5)
        nn.init.normal_(text.token.weight, std=0.02)
        nn.init.normal_(text.position, std=0.01)

    def scale(self) -> Tensor:
        """What cosines are multiplied by to be logits: one over the temperature, a scalar."""
        return self.log_scale.exp()

    def pad(self, ids: Sequence[int] | Tensor) -> Tensor:
        """A caption's ids as `encode_text` reads them: long [text_len]."""
        return pad_text(ids, self.config.text_len, self.config.text_vocab)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of the weights' dtype, resized where H, W are not
        image_size, to [B, d_embed] of length 1. ValueError for other shapes and dtypes."""
        dtype, shape = self.image_encoder.patches.weight.dtype, list(images.shape)
        if images.ndim != 4 or shape[1] != 3 or images.dtype != dtype or not images.numel():
            expected = f"expected images, {dtype} [B, 3, H, W], none of them 0"
            raise ValueError(f"{expected}; got {images.dtype} {shape}")
        return normalised(self.image_encoder(images))

    def encode_text(self, text: Tensor) -> Tensor:
        """Text, long [B, text_len] as `pad` makes it, to [B, d_embed] of length 1. ValueError for
        other shapes and dtypes."""
        want, shape = self.config.text_len, list(text.shape)
        if text.dtype != torch.long or text.ndim != 2 or shape[1] != want or not len(text):
            raise ValueError(f"expected text, long [B, {want}]; got {text.dtype} {shape}")
        return normalised(self.text_encoder(text))

    def loss(self, images: Tensor, text: Tensor) -> tuple[Tensor, dict]:
        """Symmetric cross-entropy over the pairs of the batch, in nats (CLIP, Fig. 3).

        Under torch.distributed the batch is that of all processes, each computing the rows of its
        own pairs. `all_gather` sends every process's gradient back to where a row comes from, so
        that the mean over processes of both losses and gradients is that of the whole batch.

        The metrics, detached scalars: loss; accuracy, the share of pictures whose caption is the
        likeliest in the batch; scale.
        """
        if len(images) != len(text):
            raise ValueError(f"expected a text for each image, got {len(text)} for {len(images)}")
        with torch.no_grad():  # a clamp within the graph would end the gradient for good
            self.log_scale.clamp_(max=math.log(MAX_SCALE))
        image, caption = self.encode_image(images), self.encode_text(text)
        everyone, first = (image, caption), 0
        if dist.is_initialized():
            everyone = [torch.cat(all_gather(x)) for x in everyone]
            first = dist.get_rank() * len(image)
        with torch.autocast(image.device.type, enabled=False):
            loss, accuracy = contrastive_loss(image, caption, *everyone, self.scale(), first)
        metrics = {"loss": loss, "accuracy": accuracy, "scale": self.scale()}
        return loss, {name: value.detach() for name, value in metrics.items()}
