from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dashboards.sweep_reporter import DashboardReporter
from orchestrator.driver.parent_run import open_sink, tell_sweep
from orchestrator.folders import DATA_FILE, SweepFolder, make
from orchestrator.judge import win_rates
from orchestrator.spec.loading.loader import loads
from orchestrator.spec.loading.serialization import dump
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialState
from trainer.data import prepare
from trainer.results import Point
from trainer.training_session import Workshop

SWEEP = """
name: judged
base:
  model:
    generated: {vocab_size: 320, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
                num_key_value_heads: 2, max_position_embeddings: 128}
  data:
    train: {generated: instructions, rows: 40}
    eval: {generated: instructions, split: eval, rows: 16}
    max_length: 96
  training: {pairs_per_update: 8, max_steps: 4, eval_steps: 4, learning_rate: 3e-2}
  evaluation: {prompts: 1, max_new_tokens: 4}
search:
  loss.beta: [2.0, 10.0, 20.0]
maximize: eval_accuracies/logp
judge: {top: 2, prompts: 8, max_new_tokens: 8}
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a finished sweep of three tiny trials: really trained, in MLflow, not yet judged."""
    root = tmp_path_factory.mktemp("trained") / "runs"
    spec = loads(SWEEP, root.parent)
    folder = SweepFolder(root, spec.name)
    make(folder, dump(spec))
    report = prepare(spec.base.data, spec.base.model, folder.cache).report
    (folder.path / DATA_FILE).write_text(report.model_dump_json())
    workshop = Workshop(folder.cache)
    with Study.create(folder, spec, train_pairs=report.train_rows) as study:
        sink = open_sink(study, root, DashboardReporter())
        study.begin()
        tell_sweep(study, sink, DashboardReporter(), report.fingerprint)
        while trial := study.claim():
            assert isinstance(trial, Trial)
            run = str(trial.number)
            sink.start(run, name=f"trial {run}", params=trial.config.leaves(), tags={}, at=time.time())
            points: list[Point] = list(workshop.train(trial.config, folder.attempt(trial.number, trial.attempt)))
            sink.points(run, points, at=time.time())
            study.observe(trial, points)
            study.close(trial, Outcome(TrialState.COMPLETE))
            sink.end(run, status="FINISHED", tags={"state": "COMPLETE"}, at=time.time())
        sink.end("sweep", status="FINISHED", tags={"state": "FINISHED"}, at=time.time())
        assert sink.close(60.0) == 0
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
def talk() -> tuple[list[str], Callable[[str], None]]:
    """What was said, and who listens."""
    said: list[str] = []
    return said, said.append
