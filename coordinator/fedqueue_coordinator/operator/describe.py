"""`fedqueue describe`: statistics of all sites' rows before any training, as a table, a picture and JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from fedqueue.config.loading import load_config
from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError, MissingExtra, TaskError
from fedqueue.exception_text import exception_with_place, one_line
from fedqueue.statistics.pooled import CategoryStatistics, NumberStatistics, Quantile, Statistics, common_bins, merge
from fedqueue.statistics.site_answers import SiteTable
from fedqueue.statistics.table import read_table
from fedqueue.task import Task, load_task
from fedqueue_coordinator.operator.json_text import json_text
from fedqueue_coordinator.operator.plain_console import PlainConsole

WIDTH = 140
"""Columns of the tables if the output is not a terminal."""
MOST_SITES = 8  # as columns of the table of sites


def describe(
    path: Path, overrides: Sequence[str], output: Path | None, as_json: bool, url: str = "", wait_seconds: float = 60
) -> bool:
    """Describe the data of all clients; write JSON and a picture, and print tables, or JSON.

    With `url`, or with redis.url in the configuration, the workers of the run are asked, each for at most
    `wait_seconds`; without, the clients' data is on this machine.

    Returns whether each client answered, and any has enough rows. Raises ConfigurationError for a run whose rows are
    protected by keepers or noise and for a file that cannot be written, TaskError or FedqueueError where no client
    answered, and RunExists where the run has begun.
    """
    config = load_config(path, overrides)
    named = config.statistics.file
    target = output or (config.folder / named if named else Path("describe.json"))
    require_plain(config)
    _require_writable(target)
    if address := config.redis.address(url):
        statistics = _ask_workers(config, address, wait_seconds)
    else:
        statistics = describe_here(config, load_task(config.task.entrypoint, config.task.options, config.folder))
    write(statistics, target)
    if as_json:
        typer.echo(json_text(statistics.model_dump(mode="json"), indent=2))
    else:
        show(statistics, target)
    return not statistics.refused and statistics.rows > 0


def _require_writable(target: Path) -> None:
    """Raise ConfigurationError for a file that cannot be written, or that its own picture would replace."""
    if target.suffix != ".json":
        raise ConfigurationError("--output", str(target), "is no JSON file", "name a file that ends with .json")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        existed = target.exists()
        with target.open("ab"):
            pass
        if not existed:  # an empty file would not be statistics if the sites do not answer
            target.unlink()
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise ConfigurationError("--output", str(target), problem, "name another file") from None


def require_plain(config: Config) -> None:
    """Raise ConfigurationError for a run whose sites promise more than minimum counts."""
    if config.secure.on:
        raise ConfigurationError(
            "secure.keepers", list(config.secure.keepers),
            "sites of a run with keepers send sums under masks only, and their statistics cannot be masked yet",
            "describe the data without keepers, with --set secure.keepers=[], if the sites agree",
        )  # fmt: skip
    if config.example_privacy:
        raise ConfigurationError(
            "privacy.examples", None,
            "exact statistics of rows that noise protects in training would be outside of their ε",
            "scale by public numbers, or leave out [privacy.examples] if the sites agree",
        )  # fmt: skip


def describe_here(config: Config, task: Task) -> Statistics:
    """Describe the tables of all clients in this process, with the minimum count of the configuration.

    Raises TaskError where no client has a table, and for columns that differ from client to client.
    """
    tables: dict[str, SiteTable] = {}
    refused: dict[str, str] = {}
    for name in config.clients.ids:
        try:
            columns = read_table(task.table(config.clients.client(name)))
        except (Exception, SystemExit) as error:
            refused[name] = one_line(str(error)) if isinstance(error, TaskError) else exception_with_place(error)
        else:
            tables[name] = SiteTable(columns, config.statistics.min_count)
    if not tables:
        client, why = next(iter(refused.items()))
        raise TaskError(f"no client has a table to describe; {client}: {why}")
    first = {name: table.first_answer() for name, table in tables.items()}
    bins = common_bins(first, config.statistics.bins, config.statistics.bounds)
    return merge(config.name, first, {name: table.second_answer(bins) for name, table in tables.items()}, bins, refused)


def _ask_workers(config: Config, address: str, wait_seconds: float) -> Statistics:
    from fedqueue.protocol.coordinator_identity import load_coordinator_identity
    from fedqueue.transport.connection import check, connect
    from fedqueue.transport.store import Store
    from fedqueue_coordinator.service.statistics_exchange import StatisticsExchange

    signed = config.security.signatures == "required"
    identity = load_coordinator_identity(Path(config.security.keys), config.name) if signed else None
    connection = connect(address, tls=config.redis.tls)
    check(connection, address)
    said: list[str] = []

    def waiting(clients: Collection[str]) -> None:
        if said != sorted(clients):
            said[:] = sorted(clients)
            typer.echo(f"fedqueue: waiting for {_listed(said)}", err=True)

    store = Store(connection, config.name)
    return StatisticsExchange(store, identity, config.clients.ids, wait_seconds, waiting).describe(config)


def write(statistics: Statistics, target: Path) -> None:
    """Write `target`, and a picture of the same name beside it where matplotlib is installed."""
    target.write_text(json_text(statistics.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    picture = target.with_suffix(".png")
    try:
        from fedqueue_coordinator.operator.reports.statistics_plot import draw  # imports matplotlib, which takes long
    except MissingExtra:
        picture.unlink(missing_ok=True)
    else:
        draw(picture, statistics)


def show(statistics: Statistics, target: Path) -> None:
    """Print the tables, what is not in them and why, and where the files are."""
    console = PlainConsole()
    if not console.is_terminal:
        console.width = WIDTH
    numbers = {name: of for name, of in statistics.columns.items() if isinstance(of, NumberStatistics)}
    texts = {name: of for name, of in statistics.columns.items() if isinstance(of, CategoryStatistics)}
    answered = sum(1 for rows in statistics.sites.values() if rows)
    title = f"{statistics.run}: {statistics.rows} rows at {answered} sites"
    if numbers:
        console.print(_number_table(statistics, numbers, title))
    if texts:
        console.print(_category_table(statistics, texts, "" if numbers else title))
    if statistics.columns and len(statistics.sites) <= MOST_SITES:
        console.print(_site_table(statistics))
    for line in remarks(statistics):
        console.print(line, soft_wrap=True)
    picture = target.with_suffix(".png")
    console.print(f"statistics: {target}" + (f"   picture: {picture}" if picture.exists() else ""), soft_wrap=True)
    if not picture.exists():
        console.print(str(MissingExtra(picture.name, "matplotlib", "plots")), soft_wrap=True)


def _number_table(statistics: Statistics, columns: Mapping[str, NumberStatistics], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for head in ("numbers", "values", "missing", "mean", "deviation", "5 %", "25 %", "median", "75 %", "95 %"):
        table.add_column(head, justify="left" if head == "numbers" else "right", no_wrap=head == "numbers")
    for name, of in columns.items():
        quantiles = [_with_bound(of.quantiles.get(q)) for q in ("0.05", "0.25", "0.5", "0.75", "0.95")]
        missing = f"≤ {of.missing}" if statistics.hides_missing(name) else str(of.missing)
        table.add_row(name, str(of.count), missing, _short(of.mean), _short(of.deviation), *quantiles)
    return table


def _category_table(statistics: Statistics, columns: Mapping[str, CategoryStatistics], title: str) -> Table:
    table = Table(title=title or None, title_justify="left")
    for head in ("categories", "values", "missing", "shares"):
        table.add_column(head, justify="right" if head in ("values", "missing") else "left")
    for name, of in columns.items():
        total = max(1, sum(of.counts.values()) + of.other)
        ranked = sorted(of.counts.items(), key=lambda item: -item[1])
        shares = [f"{category} {count / total:.1%}" for category, count in ranked]
        shares += [f"others {of.other / total:.1%}"] if of.other else []
        missing = f"≤ {of.missing}" if statistics.hides_missing(name) else str(of.missing)
        table.add_row(name, str(of.count), missing, ", ".join(shares) or "kept back")
    return table


def _site_table(statistics: Statistics) -> Table:
    table = Table(title="at each site: mean ± deviation, or the largest category", title_justify="left")
    table.add_column("column", no_wrap=True)
    for site, rows in statistics.sites.items():
        table.add_column(f"{site} ({rows})" if rows else site, justify="right")
    for name, of in statistics.columns.items():
        cells = []
        for site in statistics.sites:
            if site not in of.sites:
                cells.append("too few")
            elif isinstance(of, NumberStatistics):
                own = of.sites[site]
                cells.append("kept back" if own.mean is None else f"{_short(own.mean)} ± {_short(own.deviation)}")
            else:
                shares = of.sites[site].shares
                largest = max(shares, key=shares.__getitem__, default=None)
                cells.append(f"{largest} {shares[largest]:.0%}" if largest is not None else "–")
        table.add_row(name, *cells)
    return table


def remarks(statistics: Statistics) -> list[str]:
    """Say what the figures leave out, one sentence a line."""
    lines = []
    aside: dict[str, list[str]] = {}
    for name, of in statistics.columns.items():
        for site in of.set_aside_at:
            aside.setdefault(site, []).append(name)
    for site, names in aside.items():
        least = statistics.min_count[site]
        lines.append(
            f"{site} set values of {_listed(names)} aside, fewer than {least} of each: the number of missing values "
            f"would have been below its minimum of {least}"
        )
    for site, names_too_few in statistics.too_few.items():
        least = statistics.min_count[site]
        what = f"its table has fewer than {least} rows" if not statistics.sites[site] else _listed(names_too_few)
        lines.append(
            f"{site} is left out: {what}"
            if not statistics.sites[site]
            else f"{site} describes no {what}: fewer than {least} values"
        )
    for site, kept in statistics.kept_back.items():
        lines.append(f"{site} keeps back {_listed(kept)}: its policy.toml does not name them under statistics")
    for site, why in statistics.refused.items():
        lines.append(
            f"{site} {'gives no histogram' if site in statistics.sites else 'answered nothing'}: {one_line(why)}"
        )
    if any(isinstance(of, NumberStatistics) and of.quantiles for of in statistics.columns.values()):
        lines.append("A quantile of all rows is within its ±; ≥ and ≤ stand where it is in an open bin.")
    return lines


def _with_bound(quantile: Quantile | None) -> str:
    if quantile is None or (quantile.low is None and quantile.high is None):
        return "–"
    if quantile.low is None:
        return f"≤ {_short(quantile.high)}"
    if quantile.high is None:
        return f"≥ {_short(quantile.low)}"
    assert quantile.value is not None
    bound = max(quantile.high - quantile.value, quantile.value - quantile.low)
    return f"{_short(quantile.value)} ± {bound:.2g}"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _listed(names: Sequence[Any]) -> str:
    return str(names[0]) if len(names) == 1 else f"{', '.join(map(str, names[:-1]))} and {names[-1]}"
