"""Disables unpickling; Python imports this module before any other if the folder is on PYTHONPATH."""

import pickle
from typing import Any


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("something was unpickled")


class _Refusing(pickle.Unpickler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse()


pickle.load = pickle.loads = _refuse
pickle.Unpickler = _Refusing  # type: ignore[misc]
pickle._Unpickler.load = _refuse  # type: ignore[method-assign]
