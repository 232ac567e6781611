"""Answers for a judge: greedy as everywhere, draws that belong to their prompt; and a reward model's scores."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tests.support.data_cases import chat_message
from tests.support.small_trials import finish, trial
from trainer.config.trial import DataConfig, FileSource
from trainer.data import prepare
from trainer.data.data_findings import UnreadableData
from trainer.data.pair_dataset import select_prompts
from trainer.evaluation.completions import complete_greedily
from trainer.evaluation.judge_prompts import JudgePrompt, fixed_prompts, prompt_text
from trainer.evaluation.prompt_files import load_judge_prompts
from trainer.evaluation.reward_model import RewardInput, RewardScorer, reward_model_fingerprint
from trainer.evaluation.text_generation import DecodingConfig, GumbelNoise, TextGenerator
from trainer.models.model_files import resolve_model_path
from trainer.models.policy_model import load_model
from trainer.results import ModelError
from trainer.training_session import TrainingSession

GREEDY = DecodingConfig(6)
SAMPLED = DecodingConfig(6, 0, 0.9, 0.95, 3)


def silent() -> None:
    """Nobody interrupts."""


@pytest.fixture(scope="module")
def prompts(cache: Path) -> tuple[list[JudgePrompt], Any]:
    config = trial()
    return fixed_prompts(config.data, config.model, cache, 5)


def texts(
    text_generator: TextGenerator, prompts: list[JudgePrompt], decoding: DecodingConfig, budget: int = 1000
) -> dict[str, str]:
    out: dict[str, str] = {}
    for batch in text_generator.generate(prompts, decoding, budget=budget, check_cancelled=silent):
        out |= {key: written.text for key, written in batch.items()}
    return out


def test_the_prompts_are_the_held_out_ones_in_words(cache: Path, prompts: tuple[list[JudgePrompt], Any]) -> None:
    found, tokenizer = prompts
    config = trial()
    pairs = prepare(config.data, config.model, cache).eval
    assert [list(p.ids) for p in found] == [pairs.pair(i).prompt.tolist() for i in select_prompts(pairs, 5)]
    assert len({p.key for p in found}) == 5
    for prompt in found:
        assert prompt.messages == [{"role": "user", "content": prompt.text}]
        assert prompt.text in tokenizer.decode(list(prompt.ids))
        assert prompt.expected
    assert prompt_text([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "System: s\n\nUser: u"


def test_prompts_of_their_own_are_rendered_as_the_held_out_ones(
    cache: Path, prompts: tuple[list[JudgePrompt], Any], tmp_path: Path
) -> None:
    held_out, _ = prompts
    config = trial()
    rows = [{"instruction": p.text, "answer": "x", "output": "of somebody"} for p in held_out]
    rows[1]["instruction"] = [{"role": "user", "content": held_out[1].text}]
    (tmp_path / "eval.json").write_text(json.dumps([*rows, rows[0]]))
    source = FileSource(path=str(tmp_path / "eval.json"), columns={"prompt": "instruction"})
    found, _ = fixed_prompts(config.data, config.model, cache, 100, source)
    assert [(p.key, p.ids, p.messages) for p in found] == [(p.key, p.ids, p.messages) for p in held_out]
    assert {p.expected for p in found} == {"x"}
    assert [p.key for p in fixed_prompts(config.data, config.model, cache, 2, source)[0]] == [
        p.key for p in held_out[:2]
    ]


def test_rows_that_are_no_prompts_are_named(tmp_path: Path) -> None:
    data, file = trial().data, tmp_path / "asked.jsonl"
    source = FileSource(path=str(file))
    rows: list[dict[str, Any]] = [{"prompt": "fine"}, {"prompt": ""}, {"prompt": 3}, {"prompt": [{"role": "user"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UnreadableData, match=r"3 rows without a usable prompt: row 2: no prompt; row 3: .*; row 4: "):
        load_judge_prompts(source, data)
    file.write_text('{"asked": "fine"}\n')
    with pytest.raises(UnreadableData, match="no column 'prompt'"):
        load_judge_prompts(source, data)
    file.write_text("")
    with pytest.raises(UnreadableData, match="has no rows"):
        load_judge_prompts(source, data)


def test_plain_text_stays_plain(tmp_path: Path) -> None:
    plain = {"prompt": "Say:", "chosen": " yes", "rejected": " no"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(plain) + "\n" + json.dumps(plain | {"prompt": "Tell:"}) + "\n")
    data = DataConfig(train=(FileSource(path=str(tmp_path / "rows.jsonl")),), eval_share=0.5)
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "Ask:"}\n')
    assert [each.prompt for each in load_judge_prompts(FileSource(path=str(file)), data)] == ["Ask:"]
    file.write_text('{"prompt": [{"role": "user", "content": "Ask:"}]}\n')
    with pytest.raises(UnreadableData, match="row 1: messages, but the sweep's rows are plain text"):
        load_judge_prompts(FileSource(path=str(file)), data)
    file.write_text('{"prompt": "Ask:", "system": "Be kind."}\n')
    with pytest.raises(UnreadableData, match="row 1: A system text with plain text"):
        load_judge_prompts(FileSource(path=str(file)), data)
    applied = data.model_copy(update={"apply_template": True})
    requested = load_judge_prompts(FileSource(path=str(file)), applied)
    assert [each.prompt for each in requested] == [[chat_message("system", "Be kind."), chat_message("user", "Ask:")]]


def test_tools_and_their_calls_are_shown_to_a_judge() -> None:
    call = {"type": "function", "function": {"name": "tides", "arguments": {"at": "Kiel"}}}
    progress = [
        chat_message("user", "When?"),
        {"role": "assistant", "tool_calls": [call]},
        chat_message("tool", "04:10"),
    ]
    assert prompt_text(progress, [{"name": "tides"}]) == (
        '[tools: [{"name": "tides"}]]\n\nUser: When?\n\nAssistant: [tool_calls: [{"type": "function", "function": '
        '{"name": "tides", "arguments": {"at": "Kiel"}}}]]\n\ntool: 04:10'
    )
    assert prompt_text(progress[:1]) == "When?"


def test_greedy_is_what_the_evaluation_answers(cache: Path, prompts: tuple[list[JudgePrompt], Any]) -> None:
    found, tokenizer = prompts
    config = trial()
    text_generator = TextGenerator.load(config, None, tokenizer, cache)
    pairs = prepare(config.data, config.model, cache).eval
    model = load_model(config.model, resolve_model_path(config.model, cache), torch.device("cpu"))
    chosen = select_prompts(pairs, 5)
    known = complete_greedily(model, tokenizer, pairs, chosen, max_new_tokens=6, budget=1000, check_cancelled=silent)
    assert [texts(text_generator, found, GREEDY)[p.key] for p in found] == [answer.answer for answer in known]


def test_a_draw_belongs_to_its_prompt_however_it_is_batched(
    cache: Path, prompts: tuple[list[JudgePrompt], Any]
) -> None:
    found, tokenizer = prompts
    text_generator = TextGenerator.load(trial(), None, tokenizer, cache)
    together = texts(text_generator, found, SAMPLED)
    assert texts(text_generator, found, SAMPLED, budget=1) == together
    assert texts(text_generator, found[2:], SAMPLED) == {p.key: together[p.key] for p in found[2:]}
    assert texts(text_generator, found, DecodingConfig(6, 1, 0.9, 0.95, 3)) != together
    assert texts(text_generator, found, DecodingConfig(6, 0, 0.9, 0.95, 4)) != together


def test_a_trials_weights_answer_whole_or_as_adapters(
    cache: Path, prompts: tuple[list[JudgePrompt], Any], tmp_path: Path
) -> None:
    found, tokenizer = prompts
    start = texts(TextGenerator.load(trial(), None, tokenizer, cache), found, GREEDY)
    for name, more in (("full", {}), ("lora", {"lora": {"r": 4}})):
        config = trial(training={"learning_rate": 5e-2}, **more)
        finish(TrainingSession(cache).train(config, tmp_path / name))
        weights = tmp_path / name / "model"
        assert (weights / "adapter_config.json").exists() == (name == "lora")
        assert texts(TextGenerator.load(config, weights, tokenizer, cache), found, GREEDY) != start


def test_noise_draws_from_the_softmax() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(0)
    draws = 4000
    noise = GumbelNoise(list(range(draws)))
    sampled = noise(torch.zeros(draws, 1, dtype=torch.long), scores.expand(draws, 4))  # pyright: ignore[reportArgumentType]
    counts = Counter(sampled.argmax(1).tolist())
    expected = (scores.double().softmax(0) * draws).tolist()
    assert chisquare([counts[i] for i in range(4)], expected).pvalue > 1e-3
    assert not torch.equal(noise(None, scores.expand(draws, 4)), sampled)  # pyright: ignore[reportArgumentType]


def reward_model(cache: Path, to: Path, outputs: int = 1) -> Path:
    """A small random one, with the generated task's tokenizer."""
    source = resolve_model_path(trial().model, cache)
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = AutoConfig.from_pretrained(source, num_labels=outputs)
    torch.manual_seed(outputs)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


DIALOGUES = [
    RewardInput(f"k{i}", f"What is {i}?", [{"role": "user", "content": f"What is {i}?"}], "It is " + "so " * i)
    for i in range(5)
]


def scores(scorer: RewardScorer, budget: int) -> dict[str, float]:
    out: dict[str, float] = {}
    for batch in scorer.score(DIALOGUES, budget=budget, check_cancelled=silent):
        out |= batch
    return out


@pytest.mark.parametrize("template", [True, False])
def test_scores_are_the_models_own_whatever_the_batch(cache: Path, tmp_path: Path, template: bool) -> None:
    path = reward_model(cache, tmp_path / "rm")
    if not template:
        (path / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert (tokenizer.chat_template is not None) == template
    scorer = RewardScorer(str(path))
    alone, together = scores(scorer, 1), scores(scorer, 10_000)
    assert alone == pytest.approx(together, abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    for dialogue in DIALOGUES:
        if template:
            full = [*(dialogue.messages or []), {"role": "assistant", "content": dialogue.completion}]
            ids = tokenizer(tokenizer.apply_chat_template(full, tokenize=False), add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(dialogue.text, dialogue.completion)["input_ids"]
        with torch.no_grad():
            own = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
        assert together[dialogue.key] == pytest.approx(own, abs=1e-5)
    assert reward_model_fingerprint(str(path), None).startswith("sha256:")


def test_which_output_is_the_reward_must_be_clear(cache: Path, tmp_path: Path) -> None:
    path = str(reward_model(cache, tmp_path / "rm", outputs=3))
    with pytest.raises(ModelError, match="has 3 outputs; set label"):
        RewardScorer(path)
    with pytest.raises(ModelError, match="the last one is label 2"):
        RewardScorer(path, label=3)
    assert scores(RewardScorer(path, label=0), 1000) != scores(RewardScorer(path, label=2), 1000)


def test_a_language_model_is_no_reward_model(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not a reward model: it lacks score\.weight"):
        RewardScorer(resolve_model_path(trial().model, cache))
    with pytest.raises(ModelError, match="cannot be loaded"):
        RewardScorer(str(tmp_path))
