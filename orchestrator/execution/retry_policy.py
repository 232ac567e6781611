"""`RetryPolicy`: another attempt after a lost worker, or with a smaller micro-batch after running out of memory.

`RepeatedBug` stops a sweep in which every trial would fail with the same error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from pathlib import Path

from orchestrator.execution.messages import WORKER_FILE, AttemptResult, AttemptStatus
from orchestrator.interfaces import ProgressView
from orchestrator.study.database import driver_lease
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, Outcome, Trial, TrialState
from trainer.config.trial import TrialConfig

_RAY_OUT_OF_MEMORY_PHRASES = ("NODE_OUT_OF_MEMORY", "running low on memory", "OutOfMemoryError")
"""What Ray says when its own monitor killed a worker. It names the kernel's OOM killer as a guess for every death."""
_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


def kernel_kills() -> int:
    """Processes that the kernel has killed for memory: in this container where it can be told, else on the machine."""
    for path in _COUNTERS:
        lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
        for line in lines:
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


class KernelKills:
    """The kernel's kills for memory on this machine, each charged to one lost worker at most."""

    def __init__(self) -> None:
        self._charged = 0

    def charge(self, since: int) -> bool:
        """Charge one of the kills after the first `since` to a worker; False where none is left to charge."""
        before = max(since, self._charged)
        if kernel_kills() <= before:
            return False
        self._charged = before + 1
        return True

    def answer(self, folder: Path, cause: str, since: int) -> str:
        """In words that the worker of the attempt in `folder` was killed for its memory, by what Ray says or by the
        kernel's counter.

        `since`: the counter when the worker was last known to live. The counter is this machine's, so it tells nothing
        of a worker on another one. Empty where nothing shows that it was memory.
        """
        if any(words in cause for words in _RAY_OUT_OF_MEMORY_PHRASES):
            return f"Ray's memory monitor killed the worker: {cause}"
        if is_on_this_machine(folder) and self.charge(since):
            return f"the kernel killed the worker for its memory: {cause}"
        return ""


def is_on_this_machine(folder: Path) -> bool:
    """Whether the worker of the attempt in `folder` is known, and on this machine."""
    message = folder / WORKER_FILE
    return message.is_file() and not driver_lease.is_remote(message.read_text(encoding="utf-8"))


def effective_micro_batch(config: TrialConfig, limit: int | None) -> int:
    """The token budget of a micro-batch that this runs with; `limit`: at most so many, as more ran out of memory."""
    configured = config.training.tokens_per_micro_batch
    return configured if limit is None else min(configured, limit)


def halved_micro_batch(budget: int, longest: int) -> int | None:
    """Half the budget, down to `longest`, the tokens of the longest row: then the largest micro-batch is one pair."""
    return None if budget <= longest else max(budget // 2, longest)


def out_of_memory_message(config: TrialConfig, limit: int | None, reason: str) -> str:
    """What was tried, and what to set."""
    configured, last = config.training.tokens_per_micro_batch, effective_micro_batch(config, limit)
    tried = f"after halving training.tokens_per_micro_batch from {configured} to {last}" if last < configured else "and"
    return (
        f"out of memory with one pair per micro-batch, {tried} there is nothing smaller to try; set "
        f"training.gradient_checkpointing: true, lower data.max_length, train with lora, or give a trial more memory "
        f"(last: {reason})"
    )


def with_micro_batch_limit(config: TrialConfig, limit: int | None) -> TrialConfig:
    """The configuration as it is run; the very same object where nothing had to be made smaller."""
    tokens = effective_micro_batch(config, limit)
    if tokens == config.training.tokens_per_micro_batch:
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"tokens_per_micro_batch": tokens})})


MAX_LOSSES = 3
"""Workers lost by one trial in one driver's life before the sweep stops, resumably: who resumes it has looked."""


class RetryPolicy:
    """Attempts that were issued again and wait for a worker. Where the sweep stops, they wait in the study instead."""

    def __init__(self, study: Study, view: ProgressView, longest_row: int) -> None:
        self._study, self._view, self._longest_row = study, view, longest_row
        self._waiting: deque[Trial] = deque()
        self._losses: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def pop(self) -> Trial:
        """The one that waits longest."""
        return self._waiting.popleft()

    def release(self, numbers: Collection[int | None] | None = None) -> None:
        """These (None: all) to the study: no worker has them yet."""
        for trial in [t for t in self._waiting if numbers is None or t.number in numbers]:
            self._waiting.remove(trial)
            self._study.release(trial)

    def retry_with_less_memory(self, trial: Trial, reason: str, *, stopping: bool) -> Outcome | None:
        """Once more from its newest checkpoint with half the micro-batch; at one pair it has failed: how it ends."""
        tokens = halved_micro_batch(effective_micro_batch(trial.config, trial.micro_batch), self._longest_row)
        if tokens is None:
            message = out_of_memory_message(trial.config, trial.micro_batch, reason)
            return Outcome(TrialState.FAILED, message, FailureKind.OUT_OF_MEMORY)
        again = self._study.retry(trial, tokens, reason)
        if stopping:
            self._study.release(again)
            return None
        self._view.log(
            f"trial {trial.number} ran out of memory ({reason}); it goes on from its newest checkpoint with {tokens} "
            "tokens per micro-batch, as do the trials after it"
        )
        self._waiting.append(again)
        return None

    def retry_after_loss(self, trial: Trial, cause: str, *, stopping: bool) -> str:
        """Its worker is gone. That is no outcome; why the sweep must stop, in words, where it happens too often."""
        number = trial.number
        self._losses[number] = self._losses.get(number, 0) + 1
        self._study.add_event("worker lost", f"attempt {trial.attempt}: {cause}", number)
        if stopping:
            self._study.release(trial)
            return ""
        if self._losses[number] >= MAX_LOSSES:
            self._study.release(trial)
            return f"trial {number} lost its worker {MAX_LOSSES} times; last: {cause}"
        self._view.log(f"trial {number} lost its worker ({cause}); it is issued again from its newest checkpoint")
        self._waiting.append(self._study.retry(trial))
        return ""


MAX_SAME_BUGS = 3


class RepeatedBug:
    """Counts trials that ended in one and the same bug, one after the other."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._last, self._count = "", 0

    def count(self, result: AttemptResult) -> str:
        """One more trial ended by itself; why the sweep should stop, in words, or nothing."""
        if result.status is not AttemptStatus.FAILED or (result.failure or FailureKind.BUG) is not FailureKind.BUG:
            self._last, self._count = "", 0
            return ""
        self._count = self._count + 1 if result.bug_signature == self._last else 1
        self._last = result.bug_signature
        if max(self._count, self._study.consecutive_bugs()[0]) < MAX_SAME_BUGS:
            return ""
        return f"the same bug ended {MAX_SAME_BUGS} trials in a row: {result.reason}"
