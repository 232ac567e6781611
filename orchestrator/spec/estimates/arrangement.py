"""`arrange`: GPUs, sharding, checkpointing and micro-batch of a sweep's trials for given machines, by formula.

Where nothing fits, the smallest change that fits. Nothing here is measured, and no choice changes a result beyond
rounding. The rules are in `gpu_layouts`.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.spec.estimates.cost_estimate import cannot_share_base
from orchestrator.spec.estimates.gpu_layouts import (
    Arrangement,
    Case,
    Layout,
    LayoutChoice,
    MachineGpus,
    settings_of,
    with_settings,
)
from orchestrator.spec.estimates.gpu_memory import GB, usable_bytes
from orchestrator.spec.estimates.input_sizes import ModelShape, model_shape
from orchestrator.spec.pruners import depends_on_other_trials
from orchestrator.spec.samplers import AdaptiveSampler
from orchestrator.spec.search.corners import corner_configs
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import (
    AUTO,
    AUTO_TRAINING,
    CHECKPOINTING,
    DISTRIBUTED,
    GPUS_PER_TRIAL,
    Resources,
    SweepSpec,
)
from trainer.config.loss_config import DpoLoss, SftLoss
from trainer.config.trial import LoraConfig, TrialConfig


@dataclass(frozen=True, slots=True)
class NothingFits:
    """No arrangement of these GPUs holds one pair of the largest trial."""

    problem: str
    path: str
    """The setting of the file at fault."""
    change: tuple[str, ...]
    """The smallest change that fits, each PATH=VALUE for `--set`; empty if none does."""
    gpus_needed: int | None
    """GPUs of this memory in one machine that would hold a trial as it is; None if no number does."""

    def hint(self, command: str = "", *, is_new: bool = True) -> str:
        """Return the way out as text.

        Args:
            command: The command to repeat, such as `orchestrate sweep FILE`.
            is_new: Whether the sweep has yet to start; later only `resources` may change.
        """
        ways: list[str] = []
        if self.change and (is_new or all(one.startswith("resources.") for one in self.change)):
            options = " ".join(f"--set {shlex.quote(one)}" for one in self.change)
            rate = "; adapters need about ten times the learning rate" if "base.lora={}" in self.change else ""
            ways.append(f"it fits with {f'{command} {options}' if command else options}{rate}")
        if self.gpus_needed is not None:
            ways.append(f"{self.gpus_needed} such GPUs in one machine hold it unchanged")
        return "; or ".join(ways) or "no setting makes it fit"


class DoesNotFit(SpecError):
    """The sweep fits no arrangement of the GPUs at hand."""

    def __init__(self, found: NothingFits, where: str, hint: str) -> None:
        self.found = found
        super().__init__([SpecProblem(where, found.path, found.problem, hint)])


def arranged(
    spec: SweepSpec, machines: Sequence[MachineGpus], *, is_new: bool = True
) -> tuple[SweepSpec, Arrangement | None]:
    """Return the sweep with the values chosen for these machines, and the arrangement; None if nothing is `auto`.

    Raises:
        DoesNotFit: no arrangement holds one pair. `is_new`: see `NothingFits.hint`.
    """
    if not spec.auto:
        return spec, None
    found = arrange_sweep(spec, machines)
    if isinstance(found, NothingFits):
        raise DoesNotFit(found, spec.name, found.hint(is_new=is_new))
    return with_arrangement(spec, found), found


def with_arrangement(spec: SweepSpec, found: Arrangement) -> SweepSpec:
    """Return the sweep with the chosen values in place of `auto`, for slots and estimates; its study keeps `auto`."""
    update: dict[str, object] = {"auto": ()}
    paths = {section: [p for p in AUTO_TRAINING if f"{section}.{p}" in spec.auto] for section in ("base", "sft")}
    update["base"] = with_settings(spec.base, found.trials, paths["base"])
    if spec.sft is not None and found.sft is not None:
        training = found.sft.apply(spec.sft.training, paths["sft"])
        update["sft"] = spec.sft.model_copy(update={"training": training})
    if found.memory is not None:
        chosen: dict[str, object] = {"trials_per_process": found.trials_per_process}
        if GPUS_PER_TRIAL in spec.auto:
            chosen["gpus_per_trial"] = found.gpus_per_trial
        update["resources"] = spec.resources.model_copy(update=chosen)
    return spec.model_copy(update=update)


def arrange_sweep(spec: SweepSpec, machines: Sequence[MachineGpus]) -> Arrangement | NothingFits:
    """Return the arrangement of this sweep on these machines.

    Args:
        spec: The sweep.
        machines: All machines; a trial never spans two of them.
    """
    configs = [spec.base]
    if any(machine.memory for machine in machines):
        configs = corner_configs(spec.search, spec.base)
        configs += [apply_params(spec.base, given) for given in spec.enqueue]
    shapes: dict[str, ModelShape | None] = {}  # read once per model
    for config in configs:
        if (key := config.model.model_dump_json()) not in shapes:
            shapes[key] = model_shape(config.model)
    trials = spec.trials_at_most
    learns = isinstance(spec.sampler, AdaptiveSampler) or depends_on_other_trials(spec.pruner)
    return arrange(
        _distinct((config, shapes[config.model.model_dump_json()]) for config in configs),
        machines,
        resources=spec.resources,
        auto=spec.auto,
        sft=None if spec.sft is None else (_sft_config(spec), model_shape(spec.base.model)),
        trials=trials,
        concurrency=spec.budget.concurrency,
        shared_at_most=trials // _TRIALS_PER_SHARED if learns and trials is not None else None,
        can_share_base=next(cannot_share_base(spec.base, spec.search, spec.enqueue), None) is None,
    )


def _sft_config(spec: SweepSpec) -> TrialConfig:
    assert spec.sft is not None
    update = {"data": spec.sft.data or spec.base.data, "loss": SftLoss(), "training": spec.sft.training}
    return spec.base.model_copy(update={**update, "lora": None, "engine": "packed"})


def _distinct(cases: Iterator[Case]) -> list[Case]:
    """Return one case of each kind that the memory formula tells apart."""
    found: dict[object, Case] = {}
    for config, shape in cases:
        training = config.training
        weighting = isinstance(config.loss, DpoLoss) and config.loss.use_weighting, config.loss.moves_reference
        rank = None if config.lora is None else config.lora.r
        of_model = config.model.dtype, config.model.load_in_4bit, config.data.max_length
        of_training = training.pairs_per_update, training.bf16, training.stochastic_rounding, settings_of(training)
        found.setdefault((shape, config.engine, weighting, rank, of_model, of_training), (config, shape))
    return list(found.values())


def arrange(
    configs: Sequence[Case],
    machines: Sequence[MachineGpus],
    *,
    resources: Resources,
    auto: Collection[str],
    sft: Case | None = None,
    trials: int | None = None,
    concurrency: int | None = None,
    shared_at_most: int | None = None,
    can_share_base: bool = False,
) -> Arrangement | NothingFits:
    """Return the arrangement of trials on the GPUs of `machines`, or why there is none.

    Args:
        configs: The most demanding configurations, such as the corners of a search, with their models' shapes.
        machines: All machines; a trial never spans two of them.
        resources: The section `resources`; values of settings in `auto` are ignored.
        auto: Paths of the file that are left to this function (`SweepSpec.auto`).
        sft: The SFT stage's configuration, which runs where a trial does.
        trials: Trials of the sweep; None if unknown.
        concurrency: The most trials at a time that the user allows.
        shared_at_most: The most trials at a time where several share a GPU, as a sampler learns from earlier ones.
        can_share_base: Whether trials can take turns over one frozen model.
    """
    sizes = [size for machine in machines for size in machine.memory]
    gpus_are_auto = GPUS_PER_TRIAL in auto and resources.processes_per_trial is None
    if not sizes or (not gpus_are_auto and resources.gpus_per_trial == 0):
        return _without_formula(configs, sft, 0.0, "no GPU: trials run on the CPU", resources)
    cases = [*configs, *([] if sft is None else [sft])]
    if None in sizes or any(shape is None for _, shape in cases):
        unknown = "the GPUs' memory" if None in sizes else "the model's size"
        gpus = resources.gpus_per_trial or 1.0
        return _without_formula(configs, sft, gpus, f"{unknown} is unknown: defaults are used", resources)
    choice = LayoutChoice(configs, sft, machines, resources, auto, trials, concurrency, shared_at_most, can_share_base)
    return choice.best() or _refusal(choice)


def _without_formula(
    configs: Sequence[Case], sft: Case | None, gpus: float, reason: str, resources: Resources
) -> Arrangement:
    """The values of the configurations, in which settings left to auto have their defaults."""
    together = resources.trials_per_process
    return Arrangement(
        gpus,
        settings_of(configs[0][0].training),
        None if sft is None else settings_of(sft[0].training),
        1 if together == "auto" else together,
        None,
        None,
        None,
        (reason,),
    )


# --- where nothing fits ----------------------------------------------------------------------------------------------


def _refusal(choice: LayoutChoice) -> NothingFits:
    layout = list(choice.layouts())[-1]
    settings = choice.saving_settings(layout)
    cases = [(case, "base") for case in choice.configs] + ([] if choice.sft is None else [(choice.sft, "sft")])
    bytes_of = [(choice.bytes_needed(case, prefix, layout, settings), prefix) for case, prefix in cases]
    needed, prefix = max(bytes_of, key=lambda found: found[0])
    what = "one pair of the SFT stage" if prefix == "sft" else "one pair of the largest trial"
    if layout.together > 1:
        what += f" with {layout.together - 1} more trials in the process"
    gpu = f"{choice.gpu_bytes / GB:,.0f} GB"
    share = "a GPU" if layout.process_share == 1 else f"{layout.process_share:g} of a GPU"
    where = f"each of {layout.processes} GPUs" if layout.processes > 1 else share
    available = usable_bytes(choice.gpu_bytes * layout.process_share) / GB
    problem = (
        f"by formula {what} takes {needed / GB:,.0f} GB on {where} of {gpu}, of which {available:,.0f} GB are usable"
    )
    path = "resources.gpus_per_trial" if GPUS_PER_TRIAL not in choice.auto else "base.model"
    if layout.together > 1:
        path = "resources.trials_per_process"
    return NothingFits(problem, path, _smallest_change(choice), _gpus_needed(choice))


def _gpus_needed(choice: LayoutChoice) -> int | None:
    if not choice.gpus_are_auto:
        return None
    counts = choice.process_counts(_MOST_PROCESSES)
    have = max(len(machine.memory) for machine in choice.machines)
    return next((n for n in counts if n > have and choice.settings(Layout(n), required=False) is not None), None)


_TRIALS_PER_SHARED = 8
"""With a sampler or a pruner that learns from trials, GPUs are shared until an eighth of the trials run at a time."""
_MOST_PROCESSES = 64
"""Processes per trial that are tried to say how many GPUs would hold a trial."""


def _smallest_change(choice: LayoutChoice) -> tuple[str, ...]:
    """Return the fewest settings with which one arrangement fits, those without effect on results first."""
    explicit = [
        *([f"{GPUS_PER_TRIAL}={AUTO}"] if choice.resources.processes_per_trial is None else []),
        *(f"base.{path}={AUTO}" for path in (CHECKPOINTING, DISTRIBUTED) if f"base.{path}" not in choice.auto),
    ]
    settings = ["base.model.dtype=bfloat16", "base.lora={}", "base.model.load_in_4bit=true"]
    for count in (1, 2, 3):
        for options in itertools.combinations([*explicit, *settings], count):
            changed = _with(choice, options)
            if changed is not None and changed.best() is not None:
                return options
    return ()


def _with(choice: LayoutChoice, options: Sequence[str]) -> LayoutChoice | None:
    """Return the choice with these settings changed; None where they are no valid change."""
    auto = {*choice.auto, *(one.removesuffix(f"={AUTO}") for one in options if one.endswith(AUTO))}
    resources = choice.resources
    if f"{GPUS_PER_TRIAL}={AUTO}" in options:
        resources = resources.model_copy(update={"gpus_per_trial": None})

    def changed(case: Case, prefix: str) -> Case:
        """Return the case of this section, `base` or `sft`, with the options."""
        config, shape = case
        model: dict[str, object] = {}
        if "base.model.dtype=bfloat16" in options:
            model["dtype"] = "bfloat16"
        if "base.model.load_in_4bit=true" in options and prefix == "base":
            model["load_in_4bit"] = True
        updates: dict[str, object] = {"model": config.model.model_copy(update=model)} if model else {}
        if "base.lora={}" in options and prefix == "base":
            updates["lora"] = config.lora or LoraConfig()
        return config.model_copy(update=updates), shape

    configs = [changed(case, "base") for case in choice.configs]
    four = [config for config, _ in configs if config.model.load_in_4bit]
    if any(config.lora is None for config in four) or ("base.model.load_in_4bit=true" in options and choice.sft):
        return None
    sharded = f"base.{DISTRIBUTED}" not in auto and any(c.training.distributed != "ddp" for c in four)
    if sharded or (configs == choice.configs and auto == set(choice.auto)):
        return None
    sft = None if choice.sft is None else changed(choice.sft, "sft")
    return replace(choice, configs=configs, sft=sft, auto=auto, resources=resources)
