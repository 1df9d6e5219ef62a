"""Schedules at the paper's points, averaging in closed form, the order of the data, files, codes
that stay in use."""

import argparse
import json
import math
import random

import drawings
import pytest
import torch
import torch.nn.functional as F
from scripts import call, last, log_of
from torch.optim.swa_utils import AveragedModel

import engine.log
import train_dvae
import train_prior
from data.loader import Samples, micro_batches
from engine import checkpoint
from engine.cli import check_batches, choose
from engine.codes import CodesInUse
from engine.log import Log, beside_shipped
from engine.run import moving_average
from scale.parallel import World
from train_dvae import cosine
from transformer import Transformer, TransformerConfig, pad_text

ALONE = World(0, 1, torch.device("cpu"))


def test_the_papers_numbers_are_the_defaults():
    """A.2 and B.2."""
    d = train_dvae.DVAETraining()
    assert (d.image_size, d.batch_size, d.steps) == (256, 64 * 8, 3_000_000)
    assert (d.lr, d.lr_end, d.lr_steps) == (1e-4, 1.25e-6, 1_200_000)
    assert (d.beta1, d.beta2, d.eps, d.weight_decay, d.ema) == (0.9, 0.999, 1e-8, 1e-4, 0.999)
    assert (d.kl_weight, d.kl_steps) == (6.6, 5000)
    assert (d.tau_start, d.tau_end, d.tau_steps) == (1, 1 / 16, 150_000)
    p = train_prior.PriorTraining()
    assert (p.batch_size, p.steps, p.lr, p.warmup_steps) == (1024, 430_000, 4.5e-4, 5000)
    assert (p.beta1, p.beta2, p.eps, p.weight_decay, p.clip) == (0.9, 0.96, 1e-8, 4.5e-2, 4)
    assert (p.ema, p.ema_every, p.bpe_dropout, p.plateau_halvings) == (0.99, 25, 0.1, 5)
    assert train_dvae.PRESETS["paper"] == train_prior.PRESETS["paper"] == {}


def test_cosine_schedules():
    assert cosine(0, 5000, 0, 6.6) == 0
    assert cosine(2500, 5000, 0, 6.6) == pytest.approx(3.3)
    assert cosine(5000, 5000, 0, 6.6) == cosine(9**9, 5000, 0, 6.6) == 6.6
    assert cosine(50_000, 150_000, 1, 1 / 16) == pytest.approx(
        1 / 16 + 15 / 16 * (1 + math.cos(math.pi / 3)) / 2
    )
    assert cosine(1_200_000, 1_200_000, 1e-4, 1.25e-6) == 1.25e-6
    values = [cosine(s, 100, 1, 0) for s in range(101)]
    assert values == sorted(values, reverse=True)


def test_steps_alone_scale_every_schedule():
    args = argparse.Namespace(steps=300, lr=None, kl_steps=None, tau_steps=7)
    hp = choose(train_dvae.DVAETraining, {}, args)
    assert (hp.steps, hp.lr_steps, hp.tau_steps) == (300, 120, 7)
    assert hp.kl_steps == 1 and hp.warmup_steps == 0
    one = choose(train_prior.PriorTraining, {}, argparse.Namespace(steps=1))
    assert one.plateau_steps == 1


@pytest.mark.parametrize(
    "field, value",
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("kl_weight", math.inf),
        ("batch_size", 0),
        ("log_every", 0),
        ("ema", 1.5),
        ("tau_end", 0.0),
    ],
)
def test_numbers_no_run_could_use_are_refused(field, value):
    with pytest.raises(ValueError, match=field.split("_")[0]):
        train_dvae.DVAETraining(**{field: value})


def test_iterate_averaging_is_the_closed_form():
    """Σ w_k x_k, of weights that sum to 1: the first of n iterates starts the average, and each
    next one takes its share of it, at first the larger of 1 − decay and 9 / (9 + n)."""
    model = torch.nn.Linear(1, 1, bias=False)
    average = AveragedModel(model, multi_avg_fn=moving_average(0.9))
    values = [random.Random(k).uniform(-1, 1) for k in range(120)]
    weights = []
    for n, value in enumerate(values):
        model.weight.data.fill_(value)
        average.update_parameters(model)
        share = max(0.1, 9 / (10 + n)) if n else 1
        weights = [weight * (1 - share) for weight in weights] + [share]
        expected = sum(w * x for w, x in zip(weights, values))
        assert average.module.weight.item() == pytest.approx(expected, abs=1e-6)
    assert weights[-1] == 0.1 and weights[-2] == pytest.approx(0.09)  # 0.1 · 0.9^k from n = 80 on
    assert sum(weights) == pytest.approx(1)


def test_the_step_size_halves_on_plateaus_five_times():
    """(B.2)"""
    p = train_prior.PriorTraining()
    halving = train_prior.Halving()
    window = iter(range(p.plateau_steps, 10**9, p.plateau_steps))

    def after(loss):
        for loss_of_a_step in (loss - 0.5, math.nan, loss + 0.5):  # NaN: that update was skipped
            halving.see(loss_of_a_step, 1, p)
        halving.see(loss, next(window), p)
        return p.lr / 2**halving.halvings

    assert after(4.0) == after(3.9) == after(3.8) == p.lr
    assert after(3.799) == p.lr / 2  # less than 0.2% better than the best: a plateau
    assert after(3.5) == p.lr / 2
    rates = [after(3.5) for _ in range(10)]
    assert rates[:4] == [p.lr / 4, p.lr / 8, p.lr / 16, p.lr / 32]
    assert set(rates[4:]) == {p.lr / 32}


class Numbers:
    name = "numbers"

    def __init__(self, n, broken=()):
        self.n, self.broken = n, broken

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.broken:
            raise ValueError(f"{index} is broken")
        return index, []


def number_and_draw(index, captions, rng, notes):
    return [torch.tensor([index, rng.randrange(10**9)])]


def stream(world, micro_batch, start=0, workers=0, n=10, batch_size=8, steps=6):
    samples = Samples(Numbers(n), number_and_draw, seed=1)
    batches = micro_batches(
        samples, start, steps, batch_size, micro_batch, world.rank, world.size, workers
    )
    return [tensors[0] for tensors, _ in batches]


def test_data_order_is_the_same_for_any_number_of_processes():
    """Also for any micro-batch, number of workers, and when resumed."""
    whole = torch.stack(stream(ALONE, 8))
    assert whole.shape == (6, 8, 2)
    assert (torch.cat(stream(ALONE, 2, workers=2)).view(6, 8, 2) == whole).all()
    assert (torch.stack(stream(ALONE, 8, start=4)) == whole[4:]).all()
    ranks = [torch.stack(stream(World(r, 2, ALONE.device), 2)).view(6, 2, 2, 2) for r in (0, 1)]
    assert (torch.stack(ranks, dim=2).view(6, 8, 2) == whole).all()
    # each epoch of ten is a permutation, another one each time
    epochs = whole[..., 0].flatten()[:40].view(4, 10)
    assert (epochs.sort().values == torch.arange(10)).all()
    assert len({tuple(e.tolist()) for e in epochs}) == 4


def test_unreadable_samples_give_their_place_to_the_next():
    samples = Samples(Numbers(10, broken={3, 4}), number_and_draw, seed=0)
    seen, skipped = [], []
    for k in range(10):
        (item,), messages = samples[k, samples.item(k, 1)]
        seen.append(int(item[0]))
        skipped += messages
    assert len(seen) == 10 and not {3, 4} & set(seen)
    assert set(skipped) == {"3 is broken", "4 is broken"}
    with pytest.raises(ValueError, match="no usable sample"):
        Samples(Numbers(3, broken={0, 1, 2}), number_and_draw, seed=0)[0, 0]


def test_batch_sizes_must_divide():
    assert check_batches(64, None, 4) == 16
    assert check_batches(64, 8, 4) == 8
    for batch, micro, size in ((64, None, 3), (64, 7, 1), (64, 0, 1), (64, 32, 4)):
        with pytest.raises(ValueError, match="--batch-size 64"):
            check_batches(batch, micro, size)


def test_checkpoints_are_whole_or_refused(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save(path, {"a": torch.arange(3), "step": 1})
    assert checkpoint.load(path)["a"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]

    class Unsaveable:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"a": Unsaveable()})
    assert checkpoint.load(path)["step"] == 1
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path)
    torch.save(ALONE, path)  # an object, for which reading would have to run code
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path)


def test_log_drops_what_is_run_again(tmp_path):
    log = Log(tmp_path, "dvae", 0, ALONE)
    for step in (10, 20, 30):
        log.write(step, loss=1 / 3)
    Log(tmp_path, "prior", 0, ALONE).write(5, loss=2)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"stage": "dv')
    Log(tmp_path, "dvae", 20, ALONE).write(25, loss=3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("dvae", 10),
        ("dvae", 20),
        ("prior", 5),
        ("dvae", 25),
    ]
    assert not (tmp_path / "log.jsonl.old").exists()
    Log(tmp_path, "prior", 0, ALONE).write(1, loss=4)
    assert log_of(tmp_path)[-1]["loss"] == 4 and len(log_of(tmp_path)) == 4
    assert json.loads((tmp_path / "log.jsonl.old").read_text())["loss"] == 2


def test_a_look_stands_beside_the_shipped_runs(tmp_path, monkeypatch):
    """Only where preset, steps and data agree, up to the data's folder."""
    settings = {"preset": "tiny", "steps": 20, "data": "there/emoji.tsv", "lr": 1}
    entries = [
        {"stage": "dvae", "step": 0, "settings": settings},
        {"stage": "dvae", "step": 10, "loss": 1.5},
        {"stage": "dvae", "step": 10, "val_psnr": 24.04, "codes": 200},
        {"stage": "prior", "step": 10, "val_image_loss": 2.0},
    ]
    monkeypatch.setattr(engine.log, "PRETRAINED", tmp_path)
    (tmp_path / "tiny").mkdir()
    shipped = tmp_path / "tiny" / "log.jsonl"
    scores = {"val_psnr": 23.5, "codes": 31, "elb": 1.0}

    def line(step=10, stage="dvae", **changed):
        log = Log(tmp_path, stage, 0, ALONE, {"settings": settings | changed})
        return beside_shipped(stage, step, scores, log.shipped)

    assert line() == ""
    shipped.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert line() == "step 10: val_psnr 23.5, codes 31; the shipped run had 24.04, 200"
    assert line(data="here/emoji.tsv", lr=2) == line()
    assert not line(step=20) and not line(stage="prior") and not line(stage="clip")
    assert not line(steps=30) and not line(data="here/photos.tsv") and not line(preset="small")
    shipped.write_text('{"stage": "dv')
    assert line() == ""


@pytest.mark.parametrize("kind, least", [("logos", 50), ("lines", 55)])
def test_flat_pictures_keep_their_codes(kind, least, tmp_path):
    """After as many updates 59 and 32 of 256 are left here without the larger β of few codes, with
    it 85 and 78; of logos fewer still without the floor of ln b and the gain."""
    drawings.write(kind, tmp_path / kind)
    options = ["--steps", 400, "--eval-every", 400, "--val", tmp_path / kind]
    code, *_ = call(
        train_dvae, "--tiny", "--data", tmp_path / kind, "--run-dir", tmp_path, *options
    )
    assert code == 0 and last(tmp_path, "dvae", "codes") > least


def test_codes_in_use_are_those_of_the_last_512_pictures():
    """Against a count from the start, of three micro-batches an update; another process's codes
    count too."""
    encoder, rng = torch.nn.Identity(), random.Random(0)  # whose input are the logits
    in_use = CodesInUse(encoder, 64)
    others = torch.zeros(64)
    both = argparse.Namespace(size=2, mean=lambda used: (used + others) / 2)
    pictures = []  # the codes of each update
    for step in range(230):
        others.zero_()[rng.randrange(64)] = 1
        seen = set(others.nonzero().flatten().tolist())
        for _ in range(3):
            tokens = torch.randint(rng.randrange(1, 65), (8, 2, 2))
            encoder(F.one_hot(tokens, 64).permute(0, 3, 1, 2).float())
            seen |= set(tokens.flatten().tolist())
        in_use.end_update(step, 48, both)
        pictures.append(seen)
        expected = len(set().union(*pictures[-11:]))  # 10 updates of 48 are 480
        assert in_use.count == (expected if step >= 199 else 64)


def test_few_codes_are_said_once_and_weigh_the_kl_term_more(tmp_path, monkeypatch):
    def three(self, *_):
        self.tokens, self.count = [], 3

    monkeypatch.setattr(CodesInUse, "end_update", three)
    found = {"val_psnr": 9.0, "codes": 3, "elb": 0.0, "relaxed_elb": 0.0}
    monkeypatch.setattr(train_dvae, "evaluate", lambda *_: found)
    options = ["--steps", 300, "--eval-every", 100, "--batch-size", 1, "--workers", 0]
    code, out, err = call(train_dvae, "--tiny", "--run-dir", tmp_path, *options)
    assert code == 0 and out.count("only 3 of 256 codes are in use") == 1
    assert "begin again with twice the --kl-weight" in out
    assert last(tmp_path, "dvae", "kl_weight") == 4 * train_dvae.PRESETS["tiny"]["kl_weight"]


def test_held_out_captions_that_leave_no_pad():
    sizes = dict(n_layer=1, n_head=1, d_head=8, text_len=4, grid=2, text_vocab=9, image_vocab=5)
    model, image = Transformer(TransformerConfig(**sizes)), torch.zeros(2, 4, dtype=torch.long)
    text = torch.stack([pad_text(ids, 4, 9) for ids in ([1, 2, 3], [4, 5, 6])])
    scores = train_prior.evaluate(model, text, image, 2)
    assert scores["val_pad_loss"] == 0 and all(map(math.isfinite, scores.values()))
    assert scores["val_real_text_loss"] == scores["val_text_loss"] > 0
