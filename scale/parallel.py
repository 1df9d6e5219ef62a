"""
One model on many GPUs (2.5, Fig. 5).

Small models are replicated: every GPU holds all of the model, and the gradients are averaged
while the backward pass runs (DDP). Large ones are sharded among the GPUs of a machine (FSDP2): a
resblock's parameters are gathered while the one before it computes and dropped after use, its
gradients are reduced to the shards, and the machines average the gradients of their shards, as they
are or by PowerSGD (see powersgd.py).

    machine 1   [ shard 1 | shard 2 | … | shard m ]
    machine 2   [ shard 1 | shard 2 | … | shard m ]     average down each column

What is not here: the paper's kernels and 16-bit parameters. Parameters are gathered in 32 bits,
and autocast casts them for each product.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

# A block's output is only ever added to something, never changed in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


@dataclass
class World:
    """This process among those of torchrun; alone without it."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def max(self, value: int) -> int:
        """The largest value of any rank."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the ranks."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def share(self, make: Callable):
        """What rank 0 makes, on every rank; plain data."""
        box = [make() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value) -> list:
        """The values of all ranks, on every rank; plain data."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values


def launch(device: torch.device, chosen: bool = False) -> World:
    """Join the processes torchrun started: NCCL on GPUs, gloo on CPUs. chosen: the device was
    asked for by name."""
    if "RANK" not in os.environ:
        return World(0, 1, device)
    if device.type == "mps":  # which gloo does not know
        if chosen:
            raise ValueError("--device mps is for one process; under torchrun use --device cpu")
        device = torch.device("cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"process {device.index} has no GPU: {torch.cuda.device_count()} here")
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(dist.get_rank(), dist.get_world_size(), device)


def shut_down(world: World) -> None:
    """Leave the process group, once every rank is done."""
    world.wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """This GPU's shard of a parameter or gradient; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(whole: Tensor, shard: Tensor) -> Tensor:
    """The tensor of which every GPU has such a shard, as it has of `whole`."""
    if not isinstance(whole, DTensor):
        return shard
    of_all = {"shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(shard, whole.device_mesh, whole.placements, **of_all)


class Loss(nn.Module):
    """A model's loss as a forward pass, which is where DDP comes in."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(*batch)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """The loss of a model that every process holds whole, the same in each."""
    if not dist.is_initialized():
        return Loss(model)
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(Loss(model), ids, gradient_as_bucket_view=True)


def average_in_backward(loss: nn.Module, wanted: bool) -> None:
    """Whether replicas, or machines that hold the same shards, average their gradients in the next
    backward pass. The last micro-batch of a step does it for all."""
    if isinstance(loss, DistributedDataParallel):
        loss.require_backward_grad_sync = wanted
    elif isinstance(loss.model, FSDPModule):
        loss.model.set_requires_all_reduce(wanted)


def machine_mesh(device: torch.device, shards: int | None) -> DeviceMesh:
    """The processes as [machine, gpu]; `shards` neighbours make a machine, by default those that
    torchrun started on this one. ValueError where they do not divide the processes."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    shards = shards or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if shards < 1 or size % shards:
        raise ValueError(f"--shard {shards}: {size} process(es) cannot be parted into such groups")
    if size == 1:
        raise ValueError("--shard needs several processes: start them with torchrun")
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError("--shard on a CPU needs a newer PyTorch, 2.7 at least")
    names = ("machine", "gpu")
    return init_device_mesh(device.type, (size // shards, shards), mesh_dim_names=names)


def check_scale(d_model: int, gpus: int, machines: int, powersgd_rank: int | None) -> None:
    """ValueError where a prior cannot be sharded among the GPUs of a machine, or its gradients not
    be compressed between machines."""
    if 4 * d_model % gpus:
        raise ValueError(f"--shard {gpus} does not divide {4 * d_model}, 4d")
    if powersgd_rank is not None and (machines == 1 or powersgd_rank < 1 or powersgd_rank % gpus):
        raise ValueError(
            f"--powersgd-rank {powersgd_rank} on {machines} machine(s) of {gpus}: "
            f"expected several machines, and a multiple of {gpus}"
        )


def shard(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard a model built on `meta`, each resblock of its own, and make room for it on `device`.

    mesh: [gpu] of this machine, or [machine, gpu], where the machines are to average as well.
    """
    for i, block in enumerate(model.blocks):
        # Shards are of the output's axis, but for the second matrix of an MLP (Table 2).
        second = block.out.weight if i % 2 else None
        fully_shard(
            block, mesh=mesh, shard_placement_fn=lambda p, second=second: Shard(int(p is second))
        )
    fully_shard(model, mesh=mesh)
    for block, following in zip(model.blocks, model.blocks[1:]):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    model.to_empty(device=device)


def fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Hand out the weights that rank 0 holds to the shards of all."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(weights) if dist.get_rank() == 0 else {}, options=options)


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Keep only each resblock's input, and compute the rest again in the backward pass (2.4)."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def clip_gradients(model: nn.Module, most: float, norm: Tensor | None = None) -> Tensor:
    """Scale the gradients to a norm of at most `most`; the norm before, over all shards, which is
    computed where it is not known."""
    if norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
        return norm
    norm = nn.utils.clip_grad_norm_(model.parameters(), most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def all_finite(model: nn.Module) -> bool:
    """Whether the parameters are finite, on every rank. For all ranks to call."""
    finite = torch.stack([local(p).isfinite().all() for p in model.parameters()]).all().int()
    if dist.is_initialized():
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)
