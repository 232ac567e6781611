"""--trust-remote-code reaches whatever loads a model or a tokenizer; without it the refusal names the flag."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.exports import compared
from tests.support.own_code import own_code_model
from tests.support.small_trials import finish, trial
from trainer.__main__ import UNUSABLE, main
from trainer.config.trial import DataConfig, ModelConfig, TrialConfig
from trainer.data import TokenizerError, load_tokenizer, prepare
from trainer.evaluation.judge_prompts import fixed_prompts
from trainer.evaluation.reward_model import RewardScorer
from trainer.evaluation.text_generation import DecodingConfig, TextGenerator
from trainer.models.model_files import export_model, model_fingerprint
from trainer.models.policy_model import load_model
from trainer.results import ModelError, TrialError
from trainer.training_session import TrainingSession

FLAG = "runs only with --trust-remote-code"


@pytest.fixture(scope="module")
def folder(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_code_model(cache, tmp_path_factory.mktemp("own"))


def config(folder: Path, **more: Any) -> TrialConfig:
    return trial(model={"name_or_path": str(folder)}, training={"learning_rate": 2e-2}, **more)


def test_without_the_flag_every_loader_names_it(folder: Path, cache: Path, tmp_path: Path) -> None:
    own = config(folder)
    with pytest.raises(TokenizerError, match=f"the tokenizer of .*{FLAG}"):
        load_tokenizer(own.model, own.data, cache)
    with pytest.raises(TokenizerError, match=FLAG):
        prepare(own.data, own.model, cache)
    with pytest.raises(TokenizerError, match=FLAG):
        fixed_prompts(own.data, own.model, cache, 1)
    with pytest.raises(ModelError, match=f"the model .*{FLAG}"):
        load_model(own.model, str(folder), torch.device("cpu"))
    with pytest.raises(ModelError, match=f"the reward model .*{FLAG}"):
        RewardScorer(str(folder))
    with pytest.raises(TrialError, match=FLAG):
        finish(TrainingSession(cache).train(own, tmp_path / "run"))


def test_the_command_refuses_in_words_and_trains_with_the_flag(
    folder: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trial.yaml"
    file.write_text(config(folder).model_dump_json())
    arguments = [str(file), "--out", str(tmp_path / "run"), "--cache", str(cache)]
    assert main(arguments) == UNUSABLE
    assert FLAG in capsys.readouterr().err
    assert main([*arguments, "--trust-remote-code"]) == 0


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "adapters"])
def test_with_the_flag_it_is_trained_judged_and_exported(
    lora: dict[str, Any] | None, folder: Path, cache: Path, tmp_path: Path
) -> None:
    own = config(folder, lora=lora)
    run, trust = tmp_path / "run", {"trust_remote_code": True}
    finish(TrainingSession(cache, **trust).train(own, run))
    prompts, tokenizer = fixed_prompts(own.data, own.model, cache, 2, **trust)
    assert type(tokenizer).__name__ == "OwnTokenizer"
    text_generator = TextGenerator.load(own, run / "model", tokenizer, cache, **trust)
    assert (
        sum(
            len(batch)
            for batch in text_generator.generate(prompts, DecodingConfig(3), budget=999, check_cancelled=lambda: None)
        )
        == 2
    )
    for merge in (False, True):
        assert len(compared(run, own, cache, tmp_path / f"out {merge}", merge=merge, trust_remote_code=True)) == 2
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out True", **trust)).__name__ == "OwnForCausalLM"
    assert (tmp_path / "out True/modeling_own.py").is_file()
    if lora is not None:
        with pytest.raises(ModelError, match=FLAG):
            export_model(run / "model", tmp_path / "no", merge=True, model=own.model)
        assert not (tmp_path / "no").exists()


def test_a_models_code_is_part_of_its_name_and_of_its_datas(folder: Path, cache: Path, tmp_path: Path) -> None:
    """What is cached for one version of the code must not be taken for another's."""
    data = DataConfig.model_validate(trial().data.model_dump())
    names, fingerprints = [], []
    for version in ("a", "b"):
        path = own_code_model(cache, tmp_path / version)
        for file in ("modeling_own.py", "tokenization_own.py"):
            with (path / file).open("a") as code:
                code.write(f"# version {version}\n")
        model = ModelConfig(name_or_path=str(path))
        names.append(model_fingerprint(model, str(path)))
        fingerprints.append(prepare(data, model, cache, trust_remote_code=True).fingerprint)
    assert names[0] != names[1]
    assert fingerprints[0] != fingerprints[1]
