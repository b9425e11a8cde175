"""User-defined aggregations and staleness functions, and the errors for unsuitable code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedqueue.config.loading import load_config, parse_config
from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.algorithms.registry import check_algorithms, make_aggregator
from fedqueue_coordinator.algorithms.staleness import make_staleness
from fedqueue_coordinator.operator.audit.replay import replay
from tests.support.builders import make_config, make_frame, same_bits
from tests.support.federation_run import Died, Run

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_algorithm"


def example(**aggregation: Any) -> Config:
    """Return a configuration of the example's algorithm over the small model."""
    settings = {
        "strategy": "heavy_ball.py:heavy_ball", "buffer_size": 2, "strategy_options": {"momentum": 0.5},
        "staleness": {"function": "heavy_ball.py:gentle"}, **aggregation,
    }  # fmt: skip
    return make_config(aggregation=settings).located(EXAMPLE)


def own(folder: Path, code: str, name: str = "Mine", **aggregation: Any) -> Config:
    (folder / "mine.py").write_text(code)
    return make_config(aggregation={"strategy": f"mine.py:{name}", **aggregation}).located(folder)


def test_example_has_the_documented_length() -> None:
    assert len((EXAMPLE / "heavy_ball.py").read_text().splitlines()) < 40


def test_example_configuration_names_its_code_by_relative_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(EXAMPLE / "federation.toml", environment={})
    check_algorithms(config)
    assert make_aggregator(config).name == "heavy_ball"
    assert str(EXAMPLE) not in config.model_dump_json()


def test_example_momentum_matches_results_by_hand() -> None:
    """Δ̄ = 4, then 2: x = 4 and v = 4, then v = 0.5 / (1 + 1) · 4 + 2 with a buffer whose stalest is 1 behind."""
    run = Run(example(), make_frame(0.0))
    run.join("client-0", "client-1", "client-2")
    for client in ("client-0", "client-1"):
        run.post(client, 4.0)
    assert run.x == 4.0
    run.post("client-2", 8 / 3, base=0)  # s(1) = 3/4 in the example's own function
    run.post("client-0", 2.0)
    assert run.x == pytest.approx(4.0 + 1.0 + 2.0)
    assert [line["weight"] for line in run.merged] == [1.0, 1.0, 0.75, 1.0]


@pytest.mark.parametrize("dies_before", range(1, 10))
def test_state_of_the_example_survives_a_coordinator_crash(dies_before: int) -> None:
    whole, broken = (Run(example(), make_frame(0.0)) for _ in range(2))
    for run in (whole, broken):
        run.join("client-0", "client-1")
    broken.dies_before = dies_before
    for i in range(6):
        client, delta = f"client-{i % 2}", float(i)
        whole.post(client, delta)
        try:
            broken.post(client, delta)
        except Died:
            broken.restart()
    assert whole.federation.version == broken.federation.version == 3
    assert same_bits(whole.federation.model, broken.federation.model)


def test_run_of_the_example_replays_to_the_same_bits() -> None:
    run = Run(example(), make_frame(0.0))
    run.join("client-0", "client-1")
    for i in range(6):
        run.post(f"client-{i % 2}", float(i))
    payloads = run.payloads

    def read(job: Any, attempt: Any) -> Any:
        return payloads[job].buffer

    assert replay(run.config, run.ledger, run.versions[0].copy(), read, run.federation.model).problems == []
    wrong = replay(example(strategy_options={}), run.ledger, run.versions[0].copy(), read, run.federation.model)
    assert "the model differs" in wrong.problems[0]


ADDS = """
from fedqueue_coordinator.algorithms.aggregator import Aggregator
from fedqueue_coordinator.algorithms.fedbuff import fedbuff

def Mine(config, size=None, base=False):
    mean = fedbuff(size or config.buffer_size, lambda tau: 1.0)
    return Aggregator("mine", mean.buffer_size, mean.add, mean.finish, needs_base=base)

def Other(config):
    return 5
"""


@pytest.mark.parametrize(
    ("name", "aggregation", "says"),
    [
        ("Mein", {}, r"Mein is not callable; callables in this module: Mine, Other"),
        ("Other", {}, "made a int; return a fedqueue.Aggregator"),
        ("Mine", {"strategy_options": {"speed": 1}}, "unexpected keyword argument 'speed'"),
        ("Mine", {"strategy_options": {"size": 7}}, r"aggregation\.buffer_size = 4: mine\.py:Mine merges 7"),
        ("Mine", {"strategy_options": {"base": True}}, r"aggregation\.needs_base = False: mine\.py:Mine says True"),
    ],
)
def test_unsuitable_aggregation_error_names_the_key(
    tmp_path: Path, name: str, aggregation: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        check_algorithms(own(tmp_path, ADDS, name, **aggregation))


def test_custom_aggregation_may_read_bases_if_configured(tmp_path: Path) -> None:
    config = own(tmp_path, ADDS, strategy_options={"base": True}, needs_base=True)
    assert config.keeps_bases
    assert make_aggregator(config).needs_base


def test_missing_or_raising_code_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"strategy = 'mine\.py:Mine': cannot be loaded: .*there is no file"):
        make_aggregator(make_config(aggregation={"strategy": "mine.py:Mine"}).located(tmp_path))
    with pytest.raises(ConfigurationError, match="ZeroDivisionError"):
        make_aggregator(own(tmp_path, "1 / 0"))
    with pytest.raises(ConfigurationError, match="No module named 'nowhere'"):
        make_aggregator(make_config(aggregation={"strategy": "nowhere.to_be:found"}))


@pytest.mark.parametrize("mode", ["mine.py", "mine:", ":Mine", "mine.py:1x", "os system:x", "fedsum"])
def test_unknown_aggregation_name_is_refused(mode: str) -> None:
    with pytest.raises(ConfigurationError, match=r"aggregation\.strategy = .*'ca2fl', or code of your own"):
        parse_config({"task": {"entrypoint": "t.py:T"}, "stop": {"versions": 1}, "aggregation": {"strategy": mode}})


# Staleness


def staleness(folder: Path, code: str, **options: Any) -> Callable[..., Any]:
    (folder / "mine.py").write_text(f"def s(tau, **options):\n    return {code}\n")
    config = make_config(aggregation={"staleness": {"function": "mine.py:s", **options}})
    return make_staleness(config.aggregation.staleness, folder)


def test_custom_staleness_gets_the_configured_options(tmp_path: Path) -> None:
    weigh = staleness(tmp_path, "1 / (1 + options['a'] * tau)", a=3.0)
    np.testing.assert_allclose([weigh(tau) for tau in (0, 1, 5)], [1.0, 0.25, 1 / 16])


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("0.5", r"s\(0\) is 0.5; the weight of a fresh update must be 1"),
        ("1.0 - 0.2 * tau", r"s\(6\) is -0.2\d*; weights must be from 0 to 1"),
        ("1.0 + tau", r"s\(1\) is 2.0"),
        ("float('nan') if tau == 3 else 1.0", r"s\(3\) is nan"),
        ("1 / (tau - 9) ** 0 if tau != 9 else 1 / 0", "ZeroDivisionError"),
        ("'1'[tau]", "IndexError"),
    ],
)
def test_invalid_staleness_weight_is_refused_before_the_run(tmp_path: Path, code: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        staleness(tmp_path, code)
    assert caught.value.key == "aggregation.staleness.function"
