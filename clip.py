"""
CLIP, the contrastive model that reranks DALL·E's candidates (2.6).

Two encoders, of pictures and of captions, meet in one space (Radford et al. 2021, "Learning
Transferable Visual Models From Natural Language Supervision"): of all pairs in a batch, those that
belong together are to have the largest cosine. The cosine of a candidate and its caption is the
score by which candidates are ranked. "CLIP 2.4" below means section 2.4 of that paper.

What is not here: the training loop (train_clip.py); CLIP's ResNets; its GELU approximation
x · sigmoid(1.702 x), for which the exact GELU stands; its start-of-text token, which a causal
encoder that is read at its end does not need.

    python clip.py                                    # the sizes of ViT-B/32
    python clip.py a.png b.png --caption "a red cube" # cosines under --run-dir's clip.pt
"""

import argparse
import math
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

MAX_SCALE = 100.0  # logits are never scaled by more, for stability (CLIP 2.5)


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both encoders; the defaults are those of ViT-B/32 (CLIP, Tables 18 and 20)."""

    image_size: int = 224
    patch: int = 32  # pixels along each side
    d_image: int = 768
    text_vocab: int = 49406
    text_len: int = 77  # a caption's tokens and the end of text
    d_text: int = 512
    n_layer: int = 12  # of each encoder
    d_head: int = 64
    d_embed: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, part in (("image_size", "patch"), ("d_image", "d_head"), ("d_text", "d_head")):
            if getattr(self, name) % getattr(self, part):
                raise ValueError(
                    f"{name} must be a multiple of {part} = {getattr(self, part)}, "
                    f"got {getattr(self, name)}"
                )


# ---- pieces --------------------------------------------------------------------------------------


def pad_text(ids: Sequence[int] | Tensor, text_len: int, text_vocab: int) -> Tensor:
    """A caption's ids, at most text_len - 1 of them, then the end of text, id text_vocab, at each
    position left: long [text_len]. A longer caption is cut. ValueError for unknown ids.

    >>> pad_text([5, 7], text_len=5, text_vocab=100).tolist()
    [5, 7, 100, 100, 100]
    """
    text = torch.full((text_len,), text_vocab)
    ids = torch.as_tensor(ids)
    ids = ids if ids.numel() else ids.long()
    if ids.ndim != 1 or ids.dtype != torch.long or ((ids < 0) | (ids >= text_vocab)).any():
        raise ValueError(f"expected a list of ids from 0 to {text_vocab - 1}, got {ids.tolist()}")
    ids = ids[: text_len - 1]
    text[: len(ids)] = ids
    return text


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
        self.blocks = nn.Sequential(
            *(Resblock(d, config.d_head, causal=False) for _ in range(config.n_layer))
        )
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
        self.blocks = nn.Sequential(
            *(Resblock(d, config.d_head, causal=True) for _ in range(config.n_layer))
        )
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
    each caption its picture; and the logits [B, M] of the first choice (CLIP, Fig. 3).

    image and text [B, d_embed] are the rows first .. first + B - 1 of all_image and all_text
    [M, d_embed], all of them normalised.
    """
    own = torch.arange(first, first + len(image), device=image.device)
    to_text, to_image = scale * image @ all_text.T, scale * text @ all_image.T
    return (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2, to_text


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
        """The initialisation of CLIP's released code."""
        for encoder, d in (
            (self.image_encoder, self.config.d_image),
            (self.text_encoder, self.config.d_text),
        ):
            for block in encoder.blocks:
                nn.init.normal_(block.qkv.weight, std=d**-0.5)
                nn.init.normal_(block.up.weight, std=(2 * d) ** -0.5)
                for out in (block.out, block.down):
                    nn.init.normal_(out.weight, std=(2 * d * self.config.n_layer) ** -0.5)
                for linear in (block.qkv, block.up, block.out, block.down):
                    nn.init.zeros_(linear.bias)
            nn.init.normal_(encoder.head.weight, std=d**-0.5)
        nn.init.normal_(self.image_encoder.class_token, std=self.config.d_image**-0.5)
        nn.init.normal_(self.image_encoder.position, std=self.config.d_image**-0.5)
        nn.init.normal_(self.text_encoder.token.weight, std=0.02)
        nn.init.normal_(self.text_encoder.position, std=0.01)

    def scale(self) -> Tensor:
        """What cosines are multiplied by to be logits: one over the temperature, a scalar."""
        return self.log_scale.exp()

    def pad(self, ids: Sequence[int] | Tensor) -> Tensor:
        """A caption's ids as `encode_text` reads them: long [text_len]."""
        return pad_text(ids, self.config.text_len, self.config.text_vocab)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of the weights' dtype, resized where H, W are not
        image_size, to [B, d_embed] of length 1. ValueError for anything else."""
        shape, dtype = images.shape, self.image_encoder.patches.weight.dtype
        if images.ndim != 4 or shape[1] != 3 or images.dtype != dtype or not images.numel():
            raise ValueError(
                f"expected images, {dtype} [B, 3, H, W], none of them 0; "
                f"got {images.dtype} {list(shape)}"
            )
        low, high = torch.aminmax(images)
        if not (low >= 0 and high <= 1):
            raise ValueError(f"expected images in [0, 1], got values from {low:g} to {high:g}")
        return normalised(self.image_encoder(images))

    def encode_text(self, text: Tensor) -> Tensor:
        """Text, long [B, text_len] as `pad` makes it, to [B, d_embed] of length 1."""
        want, end = self.config.text_len, self.config.text_vocab
        if text.dtype != torch.long or text.ndim != 2 or text.shape[1] != want or not len(text):
            raise ValueError(
                f"expected text, long [B, {want}]; got {text.dtype} {list(text.shape)}"
            )
        if not ((text >= 0) & (text <= end)).all() or not (text[:, -1] == end).all():
            raise ValueError(f"expected ids below {end}, then {end} up to the last position")
        return normalised(self.text_encoder(text))

    def loss(self, images: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
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
        all_image, all_caption, first = image, caption, 0
        if dist.is_initialized():
            all_image, all_caption = (torch.cat(all_gather(x)) for x in (image, caption))
            first = dist.get_rank() * len(image)
        with torch.autocast(image.device.type, enabled=False):
            loss, logits = contrastive_loss(
                image, caption, all_image, all_caption, self.scale(), first
            )
        own = torch.arange(first, first + len(image), device=logits.device)
        accuracy = (logits.argmax(dim=1) == own).float().mean()
        metrics = {"loss": loss, "accuracy": accuracy, "scale": self.scale()}
        return loss, {name: value.detach() for name, value in metrics.items()}


def normalised(x: Tensor) -> Tensor:
    """To length 1, in 32 bits under autocast too."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def load_clip(path: str | Path) -> CLIP:
    """The model of a clip.pt, on the CPU. ValueError where the file is something else."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself checks no sums
            if damaged := archive.testzip():
                raise ValueError(f"its part {damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read as a CLIP checkpoint ({reason})") from error
    try:
        with torch.device("meta"):
            model = CLIP(CLIPConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"], assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a CLIP checkpoint of this project ({reason})") from error
    return model.eval()


# ---- python clip.py ------------------------------------------------------------------------------


def print_sizes() -> None:
    config = CLIPConfig()
    with torch.device("meta"):
        model = CLIP(config)
    patches = config.image_size // config.patch
    print(f"ViT-B/32: {config.n_layer} layers in each encoder, heads of {config.d_head}")
    for name, encoder, d, positions in (
        ("pictures", model.image_encoder, config.d_image, f"1 + {patches} × {patches} positions"),
        ("captions", model.text_encoder, config.d_text, f"{config.text_len} positions"),
    ):
        n = sum(p.numel() for p in encoder.parameters())
        print(f"{n:>13,} parameters for {name}, d = {d}, {positions}")
    print(f"{sum(p.numel() for p in model.parameters()):>13,} in all, with the temperature")


@torch.inference_mode()
def print_cosines(run_dir: Path, pictures: list[str], captions: list[str]) -> None:
    from bpe import BPE  # for this table alone: the model reads ids

    model, bpe = load_clip(run_dir / "clip.pt"), BPE.load(run_dir / "bpe.json")
    text = model.encode_text(torch.stack([model.pad(bpe.encode(c)) for c in captions]))
    lines = ["".join(f"{k:>8}" for k in range(1, len(captions) + 1))]
    for path in pictures:
        with Image.open(path) as img:
            pixels = torch.from_numpy(np.array(img.convert("RGB")))
        cosines = model.encode_image(pixels.permute(2, 0, 1)[None] / 255) @ text.T
        lines.append("".join(f"{x:8.3f}" for x in cosines[0].tolist()) + f"  {path}")
    print("\n".join(lines + [f"{k:>8}  {caption}" for k, caption in enumerate(captions, 1)]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The sizes of ViT-B/32; or the cosines of pictures and captions."
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE")
    parser.add_argument("--caption", action="append", metavar="TEXT", help="may be repeated")
    parser.add_argument("--run-dir", metavar="DIR", default="pretrained/tiny", type=Path)
    args = parser.parse_args()
    if bool(args.pictures) != bool(args.caption):
        parser.error("expected pictures and at least one --caption, or neither")
    try:
        if args.pictures:
            print_cosines(args.run_dir, args.pictures, args.caption)
        else:
            print_sizes()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        print(f"clip.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
