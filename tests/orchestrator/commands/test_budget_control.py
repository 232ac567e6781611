"""`set`, `retry`, `clone` of a failed trial and `stop --abandon` without a driver: what is kept, what is refused."""

from collections.abc import Sequence
from pathlib import Path

import mlflow
import pytest

from dashboards.sweep_reporter import DashboardReporter
from orchestrator.commands.budget_control import set_budget
from orchestrator.commands.request_commands import RequestRefused, enqueue_clone, request_retries
from orchestrator.commands.status import status
from orchestrator.driver.parent_run import open_sink
from orchestrator.errors import SpecError, TooManySlots
from orchestrator.execution.user_requests import StopConditions
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SWEEP_RUN
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.samplers import Reproducible
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from orchestrator.study import budget_changes
from orchestrator.study.budget_changes import BudgetUsedUp
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial, TrialState
from tests.support.metrics import COMPLETE, bug, evaluated
from tests.support.processes import LIMIT_SECONDS, called, json_of
from tests.support.specs import RANGES, SAMPLERS, make_spec, sweep_folder


def begun(root: Path, spec: SweepSpec, failed: Sequence[int] = (), ended: int = 2) -> SweepFolder:
    """A sweep without a driver: so many trials ended with values of 0.5, some of them failed; one was left running."""
    folder = sweep_folder(root)
    with Study.create(folder, spec) as study:
        folder.spec.write_text(dump_spec(spec))
        for number in range(ended + 1):
            trial = study.ask()
            assert isinstance(trial, Trial)
            study.report(trial, [evaluated(0, 0.5)])
            if number < ended:
                study.tell(trial, bug("KeyError: x") if number in failed else COMPLETE)
    return folder


def test_a_budget_is_kept_for_the_next_resume_and_the_newest_value_counts(tmp_path: Path) -> None:
    folder = begun(tmp_path, make_spec(6, budget=Budget(concurrency=1)))
    told = set_budget("s", tmp_path, ["budget.concurrency=4", "budget.hours=2"])
    assert told[0] == "requested budget.hours=2.0 budget.concurrency=4 of s"
    assert told[1] == "s is not running: the request takes effect at `orchestrate resume s`"
    set_budget("s", tmp_path, ["budget.hours=null"])
    assert set_budget("s", tmp_path, ["budget.concurrency=4"]) == [
        "s has budget.concurrency=4 already: nothing changes"
    ]
    with Study.open(folder) as study:
        assert study.spec.budget == Budget(concurrency=1), "the driver changes it"
        assert budget_changes.with_requests(study.spec, study.requests()).budget == Budget(concurrency=4)
        assert len([e for e in study.events() if e.kind == "asked"]) == 2
    assert "request pending: set the sweep, budget.hours=2.0" in status("s", tmp_path)["waiting"][0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("budget.concurency=4", r"did you mean budget.concurrency\?"),
        ("concurrency=4", r"did you mean budget.concurrency\?"),
        ("budget.concurrency=0", "budget.concurrency"),
        ("budget.hours=soon", "budget.hours"),
        ("loss.beta=3", "stop it, then orchestrate resume s --set loss.beta=3"),
    ],
)
def test_what_is_no_budget_is_refused_with_what_is(tmp_path: Path, given: str, said: str) -> None:
    folder = begun(tmp_path, make_spec(6))
    with pytest.raises(SpecError, match=said) as refused:
        set_budget("s", tmp_path, [given])
    assert str(refused.value).startswith(given)
    with Study.open(folder) as study:
        assert study.requests() == []


def test_a_limit_that_is_used_up_is_refused_with_one_that_suffices(tmp_path: Path) -> None:
    folder = begun(tmp_path, make_spec(6, budget=Budget(hours=9.0)))
    with Study.open(folder) as study:
        used = study.usage().hours
    assert used > 0
    with pytest.raises(BudgetUsedUp, match=r"budget.hours=1e-12: s has used .* hours already") as refused:
        set_budget("s", tmp_path, ["budget.hours=1e-12"])
    assert "its 2 ended trials took" in str(refused.value)
    assert "and 4 are left: set about" in str(refused.value)
    enough = float(str(refused.value).partition("set about ")[2].partition(",")[0])
    assert enough == pytest.approx(3 * used, rel=0.2)
    set_budget("s", tmp_path, [f"budget.hours={enough}"])
    with pytest.raises(BudgetUsedUp, match="s has begun 3 trials already; set 3 or more"):
        set_budget("s", tmp_path, ["budget.trials=2"])
    with pytest.raises(
        BudgetUsedUp, match=r"trial 0 of s has reached it with eval_accuracies/logp 0.5; set a value above"
    ):
        set_budget("s", tmp_path, ["budget.target=0.4"])
    out = called(tmp_path, "resume", "s", "--set", "budget.hours=1e-12", code=2)[1]
    assert "budget.hours=1e-12: s has used" in out
    with Study.open(folder) as study:
        assert study.spec.budget == Budget(hours=9.0)
        assert [r.state for r in study.trials()][-1] is TrialState.RUNNING


def test_the_limit_offered_after_a_used_up_one_can_be_set(tmp_path: Path) -> None:
    """Twice the old limit may be less than what is spent: loading and checkpointing run past a short one."""
    folder = begun(tmp_path, make_spec(6, budget=Budget(hours=9.0)))
    with Study.open(folder) as study:
        study.amend(study.spec.model_copy(update={"budget": Budget(hours=1e-9)}))
        reason = StopConditions(study).budget_reason()
        assert reason is not None
        option = reason.text.partition("--set ")[2].partition("`")[0]
        assert float(option.partition("=")[2]) > study.usage().hours
    assert set_budget("s", tmp_path, [option])


def test_more_trials_at_a_time_than_the_order_allows_are_refused(tmp_path: Path) -> None:
    spec = make_spec(RANGES, sampler=SAMPLERS["tpe"], order=Reproducible(lag=3), budget=Budget(trials=9))
    begun(tmp_path, spec)
    with pytest.raises(TooManySlots, match="at most 3 trials can run at a time, not 4"):
        set_budget("s", tmp_path, ["budget.concurrency=4"])
    assert "requested" in set_budget("s", tmp_path, ["budget.concurrency=3"])[0]


def test_only_failed_trials_are_retried_and_only_they_are_cloned_unchanged(tmp_path: Path) -> None:
    folder = begun(tmp_path, make_spec(6), failed=[0])
    with pytest.raises(RequestRefused, match="trial 1 of s is COMPLETE, and only failed trials are retried"):
        request_retries("s", tmp_path, [0, 1])
    with pytest.raises(RequestRefused, match=r"s has no trial 9 \(it has 0 to 2\)"):
        request_retries("s", tmp_path, [9])
    with Study.open(folder) as study:
        assert study.requests() == [], "all or none"
    told = request_retries("s", tmp_path, [0, 0], "mended")
    assert told[0] == "requested a retry of 0 of s: from the initial model, before any new trial"
    assert "takes effect at `orchestrate resume s`" in told[1]
    with Study.open(folder) as study:
        assert [(r.kind, r.trial) for r in study.requests()] == [("retry", 0)]
    with pytest.raises(RequestRefused, match="without changes repeats it"):
        enqueue_clone("s", tmp_path, 1, [])
    assert enqueue_clone("s", tmp_path, 0, [])[0] == (
        "enqueued a clone of trial 0 without changes: it runs next, in addition to budget.trials"
    )
    with Study.open(folder) as study:
        (again,) = study.enqueued_trials()
        assert (again.parent, again.settings) == (0, {"training.seed": 0})


def test_an_abandoned_sweep_ends_with_all_its_trials_and_runs(tmp_path: Path) -> None:
    """Its driver was killed: two trials are begun, one of them paused, and MLflow still has all runs as RUNNING."""
    root = tmp_path
    folder = begun(root, make_spec(6), ended=1)
    uri = f"sqlite:///{root / 'mlflow.db'}"
    with Study.open(folder) as study:
        study.start_driving()
        assert study.ask() is not None
        assert study.ask() is not None
        study.pause(2, "a debugger")
        sink = open_sink(study, root, DashboardReporter())
        for run in (SWEEP_RUN, "0", "1", "2"):
            sink.start_run(run, name=run, params={}, tags={"state": "RUNNING"}, at=1.0)
        sink.end_run("0", status="FINISHED", tags={"state": "COMPLETE"}, at=2.0)
        assert sink.close(LIMIT_SECONDS) == 0
    assert json_of(root, "status", "s")["state"] == "interrupted"
    assert "without it one TRIAL" in called(root, "stop", "s", "1", "--abandon", code=2)[1]
    told = called(root, "stop", "s", "--abandon", "--why", "lost interest")[1]
    assert "s is abandoned: 2 unfinished trials ended as PRUNED" in told

    found = json_of(root, "status", "s")
    assert found["state"] == "abandoned"
    assert found["why"].startswith("abandoned: lost interest (by ")
    assert [t["state"] for t in found["trials"]] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert all(t["reason"].startswith("abandoned: lost interest (by ") for t in found["trials"][1:])
    client = mlflow.MlflowClient(tracking_uri=uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "prefsweep"]
    runs = {r.data.tags["prefsweep.run"]: r for r in client.search_runs([experiment.experiment_id])}
    ended = {run: (r.info.status, r.data.tags["state"]) for run, r in runs.items()}
    assert ended == {
        SWEEP_RUN: ("KILLED", "ABANDONED"),
        "0": ("FINISHED", "COMPLETE"),
        "1": ("KILLED", "PRUNED"),
        "2": ("KILLED", "PRUNED"),
    }
    assert "0 unfinished trials ended" in called(root, "stop", "s", "--abandon")[1], "once more, nothing is left"
    assert "is not running" in called(root, "stop", "s", code=2)[1]
