"""Inputs and outputs of an objective: `PairLogps` (sums of token log-probs of N pairs) and `LossTerms`.

Also terms shared by several objectives, and the conversion of loss terms to metrics: numerators and denominators that
are summed over micro-batches and processes, then divided once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.environment import sum_dtype

_FILE_NAMES = {"chosen_collision_logp": "chosen_purity", "rejected_collision_logp": "rejected_purity"}
"""Field -> its name in the cache and in eval_pairs.safetensors, where the two differ."""
_FIELD_NAMES = {column: field for field, column in _FILE_NAMES.items()}


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy to another device; from the host to a GPU through pinned memory, so that the host does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.to(dtype or tensor.dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Per-pair statistics of N pairs. Every tensor has shape [N]; log-probs are natural, summed over tokens.

    Log-probs have the dtype of `sum_dtype`: float64 except on Apple's GPU. Optional ones are None if they were not
    computed (see `RequiredStats`); an objective that needs one raises ValueError.
    """

    chosen: Tensor
    """Sum over the chosen response's tokens."""
    rejected: Tensor
    chosen_tokens: Tensor
    """Number of scored tokens, int64; 0, and the sums 0, where a row has an undesirable response alone (KTO)."""
    rejected_tokens: Tensor
    """Like chosen_tokens; 0 too if the rejected responses were not computed (see RequiredStats.rejected)."""
    chosen_shared: Tensor | None = None
    """Sum over the first min(|chosen|, |rejected|) tokens (LD-DPO)."""
    rejected_shared: Tensor | None = None
    chosen_collision_logp: Tensor | None = None
    """Sum over tokens of log(sum over the vocabulary of p^2) (WPO)."""
    rejected_collision_logp: Tensor | None = None
    prompt: Tensor | None = None
    """Sum over the prompt's tokens after its first (ORPO's cross-entropy covers them)."""
    prompt_tokens: Tensor | None = None
    score_gap: Tensor | None = None
    """Of a reference: score of the chosen minus that of the rejected response in the data (ODPO)."""
    mismatched_chosen: Tensor | None = None
    """Like `chosen`, of another pair's chosen response after this pair's prompt (KTO; see MismatchedPairs)."""
    mismatched_rejected: Tensor | None = None
    kl: Tensor | None = None
    """Of a reference: `kl_estimate` of the update, the same for all of its pairs (KTO)."""
    reference: PairLogps | None = None
    """The same pairs under the reference model, with the other inputs of the loss that do not change with the policy.
    """

    def margins(self) -> Tensor:
        """Return the margin of length-averaged log-probs, chosen minus rejected, of each pair: [N].

        NaN for rows with one response.
        """
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens

    def __len__(self) -> int:
        return int(self.chosen.shape[0])

    def columns(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by their names in files, without the reference."""
        named = {_FILE_NAMES.get(f.name, f.name): getattr(self, f.name) for f in fields(self) if f.name != "reference"}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_columns(cls, columns: Mapping[str, Tensor]) -> Self:
        """Return the inverse of `columns`. Raises TypeError for an unknown name."""
        by_field = {_FIELD_NAMES.get(name, name): tensor for name, tensor in columns.items()}
        return cls(**by_field)  # pyright: ignore[reportArgumentType]

    def select(self, index: Sequence[int] | slice | Tensor) -> PairLogps:
        """Return the pairs at `index`, reference included."""
        selected = PairLogps.from_columns({name: tensor[index] for name, tensor in self.columns().items()})
        return replace(selected, reference=None if self.reference is None else self.reference.select(index))

    def replace_pairs(self, index: Sequence[int] | Tensor, part: PairLogps) -> PairLogps:
        """Replace the statistics of some pairs by `part`'s, differentiable in them; the reference is unchanged."""
        new = part.columns()
        positions = to_device(torch.as_tensor(index), self.chosen.device)
        updated = {
            name: column.index_copy(0, positions, new[name]) for name, column in self.columns().items() if name in new
        }
        return replace(PairLogps.from_columns(updated), reference=self.reference)

    def with_reference(self, reference: PairLogps | None) -> PairLogps:
        """Attach reference log-probs, moved to this device. Raises ValueError if their token counts differ."""
        if reference is None:
            return replace(self, reference=None)
        moved = reference.to(self.chosen.device)
        same = len(moved) == len(self) and bool(
            torch.equal(moved.chosen_tokens, self.chosen_tokens)
            and torch.equal(moved.rejected_tokens, self.rejected_tokens)
        )
        if not same:
            raise ValueError("the reference log-probs are of other pairs: token counts differ")
        return replace(self, reference=moved)

    def with_kl(self) -> PairLogps:
        """Attach `kl_estimate` over all these pairs. Raises ValueError if log-probs of mismatched responses lack."""
        kl = kl_estimate((self.mismatched_chosen, self.mismatched_rejected), self.reference).repeat(len(self))
        return replace(self, reference=None if self.reference is None else replace(self.reference, kl=kl))

    def to(self, device: torch.device | str) -> PairLogps:
        """Return the statistics on another device."""
        target, columns = torch.device(device), self.columns()
        floating = sum_dtype(target)
        moved = PairLogps.from_columns(
            {name: to_device(t, target, floating if t.is_floating_point() else t.dtype) for name, t in columns.items()}
        )
        return replace(moved, reference=None if self.reference is None else self.reference.to(device))

    def detach(self) -> PairLogps:
        """Return the statistics without autograd history."""
        detached = PairLogps.from_columns({name: tensor.detach() for name, tensor in self.columns().items()})
        return replace(detached, reference=None if self.reference is None else self.reference.detach())

    @staticmethod
    def concatenate(parts: Sequence[PairLogps]) -> PairLogps:
        """Concatenate micro-batches' pairs in order. All must have the same statistics."""
        columns = [part.columns() for part in parts]
        joined = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
        references = [part.reference for part in parts if part.reference is not None]
        if references and len(references) != len(parts):
            raise ValueError("some of the parts have a reference and some do not")
        return replace(
            PairLogps.from_columns(joined), reference=PairLogps.concatenate(references) if references else None
        )


@dataclass(frozen=True, slots=True)
class RequiredStats:
    """Statistics beyond sums and counts that an objective uses; each has a cost."""

    rejected: bool = True
    """False: the objective does not use rejected responses, and training leaves them out."""
    reference: bool = False
    prompt: bool = False
    collision_prob: bool = False
    couples_pairs: bool = False
    """Whether the loss couples the pairs of an update (a sort) and is not a sum over pairs."""
    scores: bool = False
    """Whether the loss reads the gaps of the pairs' scores (`PairLogps.score_gap` of the reference)."""
    mismatched: bool = False
    """Whether responses are scored after other prompts too, for the estimate of the KL divergence."""


def kl_estimate(policy: tuple[Tensor | None, Tensor | None], reference: PairLogps | None) -> Tensor:
    """Return KTO's estimate of the KL divergence from the reference (Ethayarajh et al. 2024): [].

    max(0, mean of lp - lpr over mismatched responses), chosen and rejected ones, in nats per response; no gradient.
    `policy`: log-probs of both, [N] each. A row has the mismatched responses of which it has its own. Raises ValueError
    if log-probs are missing.
    """
    found: list[Tensor] = []
    if reference is not None:
        frozen = (reference.mismatched_chosen, reference.mismatched_rejected)
        tokens = (reference.chosen_tokens, reference.rejected_tokens)
        for p, r, count in zip(policy, frozen, tokens, strict=True):
            if p is not None and r is not None:
                found.append((p.detach() - r.to(p.device))[(count > 0).to(p.device)])
    if len(found) != 2:
        raise ValueError("the estimate of the KL divergence needs both models' log-probs of mismatched responses")
    return torch.cat(found).mean().clamp(min=0)


@dataclass(frozen=True, slots=True)
class UpdateTotals:
    """Totals over one update, all micro-batches and processes; the denominators of each micro-batch's share."""

    pairs: int
    chosen_tokens: int
    """Scored tokens of the chosen responses."""
    prompt_tokens: int = 0
    """Predicted tokens of the prompts (each prompt's length minus 1); used by ORPO."""
    single: int = 0
    """How many of `pairs` are rows with one response and a label (KTO)."""

    @property
    def responses(self) -> int:
        """Chosen and rejected responses together."""
        return 2 * self.pairs - self.single

    @classmethod
    def from_lengths(cls, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int] | None = None) -> Self:
        """Compute totals from the lengths in tokens of an update's prompts, chosen and rejected responses.

        A length of 0 is a response that the row does not have; without `rejected` every row has both.
        """
        if len(prompt) != len(chosen):
            raise ValueError(f"{len(prompt)} prompts but {len(chosen)} chosen responses")
        single = 0 if rejected is None else sum(0 in each for each in zip(chosen, rejected, strict=True))
        return cls(len(chosen), int(sum(chosen)), int(sum(prompt)) - len(prompt), single)


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The objective's values for N pairs. `loss` is divided by the update's totals: losses of micro-batches add up."""

    loss: Tensor
    """Scalar, float64."""
    chosen_rewards: Tensor
    """[N], detached; the implicit reward as TRL defines it for this objective."""
    rejected_rewards: Tensor
    chosen_logps: Tensor
    """[N], detached; reported as `logps/chosen`: per-token average or sum, by objective."""
    rejected_logps: Tensor
    extra: Mapping[str, Tensor]
    """[N] each, detached: further metrics of this objective by name, averaged over pairs."""
    logps: PairLogps
    """The inputs of the objective, detached."""
    totals: UpdateTotals

    def select(self, index: Sequence[int] | Tensor) -> LossTerms:
        """Return these pairs' rewards and log-probs; the loss is unchanged."""
        return replace(
            self,
            chosen_rewards=self.chosen_rewards[index],
            rejected_rewards=self.rejected_rewards[index],
            chosen_logps=self.chosen_logps[index],
            rejected_logps=self.rejected_logps[index],
            extra={name: values[index] for name, values in self.extra.items()},
            logps=self.logps.select(index),
        )

    @staticmethod
    def concatenate(parts: Sequence[LossTerms]) -> LossTerms:
        """Concatenate the terms of groups of pairs of one update; losses are added."""
        return LossTerms(
            loss=torch.stack([part.loss for part in parts]).sum(),
            chosen_rewards=torch.cat([part.chosen_rewards for part in parts]),
            rejected_rewards=torch.cat([part.rejected_rewards for part in parts]),
            chosen_logps=torch.cat([part.chosen_logps for part in parts]),
            rejected_logps=torch.cat([part.rejected_logps for part in parts]),
            extra={name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra},
            logps=PairLogps.concatenate([part.logps for part in parts]),
            totals=parts[0].totals,
        )


MetricSums = dict[str, tuple[float, float]]
"""Metric name -> (numerator, denominator). Summing both over parts and dividing once gives the metric of the whole."""


_WITHOUT_REJECTED = ("loss", "logps/chosen", "nll_loss", "logps_per_token/chosen", "lengths/chosen")


def metric_sums(terms: LossTerms) -> MetricSums:
    """Return sums of every metric of trainer/metrics.py that is computed from log-probs.

    `loss` is complete after summing all parts of an update (or evaluation set); `nll_loss` is per chosen token, all
    others are means over pairs. Accuracies count strictly greater values, as in TRL. If rejected responses were not
    computed (SFT training), the metrics that need them are left out. Of rows with one response, metrics of chosen and
    of rejected responses are means over the rows that have one; accuracies and margins, which compare the two of a
    row, are left out, and `metric_means` adds the differences of the means as margins.
    """
    pending = PendingSums.of(terms)
    return pending.complete(pending.numbers.tolist())


_COUNT = "responses/"
"""Of rows with one response: prefix of the numbers of chosen and rejected responses among the numerators."""
_OF_A_PAIR = ("rewards/margins", "rewards/accuracies", "margins/logp", "accuracies/logp")
_MARGINS = {"rewards/margins": "rewards/", "margins/logp": "logps_per_token/"}
"""Margin -> prefix of the metrics of whose means it is the difference."""


def _numerators(terms: LossTerms) -> dict[str, Tensor]:
    found = _all_numerators(terms)
    if not terms.totals.single:
        return found
    counts = {f"{_COUNT}{side}": (getattr(terms.logps, f"{side}_tokens") > 0).sum() for side in ("chosen", "rejected")}
    return {name: value for name, value in found.items() if name not in _OF_A_PAIR} | counts


def _all_numerators(terms: LossTerms) -> dict[str, Tensor]:
    return {
        "loss": terms.loss.detach(),
        "rewards/chosen": terms.chosen_rewards.sum(),
        "rewards/rejected": terms.rejected_rewards.sum(),
        "rewards/margins": (terms.chosen_rewards - terms.rejected_rewards).sum(),
        "rewards/accuracies": (terms.chosen_rewards > terms.rejected_rewards).sum(),
        "logps/chosen": terms.chosen_logps.sum(),
        "logps/rejected": terms.rejected_logps.sum(),
        **_comparison_values(terms.logps),
        **{name: values.sum() for name, values in terms.extra.items()},
    }


@dataclass(frozen=True, slots=True)
class PendingSums:
    """The `metric_sums` of parts of an update, not yet read from the device that computes them."""

    names: tuple[str, ...]
    numbers: Tensor
    """[metrics + 2] in `sum_dtype`: numerators in the order of `names`, number of pairs, their share of the update."""

    @classmethod
    def of(cls, terms: LossTerms) -> PendingSums:
        """Return the sums of one part."""
        numerators, pairs = _numerators(terms), len(terms.logps)
        dtype = sum_dtype(terms.loss.device)
        counts = torch.tensor([float(pairs), pairs / terms.totals.pairs], dtype=dtype)
        stacked = torch.stack([value.to(dtype) for value in numerators.values()])
        return cls(tuple(numerators), torch.cat([stacked, to_device(counts, stacked.device)]))

    def __add__(self, other: PendingSums) -> PendingSums:
        """Add another part. Raises ValueError if their metrics differ."""
        if self.names != other.names:
            raise ValueError(f"the parts have other metrics: {self.names} and {other.names}")
        return PendingSums(self.names, self.numbers + other.numbers)

    def complete(self, numbers: Sequence[float]) -> MetricSums:
        """Return the sums of `numbers` as read from the device, possibly added up over processes."""
        *values, pairs, share = numbers
        found = dict(zip(self.names, values, strict=True))
        counts = {name.removeprefix(_COUNT): found.pop(name) for name in self.names if name.startswith(_COUNT)}
        sums = {name: (value, counts.get(name.rpartition("/")[2], pairs)) for name, value in found.items()}
        sums |= {"loss": (sums["loss"][0], share), "nll_loss": (sums["nll_loss"][0], sums["lengths/chosen"][0])}
        if sums["lengths/rejected"][0] == 0 and not counts:
            return {name: sums[name] for name in _WITHOUT_REJECTED}
        return sums


def comparison_sums(logps: PairLogps) -> MetricSums:
    """Return the sums of `metric_sums` that do not depend on the objective: margins/logp, lengths/chosen, nll_loss."""
    return _to_sums(_comparison_values(logps), len(logps))


def _comparison_values(logps: PairLogps) -> dict[str, Tensor]:
    chosen, rejected = per_token_logps(logps)
    return {
        "nll_loss": -logps.chosen.sum(),
        "margins/logp": (chosen - rejected).sum(),
        "accuracies/logp": (chosen > rejected).sum(),
        "logps_per_token/chosen": chosen.sum(),
        "logps_per_token/rejected": rejected.sum(),
        "lengths/chosen": logps.chosen_tokens.sum(),
        "lengths/rejected": logps.rejected_tokens.sum(),
    }


def log_ratio_sums(logps: PairLogps, initial: PairLogps) -> MetricSums:
    """Return the sums of the mean log-ratio per token, log pi(y|x) - log pi_0(y|x) over |y|, of chosen and rejected.

    `initial`: the initial model's log-probs of the same pairs. Means over the pairs that have such a response, in nats
    per token; 0 where nothing has changed. Without chosen or rejected responses their metric is left out.
    """
    now, before = per_token_logps(logps), per_token_logps(initial)
    sides = zip(("chosen", "rejected"), now, before, (logps.chosen_tokens, logps.rejected_tokens), strict=True)
    return {
        f"log_ratio_per_token/{side}": (float((policy - frozen).sum()), float((tokens > 0).sum()))
        for side, policy, frozen, tokens in sides
        if bool(tokens.any())
    }


def _to_sums(sums: Mapping[str, Tensor], pairs: int) -> MetricSums:
    dtype = sum_dtype(next(iter(sums.values())).device)
    values: list[float] = torch.stack([value.to(dtype) for value in sums.values()]).tolist()
    all_sums: MetricSums = {name: (value, float(pairs)) for name, value in zip(sums, values, strict=True)}
    all_sums["nll_loss"] = (all_sums["nll_loss"][0], all_sums["lengths/chosen"][0])
    return all_sums


def merge_sums(parts: Iterable[MetricSums]) -> MetricSums:
    """Add the sums of several parts. Raises KeyError if their metrics differ."""
    merged: MetricSums = {}
    for part in parts:
        merged = {
            name: (number + part[name][0], weight + part[name][1]) for name, (number, weight) in merged.items()
        } or dict(part)
    return merged


def metric_means(sums: MetricSums) -> dict[str, float]:
    """Divide numerators by denominators; NaN stays NaN. A metric of no response is left out.

    Of rows with one response, margins are the differences of the means of chosen and rejected responses.
    """
    means = {name: number / weight for name, (number, weight) in sums.items() if weight}
    for margin, prefix in _MARGINS.items():
        chosen, rejected = (means.get(f"{prefix}{side}") for side in ("chosen", "rejected"))
        if margin not in means and chosen is not None and rejected is not None:
            means[margin] = chosen - rejected
    return means


def smoothed_logistic(scaled: Tensor, smoothing: float) -> Tensor:
    """Return -(1-eps) ls(s) - eps ls(-s), elementwise: the logistic loss if labels are wrong with probability eps."""
    if not smoothing:
        return -logsigmoid(scaled)
    return -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)


def cross_entropy(logps: PairLogps, totals: UpdateTotals) -> Tensor:
    """Return these pairs' share of the update's cross-entropy per chosen token; scalar."""
    return -logps.chosen.sum() / max(1, totals.chosen_tokens)


def prompt_cross_entropy(logps: PairLogps, totals: UpdateTotals) -> Tensor:
    """Return the cross-entropy per token of prompt and chosen response."""
    if logps.prompt is None or totals.prompt_tokens == 0:
        raise ValueError("this objective scores prompts: their log-probs and token counts are missing")
    return -(logps.prompt + logps.chosen).sum() / (totals.prompt_tokens + totals.chosen_tokens)


def per_token_logps(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Return the log-prob per token of chosen and rejected, [N] each; 0 of responses that are not there."""
    return logps.chosen / logps.chosen_tokens.clamp(min=1), logps.rejected / logps.rejected_tokens.clamp(min=1)
