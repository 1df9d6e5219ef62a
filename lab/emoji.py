"""
What a run has learned of the emoji that `python -m data.emoji` makes.

Is the style right? So say three small networks, the judge, that learn the three styles from what
the dVAE makes of the true pictures, as they are and with cells of others in them, since a prior's
have wrong ones; all but those of every tenth concept, which say how reliable it is.
Is the concept right? That is the rank of the true picture among all pictures of its style, by the
distance of their pixels at 16 × 16. Both for pairs of concept and style that training held, and for
pairs of which it held neither picture nor caption (3.3). Is it memory? A sheet shows, beside what
is drawn for unseen pairs, the true picture and the nearest one in training: six that are right, by
rank among the first five, then three that are not.

    python -m lab.emoji                                     # the newest run, the folder emoji
    python -m lab.emoji DIR --run-dir runs/emoji --candidates 32
"""

import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data.emoji import STYLES
from data.files import open_pictures
from data.listings import area_resize, to_8_bits
from data.loader import derive, images_to
from data.sheets import sheet, to_images
from engine.checkpoint import check_holds, load_run, write_picture
from engine.cli import Parser, check_output, start
from lab.judge import CPU, best_of, draw_candidates
from sample import find_run
from train_dvae import evaluate

NAMES = sorted(STYLES)
STEPS, BATCH = 3000, 64  # of training each network of the judge
FLAWS = 0.4  # most of a picture's cells that are another's, in half of what it learns from
SHOWN = {True: 6, False: 3}  # unseen pairs on the sheet, right and wrong ones

# ---- the true pictures, and how near others are to them ------------------------------------------


def views_of(image: Image.Image, size: int) -> np.ndarray:
    """What Listing 2 can make of a picture: all of it, and at 9/8 of the size its middle and its
    corners, uint8 [6, size, size, 3]."""
    d = round(9 / 8 * size) - size
    whole, larger = (to_8_bits(area_resize(np.asarray(image), t)) for t in (size, size + d))
    corners = [(d // 2, d // 2), (0, 0), (0, d), (d, 0), (d, d)]
    return np.stack([whole, *(larger[y : y + size, x : x + size] for y, x in corners)])


def look(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] as they are compared, slightly blurred: at 16 × 16, [B, 768]."""
    return F.adaptive_avg_pool2d(images, 16).flatten(1)


def distances(images: Tensor, looks: Tensor) -> Tensor:
    """Squared distances of images [B, 3, H, W] to n pictures, each by the nearest of its looks
    [n, V, 768]: [B, n]."""
    found = torch.cdist(look(images), looks.flatten(0, 1)).square()
    return found.unflatten(1, looks.shape[:2]).amin(2)


def ranks(distance: Tensor, true: Tensor) -> Tensor:
    """The place, from 1, of picture `true` [B] by distance [B, n]: [B]. Equals do not count against
    it, for some emoji are drawn alike."""
    return 1 + (distance < distance.gather(1, true[:, None]) - 1e-3).sum(1)


class Gallery:
    """The pictures of a folder that `data.emoji` has made: of picture k its style and code `keys`,
    its code in whatever skin tone `concepts`, a `captions` such as "a Fluent rocket", the table
    `parts` that holds it, the number of its style `styles` [n], its views `pixels` uint8 [n, V, H,
    W, 3], and their `looks` [n, V, 768]; `kept` [n], bool: the judge of styles does not see it.

    ValueError for a folder that is none.
    """

    def __init__(self, folder: Path, size: int):
        if not (folder / "unseen.tsv").is_file():
            raise ValueError(
                f"{folder} holds no unseen.tsv; make it: python -m data.emoji {folder}"
            )
        found = []
        for part in ("train", "val", "unseen"):
            table = open_pictures(str(folder / f"{part}.tsv"), captions=True, filters=False)
            found += [(table.files[i], part, table, i) for i in range(len(table))]
        found.sort(key=lambda row: row[:2])
        self.keys = [tuple(file.removesuffix(".png").split("/")) for file, *_ in found]
        self.parts = np.array([part for _, part, *_ in found])
        self.concepts = [re.sub("-1f3f[b-f]", "", code) for _, code in self.keys]
        tenth = set(sorted(set(self.concepts))[::10])
        self.kept = torch.tensor([concept in tenth for concept in self.concepts])
        items = [table[i] for *_, table, i in tqdm(found, desc="pictures")]
        self.captions = [captions[0] for _, captions in items]
        self.styles = torch.tensor([NAMES.index(style) for style, _ in self.keys])
        self.pixels = torch.from_numpy(np.stack([views_of(image, size) for image, _ in items]))
        self.looks = torch.stack([look(images_to(CPU, views)) for views in self.pixels])

    def places(self, images: Tensor, true: Tensor) -> Tensor:
        """The ranks [B] of pictures `true` [B], all of one style, among all of that style."""
        style = self.styles[true[0]]
        first, last = torch.searchsorted(self.styles, torch.stack([style, style + 1])).tolist()
        return ranks(distances(images, self.looks[first:last]), true - first)


@torch.no_grad()
def decoded(dvae, tokens: Tensor) -> Tensor:
    """The images of tokens [n, h, w]: [n, 3, H, W]."""
    return torch.cat([dvae.decode(x) for x in tokens.split(BATCH)])


def flawed(tokens: Tensor) -> Tensor:
    """Of tokens [n, h, w] a share of 0 to FLAWS in each picture, drawn evenly, becomes what another
    of the pictures has in the same place."""
    wrong = torch.rand(tokens.shape) < FLAWS * torch.rand(len(tokens), 1, 1)
    return torch.where(wrong, tokens[torch.randperm(len(tokens))], tokens)


def train_styles(images: Tensor, styles: Tensor) -> nn.Module:
    """A network from images [B, 3, H, W] to scores of the styles, trained on images [n, 3, H, W]
    and their mirror images."""
    layers = []
    for n_in, n_out, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(n_in, n_out, 3, stride, 1), nn.BatchNorm2d(n_out), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(NAMES)))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    for step in tqdm(range(STEPS), desc="styles"):
        some = torch.randint(len(images), (BATCH,))
        x = images[some].flip(3) if step % 2 else images[some]
        loss = F.cross_entropy(net(x), styles[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


class StyleJudge:
    """From images [B, 3, H, W] to the number of their style, [B], by three networks that learn from
    what a dVAE makes of tokens [n, h, w] of the styles [n] and, each, from that with other flaws.
    They are asked about the mirror image too."""

    def __init__(self, dvae, tokens: Tensor, styles: Tensor):
        self.nets, images = [], decoded(dvae, tokens)
        for _ in range(3):
            with_flaws = decoded(dvae, flawed(tokens))
            self.nets.append(train_styles(torch.cat([images, with_flaws]), styles.repeat(2)))

    def __call__(self, images: Tensor) -> Tensor:
        asked = [net(x).softmax(1) for net in self.nets for x in (images, images.flip(3))]
        return torch.stack(asked).sum(0).argmax(1)


# ---- what a run draws ----------------------------------------------------------------------------


def measure_dvae(dvae, gallery: Gallery, kinds: dict[str, Tensor], judge: StyleJudge) -> None:
    """Print how well the pictures come back that were not trained on, and what the two measures
    say of each kind: of the true pictures [n, 3, H, W], which come first, of what the dVAE makes of
    them, than which no prior can do better, and of that with flaws."""
    new = torch.from_numpy(np.flatnonzero(gallery.parts != "train"))
    by_style = [gallery.styles[new] == k for k in gallery.styles[new].unique()]
    true, *_ = kinds.values()
    scores = evaluate(dvae, true[new], BATCH, 1 / 16)
    print(
        f"dVAE: {scores['val_psnr']:.2f} dB on {len(new)} pictures that were not trained on, "
        f"{scores['codes']} of {dvae.config.vocab_size} codes in use"
    )
    for name, images in kinds.items():
        style = judge(images[gallery.kept]) == gallery.styles[gallery.kept]
        place = torch.cat([gallery.places(images[new[of]], new[of]) for of in by_style])
        top = [(place <= n).float().mean() for n in (1, 5)]
        print(
            f"{name}: style right {style.float().mean():.1%} (concepts new to the judge), "
            f"concept top 1 {top[0]:.1%}, top 5 {top[1]:.1%}"
        )


def measure_prompts(
    run, gallery: Gallery, judge: StyleJudge, part: str, count: int, candidates: int, seed: int
) -> tuple[list[int], Tensor, Tensor]:
    """Print how often style and concept are right for `count` captions of a part: by one sample, by
    the best of the candidates by the reranker, and by any. The pictures asked for, the best images
    [count, 3, H, W], and which of these are right, bool [count]."""
    known = [k for k in np.flatnonzero(gallery.parts == part).tolist()
             if len(run.bpe.encode(gallery.captions[k])) < run.prior.config.text_len]  # fmt: skip
    asked = random.Random(derive(seed, part)).sample(known, min(count, len(known)))
    style, place, scores, best = [], [], [], []
    captions = [gallery.captions[k] for k in asked]
    for (images, score), k in zip(draw_candidates(run, captions, candidates, seed), asked):
        style.append(judge(images) == gallery.styles[k])
        place.append(gallery.places(images, torch.full((candidates,), k)))
        scores.append(score)
        best.append(images[score.argmax()])
    place, scores = torch.stack(place), torch.stack(scores)
    print(f"{len(asked)} pairs of {part}, %     one sample   best of {candidates}   any of them")
    goods = {"style": torch.stack(style), "top 1": place <= 1, "top 5": place <= 5}
    for name, good in goods.items():
        shares = [best_of(scores, good, n) for n in (1, candidates)] + [good.any(1).float()]
        line = (f"{100 * x.mean():6.1f} ± {100 * x.std() / len(x) ** 0.5:3.1f}" for x in shares)
        print(f"  {name} right         {'   '.join(line)}")
    found = place.gather(1, scores.argmax(1, keepdim=True))[:, 0] <= 5
    return asked, torch.stack(best), found


def measure_memory(gallery: Gallery, asked: list[int], best: Tensor, found: Tensor) -> Image.Image:
    """Print what the nearest training picture of each of the best images shows; a sheet of some of
    them, `found` or not, each beside the true picture and the nearest one of training."""
    trained = torch.from_numpy(gallery.parts == "train")
    kinds = {"the same in another style": 0, "another in the right style": 0, "neither": 0}
    rows, nearer = {True: [], False: []}, 0
    for k, image, is_found in zip(asked, best, found.tolist()):
        distance = distances(image[None], gallery.looks)[0]
        nearest = distance.masked_fill(~trained, torch.inf).argmin().item()
        same = gallery.concepts[nearest] == gallery.concepts[k]
        right = gallery.styles[nearest] == gallery.styles[k]
        kinds[list(kinds)[0 if same else 1 if right else 2]] += 1
        nearer += (distance[k] < distance[nearest]).item()
        row = to_images(torch.stack([image, *images_to(CPU, gallery.pixels[[k, nearest], 0])]))
        captions = gallery.captions[k], "true picture", f"nearest: {gallery.captions[nearest]}"
        rows[is_found] += zip(row, captions)
    shares = ", ".join(f"{name} {count / len(asked):.1%}" for name, count in kinds.items())
    print(f"nearest training picture of the best for unseen pairs: {shares}")
    print(f"the true picture, unseen, is nearer than any of training: {nearer / len(asked):.1%}")
    cells = [cell for is_found, some in rows.items() for cell in some[: 3 * SHOWN[is_found]]]
    return sheet(*map(list, zip(*cells)), columns=9)


def main() -> None:
    parser = Parser(description="Measure a run on the emoji.")
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=Path("emoji"), help="of data.emoji; default: emoji")
    add("--run-dir", metavar="DIR", type=Path, help="default: the newest run")
    add("--prompts", type=int, default=100, help="of each kind (default 100)")
    add("--candidates", type=int, default=32, metavar="N", help="default 32")
    add("--seed", type=int, default=0)
    add("-o", "--out", type=Path, default=Path("emoji.png"), metavar="FILE")
    args = parser.parse_args()
    if args.prompts < 2 or args.candidates < 1:
        raise ValueError("expected --prompts of 2 or more, and --candidates of 1 or more")
    check_output(args.out)
    run_dir = args.run_dir or find_run()
    check_holds(run_dir, "clip.pt")
    run = load_run(run_dir)
    gallery = Gallery(args.folder, run.dvae.config.factor * run.prior.config.grid)
    print(f"{run_dir}, {args.folder}: {len(gallery.keys)} pictures")
    torch.manual_seed(0)
    whole = images_to(CPU, gallery.pixels[:, 0])
    tokens = torch.cat([run.dvae.encode(x) for x in whole.split(BATCH)])
    through, with_flaws = decoded(run.dvae, tokens), decoded(run.dvae, flawed(tokens))
    judge = StyleJudge(run.dvae, tokens[~gallery.kept], gallery.styles[~gallery.kept])
    with torch.inference_mode():
        kinds = {"true pictures": whole, "the dVAE's of them": through, "with flaws": with_flaws}
        measure_dvae(run.dvae, gallery, kinds, judge)
        for part in ("train", "unseen"):
            drawn = measure_prompts(
                run, gallery, judge, part, args.prompts, args.candidates, args.seed
            )
        top1 = len(NAMES) / len(gallery.keys)
        print(f"by chance: style {1 / len(NAMES):.1%}, top 1 {top1:.2%}, top 5 {5 * top1:.2%}")
        write_picture(args.out, measure_memory(gallery, *drawn))
    print(f"{args.out}: drawn for unseen pairs, the true picture, the nearest one in training")


if __name__ == "__main__":
    start(main)
