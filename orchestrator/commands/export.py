"""The winner as a folder that transformers loads, with a card that says where it comes from."""

from __future__ import annotations

from pathlib import Path

from orchestrator.driving.retention import model_of
from orchestrator.errors import NoTrialCompleted, OrchestrateError
from orchestrator.folders import DATA_FILE, existing
from orchestrator.spec.place import place
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.records import TrialRecord
from orchestrator.study.study import Study
from trainer.config import DataConfig, FileSource, GeneratedSource, HubSource, Source
from trainer.errors import TrialError


class CannotExport(OrchestrateError):
    """The place is taken, or the weights are not there."""


def export(name: str, root: Path, to: Path, merge: bool) -> Path:
    """Write the best trial's model and its card into the new folder `to`; nothing is overwritten."""
    folder = existing(root, name)
    if to.exists():
        raise CannotExport(f"{to} exists already; nothing is overwritten")
    with Study.open(folder) as study:
        spec, record = study.spec, study.best()
    if record is None:
        raise NoTrialCompleted(f"no trial of {name} has completed yet")
    model = model_of(folder, record)
    if model is None:
        raise CannotExport(f"the weights of trial {record.number} are no longer in {folder.trial(record.number)}")
    from trainer.models.export import export_model

    try:
        export_model(model, to, merge=merge)
    except TrialError as why:
        raise CannotExport(str(why)) from why
    report = folder.path / DATA_FILE
    card = model_card(spec, record, report.read_text(encoding="utf-8") if report.is_file() else None, merged=merge)
    (to / "README.md").write_text(card, encoding="utf-8")
    return to


def model_card(spec: SweepSpec, record: TrialRecord, report: str | None, *, merged: bool) -> str:
    """Data, configuration, metrics and base model of a trial, as a model card."""
    from trainer.data.summary import DataReport

    config = place(spec.base, record.params)
    found = None if report is None else DataReport.model_validate_json(report)
    base = config.model.name_or_path or f"a generated {config.model.generated and config.model.generated.architecture}"
    kind = "LoRA adapters" if config.lora and not merged else "merged LoRA weights" if config.lora else "full weights"
    leaves = config.leaves()
    searched = [f"| {path} | {leaves.get(path, value)} |" for path, value in record.params.items()]
    fixed = [f"| {path} | {value} |" for path, value in leaves.items() if path not in record.params]
    metrics = [f"| {metric} | {value:.6g} |" for metric, value in sorted(record.metrics.items())]
    hub = f"base_model: {config.model.name_or_path}\n" if config.model.name_or_path else ""
    lines = [
        f"---\nlibrary_name: transformers\n{hub}tags: [preference-tuning, {config.loss.kind}, prefsweep]\n---",
        f"# {spec.name}, trial {record.number}",
        f"{config.loss.kind} from {base}{' after SFT' if spec.sft else ''}; {kind}. The best of its sweep by "
        f"{spec.goal.metric} ({spec.goal.direction}): {record.value:.6g} after {record.step} updates.",
        *_fork_lines(record),
        "## Data",
        *_data_lines(config.data),
    ]
    if found is not None:
        lines.append(f"{found.train_rows:,} pairs to train on, {found.eval_rows:,} held out; fingerprint ")
        lines[-1] += f"`{found.fingerprint}`."
    lines += ["## Searched", "| leaf | value |\n|---|---|\n" + "\n".join(searched)]
    lines += ["## Metrics", "| metric | last value |\n|---|---|\n" + "\n".join(metrics)]
    lines += ["## Configuration", "| leaf | value |\n|---|---|\n" + "\n".join(fixed)]
    return "\n\n".join(lines) + "\n"


def _fork_lines(record: TrialRecord) -> list[str]:
    if record.fork is None:
        return []
    return [
        f"Its first {record.fork.step} updates are those of trial {record.parent}, from whose checkpoint it went on; "
        "the configuration below holds from there."
    ]


def _data_lines(data: DataConfig) -> list[str]:
    train = "\n".join(f"- train: {_source(source)}" for source in data.train)
    held = data.eval or ()
    evaluation = "\n".join(f"- held out: {_source(source)}" for source in held)
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
