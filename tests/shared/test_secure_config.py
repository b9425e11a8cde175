"""What a run with keepers cannot have: each setting is refused with its reason, all of them at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedqueue.config.loading import load_config, parse_config
from fedqueue.config.schema import Config
from fedqueue.config.secure_limits import largest_cohort, quantization_levels
from fedqueue.errors import ConfigurationError, ManifestMismatch
from fedqueue_coordinator.core.federation import initial_model

EXAMPLES = Path(__file__).parents[2] / "examples"
KEEPERS = ["university", "audit-office"]


def config(secure: dict[str, Any] | None = None, **sections: Any) -> Config:
    settings = {"keepers": KEEPERS, **(secure or {})}
    return parse_config({"task": {"entrypoint": "task.py:T"}, "stop": {"versions": 1}, "secure": settings, **sections})


def refused(secure: dict[str, Any] | None = None, **sections: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        config(secure, **sections)
    return str(caught.value)


def test_defaults_go_with_keepers() -> None:
    assert config().secure.on
    assert not parse_config({"task": {"entrypoint": "task.py:T"}, "stop": {"versions": 1}}).secure.on


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"aggregation": {"strategy": "fedasync"}}, r"strategy cannot be 'fedasync', because each of its versions tells"),
    ({"aggregation": {"strategy": "ca2fl"}}, r"strategy cannot be 'ca2fl', because it keeps the last update"),
    ({"aggregation": {"strategy": "mine.py:own"}}, r"strategy cannot be 'mine\.py:own', because an algorithm of your"),
    ({"aggregation": {"staleness": {"function": "m.py:s"}}}, r"function cannot be 'm\.py:s', because keepers compute"),
    ({"aggregation": {"robust": {"rule": "median"}}}, r"rule cannot be 'median', because it compares"),
    ({"aggregation": {"filter": {"norm_factor": 2.0}}}, r"aggregation\.filter cannot be on, because it looks at"),
    ({"aggregation": {"filter": {"min_cosine": 0.0}}}, r"aggregation\.filter cannot be on, because it looks at"),
    ({"admission": {"max_norm": 2.0}}, r"admission\.max_norm cannot be 2, because the norm of a masked update"),
    ({"admission": {"norm_quantile": 0.5}}, r"admission\.norm_quantile cannot be 0\.5, because the norm"),
    ({"compression": {"uplink": "topk"}}, r"compression\.uplink cannot be 'topk', because masks need all bits"),
    (
        {"compression": {"uplink_lossless": "zstd"}},
        r"uplink_lossless cannot be 'zstd', because masked bytes are random",
    ),
    ({"dispatch": {"schedule": "fedcompass"}}, r"schedule cannot be 'fedcompass', because the first job of each"),
    ({"security": {"signatures": "off"}}, r"security\.signatures cannot be 'off', because keepers count clients by"),
    ({"clients": {"count": 2}}, r"min_cohort cannot be 3, more than the number of clients, 2; set it to at most 2"),
    ({"aggregation": {"buffer_size": 2}}, r"min_cohort cannot be 3, more than the number of updates in a buffer, 2"),
    ({"aggregation": {"buffer_size": 1}}, r"updates in a buffer, 1; have more updates in a buffer"),
    (
        {"aggregation": {"buffer_size": 9}},
        r"buffer_size cannot be 9, more than the number of clients, 8, because a ver",
    ),
    ({"aggregation": {"buffer_size": 513}, "clients": {"count": 600}}, r"cannot have 513 updates, but at most 512"),
    ({"aggregation": {"weight_by_examples": True}}, r"weight_by_examples needs secure\.max_examples, because each"),
    ({"aggregation": {"strategy": "fedavg"}}, r"strategy 'fedavg' needs secure\.max_examples, because each site"),
    (
        {"aggregation": {"barrier": True}, "dispatch": {"round_deadline_seconds": 9}},
        r"round_deadline_seconds cannot be set, because it closes a round with fewer",
    ),
    (
        {"clients": {"names": ["a", "b", "c", "university"]}},
        r"cannot be named 'university', because .* a client of the run",
    ),
]


@pytest.mark.parametrize(("sections", "expected"), REFUSED)
def test_setting_is_refused_with_its_reason(sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^configuration: with secure\.keepers, .*{expected}"):
        config(**sections)


@pytest.mark.parametrize("sections", [s for s, _ in REFUSED])
def test_same_setting_is_accepted_without_keepers(sections: dict[str, Any]) -> None:
    own = {"task": {"entrypoint": "task.py:T"}, "stop": {"versions": 1}, "secure": {"min_cohort": 3}}
    assert not parse_config({**own, **sections}).secure.on


def test_coordinator_is_no_name_of_a_keeper() -> None:
    assert "cannot be named 'coordinator', because that is the name of the coordinator's own" in refused(
        {"keepers": ["coordinator"]}
    )


def test_all_problems_are_named_at_once_one_a_line() -> None:
    text = refused(aggregation={"strategy": "ca2fl"}, compression={"uplink": "int8"}, admission={"max_norm": 1.0})
    head, *lines = text.splitlines()
    assert head == "configuration: 3 settings do not go with secure.keepers:"
    assert [line.split()[0] for line in lines] == ["aggregation.strategy", "admission.max_norm", "compression.uplink"]
    assert all("because" in line and ";" in line for line in lines)


@pytest.mark.parametrize(
    "secure", [{"min_cohort": 1}, {"weight_levels": 9}, {"keepers": ["a", "a"]}, {"keepers": [*"abcd"]}]
)
def test_values_out_of_range_are_refused(secure: dict[str, Any]) -> None:
    assert refused(secure).startswith("secure")


@pytest.mark.parametrize(
    ("buffer_size", "weight_levels", "keepers"), [(2, 1, 1), (16, 8, 2), (512, 8, 3), (1000, 8, 3)]
)
def test_no_weighted_sum_leaves_32_bits(buffer_size: int, weight_levels: int, keepers: int) -> None:
    levels = quantization_levels(buffer_size, weight_levels, keepers)
    dither = {1: 1, 8: 840}[weight_levels]
    most = weight_levels * (buffer_size + 1)
    assert most * levels + keepers * dither <= 2**31 - 1 < most * (levels + 1) + keepers * dither


def test_norm_that_rounds_parameters_coarsely_is_refused() -> None:
    text = refused({"clip_norm": 1e6}, aggregation={"buffer_size": 4})
    assert "secure.clip_norm cannot be 1e+06, because each parameter would be rounded to multiples of 0.019" in text
    assert config({"clip_norm": 50_000.0}, aggregation={"buffer_size": 4}).secure.on


@pytest.mark.parametrize(("min_cohort", "cohort"), [(3, 24), (10, 80), (64, 512)])
def test_cohort_of_stale_updates_is_larger_than_the_buffer(min_cohort: int, cohort: int) -> None:
    """A client with eight updates of weight 1 is outweighed once all have 8 m."""
    settings = config({"min_cohort": min_cohort}, aggregation={"buffer_size": min_cohort}, clients={"count": 100})
    assert largest_cohort(settings) == cohort


def test_cohort_too_large_for_a_message_is_refused() -> None:
    text = refused({"min_cohort": 65}, aggregation={"buffer_size": 65}, clients={"count": 100})
    assert "a cohort cannot have 520 updates, but at most 512; lower secure.min_cohort" in text


# Hidden numbers of examples


def test_hidden_examples_need_keepers() -> None:
    text = refused({"keepers": [], "examples": "hidden"})
    assert "examples cannot be 'hidden' without keepers, because the coordinator then reads each update" in text


def test_choice_by_hidden_examples_is_refused() -> None:
    text = refused({"examples": "hidden"}, dispatch={"selection": "examples"})
    assert "dispatch.selection cannot be 'examples', because secure.examples is 'hidden'; set it to 'uniform'" in text


def test_mean_over_a_hidden_number_of_examples_is_refused() -> None:
    hidden = {"examples": "hidden", "max_examples": 9}
    weighted = {"weight_by_examples": True}
    assert "aggregation.normalize cannot be 'count', because with secure.examples = 'hidden' the" in refused(
        hidden, aggregation=weighted
    )
    assert config(hidden, aggregation={**weighted, "normalize": "weights"}).sums_examples
    assert config(hidden, aggregation={**weighted, "staleness": {"function": "constant"}}).sums_examples
    assert config({**hidden, "weight_levels": 1}, aggregation=weighted).sums_examples
    assert config(hidden, aggregation={**weighted, "strategy": "fadas"}).sums_examples
    assert not config({"examples": "hidden"}).sums_examples, "without weights by examples no number is summed"


# Examples


@pytest.mark.parametrize("example", ["digits", "hospitals"])
def test_examples_take_keepers_by_one_override(example: str) -> None:
    path = EXAMPLES / example / "federation.toml"
    assert not load_config(path, environment={}).secure.on
    assert load_config(path, ['secure.keepers=["university", "audit-office"]'], {}).secure.keepers == tuple(KEEPERS)


# Models


class WithBuffer(torch.nn.Module):
    def __init__(self, name: str, value: torch.Tensor) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.register_buffer(name, value)


NORM = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))


def test_model_with_running_statistics_is_refused() -> None:
    with pytest.raises(
        ManifestMismatch, match=r"masks hide no buffer, so 1\.running_mean would tell.*running_statistics = 'froz"
    ):
        initial_model(config(), NORM)
    assert initial_model(config(aggregation={"running_statistics": "frozen"}), NORM).manifest.floats == 10


@pytest.mark.parametrize("name", ["queue", "steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_model_with_another_buffer_is_refused(name: str, dtype: torch.dtype) -> None:
    module = WithBuffer(name, torch.zeros(2, dtype=dtype))
    with pytest.raises(ManifestMismatch, match=rf"so {name} would tell about its client"):
        initial_model(config(), module)
    frozen = {"running_statistics": "frozen", "buffers": {name: "frozen"}}
    assert initial_model(config(aggregation=frozen), module).manifest.floats == 3


def test_model_with_buffers_is_accepted_without_keepers() -> None:
    assert initial_model(parse_config({"task": {"entrypoint": "t.py:T"}, "stop": {"versions": 1}}), NORM)
