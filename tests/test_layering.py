"""Hold the house: who may import whom, how long a file may be, which constructions are forbidden.

Everything is read from the source; a failing test names all the places at once.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500
MAX_GLOSSARY_ENTRIES = 30
# Inside dwf a part imports parts of lower rows. Those of the first row may import each other, in
# any order without a circle; all others of one row never see each other.
LAYERS = [
    [
        *("version", "checks", "config", "files", "progress", "checkpoint", "distributed"),
        *("typed_json", "exported", "torch_file"),
    ],
    ["data", "attacks", "models"],
    ["defenses"],
    ["evaluation"],
    ["training"],
    ["presets"],
    ["bench", "compat", "doctor", "export", "foreign", "report"],
    ["published"],
    ["cli"],
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """The module of a file, and all nodes below it."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def nodes(*folders: str) -> Iterator[tuple[Path, ast.AST]]:
    """All nodes of all files, each with its file."""
    for path in sources(*folders):
        for node in nodes_of(path):
            yield path, node


def imported_names(path: Path, node: ast.AST) -> Iterator[str]:
    """Dotted names that a statement of a file imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = path.relative_to(ROOT).parent.parts
        above = package[: len(package) + 1 - node.level] if node.level else ()
        origin = ".".join((*above, *([node.module] if node.module else [])))
        yield from (f"{origin}.{alias.name}" for alias in node.names)


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in the file it does."""
    for node in nodes_of(path):
        yield from imported_names(path, node)


def name_of(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def part_of(path: Path) -> str:
    """The part of dwf that a file belongs to: its folder, or itself."""
    return path.relative_to(ROOT / "dwf").parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


INSIDE = [path for path in sources("dwf") if part_of(path) not in ("__init__", "__main__")]


# Imports ----------------------------------------------------------------------------------------


def test_dwf_imports_downward():
    faults = []
    for path in INSIDE:
        part = part_of(path)
        assert part in LEVEL, f"{name(path)}: a new part of dwf needs a place in LAYERS"
        for imported in imports(path):
            top, _, rest = imported.partition(".")
            other = rest.split(".")[0]
            if top != "dwf" or other == part or other == "__version__":
                continue
            level = LEVEL.get(other, len(LAYERS))
            if not (level < LEVEL[part] or level == LEVEL[part] == 0):
                faults.append(f"{name(path)} imports {imported}")
    assert not faults


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def top_level_imports(path: Path) -> Iterator[str]:
    """What importing the file imports at once: not inside functions, not for type checkers."""
    pending = nodes_of(path)[:1]
    while pending:
        node = pending.pop()
        yield from imported_names(path, node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)


def circles(edges: dict[str, set[str]]) -> set[str]:
    """The modules that lie on a circle, or on a way from one circle to another."""
    left = set(edges)
    while True:
        seen = {x for module in left for x in edges[module]}
        idle = {x for x in left if x not in seen or not edges[x] & left}
        if not idle:
            return left
        left -= idle


@pytest.mark.parametrize("package", ["dwf", "moe_kernels"])
def test_no_import_circle(package: str) -> None:
    """Importing a module of a package counts as that module alone, not as the package too."""
    modules = {module_of(path): path for path in sources(package)}
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for module, path in modules.items():
        for imported in top_level_imports(path):
            found = imported if imported in modules else imported.rpartition(".")[0]
            if found in modules and found != module:
                edges[module].add(found)
    left = circles(edges)
    assert not left, {module: sorted(edges[module] & left) for module in sorted(left)}


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b", "c"}


def test_dwf_knows_kernels_by_function_only():
    faults = []
    for path in sources("dwf"):
        for imported in imports(path):
            if imported.split(".")[0] == "triton" or imported.startswith("moe_kernels._"):
                faults.append(f"{name(path)} imports {imported}")
            if imported == "torch.ops":
                faults.append(f"{name(path)} imports torch.ops")
    for path, node in nodes("dwf"):
        if isinstance(node, ast.Attribute) and (name_of(node.value), node.attr) == ("torch", "ops"):
            faults.append(f"{name(path)}:{node.lineno}: torch.ops")
    assert not faults


def test_kernels_know_nothing_of_dwf():
    assert not [
        f"{name(path)} imports {x}"
        for path in sources("moe_kernels")
        for x in imports(path)
        if x.split(".")[0] == "dwf"
    ]


def test_nothing_imports_tests_or_benchmarks():
    outside = {"tests", "benchmarks", "pytest"}
    outside |= {file.stem for file in sources("tests", "benchmarks")}
    assert not [
        f"{name(path)} imports {imported}"
        for path in sources("dwf", "moe_kernels")
        for imported in imports(path)
        if imported.split(".")[0] in outside
    ]


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
        if path.name not in ("bindings.cpp", "bind_layers.cpp"):
            assert not [x for x in included if "pybind11" in x or "Python.h" in x], name(path)


# Constructions ----------------------------------------------------------------------------------


def test_no_file_is_unpickled():
    """CIFAR's original files are pickles: torchvision reads them, once their hash is right."""
    faults = [
        f"{name(path)} imports {imported}"
        for path in sources("dwf", "moe_kernels", "benchmarks")
        for imported in imports(path)
        if imported.split(".")[0] in ("pickle", "dill", "joblib", "shelve", "marshal")
    ]
    for path, node in nodes("dwf", "moe_kernels", "benchmarks"):
        if isinstance(node, ast.Attribute):
            if (name_of(node.value), node.attr) == ("torch", "load"):
                faults.append(f"{name(path)}:{node.lineno}: torch.load")
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if (node.arg, node.value.value) in (("allow_pickle", True), ("weights_only", False)):
                faults.append(f"{name(path)}:{node.value.lineno}: {node.arg}")
    assert not faults


def test_no_exception_is_swallowed_whole():
    faults = []
    for path, node in nodes("dwf", "moe_kernels"):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None or all(isinstance(line, ast.Pass) for line in node.body):
                faults.append(f"{name(path)}:{node.lineno}")
    assert not faults


def test_no_argument_group_hides_names():
    """`f(*(a, b), *(c, d))` only pleases the formatter: name the arguments."""
    assert not [
        f"{name(path)}:{argument.lineno}"
        for path, node in nodes("dwf", "moe_kernels", "benchmarks")
        if isinstance(node, ast.Call)
        for argument in node.args
        if isinstance(argument, ast.Starred) and isinstance(argument.value, (ast.Tuple, ast.List))
    ]


# Sizes and names --------------------------------------------------------------------------------


def test_no_file_is_long():
    files = sources("dwf", "moe_kernels", "benchmarks")
    files += [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
    lengths = {name(path): len(path.read_bytes().splitlines()) for path in files}
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_LINES}


def test_glossary_is_short():
    path = ROOT / "ARCHITECTURE.md"
    if not path.exists():
        pytest.skip("ARCHITECTURE.md is not written yet")
    found = re.search(
        r"^#+ [^\n]*glossary[^\n]*\n(.*?)(?=^#|\Z)", path.read_text(), re.I | re.M | re.S
    )
    assert found, "ARCHITECTURE.md ends with a glossary"
    lines = found[1].splitlines()
    entries = [x for x in lines if x.startswith(("- ", "* "))]
    entries += [x for x in lines if x.startswith("|")][2:]  # below a table's head and rule
    assert 1 <= len(entries) <= MAX_GLOSSARY_ENTRIES


def test_every_folder_is_accounted_for():
    assert {part_of(path) for path in INSIDE} <= LEVEL.keys()
    assert not list(ROOT.glob("dwf/**/utils.py"))
    assert not list(ROOT.glob("moe_kernels/**/utils.py"))
