"""Running the project's scripts from tests, and reading what they log."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

from data.loader import stop_loading
from engine.cli import start

ROOT = Path(__file__).resolve().parent.parent


def run(*command, code=0, **options):
    """Run a script of the project in a process of its own; its stdout and stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, **options
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout, done.stderr


def call(module, *args):
    """The same in this process, which has the imports behind it: (exit code, stdout, stderr)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch("sys.argv", [module.__file__, *map(str, args)]):
            try:
                start(module.main)
            except SystemExit as stopped:
                code = stopped.code
    return code, out.getvalue(), err.getvalue()


# ---- trainers in processes of their own, forked from one that has the imports behind it

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["train_dvae", "train_prior", "torch._dynamo", "matplotlib.figure"])


def live(script, args, output, limits, env):
    os.setsid()
    os.environ.update(env)
    # or its loading process would start a fork server of its own, which imports all again
    multiprocessing.set_start_method("fork", force=True)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    for kind, most in limits:
        import resource  # which Windows lacks

        if kind == resource.RLIMIT_AS:  # so much more than now
            most += 1024 * int(Path("/proc/self/statm").read_text().split()[0]) * 4
        resource.setrlimit(kind, (most, most))
    sys.argv = [f"{script}.py", *args]
    try:
        start(importlib.import_module(script).main)
    finally:
        stop_loading()  # what a script's own end does


class Trainer:
    """A trainer in such a process; as much of a Popen as is needed."""

    def __init__(self, script, run_dir, *args, limits=(), **env):
        self.output = run_dir / "output.txt"
        self.begin = self.output.stat().st_size if self.output.exists() else 0
        args = [str(arg) for arg in args]
        self.process = forks.Process(target=live, args=(script, args, self.output, limits, env))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join(120)
        return self.process.exitcode

    def said(self):
        """The lines it wrote, without its bar."""
        written = self.output.read_bytes()[self.begin :].decode().replace("\r", "\n").splitlines()
        return [line for line in written if line.strip() and "%|" not in line]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def log_of(run_dir, *stages):
    """The entries of a run's log but the settings; of these stages, or of all."""
    entries = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "settings" not in entry]
    return [entry for entry in entries if not stages or entry["stage"] in stages]


def last(run_dir, stage, name):
    """The last value of that name in a run's log."""
    return [entry[name] for entry in log_of(run_dir, stage) if name in entry][-1]
