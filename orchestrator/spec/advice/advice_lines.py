"""`advise`: lines of advice on a sweep's settings, each with its reason, its sources and the values to write.

What needs no model comes from the spec and the number of rows; the rest from `PairScores`. The bounds in capitals are
this program's rules, not published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from orchestrator.spec.advice import published_values as published
from orchestrator.spec.advice.pair_scores import PairScores, length_bias, share_interval
from orchestrator.spec.advice.published_values import LossName, learning_rates, rate_text
from orchestrator.spec.search.dimensions import LogUniform, Uniform
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.loss_config import CpoLoss, DpoLoss, KtoLoss, LossConfig
from trainer.config.trial import TrainingConfig, TrialConfig
from trainer.results import TrialError
from trainer.training.schedule import total_updates

RATE, BATCH, EPOCHS, STEPS = (
    f"training.{name}" for name in ("learning_rate", "pairs_per_update", "num_train_epochs", "max_steps")
)
RATE_SLACK = 2.0
"""A rate up to this factor outside of the published ones is kept."""
SMALLEST_BATCH = 8
LONGER_SHARE, LENGTH_CORRELATION = 0.6, 0.1
REPEATED_SHARE, EASY_SHARE = 0.05, 0.9

AdviceLevel = Literal["keep", "change", "warning", "note"]


@dataclass(frozen=True, slots=True)
class AdviceLine:
    """One line of advice.

    `setting`: its place in the file, `search.loss.beta` or `base.training.max_steps`; None for advice on no setting.
    `value`: YAML to write there; None where the file's value is kept, or where no value follows.
    """

    topic: str
    level: AdviceLevel
    text: str
    reason: str
    sources: tuple[str, ...] = ()
    setting: str | None = None
    current: str | None = None
    value: str | None = None

    @property
    def yaml(self) -> str | None:
        """The advised setting as a line of YAML below `search:` or `base:`; None without a value."""
        return None if self.setting is None or self.value is None else f"{self.setting}: {self.value}"

    def as_json(self) -> dict[str, Any]:
        """Return the line as JSON values."""
        return asdict(self) | {"yaml": self.yaml}


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of the sweep: the listed values of its search, or the ends of its range, or the base's value."""

    path: str
    values: tuple[float, ...]
    searched: bool
    kind: Literal["list", "uniform", "log_uniform", "zip"]

    @property
    def place(self) -> str:
        """Its place in the file."""
        return f"{'search' if self.searched else 'base'}.{self.path}"

    @property
    def text(self) -> str:
        """Its values as in the file."""
        return values_text(self.values, self.searched)

    def advised(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return which of the advised values it gets: all, the ends for a range, the middle one for the base."""
        if not self.searched:
            return (values[(len(values) - 1) // 2],)
        return tuple(values) if self.kind in ("list", "zip") else (min(values), max(values))

    def line(self, topic: str, advised: Sequence[float], text: str, reason: str, *sources: str) -> AdviceLine:
        """Return advice to use these values: `keep` where they are the setting's own. Zipped ones are not written."""
        values = self.advised(advised)
        same = set(values) == set(self.values) or (not self.searched and self.values[0] in advised)
        new = values_text(values, self.searched)
        is_range = self.kind in ("uniform", "log_uniform")
        if same:
            return AdviceLine(topic, "keep", text, reason, sources, self.place, self.text)
        if self.kind == "zip" or (is_range and values[0] == values[-1]):
            reason += f"; to be set by hand: {new}"
            return AdviceLine(topic, "change", text, reason, sources, self.place, self.text)
        return AdviceLine(topic, "change", text, reason, sources, self.place, self.text, new)


def values_text(values: Sequence[float], as_list: bool) -> str:
    """Return the values as YAML."""
    texts = [rate_text(v) if 0 < abs(v) < 1e-2 else f"{v:g}" for v in values]
    return f"[{', '.join(texts)}]" if as_list else texts[0]


def setting_of(spec: SweepSpec, path: str, base_value: float | None) -> Setting | None:
    """Return the numbers of a setting; None where it is neither searched nor a number in `base`."""
    listed = spec.search.listed_values(path)
    if path in spec.search.paths:
        numbers = tuple(float(v) for v in listed if isinstance(v, int | float) and not isinstance(v, bool))
        match spec.search.dimensions.get(path):
            case Uniform():
                return Setting(path, numbers, True, "uniform")
            case LogUniform():
                return Setting(path, numbers, True, "log_uniform")
            case None:
                return Setting(path, numbers, True, "zip")
            case _:
                return Setting(path, numbers, True, "list") if numbers else None
    return None if base_value is None else Setting(path, (float(base_value),), False, "list")


def losses_of(spec: SweepSpec) -> list[LossConfig]:
    """Return one configured loss per kind and loss type that the sweep tries, the base's alone if none is searched."""
    found: dict[tuple[str, str], LossConfig] = {}
    corners = spec.search.corners()
    for index in range(min(len(corners), 256)):
        loss = apply_params(spec.base, spec.search.active(corners.params_at(index))).loss
        found.setdefault((loss.kind, str(getattr(loss, "loss_type", ""))), loss)
    return list(found.values()) or [spec.base.loss]


# --- without a model -------------------------------------------------------------------------------------------------


def settings_advice(spec: SweepSpec, parameters: float | None, train_pairs: int | None) -> list[AdviceLine]:
    """Return the advice that needs no model: learning rates, pairs per update, epochs.

    Args:
        spec: the sweep.
        parameters: of the initial model; None where unknown.
        train_pairs: training pairs; None where unknown.
    """
    return [*_rate_advice(spec, parameters), *_batch_advice(spec), *_duration_advice(spec, train_pairs)]


def _rate_advice(spec: SweepSpec, parameters: float | None) -> Iterator[AdviceLine]:
    rate = setting_of(spec, RATE, spec.base.training.learning_rate)
    kinds = [kind for kind in dict.fromkeys(loss.kind for loss in losses_of(spec)) if kind in published.LOSS_NAMES]
    if rate is None or not kinds:
        return
    lora, dimension = spec.base.lora is not None, spec.search.dimensions.get(RATE)
    found = [learning_rates(_name(kind), parameters, lora=lora) for kind in kinds]
    listed = sorted({value for one in found for value in one.rates})
    low, high = listed[0] / RATE_SLACK, listed[-1] * RATE_SLACK
    size = "unknown size, as for 7 to 9 billion" if parameters is None else _size(parameters)
    what = f"{'adapters of a model' if lora else 'all weights of a model'} of {size} parameters"
    outside = [value for value in rate.values if not low <= value <= high]
    reason = "; ".join(dict.fromkeys(one.reason for one in found))
    sources = tuple(dict.fromkeys(source for one in found for source in one.sources))
    if dimension is not None and dimension.when:
        yield AdviceLine(
            "learning rate", "note", f"{what}: {values_text(listed, True)}", reason, sources, rate.place, rate.text
        )
    elif not outside:
        yield AdviceLine(
            "learning rate", "keep", f"{what}: within {values_text([low, high], True)}", reason, sources,
            rate.place, rate.text,
        )  # fmt: skip
    else:
        text = f"{what}: {values_text(outside, True)} is outside of {values_text([low, high], True)}"
        yield rate.line("learning rate", listed, text, reason, *sources)


def _name(kind: str) -> LossName:
    return next(name for name in published.LOSS_NAMES if name == kind)


def _size(parameters: float) -> str:
    unit, name = next(
        ((u, n) for u, n in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")) if parameters >= u), (1, "")
    )
    return f"{parameters / unit:.3g} {name}".strip()


def _batch_advice(spec: SweepSpec) -> Iterator[AdviceLine]:
    batch = setting_of(spec, BATCH, spec.base.training.pairs_per_update)
    most = published.LARGEST_BATCH[True]
    if batch is None or spec.base.lora is None:
        return
    if max(batch.values) <= most:
        yield AdviceLine(
            "batch", "keep", f"{batch.text} pairs per update with adapters", f"at most {most}", (published.LORA,),
            batch.place, batch.text,
        )  # fmt: skip
        return
    text = f"{batch.text} pairs per update with adapters: above {most}"
    reason = (
        f"adapters lose more than all weights do with large batches, whatever their rank; TRL's guide says below {most}"
    )
    advised = sorted({value for value in batch.values if value <= most} | {most})
    line = batch.line("batch", advised, text, reason, published.LORA, "TRL's guide of the same name")
    yield replace(line, level="warning")


def _duration_advice(spec: SweepSpec, train_pairs: int | None) -> Iterator[AdviceLine]:
    training = spec.base.training
    if train_pairs is None or any(path in spec.search.paths for path in (BATCH, EPOCHS, STEPS, "data.max_train_rows")):
        return
    try:
        updates = total_updates(training, train_pairs)
    except TrialError:
        return  # the plan refuses it with its own message
    epochs = updates * training.pairs_per_update / train_pairs
    facts = f"{updates:,} updates of {training.pairs_per_update} pairs = {_epochs(epochs)} of {train_pairs:,} pairs"
    if epochs > published.MOST_EPOCHS:
        yield _fewer_epochs(training, train_pairs, facts)
    elif updates < published.FEWEST_UPDATES:
        yield _more_updates(training, train_pairs, updates, facts)
    else:
        yield AdviceLine("duration", "keep", facts, "SimPO's setups train one epoch", (published.SIMPO,))


def _epochs(epochs: float) -> str:
    text = f"{epochs:.2g}"
    return f"{text} epoch" if text == "1" else f"{text} epochs"


def _more_updates(training: TrainingConfig, train_pairs: int, updates: int, facts: str) -> AdviceLine:
    """Advise more steps where these are given, else smaller updates, as far as pairs are seen a few times only."""
    few = published.FEWEST_UPDATES
    reason = (
        f"below {few} updates the warm-up of a tenth has less than three, and the learning rate is hardly ever at its "
        "peak"
    )
    batch = training.pairs_per_update
    if training.max_steps is not None:
        if few * batch <= published.MOST_EPOCHS * train_pairs:
            place, current = f"base.{STEPS}", str(training.max_steps)
            return AdviceLine("duration", "warning", facts, reason, (), place, current, str(few))
        return AdviceLine("duration", "warning", facts, reason + "; more would need more pairs")
    while batch > SMALLEST_BATCH and updates * training.pairs_per_update / batch < few:
        batch = max(SMALLEST_BATCH, batch // 2)
    if batch == training.pairs_per_update:
        return AdviceLine("duration", "warning", facts, reason + "; more would need more pairs")
    reason += "; smaller updates make more of them"
    current = str(training.pairs_per_update)
    return AdviceLine("duration", "warning", facts, reason, (), f"base.{BATCH}", current, str(batch))


def _fewer_epochs(training: TrainingConfig, train_pairs: int, facts: str) -> AdviceLine:
    reason = (
        f"each pair is seen more than {published.MOST_EPOCHS} times; all of SimPO's setups train one epoch, and "
        "held-out metrics that rise after it may be memory of the prompts"
    )
    if training.max_steps is None:
        path, current, value = EPOCHS, f"{training.num_train_epochs:g}", str(published.MOST_EPOCHS)
    else:
        steps = max(1, published.MOST_EPOCHS * train_pairs // training.pairs_per_update)
        path, current, value = STEPS, str(training.max_steps), str(steps)
    return AdviceLine("duration", "warning", facts, reason, (published.SIMPO,), f"base.{path}", current, value)


# --- from the initial model's log-probs ------------------------------------------------------------------------------


def data_advice(scores: PairScores, losses: Sequence[LossConfig]) -> list[AdviceLine]:
    """Return the advice on the pairs themselves: which are right already, lengths, near-duplicates."""
    if scores.paired:
        return [_right(scores), _lengths(scores, losses), *_repetition(scores)]
    desirable, undesirable = scores.labels
    means = scores.chosen_tokens.sum() / desirable, scores.rejected_tokens.sum() / undesirable
    return [
        AdviceLine("right already", "note", "rows with one response each: no pair to rank", "see docs/search.md, KTO"),
        AdviceLine(
            "length",
            "note",
            f"desirable {means[0]:.3g} tokens, undesirable {means[1]:.3g}",
            "KTO's rewards are summed over tokens: responses of one label that are longer weigh more",
        ),
        *_repetition(scores),
    ]


def _right(scores: PairScores) -> AdviceLine:
    share, count = scores.right, len(scores.chosen)
    low, high = share_interval(share, count)
    text = f"{share:.1%} of {count:,} pairs are right already (95 % interval {low:.1%} to {high:.1%})"
    if share > EASY_SHARE:
        reason = "the initial model ranks nearly all pairs as the labels do: harder pairs would teach more"
        return AdviceLine("right already", "warning", text, reason)
    reason = (
        "the share that `eval_accuracies/logp` starts from: the chosen response is likelier per token"
        if low <= 0.5 <= high or share > 0.5
        else "less than half: the initial model prefers the rejected responses per token"
    )
    return AdviceLine("right already", "note", text, reason)


def _lengths(scores: PairScores, losses: Sequence[LossConfig]) -> AdviceLine:
    bias = length_bias(scores)
    text = (
        f"chosen {bias.chosen:.3g} tokens, rejected {bias.rejected:.3g}; the chosen one is longer in {bias.longer:.0%} "
        f"and shorter in {bias.shorter:.0%} of the pairs; correlation of log length with the label "
        f"{bias.correlation:+.2f}, of the difference in length with the gap {bias.gap_correlation:+.2f}"
    )
    strong = max(bias.longer, bias.shorter) > LONGER_SHARE and abs(bias.correlation) > LENGTH_CORRELATION
    if not strong:
        return AdviceLine("length", "note", text, "length alone hardly gives the labels away")
    longer = "longer" if bias.correlation > 0 else "shorter"
    summed = [loss for loss in losses if sums_tokens(loss)]
    if not summed:
        reason = f"{longer} responses are preferred; this loss averages over tokens, which takes the largest part out"
        return AdviceLine("length", "note", text, reason, (published.SIMPO,))
    reason = f"{longer} responses are preferred, and a loss on summed log-probs rewards length itself"
    if any(isinstance(loss, DpoLoss) for loss in summed):
        reason += "; to try: loss.loss_type: sigmoid_norm (averages), or loss.length_alpha above 0 (R-DPO)"
        return AdviceLine("length", "warning", text, reason, (published.R_DPO, published.TULU))
    return AdviceLine("length", "warning", text, reason + "; loss.kind: simpo averages", (published.SIMPO,))


def sums_tokens(loss: LossConfig) -> bool:
    """Return whether the preference term compares log-probs summed over tokens."""
    match loss:
        case DpoLoss():
            return any(term not in ("sigmoid_norm", "ipo", "sft") for term, _ in loss.terms) and not loss.length_alpha
        case CpoLoss():
            return loss.loss_type != "ipo"
        case KtoLoss():
            return True
        case _:
            return False


def _repetition(scores: PairScores) -> Iterator[AdviceLine]:
    found = scores.repetition
    cases = (
        (found.prompts, f"of {found.compared_prompts:,} training prompts are near-duplicates of an earlier one"),
        (found.held_out, "of the held-out prompts have a near-duplicate among the training prompts"),
        (found.answers, "of the pairs have two nearly equal responses"),
    )
    reasons = (
        "they count as several epochs of the same prompts",
        "held-out metrics then measure memory too: remove them, or hold out by topic",
        "their gap is near 0 whatever the model does, so they keep full weight and teach little",
    )
    for (share, text), reason in zip(cases, reasons, strict=True):
        if share > REPEATED_SHARE:
            yield AdviceLine("near-duplicates", "warning", f"{share:.1%} {text}", reason)
    few = [f"{share:.1%} {text}" for share, text in cases if share <= REPEATED_SHARE]
    if few:
        yield AdviceLine("near-duplicates", "note", "; ".join(few), f"at most {REPEATED_SHARE:.0%} each")


def trial_of(spec: SweepSpec) -> TrialConfig:
    """Return the trial whose initial model and data the advice is about: the first point of the search."""
    corners = spec.search.corners()
    return apply_params(spec.base, spec.search.active(corners.params_at(0))) if len(corners) else spec.base
