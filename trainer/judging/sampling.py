"""Sampling whose draws belong to the prompt: the same however prompts are batched, and after any interruption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
from transformers import LogitsProcessor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an answer is made. `sample` counts the sampled answers to a prompt from 0; None: the greedy one."""

    max_new_tokens: int
    sample: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def key(self) -> dict[str, Any]:
        """All that the answers depend on beside model and prompt, as JSON values."""
        return {"max_new_tokens": self.max_new_tokens} if self.sample is None else asdict(self)

    def processors(self, prompts: Sequence[str]) -> list[LogitsProcessor]:
        """What turns the likeliest token into a draw, for a batch of these prompts (by their keys); greedy: nothing."""
        if self.sample is None:
            return []
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        return [*warpers, GumbelNoise([self._seed(prompt) for prompt in prompts])]

    def _seed(self, prompt: str) -> int:
        digest = sha256(f"{self.seed}/{self.sample}/{prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise, each row's from its own seed: the largest score is then a draw from the softmax."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = tuple(seeds)
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """The scores of the next token, [rows, vocabulary], with noise."""
        if not self._generators:
            self._generators = [torch.Generator(device=scores.device).manual_seed(seed) for seed in self._seeds]
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        # -log of an exponential variable is a Gumbel one
        return scores.float() - noise.clamp_min(torch.finfo(torch.float32).tiny).log()
