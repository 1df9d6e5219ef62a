"""
PowerSGD between machines (2.5, Appendix E; Vogels et al. 2019).

Averaging the gradient of a large model between machines costs more time than computing it. A
gradient matrix of d rows is close to one of rank r, so two thin factors travel in its place. What
they miss is kept in an error buffer and added to the next gradient: late, but not lost.

    E ← E + g             where g is finite
    P ← E Q               averaged between machines; Q is Gaussian and fixed (a new one hurt)
    P ← orthonormal columns of P + 10⁻⁶ I
    Q' ← Eᵀ P             averaged between machines
    ĝ ← P Q'ᵀ             the decompressed gradient, the same on every machine
    E ← E − ĝ             where P and Q' are finite; an E that itself is not becomes 0

With parameters sharded among the m GPUs of a machine, each GPU compresses its own shards, with
rank r / m, together with the GPUs that hold the same shards on the other machines.

    python -m scale.powersgd           # the compression rates of Tables 1 and 2

What is not here: the paper's Householder kernel (torch's QR is Householder; Gram-Schmidt was
unstable), and its overlap of computing with sending, resblock by resblock.
"""

import argparse
import math
from collections import UserDict
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor

from scale.formats import decode, encode, largest
from scale.parallel import local, sharded_like

EPSILON = 1e-6  # keeps the factorisation of a gradient without full rank well defined

# What P and Q' are multiplied by in the 1-6-9 format. The paper has a constant for each and does
# not give them (E.2): our reading, one for both. A buffer holds less than 16, so that what a row of
# 4d = 15872 and a column of Q make is about 16 · √15872 · 5 = 10,000 at most, and Q' is less: times
# 2⁻¹⁰ both stay below the format's 16 while the buffer does. What is above 2⁻⁴⁸ keeps all 9 bits.
SCALE = 2.0**-10

Key = tuple[str, int]  # a parameter's name, and which of its pieces


class Stored(UserDict):
    """Tensors that are float32 to read and to write; with bits = 16 they are kept as 1-6-9, after
    multiplication by `scale` (E.2)."""

    def __init__(self, bits: int, scale: float = 1.0) -> None:
        super().__init__()
        self.bits, self.scale = bits, scale

    def __getitem__(self, key: str | Key) -> Tensor:
        kept = self.data[key]
        return decode(kept, "1-6-9") / self.scale if self.bits == 16 else kept

    def __setitem__(self, key: str | Key, value: Tensor) -> None:
        self.data[key] = encode(value * self.scale, "1-6-9") if self.bits == 16 else value


class PowerSGD:
    """Averages the gradients of parameters between machines, the matrices compressed.

    matrices: (name, parameter [a, b]) of those to compress; the paper's exceptions, embeddings,
        unembeddings, gains and biases, are in others, and are averaged as they are.
    rank: of a gradient matrix as a whole; `shards`, the m GPUs of a machine, must divide it.
    group: this GPU's counterparts on all machines. seed, shard: what the fixed Q derives from;
        every machine must make the same ones.
    bits: with 16, error buffers, P and Q are kept in the 1-6-9 format, and P and Q' sent in it.

    errors[name]: float32, the buffer of this GPU's shard.
    """

    def __init__(
        self,
        matrices: list[tuple[str, nn.Parameter]],
        others: list[nn.Parameter],
        rank: int,
        group: ProcessGroup | None = None,
        shards: int = 1,
        shard: int = 0,
        seed: int = 0,
        bits: int = 32,
    ) -> None:
        if rank < 1 or rank % shards:
            raise ValueError(f"rank {rank}: expected a multiple of the {shards} GPUs of a machine")
        self.matrices, self.others, self.bits = matrices, others, bits
        self.group, self.machines = group, dist.get_world_size(group)
        self.largest = largest("1-6-9") / SCALE if bits == 16 else torch.finfo(torch.float32).max
        self.errors, self.Q = Stored(bits), Stored(bits)
        generator = torch.Generator().manual_seed(seed * shards + shard)
        for name, p in matrices:
            self.errors[name] = E = torch.zeros_like(local(p))
            for i, e in enumerate(pieces(name, E)):
                Q = torch.randn(e.shape[1], min(rank // shards, e.shape[0]), generator=generator)
                self.Q[name, i] = Q.to(e)

    def average(self, tensors: Iterable[Tensor], bits: int = 32) -> None:
        """Replace tensors by their means over the machines, in one message."""
        tensors = list(tensors)
        flat = torch.cat([t.flatten() for t in tensors])
        if bits == 16:
            flat = self.mean_in_16_bits(flat)
        else:
            dist.all_reduce(flat, group=self.group)
            flat /= self.machines
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(mean.view_as(tensor))

    def mean_in_16_bits(self, vector: Tensor) -> Tensor:
        """Each machine is sent a part of all vectors as 1-6-9, averages it in 32 bits and sends
        the mean to all."""
        flat = F.pad(vector * SCALE, (0, -len(vector) % self.machines))
        codes = encode(flat, "1-6-9").view(torch.uint8)  # no library sends int16
        parts = torch.empty_like(codes)
        dist.all_to_all_single(parts, codes, group=self.group)
        mean = decode(parts.view(torch.int16), "1-6-9").view(self.machines, -1).mean(0)
        mean = encode(mean, "1-6-9").view(torch.uint8)
        dist.all_gather(list(codes.chunk(self.machines)), mean, group=self.group)
        return decode(codes.view(torch.int16), "1-6-9")[: len(vector)] / SCALE

    def average_factors(self, factors: dict[Key, Tensor]) -> tuple[Stored, dict[Key, Tensor]]:
        """The means of P or Q' over the machines, and whether they were finite, a bool each.

        Infinities become the largest value with their sign; NaN, which has none, becomes 0: our
        reading.
        """
        self.average(factors.values(), self.bits)
        means, finite = Stored(self.bits, SCALE), {}
        for key, factor in factors.items():
            finite[key] = factor.isfinite().all()
            means[key] = factor.nan_to_num(0.0, self.largest, -self.largest)
        return means, finite

    @torch.no_grad()
    def average_gradients(self) -> Tensor:
        """After backward, and after division by the resblocks' scales: replace each gradient by
        its mean over the machines, up to the rank. The comments count the steps of E.2.

        Returns the global norm, the same scalar on every GPU. It is infinite where a gradient held
        non-finite values on any of them, or P or Q' did: then the update must be skipped.
        """
        P, Q, finite = {}, {}, []
        for name, p in self.matrices:
            E, grad = self.errors[name], local(p.grad)
            for e, g in zip(pieces(name, E), pieces(name, grad)):
                finite.append(g.isfinite().all())
                e += torch.where(finite[-1], g, 0)  # (2); in the paper 5% of updates are not
            self.errors[name] = E
            for i, e in enumerate(pieces(name, self.errors[name])):
                P[name, i] = e @ self.Q[name, i]  # (3)

        means, P_finite = self.average_factors(P)  # (4)
        P = Stored(self.bits)
        for key, mean in means.items():
            mean.diagonal().add_(EPSILON)
            P[key] = torch.linalg.qr(mean).Q  # (5)

        for name, _ in self.matrices:
            for i, e in enumerate(pieces(name, self.errors[name])):
                Q[name, i] = e.T @ P[name, i]  # (6)
        Q, Q_finite = self.average_factors(Q)  # (7)

        others = [local(p.grad) for p in self.others]
        if others:
            self.average(others)  # (8)

        # (9, 10) The machines have the same Q', the GPUs of a machine different ones. Our reading:
        # what clamped factors give is not taken out of the buffers (12), and so not applied either.
        squares = torch.stack([x.square().sum() for x in (*Q.values(), *others)]).sum()
        failed = ~torch.stack([*finite, *P_finite.values(), *Q_finite.values()]).all()
        shared = torch.stack([squares / self.machines, failed.float()])
        dist.all_reduce(shared)
        norm = torch.where(shared.isfinite().all() & (shared[1] == 0), shared[0].sqrt(), math.inf)

        for name, p in self.matrices:
            E, grad = self.errors[name], local(p.grad)
            for i, (e, g) in enumerate(zip(pieces(name, E), pieces(name, grad))):
                key = name, i
                g.copy_(P[key] @ Q[key].T)  # (11)
                kept = torch.where(e.isfinite().all(), e, 0)
                # (12) names no exception: our reading, in skipped updates too
                e.copy_(torch.where(P_finite[key] & Q_finite[key], e - g, kept))
            self.errors[name] = E
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of the buffers over the machines, sharded as the parameters are: all that
        matters on resuming. For all ranks to call."""
        sums = {}
        for name, p in self.matrices:
            total = self.errors[name].clone()
            dist.all_reduce(total, group=self.group)
            sums[name] = sharded_like(p, total)
        return sums

    def load_state_dict(self, sums: dict[str, Tensor]) -> None:
        """Each machine takes an equal part of the sums, however many there were."""
        for name, p in self.matrices:
            total = sums[name]
            if isinstance(p, DTensor) and not isinstance(total, DTensor):  # it was saved whole
                total = distribute_tensor(total.to(p.device), p.device_mesh, p.placements)
            self.errors[name] = local(total).to(p.device) / self.machines


def pieces(name: str, matrix: Tensor) -> list[Tensor]:
    """Views of a parameter's shard, or of what is shaped like it, with rows ≤ columns.

    Queries, keys and values are three matrices in the paper's count (Table 2); a GPU's rows of
    the joint one are whole shards of the three.
    """
    views = matrix.chunk(3) if name.endswith("qkv.weight") else [matrix]
    return [v if v.shape[0] <= v.shape[1] else v.T for v in views]


# ---- how much is saved (Tables 1 and 2) ----------------------------------------------------------


def shapes_of(d: int, m: int) -> list[tuple[int, int]]:
    """Of a layer's matrices, one GPU's shards: q, k, v, the output's, both of the MLP. They are of
    the output's axis, but for the second matrix of the MLP (Table 2)."""
    return 3 * [(d, d // m)] + [(d, d // m), (d, 4 * d // m), (4 * d // m, d)]


def sent(d: int, rank: int, m: int) -> tuple[int, int]:
    """Numbers each GPU would send for one layer without compression, and sends as P and Q',
    counted from shapes; their ratio is r(m + 2) / 2dm (Table 2)."""
    shapes, r = shapes_of(d, m), rank // m
    return sum(a * b for a, b in shapes), sum(r * (a + b) for a, b in shapes)


# Parameters: (d, rank). The smallest ranks, in steps of 128, whose training loss was as without
# compression in the first tenth of training; a rate of 1 − 5 rank / 8d: 83, 85 and 86%.
TABLE_1 = {2.8e9: (1920, 512), 5.6e9: (2688, 640), 12.0e9: (3968, 896)}

if __name__ == "__main__":
    argparse.ArgumentParser(description="Print the rates of Tables 1 and 2.").parse_args()
    print("effective parameters      d   rank   of a GPU   gradient      P, Q'  compression")
    for n_params, (d, rank) in TABLE_1.items():
        gradient, factors = sent(d, rank, m=8)
        print(
            f"{n_params:>20.2g} {d:>6} {rank:>6} {rank // 8:>10} {gradient:>10,} {factors:>10,}"
            f" {1 - factors / gradient:>12.1%}"
        )
