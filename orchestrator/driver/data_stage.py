"""Before the first trial: the data of the trials, and of the SFT stage where there is one, is prepared and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.driver.sft_stage import sft_config
from orchestrator.errors import DataError
from orchestrator.execution.workers.data_process import Preparing
from orchestrator.folders import DATA_FILE, SweepFolder
from orchestrator.interfaces import StepsOf, View
from orchestrator.spec.search.trial_params import place
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import TrialConfig, flatten
from trainer.data.data_report import DataReport
from trainer.data.validation import UnreadableData
from trainer.evaluation.prompt_files import given_prompts
from trainer.results import TrialError
from trainer.storage.atomic_files import write_text
from trainer.training.schedule import total_updates

_CORNERS = 1024


def check_data(spec: SweepSpec, folder: SweepFolder, view: View, data: Preparing) -> DataReport:
    """Prepare what the trials and the SFT stage will read; DataError, with the list, when it must not be used."""
    view.stage("preparing and checking the data")
    report = DataReport.model_validate_json(data.prepare(spec.base))
    _refuse_changed(spec, folder, load_report(folder), report)
    write_text(folder.path / DATA_FILE, report.model_dump_json(indent=1))
    for line in report.lines():
        view.say(f"data: {line}")
    told = {str(finding) for finding in report.findings}
    for variant in _variants(spec):
        found = DataReport.model_validate_json(data.prepare(variant))
        steps_of(variant, found)
        _tell_others(view, _differing(spec, variant), found, told)
    for notice in adapter_notices(spec, data):
        view.say(notice)
    sft = sft_config(spec)
    if sft is not None:
        of_sft = report if sft.data == spec.base.data else DataReport.model_validate_json(data.prepare(sft))
        steps_of(sft, of_sft)
        _tell_others(view, "data of the sft stage", of_sft, told)
    if spec.judge is not None and spec.judge.prompts_from is not None:
        try:
            given_prompts(spec.judge.prompts_from, spec.base.data)  # rather now than after days of training
        except UnreadableData as why:
            raise DataError(f"judge.prompts_from: {why}") from why
    return report


def _variants(spec: SweepSpec) -> list[TrialConfig]:
    """The corners of the search that read other data, read it through another model, or adapt other layers of it, than
    the ones before them."""
    corners = spec.search.corners()
    placed = [spec.search.place(spec.base, corners.point(i)) for i in range(min(len(corners), _CORNERS))] or [spec.base]
    return list({_inputs(config): config for config in placed}.values())


def _inputs(config: TrialConfig) -> tuple[object, ...]:
    adapted = None if config.lora is None else config.lora.target_modules
    return config.data.model_dump_json(), config.model.model_dump_json(), adapted


def adapter_notices(spec: SweepSpec, data: Preparing) -> list[str]:
    """What the sweep's adapters change, each sentence once; of configurations that `check_data` has prepared."""
    told = [notice for config in (spec.base, *_variants(spec)) for notice in data.notices(config)]
    return list(dict.fromkeys(told))


def _differing(spec: SweepSpec, config: TrialConfig) -> str:
    """What a trial's data is called by the searched settings of model and data."""
    leaves = flatten(config.model_dump(mode="json"))
    searched = [path for path in spec.search.paths if path.startswith(("data.", "model."))]
    return f"data with {', '.join(f'{path}={leaves.get(path)}' for path in searched)}" if searched else "data"


def _tell_others(view: View, name: str, report: DataReport, told: set[str]) -> None:
    """What was found in other data than the base's, unless it was said already; `told` is added to."""
    for finding in map(str, report.findings):
        if finding not in told:
            view.say(f"{name}: {finding}")
            told.add(finding)


def _refuse_changed(spec: SweepSpec, folder: SweepFolder, before: DataReport | None, now: DataReport) -> None:
    """A sweep's trials all see the same data."""
    if before is not None and before.fingerprint != now.fingerprint:
        from trainer.data.data_report import changes

        listed = "".join(f"\n  {line}" for line in changes(folder.cache, before, now))
        raise DataError(
            f"the data of {spec.name} changed since the sweep began (fingerprint {before.fingerprint}, now "
            f"{now.fingerprint}): its trials would no longer be comparable; put the old data back, or start another "
            f"sweep{listed}"
        )


def steps_of(config: TrialConfig, report: DataReport) -> int:
    """Updates of a trial; DataError where the data cannot fill one."""
    try:
        return total_updates(config.training, report.train_rows)
    except TrialError as why:
        raise DataError(str(why)) from why


def steps_by_params(spec: SweepSpec, report: DataReport) -> Callable[[Mapping[str, Any]], int]:
    """Updates of a trial, from what it drew."""

    def steps(params: Mapping[str, Any]) -> int:
        return steps_of(place(spec.base, params), report)

    return steps


def load_report(folder: SweepFolder) -> DataReport | None:
    """What was found in the data; None before it was looked at."""
    path = folder.path / DATA_FILE
    return DataReport.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def known_steps(folder: SweepFolder, spec: SweepSpec) -> StepsOf | None:
    """Updates of a trial by its params; None before the data was looked at."""
    report = load_report(folder)
    return None if report is None else steps_by_params(spec, report)
