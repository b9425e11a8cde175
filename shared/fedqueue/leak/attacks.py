"""Tries the attacks on what was seen of clients whose rows are known, and measures how far each one comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedqueue.config.compression import CompressionConfig
from fedqueue.errors import ManifestMismatch
from fedqueue.leak.label_shares import label_correlation, shares, shuffled_correlation
from fedqueue.leak.layers import Layer, first_and_last
from fedqueue.leak.measurement import NOTHING, Measurement
from fedqueue.leak.membership import likelihoods, lira_scores, rmia_scores, update_scores
from fedqueue.leak.optimisation import MOST_ROWS, MOST_UPDATES, rows_by_optimisation
from fedqueue.leak.row_data import Indices, Rows, all_of, row_losses
from fedqueue.leak.rows import RECOVERED, best_matches, candidates
from fedqueue.leak.statistics import Numbers, Unit, auc, bootstrap, mean_of_units, split_in_two, true_positives
from fedqueue.task import Task
from fedqueue.tensors.codec import uplink_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import SECTIONS

ENCODINGS = {
    "int8": CompressionConfig(uplink="int8"),
    "top-k 1 %": CompressionConfig(uplink="topk", topk_ratio=0.01),
}
"""Encodings to compare with, where an update is posted in float32; without error feedback."""
Chosen = npt.NDArray[np.bool_]

COMPARES: Mapping[str, Callable[[Numbers, Numbers], float]] = {
    "membership": auc, "model": auc, "lira": auc,
    "membership_tpr": true_positives, "model_tpr": true_positives, "lira_tpr": true_positives,
}  # fmt: skip
"""Attacks on membership → the statistic of the scores of members and controls."""
HALVINGS = 20
"""Random divisions of the control rows that the control of a membership attack is the mean of."""


@dataclass(frozen=True)
class Seen:
    """What an attacker has: the model before, the change of it, and the clients that contributed."""

    base: Frame
    delta: Frame
    """A mean of updates: parameters as a difference, buffers as values."""
    trained: Mapping[str, Indices | None]
    """Client that contributed → its rows that were trained on, int64 (k,); None for all."""


@dataclass(frozen=True)
class Pair:
    """A true row beside the best candidate for it."""

    true: torch.Tensor
    """float (features,), as `recovered`."""
    recovered: torch.Tensor
    correlation: float


@dataclass(frozen=True)
class Gallery:
    """The rows that come out best of one kind of update, and how many come out."""

    source: str
    """In words, such as "one update"."""
    rows: Measurement
    pairs: Sequence[Pair]


def mean_update(updates: Sequence[Seen]) -> Seen:
    """Return what somebody sees who gets the mean (or the sum, and how many there are) of these updates only."""
    base, deltas = updates[-1].base, [update.delta for update in updates]
    mean = Frame(base.manifest, frozen=base.frozen)
    mean.floats.copy_(torch.stack([delta.floats for delta in deltas]).mean(0))
    for part in (*SECTIONS[1:], "changed"):
        getattr(mean, part).copy_(getattr(deltas[-1], part))
    trained: dict[str, Indices | None] = {}
    for client, rows in (pair for update in updates for pair in update.trained.items()):
        before = trained.get(client, rows)
        trained[client] = all_of([before, rows])
    return Seen(base, mean, trained)


def encoded(seen: Sequence[Seen], encoding: str, seed: int) -> list[Seen] | None:
    """Return the same updates as they arrive in an encoding of ENCODINGS; None where the model is too large for it."""
    try:
        codec = uplink_codec(ENCODINGS[encoding], seen[0].base.manifest)
    except ManifestMismatch:
        return None
    return [
        Seen(one.base, codec.decode(codec.encode(one.delta, seed + number)).whole(), one.trained)
        for number, one in enumerate(seen)
    ]


class Attacks:
    """The attacks of one party that knows the task, and the rows that tell how well they did."""

    def __init__(
        self, task: Task, model: torch.nn.Module, rows: Mapping[str, Rows], control: Mapping[str, Rows], seed: int
    ) -> None:
        """`rows`: client → rows that it trains on; `control`: client → rows of the kind that were never trained on.

        `model` is what `task.model()` returned; its tensors are overwritten.
        """
        self.task, self.model, self.rows, self.control, self.seed = task, model.cpu(), rows, control, seed
        self.first, self.last = first_and_last(task, self.model, next(iter(rows.values())))
        self._losses: dict[tuple[int, str, bool], Numbers] = {}  # of base versions, which several tables share
        self._kept: dict[int, Frame] = {}  # so that an id stays its frame's own

    def on_updates(
        self, seen: Sequence[Seen], view: str, protection: str, configured: bool = True
    ) -> list[Measurement]:
        """Try labels, rows and membership on each of `seen`."""
        return [
            *self._measured(["labels"], self._labels(), seen, view, protection, configured),
            *self._measured(["rows"], self._row_hits(), seen, view, protection, configured),
            *self._measured(["membership", "membership_tpr"], self._memberships(), seen, view, protection, configured),
        ]

    # Each attack is a function (what was seen, client) → its unit of scores, or why it is not applicable.

    def _labels(self) -> Callable[[Seen, str], Unit | None] | str:
        if self.last.problem:
            return self.last.problem

        def attack(one: Seen, client: str) -> Unit | None:
            labels = self._members(one, client).labels
            assert labels is not None
            if not len(labels):  # a step of noise alone, with [privacy.examples]
                return None
            bias = self._delta_of(one.delta, self.last, "bias")
            true = shares(labels, len(bias))
            found = label_correlation(bias, true)
            chance = shuffled_correlation(bias, true, self.seed)
            return None if found is None else (np.array([found]), np.array([chance]))

        return attack

    def _row_hits(self) -> Callable[[Seen, str], Unit | None] | str:
        if self.first.problem:
            return self.first.problem

        def attack(one: Seen, client: str) -> Unit:
            found = self._candidates(one)
            both = self._members(one, client), self.control[client]
            hits = [best_matches(found, _flat(rows))[0] > RECOVERED for rows in both]
            return tuple(hit.astype(np.float64) for hit in hits)

        return attack

    def by_optimisation(
        self, seen: Sequence[Seen], view: str, protection: str, on_update: Callable[[float], None]
    ) -> list[Measurement]:
        """Look for the rows of some of `seen` by optimisation: of the first ones of one client with few rows.

        `on_update` is called before each of them, with the seconds that all the others will take, 0 if unknown.
        """
        few = [
            one for one in seen
            if len(one.trained) == 1 and 0 < len(self._places(one, next(iter(one.trained)))) <= MOST_ROWS
        ][:MOST_UPDATES]  # fmt: skip
        if not few:
            problem = (
                f"more than {MOST_ROWS} rows, or rows of several clients, are in each; rehearse with "
                "--set training.local_steps=1 --set training.batch_size=1"
            )
            return self._measured(["optimisation"], problem, seen, view, protection, True)
        done: list[float] = []

        def attack(one: Seen, client: str) -> Unit:
            started = time.perf_counter()
            on_update(float(np.mean(done)) * (len(few) - len(done)) if done else 0.0)
            members, control = self._members(one, client), self.control[client]
            assert members.labels is not None
            found = rows_by_optimisation(
                self.task, self.model, one.base, one.delta, members.labels, control, self.seed + len(done)
            )
            done.append(time.perf_counter() - started)
            hits = [best_matches(found.flatten(1).double(), _flat(rows))[0] > RECOVERED for rows in (members, control)]
            return tuple(hit.astype(np.float64) for hit in hits)

        labelled = next(iter(self.rows.values())).labels is not None
        problem = "a row is no pair of a floating tensor and an integer label"
        return self._measured(["optimisation"], attack if labelled else problem, few, view, protection, True)

    def _memberships(self) -> Callable[[Seen, str], Unit | None] | str:
        def attack(one: Seen, client: str) -> Unit:
            after = one.base.copy()
            after.parameters.add_(one.delta.parameters)
            for part in ("buffers", "doubles", "counters"):
                getattr(after, part).copy_(getattr(one.delta, part))
            after.write(self.model)
            losses = [row_losses(self.task, self.model, rows) for rows in self._both(client)]
            before = [self._base_losses(one.base, client, control) for control in (False, True)]
            members, controls = (update_scores(b, a) for b, a in zip(before, losses, strict=True))
            return members[self._places(one, client)], controls

        return attack

    def on_model(
        self,
        head: Frame,
        references: Sequence[tuple[Frame, Mapping[str, Chosen]]],
        lira: bool = False,
        protection: str = NOTHING,
    ) -> list[Measurement]:
        """Try RMIA on the rows of all clients, in the model `head`, and with `lira` LiRA too.

        `references`: models that were trained without some of the rows, each with client → bool (n,), for each of the
        client's rows whether the model was trained on it. They come in pairs: one of a pair was trained on a row, the
        other one not. Half of the control rows are the population, the other half the rows never trained on.
        """
        started = time.perf_counter()
        units, with_lira = [], []
        target = {client: self._likelihoods(head, client) for client in self.rows}
        others = [{client: self._likelihoods(frame, client) for client in self.rows} for frame, _ in references]
        for client in self.rows:
            inside = np.array([trained[client] for _, trained in references])
            own, control = (np.array([other[client][part] for other in others]) for part in (0, 1))
            out = np.where(inside[::2], own[1::2], own[::2])  # of each pair, the model not trained on the row
            order = np.random.default_rng(self.seed).permutation(control.shape[1])
            population, never = order[::2], order[1::2]
            # A control row counts in one model of each pair too, so that its p_out has the spread of a member's.
            counted = np.random.default_rng(self.seed).integers(2, size=(len(references) // 2, control.shape[1]))
            drawn = np.where(counted, control[::2], control[1::2])
            chosen, (mine, outside) = drawn.mean(0), target[client]
            baseline = outside[population], chosen[population]
            members = rmia_scores(mine, out.mean(0), *baseline)
            units.append((members, rmia_scores(outside[never], chosen[never], *baseline)))
            with_lira.append((lira_scores(mine, out), lira_scores(outside, drawn)))
        found = self._of_units(["model", "model_tpr"], units, "outsider", protection, True, started, 1)
        if lira:
            started = time.perf_counter()
            found += self._of_units(["lira", "lira_tpr"], with_lira, "outsider", protection, True, started, 1)
        return found

    def pairs(self, seen: Sequence[Seen], most: int = 8) -> list[Pair]:
        """Return the rows with the best candidates in any of `seen`, best first, each row once."""
        if self.first.problem:
            return []
        found: dict[tuple[str, int], Pair] = {}
        for one in seen:
            vectors = self._candidates(one)
            for client in one.trained:
                places = self._places(one, client)
                true = _flat(self.rows[client].chosen(places))
                similarity, best = best_matches(vectors, true)
                for row in np.argsort(-similarity)[:most]:
                    key = client, int(places[row])
                    before = found.get(key)
                    if len(vectors) and (before is None or before.correlation < similarity[row]):
                        pair = Pair(true[row], vectors[best[row]].float(), float(similarity[row]))
                        found[key] = pair
        return sorted(found.values(), key=lambda pair: -pair.correlation)[:most]

    def gallery(self, source: str, seen: Sequence[Seen], measurements: Sequence[Measurement]) -> Gallery:
        """Return the best rows in `seen`, with the measurement of that attack among `measurements`."""
        return Gallery(source, next(m for m in measurements if m.attack == "rows"), self.pairs(seen))

    # Measuring

    def _measured(
        self, names: Sequence[str], attack: Callable[[Seen, str], Unit | None] | str, seen: Sequence[Seen],
        view: str, protection: str, configured: bool,
    ) -> list[Measurement]:  # fmt: skip
        if isinstance(attack, str):
            return [Measurement(name, view, protection, not_applicable=attack, configured=configured) for name in names]
        started = time.perf_counter()
        units = [
            unit
            for one in seen
            for client in one.trained
            if len(self._places(one, client)) and (unit := attack(one, client)) is not None
        ]
        return self._of_units(names, units, view, protection, configured, started, len(seen))

    def _of_units(
        self, names: Sequence[str], units: Sequence[Unit], view: str, protection: str, configured: bool,
        started: float, updates: int,
    ) -> list[Measurement]:  # fmt: skip
        finite = [unit for unit in units if all(np.isfinite(part).all() for part in unit)]
        if not finite:
            why = "the losses are not finite" if units else "each client has the same number of rows of each class"
            return [Measurement(name, view, protection, not_applicable=why, configured=configured) for name in names]
        measurements = []
        for name in names:
            statistic: Callable[..., float] = COMPARES.get(name, _first_mean)
            halves = [half for unit in finite for half in split_in_two(unit[1], HALVINGS, self.seed)]
            value = mean_of_units(statistic)(finite)
            control = mean_of_units(statistic)(halves) if name in COMPARES else float(
                np.mean([unit[1].mean() for unit in finite])
            )  # fmt: skip
            rows = sum(len(unit[0]) for unit in finite)
            if name == "labels":
                rows = sum(len(rows) for rows in self.rows.values())
            interval = bootstrap(finite, mean_of_units(statistic), self.seed)
            seconds = time.perf_counter() - started
            measurements.append(
                Measurement(
                    name, view, protection, value, control, interval, rows, updates, round(seconds, 2),
                    configured=configured,
                )
            )  # fmt: skip
            started = time.perf_counter()
        return measurements

    def _places(self, one: Seen, client: str) -> Indices:
        """Return where among the client's rows those are that were trained on: int64 (k,)."""
        rows, trained = self.rows[client], one.trained[client]
        return np.arange(len(rows)) if trained is None else np.flatnonzero(np.isin(rows.indices, trained))

    def _members(self, one: Seen, client: str) -> Rows:
        return self.rows[client].chosen(self._places(one, client))

    def _both(self, client: str) -> tuple[Rows, Rows]:
        return self.rows[client], self.control[client]

    def _delta_of(self, delta: Frame, layer: Layer, part: str) -> torch.Tensor:
        delta.frozen = delta.frozen if delta.frozen is not None else np.zeros(delta.manifest.frozen_nbytes, np.uint8)
        return delta.state_dict()[f"{layer.name}.{part}" if layer.name else part]

    def _candidates(self, one: Seen) -> torch.Tensor:
        return candidates(*(self._delta_of(one.delta, self.first, part) for part in ("weight", "bias")))

    def _base_losses(self, base: Frame, client: str, control: bool) -> Numbers:
        key = (id(base), client, control)
        if key not in self._losses:
            self._kept[id(base)] = base
            base.write(self.model)
            self._losses[key] = row_losses(self.task, self.model, self._both(client)[control])
        return self._losses[key]

    def _likelihoods(self, frame: Frame, client: str) -> tuple[Numbers, Numbers]:
        frame.write(self.model)
        own, control = (likelihoods(row_losses(self.task, self.model, rows)) for rows in self._both(client))
        return own, control


def _first_mean(values: Numbers, *others: Numbers) -> float:
    return float(values.mean())


def _flat(rows: Rows) -> torch.Tensor:
    assert rows.inputs is not None
    return rows.inputs.flatten(1)
