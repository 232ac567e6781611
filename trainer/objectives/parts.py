"""What several objectives are made of."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.objectives.pair_logps import Normaliser, PairLogps


def smoothed_logistic(scaled: Tensor, smoothing: float) -> Tensor:
    """-(1-eps) ls(s) - eps ls(-s), elementwise: the logistic loss when labels are wrong with probability eps."""
    if not smoothing:
        return -logsigmoid(scaled)
    return -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)


def cross_entropy(logps: PairLogps, norm: Normaliser) -> Tensor:
    """These pairs' share of the update's cross-entropy per chosen token; scalar."""
    return -logps.chosen.sum() / norm.chosen_tokens


def prompt_cross_entropy(logps: PairLogps, norm: Normaliser) -> Tensor:
    """As `cross_entropy`, over the tokens of prompt and chosen response together."""
    if logps.prompt is None or norm.prompt_tokens == 0:
        raise ValueError("this objective scores prompts too: their log-probs and number of tokens are missing")
    return -(logps.prompt + logps.chosen).sum() / (norm.prompt_tokens + norm.chosen_tokens)


def averages(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Log-prob per token of chosen and rejected, [N] each."""
    return logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens
