"""A bug that ends the driver leaves its trace where people look, and gives the name back where nothing was begun."""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.cli.composition import start
from orchestrator.commands.status import history, status
from orchestrator.driver import crash_report, sweep_driver
from orchestrator.driver import run_sweep as sweep_module
from orchestrator.errors import ExitCode, NameTaken, StorageRefused, SweepHeld
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.execution.workers import data_process
from orchestrator.folders import CRASHED_SWEEPS, SweepFolder
from orchestrator.spec.loading.loader import load_spec
from orchestrator.study.sampling.sampling_policy import NoValidTrial, SampledTrial, SamplingPolicy
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialState
from orchestrator.study.trial_snapshots import TrialSnapshot
from tests.support.processes import LIMIT_SECONDS
from tests.support.without_ray import DataHere
from trainer.results import StepMetrics

TEXT = """
name: s
base:
  model: {generated: {vocab_size: 320, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
                      num_attention_heads: 1, num_key_value_heads: 1}}
  data: {train: {generated: instructions, rows: 64}, max_length: 64}
  loss: {kind: simpo}
  training: {pairs_per_update: 8, max_steps: 2}
search: {loss.beta: [2.0, 3.0]}
maximize: eval_accuracies/logp
"""
TOKEN = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"
Run = Callable[..., StopReason]


@pytest.fixture
def file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's file; Ray is left out, the data are prepared here, its trials are run by what the test gives."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(sweep_module, "local_cluster", lambda *_: nullcontext())
    monkeypatch.setattr(data_process, "DataProcess", DataHere)
    for module in (crash_report, sweep_driver, sweep_module):
        monkeypatch.setattr(module, "_DELIVERY_SECONDS", LIMIT_SECONDS)
    (tmp_path / "s.yaml").write_text(TEXT)
    return tmp_path / "s.yaml"


@pytest.fixture
def trials_run_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    return lambda run: monkeypatch.setattr(sweep_driver, "run_trials", run)


def broken(*_: Any, **__: Any) -> StopReason:
    raise TypeError(f"an unexpected thing with {TOKEN}")


def broken_in_a_trial(study: Study, *_: Any, **__: Any) -> StopReason:
    study.ask()
    raise KeyError("boom")


def good(study: Study, *_: Any, **__: Any) -> StopReason:
    while isinstance(trial := study.ask(), Trial):
        study.report(trial, [StepMetrics(1, {"eval_accuracies/logp": 0.5})])
        study.tell(trial, Outcome(TrialState.COMPLETE))
    return StopReason(StopKind.FINISHED)


def parent_runs(root: Path) -> list[tuple[str, str, str]]:
    """Status, state and reason of every sweep's own run, by their beginning."""
    rows = sqlite3.connect(root / "mlflow.db").execute(
        "select r.status, s.value, w.value from runs r join tags t using (run_uuid) "
        "join tags s on s.run_uuid = r.run_uuid and s.key = 'state' "
        "join tags w on w.run_uuid = r.run_uuid and w.key = 'reason' "
        "where t.key = 'prefsweep.run' and t.value = 'sweep' order by r.start_time"
    )
    return [(status, state, reason) for status, state, reason in rows]


def test_a_bug_before_the_first_trial_is_told_everywhere_and_the_name_is_free(
    file: Path, trials_run_by: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    root = file.parent / "runs"
    trials_run_by(broken)
    assert cli.main(["sweep", str(file)]) == ExitCode.INTERNAL_ERROR
    messages = capsys.readouterr().err
    assert "internal error: TypeError: an unexpected thing" in messages
    assert "the name is free: `orchestrate sweep FILE` starts again" in messages
    (trace,) = (root / "s").glob("internal-error-*.txt")
    assert str(trace) in messages
    assert "in broken" in trace.read_text()
    assert TOKEN not in messages + trace.read_text(), "secrets are masked"
    found = status("s", root)
    assert found["state"] == "interrupted"
    assert found["why"].startswith("internal error: TypeError: an unexpected thing")
    assert str(trace) in found["why"]
    assert [e["text"] for e in history("s", root)["events"] if e["kind"] == "stopping"] == [found["why"]]
    assert parent_runs(root) == [("FAILED", "FAILED", found["why"])]

    trials_run_by(good)
    assert cli.main(["sweep", str(file)]) == 0
    assert "an earlier sweep s crashed before its first trial; its folder was moved to" in capsys.readouterr().err
    (temporary,) = (root / CRASHED_SWEEPS).iterdir()
    assert (temporary / trace.name).is_file()
    assert (temporary / "study.db").is_file()
    assert (status("s", root)["state"], len(status("s", root)["trials"])) == ("finished", 2)
    assert parent_runs(root)[1] == ("FINISHED", "FINISHED", "")
    with pytest.raises(NameTaken):
        start(load_spec(file), root)


def test_a_bug_after_a_trial_had_begun_keeps_the_name_and_a_good_resume_clears_the_trace(
    file: Path, trials_run_by: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    root = file.parent / "runs"
    trials_run_by(broken_in_a_trial)
    assert cli.main(["sweep", str(file)]) == ExitCode.INTERNAL_ERROR
    assert "Finished work is kept: orchestrate resume s" in capsys.readouterr().err
    assert cli.main(["sweep", str(file)]) == ExitCode.USER, "there is a trial: the name is taken"
    assert "orchestrate resume s" in capsys.readouterr().err
    assert parent_runs(root)[0][:2] == ("FAILED", "FAILED")
    assert cli.main(["resume", "s"]) == ExitCode.INTERNAL_ERROR
    stopped = [e["text"] for e in history("s", root)["events"] if e["kind"] == "stopping"]
    assert [text.partition(" (")[0] for text in stopped] == ["internal error: KeyError: 'boom'"] * 2
    trials_run_by(good)
    assert cli.main(["resume", "s"]) == 0
    found = status("s", root)
    assert (found["state"], found["why"]) == ("finished", "all points tried: 2 of the grid")
    assert parent_runs(root) == [("FINISHED", "FINISHED", "")]


def test_a_bug_before_there_is_a_study(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    trials_run_by: Callable[[Run], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = file.parent / "runs"

    def no_ray(*_: object) -> None:
        raise RuntimeError("Ray would not start")

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "local_cluster", no_ray)
        assert cli.main(["sweep", str(file)]) == ExitCode.INTERNAL_ERROR
    found = status("s", root)
    assert found["why"].startswith("internal error: RuntimeError: Ray would not start (traceback in ")
    assert [event["text"] for event in history("s", root)["events"]] == [found["why"]]
    assert "the name is free" in capsys.readouterr().err
    trials_run_by(good)
    assert cli.main(["sweep", str(file)]) == 0
    assert status("s", root)["state"] == "finished"


def test_a_folder_without_a_trace_is_not_taken_for_a_crashed_one(file: Path) -> None:
    folder = SweepFolder(file.parent / "runs", "s")
    folder.path.mkdir(parents=True)
    assert not crash_report.is_name_free(folder)
    folder.spec.write_text(TEXT)
    assert not crash_report.is_name_free(folder), "killed, or about to begin"
    with pytest.raises(NameTaken):
        crash_report.make_folder(folder, TEXT)


def test_an_error_of_the_user_is_kept_as_the_reason_too(file: Path, trials_run_by: Callable[[Run], None]) -> None:
    def refused(*_: Any, **__: Any) -> StopReason:
        raise StorageRefused("the disk is gone")

    trials_run_by(refused)
    root = file.parent / "runs"
    assert cli.main(["sweep", str(file)]) == ExitCode.REFUSED
    assert status("s", root)["why"] == "error: the disk is gone"
    assert parent_runs(root) == [("FAILED", "FAILED", "error: the disk is gone")]
    assert not crash_report.is_name_free(SweepFolder(root, "s"))


def test_a_driver_that_was_replaced_records_nothing(file: Path, trials_run_by: Callable[[Run], None]) -> None:
    def replaced(*_: Any, **__: Any) -> StopReason:
        raise SweepHeld("s", "somebody else")

    trials_run_by(replaced)
    root = file.parent / "runs"
    assert cli.main(["sweep", str(file)]) == ExitCode.LOCKED
    assert status("s", root)["why"] == ""
    assert parent_runs(root)[0][:2] == ("RUNNING", "RUNNING")


def test_a_bug_in_a_driver_that_was_replaced_is_not_told_of_the_sweep(
    file: Path, trials_run_by: Callable[[Run], None]
) -> None:
    with ExitStack() as others:

        def replaced(study: Study, *_: Any, **__: Any) -> StopReason:
            others.enter_context(Study.open(study.folder)).start_driving()
            with pytest.raises(SweepHeld):
                study.start_driving()
            raise KeyError("boom")

        trials_run_by(replaced)
        root = file.parent / "runs"
        assert cli.main(["sweep", str(file)]) == ExitCode.LOCKED
        assert [e["text"] for e in history("s", root)["events"] if e["kind"] == "stopping"] == []
        assert not list((root / "s").glob("internal-error-*.txt"))
        told = (SweepFolder(root, "s").outbox / "messages.jsonl").read_text()
        assert "RUNNING" in told
        assert "FAILED" not in told, "nothing more to MLflow"


def test_an_error_while_a_trial_is_drawn_leaves_a_sweep_that_runs_what_it_can_and_resumes(
    file: Path,
    trials_run_by: Callable[[Run], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample, root = SamplingPolicy.sample, file.parent / "runs"

    def breaks_after_one(policy: SamplingPolicy, trials: Sequence[TrialSnapshot]) -> SampledTrial | None:
        if any(not trial.is_enqueued for trial in trials):
            raise ZeroDivisionError("a bug of the sampler")
        return sample(policy, trials)

    trials_run_by(good)
    with monkeypatch.context() as patch:
        patch.setattr(SamplingPolicy, "sample", breaks_after_one)
        assert cli.main(["sweep", str(file)]) == ExitCode.INTERNAL_ERROR
        assert "internal error: ZeroDivisionError: a bug of the sampler" in capsys.readouterr().err
        assert [trial["state"] for trial in status("s", root)["trials"]] == ["COMPLETE"]
        assert cli.main(["enqueue", "s", "--set", "loss.beta=7"]) == 0
        assert cli.main(["resume", "s"]) == ExitCode.INTERNAL_ERROR
        assert [trial["state"] for trial in status("s", root)["trials"]] == ["COMPLETE", "COMPLETE"]
        assert parent_runs(root)[0][:2] == ("FAILED", "FAILED")
    assert cli.main(["resume", "s"]) == 0
    assert [trial["state"] for trial in status("s", root)["trials"]] == ["COMPLETE"] * 3


def test_a_search_without_a_valid_trial_gives_its_name_back(
    file: Path,
    trials_run_by: Callable[[Run], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_valid(*_: object) -> None:
        raise NoValidTrial("loss.beta=0")

    trials_run_by(good)
    root = file.parent / "runs"
    with monkeypatch.context() as patch:
        patch.setattr(SamplingPolicy, "sample", none_valid)
        assert cli.main(["sweep", str(file)]) == ExitCode.USER
        messages = capsys.readouterr().err
        assert "draws in a row from search are invalid trials, such as loss.beta=0" in messages
        assert "Traceback" not in messages
        assert not list((root / "s").glob("internal-error-*.txt"))
        assert status("s", root)["why"].startswith("error: no trial can be drawn: ")
    assert cli.main(["sweep", str(file)]) == 0
    assert status("s", root)["state"] == "finished"
