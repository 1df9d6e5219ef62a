"""
The paper's own 16-bit formats, and what it keeps in 16 bits (B.2, D.2, E.2).

Six bits of exponent reach down to 2⁻⁶⁷, where float16 with its five ends at 2⁻²⁴, and what they
take from the significand matters little to a running mean or an error buffer.

    1-6-9     sign, exponent, significand: Adam's running mean, error buffers, P and Q
    0-6-10    without a sign, for which it has one more bit: Adam's running variance

A code is the format's 16 bits in a torch.int16, which every device can store; code 0 is zero. As
in IEEE 754, exponent 0 holds the denormals, exponent 63 infinity and the NaNs.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

# Bits of the sign and of the significand, and the exponent's bias. 1-6-9: 59, for with it the
# largest value is slightly under 16, as in E.2. 0-6-10: our reading, 60, the largest bias that
# holds 5, to which the variance is clipped (B.2): the largest value is slightly under 8, and as
# many exponents as can be are left for the small values, down to 2⁻⁶⁹.
FORMATS = {"1-6-9": (1, 9, 59), "0-6-10": (0, 10, 60)}


def matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The matrices of a transformer's resblocks, which the paper keeps in 16 bits and compresses;
    all else it leaves as it is: embeddings, unembeddings, gains and biases (D.2, E)."""
    return [(name, p) for name, p in model.blocks.named_parameters() if p.ndim == 2]


def largest(fmt: str) -> float:
    """The largest finite value: 15.98 of 1-6-9, 7.996 of 0-6-10."""
    _, bits, bias = FORMATS[fmt]
    return (2 - 2.0**-bits) * 2.0 ** (62 - bias)


def encode(x: Tensor, fmt: str, clamp: bool = False) -> Tensor:
    """float32 -> codes, int16 of the same shape: rounded to nearest, ties to even.

    What rounds to more than the largest value becomes infinity or, with `clamp`, the largest value,
    as infinity itself then does, with its sign (E.2). NaN stays NaN, and a negative number becomes
    NaN where there is no sign.
    """
    sign, bits, bias = FORMATS[fmt]
    magnitude = x.abs().clamp(max=largest(fmt) if clamp else 2.0 ** (63 - bias))
    # The exponent as float32 holds it, with its bias of 127; all denormals have the least.
    exponent = (magnitude.view(torch.int32) >> 23).clamp(min=128 - bias)
    # 1 over what the last bit of the code is worth, a power of two: a float32 without significand.
    inverse = (254 + bits - exponent << 23).view(torch.float32)
    # The leading 1 of a normal number counts the exponent up by one, as does a carry in rounding.
    code = (magnitude * inverse).round().int() + (exponent - (128 - bias) << bits)
    code = torch.where(x.isnan() if sign else ~(x >= 0), (63 << bits) + 1, code)
    if sign:
        code = code - 2**15 * x.signbit()
    return code.to(torch.int16)


@lru_cache
def values(fmt: str, device: torch.device) -> Tensor:
    """float32 [65536]: what the codes stand for, as numbers from 0 to 65535."""
    sign, bits, bias = FORMATS[fmt]
    code = torch.arange(2**16)
    exponent, significand = code >> bits & 63, code & 2**bits - 1
    leading = (exponent > 0).int()
    x = torch.ldexp(leading + significand / 2**bits, exponent.clamp(min=1) - bias)
    x[exponent == 63] = math.nan
    x[(exponent == 63) & (significand == 0)] = math.inf
    x = torch.where(code >> 15 == 1, -x, x) if sign else x
    return x.to(device)


def decode(codes: Tensor, fmt: str) -> Tensor:
    """codes, int16 -> float32 of the same shape, exactly."""
    index = codes.flatten().int() & 2**16 - 1
    return values(fmt, codes.device).index_select(0, index).view(codes.shape)
