"""Imports the code that a configuration names: `path/to/file.py:name`, relative to it, or `package.module:name`."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from fedqueue.config.own_code import module_name
from fedqueue.errors import TaskError
from fedqueue.exception_text import exception_with_place

ENTRYPOINT = re.compile(r"[^:\0]*\w\.py:[A-Za-z_]\w*|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_entrypoint(text: str) -> bool:
    """Whether `text` has the form of an entry point; the code need not exist."""
    return ENTRYPOINT.fullmatch(text) is not None


def import_entrypoint(entrypoint: str, folder: Path, key: str) -> tuple[ModuleType, str]:
    """Import the module of `entrypoint`; returns the module and the name in it.

    A path of a file is relative to `folder`. `key` is the configuration's key, for messages. Raises TaskError if there
    is no such module, and if importing it raises; the exception is its cause.
    """
    where, _, name = entrypoint.rpartition(":")
    module = _module_from_file(folder / where, key) if where.endswith(".py") else _module_by_name(where, key)
    return module, name


def _module_from_file(path: Path, key: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise TaskError(f"{key}: there is no file {path}")
    name = module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and data loaders find their module by its name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TaskError(f"importing {path}: {exception_with_place(error)}") from error
    return module


def _module_by_name(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise TaskError(f"{key}: importing {name}: {exception_with_place(error)}") from error
