"""Greedy completions of held-out prompts, and their metrics that need no judge.

Completions of the fixed prompts are also written as text to a samples file, which grows with each evaluation and is
restored by a new attempt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer.config.position_limits import positions_of, refuse_long_answers
from trainer.data.pair_dataset import PairDataset
from trainer.distributed.fsdp import is_sharded
from trainer.environment import has_adapters
from trainer.forward.packing import micro_batches
from trainer.forward.rotary_embeddings import RotarySwitch
from trainer.models.model_files import end_token_ids
from trainer.storage.atomic_files import write_text
from trainer.synthetic import is_correct

_NGRAM = 4


@dataclass(frozen=True, slots=True)
class Completion:
    """One greedy completion. `tokens` excludes the end token; `right` is None if no answer is expected."""

    prompt: str
    answer: str
    expected: str | None
    right: bool | None
    tokens: int
    repetition: float
    token_ids: Sequence[int] = field(default=(), compare=False, repr=False)
    """The tokens themselves, while the completion is in memory; not stored."""


def complete_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: PairDataset,
    indexes: Sequence[int],
    *,
    max_new_tokens: int,
    budget: int,
    check_cancelled: Callable[[], None],
    extra_end_tokens: Sequence[int] = (),
) -> list[Completion]:
    """Generate greedy completions of these pairs' prompts, left-padded, in batches of at most `budget` tokens.

    `extra_end_tokens`: tokens that end a completion in addition to those of `end_token_ids`.
    """
    lengths = [int(n) for n in pairs.prompt_lengths]
    completions: list[Completion] = []
    end_tokens = end_token_ids(model, tokenizer, extra_end_tokens)
    for batch in generation_batches(model, lengths, indexes, max_new_tokens, budget):
        check_cancelled()
        prompts = [pairs.pair(index).prompt.tolist() for index in batch]
        for index, prompt, new in zip(
            batch, prompts, generate_token_ids(model, prompts, end_tokens, max_new_tokens), strict=True
        ):
            text = cast(str, tokenizer.decode(new, skip_special_tokens=True))
            expected = pairs.answers[index]
            completions.append(
                Completion(
                    prompt=cast(str, tokenizer.decode(prompt, skip_special_tokens=False)),
                    answer=text,
                    expected=expected,
                    right=None if expected is None else is_correct(text, expected),
                    tokens=len(new),
                    repetition=repetition(new),
                    token_ids=tuple(new),
                )
            )
    return completions


def generation_batches(
    model: nn.Module, prompt_lengths: Sequence[int], order: Sequence[int], max_new_tokens: int, budget: int
) -> list[list[int]]:
    """Split `order` (indexes into `prompt_lengths`) into batches of at most `budget` tokens, completions included.

    A prompt is alone if the budget allows no two, and if its completion can reach a length at which the model's rotary
    frequencies depend on the longest row of the batch. Raises ModelError if the model has no positions for the longest
    prompt with its completion.
    """
    longest_prompt = max((prompt_lengths[i] for i in order), default=0)
    longest = longest_prompt + max_new_tokens
    if order:
        refuse_long_answers(positions_of(cast(Any, model).config.to_dict()), longest_prompt, max_new_tokens)
    # Every row costs as much as the longest, so that padding stays within the budget.
    costs, rotary = [longest] * len(prompt_lengths), RotarySwitch.of(model)
    if rotary is None:
        return micro_batches(costs, order, budget)
    switch_length = rotary.limit - max_new_tokens
    batches: list[list[int]] = []
    for alone, run in groupby(order, lambda index: prompt_lengths[index] > switch_length):
        group = list(run)
        batches += [[index] for index in group] if alone else micro_batches(costs, group, budget)
    return batches


def generate_token_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    end_tokens: Sequence[int],
    max_new_tokens: int,
    processors: Sequence[LogitsProcessor] = (),
) -> list[list[int]]:
    """Generate greedily for one batch of prompts, up to an end token, which is left out.

    `processors` change the scores first: with Gumbel noise the argmax is a sample. All processes of a sharded model
    must call this; they make the same number of passes even if their completions end at different tokens.
    """
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), end_tokens[0], dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(end_tokens), pad_token_id=end_tokens[0]
    )
    if (rotary := RotarySwitch.of(model)) is not None:
        rotary.reset()  # the frequencies of an earlier, longer batch would persist
    batch = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    core = cast(PreTrainedModel, model.get_base_model()) if has_adapters(model) else model
    with torch.no_grad(), _without_default_settings(core):
        out = cast(Any, model.generate)(
            **batch,
            generation_config=greedy,
            logits_processor=LogitsProcessorList(processors),
            synced_gpus=is_sharded(core),
        )
    return [_truncate_at_end(row, end_tokens) for row in out[:, width:].tolist()]


@contextmanager
def _without_default_settings(model: PreTrainedModel) -> Generator[None]:
    """Generate with the call's settings only: transformers fills unset ones (repetition penalty, beams, suppressed
    tokens) from the model's own generation config.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _truncate_at_end(tokens: list[int], end_tokens: Sequence[int]) -> list[int]:
    end_positions = [position for position, token in enumerate(tokens) if token in end_tokens]
    return tokens[: end_positions[0]] if end_positions else tokens


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of 4-grams that occurred before in the same completion; 0.0 if there are fewer than two."""
    grams = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def completion_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Return `exact_answers` (if answers are expected), `repetition` and `answer_length`; {} if empty."""
    if not completions:
        return {}
    checked = [a.right for a in completions if a.right is not None]
    exact = {"exact_answers": fmean(checked)} if checked else {}
    return exact | {
        "repetition": fmean(a.repetition for a in completions),
        "answer_length": fmean(a.tokens for a in completions),
    }


SAMPLES_FILE = "samples.jsonl"
"""One JSON object per line: step, prompt, answer, expected, right."""


class SampleFile:
    """The first `limit` completions of each evaluation, in `folder`/samples.jsonl."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._path, self._limit = folder / SAMPLES_FILE, limit
        self._rows: dict[int, list[dict[str, Any]]] = {}

    def restore(self, folders: Sequence[Path], until: int) -> None:
        """Load the completions of older attempts, the newest last, up to update `until`."""
        for folder in folders:
            path = folder / SAMPLES_FILE
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            by_step: dict[int, list[dict[str, Any]]] = {}
            for row in map(json.loads, lines):
                by_step.setdefault(row["step"], []).append(row)
            self._rows |= {step: rows for step, rows in by_step.items() if step <= until}

    def add(self, step: int, completions: Sequence[Completion]) -> None:
        """Add an evaluation and write the file atomically."""
        self._rows[step] = [
            {
                "step": step,
                "prompt": completion.prompt,
                "answer": completion.answer,
                "expected": completion.expected,
                "right": completion.right,
            }
            for completion in completions[: self._limit]
        ]
        rows = [row for _, rows_of_step in sorted(self._rows.items()) for row in rows_of_step]
        write_text(self._path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
