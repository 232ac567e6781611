"""Positions that a model has: read from its config.json as transformers reads it, and checked before a trial."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.small_trials import MODEL, finish, trial
from trainer.__main__ import main
from trainer.config.position_limits import TABLES, Positions, known_positions, length_findings, positions_of
from trainer.config.trial import GeneratedModel, TrialConfig
from trainer.results import ModelError, TrialError
from trainer.synthetic import generate_model
from trainer.training_session import TrainingSession

SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "gpt_bigcode": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
    "codegen": {"n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    "opt": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16},
    "biogpt": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "openai-gpt": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "ctrl": {"n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 16},
    "mpt": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "is_decoder": True},
    "electra": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "is_decoder": True},
    "xlm": {"emb_dim": 16, "n_layers": 1, "n_heads": 2},
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_positions_ends_where_its_configuration_says(kind: str) -> None:
    """Transformers' own model computes so many tokens and fails at one more; the default is transformers' own."""
    field, default = TABLES[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=64, **SMALL[kind], **{field: 16})
    model, limit = AutoModelForCausalLM.from_config(config).eval(), positions_of(config.to_dict()).table
    assert limit == 16
    with torch.no_grad():
        model(torch.arange(1, limit + 1)[None])
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.arange(1, limit + 2)[None])
    plain = CONFIG_MAPPING[kind]()
    assert positions_of({"model_type": kind}).table == default == getattr(plain, field)


LLAMA3 = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "original_max_position_embeddings": 512}
YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 4096}
LONGROPE = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 1024}
BY_LAYER = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}}
ROPE: dict[str, tuple[dict[str, Any], int, int | None]] = {
    "plain": ({"model_type": "llama"}, 4096, None),
    "linear": ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192, None),
    "dynamic": ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 16384, 4096),
    "yarn": ({"model_type": "qwen2", **YARN}, 16384, None),
    "llama3": ({"model_type": "llama", **LLAMA3}, 4096, None),
    "longrope": ({"model_type": "phi3", **LONGROPE}, 4096, 1024),
    "by layer type": ({"model_type": "gemma3_text", "rope_parameters": BY_LAYER}, 32768, None),
}


@pytest.mark.parametrize("case", ROPE)
def test_a_rotary_models_length_counts_its_scaling(case: str) -> None:
    config, trained, switch = ROPE[case]
    found = positions_of(config | {"max_position_embeddings": 4096})
    assert (found.table, found.trained, found.switch) == (None, trained, switch)


def test_multimodal_checkpoints_say_it_of_their_text_model() -> None:
    found = positions_of({"model_type": "llava", "text_config": {"model_type": "opt", "max_position_embeddings": 64}})
    assert found.table == 64


@pytest.mark.parametrize("config", [{"model_type": "bloom"}, {"model_type": "falcon", "alibi": True}])
def test_models_without_an_end_have_no_limit(config: dict[str, Any]) -> None:
    found = positions_of(config | {"max_position_embeddings": 64})
    assert (found.table, found.trained) == (None, None)


def settings(**data: Any) -> TrialConfig:
    return trial(data={"train": "rows.jsonl", **data}, evaluation={"prompts": 1, "max_new_tokens": 64})


def test_findings_name_the_setting() -> None:
    table = Positions("n_positions", table=1024)
    assert list(length_findings(table, settings(max_length=960))) == []
    (perhaps,) = length_findings(table, settings(max_length=1024))
    assert (perhaps.path, perhaps.refused) == ("evaluation.max_new_tokens", False)
    assert list(length_findings(table, settings(max_length=1024, max_prompt_length=960))) == []
    (too_long,) = length_findings(table, settings(max_length=2048))
    assert (too_long.path, too_long.refused) == ("data.max_length", True)
    assert "2,048" in too_long.problem
    assert "1,024 positions" in too_long.problem
    (answer,) = length_findings(table, settings(max_length=1024, max_prompt_length=1000))
    assert (answer.path, answer.refused) == ("evaluation.max_new_tokens", True)
    assert list(length_findings(table, settings(max_length=1024, max_prompt_length=1000), {})) == []
    (warned,) = length_findings(Positions("max_position_embeddings", trained=1024), settings(max_length=2048))
    assert (warned.path, warned.refused) == ("data.max_length", False)
    switching = Positions("max_position_embeddings", trained=131072, switch=1024)
    assert list(length_findings(switching, settings(max_length=2048))) == []
    (engine,) = length_findings(switching, trial(data={"train": "rows.jsonl", "max_length": 2048}, engine="trl"))
    assert (engine.path, engine.refused) == ("engine", True)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2 of 48 positions with the generated task's tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(generate_model(GeneratedModel(**MODEL["generated"]), folder / "cache"))
    config = AutoConfig.for_model("gpt2", vocab_size=320, n_positions=48, n_embd=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def rows(path: Path, words: int) -> dict[str, Any]:
    text = [{"prompt": f"{i}", "chosen": "a " * words + "b", "rejected": "b"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in text), encoding="utf-8")
    return {"train": str(path), "eval_share": 0.2}


def test_a_row_beyond_the_table_is_refused_before_training(gpt2: str, tmp_path: Path) -> None:
    config = trial(
        model={"name_or_path": gpt2},
        data=rows(tmp_path / "rows.jsonl", 60) | {"max_length": 96, "apply_template": False},
    )
    with pytest.raises(ModelError, match=r"longest row has 64 tokens.* 48 positions .*data.max_length to 48"):
        finish(TrainingSession(tmp_path / "cache").train(config, tmp_path / "run"))


def test_rows_that_fit_train_whatever_the_limit_says(gpt2: str, tmp_path: Path) -> None:
    """What ran before goes on: only the file's own check is strict."""
    data = rows(tmp_path / "rows.jsonl", 6) | {"max_length": 96, "apply_template": False}
    config = trial(model={"name_or_path": gpt2}, data=data, training={"max_steps": 1})
    finish(TrainingSession(tmp_path / "cache").train(config, tmp_path / "run"))
    longer = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"max_new_tokens": 60})})
    with pytest.raises(ModelError, match="60 new ones exceeds the 48 positions"):
        finish(TrainingSession(tmp_path / "cache").train(longer, tmp_path / "longer"))


def test_the_command_says_which_setting_is_at_fault(
    gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trial.json"  # JSON is YAML
    data = rows(tmp_path / "rows.jsonl", 6) | {"max_length": 96, "apply_template": False}
    file.write_text(json.dumps({"model": gpt2, "data": data}), encoding="utf-8")
    assert main([str(file), "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]) == 2
    assert f"{file}: data.max_length: 96 tokens exceed the 48 positions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_would_hang_on_the_batch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's trainers, and a model whose own code switches in a way that is not known."""
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(generate_model(GeneratedModel(**MODEL["generated"]), tmp_path / "cache"))
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "llama", vocab_size=320, max_position_embeddings=32, rope_parameters=scaling, num_key_value_heads=2, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = known_positions(trial(model={"name_or_path": str(folder)}).model)
    assert (found.trained, found.switch) == (128, 32)
    monkeypatch.setattr("trainer.resource_cache.RotarySwitch.of", lambda _: None)
    with pytest.raises(ModelError, match=r"code outside of transformers.* set data.max_length to 32 or less"):
        finish(TrainingSession(tmp_path / "c").train(trial(model={"name_or_path": str(folder)}), tmp_path / "unknown"))
    monkeypatch.undo()
    with pytest.raises(TrialError, match=r"beyond 32 tokens .* use engine packed, or data.max_length 32 or less"):
        finish(
            TrainingSession(tmp_path / "c").train(
                trial(model={"name_or_path": str(folder)}, engine="trl"), tmp_path / "r"
            )
        )
