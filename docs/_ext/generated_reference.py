"""Generates the parts of the reference that the code itself knows: commands, the public API, errors and exit codes.

`<!-- generated: commands -->` in a page marks the place; so do `api` and `errors`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", insert)
    app.connect("autodoc-process-docstring", mark_code)
    return {"parallel_read_safe": True}


def mark_code(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Docstrings mark code with single backticks, as Markdown does: make them reStructuredText's double ones."""
    text = re.sub(r"(?<![`:\\])`([^`]+)`(?![`_])", r"``\1``\\ ", "\n".join(lines))
    lines[:] = text.split("\n")


def insert(app: Sphinx, docname: str, source: list[str]) -> None:
    for name, lines in {"commands": commands, "api": api, "errors": errors}.items():
        marker = f"<!-- generated: {name} -->"
        if marker in source[0]:
            source[0] = source[0].replace(marker, "\n".join(lines()))


# Commands


def commands() -> Iterator[str]:
    """Every command of `fedqueue`, then `fedqueue-worker` and `fedqueue-keeper`, in the order of their `--help`."""
    import typer

    from fedqueue_coordinator.cli.main import app
    from fedqueue_keeper.cli import app as keeper
    from fedqueue_worker.cli import app as worker

    group: Any = typer.main.get_command(app)
    yield "## `fedqueue`\n"
    yield from parameters(group)
    for name, command in group.commands.items():
        if not command.hidden:
            yield from section(f"fedqueue {name}", command)
    yield from section("fedqueue-worker", typer.main.get_command(worker))
    yield from section("fedqueue-keeper", typer.main.get_command(keeper))


def section(name: str, command: Any) -> Iterator[str]:
    """One command: its usage, what it does, its arguments and options."""
    arguments = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
    yield f"\n## `{name}`\n"
    yield "```text\n" + " ".join([name, "[OPTIONS]", *arguments]) + "\n```\n"
    yield inspect.cleandoc(command.help or "") + "\n"
    yield from parameters(command)
    if command.epilog:
        yield inspect.cleandoc(command.epilog) + "\n"


def parameters(command: Any) -> Iterator[str]:
    unshown = {"help", "install_completion", "show_completion"}
    shown = [p for p in command.params if p.name not in unshown and not getattr(p, "hidden", False)]
    if shown:
        yield "| argument or option | meaning | default |\n|---|---|---|"
    for parameter in shown:
        if parameter.param_type_name == "argument":
            name = f"`{parameter.metavar or parameter.name.upper()}`"
        else:
            flags = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
            name = f"{flags} `{parameter.metavar}`" if parameter.metavar and not parameter.is_flag else flags
        default = parameter.default
        said = "" if default in (None, "", False) or not parameter.show_default else f"`{default}`"
        if parameter.required:
            said = "required"
        help_ = (getattr(parameter, "help", "") or "").replace("|", "\\|").replace("\n", " ")
        yield f"| {name.replace('|', chr(92) + '|')} | {help_} | {said} |"
    if shown:
        yield ""


# The public API


def api() -> Iterator[str]:
    """A section for each name in `fedqueue.__all__`; errors are on a page of their own."""
    import fedqueue

    for name in fedqueue.__all__:
        value = getattr(fedqueue, name)
        if name.startswith("__") or (inspect.isclass(value) and issubclass(value, Exception)):
            continue
        yield f"\n## `{name}`\n"
        yield "```{eval-rst}"
        if isinstance(value, ModuleType):
            yield f".. automodule:: {value.__name__}\n   :members:"
        elif inspect.isclass(value):
            yield f".. autoclass:: fedqueue.{name}\n   :members:"
        elif inspect.isroutine(value):
            yield f".. autofunction:: fedqueue.{name}"
        else:
            yield f".. autodata:: fedqueue.{name}"
        yield "```"


# Errors


def errors() -> Iterator[str]:
    """Every error class with the exit code of the command line that it ends."""
    import fedqueue.errors as module
    from fedqueue.errors import ConfigurationError, FedqueueError, TaskError

    yield "| error | is a | exit code | meaning |\n|---|---|---|---|"
    for name, value in vars(module).items():
        if inspect.isclass(value) and issubclass(value, FedqueueError):
            code = 2 if issubclass(value, (ConfigurationError, TaskError)) else 1
            text = (value.__doc__ or module_says(name, module.__doc__ or "")).partition(">>>")[0]  # no example
            said = " ".join(text.split())
            yield f"| `{name}` | `{value.__mro__[1].__name__}` | {code} | {said} |"


def module_says(name: str, tree: str) -> str:
    """What the tree in the module's docstring says of an error that has no docstring of its own."""
    for line in tree.splitlines():
        _, found, text = line.partition(f" {name} ")
        if found:
            return text.strip()
    return ""
