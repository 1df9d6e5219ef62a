"""
Stage one of DALL-E: the discrete variational autoencoder (2.1, A.1-A.3 of the paper).

The encoder turns an image into a grid of logits over K codes, the decoder turns a grid of codes
into the parameters of a distribution over pixels, and the two are trained to maximise a lower
bound of the likelihood, with the Gumbel-softmax relaxation in place of sampling. The parameters
carry the names of OpenAI's released model.

What is not here: the training loop (train_dvae.py) and the prior over the codes, which is
uniform in this stage.

    python dvae.py               # the table of layers; writes logit_laplace.png
"""

import argparse
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class DVAEConfig:
    """Sizes of the dVAE; the defaults are those of the paper (A.1).

    With n_groups=4 an image shrinks by a factor of 8, with n_groups=3 by 4.
    """

    n_hid: int = 256
    n_init: int = 128
    n_groups: int = 4
    blocks_per_group: int = 2
    vocab_size: int = 8192

    @property
    def factor(self) -> int:
        """Image pixels per grid cell, along each side."""
        return 2 ** (self.n_groups - 1)


# ----------------------------------------------------------------------------- likelihood (A.3)

EPS = 0.1  # Eq. 3


def map_pixels(x: torch.Tensor) -> torch.Tensor:
    """phi of Eq. 3: values in [0, 1] to [0.1, 0.9], away from the poles of Eq. 2."""
    return (1 - 2 * EPS) * x + EPS


def unmap_pixels(x: torch.Tensor) -> torch.Tensor:
    """The inverse of phi, clamped to [0, 1]."""
    return ((x - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def logit_laplace_log_prob(x: torch.Tensor, mu: torch.Tensor, ln_b: torch.Tensor) -> torch.Tensor:
    """ln f(x | mu, b) of Eq. 2, elementwise, for x in (0, 1): the density of sigmoid(y) where y
    is Laplace-distributed with mean mu and scale b = exp(ln_b)."""
    ln_jacobian = torch.log(x) + torch.log1p(-x)
    return -math.log(2) - ln_b - ln_jacobian - (torch.logit(x) - mu).abs() * torch.exp(-ln_b)


# ----------------------------------------------------------------------------- layers (A.1)


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
        if self.always_fp32:
            with torch.autocast(x.device.type, enabled=False):
                return F.conv2d(x.float(), self.w, self.b, padding=padding)
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
    """phi(images) [B, 3, H, W] to logits [B, vocab_size, H/f, W/f], f = config.factor."""

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
                output=nn.Sequential(
                    OrderedDict(relu=nn.ReLU(), conv=Conv2d(config.n_hid, 6, 1))
                ),
            )
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.blocks(z)


# ----------------------------------------------------------------------------- the whole (2.1)


class DVAE(nn.Module):
    """Encoder, decoder and the bound between them. Images are float [B, 3, H, W] in [0, 1]."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens [B, h, w], long: the argmax of the logits, without noise (2.2)."""
        return self.encoder(map_pixels(images)).argmax(1)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Images of tokens [B, h, w]: the mode of each pixel's distribution, ln b ignored (A.3)."""
        mu = self.decoder(self.one_hot(tokens))[:, :3].float()
        return unmap_pixels(torch.sigmoid(mu))

    def one_hot(self, tokens: torch.Tensor) -> torch.Tensor:
        b, h, w = tokens.shape
        z = torch.zeros(b, self.config.vocab_size, h, w, device=tokens.device)
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
        x = map_pixels(images)
        logits = self.encoder(x)
        z = F.gumbel_softmax(logits, tau, hard=hard, dim=1)
        mu, ln_b = self.decoder(z).float().chunk(2, dim=1)
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
        recon, kl, mu = self.terms(images, tau)
        loss = recon + kl_weight * kl
        mse = (unmap_pixels(torch.sigmoid(mu.detach())) - images).square().mean()
        metrics = {"loss": loss, "recon": recon, "kl": kl, "psnr": -10 * torch.log10(mse)}
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def elb(self, images: torch.Tensor, tau: float | None = None) -> torch.Tensor:
        """The evidence lower bound (beta = 1) in nats per pixel value, a scalar: the relaxed one
        at temperature tau, or without tau the true one, its codes drawn from q (2.1)."""
        recon, kl, _ = self.terms(images, tau or 1.0, hard=tau is None)
        return -recon - kl


def load_dvae(path: str | Path) -> DVAE:
    """The model of a dvae.pt, on the CPU. ValueError where the file is something else."""
    try:
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
