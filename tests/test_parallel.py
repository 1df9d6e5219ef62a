"""Replicated, sharded, compressed, resumed by more or fewer processes: the same run."""

import shutil
import sys

import pytest
import soak
import torch
from scripts import Trainer, free_port, log_of

import train_prior
from engine import checkpoint
from engine.cli import start

SMALL = ["--tiny", "--n-layer", "2", "--n-head", "4", "--d-head", "8", "--batch-size", "8"]
SMALL += ["--log-every", "1"]
SMALL += ["--eval-every", "5", "--warmup-steps", "5", "--plateau-steps", "3", "--workers", "0"]
SMALL += ["--bpe-captions", "500"]


def alone(monkeypatch, run_dir, *options):
    command = ["train_prior.py", *SMALL, *soak.places(run_dir), *options]
    monkeypatch.setattr(sys, "argv", command)
    start(train_prior.main)


def together(run_dir, *options):
    """The two processes that torchrun would start; it is tried in test_resume.py and
    test_survival.py."""
    every = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    every |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    args = [*SMALL, *soak.places(run_dir), *options]
    ranks = [
        Trainer("train_prior", run_dir, *args, **every, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said()


def losses(run_dir):
    return [e["loss"] for e in log_of(run_dir) if "loss" in e]


def test_one_run_however_it_is_spread(tmp_path, monkeypatch):
    """Losses to 1e-5 over 10 steps: alone; replicated, with gradients between the two compressed
    at full rank; sharded, with activations computed again. Saved on two and resumed on one, and
    back, through both kinds of state."""
    one = soak.new_run(tmp_path / "one")
    alone(monkeypatch, one, "--steps", "5")
    rates = [entry["lr"] for entry in log_of(one) if "lr" in entry]
    assert rates == pytest.approx([3e-3 * k / 5 for k in range(1, 6)])  # the warm-up is linear
    half = shutil.copytree(one, tmp_path / "half")
    alone(monkeypatch, one, "--steps", "10", "--resume")
    expected = losses(one)
    assert len(expected) == 10 and expected[-1] < expected[0]
    averaged = checkpoint.load(one / "prior_state.pt")["n_averaged"]
    assert averaged == 3  # after the first update, and every five

    replicated = soak.new_run(tmp_path / "replicated")
    together(replicated, "--steps", "10", "--micro-batch", "2", "--powersgd-rank", "128")
    assert losses(replicated) == pytest.approx(expected, abs=1e-5)
    errors = checkpoint.load(replicated / "prior_state.pt")["errors"]
    assert 0 < max(e.abs().max() for e in errors.values()) < 1e-4

    sharded = soak.new_run(tmp_path / "sharded")
    together(sharded, "--steps", "5", "--shard", "--checkpoint-activations")
    assert (sharded / "prior_state").is_dir() and not (sharded / "prior_state.pt").exists()
    alone(monkeypatch, sharded, "--steps", "10", "--resume")
    assert losses(sharded) == pytest.approx(expected, abs=1e-5)
    assert (sharded / "prior_state.pt").exists() and not (sharded / "prior_state").exists()

    together(half, "--steps", "10", "--resume", "--shard", "1")
    assert losses(half) == pytest.approx(expected, abs=1e-5)
    whole = checkpoint.load(one / "prior.pt")["model"]
    for name, value in checkpoint.load(half / "prior.pt")["model"].items():
        assert torch.allclose(value, whole[name], atol=1e-4), name

    # a flipped bit in one of the shards is seen before anything is done
    part = next((half / "prior_state").glob("__0_*.distcp"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 4
    part.write_bytes(data)
    with pytest.raises(SystemExit, match="2"):
        alone(monkeypatch, half, "--steps", "12", "--resume")
