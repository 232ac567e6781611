"""Whatever an architecture draws at random in training mode: found, switched off, named, and kept in what is saved."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.support.small_trials import MODEL, finish, trial
from tests.support.trl_oracle import make_pairs, totals_of
from trainer.config.loss_config import SimpoLoss
from trainer.config.trial import GeneratedModel, ModelConfig
from trainer.forward.pair_model import PairModel
from trainer.models.policy_model import load_model
from trainer.randomness import StillRandom, as_configured, disable_random_modules, switch_off, switched_off
from trainer.results import RunStatus
from trainer.synthetic import generate_model
from trainer.training_session import TrainingSession

H, L = {"hidden_size": 32, "num_attention_heads": 2}, {"num_hidden_layers": 2}
MOE = {**H, **L, "num_key_value_heads": 1, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
DROPS = {"hidden_dropout": 0.3, "attention_dropout": 0.2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "resid_pdrop": 0.3, "embd_pdrop": 0.2}
OPT = {**H, **L, "ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "gpt2": ({**GPT, "attn_pdrop": 0.1}, {"resid_pdrop 0.3", "embd_pdrop 0.2", "attn_pdrop 0.1"}),
    "gptj": ({**GPT, "attn_pdrop": 0.1, "rotary_dim": 8}, {"attn_pdrop 0.1"}),
    "gpt_neo": (
        {**H, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
        | {"attention_dropout": 0.2, "resid_dropout": 0.3, "max_position_embeddings": 128},
        {"attention_dropout 0.2", "resid_dropout 0.3"},
    ),
    "gpt_neox": ({**H, **L, **DROPS, "intermediate_size": 32}, {"hidden_dropout 0.3", "attention_dropout 0.2"}),
    "falcon": ({**H, **L, **DROPS}, {"hidden_dropout 0.3", "attention_dropout 0.2"}),
    "falcon-sequential": ({**H, **L, **DROPS, "parallel_attn": False}, {"attention_dropout 0.2"}),
    "opt": ({**OPT, "dropout": 0.2, "layerdrop": 0.6}, {"dropout 0.2", "layerdrop 0.6"}),
    "biogpt": (
        {**H, **L, "intermediate_size": 32, "layerdrop": 0.5, "activation_dropout": 0.2},
        {"layerdrop 0.5", "activation_dropout 0.2", "hidden_dropout_prob 0.1"},
    ),
    "mpt": (
        {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128, "resid_pdrop": 0.2, "emb_pdrop": 0.3}
        | {"attn_config": {"attn_pdrop": 1}},
        {"resid_pdrop 0.2", "attn_pdrop 1"},
    ),
    "mixtral": ({**MOE, "router_jitter_noise": 0.3}, {"jitter_noise 0.3"}),
    "minimax": ({**MOE, "router_jitter_noise": 0.3, "block_size": 16}, {"jitter_noise 0.3"}),
    "phimoe": ({**MOE, "input_jitter_noise": 0.3, "router_jitter_noise": 0.1}, {"input_jitter_noise 0.3"}),
    "dbrx": (
        {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128, "resid_pdrop": 0.2}
        | {"attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "attn_pdrop": 0.1, "rope_theta": 10000.0}}
        | {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.3}},
        {"resid_pdrop 0.2", "attn_pdrop 0.1", "moe_jitter_eps 0.3"},
    ),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 2, **DROPS}, {"hidden_dropout 0.3"}),
    "llama": ({**H, **L, "intermediate_size": 32, "attention_dropout": 0.2}, {"attention_dropout 0.2"}),
}


def save(case: str, path: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.partition("-")[0], vocab_size=256, **CASES[case][0])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_model_under_training_computes_what_it_computes_at_rest(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Against the model as transformers loads it, in evaluation mode; in two passes with other random numbers."""
    plain, pairs = save(case, tmp_path), make_pairs(3)
    model = load_model(ModelConfig(name_or_path=str(tmp_path)), str(tmp_path), torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        ours = PairModel(model)
    model.requires_grad_(True).train()
    totals = totals_of(pairs)
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        terms = ours.backward(pairs, SimpoLoss(), None, totals, torch.Tensor.backward)
        for index, pair in enumerate(pairs):
            ids = torch.tensor([*pair.prompt, *pair.chosen])[None]
            with torch.no_grad():
                every = plain(ids, use_cache=False).logits[0, len(pair.prompt) - 1 : -1].double().log_softmax(-1)
            expected = every.gather(1, ids[0, len(pair.prompt) :, None]).sum()
            assert float(terms.logps.chosen[index]) == pytest.approx(float(expected), rel=1e-5)
    (messages,) = [r.message for r in caplog.records if "switched off" in r.message]
    assert all(f" {named}" in messages for named in CASES[case][1])
    assert ("kept in eval mode" in caplog.text) == (case == "phimoe")
    if case == "phimoe":
        assert "PhimoeTopKRouter" in caplog.text


def probabilities(tree: dict[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in tree.items() if "drop" in k or "jitter" in k}
    return found | {k: probabilities(v) for k, v in tree.items() if isinstance(v, dict) and probabilities(v)}


@pytest.mark.parametrize("case", ["falcon", "mpt", "mixtral"])
def test_what_is_switched_off_stays_in_the_saved_configuration(case: str, tmp_path: Path) -> None:
    save(case, tmp_path / "start")
    path = str(tmp_path / "start")
    model = load_model(ModelConfig(name_or_path=path), path, torch.device("cpu"))
    with as_configured(model):
        model.save_pretrained(tmp_path / "saved")
    started, saved = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("start", "saved"))
    assert probabilities(saved) == probabilities(started) != {}
    assert not any("drop" in k and v for k, v in vars(model.config).items() if isinstance(v, float))


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", vocab_size=256, **CASES["gpt_neox"][0]))


class _Noisy(nn.Module):
    """Randomness that nobody has heard of: noise in training mode, from a module's own number."""

    def __init__(self, inner: nn.Module, always: bool) -> None:
        super().__init__()
        self.inner, self.always, self.spread = inner, always, 0.1

    def forward(self, *args: Any, **options: Any) -> Any:
        found = self.inner(*args, **options)
        return found + self.spread * torch.randn_like(found) if self.training or self.always else found


@pytest.mark.parametrize("mode", [True, False])
def test_randomness_that_is_not_known_is_found_by_comparing_passes(mode: bool) -> None:
    model = tiny().train(mode)
    model.gpt_neox.layers[1].mlp = _Noisy(model.gpt_neox.layers[1].mlp, always=False)
    switch_off(model)
    ids, state = torch.arange(1, 30)[None], torch.get_rng_state()

    def run() -> torch.Tensor:
        return model.gpt_neox(input_ids=ids, use_cache=False).last_hidden_state

    assert disable_random_modules(model, run, 1e-3) == ["_Noisy"]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == mode
    model.train()
    assert not model.gpt_neox.layers[1].mlp.training
    assert model.gpt_neox.layers[1].mlp.inner.training
    with torch.no_grad():
        found = [run(), run(), model.eval() and run()]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert disable_random_modules(model.train(), run, 1e-3) == []


def test_what_cannot_be_held_at_rest_is_refused_with_a_true_sentence() -> None:
    """Here the randomness needs modules of two types in training mode, so that neither is at fault alone."""
    model = tiny()
    switch_off(model)
    ids = torch.arange(1, 30)[None]

    def run() -> torch.Tensor:
        found = model.gpt_neox(input_ids=ids, use_cache=False).last_hidden_state
        both = len({type(m) for m in model.modules() if m.training}) > 1
        return found * (1 + torch.rand(())) if both else found

    with pytest.raises(StillRandom, match="other values in training mode than in evaluation mode"):
        disable_random_modules(model, run, 1e-3)


def test_dropout_of_adapters_is_left_alone() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny()
    switch_off(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query_key_value"], lora_dropout=0.5))
    adapted.train()
    PairModel(adapted)
    assert all(m.training for m in adapted.modules())
    assert {m.p for m in adapted.modules() if isinstance(m, nn.Dropout)} == {0.0, 0.5}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Mixtral that gives its router's logits by default, as some on the hub do, with jitter."""
    path = tmp_path_factory.mktemp("mixture")
    tokenizer = AutoTokenizer.from_pretrained(generate_model(GeneratedModel(**MODEL["generated"]), path / "cache"))
    torch.manual_seed(0)
    options = {"router_aux_loss_coef": 0.5, "output_router_logits": True, "router_jitter_noise": 0.1}
    config = AutoConfig.for_model("mixtral", vocab_size=320, **MOE, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    return str(path / "model")


@pytest.mark.parametrize("loss", ["dpo", "cpo", "orpo"])
def test_a_mixture_that_gives_router_logits_answers_and_trains_alike_with_both_engines(
    loss: str, mixture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its load-balancing loss, which the notice says is no part of the objective, is none with TRL either."""
    session, metrics = TrainingSession(tmp_path / "cache"), {}
    for engine in ("packed", "trl"):
        options = {"model": {"name_or_path": mixture}, "engine": engine, "training": {"max_steps": 2}}
        run = session.train(trial(loss, **options), tmp_path / engine)
        with caplog.at_level(logging.WARNING):
            metrics[engine], result = finish(run)
        assert result.status is RunStatus.FINISHED
        assert "eval_repetition" in metrics[engine][-1].metrics, "two prompts were answered in one batch"
    for ours, theirs in zip(metrics["packed"], metrics["trl"], strict=True):
        for name in {"loss", "grad_norm", "margins/logp", "eval_margins/logp"} & ours.metrics.keys():
            assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=2e-3, abs=1e-6)
    assert "load-balancing loss is not part of the objective" in caplog.text
    assert "output_router_logits true" in caplog.text
    saved = json.loads((tmp_path / "packed/model/config.json").read_text())
    assert saved["output_router_logits"] is True
    assert saved["router_jitter_noise"] == 0.1


def test_nothing_is_named_where_nothing_is_random() -> None:
    config = AutoConfig.for_model("llama", vocab_size=256, **(CASES["llama"][0] | {"attention_dropout": 0.0}))
    model = AutoModelForCausalLM.from_config(config)
    switch_off(model)
    assert switched_off(model) == {}
