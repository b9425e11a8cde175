"""Writes docs/configuration.md from the configuration's own docstrings; a test fails where the page is out of date.

.venv/bin/python docs/make_configuration.py
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedqueue.config.loading import Config

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """# Configuration

A run is configured by one TOML file. `FEDQUEUE_SECTION__KEY` environment variables override it
(`FEDQUEUE_TRAINING__EPOCHS=5`), and `--set section.key=value` overrides both. Values are written as in TOML; what is no
TOML value is taken as a string. An unknown key is an error that names the nearest known one.

The coordinator's `[training]` settings travel with each job. `[task]`, `[clients] slowdown` and `[training] threads`
are read where they apply: each site has a file of its own.
"""


def page() -> str:
    """The whole page: a table for the top level and for each section."""
    return HEAD + "".join(_tables("", Config))


def _tables(path: str, section: type[BaseModel]) -> typing.Iterator[str]:
    plain = {n: f for n, f in section.model_fields.items() if not _is_section(f)}
    yield f"\n## {f'`[{path}]`' if path else 'Top level'}\n\n"
    if path and section.__doc__:
        yield f"{section.__doc__.strip()}\n\n"
    yield "| key | accepts | default | |\n|---|---|---|---|\n"
    said = _docstrings(section)
    for name, field in plain.items():
        text = said.get(name, "").replace("\n", " ").replace("|", "\\|")
        yield f"| `{name}` | {_accepts(field)} | {_default(field)} | {text} |\n"
    for name, field in section.model_fields.items():
        if _is_section(field):
            yield from _tables(f"{path}.{name}" if path else name, field.annotation)


def _docstrings(section: type[BaseModel]) -> dict[str, str]:
    """Field → the string below it. Read here and not by pydantic, which would do so whenever a command starts."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _accepts(field: FieldInfo) -> str:
    limits = [str(m).replace("annotated_types.", "") for m in field.metadata]
    bounds = re.findall(r"(Ge|Gt|Le|Lt)\(\w+=([^)]+)\)", " ".join(limits))
    signs = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
    return " ".join([_type(field.annotation), *(f"{signs[k]} {v}" for k, v in bounds)])


def _type(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments if a is not type(None))
    if origin is tuple:
        return "list of " + _type(arguments[0])
    if origin is dict:
        return "table of " + _type(arguments[1])
    return {int: "integer", float: "number", str: "string", bool: "true, false", typing.Any: "anything"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return ""
    if isinstance(field.default, dict | tuple):
        return "empty" if not field.default else f"`{field.default}`"
    return f'`"{field.default}"`' if isinstance(field.default, str) else f"`{str(field.default).lower()}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
