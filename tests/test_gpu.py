"""lab.gpu on a CPU, as far as that goes, and what it says of a difference."""

import math

from scripts import call

from dvae import DVAEConfig
from lab import gpu
from transformer import TransformerConfig


def test_a_cpu_is_as_a_cpu(monkeypatch):
    prior = TransformerConfig(2, 2, 16, 8, 4, 20, 16, 3)
    monkeypatch.setattr(gpu, "sizes_of", lambda *_: (prior, DVAEConfig(8, 8, 3, 1, 16), 16))
    code, said, _ = call(gpu, "--preset", "tiny", "--device", "cpu")
    assert code == 0 and said.splitlines()[-1] == "all as on a CPU"
    for what in ("prior, fp16: gradient", "dVAE, bf16: loss", "drawing, fp16", "FSDP2 on 2"):
        assert what in said


def test_the_first_difference_ends_it(monkeypatch):
    found = [("a", 1e-6, 1e-5), ("b", math.nan, 0.1), ("c", 0.2, 0.1)]
    monkeypatch.setattr(gpu, "rows", lambda *_: iter(found))
    code, said, error = call(gpu, "--device", "cpu")
    assert code == 1 and said.count("<--") == 2 and "all as" not in said
    assert "b differs by nan; expected at most 0.1" in error and error.count("\n") == 1
