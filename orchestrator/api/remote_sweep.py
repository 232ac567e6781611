"""`connect`, `Server` and `RemoteSweep`: the sweeps of a service (`orchestrate serve`) on this or another machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.api.service_client import ServiceClient, ServiceUnreachable, find_token, sweep_path
from orchestrator.api.sweep_handle import MetricPoint, Report, Settings, SweepHandle, as_overrides
from orchestrator.api.uploads import ModelNotSent, local_files, model_files, upload_file, upload_model
from orchestrator.errors import OrchestrateError, SpecError, StorageRefused
from orchestrator.folders import runs_folder
from trainer.results import clause

if TYPE_CHECKING:
    import pandas

    from orchestrator.api.sweep_files import Source
    from orchestrator.api.watched_sweep import Progress
    from trainer.results import StepMetrics

T = TypeVar("T")
Upload = Callable[[Mapping[str, Path]], bool] | bool
"""Whether the files of a sweep that are here are sent; a function gets them by their names and decides."""
_PAGE = 200
_PATIENCE_SECONDS, _AGAIN_SECONDS = 300.0, 2.0
"""How long a service that does not answer is asked again by a live table, and how often."""
_DRIVEN = frozenset({"waiting", "driven", "preparing", "running", "paused"})
"""States in which a driver runs the sweep, or will."""
_NAME_OF_TEXT = "sweep.yaml"
"""How a service names the text that it was sent, in the places of its mistakes."""
_ALL_LINES = 5000
"""The most lines of a log that a service returns."""


class NotThroughService(OrchestrateError):
    """A service does not offer this; nothing was done."""


def connect(url: str, token: str | None = None) -> Server:
    """Return a service after one request to it.

    Args:
        url: such as https://HOST:8787; http:// for this machine only.
        token: of a person; default $ORCHESTRATE_TOKEN, the file $ORCHESTRATE_TOKEN_FILE, or on this machine its own.

    Raises:
        InvalidServer: URL or token cannot be used.
        ServiceUnreachable, ServiceRefused: no service answers, or it does not accept the token.
    """
    server = Server(url, token)
    server.queue()
    return server


class Server:
    """A service. Its sweeps have the methods of those here; `url` is where it is."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """Arguments as of `connect`, which also asks the service."""
        self.client = ServiceClient(url, find_token(url, runs_folder()) if token is None else token)
        self.url = self.client.url

    def __repr__(self) -> str:
        return f"Server({self.url!r})"

    def open_sweep(self, name: str) -> RemoteSweep:
        """Return a sweep that has begun, waits or has ended. Raises NoSuchSweep."""
        sweep = RemoteSweep(self.client, name)
        sweep.status()
        return sweep

    def listed(self) -> dict[str, Any]:
        """Return all sweeps, the newest first, in the form of `list --json`, each with its row of the queue."""
        sweeps: list[Mapping[str, Any]] = []
        after: str | None = ""
        while after is not None:
            page = self.client.get("sweeps", after=after, limit=_PAGE)
            sweeps += page["sweeps"]
            after = page["next"]
        return {"runs_folder": self.url, "sweeps": sorted(sweeps, key=lambda sweep: sweep["began"], reverse=True)}

    def list_sweeps(self) -> pandas.DataFrame:
        """Return a frame with one row per sweep, as `orchestrator.api.list_sweeps`, with owner and priority."""
        from orchestrator.api.local_sweep import sweeps_frame

        sweeps = self.listed()["sweeps"]
        queued: list[Mapping[str, Any]] = [sweep.get("queue") or {} for sweep in sweeps]
        frame = sweeps_frame(sweeps)
        return frame.assign(**{key: [row.get(key) for row in queued] for key in ("owner", "priority")})

    def queue(self) -> list[dict[str, Any]]:
        """Return the sweeps that run or wait, in the order in which they start."""
        return self.client.get("queue")["queue"]

    def plan(
        self,
        source: Source,
        overrides: Settings = (),
        *,
        name: str | None = None,
        upload: Upload = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Return what a sweep would do on the service's machine, as `plan --json`.

        Arguments as of `submit`, which sends none of the files again.

        Raises:
            SpecError: with all errors of the file, each with its line.
            ModelNotSent: as of `submit`.
        """
        files = self._uploaded(source, overrides, upload, on_progress)
        return self._with_text("plan", source, overrides, {"name": name} | files)

    def submit(
        self,
        source: Source,
        overrides: Settings = (),
        *,
        name: str | None = None,
        priority: int = 0,
        upload: Upload = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> RemoteSweep:
        """Add a sweep to the service's queue; `wait` waits for its end.

        Args:
            source: path of the file here, or its content as a mapping.
            overrides: changes of settings.
            name: name of the sweep instead of the file's.
            priority: larger ones start first.
            upload: send the files of data and the model folders that the sweep names and that are here, each file once
                by its SHA-256; a function gets them by their names and decides. Without, the names are those of files
                on the service's machine.
            on_progress: called with the bytes of a file that have been sent, and all of it.

        Raises:
            SpecError: with all errors of the file, each with its line.
            NameTaken: the service has a sweep of this name.
            ModelNotSent: a model folder has code, pickles, or no weights as safetensors; nothing was sent.
        """
        more = {"name": name, "priority": priority} | self._uploaded(source, overrides, upload, on_progress)
        added = self._with_text("sweeps", source, overrides, more, creates=True)
        return RemoteSweep(self.client, added["name"], tuple(added["notices"]))

    def compare(self, *names: str) -> dict[str, Any]:
        """Compare sweeps by a common metric, as `compare --json`."""
        return self.client.get("compare", name=list(names))

    def comparison_table(self, *names: str) -> dict[str, Any]:
        """Compare sweeps in the cells and sentences that `compare` prints (`ComparisonTable`)."""
        return self.client.get("compare/table", name=list(names))

    def comparison_page(self, *names: str) -> str:
        """Compare sweeps on an HTML page, as `compare --output`."""
        return self.client.text("compare/page", name=list(names))

    def unarchive(self, name: str, url: str | None = None, *, log: Callable[[str], None] | None = None) -> RemoteSweep:
        """Bring an archived sweep back to the service's disk. `url`: of `archive`, which the service knows."""
        for notice in self.client.post(sweep_path(name, "unarchive"), {"url": url or ""})["notices"]:
            if log is not None:
                log(notice)
        return RemoteSweep(self.client, name)

    def _uploaded(
        self, source: Source, overrides: Settings, upload: Upload, on_progress: Callable[[int, int], None] | None
    ) -> dict[str, Any]:
        """Send the files of a sweep that are here, if wanted; return how a request names them as `files`."""
        found = self._local_files(source, overrides) if upload is not False else {}
        is_wanted = upload is True or (bool(found) and upload is not False and upload(found))
        return {"files": self._sent(found, on_progress)} if found and is_wanted else {}

    def _sent(self, found: Mapping[str, Path], on_progress: Callable[[int, int], None] | None) -> dict[str, str]:
        """Send files and model folders, after all of them were checked; return what a submission names each by."""
        problems: list[str] = []
        for path in found.values():
            if path.is_dir():
                try:
                    model_files(path)
                except ModelNotSent as error:
                    problems.append(str(error))
        if problems:
            raise ModelNotSent("\n".join(problems))
        send = {name: upload_model if path.is_dir() else upload_file for name, path in found.items()}
        return {name: send[name](self.client, path, on_progress) for name, path in found.items()}

    def _local_files(self, source: Source, overrides: Settings) -> dict[str, Path]:
        from orchestrator.spec.loading.overrides import parse_overrides
        from orchestrator.spec.loading.validation_errors import parse_document

        shown, text = _text_of(source)
        folders = [Path.cwd()] if isinstance(source, Mapping) else [Path(source).resolve().parent, Path.cwd()]
        tree = parse_document(text, shown).value
        return local_files(tree, parse_overrides(as_overrides(overrides)), folders)

    def _with_text(
        self, path: str, source: Source, overrides: Settings, more: Mapping[str, Any], *, creates: bool = False
    ) -> dict[str, Any]:
        shown, text = _text_of(source)
        body = {"yaml": text, "overrides": list(as_overrides(overrides)), **more}
        try:
            return self.client.post(path, body, creates=creates)
        except SpecError as error:
            raise SpecError([replace(p, where=_place(p.where, shown)) for p in error.problems]) from None


class RemoteSweep(SweepHandle):
    """A sweep of a service. `notices` are those of its submission."""

    def __init__(self, client: ServiceClient, name: str, notices: tuple[str, ...] = ()) -> None:
        """`client`: of its service; `name`: of a sweep that the service has."""
        self._client, self.name, self.notices = client, name, notices

    def __repr__(self) -> str:
        return f"RemoteSweep({self.name!r}, {self._client.url!r})"

    # --- looking -----------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return state and trials, and the row of the queue as `queue`; see `SweepHandle`."""
        return self._get()

    def history(self) -> dict[str, Any]:
        """Return events and changes; see `SweepHandle`."""
        found = self._get("history")
        events, after = found["events"], found.pop("next")
        while after is not None:
            page = self._get("history", after=after)
            events, after = [*events, *page["events"]], page["next"]
        return found | {"events": events}

    def best(self) -> dict[str, Any]:
        """Return the best configuration so far; see `SweepHandle`."""
        return self._get("best")

    def report(self, to: Path | None = None) -> Report:
        """Return the report as the service makes it. `to`: a file here for its page.

        Raises:
            NothingToReport: no trial has started.
            StorageRefused: the file cannot be written.
        """
        page, conclusions = self._client.text(sweep_path(self.name, "report")), self._get("diagnosis")
        if to is not None:
            try:
                to.write_text(page, encoding="utf-8")
            except OSError as error:
                raise StorageRefused(f"{to} cannot be written: {error}") from error
        return Report(conclusions if to is None else {"file": str(to), **conclusions}, page, to)

    def suggest(self, to: Path | None = None) -> str:
        """Return a follow-up sweep file; see `SweepHandle`."""
        text = self._client.text(sweep_path(self.name, "suggestion"))
        if to is not None:
            self._write_new(to, text)
        return text

    def log(self, trial: int | None = None, *, attempt: int | None = None) -> list[str]:
        """Return the last lines of the log, at most 5000; see `SweepHandle`."""
        return self._get("log", trial=trial, attempt=attempt, tail=_ALL_LINES)["lines"]

    def follow(self, trial: int | None = None) -> Iterator[list[str]]:
        """Yield the last lines of the log, then new ones; see `SweepHandle`."""
        for kind, data in self._client.events(sweep_path(self.name, "log", "events"), trial=trial):
            if kind in ("reload", "lines") and data["lines"]:
                yield data["lines"]
            if kind in ("end", "gone") or (kind == "reload" and data["ended"]):
                return

    def is_driven(self) -> bool:
        """Return whether a driver runs the sweep, or will."""
        found = self.status()
        return found["state"] in _DRIVEN or (found.get("queue") or {}).get("state") in _DRIVEN

    def _metric_points(self, trials: Sequence[int] | None, since: int) -> Iterator[MetricPoint]:
        from orchestrator.api.watched_sweep import points_from_json

        if not self.status()["trials"]:
            return
        found = self._get("metrics", trial=trials, since=since)
        for number, points in found["trials"].items():
            yield from ((int(number), point.step, point.metrics) for point in points_from_json(points))
            if (after := found["cut"].get(number)) is not None:
                yield from ((int(number), point.step, point.metrics) for point in self.points(int(number), after))

    def progress(self) -> Progress:
        """Return what a live table shows, now."""
        from orchestrator.api.watched_sweep import Progress

        return Progress.from_json(self._get("progress"))

    def points(self, trial: int, since: int) -> Iterator[StepMetrics]:
        """Yield a trial's metrics after an update."""
        from orchestrator.api.watched_sweep import points_from_json

        after: int | None = since
        while after is not None:
            page = self._get("trials", trial, "metrics", since=after)
            yield from points_from_json(page["points"])
            after = page["next"]

    # --- verbs -------------------------------------------------------------------------------------------------------

    def _request(self, kind: str, trial: int | None, why: str) -> list[str]:
        place = (kind,) if trial is None else ("trials", trial, kind)
        return self._post(*place, body={"why": why})

    def abandon(self, *, why: str = "") -> list[str]:
        """End the sweep for good, running or not; see `SweepHandle`."""
        return self._post("stop", body={"why": why, "abandon": True})

    def retry(self, trials: Sequence[int], *, why: str = "") -> list[str]:
        """Try failed trials again; see `SweepHandle`."""
        return self._post("retry", body={"trials": list(trials), "why": why}, creates=True)

    def set_budget(self, settings: Settings) -> list[str]:
        """Change the budget; see `SweepHandle`."""
        return self._post("budget", body={"settings": list(as_overrides(settings))}, creates=True)

    def enqueue(self, settings: Settings, *, again: bool = False) -> list[str]:
        """Enqueue a trial; see `SweepHandle`."""
        return self._post("trials", body={"overrides": list(as_overrides(settings)), "again": again}, creates=True)

    def clone(self, trial: int, settings: Settings = (), *, from_checkpoint: bool = False, why: str = "") -> list[str]:
        """Enqueue a copy of a trial with some settings changed; see `SweepHandle`."""
        body = {"overrides": list(as_overrides(settings)), "from_checkpoint": from_checkpoint, "why": why}
        return self._post("trials", trial, "clone", body=body, creates=True)

    def set_priority(self, priority: int) -> None:
        """Change the place of a waiting sweep; larger ones start first."""
        self._client.post(sweep_path(self.name, "priority"), {"priority": priority})

    def resume(self, overrides: Settings = (), *, retry_failed: bool = False, why: str = "") -> list[str]:
        """Let the sweep wait for its GPUs again; one that a command began comes into the queue.

        Args:
            overrides: changes of settings, as of `orchestrator.api.resume`; the service checks them first.
            retry_failed: try all failed trials again, each with its number.
            why: reason, for the history.

        Raises:
            SpecError, SpecChanged, SearchNarrowed: a change is refused, as here; nothing was changed.
        """
        body = {"retry_failed": retry_failed, "why": why, "overrides": list(as_overrides(overrides))}
        found = self._client.post(sweep_path(self.name, "resume"), body)
        return [*found.get("notices", ()), f"{self.name} waits in the queue of {self._client.url}"]

    def judge(
        self,
        *,
        top: int | None = None,
        prompts: int | None = None,
        samples: int | None = None,
        confirm_cost: bool = False,
    ) -> list[str]:
        """Judge the best trials' answers in the background there; the log has the progress.

        `confirm_cost`: call a paid endpoint; the other arguments are those of the sweep file's `judge`.
        """
        body = {"top": top, "prompts": prompts, "samples": samples, "confirm_cost": confirm_cost}
        return self._post("judge", body=body, creates=True)

    def delete(self, *, keep_mlflow: bool = False, confirm: Callable[[Sequence[str]], None] | None = None) -> int:
        """Delete the sweep there; see `Sweep.delete`."""
        planned = self._get("deletion", keep_mlflow=keep_mlflow)
        if confirm is not None:
            confirm(planned["lines"])
        self._client.delete(sweep_path(self.name), keep_mlflow=keep_mlflow)
        return planned["frees"]

    def archive(self, url: str, *, log: Callable[[str], None] | None = None) -> None:
        """Move the sweep's folder from the service's disk to a URL of fsspec."""
        for notice in self._post("archive", body={"url": url}):
            if log is not None:
                log(notice)

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _get(self, *parts: str | int, **query: Any) -> dict[str, Any]:
        return self._client.get(sweep_path(self.name, *parts), **query)

    def _post(self, *parts: str | int, body: Mapping[str, Any], creates: bool = False) -> list[str]:
        return self._client.post(sweep_path(self.name, *parts), body, creates=creates)["notices"]

    def _write_new(self, to: Path, text: str) -> None:
        from orchestrator.report_data import OutputExists

        try:
            with to.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise OutputExists(to) from None
        except OSError as error:
            raise StorageRefused(f"{to} cannot be written: {error}") from error


class WatchedRemote:
    """A service's sweep, for a live table."""

    def __init__(self, sweep: RemoteSweep, log: Callable[[str], None]) -> None:
        """`log`: receives a line while the service does not answer."""
        self._sweep, self._log = sweep, log

    def read(self) -> Progress:
        """Return the sweep as it is now. Raises ServiceUnreachable after minutes without an answer."""
        return self._patiently(self._sweep.progress)

    def metrics(self, trial: int, since: int) -> list[StepMetrics]:
        """Return a trial's metrics after an update."""
        return self._patiently(lambda: list(self._sweep.points(trial, since)))

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Return the answer; a service that is started again is waited for."""
        until, is_first = time.monotonic() + _PATIENCE_SECONDS, True
        while True:
            try:
                return ask()
            except ServiceUnreachable as error:
                if time.monotonic() > until:
                    raise
                if is_first:
                    is_first = False
                    self._log(f"{clause(error)}; its sweeps continue, trying again")
                time.sleep(_AGAIN_SECONDS)

    def close(self) -> None:
        """Leave the client open, which others use."""


def _text_of(source: Source) -> tuple[str, str]:
    """Return name and text of a sweep file, or of a mapping as one."""
    from orchestrator.api.sweep_files import as_yaml
    from orchestrator.spec.loading.validation_errors import read_document

    if isinstance(source, Mapping):
        return "mapping", as_yaml(source)
    path = Path(source)
    read_document(path)  # no file, or no YAML: that needs no service
    return str(path), path.read_text(encoding="utf-8-sig")


def _place(where: str, shown: str) -> str:
    """Return the place of a mistake with the name of the file here."""
    return f"{shown}{where.removeprefix(_NAME_OF_TEXT)}" if where.startswith(f"{_NAME_OF_TEXT}:") else where
