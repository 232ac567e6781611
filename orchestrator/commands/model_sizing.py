"""Values of a first sweep file sized for a model and its data, each with its source."""

from __future__ import annotations

import json
import math
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import DataError
from orchestrator.spec.advice.published_values import (
    FEWEST_UPDATES,
    LARGEST_BATCH,
    MOST_EPOCHS,
    SMALL,
    LossName,
    learning_rates,
    rate_text,
)
from orchestrator.spec.estimates.input_sizes import count_rows, model_shape
from trainer.config.model_folder import check_tokenizer_files, check_whole_model, count_elements
from trainer.config.trial import DataConfig, ModelConfig
from trainer.results import TrialError

if TYPE_CHECKING:
    from trainer.data.data_findings import FindingKind
    from trainer.data.data_report import DataReport

_SAMPLE = 1000
"""Rows whose lengths are measured."""
_MOST_UPDATES_ON_CPU = 200
_TRUST = "--trust-remote-code"
_NAMED = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ValueWithReason:
    """A value as YAML, and the reason for it."""

    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about model and data found without network; None: unknown."""

    parameters: float | None = None
    positions: int | None = None
    """Maximum sequence length (tokens) in the model's config.json."""
    rows: int | None = None
    """Rows of a local data file."""
    lengths: dict[str, dict[str, int]] | None = None
    """Percentiles of the token counts, as in `DataReport.lengths`."""
    all_rows_read: bool = False
    train_rows: int | None = None
    """Pairs to train on, where all rows were read."""
    labels: tuple[int, int] | None = None
    """Of rows with one response: those with label true and with label false, among the rows read; None for pairs."""
    apply_template: bool | None = None
    """`data.apply_template` for plain-text rows and a tokenizer with a chat template; None: not applicable."""
    notices: tuple[str, ...] = ()

    @property
    def small(self) -> bool:
        """Whether no settings are published for models of this size."""
        return self.parameters is not None and self.parameters < SMALL

    @property
    def size(self) -> str:
        """The number of parameters as text."""
        if self.parameters is None:
            return "a model of unknown size"
        for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
            if self.parameters >= unit:
                return f"{self.parameters / unit:.3g} {name} parameters"
        return f"{self.parameters:.0f} parameters"


def find_facts(model: str, data: str, *, is_file: bool) -> Facts:
    """Read the model's folder or cached config.json, its name, and a local file of pairs.

    Raises:
        DataError: a sweep would refuse the rows, or the rows with this tokenizer.
        ModelError: a file of the model is damaged or absent.
    """
    check_whole_model(model)
    check_tokenizer_files(model)
    rows = count_rows(DataConfig.model_validate({"train": data})).train if is_file else None
    stored = json.loads((Path(model) / "config.json").read_bytes()) if (Path(model) / "config.json").is_file() else {}
    positions = next((stored[key] for key in ("max_position_embeddings", "n_positions") if key in stored), None)
    facts = Facts(parameters_of(model), positions if isinstance(positions, int) else None, rows)
    if not is_file:
        return facts
    try:
        return _with_lengths(facts, model, data) if Path(model).is_dir() else _with_form(facts, data)
    except TrialError as error:
        raise DataError(f"no file is written, as a sweep would refuse it: {error}") from error


def parameters_of(model: str) -> float | None:
    """Return the parameters of a folder or hub name: counted, by formula, or as its name says; None if unknown."""
    folder = Path(model)
    if folder.is_dir() and (files := sorted(folder.glob("*.safetensors"))):
        return float(sum(map(count_elements, files)))
    shape = model_shape(ModelConfig(name_or_path=model))
    if shape is not None:
        return float(shape.parameters)
    named = _NAMED.findall(model.rpartition("/")[2].replace("-", " ").replace("_", " "))
    return float(named[0][0]) * {"b": 1e9, "m": 1e6}[named[0][1].lower()] if named else None


def _with_lengths(facts: Facts, model: str, data: str) -> Facts:
    from trainer.data import load_tokenizer  # slow import
    from trainer.data.preparation import examine

    share = float(held_out(facts).value)
    requested = DataConfig.model_validate(
        {"train": data, "max_train_rows": _SAMPLE, "max_length": 1 << 20, "eval_share": share}
    )
    notices: tuple[str, ...] = ()
    try:
        with tempfile.TemporaryDirectory() as cache:
            tokenizer = load_tokenizer(ModelConfig(name_or_path=model), requested, Path(cache))
    except TrialError as error:
        if _TRUST not in str(error):  # a sweep has that flag
            raise
        message = f"the tokenizer is not loaded, and max_length is not fitted to the rows: {error}"
        return replace(facts, notices=(message,))
    found = examine(requested, tokenizer, "")
    if _rows_of(found.report, "template_undecided"):
        requested = requested.model_copy(update={"apply_template": True})
        found = examine(requested, tokenizer, "")
        if 2 * _rows_of(found.report, "rendered_twice") > found.report.checked_rows:
            requested = requested.model_copy(update={"apply_template": False})
            found = examine(requested, tokenizer, "")
            notices = (
                "the prompts were rendered by another chat template than the tokenizer's: they are used as "
                "they are (data.apply_template: false)",
            )
    found.raise_if_unusable(requested)
    complete = facts.rows is not None and facts.rows <= _SAMPLE
    return replace(
        facts,
        lengths=found.report.lengths,
        all_rows_read=complete,
        train_rows=found.report.train_rows if complete else None,
        labels=None if found.report.labels is None else found.report.labels["train"],
        apply_template=requested.apply_template,
        notices=notices,
    )


def _rows_of(report: DataReport, kind: FindingKind) -> int:
    return sum(finding.count for finding in report.findings if finding.kind == kind)


def _with_form(facts: Facts, data: str) -> Facts:
    """Without the tokenizer: what the rows' text says, and whether a chat template would be a question."""
    from trainer.data.data_findings import raise_if_refused
    from trainer.data.row_selection import TRAIN, select_rows

    requested = DataConfig.model_validate({"train": data, "max_train_rows": _SAMPLE})
    found = select_rows(requested)
    for split in ("train", "eval"):
        if not found.rows(split):
            found.findings.add_dataset_finding("no_rows", f"The {split} split is empty")
    findings, bad = found.findings.as_tuple(), len(found.invalid)
    raise_if_refused(findings, bad, found.checked_rows, requested.bad_rows, requested.max_bad_share)
    if any(row.preference.is_single for row in found.train):
        desirable = sum(bool(row.preference.chosen) for row in found.train)
        facts = replace(facts, labels=(desirable, len(found.train) - desirable))
    if not any(isinstance(row.preference.prompt, str) for row in found.rows(TRAIN)):
        return facts
    message = (
        "the rows are plain text: if the tokenizer has a chat template, the file is refused until "
        "data.apply_template is set: true (prompts become user messages) or false (the text is used unchanged)"
    )
    return replace(facts, notices=(message,))


# --- choices ---------------------------------------------------------------------------------------------------------


def rates(loss: LossName, facts: Facts, *, lora: bool) -> ValueWithReason:
    """Return the learning rates to search."""
    found = learning_rates(loss, facts.parameters, lora=lora)
    return ValueWithReason("[" + ", ".join(map(rate_text, found.rates)) + "]", found.reason)


def base_rate(loss: LossName, facts: Facts, *, lora: bool) -> str:
    """Return the base learning rate: the middle one of the search, the lower of two."""
    return rate_text(learning_rates(loss, facts.parameters, lora=lora).middle)


def per_update(facts: Facts, *, lora: bool = False) -> ValueWithReason:
    """Return the pairs per update."""
    pairs = most = LARGEST_BATCH[facts.small or lora]
    source = "adapters tolerate large batches less: LoRA Without Regret" if lora else "as in the papers"
    reason = "as sweeps/quickstart.yaml" if facts.small else f"{source}; independent of the micro-batch"
    trained = _trained(facts)
    if trained is not None:
        while pairs > 2 and trained / pairs < (FEWEST_UPDATES if pairs > 8 else 4):
            pairs //= 2
        pairs = max(1, min(pairs, trained))
        if pairs < most:
            updates = trained // pairs
            reason = (
                f"few rows: {trained} pair{'s'[: trained - 1]} make{'s' if trained == 1 else ''} "
                f"{updates} update{'s'[: updates - 1]} an epoch"
            )
    return ValueWithReason(str(pairs), reason)


def duration(facts: Facts, *, cpu: bool, lora: bool = False) -> list[tuple[str, ValueWithReason]]:
    """Return `num_train_epochs`, or on a CPU `max_steps` where an epoch takes too many updates."""
    pairs, trained = int(per_update(facts, lora=lora).value), _trained(facts)
    epochs, reason = 1, "as in the papers"
    if trained is not None and trained < FEWEST_UPDATES * pairs:
        epochs = min(MOST_EPOCHS, math.ceil(FEWEST_UPDATES * pairs / max(1, trained)))
        reason = "few rows: several epochs"
    chosen = [("num_train_epochs", ValueWithReason(str(epochs), reason))]
    if cpu and (trained is None or epochs * trained / pairs > _MOST_UPDATES_ON_CPU):
        message = "updates instead of an epoch, for the CPU; remove this line to use all data"
        chosen = [("max_steps", ValueWithReason(str(_MOST_UPDATES_ON_CPU), message))]
    return chosen


def held_out(facts: Facts) -> ValueWithReason:
    """Return the share of rows that is held out for evaluation."""
    share = 0.1 if facts.rows is None or facts.rows >= 500 else 0.2 if facts.rows >= 100 else 0.3
    return ValueWithReason(
        f"{share:g}", "held out by prompt" + (": few rows, so a larger share" if share > 0.1 else "")
    )


def longest(facts: Facts) -> list[tuple[str, ValueWithReason]]:
    """Return `max_length`, and `max_prompt_length` where both are those of the papers."""
    most = facts.positions or math.inf
    if facts.lengths is not None:
        longest_row = facts.lengths["row"]["p100"]
        fitted = max(8, 8 * math.ceil(longest_row * (1.0 if facts.all_rows_read else 1.25) / 8))
        if fitted <= most:
            measured = "of all rows" if facts.all_rows_read else f"of the first {_SAMPLE} rows plus 25 %"
            return [
                ("max_length", ValueWithReason(str(fitted), f"tokens of prompt and response: the longest {measured}"))
            ]
        message = f"the model's maximum; the longest row has {longest_row} tokens, so rows are truncated"
        return [("max_length", ValueWithReason(str(int(most)), message))]
    if not facts.small:
        required, prompt = 2048, 1800
        if required <= most:
            return [
                (
                    "max_length",
                    ValueWithReason(str(required), "tokens of prompt and response together, as in the papers"),
                ),
                ("max_prompt_length", ValueWithReason(str(prompt), "longer prompts lose their oldest tokens")),
            ]
    length = int(min(1024, most))
    message = "tokens of prompt and response together" + ("; the model's maximum" if length == most else "")
    return [("max_length", ValueWithReason(str(length), message))]


def answers(facts: Facts) -> ValueWithReason | None:
    """Return `max_new_tokens` of evaluated answers; None for the default."""
    if facts.lengths is None:
        return None
    responses = facts.lengths.get("chosen") or facts.lengths["rejected"]
    tokens = min(64, max(8, 8 * math.ceil(responses["p90"] / 8)))
    if facts.positions is not None:
        tokens = max(1, min(tokens, facts.positions - int(longest(facts)[0][1].value)) or tokens)
    return ValueWithReason(str(tokens), "90 % of the data's responses are shorter") if tokens < 64 else None


def _trained(facts: Facts) -> int | None:
    if facts.train_rows is not None or facts.rows is None:
        return facts.train_rows
    return round(facts.rows * (1 - float(held_out(facts).value)))
