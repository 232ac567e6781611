"""Checks a sweep's lengths against the initial model's number of positions; findings name the file's lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.spec.loading.search_section import location_of
from orchestrator.spec.search.corners import valid_corners
from orchestrator.spec.search.dimensions import Params
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.position_limits import LengthFinding, known_positions, length_findings
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import Document, Location

_JUDGE = "judge.max_new_tokens"


def check_lengths(spec: SweepSpec, document: Document) -> list[str]:
    """Return warnings about lengths that the initial model was not trained on.

    Raises SpecError with lengths that the model cannot compute. Only models with a config.json on this machine are
    checked.
    """
    refused: list[SpecProblem] = []
    warned: list[str] = []
    for loc, found in dict.fromkeys(_found(spec)):
        problem = SpecProblem(
            document.location(loc), ".".join(map(str, document.as_written(loc))), found.problem, found.hint
        )
        if found.refused:
            refused.append(problem)
        else:
            warned.append(str(problem))
    if refused:
        raise SpecError(refused)
    return warned


def _found(spec: SweepSpec) -> Iterator[tuple[Location, LengthFinding]]:
    """Findings of each corner of the search, each enqueued trial and the SFT stage, with locations in the file."""
    for params, config in valid_corners(spec.search, spec.base):
        for found in _of_trial(spec, config):
            yield _loc(spec, params, found.path), found
    for number, given in enumerate(spec.enqueue):
        for found in _of_trial(spec, apply_params(spec.base, given)):
            yield (("enqueue", number, found.path) if found.path in given else _loc(spec, {}, found.path)), found
    if spec.sft is not None and spec.sft.data is not None:
        trained = spec.base.model_copy(update={"data": spec.sft.data, "engine": "packed"})
        for found in _of_config(spec, trained, {}):
            yield ("sft", *found.path.split(".")), found


def _of_trial(spec: SweepSpec, config: TrialConfig) -> Iterator[LengthFinding]:
    evaluation = config.evaluation
    answers = {"evaluation.max_new_tokens": evaluation.max_new_tokens} if evaluation.prompts else {}
    if spec.judge is not None:
        answers[_JUDGE] = spec.judge.max_new_tokens
    yield from _of_config(spec, config, answers)


def _of_config(spec: SweepSpec, config: TrialConfig, answers: dict[str, int]) -> Iterator[LengthFinding]:
    """Findings of `length_findings`; a model other than the base's is named."""
    positions = known_positions(config.model)
    for found in () if positions is None else length_findings(positions, config, answers):
        of_base = config.model == spec.base.model
        yield found if of_base else replace(found, problem=f"with {config.model.name_or_path}: {found.problem}")


def _loc(spec: SweepSpec, params: Params, path: str) -> Location:
    if path in params:
        return location_of(spec.search.zipped, path)
    return tuple(path.split(".")) if path == _JUDGE else ("base", *path.split("."))
