"""What the start model makes of the pairs: computed once per content, kept on disk, shared by all trials.

The log-probs of the training pairs are the reference of DPO; those of the held-out pairs, with the greedy answers, are
every trial's evaluation at step 0. Files: `cache/reference/<digest>.safetensors` and `.json`.

What the start model makes of a trial's pairs and prompts: in memory, else on disk, else computed now.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.config.trial import TrialConfig
from trainer.data import Prepared
from trainer.distributed.processes import World
from trainer.evaluation.completions import Answer
from trainer.evaluation.evaluator import Examiner
from trainer.objectives.losses import needs
from trainer.objectives.pair_logps import PairLogps
from trainer.storage.atomic_files import digest_of, held, write_file, write_json

log = logging.getLogger(__name__)

T = TypeVar("T")


def start_logps(
    cache: Path, key: dict[str, Any], world: World, compute: Callable[[], PairLogps]
) -> tuple[PairLogps, bool]:
    """Log-probs under the start model by their key, and whether they had to be computed now.

    `key` holds all they depend on as JSON values. `compute` is called in every process or in none.
    """
    path = cache / "reference" / f"{digest_of(key)[:32]}.safetensors"

    def write(found: PairLogps) -> None:
        columns = found.columns()
        described = {"key": json.dumps(key, sort_keys=True), "sha256": _content(columns)}
        write_file(path, lambda aside: save_file(columns, aside, metadata=described))

    return _once(path, world, compute, write, _read_logps)


def start_answers(
    cache: Path, key: dict[str, Any], world: World, compute: Callable[[], list[Answer]]
) -> tuple[list[Answer], bool]:
    """The start model's greedy answers by their key, and whether they had to be computed now; as `start_logps`."""
    path = cache / "reference" / f"{digest_of(key)[:32]}.json"

    def write(found: list[Answer]) -> None:
        rows = [asdict(answer) for answer in found]
        write_json(path, {"sha256": digest_of(rows), "answers": rows})

    return _once(path, world, compute, write, _read_answers)


def _read_logps(path: Path) -> PairLogps:
    # Read into memory: a mapped file that is replaced would pull the pages away.
    with safe_open(path, framework="pt") as file:
        columns = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if (file.metadata() or {}).get("sha256") != _content(columns):
            raise ValueError("its numbers are not those that were written")
    return PairLogps.from_columns(columns)


def _content(columns: Mapping[str, Tensor]) -> str:
    """Digest of the numbers, which safetensors does not check."""
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(f"{name}\0".encode() + columns[name].cpu().numpy().tobytes())
    return digest.hexdigest()


def _read_answers(path: Path) -> list[Answer]:
    kept = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(kept, dict) or kept.get("sha256") != digest_of(kept.get("answers")):
        raise ValueError("its answers are not those that were written")
    return [Answer(**row) for row in kept["answers"]]


def _once(
    path: Path, world: World, compute: Callable[[], T], write: Callable[[T], None], read: Callable[[Path], T]
) -> tuple[T, bool]:
    with ExitStack() as locks:
        if world.is_main:
            locks.enter_context(held(path.with_name(f".{path.name}.lock")))
            _set_damaged_aside(path, read)
        # One process decides for all: `compute` communicates, so all call it or none.
        if world.any(world.is_main and path.exists()):
            return read(path), False
        found = compute()
        if world.is_main:
            write(found)
        world.wait()
        return found, True


def _set_damaged_aside(path: Path, read: Callable[[Path], Any]) -> None:
    if not path.exists():
        return
    try:
        read(path)
    except (OSError, SafetensorError, ValueError, TypeError) as why:
        path.replace(path.with_name(f"{path.name}.damaged"))
        log.warning("%s is damaged (%s); set aside and computed again", path, why)


class StartShelf:
    """Log-probs and answers of start models by all that they depend on. `counters` tell what was computed or loaded."""

    def __init__(self, cache: Path, world: World) -> None:
        self.counters: Counter[str] = Counter()
        self._cache, self._world = cache, world
        self._logps: dict[str, PairLogps] = {}
        self._answers: dict[str, list[Answer]] = {}

    def logps(
        self, split: Literal["train", "eval"], config: TrialConfig, identity: str, prepared: Prepared, start: Examiner
    ) -> PairLogps:
        """Log-probs of all pairs of a split; `start` looks at the model of this `identity` at rest."""
        key = self._key(config, identity, prepared, start) | {"split": split}
        name, pairs = digest_of(key), prepared.train if split == "train" else prepared.eval
        if name not in self._logps:
            self._logps[name], computed = start_logps(self._cache, key, self._world, lambda: start.logps(pairs))
            self._count("reference" if split == "train" else "start", computed)
        return self._logps[name]

    def answers(self, config: TrialConfig, identity: str, prepared: Prepared, start: Examiner) -> list[Answer]:
        """The greedy answers to the fixed prompts; none where `evaluation.prompts` is 0."""
        evaluation = config.evaluation
        if evaluation.prompts == 0:
            return []
        key = self._key(config, identity, prepared, start)
        key |= {"answers": evaluation.prompts, "max_new_tokens": evaluation.max_new_tokens, "ends": start.ends}
        name = digest_of(key)
        if name not in self._answers:
            self._answers[name], computed = start_answers(self._cache, key, self._world, start.answers)
            self._count("answers", computed)
        return self._answers[name]

    def _count(self, what: str, computed: bool) -> None:
        self.counters[f"{what}_{'computed' if computed else 'loaded'}"] += 1

    def _key(self, config: TrialConfig, identity: str, prepared: Prepared, start: Examiner) -> dict[str, Any]:
        """To the bit: also how pairs are put into batches."""
        model, training, wanted = config.model, config.training, needs(config.loss)
        # Of packed pairs the key has no such entry, so that what earlier versions cached stays known.
        batches = {} if start.model.mode == "packed" else {"batches": "by padded size"}
        rotary = {} if start.model.rotary is None else {"rotary": "by sequence"}
        return (
            batches
            | rotary
            | {
                "start": identity,
                "data": prepared.fingerprint,
                "dtype": model.dtype,
                "load_in_4bit": model.load_in_4bit,
                "bf16": training.bf16,
                "mode": start.model.mode,
                "tokens_per_micro_batch": training.tokens_per_micro_batch,
                "device": self._world.device.type,
                "prompt": wanted.prompt,
                "purity": wanted.purity,
            }
        )
