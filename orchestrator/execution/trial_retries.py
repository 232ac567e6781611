"""`RetryPolicy`: retries after a lost worker, or out of memory with a smaller micro-batch.

`RepeatedBug` stops a sweep whose trials fail one after another with the same error.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path

from orchestrator.execution.messages import WORKER_FILE, AttemptResult, AttemptStatus
from orchestrator.execution.stop_reasons import StopKind
from orchestrator.interfaces import ProgressView
from orchestrator.study.database import process_identity
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, Outcome, Trial, TrialState
from trainer.config.trial import TrialConfig

_RAY_OUT_OF_MEMORY_PHRASES = ("NODE_OUT_OF_MEMORY", "running low on memory", "OutOfMemoryError")
"""Ray's messages when its memory monitor killed a worker. (Ray mentions the kernel's OOM killer after every death, so
that text is no evidence.)"""
_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))
_SAMPLE_SECONDS = 0.25
_OOM_KILL = re.compile(rb"^oom_kill (\d+)$", re.MULTILINE)


def kernel_oom_kills() -> int:
    """Return the kernel's count of out-of-memory kills, of this container if available, else of the machine."""
    for path in _COUNTERS:
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            continue
        if found := _OOM_KILL.search(text):
            return int(found[1])
    return 0


class OomKillCounter:
    """Attributes each of the kernel's out-of-memory kills to at most one lost worker."""

    def __init__(self) -> None:
        self._attributed = 0
        self._sample, self._sampled_at = 0, -math.inf

    def sample(self) -> int:
        """Return the kernel's count as of at most `_SAMPLE_SECONDS` ago: reading it costs a tenth of a report."""
        if (now := time.monotonic()) - self._sampled_at >= _SAMPLE_SECONDS:
            self._sample, self._sampled_at = kernel_oom_kills(), now
        return self._sample

    def attribute(self, since: int) -> bool:
        """Attribute one kill after the first `since` ones to a worker; return False where none is left."""
        before = max(since, self._attributed)
        if kernel_oom_kills() <= before:
            return False
        self._attributed = before + 1
        return True

    def out_of_memory_cause(self, folder: Path, cause: str, since: int) -> str:
        """Return a message if a lost worker was killed for its memory, by Ray's message or the kernel's counter.

        Args:
            folder: the attempt's folder.
            cause: Ray's message about the death.
            since: the counter when the worker was last known to be alive. Only workers on this machine are counted.

        Returns:
            Empty where there is no evidence of an out-of-memory kill.
        """
        if any(words in cause for words in _RAY_OUT_OF_MEMORY_PHRASES):
            return f"Ray's memory monitor killed the worker: {cause}"
        if is_on_this_machine(folder) and self.attribute(since):
            return f"the kernel killed the worker for its memory: {cause}"
        return ""


def is_on_this_machine(folder: Path) -> bool:
    """Return whether the worker of the attempt in `folder` is known and runs on this machine."""
    worker_file = folder / WORKER_FILE
    return worker_file.is_file() and not process_identity.is_remote(worker_file.read_text(encoding="utf-8"))


def effective_micro_batch(config: TrialConfig, limit: int | None) -> int:
    """Return the tokens per micro-batch of a trial; `limit`: maximum after running out of memory."""
    configured = config.training.tokens_per_micro_batch
    return configured if limit is None else min(configured, limit)


def halved_micro_batch(budget: int, longest: int) -> int | None:
    """Return half the tokens per micro-batch, at least `longest`, the longest row; None where already there."""
    return None if budget <= longest else max(budget // 2, longest)


def out_of_memory_message(config: TrialConfig, limit: int | None, reason: str) -> str:
    """Return the error message after the last retry: the micro-batches tried, and settings that need less memory."""
    configured, last = config.training.tokens_per_micro_batch, effective_micro_batch(config, limit)
    tried = f", after halving training.tokens_per_micro_batch from {configured} to {last}" if last < configured else ""
    return (
        f"out of memory at the smallest micro-batch{tried}; set training.gradient_checkpointing: true, lower "
        f"data.max_length, train with lora, or give a trial more memory (last: {reason})"
    )


def with_micro_batch_limit(config: TrialConfig, limit: int | None) -> TrialConfig:
    """Return the configuration with a limited micro-batch; the same object where the limit has no effect."""
    tokens = effective_micro_batch(config, limit)
    if tokens == config.training.tokens_per_micro_batch:
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"tokens_per_micro_batch": tokens})})


MAX_LOST_WORKERS = 3
"""Workers lost by one trial under one driver before the sweep stops, so that a user can find the cause."""


class RetryPolicy:
    """Retried attempts that wait for a worker. When the sweep stops, they are released to the study instead."""

    def __init__(self, study: Study, view: ProgressView, longest_row: int) -> None:
        self._study, self._view, self._longest_row = study, view, longest_row
        self._waiting: deque[Trial] = deque()
        self._losses: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def next_attempt(self) -> Trial:
        """Remove and return the attempt that waits longest."""
        return self._waiting.popleft()

    def release(self, numbers: Collection[int | None] | None = None) -> None:
        """Release the waiting attempts of these trials (None: all) to the study."""
        for trial in [t for t in self._waiting if numbers is None or t.number in numbers]:
            self._waiting.remove(trial)
            self._study.release(trial)

    def retry_with_less_memory(self, trial: Trial, reason: str, *, stopping: bool) -> Outcome | None:
        """Retry from the newest checkpoint with half the micro-batch.

        Returns a FAILED outcome if the micro-batch is already at its minimum.
        """
        tokens = halved_micro_batch(effective_micro_batch(trial.config, trial.micro_batch_limit), self._longest_row)
        if tokens is None:
            message = out_of_memory_message(trial.config, trial.micro_batch_limit, reason)
            return Outcome(TrialState.FAILED, message, FailureKind.OUT_OF_MEMORY)
        retried = self._study.retry(trial, tokens, reason)
        if stopping:
            self._study.release(retried)
            return None
        self._view.log(
            f"trial {trial.number} ran out of memory ({reason}); it continues from its newest checkpoint with {tokens} "
            "tokens per micro-batch, which later trials use too"
        )
        self._waiting.append(retried)
        return None

    def retry_after_loss(self, trial: Trial, cause: str, *, stopping: bool) -> str:
        """Retry a trial whose worker was lost; return why the sweep must stop after too many losses, else empty."""
        number = trial.number
        self._losses[number] = self._losses.get(number, 0) + 1
        self._study.add_event("worker lost", f"attempt {trial.attempt}: {cause}", number)
        if stopping:
            self._study.release(trial)
            return ""
        if self._losses[number] >= MAX_LOST_WORKERS:
            self._study.release(trial)
            return f"trial {number} lost its worker {MAX_LOST_WORKERS} times; last: {cause}"
        self._view.log(f"trial {number} lost its worker ({cause}); retrying from its newest checkpoint")
        self._waiting.append(self._study.retry(trial))
        return ""


MAX_SAME_BUGS = 3
"""Consecutive trials that fail with the same error before the sweep stops."""


class RepeatedBug:
    """Counts consecutive trials that failed with the same bug."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._last, self._count = "", 0

    def stop_reason_after(self, result: AttemptResult) -> str:
        """Count the end of a trial; return why the sweep must stop, else empty."""
        if result.status is not AttemptStatus.FAILED or (result.failure or FailureKind.BUG) is not FailureKind.BUG:
            self._last, self._count = "", 0
            return ""
        self._count = self._count + 1 if result.bug_signature == self._last else 1
        self._last = result.bug_signature
        if max(self._count, self._study.consecutive_bugs()[0]) < MAX_SAME_BUGS:
            return ""
        return f"{StopKind.SAME_BUG.value} in {MAX_SAME_BUGS} trials in a row: {result.reason}"
