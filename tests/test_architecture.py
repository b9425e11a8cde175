"""Rules for imports between packages, and for imports and operations that no module may use."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import fedqueue

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "fedqueue": ROOT / "shared" / "fedqueue",
    "fedqueue_coordinator": ROOT / "coordinator" / "fedqueue_coordinator",
    "fedqueue_worker": ROOT / "worker" / "fedqueue_worker",
    "fedqueue_keeper": ROOT / "keeper" / "fedqueue_keeper",
}
MAY_IMPORT = {
    "fedqueue": {"fedqueue"},
    "fedqueue_coordinator": {"fedqueue", "fedqueue_coordinator"},
    "fedqueue_worker": {"fedqueue", "fedqueue_worker"},
    "fedqueue_keeper": {"fedqueue", "fedqueue_keeper"},
}
MODULES = [(package, path) for package, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]
EXECUTES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "jsonpickle"}
"""Formats that can carry code."""
CALLS = {"eval", "exec", "compile", "__import__"}
LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("torch.jit", "load"), ("os", "system")}
VAGUE = {"utils", "util", "helpers", "helper", "manager", "common", "misc", "base", "tools", "lib", "core"}
READS_ENVIRONMENT = {
    "loading.py", "runs.py", "child_processes.py", "main.py", "cli.py", "prefork.py",
    "mlflow_tracker.py",  # sets what MLflow reads when it is imported: no telemetry, and that a folder may be its store
    "endpoint.py",  # between a process and its children, as prometheus_client wants it
}  # fmt: skip


TEST_NAME = re.compile(r"^\s*(?:async )?def (test_\w+)", re.MULTILINE)
MAX_NAME = 60


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Return every module that the file imports, late imports and `from a import b` as a.b included."""
    return frozenset(imports(tree_of(path)))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where a name comes from"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def names_used(path: Path) -> frozenset[str]:
    """Return every name and dotted name that the file reads."""
    nodes = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name | ast.Attribute))
    return frozenset(map(ast.unparse, nodes))


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 30
    assert {package for package, _ in MODULES} == set(PACKAGES)


def offenders(find: Callable[[str, Path], object]) -> dict[str, object]:
    """Return what `find(package, path)` finds in each module that breaks a rule."""
    found = {f"{package}/{path.name}": find(package, path) for package, path in MODULES}
    return {module: what for module, what in found.items() if what}


def test_services_import_only_the_shared_package_and_themselves() -> None:
    def find(package: str, path: Path) -> object:
        return ({name.partition(".")[0] for name in imported(path)} & set(PACKAGES)) - MAY_IMPORT[package]

    assert offenders(find) == {}


def test_nothing_that_can_carry_code_is_imported() -> None:
    assert offenders(lambda _, path: {name.partition(".")[0] for name in imported(path)} & EXECUTES) == {}


def test_nothing_is_evaluated_or_loaded_as_code() -> None:
    loaders = {f"{module}.{name}" for module, name in LOADERS}

    def find(_: str, path: Path) -> object:
        calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        shells = {"shell" for call in calls for keyword in call.keywords if keyword.arg == "shell"}
        return (names_used(path) & (CALLS | loaders)) | (imported(path) & loaders) | shells

    assert offenders(find) == {}


def test_environment_is_read_in_few_places() -> None:
    readers = {"os.environ", "os.getenv", "environ", "getenv"}
    assert offenders(lambda _, path: names_used(path) & readers if path.name not in READS_ENVIRONMENT else ()) == {}


def test_name_of_a_module_says_what_it_is_about() -> None:
    assert offenders(lambda _, path: path.stem in VAGUE) == {}


def test_every_module_says_what_it_is_for() -> None:
    assert offenders(lambda _, path: not ast.get_docstring(tree_of(path))) == {}


def test_no_module_keeps_mutable_state() -> None:
    """A constant table is allowed; an empty container at module level would be filled later."""

    def find(_: str, path: Path) -> object:
        found: list[ast.AST] = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Global)]
        for node in tree_of(path).body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and value is not None:
                empty = isinstance(value, ast.List | ast.Dict | ast.Set) and not ast.unparse(value).strip("[]{}")
                made = isinstance(value, ast.Call) and ast.unparse(value.func) in ("list", "dict", "set", "defaultdict")
                found += [node] if empty or made else []
        return [ast.unparse(node) for node in found]

    assert offenders(find) == {}


def test_only_the_keys_module_spells_keys_of_redis() -> None:
    for _, path in MODULES:
        if path.name == "keys.py":
            continue
        strings = [n.value for n in ast.walk(tree_of(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        assert not [text for text in strings if text.startswith(("fedqueue:{", "fedqueue:run"))], path.name


def test_every_script_is_called_and_documents_its_keys() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for _, path in MODULES)
    scripts = sorted((PACKAGES["fedqueue"] / "transport" / "scripts").glob("*.lua"))
    assert len(scripts) > 10
    for script in scripts:
        header = "".join(line for line in script.read_text().splitlines(keepends=True) if line.startswith("--"))
        assert "KEYS[1]" in header, script.name
        assert "Returns" in header, script.name
        assert f'"{script.stem}"' in sources, f"{script.name} is called by no module"


def test_public_names_exist_and_are_sorted() -> None:
    assert sorted(fedqueue.__all__) == list(fedqueue.__all__)
    for name in fedqueue.__all__:
        assert getattr(fedqueue, name, None) is not None, name


def test_public_classes_say_what_they_are() -> None:
    for name in fedqueue.__all__:
        if isinstance(value := getattr(fedqueue, name), type):
            assert value.__doc__, name


def test_every_package_is_typed() -> None:
    for folder in PACKAGES.values():
        assert (folder / "py.typed").exists()


def test_names_of_tests_are_short() -> None:
    names = {name for path in (ROOT / "tests").rglob("test_*.py") for name in TEST_NAME.findall(path.read_text())}
    assert len(names) > 500
    assert sorted(name for name in names if len(name) >= MAX_NAME or "_s_" in name) == []
