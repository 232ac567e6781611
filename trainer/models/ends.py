"""Which tokens end what a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int] = ()) -> list[int]:
    """Ids of the tokens that end an answer: the model's own, the tokenizer's and `stops`, in ascending order."""
    configured: int | list[int] | None = getattr(model.generation_config, "eos_token_id", None)
    several = [configured] if isinstance(configured, int) else (configured or [])
    return sorted({*several, cast(int, tokenizer.eos_token_id), *stops})
