"""`LayoutChoice`: the rules by which the trials of a sweep are laid out on GPUs, with the memory formula.

In their order: the fewest GPUs per trial that hold the most demanding configuration; no gradient checkpointing where it
fits without; the largest micro-batch that fits; several small trials on one GPU. A setting that is not left to `auto`
keeps its value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.spec.estimates.gpu_memory import GB, memory, usable_bytes
from orchestrator.spec.estimates.input_sizes import ModelShape
from orchestrator.spec.sweep_spec import (
    AUTO_TRAINING,
    CHECKPOINTING,
    DISTRIBUTED,
    GPUS_PER_TRIAL,
    MICRO_BATCH,
    Resources,
)
from trainer.config.trial import TrainingConfig, TrialConfig

_WITHOUT_CHECKPOINTING = 2048
"""Tokens of a micro-batch below which checkpointing is turned on to have larger ones."""
_BUSY = 8192
"""Tokens of a micro-batch that each of several trials on one GPU must have."""
_SMALLEST, _USEFUL = 256, 1 << 15
"""Larger micro-batches are no faster: at 8,192 tokens the matrix products of a 1B model fill an H100."""
_MOST_ON_A_GPU = 8
_SMALLEST_SHARE = 6 * GB
"""Bytes of a GPU per process: CUDA itself takes about half a GB in each."""


@dataclass(frozen=True, slots=True)
class MachineGpus:
    """GPUs of one machine that a sweep may use.

    `memory`: bytes of each, None where unknown; `cpus`: cores, which limit how many trials share a GPU.
    """

    memory: tuple[float | None, ...] = ()
    cpus: float = math.inf


@dataclass(frozen=True, slots=True)
class StageSettings:
    """Settings of `training` for the trials or for the SFT stage."""

    distributed: str
    gradient_checkpointing: bool
    tokens_per_micro_batch: int

    def apply(self, training: TrainingConfig, paths: Collection[str] = AUTO_TRAINING) -> TrainingConfig:
        """Return the section with the values of these `paths`, each `training.NAME`."""
        names = [path.rpartition(".")[2] for path in paths]
        return training.model_copy(update={name: getattr(self, name) for name in names})


def with_settings(config: TrialConfig, settings: StageSettings, paths: Collection[str]) -> TrialConfig:
    """Return the configuration with the values of these `paths`.

    4 bits, compiled layers and TRL's trainers are not sharded.
    """
    if not config.model.can_be_sharded or config.engine == "trl":
        paths = [path for path in paths if path != DISTRIBUTED]
    return config.model_copy(update={"training": settings.apply(config.training, paths)})


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the trials of a sweep are laid out; explicit settings are repeated, `reasons` has the chosen ones."""

    gpus_per_trial: float
    trials: StageSettings
    sft: StageSettings | None
    trials_per_process: int
    """Trials that take turns in one process over one frozen model."""
    trials_at_a_time: int | None
    """None without GPUs, where CPUs limit them."""
    memory: int | None
    """Bytes that the largest trial takes on each of its GPUs by formula; with a share, of its process."""
    capacity: float | None
    """Bytes that it may take there."""
    reasons: tuple[str, ...]

    @property
    def processes(self) -> int:
        """Processes of one trial, each on a GPU."""
        return max(1, int(self.gpus_per_trial))

    def __str__(self) -> str:
        return "; ".join(self.reasons)


Case = tuple[TrialConfig, ModelShape | None]
"""A configuration and the shape of its model; None if unknown."""


def settings_of(training: TrainingConfig) -> StageSettings:
    """Return the section's own values."""
    return StageSettings(training.distributed, training.gradient_checkpointing, training.tokens_per_micro_batch)


@dataclass(frozen=True, slots=True)
class Layout:
    """Processes of a trial, or its share of a GPU and how many trials its process has."""

    processes: int = 1
    share: float = 1.0
    together: int = 1

    @property
    def process_share(self) -> float:
        """Share of a GPU of each process."""
        return min(1.0, self.share * self.together)

    @property
    def gpus_per_trial(self) -> float:
        """GPUs of a trial, below 1 where several share one."""
        return float(self.processes) if self.processes > 1 else self.share


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """The choice of a layout. Fields as the arguments of `arrangement.arrange`; all sizes are known."""

    configs: Sequence[Case]
    sft: Case | None
    machines: Sequence[MachineGpus]
    resources: Resources
    auto: Collection[str]
    trials: int | None
    concurrency: int | None
    shared_at_most: int | None
    can_share_base: bool

    @property
    def gpu_bytes(self) -> float:
        """Bytes of the smallest GPU, as any trial may get it."""
        return min(size for machine in self.machines for size in machine.memory if size is not None)

    @property
    def gpus(self) -> int:
        """GPUs of all machines."""
        return sum(len(machine.memory) for machine in self.machines)

    @property
    def gpus_are_auto(self) -> bool:
        """Whether GPUs per trial are to be chosen."""
        return GPUS_PER_TRIAL in self.auto and self.resources.processes_per_trial is None

    def best(self) -> Arrangement | None:
        """Return the first layout that holds every configuration, by the rules of this module."""
        for required in (True, False):
            for layout in self.layouts():
                if (found := self.settings(layout, required=required)) is None:
                    continue
                if self.gpus_are_auto and layout == Layout():
                    layout, found = self.shared(found)
                return self.arrangement(layout, found)
        return None

    def layouts(self) -> Iterator[Layout]:
        """Yield the layouts that are tried, fewest GPUs first; shares of a GPU that are chosen come later."""
        resources, together = self.resources, self.resources.trials_per_process
        if not self.gpus_are_auto:
            several = 1 if together == "auto" else together
            gpus = resources.gpus_per_trial or (float(resources.processes) if several == 1 else _share(several))
            if gpus > 1:
                yield Layout(int(gpus))
                return
            most = int(1 / gpus + 1e-9)
            fixed = together != "auto"
            options = [together] if fixed else [n for n in range(1, most + 1) if most % n == 0]
            yield from (Layout(1, gpus, n) for n in options if n == 1 or fixed or self.can_share_base)
            return
        if together != "auto" and together > 1:
            yield Layout(1, _share(together), together)
            return
        yield Layout()
        yield from (Layout(n) for n in self.process_counts(max(len(machine.memory) for machine in self.machines)))

    def process_counts(self, most: int) -> Iterator[int]:
        """Counts above 1 that can make a trial fit, by sharding with fsdp2: not in 4 bits, not with compiled layers."""
        cases = [*self.configs, *([] if self.sft is None else [self.sft])]
        can_shard = any(self.can_shard(config, "sft" if config.loss.kind == "sft" else "base") for config, _ in cases)
        if can_shard and not any(config.engine == "trl" for config, _ in self.configs):
            counts = itertools.takewhile(lambda n: n <= most, (1 << power for power in itertools.count(1)))
            yield from dict.fromkeys((*counts, most) if most > 1 else ())

    def can_shard(self, config: TrialConfig, prefix: str) -> bool:
        """Return whether several processes can hold one model of this configuration together."""
        if not config.model.can_be_sharded or config.engine == "trl":
            return False
        return f"{prefix}.{DISTRIBUTED}" in self.auto or config.training.distributed != "ddp"

    def settings(self, layout: Layout, *, required: bool = True) -> tuple[StageSettings, StageSettings | None] | None:
        """Return the settings of trials and SFT stage with which all fit this layout; None if they do not.

        `required`: an explicit micro-batch must fit too; else one pair is enough, as out of memory it is halved.
        """
        trials = self.stage(self.configs, "base", layout, required=required)
        if trials is None or self.sft is None:
            return None if trials is None else (trials, None)
        sft = self.stage([self.sft], "sft", replace(layout, together=1), required=required)
        return None if sft is None else (trials, sft)

    def stage(self, cases: Sequence[Case], prefix: str, layout: Layout, *, required: bool) -> StageSettings | None:
        """Return the settings of trials (`prefix` base) or of the SFT stage (sft); arguments as of `settings`."""
        first, given = cases[0][0].training, f"{prefix}.{MICRO_BATCH}" not in self.auto
        useful = max(_useful_tokens(config, layout.processes) for config, _ in cases)
        if given:
            least = max(config.training.tokens_per_micro_batch for config, _ in cases) if required else 1
            wanted = [(False, least), (True, least)]
        else:
            wanted = [(False, min(_WITHOUT_CHECKPOINTING, useful)), (True, 1), (False, 1)]
        for (checkpointing, least), distributed in itertools.product(wanted, ("ddp", "fsdp2")):
            if f"{prefix}.{CHECKPOINTING}" not in self.auto and checkpointing != first.gradient_checkpointing:
                continue
            if distributed != first.distributed and (
                f"{prefix}.{DISTRIBUTED}" not in self.auto or layout.processes == 1
            ):
                continue
            settings = StageSettings(distributed, checkpointing, first.tokens_per_micro_batch)
            if not self.fits(cases, prefix, layout, settings, least):
                continue
            if given:
                return settings
            fitting = self.fitting_tokens(cases, prefix, layout, settings)
            return replace(settings, tokens_per_micro_batch=min(fitting, useful))
        return None

    def fits(self, cases: Sequence[Case], prefix: str, layout: Layout, settings: StageSettings, tokens: int) -> bool:
        """Return whether a micro-batch of `tokens`, but at least one pair, fits with every configuration."""
        available = usable_bytes(self.gpu_bytes * layout.process_share)
        return all(self.bytes_needed(case, prefix, layout, settings, tokens) <= available for case in cases)

    def fitting_tokens(self, cases: Sequence[Case], prefix: str, layout: Layout, settings: StageSettings) -> int:
        """Return the largest micro-batch, a power of two, that fits with every configuration; one pair does."""
        tokens = _SMALLEST
        while tokens < _USEFUL and self.fits(cases, prefix, layout, settings, 2 * tokens):
            tokens *= 2
        return tokens

    def saving_settings(self, layout: Layout) -> StageSettings:
        """Return the settings that take the least memory."""
        return StageSettings("ddp" if layout.processes == 1 else "fsdp2", True, _SMALLEST)

    def applied(self, config: TrialConfig, prefix: str, settings: StageSettings) -> TrialConfig:
        """Return the configuration with the settings that are left to auto."""
        return with_settings(config, settings, [p for p in AUTO_TRAINING if f"{prefix}.{p}" in self.auto])

    def shared(
        self, whole: tuple[StageSettings, StageSettings | None]
    ) -> tuple[Layout, tuple[StageSettings, StageSettings | None]]:
        """Return a share of a GPU where several trials fit it with large micro-batches and no more checkpointing."""
        useful = max(_useful_tokens(config, 1) for config, _ in self.configs)
        busy = whole[0].tokens_per_micro_batch if f"base.{MICRO_BATCH}" not in self.auto else min(_BUSY, useful)
        at_a_time = min(self.trials or math.inf, self.concurrency or math.inf)
        cores = min(machine.cpus / len(machine.memory) for machine in self.machines if machine.memory)
        wanted = min(math.ceil(min(at_a_time, 1e9) / self.gpus), (self.shared_at_most or math.inf) // self.gpus)
        most = min(_MOST_ON_A_GPU, wanted, self.gpu_bytes // _SMALLEST_SHARE, cores)
        together = self.resources.trials_per_process

        def fits(layout: Layout, tokens: int) -> tuple[StageSettings, StageSettings | None] | None:
            found = self.settings(layout)
            if found is None or found[0].tokens_per_micro_batch < tokens:
                return None
            return found if _checkpointing(found) == _checkpointing(whole) else None

        for count in range(int(most), 1, -1):
            layout = Layout(1, _share(count))
            if (found := fits(layout, busy)) is not None:
                return layout, found
        if together == "auto" and self.can_share_base and self.concurrency is not None:
            count = math.ceil(min(at_a_time, 64 * self.gpus) / self.gpus)
            layout = Layout(1, _share(count), count)
            if count > 1 and (found := fits(layout, min(busy, whole[0].tokens_per_micro_batch))) is not None:
                return layout, found
        return Layout(), whole

    def arrangement(self, layout: Layout, found: tuple[StageSettings, StageSettings | None]) -> Arrangement:
        """Return the arrangement of this layout, with its memory and reasons."""
        settings, sft = found
        each = layout.gpus_per_trial
        slots = sum(
            len(machine.memory) // layout.processes * (int(1 / layout.share + 1e-3) if layout.processes == 1 else 1)
            for machine in self.machines
        )
        at_a_time = min(slots, self.trials or slots, self.concurrency or slots)
        needed = max(
            self.bytes_needed(case, "base", layout, settings, settings.tokens_per_micro_batch) for case in self.configs
        )
        return Arrangement(
            gpus_per_trial=each,
            trials=settings,
            sft=sft,
            trials_per_process=layout.together,
            trials_at_a_time=at_a_time,
            memory=needed,
            capacity=self.gpu_bytes * layout.process_share,
            reasons=tuple(_reasons(self, layout, found, at_a_time, needed)),
        )

    def bytes_needed(self, case: Case, prefix: str, layout: Layout, settings: StageSettings, tokens: int = 1) -> int:
        """Return the bytes of a micro-batch of `tokens`, but at least one pair, on each GPU of a trial."""
        config, shape = case
        assert shape is not None
        applied = self.applied(config, prefix, settings)
        return memory(applied, shape, max(tokens, 2 * config.data.max_length), layout.processes, layout.together).total


def _share(count: int) -> float:
    """Return the share of a GPU of each of `count` trials, with the four digits that Ray keeps."""
    return math.floor(1e4 / count) / 1e4


def _checkpointing(found: tuple[StageSettings, StageSettings | None]) -> tuple[bool, bool]:
    trials, sft = found
    return trials.gradient_checkpointing, sft is not None and sft.gradient_checkpointing


def _useful_tokens(config: TrialConfig, processes: int) -> int:
    """Return the tokens of a process's part of an update, as a power of two, but at most `_USEFUL`."""
    pairs = -(-config.training.pairs_per_update // processes)
    return min(_USEFUL, max(_SMALLEST, 1 << (pairs * 2 * config.data.max_length - 1).bit_length()))


def _reasons(
    choice: LayoutChoice, layout: Layout, found: tuple[StageSettings, StageSettings | None], at_a_time: int, needed: int
) -> Iterator[str]:
    """Yield one sentence per choice."""
    settings, sft = found
    useful = max(_useful_tokens(config, layout.processes) for config, _ in choice.configs)
    yield from _layout_reasons(choice, layout, settings)
    each = f"{needed / GB:,.0f} of {choice.gpu_bytes * layout.process_share / GB:,.0f} GB by formula"
    if f"base.{CHECKPOINTING}" in choice.auto:
        tokens = _WITHOUT_CHECKPOINTING if f"base.{MICRO_BATCH}" in choice.auto else settings.tokens_per_micro_batch
        tokens = max(min(tokens, useful), *(2 * config.data.max_length for config, _ in choice.configs), 0)
        on = f"on: micro-batches of {tokens:,} tokens do not fit without"
        yield f"gradient checkpointing {on if settings.gradient_checkpointing else 'off: it fits without'}"
    if f"base.{MICRO_BATCH}" in choice.auto:
        tokens = settings.tokens_per_micro_batch
        why = "the largest that fits" if tokens < useful else "a larger one would be no faster"
        yield f"micro-batches of {tokens:,} tokens: {why} ({each})"
    if sft is not None and any(path.startswith("sft.") for path in choice.auto):
        text = f"{'with' if sft.gradient_checkpointing else 'without'} checkpointing"
        yield f"the SFT stage {text}, micro-batches of {sft.tokens_per_micro_batch:,} tokens"
    idle = choice.gpus - math.ceil(at_a_time * layout.gpus_per_trial - 1e-3)
    if choice.gpus_are_auto and idle > 0:
        yield f"{idle} of {choice.gpus} GPUs stay idle: {_idle_reason(choice, at_a_time, layout)}"


def _layout_reasons(choice: LayoutChoice, layout: Layout, settings: StageSettings) -> Iterator[str]:
    sizes = {size for machine in choice.machines for size in machine.memory}
    if len(sizes) > 1:
        yield f"the smallest GPU counts, of {choice.gpu_bytes / GB:,.0f} GB"
    if choice.gpus_are_auto:
        if layout.processes > 1:
            yield f"{layout.processes} GPUs per trial: fewer do not hold the largest one"
        elif layout.together > 1:
            yield f"{layout.together} trials in turn over one frozen model on each GPU, for budget.concurrency"
        elif layout.share < 1:
            yield f"{int(1 / layout.share + 1e-3)} trials on each GPU: all fit without more checkpointing"
        else:
            yield "1 GPU per trial: it holds the largest one"
    if layout.processes > 1 and f"base.{DISTRIBUTED}" in choice.auto:
        why = "each GPU holds all of the model" if settings.distributed == "ddp" else "no GPU holds all of the model"
        yield f"{settings.distributed}: {why}"


def _idle_reason(choice: LayoutChoice, at_a_time: int, layout: Layout) -> str:
    if at_a_time == choice.concurrency:
        return f"budget.concurrency is {at_a_time}"
    if at_a_time == choice.trials:
        return f"the sweep has {at_a_time} trial{'' if at_a_time == 1 else 's'}"
    return f"a trial takes {layout.processes} GPUs of one machine"
