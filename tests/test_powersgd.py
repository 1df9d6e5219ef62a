"""Appendix E, step by step and between two processes; Tables 1 and 2."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scripts import free_port
from test_formats import magnitudes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import engine.state as run_state
from scale import powersgd
from scale.formats import largest
from scale.powersgd import PowerSGD, pieces, sent


def test_tables_1_and_2():
    """83, 85 and 86% for the three models; communicated: r (m + 2) / (2 d m), 1 − 5 r / (8 d)."""
    percent = []
    for d, rank in powersgd.TABLE_1.values():
        for m in (1, 4, 8):
            gradient, factors = sent(d, rank, m)
            assert gradient == 12 * d * d // m
            assert factors / gradient == pytest.approx(rank * (m + 2) / (2 * d * m))
        assert 1 - factors / gradient == pytest.approx(1 - 5 * rank / (8 * d))
        percent.append(round(100 * (1 - factors / gradient)))
    assert percent == [83, 85, 86]


def test_pieces_are_what_table_2_counts():
    """Rows ≤ columns; queries, keys and values apart; views, so that writing to them tells."""
    d, m = 16, 4
    matrices = {
        "0.qkv.weight": torch.zeros(3 * d // m, d),
        "0.out.weight": torch.zeros(d // m, d),
        "1.up.weight": torch.zeros(4 * d // m, d),
        "1.out.weight": torch.zeros(d, 4 * d // m),
    }
    views = [v for name, matrix in matrices.items() for v in pieces(name, matrix)]
    assert all(v.shape[0] <= v.shape[1] for v in views)
    r = 2
    assert sum(r * sum(v.shape) for v in views) == sent(d, r * m, m)[1]
    for v in views:
        v += 1
    assert all((matrix == 1).all() for matrix in matrices.values())


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(12, 6)


def reference(errors, Q, grads):
    """Appendix E for one matrix with all machines in view, sums in place of averages: the
    decompressed gradient (a mean) and the errors."""
    n = len(grads)
    errors = [e + g for e, g in zip(errors, grads)]
    P = sum(e @ Q for e in errors)
    P = torch.linalg.qr(P / n + 1e-6 * torch.eye(*P.shape)).Q
    decompressed = P @ sum(e.T @ P for e in errors).T
    return decompressed / n, [e - decompressed / n for e in errors]


def on_two_machines(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Small()
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    compressor = PowerSGD(matrices, others, rank=2, seed=3)
    draw = torch.Generator().manual_seed(1)
    errors = {n: [torch.zeros(p.shape)] * 2 for n, p in matrices}
    total, applied = {n: 0 for n, _ in matrices}, {n: 0 for n, _ in matrices}
    for _ in range(5):
        grads = {n: torch.randn(2, *p.shape, generator=draw) for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            p.grad = grads[n][rank].clone()
        compressor.average_gradients()
        for p in others:
            name = next(n for n, q in model.named_parameters() if q is p)
            assert torch.allclose(p.grad, grads[name].mean(0))
        for n, p in matrices:
            rows = p.shape[0] // 3 if n == "qkv.weight" else p.shape[0]
            parts = []
            for i in range(p.shape[0] // rows):
                part = slice(i * rows, (i + 1) * rows)
                ghat, left = reference(
                    [e[part] for e in errors[n]], compressor.Q[n, i], list(grads[n][:, part])
                )
                parts.append((ghat, left))
            expected = torch.cat([ghat for ghat, _ in parts])
            errors[n] = [torch.cat([left[k] for _, left in parts]) for k in range(2)]
            assert torch.allclose(p.grad, expected, atol=1e-5)
            assert torch.allclose(compressor.errors[n], errors[n][rank], atol=1e-5)
            total[n] += grads[n].mean(0)
            applied[n] += p.grad
    sums = compressor.state_dict()
    for n, _ in matrices:  # nothing is lost, only late
        assert torch.allclose(applied[n] + sums[n] / 2, total[n], atol=1e-4)

    fresh = PowerSGD(matrices, others, rank=2, seed=3)
    fresh.load_state_dict(sums)
    assert all((fresh.Q[key] == Q).all() for key, Q in compressor.Q.items())  # fixed, not resampled
    assert all(torch.allclose(fresh.state_dict()[n], sums[n], atol=1e-5) for n, _ in matrices)

    # through a file, and the sums of shards as one sharded matrix, which any machine can cut anew
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    about = {"config": {}, "run": {}, "step": 1}
    tensors = run_state.tensors_of(model, None, optimizer, compressor)
    run_state.save_state(folder / "x_state.pt", about, tensors, sharded=False)
    dist.barrier()
    state = run_state.find_state(folder / "x_state.pt", {"steps": 9})
    again = PowerSGD(matrices, others, rank=2, seed=3)
    run_state.restore(state, model, None, optimizer, again)
    assert all(torch.allclose(again.state_dict()[n], sums[n], atol=1e-5) for n, _ in matrices)

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("machine", "gpu"))
    whole = {n: p.detach().clone() for n, p in matrices}
    for p in whole.values():
        dist.broadcast(p, 0)
    parts = [(n, distribute_tensor(p, mesh["gpu"], [Shard(0)])) for n, p in whole.items()]
    own = PowerSGD(parts, [], 2, mesh["machine"].get_group(), shards=2, shard=rank)
    for n, p in parts:
        own.errors[n] = p.to_local().clone()
    saved = own.state_dict()
    assert all(torch.equal(saved[n].full_tensor(), whole[n]) for n in whole)
    for sums_of in (saved, whole):
        other = PowerSGD(parts, [], 2, mesh["machine"].get_group(), shards=2, shard=rank)
        other.load_state_dict(sums_of)
        assert all(torch.equal(other.errors[n], own.errors[n]) for n in whole)

    # a noisy toy problem at rank 2 of 6: the loss ends within 7% of plain averaging's
    def train(compressed: bool) -> float:
        torch.manual_seed(0)
        model = Small()
        if compressed:
            named = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
            compressor = PowerSGD(named, [model.qkv.bias, model.out.bias], rank=2)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        draw, losses = torch.Generator().manual_seed(5), []
        teacher = torch.randn(6, 6, generator=draw) / 2
        for _ in range(300):
            x = torch.randn(2, 32, 6, generator=draw)
            y = model.out(torch.tanh(model.qkv(x[rank]))[:, :12])
            noise = torch.randn(32, 6, generator=draw) / 2
            loss = (y - torch.tanh(x[rank] @ teacher) - noise).square().mean()
            loss.backward()
            if compressed:
                compressor.average_gradients()
            else:
                for p in model.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= 2
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return sum(losses[-50:]) / 50

    plain, compressed = train(False), train(True)
    assert plain < 0.27 and compressed < 1.07 * plain, (plain, compressed)
    dist.barrier()  # one that leaves early can abort another
    dist.destroy_process_group()


def test_powersgd_between_two_machines(tmp_path):
    mp.spawn(on_two_machines, (free_port(), tmp_path), nprocs=2)


# ---- E.2 replayed --------------------------------------------------------------------------------


@lru_cache
def numbers():
    return np.array([float(v) for v in magnitudes("1-6-9")])


def nearest(x, scale=1.0):
    """float64 to the nearest number of the 1-6-9 format, after multiplication by scale."""
    table = numbers()
    magnitude = np.minimum(np.abs(x * scale), 16)
    above = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
    lower, upper = table[above - 1], table[above]
    magnitude = np.where(magnitude - lower <= upper - magnitude, lower, upper)
    magnitude = np.where(magnitude == 16, np.inf, np.where(np.isnan(x), np.nan, magnitude))
    return np.copysign(magnitude, x) / scale


def replay(errors, grads, Q, bits, scale):
    """E.2 for one matrix of one shard, all machines in view, in float64.

    The decompressed gradient, the square of its norm, whether the update fails, the new errors.
    """

    @np.errstate(over="ignore", invalid="ignore")
    def store(x, scale=1.0):  # as a machine keeps or sends it
        return nearest(x, scale) if bits == 16 else x.astype(np.float32).astype(float)

    @np.errstate(invalid="ignore")
    def average(factors):
        mean = store(sum(store(f, scale) for f in factors) / len(factors), scale)
        most = largest("1-6-9") / scale if bits == 16 else np.finfo(np.float32).max
        return np.isfinite(mean).all(), np.nan_to_num(mean, nan=0, posinf=most, neginf=-most)

    fails = not all(np.isfinite(g).all() for g in grads)
    errors = [store(E + g) if np.isfinite(g).all() else E for E, g in zip(errors, grads)]
    P_finite, P = average([E @ Q for E in errors])
    P = store(np.linalg.qr(P + 1e-6 * np.eye(*P.shape)).Q)
    Q_finite, Q = average([E.T @ P for E in errors])
    decompressed = P @ Q.T
    if P_finite and Q_finite:
        errors = [store(E - decompressed) for E in errors]
    else:
        fails, errors = True, [E if np.isfinite(E).all() else np.zeros_like(E) for E in errors]
    return decompressed, (Q**2).sum(), fails, errors


SHAPES = {"tall": (7, 3), "wide": (4, 9), "bias": (5,)}

# In each step, what the last GPU of machine 1 finds: in its gradient, in its buffer, or its whole
# buffer so large, if finite, that its P overflows.
FAULTS = [
    (),
    (),
    ("gradient", "tall", torch.inf),
    ("gradient", "wide", torch.nan),
    ("gradient", "bias", -torch.inf),
    ("buffer", "wide", torch.inf),
    ("large buffer", "tall", None),
    (),
]


def replayed(rank: int, port: int, machines: int, shards: int) -> None:
    torch.set_num_threads(1)
    world = machines * shards
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)
    groups = [dist.new_group(list(range(gpu, world, shards))) for gpu in range(shards)]
    machine, gpu = divmod(rank, shards)
    here = (machine, gpu) == (1, shards - 1)
    for bits, scale in ((32, 1.0), (16, powersgd.SCALE), (16, 1.0)):
        powersgd.SCALE = scale  # at 1, P overflows in 16 bits before its buffer does
        params = {n: nn.Parameter(torch.zeros(shape)) for n, shape in SHAPES.items()}
        matrices = [(n, p) for n, p in params.items() if p.ndim == 2]
        compressor = PowerSGD(
            matrices, [params["bias"]], 2 * shards, groups[gpu], shards, gpu, seed=3, bits=bits
        )
        draw = torch.Generator().manual_seed(1)
        for fault in FAULTS:
            grads = {n: torch.randn(world, *shape, generator=draw) for n, shape in SHAPES.items()}
            kind, name, value = fault or (None, None, None)
            if kind == "gradient":
                grads[name][world - 1 if machines == 2 else 2 * shards - 1].view(-1)[1] = value
            elif kind and here:
                buffer = compressor.errors[name]
                if kind == "buffer":
                    buffer[0, 1] = value
                else:
                    buffer.fill_(3e38 if bits == 32 else 12)
                compressor.errors[name] = buffer
            everyone = [None] * world
            state = {n: (compressor.errors[n], compressor.Q[n, 0]) for n, _ in matrices}
            dist.all_gather_object(everyone, state)
            for n, p in params.items():
                p.grad = grads[n][rank].clone()

            norm = compressor.average_gradients()

            squares, fails = 0.0, False
            for g in range(shards):
                ranks = range(g, world, shards)
                for n, _ in matrices:
                    turn = (lambda x: x.T) if n == "tall" else (lambda x: x)
                    decompressed, square, failed, errors = replay(
                        [turn(everyone[k][n][0].double().numpy()) for k in ranks],
                        [turn(grads[n][k].double().numpy()) for k in ranks],
                        everyone[g][n][1].double().numpy(),
                        bits,
                        scale,
                    )
                    squares, fails = squares + square, fails or failed
                    if g != gpu:
                        continue
                    near = dict(rtol=1e-5, atol=1e-5) if bits == 32 else dict(rtol=2**-6, atol=0.02)
                    found = turn(compressor.errors[n].numpy())
                    np.testing.assert_allclose(found, errors[machine], **near)
                    assert np.isfinite(found).all()
                    # zeroed on the GPU where it was contaminated, and nowhere else
                    assert found.any() != (here and (kind, name) == ("buffer", n))
                    if not failed:
                        np.testing.assert_allclose(
                            turn(params[n].grad.numpy()), decompressed, **near
                        )
                bias = grads["bias"][list(ranks)].mean(0)
                squares += bias.square().sum().item()
                if g == gpu:
                    assert torch.equal(params["bias"].grad.isfinite(), bias.isfinite())
            if fails or not np.isfinite(squares):
                assert norm == torch.inf
            else:
                assert norm.item() == pytest.approx(squares**0.5, rel=1e-5 if bits == 32 else 1e-2)
            # of the faults, only a large buffer does no harm in 16 bits, at the scale that is used
            assert (norm == torch.inf) == bool(fault and not (value is None and scale == 2**-10))
            if kind == "large buffer":
                for n, _ in matrices:
                    compressor.errors[n] = torch.zeros(SHAPES[n])

        # what is averaged keeps its sign when it is clamped; a NaN has none
        factor = torch.tensor([[torch.inf, -torch.inf, torch.nan, 2.0]])
        if machine:
            factor[:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        most = largest("1-6-9") / scale if bits == 16 else torch.finfo(torch.float32).max
        for values, ok in ((factor, False), (torch.full((1, 4), machine + 1.0), True)):
            means, finite = compressor.average_factors({("wide", 0): values.clone()})
            mean = [most, -most, 0, (2 + 4 * (machines - 1)) / machines]
            expected = mean if not ok else [(machines + 1) / 2] * 4
            assert means["wide", 0][0].tolist() == pytest.approx(expected, rel=2**-10)
            assert finite["wide", 0] == ok
    dist.barrier()  # one that leaves early can abort another
    dist.destroy_process_group()


@pytest.mark.parametrize("machines, shards", [(2, 1), (3, 1), (2, 2)])
def test_nothing_is_lost_where_something_is_not_finite(machines, shards):
    """E.2 against the replay, with gradients and buffers of one GPU broken in turn."""
    mp.spawn(replayed, (free_port(), machines, shards), nprocs=machines * shards)


def test_the_rank_must_fit_the_machine():
    with pytest.raises(ValueError, match="multiple of the 8"):
        PowerSGD([], [], rank=12, shards=8)
