"""Writes docs/configuration.md from the docstrings of the configuration; a test fails if the page is out of date.

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
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedqueue.config.schema import Config
from fedqueue.config.sections import word_of

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """# Configuration

One TOML file configures a run.
Environment variables `FEDQUEUE_SECTION__KEY` override it (`FEDQUEUE_TRAINING__LOCAL_EPOCHS=5`).
Variables without `__`, apart from `FEDQUEUE_NAME` and `FEDQUEUE_SEED`, are ignored.
`--set section.key=value` overrides both.

Values are written as in TOML; a value that is no TOML is taken as a string.
TOML has no null: an optional key takes a word such as `"off"` or `"auto"`, which the table names.
In Python such a key reads `None`.

An unknown key is an error that names the nearest known one.
A key that was renamed is an error that names the present one.

The coordinator sends its `[training]` settings with each job.
Each site reads from its own file `[task]`, `clients.slowdown`, and of `[training]` `device`, `threads` and
`loader_workers`.
"""


def page() -> str:
    """The whole page: a table for the top level and one for each section."""
    return HEAD + "".join(_tables("", Config, ""))


def _tables(path: str, section: type[BaseModel], purpose: str) -> typing.Iterator[str]:
    plain = {n: f for n, f in section.model_fields.items() if not _section_of(f)}
    yield f"\n## {f'`[{path}]`' if path else 'Top level'}\n\n"
    if path and (about := purpose or section.__doc__):
        yield f"{inspect.cleandoc(about.partition('>>>')[0]).strip()}\n\n"  # without its example
    yield "| key | accepts | default | |\n|---|---|---|---|\n"
    said = _docstrings(section)
    for name, field in plain.items():
        text = said.get(name, "").replace("\n", " ").replace("|", "\\|")
        yield f"| `{name}` | {_accepts(field)} | {_default(field)} | {text} |\n"
    for name, field in section.model_fields.items():
        if inner := _section_of(field):
            yield from _tables(f"{path}.{name}" if path else name, inner, said.get(name, ""))


def _docstrings(section: type[BaseModel]) -> dict[str, str]:
    """Field → the string below it. Read from the source: pydantic would do it at the start of every command."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(field.target): inspect.cleandoc(str(text.value.value))
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _accepts(field: FieldInfo) -> str:
    word = word_of(field)
    return _bounded(_type(field.annotation), field.metadata) + (f', `"{word}"`' if word else "")


def _bounded(name: str, metadata: Iterable[object]) -> str:
    limits = [str(m).replace("annotated_types.", "") for m in metadata]
    bounds = re.findall(r"(Ge|Gt|Le|Lt)\(\w+=([^)]+)\)", " ".join(limits))
    signs = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
    return " ".join([name, *(f"{signs[k]} {v}" for k, v in bounds)])


def _type(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f'`"{a}"`' for a in arguments)
    if origin is typing.Annotated:
        described = [m.description for m in arguments[1:] if isinstance(m, FieldInfo) and m.description]
        fields = [m.metadata if isinstance(m, FieldInfo) else [m] for m in arguments[1:]]
        return described[0] if described else _bounded(_type(arguments[0]), itertools.chain(*fields))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments if a is not type(None))
    if origin is tuple:
        return "list of " + _type(arguments[0])
    if origin is dict:
        return "table of " + _type(arguments[1])
    names = {int: "integer", float: "number", str: "string", bool: "`true`, `false`", typing.Any: "anything"}
    return names[annotation]  # type: ignore[index]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return f'`"{word}"`' if (word := word_of(field)) else ""
    if isinstance(field.default, dict | tuple):
        return "empty" if not field.default else f"`{field.default}`"
    return f'`"{field.default}"`' if isinstance(field.default, str) else f"`{str(field.default).lower()}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
