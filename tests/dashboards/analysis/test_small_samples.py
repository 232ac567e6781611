"""Few held-out pairs: nothing is called clear that chance does as well, and no advice asks for as many as there are."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, fisher_exact, spearmanr

from dashboards.analysis.held_out_pairs import HeldOutPairs, spearman
from dashboards.analysis.significance import analyze_significance, paired_difference
from dashboards.analysis.small_samples import is_clear_correlation, pairs_needed, share_difference
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.diagnose import analyze, diagnose
from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel
from dashboards.report.panels.result_panels import significance_text
from tests.support.scripted_sweep import METRIC, Script, frame_of, make_spec, run_sweep

COUNTS = st.integers(1, 50)


@cache
def one_sweep() -> SweepFrame:
    rates = {"training.learning_rate": {"choice": [1e-7, 3e-7, 1e-6]}}
    return frame_of(run_sweep(Path(mkdtemp()), make_spec(search=rates), lambda _: Script(quality=0.5)))


def with_pairs(count: int, after: list[int], before: int) -> SweepFrame:
    """The sweep with `count` held-out pairs, `after[k]` in order by trial k, `before` by the start."""
    frame = one_sweep()
    trials = [_with_pairs(trial, count, right, before) for trial, right in zip(frame.trials, after, strict=True)]
    return replace(frame, trials=tuple(trials))


def _with_pairs(trial: TrialFrame, count: int, right: int, before: int) -> TrialFrame:
    rejected, path = np.full(count, -20.0), np.arange(count)
    pairs = HeldOutPairs(
        chosen=rejected + np.where(path < right, 1.0, -1.0),
        rejected=rejected,
        chosen_tokens=np.full(count, 10.0),
        rejected_tokens=np.full(count, 10.0),
        rows=np.stack([np.zeros(count, dtype=np.int64), path + 1], axis=1),
        initial_chosen=rejected + np.where(path < before, 1.0, -1.0),
        initial_rejected=rejected,
    )
    curve = [(0, before / count), (40, right / count)]
    view = replace(trial.curves, record=replace(trial.record, value=right / count), curves={**trial.curves.curves})
    view.curves[METRIC] = curve
    return replace(trial, curves=view, held_out_pairs=pairs)


def said(found: list[DiagnosisFinding]) -> str:
    return "\n".join(f"{f.rule} {f.title} {f.evidence} {f.next_step}" for f in found)


def test_two_pairs_that_are_both_right_are_not_called_a_coin() -> None:
    frame = with_pairs(2, [2, 1, 1], before=1)
    found = {f.rule: f for f in diagnose(frame)}
    assert "coin_toss" not in found
    assert found["few_pairs"].level is FindingLevel.WARNING
    assert "over 2 held-out pairs, 95 % interval 0.091 to 1.000 for the best of 3 trials" in found["few_pairs"].evidence
    assert "Hold out about 100 pairs" in found["few_pairs"].next_step
    assert "not clearly better than the initial model" in found["gain_not_clear"].title
    assert "Hold out about 100 pairs" in found["gain_not_clear"].next_step
    significance = analyze_significance(frame)
    assert significance is not None
    assert "not clearly better than the initial model" in significance_text(frame, significance)


@given(st.data())
def test_advice_over_few_pairs_asks_for_more_pairs_than_there_are(data: st.DataObject) -> None:
    count = data.draw(COUNTS)
    right = st.integers(0, count)
    frame = with_pairs(count, [data.draw(right) for _ in range(3)], data.draw(right))
    analysis = analyze(frame)
    words = said(list(analysis.findings))
    for requested in re.findall(r"about ([\d,]+) (?:held-out )?pairs", words, re.IGNORECASE):
        assert int(requested.replace(",", "")) >= max(100, count + 1)
    winner = frame.ranked[0]
    accuracy = winner.last(METRIC)
    assert accuracy is not None
    best = round(accuracy * count)
    if "accuracy is no better than chance" in words:
        assert binomtest(best, count).proportion_ci().high < 0.6
    assert "accuracy may be no better than chance" not in words
    if best > count / 2:
        assert "no better than chance" not in words
    start = sum(winner.held_out_pairs.initial().margins > 0)  # pyright: ignore[reportOptionalMemberAccess]
    if best > start:
        logged = {finding.rule for finding in analysis.findings} & {"few_pairs", "coin_toss"}
        together = binomtest(best, count).proportion_ci(1 - 0.05 / 3)  # of the best of three trials
        assert bool(logged) == (together.low <= 0.5)
    against = analysis.significance.against_initial
    if against.is_clear:  # then the exact test agrees that it is no chance
        gained = abs(best - start)
        assert binomtest(gained, gained).pvalue < 0.05


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=50))
def test_a_mean_of_fewer_than_six_differing_pairs_is_never_clear(gaps: list[float]) -> None:
    column = np.array(gaps)
    found = paired_difference(column, np.zeros(len(column)), "eval_margins/logp")
    assert found.low <= found.mean <= found.high
    if found.is_clear:
        assert np.sum(np.abs(column) > 1e-12) >= 6


def test_intervals_of_means_hold_what_they_promise_with_few_pairs() -> None:
    """The plain bootstrap of 8 values leaves the truth out in 12 of 100 cases; 5 are promised."""
    rng = np.random.default_rng(0)
    sampled = [paired_difference(rng.normal(0.5, 1, 8), np.zeros(8), "eval_margins/logp") for _ in range(400)]
    assert sum(found.low <= 0.5 <= found.high for found in sampled) >= 0.93 * 400


@given(COUNTS, st.data())
def test_two_shares_without_pairing_are_clear_only_near_the_exact_test(count: int, data: st.DataObject) -> None:
    a, b = data.draw(st.integers(0, count)), data.draw(st.integers(0, count))
    low, high = share_difference(a / count, b / count, count)
    assert low <= (a - b) / count + 1e-12
    assert (a - b) / count - 1e-12 <= high
    if low > 0 or high < 0:
        assert count >= 6
        assert fisher_exact([[a, count - a], [b, count - b]]).pvalue < 0.1  # Fisher's is the stricter of the two


def test_a_share_of_all_against_none_has_a_width() -> None:
    low, high = share_difference(1.0, 0.0, 6)
    assert (low, high) == (pytest.approx(0.351, abs=1e-3), 1.0)
    assert share_difference(1.0, 0.0, 2)[0] <= 0


@given(st.integers(3, 50), st.integers(0, 10_000))
def test_a_rank_correlation_is_clear_only_where_its_test_says_so(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rho, p = spearmanr(rng.normal(size=count), rng.normal(size=count))
    assert is_clear_correlation(float(rho), count) == (count >= 6 and p < 0.05)


def test_a_preference_for_length_needs_more_than_three_pairs() -> None:
    frame = with_pairs(4, [3, 1, 1], before=1)
    winner = frame.ranked[0]
    assert winner.held_out_pairs is not None
    few = replace(winner.held_out_pairs, chosen_tokens=np.array([14.0, 13.0, 12.0, 11.0]), initial_chosen=None)
    trials = tuple(replace(trial, held_out_pairs=few) if trial is winner else trial for trial in frame.trials)
    assert "length_bias" not in {f.rule for f in diagnose(replace(frame, trials=trials))}


@pytest.mark.parametrize("pairs", [1, 2, 50, 99, 100, 5000])
def test_pairs_needed_are_more_than_there_are(pairs: int) -> None:
    assert (pairs_needed(0.5, 0.1, pairs) or 0) >= max(100, pairs + 1)
    assert pairs_needed(0.0, 0.1, pairs) is None
    assert pairs_needed(1e-6, 1.0, pairs) is None


def test_rank_correlation_has_none_for_what_is_constant() -> None:
    rising = np.array([1.0, 2.0, 2.0, 5.0])
    assert spearman(rising, rising**3) == pytest.approx(1.0)
    assert spearman(rising, -rising) == pytest.approx(-1.0)
    assert spearman(rising, np.array([2.0, 1.0, 3.0, 3.0])) == pytest.approx(0.5)
    assert spearman(rising, np.ones(4)) is None
    assert spearman(np.ones(4), rising) is None
    assert spearman(rising[:2], rising[:2]) is None
