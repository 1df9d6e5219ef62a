"""What a plan counts, against a formula, a real pass on the CPU, and the trainers themselves."""

import sys

import pytest
import torch

from dvae import DVAEConfig
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


def test_the_decoder_is_counted_as_it_is_trained(monkeypatch):
    """Upsampling comes behind the 1 × 1 convolutions, which so have a quarter of the pixels."""
    config = DVAEConfig(n_hid=8, n_init=8, n_groups=2, blocks_per_group=1, vocab_size=16)
    _, trained = plan.dvae_cost(config, 16, 2)
    monkeypatch.setattr(plan, "upsample_late", lambda decoder: None)
    _, readable = plan.dvae_cost(config, 16, 2)
    # identity path and first convolution, 16 channels to 8 and to 2, at 64 pixels in place of 256
    assert readable.flops - trained.flops == 3 * 2 * 2 * (256 - 64) * 16 * (8 + 2)


@pytest.mark.parametrize(
    "options, expected",
    [
        (["dvae", "--tiny", "--gpus", "2"], ["216,374 parameters on 2", "this fits"]),
        (
            ["prior", "--tiny", "--gpus", "4", "--shard", "--gpu-memory", "0.03"],
            ["sharded among 4", "batch 64: 1 micro-batch(es) of 16", "does not fit"],
        ),
    ],
)
def test_plans_are_printed_and_nothing_else_happens(
    options, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plan.py", *options])
    plan.main()
    out = capsys.readouterr().out
    assert all(words in out for words in expected), out
    assert not list(tmp_path.iterdir())


def test_the_paper_fits_its_cards(monkeypatch, capsys):
    """By hand: of 12,293,828,224 parameters 64 · 12 · 3968² are in matrices of resblocks, 2 bytes
    each, once in the buffers, which hold their gradients too, and twice in the moments; the other
    201,649,792 have 4 bytes. An eighth of that: 2.91 + 0.09 + 5.82 + 2.82 GB. Of the largest
    resblock, an MLP of 8 · 3968² weights, two and the gradients of one: 3 · 2 · 126e6 bytes = 0.70
    GB."""
    options = "prior --preset paper --gpus 1024 --shard 8 --checkpoint-activations --dtype fp16"
    options += " --powersgd-rank 896 --bits-stored 16 --gpu-memory 16"
    monkeypatch.setattr(sys, "argv", ["plan.py", *options.split()])
    plan.main()
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("memory of each GPU, in GB:") + 1
    memory = {line[10:].strip(): float(line[:10]) for line in lines[start:-1]}
    total, activations = memory.pop("in all, of 16"), memory.pop("activations")
    assert memory == {
        "parameters": 2.91,
        "gradients": 0.09,
        "Adam's moments": 5.82,
        "error buffers": 2.82,
        "gathered resblocks": 0.70,
    }
    assert total == pytest.approx(2.91 + 0.09 + 5.82 + 2.82 + 0.70 + activations, abs=0.03)
    assert lines[-1] == "this fits"
