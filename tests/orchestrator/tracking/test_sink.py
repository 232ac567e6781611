"""What every receiver must do, whatever stands behind it. A new one inherits `ReceiverContract` and shows its runs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.interfaces import MessageRejected, TrackingReceiver
from orchestrator.tracking.mlflow_receiver import RUN, SWEEP_ID, MlflowReceiver, param_text
from orchestrator.tracking.outbox import Outbox
from tests.support.processes import LIMIT_SECONDS
from trainer.results import StepMetrics


@dataclass
class Seen:
    """A run as the receiver shows it. `points` lists (step, value) of each metric, doubled ones twice."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    status: str = "RUNNING"
    parent: bool = False
    artifacts: list[str] = field(default_factory=list)


class ReceiverContract(ABC):
    @abstractmethod
    def open(self, root: Path) -> TrackingReceiver:
        """A receiver onto what lies under `root`, as a new process would make it."""

    @abstractmethod
    def look(self, root: Path) -> dict[str, Seen]:
        """Every run by its name inside the sweep; a run that is there twice is an error."""

    def tell(self, to: TrackingReceiver, artifact: Path) -> None:
        to.start_run("sweep", name="s", params={}, tags={"state": "RUNNING"}, at=1.0)
        to.start_run("0", name="s 0", params={"loss.beta": 2.0, "lora": None}, tags={"attempt": "1"}, at=2.0)
        to.log_metrics("0", [StepMetrics(0, {"loss": 3.0, "rewards/margins": 0.1})], at=3.0)
        to.log_metrics(
            "0", [StepMetrics(1, {"loss": 2.0}), StepMetrics(2, {"loss": math.nan, "eval_loss": 1.5})], at=4.0
        )
        to.set_tags("0", {"reason": "none"})
        to.log_final_metrics("0", {"judge/win_rate": 0.5}, step=2, at=4.5)
        to.log_artifact("0", artifact, "samples")
        to.end_run("0", status="FINISHED", tags={"state": "COMPLETE"}, at=5.0)

    def expect(self, root: Path) -> None:
        seen = self.look(root)
        assert (sorted(seen), seen["0"].params) == (["0", "sweep"], {"loss.beta": "2.0", "lora": "null"})
        assert seen["0"].points["rewards/margins"] == [(0, 0.1)]
        assert seen["0"].points["eval_loss"] == [(2, 1.5)]
        assert seen["0"].points["judge/win_rate"] == [(2, 0.5)]
        loss = seen["0"].points["loss"]
        assert (loss[:2], [step for step, _ in loss]) == ([(0, 3.0), (1, 2.0)], [0, 1, 2])
        assert math.isnan(loss[2][1])
        assert {"attempt": "1", "reason": "none", "state": "COMPLETE"}.items() <= seen["0"].tags.items()
        assert (seen["0"].status, seen["sweep"].status) == ("FINISHED", "RUNNING")
        assert (seen["0"].parent, seen["sweep"].parent) == (True, False)
        assert seen["0"].artifacts == ["samples/a.txt"]

    @pytest.fixture
    def artifact(self, tmp_path: Path) -> Path:
        path = tmp_path / "a.txt"
        path.write_text("hello")
        return path

    def test_the_story_is_there(self, tmp_path: Path, artifact: Path) -> None:
        self.tell(self.open(tmp_path), artifact)
        self.expect(tmp_path)

    def test_told_again_it_changes_nothing(self, tmp_path: Path, artifact: Path) -> None:
        first = self.open(tmp_path)
        self.tell(first, artifact)
        self.tell(first, artifact)
        self.tell(self.open(tmp_path), artifact)
        self.expect(tmp_path)

    def test_steps_known_are_skipped_whatever_time_and_value_they_come_with(self, tmp_path: Path) -> None:
        to = self.open(tmp_path)
        to.start_run("sweep", name="s", params={}, tags={}, at=1.0)
        to.start_run("0", name="0", params={}, tags={}, at=1.0)
        to.log_metrics("0", [StepMetrics(1, {"loss": 1.0}), StepMetrics(2, {"loss": 2.0})], at=3.0)
        for again in (to, self.open(tmp_path)):
            again.log_metrics(
                "0",
                [StepMetrics(1, {"loss": 9.0}), StepMetrics(2, {"loss": 2.0}), StepMetrics(3, {"loss": 3.0})],
                at=4.0,
            )
        assert self.look(tmp_path)["0"].points["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]

    def test_a_value_told_anew_is_the_newest(self, tmp_path: Path) -> None:
        to = self.open(tmp_path)
        to.start_run("sweep", name="s", params={}, tags={}, at=1.0)
        for again, value in enumerate((0.5, 0.5, 0.75, 0.75)):
            to.log_final_metrics("sweep", {"judge/win_rate": value}, step=0, at=2.0 + again)
        assert self.look(tmp_path)["sweep"].points["judge/win_rate"] == [(0, 0.5), (0, 0.75)]

    def test_a_run_that_begins_again_keeps_what_it_has(self, tmp_path: Path) -> None:
        to = self.open(tmp_path)
        to.start_run("sweep", name="s", params={}, tags={}, at=1.0)
        to.start_run("0", name="0", params={"a": 1}, tags={"attempt": "1"}, at=1.0)
        to.end_run("0", status="KILLED", tags={"state": "INTERRUPTED"}, at=2.0)
        to.start_run("0", name="0", params={"a": 2, "b": 3}, tags={"attempt": "2"}, at=3.0)
        seen = self.look(tmp_path)["0"]
        assert (seen.params, seen.tags["attempt"], seen.status) == ({"a": "1", "b": "3"}, "2", "RUNNING")

    def test_a_run_never_started_is_refused(self, tmp_path: Path) -> None:
        to = self.open(tmp_path)
        with pytest.raises(MessageRejected, match="never started"):
            to.log_metrics("7", [StepMetrics(1, {"loss": 1.0})], at=1.0)

    def test_a_file_that_is_gone_is_refused(self, tmp_path: Path) -> None:
        to = self.open(tmp_path)
        to.start_run("sweep", name="s", params={}, tags={}, at=1.0)
        with pytest.raises(MessageRejected, match="no longer exists"):
            to.log_artifact("sweep", tmp_path / "never")

    def test_many_metrics_params_and_long_texts(self, tmp_path: Path) -> None:
        to = self.open(tmp_path)
        to.start_run("sweep", name="s", params={}, tags={}, at=1.0)
        params = {f"p.{i}": i for i in range(250)} | {"long": "x" * 20_000}
        to.start_run("0", name="0", params=params, tags={"long": "y" * 20_000}, at=1.0)
        to.log_metrics("0", [StepMetrics(s, {f"m/{i}": float(i) for i in range(60)}) for s in range(40)], at=2.0)
        seen = self.look(tmp_path)["0"]
        assert len(seen.params) == 251
        assert all(len(seen.points[f"m/{i}"]) == 40 for i in range(60))
        assert seen.params["long"].startswith("xxxx")
        assert seen.tags["long"].startswith("yyyy")

    def test_through_an_outbox(self, tmp_path: Path, artifact: Path) -> None:
        for _ in range(2):
            box = Outbox(tmp_path / "outbox", self.open(tmp_path))
            self.tell(box, artifact)
            assert box.close(LIMIT_SECONDS) == 0
        self.expect(tmp_path)


class InMemory:
    """The contract in its plainest form."""

    def __init__(self, runs: dict[str, Seen]) -> None:
        self._runs = runs

    def start_run(self, run: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str], at: float) -> None:
        seen = self._runs.setdefault(run, Seen(parent=run != "sweep"))
        seen.params = {k: param_text(v) for k, v in params.items()} | seen.params
        seen.tags |= tags
        seen.status = "RUNNING"

    def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
        mine = self._of(run).points
        last = max((step for logged in mine.values() for step, _ in logged), default=-1)
        for step_metrics in metrics:
            if step_metrics.step > last:
                for name, value in step_metrics.metrics.items():
                    mine.setdefault(name, []).append((step_metrics.step, value))

    def log_final_metrics(self, run: str, values: Mapping[str, float], *, step: int, at: float) -> None:
        mine = self._of(run).points
        for name, value in values.items():
            if not mine.get(name) or mine[name][-1][1] != value:
                mine.setdefault(name, []).append((step, value))

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        self._of(run).tags |= tags

    def log_artifact(self, run: str, path: Path, folder: str = "") -> None:
        if not path.exists():
            raise MessageRejected(f"{path} no longer exists")
        name = f"{folder}/{path.name}"
        if name not in self._of(run).artifacts:
            self._of(run).artifacts.append(name)

    def end_run(self, run: str, *, status: str, tags: Mapping[str, str], at: float) -> None:
        self._of(run).tags |= tags
        self._of(run).status = status

    def _of(self, run: str) -> Seen:
        if run not in self._runs:
            raise MessageRejected(f"run {run!r} was never started")
        return self._runs[run]


class TestInMemory(ReceiverContract):
    @pytest.fixture(autouse=True)
    def _empty(self) -> None:
        self.runs: dict[str, Seen] = {}

    def open(self, root: Path) -> TrackingReceiver:
        return InMemory(self.runs)

    def look(self, root: Path) -> dict[str, Seen]:
        return self.runs


class TestMlflow(ReceiverContract):
    @pytest.fixture(autouse=True)
    def _migrated(self, tmp_path: Path, empty_mlflow: Path) -> None:
        (tmp_path / "mlflow.db").write_bytes(empty_mlflow.read_bytes())

    def open(self, root: Path) -> TrackingReceiver:
        return MlflowReceiver(root, uri=_uri(root), experiment="e", sweep_id="id", sweep="s")

    def look(self, root: Path) -> dict[str, Seen]:
        from mlflow import MlflowClient

        client = MlflowClient(_uri(root))
        runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
        named = {run.data.tags[RUN]: run for run in runs}
        assert len(named) == len(runs), "a run is there twice"
        found = {}
        for name, run in named.items():
            assert run.data.tags[SWEEP_ID] == "id"
            history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
            parent = run.data.tags.get("mlflow.parentRunId")
            assert parent in (None, named["sweep"].info.run_id)
            listed = client.list_artifacts(run.info.run_id, "samples")
            found[name] = Seen(
                params=dict(run.data.params),
                tags=dict(run.data.tags),
                points={key: sorted((m.step, m.value) for m in logged) for key, logged in history.items()},
                status=run.info.status,
                parent=parent is not None,
                artifacts=[file.path for file in listed],
            )
        return found

    def test_a_course_is_its_messages_one_after_the_other_in_one_call(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow import MlflowClient

        calls: list[int] = []
        real = MlflowClient.log_batch

        def counting(client: Any, run_id: str, metrics: Sequence[Any] = (), **more: Any) -> Any:
            calls.append(len(metrics))
            return real(client, run_id, metrics=metrics, **more)

        monkeypatch.setattr(MlflowClient, "log_batch", counting)
        logged = [([StepMetrics(k, {"loss": float(k)})], 2.0 + k) for k in range(60)]
        logged.insert(
            30, ([StepMetrics(29, {"loss": 9.0}), StepMetrics(30, {"loss": 30.0})], 99.0)
        )  # one known, one told twice
        for _ in range(2):
            to = self.open(tmp_path)
            to.start_run("sweep", name="s", params={}, tags={}, at=1.0)
            to.start_run("0", name="0", params={}, tags={}, at=1.0)
            to.log_metric_history("0", logged)
        assert calls == [60]
        assert self.look(tmp_path)["0"].points["loss"] == [(k, float(k)) for k in range(60)]
        client = MlflowClient(_uri(tmp_path))
        run = client.search_runs([client.get_experiment_by_name("e").experiment_id], f"tags.`{RUN}` = '0'")[0]
        times = {m.step: m.timestamp for m in client.get_metric_history(run.info.run_id, "loss")}
        assert times == {k: 99_000 if k == 30 else 2000 + 1000 * k for k in range(60)}

    def test_a_file_that_a_killed_driver_was_attaching_leaves_nothing_behind(
        self, tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        self.tell(self.open(tmp_path), artifact)
        (tmp_path / "b.txt").write_text("b")
        with monkeypatch.context() as killed:  # before MLflow renames its temporary file, and without its clean-up
            killed.setattr(LocalArtifactRepository, "_publish_staged_artifact", lambda *_, **__: 1 / 0)
            killed.setattr(LocalArtifactRepository, "_cleanup_staged_artifact", lambda *_: None)
            with pytest.raises(ZeroDivisionError):
                self.open(tmp_path).log_artifact("0", tmp_path / "b.txt", "samples")
        folder = next(tmp_path.rglob("artifacts/samples"))
        assert len(list(folder.iterdir())) == 2
        self.open(tmp_path).log_artifact("0", tmp_path / "b.txt", "samples")
        assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.txt"]


def _uri(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"
