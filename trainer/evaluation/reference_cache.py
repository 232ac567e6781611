"""`ReferenceCache`: log-probs and completions of the initial model, computed once per content and shared by all trials.

The log-probs of the training pairs are DPO's reference; those of the held-out pairs, with the greedy completions, are
every trial's evaluation at step 0. A value is taken from memory, else from `cache/reference/<digest>.safetensors` or
`.json`, else computed. Processes that need the same log-probs at the same time share the work: each part of the pairs
is computed by one of them, and kept in `<digest>.parts` until all are there; a kill loses only those under way.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.config.trial import TrialConfig
from trainer.data import Prepared
from trainer.distributed.processes import ProcessGroup
from trainer.evaluation.completions import Completion
from trainer.evaluation.evaluator import Evaluator
from trainer.models.layer_kernels import has_fused_layers
from trainer.objectives.losses import required_stats
from trainer.objectives.pair_logps import PairLogps
from trainer.storage.atomic_files import digest_of, write_file, write_json
from trainer.storage.file_lock import FileLock

log = logging.getLogger(__name__)

T = TypeVar("T")


MAX_PARTS = 64
"""Parts into which the pairs are split for processes that compute them at the same time."""
_POLL_SECONDS = 0.1


def logps_path(cache: Path, key: dict[str, Any]) -> Path:
    """Return the file of the log-probs with this key."""
    return cache / "reference" / f"{digest_of(key)[:32]}.safetensors"


def cached_logps(
    cache: Path, key: dict[str, Any], process_group: ProcessGroup, compute: Callable[[], PairLogps]
) -> tuple[PairLogps, bool]:
    """Return log-probs under the initial model by their key, and whether they were computed now.

    `key` has everything they depend on as JSON values. `compute` is called in every process or in none.
    """
    path = logps_path(cache, key)

    def write(found: PairLogps) -> None:
        write_file(path, lambda temporary: _save_logps(found, temporary, key))

    return _compute_once(path, process_group, compute, write, _read_logps)


def shared_logps(
    cache: Path,
    key: dict[str, Any],
    process_group: ProcessGroup,
    parts: Sequence[Sequence[int]],
    compute: Callable[[Sequence[int]], PairLogps],
    check_cancelled: Callable[[], None],
) -> tuple[PairLogps, bool, int]:
    """Do the same as `cached_logps`, together with other single processes that call it at the same time.

    Args:
        cache: Cache folder.
        key: As for `cached_logps`.
        process_group: Of one process.
        parts: Disjoint indexes of all pairs, the same in every process.
        compute: Returns the log-probs of a part.
        check_cancelled: Called before each part and while other processes compute the last ones.

    Returns:
        The log-probs, whether they were put together here, and how many parts were computed here.
    """
    path = logps_path(cache, key)
    folder, computed = path.with_suffix(".parts"), 0

    def part_of(number: int) -> Path:
        return folder / f"{number}-of-{len(parts)}.safetensors"

    def load(number: int) -> PairLogps:
        _rename_if_damaged(part_of(number), _read_logps)
        return _read_logps(part_of(number)) if part_of(number).exists() else compute(parts[number])

    def merge() -> PairLogps:
        found = PairLogps.concatenate([load(number) for number in range(len(parts))])
        order = torch.tensor([index for part in parts for index in part])
        return found.select(torch.argsort(order))

    missing, seconds = list(range(len(parts))), 0.0
    while missing and not path.exists():
        for number in list(missing):
            check_cancelled()
            lock = FileLock(folder / f".{number}.lock")
            if not lock.acquire(timeout=seconds):
                continue  # another process computes it
            try:
                _rename_if_damaged(part_of(number), _read_logps)
                if not path.exists() and not part_of(number).exists():
                    found, temporary = compute(parts[number]), folder / f".{number}.tmp"
                    _save_logps(found, temporary, key)
                    temporary.replace(part_of(number))
                    computed += 1
            finally:
                lock.release()
            missing.remove(number)
        seconds = _POLL_SECONDS
    found, was_merged = cached_logps(cache, key, process_group, merge)
    shutil.rmtree(folder, ignore_errors=True)
    return found, was_merged, computed


def _save_logps(found: PairLogps, to: Path, key: dict[str, Any]) -> None:
    columns = found.columns()
    described = {"key": json.dumps(key, sort_keys=True), "sha256": _columns_digest(columns)}
    save_file(columns, to, metadata=described)


def cached_completions(
    cache: Path, key: dict[str, Any], process_group: ProcessGroup, compute: Callable[[], list[Completion]]
) -> tuple[list[Completion], bool]:
    """Return the initial model's greedy completions by their key, and whether they were computed now."""
    path = cache / "reference" / f"{digest_of(key)[:32]}.json"

    def write(found: list[Completion]) -> None:
        rows = [{k: v for k, v in asdict(answer).items() if k != "token_ids"} for answer in found]
        write_json(path, {"sha256": digest_of(rows), "answers": rows})

    return _compute_once(path, process_group, compute, write, _read_completions)


def _read_logps(path: Path) -> PairLogps:
    # Copied into memory: replacing a mapped file would invalidate the mapping.
    with safe_open(path, framework="pt") as file:
        columns = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if (file.metadata() or {}).get("sha256") != _columns_digest(columns):
            raise ValueError("checksum of the log-probs does not match")
    return PairLogps.from_columns(columns)


def _columns_digest(columns: Mapping[str, Tensor]) -> str:
    """Return a digest of the values; safetensors has no checksum."""
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(f"{name}\0".encode() + columns[name].cpu().numpy().tobytes())
    return digest.hexdigest()


def _read_completions(path: Path) -> list[Completion]:
    stored = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(stored, dict) or stored.get("sha256") != digest_of(stored.get("answers")):
        raise ValueError("checksum of the completions does not match")
    return [Completion(**row) for row in stored["answers"]]


def _compute_once(
    path: Path,
    process_group: ProcessGroup,
    compute: Callable[[], T],
    write: Callable[[T], None],
    read: Callable[[Path], T],
) -> tuple[T, bool]:
    with ExitStack() as locks:
        if process_group.is_main:
            locks.enter_context(FileLock(path.with_name(f".{path.name}.lock")))
            _rename_if_damaged(path, read)
        # One process decides for all: `compute` communicates, so all processes call it or none.
        if process_group.any_rank(process_group.is_main and path.exists()):
            return read(path), False
        found = compute()
        if process_group.is_main:
            write(found)
        process_group.barrier()
        return found, True


def _rename_if_damaged(path: Path, read: Callable[[Path], Any]) -> None:
    if not path.exists():
        return
    try:
        read(path)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        path.replace(path.with_name(f"{path.name}.damaged"))
        log.warning("%s is damaged (%s); renamed to .damaged and computed again", path, error)


class ReferenceCache:
    """Log-probs and completions of initial models, keyed by everything they depend on.

    `counters` count how many values were computed and loaded.
    """

    def __init__(self, cache: Path, process_group: ProcessGroup) -> None:
        self.counters: Counter[str] = Counter()
        self._cache, self._process_group = cache, process_group
        self._logps: dict[str, PairLogps] = {}
        self._completions: dict[str, list[Completion]] = {}

    def logps(
        self,
        split: Literal["train", "eval"],
        config: TrialConfig,
        fingerprint: str,
        prepared: Prepared,
        evaluator: Evaluator,
        sample: int | None = None,
    ) -> PairLogps:
        """Return the log-probs of all pairs of a split. `evaluator`: of the initial model with this `fingerprint`.

        `sample`: only of this many pairs, evenly spread over the split, unless the cache has those of all.
        """
        key = self._key(config, fingerprint, prepared, evaluator) | {"split": split}
        pairs = prepared.train if split == "train" else prepared.eval
        indexes: list[int] | None = None
        if sample is not None and sample < len(pairs) and not logps_path(self._cache, key).exists():
            indexes = [k * len(pairs) // sample for k in range(sample)]
            key |= {"sample": sample}
        name = digest_of(key)
        if name not in self._logps:
            where, kind = (self._cache, key, self._process_group), "reference" if split == "train" else "start"
            parts = evaluator.parts(pairs, MAX_PARTS) if self._process_group.size == 1 and indexes is None else []
            if len(parts) > 1:
                self._logps[name], was_computed, count = shared_logps(
                    *where, parts, lambda part: evaluator.logps(pairs, part), evaluator.cancel_token.check
                )
                self.counters[f"{kind}_parts"] += count
            else:
                self._logps[name], was_computed = cached_logps(*where, lambda: evaluator.logps(pairs, indexes))
            self._count_use(kind, was_computed)
        return self._logps[name]

    def completions(
        self, config: TrialConfig, fingerprint: str, prepared: Prepared, evaluator: Evaluator
    ) -> list[Completion]:
        """Return the greedy completions of the fixed prompts; [] if `evaluation.prompts` is 0."""
        evaluation = config.evaluation
        if evaluation.prompts == 0:
            return []
        key = self._key(config, fingerprint, prepared, evaluator)
        key |= {
            "answers": evaluation.prompts,
            "max_new_tokens": evaluation.max_new_tokens,
            "ends": evaluator.end_tokens,
        }
        name = digest_of(key)
        if name not in self._completions:
            self._completions[name], was_computed = cached_completions(
                self._cache, key, self._process_group, evaluator.completions
            )
            self._count_use("answers", was_computed)
        return self._completions[name]

    def _count_use(self, name: str, was_computed: bool) -> None:
        self.counters[f"{name}_{'computed' if was_computed else 'loaded'}"] += 1

    def _key(self, config: TrialConfig, fingerprint: str, prepared: Prepared, evaluator: Evaluator) -> dict[str, Any]:
        """Return everything the bits of a value depend on, including how pairs are batched."""
        model, training, required = config.model, config.training, required_stats(config.loss)
        mismatched = {"mismatched": True} if required.mismatched else {}
        # No entry for packed pairs, so that caches of earlier versions stay valid.
        batches = {} if evaluator.pair_model.mode == "packed" else {"batches": "by padded size"}
        rotary = {} if evaluator.pair_model.rotary is None else {"rotary": "by sequence"}
        layers = {"layers": "fused"} if has_fused_layers(evaluator.model) else {}
        layers |= {"compiled": True} if model.compile else {}
        layers |= {"products": "oneDNN"} if self._process_group.onednn_products else {}
        return (
            batches
            | mismatched
            | rotary
            | layers
            | {
                "start": fingerprint,
                "data": prepared.fingerprint,
                "dtype": model.dtype,
                "load_in_4bit": model.load_in_4bit,
                "bf16": training.bf16,
                "mode": evaluator.pair_model.mode,
                "tokens_per_micro_batch": training.tokens_per_micro_batch,
                "device": self._process_group.device.type,
                "prompt": required.prompt,
                "purity": required.collision_prob,
            }
        )
