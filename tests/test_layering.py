"""Who may import whom, read from the source of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Inside dwf a part imports parts of lower rows. Those of the first row may import each other, in
# any order without a circle; all others of one row never see each other.
LAYERS = [
    ["checks", "config", "files", "progress", "checkpoint", "distributed", "typed_json"],
    ["data", "attacks", "models"],
    ["defenses"],
    ["evaluation"],
    ["training"],
    ["presets"],
    ["compat", "doctor", "export", "foreign", "report"],
    ["cli"],
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in the file it does."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            above = package[: len(package) + 1 - node.level] if node.level else ()
            origin = ".".join((*above, *([node.module] if node.module else [])))
            for alias in node.names:
                yield f"{origin}.{alias.name}"


def part_of(path: Path) -> str:
    """The part of dwf that a file belongs to: its folder, or itself."""
    return path.relative_to(ROOT / "dwf").parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


INSIDE = [path for path in sources("dwf") if part_of(path) not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", INSIDE, ids=name)
def test_dwf_imports_downward(path):
    part = part_of(path)
    assert part in LEVEL, f"{name(path)}: a new part of dwf needs a place in LAYERS"
    for imported in imports(path):
        top, _, rest = imported.partition(".")
        if top != "dwf":
            continue
        other = rest.split(".")[0]
        if other not in LEVEL:
            assert other == "__version__", f"{name(path)} imports {imported}"
        elif other != part:
            allowed = LEVEL[other] < LEVEL[part] or LEVEL[other] == LEVEL[part] == 0
            assert allowed, f"{name(path)} imports {imported}"


def test_lowest_row_has_no_circle():
    seen_by = {
        part: {
            imported.split(".")[1]
            for path in INSIDE
            if part_of(path) == part
            for imported in imports(path)
            if imported.startswith("dwf.")
        }
        for part in LAYERS[0]
    }
    while seen_by:
        leaves = [part for part, seen in seen_by.items() if not seen & seen_by.keys() - {part}]
        assert leaves, f"a circle among {sorted(seen_by)}"
        for part in leaves:
            del seen_by[part]


@pytest.mark.parametrize("path", sources("dwf"), ids=name)
def test_dwf_knows_kernels_by_function_only(path):
    assert not [x for x in imports(path) if x.split(".")[0] == "triton"]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and node.attr == "ops":
            owner = node.value
            assert not (isinstance(owner, ast.Name) and owner.id == "torch"), (
                f"{name(path)}:{node.lineno}: torch.ops"
            )
    assert "torch.ops" not in set(imports(path))
    private = [x for x in imports(path) if x.startswith("moe_kernels._")]
    assert not private, f"{name(path)} imports {private}"


@pytest.mark.parametrize("path", sources("moe_kernels"), ids=name)
def test_kernels_know_nothing_of_dwf(path):
    assert not [x for x in imports(path) if x.split(".")[0] == "dwf"]


@pytest.mark.parametrize("path", sources("dwf", "moe_kernels"), ids=name)
def test_nothing_imports_tests_or_benchmarks(path):
    outside = {"tests", "benchmarks", "pytest"}
    outside |= {file.stem for file in sources("tests", "benchmarks")}
    for imported in imports(path):
        assert imported.split(".")[0] not in outside, f"{name(path)} imports {imported}"


def test_only_the_bindings_see_pybind11_and_nothing_sees_torch():
    files = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
    assert files
    for path in files:
        included = [
            line.split(maxsplit=1)[1]
            for line in path.read_text().splitlines()
            if line.lstrip().startswith("#include ")
        ]
        assert not [x for x in included if "torch" in x or "ATen" in x or "c10" in x], name(path)
        if path.name != "bindings.cpp":
            assert not [x for x in included if "pybind11" in x or "Python.h" in x], name(path)


@pytest.mark.parametrize("path", sources("dwf", "moe_kernels", "benchmarks"), ids=name)
def test_no_file_is_unpickled(path):
    """CIFAR's original files are pickles: torchvision reads them, once their hash is right."""
    for imported in imports(path):
        assert imported.split(".")[0] not in ("pickle", "dill", "joblib", "shelve", "marshal")
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        assert ast.unparse(node.func) != "torch.load", f"{name(path)}:{node.lineno}: torch.load"
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            said = keyword.arg, value
            assert said != ("allow_pickle", "True"), f"{name(path)}:{node.lineno}"
            assert said != ("weights_only", "False"), f"{name(path)}:{node.lineno}"


@pytest.mark.parametrize("path", sources("dwf", "moe_kernels"), ids=name)
def test_no_exception_is_swallowed_whole(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            where = f"{name(path)}:{node.lineno}"
            assert node.type is not None, f"{where}: bare except"
            only_pass = all(isinstance(line, ast.Pass) for line in node.body)
            assert not only_pass, f"{where}: except: pass"


def test_every_folder_is_accounted_for():
    assert {part_of(path) for path in INSIDE} <= LEVEL.keys()
    assert not list(ROOT.glob("dwf/**/utils.py"))
    assert not list(ROOT.glob("moe_kernels/**/utils.py"))
