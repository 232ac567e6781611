"""The length-controlled win rate against a computation of its own: the same objective, minimized by scipy."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.model_selection import GroupKFold

from orchestrator.judge.win_rates import length_controlled, prompt_difficulty, wilson

Column = NDArray[np.float64]


def data(
    seed: int, rows: int = 120, model: float = 0.4, length: float = 1.2
) -> tuple[Column, Column, Column, list[str]]:
    """Preferences of a judge that likes the model a little and length much; the model's answers are longer."""
    rng = np.random.default_rng(seed)
    theirs = rng.integers(80, 400, rows).astype(float)
    ours = theirs + rng.normal(60, 90, rows).round()
    margins = theirs - ours
    votes = rng.random((rows, 2)) < expit(model - length * np.tanh(margins / margins.std(ddof=1)))[:, None]
    return votes.mean(axis=1), ours, theirs, [f"p{i}" for i in range(rows)]


def lasso(design: Column, expected: Column, strength: float) -> Column:
    """min |w|_1 + C * sum of soft log losses; w as a difference of two that are not negative."""
    width = design.shape[1]

    def loss(parts: Column) -> tuple[float, Column]:
        at = design @ (parts[:width] - parts[width:])
        soft, slope = np.sum(np.logaddexp(0, at) - expected * at), design.T @ (expit(at) - expected)
        return float(parts.sum() + strength * soft), np.concatenate([1 + strength * slope, 1 - strength * slope])

    tight = {"maxiter": 20_000, "maxfun": 200_000, "ftol": 1e-15, "gtol": 1e-10}
    found = minimize(
        loss, np.zeros(2 * width), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 2 * width, options=tight
    )
    return found.x[:width] - found.x[width:]


def independent(expected: Column, ours: Column, theirs: Column, hard: Column | None = None) -> float:
    margins = theirs - ours
    columns = [np.tanh(margins / margins.std(ddof=1)), np.ones(len(margins)), *([] if hard is None else [hard])]
    design = np.stack(columns, axis=1)

    def held_out_loss(strength: float) -> float:
        losses: list[float] = []
        for rest, held_trial in GroupKFold(5).split(design, groups=np.arange(len(margins))):
            at = design[held_trial] @ lasso(design[rest], expected[rest], strength)
            losses.append(float(np.mean(np.logaddexp(0, at) - expected[held_trial] * at)))
        return float(np.mean(losses))

    strengths = np.logspace(-4, 4, 10)
    weights = lasso(design, expected, strengths[int(np.argmin([held_out_loss(c) for c in strengths]))])
    design[:, 0] = 0
    return float(expit(design @ weights).mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_what_another_solver_finds(seed: int) -> None:
    expected, ours, theirs, prompts = data(seed)
    found = length_controlled(expected, ours, theirs, prompts)
    assert found.value == pytest.approx(independent(expected, ours, theirs), abs=2e-3)
    assert found.low < found.value < found.high


def test_it_takes_the_length_out() -> None:
    expected, ours, theirs, prompts = data(3, rows=400)
    found = length_controlled(expected, ours, theirs, prompts)
    assert expected.mean() > 0.68, "the judge likes length, and the model writes more"
    assert found.low < expit(0.4) < found.high, "what the data were made with"
    assert found.value < expected.mean() - 0.05


def test_with_the_prompts_difficulty() -> None:
    expected, ours, theirs, prompts = data(5)
    rng = np.random.default_rng(0)
    others = [[(p, float(rng.random() < 0.5)) for p in prompts] for _ in range(3)]
    hard = prompt_difficulty(others, prompts)
    assert prompt_difficulty(others[:2], prompts) is None
    won = sum(logged[0][1] for logged in others)
    assert hard[0] == pytest.approx(np.log((won + 1) / (3 - won + 1)))
    found = length_controlled(expected, ours, theirs, prompts, hard)
    assert found.value == pytest.approx(independent(expected, ours, theirs, hard), abs=2e-3)


def test_the_edges() -> None:
    five = [f"p{i}" for i in range(5)]
    ones, same = np.ones(5), np.full(5, 10.0)
    assert length_controlled(ones[:4], same[:4], same[:4], five[:4]) is None, "fewer prompts than folds"
    assert length_controlled(ones, same, same, five).value > 0.95
    assert length_controlled(0 * ones, same, same + np.arange(5), five).value < 0.05
    indistinguishable = length_controlled(ones / 2, same, same, five)
    ties = wilson(0.5, 5)
    assert (indistinguishable.low, indistinguishable.value, indistinguishable.high) == pytest.approx(
        (ties.low, 0.5, ties.high), abs=1e-3
    ), "five ties leave as much open as five votes do"


def test_where_the_penalty_leaves_nothing_the_interval_is_not_of_width_nought() -> None:
    """Two wins, four losses and eighteen ties: little is known, and least of all that it is one half."""
    expected, rng = np.array([1.0] * 2 + [0.0] * 4 + [0.5] * 18), np.random.default_rng(2)
    ours, theirs = rng.integers(5, 30, 24).astype(float), rng.integers(5, 30, 24).astype(float)
    found = length_controlled(expected, ours, theirs, [f"p{k}" for k in range(24)])
    assert found.high - found.low > 0.15
    assert 0.42 < found.value < 0.5, "a little less than one half, not one half whatever the votes are"
    assert found.low + 0.05 < found.value < found.high - 0.05, "well inside its interval"


def test_samples_of_a_prompt_stay_together() -> None:
    expected, ours, theirs, prompts = data(7, rows=60)
    doubled = [np.concatenate([c, c]) for c in (expected, ours, theirs)]
    once = length_controlled(expected, ours, theirs, prompts)
    often = length_controlled(doubled[0], doubled[1], doubled[2], prompts * 2)
    assert (often.low, often.value, often.high) == pytest.approx((once.low, once.value, once.high), abs=2e-3)


def test_a_prompt_weighs_the_same_however_many_samples_it_has() -> None:
    """The same answers once more to the prompts that were won: they were known to be won before."""
    expected, ours, theirs, prompts = data(11, rows=60)
    again = np.concatenate([np.arange(60), np.repeat(np.flatnonzero(expected > 0.5), 5)])
    once = length_controlled(expected, ours, theirs, prompts)
    often = length_controlled(expected[again], ours[again], theirs[again], [prompts[k] for k in again])
    assert often.value == pytest.approx(once.value, abs=0.03), "folds differ, weights do not"
    hard = prompt_difficulty([[(p, 1.0) for p in prompts] + [("p0", 0.0)] * 3 for _ in range(3)], prompts)
    assert hard[0] == pytest.approx(np.log((3 * 0.25 + 1) / (3 * 0.75 + 1))), "three trials, whatever their samples"


def test_the_interval_of_a_small_effect_does_not_end_at_one_half() -> None:
    """A strong penalty keeps a small effect and removes it from a tenth of the resamples, which are 0.5 then."""
    expected, ours, theirs, prompts = data(14, rows=40, model=0.25, length=0.0)
    found = length_controlled(expected, ours, theirs, prompts)
    assert found.low < 0.49
    assert found.low < found.value < found.high
