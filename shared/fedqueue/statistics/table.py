"""A client's table, as `Task.table` returns it: columns of numbers and of categories, with missing values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedqueue.errors import TaskError
from fedqueue.statistics.exact_sum import LARGEST

MAX_COLUMNS = 256
MAX_NAME = 64  # characters of the name of a column or a category


@dataclass(frozen=True)
class Numbers:
    """A column of numbers, float64 (n,): NaN where a value is missing."""

    values: npt.NDArray[np.float64]

    @property
    def missing(self) -> npt.NDArray[np.bool_]:
        """Which rows lack a value, bool (n,)."""
        return np.isnan(self.values)


@dataclass(frozen=True)
class Categories:
    """A column of categories: an index into `names` for each row, int64 (n,), -1 where a value is missing."""

    values: npt.NDArray[np.int64]
    names: tuple[str, ...]

    @property
    def missing(self) -> npt.NDArray[np.bool_]:
        """Which rows lack a value, bool (n,)."""
        return self.values < 0


Column = Numbers | Categories


def read_table(table: Any) -> dict[str, Column]:
    """Return the columns of a table, a mapping of names to one-dimensional arrays of one length.

    Integers and floats are numbers, NaN is a missing value. Strings and booleans are categories, None and "" are
    missing values. Raises TaskError, which names the column and never quotes a value.

    >>> columns = read_table({"age": [61, 58, float("nan")], "ill": [True, False, True]})
    >>> columns["age"].missing.tolist(), columns["ill"].names
    ([False, False, True], ('False', 'True'))
    """
    if not isinstance(table, Mapping):
        raise TaskError(f"Task.table returned {type(table).__name__}; expected a mapping of column names to arrays")
    if not table:
        raise TaskError("Task.table returned no column")
    if len(table) > MAX_COLUMNS:
        raise TaskError(f"Task.table returned {len(table)} columns; at most {MAX_COLUMNS} can be described")
    columns: dict[str, Column] = {}
    for name, values in table.items():
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise TaskError(f"Task.table: a column's name must be a text of 1 to {MAX_NAME} characters, not {name!r}")
        columns[name] = _read_column(name, values)
    lengths = {name: len(column.values) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        (first, rows), (other, more) = next((a, b) for a in lengths.items() for b in lengths.items() if a[1] != b[1])
        raise TaskError(f"Task.table: column {first!r} has {rows} rows, column {other!r} has {more}; expected as many")
    return columns


def _read_column(name: str, values: Any) -> Column:
    array = np.asarray(values)
    if array.ndim != 1:
        raise TaskError(f"Task.table: column {name!r} has the shape {array.shape}; expected one value for each row")
    if array.dtype == object:
        array = _typed(name, array)
    match array.dtype.kind:
        case "f" | "i" | "u":
            return _numbers(name, array)
        case "b":
            return Categories(array.astype(np.int64), ("False", "True"))
        case "U":
            return _categories(name, array)
        case _:
            raise TaskError(
                f"Task.table: column {name!r} has the dtype {array.dtype}; expected numbers, strings or booleans"
            )


def _typed(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An array of Python objects as one of strings, or of numbers."""
    known = [value for value in array if not _is_missing(value)]
    if all(isinstance(value, str) for value in known):
        return np.array([value if isinstance(value, str) else "" for value in array], dtype=np.str_)
    if all(isinstance(value, bool | np.bool_) for value in known):
        return np.array(["" if _is_missing(value) else str(bool(value)) for value in array])
    if all(isinstance(value, int | float | np.number) for value in known):
        return np.array([np.nan if value is None else float(value) for value in array])
    kinds = ", ".join(sorted({type(value).__name__ for value in known}))
    raise TaskError(f"Task.table: column {name!r} has objects ({kinds}); expected numbers, strings or booleans")


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _numbers(name: str, array: npt.NDArray[Any]) -> Numbers:
    numbers = array.astype(np.float64)
    if array.dtype.kind != "f" and np.any(numbers.astype(object) != array.astype(object)):
        raise TaskError(f"Task.table: column {name!r} has integers above 2⁵³, which float64 cannot represent")
    if np.any(np.abs(numbers) > LARGEST):  # not for NaN
        raise TaskError(
            f"Task.table: column {name!r} has an infinite or too large number (magnitudes up to {LARGEST:g}); "
            "mark a missing value with NaN"
        )
    return Numbers(numbers)


def _categories(name: str, array: npt.NDArray[np.str_]) -> Categories:
    names, values = np.unique(array, return_inverse=True)
    texts = [str(text) for text in names]
    if any(len(text) > MAX_NAME or not text.isprintable() for text in texts):
        raise TaskError(
            f"Task.table: column {name!r} has texts above {MAX_NAME} characters, or of several lines; "
            "expected categories"
        )
    indices = values.astype(np.int64)
    if texts and texts[0] == "":  # sorted: the empty text comes first
        return Categories(indices - 1, tuple(texts[1:]))
    return Categories(indices, tuple(texts))
