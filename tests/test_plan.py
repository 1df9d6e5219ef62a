"""What a plan counts, against a formula, a real pass on the CPU, and the trainers themselves."""

import sys

import pytest
import torch

import train_dvae
import train_prior
from lab import plan
from transformer import Transformer, TransformerConfig, pad_text

CONFIG = TransformerConfig(
    n_layer=2, n_head=2, d_head=16, text_len=8, grid=4, text_vocab=40, image_vocab=16, kernel=3
)


def test_operations_are_those_of_the_products():
    """6 per weight and token, of which 2 forward; attention adds its own, measured by its size."""
    model, cost = plan.prior_cost(CONFIG, 3, False)
    T, N, B = CONFIG.text_len, CONFIG.grid**2, 3
    weights = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2) * (T + N)
    weights += model.text_head.weight.numel() * (T - 1) + model.image_head.weight.numel() * N
    attention = cost.flops - 6 * B * weights
    dense = 2 * 2 * (T + N) ** 2 * CONFIG.d_model * 3 * B * CONFIG.n_layer
    assert (
        0 < attention < 1.5 * dense
    )  # blocks overlap, and at this size there are few to leave out


def test_what_is_kept_is_what_a_real_pass_keeps():
    """On the CPU the fused attention keeps less than the plain one that meta counts."""
    torch.manual_seed(0)
    model, kept = Transformer(CONFIG), {}
    mine = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in mine:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    text = torch.stack([pad_text([1, 2], 8, 40)] * 3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model.loss(text, torch.zeros(3, 16, dtype=torch.long))
    _, cost = plan.prior_cost(CONFIG, 3, False)
    assert 0.8 < cost.kept / sum(kept.values()) < 1.6
    _, again = plan.prior_cost(CONFIG, 3, True)
    assert again.kept < cost.kept and cost.flops < again.flops < 1.5 * cost.flops


@pytest.mark.parametrize(
    "script, options, expected",
    [
        (train_dvae, ["--tiny", "--plan", "2"], ["216,374 parameters on 2", "this fits"]),
        (
            train_prior,
            ["--tiny", "--plan", "4", "--shard", "--gpu-memory", "0.03"],
            ["sharded among 4", "batch 32: 1 micro-batch(es) of 8", "does not fit"],
        ),
    ],
)
def test_plans_are_printed_and_nothing_else_happens(
    script, options, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.__name__, *options])
    script.main()
    out = capsys.readouterr().out
    assert all(words in out for words in expected), out
    assert not list(tmp_path.iterdir())
