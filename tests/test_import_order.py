"""A module imports only its own layer and those before it; `core` is pure, including all that it imports.

Imports are read from each file, including late imports. Those under `if TYPE_CHECKING:` are not executed, so they do
not count.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "fedqueue": ROOT / "shared" / "fedqueue",
    "fedqueue_coordinator": ROOT / "coordinator" / "fedqueue_coordinator",
    "fedqueue_worker": ROOT / "worker" / "fedqueue_worker",
    "fedqueue_keeper": ROOT / "keeper" / "fedqueue_keeper",
}
LAYERS: tuple[tuple[str, ...], ...] = (
    ("fedqueue.errors", "fedqueue.exception_text"),
    ("fedqueue.exit_codes", "fedqueue.logs", "fedqueue.tracing"),
    ("fedqueue.config",),
    ("fedqueue.protocol",),
    ("fedqueue.observability",),
    ("fedqueue.tensors",),
    ("fedqueue.batches", "fedqueue.metrics", "fedqueue.learning_rates", "fedqueue.staleness", "fedqueue.privacy"),
    ("fedqueue.statistics",),
    (
        "fedqueue.task",
        "fedqueue.training",
        "fedqueue.evaluation",
        "fedqueue.local_model",
        "fedqueue.local_update",
        "fedqueue.private_training",
        "fedqueue.row_gradients",
        "fedqueue.partition",
    ),
    ("fedqueue.secure",),
    ("fedqueue.leak",),
    ("fedqueue.transport", "fedqueue_coordinator.algorithms"),
    ("fedqueue_coordinator.core",),
    ("fedqueue_coordinator.service", "fedqueue_coordinator.simulation", "fedqueue_worker", "fedqueue_keeper"),
    ("fedqueue_coordinator.tracking",),
    ("fedqueue_coordinator.operator",),
    ("fedqueue_coordinator.cli", "fedqueue_coordinator.__main__"),
)
"""From the bottom to the top. Members of one line do not import each other, except those of `WITHIN`."""
WITHIN = {
    ("fedqueue_coordinator.__main__", "fedqueue_coordinator.cli"),
    ("fedqueue.exception_text", "fedqueue.errors"),
    ("fedqueue.task", "fedqueue.training"),
    ("fedqueue.training", "fedqueue.task"),
    ("fedqueue.local_model", "fedqueue.task"),
    ("fedqueue.local_update", "fedqueue.local_model"),
    ("fedqueue.task", "fedqueue.evaluation"),
    ("fedqueue.evaluation", "fedqueue.task"),
    ("fedqueue.evaluation", "fedqueue.training"),
    ("fedqueue.local_update", "fedqueue.private_training"),
    ("fedqueue.local_update", "fedqueue.task"),
    ("fedqueue.local_update", "fedqueue.training"),
    ("fedqueue.private_training", "fedqueue.row_gradients"),
    ("fedqueue.private_training", "fedqueue.task"),
    ("fedqueue.private_training", "fedqueue.training"),
    ("fedqueue.row_gradients", "fedqueue.task"),
}
"""(importing, imported) within one line."""
KNOWN: dict[tuple[str, str], str] = {}
"""(importing module, imported module) that break the order → why, until they are moved."""

IMPURE_MODULES = {"redis", "rq", "nacl", "cryptography", "threading", "multiprocessing", "socket", "subprocess"}
IMPURE_IMPORTS = IMPURE_MODULES | {
    "time",
    "os",
    "random",
    "io",
    "shutil",
    "tempfile",
    "concurrent",
    "asyncio",
}
IMPURE_CALLS = {"open", "input", "print"}
FILE_METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "tofile", "unlink", "mkdir", "exists", "glob"}


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(SOURCES[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


MODULES = {
    module_name(package, path): path for package, folder in SOURCES.items() for path in sorted(folder.rglob("*.py"))
}


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node that is not under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from executed(node)


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Return the modules that the file imports; `from package import module` gives package.module."""
    found: set[str] = set()
    for node in executed(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & MODULES.keys()
            found |= modules | ({str(node.module)} if names - modules else set())
    return found


def layer_of(module: str) -> tuple[int, str] | None:
    """Return index and name of the layer; None for a package's `__init__`, which only re-exports."""
    for index, names in enumerate(LAYERS):
        for name in names:
            if module == name or module.startswith(f"{name}."):
                return index, name
    return None


def allowed(importing: str, imported: str) -> bool:
    above, below = layer_of(importing), layer_of(imported)
    if above is None or below is None or above[1] == below[1]:
        return True
    return below[0] < above[0] or (above[1], below[1]) in WITHIN


def test_every_module_has_a_layer() -> None:
    faces = {"fedqueue", "fedqueue_coordinator"}
    assert {module for module in MODULES if layer_of(module) is None} == faces


def test_module_imports_only_layers_before_its_own() -> None:
    ours = {(module, name) for module, path in MODULES.items() for name in imports_of(path)}
    ours = {(module, name) for module, name in ours if name.partition(".")[0] in SOURCES}
    assert sorted(pair for pair in ours if not allowed(*pair) and pair not in KNOWN) == []


def test_known_exceptions_still_break_the_order() -> None:
    for importing, imported in KNOWN:
        assert imported in imports_of(MODULES[importing]), "the import is gone: delete it from KNOWN"
        assert not allowed(importing, imported)


# Purity of the core

CORE = sorted(module for module in MODULES if module.startswith("fedqueue_coordinator.core"))


def reachable(module: str) -> set[str]:
    """Return the module and all of our modules and packages that its import executes."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or name not in MODULES:
            continue
        found.add(name)
        waiting += imports_of(MODULES[name])
    return found


@pytest.mark.parametrize("module", CORE)
def test_core_reaches_no_module_with_redis_or_threads(module: Any) -> None:
    foreign = {name.partition(".")[0] for ours in reachable(module) for name in imports_of(MODULES[ours])}
    assert not foreign & IMPURE_MODULES


@pytest.mark.parametrize("module", CORE)
def test_core_uses_no_clock_thread_file_or_random_generator(module: Any) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert not {name.partition(".")[0] for name in imports_of(MODULES[module])} & IMPURE_IMPORTS
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & IMPURE_CALLS
    assert not {name.rpartition(".")[2] for name in called if "." in name} & FILE_METHODS
    assert not [name for name in called if name.startswith(("np.random", "numpy.random", "torch.rand", "torch.manual"))]


@pytest.mark.slow
def test_importing_core_loads_no_redis_and_no_cryptography() -> None:
    loads = ["redis", "rq", "nacl", "cryptography"]
    code = f"import sys, {', '.join(CORE)}\nprint([name for name in {loads} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert answer.stdout.strip() == "[]"
