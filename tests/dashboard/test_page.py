"""The page's server: what it answers with, to whom, and that nothing on it changes a run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import redis

pytest.importorskip("starlette", reason="the extra `dashboard` is not installed")

from fedqueue.errors import ConfigurationError
from fedqueue.protocol.phase import Phase
from fedqueue_coordinator.operator.dashboard.server import HEADERS, STATIC, is_loopback, make_app
from fedqueue_coordinator.operator.dashboard.serving import _parse, serve_dashboard
from fedqueue_coordinator.operator.dashboard.sources import LiveRun, RunSources
from tests.support.asgi_client import AsgiClient
from tests.support.sample_run import SampleRun

LOCAL = "http://127.0.0.1:8470"
MARKUP = "<script>alert(1)</script>"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(server_client: redis.Redis) -> SampleRun:
    sample = SampleRun(server_client, clients={"names": ["c0", "c1"]})
    sample.join("c0")
    sample.publish(1)
    sample.dispatch(1)
    sample.coordinator.close(
        "sample-00000001",
        {"kind": "abandoned", "reason": "failed", "client": "c1", "error": MARKUP, "version": 1, "seconds": 1.0},
        1,
    )
    return sample


def page(client: redis.Redis, password: str = "", base: str = LOCAL) -> AsgiClient:
    return AsgiClient(make_app(RunSources(lambda: [client]), password), base)


def test_runs_are_listed_with_a_verdict(run: SampleRun) -> None:
    [line] = page(run.client).get("/api/runs").json()
    assert (line["run"], line["version"], line["state"]) == ("sample", 1, "running")
    assert line["level"] in ("well", "watch", "wrong")
    assert line["says"]


def test_run_has_its_sites_and_what_they_need(run: SampleRun) -> None:
    shown = page(run.client).get("/api/runs/sample").json()
    sites = {site["name"]: site for site in shown["clients"]}
    assert sites["c0"]["alive"]
    assert sites["c1"]["level"] == "wrong"
    assert "no worker serves it: its operator has to start `fedqueue-worker`" in sites["c1"]["says"]
    assert shown["alive"] == 1


def test_job_of_a_site_shows_its_phase(run: SampleRun) -> None:
    worker = run.worker()
    run.dispatch(2)
    claim = worker.claim("sample-00000002", 60)
    worker.heartbeat([claim.client], 60, claim, True, Phase.TRAINING)
    site = next(s for s in LiveRun(run.client, "sample").shown()["clients"] if s["name"] == "c0")
    assert (site["phase"], site["alive"]) == ("training", True)


def test_foreign_text_arrives_as_json_text(run: SampleRun) -> None:
    answer = page(run.client).get("/api/runs/sample")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["events"][0]["text"] == MARKUP


def test_script_sets_foreign_text_as_text_only() -> None:
    folder = Path(__file__).parents[2] / "coordinator/fedqueue_coordinator/operator/dashboard/static"
    for name in ("app.js", "charts.js"):
        source = (folder / name).read_text()
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
            assert way not in source, f"{name} uses {way}"


def test_page_fetches_nothing_from_elsewhere() -> None:
    folder = Path(__file__).parents[2] / "coordinator/fedqueue_coordinator/operator/dashboard/static"
    assert sorted(STATIC) == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert "<script>" not in text
        assert " style=" not in text


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/api/runs", "/api/runs/none", "/nothing"])
def test_every_answer_has_the_security_headers(run: SampleRun, path: str) -> None:
    headers = page(run.client).get(path).headers
    assert {name: headers[name.lower()] for name in HEADERS} == HEADERS
    assert "unsafe" not in headers["content-security-policy"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/runs/sample", "/api/runs/sample/events"])
def test_nothing_can_be_changed(run: SampleRun, method: str, path: str) -> None:
    assert page(run.client).request(method, path).status == 405


def test_redis_is_only_read(run: SampleRun) -> None:
    before = {key: run.client.dump(key) for key in run.client.scan_iter()}
    client = page(run.client)
    client.get("/api/runs")
    client.get("/api/runs/sample")
    assert {key: run.client.dump(key) for key in run.client.scan_iter()} == before


def test_unknown_run_is_a_404_that_names_it(run: SampleRun) -> None:
    answer = page(run.client).get("/api/runs/other")
    assert answer.status == 404
    assert "other" in answer.json()["error"]


def test_other_names_for_loopback_are_refused(run: SampleRun) -> None:
    """A page from elsewhere may have a name of its own that leads to 127.0.0.1."""
    answer = page(run.client, base="http://rebound.example").get("/api/runs")
    assert answer.status == 403
    assert page(run.client, base="http://localhost:8470").get("/api/runs").status == 200


@pytest.mark.parametrize(("host", "local"), [
    ("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("127.9.9.9", True),
    ("0.0.0.0", False), ("10.0.0.1", False), ("localhost.example", False), ("", False),
])  # fmt: skip
def test_loopback_is_known(host: str, local: bool) -> None:
    assert is_loopback(host) == local


# Behind a login


async def no_sleep(seconds: float) -> None:
    """Answer at once."""


@pytest.fixture
def locked(run: SampleRun) -> AsgiClient:
    app = make_app(RunSources(lambda: [run.client]), "correct horse", sleep=no_sleep)
    return AsgiClient(app, "http://page.example")


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/api/runs/sample"])
def test_nothing_is_shown_before_the_login(locked: AsgiClient, path: str) -> None:
    answer = locked.get(path)
    assert answer.status in (303, 401)
    assert "sample" not in answer.text


def test_password_opens_the_page(locked: AsgiClient) -> None:
    answer = locked.post("/login", {"password": "correct horse"})
    assert answer.status == 303
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert [line["run"] for line in locked.get("/api/runs").json()] == ["sample"]


@pytest.mark.parametrize("password", ["", "wrong", "correct horse ", "x" * 10_000])
def test_wrong_password_opens_nothing(locked: AsgiClient, password: str) -> None:
    answer = locked.post("/login", {"password": password})
    assert answer.status == 403
    assert "The password is wrong" in answer.text
    assert "set-cookie" not in answer.headers
    assert locked.get("/api/runs").status == 401


def test_made_up_session_opens_nothing(locked: AsgiClient) -> None:
    locked.cookies["fedqueue-session"] = "made-up"
    assert locked.get("/api/runs").status == 401


# Events


def test_events_tell_what_has_changed(run: SampleRun) -> None:
    waits, clock = 0, Clock()

    async def publish(seconds: float) -> None:
        nonlocal waits
        waits += 1
        clock.now += 1
        if waits == 3:
            run.publish(2)
        if waits > 40:
            raise ConnectionAbortedError

    sources = RunSources(lambda: [run.client], clock=clock)
    client = AsgiClient(make_app(sources, "", sleep=publish), LOCAL)
    with contextlib.suppress(ConnectionAbortedError, BaseExceptionGroup):
        client.get("/api/runs/sample/events")
    lines = client.last.text.splitlines()
    versions = [json.loads(line[6:])["version"] for line in lines if line.startswith("data: ")]
    assert (versions[0], versions[-1]) == (1, 2)
    assert client.last.headers["content-type"].startswith("text/event-stream")
    assert ": still here" in lines


def test_wait_is_over_once_a_version_came(run: SampleRun) -> None:
    clock = Clock()
    sources = RunSources(lambda: [run.client], clock=clock)
    run.client.hset(run.keys.leader, "waiting", "waiting for 4")
    assert sources.shown("sample")["waiting"] == "waiting for 4"
    run.publish(2)
    clock.now += 1.0
    assert sources.shown("sample")["waiting"] == ""
    clock.now += 10.0
    assert sources.shown("sample")["waiting"] == "waiting for 4"


def test_deleted_run_is_said_on_the_page(run: SampleRun) -> None:
    sources = RunSources(lambda: [run.client])
    assert sources.shown("sample")["version"] == 1
    run.coordinator.clear()
    assert page(run.client).get("/api/runs/sample").status == 404


# Results in a folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "digits"
    folder.mkdir()
    merged = [{"client": "c0", "staleness": 0, "examples": 5, "training_seconds": 1.0, "at": 1.0, "norm": 1.0}]
    ledger: list[dict[str, Any]] = [
        {"kind": "evaluation", "version": 0, "metrics": {"accuracy": float("nan")}, "seconds": 0.0},
        {"kind": "version", "version": 1, "seconds": 1.0, "merged": merged},
        {"kind": "evaluation", "version": 1, "metrics": {"accuracy": 0.5}, "seconds": 1.5},
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ledger))
    summary = {
        "run": "digits", "strategy": "fedbuff", "stopped_because": "versions: 1 of 1", "complete": True,
        "clients_without_update": {"c1": "no worker registered it"}, "privacy": "rows: noise",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_finished_run_is_shown_from_its_folder(results: Path) -> None:
    client = AsgiClient(make_app(RunSources(list, [results]), ""), LOCAL)
    shown = client.get("/api/runs/digits").json()
    assert (shown["state"], shown["level"], shown["says"]) == ("ended", "ended", "versions: 1 of 1")
    assert shown["metrics"]["accuracy"] == [[0, None], [1, 0.5]]
    assert shown["privacy_sentence"] == "rows: noise"
    absent = next(site for site in shown["clients"] if site["name"] == "c1")
    assert (absent["level"], absent["says"]) == ("wrong", "no worker registered it")


def test_results_are_shown_once_the_local_server_is_gone(
    run: SampleRun, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: LiveRun) -> dict[str, Any]:
        raise redis.ConnectionError("refused")

    servers = [run.client]
    sources = RunSources(lambda: servers, [results.rename(results.with_name("sample"))], ["sample"])
    assert sources.shown("sample")["state"] == "running"
    servers.clear()
    monkeypatch.setattr(LiveRun, "shown", gone)
    assert sources.shown("sample")["state"] == "ended"


def test_failed_run_is_shown_as_broken(results: Path) -> None:
    summary = json.loads((results / "summary.json").read_text())
    (results / "summary.json").write_text(json.dumps({**summary, "complete": False}))
    assert RunSources(list, [results]).shown("digits")["level"] == "wrong"


def test_damaged_results_are_named_beside_the_others(results: Path) -> None:
    (results / "ledger.jsonl").write_text("no JSON\n")
    [line] = AsgiClient(make_app(RunSources(list, [results]), ""), LOCAL).get("/api/runs").json()
    assert line["state"] == "damaged"
    assert "line 1" in line["says"]


# The command


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:x"])
def test_address_without_a_port_is_one_line(address: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--address = .* is no HOST:PORT"):
        _parse(address)


def test_run_that_is_nowhere_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="RUN = 'nowhere': no run of this name"):
        serve_dashboard(["nowhere"], "", "127.0.0.1:0", None, None, None)


def test_address_in_use_is_one_line(results: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigurationError, match=r"cannot be used: .*name another port"):
            serve_dashboard([str(results)], "", address, None, None, None)


@pytest.fixture
def empty_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("\n")
    return path


def test_empty_password_is_one_line(results: Path, empty_file: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--password-file = .*: is empty"):
        serve_dashboard([str(results)], "", "127.0.0.1:0", empty_file, None, None)
