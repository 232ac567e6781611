"""The finalists' intervals hold for seeds and pairs together, and say of equal ones that they are tied."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator.study.confirmation import ERROR_RATE, Confirmation, FinalistSample, compare_finalists

SIMULATED = 150


def drawn(
    rng: np.random.Generator,
    *,
    finalists: int = 3,
    seeds: int = 4,
    pairs: int = 60,
    of_seed: float = 0.0,
    of_pair: float = 0.0,
    of_rest: float = 0.0,
) -> list[FinalistSample]:
    """Finalists that are all truly 0, whose values vary by seed, by pair (the same for all), and by both."""
    shared = rng.normal(0, of_pair, pairs)
    return [
        FinalistSample(
            k,
            rng.normal(0, of_seed, (seeds, 1)) + shared + rng.normal(0, of_rest, (seeds, pairs)),
            cost=1.0,
        )
        for k in range(finalists)
    ]


def misses(found: Confirmation) -> tuple[bool, bool]:
    """Whether any interval of a mean excludes 0, and whether any finalist is called worse."""
    return any(v.mean.is_clear for v in found.values), len(found.tied) < len(found.values)


CASES: dict[str, dict[str, Any]] = {
    "seeds": {"of_seed": 1.0, "of_rest": 0.5},
    "pairs": {"of_pair": 1.0, "of_rest": 0.5},
    "both": {"of_seed": 0.2, "of_pair": 1.0, "of_rest": 1.0},
    "seeds alone": {"of_seed": 1.0, "pairs": 1},
    "two seeds": {"of_seed": 0.3, "of_pair": 1.0, "of_rest": 1.0, "seeds": 2},
    "two seeds far apart": {"of_seed": 1.0, "of_pair": 1.0, "of_rest": 1.0, "seeds": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_equal_finalists_are_told_apart_no_more_often_than_stated(case: str) -> None:
    """The limit is the stated rate plus four standard errors of a share of SIMULATED."""
    rng = np.random.default_rng(sum(map(ord, case)))
    found = np.array([misses(compare_finalists(drawn(rng, **CASES[case]), (), 1.0)) for _ in range(SIMULATED)])
    limit = ERROR_RATE + 4 * math.sqrt(ERROR_RATE * (1 - ERROR_RATE) / SIMULATED)
    assert (found.mean(axis=0) <= limit).all(), found.mean(axis=0)


@pytest.mark.parametrize("case", CASES)
def test_finalists_equal_to_the_initial_model_gain_no_more_often_than_stated(case: str) -> None:
    """The initial model has the pairs' values alone; the limit is as above."""
    rng = np.random.default_rng(sum(map(ord, case)))
    options = {"seeds": 4, "pairs": 60, "of_pair": 0.0} | CASES[case]
    found: list[bool] = []
    for _ in range(SIMULATED):
        shared = rng.normal(0, options["of_pair"], options["pairs"])
        samples = [
            FinalistSample(k, sample.values + shared, cost=1.0)
            for k, sample in enumerate(drawn(rng, **options | {"of_pair": 0.0}))
        ]
        gains = [value.gain for value in compare_finalists(samples, (), 1.0, shared).values]
        found.append(any(gain is not None and gain.is_clear for gain in gains))
    limit = ERROR_RATE + 4 * math.sqrt(ERROR_RATE * (1 - ERROR_RATE) / SIMULATED)
    assert np.mean(found) <= limit


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_gain_is_positive_where_the_finalist_is_better(sign: float) -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 1.0, 60)
    better = FinalistSample(7, shared + sign * 0.5 + rng.normal(0, 0.1, (3, 60)), cost=1.0)
    gain = compare_finalists([better], (), sign, shared).gain
    assert gain is not None
    assert gain.is_clear
    assert gain.value == pytest.approx(0.5, abs=0.05)
    assert compare_finalists([better], (), sign).gain is None


def test_intervals_are_not_wider_than_seeds_and_pairs_ask_for() -> None:
    """With many seeds and pairs they approach the normal interval of the true standard error."""
    rng = np.random.default_rng(1)
    found = [compare_finalists(drawn(rng, finalists=1, seeds=40, pairs=400, of_seed=1.0), (), 1.0) for _ in range(20)]
    half = float(np.mean([f.values[0].mean.high - f.values[0].mean.value for f in found]))
    assert half == pytest.approx(2.02 / math.sqrt(40), rel=0.1)


def test_a_clear_winner_is_found_in_both_directions() -> None:
    rng = np.random.default_rng(2)
    samples = drawn(rng, of_seed=0.1, of_pair=1.0, of_rest=0.1)
    moved = [FinalistSample(s.of, s.values + 2.0 * (s.of == 1), s.cost) for s in samples]
    up, down = compare_finalists(moved, (5, 4), 1.0), compare_finalists(moved, (), -1.0)
    assert (up.recommended, up.tied, up.trials) == (1, (1,), (4, 5))
    assert up.reason == "trial 1's configuration is clearly better than the other finalists"
    assert down.recommended in (0, 2)
    assert 1 not in down.tied
    assert [v.of for v in up.values] == [1, *[v.of for v in up.values if v.of != 1]]


def constant(of: int, mean: float, cost: float, distance: float | None) -> FinalistSample:
    values: NDArray[np.float64] = mean + np.array([[-1.0], [0.0], [1.0]])
    return FinalistSample(of, values, cost, distance)


@pytest.mark.parametrize(
    ("costs", "distances", "recommended", "reason"),
    [
        ((8, 8, 4), (0.3, 0.102, 0.1), 2, "is closer to the initial model (0.1 nats per token against 0.3)"),
        ((8, 8, 8), (0.3, 0.2, 0.1), 2, "is closer to the initial model (0.1 nats per token against 0.3)"),
        ((8, 8, 4), (0.1, 0.3, 0.105), 2, "trains on fewer pairs (4 against 8)"),
        ((8, 4, 8), (None, None, None), 1, "trains on fewer pairs (4 against 8)"),
        (
            (8, 8, 8),
            (0.1, 0.1, 0.1),
            0,
            "has the best mean, and none is notably closer to the initial model or cheaper",
        ),
    ],
)
def test_of_tied_finalists_the_closer_then_the_cheaper_one_is_recommended(
    costs: tuple[float, ...], distances: tuple[float | None, ...], recommended: int, reason: str
) -> None:
    samples = [constant(k, 0.2 - 0.1 * k, c, d) for k, (c, d) in enumerate(zip(costs, distances, strict=True))]
    found = compare_finalists(samples, (), 1.0)
    assert (found.tied, found.recommended) == ((0, 1, 2), recommended)
    assert found.reason == (
        f"the configurations of trials 0, 1, 2 are tied; trial {recommended}'s is recommended, as it {reason}"
    )
    assert "seeds alone" in found.text
    assert Confirmation.model_validate(found.model_dump(mode="json")) == found


def test_the_result_is_the_same_each_time() -> None:
    samples = drawn(np.random.default_rng(3), of_seed=1.0, of_pair=1.0)
    assert compare_finalists(samples, (), 1.0) == compare_finalists(samples, (), 1.0)
