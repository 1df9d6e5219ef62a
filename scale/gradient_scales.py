"""
Training in 16 bits with a gradient scale for each resblock (2.4, D, Fig. 4).

The gradients of the activations shrink from the early resblocks to the late ones, until they
underflow in float16; in a deep model no one scale of the loss keeps all of them in range. So each
resblock has its own: the gradient is multiplied by it where it enters the resblock, at its output,
and divided by it where it leaves, at its input. The identity path stays in 32 bits, and so do the
gradients of gains and biases.

In a run `Run.track` (engine/run.py) makes them with --dtype fp16, and `Run.update` finishes a step:

    scales = GradientScales(model.blocks)
    with torch.autocast(device, torch.float16):
        loss = ...
    loss.backward()
    if scales.finish(step):
        optimizer.step()

What is not here: 16-bit parameters. Our reading: 32-bit master weights, which autocast casts for
each product, so that small updates are not rounded away.
"""

import math
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from scale.parallel import local


class AtOutput(torch.autograd.Function):
    """Forward: to 32 bits, for the identity path. Backward: times the scale, to 16 bits."""

    @staticmethod
    def forward(ctx, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = y.dtype
        return y.float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        # Our reading, filtered first: what overflows by the scale itself must reach the parameters'
        # gradients, so that the scale falls; only what came in broken is dropped here.
        return (grad.nan_to_num(0, 0, 0) * scale).to(ctx.dtype), None


class AtInput(torch.autograd.Function):
    """Forward: nothing. Backward: divided by the scale again; a NaN left in here would travel
    down the identity path."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return (grad.float() / scale).nan_to_num(0, 0, 0), None


class BiasGradient(torch.autograd.Function):
    """Forward: nothing, the bias [n] is in y [..., n] already. Backward: its gradient, summed in 32
    bits (D.2)."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.flatten(0, -2).sum(0, dtype=torch.float32)


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """The forward pass of nn.Linear. Autocast casts its bias, and would sum the bias's gradient in
    16 bits: in float16 more than 65504 is infinity, in bfloat16 seven bits of it are kept."""
    return BiasGradient.apply(F.linear(x, module.weight, module.bias.detach()), module.bias)


def sum_bias_gradients_in_32_bits(blocks: Iterable[nn.Module]) -> None:
    """Of all linear layers with a bias in these resblocks, under autocast to either 16-bit type."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.forward = partial(linear, module)


class GradientScales:
    """The scales of some resblocks, modules called with one tensor that return what is added to
    it. They start at M · 2^13 and stay in [M · 2^7, M · 2^24] (D).

    M is 1 where gradients are averaged over replicas; it is their number where the loss is divided
    by the global batch and gradients are summed, as in the paper.
    """

    def __init__(self, blocks: Iterable[nn.Module], M: int = 1):
        self.blocks = list(blocks)
        device = next(self.blocks[0].parameters()).device
        self.M = M
        self.scales = torch.full((len(self.blocks),), M * 2.0**13, device=device)
        self.divided_at = torch.full((len(self.blocks),), -125, device=device)
        sum_bias_gradients_in_32_bits(self.blocks)
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda _, x, i=i: AtInput.apply(*x, self.scales[i]))
            block.register_forward_hook(lambda _, __, y, i=i: AtOutput.apply(y, self.scales[i]))

    @torch.no_grad()
    def finish(self, step: int) -> bool:
        """After backward, in which replicas average, and before PowerSGD (E.2, step 2): divide the
        resblocks' gradients by their scales, adapt the scales, and say whether this update may be
        made.

        × 2^(1/1000) for a resblock whose parameters' gradients are all finite; else ÷ √2, at most
        once in 125 updates, and the update is skipped.
        """
        finite = []
        for block, scale in zip(self.blocks, self.scales):
            grads = [local(p.grad) for p in block.parameters() if p.grad is not None]
            finite.append(torch.stack([grad.isfinite().all() for grad in grads]).all())
            for grad in grads:
                grad /= scale
        finite = torch.stack(finite)
        if dist.is_initialized():  # on every shard and replica
            everywhere = finite.int()
            dist.all_reduce(everywhere, dist.ReduceOp.MIN)
            finite = everywhere.bool()
        divide = ~finite & (step - self.divided_at >= 125)
        self.scales *= torch.where(
            finite, 2 ** (1 / 1000), torch.where(divide, 1 / math.sqrt(2), 1)
        )
        self.scales.clamp_(self.M * 2.0**7, self.M * 2.0**24)
        self.divided_at[divide] = step
        return bool(finite.all())

    def state_dict(self) -> dict[str, list]:
        return {"scales": self.scales.tolist(), "divided_at": self.divided_at.tolist()}

    def load_state_dict(self, state: dict[str, list]) -> None:
        self.scales.copy_(torch.tensor(state["scales"]))
        self.divided_at.copy_(torch.tensor(state["divided_at"]))
