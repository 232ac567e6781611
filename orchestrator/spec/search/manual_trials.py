"""Checks of trials that users enqueue or clone: whether they are valid trials of the sweep.

A clone that continues from another trial's checkpoint may change nothing that the checkpoint's state depends on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import SpecProblem, closest_match
from orchestrator.spec.loading.validation_errors import describe_value, first_error
from orchestrator.spec.objectives import Objective, check_fixed_evaluation, check_metric
from orchestrator.spec.search.dimensions import Choice, IntUniform, LogUniform, Scalar, Uniform, values_equal
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import (
    EQUIVALENT_PATHS,
    UnknownPath,
    apply_params,
    config_paths,
    list_as_text,
    list_paths,
)
from trainer.config.trial import TrialConfig

SHARED_SECTIONS = ("data", "model")
"""Sections that are the same for all trials unless searched: they are checked once, before the first trial."""

_SLACK = 1e-9


def check_manual_trial(
    base: TrialConfig, space: SearchSpace, objective: Objective, given: Mapping[str, Scalar]
) -> list[SpecProblem]:
    """Return why `base` with the settings `given` is no trial that can be ranked with the others; empty if it is."""
    found = list(_path_problems(space, objective, given))
    if found:
        return found
    try:
        apply_params(base, given, is_new=True)
    except UnknownPath as error:
        return [_problem(error.path, error.problem, error.hint)]
    except ValidationError as error:
        loc, sentence, hint = first_error(TrialConfig, error)
        named = ".".join(map(str, loc))
        return [_problem(named if named in given or not given else next(iter(given)), sentence, hint)]
    return []


def _problem(path: str, problem: str, hint: str = "") -> SpecProblem:
    """Return a problem whose line or option the caller adds."""
    return SpecProblem("", path, problem, hint)


def _path_problems(space: SearchSpace, objective: Objective, given: Mapping[str, Scalar]) -> Iterator[SpecProblem]:
    for path in given:
        if path not in config_paths():
            yield _unknown_path(path)
    for path in check_fixed_evaluation(p for p in given if p in config_paths()):
        yield _problem(
            path, "changes the held-out pairs or their evaluation: the trial could not be ranked with the others"
        )
    for path in given:
        if path.partition(".")[0] in SHARED_SECTIONS and path not in space.paths and not check_fixed_evaluation([path]):
            yield _problem(path, "is the same for all trials of this sweep", "start another sweep for another value")
    scaled = check_metric(objective.metric, objective.direction, given)
    if scaled is not None:
        yield _problem(next(iter(given)), *scaled)


def _unknown_path(path: str) -> SpecProblem:
    under = [known_path for known_path in config_paths() if known_path.startswith(f"{path}.")]
    if path in list_paths():
        return _problem(path, "is a list, which cannot be set for one trial")
    if under:
        return _problem(path, "is a group of settings, not a setting", "its settings: " + ", ".join(under))
    near = closest_match(path, config_paths())
    return _problem(path, "there is no such setting in a trial", f"did you mean {near}?" if near else "")


def resolve_params(base: TrialConfig, space: SearchSpace, given: Mapping[str, Scalar]) -> dict[str, Any]:
    """Return the trial's params: its searched settings, then the other settings that were given.

    `apply_params(base, params)` gives the same trial.
    """
    config = apply_params(base, given)
    all_params = {path: list_as_text(path, value) for path, value in config.flat_params().items()}
    active = space.active({path: all_params[path] for path in space.paths if path in all_params})
    params = {path: value for path, value in active.items() if value is not None or path in given}
    # gamma and gamma_beta_ratio name the same margin: keep one.
    extra = [path for path in given if path not in params and EQUIVALENT_PATHS.get(path) not in params]
    return params | {path: all_params[path] for path in extra}


def out_of_space(space: SearchSpace, params: Mapping[str, Scalar]) -> list[str]:
    """Return the settings whose values are outside of the search space: a sampler cannot learn from them."""
    mixed = {path for group in space.zipped for path in group if not _is_row(group, params)}
    return [path for path, value in params.items() if path in mixed or not _contains(space, path, value)]


def _is_row(group: Mapping[str, tuple[Scalar, ...]], params: Mapping[str, Scalar]) -> bool:
    rows = zip(*group.values(), strict=True)
    return any(all(p in params and values_equal(params[p], v) for p, v in zip(group, row, strict=True)) for row in rows)


def _contains(space: SearchSpace, path: str, value: Scalar) -> bool:
    listed = space.choices(path)
    if listed is not None:
        return any(values_equal(value, v) for v in listed)
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


def allowed_values(space: SearchSpace, path: str) -> str:
    """Return the searched values of a setting as text, such as "0.1 to 0.5"; "" if it is not searched."""
    listed = space.choices(path)
    if listed is not None:
        return ", ".join(map(short_value, listed))
    if path not in space.paths:
        return ""
    low, high = space.listed_values(path)
    return f"{low:g} to {high:g}" if isinstance(low, (int, float)) and isinstance(high, (int, float)) else ""


def short_value(value: Scalar) -> str:
    """A setting's value for a sentence."""
    return f"{value:g}" if isinstance(value, float) else describe_value(value)


INTERVAL_PATHS = ("training.logging_steps", "training.eval_steps", "training.save_steps")
FORK_MAY_CHANGE = (
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
    *INTERVAL_PATHS,
    "training.tokens_per_micro_batch",
    "training.gradient_checkpointing",
)
"""Settings outside the loss that a clone may change: weights, moments and the position in the data stay valid."""
_FIXED_REASONS = {
    "model": "the checkpoint's weights belong to this initial model",
    "data": "the checkpoint's position in the data refers to these pairs",
    "lora": "the checkpoint's weights belong to these adapters",
    "engine": "the checkpoint's optimizer state belongs to this engine",
    "evaluation": "the metrics so far were measured in this way",
    "training.pairs_per_update": "the position in the data is counted in updates of this size",
    "loss": "the metrics so far are of this loss",
    "training.seed": "the order of the pairs depends on this seed",
}
"""Why other settings are fixed, by the beginning of their paths."""


def check_fork(parent: TrialConfig, config: TrialConfig, changed: Mapping[str, Any]) -> list[SpecProblem]:
    """Return why a checkpoint of `parent` cannot continue as `config`, which differs in `changed`; empty if it can."""
    return list(_fork_problems(parent, config, changed))


def _fork_problems(parent: TrialConfig, config: TrialConfig, changed: Mapping[str, Any]) -> Iterator[SpecProblem]:
    before, after = parent.flat_params(), config.flat_params()
    numbers = numeric_loss_params(config) if config.loss.kind == parent.loss.kind else []
    hint = (
        f"what may change: {', '.join((*numbers, *FORK_MAY_CHANGE))}; without --from-checkpoint the clone starts from "
        "the initial model"
    )
    for path in changed:
        if path in FORK_MAY_CHANGE or path in numbers or before.get(path, ...) == after.get(path, ...):
            continue
        reason = next(
            (reason for prefix, reason in _FIXED_REASONS.items() if path == prefix or path.startswith(f"{prefix}.")), ""
        )
        because = f": {reason}" if reason else ""
        yield _problem(path, f"cannot change when training continues from a checkpoint{because}", hint)


def numeric_loss_params(config: TrialConfig) -> list[str]:
    """Return the numeric settings of the loss, such as loss.beta and loss.gamma, without those that select its kind."""
    params = config.loss.model_dump()
    return [f"loss.{name}" for name, value in params.items() if not isinstance(value, (str, bool, tuple, list))]
