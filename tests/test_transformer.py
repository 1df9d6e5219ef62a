"""transformer.py against Fig. 11 and definitions written out independently of it, and scale/fast.py
against transformer.py."""

import copy
import math
from functools import partial
from types import MethodType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import transformer
from scale import fast
from transformer import (
    Attention,
    Transformer,
    TransformerConfig,
    attention_mask,
    layer_kind,
    pad_text,
    sample_token,
)

KINDS = ["row", "column", "conv"]

# The image part of Fig. 11 with a 4 × 4 grid and kernel 3, by hand from the caption and (B.1).
FIG_11 = {
    "row": """
        #...............
        ##..............
        ###.............
        ####............
        #####...........
        .#####..........
        ..#####.........
        ...#####........
        ....#####.......
        .....#####......
        ......#####.....
        .......#####....
        ........#####...
        .........#####..
        ..........#####.
        ...........#####""",
    "column": """
        #...............
        .#..............
        ..#.............
        ...#............
        #...#...........
        .#...#..........
        ..#...#.........
        ...#...#........
        #...#...#.......
        .#...#...#......
        ..#...#...#.....
        ...#...#...#....
        #...#...#...#...
        .#...#...#...#..
        ..#...#...#...#.
        ...#...#...#...#""",
    "conv": """
        #...............
        ##..............
        .##.............
        #.##............
        ##.##...........
        ###.##..........
        .###.##.........
        ..###.##........
        ...###.##.......
        ....###.##......
        .....###.##.....
        ......###.##....
        .......###.##...
        ........###.##..
        .........###.##.
        ..........###.##""",
}
TEXT_PART = ["#" + "." * 21, "##" + "." * 20, "###" + "." * 19]
TEXT_PART += ["####" + "." * 18, "#####" + "." * 17, "######" + "." * 16]


def small(n_layer=4, text_len=5, grid=4, kernel=3, **kw):
    sizes = {"n_head": 2, "d_head": 4, "text_vocab": 20, "image_vocab": 13, **kw}
    return TransformerConfig(n_layer, text_len=text_len, grid=grid, kernel=kernel, **sizes)


def build(config, seed=0):
    """A float64 model with weights large enough that everything matters to the output."""
    torch.manual_seed(seed)
    model = Transformer(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def batch(config, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, config.text_len, (n,), generator=g).tolist()
    ids = [torch.randint(0, config.text_vocab, (k,), generator=g) for k in lengths]
    text = torch.stack([pad_text(i, config.text_len, config.text_vocab) for i in ids])
    return text, torch.randint(0, config.image_vocab, (n, config.grid**2), generator=g)


def dense(block, x):
    """The attention resblock, written with the dense mask."""
    c, (B, S, d) = block.config, x.shape
    q, k, v = block.qkv(block.norm(x)).view(B, S, 3, c.n_head, c.d_head).permute(2, 0, 3, 1, 4)
    mask = attention_mask(block.kind, c.text_len, c.grid, c.kernel)
    logits = (q @ k.transpose(2, 3) / math.sqrt(c.d_head)).masked_fill(~mask, -math.inf)
    return block.out((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, S, d))


def both(model, *args, **kw):
    """What is drawn, by the readable form and by the fast one alike."""
    images = model.generate(*args, **kw)
    assert torch.equal(fast.generate(model, *args, **kw), images)
    return images


def draw_uncached(model, text, start, n, u, warp=lambda p: p):
    """The loop of definitions: run everything for each token and invert its distribution."""
    image = start.clone()
    for k in range(n, image.shape[1]):
        p = warp(model(text, image)[1][:, k].softmax(-1))
        for row in range(len(image)):
            mass, token = 0.0, -1
            while mass <= u[row, k] * p[row].sum():
                token += 1
                mass += p[row, token]
            image[row, k] = token
    return image


# ---- masks and order ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_figure_11(kind):
    rows = TEXT_PART + ["######" + row.strip() for row in FIG_11[kind].split()]
    drawn = torch.tensor([[cell == "#" for cell in row] for row in rows])
    assert torch.equal(attention_mask(kind, text_len=6, grid=4, kernel=3), drawn)


@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3, 5, 11]))
@settings(max_examples=40, deadline=None)
def test_mask_follows_the_definition_pair_by_pair(kind, T, G, kernel):
    def sees(i, j):
        if j > i:
            return False
        if i < T or j < T:
            return True
        d, h = i - j, (kernel - 1) // 2
        if kind == "row":
            return d <= G
        if kind == "column":
            return (i - T) % G == (j - T) % G
        return any(d - r * G in range(-h, h + 1) for r in range(h + 1))

    S = T + G * G
    expected = torch.tensor([[sees(i, j) for j in range(S)] for i in range(S)])
    assert torch.equal(attention_mask(kind, T, G, kernel), expected)


def test_order_of_the_layers():
    kinds = [layer_kind(i, 64) for i in range(1, 65)]
    assert kinds[:8] == ["row", "column", "row", "row", "row", "column", "row", "row"]
    assert [i for i, kind in enumerate(kinds, 1) if kind == "column"] == list(range(2, 63, 4))
    assert [i for i, kind in enumerate(kinds, 1) if kind == "conv"] == [64]
    assert [layer_kind(i, 2) for i in (1, 2)] == ["row", "conv"]
    built = [block.kind for block in Transformer(small(n_layer=6)).blocks[0::2]]
    assert built == ["row", "column", "row", "row", "row", "conv"]


# ---- attention equals its definition, and sees the past only ------------------------------------


@given(
    st.sampled_from(KINDS),
    st.integers(1, 7),
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]),
    st.sampled_from([1, 3, 5, 11]),
    st.integers(1, 3),
    st.sampled_from([1, 3, 8, 20, 128]),
)
@settings(max_examples=40, deadline=None)
def test_layer_equals_its_definition_forward_and_backward_also_in_blocks(kind, T, G, kernel, B, n):
    torch.manual_seed(T * G)
    block = Attention(small(text_len=T, grid=G, kernel=kernel), kind).double()
    x = torch.randn(B, T + G * G, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    inputs = [x, *block.parameters()]
    reference = dense(block, x)
    expected = torch.autograd.grad((reference * weight).sum(), inputs)
    with mock.patch.object(fast, "BLOCK", n):
        fast.block_masks.cache_clear()
        forms = block(x), fast.attend_in_blocks(block, x)
    fast.block_masks.cache_clear()
    for form in forms:
        torch.testing.assert_close(form, reference, rtol=1e-9, atol=1e-12)
        gradients = torch.autograd.grad((form * weight).sum(), inputs)
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-11)


def test_a_model_in_blocks_is_the_same_model():
    """It draws, is averaged and read from a checkpoint as before, and blocks do leave keys out."""
    c = small(text_len=3, grid=16, kernel=5)
    model = build(c)
    text, image = batch(c, 2)
    expected, names = model.loss(text, image)[0], list(model.state_dict())
    u = torch.rand(2, 256, dtype=torch.float64)
    drawn = both(model, text, image[:, :240], u)
    fast.use_blocks(model)
    average = copy.deepcopy(model)
    assert average.blocks[0].forward.__self__ is average.blocks[0]
    assert list(average.state_dict()) == names
    for m in (model, average):
        torch.testing.assert_close(m.loss(text, image)[0], expected, rtol=1e-12, atol=0)
        assert torch.equal(both(m, text, drawn[:, :255], u), drawn)
    kept = [m.numel() for kind in KINDS for _, m in fast.block_masks(kind, 3, 16, 5, text.device)]
    assert sum(kept) < 0.75 * 3 * 256 * 259
    untouched = build(small())
    fast.use_blocks(untouched)  # less than a block
    assert "forward" not in vars(untouched.blocks[0])


def test_linear_layers_as_convolutions_are_the_same_model(monkeypatch):
    """Values and gradients, its average's too; only where a CPU has AVX-512."""
    c = small()
    model = build(c)
    text, image = batch(c, 3)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model.loss(text, image)[0], parameters)
    u = torch.rand(3, 16, dtype=torch.float64)
    drawn = both(model, text, image[:, :3], u)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    fast.use_convolutions(model)
    assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    fast.use_convolutions(model)
    average = copy.deepcopy(model)
    for m in (model, average):
        assert m.blocks[1].up.forward.__self__ is m.blocks[1].up
        found = torch.autograd.grad(m.loss(text, image)[0], list(m.parameters()))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(both(m, text, image[:, :3], u), drawn)
    c = small(text_len=1)  # start-of-text alone
    model = build(c)
    fast.use_convolutions(model)
    assert model.loss(*batch(c, 3))[1]["text_loss"] == 0


def test_linear_layers_by_onednn_are_the_same():
    """oneDNN takes float32 alone, and with one thread 16 samples and more."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 20)
    x = torch.randn(16, 7, 48, requires_grad=True)
    leaves = (x, linear.weight, linear.bias)
    expected, found = linear(x), fast.linear_as_convolution(linear, x)
    torch.testing.assert_close(found, expected)
    expected, found = (torch.autograd.grad(y.square().sum(), leaves) for y in (expected, found))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_allowed_key_influences_and_no_other(kind):
    c = small(text_len=3, grid=4, kernel=3)
    torch.manual_seed(0)
    block = Attention(c, kind).double()
    x = torch.randn(1, 19, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x).sum((0, 2)), x)[:, 0]
    assert torch.equal(jacobian.abs().sum(-1) > 0, attention_mask(kind, 3, 4, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_no_position_sees_the_future(kind, monkeypatch):
    monkeypatch.setattr(transformer, "layer_kind", lambda i, n_layer: kind)
    c = small(n_layer=2)
    model = build(c).float()
    text, image = batch(c, 1)
    with torch.no_grad():
        before = model(text, image)
        for i in range(1, c.text_len):  # the token at i is fed at i and predicted at i − 1
            changed = text.clone()
            changed[0, i] = (text[0, i] + 1) % c.text_vocab
            after = model(changed, image)
            assert torch.equal(before[0][:, :i], after[0][:, :i])
            assert (before[1] != after[1]).any(-1).all(), "all image positions see all of the text"
        for k in range(c.grid**2):  # the token of cell k is fed at position k + 1
            changed = image.clone()
            changed[0, k] = (image[0, k] + 1) % c.image_vocab
            after = model(text, changed)
            assert torch.equal(before[0], after[0])
            assert torch.equal(before[1][:, : k + 1], after[1][:, : k + 1])
            assert k == c.grid**2 - 1 or (before[1][:, k + 1] != after[1][:, k + 1]).any()


# ---- text, loss, sizes -------------------------------------------------------------------------


def test_pad_text():
    assert pad_text([5, 7, 2], 6, 100).tolist() == [
        100,
        5,
        7,
        2,
        104,
        105,
    ]  # the caption of Fig. 11
    assert pad_text([], 3, 100).tolist() == [100, 101, 102]
    assert pad_text(torch.tensor([1, 2]), 3, 100).tolist() == [100, 1, 2]
    assert pad_text([1], 3, 100).dtype == torch.long
    for ids in ([1, 2, 3], [100], [-1], [0.5], [[1]], torch.tensor(1)):
        with pytest.raises(ValueError):
            pad_text(ids, 3, 100)


def test_pads_are_learned_attended_and_predicted():
    c = small()
    model = build(c)
    text = pad_text([3], c.text_len, c.text_vocab)[None]
    _, image = batch(c, 1)
    pads = [c.text_vocab + i for i in range(2, c.text_len)]

    model(text, image)[1].square().sum().backward()  # through the image's logits alone
    rows = model.text_token.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows == [3, c.text_vocab, *pads]

    model.zero_grad()
    text_logits, _ = model(text, image)
    assert text_logits.shape == (1, c.text_len - 1, c.text_vocab + c.text_len)
    loss = F.cross_entropy(text_logits[0], torch.tensor([3, *pads]))
    torch.testing.assert_close(model.loss(text, image)[1]["text_loss"], loss.detach())


def test_loss_weights_one_eighth_and_seven_eighths():
    c = small()
    model = build(c)
    text, image = batch(c, 3)
    text_logits, image_logits = model(text, image)

    def mean_nats(logits, targets):
        nats = [
            math.log(sum(math.exp(z) for z in logits[b, i])) - logits[b, i, targets[b, i]].item()
            for b in range(targets.shape[0])
            for i in range(targets.shape[1])
        ]
        return sum(nats) / len(nats)

    text_loss = mean_nats(text_logits.detach(), text[:, 1:])
    image_loss = mean_nats(image_logits.detach(), image)
    loss, metrics = model.loss(text, image)
    assert metrics["text_loss"].item() == pytest.approx(text_loss, abs=1e-10)
    assert metrics["image_loss"].item() == pytest.approx(image_loss, abs=1e-10)
    assert loss.item() == pytest.approx(text_loss / 8 + 7 * image_loss / 8, abs=1e-10)
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())


def test_logits_are_32_bit_under_autocast():
    c = small()
    model = Transformer(c)
    with torch.autocast("cpu", torch.bfloat16):
        text_logits, image_logits = model(*batch(c, 2))
    assert text_logits.dtype == image_logits.dtype == torch.float32
    x = torch.randn(2, 3, c.d_model)
    for head in (model.text_head, model.image_head):  # computed so, and not only stored (D.2)
        expected = model.logits(head, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.logits(head, x), expected)


def test_the_stream_is_that_of_figure_10():
    c = small(text_len=6)
    model, image = build(c), torch.arange(16) % c.image_vocab
    text = pad_text([5, 7, 2], 6, c.text_vocab)
    held = [c.text_vocab, 5, 7, 2, c.text_vocab + 4, c.text_vocab + 5]  # start, pads of 4 and 5
    words, places = model.text_token.weight, model.text_position.weight
    stream = [words[y] + places[i] for i, y in enumerate(held)]
    for k in range(16):
        before = image[k - 1] if k else c.image_vocab  # start-of-image
        cell = model.image_row.weight[k // 4] + model.image_column.weight[k % 4]
        stream.append(model.image_token.weight[before] + cell)
    torch.testing.assert_close(model.embed(text[None], image[None])[0], torch.stack(stream))


def test_the_full_model_has_twelve_billion_weights():
    with torch.device("meta"):
        model = Transformer(TransformerConfig())
    assert model.config.d_model == 3968 and len(model.blocks) == 128
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert matrices == 12_092_178_432


def test_initialisation_also_after_meta():
    c = small(n_layer=8, n_head=4, d_head=16, text_vocab=300, image_vocab=300)
    with torch.device("meta"):
        model = Transformer(c)
    model.to_empty(device="cpu").reset_parameters()
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            assert (p == float(name.endswith("norm.weight"))).all(), name
        else:
            is_linear = "head" in name or "blocks" in name
            std = 0.5 / math.sqrt(p.shape[1]) if is_linear else 0.02
            std /= math.sqrt(16) if "out.weight" in name else 1
            assert p.std().item() == pytest.approx(std, rel=6 / math.sqrt(p.numel())), name
    loss, _ = model.loss(*batch(c, 64))
    uniform = math.log(c.text_vocab + c.text_len) / 8 + math.log(c.image_vocab) * 7 / 8
    # of x with variance 1 the heads make logits of variance 1/4: their ln Σ exp is larger by half
    assert loss.item() == pytest.approx(uniform + 1 / 8, rel=0.02)


# ---- generation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "B, repeats", [(1, [1]), (8, [8]), (8, [4, 4]), (8, [3, 5]), (6, [1, 2, 1, 2])]
)
@pytest.mark.parametrize("n", [0, 1, 7, 12])
def test_cached_generation_equals_uncached(B, repeats, n):
    c = small(grid=4, n_layer=4)
    model = build(c, seed=B)
    prompts, image = batch(c, len(repeats), seed=n)
    text = prompts.repeat_interleave(torch.tensor(repeats), 0)
    image = image.repeat_interleave(torch.tensor(repeats), 0)
    u = torch.rand(B, 16, dtype=torch.float64)
    expected = draw_uncached(model, text, image, n, u)
    assert torch.equal(both(model, text, image[:, :n], u), expected)


@pytest.mark.parametrize(
    "T, G, kernel, n_layer", [(1, 1, 1, 1), (2, 2, 11, 2), (3, 3, 5, 3), (4, 6, 3, 3)]
)
def test_generation_of_odd_sizes_and_different_prefixes(T, G, kernel, n_layer):
    c = small(n_layer, T, G, kernel)
    model = build(c)
    text, image = batch(c, 3)
    text[1:] = text[0]
    u = torch.rand(3, G * G, dtype=torch.float64)
    for n in {0, 1, G * G // 2, G * G}:
        expected = draw_uncached(model, text, image, n, u)
        assert torch.equal(both(model, text, image[:, :n], u), expected)
    assert model.loss(text, image)[0].isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_attention_equals_dense_and_the_graph_draws_what_is_drawn_uncached():
    c = small()
    model = build(c).cuda()
    text, image = (t.cuda() for t in batch(c, 8))
    for block in model.blocks[0::2]:
        x = torch.randn(2, c.text_len + 16, 8, dtype=torch.float64, device="cuda")
        expected = dense(copy.deepcopy(block).cpu(), x.cpu())
        torch.testing.assert_close(block(x).cpu(), expected, rtol=1e-9, atol=1e-11)
    u = torch.rand(8, 16, dtype=torch.float64, device="cuda")
    expected = draw_uncached(model, text, image, 3, u)
    assert torch.equal(both(model, text, image[:, :3], u), expected)


def test_candidates_do_not_depend_on_one_another():
    c = small()
    model = build(c)
    text = batch(c, 1)[0].expand(8, -1)
    u = torch.rand(8, 16, dtype=torch.float64)
    images = both(model, text, uniforms=u)
    assert torch.equal(images[:4], both(model, text[:4], uniforms=u[:4]))
    assert torch.equal(images[3:4], both(model, text[3:4], uniforms=u[3:4]))
    assert len(images.unique(dim=0)) == 8


class Recorder(TorchDispatchMode):
    """What a CUDA graph does to a step, on CPU: the same operations on the same buffers, again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        new = {}
        for func, args, kwargs, out in self.calls:
            args, kwargs = tree_map(lambda t: new.get(id(t), t), (args, kwargs))
            for old, result in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                new[id(old)] = result


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.8, "guidance": 2.0}])
@pytest.mark.parametrize("B, dtype", [(1, torch.float64), (8, torch.float64), (8, torch.float32)])
def test_a_recorded_step_draws_the_same_tokens(B, dtype, options, monkeypatch):
    c = small()
    model = build(c).to(dtype)
    text, image = batch(c, B)
    u = torch.rand(B, 16, dtype=dtype)
    plain = both(model, text, image[:, :2], u, **options)
    steps = []

    def captured(step, device):
        def run():
            if not steps:
                steps.append(Recorder())
                with steps[0]:
                    step()
            else:
                steps[0].replay()

        return run

    monkeypatch.setattr(fast, "captured", captured)
    assert torch.equal(fast.generate(model, text, image[:, :2], u, **options), plain)
    assert len(steps[0].calls) > 100


@pytest.mark.parametrize("repeats", [[1], [4], [4, 4], [3, 5]])
def test_guidance_equals_its_definition(repeats):
    c = small(n_layer=3)
    model = build(c)
    prompts, image = batch(c, len(repeats))
    text = prompts.repeat_interleave(torch.tensor(repeats), 0)
    image = image.repeat_interleave(torch.tensor(repeats), 0)
    empty = pad_text([], c.text_len, c.text_vocab).expand_as(text)
    u = torch.rand(len(text), 16, dtype=torch.float64)

    def guided(text, image):
        captioned, plain = model(text, image)[1], model(empty, image)[1]
        return None, 30 * captioned - 29 * plain

    expected = draw_uncached(guided, text, image, 5, u)
    assert torch.equal(both(model, text, image[:, :5], u, guidance=30.0), expected)
    plain = both(model, text, uniforms=u)
    assert torch.equal(both(model, text, uniforms=u, guidance=1.0), plain)
    assert not torch.equal(both(model, text, uniforms=u, guidance=30.0), plain)
    assert torch.equal(both(model, text, uniforms=u, guidance=0.0), both(model, empty, uniforms=u))


def test_temperature_top_k_top_p_equal_their_definitions():
    c = small()
    model = build(c)
    text, image = batch(c, 2)
    u = torch.rand(2, 16, dtype=torch.float64)

    def check(warp, **options):
        expected = draw_uncached(model, text, image, 0, u, warp)
        assert torch.equal(both(model, text, uniforms=u, **options), expected)

    def nucleus(p):
        order = p.argsort(-1, descending=True)
        keep = torch.zeros_like(p)
        for row in range(len(p)):
            for token in order[row]:
                if (p[row] * keep[row]).sum() >= 0.7:
                    break
                keep[row, token] = 1
        return p * keep

    check(lambda p: p**2 / (p**2).sum(-1, keepdim=True), temperature=0.5)
    check(lambda p: p * (p >= p.topk(3).values[:, -1:]), top_k=3)
    check(nucleus, top_p=0.7)
    check(lambda p: p, top_k=100, top_p=1.0)
    greedy = both(model, text, temperature=0)
    for tiny in (1e-38, 1e-46):
        assert torch.equal(both(model, text, temperature=tiny), greedy)
    assert torch.equal(greedy, both(model, text, top_k=1))
    assert torch.equal(greedy, both(model, text, top_p=1e-9))
    assert torch.equal(
        greedy, draw_uncached(model, text, image, 0, 0 * u, lambda p: p == p.amax(-1, keepdim=True))
    )


def test_draws_invert_the_distribution_at_its_edges():
    logits = torch.tensor([[-math.inf, 0.0, math.log(3.0), -math.inf]])
    just_below_one = 1 - 2**-24  # the largest float32
    for u, token in [(0.0, 1), (0.249, 1), (0.251, 2), (just_below_one, 2)]:
        assert sample_token(logits, torch.tensor([[u]]), 1.0, None, None).item() == token
    u = ((torch.arange(8000) + 0.5) / 8000)[:, None]
    counts = sample_token(logits.expand(8000, -1), u, 1.0, None, None).bincount(minlength=4)
    assert counts.tolist() == [0, 2000, 6000, 0]


@pytest.mark.parametrize("rows", [1, 2, 8, 40, 64])
def test_packed_linears_are_the_same_linears_and_only_while_drawing(rows):
    torch.manual_seed(rows)
    c = small(n_layer=1, n_head=1, d_head=256)
    model = Transformer(c)
    large, x = model.blocks[1].up, torch.randn(rows, 256)
    with torch.inference_mode(), fast.packed_linears(model, rows):
        available = torch.backends.mkldnn.is_available()
        assert ("forward" in vars(large)) == available
        torch.testing.assert_close(large(x), F.linear(x, large.weight, large.bias))
        # so small a one gains with many rows only
        assert ("forward" in vars(model.image_head)) == (rows == 64 and available)

    def stop(k, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast.generate(model, batch(c, 2)[0], progress=stop)
    assert not any("forward" in vars(module) for module in model.modules())
    large.forward = as_trained = MethodType(fast.linear_as_convolution, large)
    with torch.inference_mode(), fast.packed_linears(model, rows):
        assert (large.forward is not as_trained) == available
    assert large.forward is as_trained


@pytest.mark.parametrize("generate", [Transformer.generate, fast.generate])
def test_default_draws_follow_the_global_generator_and_progress_is_told(generate):
    c = small()
    model = Transformer(c)
    text, image = batch(c, 2)
    told = []
    torch.manual_seed(3)
    first = generate(model, text, image[:, :3], progress=lambda k, t: told.append((k, t.clone())))
    torch.manual_seed(3)
    assert torch.equal(first, generate(model, text, image[:, :3]))
    assert torch.equal(first[:, :3], image[:, :3])
    assert [k for k, _ in told] == list(range(4, 17))
    assert all(torch.equal(t[:, :k], first[:, :k]) for k, t in told)
    model.loss(text, image)[
        0
    ].backward()  # nothing that generation cached is in the way of training


# ---- bad input ---------------------------------------------------------------------------------


def test_bad_input_is_refused_with_what_was_expected():
    c = small()
    model = Transformer(c)
    text, image = batch(c, 2)
    refused = [
        (r"text \[B, 5\] and image \[B, 16\], got", lambda: model(text[:, :-1], image)),
        ("expected text", lambda: model(text[0], image)),
        (r"expected text .*got \[2, 5\] and \[2, 15\]", lambda: model(text, image[:, :-1])),
        (r"expected text .*got \[2, 5\] and \[1, 16\]", lambda: model.loss(text, image[:1])),
        ("odd", lambda: small(kernel=4)),
        ("grid", lambda: small(grid=0)),
        ("layers", lambda: layer_kind(0, 4)),
        ("kind", lambda: attention_mask("dense", 2, 2)),
        ("text_len", lambda: attention_mask("row", -1, 2)),
        ("grid", lambda: attention_mask("row", 2, 0)),
        *(("odd", lambda k=k: attention_mask("conv", 2, 2, kernel=k)) for k in (-3, 0, 4)),
    ]
    for generate in (model.generate, partial(fast.generate, model)):
        refused += [
            ("text must be at least 0 and below 25", lambda g=generate: g(text * 0 + 25)),
            ("expected text", lambda g=generate: g(text[:, 1:])),
            ("expected text", lambda g=generate: g(text, torch.zeros(2, 17, dtype=torch.long))),
            ("expected text", lambda g=generate: g(text, image[:1, :3])),
            ("prefix must be .* below 13", lambda g=generate: g(text, image[:, :3] * 0 + 13)),
            ("uniforms must be", lambda g=generate: g(text, uniforms=torch.ones(2, 16))),
            ("uniforms must be", lambda g=generate: g(text, uniforms=-torch.ones(2, 16))),
            ("uniforms", lambda g=generate: g(text, uniforms=torch.zeros(2, 15))),
            ("temperature", lambda g=generate: g(text, temperature=-1)),
            ("top_k", lambda g=generate: g(text, top_k=0)),
            ("top_p", lambda g=generate: g(text, top_p=0.0)),
            ("top_p", lambda g=generate: g(text, top_p=1.5)),
            ("guidance", lambda g=generate: g(text, guidance=math.inf)),
        ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()
