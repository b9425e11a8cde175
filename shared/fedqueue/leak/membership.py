"""Scores that say how likely a row was trained on: in an update, and in a model."""

from __future__ import annotations

import numpy as np

from fedqueue.leak.statistics import Numbers

MANY = 32
"""With at least this number of reference models, the spread of each row's own scores is used, not that of all rows."""
SURE = 1e-12
"""A probability is taken to be at least this far from 1."""
OFFLINE_A = 0.3
"""The coefficient a of RMIA's offline form: p_in ≈ a · p_out + 1 − a."""


def update_scores(before: Numbers, after: Numbers) -> Numbers:
    """Return loss(base) − loss(base + Δ) of each row, (n,): an update lowers the loss of its own rows most."""
    return before - after


def likelihoods(losses: Numbers) -> Numbers:
    """Return exp(−loss) of each row: the probability of its label, where the loss is a cross entropy."""
    return np.exp(-losses)


def rmia_scores(target: Numbers, reference: Numbers, population: Numbers, population_reference: Numbers) -> Numbers:
    """Return the RMIA score of each row: the share of population rows z with LR(x, z) ≥ 1.

        LR(x, z) = (p(x | θ) / p(x)) / (p(z | θ) / p(z)),   p(x) = (1 + a)/2 · p_out(x) + (1 − a)/2

    (Zarifzadeh et al., arXiv 2312.03262, equations 2 and 4, offline form, γ = 1). `target`: p(x | θ) under the model
    that is attacked, `reference`: p_out(x), the mean under models that were not trained on x, both (n,); `population`
    and `population_reference`: the same for rows that no model was trained on.
    """
    ratios, others = _ratio(target, reference), np.sort(_ratio(population, population_reference))
    scores: Numbers = np.searchsorted(others, ratios, side="right") / len(others)
    return scores


def _ratio(target: Numbers, reference: Numbers) -> Numbers:
    return target / ((1 + OFFLINE_A) / 2 * reference + (1 - OFFLINE_A) / 2)


def lira_scores(target: Numbers, out: Numbers) -> Numbers:
    """Return the LiRA score of each row, (n,): by how many standard deviations its confidence is above that of models
    that were not trained on it.

        z(x) = (φ(x | θ) − mean φ_out(x)) / std φ_out(x),   φ = log(p / (1 − p))

    (Carlini et al., arXiv 2112.03570, section VI, the offline attack, whose score Φ(z) has the same order). `target`:
    p(x | θ) under the model that is attacked, (n,); `out`: the same under k models not trained on x, (k, n). With fewer
    than MANY of them, the spread is that of all rows together.
    """
    confidence, others = _confidence(target), _confidence(out)
    spread = others.std(0) if len(others) >= MANY else np.sqrt(others.var(0).mean())
    scores: Numbers = (confidence - others.mean(0)) / np.maximum(spread, SURE)
    return scores


def _confidence(likelihood: Numbers) -> Numbers:
    bounded = np.clip(likelihood, SURE, 1 - SURE)
    scores: Numbers = np.log(bounded) - np.log1p(-bounded)
    return scores
