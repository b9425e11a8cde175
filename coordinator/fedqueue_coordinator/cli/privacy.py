"""The command that says before a run what its rows would spend."""

from __future__ import annotations

from typing import Annotated

import typer

from fedqueue_coordinator.cli.options import ConfigPath, Json, Sets

PRIVACY_EPILOG = """
Examples:

- `fedqueue privacy federation.toml` counts the rows of each client on this machine.

- `fedqueue privacy federation.toml --rows north=480 --rows south=1200` needs no data.

- `fedqueue privacy federation.toml --rows 300 --set privacy.examples.epsilon=3 --set privacy.examples.jobs=50
--set privacy.examples.max_grad_norm=1 --set privacy.examples.delta=1e-5` says which noise that takes.
"""


def privacy(
    config: ConfigPath,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|CLIENT=N",
            show_default=False,
            help="Rows of each client, or of one. May be repeated; default: counted by the task's train_data.",
        ),
    ] = None,
    max_epsilon: Annotated[
        float | None,
        typer.Option(
            metavar="E", show_default=False, help="The budget to count jobs for; default: privacy.examples.epsilon."
        ),
    ] = None,
    json: Json = False,
    set_: Sets = None,
) -> None:
    """Show what privacy costs: noise and ε of each client after 1, 10 and 100 jobs, and a verdict.

    Of [privacy.examples], for rows, and of [privacy.clients], for whole clients. Starts nothing. The number of rows is
    all that is needed of the data, and for clients the size of the model.
    """
    from fedqueue_coordinator.operator.privacy import show_privacy

    show_privacy(config, set_ or [], rows or [], max_epsilon, json)
