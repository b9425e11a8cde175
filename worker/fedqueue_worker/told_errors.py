"""What the coordinator is told of refusals and failures at a site that does not tell its rows, or how many they are.

The site's own log has the whole text.
"""

from __future__ import annotations

from fedqueue.errors import FedqueueError, PolicyRefusal
from fedqueue.exception_text import exception_with_place, printable

ROWS = "whose rows are protected"
NUMBER = "whose number of examples is hidden"


def told_refusal(error: FedqueueError, examples_hidden: bool) -> str:
    """Return the text of a refusal.

    Where the number of examples is hidden, the text of a policy has only the name of its rule: the steps of a job and
    the ε that it costs follow from that number.
    """
    rule, colon, _ = str(error).partition(":")
    if examples_hidden and isinstance(error, PolicyRefusal) and colon:
        return printable(f"{rule}: the numbers stay at the site, {NUMBER}")
    return printable(str(error))


def told_failure(error: BaseException, kept: str = "") -> str:
    """Return the text of an exception; of one that the task's code raised only its type, where something is `kept`.

    `kept` says why, as ROWS does. The text of such an exception may quote a row, or how many there are.
    """
    if kept and not isinstance(error, FedqueueError):
        return f"{type(error).__name__}: its text stays at the site, {kept}"
    return exception_with_place(error)
