"""
Tables and figures of what the components are made of, to look at beside the paper.

    python -m lab.figures layers          # the paper's dVAE, layer by layer (A.1)
    python -m lab.figures logit-laplace   # the density of Eq. 2
    python -m lab.figures photo PHOTO     # a picture beside what its tokens decode to
    python -m lab.figures originals SPEC  # originals over what their tokens decode to (Fig. 1)
    python -m lab.figures best            # rows of the best of 1, 8 and 64 (Fig. 6)
    python -m lab.figures masks           # the masks of Fig. 11, and the prior's size (B.1)

Of photographs Fig. 1 needs a dVAE trained on some, or OpenAI's, where its files are at hand:
python -m engine.openai encoder.pkl decoder.pkl --run-dir runs/openai, then --run-dir runs/openai.
"""

import math
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from data.files import middle_square, open_dataset, read_image
from data.loader import images_to
from data.sheets import GAP, sheet, to_images
from data.toy import toy_scene
from dvae import DVAE, EPS, Decoder, DVAEConfig, Encoder, logit_laplace_log_prob
from engine.checkpoint import load, load_model, write_picture
from engine.cli import Parser, check_output, start
from engine.log import save, subplots
from sample import draw
from scale.formats import matrices
from train_dvae import reconstructions
from transformer import Transformer, TransformerConfig, attention_mask, layer_kind

SIZES = 1, 8, 64  # candidates, of the rows of Fig. 6


def print_layers(half: nn.Module, x: Tensor) -> None:
    """The name, output shape and number of parameters of each layer of `half` on x."""
    print(f"{type(half).__name__:<28}{'output':<22}{'parameters':>12}")
    total = 0
    for name, group in half.blocks.named_children():
        layers = group.named_children() if name.startswith("group") else [("", group)]
        for part, layer in layers:
            x = layer(x)
            count = sum(p.numel() for p in layer.parameters())
            total += count
            label = f"{name}.{part}".rstrip(".")
            print(f"{label:<28}{' × '.join(map(str, x.shape[1:])):<22}{count:>12,}")
    print(f"{'':<50}{total:>12,}\n")


def draw_logit_laplace():
    """The density of Eq. 2 for a few mu and b; dotted, where phi of Eq. 3 puts black and white. A
    matplotlib Figure; ValueError where matplotlib is not there."""
    figure, (axis,) = subplots(1, width=8)
    x = torch.linspace(1e-3, 1 - 1e-3, 1000)
    for mu, b in ((0.0, 1.0), (0.0, 0.5), (-1.2, 0.6), (1.2, 2.0)):
        density = logit_laplace_log_prob(x, torch.tensor(mu), torch.tensor(math.log(b))).exp()
        axis.plot(x, density, label=f"$\\mu$ = {mu:g}, $b$ = {b:g}")
    for edge in (EPS, 1 - EPS):
        axis.axvline(edge, color="grey", linestyle=":")
    axis.set(xlabel="$x$", ylabel=r"$f(x \mid \mu, b)$", xlim=(0, 1), ylim=(0, 5))
    axis.set_title("logit-Laplace (Eq. 2); dotted: black and white (Eq. 3)")
    axis.legend()
    return figure


@torch.inference_mode()
def draw_beside_reconstruction(photo: Path, model: DVAE, path: Path) -> None:
    """A picture, cut to whole grid cells, beside what its tokens decode to."""
    img, f = read_image(photo.read_bytes()), model.config.factor
    width, height = img.width // f * f, img.height // f * f
    if not width or not height:
        raise ValueError(f"{photo}: {img.width} × {img.height} pixels; expected at least {f} × {f}")
    pixels = torch.from_numpy(np.array(img.crop((0, 0, width, height))))
    images = images_to(torch.device("cpu"), pixels[None])
    tokens = model.encode(images)
    decoded = model.decode(tokens)
    psnr = -10 * torch.log10((decoded - images).square().mean()).item()
    write_picture(path, to_images(torch.cat([images, decoded], dim=3))[0])
    h, w = tokens.shape[1:]
    print(f"{width} × {height} pixels beside {h} × {w} tokens decoded, {psnr:.1f} dB")


def draw_originals(spec: str, run_dir: Path) -> Image.Image:
    """Fig. 1: eight pictures of a data set over what the tokens of a run's dVAE decode to."""
    about = load(run_dir / "dvae.pt")
    model = load_model(run_dir / "dvae.pt", DVAE, DVAEConfig, about)
    size, pixels = about["image_size"], []
    _, pictures = open_dataset(spec, size, val=spec, captions=False)
    for i in range(len(pictures)):
        try:
            pixels.append(
                np.array(middle_square(pictures[i][0], size, size // model.config.factor))
            )
        except ValueError as error:
            print(error)
        if len(pixels) == 8:
            break
    if not pixels:
        raise ValueError(f"{spec}: none of {len(pictures)} pictures can be read")
    return reconstructions(
        model, images_to(torch.device("cpu"), torch.from_numpy(np.stack(pixels)))
    )


def draw_best(prompts: list[str], sizes: tuple[int, ...], **options) -> Image.Image:
    """Fig. 6: a column for each prompt; for each N of `sizes`, the last the largest, a row of the
    best of the first N candidates by the reranker."""
    drawn = draw(prompts, sizes[-1], top=sizes[-1], **options)
    groups = [drawn[k : k + sizes[-1]] for k in range(0, len(drawn), sizes[-1])]
    best = [[next(x for x in group if x.info["candidate"] < n) for group in groups] for n in sizes]
    above = sheet(sum(best[:-1], []), columns=len(prompts))
    last = sheet(best[-1], prompts, columns=len(prompts))
    whole = Image.new("RGB", (last.width, above.height + GAP + last.height), "white")
    whole.paste(above, (0, 0))
    whole.paste(last, (0, above.height + GAP))
    return whole


def draw_masks() -> Image.Image:
    """Fig. 11: each square is a position i that may (dark) or may not (light) attend to j."""
    T, G, cell = 6, 4, 16
    size = cell * (T + G * G)
    columns = torch.arange(T, T + G * G).view(G, G).T.flatten()
    transposed = torch.cat([torch.arange(T), columns])
    column = attention_mask("column", T, G)
    masks = {
        "(a) row": attention_mask("row", T, G),
        "(b) column": column,
        "(c) column, image states transposed": column[transposed][:, transposed],
        "(d) convolutional, kernel 3": attention_mask("conv", T, G, kernel=3),
    }
    picture = Image.new("RGB", (2 * size + 3 * cell, 2 * size + 6 * cell), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(cell)
    for p, (title, mask) in enumerate(masks.items()):
        left, top = cell + p % 2 * (size + cell), 2 * cell + p // 2 * (size + 3 * cell)
        pen.text((left, top - 1.5 * cell), title, "black", font)
        for i, j in product(range(len(mask)), repeat=2):
            dark, light = ("#3f72b5", "#dfe8f5") if j < T else ("#3d9a62", "#e0f1e6")
            x, y = left + j * cell, top + i * cell
            pen.rectangle((x, y, x + cell, y + cell), dark if mask[i, j] else light, "white")
        edge = T * cell
        pen.line((left, top + edge, left + size, top + edge), "black", 2)
        pen.line((left + edge, top, left + edge, top + size), "black", 2)
    return picture


def print_prior(config: TransformerConfig) -> None:
    """The weights and the order of the layers of a prior (B.1)."""
    with torch.device("meta"):
        model = Transformer(config)
    in_matrices = sum(p.numel() for _, p in matrices(model))
    everything = sum(p.numel() for p in model.parameters())
    print(f"{config.n_layer} layers, {config.n_head} heads, d = {config.d_model}")
    print(f"{in_matrices:>15,} weights in the matrices of the {len(model.blocks)} resblocks")
    print(f"{everything:>15,} with embeddings, heads, gains and biases")
    print("layers:", *(layer_kind(i, config.n_layer) for i in range(1, config.n_layer + 1)))


def main() -> None:
    parser = Parser(description=__doc__.strip().split("\n")[0])
    figures = parser.add_subparsers(dest="figure", metavar="FIGURE", required=True)
    figures.add_parser("layers", help="table of the paper's dVAE (A.1)")
    curve = figures.add_parser("logit-laplace", help="the density of Eq. 2")
    curve.add_argument("-o", "--out", metavar="FILE", type=Path, default=Path("logit_laplace.png"),
        help="default logit_laplace.png")  # fmt: skip
    photo = figures.add_parser("photo", help="a picture beside its reconstruction")
    photo.add_argument("photo", metavar="PHOTO", type=Path, help="a picture")
    photo.add_argument("--run-dir", metavar="DIR", type=Path, default=Path("pretrained/tiny"),
        help="whose dVAE; default pretrained/tiny")  # fmt: skip
    photo.add_argument("-o", "--out", metavar="FILE", type=Path, default=Path("reconstruction.png"),
        help="default reconstruction.png")  # fmt: skip
    fig1 = figures.add_parser("originals", help="pictures over their reconstructions (Fig. 1)")
    fig1.add_argument("spec", nargs="?", default="toy", help="toy (default), folder, table, tars")
    fig1.add_argument("--run-dir", metavar="DIR", type=Path, default=Path("pretrained/tiny"))
    fig1.add_argument("-o", "--out", metavar="FILE", type=Path, default=Path("fig1.png"))
    fig6 = figures.add_parser("best", help="the best of 1, 8 and 64, for eight captions (Fig. 6)")
    fig6.add_argument("prompt", nargs="*", help="default: eight held-out ones of the toy world")
    fig6.add_argument("--run-dir", metavar="DIR", type=Path, help="default: the newest run")
    fig6.add_argument("-o", "--out", metavar="FILE", type=Path, default=Path("fig6.png"))
    masks = figures.add_parser("masks", help="Fig. 11, and the paper's prior (B.1)")
    masks.add_argument("-o", "--out", metavar="FILE", type=Path, default=Path("fig11.png"),
        help="default fig11.png")  # fmt: skip
    args = parser.parse_args()
    if args.figure == "layers":
        config = DVAEConfig()
        with torch.device("meta"):
            print_layers(Encoder(config), torch.empty(1, 3, 256, 256))
            print_layers(Decoder(config), torch.empty(1, config.vocab_size, 32, 32))
        return
    check_output(args.out, ".png")
    if args.figure == "logit-laplace":
        save(draw_logit_laplace(), args.out)
    if args.figure == "photo":
        model = load_model(args.run_dir / "dvae.pt", DVAE, DVAEConfig)
        draw_beside_reconstruction(args.photo, model, args.out)
    if args.figure == "originals":
        write_picture(args.out, draw_originals(args.spec, args.run_dir))
    if args.figure == "best":
        scenes = [toy_scene(k, split) for split in ("val", "unseen") for k in range(4)]
        prompts = args.prompt or [scene.caption for scene in scenes]
        write_picture(args.out, draw_best(prompts, SIZES, run_dir=args.run_dir))
    if args.figure == "masks":
        print_prior(TransformerConfig())
        write_picture(args.out, draw_masks())
    print(args.out)


if __name__ == "__main__":
    start(main)
