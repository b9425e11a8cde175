"""The page in Chromium, over a ledger that the test writes: live, on a phone, in the dark, and by keyboard."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis

pytest.importorskip("starlette", reason="the extra `dashboard` is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")
import uvicorn
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from fedqueue.protocol.msgpack import pack_record
from fedqueue_coordinator.operator.dashboard.server import make_app
from fedqueue_coordinator.operator.dashboard.serving import listen
from fedqueue_coordinator.operator.dashboard.sources import RunSources
from tests.support.sample_run import SampleRun

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.server,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="chromium and chromedriver (Debian's packages) are not installed"
    ),
]
SITES = 1000
PATIENCE = 20  # seconds
MARKUP = "<img src=x onerror=document.title='hacked'>"


@pytest.fixture
def run(server_client: redis.Redis) -> SampleRun:
    sample = SampleRun(server_client, clients={"names": [f"site-{i:04}" for i in range(SITES)]})
    sample.join("site-0000")
    pipe, later = server_client.pipeline(), 1000 * (int(server_client.time()[0]) + 3600)
    for site in sample.config.clients.ids:
        pipe.hset(sample.keys.site(site), "alive", later)
    pipe.execute()
    for version in range(1, 41):
        append(sample, version)
    return sample


def append(run: SampleRun, version: int) -> None:
    """Add a version of two updates and its evaluation to the ledger."""
    merged: list[dict[str, Any]] = [
        {"client": f"site-{i:04}", "staleness": i % 3, "examples": 10, "training_seconds": 1.0, "at": float(version),
         "norm": 40.0 if i == 7 else 1.0, "share": 0.1, "metrics": {}}
        for i in range(8)
    ]  # fmt: skip
    metrics = {"accuracy": 1 - 1 / (1 + version)}
    for record in (
        {"kind": "version", "version": version, "seconds": float(version), "merged": merged},
        {"kind": "evaluation", "version": version, "seconds": float(version), "metrics": metrics},
        {"kind": "abandoned", "client": "site-0009", "reason": "failed", "error": MARKUP, "version": version,
         "seconds": float(version)},
    ):  # fmt: skip
        run.client.xadd(run.keys.ledger, {"record": pack_record(record)})


@pytest.fixture
def address(run: SampleRun) -> Iterator[str]:
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(make_app(RunSources(lambda: [run.client]), ""), log_level="critical", ws="none", lifespan="off",
                       timeout_graceful_shutdown=1)
    )  # fmt: skip
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser: webdriver.Chrome, url: str, shows: str) -> webdriver.Chrome:
    browser.get("about:blank")
    logged(browser)
    browser.get(url)
    wait(browser, shows)
    return browser


def logged(browser: webdriver.Chrome) -> list[Any]:
    """What the browser's console has said since the last call."""
    entries: list[Any] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return entries


def wait(browser: webdriver.Chrome, text: str) -> None:
    WebDriverWait(browser, PATIENCE).until(lambda driver: text in driver.find_element(By.ID, "main").text, text)


def test_overview_names_the_site_that_stands_out(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, f"{address}/#/run/sample", "site-0007")
    assert "outlier: its updates are 40 times as long" in browser.find_element(By.TAG_NAME, "table").text
    charts = browser.find_elements(By.CSS_SELECTOR, "svg[role=img]")
    assert any((chart.get_attribute("aria-label") or "").startswith("accuracy: accuracy 0.9756") for chart in charts)
    assert logged(browser) == []


def test_new_versions_appear_by_themselves(browser: webdriver.Chrome, address: str, run: SampleRun) -> None:
    opened(browser, f"{address}/#/run/sample", "320")
    append(run, 41)
    wait(browser, "328")


def test_foreign_markup_is_shown_as_text(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, f"{address}/#/run/sample", MARKUP)
    assert browser.title == "sample – fedqueue"
    assert browser.find_elements(By.TAG_NAME, "img") == []


def test_thousand_sites_are_listed_and_filtered(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, f"{address}/#/run/sample/sites", "200 of 1000 sites")
    box = browser.find_element(By.ID, "filter")
    box.send_keys("outlier")
    wait(browser, "1 of 1000 sites")
    assert browser.switch_to.active_element == box
    box.send_keys(Keys.CONTROL, "a", Keys.DELETE)
    browser.find_element(By.ID, "all").click()
    wait(browser, "1000 of 1000 sites")


@pytest.mark.parametrize("part", ["", "/sites", "/privacy"])
def test_phone_needs_no_sideways_scrolling(browser: webdriver.Chrome, address: str, part: str) -> None:
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        opened(browser, f"{address}/#/run/sample{part}", "versions are made")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_page_is_dark(browser: webdriver.Chrome, address: str) -> None:
    def brightness(scheme: str) -> int:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        opened(browser, f"{address}/#/run/sample", "version")
        colour = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        return int(colour.split("(")[1].split(",")[0])

    assert brightness("dark") < 60
    assert brightness("light") > 200


def test_keyboard_reaches_every_part(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, f"{address}/#/run/sample", "site-0007")
    seen = []
    for _ in range(6):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(browser.switch_to.active_element.text)
    assert seen[:6] == ["Skip to the content", "fedqueue", "Runs", "Overview", "Sites", "Privacy"]
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    wait(browser, "Keepers")


def test_controls_and_tables_are_labelled(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, f"{address}/#/run/sample/sites", "site-0007")
    for control in browser.find_elements(By.CSS_SELECTOR, "input, button"):
        assert control.accessible_name
    assert all(cell.get_attribute("scope") for cell in browser.find_elements(By.CSS_SELECTOR, "th"))
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"
