"""An exported model against the trial that made it: log-probs of held-out pairs, computed by plain transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.trial import TrialConfig
from trainer.data.pair_dataset import PairDataset
from trainer.models.adapters import without_peft_warnings
from trainer.models.model_files import Exported
from trainer.models.policy_model import four_bits
from trainer.results import ModelError, cannot_load

PAIRS = 8
"""Held-out pairs that are compared, at most."""
TOKENS = 4096
"""Of prompts and responses together, at most; one pair is always compared."""
_LOOKED_AT = 64
_FLOAT32, _BFLOAT16 = 1e-3, 0.03
"""Nats per token. Products in bfloat16 differ between kernels, and a merged weight in bfloat16 is rounded."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SPARE = 1.3
"""Of a model's own bytes, what a device must have free to compute with it."""
_TELL_SECONDS = 10.0


class ExportDiffers(ModelError):
    """The exported model is not the one that was trained."""


class CannotCompare(ModelError):
    """What the exported model is compared with is no longer there."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean log-prob of a response (summed over its tokens), in the trial's last evaluation and of the export."""

    pairs: int
    trial: float
    export: float
    per_token: float
    """Mean absolute difference of a response's log-prob, in nats per token."""
    limit: float
    """What `per_token` may be."""

    def __str__(self) -> str:
        count = f"{self.pairs} held-out pair{'s'[: self.pairs - 1]}"
        return (
            f"mean log-prob of the responses of {count}: {self.trial:.3f} in the trial, {self.export:.3f} in the export"
        )


def compare_export(
    exported: Exported,
    config: TrialConfig,
    pairs: PairDataset,
    logps: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool = False,
    tell: Callable[[str], None],
) -> Comparison:
    """Load the exported files with transformers (and peft) alone and compute the log-probs that the trial ended with.

    Args:
        exported: The files, which may not have got their name yet.
        config: The trial's configuration.
        pairs: Its held-out pairs.
        logps: The file in which its last evaluation left their log-probs.
        tokenizer: The one that it was trained with.
        trust_remote_code: Whether Python code that comes with the model may run.
        tell: Told of what takes long.

    Raises:
        CannotCompare: `logps` is missing or of other pairs.
        ExportDiffers: The log-probs differ by more than the dtype explains, or the tokenizer writes other tokens.
        ModelError: The export cannot be loaded.
    """
    known = _known(logps, pairs)
    chosen = _some(pairs)
    trust = {"trust_remote_code": trust_remote_code}
    _compare_tokenizers(exported.folder, tokenizer, pairs, chosen, trust)
    tell("loading what was exported with plain transformers")
    model = _load(exported, config, trust)
    ours, theirs, tokens = list[float](), list[float](), 0
    due = time.monotonic() + _TELL_SECONDS
    for done, i in enumerate(chosen):
        if time.monotonic() > due:
            tell(f"computing log-probs of held-out pairs: {done} of {len(chosen)}")
            due = time.monotonic() + _TELL_SECONDS
        pair = pairs.pair(i)
        for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            theirs.append(float(known[name][i]))
            ours.append(_logp(model, pair.prompt.tolist(), response.tolist(), bf16=config.training.bf16))
            tokens += len(response)
    off = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / tokens
    rough = config.training.bf16 or config.model.dtype == "bfloat16" or config.model.load_in_4bit
    limit = _BFLOAT16 if rough else _FLOAT32
    found = Comparison(len(chosen), sum(theirs) / len(theirs), sum(ours) / len(ours), off, limit)
    if not off <= limit:  # NaN is no agreement either
        raise ExportDiffers(
            f"the export is not the model that was trained: {found} ({off:.2g} apart per token, {limit:g} at most)"
        )
    return found


def _known(file: Path, pairs: PairDataset) -> dict[str, Tensor]:
    if not file.is_file():
        raise CannotCompare(f"the log-probs of the trial's last evaluation are no longer there ({file})")
    try:
        known = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CannotCompare(f"the log-probs of the trial's last evaluation cannot be read ({file}: {error})") from error
    same = len(known["row"]) == len(pairs) and bool(
        torch.equal(known["row"], torch.as_tensor(pairs.rows).clone())
        and torch.equal(known["source"], torch.as_tensor(pairs.sources).clone())
    )
    if not same:
        raise CannotCompare("the held-out pairs are no longer those of the trial")
    return known


def _some(pairs: PairDataset) -> list[int]:
    """A few pairs from all over the set, the shorter ones of those looked at."""
    step = max(1, len(pairs) // _LOOKED_AT)
    lengths = 2 * pairs.prompt_lengths + pairs.chosen_lengths + pairs.rejected_lengths
    chosen, tokens = list[int](), 0
    for i in sorted(range(0, len(pairs), step), key=lambda i: (int(lengths[i]), i)):
        if chosen and (len(chosen) == PAIRS or tokens + int(lengths[i]) > TOKENS):
            break
        chosen.append(i)
        tokens += int(lengths[i])
    return chosen


def _compare_tokenizers(
    folder: Path, trained: PreTrainedTokenizerBase, pairs: PairDataset, chosen: Sequence[int], trust: dict[str, Any]
) -> None:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), **trust)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(cannot_load("the exported tokenizer", error)) from error
    texts = [str(trained.decode(each.tolist())) for i in chosen for each in _parts(pairs, i)]
    both = [each(texts, add_special_tokens=False)["input_ids"] for each in (tokenizer, trained)]
    if both[0] != both[1] or tokenizer.chat_template != trained.chat_template:
        what = "chat template" if both[0] == both[1] else "tokens"
        raise ExportDiffers(f"the exported tokenizer is not the one that was trained with: its {what} differ")


def _parts(pairs: PairDataset, i: int) -> tuple[Any, ...]:
    pair = pairs.pair(i)
    return pair.prompt, pair.chosen, pair.rejected


def _load(exported: Exported, config: TrialConfig, trust: dict[str, Any]) -> PreTrainedModel:
    adapters = exported.base is not None
    path = exported.base if exported.base is not None else str(exported.folder)
    dtype = _DTYPES[config.model.dtype] if adapters else "auto"
    device = _device(Path(path))
    more: dict[str, Any] = {"revision": exported.revision}
    if adapters and config.model.load_in_4bit:
        more |= {"quantization_config": four_bits(), "device_map": {"": device}}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **more, **trust)
        if adapters:
            with without_peft_warnings():
                model = cast(Any, PeftModel).from_pretrained(model, str(exported.folder))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(cannot_load("what was exported", error)) from error
    return model.to(device).eval()


def _device(path: Path) -> torch.device:
    """The GPU where the model fits beside what else is there; a hub's model, of unknown size, is computed there too."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    needed = _SPARE * sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0
    return torch.device("cuda" if needed < torch.cuda.mem_get_info()[0] else "cpu")


def _logp(model: PreTrainedModel, prompt: list[int], response: list[int], *, bf16: bool) -> float:
    """Sum of the log-probs of the response's tokens."""
    ids = torch.tensor([prompt + response], device=model.device)
    with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = cast(Any, model)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    scores = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return float(scores.gather(1, ids[0, len(prompt) :, None]).double().sum())
