"""Rows as the model will see them: rendered, tokenised and cut, decoded again, each with what was noticed about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import DataConfig, ModelConfig
from trainer.data.check import BadData, Severity, in_words, severity
from trainer.data.prepare import Examined, examine, fingerprint_of
from trainer.data.select import EVAL, TRAIN, Place, Split
from trainer.data.summary import DataReport
from trainer.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data.pairs import Tokenised


@dataclass(frozen=True, slots=True)
class RowNotice:
    """What was noticed about one row; `severity` is `fatal`, `bad_row` or `notice`."""

    kind: str
    severity: str
    text: str


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One row of the data. `row` counts from 1 in its source; `kept` is False where it is not trained or evaluated on.

    `prompt`, `chosen` and `rejected` are decoded with special tokens, of the answers what is scored; None where the row
    was left out before it was tokenised. `lengths` count tokens of each.
    """

    split: Split
    source: str
    row: int
    kept: bool
    prompt: str | None
    chosen: str | None
    rejected: str | None
    lengths: dict[str, int] | None
    notices: tuple[RowNotice, ...]

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Preview:
    """Every row of both splits, the report of the whole, and why training would be refused; None where it is not."""

    rows: tuple[PreviewRow, ...]
    report: DataReport
    refused: BadData | None
    special_tokens: tuple[str, ...]

    def whole(self) -> dict[str, Any]:
        """Return the report for `--json`, each finding with its count and its sentence."""
        notices = [finding.model_dump(mode="json") | {"text": str(finding)} for finding in self.report.findings]
        told = self.report.model_dump(mode="json", exclude={"findings"})
        return told | {"notices": notices, "refused": None if self.refused is None else str(self.refused)}


def preview(data: DataConfig, model: ModelConfig, cache: Path, *, trust_remote_code: bool = False) -> Preview:
    """Read, check and tokenise the data as a trial would, and decode it again. Loads no model and writes no data.

    Raises UnreadableData for a source that cannot be opened, and TokenizerError.
    """
    tokenizer = load_tokenizer(model, data, cache, trust_remote_code=trust_remote_code)
    found = examine(data, tokenizer, fingerprint_of(data, tokenizer))
    try:
        found.refuse(data)
        refused = None
    except BadData as why:
        refused = why
    added = tokenizer.added_tokens_decoder.values()
    special = tuple(token.content for token in added if token.special)
    return Preview(tuple(_rows(found, tokenizer)), found.report, refused, special)


def _rows(found: Examined, tokenizer: PreTrainedTokenizerBase) -> Iterable[PreviewRow]:
    """Rows of the training split, then of evaluation, each by source and number, the ones left out among them."""
    selection = found.selection
    kept: dict[Place, Tokenised] = {
        (split, pair.source, pair.row): pair for split in (TRAIN, EVAL) for pair in found.pairs[split]
    }
    order = {TRAIN: 0, EVAL: 1}
    places: set[Place] = {*kept, *selection.notes}
    for place in sorted(places, key=lambda at: (order[at[0]], at[1], at[2])):
        split, source, row = place
        pair = kept.get(place) or found.left_out.get(place)
        texts, lengths = _decoded(pair, tokenizer)
        notices = [
            RowNotice(kind, severity(kind).value, in_words(kind, detail))
            for kind, detail in dict.fromkeys(selection.notes.get(place, ()))
        ]
        notices.sort(key=lambda notice: list(Severity).index(Severity(notice.severity)))
        yield PreviewRow(
            split, selection.names[split][source], row, place in kept, *texts, lengths=lengths, notices=tuple(notices)
        )


def _decoded(
    pair: Tokenised | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[str | None, str | None, str | None], dict[str, int] | None]:
    if pair is None or not len(pair.prompt) + len(pair.chosen) + len(pair.rejected):
        return (None, None, None), None
    prompt, chosen, rejected = (
        str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for ids in (pair.prompt, pair.chosen, pair.rejected)
    )
    lengths = {"prompt": len(pair.prompt), "chosen": len(pair.chosen), "rejected": len(pair.rejected)}
    return (prompt, chosen, rejected), lengths
