"""
Pictures in and out: read and cut for a model, on a contact sheet, in a terminal, in a file.
"""

import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from engine import checkpoint


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [0, 1] to PIL images."""
    pixels = pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(x) for x in pixels.cpu().numpy()]


def contact_sheet(cells: list[tuple[Image.Image, str]], columns: int) -> Image.Image:
    """Pictures with their labels below, in so many columns, each enlarged to at least 256 pixels,
    or to 128 where there are more than four columns."""
    least, gap, line = (256, 8, 18) if columns <= 4 else (128, 6, 16)
    scale = -(-least // cells[0][0].width)
    width, height = cells[0][0].width * scale, cells[0][0].height * scale
    font = ImageFont.load_default(line - 4)
    labels = [
        [text for part in label.split("\n") for text in textwrap.wrap(part, width // (line // 2))]
        for _, label in cells
    ]
    below = line * max(map(len, labels))
    step, rows = height + below + gap, -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * step - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for k, ((image, _), label) in enumerate(zip(cells, labels)):
        x, y = k % columns * (width + gap), k // columns * step
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for i, text in enumerate(label):
            pen.text((x + 2, y + height + i * line), text, "black", font)
    return sheet


def terminal(image: Image.Image, columns: int) -> str:
    """A picture in 24-bit colours: a character is two pixels, "▀" in the colour of the upper one
    before that of the lower one."""
    width = min(image.width, columns)
    height = 2 * max(1, round(image.height * width / image.width / 2))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BOX)).tolist()
    lines = []
    for upper, lower in zip(pixels[0::2], pixels[1::2]):
        colors = ((*u, *v) for u, v in zip(upper, lower))
        line = "".join("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*c) for c in colors)
        lines.append(line + "\x1b[0m")
    return "\n".join(lines)


def check_output(path: Path, *kinds: str) -> None:
    """ValueError where a picture could not be written to `path` later. Leaves nothing behind."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in (kinds or Image.SAVE):
        suffix = kinds[0].lower() if kinds else "png"
        raise ValueError(f"{path}: expected the name of a picture, such as cube.{suffix}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{path} is a folder or write-protected: choose another name")
    probe = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        Image.new("RGB", (8, 8)).save(probe, kind)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be written ({error})") from error
    finally:
        probe.unlink(missing_ok=True)


def write(image: Image.Image, path: Path, record: str = "", **options) -> None:
    """Write a picture whole or not at all; a PNG keeps the record."""
    kind = Image.registered_extensions()[path.suffix.lower()]
    if kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("dalle", record)
    checkpoint.write(path, lambda file: image.save(file, kind, **options))


def sheet(
    rows: list[list[np.ndarray]], captions: list[list[str]] | None = None, scale: int = 1
) -> Image.Image:
    """Rows of equal-sized uint8 [H, W, 3] images as one picture, each enlarged `scale` times,
    each with its caption below it where there are captions. The first row is the longest."""
    height, width = rows[0][0].shape[:2]
    cell_w, cell_h = width * scale + 4, height * scale + 4
    text_h = 62 if captions else 0  # four lines
    picture = Image.new("RGB", (len(rows[0]) * cell_w, len(rows) * (cell_h + text_h)), "white")
    draw = ImageDraw.Draw(picture)
    for r, row in enumerate(rows):
        for c, pixels in enumerate(row):
            img = Image.fromarray(pixels).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            x, y = c * cell_w + 2, r * (cell_h + text_h) + 2
            picture.paste(img, (x, y))
            if captions:
                wrapped = textwrap.wrap(captions[r][c], width * scale // 6)
                draw.multiline_text((x, y + height * scale), "\n".join(wrapped[:4]), "black")
    return picture
