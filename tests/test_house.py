"""The house, from the code: eight files that a reader meets, four rooms, who imports whom."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = {"dvae", "bpe", "transformer", "clip"}
SCRIPTS = {"train_dvae", "train_prior", "train_clip", "sample"}
ROOMS = {"data", "engine", "scale", "lab"}
MAY_IMPORT = {  # besides a room's own files
    "components": set(),
    "data": set(),
    "scale": COMPONENTS,
    "engine": COMPONENTS | {"data", "scale"},
    "scripts": COMPONENTS | {"data", "scale", "engine"},
    "lab": COMPONENTS | SCRIPTS | {"data", "scale", "engine"},
}


def modules():
    """{dotted name: path} of all that is ours, tests apart."""
    rooms = [path for room in ROOMS for path in (ROOT / room).glob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in [*ROOT.glob("*.py"), *rooms]
    }


def imports(path, known):
    """The modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & known


def kind_of(name):
    top = name.split(".")[0]
    return "components" if top in COMPONENTS else "scripts" if top in SCRIPTS else top


def test_eight_files_and_four_rooms():
    assert {path.stem for path in ROOT.glob("*.py")} == COMPONENTS | SCRIPTS
    for room in ROOMS:
        sign = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
        assert len(sign.body) == 1 and ast.get_docstring(sign)


def test_who_imports_whom():
    known = modules()
    for name, path in known.items():
        kind = kind_of(name)
        for other in imports(path, set(known)):
            top = other.split(".")[0]
            if top != name.split(".")[0]:
                assert top in MAY_IMPORT[kind], f"{name} imports {other}"


def test_no_circle():
    known = modules()
    left = {name: imports(path, set(known)) - {name} for name, path in known.items()}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"
