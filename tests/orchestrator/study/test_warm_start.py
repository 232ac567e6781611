"""Another sweep's trials as lessons: what is taken, what is refused, and that nothing depends on that sweep later."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import NoSuchSweep
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.samplers import RandomSampler, TpeSampler
from orchestrator.spec.sweep_spec import Budget, Objective, SweepSpec
from orchestrator.study.sampling.warm_start import WarmStartRefused, warm_start
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial, TrialState
from tests.support.metrics import COMPLETE, DIVERGED, bug, evaluated
from tests.support.specs import METRIC, RANGES, make_spec

LEARNING = {"sampler": TpeSampler(n_startup_trials=2), "budget": Budget(trials=4), "warm_start": "first"}


def earlier(root: Path, spec: SweepSpec, *, ended: bool = True) -> SweepFolder:
    """A sweep called `first` of five trials, a good one, two bad ones, a diverged one and a failed one."""
    folder = SweepFolder(root, "first")
    with Study.create(folder, spec) as study:
        folder.spec.write_text(dump_spec(spec))
        for number in range(5):
            trial = study.ask()
            assert isinstance(trial, Trial)
            study.report(trial, [evaluated(1, 0.5 + number / 10)])
            if ended or number < 4:
                study.tell(trial, {3: DIVERGED, 4: bug("KeyError")}.get(number, COMPLETE))
    return folder


def spec_of(**more: Any) -> SweepSpec:
    return make_spec(RANGES, sampler=RandomSampler(seed=2), name="first", budget=Budget(trials=5), **more)


def test_ended_trials_teach_and_the_other_folder_may_go(tmp_path: Path) -> None:
    other, spec = earlier(tmp_path, spec_of()), make_spec(RANGES, **LEARNING)
    warm = warm_start(spec, tmp_path)
    assert [t.number for t in warm.trials] == [-4, -3, -2, -1]
    assert [t.state for t in warm.trials] == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED]
    assert warm.notices == ("warm_start: the sampler uses 4 trials of first",)

    def sampled(folder: SweepFolder, trials: Any) -> list[Any]:
        with Study.create(folder, spec, slots=2, warm_start_trials=trials):
            pass
        with Study.open(folder) as study:
            return [dict(t.params) for t in (study.ask() for _ in range(3)) if isinstance(t, Trial)]

    taught = sampled(SweepFolder(tmp_path, "s"), warm.trials)
    shutil.rmtree(other.path)
    assert sampled(SweepFolder(tmp_path, "t"), warm.trials) == taught
    assert sampled(SweepFolder(tmp_path, "u"), ()) != taught


def test_what_lies_outside_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    earlier(tmp_path, spec_of())
    params = [t.params["loss.beta"] for t in warm_start(make_spec(RANGES, **LEARNING), tmp_path).trials]
    middle = sorted(params)[1] + 1e-9
    narrow = {**RANGES, "loss.beta": {"uniform": [1.0, middle]}}
    base = {"model": {"generated": {}}, "data": {"train": [{"generated": "instructions"}]}, "lora": {"r": 4}}
    warm = warm_start(make_spec(narrow, **LEARNING, base=base), tmp_path)
    assert len(warm.trials) == 2
    assert warm.notices[1] == "warm_start: 2 of first are outside of this search space and are left out"
    assert warm.notices[2].startswith("warm_start: first has another lora")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "goal": ({"goal": Objective(metric="eval_margins/logp", direction="maximize")}, f"is ranked by maximize {METRIC}"),
    "space": ({"search": {"training.warmup_ratio": {"uniform": [0.5, 0.9]}}}, "no trial among its 4 ended ones"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_sweep_of_no_use_is_refused(tmp_path: Path, name: str) -> None:
    earlier(tmp_path, spec_of())
    more, messages = REFUSED[name]
    search = more.get("search", RANGES)
    with pytest.raises(WarmStartRefused, match=messages):
        warm_start(make_spec(search, **LEARNING | {k: v for k, v in more.items() if k != "search"}), tmp_path)


def test_an_unfinished_or_absent_sweep_is_refused(tmp_path: Path, template: Callable[..., Any]) -> None:
    with pytest.raises(NoSuchSweep):
        warm_start(make_spec(RANGES, **LEARNING), tmp_path)
    earlier(tmp_path, spec_of(), ended=False)
    with pytest.raises(WarmStartRefused, match="1 of its trials have not ended"):
        warm_start(make_spec(RANGES, **LEARNING), tmp_path)
