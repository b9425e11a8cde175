"""The documents agree with the code: links, commands, options, keys, reasons, errors, scripts, file names."""

from __future__ import annotations

import inspect
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

import fedqueue.errors
from fedqueue.config.schema import Config
from fedqueue_coordinator.cli.main import app
from fedqueue_coordinator.core.reasons import AbandonReason, RejectionReason
from fedqueue_keeper.cli import app as keeper_app
from fedqueue_worker.cli import app as worker_app
from tests.support.script_module import load_script

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
PAGES = [page for page in PAGES if "_build" not in page.parts]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
SCRIPTS = sorted((ROOT / "shared" / "fedqueue" / "transport" / "scripts").glob("*.lua"))
COMMANDS: Any = typer.main.get_command(app)
WORKER: Any = typer.main.get_command(worker_app)
KEEPER: Any = typer.main.get_command(keeper_app)
POLICY_KEYS = {
    "entrypoints",
    "max_epochs",
    "max_steps",
    "max_batch_size",
    "metrics",
    "min_examples",
    "statistics",
    "min_count",
    "require",
    "max_leak",
    "keepers",
    "min_keepers",
    "min_cohort",
    "max_epsilon",
    "delta",
}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of each code block of the page; an indented block has no language."""
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        yield language, block
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^ {4,}\S.*\n?)+", prose, re.MULTILINE):
        yield "", inspect.cleandoc(block)


def printed_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command of ours in a code block, without comments."""
    for language, block in blocks(page):
        if language in ("", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(\.venv/bin/)?fedqueue(-worker|-keeper)? ", line):
                    program, *words = shlex.split(re.sub(r"\s#\s.*", "", line).split("|")[0])
                    yield [program.removeprefix(".venv/bin/"), *words]


# Generated pages


def test_configuration_page_is_what_the_configuration_says() -> None:
    page = load_script(ROOT / "docs" / "make_configuration.py").page()
    assert (ROOT / "docs" / "configuration.md").read_text() == page, "outdated: run docs/make_configuration.py"


def test_every_option_is_documented() -> None:
    plain = {"optimizer", "learning_rate", "batch_size", "mode", "function", "versions", "updates", "seconds", "name"}
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE)
    assert len(rows) > 60
    assert not [name for name, text in rows if not text.strip() and name not in plain | {"seed", "max_steps"}]


def test_diagrams_are_what_their_script_draws() -> None:
    script = load_script(ROOT / "docs" / "make_diagrams.py")
    for name, draw in script.DIAGRAMS.items():
        assert (ROOT / "docs" / "pictures" / name).read_text() == draw(), "outdated: run docs/make_diagrams.py"


# Links and files


@each_page
def test_every_link_to_a_file_leads_to_one(page: Any) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_of_the_site_is_in_a_table_of_contents() -> None:
    listed = set()
    for page in ROOT.glob("docs/**/*.md"):
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            names = [re.sub(r".*<(.*)>", r"\1", line) for line in block.splitlines() if line and line[0] != ":"]
            listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    pages = {page.resolve() for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert pages - listed == {ROOT / "docs" / "index.md"}
    assert listed <= pages


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "TESTING.md"])
def test_every_file_that_a_root_page_names_is_there(name: str) -> None:
    coordinator = ROOT / "coordinator" / "fedqueue_coordinator"
    for path in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|lua|md|toml))`", (ROOT / name).read_text()):
        if not re.search(r"NAME|SECTION|task_", path):
            assert (ROOT / path).exists() or (coordinator / path).exists(), f"{name} names {path}"


# Commands and keys


@each_page
def test_every_printed_command_and_option_exists(page: Any) -> None:
    for program, *words in printed_commands(page):
        said = f"{page.name}: {program} {' '.join(words)}"
        command = KEEPER if program == "fedqueue-keeper" else WORKER
        if program == "fedqueue" and words[0] != "worker":
            assert words[0] in {*COMMANDS.commands, "COMMAND", "--help", "--version"}, said
            command = COMMANDS.commands.get(words[0], COMMANDS)
        options = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        for word in words:
            if word.startswith("-"):
                assert word.partition("=")[0] in options | {"--help"}, said


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every key below `section`, with `*` in place of a name that the user chooses."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if inspect.isclass(t)]
        for kind in inner:
            if issubclass(kind, BaseModel):
                yield from keys_of(kind, f"{prefix}{name}.")
        if field.annotation is dict or getattr(field.annotation, "__origin__", None) is dict:
            yield f"{prefix}{name}.*"


KEYS = set(keys_of(Config))


def known(key: str) -> bool:
    """Whether the configuration has the key, or a parent table that accepts any name."""
    parts = key.split(".")
    return key in KEYS or any(".".join(parts[:n]) + ".*" in KEYS for n in range(1, len(parts)))


def leaves(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and any(k == key or k.startswith(f"{key}.") for k in KEYS) and not known(f"{key}.x"):
            yield from leaves(value, f"{key}.")
        else:
            yield key


def is_policy(table: dict[str, Any]) -> bool:
    """Whether the table is a site's policy; `statistics` is a list there, and a section of a configuration."""
    return set(table) <= POLICY_KEYS and not isinstance(table.get("statistics"), dict)


@each_page
def test_every_key_that_a_page_sets_exists(page: Any) -> None:
    for language, block in blocks(page):
        if language == "toml" and not is_policy(tomllib.loads(block)):
            assert not [key for key in leaves(tomllib.loads(block)) if not known(key)], page.name
    for _, *words in printed_commands(page):
        for option, value in itertools.pairwise(words):
            if option in ("--set", "-s", "--tune", "--seed-key"):
                assert known(value.partition("=")[0]), f"{page.name}: {value}"
            elif option == "--variant":
                for setting in value.partition(": ")[2].split():
                    assert known(setting.partition("=")[0]), f"{page.name}: {setting}"


@each_page
def test_every_key_that_a_page_mentions_exists(page: Any) -> None:
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    for section, key in re.findall(r"`([a-z_]+)\.([a-z_.]+)`", page.read_text()):
        if section in sections and not key.endswith(("py", "toml", "jsonl", "safetensors", "md", "lua")):
            assert known(f"{section}.{key}"), f"{page.name}: {section}.{key}"


# Outcomes


def reasons() -> set[str]:
    """Return every reason for a rejected update or an abandoned job."""
    return {*RejectionReason, *AbandonReason}


def test_every_reason_has_a_row() -> None:
    page = (ROOT / "docs" / "reference" / "outcomes.md").read_text()
    rows = {name for row in re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert len(reasons()) > 20
    assert not reasons() - rows


def test_every_error_that_ends_a_command_has_advice() -> None:
    page = (ROOT / "docs" / "reference" / "outcomes.md").read_text()
    silent = {"FedqueueError", "WireError", "StoreError"}  # base classes, which are never raised
    for name, value in vars(fedqueue.errors).items():
        if inspect.isclass(value) and issubclass(value, fedqueue.errors.FedqueueError) and name not in silent:
            assert f"`{name}`" in page, name


# The protocol


def test_protocol_names_every_script_and_every_key() -> None:
    protocol = (ROOT / "PROTOCOL.md").read_text()
    for script in SCRIPTS:
        assert f"`{script.stem}`" in protocol, script.stem
    keys = (ROOT / "shared" / "fedqueue" / "protocol" / "keys.py").read_text()
    for name in re.findall(r'self\._key\(f?"(\w+)', keys):
        assert re.search(rf"`{name}[`:]", protocol), name


def test_every_script_says_its_keys_arguments_and_answer() -> None:
    for script in SCRIPTS:
        text = script.read_text()
        head = "\n".join(line for line in text.splitlines() if line.startswith("--"))
        body = "\n".join(line for line in text.splitlines() if not line.startswith("--"))
        assert re.search(r"^-- (Returns|What)", head, re.MULTILINE), script.name
        for kind in ("KEYS", "ARGV"):
            used = {int(n) for n in re.findall(rf"{kind}\[(\d+)\]", body)}
            said = {int(n) for n in re.findall(rf"{kind}\[(\d+)[…\]]", head)}
            assert used <= said, f"{script.name}: {kind} {sorted(used - said)} not in its header"
