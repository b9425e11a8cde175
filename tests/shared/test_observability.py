"""Addresses, names and the endpoint of metrics, and the files that use their names."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedqueue.config.observability import host_and_port
from fedqueue.errors import ConfigurationError, MissingExtra
from fedqueue.observability import endpoint as endpoint_module
from fedqueue.observability.catalogue import COORDINATOR, KEEPER, WORKER
from fedqueue.observability.endpoint import Endpoint, make, open_endpoint
from tests.support.script_module import load_script

ROOT = Path(__file__).parents[2]
OBSERVE = ROOT / "observe"
METRICS = (*COORDINATOR, *WORKER, *KEEPER)
UNITS = ("_total", "_seconds", "_bytes", "_info")
WITHOUT_UNIT = {
    "fedqueue_version", "fedqueue_staleness", "fedqueue_update_norm", "fedqueue_jobs_open", "fedqueue_buffered_updates",
    "fedqueue_clients_alive", "fedqueue_clients_expected", "fedqueue_client_alive", "fedqueue_evaluation",
    "fedqueue_worker_phase", "fedqueue_seconds_since_version",
}  # fmt: skip
PROMTOOL = shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(
    importlib.util.find_spec("prometheus_client") is None, reason="the extra fedqueue[metrics] is not installed"
)
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    made = Endpoint(str(port))
    yield made
    made.stop()


# Addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9464", ("127.0.0.1", 9464)),
        (":9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("localhost:1", ("localhost", 1)),
        ("[::1]:9464", ("::1", 9464)),
    ],
)
def test_address_without_a_host_is_loopback(text: str, expected: tuple[str, int]) -> None:
    assert host_and_port(text) == expected


@pytest.mark.parametrize("text", ["", "host", "host:", "1:99999", "::1:9464", "http://host:9464", "-1", "0", "[x]:1"])
def test_address_without_a_port_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        host_and_port(text)


def test_metrics_are_off_unless_told_otherwise() -> None:
    assert open_endpoint(None) is None


@needs_prometheus
def test_port_in_use_is_one_line_that_names_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigurationError) as caught:
            Endpoint(address)
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_prometheus
@pytest.mark.parametrize("address", ["192.0.2.1:9464", "no.such.host.invalid:9464"])
def test_address_of_another_machine_is_one_line(address: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen there"):
        Endpoint(address)


def test_missing_package_is_a_line_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'fedqueue\[metrics\]'"):
        open_endpoint("9464")


# The endpoint


@needs_prometheus
def test_scrape_has_every_metric_in_prometheus_format(endpoint: Endpoint) -> None:
    from prometheus_client import CollectorRegistry
    from prometheus_client.parser import text_string_to_metric_families

    registry = CollectorRegistry()
    for metric in METRICS:
        made = make(metric, registry)
        if metric.labels:
            made.labels(*metric.labels)
    endpoint.start(registry)
    with urllib.request.urlopen(endpoint.url, timeout=10) as answer:
        text = answer.read().decode()
    kinds = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert kinds == {metric.name.removesuffix("_total"): metric.kind for metric in METRICS}
    if PROMTOOL:
        checked = subprocess.run(
            [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_prometheus
def test_scraper_that_goes_away_or_sends_nothing_is_no_matter(endpoint: Endpoint) -> None:
    from prometheus_client import CollectorRegistry

    endpoint.start(CollectorRegistry())
    host, port = endpoint.url.removeprefix("http://").removesuffix("/metrics").split(":")
    silent = socket.create_connection((host, int(port)))
    for request in (b"GET /metrics HTTP/1.0\r\n\r\n", b"nonsense\r\n\r\n"):
        with socket.create_connection((host, int(port))) as rude:
            rude.sendall(request)
    with urllib.request.urlopen(endpoint.url, timeout=10) as answer:
        assert answer.status == 200
    silent.close()


# Names


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"fedqueue(_[a-z]+)+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert metric.name.endswith(UNITS) or metric.name in WITHOUT_UNIT
        assert metric.help.endswith(".")
        assert bool(metric.buckets) == (metric.kind == "histogram")


def test_page_of_metrics_is_what_the_catalogue_says() -> None:
    script = load_script(ROOT / "docs" / "make_metrics.py")
    assert script.PAGE.read_text() == script.page(), "outdated: run docs/make_metrics.py"


def unknown(expressions: list[str]) -> set[str]:
    """Names in PromQL expressions that no process exposes."""
    known = {metric.name for metric in METRICS}
    known |= {f"{m.name}_{part}" for m in METRICS if m.kind == "histogram" for part in ("bucket", "sum", "count")}
    known -= {metric.name for metric in METRICS if metric.kind == "histogram"}  # is no series
    return {name for text in expressions for name in re.findall(r"fedqueue_\w+", text)} - known


def test_dashboard_names_only_metrics_that_exist() -> None:
    dashboard = json.loads((OBSERVE / "grafana" / "dashboards" / "fedqueue.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 20
    assert not unknown(expressions)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_labels_in_the_dashboard_and_the_alerts_exist() -> None:
    labels = {label for metric in METRICS for label in metric.labels} | {"le", "instance"}
    for path in (OBSERVE / "grafana" / "dashboards" / "fedqueue.json", OBSERVE / "alerts.yml"):
        text = path.read_text()
        used = {name for found in re.findall(r"by \(([^)]*)\)", text) for name in found.replace(" ", "").split(",")}
        used |= set(re.findall(r"\$labels\.(\w+)", text)) | set(re.findall(r"\{\{(\w+)\}\}", text))
        assert used <= labels


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((OBSERVE / "alerts.yml").read_text())["groups"]
    return list(group["rules"])


def test_alerts_name_only_metrics_that_exist() -> None:
    assert not unknown([rule["expr"] for rule in rules()])


def test_every_alert_is_in_the_guide() -> None:
    text = (ROOT / "docs" / "how-to" / "watch-with-prometheus.md").read_text()
    assert re.findall(r"^\| `(Fedqueue\w+)`", text, re.MULTILINE) == [rule["alert"] for rule in rules()]


@needs_promtool
def test_promtool_accepts_the_alerts_and_the_configuration() -> None:
    assert PROMTOOL
    for words in (["rules", "alerts.yml"], ["config", "prometheus.yml"]):
        checked = subprocess.run([PROMTOOL, "check", *words], cwd=OBSERVE, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
