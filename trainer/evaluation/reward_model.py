"""A local reward model: any sequence-classification model that scores a dialogue's last message."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.model_folder import check_model_files
from trainer.config.trial import ModelConfig
from trainer.data.chat_messages import Dialogue
from trainer.environment import remove_foreign_settings, report_ignored
from trainer.forward.packing import micro_batches
from trainer.models.model_files import model_fingerprint
from trainer.results import ModelError, cannot_load_message

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class RewardInput:
    """A prompt (as text, and as messages for dialogues) with the completion to be scored."""

    key: str
    text: str
    messages: Dialogue | None
    completion: str


class RewardScorer:
    """Scores completions, rendered by the model's chat template; without one, prompt and completion are a text pair."""

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        label: int | None = None,
        dtype: str = "float32",
        max_length: int = 4096,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the reward model.

        Raises ModelError if it cannot be loaded, has no trained output layer, or has several outputs without a `label`.
        """
        self._model = _load(name, revision, _DTYPES[dtype], trust_remote_code)
        self._tokenizer = _tokenizer(name, revision, trust_remote_code)
        self._max_length = max_length
        outputs = cast(int, self._model.config.num_labels)
        if outputs > 1 and label is None:
            raise ModelError(f"{name} has {outputs} outputs; set label to the one that is the reward")
        if label is not None and label >= outputs:
            raise ModelError(f"{name} has {outputs} outputs, the last one is label {outputs - 1}; label is {label}")
        self._label = label or 0
        if self._model.config.pad_token_id is None:  # decoders need it to find a dialogue's last token
            self._model.config.pad_token_id = self._tokenizer.pad_token_id

    def score(
        self, items: Sequence[RewardInput], *, budget: int, check_cancelled: Callable[[], None]
    ) -> Generator[dict[str, float]]:
        """Yield rewards by key, one batch of at most `budget` tokens at a time, the longest first."""
        encoded = [self._encode(item) for item in items]
        lengths = [len(tokens["input_ids"]) for tokens in encoded]
        order = sorted(range(len(items)), key=lambda i: -lengths[i])
        for batch in micro_batches([max(lengths, default=0)] * len(items), order, budget):
            check_cancelled()
            # padding is masked, so that a score does not depend on the other dialogues of the batch
            padded = self._tokenizer.pad([encoded[i] for i in batch], return_tensors="pt", padding=True)
            inputs = {name: tensor.to(self._model.device) for name, tensor in cast(Any, padded).items()}
            with torch.no_grad():
                rewards = cast(Any, self._model)(**inputs).logits[:, self._label].float().tolist()
            yield {items[i].key: float(reward) for i, reward in zip(batch, rewards, strict=True)}

    def _encode(self, item: RewardInput) -> dict[str, list[int]]:
        truncation = {"truncation": True, "max_length": self._max_length}
        call = cast(Any, self._tokenizer)
        if self._tokenizer.chat_template is None:
            return dict(call(item.text, item.completion, **truncation))
        messages = item.messages or [{"role": "user", "content": item.text}]
        messages_with_answer = [*messages, {"role": "assistant", "content": item.completion}]
        text = self._tokenizer.apply_chat_template(messages_with_answer, tokenize=False)
        return dict(call(text, add_special_tokens=False, **truncation))  # the template has written them


def reward_model_fingerprint(name: str, revision: str | None) -> str:
    """Return a fingerprint of the reward model's weights; of a hub model only after it was loaded."""
    return model_fingerprint(ModelConfig(name_or_path=name, revision=revision), name)


def _load(name: str, revision: str | None, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report_ignored(remove_foreign_settings(), device)
    check_model_files(name, revision)
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(cannot_load_message(f"the reward model {name}", error)) from error
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if missing := sorted(info["missing_keys"]) + sorted(str(m) for m in info["mismatched_keys"]):
        raise ModelError(
            f"{name} is not a reward model: it lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}, "
            "which would be initialized at random"
        )
    return cast(PreTrainedModel, cast(Any, model).to(device)).eval()


def _tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(cannot_load_message(f"the tokenizer of the reward model {name}", error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    return tokenizer
