"""Former names of commands and options: each is an error that gives the present name."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

RENAMED = {
    "runs": "list",
    "enroll --all": "enroll --config",
    "compare --modes": "compare --strategies",
    "acl --pool": "acl --shared-worker",
    "acl --split": "acl --dir-per-user",
    "acl --show": "acl --print-urls",
}


class CommandsWithFormerNames(TyperGroup):
    """The commands of `fedqueue`; a former name ends with exit code 2."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As in typer; a former name of a command, or of one of its options, is a usage error."""
        command, *words = args
        for former in (command, *(f"{command} {word.partition('=')[0]}" for word in words)):
            if former in RENAMED:
                ctx.fail(f"`fedqueue {former}` is now `fedqueue {RENAMED[former]}`.")
        return super().resolve_command(ctx, args)
