"""Verdicts hold as often as stated although the winner was chosen among many trials, by simulation."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from dashboards.analysis.comparison import as_json, compare_sweeps
from dashboards.analysis.held_out_pairs import HeldOutPairs
from dashboards.analysis.param_effects import has_clear_effect
from dashboards.analysis.significance import (
    Significance,
    analyze_significance,
    paired_difference,
    recommend,
)
from dashboards.analysis.simultaneous_intervals import MAX_DRAWN_TRIALS, PairedColumns, SeedVariance
from dashboards.analysis.small_samples import bonferroni
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.diagnose import analyze, diagnose
from dashboards.report.comparison_page import comparison_summary
from dashboards.report.panels.result_panels import significance_text
from orchestrator.study.trial_records import Trial
from tests.support.metrics import COMPLETE
from tests.support.scripted_sweep import METRIC, PRUNED, Script, frame_of, make_spec, run_sweep
from trainer.metrics import EXACT_ANSWERS, KL, LOG_RATIO_CHOSEN

RATES = [1e-7, 2e-7, 4e-7, 8e-7, 1.6e-6, 3.2e-6, 6.4e-6, 1.28e-5]
RATE = "training.learning_rate"


@cache
def grid(*counts: int) -> SweepFrame:
    """A sweep over so many learning rates and betas."""
    rates, betas = counts
    search = {RATE: {"choice": RATES[:rates]}, "loss.beta": {"choice": [2.0, 4.0, 6.0, 10.0][:betas]}}
    return frame_of(run_sweep(Path(mkdtemp()), make_spec(search=search), lambda _: Script(), pairs=8))


def with_margins(frame: SweepFrame, initial: np.ndarray, each: np.ndarray) -> SweepFrame:
    """The sweep whose trials, and initial model, have these margins per token on each pair: [N] and [N, trials]."""
    count, ones = len(initial), np.ones(len(initial))
    rows = np.stack([np.zeros(count, dtype=np.int64), np.arange(count)], axis=1)

    def changed(trial: TrialFrame, margins: np.ndarray) -> TrialFrame:
        pairs = HeldOutPairs(margins - 1.0, -ones, ones, ones, rows, initial - 1.0, -ones)
        record = replace(trial.record, value=float(np.mean(pairs.margins > 0)), values=None)
        curves = {**trial.curves.curves, METRIC: [(0, float(np.mean(initial > 0))), (40, record.value or 0.0)]}
        return replace(trial, curves=replace(trial.curves, record=record, curves=curves), held_out_pairs=pairs)

    trials = tuple(changed(trial, each[:, k]) for k, trial in enumerate(frame.trials))
    return replace(frame, trials=trials)


def equal_trials(frame: SweepFrame, rng: np.random.Generator, pairs: int = 300) -> SweepFrame:
    """Every trial and the initial model have the same distribution: hard and easy pairs, and noise of its own."""
    difficulty = rng.normal(0.3, 1.0, (pairs, 1))
    margins = difficulty + rng.normal(0.0, 0.7, (pairs, 1 + len(frame.trials)))
    return with_margins(frame, margins[:, 0], margins[:, 1:])


def at_most(rate: float, sweeps: int) -> int:
    """The number of sweeps that a procedure with this error rate exceeds in one of a thousand simulations."""
    return int(binom.ppf(0.999, sweeps, rate))


def test_equal_trials_get_a_verdict_no_more_often_than_stated() -> None:
    """By one interval at a time the winner of 32 equal trials is "clearly better" in 2 of 10 sweeps."""
    sweeps, rng = 60, np.random.default_rng(1)
    better, alone, worse, told = 0, 0, 0, 0
    for _ in range(sweeps):
        frame = equal_trials(grid(8, 4), rng)
        significance = analyze_significance(frame)
        assert significance is not None
        assert significance.against_initial is not None
        better += significance.against_initial.joint_low > 0
        alone += significance.against_initial.low > 0
        worse += any(difference.is_clear for _, difference in significance.runners_up)
        told += any(has_clear_effect(frame, path) for path in frame.paths)
    assert better <= at_most(0.025, sweeps)
    assert worse <= at_most(0.05, sweeps)
    assert told <= at_most(0.05, sweeps)
    assert alone > at_most(0.025, sweeps), "the interval of one trial by itself knows nothing of the choice"


@pytest.mark.parametrize(("pairs", "trials"), [(12, 6), (200, 10)])
def test_joint_intervals_hold_all_true_differences_together(pairs: int, trials: int) -> None:
    sweeps, rng = 300, np.random.default_rng(2)
    truth, missed, gained = np.linspace(0.0, 1.0, trials), 0, 0
    for _ in range(sweeps):
        values = truth + rng.normal(0, 0.5, (pairs, 1)) + rng.normal(0, 0.5, (pairs, trials))
        columns = PairedColumns(values)
        best = int(np.argmax(columns.means))
        missed += any(
            not (found.joint_low <= truth[best] - truth[k] <= found.joint_high)
            for k in range(trials)
            if k != best and (found := columns.difference(best, k))
        )
        gained += any(
            not (found.joint_low <= truth[k] <= found.joint_high) for k, found in enumerate(columns.each(trials))
        )
    assert missed <= at_most(0.05, sweeps)
    assert gained <= at_most(0.05, sweeps)
    assert gained >= binom.ppf(0.001, sweeps, 0.05) or pairs < 50, "and no wider than they say"


def test_a_real_gain_of_one_trial_among_many_is_seen() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0.3, 1.0, (300, 1))
    margins = difficulty + rng.normal(0.0, 0.3, (300, 33))
    margins[:, 5] += 1.0
    frame = with_margins(grid(8, 4), margins[:, 0], margins[:, 1:])
    significance = analyze_significance(frame)
    assert significance is not None
    assert significance.winner is frame.trials[4]
    assert "is clearly better than the initial model (counting that it was chosen among 32 trials)" in (
        text := significance_text(frame, significance)
    )
    assert "is better than all others" in text
    assert "for all 496 pairs of trials together" in text


def test_more_trials_make_joint_intervals_wider_and_none_is_narrower_than_its_own() -> None:
    values = np.random.default_rng(4).normal(0.1, 1.0, (100, 20))
    widths = [PairedColumns(values[:, :count]).difference(0, 1) for count in (2, 5, 20)]
    assert widths[0].joint is None
    assert [w.joint_high - w.joint_low for w in widths] == sorted(w.joint_high - w.joint_low for w in widths)
    for found in (*widths, *PairedColumns(values).each(20)):
        assert found.joint_low <= found.low <= found.mean <= found.high <= found.joint_high


def test_many_trials_are_corrected_by_number() -> None:
    count = MAX_DRAWN_TRIALS + 1
    columns = PairedColumns(np.random.default_rng(5).normal(0, 1, (30, count)))
    assert columns.critical_of_pairs == bonferroni(count * (count - 1) / 2)


def test_constant_columns_and_one_pair_have_intervals() -> None:
    same = PairedColumns(np.tile(np.random.default_rng(6).normal(0, 1, (40, 1)), 3))
    assert (same.difference(0, 2).joint_low, same.difference(0, 2).joint_high) == (0.0, 0.0)
    one = PairedColumns(np.array([[0.0, 1.0, 2.0]])).difference(2, 0)
    assert not one.is_clear
    assert not paired_difference(np.ones(1), np.zeros(1), METRIC).is_clear


def test_equal_signs_must_be_rarer_than_the_joint_level() -> None:
    """Six pairs that all gain convince for one trial (p = 1/32), and not for the best of thirty."""
    gained = np.zeros((40, 30))
    gained[:6, 0] = 1.0
    gained[:, 1:] = np.random.default_rng(7).choice([-1.0, 0.0, 1.0], (40, 29), p=[0.1, 0.8, 0.1])
    assert PairedColumns(gained[:, :1], share=True).each(1)[0].low > 0
    assert not PairedColumns(gained, share=True).each(30)[0].is_clear


def test_pruned_trials_count_among_those_that_could_have_won(tmp_path: Path) -> None:
    def script(trial: Trial) -> Script:
        return Script(quality=0.3, outcome=PRUNED if trial.number % 2 else COMPLETE)

    frame = frame_of(run_sweep(tmp_path, make_spec(search={RATE: {"choice": RATES}}), script))
    significance = analyze_significance(frame)
    assert significance is not None
    assert significance.against_initial is not None
    assert significance.against_initial.comparisons == 8
    assert significance.runners_up[0][1].comparisons == 6, "pairs of the four complete ones"


def test_the_variance_between_seeds_is_part_of_the_verdict(tmp_path: Path) -> None:
    def script(spread: float) -> Callable[[Trial], Script]:
        offsets = {42: -spread, 43: 0.0, 44: spread}
        return lambda t: Script(quality=0.3 + 0.4 * (t.params["loss.beta"] > 5) + offsets[t.config.training.seed])

    spec = make_spec(search={"loss.beta": {"choice": [2.0, 10.0]}}, repeats=3)
    calm = analyze_significance(frame_of(run_sweep(tmp_path / "calm", spec, script(0.01))))
    noisy = analyze_significance(frame_of(run_sweep(tmp_path / "noisy", spec, script(0.35))))
    assert calm is not None
    assert noisy is not None
    assert calm.runners_up[0][1].is_clear
    assert not noisy.runners_up[0][1].is_clear, "beta 10 is ahead by about one standard deviation between seeds"
    assert noisy.runners_up[0][1].mean > 0.5 * calm.runners_up[0][1].mean


def test_the_seeds_noise_has_the_pooled_variance() -> None:
    seeds = SeedVariance(np.array([0.04, 0.01]), 1000)
    columns = PairedColumns(np.zeros((10, 2)), seeds=seeds)
    assert columns.deviations.var(axis=0) == pytest.approx([0.04, 0.01], rel=0.15)


def test_without_records_of_pairs_nothing_stronger_is_said_than_two_shares_allow(tmp_path: Path) -> None:
    def without(goal: str, right: Callable[[Trial], float]) -> tuple[SweepFrame, Significance]:
        spec = make_spec(
            search={RATE: {"choice": RATES}},
            goal={"metric": goal, "direction": "maximize"},
            base={"evaluation": {"prompts": 100}},
        )
        folder = run_sweep(tmp_path / goal.replace("/", "-"), spec, lambda t: Script(last={EXACT_ANSWERS: right(t)}))
        frame = frame_of(folder)
        frame = replace(frame, trials=tuple(replace(trial, held_out_pairs=None) for trial in frame.trials))
        significance = analyze_significance(frame)
        assert significance is not None
        return frame, significance

    frame, significance = without(EXACT_ANSWERS, lambda t: 0.66 if t.number == 3 else 0.5)
    against = significance.against_initial
    assert against is not None
    assert (against.paired, against.comparisons, significance.runners_up[0][1].comparisons) == (False, 8, 28)
    assert against.low > 0, "16 points of 100 prompts: enough for one trial"
    assert not against.is_clear, "and not for the best of eight"
    assert "unpaired, therefore wider, for all 28 pairs of trials together" in significance_text(frame, significance)
    assert has_clear_effect(frame, RATE) is None
    frame, significance = without(METRIC, lambda _: 0.5)  # no data report: the number of pairs is unknown
    assert significance.against_initial is None
    assert "significance of the ranking is unknown" in significance_text(frame, significance)


# --- a tie, and which trial to use then ------------------------------------------------------------------------------


def tied(**last: tuple[float, ...]) -> SweepFrame:
    """Three equal trials with these last values of metrics."""
    frame = equal_trials(grid(3, 1), np.random.default_rng(8))
    trials: list[TrialFrame] = []
    for k, trial in enumerate(frame.trials):
        curves = {**trial.curves.curves, **{name: [(40, values[k])] for name, values in last.items()}}
        trials.append(replace(trial, curves=replace(trial.curves, curves=curves)))
    return replace(frame, trials=tuple(trials))


def recommended(frame: SweepFrame, avoid: Any = ()) -> tuple[str, str] | None:
    significance = analyze_significance(frame)
    assert significance is not None
    assert len(significance.not_distinguishable) == 3
    found = recommend(frame, significance, avoid)
    return None if found is None else (found[0].label, found[1])


def test_of_tied_trials_the_closest_then_the_cheapest_is_recommended() -> None:
    winner = tied().ranked[0].number
    near = next(number for number in range(3) if number != winner)
    distances = tuple(-0.1 if number == near else -0.9 for number in range(3))
    tokens = tuple(100.0 if number == winner else 900.0 for number in range(3))
    label, reason = recommended(tied(**{LOG_RATIO_CHOSEN: distances, "tokens_per_second": tokens})) or ("", "")
    assert (label, reason) == (
        str(near),
        f"closer to the initial model (log-ratio per token 0.1 against 0.9 of trial {winner})",
    )
    kl = tuple(0.5 if number == winner else 0.9 for number in range(3))
    label, _ = recommended(tied(**{KL: kl, LOG_RATIO_CHOSEN: distances})) or ("", "")
    assert label == str(winner), "the KL is the better measure"
    kl = tuple(0.1 if number == near else 0.9 for number in range(3))
    assert "KL per token 0.1 against 0.9" in (recommended(tied(**{KL: kl})) or ("", ""))[1]
    cheap = tuple(100.0 if number == near else 900.0 for number in range(3))
    rates = {"tokens_per_second": cheap, "pairs_per_second": (10.0,) * 3}
    label, reason = recommended(tied(**rates)) or ("", "")
    assert label == str(near)
    assert reason == f"cheaper (3.2 k training tokens against 28.8 k of trial {winner})"
    assert recommended(tied()) == (
        str(winner),
        "the first of them (none is notably closer to the initial model or cheaper)",
    )


def test_a_tie_is_called_one_and_the_diagnosis_names_the_trial_to_use() -> None:
    frame = tied(**{LOG_RATIO_CHOSEN: (0.9, 0.9, 0.1)})
    significance = analyze_significance(frame)
    assert significance is not None
    text = significance_text(frame, significance)
    assert "The 3 configurations are not distinguishable, which is a tie" in text
    label, reason = recommended(frame) or ("", "")
    assert f"Of these, trial {label} is recommended: {reason}." in text
    finding = next(found for found in diagnose(frame) if found.rule == "too_few_pairs")
    assert "for all 3 pairs of trials together" in finding.evidence


def test_no_trial_to_avoid_and_none_of_several_objectives_is_recommended(tmp_path: Path) -> None:
    frame = tied(**{LOG_RATIO_CHOSEN: (0.9, 0.5, 0.1)})
    assert (recommended(frame) or ("",))[0] == "2"
    assert (recommended(frame, {"2"}) or ("",))[0] == "1"
    assert recommended(frame, {"0", "1", "2"}) is None
    also = [{"metric": "eval_nll_loss", "direction": "minimize"}]
    spec = make_spec(search={RATE: {"choice": RATES[:3]}}, also=also)
    several = frame_of(run_sweep(tmp_path, spec, lambda _: Script(last={"eval_nll_loss": 1.0})))
    significance = analyze_significance(several)
    assert significance is not None
    assert recommend(several, significance) is None
    assert "recommended" not in significance_text(several, significance)
    assert analyze(several).findings


# --- many sweeps -----------------------------------------------------------------------------------------------------


def test_compared_sweeps_count_that_the_best_of_each_was_chosen(tmp_path: Path) -> None:
    def swept(name: str, quality: float) -> SweepFrame:
        spec = make_spec(name, {RATE: {"choice": RATES[:4]}})
        return frame_of(run_sweep(tmp_path, spec, lambda _: Script(quality=quality)))

    found = compare_sweeps([swept("a", 0.9), swept("b", 0.3)])
    behind = found.sweeps[1].behind
    assert behind is not None
    assert behind.comparisons == 8 * 7 // 2
    assert "clearly ahead of all others (95 % intervals for all 28 pairs of their trials together)" in (
        comparison_summary(found)
    )
    assert as_json(found)["sweeps"][1]["behind"]["joint_low"] <= behind.low
