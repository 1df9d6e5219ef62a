"""What the claims measure, on cases worked out by hand; which runs they train; the door."""

import json

import pytest
import torch
from torch import nn

from engine.cli import start
from engine.log import subplots
from lab import claims
from lab.claims import Outcome, Range, gradient_ranges, train, wilson
from transformer import Transformer, TransformerConfig, pad_text


def test_what_float16_holds_of_a_gradient():
    """Half of the least float16, 2^-24, rounds to zero; 65504 is the largest."""
    r = Range(torch.tensor([2.0**-30, 2.0**-25, 2.0**-24, 1.0]), largest=3.0)
    assert [r.flushed(2.0**k) for k in (0, 1, 5, 6)] == [0.5, 0.25, 0.25, 0]
    assert r.highest() == 2.0**14 and 3 * 2.0**14 < 65504 < 3 * 2.0**15
    assert r.flushed(1.01 * r.lowest()) == 0 < r.flushed(0.99 * r.lowest())
    many = Range(torch.linspace(1e-6, 1e-3, 1000), largest=1e-3)
    share = many.flushed(many.lowest())
    assert share == pytest.approx(claims.TOLERATED, abs=1e-3)


def test_the_gradients_of_each_resblock_are_those_of_its_layers():
    """Against gradients kept by the tensors themselves."""
    torch.manual_seed(0)
    config = TransformerConfig(2, 2, 8, text_len=5, grid=3, text_vocab=7, image_vocab=6, kernel=3)
    model = Transformer(config)
    text, image = pad_text([1, 2], 5, 7)[None], torch.arange(9)[None] % 6
    outputs = [[] for _ in model.blocks]

    def keep(k):
        return lambda layer, args, y: (y.retain_grad(), outputs[k].append(y))[0]

    handles = [
        layer.register_forward_hook(keep(k))
        for k, block in enumerate(model.blocks)
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    ]
    model.loss(text, image)[0].backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    ranges = gradient_ranges(model, text, image)
    assert len(ranges) == 4
    for block, kept, found in zip(model.blocks, outputs, ranges):
        values = torch.cat([y.grad.abs().flatten() for y in kept])
        expected = values[values > 0].sort().values
        torch.testing.assert_close(found.activations.sort().values, expected)
        matrices = [p.grad.abs().max().item() for p in block.parameters() if p.ndim == 2]
        assert found.largest == pytest.approx(max(*matrices, expected[-1].item()))


def test_intervals_of_shares():
    assert wilson(0, 10) == pytest.approx((0, 27.75), abs=0.01)
    assert wilson(50, 100) == pytest.approx((40.38, 59.62), abs=0.01)


def write_log(run, **entry):
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text(json.dumps(entry) + "\n")


def test_only_runs_that_are_missing_are_trained(monkeypatch, tmp_path, capsys):
    """Stand-in for a trainer: logs its own arguments, and fails where it is told to."""
    script = """import json, pathlib, sys
if "--bad" in sys.argv: sys.exit("wrong words")
run = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
run.mkdir(exist_ok=True)
entry = {"val_x": 1, "step": int(sys.argv[sys.argv.index("--steps") + 1]), "mine": sys.argv[-1]}
(run / "log.jsonl").write_text(json.dumps(entry))
"""
    (tmp_path / "trainer.py").write_text(script)
    monkeypatch.setattr(claims, "HERE", tmp_path)
    write_log(tmp_path / "a", step=7, val_x=1, mine="kept")
    write_log(tmp_path / "b", step=7, mine="stopped before its validation")
    runs = {tmp_path / "a": ["--bad"], tmp_path / "b": ["--x", "new"], tmp_path / "c": ["newer"]}
    assert [entry["mine"] for entry in train("trainer.py", runs, 7)] == ["kept", "new", "newer"]
    assert "1 of 3 runs are there" in capsys.readouterr().out
    with pytest.raises(ValueError, match="ended with 1: wrong words"):
        train("trainer.py", {tmp_path / "d": ["--bad"]}, 7)


def finished_sweep(monkeypatch, tmp_path, of):
    """The runs of both claims about stage one, with evaluations made by of(beta, tau, seed)."""
    monkeypatch.setattr(claims, "RUNS", tmp_path)
    for beta, tau in [(0, 1 / 16), (1, 1 / 16), (6.6, 1 / 16), (1, 1), (1, 1 / 4)]:
        for seed in claims.SEEDS:
            run = tmp_path / "dvae" / f"kl-weight-{beta:g}-tau-end-{tau:g}-seed-{seed}"
            write_log(run, step=claims.STEPS, **of(beta, tau, seed))


def test_verdicts_follow_the_logs(monkeypatch, tmp_path):
    def as_the_paper_says(beta, tau, seed):
        elbs = {"elb": 1.0, "relaxed_elb": 1 + tau**2}
        return {"codes": 10 + 10 * beta + seed, "val_psnr": 20 + beta + 0.1 * seed, **elbs}

    def otherwise(beta, tau, seed):  # one seed of the three differs
        entry = as_the_paper_says(beta, tau, seed)
        return entry | {"val_psnr": 20 + (beta > 1) * (seed - 1), "relaxed_elb": 1.1}

    finished_sweep(monkeypatch, tmp_path / "a", as_the_paper_says)
    kl, relaxed = claims.kl_weight(), claims.relaxation()
    assert kl.verdict.count("holds") == 2 and relaxed.verdict.startswith("holds")
    assert kl.rows[1] == pytest.approx([1, 21, 20, 22, 21.1, 21, 21.2])
    assert [row[3] for row in relaxed.rows] == pytest.approx([1, 1 / 16, 1 / 256])
    finished_sweep(monkeypatch, tmp_path / "b", otherwise)
    kl, relaxed = claims.kl_weight(), claims.relaxation()
    assert kl.verdict.count("holds") == 1 and kl.verdict.count("PSNR in dB: undecided") == 1
    assert relaxed.verdict.startswith("does not hold")


def test_what_a_claim_leaves_behind(monkeypatch, tmp_path, capsys):
    def toy():
        """The paper
        says so (1.2)."""
        figure, (axis,) = subplots(1)
        axis.plot([1, 2], [3, 4])
        return Outcome(["x", "share"], [[1, 0.5], ["all", 12345.678]], "holds", figure)

    monkeypatch.setattr(claims, "CLAIMS", {"toy": toy})
    monkeypatch.setattr("sys.argv", ["claims.py", "toy", "--out", str(tmp_path / "c")])
    claims.main()
    printed = capsys.readouterr().out
    assert "the paper: The paper says so (1.2).\n" in printed
    assert "  x      share\n  1        0.5\nall  1.235e+04\n\nholds\n" in printed
    left = json.loads((tmp_path / "c/toy.json").read_text())
    assert left["rows"] == [[1, 0.5], ["all", 12345.678]] and left["verdict"] == "holds"
    assert (tmp_path / "c/toy.png").stat().st_size > 0
    monkeypatch.setattr("sys.argv", ["claims.py", "truth"])
    with pytest.raises(SystemExit) as end:
        start(claims.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "'truth'" in error
