"""`fedqueue.run` and `fedqueue.simulate`: a whole federation from a script or a notebook cell."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import numpy as np
import structlog
import torch
from pydantic.fields import FieldInfo

from fedqueue.config.entrypoint import import_entrypoint
from fedqueue.config.loading import load_config, override_config
from fedqueue.config.schema import Config
from fedqueue.config.sections import Section, Word
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.logs import configure_structlog, log_level
from fedqueue.task import Task, construct_task, load_task, prepare_task
from fedqueue_coordinator.algorithms.registry import check_algorithms
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator.local_run import run_federation
from fedqueue_coordinator.operator.results import deliver_results, summary_of
from fedqueue_coordinator.operator.run_folder import LAUNCH_CONFIG_FILENAME, LOG_FILENAME, PYTHON, Launch, RunFolder
from fedqueue_coordinator.operator.task_source import find_entrypoint
from fedqueue_coordinator.operator.toml_text import toml_document, toml_value
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel
from fedqueue_coordinator.tracking.feed import HookFeed
from fedqueue_coordinator.tracking.hooks import RunHooks
from fedqueue_coordinator.tracking.registry import make_trackers

Source = str | Path | Mapping[str, Any] | Config | Task | type[Task]
"""The path of a configuration file (TOML), its content as a dict, a `Config`, or a task: its class or an instance."""

SHORT_NAMES = {
    "strategy": ("aggregation", "strategy"),
    "versions": ("stop", "versions"),
    "updates": ("stop", "updates"),
    "seconds": ("stop", "seconds"),
    "target": ("stop", "target"),
    "options": ("task", "options"),
}


def run(
    source: Source,
    *,
    workers: int = 4,
    folder: str | Path | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
    hooks: Sequence[RunHooks] = (),
    **settings: Any,
) -> RunResult:
    """Run a whole federation on this machine, with a real server and real worker processes, as `fedqueue run` does.

    `source` is the path of a configuration file (TOML), its content as a dict, a `Config`, a `Task` class, or an
    instance of a class whose constructor needs no argument. Worker processes import the class, so it must be in a file.
    A class of the running script may stand above the call. A class of a notebook cell is refused: `simulate` takes it.

    `settings` override the configuration: `clients` (their number, or their names), `strategy`
    (`aggregation.strategy`), `versions`, `updates`, `seconds` and `target` (`stop.…`), `options` (`task.options`), and
    any section or value by its own name, such as `training={"local_epochs": 2}` or `seed=1`. Environment variables
    `FEDQUEUE_SECTION__KEY` override what `source` says, as they do on the command line.

    The results are written to `folder`, by default `runs/NAME`; at the end of the run they replace those of an earlier
    run of the same task. An interrupt (Ctrl-C, or a notebook's stop button) ends the run and keeps the model so far. A
    run that failed is returned with `failed` set, and `stopped_because` says why. With `overwrite`, an unfinished run
    in `folder` is deleted, results of another task are replaced, and a run of the same name that has ended is deleted
    from Redis. `show_progress` writes the run's progress to stderr. `hooks` follow the run, as do the trackers of the
    configuration.

    Raises ConfigurationError for a setting that is not accepted, and for a `folder` with files that no run of fedqueue
    made or, without `overwrite`, with an unfinished run or results of another task. Raises TaskError for a task that
    cannot be imported or constructed, RunExists where a run in `folder` is still active, and ServerUnavailable without
    a Redis server.

    >>> import tempfile
    >>> import fedqueue
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = fedqueue.run("examples/digits/federation.toml", workers=2, versions=1, folder=folder)
    >>> result.version, result.failed
    (1, False)
    """
    _refuse_during_import()
    overrides = _overrides(settings)
    with contextlib.ExitStack() as stack:
        if isinstance(source, str | Path):
            path, task = Path(source).resolve(), None
            config = load_config(path, overrides)
            results = _folder_for(config, folder)
            stack.enter_context(results.opened(Launch(path, overrides, workers, run=config.name), overwrite))
        else:
            tree, base = _tree_of(source)
            config = override_config(copy.deepcopy(tree), overrides)
            if file := config.statistics.file:  # the configuration moves to the folder of the results
                overrides = [*overrides, f"statistics.file={(base / file).resolve()}"]
            results = _folder_for(config, folder)
            path = results.path.resolve() / LAUNCH_CONFIG_FILENAME
            origin = _origin(source, config, base)
            launch = Launch(path, overrides, workers, run=config.name, origin=origin)
            stack.enter_context(results.opened(launch, overwrite))
            if isinstance(source, Task | type):
                cls = source if isinstance(source, type) else type(source)
                tree["task"] = {"entrypoint": find_entrypoint(cls, results.path)}
            else:
                _move_paths(tree, base, results.path)
            config = override_config(copy.deepcopy(tree), overrides).located(results.path)
            task = _constructible_by_workers(source, config) if isinstance(source, Task | type) else None
            path.write_text(toml_document(_without_url(tree)), encoding="utf-8")
        return _run(config, results, show_progress, task, overwrite, hooks)


def simulate(
    source: Source,
    *,
    folder: str | Path | None = None,
    overwrite: bool = False,
    hooks: Sequence[RunHooks] = (),
    batch_seconds: float = 0.01,
    job_seconds: float = 0.01,
    jitter: float = 0.1,
    **settings: Any,
) -> RunResult:
    """Run a whole federation in this process under a virtual clock, with the coordinator's own state machine.

    Training is real; only time is computed. A job takes `job_seconds`, and `batch_seconds` for each batch times
    `clients.slowdown` of its client; `jitter` is the standard deviation of the logarithm of each job's noise. Two
    calls with the same arguments return the same model to the bit.

    `source`, `hooks` and `settings` are those of `run`. Any task will do here, also a class of a notebook cell or an
    instance whose constructor took arguments. Files are written only where `folder` is given, as `run` writes them.
    torch's random generator and its number of threads are the same after the call as before.

    Raises ConfigurationError and TaskError as `run`, and RunFailed where no client can train any more.

    >>> import torch
    >>> import fedqueue
    >>> class Line(fedqueue.Task):
    ...     def model(self):
    ...         return torch.nn.Linear(1, 1)
    ...     def train_data(self, client):
    ...         x = torch.linspace(client.partition, client.partition + 1, 64).unsqueeze(1)
    ...         return torch.utils.data.TensorDataset(x, 2 * x + 1)
    ...     def loss(self, model, batch):
    ...         inputs, targets = batch
    ...         return torch.nn.functional.mse_loss(model(inputs), targets)
    >>> result = fedqueue.simulate(Line, clients=4, strategy="fedbuff", versions=20)
    >>> result.version, sorted(result.state_dict())
    (20, ['bias', 'weight'])
    """
    _refuse_during_import()
    overrides = _overrides(settings)
    if isinstance(source, str | Path):
        config = load_config(source, overrides)
    else:
        tree, base = _tree_of(source)
        config = override_config(tree, overrides).located(base)
    if isinstance(source, Task):
        task = source
    elif isinstance(source, type):
        task = construct_task(source, config.task.options)
    else:
        task = load_task(config.task.entrypoint, config.task.options, config.folder)
    config = prepare_task(task, config)
    check_algorithms(config)
    with contextlib.ExitStack() as stack:
        results = RunFolder(Path(folder), PYTHON) if folder is not None else None
        if results:
            path = Path(source).resolve() if isinstance(source, str | Path) else Path()
            launch = Launch(path, overrides, 0, "simulate", config.name, _origin(source, config, config.folder))
            stack.enter_context(results.opened(launch, overwrite))
        stack.enter_context(_torch_settings_kept())
        torch.set_num_threads(config.training.threads)
        timing = TimingModel(batch_seconds, job_seconds, jitter)
        feed = stack.enter_context(HookFeed(config, make_trackers(config, hooks)))
        result = Simulation(config, ClientDatasets(task), timing, observer=feed).run()
        if results:
            summary, result = deliver_results(results, config, result, checkpoint_saved=True)
        else:
            summary = summary_of(config, result)
        feed.end({**summary, "folder": str(result.folder) if result.folder else None})
        return result


def _run(
    config: Config,
    folder: RunFolder,
    show_progress: bool,
    task: Task | None,
    overwrite: bool,
    hooks: Sequence[RunHooks],
) -> RunResult:
    launch = folder.launch()
    assert launch is not None
    with (folder.path / LOG_FILENAME).open("a") as log, _log_into(log, config), _torch_settings_kept():
        result = run_federation(
            config, launch, folder, quiet=not show_progress, resume=False, task=task, overwrite=overwrite, hooks=hooks
        )
    if result is None:
        raise KeyboardInterrupt
    return result


def _origin(source: Source, config: Config, base: Path) -> str:
    """What the results are of, to tell those of one project from another's: a file, or a class and where it is."""
    if isinstance(source, str | Path):
        return str(Path(source).resolve())
    if isinstance(source, Task | type):
        cls = source if isinstance(source, type) else type(source)
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        return f"{Path(file).resolve() if file else cls.__module__}:{cls.__qualname__}"
    where, colon, name = config.task.entrypoint.rpartition(":")
    return f"{(base / where).resolve() if where.endswith('.py') else where}{colon}{name}"


def _refuse_during_import() -> None:
    """Raise TaskError where a task's module starts a run while it is imported: each worker would start one more."""
    frame: FrameType | None = sys._getframe(1)
    while frame:
        if frame.f_code is import_entrypoint.__code__:
            raise TaskError(
                "the task's module starts a run while it is imported: put the call of fedqueue.run or "
                "fedqueue.simulate below `if __name__ == '__main__':`"
            )
        frame = frame.f_back


def _folder_for(config: Config, folder: str | Path | None) -> RunFolder:
    return RunFolder(Path(folder) if folder is not None else Path("runs") / config.name, PYTHON)


# What the caller gave, as a configuration


def _tree_of(source: Mapping[str, Any] | Config | Task | type[Task]) -> tuple[dict[str, Any], Path]:
    """The content of a configuration file that says what `source` says, and the folder that its paths start from."""
    match source:
        case Config():
            return _values(source), source.folder
        case Mapping():
            return copy.deepcopy(dict(source)), Path.cwd()
        case Task():
            cls: type[Any] = type(source)
        case type():
            cls = source
        case _:
            cls = object
    if not issubclass(cls, Task):
        hint = "give the path of a configuration file, a dict, a Config, or a Task"
        raise ConfigurationError("source", source, "is no configuration and no task", hint)
    return {"name": cls.__name__, "task": {"entrypoint": f"{cls.__module__}:{cls.__qualname__}"}, "stop": {}}, Path()


def _values(section: Section) -> dict[str, Any]:
    """What was set in `section`, tables as dicts; with those keys that a dump for other machines leaves out."""
    values = {name: getattr(section, name) for name in sorted(section.model_fields_set)}
    return {name: _plain(value, type(section).model_fields[name]) for name, value in values.items()}


def _plain(value: Any, field: FieldInfo | None) -> Any:
    """`value` as a configuration file writes it: a table for a section, and a word such as `off` for None."""
    if isinstance(value, Section):
        return _values(value)
    words = (item.word for item in (field.metadata if field else ()) if isinstance(item, Word))
    return next(words, None) if value is None else value


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    """`settings` as the words of `--set`."""
    words: list[str] = []
    for name, value in settings.items():
        if name == "clients" and not isinstance(value, Mapping | Section):
            named = isinstance(value, Sequence) and not isinstance(value, str)
            words += [f"clients.names={toml_value(value if named else [], 'clients')}"]
            words += [] if named else [f"clients.count={toml_value(value, 'clients')}"]
        elif name in SHORT_NAMES:
            section, key = SHORT_NAMES[name]
            words += _words(section, Config.model_fields[section], {key: value})
        else:
            words += _words(name, Config.model_fields.get(name), value)
    return words


def _words(key: str, field: FieldInfo | None, value: Any) -> Iterator[str]:
    """One `key=value` for each value of a section, and one for anything else."""
    section = field.annotation if field else None
    plain = _plain(value, field)
    if isinstance(plain, Mapping) and isinstance(section, type) and issubclass(section, Section):
        for name, inner in plain.items():
            yield from _words(f"{key}.{name}", section.model_fields.get(name), inner)
    else:
        yield f"{key}={toml_value(plain, key)}"


def _move_paths(tree: dict[str, Any], base: Path, folder: Path) -> None:
    """Rewrite the paths of code in `tree`, which start from `base`, so that they start from `folder`."""
    aggregation = tree.get("aggregation", {})
    entrypoints = [
        (tree.get("task", {}), "entrypoint"),
        (aggregation, "strategy"),
        (aggregation.get("staleness", {}), "function"),
    ]

    def moved(entrypoint: str) -> str:
        where, colon, name = entrypoint.rpartition(":")
        if not (colon and where.endswith(".py")):
            return entrypoint
        return f"{os.path.relpath((base / where).resolve(), folder.resolve())}:{name}"

    for table, key in entrypoints:
        if key in table:
            table[key] = moved(str(table[key]))
    if trackers := tree.get("trackers"):
        use = trackers.get("use", ())
        trackers["use"] = [moved(str(name)) for name in ((use,) if isinstance(use, str) else use)]
        if "options" in trackers:
            trackers["options"] = {moved(str(name)): options for name, options in trackers["options"].items()}


def _without_url(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` without `redis.url`, which may hold a password: worker processes get it in their environment."""
    redis = {key: value for key, value in tree.get("redis", {}).items() if key != "url"}
    return {**tree, "redis": redis} if redis else {key: value for key, value in tree.items() if key != "redis"}


def _constructible_by_workers(given: Task | type[Task], config: Config) -> Task:
    if isinstance(given, type):
        return construct_task(given, config.task.options)
    cls = type(given)
    needed = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    needed = [p for p in needed if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed or config.task.options:
        raise TaskError(
            f"worker processes construct a {cls.__name__} of their own: pass the class {cls.__name__} and the "
            "keyword arguments of its constructor as options={…}, not an instance"
        )
    return given


# What the caller's process is like afterwards


@contextlib.contextmanager
def _log_into(stream: TextIO, config: Config) -> Iterator[None]:
    """fedqueue's log lines go to `stream`; afterwards structlog is configured as it was before."""
    configured, before = structlog.is_configured(), structlog.get_config()
    observability = config.observability
    level = log_level(verbose=False, quiet=False, configured=observability.log_level)
    configure_structlog(stream, level, observability.log_format, {"run": config.name})
    try:
        yield
    finally:
        structlog.reset_defaults()
        if configured:
            structlog.configure(**before)


@contextlib.contextmanager
def _torch_settings_kept() -> Iterator[None]:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
