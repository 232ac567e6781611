"""A trial given by a person, not drawn: whether it is a legal trial of the sweep, and what of it was searched.

What may be changed in a trial that goes on from another one's checkpoint: nothing that its state depends on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import nearest
from orchestrator.spec.loading.validation_errors import first_sentence, show
from orchestrator.spec.objectives import Goal, check_metric, check_ruler
from orchestrator.spec.search.dimensions import Scalar, same
from orchestrator.spec.search.space import Choice, IntUniform, LogUniform, SearchSpace, Uniform
from orchestrator.spec.search.trial_params import TWINS, NoSuchLeaf, leaves, lists, place
from trainer.config.trial import TrialConfig

SHARED = ("data", "model")
"""Parts that all trials have in common unless the search says otherwise: they were checked before the first trial."""

_SLACK = 1e-9

Problem = tuple[str, str, str]
"""A leaf's path, a sentence and a hint."""


def problems(base: TrialConfig, space: SearchSpace, goal: Goal, given: Mapping[str, Scalar]) -> list[Problem]:
    """Why these leaves over `base` are no trial that can be ranked with the others; empty where they are one."""
    found = list(_unfit(space, goal, given))
    if found:
        return found
    try:
        place(base, given)
    except NoSuchLeaf as error:
        return [(error.path, error.problem, error.hint)]
    except ValidationError as error:
        loc, sentence, hint = first_sentence(TrialConfig, error)
        named = ".".join(map(str, loc))
        return [(named if named in given or not given else next(iter(given)), sentence, hint)]
    return []


def _unfit(space: SearchSpace, goal: Goal, given: Mapping[str, Scalar]) -> Iterator[Problem]:
    for path in given:
        if path not in leaves():
            yield _no_leaf(path)
    for path in check_ruler(p for p in given if p in leaves()):
        yield path, "decides what is held out or how it is measured: the trial could not be ranked with the others", ""
    for path in given:
        if path.partition(".")[0] in SHARED and path not in space.paths and not check_ruler([path]):
            yield path, "is the same for all trials of this sweep", "start another sweep for another"
    scaled = check_metric(goal.metric, goal.direction, given)
    if scaled is not None:
        yield next(iter(given)), *scaled


def _no_leaf(path: str) -> Problem:
    under = [leaf for leaf in leaves() if leaf.startswith(f"{path}.")]
    if path in lists():
        return path, "holds a list, which cannot be set for one trial", ""
    if under:
        return path, "is a group of leaves, not a leaf", "its leaves: " + ", ".join(under)
    near = nearest(path, leaves())
    return path, "there is no such leaf in a trial", f"did you mean {near}?" if near else ""


def params_of(base: TrialConfig, space: SearchSpace, given: Mapping[str, Scalar]) -> dict[str, Any]:
    """What tells this trial from the others: its searched leaves, then what else was given.

    `place(base, params)` is the same trial again.
    """
    config = place(base, given)
    held = config.leaves()
    active = space.active({path: held[path] for path in space.paths if path in held})
    params = {path: value for path, value in active.items() if value is not None or path in given}
    # The other name of a margin would say it twice.
    extra = [path for path in given if path not in params and TWINS.get(path) not in params]
    return params | {path: held[path] for path in extra}


def outside(space: SearchSpace, params: Mapping[str, Scalar]) -> list[str]:
    """Which of these leaves the search itself would never draw so: a sampler cannot learn from them."""
    mixed = {path for group in space.zipped for path in group if not _is_row(group, params)}
    return [path for path, value in params.items() if path in mixed or not _inside(space, path, value)]


def _is_row(group: Mapping[str, tuple[Scalar, ...]], params: Mapping[str, Scalar]) -> bool:
    rows = zip(*group.values(), strict=True)
    return any(all(p in params and same(params[p], v) for p, v in zip(group, row, strict=True)) for row in rows)


def _inside(space: SearchSpace, path: str, value: Scalar) -> bool:
    listed = space.drawable(path)
    if listed is not None:
        return any(same(value, v) for v in listed)
    if isinstance(value, (bool, str)) or value is None:
        return False
    match space.dimensions.get(path):
        case Uniform(uniform=(low, high), step=step) | IntUniform(int_uniform=(low, high), step=step):
            steps = 0.0 if step is None else (value - low) / step
            return low <= value <= high and abs(steps - round(steps)) < _SLACK
        case LogUniform(log_uniform=(low, high)):
            return low <= value <= high
        case Choice() | None:
            return False


def valid(space: SearchSpace, path: str) -> str:
    """What the search draws for this leaf, in words; empty where it is not searched."""
    listed = space.drawable(path)
    if listed is not None:
        return ", ".join(f"{v:g}" if isinstance(v, float) else show(v) for v in listed)
    if path not in space.paths:
        return ""
    low, high = space.listed(path)
    return f"{low:g} to {high:g}" if isinstance(low, (int, float)) and isinstance(high, (int, float)) else ""


CADENCE = ("training.logging_steps", "training.eval_steps", "training.save_steps")
MAY_CHANGE = (
    "training.learning_rate",
    "training.lr_scheduler_type",
    "training.warmup_ratio",
    "training.max_steps",
    "training.num_train_epochs",
    "training.weight_decay",
    "training.adam_beta1",
    "training.adam_beta2",
    "training.adam_epsilon",
    "training.max_grad_norm",
    *CADENCE,
    "training.tokens_per_micro_batch",
    "training.gradient_checkpointing",
)
"""Leaves outside the loss under which weights, moments and the place in the data keep their meaning."""
_BOUND = {
    "model": "the weights are of this start model",
    "data": "the place in the data is of these pairs",
    "lora": "the weights are of these adapters",
    "engine": "the optimiser's state is of this engine",
    "evaluation": "the points so far were measured in this way",
    "training.pairs_per_update": "the place in the data is counted in updates of this size",
    "loss": "the points so far are of this loss",
    "training.seed": "the order of the pairs is drawn with this seed",
}
"""Why others may not, by the start of their paths."""


def fork_problems(parent: TrialConfig, config: TrialConfig, changed: Mapping[str, Any]) -> list[Problem]:
    """Why a checkpoint of `parent` cannot go on as `config`, which differs in `changed`; empty where it can."""
    return list(_problems(parent, config, changed))


def _problems(parent: TrialConfig, config: TrialConfig, changed: Mapping[str, Any]) -> Iterator[Problem]:
    before, after = parent.leaves(), config.leaves()
    numbers = loss_numbers(config) if config.loss.kind == parent.loss.kind else []
    hint = f"these may: {', '.join((*numbers, *MAY_CHANGE))}; without --from-checkpoint the clone begins anew"
    for path in changed:
        if path in MAY_CHANGE or path in numbers or before.get(path, ...) == after.get(path, ...):
            continue
        why = next((why for start, why in _BOUND.items() if path == start or path.startswith(f"{start}.")), "")
        yield path, "cannot change from one update to the next" + (f": {why}" if why else ""), hint


def loss_numbers(config: TrialConfig) -> list[str]:
    """The numbers of this loss: beta, gamma and the like. What kind of loss it is, is not among them."""
    leaves = config.loss.model_dump()
    return [f"loss.{name}" for name, value in leaves.items() if not isinstance(value, (str, bool, tuple, list))]
