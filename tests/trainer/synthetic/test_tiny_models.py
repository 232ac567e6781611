"""Generated models and tokenizers load without a network, are the same every time, and take after big ones."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.data_cases import CHATML, tokenizer
from trainer.config.trial import GeneratedModel, GeneratedSource
from trainer.results import ModelError
from trainer.synthetic import detect_architecture, generate_model, generate_rows, tiny_model_like
from trainer.synthetic.tiny_models import ARCHITECTURES

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _small(architecture: str = "llama", **more: int) -> GeneratedModel:
    return GeneratedModel.model_validate({"architecture": architecture, "num_key_value_heads": 1} | SMALL | more)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_generated_model_loads_and_speaks_its_tokenizer(tmp_path: Path) -> None:
    folder = generate_model(_small(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    made = AutoTokenizer.from_pretrained(folder)
    assert (len(made), model.config.vocab_size) == (512, 512)
    for name in ("bos", "eos", "pad"):
        assert getattr(made, f"{name}_token_id") == getattr(model.config, f"{name}_token_id") is not None
    row = generate_rows(GeneratedSource(generated="instructions", rows=1))[0]
    text = made.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == made.bos_token_id
    assert ids[-1] == made.eos_token_id
    assert made.decode(ids) == text
    assert made.decode(made("ünïcode 🙂\n")["input_ids"]) == "ünïcode 🙂\n"
    loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert 4 < loss < 12


def test_the_same_configuration_gives_the_same_bytes(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, second = (generate_model(_small(), tmp_path / name) for name in "ab")
    assert _bytes(first) == _bytes(second)
    assert torch.equal(torch.get_rng_state(), state)
    other = generate_model(_small(seed=1), tmp_path / "a")
    assert first.name != other.name
    assert _bytes(first)["model.safetensors"] != _bytes(other)["model.safetensors"]
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert generate_model(_small(), tmp_path / "a") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made


def test_a_vocabulary_too_small_for_every_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the least is 262"):
        generate_model(_small(vocab_size=100), tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_generated_and_made_alike(tmp_path: Path, architecture: str) -> None:
    made = tokenizer(CHATML)
    by_name = tiny_model_like(architecture, tmp_path / "name", made)  # pyright: ignore[reportArgumentType]
    by_config = tiny_model_like(AutoConfig.for_model(architecture), tmp_path / "config", made)
    assert (by_name / "model.safetensors").read_bytes() == (by_config / "model.safetensors").read_bytes()
    for folder in (generate_model(_small(architecture), tmp_path), by_name):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert model.config.model_type == architecture
        assert not any(info.values())
        assert sum(p.numel() for p in model.parameters()) < 500_000
        ids = torch.tensor([[3, 5, 7, 9]])
        assert torch.isfinite(model(ids).logits).all()
    assert detect_architecture(str(by_name)).architecture == architecture
    for folder in (generate_model(_small(architecture), tmp_path), by_name):
        loaded, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        assert len(loaded) == config.vocab_size
        for name in ("eos", "pad"):
            assert getattr(loaded, f"{name}_token_id") == getattr(config, f"{name}_token_id") is not None
        assert loaded.decode(loaded("It is 12.")["input_ids"]) == "It is 12."


def test_what_a_big_model_has_of_its_own_is_kept(tmp_path: Path) -> None:
    big = AutoConfig.for_model(
        "llama", rope_theta=500000.0, tie_word_embeddings=True, rms_norm_eps=1e-5, hidden_size=8192
    )
    folder = tiny_model_like(big, tmp_path / "m", tokenizer(CHATML))
    config = AutoConfig.from_pretrained(folder)
    assert (config.tie_word_embeddings, config.rms_norm_eps, config.hidden_size) == (True, 1e-5, 64)
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert big.hidden_size == 8192


@pytest.mark.parametrize(
    ("name", "architecture", "says"),
    [
        ("princeton-nlp/Llama-3-Base-8B-SFT", "llama", "by its name"),
        ("alignment-handbook/zephyr-7b-sft-full", "mistral", "by its name"),
        ("google/gemma-2-9b-it", "gemma2", "by its name"),
        ("Qwen/Qwen2.5-7B", "qwen2", "by its name"),
        ("Qwen/Qwen3-8B", "qwen3", "by its name"),
        ("someone/something", "llama", "the name says nothing"),
    ],
)
def test_without_a_hub_the_name_is_asked(
    monkeypatch: pytest.MonkeyPatch, name: str, architecture: str, says: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = detect_architecture(name)
    assert found.architecture == architecture
    assert says in found.explanation


def test_an_architecture_that_is_not_rehearsed_and_a_broken_folder_are_named(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="gpt2 model; rehearsals know llama"):
        detect_architecture(str(tmp_path / "gpt2"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no model configuration"):
        detect_architecture(str(tmp_path / "empty"))
