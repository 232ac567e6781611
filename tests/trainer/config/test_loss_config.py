"""Combinations without meaning, and other programs' names, are refused when a configuration is read."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tests.support.objectives import OBJECTIVES
from trainer.config.loss_aliases import PARAMETER_ALIASES
from trainer.config.loss_config import CpoLoss, DpoLoss, LossConfig, OrpoLoss, SimpoLoss
from trainer.config.trial import TrialConfig

LOSS: TypeAdapter[Any] = TypeAdapter(LossConfig)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kind": "simpo", "gamma": 1.0, "gamma_beta_ratio": 0.5}, "are one setting"),
    ({"kind": "simpo", "loss_type": "hinge", "label_smoothing": 0.1}, "not used by loss_type hinge"),
    ({"kind": "simpo", "label_smoothing": 0.5}, "less than 0.5"),
    ({"kind": "simpo", "sft_weight": 0.1, "nll_scale": 0.1}, "two names of one weight"),
    ({"kind": "simpo", "beta": 0.0}, "greater than 0"),
    ({"kind": "simpo", "alpha": float("nan")}, "finite"),
    ({"kind": "simpo", "simpo_gamma": 1.0}, "is called gamma here"),
    ({"kind": "simpo", "cpo_alpha": 1.0}, "is called sft_weight here"),
    ({"kind": "dpo", "loss_type": "robust", "label_smoothing": 0.5}, "less than 0.5"),
    ({"kind": "dpo", "loss_type": "exo_pair"}, "label_smoothing must be above 0"),
    ({"kind": "dpo", "label_smoothing": 0.1}, "not used by sigmoid; use robust"),
    ({"kind": "dpo", "loss_type": ["ipo", "hinge"], "label_smoothing": 0.1}, "not used by ipo, hinge; remove it"),
    ({"kind": "dpo", "loss_type": ["ipo", "hing"]}, "no loss type: hing; it must be some of sigmoid, "),
    ({"kind": "dpo", "loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "not used by nca_pair"),
    ({"kind": "dpo", "loss_type": ["sigmoid", "aot"], "f_divergence_type": "js_divergence"}, "not used by"),
    ({"kind": "dpo", "loss_type": "sft", "f_divergence_type": "js_divergence"}, "not used by sft"),
    ({"kind": "dpo", "f_alpha_divergence_coef": 0.7}, "only with f_divergence_type alpha_divergence"),
    ({"kind": "dpo", "discopop_tau": 0.1}, "not used by sigmoid"),
    ({"kind": "dpo", "dpop_lambda": 5.0}, "dpop_lambda is not used by sigmoid"),
    ({"kind": "dpo", "loss_type": "dpop", "f_divergence_type": "forward_kl"}, "not used by dpop"),
    ({"kind": "dpo", "chipo_r_max": 1.0}, "chipo_r_max is not used by sigmoid"),
    ({"kind": "dpo", "lambda": 5.0}, "dpop_lambda"),
    ({"kind": "dpo", "loss_type": ["sigmoid", "ipo"], "length_alpha": 0.1}, "length_alpha is not used by sigmoid, ipo"),
    ({"kind": "dpo", "rdpo_alpha": 0.1}, "is called length_alpha here"),
    ({"kind": "dpo", "alpha": 0.1}, "length_alpha"),
    ({"kind": "dpo", "alpha": 0.1}, "ODPO's odpo_alpha"),
    ({"kind": "dpo", "offset": 1.0}, "is called odpo_alpha here"),
    ({"kind": "dpo", "loss_type": "ipo", "odpo_alpha": 1.0}, "odpo_alpha is not used by ipo: only with sigmoid"),
    ({"kind": "dpo", "loss_type": ["sigmoid", "hinge"], "odpo_alpha": 1.0}, "odpo_alpha is not used by sigmoid, hinge"),
    ({"kind": "dpo", "odpo_alpha": -1.0}, "greater than or equal to 0"),
    ({"kind": "dpo", "odpo_scale": "identity"}, "only with odpo_alpha above 0"),
    ({"kind": "dpo", "tau": 0.1}, "ref_model_sync_steps"),
    ({"kind": "dpo", "loss_type": "sft", "sync_ref_model": True}, "which has no reference"),
    ({"kind": "dpo", "ref_model_sync_steps": 64}, "ref_model_sync_steps is used only with sync_ref_model: true"),
    ({"kind": "dpo", "ref_model_mixup_alpha": 1.0}, "ref_model_mixup_alpha is used only with sync_ref_model: true"),
    ({"kind": "dpo", "sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, "greater than 0"),
    ({"kind": "dpo", "sync_ref_model": True, "ref_model_sync_steps": 0}, "equal to 1"),
    ({"kind": "simpo", "sync_ref_model": True}, "belongs to TR-DPO"),
    ({"kind": "orpo", "odpo_alpha": 1.0}, "belongs to ODPO"),
    ({"kind": "dpo", "loss_type": "aot", "use_weighting": True}, "which aot does not have"),
    ({"kind": "dpo", "loss_type": ["sigmoid", "sft"], "use_weighting": True}, "use nll_scale"),
    ({"kind": "dpo", "loss_type": ["sigmoid", "sft"], "nll_scale": 0.1}, "the same term"),
    ({"kind": "dpo", "loss_type": "sft", "ld_alpha": 0.5}, "not used by sft"),
    ({"kind": "dpo", "loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "loss_weights: 1 for 2 loss types"),
    ({"kind": "dpo", "loss_type": ["sigmoid", "sigmoid"]}, "a loss twice"),
    ({"kind": "dpo", "loss_type": []}, "loss_type is empty"),
    ({"kind": "dpo", "loss_weights": [0.0]}, "greater than 0"),
    ({"kind": "dpo", "ld_alpha": 1.5}, "less than or equal to 1"),
    ({"kind": "dpo", "loss_type": "aot_pair"}, "write aot_unpaired"),
    ({"kind": "dpo", "loss_type": "kto_pair"}, "removed from TRL"),
    ({"kind": "dpo", "loss_type": "simpo"}, "loss.kind simpo"),
    ({"kind": "dpo", "loss_type": "sigmoyd"}, "sigmoid"),
    ({"kind": "dpo", "rpo_alpha": 1.0}, "is written nll_scale here"),
    ({"kind": "dpo", "reference_free": True}, "loss.kind cpo"),
    ({"kind": "cpo", "cpo_alpha": 1.0}, "is called nll_scale here"),
    ({"kind": "cpo", "loss_type": "simpo"}, "loss.kind simpo"),
    ({"kind": "cpo", "loss_type": "ipo", "label_smoothing": 0.1}, "not used by loss_type ipo"),
    ({"kind": "orpo", "lambda": 0.1}, "is called beta here"),
    ({"kind": "orpo", "orpo_lambda": 0.1}, "never used it"),
    ({"kind": "simpo", "rpo_alpha": 1.0}, "is called sft_weight here"),
    ({"kind": "simpo", "ld_alpha": 0.5}, "loss.kind dpo with ld_alpha"),
    ({"kind": "dpo", "gamma": 1.0}, "belongs to SimPO"),
    ({"kind": "dpo", "sft_weight": 1.0}, "write nll_scale"),
    ({"kind": "dpo", "orpo_lambda": 1.0}, "belongs to ORPO"),
    ({"kind": "cpo", "rpo_alpha": 1.0}, "is called nll_scale here"),
    ({"kind": "orpo", "cpo_alpha": 1.0}, "is called nll_scale here"),
    ({"kind": "simper", "beta": 2.0}, "is no parameter of SimPER"),
    ({"kind": "simper", "sft_weight": 0.1}, "write nll_scale"),
    ({"kind": "simpo", "loss_type": "SimPER"}, "loss.kind simper"),
    ({"kind": "dpo", "loss_type": "simper"}, "loss.kind simper"),
    ({"kind": "dpo", "loss_type": "kto"}, "loss.kind kto"),
    ({"kind": "dpo", "desirable_weight": 1.3}, "belongs to KTO"),
    ({"kind": "kto", "lambda_d": 1.3}, "desirable_weight"),
    ({"kind": "kto", "desirable_weight": 0, "undesirable_weight": 0}, "both 0"),
    ({"kind": "bco"}, "does not match any of the expected tags"),
]


@pytest.mark.parametrize(("given", "sentence"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_with_a_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        LOSS.validate_python(given)


@pytest.mark.parametrize("kind", PARAMETER_ALIASES)
def test_no_old_name_is_a_parameter(kind: str) -> None:
    assert not type(LOSS.validate_python({"kind": kind})).model_fields.keys() & PARAMETER_ALIASES[kind].keys()


def test_an_old_name_is_told_at_its_place_and_hides_no_other_mistake() -> None:
    with pytest.raises(ValidationError) as caught:
        LOSS.validate_python({"kind": "dpo", "rpo_alpha": 1.0, "beta": -1.0, "bta": 1.0})
    assert {error["loc"] for error in caught.value.errors()} == {("dpo", key) for key in ("rpo_alpha", "beta", "bta")}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_survives_json(name: str) -> None:
    loss = OBJECTIVES[name]
    assert LOSS.validate_json(LOSS.dump_json(loss)) == loss


def test_a_list_of_one_is_that_one() -> None:
    assert DpoLoss.model_validate({"loss_type": ["ipo"]}) == DpoLoss(loss_type="ipo")
    mixture = DpoLoss.model_validate({"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.1]})
    assert mixture.terms == (("sigmoid", 1.0), ("sft", 0.1))


def trial(loss: LossConfig, **training: Any) -> TrialConfig:
    return TrialConfig.model_validate({"model": "m", "data": {"train": "t.jsonl"}, "loss": loss, "training": training})


def test_a_loss_over_pairs_needs_more_than_one() -> None:
    with pytest.raises(ValidationError, match="at least 2"):
        trial(DpoLoss(loss_type="aot"), pairs_per_update=1)
    assert trial(DpoLoss(loss_type="aot"), pairs_per_update=2).loss.couples_pairs
    assert not trial(DpoLoss(), pairs_per_update=1).loss.couples_pairs


def test_two_names_of_the_sft_weight_are_one_point() -> None:
    by_either = [trial(SimpoLoss(**{name: 0.4})) for name in ("sft_weight", "nll_scale")]
    assert by_either[0].canonical_params() == by_either[1].canonical_params()
    assert by_either[0].flat_params()["loss.nll_scale"] == 0.4


def test_defaults_are_those_of_the_papers() -> None:
    assert (CpoLoss().beta, CpoLoss().nll_scale) == (0.1, 1.0)
    assert (OrpoLoss().beta, OrpoLoss().nll_scale, OrpoLoss().nll_prompt) == (0.1, 1.0, True)
    assert (DpoLoss().beta, DpoLoss().terms) == (0.1, (("sigmoid", 1.0),))
    assert (SimpoLoss().beta, SimpoLoss().gamma_over_beta, SimpoLoss().cross_entropy_weight) == (2.0, 0.25, 0.0)
