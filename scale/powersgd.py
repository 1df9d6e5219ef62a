"""
PowerSGD between machines (2.5, Appendix E; Vogels et al. 2019).

Averaging the gradient of a large model between machines costs more time than computing it. A
gradient matrix of d rows is close to one of rank r, so two thin factors travel in its place. What
they miss is kept in an error buffer and added to the next gradient: nothing is lost, only late.

    E ← E + g             the gradient joins what earlier updates left behind
    P ← E Q               averaged between machines; Q is Gaussian and fixed at the start
    P ← orthonormal columns of P + 10⁻⁶ I
    Q' ← Eᵀ P             averaged between machines
    ĝ ← P Q'ᵀ             the decompressed gradient, the same on every machine
    E ← E − ĝ

With parameters sharded among the m GPUs of a machine, each GPU compresses its own shards, with
rank r / m, together with the GPUs that hold the same shards on the other machines.

    python -m scale.powersgd           # the compression rates of Tables 1 and 2

What is not here: the paper's Householder kernel (torch's QR is Householder) and its 1-6-9 format
for P and Q', which travel in 32 bits.
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor

EPSILON = 1e-6  # keeps the factorisation of a gradient without full rank well defined


def local(tensor: Tensor) -> Tensor:
    """This GPU's shard of a parameter or gradient; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class PowerSGD:
    """Averages the gradients of parameters between machines, the matrices compressed.

    matrices: (name, parameter [a, b]) of those to compress; the paper's exceptions, embeddings,
        unembeddings, gains and biases, are in others, and are averaged as they are.
    rank: of a gradient matrix as a whole; `shards`, the m GPUs of a machine, must divide it.
    group: this GPU's counterparts on all machines. seed, shard: what the fixed Q derives from;
        every machine must make the same ones.
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
    ) -> None:
        if rank < 1 or rank % shards:
            raise ValueError(f"rank {rank}: expected a multiple of the {shards} GPUs of a machine")
        self.matrices, self.others = matrices, others
        self.group, self.machines = group, dist.get_world_size(group)
        self.errors = {name: torch.zeros_like(local(p)) for name, p in matrices}
        generator = torch.Generator().manual_seed(seed * shards + shard)
        self.Q = {}
        for name, _ in matrices:
            for i, E in enumerate(pieces(name, self.errors[name])):
                Q = torch.randn(E.shape[1], min(rank // shards, E.shape[0]), generator=generator)
                self.Q[name, i] = Q.to(E)

    def average(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their means over the machines, in one message."""
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat, group=self.group)
        flat /= self.machines
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(mean.view_as(tensor))

    @torch.no_grad()
    def average_gradients(self) -> None:
        """After backward: replace each gradient by its mean over the machines, up to the rank.

        A buffer that non-finite values have reached is zeroed, on every machine alike; the others
        survive an update that is skipped.
        """
        self.average([local(p.grad) for p in self.others])
        work = []
        for name, parameter in self.matrices:
            grad, error = local(parameter.grad), self.errors[name]
            error += grad
            for i, (E, g) in enumerate(zip(pieces(name, error), pieces(name, grad))):
                work.append((E, g, self.Q[name, i]))
        P = [E @ Q for E, _, Q in work]
        self.average(P)
        for p in P:
            p.diagonal().add_(EPSILON)
        P = [torch.linalg.qr(p).Q for p in P]
        Q = [E.T @ p for (E, _, _), p in zip(work, P)]
        self.average(Q)
        for (E, g, _), p, q in zip(work, P, Q):
            E -= g.copy_(p @ q.T)
        for error in self.errors.values():
            error.copy_(torch.where(error.isfinite().all(), error, 0))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of the buffers over the machines, sharded as the parameters are: all that
        matters on resuming. For all ranks to call."""
        sums = {}
        for name, p in self.matrices:
            total = self.errors[name].clone()
            dist.all_reduce(total, group=self.group)
            if isinstance(p, DTensor):
                of_all = {"shape": p.shape, "stride": p.stride()}
                total = DTensor.from_local(total, p.device_mesh, p.placements, **of_all)
            sums[name] = total
        return sums

    def load_state_dict(self, sums: dict[str, Tensor]) -> None:
        """Each machine takes an equal part of the sums, however many there were."""
        for name, p in self.matrices:
            total = sums[name]
            if isinstance(p, DTensor) and not isinstance(total, DTensor):  # it was saved whole
                total = distribute_tensor(total.to(p.device), p.device_mesh, p.placements)
            self.errors[name].copy_(local(total) / self.machines)


def pieces(name: str, matrix: Tensor) -> list[Tensor]:
    """Views of a parameter's shard, or of what is shaped like it, with rows ≤ columns.

    Queries, keys and values are three matrices in the paper's count (Table 2); a GPU's rows of
    the joint one are whole shards of the three.
    """
    views = matrix.chunk(3) if name.endswith("qkv.weight") else [matrix]
    return [v if v.shape[0] <= v.shape[1] else v.T for v in views]


# ---- how much is saved (Tables 1 and 2) ----------------------------------------------------------


def sent(d: int, rank: int, m: int) -> tuple[int, int]:
    """Numbers each GPU sends for one layer: (its gradient, its P and Q'), counted from shapes.

    The shards are of the output's axis, but for the second matrix of the MLP (Table 2).
    """
    shapes = 3 * [(d, d // m)] + [(d, d // m), (d, 4 * d // m), (4 * d // m, d)]
    r = rank // m
    return sum(a * b for a, b in shapes), sum(r * (a + b) for a, b in shapes)


TABLE_1 = {2.8e9: (1920, 512), 5.6e9: (2688, 640), 12.0e9: (3968, 896)}  # parameters: (d, rank)

if __name__ == "__main__":
    argparse.ArgumentParser(description="Print the compression rates of Table 1.").parse_args()
    print("effective parameters      d   rank   of a GPU   sent      P, Q'   compression")
    for n_params, (d, rank) in TABLE_1.items():
        gradient, factors = sent(d, rank, m=8)
        print(
            f"{n_params:>20.2g} {d:>6} {rank:>6} {rank // 8:>10} {gradient:>10,} {factors:>10,}"
            f" {1 - factors / gradient:>12.1%}"
        )
