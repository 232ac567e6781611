"""Trials that go on in another attempt: after a lost worker, or with a smaller micro-batch where memory ran out."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from orchestrator.engine import memory
from orchestrator.engine.view import View
from orchestrator.study.records import Trial
from orchestrator.study.state import FailureKind, Outcome, TrialState
from orchestrator.study.study import Study

LOSSES = 3
"""Workers lost by one trial in one driver's life before the sweep stops, resumably: who resumes it has looked."""


class Retries:
    """Attempts that were issued again and wait for a worker. Where the sweep stops, they wait in the study instead."""

    def __init__(self, study: Study, view: View, longest: int) -> None:
        self._study, self._view, self._longest = study, view, longest
        self._waiting: deque[Trial] = deque()
        self._losses: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def pop(self) -> Trial:
        """The one that waits longest."""
        return self._waiting.popleft()

    def give_back(self, numbers: Collection[int | None] | None = None) -> None:
        """These (None: all) to the study: no worker has them yet."""
        for trial in [t for t in self._waiting if numbers is None or t.number in numbers]:
            self._waiting.remove(trial)
            self._study.release(trial)

    def smaller(self, trial: Trial, why: str, *, stopping: bool) -> Outcome | None:
        """Once more from its newest checkpoint with half the micro-batch; at one pair it has failed: how it ends."""
        tokens = memory.smaller(memory.in_effect(trial.config, trial.micro_batch), self._longest)
        if tokens is None:
            told = memory.given_up(trial.config, trial.micro_batch, why)
            return Outcome(TrialState.FAILED, told, FailureKind.OUT_OF_MEMORY)
        again = self._study.reissue(trial, tokens, why)
        if stopping:
            self._study.release(again)
            return None
        self._view.say(
            f"trial {trial.number} ran out of memory ({why}); it goes on from its newest checkpoint with {tokens} "
            "tokens per micro-batch, as do the trials after it"
        )
        self._waiting.append(again)
        return None

    def lost(self, trial: Trial, cause: str, *, stopping: bool) -> str:
        """Its worker is gone. That is no outcome; why the sweep must stop, in words, where it happens too often."""
        number = trial.number
        self._losses[number] = self._losses.get(number, 0) + 1
        self._study.note("worker lost", f"attempt {trial.attempt}: {cause}", number)
        if stopping:
            self._study.release(trial)
            return ""
        if self._losses[number] >= LOSSES:
            self._study.release(trial)
            return f"trial {number} lost its worker {LOSSES} times; last: {cause}"
        self._view.say(f"trial {number} lost its worker ({cause}); it is issued again from its newest checkpoint")
        self._waiting.append(self._study.reissue(trial))
        return ""
