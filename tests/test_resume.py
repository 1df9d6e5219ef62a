"""Interrupted and resumed, alone and with others: the same run."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from scripts import ROOT, log_of, run


def test_resumed_training_repeats_an_uninterrupted_one(tmp_path):
    """Interrupted by Ctrl-C somewhere, both stages end with the same bits."""
    dvae = ["train_dvae.py", "--tiny", "--steps", "40", "--eval-every", "40", "--log-every", "2"]
    prior = ["train_prior.py", "--steps", "40", "--eval-every", "40", "--log-every", "2",
             "--ema-every", "1", "--batch-size", "8", "--plateau-steps", "5"]  # fmt: skip
    for script, name in ((dvae, "dvae.pt"), (prior, "prior.pt")):
        run(*script, "--run-dir", tmp_path / "whole")
        command = [sys.executable, *script, "--run-dir", str(tmp_path / "broken")]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        log = tmp_path / "broken" / "log.jsonl"
        stage = name.removesuffix(".pt")
        deadline = time.time() + 120
        while not (log.exists() and f'"stage": "{stage}", "step": 4' in log.read_text()):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "go on with --resume" in process.stderr.read()
        run(*script, "--run-dir", tmp_path / "broken", "--resume")
        whole = torch.load(tmp_path / "whole" / name, weights_only=True)
        broken = torch.load(tmp_path / "broken" / name, weights_only=True)
        assert whole["step"] == broken["step"] == 40
        for key, value in whole["model"].items():
            assert (value == broken["model"][key]).all(), key
        steps = [e["step"] for e in log_of(tmp_path / "broken", stage) if "loss" in e]
        assert steps == sorted(set(steps))


def test_torchrun_gives_the_same_losses(tmp_path):
    """Two processes with gloo against one, the same global batch."""
    losses = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
        run_dir = tmp_path / str(len(losses))
        run_dir.mkdir()
        for name in ("dvae.pt", "bpe.json"):
            shutil.copy(ROOT / "pretrained/tiny" / name, run_dir)
        options = ["--steps", 6, "--warmup-steps", 6, "--log-every", 1, "--batch-size", 8]
        options += ["--micro-batch", 2]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        run(*launcher, "train_prior.py", "--run-dir", run_dir, *options, env=one_thread)
        losses.append([e["loss"] for e in log_of(run_dir, "prior") if "loss" in e])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
