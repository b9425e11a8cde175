"""The command that compares aggregation algorithms under a virtual clock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedqueue.exit_codes import FAILED
from fedqueue_coordinator.cli.options import ConfigPath, Overwrite, Sets

COMPARE_EPILOG = """
Examples:

- `fedqueue compare federation.toml --seeds 5` compares fedavg, fedasync and fedbuff, each with five seeds.

- `fedqueue compare federation.toml --strategies fedbuff --speeds 1:2:10` makes each third client ten times slower.

- `fedqueue compare federation.toml --variant "small: aggregation.buffer_size=2" --variant "large:
aggregation.buffer_size=8" --tune server_optimizer.learning_rate=0.5,1.0` compares two settings, each tuned by itself.

- `fedqueue compare federation.toml` with a section `[compare]` in the file compares what that section says.
"""


def compare(
    config: ConfigPath,
    strategies: Annotated[
        str,
        typer.Option(
            metavar="A,B,…",
            show_default=False,
            help="Aggregation strategies; default: compare.strategies, else fedavg,fedasync,fedbuff, or none where "
            "variants are given.",
        ),
    ] = "",
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar='"NAME: KEY=VALUE …"',
            help="A variant with settings of its own. May be repeated. Default: compare.variants.",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Run each variant with the seeds 0 to N−1; default: compare.seeds, 3."),
    ] = None,
    seed_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="A further key that gets the seed, such as task.options.seed. May be repeated. Default: "
            "compare.seed_keys.",
        ),
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B,…",
            help="Choose the best of these values for each variant, on two separate seeds. May be repeated. Default: "
            "compare.tune.",
        ),
    ] = None,
    updates: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Updates per run; 0: stop.updates, or else 50 per client. Default: compare.updates.",
        ),
    ] = None,
    speeds: Annotated[
        str,
        typer.Option(
            metavar="A:B:…",
            show_default=False,
            help="Slowdown factors, given to the clients in turn; default: compare.speeds, else clients.slowdown.",
        ),
    ] = "",
    batch_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S", min=1e-9, help="Virtual seconds that one batch takes; default: compare.batch_seconds, 0.01."
        ),
    ] = None,
    job_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0,
            help="Virtual seconds from the dispatch of a job until it begins; default: compare.job_seconds, 0.01.",
        ),
    ] = None,
    jitter: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            help="Relative noise of each job's duration; 0.1 is 10 %; default: compare.jitter, 0.1.",
        ),
    ] = None,
    set_: Sets = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Write results to DIR; default: runs/NAME-compare.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare aggregation strategies on the same clients and speeds, under a virtual clock.

    Training is real, in this process, with the coordinator's own state machine; only time is computed. A job takes its
    number of batches times --batch-seconds times clients.slowdown. Each run continues past its target until it has
    merged --updates. The section [compare] of CONFIG.toml can hold what the options say. Writes comparison.md,
    comparison.json and comparison.png, and prints the table.
    Exits with 1 if a run failed or merged no update.
    """
    from fedqueue_coordinator.operator.compare import compare_strategies
    from fedqueue_coordinator.operator.compare_options import (
        CompareOptions,
        parse_axes,
        parse_speeds,
        parse_strategies,
        parse_variant,
    )

    settings = {
        "seeds": seeds, "seed_keys": tuple(seed_key) if seed_key else None, "speeds": parse_speeds(speeds),
        "updates": updates, "batch_seconds": batch_seconds, "job_seconds": job_seconds, "jitter": jitter,
    }  # fmt: skip
    options = CompareOptions(
        parse_strategies(strategies), [parse_variant(text) for text in variant or []], parse_axes(tune or []), settings
    )
    if not compare_strategies(config, options, set_ or [], output, overwrite):
        raise typer.Exit(FAILED)
