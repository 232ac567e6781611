"""Answers end where a turn of the training data ends, which need not be the tokenizer's eos_token."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.support.small_trials import finish, trial
from trainer.config.trial import TrialConfig
from trainer.data import prepare
from trainer.data.pair_dataset import select_prompts
from trainer.evaluation.completions import complete_greedily
from trainer.evaluation.judge_prompts import fixed_prompts
from trainer.evaluation.text_generation import DecodingConfig, TextGenerator
from trainer.models.model_files import end_token_ids, export_model, resolve_model_path
from trainer.models.policy_model import load_model
from trainer.training_session import TrainingSession

TURN_END = "<|im_end|>"
LIMIT = 40


@pytest.fixture(scope="module")
def start(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template closes a turn with a token that neither model nor tokenizer calls an end."""
    to = tmp_path_factory.mktemp("start")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(trial().model, cache))
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_END]})
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", f"'{TURN_END}'")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=160,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def config(start: Path, **more: Any) -> TrialConfig:
    training = {"learning_rate": 1e-2, "num_train_epochs": 12, "eval_steps": 36}
    evaluation = {"prompts": 4, "max_new_tokens": LIMIT}
    return trial("sft", model={"name_or_path": str(start)}, training=training, evaluation=evaluation, **more)


@pytest.fixture(scope="module")
def trained(start: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs in full and with adapters, long enough to have learned where an answer ends."""
    runs = {name: tmp_path_factory.mktemp(name) for name in ("full", "adapters")}
    for name, lora in (("full", None), ("adapters", {"r": 32, "alpha": 64})):
        metrics, _ = finish(TrainingSession(cache).train(config(start, lora=lora), runs[name]))
        (runs[name] / "last.json").write_text(json.dumps(metrics[-1].metrics))
    return runs


def test_a_trials_answers_end_with_the_turn(trained: dict[str, Path], start: Path, cache: Path) -> None:
    requested = config(start)
    prepared = prepare(requested.data, requested.model, cache)
    tokenizer = AutoTokenizer.from_pretrained(start)
    assert tokenizer.convert_tokens_to_ids(TURN_END) in prepared.report.stop_tokens
    for run in trained.values():
        assert json.loads((run / "last.json").read_text())["eval_answer_length"] < LIMIT
        rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        last = [row for row in rows if row["step"] == rows[-1]["step"]]
        assert len(last) == 4
        assert all(TURN_END not in row["answer"] for row in last)
    # Without the data's ends the same weights go on to the limit.
    model = load_model(requested.model, str(trained["full"] / "model"), torch.device("cpu"))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    chosen = select_prompts(prepared.eval, 4)
    how: dict[str, Any] = {"max_new_tokens": LIMIT, "budget": 999, "check_cancelled": lambda: None}
    free = complete_greedily(model, tokenizer, prepared.eval, chosen, **how)
    ended = complete_greedily(
        model, tokenizer, prepared.eval, chosen, extra_end_tokens=prepared.report.stop_tokens, **how
    )
    assert [a.tokens for a in free] == [LIMIT] * 4
    assert max(a.tokens for a in ended) < LIMIT


@pytest.mark.parametrize("name", ["full", "adapters"])
def test_the_judges_answers_end_with_the_turn(name: str, trained: dict[str, Path], start: Path, cache: Path) -> None:
    requested = config(start)
    prompts, tokenizer = fixed_prompts(requested.data, requested.model, cache, 4)
    stops = prepare(requested.data, requested.model, cache, tokenizer).report.stop_tokens
    text_generator = TextGenerator.load(requested, trained[name] / "model", tokenizer, cache, extra_end_tokens=stops)
    for decoding in (DecodingConfig(LIMIT), DecodingConfig(LIMIT, 0, 0.2, 1.0, 1)):
        found = [
            w
            for b in text_generator.generate(prompts, decoding, budget=999, check_cancelled=lambda: None)
            for w in b.values()
        ]
        assert all(written.ended for written in found)
        assert all(TURN_END not in written.text for written in found)


@pytest.mark.parametrize(("name", "merge"), [("full", False), ("adapters", False), ("adapters", True)])
def test_the_exported_model_ends_with_the_turn(
    name: str, merge: bool, trained: dict[str, Path], start: Path, tmp_path: Path
) -> None:
    export_model(trained[name] / "model", tmp_path / "out", merge=merge)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ends = sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)])
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == ends
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if merge or name == "full":  # of adapters, transformers takes the base's settings
        assert model.generation_config.eos_token_id == ends
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "Reverse: abc"}], add_generation_prompt=True)
        new = model.generate(torch.tensor([ids["input_ids"]]), max_new_tokens=LIMIT, do_sample=False)[0]
        assert len(new) < len(ids["input_ids"]) + LIMIT
    assert AutoTokenizer.from_pretrained(start).eos_token_id != ends[1]


def test_a_models_own_ends_stay_among_the_exported_ones(cache: Path, tmp_path: Path) -> None:
    """Its other settings stay too, also such as transformers would not save: published files hold them."""
    own = Path(
        resolve_model_path(trial(model={"generated": {**trial().model.generated.model_dump(), "seed": 5}}).model, cache)
    )  # pyright: ignore
    path = tmp_path / "start"
    AutoModelForCausalLM.from_pretrained(own).save_pretrained(path)
    AutoTokenizer.from_pretrained(own).save_pretrained(path)
    odd = {"eos_token_id": [7, 9], "do_sample": False, "temperature": 0.6, "repetition_penalty": 1.3}
    (path / "generation_config.json").write_text(json.dumps(odd))
    for lora in (None, {"r": 2}):
        run = tmp_path / f"run {lora is None}"
        finish(TrainingSession(cache).train(trial(model={"name_or_path": str(path)}, lora=lora), run))
        logged = json.loads((run / "model/generation_config.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert logged["eos_token_id"] == sorted({7, 9, tokenizer.eos_token_id})
        assert (logged["temperature"], logged["repetition_penalty"]) == (0.6, 1.3)


def test_a_models_own_generation_settings_do_not_change_the_answers(cache: Path) -> None:
    """A published model's penalty for repetition or its beams are filled in by transformers where a call is silent."""
    requested = trial()
    pairs = prepare(requested.data, requested.model, cache).eval
    path = resolve_model_path(requested.model, cache)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = load_model(requested.model, path, torch.device("cpu"))
    how: dict[str, Any] = {"max_new_tokens": 12, "budget": 999, "check_cancelled": lambda: None}
    plain = complete_greedily(model, tokenizer, pairs, [0, 1], **how)
    penalised = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id, repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=3
    )
    model.generation_config = penalised
    assert complete_greedily(model, tokenizer, pairs, [0, 1], **how) == plain
    assert model.generation_config is penalised


def test_ends_are_the_models_the_tokenizers_and_the_datas(cache: Path) -> None:
    requested = trial()
    path = resolve_model_path(requested.model, cache)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = load_model(requested.model, path, torch.device("cpu"))
    eos = tokenizer.eos_token_id
    for own, stops, expected in ((None, (), [eos]), (eos, (), [eos]), ([8, eos], (9,), sorted([8, eos, 9]))):
        model.generation_config.eos_token_id = own
        assert end_token_ids(model, tokenizer, stops) == expected
