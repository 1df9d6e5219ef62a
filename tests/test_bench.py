"""bench.py: what it counts, and the lines of its table."""

import math

import pytest
from torch import nn

from engine.cli import start
from lab import bench
from lab.bench import DVAEConfig, Transformer, TransformerConfig, attention_mask, layer_kind

SMALL = TransformerConfig(3, 2, 4, text_len=5, grid=8, text_vocab=20, image_vocab=13, kernel=3)


def test_counted_operations_are_those_of_the_layers_and_masks():
    c, total = SMALL, 0
    masks = [
        attention_mask(layer_kind(i, c.n_layer), c.text_len, c.grid, c.kernel)
        for i in range(1, c.n_layer + 1)
    ]

    def count(linear, _, y):
        nonlocal total
        total += 2 * y.numel() * linear.in_features

    model = Transformer(c)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    text, image = bench.prior_data(c, 2, "cpu")
    model(text, image)
    total += 2 * 4 * c.d_model * sum(mask.sum().item() for mask in masks)
    assert bench.forward_ops(c, 2) == total

    rows = [mask[c.text_len + 20 : c.text_len + 30].sum().item() for mask in masks]
    assert bench.pairs(c, 20, 30) == sum(rows)
    weights = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    weights += model.image_head.weight.numel()
    own = sum(rows) / 10 - c.n_layer * c.text_len
    ops, numbers = bench.token_cost(c, 4, 20, 30)
    assert math.isclose(ops, 4 * 2 * (weights + 2 * c.d_model * sum(rows) / 10))
    assert math.isclose(numbers, weights + 2 * c.d_model * (c.n_layer * c.text_len + 4 * own))


def test_counted_operations_of_convolutions():
    config = DVAEConfig(n_hid=8, n_init=4, n_groups=2, blocks_per_group=1, vocab_size=6)
    one = 2 * 8 * 3 * 49 * 64  # the input convolution, on 8 × 8 pixels
    one += 2 * 64 * (8 * 2 * 9 + 2 * 2 * 9 * 2 + 2 * 8)  # a resblock of width 8
    one += 2 * 16 * (8 * 4 * 9 + 4 * 4 * 9 * 2 + 4 * 16 + 8 * 16)  # of width 16, on 4 × 4
    one += 2 * 16 * 16 * 6
    more = 4 * 16 * 16  # 4 pictures of 128 × 128 pixels
    assert bench.dvae("cpu", False, config).ops == more * one
    one += 2 * 16 * (6 * 4 + 4 * 4 + 4 * 4 * 9 * 2 + 4 * 16 * 9 + 4 * 16)  # the decoder, on 4 × 4
    one += 2 * 64 * (16 * 2 + 2 * 2 * 9 * 2 + 2 * 8 * 9 + 16 * 8 + 8 * 6)  # and on 8 × 8
    assert bench.dvae("cpu", True, config).ops == 3 * more * one


@pytest.mark.parametrize(
    "build",
    [
        lambda: bench.prior_step("cpu", SMALL),
        lambda: bench.attention("cpu", "column", SMALL),
        lambda: bench.generation("cpu", 1, SMALL),
        lambda: bench.generation("cpu", 8, SMALL),
    ],
)
def test_a_line_of_the_table(build, capsys, monkeypatch):
    monkeypatch.setattr(
        bench, "probes", lambda device: {"op": lambda: 1e-12, "byte": lambda: 1e-12}
    )
    line = bench.measure(build, "cpu", with_peers=True)
    assert line["figure"] > 0 and line["memory"] >= 0 and 0 < line["percent"] < 100
    assert all(ratio > 0 for ratio in line["ratios"].values()) and "dense" in str(line["ratios"])
    bench.show(line)
    assert line["what"] in capsys.readouterr().out


def test_corpus_has_the_size_asked_for():
    captions = bench.corpus(0.1)
    assert sum(len(caption) + 1 for caption in captions) == pytest.approx(100_000, rel=0.01)
    assert captions == bench.corpus(0.1) and len(set(" ".join(captions).split())) > 3000


def test_bad_options_end_with_one_line(monkeypatch, capsys):
    for argv in (["--threads", "0"], ["--only", "nothing"], ["--device", "tpu"]):
        monkeypatch.setattr("sys.argv", ["bench.py", *argv])
        with pytest.raises(SystemExit) as exit:
            start(bench.main)
        assert exit.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
