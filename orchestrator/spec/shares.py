"""Trials that share a GPU: with a copy of the model each, or some of them in one process over one frozen model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from orchestrator.errors import Finding, SpecError
from orchestrator.spec.corners import placed
from orchestrator.spec.cost import Machine, dearest, does_not_fit
from orchestrator.spec.dimensions import Scalar
from orchestrator.spec.memory import tokens_that_fit
from orchestrator.spec.place import place
from orchestrator.spec.sizes import Shape, shape_of
from orchestrator.spec.space import SearchSpace
from orchestrator.spec.sweep import SweepSpec
from trainer.config import TrialConfig

_MODEL = "model."


def why_apart(
    base: TrialConfig, search: SearchSpace, enqueue: Sequence[Mapping[str, Scalar]] = ()
) -> Iterator[tuple[str, str]]:
    """Why these trials cannot be trained over one frozen model: the leaf, and a sentence."""
    given = [place(base, params) for params in enqueue]
    configs = [*placed(search, base), *given]
    if any(config.lora is None for config in configs):
        yield "lora", "trials without it change the model's own weights"
    if any(config.engine == "trl" for config in configs):
        yield "engine", "trl's trainers take one trial in a process"
    for path in search.paths:
        if path.startswith(_MODEL):
            yield path, "its values are models of their own"
    if any(config.model != base.model for config in given):
        yield "enqueue", "a trial in it has a model of its own"


def sharing_of(spec: SweepSpec, gpu_memory: float | None) -> int:
    """How many trials take turns in one process. The rule of `auto`, with GPUs of so many bytes (None: none, or not
    known): as few as let all trials that are to share a GPU fit it, by formula; in turn they save memory, not time."""
    asked = spec.resources.trials_per_process
    if asked != "auto":
        return asked
    share, shape = spec.resources.gpus_per_trial, shape_of(spec.base.model)
    if share is None or not 0 < share <= 0.5 or gpu_memory is None or shape is None:
        return 1
    if next(why_apart(spec.base, spec.search, spec.enqueue), None) is not None:
        return 1
    configs, most = placed(spec.search, spec.base), int(1 / share + 1e-9)
    machine = Machine(gpu_memory=gpu_memory)
    for trials in range(1, most + 1):
        if most % trials == 0 and _fits(
            configs, shape, replace(machine, share=min(1.0, trials * share), trials=trials)
        ):
            return trials
    return 1


def of_gpu(spec: SweepSpec, gpu_memory: float | None, machine: Machine | None = None) -> Machine:
    """What a process of this sweep has of a GPU of so many bytes, and for how many trials."""
    trials = sharing_of(spec, gpu_memory)
    share = min(1.0, trials * (spec.resources.gpus_per_trial or 1.0))
    return replace(machine or Machine(), gpu_memory=gpu_memory, share=share, trials=trials)


def check_share(spec: SweepSpec, gpu_memory: float | None) -> None:
    """SpecError where the dearest trial with one pair at a time needs more than its process has of such a GPU."""
    share, shape = spec.resources.gpus_per_trial, shape_of(spec.base.model)
    machine = of_gpu(spec, gpu_memory)
    if shape is None or gpu_memory is None or (machine.trials == 1 and (share is None or not 0 < share < 1)):
        return
    configs = placed(spec.search, spec.base)
    if _fits(configs, shape, machine):
        return
    told = does_not_fit(dearest(configs, shape, machine), shape, machine)
    if machine.trials > 1:
        where, problem = "trials_per_process", f"{machine.trials} is too many: {told}"
        raise SpecError([Finding("resources", f"resources.{where}", problem, "or have fewer share a process")])
    problem = f"{share:g} is too little: {told}"
    raise SpecError([Finding("resources", "resources.gpus_per_trial", problem, "or give it a larger share, 1 at most")])


def _fits(configs: list[TrialConfig], shape: Shape, machine: Machine) -> bool:
    assert machine.room is not None
    return tokens_that_fit(dearest(configs, shape, machine), shape, machine.room, trials=machine.trials) is not None
