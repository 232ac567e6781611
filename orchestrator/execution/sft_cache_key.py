"""Cache key of the SFT stage's model: a digest of exactly what changes its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.trial import TrialConfig

if TYPE_CHECKING:
    from trainer.data.pair_dataset import PairDataset

_FORMAT = 1
_REPLACED = ("model.name_or_path", "model.generated", "model.revision", "data.")
"""By digests of what is there: the initial weights, and the training rows as tokens."""
_KEPT = ("data.chat_template",)
"""Saved with the model: its trials render their rows with it."""
_NO_EFFECT = (
    "evaluation.",
    "training.tokens_per_micro_batch",
    "training.distributed",
    "training.gradient_checkpointing",
    "training.logging_steps",
    "training.eval_steps",
    "training.save_steps",
)
"""What is measured, kept or said on the way, and how the work is cut: the weights arrive at the same place."""


def stage_key(config: TrialConfig, fingerprint: str, cache: Path) -> str:
    """Name of the folder below `cache/sft` of what training this configuration makes: 32 hex digits.

    fingerprint: of its prepared data. Where an earlier version of this program, whose names held more, left a run of
    this very configuration, it is that run's name: trials that began from its model keep it.
    """
    from trainer.models.model_files import model_fingerprint, resolve_model_path
    from trainer.storage.atomic_files import digest_of
    from trainer.training_session import config_digest

    start = model_fingerprint(config.model, resolve_model_path(config.model, cache))
    earlier = digest_of([config_digest(config), fingerprint, start])[:32]
    if (cache / "sft" / earlier).is_dir():
        return earlier
    from trainer.data import prepare

    rows = _digest(prepare(config.data, config.model, cache).train)
    return digest_of({"format": _FORMAT, "settings": settings_of_weights(config), "rows": rows, "start": start})[:32]


def settings_of_weights(config: TrialConfig) -> dict[str, Any]:
    """The settings by dotted path that change the weights which this configuration makes; defaults are left out."""
    silent = {*_unread(config)}
    return {
        path: value
        for path, value in config.canonical_params().items()
        if path in _KEPT or (not path.startswith((*_REPLACED, *_NO_EFFECT)) and path not in silent)
    }


def _unread(config: TrialConfig) -> list[str]:
    """Settings that others make meaningless."""
    training, found = config.training, list[str]()
    if training.max_steps is not None:
        found.append("training.num_train_epochs")
    if training.lr_scheduler_type == "constant":
        found.append("training.warmup_ratio")
    if config.model.dtype == "float32":
        found.append("training.stochastic_rounding")
    return found


def _digest(pairs: PairDataset) -> str:
    """Of the prompts and the chosen responses, in order: supervised training reads no others."""
    import hashlib

    found = hashlib.sha256()
    for k in range(len(pairs)):
        pair = pairs.pair(k)
        for ids in (pair.prompt, pair.chosen):
            found.update(len(ids).to_bytes(8, "little"))
            found.update(ids.tobytes())
    return found.hexdigest()
