"""Time, GPU-hours and cost of a sweep from its FLOPs, at a stated efficiency. Nothing here is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.spec.memory import GB, Memory, memory, most_trials, smaller, tokens_that_fit
from orchestrator.spec.sizes import Shape
from trainer.config import TrialConfig
from trainer.loss_config import DpoLoss

PEAK_TFLOPS = 989.0
"""Dense bfloat16 products on an H100 or H200, by NVIDIA's data sheet."""
EFFICIENCY = 0.3
"""Share of the peak that training reaches: assumed, not measured."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the estimate assumes."""

    gpu_memory: float | None = None
    """Bytes of one GPU."""
    processes: int = 1
    """Of one trial, each on a GPU of its own."""
    share: float = 1.0
    """Of a GPU that a process has, where several share one."""
    trials: int = 1
    """That take turns in one process, over one frozen model."""
    tflops: float = PEAK_TFLOPS
    efficiency: float = EFFICIENCY
    price: float | None = None
    """Of one GPU for an hour, in any currency."""
    tokens_per_pair: int | None = None
    """By default 2 * max_length: the most there can be."""
    train_pairs: int | None = None
    """Where the data is not here yet."""

    @property
    def room(self) -> float | None:
        """Bytes that a process may take."""
        return None if self.gpu_memory is None else self.gpu_memory * self.share

    @property
    def place(self) -> str:
        """That room in words."""
        whole = f"{(self.gpu_memory or 0.0) / GB:,.0f} GB"
        several = "" if self.trials == 1 else f" for {self.trials} trials"
        if self.share < 1:
            return f"{self.share:g} of a GPU of {whole}{several}"
        return f"a GPU of {whole}{several}" if self.processes == 1 else f"each of {self.processes} GPUs of {whole}"


@dataclass(frozen=True, slots=True)
class Estimate:
    """By formula; None where the model's size or the number of pairs is unknown."""

    parameters: int
    memory: Memory
    gpu_memory: float | None
    place: str
    tokens_per_micro_batch: int | None
    """The largest that fits; None where one pair does not, or where no GPU's memory is given."""
    trials_on_a_gpu: tuple[int, int] | None
    """With adapters, by memory: that many with a copy of the model each, and that many over one frozen model."""
    flops_per_trial: float | None
    gpu_hours_per_trial: float | None
    gpu_hours: float | None
    cost: float | None
    assumed: str
    warnings: tuple[str, ...]


def estimate(
    configs: Sequence[TrialConfig],
    updates: Sequence[int],
    shape: Shape,
    machine: Machine,
    trials: int | None,
    *,
    eval_pairs: int | None,
) -> Estimate:
    """Of the dearest of these trials; `updates`: of each, or empty where unknown."""
    largest = dearest(configs, shape, machine)
    fits, warnings = None, list[str]()
    if (room := machine.room) is not None:
        fits = tokens_that_fit(largest, shape, room, machine.processes, machine.trials)
        if fits is None:
            warnings.append(does_not_fit(largest, shape, machine))
        elif fits < largest.training.tokens_per_micro_batch:
            warnings.append(
                f"by formula training.tokens_per_micro_batch {largest.training.tokens_per_micro_batch:,} does not fit "
                f"{machine.place}; {fits:,} does, with the same results"
            )
    flops = max(
        (_flops(c, shape, n, machine, eval_pairs) for c, n in zip(configs, updates, strict=False)), default=None
    )
    speed = machine.tflops * 1e12 * machine.efficiency * 3600
    each = None if flops is None else flops / speed
    total = None if flops is None or trials is None else trials * flops / speed
    if total is not None and updates and any(isinstance(c.loss, DpoLoss) for c in configs):
        total += _reference(configs, updates, shape, machine) / speed
    return Estimate(
        parameters=shape.parameters,
        memory=memory(largest, shape, tokens_of(largest), machine.processes, machine.trials),
        gpu_memory=machine.gpu_memory,
        place=machine.place,
        tokens_per_micro_batch=fits,
        trials_on_a_gpu=_on_a_gpu(largest, shape, machine),
        flops_per_trial=flops,
        gpu_hours_per_trial=each,
        gpu_hours=total,
        cost=None if total is None or machine.price is None else total * machine.price,
        assumed=_assumed(machine) + ("" if eval_pairs is not None else ", without evaluation"),
        warnings=tuple(warnings),
    )


def _on_a_gpu(config: TrialConfig, shape: Shape, machine: Machine) -> tuple[int, int] | None:
    if machine.gpu_memory is None or machine.processes > 1 or config.lora is None or config.engine == "trl":
        return None
    return most_trials(config, shape, machine.gpu_memory)


def tokens_of(config: TrialConfig) -> int:
    """Of a micro-batch: its budget, or one pair where that is more."""
    return max(config.training.tokens_per_micro_batch, 2 * config.data.max_length)


def dearest(configs: Sequence[TrialConfig], shape: Shape, machine: Machine) -> TrialConfig:
    """The trial that takes the most memory."""
    return max(configs, key=lambda c: memory(c, shape, tokens_of(c), machine.processes, machine.trials).total)


def does_not_fit(config: TrialConfig, shape: Shape, machine: Machine) -> str:
    """That not even one pair fits, and the first change that helps."""
    assert machine.room is not None
    need = memory(config, shape, 2 * config.data.max_length, machine.processes, machine.trials).total
    helps = smaller(config, shape, machine.room, machine.processes, machine.trials)
    what = "one pair" if machine.trials == 1 else f"one pair beside {machine.trials - 1} more trials"
    return f"by formula {what} takes {need / GB:,.0f} GB, which {machine.place} has not: " + (
        f"it fits with {helps}" if helps else "no setting here makes it fit"
    )


def update_seconds(config: TrialConfig, shape: Shape, machine: Machine) -> float:
    """Of one update, on all GPUs of the trial."""
    return _update(config, shape, machine) / (machine.tflops * 1e12 * machine.efficiency * machine.processes)


def _update(config: TrialConfig, shape: Shape, machine: Machine) -> float:
    """FLOPs: 6 per weight and token, 4 with adapters, 2 more where checkpointing computes the forward pass again."""
    tokens = machine.tokens_per_pair or 2 * config.data.max_length
    forwards = (3 if config.lora is None else 2) + (1 if config.training.gradient_checkpointing else 0)
    return config.training.pairs_per_update * _forward(shape, tokens) * forwards


def _flops(config: TrialConfig, shape: Shape, updates: int, machine: Machine, eval_pairs: int | None) -> float:
    tokens = machine.tokens_per_pair or 2 * config.data.max_length
    trained = updates * _update(config, shape, machine)
    every = config.training.eval_steps or max(1, updates // 10)
    return trained + (eval_pairs or 0) * (math.ceil(updates / every) + 1) * _forward(shape, tokens)


def _forward(shape: Shape, tokens: int) -> float:
    """FLOPs of one pair: the weights, and causal attention over two sequences of half the tokens each."""
    weights = shape.linear_parameters + shape.vocabulary * shape.hidden
    return 2.0 * weights * tokens + shape.layers * shape.heads * shape.head_dim * float(tokens) ** 2


def _reference(configs: Sequence[TrialConfig], updates: Sequence[int], shape: Shape, machine: Machine) -> float:
    """The start model's log-probs of every pair, once per sweep."""
    config = configs[0]
    epochs = max(1.0, config.training.num_train_epochs)
    pairs = max(updates) * config.training.pairs_per_update / epochs
    return pairs * _forward(shape, machine.tokens_per_pair or 2 * config.data.max_length)


def _assumed(machine: Machine) -> str:
    pair = f"{machine.tokens_per_pair:,} tokens per pair" if machine.tokens_per_pair else "every pair at full length"
    rows = f", {machine.train_pairs:,} training pairs" if machine.train_pairs else ""
    return f"{pair}{rows}, {machine.efficiency:.0%} of {machine.tflops:,.0f} TFLOP/s on a GPU"
