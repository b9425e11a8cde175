"""Writes configuration values as TOML, so that worker processes read what was given as Python objects."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any

from fedqueue.errors import ConfigurationError

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def toml_document(tree: Mapping[str, Any]) -> str:
    """`tree` as a TOML document: single values first, then a table for each mapping at the top."""
    tables = {key: value for key, value in tree.items() if isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {toml_value(value, key)}" for key, value in tree.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{_key(name)}]"]
        lines += [f"{_key(k)} = {toml_value(v, f'{name}.{k}')}" for k, v in table.items() if v is not None]
    return "\n".join(lines) + "\n"


def toml_value(value: Any, key: str) -> str:
    """`value` as TOML on one line; raises ConfigurationError, which names `key`, for a type that TOML lacks."""
    match value:
        case bool():
            return "true" if value else "false"
        case str() | PurePath():
            # JSON's escapes are TOML's, but for DEL, which TOML wants escaped and JSON does not escape.
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case Integral():
            return str(int(value))
        case Real():
            number = float(value)
            return repr(number) if math.isfinite(number) else str(number)
        case Mapping():
            pairs = (f"{_key(k)} = {toml_value(v, f'{key}.{k}')}" for k, v in value.items() if v is not None)
            return f"{{{', '.join(pairs)}}}"
        case Sequence() if not isinstance(value, bytes | bytearray):
            return f"[{', '.join(toml_value(item, key) for item in value)}]"
    raise ConfigurationError(key, value, f"type {type(value).__name__} has no form in TOML")


def _key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else toml_value(key, "key")
