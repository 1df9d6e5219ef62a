"""The dVAE against numerical integration, torch.distributions and the paper's own numbers."""

import copy
import dataclasses
import math
import random

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F

from dvae import (
    DVAE,
    Decoder,
    DVAEConfig,
    Encoder,
    logit_laplace_log_prob,
    map_pixels,
    unmap_pixels,
)
from engine.checkpoint import load_model
from scale import fast

TINY = DVAEConfig(n_hid=8, n_init=6, n_groups=3, blocks_per_group=1, vocab_size=16)


def tiny(config=TINY, seed=0):
    torch.manual_seed(seed)
    return DVAE(config)


def test_logit_laplace_is_a_density_and_a_change_of_variables():
    y = torch.linspace(-60, 60, 400_001, dtype=torch.double)
    x = torch.sigmoid(y[(y > -30) & (y < 30)])
    for mu, b in ((0.0, 1.0), (1.3, 0.2), (-2.0, 0.7), (0.4, 1.5)):
        mu, ln_b = torch.tensor(mu).double(), torch.tensor(b).double().log()
        density = logit_laplace_log_prob(x, mu, ln_b).exp()
        assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-5)
        laplace = D.TransformedDistribution(
            D.Laplace(mu, ln_b.exp()), [D.transforms.SigmoidTransform()]
        )
        inside = x[(x > 1e-6) & (x < 1 - 1e-6)]
        expected = laplace.log_prob(inside)
        torch.testing.assert_close(logit_laplace_log_prob(inside, mu, ln_b), expected)


def test_phi():
    """Eq. 3, on 0 .. 255 divided by 255."""
    v = torch.arange(256)
    expected = (1 - 2 * 0.1) / 255 * v + 0.1
    torch.testing.assert_close(map_pixels(v / 255), expected)
    torch.testing.assert_close(unmap_pixels(map_pixels(v / 255)), v / 255)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_the_released_model():
    """A.1: sizes, parameter names, gains and the scale of the first weights."""
    config = DVAEConfig()
    with torch.device("meta"):
        encoder, decoder = Encoder(config), Decoder(config)
        assert encoder(torch.empty(1, 3, 256, 256)).shape == (1, 8192, 32, 32)
        assert decoder(torch.empty(1, 8192, 32, 32)).shape == (1, 6, 256, 256)
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766
    for half, kernels in ((encoder, (3, 3, 3, 1)), (decoder, (1, 3, 3, 3))):
        names = dict(half.named_parameters())
        for group in range(1, 5):
            for block in (1, 2):
                for k, size in enumerate(kernels, 1):
                    conv = f"blocks.group_{group}.block_{block}.res_path.conv_{k}"
                    assert names[f"{conv}.w"].shape[2:] == (size, size)
                    assert f"{conv}.b" in names
        assert {"blocks.input.w", "blocks.input.b"} < set(names)
        assert {"blocks.output.conv.w", "blocks.output.conv.b"} < set(names)
        assert half.blocks.group_2.block_1.post_gain == 1 / 64
    # an id path only where the width changes; 2048 maps in, 128 for the first of the decoder
    assert encoder.blocks.group_2.block_1.id_path.w.shape == (512, 256, 1, 1)
    assert not list(encoder.blocks.group_1.block_1.id_path.parameters())
    assert decoder.blocks.input.w.shape == (128, 8192, 1, 1)
    assert decoder.blocks.group_1.block_1.id_path.w.shape == (2048, 128, 1, 1)
    assert isinstance(encoder.blocks.group_1[-1], torch.nn.MaxPool2d)
    conv = tiny(DVAEConfig(n_hid=64, n_groups=3, vocab_size=64)).encoder.blocks.input
    assert conv.w.std().item() == pytest.approx(1 / math.sqrt(3 * 49), rel=0.05)
    assert not conv.b.any()


def test_upsampling_late_is_the_same_decoder():
    """Outputs, gradients and parameter names; also of a copy."""
    model = tiny(DVAEConfig(n_hid=8, n_init=6, n_groups=4, blocks_per_group=2, vocab_size=16))
    late = copy.deepcopy(model.double())
    fast.upsample_late(late.decoder)
    found = []
    for one in (model, late, copy.deepcopy(late)):
        torch.manual_seed(1)
        loss, _ = one.loss(torch.rand(2, 3, 16, 24, dtype=torch.double), 0.5, 1.0)
        loss.backward()
        found.append([loss, *(p.grad for p in one.parameters())])
        assert list(one.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_an_input_gain_makes_pixels_and_codes_differ():
    """Pixels around ½ come in around 0, and both first convolutions are as many times larger."""
    plain, even = tiny(), tiny(dataclasses.replace(TINY, input_gain=8))
    for half in ("encoder", "decoder"):
        first, larger = (getattr(m, half).blocks.input for m in (plain, even))
        torch.testing.assert_close(larger.w, 8 * first.w)
    grey = torch.full((1, 3, 15, 15), 0.5)
    assert even.encoder.blocks.input(grey)[..., 7, 7].abs().max() < 1e-5
    assert not even.decoder.blocks.input.b.any()


def test_ln_b_has_a_floor():
    """In the bound as in the distortion the density is that of the floor where ln b is below it."""
    free, floored = tiny(), tiny(dataclasses.replace(TINY, min_ln_b=-1.0))
    images = torch.rand(2, 3, 8, 8)
    for model in (free, floored):
        model.decoder.blocks.output.conv.b.data[3:] = -1.0 if model is free else -3.0
        model.decoder.blocks.output.conv.w.data[3:] = 0
    for measure in (lambda m: m.elb(images, 0.5), lambda m: m.distortion(images)):
        torch.manual_seed(0)
        expected = measure(free)
        torch.manual_seed(0)
        torch.testing.assert_close(measure(floored), expected)
    with pytest.raises(ValueError, match="min_ln_b"):
        DVAEConfig(min_ln_b=math.nan)


def test_shapes_of_any_model():
    rng = random.Random(0)
    for _ in range(6):
        config = DVAEConfig(
            4 * rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 4), rng.randint(1, 2), 7
        )
        f, b, h, w = config.factor, rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 3)
        model, images = tiny(config), torch.rand(b, 3, f * h, f * w)
        tokens = model.encode(images)
        assert tokens.shape == (b, h, w) and tokens.dtype == torch.long
        decoded = model.decode(tokens)
        assert decoded.shape == images.shape and 0 <= decoded.min() <= decoded.max() <= 1


@pytest.mark.parametrize("n_groups, size_rule", [(4, 192), (3, 48), (2, 12)])
def test_loss_is_the_bound(n_groups, size_rule):
    """Reconstruction and KL against torch.distributions, the KL weight by the size rule (A.2)."""
    config = DVAEConfig(8, 6, n_groups, 1, 16)
    model, f = tiny(config).double(), config.factor
    images = torch.rand(2, 3, 2 * f, 4 * f, dtype=torch.double)
    torch.manual_seed(3)
    loss, metrics = model.loss(images, tau=0.7, kl_weight=6.6)
    x = map_pixels(images)
    q = D.Categorical(logits=model.encoder(x).permute(0, 2, 3, 1))
    uniform = D.Categorical(logits=torch.zeros(16).double())
    kl_per_position = D.kl_divergence(q, uniform)
    torch.manual_seed(3)
    u = torch.rand_like(model.encoder(x))
    gumbel = D.Gumbel(torch.zeros(()).double(), 1).icdf(u)
    z = ((model.encoder(x) + gumbel) / 0.7).softmax(1)
    mu, ln_b = model.decoder(z).chunk(2, 1)
    base = D.Laplace(mu, ln_b.exp())
    density = D.TransformedDistribution(base, [D.transforms.SigmoidTransform()])
    recon = -density.log_prob(x).sum((1, 2, 3)).mean() / x[0].numel()
    torch.testing.assert_close(metrics["recon"], recon)
    torch.testing.assert_close(metrics["kl"], kl_per_position.mean() / size_rule)
    torch.testing.assert_close(loss, recon + 6.6 / size_rule * kl_per_position.mean())
    mse = (unmap_pixels(torch.sigmoid(mu)) - images).square().mean()
    torch.testing.assert_close(metrics["psnr"], -10 * mse.log10())

    torch.manual_seed(3)  # the bound is one at β = 1 only
    bound = (-recon - kl_per_position.mean() / size_rule).detach()
    torch.testing.assert_close(model.elb(images, 0.7), bound)
    tokens = q.probs.argmax(-1)  # without noise (2.2)
    assert torch.equal(model.encode(images), tokens)
    mu, ln_b = model.decoder(F.one_hot(tokens, 16).permute(0, 3, 1, 2).double()).chunk(2, 1)
    base = D.Laplace(mu, ln_b.exp())
    density = D.TransformedDistribution(base, [D.transforms.SigmoidTransform()])
    nats = -density.log_prob(x).mean() - math.log(0.8 / 255)  # a grey level's width behind phi
    torch.testing.assert_close(model.distortion(images), nats.detach())


def test_samples_of_q_are_distributed_as_it():
    """encode(sample=True), of footnote 6: each position's frequencies over 4,000 draws."""
    model = tiny()
    images = torch.rand(1, 3, 4, 8)
    q = model.encoder(map_pixels(images)).softmax(1)  # [1, K, 1, 2]
    drawn = model.encode(images.expand(4000, -1, -1, -1), sample=True)
    frequencies = F.one_hot(drawn, 16).float().mean(0).permute(2, 0, 1)
    assert (frequencies - q[0]).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_gradient_of_the_loss_by_finite_differences():
    model = tiny().double().to(memory_format=torch.contiguous_format)  # for view(-1)
    for name, p in model.named_parameters():
        if name.endswith(".b"):  # all 0 they would leave some ReLU right on its kink
            torch.nn.init.normal_(p, std=0.1)
    images = torch.rand(1, 3, 8, 8, dtype=torch.double)
    rng = random.Random(0)

    def loss():
        torch.manual_seed(0)
        return model.loss(images, 0.5, 2.0)[0]

    loss().backward()
    checked = 0
    for name, p in model.named_parameters():
        flat, grad = p.data.view(-1), p.grad.view(-1)
        for i in rng.sample(range(len(flat)), min(3, len(flat))):
            value, h = flat[i].item(), 1e-5
            flat[i] = value + h
            above = loss().item()
            flat[i] = value - h
            below = loss().item()
            flat[i] = value
            expected = (above - below) / (2 * h)
            assert grad[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-8), name
            checked += 1
    assert checked > 60


def test_relaxation():
    """No hard sampling in training: relaxed codes at the temperature; one-hot ones in the true
    bound, drawn with the probabilities q."""
    model = tiny()
    seen = []
    model.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.rand(64, 3, 16, 16)
    model.loss(images, 1.0, 0.0)
    model.loss(images, 1 / 16, 0.0)
    model.elb(images)
    warm, cold, hard = (z.max(1).values.mean().item() for z in seen)
    assert warm < cold < 1 and hard == 1
    for z in seen:
        torch.testing.assert_close(z.sum(1), torch.ones_like(z[:, 0]))
    q = model.encoder(map_pixels(images)).softmax(1).mean((0, 2, 3))
    drawn = torch.zeros(16)
    for _ in range(20):
        model.elb(images)
        drawn += seen[-1].mean((0, 2, 3)) / 20
    count = 20 * seen[-1][:, 0].numel()
    assert ((drawn - q).abs() < 5 * (q * (1 - q) / count).sqrt() + 1e-4).all()


def test_decode_inverts_what_the_decoder_says():
    model = tiny()
    tokens = torch.randint(16, (2, 2, 3))
    one_hot = torch.nn.functional.one_hot(tokens, 16).permute(0, 3, 1, 2).float()
    mu = model.decoder(one_hot)[:, :3]
    expected = ((torch.sigmoid(mu) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(model.decode(tokens), expected)


def test_convolutions_next_to_the_relaxation_stay_in_32_bits():
    model = tiny()
    kinds = {}
    for name, module in model.named_modules():
        if name.endswith(("encoder.blocks.output.conv", "decoder.blocks.input", "block_1")):
            module.register_forward_hook(lambda m, a, y, n=name: kinds.__setitem__(n, y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(torch.rand(1, 3, 8, 8), 1.0, 1.0)
    assert loss.dtype == torch.float32
    assert kinds["encoder.blocks.output.conv"] == torch.float32
    assert kinds["decoder.blocks.input"] == torch.float32
    assert kinds["encoder.blocks.group_2.block_1"] == torch.bfloat16


def test_bad_input_is_refused():
    model, good = tiny(), torch.rand(1, 3, 8, 8)
    for bad, match in (
        (good[0], r"\[B, 3, H, W\]"),
        (good[:, :2], r"\[B, 3, H, W\]"),
        (good.mul(255).byte(), "float32"),
        (good.double(), "float32.*float64"),
        (good.half(), "float32.*float16"),
        (good[:0], "none of them 0"),
        (good[..., :0], "none of them 0"),
        (good[..., :7], "multiples of 4"),
    ):
        with pytest.raises(ValueError, match=match):
            model.encode(bad)
        with pytest.raises(ValueError, match=match):
            model.loss(bad, 1.0, 1.0)
        with pytest.raises(ValueError, match=match):
            model.encoder(bad)
    none = torch.zeros(0, 2, 2).long()
    for tokens in (torch.zeros(1, 2, 2), none, none.transpose(0, 1)):
        with pytest.raises(ValueError, match="expected tokens"):
            model.decode(tokens)
    codes = torch.rand(1, 16, 2, 2)
    for bad in (codes[:, :15], codes.double(), codes[..., :0]):
        with pytest.raises(ValueError, match="codes"):
            model.decoder(bad)
    with pytest.raises(ValueError, match="n_hid"):
        DVAEConfig(n_hid=0)


def test_load(tmp_path):
    model, path = tiny(), tmp_path / "dvae.pt"
    torch.save({"config": vars(TINY), "model": model.state_dict()}, path)
    loaded = load_model(path, DVAE, DVAEConfig)
    assert loaded.config == TINY
    images = torch.rand(1, 3, 8, 8)
    assert (loaded.encode(images) == model.encode(images)).all()
    torch.save({"config": vars(TINY) | {"n_hid": 16}, "model": model.state_dict()}, path)
    with pytest.raises(ValueError, match="not a DVAE checkpoint"):
        load_model(path, DVAE, DVAEConfig)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(path, DVAE, DVAEConfig)
