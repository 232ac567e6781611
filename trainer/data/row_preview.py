"""Preview of the rows as the model sees them: rendered, tokenized, truncated and decoded, with their findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.loss_config import LossConfig
from trainer.config.trial import DataConfig, ModelConfig
from trainer.data.data_findings import Severity, UnreadableData, describe_finding, severity_of
from trainer.data.data_report import DataReport
from trainer.data.pair_dataset import check_rows
from trainer.data.preparation import CheckedData, cited_values, data_fingerprint, examine, read_score_gaps
from trainer.data.row_selection import EVAL, TRAIN, RowAddress, Split
from trainer.data.tokenization import load_tokenizer
from trainer.results import TrialError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data.pair_dataset import TokenIds, TokenizedPair


@dataclass(frozen=True, slots=True)
class RowNotice:
    """A finding about one row; `severity` is `fatal`, `bad_row` or `notice`."""

    kind: str
    severity: str
    text: str


@dataclass(frozen=True, eq=False)
class PreviewRow:
    """One row of the data. `row` counts from 1 in its source; `kept` is False if it is not trained or evaluated on.

    `prompt`, `chosen` and `rejected` are decoded on access, special tokens included; of the answers the scored tokens.
    They are None if the row was left out before tokenization; of a row with one response and a label also the answer
    that it does not have.
    """

    split: Split
    source: str
    row: int
    kept: bool
    notices: tuple[RowNotice, ...]
    _pair: TokenizedPair | None = field(repr=False)
    _tokenizer: PreTrainedTokenizerBase = field(repr=False)

    @cached_property
    def prompt(self) -> str | None:
        """The text before the answers, which is not scored."""
        return None if self._pair is None else self._text(self._pair.prompt)

    @cached_property
    def chosen(self) -> str | None:
        """The scored tokens of the chosen answer."""
        return None if self._pair is None or not len(self._pair.chosen) else self._text(self._pair.chosen)

    @cached_property
    def rejected(self) -> str | None:
        """The scored tokens of the rejected answer."""
        return None if self._pair is None or not len(self._pair.rejected) else self._text(self._pair.rejected)

    @property
    def lengths(self) -> dict[str, int] | None:
        """Number of tokens of prompt, chosen and rejected."""
        if self._pair is None:
            return None
        return {name: len(getattr(self._pair, name)) for name in ("prompt", "chosen", "rejected")}

    def as_json(self) -> dict[str, Any]:
        """Return the row for `data --json`."""
        names = ("split", "source", "row", "kept", "prompt", "chosen", "rejected", "lengths")
        return {name: getattr(self, name) for name in names} | {"notices": [asdict(notice) for notice in self.notices]}

    def _text(self, ids: TokenIds) -> str:
        decoded = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded)


@dataclass(frozen=True, slots=True)
class Preview:
    """Every row of both splits, the data report, and why training would be refused (None if it is not)."""

    rows: tuple[PreviewRow, ...]
    report: DataReport
    refused: TrialError | None
    special_tokens: tuple[str, ...]

    def report_json(self) -> dict[str, Any]:
        """Return the report for `data --json`, each finding with its count and text."""
        notices = [finding.model_dump(mode="json") | {"text": str(finding)} for finding in self.report.findings]
        report = self.report.model_dump(mode="json", exclude={"findings"})
        return report | {"notices": notices, "refused": None if self.refused is None else str(self.refused)}


def preview(
    data: DataConfig,
    model: ModelConfig,
    cache: Path,
    *,
    trust_remote_code: bool = False,
    loss: LossConfig | None = None,
) -> Preview:
    """Read, check and tokenize the data as a trial would, and decode it again. Loads no model and writes no data.

    `loss`: rows that it cannot be trained on are refused: without a score that it reads, or without a pair.

    Raises UnreadableData if a source cannot be opened, or lacks a column of scores that the loss needs; TokenizerError.
    """
    tokenizer = load_tokenizer(model, data, cache, trust_remote_code=trust_remote_code)
    found = examine(data, tokenizer, data_fingerprint(data, tokenizer))
    try:
        found.raise_if_unusable(data)
        if loss is not None:
            check_rows(loss, *found.pairs.values())
        if loss is not None and loss.needs_scores:
            read_score_gaps(data, {split: [(p.source, p.row) for p in pairs] for split, pairs in found.pairs.items()})
        refused = None
    except UnreadableData:
        raise
    except TrialError as error:
        refused = error
    added = tokenizer.added_tokens_decoder.values()
    special = tuple(token.content for token in added if token.special)
    return Preview(tuple(_rows(found, tokenizer, cited_values(data, tokenizer))), found.report, refused, special)


def _rows(found: CheckedData, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, str]) -> Iterable[PreviewRow]:
    """Yield rows of the training split, then of evaluation, each by source and number; left-out rows are included."""
    selection = found.selection
    kept_pairs: dict[RowAddress, TokenizedPair] = {
        (split, pair.source, pair.row): pair for split in (TRAIN, EVAL) for pair in found.pairs[split]
    }
    order = {TRAIN: 0, EVAL: 1}
    addresses: set[RowAddress] = {*kept_pairs, *selection.findings_by_row}
    for address in sorted(addresses, key=lambda at: (order[at[0]], at[1], at[2])):
        split, source, row = address
        pair = kept_pairs.get(address) or found.left_out.get(address)
        if pair is not None and not len(pair.prompt) + len(pair.chosen) + len(pair.rejected):
            pair = None  # the template refused it
        notices = [
            RowNotice(kind, severity_of(kind).value, describe_finding(kind, detail, settings))
            for kind, detail in dict.fromkeys(selection.findings_by_row.get(address, ()))
        ]
        notices.sort(key=lambda notice: list(Severity).index(Severity(notice.severity)))
        yield PreviewRow(
            split=split,
            source=selection.names[split][source],
            row=row,
            kept=address in kept_pairs,
            notices=tuple(notices),
            _pair=pair,
            _tokenizer=tokenizer,
        )
