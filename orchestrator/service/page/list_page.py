"""The first page: all sweeps with what is wrong with each, the queue, and who has the GPUs; login and logout."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from dashboards.diagnosis.diagnose import diagnose
from dashboards.diagnosis.findings import SHORT_TITLES, DiagnosisFinding
from dashboards.formatting import format_about, format_value
from orchestrator.commands.runs_folder.sweep_list import INTERRUPTED, UNREADABLE, SweepRow
from orchestrator.errors import OrchestrateError
from orchestrator.folders import SweepFolder
from orchestrator.gpu_locks import gpu_holders
from orchestrator.gpus import visible_devices
from orchestrator.report_data import load_sweep_frame
from orchestrator.service.access_tokens import SESSION_SECONDS, FailedLogins, LoginSessions, Role
from orchestrator.service.page.page_rendering import PageRoute, form_of, own_path, render
from orchestrator.service.request_guard import COOKIE, require
from orchestrator.service.service_context import ServiceContext
from orchestrator.service.sweep_queue import QueueState
from orchestrator.study.trial_records import TrialState
from trainer.storage.atomic_files import write_json

_ON_A_PAGE = 100
_KEPT = "diagnoses.json"
_PROMPT, _REST_FACTOR, _LATER_FACTOR = 20, 4.0, 19.0
"""The thread rests after a sweep for 4 times the seconds that it took, after the first 20 of a pass for 19 times."""
_PASS_SECONDS, _KEPT_SECONDS = 2.0, 30.0
"""The sweeps' files are looked at no more often than this; what was found is stored after so long at the latest."""
_RUNNING_SECONDS = 60.0
"""Sweeps that run are diagnosed again after this time."""


@dataclass(frozen=True, slots=True)
class ListedSweep:
    """A row of the list."""

    name: str
    state: str
    owner: str
    priority: int | None
    finished: int
    planned: int | None
    metric: str
    best: float | None
    best_trial: str
    sign: float
    """-1 where a smaller value is better."""
    began: float
    wrong: str
    """What is wrong in a few words; "" for nothing."""
    level: str
    """serious, warning or note."""
    why: str
    is_diagnosed: bool
    """Whether its diagnosis is known, so that no finding means that nothing is wrong."""

    @property
    def best_text(self) -> str:
        """The best value."""
        return "–" if self.best is None else format_value(float(f"{self.best:.4g}"))

    @property
    def age(self) -> str:
        """How long ago it began."""
        return format_about(max(0.0, time.time() - self.began))


_SORTS: Mapping[str, Callable[[ListedSweep], Any]] = {
    "newest": lambda row: -row.began,
    "name": lambda row: row.name,
    "state": lambda row: (row.state, -row.began),
    "owner": lambda row: (row.owner, -row.began),
    "progress": lambda row: -(row.finished / row.planned if row.planned else 0.0),
    "best": lambda row: (row.metric, row.best is None, -row.sign * (row.best or 0.0)),
    "wrong": lambda row: (("serious", "warning", "note", "").index(row.level), -row.began),
}


class Diagnoses:
    """The most serious finding of each sweep, found by a thread of its own and kept in `cache/diagnoses.json`."""

    def __init__(self, root: Path) -> None:
        self._path = SweepFolder(root, "").cache / _KEPT
        self._root = root
        self._guard, self._asked, self._ends = threading.Lock(), threading.Event(), threading.Event()
        self._wanted: Sequence[SweepRow] = ()
        self._thread: threading.Thread | None = None
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # none yet, or a damaged file: the sweeps are diagnosed anew
            content = {}
        self._found: dict[str, dict[str, Any]] = content if isinstance(content, dict) else {}

    def close(self) -> None:
        """End the thread."""
        self._ends.set()
        self._asked.set()
        if self._thread is not None:
            self._thread.join()

    def found(self, rows: Sequence[SweepRow]) -> dict[str, tuple[str, str]]:
        """Return sweep -> rule and level of its most serious finding, as far as known; the others are looked at now."""
        with self._guard:
            self._wanted = rows
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="diagnoses", daemon=True)
                self._thread.start()
            known = {row.name: self._found[row.name] for row in rows if row.name in self._found}
        self._asked.set()
        return {name: (entry["rule"], entry["level"]) for name, entry in known.items()}

    def _work(self) -> None:
        while not self._ends.is_set():
            self._asked.wait()
            self._asked.clear()
            with self._guard:
                wanted = self._wanted
            began, changed, looked = time.monotonic(), False, 0
            for row in wanted:
                if self._ends.is_set():
                    break
                if self._look(row, _REST_FACTOR if looked < _PROMPT else _LATER_FACTOR):
                    changed, looked = True, looked + 1
                if changed and time.monotonic() - began > _KEPT_SECONDS:
                    self._keep()
                    began, changed = time.monotonic(), False
            if changed:
                self._keep()
            self._ends.wait(_PASS_SECONDS)

    def _keep(self) -> None:
        with self._guard:
            write_json(self._path, self._found)

    def _look(self, row: SweepRow, rest: float) -> bool:
        """Diagnose a sweep unless that is known; then rest for so many times the seconds that it took."""
        began = time.monotonic()
        with self._guard:
            old = self._found.get(row.name)
        if row.change is None or (old is not None and old["stamp"] == row.stamp):
            return False
        if old is not None and time.time() - old["at"] < _RUNNING_SECONDS:
            return False
        try:
            first = next(iter(diagnose(load_sweep_frame(SweepFolder(self._root, row.name)))), None)
        except OrchestrateError:  # the list shows why it cannot be read
            return False
        entry = {"stamp": row.stamp, "at": time.time(), **_entry(first)}
        with self._guard:
            self._found[row.name] = entry
        self._ends.wait(rest * (time.monotonic() - began))
        return True


def _entry(finding: DiagnosisFinding | None) -> dict[str, str]:
    return {"rule": "", "level": ""} if finding is None else {"rule": finding.rule, "level": finding.level.value}


def list_pages(
    context: ServiceContext,
    diagnoses: Diagnoses,
    logins: LoginSessions,
    failed: FailedLogins,
    problem: Callable[[], str],
    *,
    secure: bool,
) -> APIRouter:
    """Return the list of sweeps and the login.

    `problem`: returns what keeps sweeps from starting; `secure`: whether browsers send the cookie by HTTPS only.
    """
    pages = APIRouter(route_class=PageRoute, include_in_schema=False)

    def listed(request: Request, q: str, state: str, owner: str, sort: str, page: int) -> dict[str, Any]:
        """Return what the template of the list shows for these filters."""

        def query(**changed: Any) -> str:
            return _changed_query(request, changed)

        rows = _rows(context, diagnoses)
        owners, states = sorted({row.owner for row in rows} - {""}), sorted({row.state for row in rows})
        rows = [
            row
            for row in rows
            if q.lower() in row.name.lower() and state in ("", row.state) and owner in ("", row.owner)
        ]
        rows.sort(key=_SORTS.get(sort, _SORTS["newest"]))
        pages_count = max(1, -(-len(rows) // _ON_A_PAGE))
        page = min(max(1, page), pages_count)
        waiting = [each for state in (QueueState.DRIVEN, QueueState.WAITING) for each in context.queue.sweeps((state,))]
        return {
            "rows": rows[(page - 1) * _ON_A_PAGE : page * _ON_A_PAGE],
            "count": len(rows),
            "page": page,
            "pages_count": pages_count,
            "q": q,
            "state": state,
            "owner": owner,
            "owners": owners,
            "states": states,
            "sort": sort if sort in _SORTS else "newest",
            "query": query,
            "waiting": waiting,
            "gpus": _gpus(),
            "runs_folder": str(context.root),
            "keeps_from_starting": problem(),
        }

    @pages.get("/")
    def sweeps(
        request: Request, q: str = "", state: str = "", owner: str = "", sort: str = "newest", page: int = 1
    ) -> Response:
        """Answer with the list of sweeps, the queue and the GPUs."""
        require(request, Role.VIEWER)
        return render(request, "sweeps.html.j2", **listed(request, q, state, owner, sort, page))

    @pages.get("/list")
    def tables(
        request: Request, q: str = "", state: str = "", owner: str = "", sort: str = "newest", page: int = 1
    ) -> Response:
        """Answer with the tables of the page of the same query, for its script; notices stay for the next page."""
        require(request, Role.VIEWER)
        found = listed(request, q, state, owner, sort, page)
        return render(request, "list_tables.html.j2", with_notices=False, **found)

    @pages.get("/login")
    def ask(request: Request, to: Annotated[str, Query(alias="next")] = "/") -> Response:
        if request.state.person is not None:
            return RedirectResponse(own_path(to), HTTPStatus.SEE_OTHER)
        return render(request, "login.html.j2", problem="", next=own_path(to))

    @pages.post("/login")
    async def log_in(request: Request) -> Response:
        """Log in by the token of the form; failures are slowed."""
        form = await form_of(request)
        token, to = form.get("token", [""])[0].strip(), own_path(form.get("next", ["/"])[0])
        address = request.client.host if request.client else ""
        if wait := failed.wait_seconds(address):
            refused = f"Too many failed logins from this address: try again in {int(wait) + 1} seconds."
            return render(request, "login.html.j2", HTTPStatus.TOO_MANY_REQUESTS, problem=refused, next=to)
        begun = logins.log_in(token[:256])
        if begun is None:
            failed.add(address)
            refused = "This token is not valid, or was revoked."
            return render(request, "login.html.j2", HTTPStatus.UNAUTHORIZED, problem=refused, next=to)
        answer = RedirectResponse(to, HTTPStatus.SEE_OTHER)
        answer.set_cookie(COOKIE, begun[0], int(SESSION_SECONDS), httponly=True, samesite="strict", secure=secure)
        return answer

    @pages.post("/logout")
    def log_out(request: Request) -> Response:
        """End this browser's login."""
        logins.log_out(request.state.cookie)
        answer = RedirectResponse("/login", HTTPStatus.SEE_OTHER)
        answer.delete_cookie(COOKIE)
        return answer

    return pages


def _changed_query(request: Request, changed: Mapping[str, Any]) -> str:
    values = dict(parse_qsl(request.url.query)) | {key: str(value) for key, value in changed.items()}
    return "?" + urlencode({key: value for key, value in values.items() if value})


def _rows(context: ServiceContext, diagnoses: Diagnoses) -> list[ListedSweep]:
    entries = context.listed()
    begun = [entry.row for entry in entries if entry.row is not None]
    found = diagnoses.found(sorted(begun, key=lambda row: -row.summary["began"]))
    rows: list[ListedSweep] = []
    for entry in (each.values for each in entries):
        place, best = entry.get("queue") or {}, entry.get("best") or {}
        waits = place.get("state") == QueueState.WAITING.value
        words, level = _wrong(entry, *found.get(entry["name"], ("", "")))
        value = best.get("value")
        rows.append(
            ListedSweep(
                name=entry["name"],
                state=QueueState.WAITING.value if waits else entry["state"],
                owner=place.get("owner", ""),
                priority=place.get("priority"),
                finished=entry.get("finished", 0),
                planned=entry.get("planned"),
                metric=(entry.get("goal") or {}).get("metric", "").removeprefix("eval_"),
                best=value if isinstance(value, float | int) else None,
                best_trial=str(best.get("trial", "")),
                sign=-1.0 if (entry.get("goal") or {}).get("direction") == "minimize" else 1.0,
                began=entry["began"],
                wrong=words,
                level=level,
                why=entry.get("why", "") or place.get("why", ""),
                is_diagnosed=entry["name"] in found,
            )
        )
    return rows


def _wrong(entry: Mapping[str, Any], rule: str, level: str) -> tuple[str, str]:
    """Return what is wrong in a few words, and how serious it is."""
    place = entry.get("queue") or {}
    if entry["state"] == UNREADABLE:
        return "cannot be read", "serious"
    if place.get("state") == QueueState.FAILED.value:
        return "was refused", "serious"
    if place.get("state") == QueueState.STOPPED.value and place.get("deaths"):
        return "drivers died", "serious"
    if rule and level == "serious":
        return SHORT_TITLES[rule], level
    if failures := (entry.get("states") or {}).get(TrialState.FAILED.value, 0):
        return f"{failures} trial{'' if failures == 1 else 's'} failed", "warning"
    if rule:
        return SHORT_TITLES[rule], level
    return ("was interrupted", "warning") if entry["state"] == INTERRUPTED and not place else ("", "")


def _gpus() -> list[tuple[str, str]]:
    """Return each GPU of this machine, and who has it."""
    devices = visible_devices()
    holders = gpu_holders(devices)
    names = [", ".join(part for part in (device.name, device.memory_text) if part) for device in devices]
    return [
        (f"{device.index} {name}".strip(), str(holders[device]) if device in holders else "free")
        for device, name in zip(devices, names, strict=True)
    ]
