"""The 16-bit formats of B.2 and E.2: all 65,536 codes of each against their definition."""

import math
from fractions import Fraction

import pytest
import torch

from scale.formats import decode, encode, largest

BIAS = {"1-6-9": 59, "0-6-10": 60}
CODES = torch.arange(2**16).to(torch.int16)  # bit patterns
each_format = pytest.mark.parametrize("fmt", BIAS)


def value(code: int, fmt: str) -> Fraction | float:
    """A code's bits, read from left to right as IEEE 754 does."""
    s, e, _ = (int(width) for width in fmt.split("-"))
    bits = f"{code:016b}"
    sign, exponent, significand = bits[:s], int(bits[s : s + e], 2), bits[s + e :]
    minus = -1 if sign == "1" else 1
    fraction = Fraction(int(significand, 2), 2 ** len(significand))
    if exponent == 63:
        return math.nan if fraction else minus * math.inf
    if exponent == 0:
        return minus * fraction * Fraction(2) ** (1 - BIAS[fmt])
    return minus * (1 + fraction) * Fraction(2) ** (exponent - BIAS[fmt])


def magnitudes(fmt: str) -> list[Fraction]:
    """The finite values without a sign, in order, and what would be next in place of infinity."""
    finite = [value(code, fmt) for code in range(63 << int(fmt[4:]))]
    return [*finite, Fraction(2) ** (63 - BIAS[fmt])]


@each_format
def test_every_code_is_what_its_bits_say(fmt):
    expected = torch.tensor([float(value(code, fmt)) for code in range(2**16)], dtype=torch.float64)
    decoded = decode(CODES, fmt)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.double().nan_to_num(-99), expected.nan_to_num(-99))

    number = ~decoded.isnan()
    assert torch.equal(encode(decoded, fmt)[number], CODES[number])  # −0 and infinities too
    assert decode(encode(decoded, fmt), fmt)[~number].isnan().all()
    assert largest(fmt) == max(v for v in expected.tolist() if math.isfinite(v))


def test_ranges():
    """1-6-9 ends slightly under 16 (E.2). 0-6-10 holds 5 (B.2), and no larger bias would."""
    assert 15.98 < largest("1-6-9") < 16
    assert largest("0-6-10") / 2 < 5 < largest("0-6-10") < 8
    smallest = [decode(torch.tensor([1], dtype=torch.int16), fmt).item() for fmt in BIAS]
    assert smallest == [2.0**-67, 2.0**-69]


@each_format
def test_rounds_to_nearest_and_ties_to_even(fmt):
    """At the midpoint of all neighbours, and right below and above it."""
    table = magnitudes(fmt)
    codes = torch.arange(len(table) - 1)
    middle = torch.tensor([float((a + b) / 2) for a, b in zip(table, table[1:])])
    below, above = middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(99.0))
    cases = {middle: codes + codes % 2, below: codes, above: codes + 1}
    for x, expected in cases.items():
        assert torch.equal(encode(x, fmt), expected.to(torch.int16))
        if fmt == "1-6-9":
            assert torch.equal(encode(-x, fmt), (expected + 2**15).to(torch.int16))


@each_format
def test_any_number_goes_to_its_nearest_code_and_order_is_kept(fmt):
    """All float32 from 0 to infinity, in steps of 4099 of them."""
    x = torch.arange(0, 0x7F800001, 4099, dtype=torch.int32).view(torch.float32)
    codes = encode(x, fmt).int() & 0xFFFF
    assert (codes.diff() >= 0).all() and codes[0] == 0
    table = torch.tensor([float(v) for v in magnitudes(fmt)], dtype=torch.float64)
    finite, x = codes < len(table) - 1, x.double()
    assert (x[~finite] >= (table[-2] + table[-1]) / 2).all()
    x, codes = x[finite], codes[finite].long()
    assert ((x - table[codes]).abs() <= (x - table[codes + 1]).abs()).all()
    assert ((x - table[codes]).abs() <= (x - table[(codes - 1).clamp(min=0)]).abs()).all()


@each_format
def test_infinities_are_kept_or_clamped(fmt):
    most = largest(fmt)
    x = torch.tensor([math.inf, 1e30, most * 1.01, most, math.nan])
    kept, clamped = (decode(encode(x, fmt, clamp=clamp), fmt) for clamp in (False, True))
    assert kept[:4].tolist() == [math.inf] * 3 + [most] and kept[4].isnan()
    assert clamped[:4].tolist() == [most] * 4 and clamped[4].isnan()
    minus = decode(encode(-x, fmt, clamp=True), fmt)
    if fmt == "1-6-9":
        assert minus[:4].tolist() == [-most] * 4 and minus[4].isnan()
    else:  # it has no negative numbers
        assert minus.isnan().all()
    assert encode(torch.zeros(2, 3), fmt).shape == (2, 3)
