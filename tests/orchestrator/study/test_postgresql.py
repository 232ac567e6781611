"""The same study in PostgreSQL, on a server of its own; skipped with a word where there is none."""

import math
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import NameTaken, StorageRefused, SweepHeld
from orchestrator.folders import SweepFolder
from orchestrator.spec.search.space import SearchSpace
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial, TrialState
from tests.support.metrics import COMPLETE, DIVERGED, bug, evaluated
from tests.support.postgresql import postgresql_server
from tests.support.specs import GRID, make_spec


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgresql_server() as url:
        yield url


@pytest.fixture
def study(url: str, tmp_path: Path) -> Iterator[Study]:
    with Study.create(SweepFolder(tmp_path, f"s-{uuid.uuid4().hex[:12]}"), make_spec(GRID), url) as study:
        yield study


def test_a_sweep_with_a_crash_and_a_fenced_driver(study: Study) -> None:
    for trial in iter(study.ask, None):
        study.report(trial, [evaluated(step, 0.1 * trial.number, **{"logps/chosen": math.nan}) for step in range(5)])
        if trial.number < 3:
            study.tell(trial, COMPLETE if trial.number else DIVERGED)
    with Study.open(study.folder) as later:
        states = [t.state for t in later.trials()]
        assert states == [TrialState.PRUNED, TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]
        assert later.best().number == 2
        again = later.ask()
        assert (again.number, again.attempt) == (3, 2)
        points = later.metric_history(3)
        assert [p.step for p in points] == list(range(5))
        assert all(math.isnan(p.metrics["logps/chosen"]) for p in points)
        with pytest.raises(SweepHeld):
            study.ask()


def test_failed_trials_are_tried_again_with_their_numbers(study: Study) -> None:
    first = study.ask()
    assert isinstance(first, Trial)
    study.tell(first, bug("KeyError: x"))
    study.retry_failed([0], "mended (by me)")
    with Study.open(study.folder) as later:
        again = later.ask()
        assert isinstance(again, Trial)
        assert (again.number, again.attempt, again.params) == (0, 2, first.params)
        later.report(again, [evaluated(0, 0.7)])
        ended = later.tell(again, COMPLETE)
        assert (ended.state, ended.value) == (TrialState.COMPLETE, 0.7)
        assert [failed.reason for failed in ended.failed_attempts] == ["KeyError: x"]


def test_a_widened_search_continues_with_its_new_points(study: Study) -> None:
    for _ in range(4):
        trial = study.ask()
        assert isinstance(trial, Trial)
        study.report(trial, [evaluated(0, 0.5)])
        study.tell(trial, COMPLETE)
    assert study.ask() is None
    wide = GRID | {"loss.beta": {"choice": [10.0, 2.0, 2.5]}}
    study.amend(study.spec.model_copy(update={"search": SearchSpace.model_validate({"dimensions": wide})}))
    with Study.open(study.folder) as later:
        new = [later.ask(), later.ask()]
        assert later.ask() is None
        assert [t.params["loss.beta"] for t in new if isinstance(t, Trial)] == [10.0, 10.0]
        assert len(later.trials()) == 6
        assert len(later.spec_history()) == 2


def test_a_name_is_used_once(study: Study, url: str) -> None:
    with pytest.raises(NameTaken):
        Study.create(study.folder, make_spec(GRID), url)


def test_a_database_that_cannot_be_reached_is_refused_and_not_remembered(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path, "s")
    with pytest.raises(StorageRefused, match=r"needs a driver|Connection refused"):
        Study.create(folder, make_spec(GRID), "postgresql+psycopg://me@127.0.0.1:1/sweeps")
    assert not folder.database.with_suffix(".url").exists()
