"""AdamW with the variance's clip: against torch's, by hand, in 16 bits, sharded and resumed."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scripts import free_port
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from scale.adamw import AdamW
from scale.formats import decode, encode

SETTINGS = dict(lr=2e-3, betas=(0.9, 0.96), eps=1e-8, weight_decay=4.5e-2)
both = pytest.mark.parametrize("moments", (32, 16))


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def new_adamw(params, moments):
    params = list(params)
    return AdamW(params, **SETTINGS, in_16_bits=params if moments == 16 else ())


def updates(model, optimizer, steps):
    """With gradients that depend on the step and on nothing else; every rank has the same."""
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_without_a_clip_it_is_torchs():
    ours, theirs = small_model(), small_model()
    for model, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        updates(model, kind(model.parameters(), **SETTINGS), range(100))
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert not torch.allclose(ours[0].weight, small_model()[0].weight, atol=1e-2)  # they have moved


@both
def test_the_variance_is_clipped_before_it_is_used(moments):
    """Large gradients, then small ones: by hand, one parameter, B.2's numbers."""
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = new_adamw([p], moments)
    theta, m, v, clips = 1.0, 0.0, 0.0, 0
    for t, g in enumerate([20.0, -3.0, 12.0, 0.5, 0.01, 4.0], start=1):
        m = 0.9 * m + 0.1 * g
        unclipped = 0.96 * v + 0.04 * g * g
        v, clips = min(unclipped, 5.0), clips + (unclipped > 5)
        theta -= 2e-3 * 4.5e-2 * theta
        v_hat = v / (1 - 0.96**t)
        theta -= 2e-3 * m / (1 - 0.9**t) / (math.sqrt(v_hat) + 1e-8)
        p.grad = torch.tensor([g])
        optimizer.step()
        state = optimizer.state_dict()["state"][0]
        near = dict(rel=1e-5) if moments == 32 else dict(rel=5e-3)
        assert state["exp_avg"].item() == pytest.approx(m, **near)
        assert state["exp_avg_sq"].item() == pytest.approx(v, **near)
        assert p.item() == pytest.approx(theta, abs=1e-6 if moments == 32 else 1e-4)
    assert clips == 4


def test_in_16_bits_only_what_is_kept_is_rounded():
    """An update from moments of 16 bits is that of 32 bits, from the same moments, rounded."""
    model = small_model()
    optimizer = new_adamw(model.parameters(), 16)
    for step in range(20):
        state, before = copy.deepcopy((optimizer.state_dict(), model))
        updates(model, optimizer, [step])
        exact = AdamW(before.parameters(), **SETTINGS)
        if step:
            exact.load_state_dict(state)
        updates(before, exact, [step])
        for p, q in zip(model.parameters(), before.parameters()):
            assert torch.equal(p, q)
            for name, fmt in (("exp_avg", "1-6-9"), ("exp_avg_sq", "0-6-10")):
                codes = optimizer.state[p][name]
                assert codes.dtype == torch.int16
                assert torch.equal(codes, encode(exact.state[q][name], fmt))
                assert decode(codes, fmt).any()

    wide = small_model()
    updates(wide, AdamW(wide.parameters(), **SETTINGS), range(20))
    for p, q in zip(model.parameters(), wide.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)  # one update's worth, after twenty


def test_matrices_alone_in_16_bits():
    """As the prior's trainer has it (D.2): each parameter is updated as where all have its bits."""

    def gradients(p):
        return [torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) for k in range(9)]

    mixed, wide, narrow = small_model(), small_model(), small_model()
    kept = [p for p in mixed.parameters() if p.ndim == 2]
    optimizers = [
        AdamW(mixed.parameters(), **SETTINGS, in_16_bits=kept),
        new_adamw(wide.parameters(), 32),
        new_adamw(narrow.parameters(), 16),
    ]
    for step in range(9):
        if step == 5:  # gone on with from what was saved
            saved = copy.deepcopy(optimizers[0].state_dict())
            optimizers[0] = AdamW(mixed.parameters(), **SETTINGS, in_16_bits=kept)
            optimizers[0].load_state_dict(saved)
        for model, optimizer in zip((mixed, wide, narrow), optimizers):
            for p in model.parameters():
                p.grad = gradients(p)[step]
            optimizer.step()
    for p, q, r in zip(mixed.parameters(), wide.parameters(), narrow.parameters()):
        assert torch.equal(p, r if p.ndim == 2 else q) and not torch.equal(q, r)
        assert (optimizers[0].state[p]["exp_avg"].dtype == torch.int16) == (p.ndim == 2)


@both
def test_resumed_with_the_same_bits(moments, tmp_path):
    whole = small_model()
    updates(whole, new_adamw(whole.parameters(), moments), range(10))
    half = small_model()
    optimizer = new_adamw(half.parameters(), moments)
    updates(half, optimizer, range(5))
    torch.save([half.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = small_model()
    again.load_state_dict(weights)
    optimizer = new_adamw(again.parameters(), moments)
    optimizer.load_state_dict(copy.deepcopy(state))
    updates(again, optimizer, range(5, 10))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))

    # torch's own state and that of the other number of bits can be gone on with, and their own
    theirs = torch.optim.AdamW(again.parameters(), **SETTINGS)
    theirs.load_state_dict(state)
    other = new_adamw(again.parameters(), 48 - moments)
    other.load_state_dict(theirs.state_dict())
    for kept, first in zip(other.state_dict()["state"].values(), state["state"].values()):
        assert kept["step"] == 5
        torch.testing.assert_close(kept["exp_avg"], first["exp_avg"], rtol=2**-10, atol=0)
        torch.testing.assert_close(kept["exp_avg_sq"], first["exp_avg_sq"], rtol=2**-11, atol=0)
    if moments == 32:  # what is too large for 16 bits becomes the largest, not infinite
        state["state"][0]["exp_avg"].fill_(-100.0)
        other.load_state_dict(state)
        kept = other.state_dict()["state"][0]["exp_avg"]
        assert kept.isfinite().all() and (kept < -10).all()


def on_two_gpus(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for moments in (32, 16):
        sharded(mesh, moments)
    dist.barrier()  # one that leaves early can abort another
    dist.destroy_process_group()


def sharded(mesh, moments):

    def new():
        model = fully_shard(small_model(), mesh=mesh)
        return model, new_adamw(model.parameters(), moments)

    whole = small_model()
    updates(whole, new_adamw(whole.parameters(), moments), range(6))
    model, optimizer = new()
    updates(model, optimizer, range(3))
    parts = get_state_dict(model, optimizer)
    assert all(isinstance(s["exp_avg"], DTensor) for s in parts[1]["state"].values())
    assert {"exp_avg", "exp_avg_sq", "step"} == set(parts[1]["state"]["0.weight"])
    gathered = StateDictOptions(full_state_dict=True)
    saved = [(parts, None), (get_state_dict(model, optimizer, options=gathered), gathered)]
    saved = [(copy.deepcopy(state), options) for state, options in saved]
    updates(model, optimizer, range(3, 6))
    for p, q in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(p.full_tensor(), q, rtol=0, atol=1e-4)
    for (weights, state), options in saved:  # a folder of shards, or one file
        other, its = new()
        set_state_dict(
            other, its, model_state_dict=weights, optim_state_dict=state, options=options
        )
        updates(other, its, range(3, 6))
        for p, q in zip(model.parameters(), other.parameters()):
            assert torch.equal(p.to_local(), q.to_local())


def test_sharded_and_resumed():
    mp.spawn(on_two_gpus, (free_port(),), nprocs=2)
