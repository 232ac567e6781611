"""The notebook of docs/python.md runs as it stands, and shows what it says."""

from pathlib import Path

import pandas
import pytest

from orchestrator.api import Report, Sweep
from tests.support.notebook import run_notebook

ROOT = Path(__file__).parents[2]


def test_the_notebook_runs_a_sweep_and_shows_it(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names, shown = run_notebook(ROOT / "docs" / "python.ipynb")
    assert (home / "from-python" / "report.html").is_file()
    assert {problem.path for problem in names["problems"]} == {"base.loss.bta", "budget.trials"}
    assert names["planned"]["trials"] == len(names["trials"]) == 3
    assert set(names["trials"]["state"]) == {"COMPLETE"}
    assert set(names["curves"].index.get_level_values("trial")) == {0, 1, 2}
    assert names["best"]["value"] == names["trials"]["value"].max()
    assert any(isinstance(value, Report) for value in shown)
    assert any(isinstance(value, Sweep) for value in shown)
    states = shown[-1]
    assert isinstance(states, pandas.Series)
    assert dict(states) == {"COMPLETE": 4}, "the enqueued trial ran in this process"
