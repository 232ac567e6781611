"""`AnswerKl`: how far a trained model is from the initial one on its own greedy answers, as KL divergence per token.

At each position t of an answer y to a prompt x, KL(pi(.|x, y<t) || pi_0(.|x, y<t)) is computed over the vocabulary: the
next token is summed over, not sampled. Estimators from one sampled token, such as k1 = log(pi / pi_0) and
k3 = pi_0 / pi - 1 - log(pi_0 / pi) (Schulman, "Approximating KL Divergence", 2020), are unbiased for tokens drawn from
pi. A greedy token is the mode, which both models make likely: there k1 and k3 estimate no expectation.

What is computed is the coarse-grained divergence: the `TOP_TOKENS` most probable tokens under pi one by one, and all
others as one outcome. By the log sum inequality it is at most the full divergence, lower by p * KL(others | others),
where p is the probability that pi gives to the others; exact if at most one token is left over. Memory: 128 ids and 129
log-probs per position instead of a second model or the logits.

The prefixes are those of greedy decoding. The mean over positions therefore says how far the policy is from the initial
model where it goes by itself; it is no estimate of the divergence between distributions over whole answers, whose
prefixes are sampled from pi.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.pair_dataset import select_prompts
from trainer.evaluation.completions import Completion
from trainer.evaluation.evaluator import Evaluator, pair_batches

TOP_TOKENS = 128
"""Tokens per position that count as outcomes of their own."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """A prompt and its greedy answer as a token pair, of which only the chosen response is scored."""

    prompt: NDArray[np.int32]
    chosen: NDArray[np.int32]
    """The answer and the end token, if it ended before the limit; the end token is predicted too."""

    @property
    def rejected(self) -> NDArray[np.int32]:
        """Not scored."""
        return self.chosen


class AnswerKl:
    """KL divergence per token on greedy answers, from two passes over them: under the trained and the initial model.

    The two models are states of the evaluator's model, one after the other.
    """

    def __init__(self, evaluator: Evaluator, completions: Sequence[Completion]) -> None:
        """`completions`: those of `evaluator.completions()` under the trained model; at least one."""
        self._evaluator = evaluator
        limit, end_token = evaluator.config.evaluation.max_new_tokens, evaluator.end_tokens[0]
        prompts = select_prompts(evaluator.pairs, evaluator.config.evaluation.prompts)
        self._answers = [
            _Answer(
                evaluator.pairs.pair(index).prompt,
                np.array([*answer.token_ids, *([end_token] if answer.tokens < limit else [])], dtype=np.int32),
            )
            for index, answer in zip(prompts, completions, strict=True)
        ]
        costs = [len(answer.prompt) + len(answer.chosen) - 1 for answer in self._answers]
        budget = evaluator.config.training.tokens_per_micro_batch
        self._batches = pair_batches(evaluator.pair_model, costs, range(len(costs)), budget)
        self._policy: list[tuple[Tensor, Tensor]] = []
        """By chunk: ids of the top tokens [rows, k], and log-probs [rows, k + 1] on the CPU."""

    @property
    def forward_passes(self) -> int:
        """Forward passes of `read_policy`; `against_initial` takes as many."""
        return len(self._batches)

    def read_policy(self) -> None:
        """Keep the most probable tokens and their log-probs under the trained model. Raises RunInterrupted."""
        self._policy.clear()

        def read(logps: Tensor) -> None:
            ids = logps.topk(min(TOP_TOKENS, logps.shape[1] - 1), dim=1).indices
            self._policy.append((ids, _coarse(logps, ids)))

        self._read(read, self._evaluator.cancel_token.check)

    def against_initial(self) -> float:
        """Return the mean divergence over all positions of all answers, in nats per token.

        Call it after `read_policy`, when the evaluator's model is the initial one. It cannot be interrupted, as a
        checkpoint would hold the initial weights.
        """
        chunks = iter(self._policy)
        total = torch.zeros((), dtype=torch.float64)

        def read(logps: Tensor) -> None:
            ids, policy = next(chunks)
            policy, initial = policy.double(), _coarse(logps, ids).double()
            total.add_((policy.exp() * (policy - initial)).sum())

        self._read(read, lambda: None)
        positions = sum(len(policy) for _, policy in self._policy)
        return max(0.0, float(total) / positions)  # rounding of nearly equal models can give -1e-8

    def _read(self, read: Callable[[Tensor], None], check_cancelled: Callable[[], None]) -> None:
        self._evaluator.read_next_token_logps(self._answers, self._batches, read, check_cancelled)


def _coarse(logps: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probs of the tokens `ids` [rows, k] and of all others together: [rows, k + 1]; overwrites `logps`.

    The others are summed by themselves: 1 minus the sum of the top ones would lose small probabilities.
    """
    top = logps.gather(1, ids)
    rest = logps.scatter_(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([top, rest], dim=1).cpu()
