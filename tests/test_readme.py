"""What the README and docs/ point at exists, and what the paper has is pointed at."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.name: path.read_text("utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
}
PAPER = (
    "2, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 3.1, 3.2, 3.3, A.1, A.2, A.3, B.1, B.2, C, D, D.1, D.2, "
    "D.3, E.1, E.2, F, G, Eq. 1, Eq. 2, Eq. 3, Fig. 1, Fig. 2, Fig. 3, Fig. 4, Fig. 5, Fig. 6, "
    "Fig. 7, Fig. 8, Fig. 9, Fig. 10, Fig. 11, Fig. 12, Fig. 13, Fig. 14, Listing 1, Listing 2, "
    "Table 1, Table 2, "
    "footnote 4, footnote 6, footnote 7, footnote 12"
).split(", ")


def rows(text):
    """The cells of each row of a page's tables."""
    return [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", text, re.MULTILINE)]


@pytest.mark.parametrize("page", ["README.md", "map.md", "readings.md"])
def test_every_name_exists(page):
    """A name of code stands behind its file: `dvae.py` `DVAE.terms`."""
    checked = 0
    for line in PAGES[page].splitlines():
        if not line.startswith(("| ", "- ")) or ".py`" not in line:
            continue
        module = None
        for name in re.findall(r"`([A-Za-z_.0-9/]+)`", line):
            if name.endswith(".py"):
                module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
            elif module and not name.startswith("torch."):
                found = module
                for part in name.split("."):
                    found = getattr(found, part)
                checked += 1
    assert checked > 10


def test_every_part_of_the_paper_has_a_row():
    labels = {label for row in rows(PAGES["map.md"]) for label in row[0].split(", ")}
    assert not set(PAPER) - labels


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_link_and_script_exists(page):
    base = ROOT if page == "README.md" else ROOT / "docs"
    for path in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (base / path).is_file(), path
    for name in re.findall(r"python (\w+\.py)", PAGES[page]):
        assert (ROOT / name).is_file(), name
    for module in re.findall(r"python -m ((?:data|engine|scale|lab)\.\w+)", PAGES[page]):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_the_readme_is_a_page():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 200 and len(text) <= 12_000
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| .* \| (\d+) \|", text, re.MULTILINE):
        assert int(lines) == len((ROOT / name).read_text("utf-8").splitlines()), name


def test_a_shipped_model_has_a_page():
    """It names every file beside it."""
    for folder in (ROOT / "pretrained").iterdir():
        text = (folder / "README.md").read_text("utf-8")
        for path in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / path).is_file(), path
        for path in folder.iterdir():
            assert path.name == "README.md" or f"`{path.name}`" in text, path
