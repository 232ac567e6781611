"""Cache key of the SFT stage's model: a digest of all inputs that change its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.trial import TrialConfig

if TYPE_CHECKING:
    from trainer.data.pair_dataset import PairDataset

_FORMAT = 1
_REPLACED = ("model.name_or_path", "model.generated", "model.revision", "data.")
"""Prefixes of settings that are replaced by digests of the initial weights and of the tokenized training rows."""
_KEPT = ("data.chat_template",)
"""Settings kept although their prefix is replaced: the template is saved with the model and used by its trials."""
_NO_EFFECT = (
    "model.kernels",
    "model.compile",
    "evaluation.",
    "training.tokens_per_micro_batch",
    "training.distributed",
    "training.gradient_checkpointing",
    "training.logging_steps",
    "training.eval_steps",
    "training.save_steps",
)
"""Settings of evaluation, logging, checkpoints and execution, which do not change the weights."""


def stage_key(config: TrialConfig, fingerprint: str, cache: Path) -> str:
    """Return the name of the model's folder below `cache/sft`: 32 hex digits.

    `fingerprint`: fingerprint of the prepared data. If a run of this configuration exists under the longer key of an
    earlier version, that key is returned, as trials have started from its model.
    """
    from trainer.models.model_files import model_fingerprint, resolve_model_path
    from trainer.storage.atomic_files import digest_of
    from trainer.training_session import digest_with_checkpointing

    start = model_fingerprint(config.model, resolve_model_path(config.model, cache))
    for on in (config.training.gradient_checkpointing, not config.training.gradient_checkpointing):
        earlier = digest_of([digest_with_checkpointing(config, on=on), fingerprint, start])[:32]
        if (cache / "sft" / earlier).is_dir():
            return earlier
    from trainer.data import prepare

    rows = _digest(prepare(config.data, config.model, cache).train)
    return digest_of({"format": _FORMAT, "settings": settings_of_weights(config), "rows": rows, "start": start})[:32]


def settings_of_weights(config: TrialConfig) -> dict[str, Any]:
    """Return the settings that change the trained weights, by dotted path, without defaults."""
    unused = {*_unused(config)}
    return {
        path: value
        for path, value in config.canonical_params().items()
        if path in _KEPT or (not path.startswith((*_REPLACED, *_NO_EFFECT)) and path not in unused)
    }


def _unused(config: TrialConfig) -> list[str]:
    """Return settings that other settings make irrelevant."""
    training, found = config.training, list[str]()
    if training.max_steps is not None:
        found.append("training.num_train_epochs")
    if training.lr_scheduler_type == "constant":
        found.append("training.warmup_ratio")
    if config.model.dtype == "float32":
        found.append("training.stochastic_rounding")
    return found


def _digest(pairs: PairDataset) -> str:
    """Return a digest of prompts and chosen responses in order, all that supervised training reads."""
    import hashlib

    found = hashlib.sha256()
    for k in range(len(pairs)):
        pair = pairs.pair(k)
        for ids in (pair.prompt, pair.chosen):
            found.update(len(ids).to_bytes(8, "little"))
            found.update(ids.tobytes())
    return found.hexdigest()
