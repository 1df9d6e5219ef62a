"""Gradient scales per resblock: where one scale for all fails, and the rule that adapts them."""

import math

import pytest
import torch
from torch import nn

from scale.gradient_scales import GradientScales, sum_bias_gradients_in_32_bits

DEPTH, WIDTH = 8, 16


def resblocks(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleList(
        nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )
        for _ in range(DEPTH)
    )


def shrinking_loss(blocks, loss_scale=1.0):
    """A loss whose activation gradients shrink from the first resblock to the last by 10^12."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, WIDTH, generator=generator)
    loss = 0
    for i, block in enumerate(blocks):
        x = x + block(x)
        target = torch.randn(4, WIDTH, generator=generator)
        loss = loss + 10 ** (-12 * i / (DEPTH - 1)) * (x * target).sum()
    return loss * loss_scale


def gradients(blocks):
    return [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in blocks]


@pytest.fixture(scope="module")
def exact():
    blocks = resblocks()
    shrinking_loss(blocks).backward()
    return gradients(blocks)


def error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def test_one_scale_for_all_fails_whatever_it_is(exact):
    for exponent in range(-8, 41, 4):
        blocks = resblocks()
        with torch.autocast("cpu", torch.float16):
            loss = shrinking_loss(blocks, 2.0**exponent)
        loss.backward()
        errors = [error(g / 2.0**exponent, e) for g, e in zip(gradients(blocks), exact)]
        assert not all(e < 0.1 for e in errors)  # too large, or not a number


def test_a_scale_for_each_resblock_keeps_every_gradient(exact):
    blocks = resblocks()
    scales = GradientScales(blocks)
    scales.scales.copy_(torch.linspace(7, 24, DEPTH).exp2())
    with torch.autocast("cpu", torch.float16):
        loss = shrinking_loss(blocks)
    loss.backward()
    assert scales.finish(0)
    assert all(error(g, e) < 0.02 for g, e in zip(gradients(blocks), exact))


def test_in_32_bits_scales_change_nothing(exact):
    blocks = resblocks()
    scales = GradientScales(blocks)
    shrinking_loss(blocks).backward()
    assert scales.finish(0)
    for g, e in zip(gradients(blocks), exact):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=0)


def test_an_overflow_stays_in_its_resblock():
    """Its gradient is filtered to zero on the way out; the identity path carries the rest."""
    blocks = resblocks()
    GradientScales(blocks)
    blocks[4].register_full_backward_hook(lambda m, into, out: (into[0] * math.inf,))
    shrinking_loss(blocks).backward()
    found = gradients(blocks)
    assert all(g.isfinite().all() for g in found)
    without = resblocks()
    for p in without[4].parameters():
        p.requires_grad_(False)
    detached = without[4].forward
    without[4].forward = lambda x: detached(x.detach())
    shrinking_loss(without).backward()
    for k in (0, 1, 2, 3):
        expected = torch.cat([p.grad.flatten() for p in without[k].parameters()])
        torch.testing.assert_close(found[k] / 2**13, expected, rtol=1e-4, atol=1e-6)


def test_a_scale_that_overflows_is_noticed_and_falls():
    """The largest gradients must not be dropped in silence: 0.1 times 2^24 is no float16."""
    block = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
    scales = GradientScales(block)
    scales.scales.fill_(2.0**24)
    x = torch.randn(256, WIDTH)
    with torch.autocast("cpu", torch.float16):
        y = x + block[0](x)
    grad = torch.full_like(y, 1e-6)
    grad[7] = 0.1
    y.backward(grad)
    assert not scales.finish(0)
    assert scales.scales.item() == pytest.approx(2**23.5)


def test_the_rule():
    blocks = resblocks()
    scales = GradientScales(blocks, M=8)
    assert (scales.scales == 8 * 2**13).all()

    def update(step, bad=()):
        for i, block in enumerate(blocks):
            for p in block.parameters():
                p.grad = torch.full_like(p, math.nan if i in bad else 1.0)
        return scales.finish(step)

    assert update(0) and update(1)
    assert scales.scales.log2().tolist() == pytest.approx([16 + 2 / 1000] * DEPTH)
    assert blocks[0][1].weight.grad[0, 0].item() == pytest.approx(2**-16.001)
    before = scales.scales.clone()
    assert not update(2, bad={3})  # divided by the square root of 2, the update skipped
    assert scales.scales[3] / before[3] == pytest.approx(2**-0.5)
    assert scales.scales[2] / before[2] == pytest.approx(2**0.001)
    for step in range(3, 127):  # no second division within 125 updates
        assert not update(step, bad={3})
    assert scales.scales[3] / before[3] == pytest.approx(2**-0.5)
    assert not update(127, bad={3})
    assert scales.scales[3] / before[3] == pytest.approx(0.5)

    scales.scales.fill_(8 * 2.0**7)
    update(1000, bad={0})
    assert scales.scales[0] == 8 * 2**7
    scales.scales.fill_(8 * 2.0**24)
    update(1001)
    assert (scales.scales == 8 * 2**24).all()

    copy = GradientScales(resblocks(), M=8)
    copy.load_state_dict(scales.state_dict())
    assert (copy.scales == scales.scales).all() and (copy.divided_at == scales.divided_at).all()


def test_a_biass_gradient_is_summed_in_32_bits():
    """102,400 positions of gradient 1 are infinity in float16, for which the scale would fall."""

    def update(block, scales):
        scales.scales.fill_(2.0**10)
        x = torch.zeros(100, 1024, WIDTH)
        with torch.autocast("cpu", torch.float16):
            y = x + block[0](x)
        y.backward(torch.full_like(y, 2.0**-10))
        before = block[0].bias.grad.clone()
        return before, scales.finish(0)

    block = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
    scales = GradientScales(block)
    grad, finite = update(block, scales)
    assert (grad == 102_400).all() and grad.dtype == torch.float32
    assert finite and (block[0].bias.grad == 100).all()
    assert scales.scales.item() == pytest.approx(2**10.001)

    block[0].zero_grad()
    del block[0].forward  # nn.Linear's own again
    grad, finite = update(block, scales)
    assert grad.isinf().all() and not finite
    assert scales.scales.item() == pytest.approx(2**9.5)


def test_a_biass_gradient_keeps_its_bits_beside_bfloat16():
    """3,003 positions of gradient 1: bfloat16 would make 3,008 of them."""

    def gradient(block):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = block[0](torch.zeros(3, 1001, WIDTH))
        y.backward(torch.ones_like(y))
        return block[0].bias.grad

    block = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
    assert (gradient(block) == 3008).all()
    sum_bias_gradients_in_32_bits(block)
    assert (gradient(block) == 3003).all()


def test_linear_layers_give_what_they_gave():
    plain, scaled = resblocks()[:1], resblocks()[:1]
    scales = GradientScales(scaled)
    x = torch.randn(2, 4, WIDTH)
    assert torch.equal(plain[0](x), scaled[0](x))
    for blocks in (plain, scaled):
        blocks[0](x).square().sum().backward()
    scales.finish(0)
    for p, q in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
