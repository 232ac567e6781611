"""Trials small enough to be run many times over in a test."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from trainer.config.trial import TrialConfig
from trainer.results import RunResult, StepMetrics

_SIZE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
MODEL = {"generated": _SIZE | {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}}
DATA = {
    "train": {"generated": "instructions", "rows": 24},
    "eval": {"generated": "instructions", "split": "eval", "rows": 6},
    "max_length": 96,
}
SPEED = ("tokens_per_second", "pairs_per_second")


def trial(loss: str | dict[str, Any] = "simpo", training: dict[str, Any] | None = None, **more: Any) -> TrialConfig:
    """Six updates of eight pairs, evaluated at the third and the sixth, on a Llama of two small layers."""
    settings = {"learning_rate": 5e-3, "pairs_per_update": 8, "num_train_epochs": 2, "eval_steps": 3}
    given = {
        "model": MODEL,
        "data": DATA,
        "loss": {"kind": loss} if isinstance(loss, str) else loss,
        "training": settings | (training or {}),
        "evaluation": {"prompts": 2, "max_new_tokens": 6},
    }
    return TrialConfig.model_validate(given | more)


def finish(run: Generator[StepMetrics, None, RunResult]) -> tuple[list[StepMetrics], RunResult]:
    """All points and the ending."""
    metrics: list[StepMetrics] = []
    while True:
        try:
            metrics.append(next(run))
        except StopIteration as end:
            return metrics, end.value


def take(run: Generator[StepMetrics, None, RunResult], count: int) -> list[StepMetrics]:
    """The first points of a run, which is closed then."""
    metrics = [next(run) for _ in range(count)]
    run.close()
    return metrics


def without_speed(metrics: Sequence[StepMetrics]) -> list[tuple[int, dict[str, float]]]:
    """Points without what the clock says."""
    return [(p.step, {k: v for k, v in p.metrics.items() if k not in SPEED}) for p in metrics]


def model_bytes(folder: Path) -> dict[str, bytes]:
    """The saved weights."""
    return {p.name: p.read_bytes() for p in sorted((folder / "model").glob("*.safetensors"))}
