import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dashboards.sweep_reporter import DashboardReporter
from orchestrator.driver.parent_run import open_sink, start_parent_run
from orchestrator.judge import win_rates
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, TrialState
from tests.support.preparation import prepared_sweep
from tests.support.processes import LIMIT_SECONDS
from tests.support.small_trials import DATA, MODEL
from tests.support.specs import make_spec
from trainer.results import StepMetrics
from trainer.training_session import TrainingSession

SPEC = make_spec(
    {"loss.beta": {"choice": [2.0, 10.0, 20.0]}},
    name="judged",
    base={
        "model": MODEL,
        "data": DATA
        | {
            "train": {"generated": "instructions", "rows": 40},
            "eval": {"generated": "instructions", "split": "eval", "rows": 16},
        },
        "training": {"pairs_per_update": 8, "max_steps": 4, "eval_steps": 4, "learning_rate": 3e-2},
        "evaluation": {"prompts": 1, "max_new_tokens": 4},
    },
    judge={"top": 2, "prompts": 8, "max_new_tokens": 8},
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a finished sweep of three tiny trials: really trained, in MLflow, not yet judged."""
    root = tmp_path_factory.mktemp("trained") / "runs"
    folder, report = prepared_sweep(root, SPEC)
    session = TrainingSession(folder.cache)
    with Study.create(folder, SPEC, train_pairs=report.train_rows) as study:
        sink = open_sink(study, root, DashboardReporter())
        study.start_driving()
        start_parent_run(study, sink, DashboardReporter(), report.fingerprint)
        while trial := study.ask():
            run = str(trial.number)
            sink.start_run(run, name=f"trial {run}", params=trial.config.flat_params(), tags={}, at=time.time())
            metrics: list[StepMetrics] = list(session.train(trial.config, folder.attempt(trial.number, trial.attempt)))
            sink.log_metrics(run, metrics, at=time.time())
            study.report(trial, metrics)
            study.tell(trial, Outcome(TrialState.COMPLETE))
            sink.end_run(run, status="FINISHED", tags={"state": "COMPLETE"}, at=time.time())
        sink.end_run("sweep", status="FINISHED", tags={"state": "FINISHED"}, at=time.time())
        assert sink.close(LIMIT_SECONDS) == 0
    return root


@pytest.fixture
def runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to judge, whose MLflow keeps its artifacts beside it; intervals from few draws, to be quick."""
    monkeypatch.setattr(win_rates, "RESAMPLES", 20)
    copy = tmp_path / "runs"
    shutil.copytree(trained, copy)
    with sqlite3.connect(copy / "mlflow.db") as store:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            store.execute(f"update {table} set {column} = replace({column}, ?, ?)", (str(trained), str(copy)))
    return copy


@pytest.fixture
def log_lines() -> tuple[list[str], Callable[[str], None]]:
    """What was said, and who listens."""
    messages: list[str] = []
    return messages, messages.append
