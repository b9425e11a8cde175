"""A keeper adds its own noise to each sum, and releases none with a client whose budget is used up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from fedqueue.config.privacy import ClientPrivacyConfig
from fedqueue.privacy.gaussian_dp import client_budget
from fedqueue.protocol.messages import MaskRefused
from fedqueue.secure.keeper import Keeper, OwnBudget, Release
from fedqueue.secure.masks import new_seed
from fedqueue.secure.ring import Ring, ring_for
from tests.support.masked_run import MaskedRun, Posted

PRIVACY = {"clip_norm": 1.0, "noise_multiplier": 2.0, "max_participations": 2, "delta": 1e-5}
WORDS = 20_000


@pytest.fixture
def run(tmp_path: Path) -> MaskedRun:
    return MaskedRun(tmp_path, parameters=WORDS, privacy=PRIVACY)


@pytest.fixture
def keeper(run: MaskedRun) -> Keeper:
    return run.running["k0"]


def offered(run: MaskedRun, clients: str = "abcd", base: int = 0) -> list[Posted]:
    posted = [run.post(client, base, vector=3 + i) for i, client in enumerate(clients)]
    for keeper in run.running.values():
        for update in posted:
            assert keeper.offer(update.offer).refusal == ""
    return posted


def answer(keeper: Keeper, run: MaskedRun, version: int, posted: list[Posted], weights: Any = None) -> Any:
    return keeper.release(run.propose(version, posted, weights))


def noise(run: MaskedRun, release: Release) -> npt.NDArray[np.float64]:
    """The keeper's noise and dither, in standard deviations of the noise: what its masks' sum lacks."""
    plain = np.concatenate([piece.copy() for piece in replace(release, _deviation=0.0).pieces()])
    noisy = np.concatenate([piece.copy() for piece in release.pieces()])
    taken: npt.NDArray[np.float64] = (plain - noisy).view(np.int32) / ring_for(run.config, WORDS).deviation
    return taken


# Noise


def test_sum_has_the_noise_of_each_keeper(run: MaskedRun) -> None:
    posted = offered(run)
    releases = [answer(keeper, run, 0, posted) for keeper in run.running.values()]
    total = run.unmask(posted, [8] * 4, releases) - 8 * (3 + 4 + 5 + 6)
    sigma = 2.0 * 8 * ring_for(run.config, WORDS).levels * np.sqrt(2)
    assert stats.kstest(total / sigma, "norm").pvalue > 1e-3
    assert (total / sigma).var() == pytest.approx(1, abs=5 * np.sqrt(2 / WORDS))


def test_noise_is_independent_between_keepers_and_cohorts(run: MaskedRun) -> None:
    first, second = offered(run), offered(run, base=1)
    one, other = (noise(run, answer(keeper, run, 0, first)) for keeper in run.running.values())
    later = noise(run, answer(run.running["k0"], run, 1, second))
    for a, b in ((one, other), (one, later), (other, later)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(WORDS)


@pytest.mark.parametrize("change", ["order", "weight", "version"])
def test_another_cohort_of_the_same_updates_gets_other_noise(run: MaskedRun, change: str) -> None:
    """Two sums with the same noise would tell their difference exactly: two copies of one keeper's file do not."""
    posted, weights = offered(run), [8, 8, 8, 8]
    first = noise(run, answer(run.running["k0"], run, 0, posted, weights))
    copied = run.start("k0", log=type(run.logs["k0"])())
    for update in posted:
        copied.offer(update.offer)
    if change == "order":
        posted = posted[::-1]
    if change == "weight":
        weights = [7, 8, 8, 8]
    version = int(change == "version")
    other = noise(run, answer(copied, run, version, posted, [5] * 4 if version else weights))
    assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(WORDS)


def test_repeated_cohort_has_the_same_noise_and_is_charged_once(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run)
    assert np.array_equal(noise(run, answer(keeper, run, 0, posted)), noise(run, answer(keeper, run, 0, posted)))
    assert run.logs["k0"].account("a") == 64


def test_keeper_of_another_secret_has_other_noise(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run)
    other = run.start("k0", secret=new_seed(), log=type(run.logs["k0"])())
    for update in posted:
        other.offer(update.offer)
    first, second = (noise(run, answer(k, run, 0, posted)) for k in (keeper, other))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(WORDS)


@pytest.mark.parametrize("noise_multiplier", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("keepers", [1, 2, 3])
def test_ring_has_room_for_twelve_deviations(noise_multiplier: float, keepers: int) -> None:
    ring = Ring(1.0, 10, 8, keepers, 100, noise_multiplier)
    largest = ring.most_weight * ring.levels + ring.most_dither + 12 * np.sqrt(keepers) * ring.deviation
    assert largest < 2**31
    assert ring.levels > 0
    with_next = (ring.levels + 1) * (ring.most_weight + 12 * np.sqrt(keepers) * noise_multiplier * 8)
    assert with_next + keepers * ring.dither > 2**31 - 1


def test_noise_does_not_exceed_the_norm_that_is_expected(run: MaskedRun) -> None:
    posted = offered(run)
    releases = [answer(keeper, run, 0, posted) for keeper in run.running.values()]
    norm = float(np.linalg.norm(run.unmask(posted, [8] * 4, releases).astype(float)))
    ring = ring_for(run.config, WORDS)
    assert 0.9 * ring.largest_norm(32) < norm <= ring.largest_norm(32)


# Sensitivity


def test_zeroing_a_client_changes_a_sum_by_its_load_at_most() -> None:
    """All corners and diagonals of the ball, all weights and at most two updates of a client."""
    levels, most = 5, 2
    vectors = np.array([(x, y) for x in range(-5, 6) for y in range(-5, 6) if x * x + y * y <= levels**2])
    largest = {1: 0.0, 2: 0.0}
    for load in (1, 2):
        for split in ([load],) if load == 1 else ([2], [1, 1]):
            sums = np.zeros((1, 2))
            for weight in split:
                sums = (sums[:, None] + weight * vectors[None]).reshape(-1, 2)
            largest[load] = max(largest[load], float(np.linalg.norm(sums, axis=1).max()))
    assert largest == {1: levels, 2: most * levels}


# Budgets


def test_budget_is_refused_exactly_where_the_next_would_exceed(run: MaskedRun, keeper: Keeper) -> None:
    for version in (0, 1):
        assert isinstance(answer(keeper, run, version, offered(run, base=version)), Release)
    posted = offered(run, base=2)
    refused = answer(keeper, run, 2, posted)
    assert isinstance(refused, MaskRefused)
    assert refused.reason == "budget"
    assert set(refused.headers) == {update.header for update in posted}
    assert "4 clients have used up their privacy budget: a has spent ε = 2.943" in refused.detail


def test_full_account_has_no_room_for_the_smallest_weight(run: MaskedRun, keeper: Keeper) -> None:
    for version in (0, 1):
        answer(keeper, run, version, offered(run, base=version))
    assert answer(keeper, run, 2, offered(run, base=2), [1] * 4).reason == "budget"


def test_only_members_of_spent_clients_are_named(run: MaskedRun, keeper: Keeper) -> None:
    for version in (0, 1):
        answer(keeper, run, version, offered(run, "abc", base=version))
    posted = offered(run, "abde", base=2) + offered(run, "c", base=2)
    assert set(answer(keeper, run, 2, posted).headers) == {posted[i].header for i in (0, 1, 4)}


def test_stale_updates_cost_the_square_of_their_weight(run: MaskedRun, keeper: Keeper) -> None:
    """Two fresh updates fill the account of 2 · 8²; with one of them, 64 are left: three of weight 4, not five."""
    answer(keeper, run, 0, offered(run))
    accounts = []
    for base in range(1, 6):
        release = answer(keeper, run, base, offered(run, base=base), [4] * 4)
        accounts.append(run.logs["k0"].account("a"))
        if base == 5:
            assert release.reason == "budget"
    assert accounts == [80, 96, 112, 128, 128]


def test_two_updates_of_a_client_cost_the_square_of_their_sum(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run) + offered(run, "a")
    answer(keeper, run, 0, posted, [4, 8, 8, 8, 4])
    assert [run.logs["k0"].account(client) for client in "abe"] == [64, 64, 0]


def test_account_survives_a_restart_of_the_keeper(run: MaskedRun, keeper: Keeper) -> None:
    for version in (0, 1):
        answer(keeper, run, version, offered(run, base=version))
    again = run.running["k0"] = run.start("k0")
    assert answer(again, run, 2, offered(run, base=2)).reason == "budget"


@pytest.mark.parametrize(("own", "released"), [(OwnBudget(1e3, 1e-5), 2), (OwnBudget(2.2, 1e-5), 1)])
def test_smaller_budget_of_keeper_and_run_holds(run: MaskedRun, own: OwnBudget, released: int) -> None:
    keeper = run.running["k0"] = run.start("k0", own_budget=own)
    answers = [answer(keeper, run, version, offered(run, base=version)) for version in range(3)]
    assert [isinstance(a, Release) for a in answers] == [i < released for i in range(3)]


def test_seed_for_other_privacy_settings_is_refused(run: MaskedRun) -> None:
    """A coordinator cannot tell sites of much noise and keepers of little."""
    posted = run.post("a")
    lied = run.config.model_copy(update={"privacy": run.config.privacy.model_copy(
        update={"clients": ClientPrivacyConfig(**{**PRIVACY, "noise_multiplier": 0.1})})})  # fmt: skip
    assert run.start("k0", config=lied).offer(posted.offer).refusal == "unmaskable"


@pytest.mark.parametrize(
    ("settings", "noise_multiplier", "account"),
    [
        ({"noise_multiplier": 2.0, "max_participations": 2}, 2.0, 128),
        ({"epsilon": 8.0, "max_participations": 20}, 2.684306, 1280),
        ({"epsilon": 8.0, "noise_multiplier": 2.6844}, 2.6844, 1280),
    ],
)
def test_two_of_three_settings_determine_the_third(
    settings: dict[str, float], noise_multiplier: float, account: int
) -> None:
    given: Any = {"clip_norm": 1.0, "delta": 1e-5, **settings}
    budget, most = client_budget(ClientPrivacyConfig(**given), 8)
    assert budget.noise_multiplier == pytest.approx(noise_multiplier, rel=1e-6)
    assert most == account
