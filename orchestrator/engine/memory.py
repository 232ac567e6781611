"""Out of memory: how it is told from other deaths of a worker, and the next smaller size to try."""

from __future__ import annotations

from pathlib import Path

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


def killed_for_memory(cause: str, kills: int) -> str:
    """In words that a worker was killed for its memory, by what Ray says or by `kills` of the kernel since it began."""
    if any(words in cause for words in _BY_RAY):
        return f"Ray's memory monitor killed the worker: {cause}"
    if kills > 0:
        return f"the kernel killed the worker for its memory: {cause}"
    return ""


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
