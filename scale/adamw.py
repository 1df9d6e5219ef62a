"""
AdamW with the paper's clip of the running variance, its moments in 32 or 16 bits (B.2).

It is Adam with decoupled weight decay (Loshchilov & Hutter 2019) and one thing more: the running
variance is clipped by value to 5 "before it is used to update the parameters or moments".

    m ← β1 m + (1 − β1) g
    v ← min(β2 v + (1 − β2) g², 5)
    θ ← θ − lr λ θ − lr m̂ / (√v̂ + ε)        m̂ = m / (1 − β1ᵗ), v̂ = v / (1 − β2ᵗ)

In 16 bits m is kept in the 1-6-9 and v in the 0-6-10 format, 4 bytes for each parameter in place of
8, and they are 32-bit numbers only while they are updated. The caller says for which parameters:
gains, biases, embeddings and unembeddings stay in 32 bits (D.2).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from scale.formats import decode, encode
from scale.parallel import local, sharded_like

FORMATS = {"exp_avg": "1-6-9", "exp_avg_sq": "0-6-10"}  # m and v, as torch.optim.AdamW names them


class AdamW(torch.optim.Optimizer):
    """For parameters which all have gradients, sharded (DTensor) or not.

    in_16_bits: the parameters whose m and v are kept so. `state_dict` has them in 32 bits either
    way, under the names of torch.optim.AdamW: a run can go on with others.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        variance_clip: float = 5.0,
        in_16_bits: Iterable[nn.Parameter] = (),
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.variance_clip, self.in_16_bits = variance_clip, set(in_16_bits)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
            # 32-bit ones together, 16-bit ones one by one: decoded they are twice as large.
            together = [p for p in group["params"] if p not in self.in_16_bits]
            alone = [[p] for p in group["params"] if p in self.in_16_bits]
            for params in [together, *alone] if together else alone:
                states = [self.state[p] or self.start(p) for p in params]
                for state in states:
                    state["step"] += 1
                t = states[0]["step"].item()
                theta, g = [local(p) for p in params], [local(p.grad) for p in params]
                m, v = [[self.read(state, name) for state in states] for name in FORMATS]

                torch._foreach_lerp_(m, g, 1 - beta1)
                torch._foreach_mul_(v, beta2)
                torch._foreach_addcmul_(v, g, g, 1 - beta2)
                torch._foreach_clamp_max_(v, self.variance_clip)

                # √v̂ + ε times √(1 − β2ᵗ), which the last line divides by.
                correction = math.sqrt(1 - beta2**t)
                denominator = torch._foreach_sqrt(v)
                torch._foreach_add_(denominator, eps * correction)
                torch._foreach_mul_(theta, 1 - lr * group["weight_decay"])
                torch._foreach_addcdiv_(theta, m, denominator, -lr * correction / (1 - beta1**t))

                if params[0] in self.in_16_bits:  # clamped: what became infinite would stay so
                    for (name, fmt), (moment,) in zip(FORMATS.items(), (m, v)):
                        local(states[0][name]).copy_(encode(moment, fmt, clamp=True))

    def start(self, p: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter before its first update; code 0 is 0."""
        dtype = torch.int16 if p in self.in_16_bits else p.dtype
        self.state[p] = {name: torch.zeros_like(p, dtype=dtype) for name in FORMATS}
        self.state[p]["step"] = torch.tensor(0.0)
        return self.state[p]

    def read(self, state: dict[str, Tensor], name: str) -> Tensor:
        """This GPU's shard of a moment, in 32 bits."""
        kept = local(state[name])
        return decode(kept, FORMATS[name]) if kept.dtype == torch.int16 else kept

    def state_dict(self) -> dict:
        saved = super().state_dict()
        if self.in_16_bits:
            states = {}
            for k, state in saved["state"].items():
                moments = {n: sharded_like(state[n], self.read(state, n)) for n in FORMATS}
                states[k] = state | moments
            saved["state"] = states
        return saved

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for p in self.in_16_bits & self.state.keys():
            state = self.state[p]
            for name, fmt in FORMATS.items():
                state[name] = sharded_like(state[name], encode(local(state[name]), fmt, True))
