import json
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.support.trl_oracle import tiny_tokenizer
from trainer.config.trial import LoraConfig, ModelConfig, TrainingConfig
from trainer.models.initial_weights import InitialWeights, named_tensors
from trainer.models.model_files import export_model, model_fingerprint, save_model, weight_files
from trainer.models.policy_model import PolicyModel, load_model
from trainer.results import ModelError
from trainer.storage.atomic_files import sha256_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attention_dropout=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(path: Path, **more: object) -> torch.nn.Module:
    return load_model(ModelConfig(name_or_path=str(path), **more), str(path), CPU)  # pyright: ignore


def policy(path: Path) -> PolicyModel:
    config = ModelConfig(name_or_path=str(path))
    return PolicyModel(load_model(config, str(path), CPU), config, "id", weight_files(config, str(path)))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_dropout_is_off_but_kept_in_the_config_that_is_saved(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    assert (model.model.layers[0].self_attn.attention_dropout, model.config.attention_dropout) == (0.0, 0.0)
    save_model(model, tiny_tokenizer(), tmp_path / "model")  # pyright: ignore[reportArgumentType]
    assert json.loads((tmp_path / "model/config.json").read_text())["attention_dropout"] == 0.1
    assert model.config.attention_dropout == 0.0


def test_dtype_is_as_asked(folder: Path) -> None:
    assert next(load(folder, dtype="bfloat16").parameters()).dtype == torch.bfloat16
    assert next(load(folder).parameters()).dtype == torch.float32


def test_training_never_writes_into_the_model_file(folder: Path) -> None:
    before, model = sha256_of(sorted(folder.glob("*"))), load(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert sha256_of(sorted(folder.glob("*"))) == before


def test_start_weights_come_back_to_the_bit(folder: Path) -> None:
    model = policy(folder)
    start = weights(model.base)
    assert model.reset() is False
    model.prepare_for_trial(None, TrainingConfig())
    with torch.no_grad():
        for p in model.trainable_parameters().values():
            p.mul_(1.5).add_(0.1)
    assert not same(weights(model.base), start)
    assert model.reset() is True
    assert same(weights(model.base), start)
    assert model.trainable_parameters() == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_start_weights_are_mapped_from_the_file(folder: Path, dtype: str) -> None:
    model = load(folder, dtype=dtype)
    before, start = weights(model), InitialWeights(model, sorted(folder.glob("*.safetensors")))
    # Only the rotary frequencies, which no file holds; a bfloat16 model starts from the float32 file's weights rounded.
    assert sum(t.nbytes for t in start._copied.values()) == sum(b.nbytes for _, b in model.named_buffers())
    assert sum(t.nbytes for t in start._mapped.values()) == 4 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for _, tensor in named_tensors(model):
            tensor.add_(1.0)
    start.restore(model)
    assert same(weights(model), before)
    assert str(folder) in Path("/proc/self/maps").read_text()


def test_weights_that_differ_from_the_file_are_copied(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    before, start = weights(model), InitialWeights(model, sorted(folder.glob("*.safetensors")))
    assert sum(t.nbytes for t in start._copied.values()) == model.model.norm.weight.nbytes + sum(
        b.nbytes for _, b in model.named_buffers()
    )
    with torch.no_grad():
        model.model.norm.weight.zero_()
    start.restore(model)
    assert same(weights(model), before)


def test_a_start_model_that_changes_meanwhile_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    copytree(folder, path)
    model = load(path)
    start = InitialWeights(model, sorted(path.glob("*.safetensors")))
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(ModelError, match="was changed; all trials"):
        start.restore(model)


def test_a_start_model_that_is_removed_meanwhile_stays_mapped(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    copytree(folder, path)
    model = load(path)
    before, start = weights(model), InitialWeights(model, sorted(path.glob("*.safetensors")))
    rmtree(path)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    start.restore(model)
    assert same(weights(model), before)


def test_adapters_are_a_function_of_the_seed_and_leave_no_trace(folder: Path) -> None:
    model = policy(folder)
    start, sampled = weights(model.base), []
    for seed, rank in ((1, 4), (2, 2), (1, 4)):
        model.reset()
        model.prepare_for_trial(LoraConfig(r=rank), TrainingConfig(seed=seed, gradient_checkpointing=seed == 2))
        assert all("lora_" in name for name in model.trainable_parameters())
        sampled.append({k: v.detach().clone() for k, v in model.trainable_parameters().items()})
        with torch.no_grad():
            for p in model.trainable_parameters().values():
                p.add_(1.0)
    assert same(sampled[0], sampled[2])
    assert not same(sampled[0], sampled[1])
    model.reset()
    assert same(weights(model.base), start)
    model.prepare_for_trial(None, TrainingConfig())
    assert model.trainable_parameters().keys() == dict(model.base.named_parameters()).keys()


def test_gradient_checkpointing_follows_the_trial(folder: Path) -> None:
    model = policy(folder)
    model.prepare_for_trial(None, TrainingConfig(gradient_checkpointing=True))
    assert model.base.is_activation_checkpointing
    model.reset()
    model.prepare_for_trial(None, TrainingConfig())
    assert not model.base.is_activation_checkpointing


def test_lora_dropout_only_when_asked(folder: Path) -> None:
    model = policy(folder)
    for share in (0.0, 0.25):
        model.reset()
        model.prepare_for_trial(LoraConfig(dropout=share), TrainingConfig())
        found = {m.p for m in model.base.modules() if isinstance(m, torch.nn.Dropout)}
        assert found == ({share} if share else set())


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(target_modules=("nowhere",)), "nowhere is not in LlamaForCausalLM"),
        (LoraConfig(target_modules=("lm_head",)), "output layer"),
    ],
)
def test_adapters_that_cannot_be_are_refused(folder: Path, lora: LoraConfig, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        policy(folder).prepare_for_trial(lora, TrainingConfig())


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors weights \(pytorch_model\.bin in pickle form"):
        load(tmp_path)


def test_incomplete_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        load(tmp_path)


def test_code_in_a_model_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model"
    path.mkdir()
    (path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (path / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}'
    )
    (path / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    with pytest.raises(ModelError, match="runs only with --trust-remote-code"):
        load(path)
    assert not canary.exists()


def test_a_missing_model_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path / "none")


def test_four_bits_without_the_library_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.models.policy_model.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="bitsandbytes, which is not installed"):
        load(folder, load_in_4bit=True)


def test_identity_follows_the_bytes(folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(name_or_path=str(folder))
    first, model = model_fingerprint(config, str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    assert first.startswith("sha256:")
    assert model_fingerprint(config, str(tmp_path / "same")) == model_fingerprint(config, str(tmp_path / "same"))
    assert model_fingerprint(config, str(tmp_path / "other")) != model_fingerprint(config, str(tmp_path / "same"))
    assert model_fingerprint(ModelConfig(name_or_path="a/b", revision="abc"), "a/b") == "hub:a/b@abc"


def test_export_refuses_what_is_there_or_is_nothing(folder: Path, tmp_path: Path) -> None:
    export_model(folder, tmp_path / "copy")
    assert same(weights(load(tmp_path / "copy")), weights(load(folder)))
    with pytest.raises(ModelError, match="exists already"):
        export_model(folder, tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no saved model"):
        export_model(tmp_path / "empty", tmp_path / "other")
