"""`clone --from-checkpoint` survives kill -9: before the checkpoint is held, after it, and while it is used."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.request_commands import RequestRefused, enqueue_clone
from orchestrator.driver.checkpoint_retention import fork_lock, remove_unused_forks
from orchestrator.errors import SpecError
from orchestrator.folders import SweepFolder
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow_client import connect
from tests.support.local_driver import KILLED, STEPS, drive, forked, killed_at
from trainer.storage.checkpoint_manifest import checkpoint_path, list_checkpoints

RATE = "training.learning_rate=0.25"
CLONE = f"clone of trial 0 from its checkpoint of update 3 with {RATE}"
ASKING = ("folder.sync", "folder.rename", "folder.renamed", "checkpoint.pinned", "study.begun", "study.commit")
"""Where the terminal that asks is killed; nothing is queued then."""
DRIVING = (
    "study.committed",
    "outbox.append",
    "checkpoint.weights",
    "checkpoint.discarded",
    "fork.remove",
    "trial.told",
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep whose driver was killed: trial 0 has a checkpoint of update 3."""
    root = tmp_path_factory.mktemp("begun")
    assert forked(lambda: connect(root, f"sqlite:///{root / 'mlflow.db'}")) == 0
    assert killed_at(partial(drive, root), "checkpoint.discarded:1") == KILLED
    return root


@pytest.fixture
def root(begun: Path, fast_tmp_path: Path) -> Path:
    shutil.copytree(begun, fast_tmp_path / "runs")
    return fast_tmp_path / "runs"


def ask(root: Path, *sets: str) -> list[str]:
    return enqueue_clone("s", root, 0, list(sets) or [RATE], "try a smaller rate", from_checkpoint=True)


def trial_facts(root: Path) -> list[Any]:
    with Study.open(SweepFolder(root, "s")) as study:
        return [
            (r.number, r.state, dict(r.params), r.fork and r.fork.step, r.value, study.metric_history(r.number))
            for r in study.trials()
        ]


def fork_names(root: Path) -> list[str]:
    forks = SweepFolder(root, "s").forks
    return sorted(path.name for path in forks.iterdir()) if forks.is_dir() else []


def test_it_goes_on_from_the_checkpoint_and_is_told_of_everywhere(root: Path) -> None:
    messages = ask(root)
    assert messages[0].startswith(
        "enqueued a clone of trial 0 from its checkpoint of update 3 with training.learning_rate=0.25"
    )
    assert len(fork_names(root)) == 1
    assert forked(partial(drive, root)) == 0
    assert fork_names(root) == [], "it has a checkpoint of its own, or has ended"
    with Study.open(SweepFolder(root, "s")) as study:
        record = next(r for r in study.trials() if r.fork is not None)
        parent, mine = study.metric_history(0), study.metric_history(record.number)
        events = [e.text for e in study.events() if e.kind == "cloned"]
        assert [t.number for t in study.snapshots() if t.is_fork] == [record.number]
    assert (record.number, record.parent, record.fork and record.fork.step) == (1, 0, 3)
    assert record.origin.startswith(CLONE)
    assert record.origin.endswith(": try a smaller rate")
    assert events == [record.origin]
    assert [p.step for p in mine] == list(range(STEPS + 1))
    assert mine[:4] == parent[:4]
    assert all(a != b for a, b in zip(mine[4:], parent[4:], strict=True))
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])  # pyright: ignore[reportOptionalMemberAccess]
    (run,) = [run for run in runs if run.data.tags["prefsweep.run"] == "1"]
    assert (run.data.tags["clone.of"], run.data.tags["clone.from_update"]) == ("0", "3")
    assert run.data.tags["origin"] == record.origin


def test_killed_while_asking_and_asked_again(root: Path, fast_tmp_path: Path) -> None:
    calm = fast_tmp_path / "calm"
    shutil.copytree(root, calm)
    ask(calm)
    assert forked(partial(drive, calm)) == 0
    assert [killed_at(partial(ask, root), step_metrics) for step_metrics in ASKING] == [KILLED] * len(ASKING)
    with Study.open(SweepFolder(root, "s")) as study:
        assert study.enqueued_trials() == [], "killed before it was queued, it is not queued"
    assert len(fork_names(root)) > 0
    ask(root)
    assert forked(partial(drive, root)) == 0
    assert trial_facts(root) == trial_facts(calm)
    assert fork_names(root) == [], "what the killed terminals left behind is gone too"


def test_killed_while_it_runs_it_ends_as_if_nothing_had_been(root: Path, fast_tmp_path: Path) -> None:
    calm = fast_tmp_path / "calm"
    shutil.copytree(root, calm)
    for path in (root, calm):
        ask(path)
    assert forked(partial(drive, calm)) == 0
    deaths = [killed_at(partial(drive, root), f"{step_metrics}:{n}") for step_metrics in DRIVING for n in (1, 2)]
    assert deaths.count(KILLED) >= len(DRIVING)
    assert forked(partial(drive, root)) == 0
    assert trial_facts(root) == trial_facts(calm)
    assert fork_names(root) == []


def test_the_held_checkpoint_outlives_its_trial(root: Path) -> None:
    """The source goes on, removes its old checkpoints, ends and is tidied up before the clone begins."""
    ask(root)
    folder = SweepFolder(root, "s")
    shutil.rmtree(folder.trial(0))
    with Study.open(folder) as study:
        remove_unused_forks(folder, study)
    (path,) = fork_names(root)
    assert [p.name for p in list_checkpoints([folder.forks / path])] == ["step-00000003"]


def test_what_is_being_made_is_left_alone(root: Path) -> None:
    folder = SweepFolder(root, "s")
    (folder.forks / "abc").mkdir(parents=True)
    with Study.open(folder) as study:
        with fork_lock(folder):
            remove_unused_forks(folder, study)
            assert fork_names(root) == ["abc"]
        remove_unused_forks(folder, study)
    assert fork_names(root) == []


def test_what_a_checkpoint_cannot_go_on_under_is_refused_by_name(root: Path) -> None:
    with pytest.raises(SpecError) as refused:
        ask(root, "training.seed=1", "training.pairs_per_update=4", "loss.loss_type=hinge", RATE)
    cannot = "cannot change when training continues from a checkpoint"
    assert [(f.path, f.problem) for f in refused.value.problems] == [
        ("training.seed", f"{cannot}: the order of the pairs depends on this seed"),
        ("training.pairs_per_update", f"{cannot}: the position in the data is counted in updates of this size"),
        ("loss.loss_type", f"{cannot}: the metrics so far are of this loss"),
    ]
    assert "what may change: loss.beta, " in refused.value.problems[0].hint
    with pytest.raises(SpecError, match="is the same for all trials of this sweep"):
        ask(root, "model.attention=separate")
    with pytest.raises(
        RequestRefused, match=r"is of update 3, but the clone has 2 updates: set training.max_steps above 3"
    ):
        ask(root, "training.max_steps=2")
    assert fork_names(root) == []
    with Study.open(SweepFolder(root, "s")) as study:
        assert study.enqueued_trials() == []
    ask(root, "loss.beta=9", "training.max_steps=60", "training.weight_decay=0.1")


def test_without_a_good_checkpoint_it_is_refused(root: Path) -> None:
    (run,) = SweepFolder(root, "s").trial(0).glob("[0-9]*")
    (checkpoint_path(run, 3) / "state.json").write_text("{}")
    with pytest.raises(RequestRefused, match=r"no valid checkpoint yet: the checkpoint of update 3 is damaged"):
        ask(root)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(
        RequestRefused, match=r"no valid checkpoint yet: the first is written after `training.save_steps`"
    ):
        ask(root)
    assert forked(partial(drive, root)) == 0
    with pytest.raises(RequestRefused, match="is COMPLETE, and checkpoints of finished trials are removed"):
        ask(root)
    assert fork_names(root) == []
