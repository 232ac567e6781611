"""`warm_start`: another sweep's trials for this sweep's sampler, checked before the first trial."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import OrchestrateError
from orchestrator.folders import existing_sweep
from orchestrator.spec.search.manual_trials import out_of_space
from orchestrator.spec.search.trial_params import list_as_text
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.reader import StudyReader
from orchestrator.study.repeats import merge_snapshots
from orchestrator.study.trial_records import TrialState
from orchestrator.study.trial_snapshots import TrialSnapshot
from trainer.config.trial import flatten


class WarmStartRefused(OrchestrateError):
    """The sampler cannot use the sweep named by `warm_start`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"warm_start: {name} {reason}")


@dataclass(frozen=True, slots=True)
class WarmStart:
    """Another sweep's trials, numbered below 0, and notices about how they were chosen."""

    trials: tuple[TrialSnapshot, ...] = ()
    notices: tuple[str, ...] = ()


def warm_start(spec: SweepSpec, root: Path) -> WarmStart:
    """Return the complete and pruned trials of the sweep named by `warm_start`.

    Raises WarmStartRefused if that sweep has other objectives, is not finished or has no trial in the search space.
    """
    name = spec.warm_start
    if name is None:
        return WarmStart()
    folder = existing_sweep(root, name)
    if not StudyReader.exists(folder):
        raise WarmStartRefused(name, "has not begun its trials")
    with StudyReader.open(folder, read_only=True) as other:
        other_spec = other.spec
        each = [replace(trial, violations=other.violations(trial.number, spec)) for trial in other.snapshots()]
        snapshots = merge_snapshots(each, other_spec)  # of several seeds the mean
    if other_spec.objectives != spec.objectives:
        objectives_text = [
            ", ".join(f"{objective.direction} {objective.metric}" for objective in sweep_spec.objectives)
            for sweep_spec in (other_spec, spec)
        ]
        raise WarmStartRefused(name, f"is ranked by {objectives_text[0]}, and this sweep by {objectives_text[1]}")
    running = sum(not trial.state.is_final for trial in snapshots)
    if running:
        raise WarmStartRefused(name, f"is not finished: {running} of its trials have not ended")
    ended = [
        trial for trial in snapshots if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and not trial.is_fork
    ]
    fitting = [taken for trial in ended if (taken := _translate(trial, other_spec, spec)) is not None]
    if not fitting:
        raise WarmStartRefused(name, f"has no trial among its {len(ended)} ended ones in this sweep's search space")
    notices = [f"warm_start: the sampler uses {len(fitting)} trials of {name}"]
    if len(fitting) < len(ended):
        notices.append(
            f"warm_start: {len(ended) - len(fitting)} of {name} are outside of this search space and are left out"
        )
    if differing := _differing_paths(other_spec, spec):
        notices.append(f"warm_start: {name} has another {', '.join(differing)}; its values are used anyway")
    numbered = (
        replace(trial, number=position - len(fitting), sampler_note={}) for position, trial in enumerate(fitting)
    )
    return WarmStart(tuple(numbered), tuple(notices))


def _translate(trial: TrialSnapshot, other_spec: SweepSpec, spec: SweepSpec) -> TrialSnapshot | None:
    """Return the trial with the settings that this sweep searches; None if it is outside of the search space."""
    all_params = other_spec.search.apply(other_spec.base, trial.params).flat_params() | dict(trial.params)
    params = spec.search.active(
        {path: list_as_text(path, all_params[path]) for path in spec.search.paths if path in all_params}
    )
    required = [path for path, dimension in spec.search.dimensions.items() if not dimension.when]
    required += [path for group in spec.search.zipped for path in group]
    if any(path not in params for path in required) or out_of_space(spec.search, params):
        return None
    return replace(trial, params=params)


def _differing_paths(other_spec: SweepSpec, spec: SweepSpec) -> list[str]:
    """Settings of the base that differ and that neither sweep searches."""
    searched = {*other_spec.search.paths, *spec.search.paths}
    other_base, base = flatten(other_spec.base.model_dump(mode="json")), flatten(spec.base.model_dump(mode="json"))
    return sorted(
        path
        for path in other_base.keys() | base.keys()
        if path not in searched and other_base.get(path, ...) != base.get(path, ...)
    )
