"""Changes of a sweep that has begun: those that a user asks for, and places of data and models that were moved.

Moved files are found in a moved runs folder, and compared with those with which the sweep began.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.driver.data_stage import load_data_report
from orchestrator.driver.preflight import check_no_removed_values
from orchestrator.driver.sft_stage import sft_config
from orchestrator.errors import DataError, SpecError, SpecProblem
from orchestrator.execution.stop_reasons import StopKind
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.file_rights import FileRights, check_forbidden
from orchestrator.spec.loading.loader import load_text_with_notices
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study import budget_changes, sweep_terms
from orchestrator.study.retried_trials import can_begin_again, never_trained, numbers_text
from orchestrator.study.study import Study
from orchestrator.study.sweep_terms import is_location, spec_differences
from orchestrator.study.trial_records import RequestKind
from trainer.config.locations import found_below, stored_config, with_source_paths
from trainer.config.model_folder import check_model_files
from trainer.config.trial import DataConfig, FileSource, ModelConfig, TrialConfig
from trainer.results import clause
from trainer.storage.atomic_files import write_text
from trainer.storage.checkpoint_manifest import list_checkpoints, read_json_object

if TYPE_CHECKING:
    from trainer.data import Prepared

_RESULT, _STATE = "ending.json", "state.json"
_REWARD_MODEL = "judge.reward_model.name_or_path"


def changed_spec(
    folder: SweepFolder,
    overrides: Sequence[str],
    root: Path,
    *,
    trust_remote_code: bool = False,
    rights: FileRights | None = None,
) -> SweepSpec:
    """Return the sweep with moved files, requested changes of its budget and these changes; nothing is written.

    Args:
        folder: of the sweep.
        overrides: changes as PATH=VALUE.
        root: the runs folder.
        trust_remote_code: whether Python code of the model's repository may run.
        rights: what the changes may name; None: what a user of this machine may.
    """
    with Study.open(folder) as study:
        check_no_removed_values(folder, study.spec)
        spec = follow_folder(budget_changes.with_requests(study.spec, study.requests()), root)
        if overrides:
            own = FileRights.of_command(folder.path)
            spec = with_overrides(spec, overrides, rights or own, source=str(folder.spec) if rights is None else "")
        check_inputs_exist(spec)
        sweep_terms.allowed_changes(study.spec, spec)  # before contents are compared, which takes a while
        if overrides:
            budget_changes.check_not_used_up(study.spec, spec, study.snapshots(), study.usage())
        check_moved_inputs(folder, study.spec, spec, trust_remote_code=trust_remote_code)
        return spec


def with_overrides(spec: SweepSpec, overrides: Sequence[str], rights: FileRights, *, source: str = "") -> SweepSpec:
    """Return a stored sweep with changes that `rights` allow; what it names already stays allowed. Raises SpecError.

    `source`: the name of its file in messages.
    """
    allowed = rights.with_names_of(spec)
    changed = load_text_with_notices(dump_spec(spec), allowed, overrides, source=source or "sweep.yaml").spec
    check_forbidden(rights, spec, changed, overrides)
    return changed


def apply_changes(study: Study, spec: SweepSpec) -> list[str]:
    """Continue a sweep with a changed spec; return a sentence for each setting that changed."""
    folder = study.folder
    changes = [f"changed {change}" for change in study.amend(spec)]
    for request in study.requests():
        if request.kind == RequestKind.SET:
            study.complete_request(request.seq)
    if folder.spec.read_text(encoding="utf-8") != dump_spec(spec):
        write_text(folder.spec, dump_spec(spec))
    return changes


def retry_trials(study: Study, *, retry_failed: bool) -> list[str]:
    """Retry all failed trials, or those for whose common bug the sweep stopped; return what was done as sentences."""
    records = study.trials()
    numbers = never_trained(records) if retry_failed else study.failed_alike(StopKind.SAME_BUG.value)
    wanted = [records[number] for number in numbers]
    if not wanted:
        return [f"{study.folder.name} has no failed trial to retry"] if retry_failed else []
    lost = [record for record in wanted if not can_begin_again(record, study.folder)]
    notices = [
        f"trial {record.number} is not retried: the checkpoint that it began from was removed after its failure"
        for record in lost
    ]
    again = [record.number for record in wanted if record not in lost]
    if again:
        reason = "resume --retry-failed" if retry_failed else "resumed after a stop for the same bug"
        study.retry_failed(again, reason)
        why = "" if retry_failed else f" ({study.folder.name} had stopped as they failed alike)"
        many = "trial" if len(again) == 1 else "trials"
        notices.append(
            f"retrying {len(again)} failed {many}: {numbers_text(again)}{clause(why)}; the failures stay in "
            f"`orchestrate history {study.folder.name}`"
        )
    return notices


def follow_folder(spec: SweepSpec, root: Path) -> SweepSpec:
    """Return the spec with files and folders that are gone replaced by those at the same place in the runs folder.

    For a runs folder that was moved or copied, with the data or the model inside.
    """
    base = spec.base.model_copy(update={"data": _follow_data(spec.base.data, root)})
    base = base.model_copy(update={"model": _follow_model(base.model, root)})
    update: dict[str, Any] = {"base": base}
    if spec.sft is not None and spec.sft.data is not None:
        update["sft"] = spec.sft.model_copy(update={"data": _follow_data(spec.sft.data, root)})
    return spec.model_copy(update=update)


def check_inputs_exist(spec: SweepSpec) -> None:
    """Raise SpecError with every file and local folder of the spec that does not exist, and what to type."""
    problems = [
        SpecProblem(
            spec.name,
            path,
            f"there is no {missing}",
            f"if it was moved: orchestrate resume {spec.name} --set {path}=NEW_PATH",
        )
        for path, missing in _missing(spec)
    ]
    if problems:
        raise SpecError(problems)


def check_moved_inputs(folder: SweepFolder, old: SweepSpec, new: SweepSpec, *, trust_remote_code: bool = False) -> None:
    """Check that data and models whose paths changed in `new` have the contents with which the sweep began.

    Raises:
        DataError: the data has another content.
        SpecError: a model has other weights, or nothing says which it had.
        TrialError: data or model cannot be read.
    """
    differences = spec_differences(old, new)
    if any(change.path == _REWARD_MODEL and change.old is not None for change in differences):
        _check_reward_model(folder, old, new)
    moved = {change.path for change in differences if is_location(change)}
    if "base.model.name_or_path" in moved:
        _check_model(folder, old, new)
    if any(path.startswith("base.") for path in moved):
        report = load_data_report(folder)
        now = _prepare(new.base, folder, trust_remote_code).report
        if report is not None and report.fingerprint != now.fingerprint:
            from trainer.data.data_report import describe_changes

            listed = "".join(f"\n  {line}" for line in describe_changes(folder.cache, report, now))
            raise _other_data(new.name, "base.data", report.fingerprint, now.fingerprint, listed)
    if any(path.startswith("sft.data.") for path in moved):
        _check_stage_data(folder, old, new, trust_remote_code)


def _check_model(folder: SweepFolder, old: SweepSpec, new: SweepSpec) -> None:
    from trainer.models.model_files import model_fingerprint

    before, after = old.base.model, new.base.model
    assert before.name_or_path is not None
    assert after.name_or_path is not None
    _check_is_model(new.name, "base.model.name_or_path", after.name_or_path)
    now = model_fingerprint(after, after.name_or_path)
    if Path(before.name_or_path).is_dir():
        known = {model_fingerprint(before, before.name_or_path)}
    else:
        known = _recorded_models(folder, before.name_or_path)
    if known == {now}:
        return
    problem, hint = (
        ("has other weights than the model with which the sweep began", "its trials would not be comparable")
        if known
        else (
            f"cannot be compared: {before.name_or_path} is gone, and no trial has recorded its weights yet",
            "put the model back to its place, or start another sweep",
        )
    )
    raise SpecError([SpecProblem(new.name, "base.model.name_or_path", f"{after.name_or_path} {problem}", hint)])


def _check_is_model(sweep: str, path: str, name: str) -> None:
    """Raise SpecError for a folder without config.json, ModelError for one with damaged files."""
    check_model_files(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise SpecError([SpecProblem(sweep, path, f"{name} is no model: it has no config.json")])


def _check_reward_model(folder: SweepFolder, old: SweepSpec, new: SweepSpec) -> None:
    """Check that a reward model that has judged trials has the same weights at its new place.

    Trials judged by another model would stand beside them unnoticed. Before it has judged any, and by the command
    `judge`, another model may be used.
    """
    before = None if old.judge is None else old.judge.reward_model
    after = None if new.judge is None else new.judge.reward_model
    if before is None or after is None:
        return
    _check_is_model(new.name, _REWARD_MODEL, after.name_or_path)
    from orchestrator.driver.judge_candidates import reward_scores_file
    from orchestrator.judge.judgements import parse_judgements

    with Study.open(folder, read_only=True) as study:
        if not any(each.judge == "reward" for each in parse_judgements(study.judgements())):
            return
    if Path(before.name_or_path).is_dir():
        is_same = reward_scores_file(before, folder.cache) == reward_scores_file(
            before.model_copy(update={"name_or_path": after.name_or_path}), folder.cache
        )
        problem = "has other weights than the reward model that has judged this sweep's trials"
    else:
        moved = before.model_copy(update={"name_or_path": after.name_or_path})
        is_same = reward_scores_file(moved, folder.cache).is_file()
        problem = f"is not {before.name_or_path}, which has judged this sweep's trials and is gone, by its weights"
    if not is_same:
        hint = f"judge all trials anew: orchestrate judge {new.name} --set judge.reward_model={after.name_or_path}"
        raise SpecError([SpecProblem(new.name, _REWARD_MODEL, f"{after.name_or_path} {problem}", hint)])


def _recorded_models(folder: SweepFolder, name: str) -> set[str]:
    """Return the fingerprints of the model `name` in the results and checkpoints that were trained from it."""
    by_trials = _recorded_in(folder.path.glob("trials/*/*"), name)
    return by_trials or _recorded_in(folder.cache.glob("sft/*/*"), name)  # trials of a sweep with an SFT stage


def _recorded_in(runs: Iterable[Path], name: str) -> set[str]:
    found: set[str] = set()
    for run in runs:
        config = stored_config(run)
        if config is None or config.model.name_or_path != name:
            continue
        files = [run / _RESULT, *(checkpoint / _STATE for checkpoint in list_checkpoints([run]))]
        for file in files:
            inputs = read_json_object(file).get("inputs", {}) if file.is_file() else {}
            found |= {str(inputs["model"])} if "model" in inputs else set()
    return found


def _check_stage_data(folder: SweepFolder, old: SweepSpec, new: SweepSpec, trust_remote_code: bool) -> None:
    """Compare the data of the SFT stage with that at its earlier place, else with that of the stage's model."""
    from orchestrator.execution.sft_cache_key import stage_key

    config, before = sft_config(new), sft_config(old)
    assert config is not None
    assert before is not None
    now = _prepare(config, folder, trust_remote_code).fingerprint
    if not _missing_files(before.data):
        was = _prepare(before, folder, trust_remote_code).fingerprint
        if was != now:
            raise _other_data(new.name, "sft.data", was, now, "")
    elif not (folder.cache / "sft" / stage_key(config, now, folder.cache)).is_dir():
        problem = "is not the data of the sft stage's model, or that model is no longer in the cache"
        raise SpecError([SpecProblem(new.name, "sft.data", problem, "put the data back to its place")])


def _other_data(name: str, path: str, was: str, now: str, listed: str) -> DataError:
    return DataError(
        f"{path}: the data at its new place is not that with which {name} began (fingerprint {was}, now {now}), so "
        f"that its trials would not be comparable; nothing was changed{listed}"
    )


def _prepare(config: TrialConfig, folder: SweepFolder, trust_remote_code: bool) -> Prepared:
    from trainer.data import prepare

    return prepare(config.data, config.model, folder.cache, trust_remote_code=trust_remote_code)


def _missing(spec: SweepSpec) -> list[tuple[str, str]]:
    """Return the settings of missing files and folders, and their names."""
    sections = [("base.data", spec.base.data)]
    if spec.sft is not None and spec.sft.data is not None:
        sections.append(("sft.data", spec.sft.data))
    found = [(f"{section}.{split}", file) for section, data in sections for split, file in _missing_files(data)]
    for field in ("name_or_path", "tokenizer"):
        value = getattr(spec.base.model, field)
        if value is not None and Path(value).is_absolute() and not Path(value).exists():
            found.append((f"base.model.{field}", value))
    return found


def _missing_files(data: DataConfig) -> list[tuple[str, str]]:
    splits = (("train", data.train), ("eval", data.eval or ()))
    return [
        (split, source.path)
        for split, sources in splits
        for source in sources
        if isinstance(source, FileSource) and not Path(source.path).is_file()
    ]


def _follow_data(data: DataConfig, root: Path) -> DataConfig:
    place = {
        path: str(there) for _, path in _missing_files(data) if (there := found_below(Path(path), root)) is not None
    }
    held_out = None if data.eval is None else with_source_paths(data.eval, place)
    return data.model_copy(update={"train": with_source_paths(data.train, place), "eval": held_out})


def _follow_model(model: ModelConfig, root: Path) -> ModelConfig:
    update: dict[str, str] = {}
    for field in ("name_or_path", "tokenizer"):
        value = getattr(model, field)
        if value is not None and Path(value).is_absolute() and not Path(value).exists():
            there = found_below(Path(value), root)
            update |= {} if there is None else {field: str(there)}
    return model.model_copy(update=update)
