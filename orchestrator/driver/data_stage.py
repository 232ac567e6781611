"""Data stage: prepares and checks the data of the trials and of the SFT stage before the first trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.driver.sft_stage import sft_config
from orchestrator.errors import DataError
from orchestrator.execution.workers.data_process import DataProcess
from orchestrator.folders import DATA_FILE, SweepFolder
from orchestrator.interfaces import ProgressView, UpdatesOf
from orchestrator.spec.objectives import needs_pairs
from orchestrator.spec.pruners import NoPruner, PatientPruner, WilcoxonPruner
from orchestrator.spec.search.corners import corner_configs
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.loss_config import DpoLoss
from trainer.config.trial import TrialConfig, flatten
from trainer.data.data_findings import UnreadableData
from trainer.data.data_report import DataReport
from trainer.evaluation.prompt_files import load_judge_prompts
from trainer.metrics import EXACT_ANSWERS, MARGIN
from trainer.results import TrialError
from trainer.storage.atomic_files import write_text
from trainer.training.schedule import total_updates

_MAX_CORNERS = 1024


def check_data(spec: SweepSpec, folder: SweepFolder, view: ProgressView, data: DataProcess) -> DataReport:
    """Prepare and check the data of the trials and of the SFT stage.

    Raises:
        DataError: with all findings, where the data must not be used.
    """
    view.set_activity("preparing and checking the data")
    report = DataReport.model_validate_json(data.prepare(spec.base))
    earlier = load_data_report(folder)
    _check_unchanged(spec, folder, earlier, report)
    write_text(folder.path / DATA_FILE, report.model_dump_json(indent=1))
    for line in report.summary_lines():
        view.log(f"data: {line}")
    logged = {str(finding) for finding in report.findings}
    if report.labels is not None and (problems := label_problems(spec)):
        raise DataError("\n".join(f"{path}: {problem}; {hint}" for path, problem, hint in problems))
    for variant in _data_variants(spec):
        found = DataReport.model_validate_json(data.prepare(variant))
        total_updates_of(variant, found)
        _log_new_findings(view, _data_label(spec, variant), found, logged)
    for notice in [*_score_notices(spec, data), *adapter_notices(spec, data)]:
        view.log(notice)
    sft = sft_config(spec)
    if sft is not None:
        sft_report = report if sft.data == spec.base.data else DataReport.model_validate_json(data.prepare(sft))
        total_updates_of(sft, sft_report, "the sft stage: ")
        _log_new_findings(view, "data of the sft stage", sft_report, logged)
    if spec.judge is not None and spec.judge.prompts_from is not None:
        try:
            load_judge_prompts(spec.judge.prompts_from, spec.base.data)  # fails before training rather than after it
        except UnreadableData as error:
            raise DataError(f"judge.prompts_from: {error}") from error
    if spec.judge is not None:
        checked = spec.judge.only_checker and earlier is None  # a begun sweep is not refused its resume
        for config in _by_data_and_model(spec):
            data.check_judge(config, spec.judge, checked=checked)
    return report


def label_problems(spec: SweepSpec) -> list[tuple[str, str, str]]:
    """Return what of a sweep needs pairs, for rows with one response and a label.

    Each with its setting, what is wrong and what to do.
    """
    configs = (spec.base, *corner_configs(spec.search, spec.base), *(apply_params(spec.base, p) for p in spec.enqueue))
    kinds = [kind for kind in dict.fromkeys(config.loss.kind for config in configs) if kind != "kto"]
    searched = "search.loss.kind" if "loss.kind" in spec.search.paths else "base.loss.kind"
    problems = (
        [(searched, f"the rows have one response each, and {', '.join(kinds)} needs pairs", "write kto")]
        if kinds
        else []
    )
    if spec.sft is not None and spec.sft.data is None:
        stage = "the rows have one response each, and supervised fine-tuning reads the chosen response of pairs"
        problems.append(("sft.data", stage, "give the sft stage pairs"))
    instead = f"use {MARGIN}, the difference of the means of desirable and undesirable responses"
    one = "compares the two responses of a pair, and the rows have one each"
    for objective in (spec.goal, *spec.also):
        if needs_pairs(objective.metric):
            problems.append((objective.direction, f"{objective.metric} {one}", f"{instead}, or {EXACT_ANSWERS}"))
    problems += [
        (f"require.{requirement.metric}", f"{requirement.metric} {one}", instead)
        for requirement in spec.require
        if needs_pairs(requirement.metric)
    ]
    pruner = spec.pruner.wrapped if isinstance(spec.pruner, PatientPruner) and spec.pruner.wrapped else spec.pruner
    if isinstance(pruner, WilcoxonPruner):
        problems.append(("pruner.kind", f"wilcoxon {one}", "use median, hyperband or another pruner"))
    named = None if isinstance(pruner, NoPruner | WilcoxonPruner) else pruner.metric
    if named is not None and needs_pairs(named):
        problems.append(("pruner.metric", f"{named} {one}", instead))
    return problems


def _by_data_and_model(spec: SweepSpec) -> list[TrialConfig]:
    """The base, and the corners of the search that read other data or read it through another model."""
    configs = (spec.base, *_data_variants(spec))
    return list({_inputs(config)[:2]: config for config in reversed(configs)}.values())


def _data_variants(spec: SweepSpec) -> list[TrialConfig]:
    """Return one corner of the search per distinct combination of data, model, adapted layers and what the loss reads
    of the rows; also enqueued trials that read scores or responses after other prompts.
    """
    corners = spec.search.corners()
    configs = [spec.search.apply(spec.base, corners.params_at(i)) for i in range(min(len(corners), _MAX_CORNERS))] or [
        spec.base
    ]
    enqueued = (apply_params(spec.base, p) for p in spec.enqueue)
    configs += [given for given in enqueued if given.loss.needs_scores or given.loss.scores_mismatched]
    if spec.finalists is not None:  # KTO needs both labels and several prompts there too
        to_confirm = [c.model_copy(update={"data": c.data.model_copy(update={"eval_on": "confirm"})}) for c in configs]
        configs += [config for config in to_confirm if config.loss.kind == "kto"]
    return list({_inputs(config): config for config in configs}.values())


def _inputs(config: TrialConfig) -> tuple[object, ...]:
    adapted = None if config.lora is None else config.lora.target_modules
    scores = config.loss.odpo_scale if isinstance(config.loss, DpoLoss) and config.loss.needs_scores else None
    return config.data.model_dump_json(), config.model.model_dump_json(), adapted, scores, config.loss.scores_mismatched


def _score_notices(spec: SweepSpec, data: DataProcess) -> list[str]:
    notices = [data.score_notice(config) for config in (spec.base, *_data_variants(spec))]
    return list(dict.fromkeys(filter(None, notices)))


def adapter_notices(spec: SweepSpec, data: DataProcess) -> list[str]:
    """Return the distinct notices about layers that adapters train; `check_data` must have run."""
    notices = [notice for config in (spec.base, *_data_variants(spec)) for notice in data.notices(config)]
    return list(dict.fromkeys(notices))


def _data_label(spec: SweepSpec, config: TrialConfig) -> str:
    """Return a label of a trial's data from the searched settings of model and data."""
    params = flatten(config.model_dump(mode="json"))
    searched = [path for path in spec.search.paths if path.startswith(("data.", "model."))]
    return f"data with {', '.join(f'{path}={params.get(path)}' for path in searched)}" if searched else "data"


def _log_new_findings(view: ProgressView, name: str, report: DataReport, logged: set[str]) -> None:
    """Log the findings that are not in `logged`, and add them to it."""
    for finding in map(str, report.findings):
        if finding not in logged:
            view.log(f"{name}: {finding}")
            logged.add(finding)


def _check_unchanged(spec: SweepSpec, folder: SweepFolder, before: DataReport | None, now: DataReport) -> None:
    """Raise DataError where the data differs from that of earlier trials of the sweep."""
    if before is not None and before.fingerprint != now.fingerprint:
        from trainer.data.data_report import describe_changes

        listed = "".join(f"\n  {line}" for line in describe_changes(folder.cache, before, now))
        raise DataError(
            f"the data of {spec.name} changed since the sweep started (fingerprint {before.fingerprint}, now "
            f"{now.fingerprint}), so that its trials would not be comparable; restore the data, or start another "
            f"sweep{listed}"
        )


def total_updates_of(config: TrialConfig, report: DataReport, subject: str = "") -> int:
    """Return the total updates of a trial; `subject` begins the message of an error.

    Raises:
        DataError: there are fewer training pairs than one update needs.
    """
    try:
        return total_updates(config.training, report.train_rows)
    except TrialError as error:
        raise DataError(f"{subject}{error}") from error


def updates_by_params(spec: SweepSpec, report: DataReport) -> Callable[[Mapping[str, Any]], int]:
    """Return a function from a trial's params to its total updates."""

    def updates(params: Mapping[str, Any]) -> int:
        return total_updates_of(apply_params(spec.base, params), report)

    return updates


def load_data_report(folder: SweepFolder) -> DataReport | None:
    """Return the sweep's data report; None before the data stage."""
    path = folder.path / DATA_FILE
    return DataReport.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def updates_if_known(folder: SweepFolder, spec: SweepSpec) -> UpdatesOf | None:
    """Return a function from a trial's params to its total updates; None before the data stage."""
    report = load_data_report(folder)
    return None if report is None else updates_by_params(spec, report)
