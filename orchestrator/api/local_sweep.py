"""`Sweep`: a sweep of this machine's runs folder; `open_sweep` finds one, `list_sweeps` lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api.sweep_handle import MetricPoint, Report, Settings, SweepHandle, as_overrides
from orchestrator.folders import SweepFolder, existing_sweep, lock_holder, runs_folder

if TYPE_CHECKING:
    import pandas

    from orchestrator.commands.judge_sweep import ConfirmCost
    from orchestrator.driver.judge_stage import JudgeResult

Log = Callable[[str], None]


def open_sweep(name: str, runs: Path | None = None) -> Sweep:
    """Return an existing sweep. `runs`: the runs folder; default $ORCHESTRATE_HOME, or ./runs.

    Raises:
        NoSuchSweep: there is none of this name; the message has the most similar one.
    """
    return Sweep(existing_sweep((runs or runs_folder()).resolve(), name))


def list_sweeps(runs: Path | None = None, *, with_disk: bool = False) -> pandas.DataFrame:
    """Return a frame with one row per sweep, the newest first, indexed by name.

    Columns: state, why, finished and planned trials, metric, best trial and its value, begin; `with_disk`: bytes on
    disk, and archived sweeps too.
    """
    from orchestrator.commands.runs_folder.sweep_list import list_sweeps as read_list

    sweeps = read_list((runs or runs_folder()).resolve(), with_disk=with_disk)["sweeps"]
    frame = sweeps_frame(sweeps)
    return frame.assign(disk=[sweep["disk"] for sweep in sweeps]) if with_disk else frame


def sweeps_frame(sweeps: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Return the entries of `list --json` as a frame."""
    import pandas

    rows: list[dict[str, Any]] = []
    for sweep in sweeps:
        best, objective = sweep.get("best") or {}, sweep.get("goal") or {}
        row = {key: sweep.get(key) for key in ("name", "state", "why", "finished", "planned")}
        row |= {"metric": objective.get("metric"), "trial": best.get("trial"), "value": best.get("value")}
        rows.append(row | {"began": pandas.Timestamp(sweep["began"], unit="s", tz="UTC")})
    columns = ["name", "state", "why", "finished", "planned", "metric", "trial", "value", "began"]
    return pandas.DataFrame(rows, columns=pandas.Index(columns)).set_index("name")


def unarchive(name: str, url: str | None = None, *, runs: Path | None = None, log: Log | None = None) -> Sweep:
    """Bring an archived sweep back. `url`: of `archive`; known for what was archived from this runs folder."""
    from orchestrator.commands.runs_folder.sweep_archive import unarchive_sweep

    root = (runs or runs_folder()).resolve()
    unarchive_sweep(name, root, url, log or _ignore)
    return open_sweep(name, root)


class Sweep(SweepHandle):
    """A sweep in a runs folder of this machine. `folder` has the paths of its files."""

    def __init__(self, folder: SweepFolder) -> None:
        """`folder`: of a sweep that exists."""
        self.folder, self.name, self._root = folder, folder.name, folder.root

    def __repr__(self) -> str:
        return f"Sweep({str(self.folder.path)!r})"

    # --- looking -----------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return state, best trial and all trials; see `SweepHandle`."""
        from orchestrator.commands.status import status

        return status(self.name, self._root)

    def history(self) -> dict[str, Any]:
        """Return events and changes; see `SweepHandle`."""
        from orchestrator.commands.status import history

        return history(self.name, self._root)

    def best(self) -> dict[str, Any]:
        """Return the best configuration so far; see `SweepHandle`."""
        from orchestrator.commands.status import best
        from orchestrator.report_data import reasons_not_to_export

        found = best(self.name, self._root)
        return {**found, "do_not_use": reasons_not_to_export(self.name, self._root, found["number"])}

    def report(self, to: Path | None = None) -> Report:
        """Write the report and return it. `to`: its file; default report.html in the sweep's folder.

        Raises:
            NothingToReport: no trial has started.
            StorageRefused: the file cannot be written.
        """
        from orchestrator.report_data import report

        conclusions = report(self.name, self._root, to)
        file = Path(conclusions["file"])
        return Report(conclusions, file.read_text(encoding="utf-8"), file)

    def suggest(self, to: Path | None = None) -> str:
        """Return a follow-up sweep file; see `SweepHandle`."""
        from orchestrator.report_data import suggest

        return suggest(self.name, self._root, to)

    def log(self, trial: int | None = None, *, attempt: int | None = None) -> list[str]:
        """Return the lines of the log; see `SweepHandle`."""
        from orchestrator.commands.runs_folder.sweep_logs import SweepLog
        from orchestrator.redaction import redact

        with SweepLog.open(self.name, self._root, trial, attempt) as log:
            return [redact(line) for line in log.new_lines()]

    def follow(self, trial: int | None = None) -> Iterator[list[str]]:
        """Yield new lines of the log; see `SweepHandle`."""
        from orchestrator.commands.runs_folder.sweep_logs import SweepLog
        from orchestrator.redaction import redact

        with SweepLog.open(self.name, self._root, trial) as log:
            for lines in log.followed():
                yield [redact(line) for line in lines]

    def is_driven(self) -> bool:
        """Return whether a driver runs the sweep on this machine."""
        return lock_holder(self.folder) is not None

    def _metric_points(self, trials: Sequence[int] | None, since: int) -> Iterator[MetricPoint]:
        from orchestrator.commands.request_commands import record_of
        from orchestrator.study.reader import StudyReader

        if not StudyReader.exists(self.folder):
            return
        with StudyReader.open(self.folder, read_only=True) as study:
            chosen = study.trials() if trials is None else [record_of(study, number) for number in trials]
            for record in chosen:
                for point in study.metric_history(record.number):
                    if point.step > since:
                        yield record.number, point.step, point.metrics

    # --- verbs -------------------------------------------------------------------------------------------------------

    def _request(self, kind: str, trial: int | None, why: str) -> list[str]:
        from orchestrator.commands.request_commands import request_control

        return request_control(self.name, self._root, kind, trial, why)

    def abandon(self, *, why: str = "") -> list[str]:
        """End the sweep for good, running or not; see `SweepHandle`."""
        if self.is_driven():
            return self._request("abandon", None, why)
        from orchestrator.api.driving import abandon

        notices: list[str] = []
        ended = abandon(self.folder, why, notices.append)
        return [*notices, ended]

    def retry(self, trials: Sequence[int], *, why: str = "") -> list[str]:
        """Try failed trials again; see `SweepHandle`."""
        from orchestrator.commands.request_commands import request_retries

        return request_retries(self.name, self._root, trials, why)

    def set_budget(self, settings: Settings) -> list[str]:
        """Change the budget; see `SweepHandle`."""
        from orchestrator.commands.budget_control import set_budget

        return set_budget(self.name, self._root, as_overrides(settings))

    def enqueue(self, settings: Settings, *, again: bool = False) -> list[str]:
        """Enqueue a trial; see `SweepHandle`."""
        from orchestrator.commands.request_commands import enqueue_trial

        return enqueue_trial(self.name, self._root, as_overrides(settings), again=again)

    def clone(self, trial: int, settings: Settings = (), *, from_checkpoint: bool = False, why: str = "") -> list[str]:
        """Enqueue a copy of a trial with some settings changed; see `SweepHandle`."""
        from orchestrator.commands.request_commands import enqueue_clone

        changes = as_overrides(settings)
        return enqueue_clone(self.name, self._root, trial, changes, why, from_checkpoint=from_checkpoint)

    def resume(
        self,
        overrides: Settings = (),
        *,
        retry_failed: bool = False,
        detach: bool = False,
        show_progress: bool = True,
        check: bool = True,
    ) -> Sweep:
        """Resume the sweep; `orchestrator.api.resume` has the other arguments and what is raised."""
        from orchestrator.api.sweep_runs import resume

        return resume(
            self.name,
            overrides,
            retry_failed=retry_failed,
            detach=detach,
            show_progress=show_progress,
            check=check,
            runs=self._root,
        )

    def judge(
        self,
        settings: Settings = (),
        *,
        confirm_cost: ConfirmCost | None = None,
        trust_remote_code: bool = False,
        set_activity: Log | None = None,
        log: Log | None = None,
    ) -> JudgeResult:
        """Compute win rates of the best trials against the initial model.

        Args:
            settings: changes of `judge.*` for this call.
            confirm_cost: called with a paid endpoint and its estimated use before it is called; None refuses it.
            trust_remote_code: whether Python code of the model's repository may run.
            set_activity: called with the current stage of the work.
            log: called with each message.

        Raises:
            NoTrialCompleted, SpecError, SweepHeld: nothing was computed.
            CostNotConfirmed: a paid endpoint was not confirmed; nothing was called.
        """
        from dashboards.sweep_reporter import DashboardReporter
        from orchestrator.commands.judge_sweep import judge_sweep

        return judge_sweep(
            self.name,
            self._root,
            as_overrides(settings),
            set_activity=set_activity or _ignore,
            log=log or _ignore,
            confirm_cost=confirm_cost or _refuse_cost,
            reporter=DashboardReporter(),
            trust_remote_code=trust_remote_code,
        )

    def export(
        self,
        to: Path | str,
        *,
        merge: bool = False,
        compare: bool = True,
        trust_remote_code: bool = False,
        log: Log | None = None,
    ) -> Path:
        """Write the best trial's model and its card into the new folder `to`.

        Args:
            to: a folder that does not exist yet.
            merge: merge LoRA adapters into the weights.
            compare: load the result with plain transformers and compare its log-probs with the trial's.
            trust_remote_code: whether Python code of the model's repository may run.
            log: called with each message.

        Raises:
            NoTrialCompleted, CannotExport, OtherModel: nothing was written.
        """
        from orchestrator.commands.model_export import export_best_model

        return export_best_model(
            self.name,
            self._root,
            Path(to),
            merge,
            compare=compare,
            trust_remote_code=trust_remote_code,
            log=log or _ignore,
        )

    def delete(self, *, keep_mlflow: bool = False, confirm: Callable[[Sequence[str]], None] | None = None) -> int:
        """Delete the sweep; see `SweepHandle`."""
        from orchestrator.commands.runs_folder.sweep_deletion import delete_sweep, plan_deletion

        deletion = plan_deletion(self.name, self._root, keep_mlflow=keep_mlflow)
        if confirm is not None:
            confirm(deletion.lines())
        delete_sweep(deletion)
        return deletion.frees

    def archive(self, url: str, *, log: Log | None = None) -> None:
        """Move the sweep to a URL; see `SweepHandle`."""
        from orchestrator.commands.runs_folder.sweep_archive import archive_sweep

        archive_sweep(self.name, self._root, url, log or _ignore)


def _ignore(_: str) -> None:
    """Receive a message that the caller does not want."""


def _refuse_cost(endpoint: Any, expected: Any) -> bool:
    from orchestrator.driver.judge_stage import CostNotConfirmed

    raise CostNotConfirmed(f"judge.endpoint: {expected} of {endpoint.model} needs a confirmation: give confirm_cost")
