"""What a run leaves on disk: summary.json, model.safetensors, ledger.jsonl and report.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fedqueue.config.loading import Config
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.core.run_summary import RunResult, summarize

RESULT_FILENAMES = ("summary.json", "model.safetensors", "ledger.jsonl", "report.png")


def write_results(folder: Path, config: Config, result: RunResult) -> dict[str, Any]:
    """Write the four files into `folder`, and return the summary."""
    from fedqueue_coordinator.operator.reports.run import draw_report  # matplotlib: not before it is needed

    folder.mkdir(parents=True, exist_ok=True)
    summary = summarize(
        config.name,
        config.aggregation.mode,
        config.seed,
        result.stopped_because,
        result.ledger,
        result.refused,
    )
    summary["model_version"] = result.version
    summary["jobs_dispatched"] = result.jobs_dispatched
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    with (folder / "ledger.jsonl").open("w", encoding="utf-8") as ledger:
        ledger.writelines(json.dumps(record) + "\n" for record in result.ledger)
    save_model(folder / "model.safetensors", result.model)
    draw_report(folder / "report.png", summary, result.ledger)
    return summary


def save_model(path: Path, model: Frame) -> None:
    """A plain `state_dict` of the model's own names, dtypes and shapes, as safetensors."""
    save_file(model.state_dict(), path)
