"""`prepare()`: read and check preference data, tokenize it once and cache the result by content.

Long steps show a progress bar on stderr.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from trainer.config.trial import DataConfig, GeneratedSource, ModelConfig, Source
from trainer.data.chat_messages import to_score, type_name
from trainer.data.data_findings import (
    BadData,
    FindingCollector,
    Severity,
    UnreadableData,
    raise_if_refused,
    severity_of,
)
from trainer.data.data_report import DataReport, SourceRows, length_table
from trainer.data.pair_dataset import PairDataset, TokenizedPair, get_or_create, write_pairs
from trainer.data.row_selection import EVAL, TRAIN, PreferenceRow, RowAddress, Selection, Split, select_rows, sources_of
from trainer.data.sources import RawRow, read_source, source_digest, source_name
from trainer.data.tokenization import EncodedPair, PairTokenizer, load_tokenizer, tokenizer_digest
from trainer.storage.atomic_files import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

PROGRESS_DELAY = 2.0
"""Seconds before a progress bar is shown."""


def iterate_with_progress(items: Sequence[T], size: int, description: str) -> Iterator[Sequence[T]]:
    """Yield `items` in slices of `size`. After `PROGRESS_DELAY` seconds, show progress on stderr: a bar in a terminal,
    else one line.
    """
    started, is_logged = time.monotonic(), sys.stderr.isatty()
    with tqdm(total=len(items), desc=description, delay=PROGRESS_DELAY, disable=None, leave=False) as bar:
        for start in range(0, len(items), size):
            if not is_logged and time.monotonic() - started > PROGRESS_DELAY:
                is_logged = True
                sys.stderr.write(f"{description}: {len(items):,} rows\n")
            piece = items[start : start + size]
            yield piece
            bar.update(len(piece))


FORMAT = 3
"""Version of the preparation rules (splits, mixing, truncation) and of its files; part of every fingerprint."""

_CHUNK_ROWS = 500
_DROPPED_KINDS = frozenset({"equal_after_cut"})
"""Notices because of which a row is dropped."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Train and evaluation pairs, the report of findings, and the fingerprint of data, rules and tokenizer."""

    train: PairDataset
    eval: PairDataset
    report: DataReport
    fingerprint: str
    was_computed: bool
    """True if this call read and tokenized the data, False if it came from the cache."""


def prepare(
    data: DataConfig,
    model: ModelConfig,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    trust_remote_code: bool = False,
) -> Prepared:
    """Return preference pairs as token ids, from `cache/data/<fingerprint>` if they are there.

    Args:
        data: The data section of a trial.
        model: The model section; names the tokenizer.
        cache: Folder of the cache.
        tokenizer: What `load_tokenizer(model, data, cache)` returned, to avoid loading it again.
        trust_remote_code: Whether a tokenizer class that comes with the model may run.

    Raises:
        BadData: The findings forbid training on these rows.
        UnreadableData: A source cannot be opened.
        TokenizerError: The tokenizer cannot be loaded or used.
        OSError: The cache cannot be written.
    """
    loaded_tokenizer = tokenizer or load_tokenizer(model, data, cache, trust_remote_code=trust_remote_code)
    fingerprint = data_fingerprint(data, loaded_tokenizer)
    folder = cache / "data" / fingerprint
    was_computed = get_or_create(
        folder, lambda temporary: _write_prepared(temporary, data, loaded_tokenizer, fingerprint)
    )
    report = DataReport.model_validate_json((folder / "report.json").read_bytes())
    report = report.with_source_names([source_name(s) for split in (TRAIN, EVAL) for s in sources_of(data, split)])
    report = report.with_settings(cited_values(data, loaded_tokenizer))
    train, evaluation = (PairDataset.open(folder, split) for split in (TRAIN, EVAL))
    return Prepared(train, evaluation, report, fingerprint, was_computed)


def data_fingerprint(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 32 hex digits over data content, tokenizer, template, lengths and rules; paths do not enter."""
    rules = data.model_dump(mode="json", exclude={"train", "eval", "chat_template"})
    return digest_of(
        {
            "format": FORMAT,
            "train": [_source_identity(source) for source in data.train],
            "eval": None if data.eval is None else [_source_identity(source) for source in data.eval],
            "rules": rules | {"prompt_budget": data.prompt_budget},
            "tokenizer": tokenizer_digest(tokenizer),
        }
    )[:32]


def _source_identity(source: Source) -> list[object]:
    columns = {} if isinstance(source, GeneratedSource) else source.columns
    return [source_digest(source), source.weight, columns]


# --- scores ----------------------------------------------------------------------------------------------------------

Gaps = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ScoreGaps:
    """Score of the chosen minus that of the rejected response of every pair, float64, [N] each."""

    train: Gaps
    eval: Gaps

    def notice(self, scale: str) -> str:
        """Return how many training pairs have no positive gap and what `loss.odpo_scale` makes of them; "" if none."""
        equal, lower = int((self.train == 0).sum()), int((self.train < 0).sum())
        if not equal + lower:
            return ""
        effect = "their loss and gradient are 0" if scale == "log" else "their offset is not above 0"
        return (
            f"odpo_alpha: of {len(self.train):,} training pairs {equal:,} have equal scores and {lower:,} a lower one "
            f"for chosen: {effect}"
        )


def score_gaps(data: DataConfig, prepared: Prepared, cache: Path) -> ScoreGaps:
    """Return the gaps of `score_chosen` and `score_rejected` of prepared pairs.

    They are read from the sources again, as tokenized data holds no scores, and cached beside it.

    Raises:
        BadData: A row has no finite number as one of its scores.
        UnreadableData: A source lacks a column of scores, or cannot be opened.
        OSError: The cache cannot be written.
    """
    folder = cache / "data" / f"{prepared.fingerprint}-scores"

    def write(temporary: Path) -> None:
        splits: dict[Split, PairDataset] = {TRAIN: prepared.train, EVAL: prepared.eval}
        addresses: dict[Split, list[tuple[int, int]]] = {
            s: [*zip(p.sources.tolist(), p.rows.tolist(), strict=True)] for s, p in splits.items()
        }
        for split, gaps in read_score_gaps(data, addresses).items():
            np.save(temporary / f"{split}.gaps.npy", gaps)

    get_or_create(folder, write)
    return ScoreGaps(*(np.load(folder / f"{split}.gaps.npy") for split in (TRAIN, EVAL)))


def read_score_gaps(data: DataConfig, addresses: Mapping[Split, Sequence[tuple[int, int]]]) -> dict[Split, Gaps]:
    """Return the gap of the scores of the rows at these addresses (source, row number) of each split; raises as
    `score_gaps` does.
    """
    findings, gaps = FindingCollector(), dict[Split, Gaps]()
    read: dict[str, dict[int, RawRow]] = {}
    for split, rows in addresses.items():
        sources = sources_of(data, split)
        found: list[float] = []
        names = [source.model_dump_json() for source in sources]
        for source, number in rows:
            if names[source] not in read:
                read[names[source]] = _rows_with_scores(sources[source])
            fields = read[names[source]][number].fields or {}
            chosen, rejected = (to_score(fields.get(name)) for name in _SCORES)
            if chosen is None or rejected is None:
                wrong = next(name for name in _SCORES if to_score(fields.get(name)) is None)
                detail = f"In the first, {wrong} is {type_name(fields.get(wrong))}"
                findings.add("missing_score", source_name(sources[source]), number, detail)
            found.append((chosen or 0.0) - (rejected or 0.0))
        gaps[split] = np.array(found, dtype=np.float64)
    if missing := findings.as_tuple():
        raise BadData(missing, "Set loss.odpo_alpha to 0 for DPO, which needs no scores.")
    return gaps


_SCORES = ("score_chosen", "score_rejected")


def _rows_with_scores(source: Source) -> dict[int, RawRow]:
    try:
        return {row.number: row for row in read_source(source, ("chosen", "rejected", *_SCORES))}
    except UnreadableData as error:
        raise UnreadableData(f"loss.odpo_alpha needs the scores of the rows: {error}") from error


# --- computation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckedData:
    """Data as it would be trained on: read, checked and tokenized, but not written."""

    selection: Selection
    pairs: dict[Split, list[TokenizedPair]]
    left_out: dict[RowAddress, TokenizedPair]
    """Rows found invalid by tokenization, or with equal answers after truncation."""
    report: DataReport

    def raise_if_unusable(self, data: DataConfig) -> None:
        """Raise BadData if the rules of `data` forbid training on this (`raise_if_refused`), or if no row of a source
        can be used and `max_bad_share` is below 1.
        """
        selection = self.selection
        findings, bad = self.report.findings, len(selection.invalid)
        raise_if_refused(findings, bad, selection.checked_rows, data.bad_rows, data.max_bad_share)
        unusable: list[str] = []
        for (split, source), count in selection.checked.items():
            splits = (TRAIN, EVAL) if data.eval is None else (split,)
            if count == sum(address[0] in splits and address[1] == source for address in selection.invalid):
                unusable.append(selection.names[split][source])
        if unusable and data.max_bad_share < 1:
            raise BadData(findings, f"No row of {', '.join(unusable)} can be used. Correct or remove the source.")


def examine(data: DataConfig, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> CheckedData:
    """Read, check and tokenize both splits. Problems of rows are in the report and raise nothing here.

    Raises UnreadableData if a source cannot be opened, and TokenizerError.
    """
    selection = select_rows(data)
    pair_tokenizer = PairTokenizer(tokenizer, data)
    left_out: dict[RowAddress, TokenizedPair] = {}
    pairs: dict[Split, list[TokenizedPair]] = {
        split: _tokenize_split(selection, split, pair_tokenizer, left_out) for split in (TRAIN, EVAL)
    }
    for split in (TRAIN, EVAL):
        if not pairs[split]:
            selection.findings.add_dataset_finding("no_rows", f"The {split} split is empty")
    stop_tokens = {int(tokenizer.eos_token_id), *pair_tokenizer.end_token_ids}  # pyright: ignore[reportArgumentType]
    report = _build_report(selection, data, pairs, fingerprint, tuple(sorted(stop_tokens)))
    return CheckedData(selection, pairs, left_out, report.with_settings(cited_values(data, tokenizer)))


def cited_values(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the values of the settings that findings cite."""
    length = data.max_prompt_length
    return {
        "data.max_length": str(data.max_length),
        "data.max_prompt_length": "(not set)" if length is None else str(length),
        "eos_token": repr(str(tokenizer.eos_token)),
    }


def _write_prepared(folder: Path, data: DataConfig, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> None:
    """Write both splits and report.json into `folder`. Raises BadData if the findings forbid training."""
    found = examine(data, tokenizer, fingerprint)
    found.raise_if_unusable(data)
    for split in (TRAIN, EVAL):
        write_pairs(folder, split, found.pairs[split])
    (folder / "report.json").write_text(found.report.model_dump_json(indent=1), encoding="utf-8")


def _tokenize_split(
    selection: Selection, split: Split, pair_tokenizer: PairTokenizer, left_out: dict[RowAddress, TokenizedPair]
) -> list[TokenizedPair]:
    """Tokenize one split; rows found invalid, or equal after truncation, go to `left_out` and are counted."""
    out: list[TokenizedPair] = []
    for rows in iterate_with_progress(selection.rows(split), _CHUNK_ROWS, f"tokenizing {split}"):
        for row, tokens in zip(rows, pair_tokenizer([row.preference for row in rows]), strict=True):
            address = row.address(split)
            for kind, detail in tokens.notices:
                selection.add_finding(address, kind, detail)
            if any(severity_of(kind) is Severity.BAD_ROW or kind in _DROPPED_KINDS for kind, _ in tokens.notices):
                left_out[address] = _to_tokenized_pair(row, tokens)
            else:
                out.append(_to_tokenized_pair(row, tokens))
    return out


def _to_tokenized_pair(row: PreferenceRow, tokens: EncodedPair) -> TokenizedPair:
    prompt, chosen, rejected = (
        np.array(ids, dtype=np.int32) for ids in (tokens.prompt, tokens.chosen, tokens.rejected)
    )
    return TokenizedPair(prompt, chosen, rejected, row.sampled.source, row.sampled.row.number, row.preference.answer)


def _build_report(
    selection: Selection,
    data: DataConfig,
    pairs: dict[Split, list[TokenizedPair]],
    fingerprint: str,
    stop_tokens: tuple[int, ...],
) -> DataReport:
    sampled = {split: Counter(row.sampled.source for row in selection.rows(split)) for split in (TRAIN, EVAL)}
    kept_rows = {split: Counter(pair.source for pair in pairs[split]) for split in (TRAIN, EVAL)}
    sources = tuple(
        SourceRows(
            name=source_name(source),
            split=split,
            read=selection.rows_read[split if data.eval is not None else TRAIN, source_index],
            drawn=sampled[split][source_index],
            kept=kept_rows[split][source_index],
        )
        for split in (TRAIN, EVAL)
        for source_index, source in enumerate(sources_of(data, split))
    )
    all_pairs = [pair for split in (TRAIN, EVAL) for pair in pairs[split]]
    labels: dict[str, tuple[int, int]] | None = None
    if any(not len(pair.chosen) or not len(pair.rejected) for pair in all_pairs):
        labels = {
            s: (sum(len(p.chosen) > 0 for p in rows), sum(not len(p.chosen) for p in rows)) for s, rows in pairs.items()
        }
    return DataReport(
        fingerprint=fingerprint,
        train_rows=len(pairs[TRAIN]),
        eval_rows=len(pairs[EVAL]),
        bad_rows=len(selection.invalid),
        dropped_rows=len(selection.shared) + sum(len(selection.rows(s)) - len(pairs[s]) for s in (TRAIN, EVAL)),
        sources=sources,
        findings=selection.findings.as_tuple(),
        lengths=length_table(all_pairs),
        stop_tokens=stop_tokens,
        eval_held_out=data.eval is None,
        checked_rows=selection.checked_rows,
        labels=labels,
    )
