"""The driver's side of the mirror: what retention removes goes, a new disk gets what it lacks, trouble is told."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashboards.sweep_reporter import DashboardReporter
from orchestrator.driver import mirror_maintenance
from orchestrator.driver.mirror_maintenance import MirrorMaintenance, claim_mirror, maintain_mirror
from orchestrator.driver.sweep_driver import AfterTrial
from orchestrator.execution.messages import AttemptReport
from orchestrator.execution.workers.mirror_upload import UPLOADING, model_files, result_files
from orchestrator.mirror import Mirror, MirrorRefused, sweep_mirror
from orchestrator.study.database import driver_lease
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, TrialState
from tests.support.local_driver import make_controller
from tests.support.metrics import COMPLETE
from tests.support.mirrored_trial import write_checkpoint
from tests.support.processes import LIMIT_SECONDS
from tests.support.recorders import ListSink, SilentView
from tests.support.specs import METRIC, make_spec, sweep_folder
from trainer.results import StepMetrics
from trainer.storage.atomic_files import write_text


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    spec = make_spec(4, mirror=f"file://{tmp_path}/far")
    with Study.create(sweep_folder(tmp_path / "runs"), spec) as study:
        yield study


@pytest.fixture
def far(study: Study) -> Mirror:
    assert study.spec.mirror is not None
    return sweep_mirror(study.spec.mirror, study.spec.name)


def _trial(study: Study, far: Mirror, value: float, ended: Outcome | None) -> int:
    """A trial as its worker leaves it, here and in the mirror."""
    trial = study.ask()
    study.report(trial, [StepMetrics(0, {METRIC: value})])
    folder = study.folder.attempt(trial.number, 1)
    write_text(folder / "samples.jsonl", f"{trial.number}\n")
    write_checkpoint(folder, 4)
    far.put(f"trials/{trial.number:04d}/1/checkpoints/step-00000004", {"a": folder / "samples.jsonl"})
    if ended is not None and ended.state is TrialState.COMPLETE:
        write_text(folder / "model" / "model.safetensors", f"weights of {trial.number}")
        write_text(folder / "ending.json", "{}")
        far.put(f"trials/{trial.number:04d}/1/model", model_files(folder))
        far.put(f"trials/{trial.number:04d}/1/end", result_files(folder))
    if ended is not None:
        study.tell(trial, ended)
    return trial.number


PRUNED = Outcome(TrialState.PRUNED, "median")


def test_what_goes_here_goes_there(study: Study, far: Mirror) -> None:
    with (
        maintain_mirror(study, SilentView()) as mirror,
        AfterTrial(study, ListSink(), DashboardReporter(), mirror) as after,
    ):
        for value, ended in ((0.5, COMPLETE), (0.7, COMPLETE), (0.1, PRUNED), (0.2, None)):
            number = _trial(study, far, value, ended)
            (study.folder.attempt(number, 1) / UPLOADING / "left").mkdir(parents=True)
            record = study.trial(number)
            assert record is not None
            if ended is not None:
                after(record)
    assert far.complete_paths() == [
        "trials/0000/1/end",
        "trials/0001/1/end",
        "trials/0001/1/model",
        "trials/0002/1/end",
        "trials/0003/1/checkpoints/step-00000004",
    ], "the best one's weights, no checkpoint but the running trial's, and what the pruned one left"
    assert not (study.folder.attempt(0, 1) / "model").exists()
    assert not (study.folder.attempt(2, 1) / UPLOADING).exists()


def test_a_new_disk_gets_what_it_lacks_and_the_mirror_what_it_lacks(study: Study, far: Mirror) -> None:
    for value, ended in ((0.5, COMPLETE), (0.7, COMPLETE), (0.1, PRUNED), (0.2, None)):
        _trial(study, far, value, ended)
    far.write("trials/0000/1/checkpoints/step-00000008/a", b"half of an upload")
    shutil.rmtree(study.folder.path / "trials" / "0000")
    shutil.rmtree(study.folder.path / "trials" / "0001")
    far.remove("trials/0001/1/model")
    write_text(study.folder.attempt(1, 1) / "model" / "model.safetensors", "weights of 1")
    view = SilentView()
    with maintain_mirror(study, view):
        assert (study.folder.attempt(0, 1) / "samples.jsonl").read_text() == "0\n"
        assert not (study.folder.attempt(0, 1) / "model").exists(), "not one of the best"
        assert (study.folder.attempt(1, 1) / "samples.jsonl").read_text() == "1\n"
        assert not study.folder.attempt(3, 1).joinpath(".fetched").exists()
    assert "mirror: downloaded results of 2 of 2 ended trials" in view.said
    assert "trials/0001/1/model" in far.complete_paths()
    assert "trials/0002/1/end" in far.complete_paths()
    assert [name for name in far.files() if "/checkpoints/" in name and "0003" not in name] == []
    shutil.rmtree(study.folder.path / "trials")
    with maintain_mirror(study, view):
        assert (study.folder.attempt(1, 1) / "model" / "model.safetensors").read_text() == "weights of 1"
    assert not [event for event in study.events() if event.kind == "mirror"]


def test_a_driver_that_was_overtaken_leaves_the_mirror_alone(
    study: Study, far: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [_trial(study, far, value, COMPLETE) for value in (0.5, 0.7)]
    record, before = study.trial(numbers[0]), sorted(far.files())
    assert record is not None
    maintenance = MirrorMaintenance(study, SilentView())
    with Study.open(study.folder) as newer:
        newer.start_driving()
        monkeypatch.setattr(driver_lease, "SILENCE_TIMEOUT", 0.0)  # as if this one had slept so long
        maintenance.on_removed(record, True)
        maintenance.shut_down()
        maintenance._thread.join()  # pyright: ignore[reportPrivateUsage]
    assert sorted(far.files()) == before


def test_trouble_is_tried_again_told_and_in_nobodys_way(
    study: Study, far: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = study.trial(_trial(study, far, 0.5, COMPLETE))
    assert record is not None
    tries, view = [], SilentView()

    def refuse(*_: object) -> None:
        tries.append(threading.current_thread().name)
        raise MirrorRefused("503") if len(tries) < 4 else ValueError("ours")

    monkeypatch.setattr(Mirror, "remove", refuse)
    maintenance = MirrorMaintenance(study, view, waits=(0.0, 0.0))
    maintenance.on_removed(record, False)
    maintenance.shut_down()
    assert len(tries) == 6, "three for what was asked, three for what both sides agree on at the end"
    assert set(tries) == {"mirror"}
    logged = [event.text for event in study.events() if event.kind == "mirror"]
    assert logged == ["given up after 3 tries: 503", "given up after 3 tries: ours"]
    assert "mirror: given up after 3 tries: 503" in view.said


def test_an_end_that_cannot_wait_says_so(study: Study, far: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    held_trial = threading.Event()
    monkeypatch.setattr(mirror_maintenance, "_FINISH_TIMEOUT", 0.05)
    monkeypatch.setattr(Mirror, "files", lambda *_: held_trial.wait(LIMIT_SECONDS) and [])
    MirrorMaintenance(study, SilentView(), waits=()).shut_down()
    held_trial.set()
    assert any("the next resume continues it" in event.text for event in study.events() if event.kind == "mirror")


def test_a_worker_s_words_reach_history_and_terminal(study: Study) -> None:
    view = SilentView()
    controller = make_controller(study, ListSink(), view)
    task = controller.next_attempt(1)
    assert task.mirror.endswith("/far/s/trials/0000")
    controller.on_report(task.id, AttemptReport((), None, 7, {"mirror_failures": 1}, ("a copy failed (503)",)))
    assert [(e.trial, e.text) for e in study.events() if e.kind == "mirror"] == [(0, "a copy failed (503)")]
    assert "trial 0: a copy failed (503)" in view.said


def test_the_sweep_s_own_files_are_there(study: Study, far: Mirror) -> None:
    write_text(study.folder.spec, "name: s\n")
    write_text(study.folder.path / "data.json", "{}")
    claim_mirror(study)
    assert (far.read("sweep.yaml"), far.read("data.json")) == (b"name: s\n", b"{}")
    assert far.read("study") == study.id.encode()
