"""What MLflow's own pages are given: the saved view in the UI's form, and the description of the parent run."""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel
from dashboards.mlflow_pages import run_description, saved_view
from orchestrator.study.trial_records import FailureKind, Outcome, TrialRecord, TrialState
from orchestrator.tracking.mlflow_receiver import MAX_TAG_LENGTH, MlflowReceiver
from orchestrator.tracking.run_metadata import NOTE, RUN, end_tags, run_page, trials_filter, with_links
from tests.support.scripted_sweep import METRIC, make_spec
from trainer.metrics import lookup
from trainer.results import StepMetrics

LONGEST_EXPERIMENT_TAG = 20_000


def unpacked(value: str) -> dict[str, Any]:
    envelope = json.loads(value)
    assert isinstance(envelope["name"], str)
    assert isinstance(envelope["createdAt"], int)
    packed = envelope["state"].removeprefix("deflate;")
    assert packed != envelope["state"]
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def record(number: int, state: TrialState = TrialState.COMPLETE, **more: Any) -> TrialRecord:
    params = {"loss.beta": 2.0, "loss.gamma": 1.0, "training.learning_rate": 3e-7}
    return TrialRecord(number=number, state=state, params=params, attempts=1, **more)


def test_the_view_has_every_chart_and_only_metrics_that_exist() -> None:
    key, value = saved_view(make_spec("mine"), "7f", 1.5)
    state = unpacked(value)
    assert key == "mlflow.sharedViewState.prefsweep-7f"
    assert trials_filter("7f") == state["searchFilter"]
    assert len(value) < LONGEST_EXPERIMENT_TAG
    charts = state["compareRunCharts"]
    lines = [set(chart["selectedMetricKeys"]) for chart in charts if chart["type"] == "LINE"]
    assert all(lookup(name) for names in lines for name in names)
    assert {"eval_logps_per_token/chosen", "eval_logps_per_token/rejected"} in lines
    single = {name for names in lines if len(names) == 1 for name in names}
    assert single >= {"eval_margins/logp", "eval_accuracies/logp", "loss", "grad_norm", "tokens_per_second"}
    (parallel,) = (chart for chart in charts if chart["type"] == "PARALLEL")
    assert parallel["selectedParams"] == ["loss.beta", "loss.gamma", "training.learning_rate"]
    (contour,) = (chart for chart in charts if chart["type"] == "CONTOUR")
    assert [contour[axis]["key"] for axis in ("xaxis", "yaxis", "zaxis")] == ["loss.beta", "loss.gamma", METRIC]
    assert {chart["metricSectionId"] for chart in charts} <= {part["uuid"] for part in state["compareRunSections"]}
    assert (state["orderByAsc"], state["runsHiddenMode"]) == (False, "SHOW_ALL")


def test_a_search_over_words_or_nothing_has_no_contour() -> None:
    words: dict[str, Any] = {"loss.beta": {"choice": [2.0, 3.0]}, "loss.loss_type": {"choice": ["sigmoid", "hinge"]}}
    for search in ({}, words):
        spec = make_spec(search=search)
        kinds = [chart["type"] for chart in unpacked(saved_view(spec, "f", 1.0)[1])["compareRunCharts"]]
        assert "CONTOUR" not in kinds
        assert ("PARALLEL" in kinds) is bool(search)


def test_the_description_says_what_ended_how_and_stays_short_enough() -> None:
    spec = make_spec("mine", description="Words <of> mine")
    records = [record(n, value=0.5 + n / 1000) for n in range(200)]
    records += [record(200, TrialState.PRUNED, reason="in | the <b>lower</b> half\nof all")]
    records += [record(201, TrialState.PRUNED, reason="diverged: loss is nan", diverged=True)]
    records += [record(202, TrialState.FAILED, reason="x" * 5000, failure=FailureKind.BUG)]
    findings = [DiagnosisFinding(f"r{n}", FindingLevel.WARNING, "t" * 300, "e" * 900, "n" * 900) for n in range(9)]
    text = run_description(spec, records, "finished", findings=findings, report=True)
    complete = with_links(text, "1", "mine", lambda run: f"{run:0>32}")
    assert len(complete) < MAX_TAG_LENGTH
    head = text.split("\n\n")[0]
    assert head.startswith(
        "**Finished**: 203 trials (200 complete, 1 pruned, 1 failed, 1 diverged). **Best: [trial 199]"
    )
    assert "in \\| the &lt;b>lower&lt;/b> half of all" in text
    assert "| &nbsp;diverged |" in text
    assert "](#/experiments/1/runs/0000000000000000000000000000sweep/artifacts/report.html)" not in text
    assert f"](#/experiments/1/runs/{'sweep':0>32}/artifacts/report.html?workflowType=machine_learning)" in complete
    assert "mlflow:" not in complete


def test_a_trial_not_to_use_is_not_offered_for_export() -> None:
    records = [record(0, value=0.5), record(1, value=0.6)]
    for trial, offered in (("1", False), ("0", True)):
        findings = [DiagnosisFinding("answers_lost", FindingLevel.SERIOUS, "Fewer right answers", "e", trials=(trial,))]
        text = run_description(make_spec("mine"), records, "finished", findings=findings)
        assert ("orchestrate best mine --export DIR" in text) is offered


def test_nothing_complete_yet_is_said() -> None:
    assert "No trial has completed yet." in run_description(make_spec(), [], "running")
    failed = [record(0, TrialState.FAILED, reason="boom", failure=FailureKind.BUG)]
    assert "No trial has completed." in run_description(make_spec(), failed, "finished")


def test_mlflow_keeps_the_view_and_the_links_and_names_the_stopped(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    view = saved_view(make_spec("mine"), "id", 1.0)
    to = MlflowReceiver(tmp_path, uri=uri, experiment="e", sweep_id="id", sweep="mine", view=view)
    to.start_run("sweep", name="mine", params={}, tags={}, at=1.0)
    to.start_run("0", name="trial 0", params={}, tags={}, at=1.0)
    to.log_metrics("0", [StepMetrics(1, {"loss": 1.0})], at=1.0)
    diverged = Outcome(TrialState.PRUNED, "diverged: loss is nan", diverged=True)
    to.end_run("0", status="KILLED", tags=end_tags(0, diverged), at=2.0)
    to.set_tags("sweep", {NOTE: "[trial 0](mlflow:0) [charts](mlflow:charts) [gone](mlflow:7)"})
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment.tags[view[0]] == view[1]
    runs = {run.data.tags[RUN]: run for run in client.search_runs([experiment.experiment_id])}
    assert (runs["0"].info.run_name, runs["0"].data.tags["state"]) == ("trial 0 diverged", "DIVERGED")
    text = runs["sweep"].data.tags[NOTE]
    assert text.startswith(f"[trial 0](#{run_page(experiment.experiment_id, runs['0'].info.run_id)}) ")
    assert text.count("viewStateShareKey=prefsweep-id") == 2
