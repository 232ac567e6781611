"""Names of metrics, and which settings scale each: a scaled metric cannot rank trials that differ in these settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

EVAL_PREFIX = "eval_"
"""Prefix of a metric measured on the held-out pairs."""

_BETA_LIKE = frozenset(
    f"loss.{name}" for name in ("beta", "gamma", "gamma_beta_ratio", "kind", "loss_type", "alpha", "ld_alpha")
)
_ANY_LOSS = frozenset({"loss"})
_SUMMED = frozenset({"loss.kind", "loss.loss_type", "loss.ld_alpha"})
"""Settings that decide whether log-probs are sums, averages, or weighted sums."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: its meaning, the better direction (None: neither), and the settings that scale it."""

    name: str
    meaning: str
    better: str | None
    scaled_by: frozenset[str]
    on_eval: bool = True
    on_train: bool = True
    kind: str | None = None
    """The only kind of loss that reports it; None: all."""


_TABLE = (
    Metric("loss", "mean objective over the pairs of an update", "minimize", _ANY_LOSS),
    Metric("rewards/chosen", "mean implicit reward of the chosen responses", "maximize", _BETA_LIKE),
    Metric("rewards/rejected", "mean implicit reward of the rejected responses", "minimize", _BETA_LIKE),
    Metric("rewards/margins", "mean reward margin, chosen minus rejected", "maximize", _BETA_LIKE),
    Metric("rewards/accuracies", "share of pairs whose chosen reward is strictly higher", "maximize", _SUMMED),
    Metric(
        "logps/chosen", "log-prob of the chosen responses (per token for SimPO, summed for DPO)", "maximize", _SUMMED
    ),
    Metric("logps/rejected", "log-prob of the rejected responses (per token for SimPO, summed for DPO)", None, _SUMMED),
    Metric("log_odds_chosen", "mean log odds ratio, chosen over rejected (ORPO)", "maximize", frozenset(), kind="orpo"),
    Metric("log_odds_ratio", "mean log sigmoid of the log odds ratio (ORPO)", "maximize", frozenset(), kind="orpo"),
    Metric(
        "kl", "estimate of the KL divergence from the initial model per response (KTO)", None, frozenset(), kind="kto"
    ),
    Metric("nll_loss", "cross-entropy per chosen token", "minimize", frozenset()),
    Metric("margins/logp", "mean margin of length-averaged log-probs, unscaled", "maximize", frozenset()),
    Metric("accuracies/logp", "share of pairs with margins/logp above 0", "maximize", frozenset()),
    Metric("logps_per_token/chosen", "length-averaged log-prob of the chosen responses", "maximize", frozenset()),
    Metric("logps_per_token/rejected", "length-averaged log-prob of the rejected responses", None, frozenset()),
    Metric(
        "log_ratio_per_token/chosen",
        "mean log-ratio per token to the initial model, on the chosen responses",
        None,
        frozenset(),
        on_train=False,
    ),
    Metric(
        "log_ratio_per_token/rejected",
        "mean log-ratio per token to the initial model, on the rejected responses",
        None,
        frozenset(),
        on_train=False,
    ),
    Metric(
        "kl_per_token",
        "KL divergence from the initial model per token of the final greedy answers",
        "minimize",
        frozenset(),
        on_train=False,
    ),
    Metric("exact_answers", "share of held-out prompts answered right", "maximize", frozenset(), on_train=False),
    Metric("repetition", "share of repeated 4-grams in the greedy answers", "minimize", frozenset(), on_train=False),
    Metric("answer_length", "mean tokens of the greedy answers", None, frozenset(), on_train=False),
    Metric("lengths/chosen", "mean scored tokens of the chosen responses", None, frozenset()),
    Metric("lengths/rejected", "mean scored tokens of the rejected responses", None, frozenset()),
    Metric("grad_norm", "gradient norm before clipping", None, _ANY_LOSS, on_eval=False),
    Metric("learning_rate", "learning rate of the update", None, frozenset({"training.learning_rate"}), on_eval=False),
    Metric("epoch", "passes over the training pairs", None, frozenset(), on_eval=False),
    Metric("tokens_per_second", "tokens computed per second of training", "maximize", frozenset(), on_eval=False),
    Metric("pairs_per_second", "pairs trained per second", "maximize", frozenset(), on_eval=False),
)

METRICS: dict[str, Metric] = {m.name: m for m in _TABLE}
MARGIN = f"{EVAL_PREFIX}margins/logp"
CHOSEN = f"{EVAL_PREFIX}logps_per_token/chosen"
REJECTED = f"{EVAL_PREFIX}logps_per_token/rejected"
EXACT_ANSWERS = f"{EVAL_PREFIX}exact_answers"
REPETITION = f"{EVAL_PREFIX}repetition"
ANSWER_LENGTH = f"{EVAL_PREFIX}answer_length"
LOG_RATIO_CHOSEN = f"{EVAL_PREFIX}log_ratio_per_token/chosen"
LOG_RATIO_REJECTED = f"{EVAL_PREFIX}log_ratio_per_token/rejected"
KL = f"{EVAL_PREFIX}kl_per_token"
"""Measured at a trial's end; 0 at step 0 by definition (`trainer.evaluation.answer_kl`)."""
COMPARISON_METRIC = f"{EVAL_PREFIX}accuracies/logp"
"""The held-out metric that no setting scales; sweeps of any objective can be compared by it."""


def base_name(name: str) -> str:
    """Return the metric's name without the `eval_` prefix."""
    return name.removeprefix(EVAL_PREFIX)


def lookup(name: str) -> Metric | None:
    """Return the metric called `name`, with or without `eval_`; None if it does not exist in training or evaluation."""
    metric = METRICS.get(base_name(name))
    if metric is None:
        return None
    return metric if (metric.on_eval if name.startswith(EVAL_PREFIX) else metric.on_train) else None


def all_names() -> list[str]:
    """Return every name that a trial may report."""
    return [m.name for m in _TABLE if m.on_train] + [EVAL_PREFIX + m.name for m in _TABLE if m.on_eval]


def scaled_by(name: str, searched: Iterable[str]) -> list[str]:
    """Return which of the searched settings scale this metric; [] if it may rank the trials."""
    metric = lookup(name)
    if metric is None:
        return []
    return sorted(s for s in searched if any(s == path or s.startswith(f"{path}.") for path in metric.scaled_by))
