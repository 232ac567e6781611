"""Advice before training: formulas against values computed by hand, and what is advised for which pairs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.spec.advice.advice_lines import AdviceLine, data_advice, losses_of, settings_advice
from orchestrator.spec.advice.loss_advice import KTO_TRAVEL, loss_advice, margin_table, weight_advice
from orchestrator.spec.advice.pair_scores import (
    Distribution,
    PairScores,
    Repetition,
    length_bias,
    log_odds,
    margin_effect,
    rounded,
    share_interval,
    weights,
)
from orchestrator.spec.advice.published_values import LOSS_NAMES, learning_rates
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.loss_config import OrpoLoss, SimpoLoss
from trainer.objectives.losses import pair_loss
from trainer.objectives.pair_logps import PairLogps, UpdateTotals

NONE_REPEATED = Repetition(0.0, 0.0, 0.0, 100)


def scores(
    gaps: Any, tokens: Any = 10.0, rejected_tokens: Any = None, repetition: Repetition = NONE_REPEATED
) -> PairScores:
    """Pairs with these gaps: the rejected responses have -1 per token."""
    gap = np.asarray(gaps, dtype=np.float64)
    chosen = np.broadcast_to(np.asarray(tokens, dtype=np.float64), gap.shape)
    rejected = chosen if rejected_tokens is None else np.broadcast_to(np.asarray(rejected_tokens, float), gap.shape)
    return PairScores("eval", len(gap), (gap - 1) * chosen, -rejected, chosen, rejected, 1000, repetition)


def sweep(search: str, loss: str = "{kind: simpo}", training: str = "{}", more: str = "") -> SweepSpec:
    return load_spec_text(
        f"name: s\nbase:\n  model: {{generated: {{}}}}\n  data: {{train: {{generated: instructions}}}}\n"
        f"  loss: {loss}\n  training: {training}\n{more}search: {search}\n"
        "sampler: random\nbudget: {trials: 4}\nmaximize: eval_accuracies/logp\n",
        Path.cwd(),
    )


def of(lines: list[AdviceLine], topic: str) -> AdviceLine:
    (found,) = [line for line in lines if line.topic == topic]
    return found


# --- formulas --------------------------------------------------------------------------------------------------------


def test_a_margin_by_hand() -> None:
    # beta 2, ratio 0.5: z = 2 * (0.5 - gap) = 1, 0, -1
    found = margin_effect(2.0, 0.5, np.array([0.0, 0.5, 1.0]))
    each = [1 / (1 + math.exp(-1)), 0.5, 1 / (1 + math.exp(1))]
    assert found.beyond == pytest.approx(1 / 3)
    assert found.weight == pytest.approx(0.5)
    assert found.effective == pytest.approx(sum(each) ** 2 / (3 * sum(w * w for w in each)))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0.01, 30), st.floats(0, 3), st.floats(0.01, 2))
def test_the_weight_is_the_gradient_of_simpo(gaps: list[float], beta: float, ratio: float, more: float) -> None:
    made = scores(gaps)
    chosen = torch.tensor(made.chosen, requires_grad=True)
    tokens = torch.tensor(made.chosen_tokens).long()
    logps = PairLogps(chosen, torch.tensor(made.rejected), tokens, tokens)
    loss = SimpoLoss(beta=beta, gamma_beta_ratio=ratio)
    totals = UpdateTotals.from_lengths([1] * len(gaps), tokens.tolist())
    (gradient,) = torch.autograd.grad(pair_loss(loss, logps, totals).loss, chosen)
    expected = -beta * weights(beta, made.gaps, ratio) / made.chosen_tokens / len(gaps)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9, atol=1e-300)
    # A larger margin leaves more weight and fewer pairs beyond it.
    here, further = margin_effect(beta, ratio, made.gaps), margin_effect(beta, ratio + more, made.gaps)
    assert further.weight >= here.weight
    assert further.beyond <= here.beyond
    assert 0 <= here.effective <= 1 + 1e-12


def test_orpos_odds_are_those_of_the_objective() -> None:
    made = scores([0.3, -0.2, 0.9], [3, 4, 5], [6, 5, 4])
    columns = [torch.tensor(v) for v in (made.chosen, made.rejected)]
    logps = PairLogps(*columns, torch.tensor(made.chosen_tokens).long(), torch.tensor(made.rejected_tokens).long())
    totals = UpdateTotals.from_lengths([1, 1, 1], [3, 4, 5])
    terms = pair_loss(OrpoLoss(beta=1.0, nll_scale=0.0, nll_prompt=False), logps, totals)
    assert float(terms.loss) == pytest.approx(float(np.logaddexp(0, -log_odds(made)).mean()))


def test_lengths_and_shares_by_hand() -> None:
    bias = length_bias(scores([1.0, 0.0, 0.0, 0.0], [2, 2, 2, 2], [1, 2, 4, 2]))
    assert (bias.chosen, bias.rejected, bias.longer, bias.shorter) == (2, 2.25, 0.25, 0.25)
    assert bias.correlation == pytest.approx(0.0)  # log lengths 1 1 1 1 and 0 1 2 1 have one mean
    # Differences 1, 0, -2, 0 and gaps 1, 0, 0, 0: covariance 1.25 / 4, variances 4.75 / 4 and 0.75 / 4.
    assert bias.gap_correlation == pytest.approx(1.25 / math.sqrt(4.75 * 0.75))
    assert share_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert share_interval(0.0, 10)[0] == 0
    assert rounded([2.0, 0.123, 0.2497, 0.25]) == (0.12, 0.25, 2.0)
    found = Distribution.of(np.arange(101.0))
    assert (found.mean, found.median, found.percentiles["p95"]) == (50, 50, 95)


def test_scores_are_read_back_as_they_were_and_damaged_ones_are_refused() -> None:
    made = scores([0.1, -0.2])
    back = PairScores.from_json(made.as_json())
    assert np.array_equal(back.gaps, made.gaps)
    assert back.repetition == made.repetition
    with pytest.raises(ValueError, match="differ in length"):
        PairScores.from_json(made.as_json() | {"chosen": [1.0]})


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("parameters", [1e6, 1e8, 1.5e9, 8e9, 13e9, 70e9, None])
def test_adapters_get_ten_times_the_rates_with_the_source(loss: Any, parameters: float | None) -> None:
    full, lora = (learning_rates(loss, parameters, lora=on) for on in (False, True))
    assert lora.rates == tuple(min(float(f"{10 * rate:.3g}"), 5e-3) for rate in full.rates)
    assert any("LoRA Without Regret" in source for source in lora.sources)
    if parameters is None or parameters >= 3e8:
        assert full.sources


def test_a_rate_outside_of_the_published_ones_is_replaced() -> None:
    spec = sweep("{training.learning_rate: [1e-5, 5e-7]}")
    (kept, changed) = (of(settings_advice(spec, size, None), "learning rate") for size in (None, 8e9))
    assert kept.level == changed.level == "change"
    assert changed.yaml == "search.training.learning_rate: [3e-7, 5e-7, 8e-7, 1e-6]"
    assert "2405.14734" in changed.sources[0]
    ranged = sweep("{training.learning_rate: {log_uniform: [1e-5, 1e-3]}}")
    assert of(settings_advice(ranged, 8e9, None), "learning rate").value == "[3e-7, 1e-6]"
    fixed = sweep("{loss.beta: [2.0, 2.5]}", training="{learning_rate: 5e-7}")
    assert of(settings_advice(fixed, 8e9, None), "learning rate").level == "keep"
    zipped = sweep("{zip: {training.learning_rate: [1e-3, 1e-2], loss.beta: [2.0, 3.0]}}")
    line = of(settings_advice(zipped, 8e9, None), "learning rate")
    assert (line.level, line.value) == ("change", None)
    assert "by hand: [3e-7" in line.reason


def test_batches_of_adapters_and_numbers_of_updates() -> None:
    adapters = sweep("{loss.beta: [2.0, 2.5]}", training="{pairs_per_update: 128}", more="  lora: {}\n")
    assert of(settings_advice(adapters, 8e9, None), "batch").yaml == "base.training.pairs_per_update: 32"
    spec = sweep("{loss.beta: [2.0, 2.5]}", training="{pairs_per_update: 128}")
    assert not [line for line in settings_advice(spec, 8e9, None) if line.topic == "batch"]
    # 1,000 rows by 128 are 7 updates; 32 make 28, 16 make 56.
    few = of(settings_advice(spec, 8e9, 1000), "duration")
    assert (few.level, few.yaml) == ("warning", "base.training.pairs_per_update: 16")
    many = sweep("{loss.beta: [2.0, 2.5]}", training="{pairs_per_update: 10, max_steps: 900}")
    line = of(settings_advice(many, 8e9, 1000), "duration")
    assert (line.level, line.yaml) == ("warning", "base.training.max_steps: 300")


# --- beta and margin -------------------------------------------------------------------------------------------------

GRID = "{loss.beta: [2.0, 10.0], loss.gamma_beta_ratio: [0.3, 0.5]}"


def test_published_margins_are_kept_where_pairs_have_weight() -> None:
    made = scores(np.random.default_rng(0).normal(0.05, 0.3, 500))
    spec = sweep(GRID)
    assert {line.level for line in loss_advice(spec, made)} == {"keep"}
    assert [(e.beta, e.ratio) for e in margin_table(spec, made)] == [(2, 0.3), (10, 0.3), (2, 0.5), (10, 0.5)]


def test_where_all_pairs_are_beyond_the_margin_a_larger_one_is_advised() -> None:
    made = scores(np.random.default_rng(0).normal(3.0, 0.5, 500))
    margin = of(loss_advice(sweep(GRID), made), "margin")
    assert margin.level == "change"
    assert margin.yaml == "search.loss.gamma_beta_ratio: [3.3, 3.5, 3.8]"
    # What is advised is kept by a second call, in this form and as gamma.
    assert of(loss_advice(sweep(GRID.replace("[0.3, 0.5]", "[3.3, 3.5, 3.8]")), made), "margin").level == "keep"
    absolute = sweep("{loss.beta: [2.0], loss.gamma: [0.3, 1.6]}")
    advised = of(loss_advice(absolute, made), "margin")
    assert advised.yaml == "search.loss.gamma: [6.5, 6.9, 7.5]"


def test_a_margin_far_above_the_gaps_and_a_beta_without_effect_are_replaced() -> None:
    made = scores(np.random.default_rng(0).normal(0.0, 0.02, 500))
    lines = loss_advice(sweep("{loss.beta: [2.0], loss.gamma_beta_ratio: [0.5, 1.5, 3.0]}"), made)
    beta, margin = of(lines, "beta"), of(lines, "margin")
    assert beta.yaml == "search.loss.beta: [50, 150]"
    assert margin.value == "[0.3, 0.5, 0.8]"


def test_dpo_gets_the_distance_that_its_beta_allows() -> None:
    # ln 9 / (0.1 * 200) = 0.11 nats per token; with 5 tokens 4.4, too far.
    spec = sweep("{loss.beta: [0.01, 0.1]}", loss="{kind: dpo}")
    kept = of(loss_advice(spec, scores([0.1, 0.2], tokens=200)), "beta")
    assert kept.level == "keep"
    assert "0.11 (beta 0.1)" in kept.text
    short = of(loss_advice(spec, scores([0.1, 0.2], tokens=5)), "beta")
    assert short.yaml == "search.loss.beta: [0.4, 1, 2]"
    averaged = sweep("{loss.beta: [5.0, 10.0]}", loss="{kind: dpo, loss_type: sigmoid_norm}")
    assert of(loss_advice(averaged, scores([0.1, 0.2], tokens=5)), "beta").level == "keep"
    squared = sweep("{loss.beta: [0.01, 1.0]}", loss="{kind: dpo, loss_type: ipo}")
    assert "50 (beta 0.01), 0.5 (beta 1)" in of(loss_advice(squared, scores([0.1])), "beta").text


def test_every_loss_of_the_search_gets_its_advice() -> None:
    spec = sweep("{loss.kind: [simpo, orpo, cpo, simper], training.learning_rate: [3e-4, 1e-3]}", loss="{kind: simpo}")
    assert [loss.kind for loss in losses_of(spec)] == ["simpo", "orpo", "cpo", "simper"]
    lines = loss_advice(spec, scores(np.random.default_rng(0).normal(0.0, 0.3, 100)))
    assert {line.topic for line in lines} == {"beta", "margin", "weights", "loss"}


# --- the pairs -------------------------------------------------------------------------------------------------------


def test_pairs_right_already_lengths_and_duplicates() -> None:
    longer = scores([0.5] * 95 + [-0.5] * 5, tokens=40, rejected_tokens=10, repetition=Repetition(0.5, 0.1, 0.0, 100))
    dpo = sweep("{loss.beta: [0.1]}", loss="{kind: dpo}")
    lines = data_advice(longer, losses_of(dpo))
    assert (of(lines, "right already").level, of(lines, "length").level) == ("warning", "warning")
    assert "length_alpha" in of(lines, "length").reason
    assert [line.level for line in lines if line.topic == "near-duplicates"] == ["warning", "warning", "note"]
    averaged = data_advice(longer, losses_of(sweep(GRID)))
    assert of(averaged, "length").level == "note"
    assert all(line.reason for line in (*lines, *averaged))


# --- KTO -------------------------------------------------------------------------------------------------------------


def test_ktos_beta_says_how_far_a_response_moves_until_it_weighs_a_fifth() -> None:
    at = 1 / (1 + math.exp(-KTO_TRAVEL))
    assert at * (1 - at) == pytest.approx(1 / 20)
    made = scores([0.2, -0.1], tokens=30)
    spec = sweep("{loss.beta: [0.001, 0.1, 0.3]}", "{kind: kto}")
    line = of(loss_advice(spec, made), "beta")
    assert f"{KTO_TRAVEL / (0.1 * 30):.2g} (beta 0.1)" in line.text
    assert (line.level, line.value) == ("change", "[0.1, 0.3]")
    assert "2402.01306" in line.sources[0]
    assert of(loss_advice(sweep("{loss.beta: [0.2, 1.0]}", "{kind: kto}"), made), "beta").level == "keep"


@pytest.mark.parametrize(
    ("desirable", "undesirable", "loss", "yaml"),
    [
        (100, 100, "", None),
        (140, 100, "", None),
        (160, 100, "", "base.loss.undesirable_weight: 1.6"),
        (100, 1000, "", "base.loss.desirable_weight: 10"),
        (100, 1000, ", desirable_weight: 13.33", None),
        (100, 1000, ", undesirable_weight: 0.09", None),
    ],
)
def test_the_rarer_label_gets_the_weight_that_makes_both_equal(
    desirable: int, undesirable: int, loss: str, yaml: str | None
) -> None:
    spec = sweep("{loss.beta: [0.1]}", f"{{kind: kto{loss}}}")
    (line,) = weight_advice(spec, desirable, undesirable)
    assert (line.level, line.yaml) == ("keep" if yaml is None else "change", yaml)
    assert not list(weight_advice(sweep("{loss.beta: [2.0]}"), desirable, undesirable))


def test_rows_with_one_response_have_no_gaps_and_get_no_advice_from_them() -> None:
    made = scores([0.0, 0.0, 0.0], tokens=[10, 0, 0], rejected_tokens=[0, 6, 8])
    assert (made.paired, made.labels, made.mean_tokens) == (False, (1, 2), 8.0)
    lines = data_advice(made, losses_of(sweep("{loss.beta: [0.1]}", "{kind: kto}")))
    assert of(lines, "right already").text == "rows with one response each: no pair to rank"
    assert "desirable 10 tokens, undesirable 7" in of(lines, "length").text
