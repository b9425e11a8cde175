"""Tests report.png and the other result files, for runs of every kind."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fedqueue.config.loading import parse_config
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.core.run_summary import RunResult, summarize
from fedqueue_coordinator.operator.json_text import json_text
from fedqueue_coordinator.operator.reports.run import draw_report
from fedqueue_coordinator.operator.results import RESULT_FILENAMES, write_results

NAN = float("nan")


def line(job: Any, client: Any, at: Any, staleness: int = 0) -> dict[str, Any]:
    return {"job": f"r-{job}", "client": client, "at": at, "staleness": staleness, "base": 0, "weight": 1.0}


def ledger_of(clients: int, versions: int = 5, metrics: tuple[str, ...] = ("loss", "accuracy")) -> list[Any]:
    records = []
    for v in range(1, versions + 1):
        merged = [line(v * clients + c, f"client-{c}", v - 0.5, (v + c) % 4) for c in range(clients)]
        records.append({"kind": "version", "version": v, "seconds": float(v), "merged": merged})
        if metrics:
            values = dict.fromkeys(metrics, 1 / v)
            records.append({"kind": "evaluation", "version": v, "seconds": v + 0.1, "metrics": values})
    records.append({"kind": "rejected", "reason": "stale", "client": "client-0", "job": "r-x", "seconds": 2.5})
    records.append({"kind": "abandoned", "reason": "lapsed", "client": "client-0", "job": "r-y", "seconds": 3.0})
    records.append({"kind": "abandoned", "reason": "run_ended", "client": "client-1", "job": "r-z", "seconds": 5.0})
    return records


def drawn(tmp_path: Path, ledger: Any) -> Image.Image:
    path = tmp_path / "report.png"
    summary = summarize("digits", "fedbuff", 0, "target accuracy >= 0.95 reached", ledger, {"closed": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_report(path, summary, ledger)
    image = Image.open(io.BytesIO(path.read_bytes()))
    assert image.format == "PNG"
    image.load()
    return image.convert("L")


LEDGERS = {
    "nothing happened": [],
    "an ordinary run": ledger_of(4),
    "a hundred clients": ledger_of(100),
    "one update": ledger_of(1, 1),
    "no evaluation": ledger_of(3, metrics=()),
    "loss alone": ledger_of(3, metrics=("loss",)),
    "an unusual metric": ledger_of(3, metrics=("f1",)),
    "many evaluations": ledger_of(2, 100),
    "rejections alone": ledger_of(4)[-3:],
}


@pytest.mark.parametrize("ledger", LEDGERS.values(), ids=LEDGERS.keys())
def test_report_of_any_run_has_content_in_each_quarter(tmp_path: Path, ledger: Any) -> None:
    image = drawn(tmp_path, ledger)
    width, height = image.size
    assert width > 800
    for left in (0, width // 2):
        for top in (0, height // 2):
            quarter = image.crop((left, top, left + width // 2, top + height // 2))
            dark = sum(quarter.histogram()[:128])
            assert dark > 500, "a quarter of the report is empty"


@pytest.mark.parametrize("values", [(NAN, 2.0, NAN), (NAN, NAN, NAN), (float("inf"), 1.0, 0.5)])
def test_report_has_gaps_where_a_metric_is_not_finite(tmp_path: Path, values: tuple[Any, ...]) -> None:
    ledger = ledger_of(2, 3, metrics=("loss",))
    for record, value in zip([r for r in ledger if r["kind"] == "evaluation"], values, strict=True):
        record["metrics"] = {"loss": value}
    assert sum(drawn(tmp_path, ledger).histogram()[:128]) > 500


def test_number_that_is_not_finite_is_null_in_json() -> None:
    text = json_text({"metrics": {"loss": NAN}, "list": [1, float("inf"), (0.5, None)], "text": "NaN"})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "metrics": {"loss": None}, "list": [1, None, [0.5, None]], "text": "NaN",
    }  # fmt: skip


def test_report_shows_more_for_a_longer_run(tmp_path: Path) -> None:
    def ink(ledger: Any) -> Any:
        return sum(drawn(tmp_path, ledger).histogram()[:200])

    assert ink(ledger_of(4)) > 1.3 * ink([])


def test_drawing_does_not_change_matplotlib_settings(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    drawn(tmp_path, ledger_of(2))
    assert dict(mpl.rcParams) == before


def test_four_result_files_agree(tmp_path: Path) -> None:
    ledger = ledger_of(4)
    manifest = Manifest.from_module(torch.nn.Linear(2, 1))
    model = Frame(manifest)
    model.parameters.fill_(0.5)
    config = parse_config({"name": "digits", "task": {"entrypoint": "t:T"}, "stop": {"versions": 5}})
    refused = {"closed": 0, "replayed": 2}
    result = RunResult(5, model, "versions = 5 reached", False, ledger, refused, jobs_dispatched=23)
    summary = write_results(tmp_path / "out", config, result)
    assert set(RESULT_FILENAMES) <= {path.name for path in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert [json.loads(row) for row in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()] == ledger
    assert set(load_file(tmp_path / "out" / "model.safetensors")["weight"].flatten().tolist()) == {0.5}
    assert (summary["versions"], summary["updates_merged"], summary["model_version"]) == (5, 20, 5)
    assert summary["updates_rejected"] == {"stale": 1}
    assert summary["jobs_abandoned"] == 2
    assert summary["posts_refused"] == {"replayed": 2}
    assert summary["stopped_because"] == "versions = 5 reached"
