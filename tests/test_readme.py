"""What the README points at exists."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_name_of_the_table_exists():
    table = README.split("## Paper → code")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .* \| .* \| (`.*) \|$", table, re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        module = None
        for name in re.findall(r"`([^`]+)`", row):
            if name.endswith(".py"):
                module = importlib.import_module(name.removesuffix(".py"))
            else:
                found = module
                for part in name.split("."):
                    found = getattr(found, part)


def test_every_picture_and_file_exists():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / name).is_file(), name
