"""What the README points at exists, and what the paper has is pointed at."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAPER = (
    "2, 2.1, 2.2, 2.4, 2.5, 2.6, 3.3, A.1, A.2, A.3, B.1, B.2, C, D, E, G, Eq. 1, Eq. 2, Eq. 3, "
    "Fig. 4, Fig. 5, Fig. 10, Fig. 11, Fig. 12, Listing 1, Listing 2, Table 1, Table 2"
).split(", ")


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title):
    """The cells of each row of a section's tables, without the heads."""
    found = re.findall(r"^\| (.*) \|$", section(title), re.MULTILINE)
    return [row.split(" | ") for row in found if not row.startswith("---")][1:]


@pytest.mark.parametrize("title", ["Paper → code", "Our readings"])
def test_every_name_exists(title):
    lines = [line for line in section(title).splitlines() if line.startswith(("| ", "- "))]
    checked = 0
    for line in lines:
        module = None
        for name in re.findall(r"`([A-Za-z_.0-9/]+)`", line.split(" | ")[-1]):
            if name.endswith(".py"):
                module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
                checked += 1
            else:
                found = module
                for part in name.split("."):
                    found = getattr(found, part)
                checked += 1
    assert checked > len(lines)


def test_every_part_of_the_paper_has_a_row():
    labels = {label for row in rows("Paper → code") for label in row[0].split(", ")}
    assert not set(PAPER) - labels


def test_every_picture_link_and_script_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"(?:`|python |torchrun [^\n`]*?)([\w/]+\.py)", README):
        assert (ROOT / name).is_file(), name


def test_every_file_is_in_the_table():
    named = {name for row in rows("The files") for name in re.findall(r"`([\w/]+\.py)`", row[0])}
    rooms = [p for room in ("data", "engine", "scale", "lab") for p in (ROOT / room).glob("*.py")]
    files = {str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.py"), *rooms]}
    assert named == {f for f in files if not f.endswith("__init__.py")}
