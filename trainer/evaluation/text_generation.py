"""`TextGenerator`: completions of prompts by the initial model or a trial's final weights.

Sampling noise is a function of the prompt and the seed, so completions do not depend on batching or interruptions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from trainer.config.model_folder import check_model_files
from trainer.config.trial import ModelConfig, TrialConfig
from trainer.environment import remove_foreign_settings, report_ignored
from trainer.evaluation.completions import generate_token_ids, generation_batches
from trainer.evaluation.judge_prompts import JudgePrompt
from trainer.models.adapters import without_peft_warnings
from trainer.models.model_files import end_token_ids, resolve_model_path
from trainer.models.policy_model import load_model
from trainer.results import ModelError


@dataclass(frozen=True, slots=True)
class DecodingConfig:
    """How a completion is generated. `sample`: number of the sampled completion of a prompt, from 0; None: greedy."""

    max_new_tokens: int
    sample: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def key(self) -> dict[str, Any]:
        """Return everything the completions depend on besides model and prompt, as JSON values."""
        return {"max_new_tokens": self.max_new_tokens} if self.sample is None else asdict(self)

    def logits_processors(self, prompts: Sequence[str]) -> list[LogitsProcessor]:
        """Return processors that turn argmax into sampling, for a batch of prompts given by keys; [] for greedy."""
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
    """Adds Gumbel noise, each row's from its own seed, so that the argmax is a sample from the softmax (Gumbel-max)."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = tuple(seeds)
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return the scores of the next token, [rows, vocabulary], with noise added."""
        if not self._generators:
            self._generators = [torch.Generator(device=scores.device).manual_seed(seed) for seed in self._seeds]
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        # -log of an exponential variable is a Gumbel variable
        return scores.float() - noise.clamp_min(torch.finfo(torch.float32).tiny).log()


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """A completion. `ended`: the model ended it before the token limit."""

    text: str
    tokens: int
    ended: bool


class TextGenerator:
    """A loaded model in evaluation mode, with its tokenizer."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        bf16: bool,
        extra_end_tokens: Sequence[int] = (),
    ) -> None:
        """`extra_end_tokens`: further tokens that end a completion, because the data's responses end with them."""
        self._model, self._tokenizer, self._bf16 = model.eval(), tokenizer, bf16
        self._end_token_ids = end_token_ids(model, tokenizer, extra_end_tokens)

    @classmethod
    def load(
        cls,
        config: TrialConfig,
        weights: Path | None,
        tokenizer: PreTrainedTokenizerBase,
        cache: Path,
        *,
        extra_end_tokens: Sequence[int] = (),
        trust_remote_code: bool = False,
    ) -> TextGenerator:
        """Load the initial model of this trial or, with `weights` (a trial's `model` folder), its trained model.

        Raises ModelError if it cannot be loaded.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        report_ignored(remove_foreign_settings(), device)
        adapters = weights is not None and (weights / "adapter_config.json").is_file()
        model_config, path = config.model, resolve_model_path(config.model, cache)
        if weights is not None and not adapters:
            model_config, path = ModelConfig(name_or_path=str(weights), dtype=config.model.dtype), str(weights)
        model = load_model(model_config, path, device, trust_remote_code=trust_remote_code)
        if adapters:
            check_model_files(str(weights))
            try:
                with without_peft_warnings():
                    adapted = PeftModel.from_pretrained(model, str(weights))  # pyright: ignore[reportCallIssue]
            except (OSError, ValueError) as error:
                raise ModelError(f"the adapters in {weights} cannot be loaded: {error}") from error
            model = cast(PreTrainedModel, adapted)
        return cls(model, tokenizer, bf16=config.training.bf16, extra_end_tokens=extra_end_tokens)

    def generate(
        self,
        prompts: Sequence[JudgePrompt],
        decoding: DecodingConfig,
        *,
        budget: int,
        check_cancelled: Callable[[], None],
    ) -> Generator[dict[str, GeneratedText]]:
        """Yield completions by the prompts' keys, a batch at a time, longest prompts first.

        `check_cancelled` is called between batches. A batch has at most `budget` tokens, padding and completions
        included, and at least one prompt.
        """
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        lengths = [len(prompt.ids) for prompt in prompts]
        for batch in generation_batches(self._model, lengths, order, decoding.max_new_tokens, budget):
            check_cancelled()
            chosen = [prompts[i] for i in batch]
            yield dict(zip((p.key for p in chosen), self._generate_batch(chosen, decoding), strict=True))

    def _generate_batch(self, prompts: Sequence[JudgePrompt], decoding: DecodingConfig) -> list[GeneratedText]:
        noise = decoding.logits_processors([prompt.key for prompt in prompts])
        with torch.autocast(self._model.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            tokens_by_row = generate_token_ids(
                self._model, [p.ids for p in prompts], self._end_token_ids, decoding.max_new_tokens, noise
            )
        texts = [cast(str, self._tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in tokens_by_row]
        limit = decoding.max_new_tokens
        return [
            GeneratedText(text, len(tokens), len(tokens) < limit)
            for text, tokens in zip(texts, tokens_by_row, strict=True)
        ]
