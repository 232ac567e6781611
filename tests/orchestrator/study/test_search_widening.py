"""A begun sweep whose search grows: old trials stay, new ones come from all of it, and nothing is ever taken away."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SearchNarrowed, SpecChanged
from orchestrator.folders import SweepFolder
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.sweep_terms import allowed_changes
from orchestrator.study.trial_records import Trial
from tests.support.metrics import COMPLETE, evaluated
from tests.support.specs import GRID, SAMPLERS, make_spec

NARROW = {
    "loss.beta": {"uniform": [1.0, 2.0]},
    "training.learning_rate": {"log_uniform": [1e-7, 1e-6]},
    "training.pairs_per_update": {"int_uniform": [8, 16], "step": 4},
    "loss.gamma": {"choice": [0.5, 1.0]},
}
WIDE = {
    "loss.beta": {"uniform": [0.5, 8.0]},
    "training.learning_rate": {"log_uniform": [1e-8, 1e-5]},
    "training.pairs_per_update": {"int_uniform": [4, 32], "step": 4},
    "loss.gamma": {"choice": [0.25, 0.5, 1.0, 1.5]},
}


def widened(spec: SweepSpec, search: dict[str, Any], zipped: Any = (), **more: Any) -> SweepSpec:
    space = SearchSpace.model_validate({"dimensions": search, "zipped": zipped})
    return spec.model_copy(update={"search": space, **more})


def _run(folder: SweepFolder, wide: SweepSpec, *, killed: bool) -> list[Any]:
    """Six trials, then the wider search; the driver dies, if so wanted, after every ask of an odd turn."""
    study = Study.open(folder)
    for turn in itertools.count():
        if len(study.trials()) == 6 and study.spec != wide and all(t.state.is_final for t in study.trials()):
            assert study.amend(wide)
        trial = study.ask()
        if not isinstance(trial, Trial):
            break
        if killed and turn % 2:
            study.dispose()
            study = Study.open(folder)
            continue
        study.report(trial, [evaluated(0, 1 - abs(trial.config.loss.beta - 6.0) / 10)])
        study.tell(trial, COMPLETE)
    rows = [(t.number, dict(t.params)) for t in study.trials()]
    study.dispose()
    return rows


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("grid", "staged")])
def test_samplers_draw_from_the_wider_search_and_resume_exactly(
    tmp_path: Path, template: Callable[[Path, SweepSpec], SweepFolder], name: str
) -> None:
    spec = make_spec(NARROW, sampler=SAMPLERS[name], budget=Budget(trials=20))
    wide = widened(spec, WIDE)
    calm = _run(template(tmp_path / "calm", spec), wide, killed=False)
    assert _run(template(tmp_path / "killed", spec), wide, killed=True) == calm
    assert len(calm) == 20
    first, later = [p for _, p in calm[:6]], [p for _, p in calm[6:]]
    assert all(1 <= p["loss.beta"] <= 2 and p["loss.gamma"] in (0.5, 1.0) for p in first)
    assert any(not 1 <= p["loss.beta"] <= 2 for p in later)
    assert any(not 1e-7 <= p["training.learning_rate"] <= 1e-6 for p in later)
    assert any(p["loss.gamma"] in (0.25, 1.5) for p in later)


def test_a_grid_goes_on_with_its_new_points_and_the_history_says_so(tmp_path: Path) -> None:
    folder, spec = SweepFolder(tmp_path, "s"), make_spec(GRID)
    wide = widened(spec, GRID | {"loss.beta": {"choice": [10.0, 2.0, 2.5]}})
    with Study.create(folder, spec) as study:
        for _ in range(4):
            trial = study.ask()
            assert isinstance(trial, Trial)
            study.report(trial, [evaluated(0, 0.5)])
            study.tell(trial, COMPLETE)
        before = study.trials()
        assert study.ask() is None
        study.amend(wide)
    with Study.open(folder) as study:
        new = [study.ask(), study.ask()]
        assert study.ask() is None
        assert [t.params for t in new if isinstance(t, Trial)] == [
            {"loss.beta": 10.0, "loss.gamma": 0.5},
            {"loss.beta": 10.0, "loss.gamma": 1.0},
        ]
        assert study.trials()[:4] == before
        assert [t.params["loss.beta"] for t in study.trials()[4:]] == [10.0, 10.0]
        told = [e.text for e in study.events() if e.kind == "spec"]
        assert told == ["search.loss.beta.choice: [2.0, 2.5] -> [10.0, 2.0, 2.5]"]
        assert len(study.spec_history()) == 2


ZIPPED = ({"loss.beta": (2.0, 10.0), "training.learning_rate": (1e-6, 3e-7)},)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"loss.beta": {"choice": [2.0, 4.0]}}, {"loss.beta": {"choice": [2.0, 8.0]}}, "4 is left out"),
        (NARROW, NARROW | {"loss.beta": {"uniform": [1.5, 9.0]}}, r"\[1.5, 9\] leaves out a part of \[1, 2\]"),
        (
            NARROW,
            NARROW | {"training.learning_rate": {"log_uniform": [1e-8, 1e-7]}},
            r"\[1e-08, 1e-07\] leaves out a part",
        ),
        (
            NARROW,
            NARROW | {"training.learning_rate": {"uniform": [1e-8, 1e-5]}},
            r"was a range \(log_uniform\) and cannot become a range \(uniform\)",
        ),
        (NARROW, NARROW | {"loss.beta": {"choice": [1.0, 2.0]}}, r"was a range \(uniform\) and cannot become a list"),
        (
            NARROW,
            NARROW | {"training.pairs_per_update": {"int_uniform": [6, 18], "step": 4}},
            "move the end by whole steps",
        ),
        (
            NARROW,
            NARROW | {"training.pairs_per_update": {"int_uniform": [8, 16], "step": 2}},
            "its step and its scale cannot change",
        ),
        (GRID, GRID | {"training.seed": {"choice": [1, 2]}}, "search.training.seed: is searched in addition"),
        (GRID, {"loss.beta": GRID["loss.beta"]}, "search.loss.gamma: is no longer searched"),
        (
            GRID | {"loss.kind": {"choice": ["simpo"]}},
            {"loss.kind": {"choice": ["simpo"]}, "loss.beta": GRID["loss.beta"]}
            | {"loss.gamma": {"choice": [0.5, 1.0], "when": {"loss.kind": "simpo"}}},
            r"its condition \(when\) cannot change",
        ),
    ],
)
def test_a_search_that_does_not_only_grow_is_refused(old: Any, new: Any, said: str) -> None:
    spec = make_spec(old, sampler=SAMPLERS["random"], budget=Budget(trials=4))
    with pytest.raises(SearchNarrowed, match=said) as refused:
        allowed_changes(spec, widened(spec, new))
    assert "Nothing was changed" in str(refused.value)


def test_zipped_lists_grow_by_rows(tmp_path: Path) -> None:
    spec = make_spec({}, ZIPPED)
    more = ({"loss.beta": (2.0, 10.0, 5.0), "training.learning_rate": (1e-6, 3e-7, 6e-7)},)
    assert allowed_changes(spec, widened(spec, {}, more))
    crossed = ({"loss.beta": (10.0, 2.0), "training.learning_rate": (1e-6, 3e-7)},)
    with pytest.raises(SearchNarrowed, match=r"search.zip: \(2, 1e-06\), \(10, 3e-07\) is left out"):
        allowed_changes(spec, widened(spec, {}, crossed))


def test_staged_searches_and_other_settings_stay_as_they_are() -> None:
    staged = make_spec(GRID, sampler=SAMPLERS["staged"])
    wide = GRID | {"loss.beta": {"choice": [2.0, 2.5, 3.0]}}
    with pytest.raises(SearchNarrowed, match="sampler staged"):
        allowed_changes(staged, widened(staged, wide))
    grid = make_spec(GRID)
    with pytest.raises(SpecChanged, match="lists and ranges of search may grow"):
        allowed_changes(grid, widened(grid, wide, sampler=SAMPLERS["random"]))
