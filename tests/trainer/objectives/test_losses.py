"""The objectives against worked numbers, independent formulas and what must hold of any of them."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.objectives import OBJECTIVES, evaluate, pair_logps, random_logps, update_totals
from tests.support.objectives import test_every_class_of_the_union_has_an_example as test_every_class  # noqa: F401
from trainer.config.loss_config import (
    LENGTH_TERMS,
    OWN_TERMS,
    SMOOTHED_TERMS,
    CpoLoss,
    DpoLoss,
    DpoLossType,
    KtoLoss,
    LossConfig,
    OrpoLoss,
    SftLoss,
    SimperLoss,
    SimpoLoss,
)
from trainer.objectives.dpo_terms import chi_squared_link
from trainer.objectives.losses import pair_loss, required_stats
from trainer.objectives.pair_logps import (
    PairLogps,
    UpdateTotals,
    log_ratio_sums,
    merge_sums,
    metric_means,
    metric_sums,
)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


# --- worked numbers --------------------------------------------------------------------------------------------------
def test_first_worked_example_of_the_simpo_guide() -> None:
    """Averages -1.2 and -2.5, beta 2, gamma 1: margin 1.6, sigmoid 0.832, loss 0.184."""
    logps = pair_logps([-24.0], [-50.0], [20], [20])
    terms = evaluate(SimpoLoss(beta=2.0, gamma=1.0), logps)
    assert float(terms.loss) == pytest.approx(0.183901, abs=1e-6)
    assert math.exp(-float(terms.loss)) == pytest.approx(0.832018, abs=1e-6)
    assert float(terms.chosen_rewards) == pytest.approx(-2.4)
    assert float(terms.rejected_rewards) == pytest.approx(-5.0)


def test_second_worked_example_with_the_guides_error_corrected() -> None:
    """Beta 2.5 with gamma/beta 0.5 gives 0.126928; the guide carried 0.184 over from beta 2. With SFT 0.1: 0.246928."""
    logps = pair_logps([-24.0], [-50.0], [20], [20])
    assert float(evaluate(SimpoLoss(beta=2.5, gamma_beta_ratio=0.5), logps).loss) == pytest.approx(0.126928, abs=1e-6)
    with_sft = evaluate(SimpoLoss(beta=2.5, gamma_beta_ratio=0.5, sft_weight=0.1), logps)
    assert float(with_sft.loss) == pytest.approx(0.246928, abs=1e-6)
    assert float(with_sft.chosen_rewards - with_sft.rejected_rewards) == pytest.approx(3.25)
    # The guide's total, 0.304, is what beta 2 gives.
    at_two = evaluate(SimpoLoss(beta=2.0, gamma_beta_ratio=0.5, sft_weight=0.1), logps)
    assert float(at_two.loss) == pytest.approx(0.303901, abs=1e-6)


def test_gamma_is_divided_by_beta() -> None:
    """Subtracting gamma itself from the averages' gap, as the guide's step 2 writes, would give 0.437488."""
    logps = pair_logps([-24.0], [-50.0], [20], [20])
    assert -log_sigmoid(2 * (1.3 - 1.0)) == pytest.approx(0.437488, abs=1e-6)
    assert float(evaluate(SimpoLoss(beta=2.0, gamma=1.0), logps).loss) != pytest.approx(0.437488, abs=1e-3)


def test_gradient_of_the_guide() -> None:
    """d(loss)/d(z) at z = 0.8 (gap minus gamma/beta), beta 2, smoothing 0.1, from the guide: -0.135963 times beta."""
    z = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    logps = PairLogps(z + 0.5 - 1.0, -torch.ones(1, dtype=torch.float64), torch.ones(1), torch.ones(1))
    pair_loss(SimpoLoss(beta=2.0, gamma=1.0, label_smoothing=0.1), logps, UpdateTotals(1, 1)).loss.backward()
    assert z.grad is not None
    expected = 2.0 * (0.1 - (1 - 1 / (1 + math.exp(-1.6))))
    assert float(z.grad) == pytest.approx(expected, abs=1e-9)
    assert float(z.grad) == pytest.approx(-0.135963, abs=1e-6)


@pytest.mark.parametrize(("gamma", "value"), [(1.0, 1.3133), (1.375, 1.6004), (3.0, 3.0486), (5.0, 5.0067)])
def test_simpo_at_equal_logps_is_softplus_of_gamma(gamma: float, value: float) -> None:
    logps = pair_logps([-10.0], [-20.0], [10], [20])
    assert float(evaluate(SimpoLoss(beta=2.5, gamma=gamma), logps).loss) == pytest.approx(value, abs=1e-4)


def test_kto_before_the_first_step_and_worked_numbers() -> None:
    """Log-ratios 2 and -2, beta 0.1. KL 0: 1 - sigmoid(0.2) for both; KL 3: sigmoid(0.1) and sigmoid(-0.5)."""
    start = pair_logps([-20.0], [-30.0], [20], [20], ([-20.0], [-30.0]))
    logps = pair_logps([-18.0], [-22.0], [20], [20], ([-20.0], [-20.0]))

    def value(given: PairLogps, kl: float, loss: KtoLoss) -> float:
        assert given.reference is not None
        reference = replace(given.reference, kl=torch.full((1,), kl, dtype=torch.float64))
        return float(evaluate(loss, replace(given, reference=reference)).loss)

    assert value(start, 0.0, KtoLoss(desirable_weight=3.0)) == pytest.approx(1.0)
    assert value(logps, 0.0, KtoLoss()) == pytest.approx(0.450166, abs=1e-6)
    assert value(logps, 3.0, KtoLoss()) == pytest.approx((0.524979 + 0.377541) / 2, abs=1e-6)
    assert value(logps, 3.0, KtoLoss(loss_type="apo_zero_unpaired")) == pytest.approx(0.450166, abs=1e-6)
    with pytest.raises(ValueError, match="estimate of the KL divergence"):
        evaluate(KtoLoss(), logps)


def test_the_kl_estimate_is_the_mean_over_both_sides_and_never_below_0() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    frozen = PairLogps(-ones, -ones, ones, ones, mismatched_chosen=-3 * ones, mismatched_rejected=-5 * ones)
    rising = replace(frozen, mismatched_chosen=-ones, mismatched_rejected=-4 * ones, reference=frozen)
    falling = replace(frozen, mismatched_chosen=-ones, mismatched_rejected=-8 * ones, reference=frozen)
    for logps, expected in ((rising, 1.5), (falling, 0.0)):
        reference = logps.with_kl().reference
        assert reference is not None
        assert reference.kl is not None
        assert reference.kl.tolist() == [expected, expected]
    with pytest.raises(ValueError, match="mismatched responses"):
        replace(frozen, mismatched_chosen=None, reference=frozen).with_kl()


def test_dpo_table_value_and_step_zero() -> None:
    logps = pair_logps([-18.0], [-22.0], [20], [20], ([-20.0], [-20.0]))
    assert float(evaluate(DpoLoss(beta=0.1), logps).loss) == pytest.approx(0.513015, abs=1e-6)
    start = pair_logps([-20.0], [-30.0], [20], [20], ([-20.0], [-30.0]))
    terms = evaluate(DpoLoss(beta=0.1), start)
    assert float(terms.loss) == pytest.approx(math.log(2))
    # Ties count as wrong, as in TRL: accuracy 0 before the first step.
    assert metric_means(metric_sums(terms))["rewards/accuracies"] == 0.0


TABLE: dict[DpoLossType, tuple[float, dict[str, float]]] = {
    "sigmoid": (0.513015, {}),
    "sigmoid_norm": (0.683197, {}),
    "hinge": (0.6, {}),
    "ipo": (23.04, {}),
    "robust": (0.463015, {"label_smoothing": 0.1}),
    "exo_pair": (2.099226, {"label_smoothing": 1e-3}),
    "nca_pair": (1.296278, {}),
    "bco_pair": (1.196278, {}),
    "sppo_hard": (18.0, {}),
    "aot": (0.513015, {}),
    "aot_unpaired": (0.513015, {}),
    "apo_zero": (0.900332, {}),
    "apo_down": (0.951146, {}),
    "discopop": (0.670267, {}),
    "sft": (18 / 20, {}),
}


@pytest.mark.parametrize("term", TABLE)
def test_dpo_terms_have_the_values_that_trl_gave(term: DpoLossType) -> None:
    """Log-ratios 2 and -2, beta 0.1, 20 tokens; run with TRL 1.16. A sort of one pair sorts nothing: aot is sigmoid."""
    value, options = TABLE[term]
    logps = pair_logps([-18.0], [-22.0], [20], [20], ([-20.0], [-20.0]))
    found = evaluate(DpoLoss(loss_type=term, beta=0.1, **options), logps).loss
    assert float(found) == pytest.approx(value, abs=1e-6)


def test_the_table_has_every_term_of_trl() -> None:
    assert TABLE.keys() == set(get_args(DpoLossType)) - OWN_TERMS


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (DpoLoss(), 0.6931),
        (DpoLoss(loss_type="dpop"), 0.6931),
        (DpoLoss(loss_type="chipo"), 0.6931),
        (DpoLoss(loss_type="robust", label_smoothing=0.1), 0.6931),
        (DpoLoss(loss_type="ipo", beta=0.1), 25.0),
        (DpoLoss(loss_type="sppo_hard", beta=0.1), 50.0),
    ],
)
def test_dpo_terms_before_the_first_step(loss: DpoLoss, value: float) -> None:
    logps = pair_logps([-20.0], [-30.0], [20], [20], ([-20.0], [-30.0]))
    assert float(evaluate(loss, logps).loss) == pytest.approx(value, abs=1e-4)


def test_a_mixture_is_the_weighted_sum_of_its_terms() -> None:
    logps = random_logps(5)
    mixture = DpoLoss(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.5))
    parts = [evaluate(DpoLoss(loss_type=term), logps).loss for term in ("sigmoid", "bco_pair", "sft")]
    expected = 0.8 * parts[0] + 0.2 * parts[1] + 1.5 * parts[2]
    assert float(evaluate(mixture, logps).loss) == pytest.approx(float(expected))
    unweighted = DpoLoss(loss_type=("sigmoid", "bco_pair"))
    assert float(evaluate(unweighted, logps).loss) == pytest.approx(float(parts[0] + parts[1]))


_WITHOUT_NLL = [SimpoLoss(), DpoLoss(), CpoLoss(nll_scale=0), OrpoLoss(nll_scale=0), SimperLoss(), KtoLoss()]


@pytest.mark.parametrize("loss", _WITHOUT_NLL, ids=str)
def test_nll_scale_adds_the_cross_entropy_per_chosen_token(loss: LossConfig) -> None:
    logps = random_logps(5)
    scaled = loss.model_copy(update={"nll_scale": 0.3, **({"nll_prompt": False} if loss.kind == "orpo" else {})})
    nll = float(-logps.chosen.sum() / logps.chosen_tokens.sum())
    assert float(evaluate(scaled, logps).loss - evaluate(loss, logps).loss) == pytest.approx(0.3 * nll)


@settings(max_examples=60, deadline=None)
@given(a=st.floats(-20, 20), d=st.floats(-20, 20), weight=st.floats(0, 100))
def test_dpop_is_dpo_where_the_chosen_response_does_not_fall(a: float, d: float, weight: float) -> None:
    logps = pair_logps([a], [d], [5], [9], ([0.0], [0.0]))
    dpo = evaluate(DpoLoss(), logps)
    dpop = evaluate(DpoLoss(loss_type="dpop", dpop_lambda=weight), logps)
    assert torch.equal(dpop.chosen_rewards, dpo.chosen_rewards)
    if a >= 0 or weight == 0:
        assert torch.equal(dpop.loss, dpo.loss)
    else:
        assert float(dpop.loss) == pytest.approx(-log_sigmoid(0.1 * (a - d + weight * a)), rel=1e-9, abs=1e-12)
        assert dpop.loss >= dpo.loss


@pytest.mark.parametrize("term", sorted(LENGTH_TERMS))
def test_the_length_term_shifts_the_reward_difference_by_alpha_a_token(term: DpoLossType) -> None:
    """Of 5 against 9 tokens: as if the log-ratio of the chosen response were -4 alpha / beta larger."""
    options = {"label_smoothing": 0.1} if term in SMOOTHED_TERMS else {}
    loss = DpoLoss(loss_type=term, beta=0.2, length_alpha=0.1, dpop_lambda=0.0 if term == "dpop" else 50.0, **options)
    plain = loss.model_copy(update={"length_alpha": 0.0})
    terms = evaluate(loss, pair_logps([3.0], [-2.0], [5], [9], ([0.0], [0.0])))
    shifted = evaluate(plain, pair_logps([3.0 - 4 * 0.1 / 0.2], [-2.0], [5], [9], ([0.0], [0.0])))
    assert float(terms.loss) == pytest.approx(float(shifted.loss), rel=1e-12)
    # Its rewards are those of DPO, so that margins can be compared.
    dpo = evaluate(plain, pair_logps([3.0], [-2.0], [5], [9], ([0.0], [0.0])))
    assert torch.equal(terms.chosen_rewards, dpo.chosen_rewards)


def test_alpha_zero_is_dpo_and_a_longer_chosen_response_pulls_less() -> None:
    logps = random_logps(6)
    assert torch.equal(evaluate(DpoLoss(length_alpha=0.0), logps).loss, evaluate(DpoLoss(), logps).loss)
    pulls: list[float] = []
    for alpha in (0.0, 0.05):
        pair = pair_logps([-9.0], [-9.0], [40], [10], ([-9.0], [-9.0]))
        chosen = pair.chosen.clone().requires_grad_()
        evaluate(DpoLoss(length_alpha=alpha), replace(pair, chosen=chosen)).loss.backward()
        assert chosen.grad is not None
        pulls.append(float(-chosen.grad))
    assert pulls[1] < pulls[0]


@settings(max_examples=60, deadline=None)
@given(a=st.floats(-20, 20), d=st.floats(-20, 20), gap=st.floats(-10, 10), alpha=st.floats(0.01, 3))
def test_the_offset_is_a_margin_that_grows_with_the_gap_of_scores(a: float, d: float, gap: float, alpha: float) -> None:
    logps = pair_logps([a], [d], [5], [9], ([0.0], [0.0]))
    assert logps.reference is not None
    logps = replace(logps, reference=replace(logps.reference, score_gap=torch.tensor([gap], dtype=torch.float64)))
    dpo = evaluate(DpoLoss(), logps)
    for scale, offset in (("log", math.log(gap) if gap > 0 else -math.inf), ("identity", gap)):
        chosen = logps.chosen.clone().requires_grad_()
        odpo = evaluate(DpoLoss(odpo_alpha=alpha, odpo_scale=scale), replace(logps, chosen=chosen))
        assert torch.equal(odpo.chosen_rewards, dpo.chosen_rewards)
        odpo.loss.backward()
        assert chosen.grad is not None
        if offset == -math.inf:  # equal scores, or a lower one for chosen: the pair counts for nothing
            assert (float(odpo.loss.detach()), float(chosen.grad)) == (0.0, 0.0)
        else:
            margin = 0.1 * (a - d) - alpha * offset
            assert float(odpo.loss.detach()) == pytest.approx(-log_sigmoid(margin), rel=1e-9, abs=1e-12)
            assert float(odpo.loss.detach() - dpo.loss) * offset >= 0
    assert torch.equal(evaluate(DpoLoss(odpo_alpha=0.0), logps).loss, dpo.loss)


def test_the_offset_needs_scores() -> None:
    logps = pair_logps([-9.0], [-9.0], [5], [9], ([-9.0], [-9.0]))
    with pytest.raises(ValueError, match="odpo_alpha needs the gaps"):
        evaluate(DpoLoss(odpo_alpha=1.0), logps)


@settings(max_examples=60, deadline=None)
@given(a=st.floats(-60, 60), more=st.floats(1e-3, 60), d=st.floats(-10, 10))
def test_the_link_of_chipo_is_strictly_increasing(a: float, more: float, d: float) -> None:
    low, high = (float(chi_squared_link(torch.tensor(x, dtype=torch.float64))) for x in (a, a + more))
    assert low < high
    assert low == pytest.approx(math.exp(min(a, 20)) + a, rel=1e-12, abs=1e-12)
    # So pairs are ordered as by DPO, whose rewards it has.
    chipo, dpo = (
        evaluate(DpoLoss(loss_type=term), pair_logps([a], [d], [5], [9], ([0.0], [0.0])))
        for term in ("chipo", "sigmoid")
    )
    assert torch.equal(chipo.chosen_rewards, dpo.chosen_rewards)
    if abs(a - d) > 1e-3:
        assert (chipo.loss < math.log(2)) == (dpo.loss < math.log(2))


def test_chipo_near_the_reference_is_dpo_of_twice_beta_and_beyond_its_limit_still() -> None:
    def pull(loss: DpoLoss, ratio: float) -> float:
        logps = pair_logps([ratio - 10], [-ratio - 10], [5], [9], ([-10.0], [-10.0]))
        chosen = logps.chosen.clone().requires_grad_()
        evaluate(loss, replace(logps, chosen=chosen)).loss.backward()
        assert chosen.grad is not None
        return float(-chosen.grad)

    assert pull(DpoLoss(loss_type="chipo"), 0.0) == pytest.approx(pull(DpoLoss(beta=0.2), 0.0), rel=1e-12)
    limited = DpoLoss(loss_type="chipo", chipo_r_max=1.0)
    assert pull(limited, 1.0) == pull(DpoLoss(loss_type="chipo"), 1.0) > 0
    assert (pull(limited, 4.0), pull(limited, -4.0)) == (0.0, 0.0)
    assert pull(DpoLoss(loss_type="chipo"), 4.0) > 0


def test_simper_is_the_difference_of_inverse_perplexities() -> None:
    """Per token -1.2 and -2.5: e^-2.5 - e^-1.2. Its reward is the average itself, and its loss lies within 1 of 0."""
    terms = evaluate(SimperLoss(), pair_logps([-24.0], [-50.0], [20], [20]))
    assert float(terms.loss) == pytest.approx(math.exp(-2.5) - math.exp(-1.2), rel=1e-12)
    assert (float(terms.chosen_rewards), float(terms.rejected_rewards)) == (pytest.approx(-1.2), pytest.approx(-2.5))
    found = metric_means(metric_sums(evaluate(SimperLoss(), random_logps(6))))
    assert found["rewards/margins"] == pytest.approx(found["margins/logp"], rel=1e-12)
    assert found["rewards/accuracies"] == found["accuracies/logp"]
    for scale in (1e-6, 1.0, 1e6):
        assert abs(float(evaluate(SimperLoss(), random_logps(9, per_token=scale)).loss)) <= 1


def test_orpo_worked_numbers() -> None:
    """Per token -1.2 and -2.5: log odds ratio 1.573 on averages, loss 0.1885 with beta 1; with sums it would be 26."""
    logps = replace(
        pair_logps([-24.0], [-50.0], [20], [20]), prompt=torch.tensor([-30.0]), prompt_tokens=torch.tensor([10])
    )
    terms = evaluate(OrpoLoss(beta=1.0, nll_scale=0.0), logps)
    assert float(terms.extra["log_odds_chosen"]) == pytest.approx(1.573, abs=1e-3)
    assert float(terms.loss) == pytest.approx(0.1885, abs=1e-4)
    assert float(evaluate(OrpoLoss(beta=1.0), logps).loss - terms.loss) == pytest.approx(54 / 30)
    assert float(evaluate(OrpoLoss(beta=1.0, nll_prompt=False), logps).loss - terms.loss) == pytest.approx(24 / 20)


def test_alphapo_goes_to_simpo_as_alpha_goes_to_zero() -> None:
    logps = random_logps(4)
    plain = evaluate(SimpoLoss(beta=2.0, gamma=0.5), logps)
    near = evaluate(SimpoLoss(beta=2.0, gamma=0.5, alpha=1e-6), logps)
    assert float(near.loss) == pytest.approx(float(plain.loss), rel=1e-5)
    # (1 - p^-alpha) / alpha at p = e^-1.2, alpha 0.5
    one = pair_logps([-24.0], [-24.0], [20], [20])
    shaped = evaluate(SimpoLoss(beta=2.0, gamma=0.5, alpha=0.5), one)
    assert float(shaped.chosen_rewards) == pytest.approx(2.0 * (1 - math.exp(0.6)) / 0.5)
    assert float(shaped.chosen_logps) == pytest.approx(-1.2)


def test_one_name_more_for_the_sft_weight() -> None:
    logps = random_logps(3)
    by_either = [evaluate(SimpoLoss(**{name: 0.4}), logps).loss for name in ("sft_weight", "nll_scale")]
    assert torch.equal(*by_either)


def test_hinge_against_the_formula() -> None:
    logps = pair_logps([-10.0, -30.0], [-40.0, -8.0], [10, 15], [20, 8])
    loss = SimpoLoss(loss_type="hinge", beta=2.0, gamma=1.0)
    expected = [max(0.0, 1 - 2.0 * (-1.0 + 2.0 - 0.5)), max(0.0, 1 - 2.0 * (-2.0 + 1.0 - 0.5))]
    assert float(evaluate(loss, logps).loss) == pytest.approx(sum(expected) / 2)


def test_sft_is_the_mean_over_tokens_not_over_sequences() -> None:
    logps = pair_logps([-10.0, -90.0], [-1.0, -1.0], [10, 30], [1, 1])
    assert float(evaluate(SftLoss(), logps).loss) == pytest.approx(100 / 40)
    simpo = evaluate(SimpoLoss(beta=2.0, gamma=1.0, sft_weight=0.5), logps)
    plain = evaluate(SimpoLoss(beta=2.0, gamma=1.0), logps)
    assert float(simpo.loss - plain.loss) == pytest.approx(0.5 * 100 / 40)


# --- what must hold of any objective ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name: str) -> None:
    loss, logps = OBJECTIVES[name], random_logps(4, seed=3)
    totals = update_totals(logps)

    def value(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        # WPO's weights are constants by definition: collision log-probs that move along hold them still.
        collisions = {
            "chosen_collision_logp": logps.chosen_collision_logp + chosen - logps.chosen,
            "rejected_collision_logp": logps.rejected_collision_logp + rejected - logps.rejected,
        }
        return pair_loss(loss, replace(logps, chosen=chosen, rejected=rejected, **collisions), totals).loss

    inputs = (logps.chosen.clone().requires_grad_(), logps.rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("name", [name for name, loss in OBJECTIVES.items() if not required_stats(loss).couples_pairs])
def test_micro_batches_add_up(name: str) -> None:
    """Of every objective that does not couple the pairs of an update by definition."""
    loss, logps = OBJECTIVES[name], random_logps(7, seed=1)
    totals = update_totals(logps)
    full = pair_loss(loss, logps, totals)
    parts = [pair_loss(loss, logps.select(part), totals) for part in (slice(0, 1), slice(1, 5), slice(5, 7))]
    assert float(sum(part.loss for part in parts)) == pytest.approx(float(full.loss), rel=1e-12)
    together = metric_means(merge_sums(metric_sums(part) for part in parts))
    assert together == pytest.approx(metric_means(metric_sums(full)), rel=1e-12)
    assert together["loss"] == pytest.approx(float(full.loss), rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [1e-6, 1e3, 1e6])
def test_finite_at_extremes(name: str, scale: float) -> None:
    loss, logps = OBJECTIVES[name], random_logps(4, seed=2, per_token=scale)
    chosen = logps.chosen.clone().requires_grad_()
    terms = evaluate(loss, replace(logps, chosen=chosen))
    terms.loss.backward()
    assert torch.isfinite(terms.loss)
    assert chosen.grad is not None
    assert torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_missing_reference_is_an_error(name: str) -> None:
    logps = replace(random_logps(2), reference=None)
    if required_stats(OBJECTIVES[name]).reference:
        with pytest.raises(ValueError, match="reference log-probs"):
            evaluate(OBJECTIVES[name], logps)
    else:
        assert torch.isfinite(evaluate(OBJECTIVES[name], logps).loss)


RANKING = (
    "simpo", "simpo-sft", "simpo-hinge", "alphapo", "dpo-sigmoid", "dpo-sigmoid_norm", "dpo-hinge", "dpo-bco_pair",
    "dpo-apo_zero", "dpo-discopop", "dpo-aot_unpaired", "dpo-sft", "dpo-mixture", "dpo-nll", "dpo-forward-kl", "dpo-js",
    "dpo-alpha", "dpo-alpha-one", "dpo-ld", "dpo-length", "dpo-offset", "dpo-offset-identity", "dpo-moving", "dpo-dpop",
    "dpo-chipo", "dpo-chipo-limited", "cpo", "cpo-hinge", "orpo", "orpo-response", "simper", "simper-nll", "sft",
)  # fmt: skip
"""Objectives that only push apart. The others pull towards a target gap (ipo, sppo, smoothed ones), or push the chosen
response down as well by their formula (nca, apo_down, exo)."""


def reads_log_ratios_only(loss: LossConfig) -> bool:
    """Whether policy and reference enter the loss by their difference alone."""
    if loss.kind == "kto" and loss.nll_scale:
        return False
    if loss.kind == "dpo" and (loss.nll_scale or loss.use_weighting or "sft" in dict(loss.terms)):
        return False
    return required_stats(loss).reference


@pytest.mark.parametrize("name", [name for name, loss in OBJECTIVES.items() if reads_log_ratios_only(loss)])
@pytest.mark.parametrize("shift", [-30.0, 1e-3, 500.0])
def test_what_policy_and_reference_share_does_not_matter(name: str, shift: float) -> None:
    """Only log-ratios count: a response that both find likelier by the same factor leaves the preference as it is."""
    loss, logps = OBJECTIVES[name], random_logps(5, seed=6)

    def moved(of: PairLogps) -> PairLogps:
        columns = {
            n: c if "tokens" in n or "purity" in n or n in ("prompt", "score_gap", "kl") else c + shift
            for n, c in of.columns().items()
        }
        return PairLogps.from_columns(columns)

    assert logps.reference is not None
    found = evaluate(loss, moved(logps).with_reference(moved(logps.reference)))
    expected = evaluate(loss, logps)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-9)
    torch.testing.assert_close(found.chosen_rewards, expected.chosen_rewards, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dpo-sigmoid", "dpo-sigmoid_norm", "dpo-aot_unpaired", "cpo-smoothed", "simpo"])
def test_mirrored_pairs_mirror_the_gradient(name: str) -> None:
    """Swapping chosen and rejected swaps what they pull, where there is no margin: sigma(-z) against sigma(z)."""
    loss, logps = OBJECTIVES[name], random_logps(1, seed=8)
    if loss.kind == "simpo":
        loss = loss.model_copy(update={"gamma": 0.0})
    pulls: list[torch.Tensor] = []
    for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
        columns = dict(logps.columns())
        frozen = dict(logps.reference.columns()) if logps.reference is not None else {}
        for kind in ("", "_tokens", "_shared"):
            columns[f"chosen{kind}"], columns[f"rejected{kind}"] = (
                logps.columns()[f"{one}{kind}"],
                logps.columns()[f"{other}{kind}"],
            )
            if logps.reference is not None:
                frozen[f"chosen{kind}"], frozen[f"rejected{kind}"] = (
                    logps.reference.columns()[f"{one}{kind}"],
                    logps.reference.columns()[f"{other}{kind}"],
                )
        columns["chosen"] = columns["chosen"].clone().requires_grad_()
        evaluate(loss, PairLogps.from_columns(columns).with_reference(PairLogps.from_columns(frozen))).loss.backward()
        grad = columns["chosen"].grad
        assert grad is not None
        pulls.append(grad * columns["chosen_tokens"] if name in {"simpo", "dpo-sigmoid_norm"} else grad)
    smoothing, beta = getattr(loss, "label_smoothing", 0.0), -getattr(loss, "beta", 1.0)
    # The two pulls are -beta (sigma(-z) - eps) and -beta (sigma(z) - eps): together -beta (1 - 2 eps).
    assert float(pulls[0] + pulls[1]) == pytest.approx(beta * (1 - 2 * smoothing))


@pytest.mark.parametrize("name", RANKING)
def test_a_likelier_chosen_response_never_costs_more(name: str) -> None:
    loss, logps = OBJECTIVES[name], random_logps(6, seed=4)
    chosen, rejected = logps.chosen.clone().requires_grad_(), logps.rejected.clone().requires_grad_()
    evaluate(loss, replace(logps, chosen=chosen, rejected=rejected)).loss.backward()
    assert chosen.grad is not None
    assert (chosen.grad <= 0).all()
    assert rejected.grad is None or (rejected.grad >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    gap=st.floats(-20, 20),
    shift=st.floats(-50, 50),
    beta=st.floats(0.05, 10),
    ratio=st.floats(0, 2),
    tokens=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_simpo_sees_only_the_gap_of_averages(
    gap: float, shift: float, beta: float, ratio: float, tokens: tuple[int, int]
) -> None:
    w, r = tokens
    loss = SimpoLoss(beta=beta, gamma_beta_ratio=ratio, label_smoothing=0.1)
    base = pair_logps([gap * w], [0.0], [w], [r])
    moved = pair_logps([(gap + shift) * w], [shift * r], [w], [r])
    assert float(evaluate(loss, moved).loss) == pytest.approx(float(evaluate(loss, base).loss), rel=1e-6, abs=1e-9)
    # Mirror: swapping the responses and the smoothing's two sides with no margin is the same objective.
    mirrored = -(1 - 0.1) * log_sigmoid(-beta * gap) - 0.1 * log_sigmoid(beta * gap)
    swapped = pair_logps([0.0], [gap * w], [r], [w])
    without = SimpoLoss(beta=beta, gamma_beta_ratio=0.0, label_smoothing=0.1)
    assert float(evaluate(without, swapped).loss) == pytest.approx(mirrored, rel=1e-6, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(a=st.floats(-40, 40), d=st.floats(-40, 40), shift=st.floats(-100, 100), beta=st.floats(0.01, 5))
def test_dpo_sees_only_the_gap_of_log_ratios(a: float, d: float, shift: float, beta: float) -> None:
    loss = DpoLoss(beta=beta)
    base = evaluate(loss, pair_logps([a], [d], [5], [9], ([0.0], [0.0])))
    moved = evaluate(loss, pair_logps([a + shift], [d + 3 * shift], [5], [9], ([shift], [3 * shift])))
    assert float(moved.loss) == pytest.approx(float(base.loss), rel=1e-6, abs=1e-9)
    assert float(base.loss) == pytest.approx(-log_sigmoid(beta * (a - d)), rel=1e-9, abs=1e-12)
    # Mirror: loss(gap) - loss(-gap) = -beta * gap.
    mirrored = evaluate(loss, pair_logps([d], [a], [5], [9], ([0.0], [0.0])))
    assert float(base.loss - mirrored.loss) == pytest.approx(-beta * (a - d), rel=1e-6, abs=1e-9)


# --- metrics ---------------------------------------------------------------------------------------------------------
def test_metrics_follow_each_objectives_convention() -> None:
    logps = pair_logps([-10.0, -30.0], [-40.0, -8.0], [10, 15], [20, 8], ([-12.0, -30.0], [-39.0, -9.0]))
    simpo = metric_means(metric_sums(evaluate(SimpoLoss(beta=2.0, gamma=1.0), replace(logps, reference=None))))
    assert (simpo["logps/chosen"], simpo["rewards/chosen"]) == (pytest.approx(-1.5), pytest.approx(-3.0))
    assert (simpo["rewards/margins"], simpo["rewards/accuracies"]) == (pytest.approx(0.0), 0.5)
    dpo = metric_means(metric_sums(evaluate(DpoLoss(beta=0.1), logps)))
    assert dpo["logps/chosen"] == pytest.approx(-20.0)
    assert dpo["rewards/chosen"] == pytest.approx(0.1 * (2.0 + 0.0) / 2)
    assert dpo["rewards/rejected"] == pytest.approx(0.1 * (-1.0 + 1.0) / 2)
    for found in (simpo, dpo):
        assert (found["margins/logp"], found["accuracies/logp"]) == (pytest.approx(0.0), 0.5)
        assert found["logps_per_token/chosen"] == pytest.approx(-1.5)
        assert (found["nll_loss"], found["lengths/chosen"]) == (pytest.approx(40 / 25), 12.5)
        assert found["lengths/rejected"] == 14.0


def test_metrics_have_names_that_are_known() -> None:
    from trainer.metrics import METRICS

    assert metric_sums(evaluate(DpoLoss(), random_logps())).keys() <= METRICS.keys()


def test_without_rejected_responses_their_metrics_are_absent() -> None:
    logps = pair_logps([-10.0], [0.0], [10], [0])
    found = metric_means(metric_sums(evaluate(SftLoss(), logps)))
    assert found == pytest.approx(
        {"loss": 1.0, "nll_loss": 1.0, "logps/chosen": -10.0, "logps_per_token/chosen": -1.0, "lengths/chosen": 10.0}
    )


def test_metrics_of_rows_with_one_response_are_means_over_those_that_have_it() -> None:
    """Three rows, of which one is undesirable. Log-ratios 2, 4 and -3; beta 0.5, KL 1."""
    logps = pair_logps([-10.0, 0.0, -20.0], [0.0, -9.0, 0.0], [10, 0, 5], [0, 3, 0], ([-12.0, 0, -24], [0, -6.0, 0]))
    assert logps.reference is not None
    logps = replace(logps, reference=replace(logps.reference, kl=torch.ones(3, dtype=torch.float64)))
    totals = UpdateTotals.from_lengths([4, 4, 4], [10, 0, 5], [0, 3, 0])
    assert (totals.single, totals.responses) == (3, 3)
    loss = KtoLoss(beta=0.5, undesirable_weight=2.0)
    sums = [metric_sums(pair_loss(loss, logps.select([i]), totals)) for i in range(3)]
    found = metric_means(merge_sums(sums))
    expected = sum(1 / (1 + math.exp(-z)) for z in (-0.5, -1.5)) + 2 / (1 + math.exp(2.0))
    assert found["loss"] == pytest.approx(expected / 3)
    assert found == pytest.approx(
        {
            "loss": expected / 3,
            "rewards/chosen": 1.5,
            "rewards/rejected": -1.5,
            "rewards/margins": 3.0,
            "logps/chosen": -15.0,
            "logps/rejected": -9.0,
            "kl": 1.0,
            "nll_loss": 2.0,
            "logps_per_token/chosen": -2.5,
            "logps_per_token/rejected": -3.0,
            "margins/logp": 0.5,
            "lengths/chosen": 7.5,
            "lengths/rejected": 3.0,
        }
    )
    # A window without an undesirable response has no metric of one, and no margin.
    one_sided = metric_means(merge_sums([sums[0], sums[2]]))
    assert not {name for name in one_sided if "rejected" in name or "margins" in name}
    assert metric_means(log_ratio_sums(logps, logps.reference)) == pytest.approx(
        {"log_ratio_per_token/chosen": 0.5, "log_ratio_per_token/rejected": -1.0}
    )


def test_a_reference_of_other_pairs_is_refused() -> None:
    mine, other = random_logps(3, seed=1), random_logps(3, seed=2)
    with pytest.raises(ValueError, match="other pairs"):
        mine.with_reference(other)
    assert mine.with_reference(mine.reference).reference is not None


def test_pair_logps_cut_and_joined_are_the_same() -> None:
    logps = random_logps(5)
    joined = PairLogps.concatenate([logps.select([0, 1]), logps.select(slice(2, 5))])
    for name, column in logps.columns().items():
        assert torch.equal(joined.columns()[name], column)
    assert torch.equal(joined.reference.chosen, logps.reference.chosen)
    assert PairLogps.from_columns(logps.columns()).columns().keys() == logps.columns().keys()
