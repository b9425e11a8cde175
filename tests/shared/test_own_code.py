"""Modules of the user's files: their names, their neighbours, and processes that they start."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedqueue.config.entrypoint import import_entrypoint
from fedqueue.task import load_task

TASK = """
from fedqueue import Task
from .neighbour import NAME
import neighbour as absolute

class Rows:
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return float(i)

class Mine(Task):
    name = NAME, absolute.NAME

def double(x): return 2 * x
"""


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("fedqueue.config.own_code.", "neighbour")):
            del sys.modules[name]


def folder(parent: Path, name: str, task: str = "task.py") -> Path:
    made = parent / name
    made.mkdir()
    (made / task).write_text(TASK)
    (made / "neighbour.py").write_text(f"NAME = {name!r}\n")
    return made


def test_relative_and_absolute_imports_of_neighbours_work(tmp_path: Path) -> None:
    task = load_task("task.py:Mine", {}, folder(tmp_path, "one"))
    assert vars(type(task))["name"] == ("one", "one")


def test_files_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    one, two = (import_entrypoint("task.py:Mine", folder(tmp_path, name), "task")[0] for name in ("one", "two"))
    assert one.__name__ != two.__name__
    assert (one.NAME, two.NAME) == ("one", "two")
    for module in (one, two):
        assert type(pickle.loads(pickle.dumps(module.Rows(3)))) is module.Rows


@pytest.mark.parametrize("name", ["task.v2.py", "a%b.py", ".hidden.py"])
def test_file_whose_name_has_a_dot_is_imported_again_by_name(tmp_path: Path, name: str) -> None:
    module, _ = import_entrypoint(f"{name}:Mine", folder(tmp_path, "one", name), "task")
    assert module.NAME == "one"  # its relative import
    pickled = pickle.dumps(module.Rows(3))
    del sys.modules[module.__name__]
    assert len(pickle.loads(pickled)) == 3


@pytest.mark.parametrize("name", ["random.py", "json.py", "queue.py", "torch.py"])
def test_file_named_as_a_module_of_python_hides_nothing(tmp_path: Path, name: str) -> None:
    module, _ = import_entrypoint(f"{name}:Mine", folder(tmp_path, "one", name), "task")
    assert module.double(2) == 4
    assert random.Random is sys.modules["random"].Random
    assert module is not sys.modules[name.removesuffix(".py")]


def test_users_folder_comes_after_python_and_before_packages(tmp_path: Path) -> None:
    import_entrypoint("task.py:Mine", folder(tmp_path, "one"), "task")
    position = sys.path.index(str(tmp_path / "one"))
    assert position > max(i for i, entry in enumerate(sys.path) if entry.endswith("lib-dynload"))
    assert position < min(i for i, entry in enumerate(sys.path) if entry.endswith("site-packages"))


STARTS = """
import multiprocessing, sys
from pathlib import Path

from fedqueue.config.entrypoint import import_entrypoint

def main():
    module, _ = import_entrypoint(sys.argv[1] + ":Mine", Path(sys.argv[2]), "task")
    with multiprocessing.get_context(sys.argv[3]).Pool(1) as pool:
        print(pool.map(module.double, [1, 2]), pool.apply(len, [module.Rows(7)]))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("name", ["task.py", "random.py", "task.v2.py"])
def test_started_processes_import_the_users_file(tmp_path: Path, method: str, name: str) -> None:
    script = tmp_path / "start.py"
    script.write_text(STARTS)
    made = folder(tmp_path, "one", name)
    done = subprocess.run(
        [sys.executable, str(script), name, str(made), method], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.stdout, done.returncode) == ("[2, 4] 7\n", 0), done.stderr
