"""Interrupted and resumed, alone and with others: the same run."""

import os
import signal

import pytest
import soak
import torch
from scripts import Trainer, log_of, run

from engine import checkpoint


def test_resumed_training_repeats_an_uninterrupted_one(tmp_path):
    """Interrupted by Ctrl-C somewhere, both stages end with the same bits."""
    whole, broken = soak.new_run(tmp_path / "whole"), soak.new_run(tmp_path / "broken")
    log, prior = broken / "log.jsonl", ["--ema-every", 1, "--batch-size", 8, "--plateau-steps", 5]
    options = {"dvae": ["--tiny"], "prior": [*prior, "--bpe-captions", 500]}
    every = ["--steps", 40, "--eval-every", 40, "--log-every", 2]

    def launch(stage, run_dir, *more):
        args = [*options[stage], *every, *soak.places(run_dir), *more]
        return Trainer(f"train_{stage}", run_dir, *args)

    for stage in options:
        assert launch(stage, whole).wait() == 0
        process, begun = launch(stage, broken), f'"stage": "{stage}", "step": 4'
        soak.wait_for(lambda: log.exists() and begun in log.read_text(), process)  # noqa: B023
        os.kill(process.pid, signal.SIGINT)
        assert process.wait() == 130
        assert "go on with --resume" in process.said()[-1]
        assert launch(stage, broken, "--resume").wait() == 0
        paths = (run_dir / f"{stage}.pt" for run_dir in (whole, broken))
        a, b = (torch.load(path, weights_only=True) for path in paths)
        assert a["step"] == b["step"] == 40
        for key, value in a["model"].items():
            assert (value == b["model"][key]).all(), key
        steps = [e["step"] for e in log_of(broken, stage) if "loss" in e]
        assert steps == sorted(set(steps))
    a, b = (checkpoint.load(run_dir / "dvae_state.pt") for run_dir in (whole, broken))
    assert a["in_use"] == b["in_use"] and 39 in a["in_use"]["last_used"]


def test_torchrun_gives_the_same_losses(tmp_path):
    """Two processes with gloo against one, the same global batch."""
    options = ["--steps", 6, "--warmup-steps", 6, "--log-every", 1, "--batch-size", 8]
    options += ["--micro-batch", 2, "--bpe-captions", 500]
    one, two = soak.new_run(tmp_path / "one"), soak.new_run(tmp_path / "two")
    assert Trainer("train_prior", one, *soak.places(one), *options).wait() == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    run(*launcher, "train_prior.py", *soak.places(two), *options, env=one_thread)
    a, b = ([e["loss"] for e in log_of(run_dir, "prior") if "loss" in e] for run_dir in (one, two))
    assert len(a) == 6 and a == pytest.approx(b, abs=1e-5)
