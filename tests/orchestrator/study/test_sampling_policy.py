import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.folders import SweepFolder
from orchestrator.spec.samplers import GridSampler, RandomSampler
from orchestrator.spec.search.space import Grid
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from orchestrator.study.sampling.adaptive_samplers import OptunaSampler
from orchestrator.study.sampling.random_samplers import stable_seed
from orchestrator.study.sampling.sampling_policy import NoValidTrial, SamplingPolicy
from orchestrator.study.study import Study
from orchestrator.study.sweep_terms import TERMS_KEY
from orchestrator.study.trial_records import Outcome, Trial, TrialState
from orchestrator.study.trial_snapshots import TrialSnapshot
from tests.support.specs import METRIC, RANGES, SAMPLERS, make_spec
from trainer.results import StepMetrics

CONDITIONAL = {
    "loss.kind": {"choice": ["simpo", "dpo"]},
    "loss.gamma": {"uniform": [0.1, 1.0], "step": 0.1, "when": {"loss.kind": "simpo"}},
}


def random_spec(search: object = RANGES, seed: int = 7, **more: object) -> SweepSpec:
    return make_spec(search, sampler=RandomSampler(seed=seed), **more)  # type: ignore[arg-type]


@given(seed=st.integers(0, 2**31), number=st.integers(0, 300))
def test_a_random_trial_depends_on_seed_and_number_alone(seed: int, number: int) -> None:
    spec, before = random_spec(seed=seed), [TrialSnapshot(n, {}) for n in range(number)]
    sampled = SamplingPolicy(spec).sample(before)
    assert sampled == SamplingPolicy(spec).sample(before)
    assert 1.0 <= sampled.params["loss.beta"] <= 4.0
    assert 1e-7 <= sampled.params["training.learning_rate"] <= 1e-5


def test_seeds_and_numbers_differ_in_what_they_draw() -> None:
    sampled = [
        SamplingPolicy(random_spec(seed=s)).sample([TrialSnapshot(k, {}) for k in range(n)])
        for s in (1, 2)
        for n in range(20)
    ]
    assert len({str(d) for d in sampled}) == 40


def test_the_seed_is_the_same_in_every_process() -> None:
    assert stable_seed(7, 0, 0) == 4067440343
    assert stable_seed(1, 23, 0) != stable_seed(12, 3, 0)


def test_conditional_leaves_are_there_only_where_they_mean_something() -> None:
    policy = SamplingPolicy(random_spec(CONDITIONAL))
    for number in range(40):
        sampled = policy.sample([TrialSnapshot(k, {}) for k in range(number)])
        assert ("loss.gamma" in sampled.params) == (sampled.params["loss.kind"] == "simpo")
        assert sampled.config.loss.kind == sampled.params["loss.kind"]
        if "loss.gamma" in sampled.params:
            assert sampled.params["loss.gamma"] in [round(0.1 * i, 1) for i in range(1, 11)]


def test_zipped_leaves_are_drawn_together() -> None:
    pairs = {"loss.beta": [2.0, 2.5, 10.0], "training.learning_rate": [1e-6, 5e-7, 3e-7]}
    policy = SamplingPolicy(random_spec({}, zipped=[pairs]))
    sampled = [policy.sample([TrialSnapshot(k, {}) for k in range(n)]) for n in range(60)]
    seen = {tuple(d.params.values()) for d in sampled if d is not None}
    assert seen == {(2.0, 1e-6), (2.5, 5e-7), (10.0, 3e-7)}


def test_a_sweep_begun_before_repeats_were_refused_draws_them_as_it_began(
    template: Callable[[Path, SweepSpec], SweepFolder], tmp_path: Path
) -> None:
    spec = random_spec({"loss.beta": {"choice": [2.0, 2.5, 3.0]}}, budget=Budget(trials=5))
    folder = template(tmp_path, spec)
    with Study.open(folder) as study:  # its terms as an earlier version stored them
        terms = study.terms.as_json()
        del terms["distinct"]
        study._optuna_trials.set_study(TERMS_KEY, terms)  # pyright: ignore[reportPrivateUsage]
    with Study.open(folder) as study:
        assert not study.terms.distinct
        sampled = [t.params["loss.beta"] for t in iter(study.ask, None)]
        assert (len(sampled), sorted(sampled[:3])) == (5, [2.0, 2.5, 3.0])
        twins = [e for e in study.events() if e.kind == "twin"]
        assert [e.trial for e in twins] == [3, 4]
        assert all("equal to trial" in e.text for e in twins)


def test_what_a_conditional_trial_drew_survives_the_database(
    template: Callable[[Path, SweepSpec], SweepFolder], tmp_path: Path
) -> None:
    folder = template(tmp_path, random_spec(CONDITIONAL, budget=Budget(trials=8)))
    with Study.open(folder) as study:
        first = list(iter(study.ask, None))
    with Study.open(folder) as later:
        again = list(iter(later.ask, None))
        assert [(t.params, t.config) for t in again] == [(t.params, t.config) for t in first]
        assert [t.params for t in later.trials()] == [dict(t.params) for t in first]


# --- draws that go wrong ---------------------------------------------------------------------------------------------

PARTLY_INVALID = {
    "loss.loss_type": {"choice": ["hinge", "sigmoid"]},
    "loss.label_smoothing": {"choice": [0.1, 0.0]},
    "training.seed": {"choice": list(range(8))},
}
"""hinge with label_smoothing is no trial; the corners that are checked before the start do not include every such."""
NEVER_VALID = {"training.pairs_per_update": {"log_uniform": [8.2, 8.9]}, "loss.beta": {"uniform": [1.0, 2.0]}}


@pytest.mark.parametrize("kind", sorted(SAMPLERS.keys() - {"staged", "cmaes"}))
def test_combinations_that_are_no_trial_are_left_out_with_their_reasons(kind: str, tmp_path: Path) -> None:
    spec = make_spec(PARTLY_INVALID, sampler=SAMPLERS[kind], budget=Budget(trials=12))
    with Study.create(SweepFolder(tmp_path, "s"), spec) as study:
        while isinstance(trial := study.ask(), Trial):
            study.report(trial, [StepMetrics(1, {METRIC: 0.5})])
            study.tell(trial, Outcome(TrialState.COMPLETE))
        records = study.trials()
        texts = [event.text for event in study.events() if event.kind == "left out"]
    assert len(records) == 12
    assert not [r for r in records if (r.params["loss.loss_type"], r.params["loss.label_smoothing"]) == ("hinge", 0.1)]
    assert texts
    assert all("label_smoothing is not used by loss_type hinge" in text for text in texts)


def test_a_search_without_a_valid_trial_ends_after_what_can_run(tmp_path: Path) -> None:
    spec = make_spec(NEVER_VALID, sampler=SAMPLERS["tpe"], enqueue=({"training.pairs_per_update": 8},))
    with Study.create(SweepFolder(tmp_path, "s"), spec) as study:
        enqueued = study.ask()
        assert isinstance(enqueued, Trial)
        assert study.ask() is None
        assert isinstance(study.draw_error, NoValidTrial)
        assert study.no_more_trials_reason().startswith(
            "no trial can be drawn: 50 draws in a row from search are invalid"
        )
        study.enqueue({"training.pairs_per_update": 9}, "by hand", kind="enqueued")
        assert isinstance(study.ask(), Trial)


def test_a_sampler_that_fails_draws_at_random_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ArithmeticError("the matrix is singular")

    monkeypatch.setattr(OptunaSampler, "propose", fails)
    spec = make_spec(RANGES, sampler=SAMPLERS["gp"], budget=Budget(trials=2))
    with Study.create(SweepFolder(tmp_path, "s"), spec) as study:
        assert isinstance(study.ask(), Trial)
        said = "sampler gp failed, drawn at random: ArithmeticError: the matrix is singular"
        assert [event.text for event in study.events() if event.kind == "left out"] == [said]
        assert study.draw_error is None


# --- the order of a grid ---------------------------------------------------------------------------------------------

FOUR_BY_TWO = {"loss.beta": {"choice": [1.0, 2.0, 3.0, 4.0]}, "training.seed": {"choice": [1, 2]}}
ORDER = [(4.0, 1), (4.0, 2), (1.0, 1), (1.0, 2), (3.0, 1), (3.0, 2), (2.0, 1), (2.0, 2)]


def walk(spec: SweepSpec, known: int = 0) -> list[tuple[float, int]]:
    """The points of a grid by trial, by a policy that knows of the first ones from their fingerprints only."""
    first, policy, found = SamplingPolicy(spec), SamplingPolicy(spec), list[TrialSnapshot]()
    while (sampled := (first if len(found) < known else policy).sample(found)) is not None:
        found.append(TrialSnapshot(len(found), sampled.params, fingerprint=sampled.fingerprint))
    return [(trial.params["loss.beta"], trial.params["training.seed"]) for trial in found]


def test_a_shuffled_grid_has_each_point_once_in_an_order_that_depends_on_the_seed_and_keeps_seeds_together() -> None:
    shuffled = make_spec(FOUR_BY_TWO, sampler=GridSampler(order="shuffled"))
    in_file = sorted(ORDER)
    assert walk(shuffled) == walk(shuffled, known=5) == ORDER
    assert walk(make_spec(FOUR_BY_TWO)) == walk(make_spec(FOUR_BY_TWO, sampler=GridSampler(order="file"))) == in_file
    other = walk(make_spec(FOUR_BY_TWO, sampler=GridSampler(order="shuffled", seed=1)))
    assert other != ORDER
    assert sorted(other) == in_file


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_shuffled_grid_leaves_nothing_out(sizes: list[int], seed: int) -> None:
    paths = ["loss.beta", "loss.gamma", "training.learning_rate", "training.seed"]
    search = {path: {"choice": list(range(1, size + 1))} for path, size in zip(paths, sizes, strict=False)}
    spec = make_spec(search)
    points = [json.dumps(p, sort_keys=True) for p in Grid(spec.search, spec.base, seed)]
    assert sorted(points) == sorted(json.dumps(p, sort_keys=True) for p in Grid(spec.search, spec.base))
    assert len(points) == math.prod(sizes)
