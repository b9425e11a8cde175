"""Where worker processes find a task class that a Python program handed to `fedqueue.run`.

A worker process imports its task from a file or a module: no object travels to it, pickled or otherwise. A class of an
imported module is found there. A class of the running script is found in a copy of the script's statements above its
first call of `fedqueue.run` or `fedqueue.simulate`, so that a worker does not start the run again. A class of a
notebook or of an interactive session is in no file, and is refused.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType

from fedqueue.errors import TaskError
from fedqueue.task import Task
from fedqueue_coordinator.operator.run_folder import SCRIPT_COPY

CALLS = ("run", "simulate")


def find_entrypoint(cls: type[Task], folder: Path) -> str:
    """Return the entry point of `cls` for a configuration file in `folder`.

    Writes `folder/launch_task.py` for a class of the running script. Raises TaskError for a class that no other process
    can import.
    """
    name, module = cls.__qualname__, sys.modules.get(cls.__module__)
    if "." in name:
        raise TaskError(f"{name} is defined inside a function or a class: define it at the top level of a file")
    file = getattr(module, "__file__", None)
    if module is None or file is None or getattr(module, name, None) is not cls:
        raise TaskError(
            f"{name} is defined in a notebook or an interactive session, and worker processes cannot import it: "
            "put the class into a file (in a notebook: %%writefile task.py) and import it from there, or use "
            "fedqueue.simulate, which trains in this process"
        )
    if cls.__module__ == "__main__":
        spec = module.__spec__
        if spec is not None:  # python -m package.module
            return f"{spec.name}:{name}"
        (folder / SCRIPT_COPY).write_text(_above_the_run(Path(file).resolve(), name, module), encoding="utf-8")
        return f"{SCRIPT_COPY}:{name}"
    if "." in cls.__module__:  # its relative imports need its package
        return f"{cls.__module__}:{name}"
    return f"{os.path.relpath(Path(file).resolve(), folder.resolve())}:{name}"


def _above_the_run(script: Path, name: str, module: ModuleType) -> str:
    """Return what worker processes import instead of `script`. Raises TaskError if it lacks class `name`."""
    source = script.read_text(encoding="utf-8")
    body = ast.parse(source).body
    running = _running_line(module)
    first = min((s.lineno for s in body if _calls_a_run(s, _names_of_runs(body))), default=running)
    kept = [s for s in body if (s.end_lineno or s.lineno) < min(first, running)]
    if not any(isinstance(s, ast.ClassDef) and s.name == name for s in kept):
        raise TaskError(
            f"{script.name}: class {name} must be defined at the top level, above the first call of fedqueue.run or "
            "fedqueue.simulate, or in a file of its own: worker processes import the statements above that call"
        )
    lines = source.splitlines()
    future = (s.end_lineno or 0 for s in kept if isinstance(s, ast.ImportFrom) and s.module == "__future__")
    head = max(future, default=0)  # Python allows nothing but a docstring above an import from __future__
    added = [
        f"# Worker processes import this copy of {script}: its statements above the first run.",
        "import sys as _sys",
        f"_sys.path.insert(0, {str(script.parent)!r})",
        f"__file__ = {str(script)!r}",
    ]
    return "\n".join([*lines[:head], *added, *lines[head : kept[-1].end_lineno]]) + "\n"


def _running_line(module: ModuleType) -> int:
    """Return the line of `module` that is being executed."""
    for frame in _frames():
        if frame.f_code.co_name == "<module>" and frame.f_globals is vars(module):
            return frame.f_lineno
    return sys.maxsize  # a thread of the script's: the script itself may have been executed to its end


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame:
        yield frame
        frame = frame.f_back


def _names_of_runs(body: list[ast.stmt]) -> set[str]:
    """Return the names by which the script calls `fedqueue.run` and `fedqueue.simulate`."""
    names = set()
    for statement in body:
        if isinstance(statement, ast.Import):
            names |= {f"{a.asname or a.name}.{c}" for a in statement.names if a.name == "fedqueue" for c in CALLS}
        elif isinstance(statement, ast.ImportFrom) and statement.module == "fedqueue":
            names |= {alias.asname or alias.name for alias in statement.names if alias.name in CALLS}
    return names


def _calls_a_run(statement: ast.stmt, names: set[str]) -> bool:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False  # the call is made where the function is called
    return any(isinstance(node, ast.Call) and ast.unparse(node.func) in names for node in ast.walk(statement))
