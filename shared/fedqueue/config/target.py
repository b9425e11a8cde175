"""The key `stop.target`: the metrics to reach, and for each whether it must rise or fall to its value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from fedqueue.config.sections import refuse

Direction = Literal["above", "below"]
Wanted = Mapping[str, float | Mapping[str, float]]
"""A validated `stop.target`."""

# fmt: off
RISING = frozenset({
    "accuracy", "acc", "auc", "auroc", "aucroc", "rocauc", "auprc", "aucpr", "prauc", "ap", "map", "f1", "f2", "fbeta",
    "precision", "recall", "sensitivity", "specificity", "tpr", "tnr", "ppv", "npv", "mcc", "kappa", "r2", "iou",
    "miou", "jaccard", "dice", "bleu", "rouge", "meteor", "chrf", "mrr", "ndcg", "psnr", "ssim",
})
FALLING = frozenset({
    "loss", "nll", "crossentropy", "bce", "error", "err", "mse", "rmse", "nrmse", "mae", "mape", "smape", "msle",
    "rmsle", "perplexity", "ppl", "bpc", "bpb", "wer", "cer", "ter", "eer", "fpr", "fnr", "brier", "ece",
    "fid", "lpips", "hausdorff",
})
_QUALIFIERS = frozenset({
    "score", "rate", "mean", "avg", "average", "total", "macro", "micro", "weighted", "val", "valid", "validation",
    "test", "eval", "dev", "holdout", "train", "central", "global", "server", "percent", "pct", "top", "at", "k",
})
_NEGATIONS = frozenset({"neg", "negative", "negated", "minus", "inverse", "inverted", "inv", "non"})
# fmt: on


@dataclass(frozen=True)
class Goal:
    """One metric of a target."""

    metric: str
    direction: Direction
    """`above`: the metric must be `value` or more; `below`: `value` or less."""
    value: float

    def is_met(self, value: float | None) -> bool:
        """Whether a metric of this value meets the goal; NaN and None do not."""
        if value is None:
            return False
        return value >= self.value if self.direction == "above" else value <= self.value

    @property
    def condition(self) -> str:
        """The goal's sign and value, such as `≥ 0.9`."""
        return f"{'≥' if self.direction == 'above' else '≤'} {self.value:g}"

    def __str__(self) -> str:
        return f"{self.metric} {self.condition}"


def direction_of(metric: str) -> Direction | None:
    """Return the direction in which a metric of a well-known name improves; None for other names.

    The last word of a name decides, such as `loss` in `val_loss` and `mse` in `test/mse`. Words such as `macro`, `val`
    or `score` and numbers may follow it (`f1_score`, `accuracy@5`). A name that negates (`neg_mse`, `1-accuracy`) is
    unknown.
    """
    words = _words(metric)
    if metric.startswith("1-") or _NEGATIONS & set(words):
        return None
    while words and (words[-1].isdigit() or _unnumbered(words[-1]) in _QUALIFIERS):
        words.pop()
    for last in ("".join(words[-2:]), *words[-1:]):
        for word in (last, _unnumbered(last)):
            if word in RISING:
                return "above"
            if word in FALLING:
                return "below"
    return None


def goals(target: Wanted) -> tuple[Goal, ...]:
    """Return the goals of a validated `stop.target`, in its order."""
    found = []
    for metric, wanted in target.items():
        if isinstance(wanted, Mapping):
            ((direction, value),) = wanted.items()
        else:
            direction, value = str(direction_of(metric)), wanted
        found.append(Goal(metric, "above" if direction == "above" else "below", float(value)))
    return tuple(found)


def _unnumbered(word: str) -> str:
    return word.rstrip("0123456789")


def _words(name: str) -> list[str]:
    """The words of a name in lower case, split at other characters than letters and digits, and at camelCase."""
    words: list[str] = []
    for part in re.split(r"[^A-Za-z0-9]+", name):
        if part.lower() in RISING | FALLING:
            words.append(part.lower())
        else:
            words += re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", part).lower().split()
    return words


def _checked(target: Any) -> Any:
    """Refuse a target without a direction, or with a value that is no finite number."""
    if not isinstance(target, Mapping):
        raise refuse("a target is a table of metrics", "write target = { accuracy = 0.9 }")
    for metric, wanted in target.items():
        value = wanted
        if isinstance(wanted, Mapping):
            if len(wanted) != 1 or not set(wanted) <= {"above", "below"}:
                keys = ", ".join(map(str, wanted)) or "nothing"
                raise refuse(f"the target of {metric!r} sets {keys}", f"write {_spellings(metric, 0.5)}")
            value = next(iter(wanted.values()))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise refuse(f"the target of {metric!r} is {value!r}, not a finite number", f"write {_spellings(metric)}")
        if not isinstance(wanted, Mapping) and direction_of(str(metric)) is None:
            problem = f"{metric!r} is no well-known metric: it may improve by rising to {value:g} or by falling to it"
            raise refuse(problem, f"write {_spellings(metric, value)}")
    return target


def _spellings(metric: Any, value: float = 0.5) -> str:
    name = metric if re.fullmatch(r"[A-Za-z0-9_-]+", str(metric)) else f'"{metric}"'
    return f"{{ {name} = {{ above = {value:g} }} }} or {{ {name} = {{ below = {value:g} }} }}"


Target = Annotated[dict[str, float | dict[str, float]], BeforeValidator(_checked)]
"""Metric → value for a well-known metric, or → {above: value} or {below: value}."""
