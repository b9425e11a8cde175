"""Writes the result files of a run: summary.json, model.safetensors, ledger.jsonl and report.png."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedqueue.config.schema import Config
from fedqueue.errors import MissingExtra
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.core.run_summary import RunResult, summarize

RESULT_FILENAMES = ("summary.json", "model.safetensors", "ledger.jsonl", "report.png")


def write_results(folder: Path, config: Config, result: RunResult) -> dict[str, Any]:
    """Write RESULT_FILENAMES into `folder`; returns the summary.

    Without matplotlib there is no report.png, and one of an earlier run is deleted.
    `result` is what `Coordinator.run` or `Simulation.run` returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarize(
        config.name,
        config.aggregation.strategy,
        config.seed,
        result.stopped_because,
        result.ledger,
        result.refused,
        config.clients.ids,
        result.registered,
    )
    summary["model_version"] = result.version
    summary["jobs_dispatched"] = result.jobs_dispatched
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    with (folder / "ledger.jsonl").open("w", encoding="utf-8") as ledger:
        ledger.writelines(json.dumps(record) + "\n" for record in result.ledger)
    save_model(folder / "model.safetensors", result.model)
    (folder / "report.png").unlink(missing_ok=True)
    with contextlib.suppress(MissingExtra):
        from fedqueue_coordinator.operator.reports.run import draw_report  # imports matplotlib, which takes long

        draw_report(folder / "report.png", summary, result.ledger)
    return summary


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
