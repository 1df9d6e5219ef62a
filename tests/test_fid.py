"""FID against closed forms and another way to compute it, IS against loops, Fig. 9 drawn."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import call

from lab import fid
from lab.judge import Judge

SHIPPED = Path(__file__).resolve().parent.parent / "pretrained/tiny"


def sample_of(mean, factor, n=50, seed=0):
    """n points whose mean and covariance are exactly `mean` and factor · factorᵀ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(mean), generator=generator, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5
    return x @ factor.T + mean


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_frechet_distance_has_its_closed_forms():
    """One dimension; equal covariances; axes in common; none of these, where C_a C_b is a square:
    with C_a = [[2, 1], [1, 1]]² and C_b = 1 the root of the product is [[2, 1], [1, 1]]."""
    a = sample_of(vector(3, 0), vector([2, 0], [0, 0]))  # a second one that is constant
    b = sample_of(vector(-1, 0), vector([5, 0], [0, 0]), n=80)
    assert fid.frechet_distance(a, b) == pytest.approx((3 + 1) ** 2 + (2 - 5) ** 2)
    assert fid.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)

    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    s, t, m = vector(1, 2, 3, 0), vector(4, 0.5, 3, 2), vector(1, -1, 0, 2)
    a, b = sample_of(0 * m, turn * s), sample_of(m, turn * t, seed=1)
    distance = m.square().sum() + (s - t).square().sum()
    assert fid.frechet_distance(a, b) == pytest.approx(distance.item())

    root, zero = vector([2, 1], [1, 1]), vector(0, 0)
    a, b = sample_of(zero, root), sample_of(zero, torch.eye(2, dtype=torch.float64), seed=1)
    assert fid.frechet_distance(a, b) == pytest.approx(7 + 2 - 2 * 3)


def test_frechet_distance_another_way():
    """The eigenvalues of C_a C_b, which is not symmetric, in numpy; also with more dimensions than
    points, where both covariances are singular."""
    for n, d in ((40, 6), (8, 12)):
        rng = np.random.default_rng(n)
        a, b = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(1, 2, (n + 3, d))
        C_a, C_b = np.cov(a.T), np.cov(b.T)
        roots = np.sqrt(np.linalg.eigvals(C_a @ C_b).astype(complex)).real.sum()
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(C_a + C_b) - 2 * roots
        found = fid.frechet_distance(torch.tensor(a), torch.tensor(b))
        assert found == pytest.approx(expected, rel=1e-4)


def test_inception_score_is_its_definition():
    p = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)).double()
    p[0, 2] = 0
    p /= p.sum(1, keepdim=True)
    of_class = [sum(row[y] for row in p.tolist()) / 7 for y in range(5)]
    kl = [sum(q * math.log(q / of_class[y]) for y, q in enumerate(row) if q) for row in p.tolist()]
    assert fid.inception_score(p) == pytest.approx(math.exp(sum(kl) / 7))
    assert fid.inception_score(torch.eye(5)) == pytest.approx(5)
    assert fid.inception_score(p[:1].expand(3, 5)) == pytest.approx(1)


def test_the_blur_is_a_gaussian():
    """A point of light, blurred at radius 8, which is a pixel at 32 × 32, has that spread."""
    judge, image = Judge().eval(), torch.zeros(1, 3, 32, 32)
    image[:, :, 16, 16] = 1
    seen = []
    judge.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features, p = fid.look(judge, image, 8)
    fid.look(judge, image, 0)
    assert features.shape == (1, 128) and p.shape == (1, 40)
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(seen[1], image)
    row = seen[0][0, 0].sum(0).double()
    place = torch.arange(32) - 16
    assert row.sum().item() == pytest.approx(1, abs=1e-5)
    assert (row * place**2).sum().item() == pytest.approx(1, abs=2e-3)
    assert row[18] / row[16] == pytest.approx(math.exp(-2), abs=1e-5)


def test_figure_9_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "reliable_judge", lambda: Judge().eval())
    monkeypatch.setattr(fid, "REFERENCE", 30)
    out = tmp_path / "fig9.png"
    options = ["--run-dir", SHIPPED, "--prompts", 5, "--candidates", 4, "-o", out]
    code, said, _ = call(fid, *options)
    assert code == 0 and Image.open(out).size == (960, 448)
    of_n = [line for line in said.splitlines() if line.startswith("candidates N; seen pairs")]
    assert len(of_n) == 2 and "1: " in of_n[0] and "4: " in of_n[0]
    code, _, error = call(fid, *options, "--candidates", 3)
    assert code == 2 and "power of 2" in error and error.count("\n") == 1
