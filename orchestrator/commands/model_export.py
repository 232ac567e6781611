"""`orchestrate best --export`: writes the best model as a transformers folder with a model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.driver.checkpoint_retention import model_folder
from orchestrator.driver.data_stage import load_data_report
from orchestrator.errors import ExitCode, OrchestrateError
from orchestrator.folders import DATA_FILE, SweepFolder, existing_sweep
from orchestrator.spec.requirements import Requirement
from orchestrator.spec.search.trial_params import SEED
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.finalists import trial_config
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord
from trainer.config.trial import DataConfig, FileSource, GeneratedSource, HubSource, Source, TrialConfig
from trainer.results import TrialError, clause

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data.pair_dataset import PairDataset
    from trainer.models.model_files import Exported

Log = Callable[[str], None]


class CannotExport(OrchestrateError):
    """The output folder exists, the weights are missing, or the comparison is impossible."""


class OtherModel(CannotExport):
    """The exported model computes other log-probs than the trained one: a bug of prefsweep."""

    code = ExitCode.INTERNAL_ERROR


def export_best_model(
    name: str,
    root: Path,
    to: Path,
    merge: bool,
    *,
    compare: bool = True,
    trust_remote_code: bool = False,
    log: Log = lambda _: None,
) -> Path:
    """Write the best trial's model and its card into the new folder `to`; nothing is overwritten.

    Args:
        name: the sweep.
        root: the runs folder.
        to: a folder that does not exist yet.
        merge: merge adapters into the weights of their base model.
        compare: load the result with plain transformers and compare it with the trial's last evaluation.
        trust_remote_code: whether Python code of the model's repository may run.
        log: called with each message.

    Raises:
        NoTrialCompleted: there is no best trial.
        CannotExport: `to` exists, the weights were deleted, or the comparison is impossible.
        OtherModel: the comparison failed; `to` was removed again.
    """
    folder = existing_sweep(root, name)
    if to.exists():
        raise CannotExport(f"{to} exists already and is not overwritten; name another folder")
    with Study.open(folder, read_only=True) as study:
        spec, record = study.spec, study.best()
        if record is None:
            raise study.no_best()
        initial = study.initial_metrics(record)
    model = model_folder(folder, record)
    if model is None:
        raise CannotExport(f"the weights of trial {record.number} are no longer in {folder.trial(record.number)}")
    from transformers.utils.logging import disable_progress_bar

    from trainer.models.model_files import BASE_FOLDER, export_model

    disable_progress_bar()
    config = trial_config(spec, record, record.trained_params)
    check = _Check(folder, spec, config, model, trust_remote_code, log) if compare else None
    try:
        export_model(
            model,
            to,
            merge=merge,
            model=config.model,
            temporary=folder.cache,
            trust_remote_code=trust_remote_code,
            check=check,
        )
    except TrialError as error:
        raise _export_error(error, spec) from error
    if (to / BASE_FOLDER).is_dir():
        log(
            f"the base model of these adapters is in the cache {folder.cache}, which may be cleared; it was copied to "
            f"{to / BASE_FOLDER} (--merge merges both into one model)"
        )
    report = folder.path / DATA_FILE
    found = report.read_text(encoding="utf-8") if report.is_file() else None
    card = model_card(spec, record, found, merged=merge, compared="" if check is None else check.found, initial=initial)
    (to / "README.md").write_text(card, encoding="utf-8")
    return to


def _export_error(reason: TrialError, spec: SweepSpec) -> CannotExport:
    from trainer.evaluation.export_check import CannotCompare, ExportDiffers
    from trainer.models.adapter_merging import BaseGone

    if isinstance(reason, ExportDiffers):
        return OtherModel(f"{clause(reason)}; nothing was written. This is a bug of prefsweep: please report it")
    if isinstance(reason, CannotCompare):
        return CannotExport(
            f"the export cannot be compared with its trial: {clause(reason)}; --no-compare exports it without "
            "comparison"
        )
    if isinstance(reason, BaseGone) and spec.sft is not None:
        return CannotExport(f"{clause(reason)}; orchestrate resume {spec.name} creates it again")
    return CannotExport(str(reason))


@dataclass(slots=True)
class _Check:
    """Compares the exported model with the trial's last evaluation. `found`: the result as text, once called."""

    folder: SweepFolder
    spec: SweepSpec
    config: TrialConfig
    model: Path
    trust_remote_code: bool
    log: Log
    found: str = field(default="", init=False)

    def __call__(self, exported: Exported) -> None:
        from trainer.evaluation.export_check import compare_export

        pairs, tokenizer = self._held_out()
        result = compare_export(
            exported,
            self.config,
            pairs,
            self.model.parent / "eval_pairs.safetensors",
            tokenizer,
            trust_remote_code=self.trust_remote_code,
            report_progress=lambda text: self.log(f"export: {text}"),
        )
        self.found = str(result)
        self.log(f"export: {self.found}")

    def _held_out(self) -> tuple[PairDataset, PreTrainedTokenizerBase]:
        """Return the trial's held-out pairs, from the cache if present, and its tokenizer."""
        from trainer.data import load_tokenizer, prepare
        from trainer.data.pair_dataset import PairDataset
        from trainer.evaluation.export_check import CannotCompare

        data, model, cache = self.config.data, self.config.model, self.folder.cache
        try:
            tokenizer = load_tokenizer(model, data, cache, trust_remote_code=self.trust_remote_code)
            report = load_data_report(self.folder)
            if report is not None and (data, model) == (self.spec.base.data, self.spec.base.model):
                prepared = cache / "data" / report.fingerprint
                if prepared.is_dir():
                    return PairDataset.open(prepared, "eval"), tokenizer
            return prepare(data, model, cache, tokenizer).eval, tokenizer
        except (TrialError, OSError, ValueError) as error:
            raise CannotCompare(f"its held-out pairs cannot be loaded ({error})") from error


def model_card(
    spec: SweepSpec,
    record: TrialRecord,
    report: str | None,
    *,
    merged: bool,
    compared: str = "",
    initial: Mapping[str, float] | None = None,
) -> str:
    """Return the model card of a trial: data, configuration, metrics and base model, as Markdown.

    Folders and files of this machine are named relative to the current folder, or by their last part.

    Args:
        spec: the sweep.
        record: the exported trial.
        report: the sweep's data report as JSON; None where it is missing.
        merged: whether adapters were merged into the weights.
        compared: result of the comparison with the trial's last evaluation; empty without one.
        initial: the initial model's metrics.
    """
    from trainer.data.data_report import DataReport

    config = trial_config(spec, record, record.trained_params)
    found = None if report is None else DataReport.model_validate_json(report)
    name, start = config.model.name_or_path, initial or {}
    base = _public(name) if name else f"a generated {config.model.generated and config.model.generated.architecture}"
    kind = "LoRA adapters" if config.lora and not merged else "merged LoRA weights" if config.lora else "full weights"
    params = config.flat_params()
    searched = [f"| {path} | {_public(params.get(path, value))} |" for path, value in record.params.items()]
    fixed = [
        f"| {path} | {_public(value)} |"
        for path, value in params.items()
        if path not in record.params and value is not None
    ]
    metrics = [
        f"| {metric} | {value:.6g} | {f'{start[metric]:.6g}' if metric in start else '–'} |"
        for metric, value in sorted(record.metrics.items())
    ]
    values = zip(spec.objectives, record.values or (record.value,), strict=True)
    reached = ", ".join(
        f"{each.metric} ({each.direction}) {value:.6g}"
        + (f" (initial model: {start[each.metric]:.6g})" if each.metric in start else "")
        for each, value in values
    )
    hub = f"base_model: {name}\n" if name and not _is_local(name) else ""
    lines = [
        f"---\nlibrary_name: transformers\n{hub}tags: [preference-tuning, {config.loss.kind}, prefsweep]\n---",
        f"# {spec.name}, trial {record.number}",
        f"{config.loss.kind} from {base}{' after SFT' if spec.sft else ''}; {kind}. The best of its sweep by "
        f"{reached} after {record.step} updates.",
        *([f"Loaded with plain transformers and compared: {compared}."] if compared else []),
        *_seed_lines(record),
        *_fork_lines(record),
        "## Data",
        *_data_lines(config.data),
    ]
    if found is not None:
        lines.append(f"{found.train_rows:,} training pairs, {found.eval_rows:,} held out; fingerprint ")
        lines[-1] += f"`{found.fingerprint}`."
    if searched:
        lines += ["## Searched settings", "| setting | value |\n|---|---|\n" + "\n".join(searched)]
    if spec.require:
        kept = [f"| {_metric_bound(r, start)} | {_measured(r, record)} |" for r in spec.require]
        lines += ["## Requirements", "The best trial had to keep these bounds.", "| bound | this model |\n|---|---|\n"]
        lines[-1] += "\n".join(kept)
    lines += ["## Metrics", "| metric | last value | initial model |\n|---|---|---|\n" + "\n".join(metrics)]
    lines += ["## Configuration", "| setting | value |\n|---|---|\n" + "\n".join(fixed)]
    return "\n\n".join(lines) + "\n"


def _metric_bound(requirement: Requirement, start: Mapping[str, float]) -> str:
    """Return the requirement with the initial model's value: "eval_exact_answers >= initial (0.39)"."""
    first = start.get(requirement.metric)
    return requirement.name + (f" ({first:.6g})" if requirement.relative_to_initial and first is not None else "")


def _measured(requirement: Requirement, record: TrialRecord) -> str:
    value = record.metrics.get(requirement.metric)
    return "not measured" if value is None else f"{value:.6g}"


def _is_local(name: str) -> bool:
    return Path(name).is_absolute() or Path(name).exists() or name.startswith((".", "~"))


def _public(value: Any) -> str:
    """Return a setting as text that does not depend on this machine: an absolute path relative, or by its last part."""
    if isinstance(value, list | tuple):
        return ", ".join(_public(each) for each in value)
    if isinstance(value, dict):
        given = {key: each for key, each in value.items() if each is not None and each != {}}
        return ", ".join(f"{key} {_public(each)}" for key, each in given.items())
    path = Path(value) if isinstance(value, str) else None
    if path is None or not path.is_absolute():
        return str(value)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _seed_lines(record: TrialRecord) -> list[str]:
    if not record.seeds:
        return []
    seed = record.trained_params[SEED]
    return [f"Values are the {record.seeds_text}; these weights are the best seed's (training.seed {seed})."]


def _fork_lines(record: TrialRecord) -> list[str]:
    if record.fork is None:
        return []
    return [
        f"Its first {record.fork.step} updates are those of trial {record.parent}, from whose checkpoint it continued; "
        "the configuration below applies from there."
    ]


def _data_lines(data: DataConfig) -> list[str]:
    train = "\n".join(f"- train: {_source(source)}" for source in data.train)
    held_out = data.eval or ()
    evaluation = "\n".join(f"- held out: {_source(source)}" for source in held_out)
    return [train, evaluation or f"- held out: {data.eval_share:.0%} of train, by prompt"]


def _source(source: Source) -> str:
    match source:
        case FileSource():
            return f"`{Path(source.path).name}`"
        case HubSource():
            revision = f" at {source.revision}" if source.revision else ""
            return f"`{source.dataset}`, {source.subset or 'default'}, {source.split}{revision}"
        case GeneratedSource():
            return f"generated {source.generated}, {source.split}, {source.rows} rows, seed {source.seed}"
