"""Running the project's scripts from tests, and reading what they log."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

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


def log_of(run_dir, *stages):
    """The entries of a run's log but the settings; of these stages, or of all."""
    entries = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "settings" not in entry]
    return [entry for entry in entries if not stages or entry["stage"] in stages]
