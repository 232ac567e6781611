"""The saved view and the parent run's page in MLflow's own UI, in a real Chromium, as a person opens them."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashboards.mlflow_pages import saved_view
from dashboards.sweep_reporter import DashboardReporter
from docs.chromium import Page, browser, installed
from docs.mlflow_looks import CLOSE, open_charts, rows, show, titles
from orchestrator.driver.parent_run import attach_report, end_parent_run, open_sink, start_parent_run
from orchestrator.folders import SweepFolder
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial, TrialState
from orchestrator.tracking.mlflow_client import connect, tracking_uri
from orchestrator.tracking.mlflow_ui import UiServer, start_ui, sweep_page
from orchestrator.tracking.run_metadata import end_tags, run_page, start_tags
from tests.support.processes import LIMIT_SECONDS
from tests.support.scripted_sweep import COMPLETE, DIVERGED, FAILED, METRIC, PRUNED, Script, make_spec, run_sweep

STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAILED: "FAILED"}
CHARTS = [
    "eval_margins/logp",
    "eval_accuracies/logp",
    "eval_logps_per_token/chosen vs eval_logps_per_token/rejected",
    "Parallel Coordinates",
    f"loss.beta vs. loss.gamma vs. {METRIC}",
    "loss",
    "grad_norm",
    "tokens_per_second",
    "eval_rewards/margins",
]
WORDS = {3: PRUNED, 5: DIVERGED, 7: FAILED}
DESCRIBED = "document.body.innerText.includes('Running, stopped and failed')"


def rich(trial: Trial) -> Script:
    return Script(quality=0.2 + 0.05 * trial.number, outcome=WORDS.get(trial.number, COMPLETE))


def tell(root: Path, name: str) -> None:
    """What a driver tells while such a sweep runs, all at once."""
    with Study.open(run_sweep(root, make_spec(name), rich)) as study:
        sink = open_sink(study, root, DashboardReporter())
        start_parent_run(study, sink, DashboardReporter(), "f" * 12)
        for record in study.trials():
            run, outcome = str(record.number), WORDS.get(record.number, COMPLETE)
            params = {path: record.params[path] for path in study.spec.search.paths}
            sink.start_run(
                run,
                name=f"trial {run}",
                params=params,
                tags={"state": "RUNNING", **start_tags(record.number)},
                at=time.time(),
            )
            sink.log_metrics(run, study.metric_history(record.number), at=time.time())
            sink.end_run(run, status=STATUS[record.state], tags=end_tags(record.number, outcome), at=time.time())
        attach_report(study, sink, DashboardReporter(), print, "finished")
        end_parent_run(study, sink, "FINISHED", "FINISHED", "")
        assert sink.close(LIMIT_SECONDS) == 0


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, UiServer, Page]]:
    if installed() is None:
        pytest.skip("no Chromium on the PATH")
    root = tmp_path_factory.mktemp("mlflow")
    tell(root, "seen")
    ui = start_ui(root, tracking_uri(root, None))
    try:
        with browser() as chromium:
            yield root, ui, chromium.page()
    finally:
        ui.stop()


@pytest.mark.browser
@pytest.mark.slow
def test_the_view_opens_on_the_charts_by_name_with_the_sweeps_runs(told: tuple[Path, UiServer, Page]) -> None:
    root, ui, page = told
    spec = make_spec("seen")
    with Study.open(SweepFolder(root, "seen")) as study:
        sweep_id = study.id
    view = saved_view(spec, sweep_id, time.time())
    open_charts(page, sweep_page(ui.base, root, tracking_uri(root, None), spec.tracking.experiment, sweep_id, view))
    assert titles(page) == CHARTS
    assert {title: show(page, title) for title in CHARTS} == dict.fromkeys(CHARTS, "drawn")
    ends = {3: " pruned", 5: " diverged", 7: " failed"}
    assert sorted(rows(page)) == sorted(f"trial {n}{ends.get(n, '')}" for n in range(12))


@pytest.mark.browser
@pytest.mark.slow
def test_the_parent_run_opens_on_its_description(told: tuple[Path, UiServer, Page]) -> None:
    root, ui, page = told
    client = connect(root, tracking_uri(root, None))
    experiment = client.get_experiment_by_name("prefsweep")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`prefsweep.run` = 'sweep'")
    address = f"{ui.base}/#{run_page(experiment.experiment_id, run.info.run_id)}"
    page.look(address, width=1600, height=1200, ready=DESCRIBED)
    page.run(CLOSE)
    text = page.run("document.body.innerText")
    for words in ("Finished: 12 trials (9 complete, 1 pruned, 1 failed, 1 diverged).", "Best: trial 11", "Diagnosis"):
        assert words in text, words
    assert [f.path for f in client.list_artifacts(run.info.run_id) if f.path.endswith(".html")] == ["report.html"]
    assert {"figures/map.html", "figures/curves.html"} <= {
        f.path for f in client.list_artifacts(run.info.run_id, "figures")
    }
    link = "[...document.querySelectorAll('a')].find((a) => a.textContent === 'Charts of all trials').href"
    open_charts(page, page.run(link))
    assert show(page, "eval_margins/logp") == "drawn"
