from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.folders import SweepFolder
from orchestrator.spec.samplers import RandomSampler
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from orchestrator.study.sampling.random_samplers import stable_seed
from orchestrator.study.sampling.sampling_policy import SamplingPolicy
from orchestrator.study.study import Study
from orchestrator.study.sweep_terms import TERMS_KEY
from orchestrator.study.trial_snapshots import TrialSnapshot
from tests.support.specs import RANGES, make_spec

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
