"""Greedy completions of held-out prompts, and metrics that need no judge.

Completions of the fixed prompts are also written as text to a samples file, which grows with each evaluation and
survives a new attempt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from peft import PeftModel
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
from trainer.forward.packing import micro_batches
from trainer.forward.rotary_embeddings import RotarySwitch
from trainer.models.model_files import end_token_ids
from trainer.storage.atomic_files import write_text
from trainer.synthetic import is_correct

_NGRAM = 4


@dataclass(frozen=True, slots=True)
class Completion:
    """One greedy answer. `tokens` counts without the end token; `right` is None where no answer is expected."""

    prompt: str
    answer: str
    expected: str | None
    right: bool | None
    tokens: int
    repetition: float


def select_prompts(pairs: PairDataset, count: int) -> list[int]:
    """The first pair of each of the first `count` distinct prompts: the same for every trial on these data."""
    seen: set[bytes] = set()
    picked: list[int] = []
    for index in range(len(pairs)):
        if len(picked) == count:
            break
        prompt = pairs.pair(index).prompt.tobytes()
        if prompt not in seen:
            seen.add(prompt)
            picked.append(index)
    return picked


def complete_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: PairDataset,
    indexes: Sequence[int],
    *,
    max_new_tokens: int,
    budget: int,
    check_cancelled: Callable[[], None],
    stops: Sequence[int] = (),
) -> list[Completion]:
    """The model's answers to these pairs' prompts, padded on the left, at most `budget` tokens in a batch.

    stops: tokens that end an answer beside those of `end_token_ids`, as the data's responses end with them.
    """
    lengths = [int(n) for n in pairs.prompt_lengths]
    completions: list[Completion] = []
    ends = end_token_ids(model, tokenizer, stops)
    for batch in generation_batches(model, lengths, indexes, max_new_tokens, budget):
        check_cancelled()
        prompts = [pairs.pair(i).prompt.tolist() for i in batch]
        for i, prompt, new in zip(
            batch, prompts, generate_token_ids(model, prompts, ends, max_new_tokens), strict=True
        ):
            text = cast(str, tokenizer.decode(new, skip_special_tokens=True))
            expected = pairs.answers[i]
            completions.append(
                Completion(
                    prompt=cast(str, tokenizer.decode(prompt, skip_special_tokens=False)),
                    answer=text,
                    expected=expected,
                    right=None if expected is None else is_correct(text, expected),
                    tokens=len(new),
                    repetition=repetition(new),
                )
            )
    return completions


def generation_batches(
    model: nn.Module, prompt_lengths: Sequence[int], order: Sequence[int], max_new_tokens: int, budget: int
) -> list[list[int]]:
    """Cut `order`, indexes into `prompt_lengths`, into batches of at most `budget` tokens, answers included.

    A prompt is alone where the budget allows no two, and where its answer can reach a length at which the model's
    rotary frequencies follow from the longest row of the batch: then it would hang on its neighbours. ModelError where
    the model has no positions for the longest prompt with its answer.
    """
    longest_prompt = max((prompt_lengths[i] for i in order), default=0)
    longest = longest_prompt + max_new_tokens
    if order:
        refuse_long_answers(positions_of(cast(Any, model).config.to_dict()), longest_prompt, max_new_tokens)
    # Every row costs what the longest does, so that a batch's padding stays within the budget too.
    costs, rotary = [longest] * len(prompt_lengths), RotarySwitch.of(model)
    if rotary is None:
        return micro_batches(costs, order, budget)
    reach = rotary.limit - max_new_tokens
    batches: list[list[int]] = []
    for alone, run in groupby(order, lambda index: prompt_lengths[index] > reach):
        together = list(run)
        batches += [[index] for index in together] if alone else micro_batches(costs, together, budget)
    return batches


def generate_token_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    max_new_tokens: int,
    processors: Sequence[LogitsProcessor] = (),
) -> list[list[int]]:
    """The likeliest token after the other behind each prompt, in one batch, up to an end token, which is left out.

    `processors` change the scores first: with noise in them, the likeliest one is a draw. A sharded model is called by
    all its processes, which make the same number of passes even where their answers end at different tokens.
    """
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), ends[0], dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(ends), pad_token_id=ends[0]
    )
    if (rotary := RotarySwitch.of(model)) is not None:
        rotary.reset()  # the frequencies of an earlier, longer batch would stay
    batch = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    core = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    with torch.no_grad(), _no_settings_of_its_own(core):
        out = cast(Any, model.generate)(
            **batch,
            generation_config=greedy,
            logits_processor=LogitsProcessorList(processors),
            synced_gpus=is_sharded(core),
        )
    return [_truncate_at_end(row, ends) for row in out[:, width:].tolist()]


@contextmanager
def _no_settings_of_its_own(model: PreTrainedModel) -> Generator[None]:
    """Generation with nothing but what the call says: transformers fills what it leaves open (a penalty for repetition,
    beams, forbidden tokens) from the model's own configuration."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _truncate_at_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    stops = [position for position, token in enumerate(tokens) if token in ends]
    return tokens[: stops[0]] if stops else tokens


def repetition(tokens: Sequence[int]) -> float:
    """Share of 4-grams that occurred before in the same answer; 0.0 for one too short to have two."""
    grams = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def completion_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """`exact_answers` (only where answers are expected), `repetition` and `answer_length`; empty without answers."""
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
    """The first `kept` answers of each look, in `folder`/samples.jsonl."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._path, self._limit = folder / SAMPLES_FILE, limit
        self._rows: dict[int, list[dict[str, Any]]] = {}

    def restore(self, folders: Sequence[Path], until: int) -> None:
        """What older attempts, the newest last, were answered up to update `until`, where this one goes on."""
        for folder in folders:
            path = folder / SAMPLES_FILE
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            theirs: dict[int, list[dict[str, Any]]] = {}
            for row in map(json.loads, lines):
                theirs.setdefault(row["step"], []).append(row)
            self._rows |= {step: rows for step, rows in theirs.items() if step <= until}

    def add(self, step: int, completions: Sequence[Completion]) -> None:
        """Keep a look; the file is whole at every moment."""
        self._rows[step] = [
            {"step": step, "prompt": a.prompt, "answer": a.answer, "expected": a.expected, "right": a.right}
            for a in completions[: self._limit]
        ]
        rows = [row for _, given in sorted(self._rows.items()) for row in given]
        write_text(self._path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
