"""Compare an exported model with its trial: log-probs of held-out pairs, computed by plain transformers."""

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
from trainer.models.policy_model import quantization_config
from trainer.results import ModelError, cannot_load_message

MAX_PAIRS = 8
"""Maximum number of held-out pairs compared."""
MAX_TOKENS = 4096
"""Maximum number of tokens of prompts and responses together; one pair is always compared."""
_CANDIDATES = 64
_FLOAT32_LIMIT, _BFLOAT16_LIMIT = 1e-3, 0.03
"""Nats per token. Products in bfloat16 differ between kernels, and a merged weight in bfloat16 is rounded."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MEMORY_FACTOR = 1.3
"""Multiple of the model's bytes that a device must have free."""
_PROGRESS_INTERVAL = 10.0


class ExportDiffers(ModelError):
    """The exported model is not the trained one."""


class CannotCompare(ModelError):
    """The log-probs or pairs for the comparison do not exist any more."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean log-prob of a response (sum over its tokens) in the trial's last evaluation and of the export."""

    pairs: int
    trial: float
    export: float
    per_token: float
    """Mean absolute difference of a response's log-prob, in nats per token."""
    limit: float
    """Largest `per_token` that is accepted."""

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
    report_progress: Callable[[str], None],
) -> Comparison:
    """Load the exported files with transformers (and peft) alone and compare log-probs with the trial's last
    evaluation.

    Args:
        exported: The files, which may still be in a temporary folder.
        config: The trial's configuration.
        pairs: Its held-out pairs.
        logps: The file with the log-probs of its last evaluation.
        tokenizer: The tokenizer of training.
        trust_remote_code: Whether Python code that comes with the model may run.
        report_progress: Called with a line of text before and during long steps.

    Raises:
        CannotCompare: `logps` is missing or of other pairs.
        ExportDiffers: The log-probs differ by more than the dtype explains, or the tokenizers differ.
        ModelError: The export cannot be loaded.
    """
    trial_logps = _read_trial_logps(logps, pairs)
    chosen = _select_pairs(pairs)
    load_options = {"trust_remote_code": trust_remote_code}
    _compare_tokenizers(exported.folder, tokenizer, pairs, chosen, load_options)
    report_progress("loading the export with plain transformers")
    model = _load(exported, config, load_options)
    export_sums, trial_sums, tokens = list[float](), list[float](), 0
    due = time.monotonic() + _PROGRESS_INTERVAL
    for done, index in enumerate(chosen):
        if time.monotonic() > due:
            report_progress(f"computing log-probs of held-out pairs: {done} of {len(chosen)}")
            due = time.monotonic() + _PROGRESS_INTERVAL
        pair = pairs.pair(index)
        for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if not len(response):
                continue
            trial_sums.append(float(trial_logps[name][index]))
            export_sums.append(_logp(model, pair.prompt.tolist(), response.tolist(), bf16=config.training.bf16))
            tokens += len(response)
    difference = sum(abs(a - b) for a, b in zip(export_sums, trial_sums, strict=True)) / tokens
    rough = config.training.bf16 or config.model.dtype == "bfloat16" or config.model.load_in_4bit
    limit = _BFLOAT16_LIMIT if rough else _FLOAT32_LIMIT
    count = len(export_sums)
    found = Comparison(len(chosen), sum(trial_sums) / count, sum(export_sums) / count, difference, limit)
    if not difference <= limit:  # also true for NaN
        raise ExportDiffers(
            f"the export is not the trained model: {found} ({difference:.2g} per token, limit {limit:g})"
        )
    return found


def _read_trial_logps(file: Path, pairs: PairDataset) -> dict[str, Tensor]:
    if not file.is_file():
        raise CannotCompare(f"the log-probs of the trial's last evaluation were not found: {file}")
    try:
        columns = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CannotCompare(f"the log-probs of the trial's last evaluation cannot be read ({file}: {error})") from error
    same = len(columns["row"]) == len(pairs) and bool(
        torch.equal(columns["row"], torch.as_tensor(pairs.rows).clone())
        and torch.equal(columns["source"], torch.as_tensor(pairs.sources).clone())
    )
    if not same:
        raise CannotCompare("the held-out pairs are not those of the trial")
    return columns


def _select_pairs(pairs: PairDataset) -> list[int]:
    """Return a few pairs spread over the set, preferring shorter ones."""
    step = max(1, len(pairs) // _CANDIDATES)
    lengths = 2 * pairs.prompt_lengths + pairs.chosen_lengths + pairs.rejected_lengths
    chosen, tokens = list[int](), 0
    for index in sorted(range(0, len(pairs), step), key=lambda index: (int(lengths[index]), index)):
        if chosen and (len(chosen) == MAX_PAIRS or tokens + int(lengths[index]) > MAX_TOKENS):
            break
        chosen.append(index)
        tokens += int(lengths[index])
    return chosen


def _compare_tokenizers(
    folder: Path,
    trained: PreTrainedTokenizerBase,
    pairs: PairDataset,
    chosen: Sequence[int],
    load_options: dict[str, Any],
) -> None:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), **load_options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(cannot_load_message("the exported tokenizer", error)) from error
    texts = [str(trained.decode(each.tolist())) for i in chosen for each in _parts(pairs, i)]
    both = [each(texts, add_special_tokens=False)["input_ids"] for each in (tokenizer, trained)]
    if both[0] != both[1] or tokenizer.chat_template != trained.chat_template:
        difference = "chat template" if both[0] == both[1] else "tokens"
        raise ExportDiffers(f"the exported tokenizer is not the one of training: its {difference} differ")


def _parts(pairs: PairDataset, index: int) -> tuple[Any, ...]:
    pair = pairs.pair(index)
    return tuple(part for part in (pair.prompt, pair.chosen, pair.rejected) if len(part))


def _load(exported: Exported, config: TrialConfig, load_options: dict[str, Any]) -> PreTrainedModel:
    adapters = exported.base is not None
    path = exported.base if exported.base is not None else str(exported.folder)
    dtype = _DTYPES[config.model.dtype] if adapters else "auto"
    device = _device(Path(path))
    more: dict[str, Any] = {"revision": exported.revision}
    if adapters and config.model.load_in_4bit:
        more |= {"quantization_config": quantization_config(), "device_map": {"": device}}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **more, **load_options)
        if adapters:
            with without_peft_warnings():
                model = cast(Any, PeftModel).from_pretrained(model, str(exported.folder))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(cannot_load_message("the export", error)) from error
    return model.to(device).eval()


def _device(path: Path) -> torch.device:
    """Return the GPU if the model fits into its free memory (a hub model's size is unknown and assumed to fit)."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    needed = _MEMORY_FACTOR * sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0
    return torch.device("cuda" if needed < torch.cuda.mem_get_info()[0] else "cpu")


def _logp(model: PreTrainedModel, prompt: list[int], response: list[int], *, bf16: bool) -> float:
    """Return the sum of the log-probs of the response's tokens."""
    ids = torch.tensor([prompt + response], device=model.device)
    with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = cast(Any, model)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    scores = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return float(scores.gather(1, ids[0, len(prompt) :, None]).double().sum())
