"""The package of the modules that are imported from a file of the user's, such as `task.py`.

A folder of such files is a package in here, named after a digest of its path, so files of one name in two folders stay
apart, and no file hides a module of Python's own. The finder below looks for the folder on `sys.path`. A process that
`multiprocessing` spawns gets `sys.path` from its parent and so finds the same modules: it can unpickle a Dataset that
is defined in `task.py`.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

DIGITS = 12
DOT = "%2E"


def package_of(folder: Path) -> ModuleType:
    """The package for the files of `folder`, which is put on `sys.path` if it is not there."""
    path = str(folder)
    if all(Path(entry).resolve() != folder for entry in sys.path):
        sys.path.insert(_after_python(), path)
    importlib.invalidate_caches()
    return importlib.import_module(f"{__name__}.{_digest(folder)}")


def module_name(path: Path) -> str:
    """The name under which `path` is imported: its folder's package, and its name without `.py`.

    A dot would divide the name, so that `task.v2.py` is `task%2Ev2`.
    """
    return f"{package_of(path.parent).__name__}.{path.stem.replace('%', '%25').replace('.', DOT)}"


def _after_python() -> int:
    """Where the user's files come on `sys.path`: behind Python's own modules, and before installed packages."""
    own = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    own |= {f"{path}/lib-dynload" for path in own}
    return max((i + 1 for i, entry in enumerate(sys.path) if entry in own), default=len(sys.path))


def _digest(folder: Path) -> str:
    return "folder_" + hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:DIGITS]


class FolderFinder:
    """Finds the package of a folder on `sys.path` by the digest in its name, and files whose names have dots."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder.find_spec`."""
        parent, _, last = name.rpartition(".")
        if parent == __name__:
            return _package_spec(name, last)
        if parent.startswith(f"{__name__}.") and "%" in last:
            file = f"{last.replace(DOT, '.').replace('%25', '%')}.py"
            found = (Path(folder, file) for folder in path or ())
            return next((spec_from_file_location(name, file) for file in found if file.is_file()), None)
        return None


def _package_spec(name: str, digest: str) -> ModuleSpec | None:
    for entry in sys.path:
        folder = Path(entry).resolve()
        if _digest(folder) == digest:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            return spec
    return None


sys.meta_path.append(FolderFinder)
