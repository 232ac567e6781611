"""Out of memory: how it is told from other deaths of a worker, and the next smaller size to try."""

from __future__ import annotations

from pathlib import Path

from orchestrator.engine.messages import WORKER_FILE
from orchestrator.study import lease
from trainer.config import TrialConfig

_BY_RAY = ("NODE_OUT_OF_MEMORY", "running low on memory", "OutOfMemoryError")
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
        if any(words in cause for words in _BY_RAY):
            return f"Ray's memory monitor killed the worker: {cause}"
        if is_on_this_machine(folder) and self.charge(since):
            return f"the kernel killed the worker for its memory: {cause}"
        return ""


def is_on_this_machine(folder: Path) -> bool:
    """Whether the worker of the attempt in `folder` is known, and on this machine."""
    told = folder / WORKER_FILE
    return told.is_file() and not lease.is_elsewhere(told.read_text(encoding="utf-8"))


def in_effect(config: TrialConfig, learned: int | None) -> int:
    """The token budget of a micro-batch that this runs with; `learned`: at most so many, as more ran out of memory."""
    configured = config.training.tokens_per_micro_batch
    return configured if learned is None else min(configured, learned)


def smaller(budget: int, longest: int) -> int | None:
    """Half the budget, down to `longest`, the tokens of the longest row: then the largest micro-batch is one pair."""
    return None if budget <= longest else max(budget // 2, longest)


def given_up(config: TrialConfig, learned: int | None, why: str) -> str:
    """What was tried, and what to set."""
    configured, last = config.training.tokens_per_micro_batch, in_effect(config, learned)
    tried = f"after halving training.tokens_per_micro_batch from {configured} to {last}" if last < configured else "and"
    return (
        f"out of memory with one pair per micro-batch, {tried} there is nothing smaller to try; set "
        f"training.gradient_checkpointing: true, lower data.max_length, train with lora, or give a trial more memory "
        f"(last: {why})"
    )


def fitted(config: TrialConfig, learned: int | None) -> TrialConfig:
    """The configuration as it is run; the very same object where nothing had to be made smaller."""
    tokens = in_effect(config, learned)
    if tokens == config.training.tokens_per_micro_batch:
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"tokens_per_micro_batch": tokens})})
