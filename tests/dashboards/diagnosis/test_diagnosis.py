"""Each rule of the diagnosis on a sweep made to show it; and the follow-up that acts on it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dashboards.analysis.follow_up import NothingLearned, follow_up, next_name, to_yaml
from dashboards.analysis.significance import analyze_significance
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.diagnose import analyze, diagnose
from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.samplers import StagedSampler
from orchestrator.spec.search.space import Choice, SearchSpace
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.trial_records import Trial
from tests.support.scripted_sweep import COMPLETE, DIVERGED, FAILED, Script, frame_of, make_spec, run_sweep

RATES: dict[str, Any] = {"training.learning_rate": {"choice": [1e-7, 3e-7, 1e-6]}}
BETAS: dict[str, Any] = {"loss.beta": {"choice": [1.0, 2.0, 10.0]}, **RATES}


def swept(root: Path, script: Callable[[Trial], Script], search: Any = RATES, **more: Any) -> SweepFrame:
    return frame_of(run_sweep(root, make_spec(search=search, **more), script))


def rules(frame: SweepFrame) -> dict[str, DiagnosisFinding]:
    return {finding.rule: finding for finding in diagnose(frame)}


def rate(trial: Trial) -> float:
    return trial.params["training.learning_rate"]


def inner_best(trial: Trial) -> Script:
    """Healthy, and clearly best in the middle."""
    return Script(quality={1e-7: 0.2, 3e-7: 0.9, 1e-6: 0.4}[rate(trial)], chosen=-0.9, last={"eval_loss": 0.2})


def test_a_healthy_sweep_has_no_complaint(tmp_path: Path) -> None:
    frame = swept(tmp_path, inner_best, base={"loss": {"kind": "simpo", "beta": 2.0, "gamma": 1.0}})
    assert [f.rule for f in diagnose(frame) if f.level is not FindingLevel.NOTE] == []


def test_margin_far_below_gamma_counts_in_rewards(tmp_path: Path) -> None:
    low = rules(swept(tmp_path / "a", inner_best, base={"loss": {"kind": "simpo", "beta": 2.0, "gamma": 4.0}}))
    found = low["margin_below_gamma"]
    assert "mean reward margin 1.8, from 0.2 at step 0, against gamma 4" in found.evidence
    assert "per token that is 0.9, with a target of gamma / beta = 2" in found.evidence
    ratio = {"kind": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5}
    assert "margin_below_gamma" not in rules(swept(tmp_path / "b", inner_best, base={"loss": ratio}))


@pytest.mark.parametrize(("chosen", "level"), [(-3.0, FindingLevel.SERIOUS), (-1.3, FindingLevel.WARNING)])
def test_margins_that_rise_while_chosen_falls(chosen: float, level: FindingLevel, tmp_path: Path) -> None:
    def hollow(trial: Trial) -> Script:
        return Script(quality=0.9 if rate(trial) == 3e-7 else 0.2, chosen=chosen if rate(trial) == 3e-7 else -1.0)

    found = rules(swept(tmp_path, hollow))["chosen_falling"]
    assert found.level is level
    assert found.trials == ("1",)
    assert f"({chosen + 1:.3g})"[:4] in found.evidence
    assert "beta (now 2;" in found.next_step


def test_log_probs_under_ten(tmp_path: Path) -> None:
    found = rules(swept(tmp_path, lambda t: Script(quality=0.5 + rate(t) * 1e5, chosen=-12.0)))["unlikely_text"]
    assert found.level is FindingLevel.SERIOUS
    assert "-12" in found.evidence
    assert "lower the learning rate" in found.next_step


def test_a_loss_that_never_moved_and_one_that_stood_still(tmp_path: Path) -> None:
    stuck = rules(swept(tmp_path / "a", lambda t: Script(quality=0.5, loss=lambda _: 0.69)))["loss_plateau"]
    assert stuck.title == "The loss hardly changed"
    flat = rules(swept(tmp_path / "b", lambda t: Script(quality=0.5, loss=lambda s: 1 - 0.05 * min(s, 10))))
    assert flat["loss_plateau"].title == "The loss was flat after about 10 of 40 updates"


def test_a_loss_that_comes_up_again(tmp_path: Path) -> None:
    def valley(step: int) -> float:
        return 1 - 0.02 * step if step <= 20 else 0.6 + 0.015 * (step - 20)

    found = rules(swept(tmp_path / "a", lambda t: Script(quality=0.5, loss=valley)))
    assert found["overfitting"].title == "The held-out loss rose again after update 20"
    assert found["overfitting"].level is FindingLevel.NOTE
    assert "1 at step 0, 0.6 at update 20, 0.9 at the end" in found["overfitting"].evidence
    assert "did not get worse" in found["overfitting"].evidence
    assert "loss_plateau" not in found
    falling = swept(tmp_path / "b", lambda t: Script(quality=0.5, loss=lambda step: 1 - 0.02 * step))
    assert "overfitting" not in rules(falling)


def test_a_loss_that_only_rose_did_move(tmp_path: Path) -> None:
    found = rules(swept(tmp_path / "a", lambda t: Script(quality=0.5, loss=lambda step: 0.7 + 0.05 * step)))
    assert "loss_plateau" not in found
    assert found["overfitting"].title == "The held-out loss only rose"
    assert found["overfitting"].level is FindingLevel.NOTE
    assert "0.7 at step 0" in found["overfitting"].evidence
    assert "2.7 at the end" in found["overfitting"].evidence


def test_log_probs_above_nought_are_a_defect(tmp_path: Path) -> None:
    last = {"eval_logps_per_token/chosen": 0.5}
    found = rules(swept(tmp_path, lambda t: Script(quality=0.5, last=last)))["impossible_logps"]
    assert found.level is FindingLevel.SERIOUS
    assert "chosen 0.5" in found.evidence
    assert "3 of 3 trials" in found.evidence


def test_a_gain_that_the_pairs_cannot_show(tmp_path: Path) -> None:
    found = rules(swept(tmp_path, lambda t: Script(quality=0.108)))
    assert found["gain_not_clear"].level is FindingLevel.WARNING
    assert "over 300 held-out pairs; selecting the best of 3" in found["gain_not_clear"].evidence
    assert "gain_not_clear" not in rules(swept(tmp_path / "clear", inner_best))


def zipped(root: Path) -> SweepFrame:
    """Beta and gamma side by side, the middle best."""
    group: dict[str, Any] = {"loss.beta": (2.0, 5.0, 10.0), "loss.gamma": (0.5, 1.0, 1.6)}
    space = SearchSpace(zipped=(group,)).model_dump()
    spec = SweepSpec.model_validate(make_spec().model_dump() | {"search": space})
    return frame_of(run_sweep(root, spec, lambda t: Script(quality=0.9 if t.params["loss.beta"] == 5 else 0.3)))


def test_leaves_that_were_only_varied_together(tmp_path: Path) -> None:
    found = rules(zipped(tmp_path))["varied_together"]
    assert found.title == "beta and gamma were only varied together"
    assert "Over 3 complete trials each value of one occurred with only one value of the other" in found.evidence
    assert found.next_step == "Add trials that change one alone, for example beta 5 with gamma 0.5."
    assert "varied_together" not in rules(swept(tmp_path / "crossed", inner_best, BETAS))


def test_values_drawn_from_ranges_are_not_varied_together(tmp_path: Path) -> None:
    search = {"loss.beta": {"uniform": [1, 10]}, "training.learning_rate": {"log_uniform": [1e-7, 1e-5]}}
    more = {"sampler": {"kind": "random", "seed": 1}, "budget": {"trials": 8}}
    assert "varied_together" not in rules(swept(tmp_path, lambda t: Script(quality=0.3), search, **more))


def test_draws_in_which_several_are_best_are_shared(tmp_path: Path) -> None:
    significance = analyze_significance(swept(tmp_path, lambda t: Script(quality=0.5)))
    assert list(significance.first_place_shares.values()) == pytest.approx([1 / 3] * 3)


def test_divergence_is_laid_to_the_leaf_that_explains_most(tmp_path: Path) -> None:
    def ends(trial: Trial) -> Script:
        alone = rate(trial) == 1e-7 and trial.params["loss.beta"] == 10
        return Script(outcome=DIVERGED if rate(trial) > 1e-7 or alone else COMPLETE)

    found = rules(swept(tmp_path, ends, BETAS))["diverging_region"]
    assert found.setting == "training.learning_rate"
    assert "6 of 6 trials, against 1 of 3 with smaller values" in found.evidence


@pytest.mark.parametrize(
    ("search", "bad", "words"),
    [
        ({"loss.beta": {"choice": [0.01, 2.0, 10.0]}, **RATES}, ("loss.beta", 0.01), "beta 0.01"),
        ({"loss.loss_type": {"choice": ["sigmoid", "hinge"]}, **RATES}, ("loss.loss_type", "hinge"), "loss_type hinge"),
    ],
)
def test_divergence_at_small_values_and_names(search: Any, bad: tuple[str, Any], words: str, tmp_path: Path) -> None:
    path, value = bad
    frame = swept(tmp_path, lambda t: Script(outcome=DIVERGED if t.params[path] == value else COMPLETE), search)
    assert rules(frame)["diverging_region"].title == f"Every trial with {words} diverged"


def test_a_coin_and_ties(tmp_path: Path) -> None:
    few = frame_of(run_sweep(tmp_path / "few", make_spec(search=RATES), lambda _: Script(quality=0.13), pairs=60))
    assert rules(few)["coin_toss"].title == "The winner's accuracy may be no better than chance"
    assert (
        "0.6 over 60 held-out pairs, 95 % interval 0.438 to 0.748 for the best of 3 trials"
        in rules(few)["coin_toss"].evidence
    )
    noisy = run_sweep(tmp_path / "noisy", make_spec(search=RATES), lambda t: Script(quality=0.101), pairs=1200)
    frame = frame_of(noisy)
    assert "coin_toss" not in rules(frame), "58 % of 1,200 pairs are more than a coin's"
    found = rules(swept(tmp_path, lambda t: Script(quality=0.0 - rate(t))))
    assert found["worse_than_start"].level is FindingLevel.SERIOUS
    assert "coin_toss" not in found, "one says smaller steps, the other larger ones"
    frame = swept(tmp_path / "ties", inner_best)
    pairs = frame.ranked[0].held_out_pairs
    pairs.chosen[:10] = pairs.rejected[:10] = -4.0
    pairs.chosen_tokens[:10] = pairs.rejected_tokens[:10] = 4.0
    assert "10 of 300 pairs have exactly the same log-prob" in rules(frame)["ties"].evidence


def test_the_edge_names_points_to_add(tmp_path: Path) -> None:
    found = rules(swept(tmp_path, lambda t: Script(quality=0.2 + 0.3 * math.log10(rate(t) / 1e-7))))["at_the_edge"]
    assert found.setting == "training.learning_rate"
    assert found.level is FindingLevel.WARNING
    assert "add 2e-6 and 4e-6" in found.next_step
    low = rules(swept(tmp_path / "low", lambda t: Script(quality=0.2 - 0.3 * math.log10(rate(t) / 1e-6))))
    assert "add 5e-8 and 2.5e-8" in low["at_the_edge"].next_step


def test_values_that_the_grid_comes_to_later_are_no_news(tmp_path: Path) -> None:
    """Trials come in the grid's order: in the middle the last value is not the highest that the sweep will try."""
    folder = run_sweep(tmp_path, make_spec(search=RATES), lambda t: Script(quality=0.2 + rate(t) * 1e6), trials=2)
    frame = frame_of(folder, state="interrupted")
    assert "at_the_edge" not in rules(frame)
    made = follow_up(analyze(frame))
    assert made.spec.search.dimensions["training.learning_rate"] == Choice(choice=(2e-07, 3e-07, 6.5e-07))
    assert "s is interrupted: 2 of 3 trials are complete; wait for the rest." in made.notes


def test_the_edge_of_a_range(tmp_path: Path) -> None:
    search = {"training.learning_rate": {"log_uniform": [1e-7, 1e-5]}}
    more: dict[str, Any] = {"sampler": {"kind": "random"}, "budget": {"trials": 24}}
    frame = swept(tmp_path, lambda t: Script(quality=0.2 + 0.2 * math.log10(rate(t) / 1e-7)), search, **more)
    assert "add 2e-5 and 4e-5" in rules(frame)["at_the_edge"].next_step


def test_values_that_made_no_difference(tmp_path: Path) -> None:
    frame = swept(tmp_path, lambda t: Script(quality={1e-7: 0.1, 3e-7: 0.9, 1e-6: 0.5}[rate(t)]), BETAS)
    findings = [f for f in diagnose(frame) if f.rule == "not_told_apart"]
    assert [f.setting for f in findings] == ["loss.beta"]
    assert "all else equal (3 pairs of trials)" in findings[0].evidence
    assert "Fix it at" in findings[0].next_step


def test_too_few_pairs_says_how_many_would_do(tmp_path: Path) -> None:
    found = rules(swept(tmp_path, lambda t: Script(quality=0.5 + 1e4 * rate(t))))["too_few_pairs"]
    assert found.title.endswith("configurations are not distinguishable")
    assert "held-out pairs would distinguish them" in found.next_step
    assert "% of bootstrap resamples" in found.evidence


def test_right_answers_lost_while_accuracy_rises(tmp_path: Path) -> None:
    def script(trial: Trial) -> Script:
        return Script(quality=0.3 + 2e5 * rate(trial), last={"eval_exact_answers": 0.1})

    spec: dict[str, Any] = {"evaluation": {"prompts": 64}}
    found = rules(swept(tmp_path, script, base=spec))["answers_lost"]
    assert found.level is FindingLevel.SERIOUS
    assert "from 50.0% to 10.0% of 64 prompts" in found.evidence
    assert "3 of 3 complete trials" in found.evidence


def test_answers_that_repeat_and_grow(tmp_path: Path) -> None:
    last = {"eval_repetition": 0.6, "eval_answer_length": 64.0}
    found = rules(swept(tmp_path, lambda t: Script(quality=0.5, last=last)))["degenerate_text"]
    assert "from 0% to 60%" in found.evidence
    assert "from 20 to 64 tokens" in found.evidence


def test_one_diverged_trial_of_several_blames_no_value(tmp_path: Path) -> None:
    """Two others diverged with a smaller beta: the one at 10 says nothing about it."""

    def ends(trial: Trial) -> Script:
        return Script(outcome=DIVERGED if trial.params["loss.beta"] == 10 or rate(trial) < 1e-6 else COMPLETE)

    search = {"training.learning_rate": {"choice": [1e-7, 3e-7, 1e-6]}, "loss.beta": {"choice": [2.0, 10.0]}}
    base = {"loss": {"kind": "simpo", "beta": 2.0}}
    found = rules(swept(tmp_path, ends, search, base=base, sampler=StagedSampler()))["diverging_region"]
    assert found.title == "3 of 4 finished trials diverged"


def test_where_everything_diverged(tmp_path: Path) -> None:
    found = rules(swept(tmp_path, lambda t: Script(outcome=DIVERGED if rate(t) > 5e-7 else COMPLETE), BETAS))
    assert found["diverging_region"].title == "Every trial with learning_rate of 1e-6 or more diverged"
    assert "3 of 3 trials, against 0 of 6 with smaller values" in found["diverging_region"].evidence
    assert found["diverging_region"].level is FindingLevel.WARNING
    nothing = rules(swept(tmp_path / "all", lambda _: Script(outcome=DIVERGED)))
    assert nothing["diverging_region"].level is FindingLevel.SERIOUS


def test_failures_by_kind(tmp_path: Path) -> None:
    found = rules(swept(tmp_path, lambda t: Script(outcome=FAILED if t.number else COMPLETE)))["failures"]
    assert found.title == "2 of 3 trials failed: bug"
    assert "2 of them with: RuntimeError: scripted" in found.evidence


def followed(frame: SweepFrame, tmp_path: Path) -> tuple[SweepSpec, str]:
    """The follow-up through its file and the real loader: the same sweep comes out."""
    made = follow_up(analyze(frame), {"s"})
    text = to_yaml(made)
    loaded = load_spec_text(text, tmp_path)
    assert loaded == made.spec
    return loaded, text


def test_beyond_the_edge_and_finer_elsewhere(tmp_path: Path) -> None:
    def script(trial: Trial) -> Script:
        beta = {1.0: 0.0, 2.0: 0.4, 10.0: 0.2}[trial.params["loss.beta"]]
        return Script(quality=0.2 + beta + 0.2 * math.log10(rate(trial) / 1e-7))

    spec, text = followed(swept(tmp_path, script, BETAS), tmp_path)
    assert spec.name == "s-2"
    assert spec.search.choices("training.learning_rate") == (1e-6, 2e-6, 4e-6)
    assert spec.search.choices("loss.beta") == (1.4, 2.0, 4.5)
    assert spec.base.flat_params()["loss.beta"] == 2.0
    assert "# the best value is the highest tried" in text
    assert "# halfway to the neighbors of the best value, 2" in text


def test_what_was_varied_together_is_taken_apart(tmp_path: Path) -> None:
    spec, text = followed(zipped(tmp_path), tmp_path)
    assert spec.search.zipped == ()
    assert {"loss.beta", "loss.gamma"} <= set(spec.search.paths)
    assert "# note: beta and gamma were only varied together." in text


def test_what_makes_no_difference_is_fixed(tmp_path: Path) -> None:
    frame = swept(tmp_path, lambda t: Script(quality={1e-7: 0.1, 3e-7: 0.9, 1e-6: 0.5}[rate(t)]), BETAS)
    spec, text = followed(frame, tmp_path)
    assert spec.search.paths == ("training.learning_rate",)
    assert "# loss.beta is fixed: its values are not distinguishable" in text


def test_equal_ones_are_run_again_with_other_seeds(tmp_path: Path) -> None:
    spec, text = followed(swept(tmp_path, lambda t: Script(quality=0.5)), tmp_path)
    assert spec.search.choices("training.seed") == (1, 2, 3)
    assert spec.search.zipped == ({"training.learning_rate": (1e-7, 3e-7, 1e-6)},)
    assert "are not distinguishable on 300 held-out pairs" in text


def test_a_hollow_winner_goes_down_and_gets_an_sft_term(tmp_path: Path) -> None:
    spec, text = followed(swept(tmp_path, lambda t: Script(quality=0.2 + 5e5 * rate(t), chosen=-3.0)), tmp_path)
    assert spec.search.choices("training.learning_rate") == (2.5e-7, 5e-7, 1e-6)
    assert spec.search.choices("loss.sft_weight") == (0.0, 0.1)
    assert "# downwards from 1e-6: margins rise while" in text


def test_a_hollow_winner_goes_down_where_the_rate_was_not_searched_too(tmp_path: Path) -> None:
    betas = {"loss.beta": {"choice": [2.0, 10.0]}}
    made = follow_up(analyze(swept(tmp_path, lambda t: Script(quality=0.3, chosen=-3.0), betas)))
    at = made.spec.base.training.learning_rate
    assert made.spec.search.dimensions["training.learning_rate"] == Choice(choice=(at / 4, at / 2, at))
    assert "downwards" in made.reasons["training.learning_rate"]


def test_not_into_what_diverged(tmp_path: Path) -> None:
    def script(trial: Trial) -> Script:
        if rate(trial) == 1e-6:
            return Script(outcome=DIVERGED)
        return Script(quality=0.2 if rate(trial) == 1e-7 else 0.8)

    spec, _ = followed(swept(tmp_path, script), tmp_path)
    values = spec.search.choices("training.learning_rate")
    assert values is not None
    assert max(float(v) for v in values if isinstance(v, float)) < 1e-6


def test_not_beyond_where_most_diverged(tmp_path: Path) -> None:
    def script(trial: Trial) -> Script:
        if rate(trial) == 1e-6 and trial.params["loss.beta"] != 2.0:
            return Script(outcome=DIVERGED)
        return Script(quality=0.2 + 5e5 * rate(trial) + (0.1 if trial.params["loss.beta"] == 2.0 else 0.0))

    spec, text = followed(swept(tmp_path, script, BETAS), tmp_path)
    values = spec.search.choices("training.learning_rate")
    assert values is not None
    assert max(float(v) for v in values if isinstance(v, float)) == 1e-6
    assert "# not above 1e-6: from 1e-6 upwards at least half of the trials diverged" in text


def test_a_hollow_dpo_winner_gets_an_nll_term(tmp_path: Path) -> None:
    base = {"loss": {"kind": "dpo"}}
    spec, _ = followed(swept(tmp_path, lambda t: Script(quality=0.2 + 5e5 * rate(t), chosen=-3.0), base=base), tmp_path)
    assert spec.search.choices("loss.nll_scale") == (0.0, 0.1)


def test_a_hollow_winner_asks_for_no_larger_margin(tmp_path: Path) -> None:
    gammas, script = {"loss.gamma": {"choice": [0.5, 1.0, 1.5]}}, {0.5: 0.2, 1.0: 0.5, 1.5: 0.9}
    spec, text = followed(
        swept(tmp_path, lambda t: Script(quality=script[t.params["loss.gamma"]], chosen=-3.0), gammas), tmp_path
    )
    assert spec.search.choices("loss.gamma") == (1.0, 1.5)
    assert "not above 1.5" in text


def test_after_divergence_of_a_zip_its_other_leaves_stay(tmp_path: Path) -> None:
    zipped = ({"training.learning_rate": (1e-6, 2e-6), "loss.beta": (2.0, 10.0)},)
    spec, space = make_spec(search={}), SearchSpace.model_validate({"zipped": zipped})
    frame = frame_of(run_sweep(tmp_path, spec.model_copy(update={"search": space}), lambda _: Script(outcome=DIVERGED)))
    assert follow_up(analyze(frame)).spec.search.zipped == ({"loss.beta": (2.0, 10.0)},)


def test_after_divergence_alone_and_after_failures_alone(tmp_path: Path) -> None:
    spec, text = followed(swept(tmp_path / "a", lambda _: Script(outcome=DIVERGED)), tmp_path)
    assert spec.search.choices("training.learning_rate") == (3e-9, 1e-8, 3e-8)
    assert "much smaller learning rates" in text
    with pytest.raises(NothingLearned):
        follow_up(analyze(swept(tmp_path / "b", lambda _: Script(outcome=FAILED))))


def test_ranges_are_narrowed_to_where_the_best_lie(tmp_path: Path) -> None:
    search = {"training.learning_rate": {"log_uniform": [1e-7, 1e-5]}, "loss.beta": {"uniform": [1.0, 10.0]}}
    more: dict[str, Any] = {"sampler": {"kind": "random"}, "budget": {"trials": 24}}

    def script(trial: Trial) -> Script:
        return Script(quality=0.9 - abs(math.log10(rate(trial) / 1e-6)) - 0.05 * abs(trial.params["loss.beta"] - 5))

    spec, text = followed(swept(tmp_path, script, search, **more), tmp_path)
    low, high = spec.search.dimensions["training.learning_rate"].log_uniform  # type: ignore[union-attr]
    assert 1e-7 < low < 1e-6 < high < 1e-5
    assert "# range of the best 8 of 24 trials" in text
    assert (spec.budget.trials, spec.sampler.kind) == (24, "random")


def test_conditional_leaves_of_the_winner(tmp_path: Path) -> None:
    search = {
        "loss.kind": {"choice": ["simpo", "cpo"]},
        "loss.gamma": {"choice": [0.5, 1.0, 1.5], "when": {"loss.kind": "simpo"}},
        **RATES,
    }

    def script(trial: Trial) -> Script:
        return Script(quality=0.9 if trial.params.get("loss.gamma") == 1.0 else 0.3)

    spec, text = followed(swept(tmp_path / "a", script, search), tmp_path)
    assert spec.base.loss.kind == "simpo"
    assert "loss.kind is fixed: clearly worse: cpo" in text
    assert spec.search.choices("loss.gamma") == (0.75, 1.0, 1.2)

    def alike(trial: Trial) -> Script:
        return Script(quality=0.9 if trial.params.get("loss.gamma", 1.0) == 1.0 else 0.3)

    spec, text = followed(swept(tmp_path / "b", alike, search), tmp_path)
    assert spec.search.choices("loss.kind") == ("simpo", "cpo")
    assert spec.search.dimensions["loss.gamma"].when == {"loss.kind": ("simpo",)}


def test_names_of_follow_ups() -> None:
    assert next_name("a", set()) == "a-2"
    assert next_name("a-2", {"a-3"}) == "a-4"
    assert len(next_name("x" * 64, set())) <= 64


def test_a_winner_that_loses_another_objective_is_not_one_to_use(tmp_path: Path) -> None:
    also = [{"metric": "eval_loss", "direction": "minimize"}]

    def trade(other: float) -> Callable[[Trial], Script]:
        return lambda trial: Script(
            quality=0.9 if rate(trial) == 1e-6 else 0.5, last={"eval_loss": 3.0 if rate(trial) == 1e-6 else other}
        )

    frame = swept(tmp_path / "other", trade(0.1), also=also)
    start = frame.initial_value("eval_loss")
    assert start is not None
    assert 0.1 < start < 3.0
    found = rules(frame)["objective_lost"]
    assert (found.level, found.trials) == (FindingLevel.SERIOUS, (frame.ranked[0].label,))
    assert f"Trial {frame.pareto_front[1].label} is better than the initial model in every objective" in found.next_step
    found = rules(swept(tmp_path / "none", trade(2.9), also=also))["objective_lost"]
    assert found.level is FindingLevel.WARNING, "a trade that the user weighs"
    assert "objective_lost" not in rules(swept(tmp_path / "one", trade(0.1)))
