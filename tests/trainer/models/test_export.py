"""What is exported computes what was trained: plain transformers load every kind and give the trial's log-probs."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.support.exports import compared
from tests.support.small_trials import finish, trial
from trainer.config.trial import ModelConfig
from trainer.evaluation.export_check import CannotCompare, ExportDiffers
from trainer.models.model_files import export_model, resolve_model_path
from trainer.training_session import TrainingSession

FAST = {"learning_rate": 5e-2}


@pytest.fixture(scope="module")
def workshop(cache: Path) -> TrainingSession:
    return TrainingSession(cache)


def start_model(kind: str, cache: Path, to: Path, **more: Any) -> Path:
    """A small model of random weights, its output layer tied to its embeddings, with the generated task's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(trial().model, cache))
    torch.manual_seed(3)
    if kind == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128)
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                tie_word_embeddings=True, **({"hidden_size": 32, "intermediate_size": 64} | more),
            )
        )  # fmt: skip
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", ["embed_tokens", "q_proj"]), ("llama", "all-linear"), ("gpt2", ["wte", "c_attn"])]
)
def test_adapters_of_a_model_with_tied_embeddings_merge_into_what_was_trained(
    kind: str, targets: Any, cache: Path, workshop: TrainingSession, tmp_path: Path
) -> None:
    path = start_model(kind, cache, tmp_path / "start")
    config = trial(model={"name_or_path": str(path)}, lora={"r": 4, "target_modules": targets}, training=FAST)
    metrics, _ = finish(workshop.train(config, tmp_path / "run"))
    assert abs(metrics[-1].metrics["eval_nll_loss"] - metrics[0].metrics["eval_nll_loss"]) > 1e-2
    assert "held-out pairs" in compared(tmp_path / "run", config, cache, tmp_path / "merged", merge=True)[-1]
    compared(tmp_path / "run", config, cache, tmp_path / "adapters")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    indistinguishable = targets == "all-linear"
    assert merged.config.tie_word_embeddings is indistinguishable
    same = torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    assert same is indistinguishable
    # It is an initial model like any other, and carries the tokenizer's files but none of the adapters.
    again = trial(model={"name_or_path": str(tmp_path / "merged")}, training={"learning_rate": 1e-9})
    then, _ = finish(workshop.train(again, tmp_path / "again"))
    for name in ("eval_nll_loss", "eval_margins/logp"):
        assert then[0].metrics[name] == pytest.approx(metrics[-1].metrics[name], rel=1e-4, abs=1e-6)
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert (tmp_path / "merged/chat_template.jinja").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["embeddings saved", "head saved", "head", "both", "tied adapters"],
)
def test_whatever_touches_a_tied_weight_merges_to_the_same_logits(
    settings: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    """Adapters that peft can make and a trial cannot, for folders that come from elsewhere."""
    path = start_model("llama", cache, tmp_path / "start")
    base = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(1)
    adapted = get_peft_model(base, PeftLoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.arange(5, 25)[None]
    cast(Any, adapted).save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "adapters")
    fresh = cast(Any, PeftModel).from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapters")
    with torch.no_grad():
        expected = fresh.eval()(input_ids=ids).logits
    export_model(tmp_path / "adapters", tmp_path / "merged", merge=True)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits
        start = AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - start).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_weights_are_exported_as_they_were_trained(
    dtype: str, cache: Path, workshop: TrainingSession, tmp_path: Path
) -> None:
    model = {"name_or_path": str(start_model("llama", cache, tmp_path / "start")), "dtype": dtype}
    config = trial(model=model, training={"learning_rate": 1e-2})
    finish(workshop.train(config, tmp_path / "run"))
    compared(tmp_path / "run", config, cache, tmp_path / "out")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(stored.dtype) == f"torch.{dtype}"
    assert stored.config.tie_word_embeddings is True


def test_adapters_merge_in_the_dtype_they_were_trained_over(
    cache: Path, workshop: TrainingSession, tmp_path: Path
) -> None:
    """Over a model stored in bfloat16 and trained in float32 a small change would be lost in its rounding."""
    path = start_model("llama", cache, tmp_path / "start")
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    config = trial(model={"name_or_path": str(path)}, lora={"r": 4}, training={"learning_rate": 1e-3})
    finish(workshop.train(config, tmp_path / "run"))
    compared(tmp_path / "run", config, cache, tmp_path / "out", merge=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32


def test_adapters_over_weights_in_4_bits_are_exported_as_they_were_trained(
    cache: Path, workshop: TrainingSession, tmp_path: Path
) -> None:
    """Merged, the base's weights are the numbers that the 4 bits stood for, not those of its file."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'prefsweep[quantisation]'")
    path = start_model("llama", cache, tmp_path / "start", hidden_size=128, intermediate_size=128)
    config = trial(model={"name_or_path": str(path), "load_in_4bit": True}, lora={"r": 4}, training=FAST)
    finish(workshop.train(config, tmp_path / "run"))
    for merge in (False, True):
        compared(tmp_path / "run", config, cache, tmp_path / f"out {merge}", merge=merge)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out True")
    assert getattr(merged.config, "quantization_config", None) is None
    stored = load_file(path / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    assert not torch.allclose(merged.model.layers[0].self_attn.o_proj.weight, stored, atol=1e-3)


def test_an_export_that_is_another_model_leaves_nothing(cache: Path, workshop: TrainingSession, tmp_path: Path) -> None:
    config = trial(lora={"r": 4}, training=FAST)
    finish(workshop.train(config, tmp_path / "run"))
    weights = tmp_path / "run/model/adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    for merge in (False, True):
        with pytest.raises(ExportDiffers, match=r"not the trained model: .* in the trial, .* in the export"):
            compared(tmp_path / "run", config, cache, tmp_path / "out", merge=merge)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_an_export_with_another_template_is_refused(cache: Path, workshop: TrainingSession, tmp_path: Path) -> None:
    config = trial(training=FAST)
    finish(workshop.train(config, tmp_path / "run"))
    template = tmp_path / "run/model/chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(ExportDiffers, match="chat template differ"):
        compared(tmp_path / "run", config, cache, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_exported_tokenizer_has_the_template_that_was_trained_with(
    cache: Path, workshop: TrainingSession, tmp_path: Path
) -> None:
    own = AutoTokenizer.from_pretrained(resolve_model_path(trial().model, cache)).chat_template
    template = own.replace("<|user|>", "<|user|>\n") if "<|user|>" in own else "{# ours #}" + own
    data = trial().data.model_dump() | {"chat_template": template}
    for lora in (None, {"r": 2}):
        config, run = trial(data=data, lora=lora, training=FAST), tmp_path / f"run {lora is None}"
        finish(workshop.train(config, run))
        for merge in (False, True):
            to = tmp_path / f"out {lora is None} {merge}"
            compared(run, config, cache, to, merge=merge)
            assert AutoTokenizer.from_pretrained(to).chat_template == template


def test_without_what_to_compare_with_it_says_so(cache: Path, workshop: TrainingSession, tmp_path: Path) -> None:
    config = trial(training=FAST)
    finish(workshop.train(config, tmp_path / "run"))
    other = trial(data=trial().data.model_dump() | {"max_eval_rows": 3}, training=FAST)
    with pytest.raises(CannotCompare, match="not those of the trial"):
        compared(tmp_path / "run", other, cache, tmp_path / "out")
    (tmp_path / "run/eval_pairs.safetensors").unlink()
    with pytest.raises(CannotCompare, match="were not found"):
        compared(tmp_path / "run", config, cache, tmp_path / "out")


@pytest.mark.filterwarnings("error:.*is_gradient_checkpointing:FutureWarning")
def test_a_base_in_the_cache_goes_along_with_its_adapters(
    cache: Path, workshop: TrainingSession, tmp_path: Path
) -> None:
    """As an SFT stage's model does: the export still loads when the cache was emptied."""
    own = tmp_path / "cache"
    path = start_model("llama", cache, own / "sft/key/run/model")
    config = trial(model={"name_or_path": str(path)}, lora={"r": 4}, training=FAST)
    metrics, _ = finish(TrainingSession(own).train(config, tmp_path / "run"))
    compared(tmp_path / "run", config, own, tmp_path / "out")
    shutil.rmtree(own)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any("lora_" in name for name, _ in loaded.named_parameters())
    logged = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert logged["base_model_name_or_path"] == str(tmp_path / "out/base")
    export_model(tmp_path / "out", tmp_path / "merged", merge=True, model=ModelConfig(name_or_path=str(path)))
    again = trial(model={"name_or_path": str(tmp_path / "merged")}, training={"learning_rate": 1e-9})
    then, _ = finish(workshop.train(again, tmp_path / "again"))
    assert then[0].metrics["eval_nll_loss"] == pytest.approx(metrics[-1].metrics["eval_nll_loss"], rel=1e-4)


def test_a_base_of_the_users_own_stays_where_it_is(cache: Path, workshop: TrainingSession, tmp_path: Path) -> None:
    path = start_model("llama", cache, tmp_path / "start")
    config = trial(model={"name_or_path": str(path)}, lora={"r": 4}, training=FAST)
    finish(workshop.train(config, tmp_path / "run"))
    compared(tmp_path / "run", config, cache, tmp_path / "out")
    assert not (tmp_path / "out/base").exists()
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(path)
