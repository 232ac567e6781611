"""Generated models and tokenizers load without a network and are the same every time."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer.config.trial import Architecture, GeneratedModel, GeneratedSource
from trainer.results import ModelError
from trainer.synthetic import generate_model, generate_rows

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _small(architecture: str = "llama", **more: int) -> GeneratedModel:
    return GeneratedModel.model_validate({"architecture": architecture, "num_key_value_heads": 1} | SMALL | more)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_generated_model_loads_and_speaks_its_tokenizer(tmp_path: Path) -> None:
    folder = generate_model(_small(), tmp_path)
    model, made = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (len(made), model.config.vocab_size) == (512, 512)
    for name in ("bos", "eos", "pad"):
        assert getattr(made, f"{name}_token_id") == getattr(model.config, f"{name}_token_id") is not None
    row = generate_rows(GeneratedSource(generated="instructions", rows=1))[0]
    text = made.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1]) == (made.bos_token_id, made.eos_token_id)
    assert made.decode(ids) == text
    assert made.decode(made("ünïcode 🙂\n")["input_ids"]) == "ünïcode 🙂\n"
    assert 4 < model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() < 12


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
    with pytest.raises(ModelError, match="use at least 262"):
        generate_model(_small(vocab_size=100), tmp_path)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_every_architecture_is_generated(tmp_path: Path, architecture: str) -> None:
    folder = generate_model(_small(architecture), tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert model.config.model_type == architecture
    assert not any(info.values())
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert torch.isfinite(model(torch.tensor([[3, 5, 7, 9]])).logits).all()
    loaded, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert len(loaded) == config.vocab_size
    for name in ("eos", "pad"):
        assert getattr(loaded, f"{name}_token_id") == getattr(config, f"{name}_token_id") is not None
    assert loaded.decode(loaded("It is 12.")["input_ids"]) == "It is 12."
