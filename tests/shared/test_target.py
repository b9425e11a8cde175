"""The key `stop.target`: directions of metrics, and targets that are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedqueue.config.loading import override_config, parse_config
from fedqueue.config.target import FALLING as FALLING_NAMES
from fedqueue.config.target import RISING as RISING_NAMES
from fedqueue.config.target import direction_of
from fedqueue.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
TASK = {"entrypoint": "task.py:Mine"}
RISING = """
accuracy acc auc AUC roc_auc auroc f1 f1_score macro_f1 F1Score r2 R2 test.r2_score val_accuracy valAccuracy
top5_accuracy top-5-acc acc@5 accuracy/top1 mAP map50-95 val_mIoU recall@10 digits_accuracy accuracy_mean
"""
FALLING = """
loss val_loss valLoss loss_mean dice_loss accuracy_loss log_loss cross_entropy error error_rate test/mse MSE
rmse mae mean_absolute_error perplexity wer cer eer brier brier_score nll client-0.loss
"""
UNKNOWN = """
depth gini score throughput lossless accuracy_drop loss_reduction accuracy_std neg_loss neg_mean_squared_error
1-accuracy error_count minus_loss
"""


def goals(target: Any) -> Any:
    return [str(goal) for goal in parse_config({"task": TASK, "stop": {"target": target}}).stop.goals]


@pytest.mark.parametrize("name", RISING.split())
def test_well_known_metric_that_rises(name: Any) -> None:
    assert direction_of(name) == "above"
    assert goals({name: 0.5}) == [f"{name} ≥ 0.5"]


@pytest.mark.parametrize("name", FALLING.split())
def test_well_known_metric_that_falls(name: Any) -> None:
    assert direction_of(name) == "below"
    assert goals({name: 0.5}) == [f"{name} ≤ 0.5"]


def test_page_about_targets_lists_every_well_known_name() -> None:
    page = (ROOT / "docs/reference/evaluation.md").read_text(encoding="utf-8")
    for direction, names in (("higher", RISING_NAMES), ("lower", FALLING_NAMES)):
        (row,) = re.findall(rf"^\| {direction} \| (.+) \|$", page, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row)) == names, row


@pytest.mark.parametrize("name", UNKNOWN.split())
def test_unknown_metric_is_refused_with_both_spellings(name: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        goals({name: 3})
    assert caught.value.key == "stop.target"
    assert repr(name) in caught.value.problem
    assert f"{{ {name} = {{ above = 3 }} }} or {{ {name} = {{ below = 3 }} }}" in caught.value.hint
    assert goals({name: {"above": 3}}) == [f"{name} ≥ 3"]
    assert goals({name: {"below": 3}}) == [f"{name} ≤ 3"]


def test_stated_direction_wins_over_the_name() -> None:
    assert goals({"loss": {"above": 0.1}, "accuracy": {"below": 1}}) == ["loss ≥ 0.1", "accuracy ≤ 1"]


@pytest.mark.parametrize(
    "target",
    [
        0.9,
        ["accuracy"],
        {"accuracy": "high"},
        {"mse": "<0.05"},
        {"accuracy": True},
        {"accuracy": float("nan")},
        {"accuracy": float("inf")},
        {"mse": {}},
        {"mse": {"under": 0.05}},
        {"mse": {"below": 0.05, "above": 0.01}},
        {"mse": {"below": "low"}},
    ],
)
def test_malformed_target_is_refused(target: dict[str, Any] | float | list[str]) -> None:
    with pytest.raises(ConfigurationError, match=r"^stop\.target"):
        goals(target)


def test_direction_can_be_set_on_the_command_line() -> None:
    config = override_config({"task": TASK}, ["stop.target.mse.below=0.05"], {})
    assert config.stop.target == {"mse": {"below": 0.05}}
    again = parse_config(config.model_dump(mode="json"))
    assert again.stop == config.stop


def test_target_is_refused_where_nothing_is_evaluated() -> None:
    tree: dict[str, Any] = {"task": TASK, "stop": {"target": {"acc": 0.9}}, "evaluation": {"every_versions": "off"}}
    with pytest.raises(ConfigurationError, match=r"stop.target names acc, but every_versions and every_seconds"):
        parse_config(tree)
    tree["evaluation"]["every_seconds"] = 10
    assert parse_config(tree).stop.goals


@pytest.mark.parametrize(("clients", "barrier", "refused"), [(4, True, True), (8, True, False), (4, False, False)])
def test_round_needs_a_client_for_each_update(clients: int, barrier: bool, refused: bool) -> None:
    tree = {
        "task": TASK,
        "stop": {"versions": 5},
        "clients": {"count": clients},
        "aggregation": {"strategy": "fedbuff", "buffer_size": 8, "barrier": barrier},
    }
    if refused:
        with pytest.raises(ConfigurationError, match=r"buffer_size is 8, but there are only 4 clients"):
            parse_config(tree)
    else:
        parse_config(tree)
