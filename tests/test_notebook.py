"""docs/walkthrough.ipynb as it lies there: valid, run from top to bottom, small. `make notebook`
runs it; nothing here does."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "docs/walkthrough.ipynb"
NOTEBOOK = json.loads(PATH.read_text("utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_of_format_4():
    assert NOTEBOOK["nbformat"] == 4
    pytest.importorskip("nbformat").validate(NOTEBOOK)


def test_every_cell_was_run_in_order_and_none_failed():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds and kinds <= {"stream", "display_data", "execute_result"}, cell["id"]


def test_outputs_are_small_and_of_no_one_machine():
    """Neither a warning nor a path, which a traceback, a repr or a progress bar would leave."""
    assert PATH.stat().st_size < 2**20
    for cell in CODE:
        for output in cell["outputs"]:
            assert output.get("name") != "stderr", cell["id"]
            text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
            assert not re.search(r"/\w+/|\w:\\| at 0x|[Ww]arning", text), text


def test_ten_sections_each_with_its_place_in_the_paper():
    titles = []
    for before, cell in zip(NOTEBOOK["cells"], NOTEBOOK["cells"][1:]):
        text = "".join(before["source"])
        if title := re.match(r"## (\d+)\. .+ \((?:\d|[A-G]\b).*\)\n", text):
            titles.append(int(title[1]))
            assert cell["cell_type"] == "code" and len(text.splitlines()) > 2
    assert titles == list(range(1, 11)) and len(CODE) == 11  # the first imports


def test_what_it_imports_exists():
    names = 0
    for cell in CODE:
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                names += len([getattr(module, alias.name) for alias in node.names])
    assert names > 10
