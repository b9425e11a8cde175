"""The error classes form the tree in the module's docstring, and each error says what to do."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import fedqueue
from fedqueue import errors


def drawn() -> dict[str, str]:
    """Return the parent of each class, as the docstring draws the tree."""
    parents: dict[Any, Any] = {}
    path: list[Any] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)([A-Z][A-Za-z]+)(?:\s|$)", line)
        if not match:
            continue
        depth = len(match[1]) // 4
        path[depth:] = [match[2]]
        parents[match[2]] = path[depth - 1] if depth else "Exception"
    return parents


def defined() -> dict[str, str]:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    return {c.__name__: c.__bases__[0].__name__ for c in classes}


def test_docstring_draws_every_error_under_its_parent() -> None:
    assert len(drawn()) > 10
    assert drawn() == defined()


def test_every_error_has_a_docstring_or_a_message_of_its_own() -> None:
    for name in defined():
        cls = getattr(errors, name)
        assert cls.__doc__ or "__init__" in vars(cls), name


def test_root_is_public() -> None:
    assert fedqueue.FedqueueError is errors.FedqueueError


@pytest.mark.parametrize(
    ("error", "fields", "message"),
    [
        (
            errors.ConfigurationError("stop.seconds", -1, "must be greater than 0", "write 'off'"),
            {"key": "stop.seconds", "value": -1, "problem": "must be greater than 0", "hint": "write 'off'"},
            "stop.seconds = -1: must be greater than 0; write 'off'",
        ),
        (
            errors.ConfigurationError("redis.url", None, "missing"),
            {"key": "redis.url", "value": None, "problem": "missing", "hint": ""},
            "redis.url: missing",
        ),
        (errors.RunNotFound("digits"), {"run": "digits"}, "no run named 'digits'"),
        (
            errors.RunExists("digits", "has ended", "choose another name"),
            {"run": "digits", "problem": "has ended", "hint": "choose another name"},
            "run 'digits' has ended; choose another name",
        ),
        (errors.BlobMissing("k:0"), {"key": "k:0"}, "k:0 is not stored"),
    ],
)
def test_error_stores_its_fields_and_describes_the_problem(error: Any, fields: dict[str, Any], message: str) -> None:
    assert {name: getattr(error, name) for name in fields} == fields
    assert message in str(error)
