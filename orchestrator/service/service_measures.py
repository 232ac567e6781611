"""`Measures`: what the service counts of itself, and the text of `/metrics` in Prometheus' exposition format."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from orchestrator.gpu_locks import gpu_holders
from orchestrator.gpus import visible_devices

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds."""


@dataclass(slots=True)
class Histogram:
    """How often something took at most so many seconds. Thread-safe."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def add(self, seconds: float) -> None:
        """Count one more."""
        with self._guard:
            self.counts[bisect_left(_BOUNDS, seconds)] += 1
            self.total += seconds

    @contextmanager
    def timed(self) -> Generator[None]:
        """Count what is done in the context."""
        began = time.monotonic()
        yield
        self.add(time.monotonic() - began)

    def lines(self, name: str) -> list[str]:
        """Return the samples of the metric `name`."""
        with self._guard:
            counts, total = list(self.counts), self.total
        found, below = list[str](), 0
        for bound, count in zip((*map(str, _BOUNDS), "+Inf"), counts, strict=True):
            below += count
            found.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*found, f"{name}_sum {total:.6f}", f"{name}_count {below}"]


@dataclass(slots=True)
class Measures:
    """What the service measures of its own work."""

    report: Histogram = field(default_factory=Histogram)
    """Seconds until a report was made."""
    event: Histogram = field(default_factory=Histogram)
    """Seconds from an event of a sweep to its message to those who watch."""


def exposition(measures: Measures, sweeps: Iterable[Mapping[str, Any]], readers: int, problem: str, now: float) -> str:
    """Return the metrics as text.

    Args:
        measures: of the service.
        sweeps: entries of the list of sweeps, with their rows of the queue.
        readers: open streams of events.
        problem: what keeps sweeps from starting; "" for nothing.
        now: seconds since 1970.
    """
    entries = list(sweeps)
    states = Counter(str(entry["state"]) for entry in entries)
    queued = Counter(str(entry["queue"]["state"]) for entry in entries if entry["queue"])
    trials: Counter[str] = Counter()
    for entry in entries:
        trials.update(entry.get("states", {}))
    waiting = [entry["queue"] for entry in entries if entry["queue"] and entry["queue"]["state"] == "waiting"]
    waits = [now - each["submitted_at"] for each in waiting]
    devices = visible_devices()
    held = gpu_holders(devices)
    lines = [
        *_gauge(
            "prefsweep_up", "1 if sweeps are started, 0 if something keeps them from it.", {"": 0 if problem else 1}
        ),
        *_gauge("prefsweep_sweeps", "Sweeps by state.", _labelled("state", states)),
        *_gauge("prefsweep_queue_sweeps", "Sweeps of the queue by what the service does.", _labelled("state", queued)),
        *_gauge(
            "prefsweep_queue_longest_wait_seconds",
            "Time since the submission of the sweep that waits longest.",
            {"": max(waits, default=0.0)},
        ),
        *_gauge("prefsweep_trials", "Trials of all sweeps by state.", _labelled("state", trials)),
        *_gauge(
            "prefsweep_gpus",
            "GPUs of this machine.",
            _labelled("use", {"held": len(held), "free": len(devices) - len(held)}),
        ),
        *_gauge("prefsweep_event_streams", "Open streams of events.", {"": readers}),
        *_described("prefsweep_report_seconds", "Time to make a report.", "histogram"),
        *measures.report.lines("prefsweep_report_seconds"),
        *_described("prefsweep_event_delay_seconds", "Time from an event of a sweep to its message.", "histogram"),
        *measures.event.lines("prefsweep_event_delay_seconds"),
    ]
    return "\n".join(lines) + "\n"


def _labelled(label: str, counts: Mapping[str, int]) -> dict[str, float]:
    return {f'{{{label}="{value}"}}': count for value, count in sorted(counts.items())}


def _gauge(name: str, text: str, samples: Mapping[str, float]) -> list[str]:
    return [*_described(name, text, "gauge"), *(f"{name}{labels} {value:g}" for labels, value in samples.items())]


def _described(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
