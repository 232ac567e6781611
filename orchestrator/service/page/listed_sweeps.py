"""`ListedSweep`: a sweep as the lists of pages show it, what is wrong with it, and the filters that choose some."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dashboards.diagnosis.diagnose import diagnose
from dashboards.diagnosis.findings import SHORT_TITLES, DiagnosisFinding
from dashboards.formatting import format_about, format_value
from orchestrator.commands.runs_folder.sweep_list import INTERRUPTED, UNREADABLE, SweepRow
from orchestrator.errors import OrchestrateError
from orchestrator.execution.stop_reasons import is_deliberate
from orchestrator.folders import SweepFolder
from orchestrator.report_data import load_sweep_frame
from orchestrator.service.service_context import ServiceContext
from orchestrator.service.sweep_queue import MOST_DEATHS, QueueState
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
    has_begun: bool
    """Whether its files are here."""

    @property
    def best_text(self) -> str:
        """The best value."""
        return "–" if self.best is None else format_value(float(f"{self.best:.4g}"))

    @property
    def age(self) -> str:
        """How long ago it began."""
        return format_about(max(0.0, time.time() - self.began))


SORTS: Mapping[str, Callable[[ListedSweep], Any]] = {
    "newest": lambda row: -row.began,
    "name": lambda row: row.name,
    "state": lambda row: (row.state, -row.began),
    "owner": lambda row: (row.owner, -row.began),
    "progress": lambda row: -(row.finished / row.planned if row.planned else 0.0),
    "best": lambda row: (row.metric, row.best is None, -row.sign * (row.best or 0.0)),
    "wrong": lambda row: (("serious", "warning", "note", "").index(row.level), -row.began),
}


@dataclass(frozen=True, slots=True)
class ListFilter:
    """Which sweeps a reader wants to see, in which order, and which page of them."""

    q: str = ""
    """Part of the name."""
    state: str = ""
    owner: str = ""
    sort: str = "newest"
    page: int = 1

    def apply(self, rows: Sequence[ListedSweep]) -> FilteredList:
        """Return the page of the sweeps that are wanted, and how many each choice of the filters would leave."""
        named = [row for row in rows if self.q.lower() in row.name.lower()]
        found = [row for row in named if self.state in ("", row.state) and self.owner in ("", row.owner)]
        found.sort(key=SORTS.get(self.sort, SORTS["newest"]))
        pages = max(1, -(-len(found) // _ON_A_PAGE))
        page = min(max(1, self.page), pages)
        states = Counter(row.state for row in named if self.owner in ("", row.owner))
        owners = Counter(row.owner for row in named if self.state in ("", row.state))
        return FilteredList(
            found[(page - 1) * _ON_A_PAGE : page * _ON_A_PAGE],
            len(found),
            page,
            pages,
            _choices(states, {row.state for row in rows}, self.state),
            _choices(owners, {row.owner for row in rows}, self.owner),
        )


@dataclass(frozen=True, slots=True)
class FilteredList:
    """One page of a filtered list."""

    rows: Sequence[ListedSweep]
    count: int
    """Sweeps on all pages."""
    page: int
    pages: int
    states: Sequence[tuple[str, int]]
    """Each state that a sweep of the list has, and how many sweeps it would show: every sweep has one state."""
    owners: Sequence[tuple[str, int]]


def _choices(counts: Mapping[str, int], known: set[str], chosen: str) -> list[tuple[str, int]]:
    return [(each, counts.get(each, 0)) for each in sorted(({*known, chosen}) - {""})]


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


def listed_sweeps(context: ServiceContext, diagnoses: Diagnoses) -> list[ListedSweep]:
    """Return every sweep of the list; those that have begun are diagnosed as time allows."""
    entries = context.listed()
    begun = [entry.row for entry in entries if entry.row is not None]
    found = diagnoses.found(sorted(begun, key=lambda row: -row.summary["began"]))
    rows: list[ListedSweep] = []
    for entry_of in entries:
        entry = entry_of.values
        place, best = entry.get("queue") or {}, entry.get("best") or {}
        words, level = _wrong(entry, *found.get(entry["name"], ("", "")))
        value = best.get("value")
        rows.append(
            ListedSweep(
                name=entry["name"],
                state=_state(entry, place),
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
                has_begun=entry_of.row is not None,
            )
        )
    return rows


def _state(entry: Mapping[str, Any], place: Mapping[str, Any]) -> str:
    """Return the one state under which the list has a sweep."""
    if place.get("state") == QueueState.WAITING.value:
        return QueueState.WAITING.value
    return "starting" if entry["state"] == QueueState.DRIVEN.value else entry["state"]


def _wrong(entry: Mapping[str, Any], rule: str, level: str) -> tuple[str, str]:
    """Return what is wrong in a few words, and how serious it is."""
    place = entry.get("queue") or {}
    if entry["state"] == UNREADABLE:
        return "cannot be read", "serious"
    if place.get("state") == QueueState.FAILED.value:
        return "was refused", "serious"
    if place.get("state") == QueueState.STOPPED.value and place["deaths"] > MOST_DEATHS:
        return "drivers died", "serious"
    if rule and level == "serious":
        return SHORT_TITLES[rule], level
    if failures := (entry.get("states") or {}).get(TrialState.FAILED.value, 0):
        return f"{failures} trial{'' if failures == 1 else 's'} failed", "warning"
    if rule:
        return SHORT_TITLES[rule], level
    was_lost = entry["state"] == INTERRUPTED and not place and not is_deliberate(entry["why"])
    return ("was interrupted", "warning") if was_lost else ("", "")
