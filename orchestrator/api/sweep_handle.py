"""`SweepHandle`: what can be seen of a sweep and done with it, whether it is on this machine or behind a service.

Verbs store a request, which the sweep's driver carries out; they return notices about its effect, as the command of the
same name prints.
"""

from __future__ import annotations

import html
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from orchestrator.errors import ExitCode, NoTrialCompleted, SpecError, SpecProblem, SweepIncomplete

if TYPE_CHECKING:
    import pandas

Settings = Mapping[str, Any] | Sequence[str]
"""Changes of settings: {"loss.beta": 2.5}, or ["loss.beta=2.5"] as after `--set`."""
MetricPoint = tuple[int, int, Mapping[str, float]]
"""Trial, update, metrics."""
_POLL_SECONDS = 1.0
_SHOWN_TRIALS = 20
_FRAME_HEIGHT = 720
"""Pixels of a report inside a notebook."""
_TRIAL_COLUMNS = ("state", "diverged", "value", "step", "steps", "attempts", "origin", "parent", "reason")


@dataclass(frozen=True, slots=True)
class Report:
    """A sweep's report; a notebook shows the page.

    Attributes:
        conclusions: best trial, findings and importances, as printed by `report --json`.
        page: the HTML page, which needs no other file and no network.
        file: where it was written; None for a sweep of a service.
    """

    conclusions: Mapping[str, Any]
    page: str = field(repr=False)
    file: Path | None = None

    def _repr_html_(self) -> str:
        page = html.escape(self.page, quote=True)
        style = f"width: 100%; height: {_FRAME_HEIGHT}px; border: 0"
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="{style}"></iframe>'


class SweepHandle(ABC):
    """A sweep that exists. `orchestrator.api.open_sweep` returns one of this machine."""

    name: str

    # --- looking -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """Return state, best trial and all trials, as printed by `status --json`."""

    @abstractmethod
    def history(self) -> dict[str, Any]:
        """Return the sweep's events and the changes of its spec, as printed by `history --json`."""

    @abstractmethod
    def best(self) -> dict[str, Any]:
        """Return the best configuration so far, as printed by `best --json`.

        `do_not_use` lists why the diagnosis advises against its model.

        Raises:
            NoTrialCompleted: no trial is complete.
        """

    @abstractmethod
    def report(self, to: Path | None = None) -> Report:
        """Make the report from the trials as they are now. `to`: a file for the page.

        Raises:
            NothingToReport: no trial has started.
        """

    @abstractmethod
    def suggest(self, to: Path | None = None) -> str:
        """Return a follow-up sweep file with a reason for each range, also written to the new file `to`.

        Raises:
            NothingLearned: no search range can be derived from the trials.
            OutputExists: `to` exists already.
        """

    @abstractmethod
    def log(self, trial: int | None = None, *, attempt: int | None = None) -> list[str]:
        """Return the lines of the sweep's log, or of one trial's or attempt's, as printed by `logs`."""

    @abstractmethod
    def follow(self, trial: int | None = None) -> Iterator[list[str]]:
        """Yield new lines of the log as they come, until the sweep's driver or the trial has ended."""

    @abstractmethod
    def is_driven(self) -> bool:
        """Return whether a driver runs the sweep, or will as soon as GPUs are free."""

    @abstractmethod
    def _metric_points(self, trials: Sequence[int] | None, since: int) -> Iterator[MetricPoint]: ...

    def trials(self) -> pandas.DataFrame:
        """Return a frame with one row per trial, indexed by its number.

        Columns: state, value of the objective, updates done and planned, attempts, origin, reason; then `params.PATH`
        and `metrics.NAME`, as MLflow's `search_runs` names them. With several objectives also `values.METRIC`.
        """
        import pandas

        found = self.status()
        rows = [_trial_row(trial, found.get("goals") or ()) for trial in found["trials"]]
        index = pandas.Index([trial["number"] for trial in found["trials"]], name="trial", dtype="int64")
        columns = dict.fromkeys([*_TRIAL_COLUMNS, *(column for row in rows for column in row)])
        return pandas.DataFrame(rows, index=index, columns=pandas.Index(list(columns)))

    def metrics(
        self, names: Sequence[str] | None = None, *, trials: Sequence[int] | None = None, since: int = -1
    ) -> pandas.DataFrame:
        """Return the learning curves: one row per trial and update with metrics, indexed by both.

        Args:
            names: metrics to return; None for all. A metric that no trial has is an empty column.
            trials: numbers of the trials; None for all.
            since: only updates after this one. Update 0 is the initial model.
        """
        import pandas

        points = list(self._metric_points(trials, since))
        index = pandas.MultiIndex.from_tuples([point[:2] for point in points], names=["trial", "step"])
        if not points:
            index = pandas.MultiIndex.from_arrays([[], []], names=["trial", "step"])
        columns = (
            list(names) if names is not None else list(dict.fromkeys(name for *_, each in points for name in each))
        )
        return pandas.DataFrame([dict(each) for *_, each in points], index=index, columns=pandas.Index(columns))

    def wait(self, *, timeout: float | None = None, check: bool = True) -> ExitCode:
        """Wait until no driver runs the sweep; return the exit code that `orchestrate sweep` would have had.

        Args:
            timeout: seconds; None waits as long as it takes.
            check: raise where that code is not 0.

        Raises:
            TimeoutError: the sweep is still running.
            NoTrialCompleted, SweepIncomplete: with `check`, it ended without a complete trial, or otherwise incomplete.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self.is_driven():
            left = _POLL_SECONDS if until is None else until - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{self.name} still runs after {timeout:g} seconds")
            time.sleep(min(left, _POLL_SECONDS))
        code, reason = ending(self.status())
        if check:
            raise_incomplete(self.name, code, reason)
        return code

    def _repr_html_(self) -> str:
        found, shown = self.status(), self.trials()
        params = [column for column in shown.columns if column.startswith("params.")]
        columns = ["state", "value", "step", *params]
        more = f"<p>and {len(shown) - _SHOWN_TRIALS} trials more</p>" if len(shown) > _SHOWN_TRIALS else ""
        why = f": {found['why']}" if found.get("why") else ""
        head = html.escape(f"{self.name} is {found['state']}{why}")
        return f"<p>{head}</p>{shown[columns].head(_SHOWN_TRIALS).to_html()}{more}"

    # --- verbs -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _request(self, kind: str, trial: int | None, why: str) -> list[str]: ...

    def stop(self, trial: int | None = None, *, why: str = "") -> list[str]:
        """Stop the sweep with checkpoints, so that it can be resumed, or one trial for good, which ends as PRUNED."""
        return self._request("stop", trial, why or "stopped")

    def pause(self, trial: int | None = None, *, why: str = "") -> list[str]:
        """Pause one trial, which frees its slot, or the whole sweep."""
        return self._request("pause", trial, why)

    def unpause(self, trial: int | None = None, *, why: str = "") -> list[str]:
        """Continue a paused trial, or a paused sweep."""
        return self._request("unpause", trial, why)

    def prune(self, trial: int, *, why: str) -> list[str]:
        """Prune one trial with a reason, which the history keeps."""
        return self._request("prune", trial, why)

    @abstractmethod
    def abandon(self, *, why: str = "") -> list[str]:
        """End the sweep for good, running or not: unfinished trials end as PRUNED."""

    @abstractmethod
    def retry(self, trials: Sequence[int], *, why: str = "") -> list[str]:
        """Try failed trials again, each with its number and configuration."""

    @abstractmethod
    def set_budget(self, settings: Settings) -> list[str]:
        """Change the budget without a stop: budget.trials, hours, gpu_hours, target and concurrency; None: no limit."""

    @abstractmethod
    def enqueue(self, settings: Settings, *, again: bool = False) -> list[str]:
        """Enqueue a trial with these settings, the others as in `base`; it runs next, on top of budget.trials.

        `again`: train a trial with these settings once more, with another training.seed.
        """

    @abstractmethod
    def clone(self, trial: int, settings: Settings = (), *, from_checkpoint: bool = False, why: str = "") -> list[str]:
        """Enqueue a copy of a trial with some settings changed.

        `from_checkpoint`: it starts from the trial's newest checkpoint instead of the initial model.
        """

    @abstractmethod
    def delete(self, *, keep_mlflow: bool = False, confirm: Callable[[Sequence[str]], None] | None = None) -> int:
        """Delete the sweep: its folder, its study and its runs in MLflow; return the bytes that were freed.

        Args:
            keep_mlflow: leave its runs in MLflow.
            confirm: called with what is deleted before anything is; an exception of it keeps everything.

        Raises:
            SweepHeld: a driver runs it.
        """

    @abstractmethod
    def archive(self, url: str, *, log: Callable[[str], None] | None = None) -> None:
        """Move the sweep's folder to a URL of fsspec and free its disk; `unarchive` brings it back.

        Each file is compared by its digest before the folder is removed. The same call continues an interrupted one.
        """


def as_overrides(settings: Settings) -> tuple[str, ...]:
    """Return settings as PATH=VALUE, as after `--set`. Raises SpecError for a single text instead of a list of them."""
    if isinstance(settings, str):
        problem = "settings are a mapping or a list"
        raise SpecError([SpecProblem("", "", problem, f"write [{settings!r}]")])
    if isinstance(settings, Mapping):
        return tuple(
            f"{path}={json.dumps(value, ensure_ascii=False, default=plain_value)}" for path, value in settings.items()
        )
    return tuple(settings)


def plain_value(value: Any) -> Any:
    """Return paths, numbers of NumPy and other mappings and sequences as JSON has them; for `json.dumps`."""
    match value:
        case Path():
            return str(value)
        case Mapping():
            return dict(cast(Mapping[Any, Any], value))
        case Sequence():
            return list(cast(Sequence[Any], value))
        case _ if hasattr(value, "item"):
            return value.item()
        case _:
            raise TypeError(f"{value!r} cannot be the value of a setting")


def ending(status: Mapping[str, Any]) -> tuple[ExitCode, str]:
    """Return the exit code of a sweep that no driver runs, and why it ended, from its status."""
    from orchestrator.execution.stop_reasons import StopKind, exit_code

    why, state = str(status.get("why") or ""), status["state"]
    kinds = sorted(StopKind, key=lambda kind: len(kind.value), reverse=True)  # `paused trials` before `paused`
    kind = next((kind for kind in kinds if why.startswith(kind.value)), StopKind.INTERRUPTED)
    if state == "finished":
        kind = StopKind.FINISHED
    if state == "failed":  # in a service's queue: refused before its first trial
        return ExitCode.USER, why or state
    any_complete = any(trial["value"] is not None for trial in status["trials"])
    any_failed = bool(status.get("never_trained"))
    return exit_code(kind, any_complete=any_complete, any_failed=any_failed), why or str(state)


def raise_incomplete(name: str, code: ExitCode, reason: str) -> None:
    """Raise the error of a sweep that ended with this exit code; return where it is 0."""
    if code is ExitCode.DONE:
        return
    if code is ExitCode.NO_TRIAL_COMPLETED:
        raise NoTrialCompleted(f"no trial of {name} has completed: {reason}")
    raise SweepIncomplete(name, code, reason)


def _trial_row(trial: Mapping[str, Any], objectives: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row = {column: trial.get(column) for column in _TRIAL_COLUMNS} | {"value": _number(trial["value"])}
    if len(objectives) > 1:
        values = trial.get("values") or [None] * len(objectives)
        row |= {f"values.{each['metric']}": _number(value) for each, value in zip(objectives, values, strict=True)}
    row |= {f"params.{path}": value for path, value in trial["params"].items()}
    return row | {f"metrics.{name}": _number(value) for name, value in trial["metrics"].items()}


def _number(value: float | str | None) -> float | None:
    """Return a value of `status --json`, in which NaN and infinities are texts."""
    return None if value is None else float(value)
