"""The data stage: data of the trials, and of the SFT stage, prepared and checked before the first trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.driver.sft_stage import sft_config
from orchestrator.errors import DataError
from orchestrator.execution.workers.data_process import DataProcess
from orchestrator.folders import DATA_FILE, SweepFolder
from orchestrator.interfaces import ProgressView, UpdatesOf
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import TrialConfig, flatten
from trainer.data.data_report import DataReport
from trainer.data.validation import UnreadableData
from trainer.evaluation.prompt_files import load_judge_prompts
from trainer.results import TrialError
from trainer.storage.atomic_files import write_text
from trainer.training.schedule import total_updates

_MAX_CORNERS = 1024


def check_data(spec: SweepSpec, folder: SweepFolder, view: ProgressView, data: DataProcess) -> DataReport:
    """Prepare what the trials and the SFT stage will read; DataError, with the list, when it must not be used."""
    view.set_stage("preparing and checking the data")
    report = DataReport.model_validate_json(data.prepare(spec.base))
    _check_unchanged(spec, folder, load_report(folder), report)
    write_text(folder.path / DATA_FILE, report.model_dump_json(indent=1))
    for line in report.summary_lines():
        view.log(f"data: {line}")
    message = {str(finding) for finding in report.findings}
    for variant in _data_variants(spec):
        found = DataReport.model_validate_json(data.prepare(variant))
        total_updates_of(variant, found)
        _tell_others(view, _differing(spec, variant), found, message)
    for notice in adapter_notices(spec, data):
        view.log(notice)
    sft = sft_config(spec)
    if sft is not None:
        of_sft = report if sft.data == spec.base.data else DataReport.model_validate_json(data.prepare(sft))
        total_updates_of(sft, of_sft)
        _tell_others(view, "data of the sft stage", of_sft, message)
    if spec.judge is not None and spec.judge.prompts_from is not None:
        try:
            load_judge_prompts(spec.judge.prompts_from, spec.base.data)  # rather now than after days of training
        except UnreadableData as error:
            raise DataError(f"judge.prompts_from: {error}") from error
    if spec.judge is not None:
        for config in _by_data_and_model(spec):
            data.check_judge(config, spec.judge)
    return report


def _by_data_and_model(spec: SweepSpec) -> list[TrialConfig]:
    """The base, and the corners of the search that read other data or read it through another model."""
    configs = (spec.base, *_data_variants(spec))
    return list({_inputs(config)[:2]: config for config in reversed(configs)}.values())


def _data_variants(spec: SweepSpec) -> list[TrialConfig]:
    """The corners of the search that read other data, read it through another model, or adapt other layers of it, than
    the ones before them."""
    corners = spec.search.corners()
    placed = [spec.search.apply(spec.base, corners.params_at(i)) for i in range(min(len(corners), _MAX_CORNERS))] or [
        spec.base
    ]
    return list({_inputs(config): config for config in placed}.values())


def _inputs(config: TrialConfig) -> tuple[object, ...]:
    adapted = None if config.lora is None else config.lora.target_modules
    return config.data.model_dump_json(), config.model.model_dump_json(), adapted


def adapter_notices(spec: SweepSpec, data: DataProcess) -> list[str]:
    """What the sweep's adapters change, each sentence once; of configurations that `check_data` has prepared."""
    message = [notice for config in (spec.base, *_data_variants(spec)) for notice in data.notices(config)]
    return list(dict.fromkeys(message))


def _differing(spec: SweepSpec, config: TrialConfig) -> str:
    """What a trial's data is called by the searched settings of model and data."""
    params = flatten(config.model_dump(mode="json"))
    searched = [path for path in spec.search.paths if path.startswith(("data.", "model."))]
    return f"data with {', '.join(f'{path}={params.get(path)}' for path in searched)}" if searched else "data"


def _tell_others(view: ProgressView, name: str, report: DataReport, message: set[str]) -> None:
    """What was found in other data than the base's, unless it was said already; `message` is added to."""
    for finding in map(str, report.findings):
        if finding not in message:
            view.log(f"{name}: {finding}")
            message.add(finding)


def _check_unchanged(spec: SweepSpec, folder: SweepFolder, before: DataReport | None, now: DataReport) -> None:
    """A sweep's trials all see the same data."""
    if before is not None and before.fingerprint != now.fingerprint:
        from trainer.data.data_report import describe_changes

        listed = "".join(f"\n  {line}" for line in describe_changes(folder.cache, before, now))
        raise DataError(
            f"the data of {spec.name} changed since the sweep began (fingerprint {before.fingerprint}, now "
            f"{now.fingerprint}): its trials would no longer be comparable; put the old data back, or start another "
            f"sweep{listed}"
        )


def total_updates_of(config: TrialConfig, report: DataReport) -> int:
    """Updates of a trial; DataError where the data cannot fill one."""
    try:
        return total_updates(config.training, report.train_rows)
    except TrialError as error:
        raise DataError(str(error)) from error


def updates_by_params(spec: SweepSpec, report: DataReport) -> Callable[[Mapping[str, Any]], int]:
    """Updates of a trial, from what it drew."""

    def steps(params: Mapping[str, Any]) -> int:
        return total_updates_of(apply_params(spec.base, params), report)

    return steps


def load_report(folder: SweepFolder) -> DataReport | None:
    """What was found in the data; None before it was looked at."""
    path = folder.path / DATA_FILE
    return DataReport.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def known_steps(folder: SweepFolder, spec: SweepSpec) -> UpdatesOf | None:
    """Updates of a trial by its params; None before the data was looked at."""
    report = load_report(folder)
    return None if report is None else updates_by_params(spec, report)
