"""What the start model makes of a trial's pairs and prompts: in memory, else on disk, else computed now."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

from trainer.config import TrialConfig
from trainer.data import Prepared
from trainer.evaluation.answers import Answer
from trainer.evaluation.evaluate import Examiner
from trainer.evaluation.reference import start_answers, start_logps
from trainer.objectives.losses import needs
from trainer.objectives.pair_logps import PairLogps
from trainer.storage.durable import digest_of
from trainer.world import World


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
