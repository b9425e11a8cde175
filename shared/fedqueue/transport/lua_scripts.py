"""Runs the Lua scripts in `scripts/`: every step that must be atomic is one of them.

A script is named after what it does. Its header documents its keys, its arguments and what it returns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, TypeAlias

import redis

from fedqueue.transport.zero_copy import Command, Moved, checked, exchange, ignore_moved

_SCRIPTS = resources.files("fedqueue.transport").joinpath("scripts")
WORKER_SCRIPTS = ("join", "register", "leave", "claim", "release", "heartbeat", "store_piece", "post")
"""The scripts that a worker runs; access rules allow it no others."""
Call: TypeAlias = tuple[str, list[str], list[Any]]
"""A script's name, its keys and its arguments."""


@cache
def script_digest(name: str) -> str:
    """The name under which Redis caches `scripts/NAME.lua`: its SHA-1, in hex."""
    source = _SCRIPTS.joinpath(f"{name}.lua").read_text(encoding="utf-8")
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class ScriptRunner:
    """Mixin for a store with a client `redis`."""

    redis: redis.Redis

    def script(
        self,
        name: str,
        keys: list[str],
        args: list[Any],
        first: Sequence[Command] = (),
        then: Sequence[Command] = (),
        moved: Moved = ignore_moved,
    ) -> Any:
        """Run `scripts/NAME.lua` atomically; the commands `first` and `then` travel before and after it.

        `moved` is called as by `exchange`.
        """
        return self.scripts([(name, keys, args)], first, then, moved)[-1]

    def scripts(
        self,
        calls: Sequence[Call],
        first: Sequence[Command] = (),
        then: Sequence[Command] = (),
        moved: Moved = ignore_moved,
    ) -> list[Any]:
        """Run several scripts, each atomically, in one round trip; returns their replies.

        Raises the first error among `first` and the scripts. Replies to `then` are discarded. A restarted server has
        lost its scripts: a client with the right to load them does so, and everything is sent again. A worker whose
        access rules forbid it gets NoScriptError and waits for its coordinator (`retry.py`).
        """
        own = [("EVALSHA", script_digest(name), len(keys), *keys, *args) for name, keys, args in calls]
        commands, wanted = [*first, *own, *then], slice(len(first) + len(own))
        try:
            answers = checked(exchange(self.redis, commands, moved=moved)[wanted])
        except redis.exceptions.NoScriptError as missing:
            try:
                self.load_scripts()
            except redis.exceptions.NoPermissionError:
                raise missing from None
            answers = checked(exchange(self.redis, commands, moved=moved)[wanted])
        return answers[len(first) :]

    def load_scripts(self) -> None:
        """Load every script into the server's cache, including those that only workers run."""
        pipe = self.redis.pipeline(transaction=False)
        for file in _SCRIPTS.iterdir():
            if file.name.endswith(".lua"):
                pipe.script_load(file.read_text(encoding="utf-8"))
        pipe.execute()
