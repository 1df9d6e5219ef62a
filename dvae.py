"""
Stage one of DALL-E: the discrete variational autoencoder (2.1, A.1-A.3 of the paper).

The encoder turns an image into a grid of logits over K codes, the decoder turns a grid of codes
into the parameters of a distribution over pixels, and the two are trained to maximise a lower
bound of the likelihood, with the Gumbel-softmax relaxation in place of sampling. The parameters
carry the names of OpenAI's released model.

What is not here: the training loop (train_dvae.py) and the prior over the codes, which is
uniform in this stage.

    python dvae.py               # the table of layers; writes logit_laplace.png
    python dvae.py PHOTO         # writes the photo beside its reconstruction
"""

import argparse
import io
import math
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn


@dataclass(frozen=True)
class DVAEConfig:
    """Sizes of the dVAE; the defaults are those of the paper (A.1).

    With n_groups=4 an image shrinks by a factor of 8, with n_groups=3 by 4.
    """

    n_hid: int = 256
    n_init: int = 128
    n_groups: int = 4
    blocks_per_group: int = 2
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.n_hid % 4:
            raise ValueError(
                f"n_hid must be a multiple of 4, for the bottlenecks, got {self.n_hid}"
            )

    @property
    def factor(self) -> int:
        """Image pixels per grid cell, along each side."""
        return 2 ** (self.n_groups - 1)


# ----------------------------------------------------------------------------- likelihood (A.3)

EPS = 0.1  # Eq. 3


def map_pixels(x: torch.Tensor) -> torch.Tensor:
    """phi of Eq. 3: values in [0, 1], unchecked, to [0.1, 0.9], away from the poles of Eq. 2."""
    return (1 - 2 * EPS) * x + EPS


def unmap_pixels(x: torch.Tensor) -> torch.Tensor:
    """The inverse of phi, clamped to [0, 1]."""
    return ((x - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def logit_laplace_log_prob(x: torch.Tensor, mu: torch.Tensor, ln_b: torch.Tensor) -> torch.Tensor:
    """ln f(x | mu, b) of Eq. 2, elementwise, for x in (0, 1): the density of sigmoid(y) where y
    is Laplace-distributed with mean mu and scale b = exp(ln_b). x is not checked; DVAE does."""
    ln_jacobian = torch.log(x) + torch.log1p(-x)
    return -math.log(2) - ln_b - ln_jacobian - (torch.logit(x) - mu).abs() * torch.exp(-ln_b)


# ----------------------------------------------------------------------------- layers (A.1)


def check_channels(x: torch.Tensor, w: torch.Tensor, what: str) -> None:
    """ValueError unless x, not empty, is what a convolution with the weights w reads."""
    if x.ndim != 4 or x.shape[1] != w.shape[1] or x.dtype != w.dtype or not x.numel():
        raise ValueError(
            f"expected {what}, {w.dtype} [B, {w.shape[1]}, H, W], none of them 0; "
            f"got {x.dtype} {list(x.shape)}"
        )


class Conv2d(nn.Module):
    """A convolution that keeps the size, with the released parameter names `w` and `b`."""

    def __init__(self, n_in: int, n_out: int, kernel: int, always_fp32: bool = False):
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(n_out))
        nn.init.normal_(self.w, std=1 / math.sqrt(n_in * kernel**2))
        self.always_fp32 = always_fp32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = self.w.shape[-1] // 2
        if self.always_fp32 and torch.amp.is_autocast_available(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return F.conv2d(x.to(self.w.dtype), self.w, self.b, padding=padding)
        return F.conv2d(x, self.w, self.b, padding=padding)


class Block(nn.Module):
    """A bottleneck resblock: x + post_gain * res(x), four (ReLU, convolution) pairs in res."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], n_blocks: int):
        super().__init__()
        n_mid = n_out // 4
        widths = (n_in, n_mid, n_mid, n_mid, n_out)
        # the "small constant" that keeps the start of training stable (2.1)
        self.post_gain = 1 / n_blocks**2
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        layers = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.id_path(x) + self.post_gain * self.res_path(x)


def resblock_groups(
    widths: list[int], kernels: tuple[int, ...], resample: nn.Module, config: DVAEConfig
) -> OrderedDict:
    """`group_1`, `group_2`, ...: resblocks from width to width, resampled after all but the
    last group."""
    groups = OrderedDict()
    for g in range(config.n_groups):
        group = OrderedDict()
        for i in range(config.blocks_per_group):
            n_in = widths[g] if i == 0 else widths[g + 1]
            n_blocks = config.n_groups * config.blocks_per_group
            group[f"block_{i + 1}"] = Block(n_in, widths[g + 1], kernels, n_blocks)
        if g < config.n_groups - 1:
            group["resample"] = resample
        groups[f"group_{g + 1}"] = nn.Sequential(group)
    return groups


class Encoder(nn.Module):
    """phi(images) [B, 3, H, W] to logits [B, vocab_size, H/f, W/f], f = config.factor.

    ValueError for other shapes and dtypes; the values are not checked.
    """

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = config
        widths = [config.n_hid * 2 ** max(g - 1, 0) for g in range(config.n_groups + 1)]
        # max-pooling gave a better bound than average-pooling
        groups = resblock_groups(widths, (3, 3, 3, 1), nn.MaxPool2d(2), config)
        # 1x1 next to the relaxation: a small receptive field generalises better (2.1)
        head = Conv2d(widths[-1], config.vocab_size, 1, always_fp32=True)
        self.blocks = nn.Sequential(
            OrderedDict(
                input=Conv2d(3, config.n_hid, 7),
                **groups,
                output=nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=head)),
            )
        )

    def check(self, x: torch.Tensor, what: str) -> None:
        check_channels(x, self.blocks.input.w, what)
        f = self.config.factor
        if x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"expected sides that are multiples of {f}, got {list(x.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.check(x, "images through phi")
        return self.blocks(x)


class Decoder(nn.Module):
    """One-hot or relaxed codes [B, vocab_size, h, w] to six maps [B, 6, f·h, f·w]: the means mu
    for R, G, B, then ln b for each."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = config
        down = [config.n_hid * 2**g for g in reversed(range(config.n_groups))]
        widths = [config.n_init, *down]
        upsample = nn.Upsample(scale_factor=2, mode="nearest")
        groups = resblock_groups(widths, (1, 3, 3, 3), upsample, config)
        self.blocks = nn.Sequential(
            OrderedDict(
                input=Conv2d(config.vocab_size, config.n_init, 1, always_fp32=True),
                **groups,
                output=nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(config.n_hid, 6, 1))),
            )
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        check_channels(z, self.blocks.input.w, "one-hot or relaxed codes")
        return self.blocks(z)


# ----------------------------------------------------------------------------- the whole (2.1)


class DVAE(nn.Module):
    """Encoder, decoder and the bound between them.

    Images are [B, 3, H, W] in [0, 1] of the weights' dtype, H and W multiples of config.factor = f;
    tokens are long [B, H/f, W/f] in [0, vocab_size). Anything else, or nothing, is a ValueError.
    """

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens [B, h, w], long: the argmax of the logits, without noise (2.2)."""
        self.check_images(images)
        return self.encoder(map_pixels(images)).argmax(1)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Images of tokens [B, h, w]: phi^-1(sigmoid(mu)), ln b ignored (A.3)."""
        mu = self.decoder(self.one_hot(tokens))[:, :3]
        return unmap_pixels(torch.sigmoid(mu))

    def check_images(self, images: torch.Tensor) -> None:
        self.encoder.check(images, "images")
        low, high = torch.aminmax(images)
        if not (low >= 0 and high <= 1):
            raise ValueError(f"expected images in [0, 1], got values from {low:g} to {high:g}")

    def one_hot(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.ndim != 3 or tokens.dtype != torch.long or not tokens.numel():
            raise ValueError(
                f"expected tokens, long [B, h, w], none of them 0; "
                f"got {tokens.dtype} {list(tokens.shape)}"
            )
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(
                f"expected tokens from 0 to {self.config.vocab_size - 1}, "
                f"got {tokens.min()} to {tokens.max()}"
            )
        b, h, w = tokens.shape
        weight = self.decoder.blocks.input.w
        z = weight.new_zeros(b, self.config.vocab_size, h, w)
        return z.scatter_(1, tokens[:, None], 1.0)

    def terms(
        self, images: torch.Tensor, tau: float, hard: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The two terms of the bound, scalars in nats per pixel value, and mu [B, 3, H, W].

        Both are joint over the image and divided by H · W · 3 (A.2): the KL term is a sum over
        h · w grid positions, so that it carries the weight h · w / (H · W · 3) against the mean
        over positions; that is 1/192 for a factor of 8, 1/48 for 4. Codes are relaxed at
        temperature tau, or with `hard` drawn from q.
        """
        self.check_images(images)
        if not 0 < tau < math.inf:
            raise ValueError(f"expected a finite temperature tau > 0, got {tau}")
        x = map_pixels(images)
        logits = self.encoder(x)
        gumbel = -torch.log(-torch.log(torch.rand_like(logits)))
        if hard:  # the largest of logits + gumbel is distributed as q
            z = self.one_hot((logits + gumbel).argmax(1))
        else:
            z = F.softmax((logits + gumbel) / tau, dim=1)
        mu, ln_b = self.decoder(z).to(x.dtype).chunk(2, dim=1)
        recon = -logit_laplace_log_prob(x, mu, ln_b).mean()
        ln_q = F.log_softmax(logits, dim=1)
        kl = (ln_q.exp() * (ln_q + math.log(self.config.vocab_size))).sum(1)  # [B, h, w]
        return recon, kl.sum() / images.numel(), mu

    def loss(
        self, images: torch.Tensor, tau: float, kl_weight: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The negative relaxed bound with the KL term weighted by beta = kl_weight (2.1, A.2).

        The metrics are detached scalars: loss, recon and kl in nats per pixel value, and psnr in
        dB of the relaxed reconstruction.
        """
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"expected a finite kl_weight ≥ 0, got {kl_weight}")
        recon, kl, mu = self.terms(images, tau)
        loss = recon + kl_weight * kl
        mse = (unmap_pixels(torch.sigmoid(mu.detach())) - images).square().mean()
        metrics = {"loss": loss, "recon": recon, "kl": kl, "psnr": -10 * torch.log10(mse)}
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def distortion(self, images: torch.Tensor) -> torch.Tensor:
        """-ln p(x | z) for images and their own tokens, in nats for each 8-bit value, a scalar."""
        mu, ln_b = self.decoder(self.one_hot(self.encode(images))).chunk(2, dim=1)
        nats = -logit_laplace_log_prob(map_pixels(images), mu, ln_b).mean()
        return nats + math.log(255 / (1 - 2 * EPS))  # phi makes a step of 1 / 255 smaller

    @torch.no_grad()
    def elb(self, images: torch.Tensor, tau: float | None = None) -> torch.Tensor:
        """The evidence lower bound in nats per pixel value, a scalar: the relaxed one at
        temperature tau, or without tau the true one, its codes drawn from q (2.1). Eq. 1 is a bound
        at beta = 1 only, so that is the weight here, whatever that of the training."""
        recon, kl, _ = self.terms(images, 1.0 if tau is None else tau, hard=tau is None)
        return -recon - kl


def load_dvae(path: str | Path) -> DVAE:
    """The model of a dvae.pt, on the CPU. ValueError where the file is something else."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself checks no sums
            if damaged := archive.testzip():
                raise ValueError(f"its part {damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read as a dVAE checkpoint ({reason})") from error
    try:
        model = DVAE(DVAEConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a dVAE checkpoint of this project ({reason})") from error
    return model.eval().to(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------- OpenAI's weights

RELEASED_CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)


class Shell:
    """What a class of the release becomes: its attributes, none of its code."""

    def parameters(self, prefix: str = "") -> dict[str, torch.Tensor]:
        found = {prefix + name: p for name, p in self._parameters.items() if p is not None}
        for name, module in self._modules.items():
            found |= module.parameters(f"{prefix}{name}.")
        return found


def view_of(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_) -> torch.Tensor:
    return storage.as_strided(size, stride, offset)


# Every name that such a file may use, and what is called or built in its place.
ALLOWED = dict.fromkeys(RELEASED_CLASSES, Shell) | {
    "__builtin__.set": set,
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "torch.device": torch.device,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch._utils._rebuild_tensor_v2": view_of,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
}


class Reader(pickle.Unpickler):
    """Unpickles tensors, plain data and shells; any other name in the file is refused."""

    def __init__(self, file: io.BytesIO, most_bytes: int):
        super().__init__(file)
        self.most_bytes = most_bytes
        self.storages: dict[str, torch.Tensor] = {}  # allocated here, filled in later

    def find_class(self, module: str, name: str):
        if f"{module}.{name}" not in ALLOWED:
            raise ValueError(f"it names {module}.{name}, which no such file needs")
        allowed = ALLOWED[f"{module}.{name}"]
        # A file can set attributes on the classes it is given: no two get the same shell.
        return type("Shell", (Shell,), {}) if allowed is Shell else allowed

    def persistent_load(self, key: tuple):
        if key[0] == "module":  # a class and its source, before PyTorch 1.6
            return key[1]
        _, dtype, name, _, numel, *_ = key
        if name not in self.storages:
            if numel * dtype.itemsize > self.most_bytes:
                raise ValueError(f"it has {numel} numbers in one tensor, more than its size")
            self.storages[name] = torch.empty(numel, dtype=dtype)
        return self.storages[name]


def read_released(path: str | Path) -> dict[str, torch.Tensor]:
    """The parameters of a pickled module of the release, float32 on the CPU, by name.

    Reads both of PyTorch's formats, the zip archive and what came before version 1.6: four
    pickles and the storages. ValueError where the file is something else.
    """
    data = Path(path).read_bytes()
    file = io.BytesIO(data)
    try:
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            root = archive.namelist()[0].split("/")[0]
            reader = Reader(io.BytesIO(archive.read(f"{root}/data.pkl")), len(data))
            module = reader.load()
            for name, storage in reader.storages.items():
                if archive.getinfo(f"{root}/data/{name}").file_size != storage.nbytes:
                    raise ValueError(f"its tensor {name} has another size than it says")
                content = bytearray(archive.read(f"{root}/data/{name}"))
                storage.copy_(torch.frombuffer(content, dtype=storage.dtype))
        else:
            file.seek(0)
            for _ in range(3):  # a magic number, a version, the machine it was written on
                Reader(file, 0).load()
            reader = Reader(file, len(data))
            module = reader.load()
            for name in Reader(file, 0).load():
                storage = reader.storages[name]
                content = bytearray(file.read(8 + storage.nbytes)[8:])  # after its length
                storage.copy_(torch.frombuffer(content, dtype=storage.dtype))
        return {name: p.float() for name, p in module.parameters().items()}
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is not one of OpenAI's encoder.pkl and decoder.pkl ({reason})"
        ) from error


def load_openai(encoder_path: str | Path, decoder_path: str | Path) -> DVAE:
    """OpenAI's released encoder.pkl and decoder.pkl as a DVAE on the CPU.

    The files are pickles of whole modules from the package `dall_e`, which is not needed, nor is
    any code of it run. The sizes are read off the parameters. ValueError for any other file.
    """
    halves = {"encoder": read_released(encoder_path), "decoder": read_released(decoder_path)}
    try:
        encoder, decoder = halves["encoder"], halves["decoder"]
        config = DVAEConfig(
            n_hid=encoder["blocks.input.w"].shape[0],
            n_init=decoder["blocks.input.w"].shape[0],
            n_groups=len({name.split(".")[1] for name in encoder if ".group_" in name}),
            blocks_per_group=sum(
                bool(re.fullmatch(r"blocks\.group_1\.block_\d+\.res_path\.conv_1\.w", name))
                for name in encoder
            ),
            vocab_size=encoder["blocks.output.conv.w"].shape[0],
        )
        with torch.device("meta"):
            model = DVAE(config)
        for name, parameters in halves.items():
            getattr(model, name).load_state_dict(parameters, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{encoder_path} and {decoder_path} do not have the released layout ({reason})"
        ) from error
    return model.eval().to(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------- python dvae.py


def print_layers(half: nn.Module, x: torch.Tensor) -> None:
    """The name, output shape and number of parameters of each layer of `half` on x."""
    print(f"{type(half).__name__:<28}{'output':<22}{'parameters':>12}")
    total = 0
    for name, group in half.blocks.named_children():
        layers = group.named_children() if name.startswith("group") else [("", group)]
        for part, layer in layers:
            x = layer(x)
            count = sum(p.numel() for p in layer.parameters())
            total += count
            label = f"{name}.{part}".rstrip(".")
            print(f"{label:<28}{' × '.join(map(str, x.shape[1:])):<22}{count:>12,}")
    print(f"{'':<50}{total:>12,}\n")


def draw_logit_laplace(path: str) -> None:
    """The density of Eq. 2 over (0, 1) for a few mu and b, as a PNG."""
    width, height, margin, top = 640, 360, 40, 4.0
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    x = torch.linspace(1e-3, 1 - 1e-3, 1000)
    left, right, bottom = margin, width - 10, height - margin

    def at(u: float, f: float) -> tuple[float, float]:
        return left + u * (right - left), bottom - min(f, top) / top * (bottom - 10)

    curves = [
        (0.0, 1.0, "#3f72b5"),
        (0.0, 0.5, "#3d9a62"),
        (-1.2, 0.6, "#c2553d"),
        (1.2, 2.0, "#7a55a8"),
    ]
    for k, (mu, b, color) in enumerate(curves):
        f = logit_laplace_log_prob(x, torch.tensor(mu), torch.tensor(math.log(b))).exp()
        pen.line([at(u, v) for u, v in zip(x.tolist(), f.tolist())], color, 2)
        pen.text((right - 220, 14 + 16 * k), f"mu = {mu:g}, b = {b:g}", color)
    for edge in (EPS, 1 - EPS):  # where phi puts black and white
        pen.line([at(edge, 0), at(edge, top)], "#bbbbbb")
        pen.text((at(edge, 0)[0] - 8, bottom + 4), f"{edge:g}", "black")
    pen.rectangle((left, 10, right, bottom), outline="black")
    pen.text((left, height - 18), "x in (0, 1); grey: phi(0) and phi(255) of Eq. 3", "black")
    pen.text((4, 10), f"{top:g}", "black")
    picture.save(path)
    print(f"{path}: the logit-Laplace density of Eq. 2")


def draw_beside_reconstruction(photo: str, model: DVAE, path: str) -> None:
    """A picture, cut to whole grid cells, beside what its tokens decode to."""
    with Image.open(photo) as img:
        img = ImageOps.exif_transpose(img).convert("RGB")
    f = model.config.factor
    width, height = img.width // f * f, img.height // f * f
    if not width or not height:
        raise ValueError(
            f"{photo} is {img.width} × {img.height} pixels; expected at least {f} × {f}"
        )
    data = bytearray(img.crop((0, 0, width, height)).tobytes())
    pixels = torch.frombuffer(data, dtype=torch.uint8).view(1, height, width, 3)
    images = pixels.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        tokens = model.encode(images)
        decoded = model.decode(tokens)
    psnr = -10 * torch.log10((decoded - images).square().mean()).item()
    both = torch.cat([images, decoded], dim=3)[0].permute(1, 2, 0).mul(255).round()
    Image.fromarray(both.to(torch.uint8).numpy()).save(path)
    h, w = tokens.shape[1:]
    print(f"{path}: {width} × {height} pixels beside {h} × {w} tokens decoded, {psnr:.1f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The layers of the paper's dVAE and Eq. 2; or a photo and its reconstruction."
    )
    parser.add_argument("photo", nargs="?", help="a picture to encode and decode")
    parser.add_argument("--openai", nargs=2, metavar=("ENC", "DEC"), help="the released files")
    parser.add_argument("--run-dir", metavar="DIR", default="pretrained/tiny", type=Path)
    parser.add_argument("-o", "--out", metavar="FILE", help="default: named after what it shows")
    args = parser.parse_args()
    try:
        if args.photo:
            released = args.openai and load_openai(*args.openai)
            model = released or load_dvae(args.run_dir / "dvae.pt")
            draw_beside_reconstruction(args.photo, model, args.out or "reconstruction.png")
            return
        config = DVAEConfig()
        with torch.device("meta"):
            print_layers(Encoder(config), torch.empty(1, 3, 256, 256))
            print_layers(Decoder(config), torch.empty(1, config.vocab_size, 32, 32))
        draw_logit_laplace(args.out or "logit_laplace.png")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        print(f"dvae.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
