"""Time, GPU-hours and cost of a sweep from its FLOPs, at an assumed efficiency. Nothing here is measured.

Trials that share a GPU have a copy of the model each, or run in one process over one frozen model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.spec.estimates.gpu_memory import (
    GB,
    Memory,
    max_micro_batch_tokens,
    max_trials_per_gpu,
    memory,
    suggest_change,
)
from orchestrator.spec.estimates.input_sizes import ModelShape, model_shape
from orchestrator.spec.search.corners import corner_configs
from orchestrator.spec.search.dimensions import Scalar
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.loss_config import DpoLoss, KtoLoss
from trainer.config.trial import TrialConfig

PEAK_TFLOPS = 989.0
"""TFLOP/s of dense bfloat16 matrix products on an H100 or H200, by NVIDIA's data sheet."""
EFFICIENCY = 0.3
"""Share of the peak that training reaches; an assumption."""


@dataclass(frozen=True, slots=True)
class GpuAssumptions:
    """Assumptions of the estimate about the GPUs and the data."""

    gpu_memory: float | None = None
    """Bytes of one GPU."""
    processes: int = 1
    """Processes of one trial, each on a GPU of its own."""
    share: float = 1.0
    """Fraction of a GPU per process, below 1 if several share one."""
    trials: int = 1
    """Trials that take turns in one process over one frozen model."""
    tflops: float = PEAK_TFLOPS
    efficiency: float = EFFICIENCY
    price: float | None = None
    """Price of a GPU-hour, in any currency."""
    tokens_per_pair: int | None = None
    """By default 2 * max_length, the maximum."""
    train_pairs: int | None = None
    """Number of training pairs if the data is not on this machine."""

    @property
    def data(self) -> str:
        """The assumptions about the data as text."""
        tokens = self.tokens_per_pair
        pair = f"{tokens:,} tokens per pair" if tokens else "every pair at full length"
        return f"{pair}, {self.train_pairs:,} training pairs" if self.train_pairs else pair

    @property
    def has_gpu(self) -> bool:
        """Whether anything is stated about a GPU."""
        stated = (self.tflops, self.efficiency) != (PEAK_TFLOPS, EFFICIENCY)
        return stated or self.gpu_memory is not None or self.price is not None

    @property
    def memory_per_process(self) -> float | None:
        """Bytes of GPU memory that a process may use."""
        return None if self.gpu_memory is None else self.gpu_memory * self.share

    @property
    def description(self) -> str:
        """The memory per process as text, such as "a GPU of 80 GB"."""
        gpu = f"{(self.gpu_memory or 0.0) / GB:,.0f} GB"
        several = "" if self.trials == 1 else f" for {self.trials} trials"
        if self.share < 1:
            return f"{self.share:g} of a GPU of {gpu}{several}"
        return f"a GPU of {gpu}{several}" if self.processes == 1 else f"each of {self.processes} GPUs of {gpu}"


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """Estimates by formula; None if the model's size or the number of pairs is unknown."""

    parameters: int
    memory: Memory
    gpu_memory: float | None
    gpu_description: str
    tokens_per_micro_batch: int | None
    """The largest that fits; None if one pair does not fit, or if the GPU's memory is unknown."""
    trials_on_a_gpu: tuple[int, int] | None
    """How many adapter trials fit a GPU: with a copy of the model each, and over one frozen model."""
    flops_per_trial: float | None
    gpu_hours_per_trial: float | None
    gpu_hours: float | None
    cost: float | None
    assumed: str
    warnings: tuple[str, ...]


def estimate_cost(
    configs: Sequence[TrialConfig],
    updates: Sequence[int],
    shape: ModelShape,
    assumptions: GpuAssumptions,
    trials: int | None,
    *,
    eval_pairs: int | None,
) -> CostEstimate:
    """Estimate memory, time and cost of a sweep.

    Args:
        configs: Configurations at the corners of the search space; the largest sets memory and time.
        updates: Updates of each configuration; empty if unknown.
        shape: Shape of the initial model.
        assumptions: Assumptions about GPUs and data.
        trials: Trials of the sweep; None if unknown.
        eval_pairs: Held-out pairs; None if unknown.
    """
    largest = largest_config(configs, shape, assumptions)
    fits, warnings = None, list[str]()
    if (available := assumptions.memory_per_process) is not None:
        fits = max_micro_batch_tokens(largest, shape, available, assumptions.processes, assumptions.trials)
        if fits is None:
            warnings.append(too_large_message(largest, shape, assumptions))
        elif fits < largest.training.tokens_per_micro_batch:
            warnings.append(
                f"by formula training.tokens_per_micro_batch {largest.training.tokens_per_micro_batch:,} does not fit "
                f"{assumptions.description}; {fits:,} does, with the same results"
            )
    flops = max(
        (_trial_flops(c, shape, n, assumptions, eval_pairs) for c, n in zip(configs, updates, strict=False)),
        default=None,
    )
    speed = assumptions.tflops * 1e12 * assumptions.efficiency * 3600
    each = None if flops is None else flops / speed
    total = None if flops is None or trials is None else trials * flops / speed
    if (
        total is not None
        and updates
        and any(isinstance(c.loss, DpoLoss | KtoLoss) and not c.loss.moves_reference for c in configs)
    ):
        total += _reference_flops(configs, updates, shape, assumptions) / speed
    return CostEstimate(
        parameters=shape.parameters,
        memory=memory(largest, shape, micro_batch_tokens(largest), assumptions.processes, assumptions.trials),
        gpu_memory=assumptions.gpu_memory,
        gpu_description=assumptions.description,
        tokens_per_micro_batch=fits,
        trials_on_a_gpu=_trials_on_a_gpu(largest, shape, assumptions),
        flops_per_trial=flops,
        gpu_hours_per_trial=each,
        gpu_hours=total,
        cost=None if total is None or assumptions.price is None else total * assumptions.price,
        assumed=_assumptions_text(assumptions) + ("" if eval_pairs is not None else ", without evaluation"),
        warnings=tuple(warnings),
    )


def _trials_on_a_gpu(config: TrialConfig, shape: ModelShape, assumptions: GpuAssumptions) -> tuple[int, int] | None:
    if assumptions.gpu_memory is None or assumptions.processes > 1 or config.lora is None or config.engine == "trl":
        return None
    return max_trials_per_gpu(config, shape, assumptions.gpu_memory)


def micro_batch_tokens(config: TrialConfig) -> int:
    """Return the tokens of a micro-batch: tokens_per_micro_batch, or one pair if that is more."""
    return max(config.training.tokens_per_micro_batch, 2 * config.data.max_length)


def largest_config(configs: Sequence[TrialConfig], shape: ModelShape, assumptions: GpuAssumptions) -> TrialConfig:
    """Return the configuration that takes the most memory."""
    return max(
        configs, key=lambda c: memory(c, shape, micro_batch_tokens(c), assumptions.processes, assumptions.trials).total
    )


def too_large_message(config: TrialConfig, shape: ModelShape, assumptions: GpuAssumptions) -> str:
    """Return the message that not even one pair fits, with the first change that makes it fit."""
    assert assumptions.memory_per_process is not None
    need = memory(config, shape, 2 * config.data.max_length, assumptions.processes, assumptions.trials).total
    helps = suggest_change(config, shape, assumptions.memory_per_process, assumptions.processes, assumptions.trials)
    what = (
        "one pair" if assumptions.trials == 1 else f"one pair with {assumptions.trials - 1} more trials in the process"
    )
    return f"by formula {what} takes {need / GB:,.0f} GB, more than {assumptions.description} has: " + (
        f"it fits with {helps}" if helps else "no setting makes it fit"
    )


def update_seconds(config: TrialConfig, shape: ModelShape, assumptions: GpuAssumptions) -> float:
    """Return the seconds of one update on all GPUs of the trial, by formula."""
    return _update_flops(config, shape, assumptions) / (
        assumptions.tflops * 1e12 * assumptions.efficiency * assumptions.processes
    )


def _update_flops(config: TrialConfig, shape: ModelShape, assumptions: GpuAssumptions) -> float:
    """FLOPs: 6 per weight and token, 4 with adapters, 2 more if gradient checkpointing repeats the forward pass, 2 more
    for a reference that moves, 2 more for responses after other prompts (KTO).
    """
    tokens = assumptions.tokens_per_pair or 2 * config.data.max_length
    forwards = (3 if config.lora is None else 2) + config.training.gradient_checkpointing
    forwards += config.loss.moves_reference + config.loss.scores_mismatched
    return config.training.pairs_per_update * _forward_flops(shape, tokens) * forwards


def _trial_flops(
    config: TrialConfig, shape: ModelShape, updates: int, assumptions: GpuAssumptions, eval_pairs: int | None
) -> float:
    tokens = assumptions.tokens_per_pair or 2 * config.data.max_length
    trained = updates * _update_flops(config, shape, assumptions)
    every = config.training.eval_steps or max(1, updates // 10)
    passes = (math.ceil(updates / every) + 1) * (1 + config.loss.scores_mismatched)
    return trained + (eval_pairs or 0) * passes * _forward_flops(shape, tokens)


def _forward_flops(shape: ModelShape, tokens: int) -> float:
    """FLOPs of one pair: linear layers, output layer, causal attention over two sequences of half the tokens each."""
    weights = shape.linear_parameters + shape.vocabulary * shape.hidden
    return 2.0 * weights * tokens + shape.layers * shape.heads * shape.head_dim * float(tokens) ** 2


def _reference_flops(
    configs: Sequence[TrialConfig], updates: Sequence[int], shape: ModelShape, assumptions: GpuAssumptions
) -> float:
    """FLOPs of the reference model's log-probs of every pair, once per sweep."""
    config, passes = configs[0], 1 + any(c.loss.scores_mismatched for c in configs)
    epochs = max(1.0, config.training.num_train_epochs)
    pairs = max(updates) * config.training.pairs_per_update / epochs
    return passes * pairs * _forward_flops(shape, assumptions.tokens_per_pair or 2 * config.data.max_length)


def _assumptions_text(assumptions: GpuAssumptions) -> str:
    return f"{assumptions.data}, {assumptions.efficiency:.0%} of {assumptions.tflops:,.0f} TFLOP/s on a GPU"


_MODEL_PREFIX = "model."


def cannot_share_base(
    base: TrialConfig, search: SearchSpace, enqueue: Sequence[Mapping[str, Scalar]] = ()
) -> Iterator[tuple[str, str]]:
    """Yield why trials cannot share one frozen model: the setting and a message."""
    given = [apply_params(base, params) for params in enqueue]
    configs = [*corner_configs(search, base), *given]
    if any(config.lora is None for config in configs):
        yield "lora", "trials without it change the model's own weights"
    if any(config.engine == "trl" for config in configs):
        yield "engine", "TRL's trainers run one trial per process"
    for path in search.paths:
        if path.startswith(_MODEL_PREFIX):
            yield path, "its values are different models"
    if any(config.model != base.model for config in given):
        yield "enqueue", "one of its trials has another model"


def trials_per_process(spec: SweepSpec, gpu_memory: float | None) -> int:
    """Return how many trials take turns in one process.

    `auto` is the smallest number with which, by formula, all trials that share a GPU of `gpu_memory` bytes fit (None:
    no GPU, or unknown memory). Trials in turns save memory and no time.
    """
    requested = spec.resources.trials_per_process
    if requested != "auto":
        return requested
    share, shape = spec.resources.gpus_per_trial, model_shape(spec.base.model)
    if share is None or not 0 < share <= 0.5 or gpu_memory is None or shape is None:
        return 1
    if next(cannot_share_base(spec.base, spec.search, spec.enqueue), None) is not None:
        return 1
    configs, most = corner_configs(spec.search, spec.base), int(1 / share + 1e-9)
    assumptions = GpuAssumptions(gpu_memory=gpu_memory)
    for trials in range(1, most + 1):
        if most % trials == 0 and _fits(
            configs, shape, replace(assumptions, share=min(1.0, trials * share), trials=trials)
        ):
            return trials
    return 1


def gpu_share(spec: SweepSpec, gpu_memory: float | None, assumptions: GpuAssumptions | None = None) -> GpuAssumptions:
    """Return the assumptions with the share of a GPU of `gpu_memory` bytes per process, and its number of trials."""
    trials = trials_per_process(spec, gpu_memory)
    share = min(1.0, trials * (spec.resources.gpus_per_trial or 1.0))
    return replace(assumptions or GpuAssumptions(), gpu_memory=gpu_memory, share=share, trials=trials)


def check_share(spec: SweepSpec, gpu_memory: float | None) -> None:
    """Raise SpecError if by formula the largest trial, one pair at a time, exceeds its share of the GPU's memory."""
    share, shape = spec.resources.gpus_per_trial, model_shape(spec.base.model)
    assumptions = gpu_share(spec, gpu_memory)
    if shape is None or gpu_memory is None or (assumptions.trials == 1 and (share is None or not 0 < share < 1)):
        return
    configs = corner_configs(spec.search, spec.base)
    if _fits(configs, shape, assumptions):
        return
    message = too_large_message(largest_config(configs, shape, assumptions), shape, assumptions)
    if assumptions.trials > 1:
        where, problem = "trials_per_process", f"{assumptions.trials} is too many: {message}"
        raise SpecError([SpecProblem("resources", f"resources.{where}", problem, "or set fewer trials per process")])
    problem = f"{share:g} is too little: {message}"
    raise SpecError([SpecProblem("resources", "resources.gpus_per_trial", problem, "or set a larger share, at most 1")])


def _fits(configs: list[TrialConfig], shape: ModelShape, assumptions: GpuAssumptions) -> bool:
    assert assumptions.memory_per_process is not None
    return (
        max_micro_batch_tokens(
            largest_config(configs, shape, assumptions),
            shape,
            assumptions.memory_per_process,
            trials=assumptions.trials,
        )
        is not None
    )
