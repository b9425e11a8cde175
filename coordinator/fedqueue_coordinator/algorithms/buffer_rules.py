"""Merging of buffers and counters, which the papers on asynchronous training do not specify.

An aggregation merges the values b_i of floating buffers by x_B ← x_B + Σ w_i (b_i − x_B) / divisor, and counters by
their maximum. `with_buffer_rules` adds what a buffer needs that is not averaged. Each rule, for one tensor:

    latest     the value of the last update, in the order of arrival, that changed the tensor
    mean       b_i = local_i                     a convex combination: a variance stays positive
    max        the maximum of the model's and of all clients' values, by element
    frozen     not here: such a tensor is in no update

`aggregation.running_statistics` chooses b_i of running statistics for a stale update:

    mean       b_i = local_i
    drift      b_i = local_i + (x_B − base_B)    the client's change is added: x_B + Σ w_i Δ_i / divisor, as for
                                                 parameters; a variance may fall below 0

An element that has the model's own bits in every update of a version keeps them: a mean of equal numbers may differ
from them in the last bit, and a mean of infinities is not a number.

With a robust rule, which no single client may overrule, a tensor with the rule `latest` changes where more than half of
the updates changed it, to the value of the update that is closest to the others of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from fedqueue.config.aggregation import AggregationConfig
from fedqueue.tensors.frame import Delta, Frame, same_elements
from fedqueue.tensors.manifest import DOUBLES, FLOATS, INTEGERS, MAX, MEAN, LatestTensors, Manifest
from fedqueue_coordinator.algorithms.aggregator import Accumulator, Aggregator, Contribution, Step


@dataclass
class MergedBuffers:
    """The buffers of the updates that an accumulator contains, by section."""

    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    """Which averaged elements differ from the model's in any update, bool."""
    greatest: dict[str, torch.Tensor] = field(default_factory=dict)
    """The maximum so far of the elements with the rule `max`."""
    latest: dict[str, torch.Tensor] = field(default_factory=dict)
    """The elements with the rule `latest` of a section in which an update has changed any."""
    updates: list[Delta] = field(default_factory=list)
    """The updates themselves, for a robust rule."""


def with_buffer_rules(aggregator: Aggregator, config: AggregationConfig) -> Aggregator:
    """Return `aggregator` with the rules of each tensor; `drift` needs the base versions of stale updates."""
    robust = config.robust.rule != "mean"
    drift = config.running_statistics == "drift"

    def add(acc: Accumulator, update: Contribution, model: Frame) -> float:
        manifest = model.manifest
        if manifest.ruled_sections:
            if drift and update.staleness > 0:
                _add_drift(update, model)
            acc.merged_buffers = acc.merged_buffers or MergedBuffers()
            _observe(acc.merged_buffers, update.delta, model, robust)
        return aggregator.add(acc, update, model)

    def finish(acc: Accumulator, model: Frame) -> Step:
        merged = acc.merged_buffers
        step = aggregator.finish(acc, model)
        if merged is None:
            return step
        sections = {
            section: _finished(section, merged, getattr(step, section), model, robust)
            for section in model.manifest.ruled_sections
        }
        return replace(step, **sections)

    return replace(aggregator, add=add, finish=finish, needs_base=aggregator.needs_base or drift)


def _add_drift(update: Contribution, model: Frame) -> None:
    """Replace the running statistics of an update by b_i, in place: nothing reads the client's values after this."""
    assert update.base is not None
    for section in FLOATS, DOUBLES:
        statistics = model.manifest.span(section, "")
        local, present, base = (getattr(f, section)[statistics] for f in (update.delta, model, update.base))
        unchanged = same_elements(local, base)
        local.add_(present).sub_(base)
        local[unchanged] = present[unchanged]


def _observe(merged: MergedBuffers, delta: Delta, model: Frame, robust: bool) -> None:
    manifest = model.manifest
    if robust:
        merged.updates.append(delta)
    for section in manifest.ruled_sections:
        values, present = getattr(delta, section), getattr(model, section)
        averaged, greatest = _averaged(manifest, section), manifest.span(section, MAX)
        if averaged.stop > averaged.start:
            differs = ~same_elements(values[averaged], present[averaged])
            if (so_far := merged.changed.setdefault(section, differs)) is not differs:
                so_far |= differs
        if greatest.stop > greatest.start and not robust:
            largest = merged.greatest.get(section, present[greatest])
            merged.greatest[section] = torch.maximum(largest, values[greatest])
        latest = manifest.latest(section)
        if latest and not robust and bool(delta.changed[latest.flags].any()):
            newest = merged.latest.get(section, present[latest.elements])
            takes = delta.changed[latest.flags].bool().repeat_interleave(torch.tensor(latest.lengths))
            merged.latest[section] = torch.where(takes, values[latest.elements], newest)


def _finished(
    section: str, merged: MergedBuffers, made: torch.Tensor | None, model: Frame, robust: bool
) -> torch.Tensor:
    """The next version's values of a section; `made` are those of the aggregation, which averages all of them."""
    manifest, present = model.manifest, getattr(model, section)
    new: torch.Tensor = present.clone()
    made = present if made is None else made
    averaged, greatest, latest = _averaged(manifest, section), manifest.span(section, MAX), manifest.latest(section)
    if averaged.stop > averaged.start:
        new[averaged] = torch.where(merged.changed[section], made[averaged], present[averaged])
    if section == INTEGERS:
        counted = manifest.span(section, "")
        new[counted] = made[counted]
    if greatest.stop > greatest.start:
        of_clients = _median(section, greatest, merged.updates) if robust else merged.greatest[section]
        new[greatest] = torch.maximum(present[greatest], of_clients)
    if latest and robust:
        _take_agreed(new, section, latest, merged.updates)
    elif latest and section in merged.latest:
        new[latest.elements] = merged.latest[section]
    return new


def _averaged(manifest: Manifest, section: str) -> slice:
    """The elements that the aggregation averages; no integer is averaged."""
    return slice(0, 0) if section == INTEGERS else manifest.span(section, "", MEAN)


def _median(section: str, span: slice, updates: Sequence[Delta]) -> torch.Tensor:
    return torch.stack([getattr(update, section)[span] for update in updates]).median(dim=0).values


def _take_agreed(new: torch.Tensor, section: str, latest: LatestTensors, updates: Sequence[Delta]) -> None:
    """Set each tensor that more than half of the updates changed to the one of these that is closest to the others."""
    start = latest.elements.start
    for i, length in enumerate(latest.lengths):
        flag = latest.flags.start + i
        where = slice(start, start + length)
        start += length
        values = [getattr(update, section)[where] for update in updates if update.changed[flag]]
        if 2 * len(values) > len(updates):
            rows = torch.stack(values).double()
            distances = [float((rows - row).abs().nan_to_num(0.0).sum()) for row in rows]
            new[where] = values[distances.index(min(distances))]
