"""Writes the result files of a run: summary.json, model.safetensors, ledger.jsonl and report.png."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError, MissingExtra, StoreError
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.core.run_summary import RunResult, summarize
from fedqueue_coordinator.operator.json_text import json_text
from fedqueue_coordinator.operator.run_folder import INTERRUPT, RunFolder
from fedqueue_coordinator.service.replay_archive import REPLAY_FOLDER

log = structlog.get_logger("fedqueue.coordinator")

RESULT_FILENAMES = ("summary.json", "model.safetensors", "ledger.jsonl", "report.png")


def deliver_results(
    folder: RunFolder, config: Config, result: RunResult, checkpoint_saved: bool
) -> tuple[dict[str, Any], RunResult]:
    """Write the results and put them into `folder`; returns the summary, and the result with the folder it is in.

    Where the disk does not take them, they are written to a new folder for temporary files. With `checkpoint_saved`, a
    run that did not come to its end is resumed from its checkpoint, so its append-only file is deleted. Raises
    StoreError where no disk takes the results.
    """
    complete = came_to_its_end(result)
    try:
        if not folder.reclaim():
            raise OSError("the folder was deleted, or is another run's now")
        summary = write_results(folder.unfinished, config, result)
        where = folder.publish((*RESULT_FILENAMES, REPLAY_FOLDER), complete)
    except (OSError, SafetensorError) as error:
        log.error("results not written; check the disk", folder=str(folder.path), error=str(error))
        summary, where = _write_elsewhere(config, result, folder, error)
    if complete or (not result.version and where != folder.unfinished):
        folder.discard()
    else:
        folder.note_end(result.version, "failed" if result.failed else "was interrupted")
        if checkpoint_saved:
            folder.discard_server()
    return summary, dataclasses.replace(result, folder=where)


def _write_elsewhere(
    config: Config, result: RunResult, folder: RunFolder, why: Exception
) -> tuple[dict[str, Any], Path]:
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix=f"fedqueue-{config.name}-"))
        return write_results(elsewhere, config, result), elsewhere
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"the results cannot be written to {folder.path} ({why}), nor to {tempfile.gettempdir()} ({error}); "
            f"free space, then {folder.how_to_deliver()}"
        ) from error


def write_results(folder: Path, config: Config, result: RunResult) -> dict[str, Any]:
    """Write RESULT_FILENAMES into `folder`; returns the summary.

    Without matplotlib there is no report.png, and one of an earlier run is deleted.
    `result` is what `Coordinator.run` or `Simulation.run` returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = summary_of(config, result)
    (folder / "summary.json").write_text(json_text(summary, indent=2) + "\n", encoding="utf-8")
    with (folder / "ledger.jsonl").open("w", encoding="utf-8") as ledger:
        ledger.writelines(json_text(record) + "\n" for record in result.ledger)
    save_model(folder / "model.safetensors", result.model)
    (folder / "report.png").unlink(missing_ok=True)
    with contextlib.suppress(MissingExtra):
        from fedqueue_coordinator.operator.reports.run import draw_report  # imports matplotlib, which takes long

        draw_report(folder / "report.png", summary, result.ledger)
    return summary


def summary_of(config: Config, result: RunResult) -> dict[str, Any]:
    """Return what summary.json contains."""
    summary = summarize(
        config.name,
        config.aggregation.strategy,
        config.seed,
        result.stopped_because,
        result.ledger,
        result.refused,
        config.clients.ids,
        result.registered,
        result.seconds,
    )
    summary["model_version"] = result.version
    summary["jobs_dispatched"] = result.jobs_dispatched
    summary["privacy"] = config.privacy.sentence
    summary["complete"] = came_to_its_end(result)
    return summary


def came_to_its_end(result: RunResult) -> bool:
    """Return whether the run reached a limit of [stop], with at least one version."""
    return result.version > 0 and not result.failed and result.stopped_because != INTERRUPT


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path` to write to, and rename it to `path` at the end; an error leaves `path` as it was.

    Raises ConfigurationError at once where the file cannot be made, and for a `path` that exists and is no model.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        if path.is_dir() or (path.exists() and not _is_safetensors(path)):
            raise ConfigurationError("--output", str(path), "exists and is no model", "name another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        new.touch()
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise ConfigurationError("--output", str(path), problem, "name another file") from None
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _is_safetensors(path: Path) -> bool:
    """Return whether the file has the size of a JSON header in its first eight bytes, and then the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return not start or (start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size)


def save_model(path: Path, model: Frame) -> None:
    """Write the model's `state_dict`, with its own names, dtypes and shapes, as safetensors.

    The format has no shared memory, so each name of a tied tensor gets a copy of its values.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        tensors[name] = tensor.clone() if id(tensor) in seen else tensor
        seen.add(id(tensor))
    save_file(tensors, path)
