"""`PairDataset`: tokenized pairs on disk, memory-mapped, so that all trials on a machine share one copy.

The cache folder is addressed by content. It is written under a temporary name by one process at a time, renamed when
complete, and verified before use.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.config.loss_config import LossConfig
from trainer.results import TrialError
from trainer.storage.atomic_files import sha256_of, write_folder
from trainer.storage.file_lock import FileLock

TokenIds = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference pair as token ids (int32 arrays of shape [length]).

    `prompt` holds all tokens before the response, including BOS and generation prompt; `chosen` and `rejected` the
    scored tokens with their end token. No array is empty, but one of the two responses of a row with one response and
    a label (KTO): rejected where the label is true, else chosen.
    """

    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair to be written to disk, with its source and row number."""

    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds
    source: int
    row: int
    answer: str | None


class PairDataset:
    """The pairs of one split. Lengths count tokens; `rows` are row numbers in their source, from 1; `sources` index the
    split's sources in the order of the configuration; `answers` are the checkable answers (None if a row has none).
    """

    def __init__(
        self,
        tokens: TokenIds,
        offsets: Counts,
        rows: Counts,
        sources: Counts,
        answers: Sequence[str | None],
    ) -> None:
        self._tokens = tokens
        self._offsets = offsets
        self.rows = rows
        self.sources = sources
        self.answers = tuple(answers)
        lengths = np.diff(offsets).reshape(-1, 3)
        self.prompt_lengths: Counts = lengths[:, 0]
        self.chosen_lengths: Counts = lengths[:, 1]
        self.rejected_lengths: Counts = lengths[:, 2]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def max_token_id(self) -> int:
        """The largest token id of the split; -1 if it is empty."""
        return int(self._tokens.max()) if len(self._tokens) else -1

    def __iter__(self) -> Iterator[Pair]:
        return map(self.pair, range(len(self)))

    @property
    def paired(self) -> bool:
        """Whether every row has both responses; False for rows with one response and a label."""
        return bool((self.chosen_lengths > 0).all() and (self.rejected_lengths > 0).all())

    def pair(self, index: int) -> Pair:
        """Return the pair at `index`, 0 to len-1, as views into the mapped file. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        begin, prompt_end, chosen_end, end = (int(offset) for offset in self._offsets[3 * index : 3 * index + 4])
        return Pair(self._tokens[begin:prompt_end], self._tokens[prompt_end:chosen_end], self._tokens[chosen_end:end])

    @classmethod
    def open(cls, folder: Path, split: str) -> PairDataset:
        """Map the files of `write_pairs`. Raises OSError or ValueError if one is missing or malformed."""
        tokens: TokenIds = np.load(folder / f"{split}.tokens.npy", mmap_mode="r")
        table: Counts = np.load(folder / f"{split}.rows.npy")
        offsets: Counts = np.load(folder / f"{split}.offsets.npy")
        answers: list[str | None] = json.loads((folder / f"{split}.answers.json").read_text(encoding="utf-8"))
        if len(offsets) != 3 * len(table) + 1 or int(offsets[-1]) != len(tokens) or len(answers) != len(table):
            raise ValueError(f"{folder / split}: the files of this split are inconsistent")
        return cls(tokens, offsets, table[:, 1], table[:, 0], answers)


class MismatchedPairs:
    """A split whose pairs have responses of other prompts, for KTO's estimate of the KL divergence.

    Pair i has its own prompt and both responses of the nearest pair before it, the last one before the first, that has
    another prompt; responses are cut where a sequence would be longer than the longest of the split. So the pairs
    depend on the data alone, and log-probs of the initial model serve every trial. A row with one response gets one,
    whatever its label, in the place of its own.
    """

    def __init__(self, pairs: PairDataset) -> None:
        """Raises ValueError if all pairs have the same prompt."""
        self._pairs = pairs
        differs = [
            not np.array_equal(pairs.pair(i).prompt, pairs.pair(i - 1 if i else len(pairs) - 1).prompt)
            for i in range(len(pairs))
        ]
        first = next((i for i, is_other in enumerate(differs) if is_other), None)
        if first is None:
            raise ValueError("all pairs have the same prompt, so none has a response of another one")
        self._others = np.zeros(len(pairs), dtype=np.int64)
        for i in [*range(first, len(pairs)), *range(first)]:
            before = i - 1 if i else len(pairs) - 1
            self._others[i] = before if differs[i] else self._others[before]
        longest = pairs.prompt_lengths + np.maximum(pairs.chosen_lengths, pairs.rejected_lengths)
        self._most = longest.max() - pairs.prompt_lengths
        self.prompt_lengths: Counts = pairs.prompt_lengths
        chosen, rejected = (lengths[self._others] for lengths in (pairs.chosen_lengths, pairs.rejected_lengths))
        if not (paired := pairs.paired):
            chosen = rejected = chosen + rejected
        self._paired = paired
        self.chosen_lengths: Counts = np.where(pairs.chosen_lengths, np.minimum(chosen, self._most), 0)
        self.rejected_lengths: Counts = np.where(pairs.rejected_lengths, np.minimum(rejected, self._most), 0)

    def __len__(self) -> int:
        return len(self._pairs)

    def pair(self, index: int) -> Pair:
        """Return the prompt at `index` with the responses of another pair. Raises IndexError."""
        own, other, most = self._pairs.pair(index), self._pairs.pair(int(self._others[index])), self._most[index]
        if self._paired:
            return Pair(own.prompt, other.chosen[:most], other.rejected[:most])
        response = np.concatenate([other.chosen, other.rejected])[:most]
        none = response[:0]
        return Pair(own.prompt, response, none) if len(own.chosen) else Pair(own.prompt, none, response)


def select_prompts(pairs: PairDataset, count: int) -> list[int]:
    """Return the first pair of each of the first `count` distinct prompts: the same for every trial on these data."""
    seen: set[bytes] = set()
    selected: list[int] = []
    for index in range(len(pairs)):
        if len(selected) == count:
            break
        prompt = pairs.pair(index).prompt.tobytes()
        if prompt not in seen:
            seen.add(prompt)
            selected.append(index)
    return selected


def mismatched_pairs(pairs: PairDataset) -> MismatchedPairs:
    """Return a split's prompts with responses of other prompts. Raises TrialError if all prompts are the same."""
    try:
        return MismatchedPairs(pairs)
    except ValueError:
        raise _one_prompt(len(pairs)) from None


def _one_prompt(count: int) -> TrialError:
    found = "one split has a single row" if count == 1 else f"{count:,} rows of one split all have the same prompt"
    return TrialError(
        f"loss.kind kto: {found}, so that there is no response of another prompt, from which the KL divergence is "
        "estimated; use loss_type apo_zero_unpaired or other data"
    )


def check_rows(loss: LossConfig, *splits: PairDataset | Sequence[Pair | TokenizedPair]) -> None:
    """Check that the rows of each split have what the loss needs, before a model is loaded.

    Raises:
        TrialError: Rows have one response each and the loss compares pairs; the rows of a split all have one label;
            or KTO's estimate of the KL divergence finds one prompt only.
    """
    for split in splits:
        if isinstance(split, PairDataset):
            sides = [int((lengths > 0).sum()) for lengths in (split.chosen_lengths, split.rejected_lengths)]
        else:
            sides = [sum(len(response) > 0 for response in each) for each in _responses(split)]
        several = not loss.scores_mismatched or _has_several_prompts(split)
        check_counts(loss, len(split), sides[0], sides[1], several_prompts=several)


def _responses(rows: Sequence[Pair | TokenizedPair]) -> tuple[list[TokenIds], list[TokenIds]]:
    return [row.chosen for row in rows], [row.rejected for row in rows]


def _has_several_prompts(rows: Iterable[Pair | TokenizedPair]) -> bool:
    first: TokenIds | None = None
    for row in rows:
        if first is not None and not np.array_equal(first, row.prompt):
            return True
        first = row.prompt
    return False


def check_counts(loss: LossConfig, rows: int, desirable: int, undesirable: int, *, several_prompts: bool) -> None:
    """Check a split of so many rows, desirable and undesirable responses; raises as `check_rows` does."""
    if desirable + undesirable < 2 * rows:
        _check_labels(loss, desirable, undesirable)
    if rows and loss.scores_mismatched and not several_prompts:
        raise _one_prompt(rows)


def _check_labels(loss: LossConfig, desirable: int, undesirable: int) -> None:
    """Raise TrialError where rows with one response each cannot be used with a loss."""
    has = "the rows have one response each and a label"
    if loss.kind == "sft":
        raise TrialError(
            f"{has}, and supervised fine-tuning reads the chosen response of pairs: give the sft stage pairs (sft.data)"
        )
    if loss.kind != "kto":
        raise TrialError(
            f"{has}, and loss.kind {loss.kind} needs pairs: use loss.kind kto, or join a completion with label true "
            "and one with label false of the same prompt into a row with prompt, chosen and rejected"
        )
    if not (desirable and undesirable):
        count, label = desirable + undesirable, "true" if desirable else "false"
        found = (
            f"the only row of one split has label {label}"
            if count == 1
            else f"all {count:,} rows of one split have label {label}"
        )
        raise TrialError(
            f"loss.kind kto: {found}, and both training and evaluation need both labels: add rows with the other one, "
            "or raise data.eval_share where few rows are held out"
        )


def write_pairs(folder: Path, split: str, pairs: Sequence[TokenizedPair]) -> None:
    """Write a split as four files: flat tokens, offsets of every sequence, (source, row), answers."""
    parts = [part for p in pairs for part in (p.prompt, p.chosen, p.rejected)]
    lengths = np.fromiter((len(part) for part in parts), dtype=np.int64, count=len(parts))
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    tokens = np.concatenate([np.zeros(0, dtype=np.int32), *parts])
    table = np.array([(p.source, p.row) for p in pairs], dtype=np.int64).reshape(-1, 2)
    np.save(folder / f"{split}.tokens.npy", tokens)
    np.save(folder / f"{split}.offsets.npy", offsets)
    np.save(folder / f"{split}.rows.npy", table)
    answers = json.dumps([p.answer for p in pairs])
    (folder / f"{split}.answers.json").write_text(answers, encoding="utf-8")


MANIFEST = "manifest.json"


class DamagedCache(UserWarning):
    """A cached folder does not match its manifest and is created again."""


def get_or_create(folder: Path, write: Callable[[Path], None]) -> bool:
    """Create `folder` with `write` unless it exists and matches its manifest. Return whether it was created now.

    One process writes, others wait for it. A folder that does not match its manifest is created again, with a warning.
    Raises OSError if the disk cannot be written; an exception of `write` passes through, and nothing is left behind.
    """
    if _is_complete(folder):
        return False
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():
            if _is_complete(folder):
                return False
            warnings.warn(f"{folder} is damaged and is created again", DamagedCache, stacklevel=2)
            shutil.rmtree(folder)
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(left)  # left by a process that died while writing; the lock excludes a live one
        write_folder(folder, lambda temporary: _write_folder(temporary, write))
    return True


def _write_folder(temporary: Path, write: Callable[[Path], None]) -> None:
    write(temporary)
    files = {file.name: sha256_of([file]) for file in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    """Return whether every file of the manifest exists with the recorded digest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = dict(manifest["files"])
        return bool(files) and all(sha256_of([folder / name]) == digest for name, digest in files.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False
