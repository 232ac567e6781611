"""The driver is killed before the finalists, inside one and before they are compared: the next ends exactly alike."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep_spec import Finalists, SweepSpec
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow_client import connect
from tests.support.local_driver import KILLED, drive, forked, killed_at
from tests.support.specs import BASE, make_spec
from tests.support.sweep_record import differences, doubled_rows, sweep_record

SEARCHED = 3
POINTS = {
    "the last trial of the search has ended": f"trial.closed:{SEARCHED}",
    "the first finalist has a checkpoint of three": f"checkpoint.manifest:{3 * SEARCHED + 1}",
    "the second finalist's end is in tracking alone": f"trial.told:{SEARCHED + 2}",
    "all have ended": f"trial.closed:{SEARCHED + 4}",
    "they are compared, and nothing is stored": "finalists.compared:1",
}


def spec() -> SweepSpec:
    data: dict[str, Any] = BASE | {"data": {"train": [{"generated": "instructions"}], "confirm_share": 0.5}}
    rates = {"training.learning_rate": {"choice": [1e-3, 2e-3, 3e-3]}}
    return make_spec(rates, base=data, finalists=Finalists(top=2, seeds=2))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep that nobody touched."""
    root = tmp_path_factory.mktemp("calm")
    assert forked(lambda: connect(root, f"sqlite:///{root / 'mlflow.db'}")) == 0
    shutil.copy(root / "mlflow.db", root / "empty.db")
    assert forked(partial(drive, root, spec())) == 0
    return root


@pytest.mark.parametrize("instant", POINTS)
def test_a_killed_driver_is_followed_by_one_that_ends_alike(calm: Path, fast_tmp_path: Path, instant: str) -> None:
    shutil.copy(calm / "empty.db", fast_tmp_path / "mlflow.db")
    assert killed_at(partial(drive, fast_tmp_path, spec()), POINTS[instant]) == KILLED
    assert forked(partial(drive, fast_tmp_path, spec())) == 0
    left, right = sweep_record(calm, "s"), sweep_record(fast_tmp_path, "s")
    assert differences(left, right) == []
    assert doubled_rows(right) == 0
    confirmed: list[str] = []
    for root in (calm, fast_tmp_path):
        with Study.open(SweepFolder(root, "s")) as study:
            found = study.confirmation()
            assert found is not None
            confirmed.append(found.model_dump_json())
            assert [e.kind for e in study.events()].count("confirmed") == 1
            assert len(study.trials()) == SEARCHED + 4
    assert confirmed[0] == confirmed[1]
    assert left["mlflow"]["sweep"]["tags"]["confirmed.of"] == "2"
