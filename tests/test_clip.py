"""The contrastive loss against loops, alone and over two processes; the reranker's training."""

import itertools
import math
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scripts import log_of

import train_clip
from bpe import BPE
from clip import CLIP, CLIPConfig, contrastive_loss
from data.loader import images_to
from data.toy import BACKGROUNDS, PAIRS, SEEN_PAIRS, SIZES, Scene, Thing, render
from dvae import DVAE, DVAEConfig
from engine.checkpoint import load_model
from engine.cli import start
from scale import parallel
from scale.parallel import World

SHIPPED = Path(__file__).resolve().parent.parent / "pretrained/tiny"
SMALL = CLIPConfig(image_size=8, patch=4, d_image=16, text_vocab=20, text_len=6, d_text=8,
                   n_layer=2, d_head=4, d_embed=12)  # fmt: skip


def small_model(seed=0):
    torch.manual_seed(seed)
    return CLIP(SMALL).double()


def pairs(count, config=SMALL, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    images = torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)
    text = torch.full((count, config.text_len), config.text_vocab)
    for k in range(count):
        n = k % config.text_len
        text[k, :n] = torch.randint(config.text_vocab, (n,), generator=generator)
    return images, text


def test_the_defaults_are_vit_b_32():
    """The released model has 151,277,313 parameters, 512 of them for a start of text."""
    with torch.device("meta"):
        model = CLIP(CLIPConfig())
    assert sum(p.numel() for p in model.parameters()) == 151_277_313 - 512
    t = train_clip.CLIPTraining()
    assert (t.batch_size, t.lr, t.warmup_steps, t.weight_decay) == (32_768, 5e-4, 2000, 0.2)
    assert (t.beta1, t.beta2, t.eps) == (0.9, 0.98, 1e-6)
    assert train_clip.PRESETS["paper"] == {}


def test_loss_is_the_double_loop():
    model, (images, text) = small_model(), pairs(5)
    loss, metrics = model.loss(images, text)
    u, v = model.encode_image(images).tolist(), model.encode_text(text).tolist()
    scale = math.exp(model.log_scale.item())
    logits = [[scale * sum(a * b for a, b in zip(u[i], v[j])) for j in range(5)] for i in range(5)]
    total = 0.0
    for i in range(5):
        row = sum(math.exp(logits[i][j]) for j in range(5))
        column = sum(math.exp(logits[j][i]) for j in range(5))
        total -= math.log(math.exp(logits[i][i]) / row) + math.log(math.exp(logits[i][i]) / column)
    assert loss.item() == pytest.approx(total / 10, rel=1e-6)
    assert metrics["loss"].item() == loss.item()
    found = sum(max(range(5), key=lambda j: logits[i][j]) == i for i in range(5))
    assert metrics["accuracy"].item() == pytest.approx(found / 5)


def test_gradient_is_the_finite_difference():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    s = torch.tensor(1.7, dtype=torch.float64)
    u, v, s = (x.requires_grad_() for x in (u, v, s))
    torch.autograd.gradcheck(lambda u, v, s: contrastive_loss(u, v, u, v, s.exp())[0], (u, v, s))


def test_embeddings_have_length_one_and_any_size_is_read():
    model, (images, text) = small_model(), pairs(6)
    for embedded in (model.encode_image(images), model.encode_text(text)):
        assert embedded.shape == (6, 12)
        assert torch.allclose(embedded.norm(dim=1), torch.ones(6, dtype=torch.float64))
    # twice the size, each pixel repeated: the same picture
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (model.encode_image(large) * model.encode_image(images)).sum(1).min() > 0.9
    colors, bytes_, none = images[:, :1], (images * 255).byte(), images[..., :0]
    for wrong in (colors, bytes_, images.float(), images[:0], none):
        with pytest.raises(ValueError, match="expected images"):
            model.encode_image(wrong)
    for wrong in (text[:, :-1], text.int(), text[:0]):
        with pytest.raises(ValueError, match="expected"):
            model.encode_text(wrong)
    for wrong in (images[:1], images[1:]):
        with pytest.raises(ValueError, match="a text for each image"):
            model.loss(wrong, text)
    for wrong in ([20], [-1], [0, 1, 2, 3, 4, 5, 20], [1.5], [[1]], torch.tensor(1)):
        with pytest.raises(ValueError, match="ids from 0 to 19"):
            model.pad(wrong)


def test_scale_starts_at_the_published_one_and_stops_at_100():
    model, (images, text) = small_model(), pairs(5)
    assert model.scale().item() == pytest.approx(1 / 0.07)
    model.log_scale.data.fill_(9.0)
    model.loss(images, text)[0].backward()
    assert model.scale().item() == pytest.approx(100)
    assert model.log_scale.grad != 0  # it can come down again


def test_what_stands_behind_the_end_is_not_read():
    model = small_model()
    text = model.pad([3, 1, 4])
    assert text.tolist() == [3, 1, 4, 20, 20, 20]
    assert model.pad(range(9)).tolist() == [0, 1, 2, 3, 4, 20]
    assert model.pad([]).tolist() == [20] * 6
    other = text.clone()
    other[4] = 7
    longer = CLIP(replace(SMALL, text_len=11)).double()
    weights = model.state_dict()
    position = weights["text_encoder.position"]
    weights["text_encoder.position"] = torch.cat([position, torch.randn(5, 8).double()])
    longer.load_state_dict(weights)
    embedded = model.encode_text(text[None])
    assert torch.equal(model.encode_text(other[None]), embedded)
    assert torch.allclose(longer.encode_text(longer.pad([3, 1, 4])[None]), embedded)
    for changed in ([3, 1, 5], [5, 1, 4], [1, 3, 4], [3, 1]):
        assert not torch.allclose(model.encode_text(model.pad(changed)[None]), embedded, atol=1e-4)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def half_a_batch(rank, folder):
    """One of two processes: the gradients it ends with, into a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, (images, text) = small_model(), pairs(6)
    own = slice(3 * rank, 3 * rank + 3)
    world = World(rank, 2, torch.device("cpu"))
    loss_of = parallel.replicate(model, world.device)
    loss, metrics = loss_of(images[own], text[own])
    loss.backward()
    result = gradients(model) | {k: world.mean(value) for k, value in metrics.items()}
    torch.save(result, f"{folder}/{rank}.pt")
    parallel.shut_down(world)


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(half_a_batch, (str(tmp_path),), nprocs=2)
    model = small_model()
    loss, metrics = model.loss(*pairs(6))
    loss.backward()
    expected = gradients(model) | metrics
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(result[name], value, rtol=1e-6, atol=1e-9), name


def test_weights_alone_decay():
    model = small_model()
    names = {id(p): name for name, p in model.named_parameters()}
    weights, others = train_clip.decay_groups(model)
    assert len(weights["params"]) + len(others["params"]) == len(names)
    assert {"log_scale", "image_encoder.norm.weight", "text_encoder.blocks.0.out.bias"} <= {
        names[id(p)] for p in others["params"]
    }
    assert others["weight_decay"] == 0 and "weight_decay" not in weights


def test_equal_captions_count_as_one():
    """Three pictures; the second and the third have the same words."""

    class Table:
        def encode_image(self, x):
            return torch.eye(3)[[0, 1, 2]]

        def encode_text(self, x):
            return torch.tensor([[0.0, 0.9, 0.1], [0.0, 0.5, 0.8], [0.0, 0.5, 0.8]])

        def scale(self):
            return torch.tensor(1.0)

    text = torch.tensor([[1, 9], [2, 9], [2, 9]])
    scores, cosines = train_clip.evaluate(Table(), torch.zeros(3), text, 3)
    # picture 1 prefers caption 0; pictures 0 and 2 theirs (0 by the order of equals)
    assert scores["val_captions_found"] == pytest.approx(2 / 3)
    # caption 0 prefers picture 1; captions 1 and 2 picture 2, which has both their words
    assert scores["val_pictures_found"] == pytest.approx(2 / 3)
    assert cosines.shape == (3, 3)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "clip.pt"
    with pytest.raises(FileNotFoundError):
        load_model(path, CLIP, CLIPConfig)
    good = {"config": vars(SMALL), "model": CLIP(SMALL).state_dict()}
    torch.save(good, path)
    model = load_model(path, CLIP, CLIPConfig)
    assert model.config == SMALL and not model.training
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_model(path, CLIP, CLIPConfig)
    torch.save(CLIPConfig, path)  # code, which reading does not run
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_model(path, CLIP, CLIPConfig)
    for bad in (
        [1, 2],
        {"config": vars(SMALL)},
        good | {"config": vars(SMALL) | {"d_text": 16}},
        good | {"config": vars(SMALL) | {"colour": 3}},
        good | {"config": vars(SMALL) | {"patch": 3}},
        good | {"model": {}},
    ):
        torch.save(bad, path)
        with pytest.raises(ValueError) as error:
            load_model(path, CLIP, CLIPConfig)
        assert "\n" not in str(error.value)


# ---- train_clip.py -------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Calls train_clip.py here, in a directory with the shipped run's dVAE and BPE."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}

    def call(name, *args):
        (tmp_path / name).mkdir(exist_ok=True)
        for file in ("bpe.json", "dvae.pt"):
            shutil.copy(SHIPPED / file, tmp_path / name)
        command = ["train_clip.py", "--run-dir", str(tmp_path / name), "--workers", "0", *args]
        monkeypatch.setattr(sys, "argv", command)
        start(train_clip.main)
        return tmp_path / name

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


MINI = ("--n-layer", "1", "--patch", "8")


def test_a_short_run_learns(train, capsys):
    run = train("run", "--steps", "150", "--batch-size", "32", "--patch", "8")
    assert "of the captions" in capsys.readouterr().out
    assert {entry["stage"] for entry in log_of(run)} == {"clip"}
    assert log_of(run)[-1]["val_loss"] < math.log(512) - 0.2  # a guess among 512 has ln 512
    assert (run / "clip.png").stat().st_size > 0


SHORT = (*MINI, "--steps", "12", "--batch-size", "8", "--log-every", "2", "--eval-every", "12")


def test_a_resumed_run_repeats_an_uninterrupted_one(train, monkeypatch, capsys):
    whole = train("whole", *SHORT)
    steps = iter(range(1, 100))
    with monkeypatch.context() as patch:
        # asked once before the first step, and after each
        patch.setattr(World, "max", lambda *_: 130 if next(steps) == 6 else 0)
        with pytest.raises(SystemExit) as stopped:
            train("broken", *SHORT)
    assert stopped.value.code == 130 and "--resume" in capsys.readouterr().err
    assert torch.load(whole.parent / "broken" / "clip.pt", weights_only=True)["step"] == 5
    broken = train("broken", *SHORT, "--resume")
    ends = [torch.load(run / "clip.pt", weights_only=True) for run in (whole, broken)]
    assert ends[0]["step"] == ends[1]["step"] == 12
    for name, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][name]), name
    logged = [entry["step"] for entry in log_of(broken) if "loss" in entry]
    assert logged == [2, 4, 5, 6, 8, 10, 12]
    # fine-tuning starts from the weights of the file
    tuned = train("tuned", "--init-from", str(whole / "clip.pt"), "--lr", "0", *SHORT)
    weights = load_model(tuned / "clip.pt", CLIP, CLIPConfig).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in ends[0]["model"].items())


@pytest.mark.parametrize(
    "args, code, expected",
    [
        (("--batch-size", "64", "--micro-batch", "32"), 2, "every other"),
        (("--text-vocab", "400"), 2, "pieces"),
        (("--patch", "5"), 2, "multiple of patch"),
        (("--init-from", "nowhere.pt"), 2, "nowhere.pt"),
        (("--init-from", str(SHIPPED / "prior.pt")), 2, "not a CLIP checkpoint"),
        (("--data", "nowhere"), 2, "not a folder"),
        (("--beta2", "1.5"), 2, "--beta2"),
        (("--lr", "1e30", "--warmup-steps", "0", *SHORT), 1, "not finite"),
    ],
)
def test_bad_input_is_one_line(args, code, expected, train, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("run", *args)
    assert stopped.value.code == code
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.glob("run/clip*"))


@pytest.mark.parametrize(
    "missing, script", [("dvae.pt", "train_dvae"), ("bpe.json", "train_prior")]
)
def test_a_run_without_its_files(missing, script, tmp_path, monkeypatch, capsys):
    for file in {"dvae.pt", "bpe.json"} - {missing}:
        shutil.copy(SHIPPED / file, tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_clip.py", "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        start(train_clip.main)
    assert stopped.value.code == 2
    assert f"python {script}.py" in capsys.readouterr().err


def test_the_shipped_reranker_finds_every_pair():
    """Among decoded pictures of all 40 pairs, those of a caption's words come first, also for the
    five pairs that no training picture held."""
    model, bpe = load_model(SHIPPED / "clip.pt", CLIP, CLIPConfig), BPE.load(SHIPPED / "bpe.json")
    dvae = load_model(SHIPPED / "dvae.pt", DVAE, DVAEConfig)
    text = torch.stack([model.pad(bpe.encode(f"a {color} {shape}")) for color, shape in PAIRS])
    is_seen = torch.tensor([pair in SEEN_PAIRS for pair in PAIRS])
    seen, unseen = [], []
    for background, (size, radius) in itertools.product(BACKGROUNDS, SIZES.items()):
        things = [Thing(color, shape, size, 0.5, 0.5, radius) for color, shape in PAIRS]
        scenes = [Scene([thing], background, 1.0, "") for thing in things]
        pixels = torch.from_numpy(np.stack([render(scene, 32) for scene in scenes]))
        with torch.inference_mode():
            images = dvae.decode(dvae.encode(images_to(torch.device("cpu"), pixels)))
            cosines = model.encode_image(images) @ model.encode_text(text).T
        right = cosines.argmax(0) == torch.arange(len(PAIRS))
        seen.append(right[is_seen])
        unseen.append(right[~is_seen])
    assert torch.cat(seen).float().mean() > 0.9
    assert torch.cat(unseen).float().mean() > 0.7
