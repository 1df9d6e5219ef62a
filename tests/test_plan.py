"""What a plan counts, against a formula, a real pass on the CPU, and the trainers themselves."""

import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dvae import DVAE, DVAEConfig
from lab import plan
from scale.fast import upsample_late
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


def kept_by(model, *batch, bits):
    """The bytes that a forward pass on the CPU keeps for the backward pass, weights apart."""
    mine, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in mine:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bits == 16):
            loss, _ = model.loss(*batch)
    return sum(kept.values())


def planned(model, cost, bits):
    memory = plan.memory_of(model, cost, shards=1, bits=bits)
    return memory["activations"] + memory.get("16-bit weights", 0)


@pytest.mark.parametrize("bits", [32, 16])
def test_what_is_kept_is_what_a_real_pass_keeps(bits):
    """On the CPU the fused attention keeps less than the plain one that meta counts. Of
    checkpointed resblocks the inputs alone, in 32 bits."""
    torch.manual_seed(0)
    text, image = torch.stack([pad_text([1, 2], 8, 40)] * 3), torch.zeros(3, 16, dtype=torch.long)
    model = Transformer(CONFIG)
    meta, cost = plan.prior_cost(CONFIG, 3, False)
    assert 0.8 < planned(meta, cost, bits) / kept_by(model, text, image, bits=bits) < 1.6
    meta, again = plan.prior_cost(CONFIG, 3, True)
    assert again.kept < cost.kept and cost.flops < again.flops < 1.5 * cost.flops
    sizes = DVAEConfig(n_hid=8, n_init=8, n_groups=2, blocks_per_group=1, vocab_size=16)
    meta, cost = plan.dvae_cost(sizes, 16, 2)
    model = DVAE(sizes)
    upsample_late(model.decoder)
    found = kept_by(model, torch.rand(2, 3, 16, 16), 1.0, 1.0, bits=bits)
    assert 0.9 < planned(meta, cost, bits) / found < 1.1


def test_of_checkpointed_resblocks_the_inputs_are_kept_in_32_bits():
    """Four resblocks and what one of them keeps while it is computed again, beside the ends."""
    inputs = 4 * 3 * (CONFIG.text_len + CONFIG.grid**2) * CONFIG.d_model * 4
    _, whole = plan.prior_cost(CONFIG, 3, False)
    _, again = plan.prior_cost(CONFIG, 3, True)
    _, deeper = plan.prior_cost(replace(CONFIG, n_layer=4), 3, True)
    assert deeper.kept - again.kept == inputs and deeper.cast == again.cast
    assert 0 < again.cast < whole.cast / 2


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--gpus 3 --batch-size 48 --shard 3", "does not divide 512, 4d"),
        ("--gpus 1 --shard", "or 1 GPU"),
        ("--gpus 8 --shard 8 --powersgd-rank 8", "several machines"),
        ("--gpus 16 --shard 8 --powersgd-rank 7", "a multiple of 8"),
        ("--gpu-memory nan", "expected GB above 0"),
    ],
)
def test_what_the_trainer_refuses_has_no_plan(options, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan.py", "prior", "--tiny", *options.split()])
    with pytest.raises(ValueError, match=expected):
        plan.main()


def test_nothing_is_held_out_beside_other_held_out_data(tmp_path, monkeypatch, capsys):
    for name in "ab":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    options = ["--data", str(tmp_path), "--val", "toy", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", ["plan.py", "dvae", "--tiny", *options])
    plan.main()
    assert "an epoch: 2 images" in capsys.readouterr().out


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


def test_the_paper_and_its_cards(monkeypatch, capsys):
    """By hand: of 12,293,828,224 parameters 64 · 12 · 3968² are in matrices of resblocks, 2 bytes
    each, once in the buffers, which hold their gradients too, and twice in the moments; the other
    201,649,792 have 4 bytes. An eighth of that: 2.91 + 0.09 + 5.82 + 2.82 GB. The fixed Q of a
    layer have 6 · 3968 · 112 numbers, of all layers 0.32 GB. Of the largest resblock, an MLP of
    8 · 3968² weights, two and the gradients of one: 3 · 2 · 126e6 bytes = 0.70 GB. Embeddings,
    heads and the last norm have 198,348,416, whole, and so have their gradients: 1.48 GB. The
    inputs of 128 resblocks, 1280 · 3968 numbers of 4 bytes each, are 2.42 GB; what one resblock
    and both ends keep comes on top."""
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
        "error buffers and Q": 3.13,
        "gathered resblocks": 0.70,
        "gathered embeddings and heads": 1.48,
    }
    assert total == pytest.approx(sum(memory.values()) + activations, abs=0.03)
    assert 2.42 < activations < 3 and lines[-1].startswith("this does not fit")
