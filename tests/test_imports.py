"""The walls of docs/architecture.md: who may import whom, function-local imports counted, and no cycles."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine", "services", "worker", "migrations", "examples", "benchmarks", "whet_client")

FLOOR = ("services.settings", "services.errors", "services.store")
ENGINE_DOOR = ("engine.messages", "engine.client", "engine.text")
HTTP = (*FLOOR, "services.app", *ENGINE_DOOR)
WORKER_PACKAGES = ("worker.curation", "worker.training", "worker.gate", "worker.indexing", "worker.rollout")
TOP = (
    "worker.tasks",
    "worker.dispatcher",
    "worker.main",
    "worker.schedule",
    "worker.cadence",
    "worker.watchdog",
    "worker.logs",
)

# The longest prefix that fits a module decides. Each may also import itself.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "engine": (),
    "services.settings": (),
    "services.errors": (),
    "services.store": ("services.settings", "services.errors"),
    "services.app": FLOOR,
    "services.platform": ("services.settings", "services.errors"),
    "services.gateway": HTTP,
    "services.console": HTTP,
    "services.admin": HTTP,
    "services.web": ("services",),
    "services.cli": ("services",),
    "services.cli_access": ("services",),
    "services.cli_artifacts": ("services",),
    "services.cli_client": ("services",),
    "services.cli_datasets": ("services",),
    "services.cli_erase": ("services",),
    "services.cli_instant": ("services",),
    "services.cli_learning": ("services",),
    "services.cli_people": ("services",),
    "whet_client": (),
    "services.bootstrap": ("services",),
    "services.exports": ("services.errors",),
    **dict.fromkeys(WORKER_PACKAGES, (*FLOOR, "engine")),
    **dict.fromkeys(TOP, (*FLOOR, "worker", "engine.client", "engine.sync_client", "engine.messages")),
    "migrations": ("services.settings", "services.store"),
    "examples": PACKAGES,
    "benchmarks": PACKAGES,
}

Graph = Mapping[str, set[str]]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def rule_of(module: str) -> str | None:
    """The rule that governs a module, or None when nobody has said what it may import."""
    return max((package for package in MAY_IMPORT if within(module, package)), key=len, default=None)


def modules(root: Path, packages: Iterable[str] = PACKAGES) -> dict[str, Path]:
    """Every module's dotted name and file; migrations of the database are scripts with names that are none."""
    found = {}
    for package in packages:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if "versions" not in parts:
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, known: Iterable[str], *, top_level_only: bool = False) -> Iterator[str]:
    """Our own modules a syntax tree imports. Relative imports are refused by a test of their own."""
    names = set(known)
    nodes = _top_level(tree) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in names or node.module in names:
                    yield submodule if submodule in names else node.module


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: everything outside functions and TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _top_level(node)


def graph_of(sources: Mapping[str, str], *, top_level_only: bool = False) -> dict[str, set[str]]:
    return {
        name: set(imported(ast.parse(text), sources, top_level_only=top_level_only)) - {name}
        for name, text in sources.items()
    }


def forbidden(graph: Graph) -> list[str]:
    """Edges no rule allows, and modules without a rule."""
    found = []
    for module, targets in graph.items():
        rule = rule_of(module)
        if rule is None:
            found += [f"{module} has no rule" for _ in [0] if targets]
            continue
        allowed = (rule, *MAY_IMPORT[rule])
        found += [
            f"{module} imports {target}" for target in targets if not any(within(target, name) for name in allowed)
        ]
    return sorted(found)


def cycle(graph: Graph) -> list[str]:
    """One import cycle as a path, or nothing."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        found = next((loop for target in sorted(graph[module]) if (loop := visit(target))), [])
        path.pop()
        done.add(module)
        return found

    return next((loop for module in sorted(graph) if (loop := visit(module))), [])


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {name: path.read_text() for name, path in modules(ROOT).items()}


def test_no_module_imports_what_its_package_may_not(sources: dict[str, str]) -> None:
    graph = graph_of(sources)
    assert sum(len(targets) for targets in graph.values()) > 50
    assert forbidden(graph) == []


def test_there_is_no_import_cycle(sources: dict[str, str]) -> None:
    assert cycle(graph_of(sources, top_level_only=True)) == []


def test_no_cycle_is_hidden_inside_a_function(sources: dict[str, str]) -> None:
    assert cycle(graph_of(sources)) == []


def test_imports_are_absolute(sources: dict[str, str]) -> None:
    relative = [
        name
        for name, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert relative == []


def test_package_files_stay_empty() -> None:
    assert [str(path) for name, path in modules(ROOT).items() if path.name == "__init__.py" and path.read_text()] == []


@pytest.mark.parametrize(
    ("module", "source", "edge"),
    [
        ("engine.x", "import services.errors", "engine.x imports services.errors"),
        ("services.store", "def f():\n    from services.gateway import y", "services.store imports services.gateway.y"),
        ("services.gateway.x", "from services.console.y import z", "services.gateway.x imports services.console.y"),
        ("services.platform.x", "from services.store.y import z", "services.platform.x imports services.store.y"),
        ("worker.gate.x", "import worker.training.y", "worker.gate.x imports worker.training.y"),
        ("worker.tasks", "from examples.y import z", "worker.tasks imports examples.y"),
    ],
)  # fmt: skip
def test_a_forbidden_import_is_noticed(module: str, source: str, edge: str) -> None:
    others = ("services.errors", "services.gateway.y", "services.console.y", "services.store.y", "worker.training.y")
    graph = graph_of({module: source, **dict.fromkeys((*others, "examples.y"), "")})
    assert forbidden(graph) == [edge]


def test_a_cycle_is_noticed() -> None:
    around = {
        "engine.a": "import engine.b",
        "engine.b": "def f():\n    from engine import c",
        "engine.c": "import engine.a",
    }
    assert cycle(graph_of(around)) == ["engine.a", "engine.b", "engine.c", "engine.a"]
    assert cycle(graph_of(around, top_level_only=True)) == []
