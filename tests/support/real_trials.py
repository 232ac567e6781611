"""Real trials of two small layers, in processes that can be told to die."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import SweepSpec
from tests.support.fake_session import make_spec
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, StepMetrics

MODEL = {
    "generated": {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
}
SPEED = ("tokens_per_second", "pairs_per_second")


def spec(strategy: str, steps: int = 6, rates: Sequence[float] = (1e-3,), **more: Any) -> SweepSpec:
    base = {
        "model": MODEL,
        "data": {
            "train": [{"generated": "instructions", "rows": 24}],
            "eval": [{"generated": "instructions", "split": "eval", "rows": 6}],
            "max_length": 96,
        },
        "loss": {"kind": "simpo"},
        "training": {
            "pairs_per_update": 7,
            "max_steps": steps,
            "eval_steps": 3,
            "save_steps": 1,
            "adam_epsilon": 1e-4,
            "adam_beta2": 0.95,
            "distributed": strategy,
        },
        "evaluation": {"prompts": 2, "max_new_tokens": 6},
    }
    searched = {"dimensions": {"training.learning_rate": {"choice": list(rates)}}}
    return make_spec(base=base, search=SearchSpace.model_validate(searched), **more)


def without_speed(metrics: Sequence[StepMetrics]) -> list[tuple[int, dict[str, float]]]:
    return [(p.step, {k: v for k, v in p.metrics.items() if k not in SPEED}) for p in metrics]


class Mortal:
    """The trainer's training session. In the first attempt the process named in `die` kills itself after update 3, and
    the one named in `device` fails as if its GPU had."""

    def __init__(self, cache: Path) -> None:
        from trainer.training_session import TrainingSession

        self._trainers = TrainingSession(cache)
        self._root, self._rank = cache.parent, int(os.environ.get("RANK", "0"))

    @property
    def counters(self) -> Mapping[str, int]:
        return self._trainers.counters

    def interrupt(self) -> None:
        self._trainers.interrupt()

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        requested, fails = self._root / "die", self._root / "device"
        if earlier:
            left = [pid for pid in (self._root / "pids").read_text().split() if _lives(int(pid))]
            (self._root / f"left-{self._rank}").write_text(" ".join(left))
        else:
            with (self._root / "pids").open("a") as pids:
                pids.write(f"{os.getpid()}\n")
        run = self._trainers.train(config, folder, earlier, fork)
        while True:
            try:
                step_metrics = next(run)
            except StopIteration as end:
                return end.value
            if (
                step_metrics.step == 3
                and not earlier
                and requested.is_file()
                and int(requested.read_text()) == self._rank
            ):
                os.kill(os.getpid(), signal.SIGKILL)
            if step_metrics.step == 3 and not earlier and fails.is_file() and int(fails.read_text()) == self._rank:
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            yield step_metrics


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")
