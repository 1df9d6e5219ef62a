"""
Stage one of DALL·E: the discrete variational autoencoder (2.1, A.1 to A.3).

The encoder turns an image into a grid of logits over K codes, the decoder a grid of codes into the
parameters of a distribution over pixels: 256 · 256 · 3 values become 32 · 32 tokens, 192 times
fewer for the prior to read. Both are trained to maximise a lower bound of the images' likelihood
(Eq. 1), with the Gumbel-softmax relaxation in place of sampling. Start at `DVAE.terms`.

What is not here: the training loop and its schedules (train_dvae.py); the prior over the codes,
which is uniform in this stage (transformer.py); OpenAI's weights (engine/openai.py), whose names
the parameters carry.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DVAEConfig:
    """Sizes of the dVAE; the defaults are those of the paper (A.1).

    With n_groups=4 an image shrinks by a factor of 8, with n_groups=3 by 4.
    """

    n_hid: int = 256  # the width: groups have 1, 2, 4, 8 times as many channels (A.1)
    n_init: int = 128  # channels at the decoder's start (A.1)
    n_groups: int = 4  # groups of resblocks; between them H, W halve, in the decoder double (A.1)
    blocks_per_group: int = 2  # resblocks in a group (A.1)
    vocab_size: int = 8192  # K: the codes that a token can be (2.1)
    input_gain: int = 1  # both first convolutions start this much larger; not the paper's
    min_ln_b: float = -math.inf  # floor of ln b, lest flat areas dominate the loss; not the paper's

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "min_ln_b" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not self.min_ln_b < math.inf:
            raise ValueError(f"min_ln_b must be a number or -inf, got {self.min_ln_b!r}")
        if self.n_hid % 4:
            raise ValueError(f"n_hid must be a multiple of 4, got {self.n_hid}")

    @property
    def factor(self) -> int:
        """Image pixels per grid cell, along each side."""
        return 2 ** (self.n_groups - 1)


# ----------------------------------------------------------------------------- likelihood (A.3)

EPS = 0.1  # Eq. 3


def map_pixels(x: Tensor) -> Tensor:
    """phi of Eq. 3: floats in [0, 1] to [0.1, 0.9], away from the poles of Eq. 2."""
    if not x.is_floating_point():
        raise ValueError(f"expected pixels from 0 to 1, such as float32; got {x.dtype}")
    return (1 - 2 * EPS) * x + EPS


def unmap_pixels(x: Tensor) -> Tensor:
    """The inverse of phi, clamped to [0, 1]."""
    return ((x - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def logit_laplace_log_prob(x: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """ln f(x | mu, b) of Eq. 2, elementwise, for x in (0, 1): the density of sigmoid(y) where y
    is Laplace-distributed with mean mu and scale b = exp(ln_b)."""
    ln_jacobian = torch.log(x) + torch.log1p(-x)
    return -math.log(2) - ln_b - ln_jacobian - (torch.logit(x) - mu).abs() * torch.exp(-ln_b)


# ----------------------------------------------------------------------------- networks (A.1)


def check(x: Tensor, w: Tensor, factor: int, what: str) -> None:
    """ValueError unless x fits the weights w, and H and W are multiples of factor."""
    fits = x.ndim == 4 and x.shape[1] == w.shape[1] and x.dtype == w.dtype and x.numel()
    if not fits or x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(
            f"expected {what}, {w.dtype} [B, {w.shape[1]}, H, W], none of them 0, H and W "
            f"multiples of {factor}; got {x.dtype} {list(x.shape)}"
        )


class Conv2d(nn.Module):
    """A convolution that keeps the size, with the released parameter names `w` and `b`.

    always_fp32: in 32 bits under autocast too, as the release has the two next to the relaxation.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, always_fp32: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(n_out))
        nn.init.normal_(self.w, std=1 / math.sqrt(n_in * kernel**2))
        self.always_fp32 = always_fp32

    def forward(self, x: Tensor) -> Tensor:
        padding = self.w.shape[-1] // 2
        if self.always_fp32 and torch.amp.is_autocast_available(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return F.conv2d(x.to(self.w.dtype), self.w, self.b, padding=padding)
        return F.conv2d(x, self.w, self.b, padding=padding)


class Block(nn.Module):
    """A bottleneck resblock: id(x) + post_gain · res(x), four (ReLU, convolution) pairs in res."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], n_blocks: int) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
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
    """phi(images) [B, 3, H, W] to logits [B, vocab_size, H/f, W/f], f = config.factor."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.factor = config.factor
        # before the groups and after each: 1, 1, 2, 4, 8 times n_hid (A.1)
        widths = [config.n_hid * 2 ** max(g - 1, 0) for g in range(config.n_groups + 1)]
        # max-pooling gave a better bound than average-pooling
        groups = resblock_groups(widths, (3, 3, 3, 1), nn.MaxPool2d(2), config)
        # 1x1 next to the relaxation, here and at the decoder's start: a smaller receptive field
        # there generalises better to the true bound (2.1)
        last = Conv2d(widths[-1], config.vocab_size, 1, always_fp32=True)
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
        first = Conv2d(3, config.n_hid, 7)
        self.blocks = nn.Sequential(OrderedDict(input=first, **groups, output=output))

    def forward(self, x: Tensor) -> Tensor:
        check(x, self.blocks.input.w, self.factor, "images through phi")
        return self.blocks(x)


class Decoder(nn.Module):
    """One-hot or relaxed codes [B, vocab_size, h, w] to six maps [B, 6, f·h, f·w]: the means mu
    for R, G, B, then ln b for each."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        down = [config.n_hid * 2**g for g in reversed(range(config.n_groups))]
        upsample = nn.Upsample(scale_factor=2, mode="nearest")
        groups = resblock_groups([config.n_init, *down], (1, 3, 3, 3), upsample, config)
        first = Conv2d(config.vocab_size, config.n_init, 1, always_fp32=True)
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(config.n_hid, 6, 1)))
        self.blocks = nn.Sequential(OrderedDict(input=first, **groups, output=output))

    def forward(self, z: Tensor) -> Tensor:
        check(z, self.blocks.input.w, 1, "one-hot or relaxed codes")
        return self.blocks(z)


# ----------------------------------------------------------------------------- the whole (2.1)


def gumbel_noise(logits: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of logits: −ln(−ln u), u uniform (2.1)."""
    return -torch.log(-torch.log(torch.rand_like(logits)))


class DVAE(nn.Module):
    """Encoder, decoder and the bound between them.

    Images are [B, 3, H, W] in [0, 1] of the weights' dtype, H and W multiples of config.factor = f;
    tokens are long [B, H/f, W/f] in [0, vocab_size). ValueError for other shapes and dtypes.
    """

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.input_gain > 1:
            self.even_out()
        self.to(memory_format=torch.channels_last)  # faster convolutions

    @torch.no_grad()
    def even_out(self) -> None:
        """Give what both first convolutions make at the start a mean near 0 and a larger variance.

        Not the paper's; `tiny`, `emoji` and `small` do it: phi(x) is about ½ everywhere, and one
        code of K alone is 1, so that with the usual start all pixels, and all codes, look almost
        the same to what follows, and short runs are spent on telling them apart.
        """
        pixels, codes = self.encoder.blocks.input, self.decoder.blocks.input
        pixels.w *= self.config.input_gain
        codes.w *= self.config.input_gain
        pixels.b.copy_(-pixels.w.sum((1, 2, 3)) / 2)

    def encode(self, images: Tensor, sample: bool = False) -> Tensor:
        """Tokens: the argmax of the logits, without noise (2.2), or a sample of q (footnote 6)."""
        logits = self.encoder(map_pixels(images))
        if sample:
            logits = logits + gumbel_noise(logits)
        return logits.argmax(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Images of tokens: phi^-1(sigmoid(mu)), ln b ignored (A.3)."""
        mu, _ = self.decoder(self.one_hot(tokens)).chunk(2, dim=1)
        return unmap_pixels(torch.sigmoid(mu))

    def one_hot(self, tokens: Tensor) -> Tensor:
        """Tokens [B, h, w] as codes [B, vocab_size, h, w]."""
        if tokens.ndim != 3 or tokens.dtype != torch.long or not tokens.numel():
            found = f"{tokens.dtype} {list(tokens.shape)}"
            raise ValueError(f"expected tokens, long [B, h, w], none of them 0; got {found}")
        b, h, w = tokens.shape
        z = self.decoder.blocks.input.w.new_zeros(b, self.config.vocab_size, h, w)
        return z.scatter_(1, tokens[:, None], 1.0)

    def distribution(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """mu and ln b of Eq. 2, each [B, 3, H, W], of one-hot or relaxed codes [B, vocab_size, h,
        w]; ln b is at least config.min_ln_b."""
        mu, ln_b = self.decoder(z).to(z.dtype).chunk(2, dim=1)
        return mu, ln_b.clamp(min=self.config.min_ln_b)

    def terms(self, images: Tensor, tau: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """−ln p(x | z) and the KL, the terms of the negative bound (Eq. 1), scalars in nats per
        pixel value, and mu [B, 3, H, W].

        Codes are relaxed at temperature tau, or without one drawn from q. Both terms are joint over
        the image and divided by H · W · 3 (A.2), so that the mean KL per grid position has the
        weight h · w / (H · W · 3): that is 1/192 for a factor of 8, 1/48 for 4.
        """
        x = map_pixels(images)
        logits = self.encoder(x)  # [B, K, h, w]
        noisy = logits + gumbel_noise(logits)
        if tau is None:  # Gumbel-max: the argmax is a draw from q
            z = self.one_hot(noisy.argmax(1))
        else:  # relaxed in forward and backward alike
            z = F.softmax(noisy / tau, dim=1)
        mu, ln_b = self.distribution(z)
        recon = -logit_laplace_log_prob(x, mu, ln_b).mean()
        ln_q = F.log_softmax(logits, dim=1)  # of the logits, not of logits / tau
        # KL(q ‖ uniform) = Σ q (ln q + ln K) at each grid position: [B, h, w]
        kl = (ln_q.exp() * (ln_q + math.log(self.config.vocab_size))).sum(1)
        return recon, kl.sum() / images.numel(), mu

    def loss(self, images: Tensor, tau: float, kl_weight: float) -> tuple[Tensor, dict]:
        """The negative relaxed bound, its KL term weighted by beta = kl_weight (2.1, A.2).

        The metrics are detached scalars: loss, recon and kl in nats per pixel value, and psnr in
        dB of the relaxed reconstruction, by the squared error of all images.
        """
        recon, kl, mu = self.terms(images, tau)
        loss = recon + kl_weight * kl
        mse = (unmap_pixels(torch.sigmoid(mu.detach())) - images).square().mean()
        metrics = {"loss": loss, "recon": recon, "kl": kl, "psnr": -10 * torch.log10(mse)}
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def elb(self, images: Tensor, tau: float | None = None) -> Tensor:
        """The evidence lower bound in nats per pixel value, a scalar: the relaxed one at
        temperature tau, or without tau the true one, its codes drawn from q (2.1). Eq. 1 is a bound
        at beta = 1 only, so that is the weight here, whatever that of the training."""
        recon, kl, _ = self.terms(images, tau)
        return -recon - kl

    @torch.no_grad()
    def distortion(self, images: Tensor) -> Tensor:
        """-ln p(x | z) for images and their own tokens, in nats for each 8-bit value, a scalar: of
        the density times the width of a value's step, (1 − 2ε) / 255 behind phi. The product is
        about the value's probability, and above it where b is near that width."""
        mu, ln_b = self.distribution(self.one_hot(self.encode(images)))
        nats = -logit_laplace_log_prob(map_pixels(images), mu, ln_b).mean()
        return nats - math.log((1 - 2 * EPS) / 255)
