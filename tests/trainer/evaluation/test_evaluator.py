from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.support.small_trials import DATA, MODEL, trial
from trainer.config.trial import DataConfig, GeneratedModel, ModelConfig
from trainer.data import PairDataset, prepare
from trainer.data.pair_dataset import select_prompts
from trainer.distributed.processes import CancelToken, ProcessGroup
from trainer.evaluation.completions import Completion, complete_greedily, completion_metrics, repetition
from trainer.evaluation.evaluator import Evaluator, pair_costs, score_pairs
from trainer.forward.pair_model import PairModel
from trainer.objectives.pair_logps import RequiredStats
from trainer.synthetic import generate_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_model(GeneratedModel(**MODEL["generated"]), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(model_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_path).eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairDataset:
    cache = tmp_path_factory.mktemp("data")
    return prepare(DataConfig.model_validate(DATA), ModelConfig.model_validate(MODEL), cache).eval


def nothing() -> None:
    pass


@pytest.mark.parametrize("attention", ["packed", "separate"])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_log_probs_of_a_set_are_in_order_whatever_the_batches(
    model: PreTrainedModel, pairs: PairDataset, attention: str, budget: int
) -> None:
    found = score_pairs(PairModel(model, attention), pairs, RequiredStats(), budget, ProcessGroup(), nothing)  # pyright: ignore
    for index in range(len(pairs)):
        pair = pairs.pair(index)
        for response, ours, count in (
            (pair.chosen, found.chosen[index], found.chosen_tokens[index]),
            (pair.rejected, found.rejected[index], found.rejected_tokens[index]),
        ):
            ids = torch.tensor(np.concatenate([pair.prompt, response]), dtype=torch.long)[None]
            with torch.no_grad():
                logits = model(ids).logits[0, len(pair.prompt) - 1 : -1].double()
            token = logits.log_softmax(-1).gather(1, torch.tensor(response, dtype=torch.long)[:, None])
            assert float(ours) == pytest.approx(float(token.sum()), rel=1e-5)
            assert int(count) == len(response)


@pytest.mark.parametrize("attention", ["packed", "separate"])
def test_parts_of_a_set_have_the_log_probs_of_all_bit_for_bit(
    model_path: Path, model: PreTrainedModel, pairs: PairDataset, attention: str
) -> None:
    group, tokenizer = ProcessGroup(), AutoTokenizer.from_pretrained(model_path)
    config = trial(training={"tokens_per_micro_batch": 150})
    cancel = CancelToken(group, lambda: False)
    evaluator = Evaluator(config, model, PairModel(model, attention), tokenizer, pairs, group, cancel)  # pyright: ignore
    whole, parts = evaluator.logps(pairs), evaluator.parts(pairs, 2)
    assert (len(parts), sorted(pair for part in parts for pair in part)) == (2, list(range(len(pairs))))
    for part in parts:
        found, expected = evaluator.logps(pairs, part).columns(), whole.select(part).columns()
        assert all(torch.equal(column, expected[name]) for name, column in found.items())


def test_costs_are_what_the_model_computes(model: PreTrainedModel, pairs: PairDataset) -> None:
    for attention in ("packed", "separate"):
        ours = PairModel(model, attention)  # pyright: ignore[reportArgumentType]
        ours.logps([pairs.pair(2)])
        assert pair_costs(ours, pairs)[2] == ours.counters.tokens


@pytest.mark.parametrize("budget", [1, 10_000])
def test_greedy_answers_equal_those_of_one_prompt_at_a_time(
    model_path: Path, model: PreTrainedModel, pairs: PairDataset, budget: int
) -> None:
    tokenizer, indexes = AutoTokenizer.from_pretrained(model_path), select_prompts(pairs, 5)
    completions = complete_greedily(
        model, tokenizer, pairs, indexes, max_new_tokens=7, budget=budget, check_cancelled=nothing
    )
    assert len({pairs.pair(i).prompt.tobytes() for i in indexes}) == 5
    for index, answer in zip(indexes, completions, strict=True):
        ids = pairs.pair(index).prompt.tolist()
        new: list[int] = []
        while len(new) < 7:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
        assert answer.tokens == len(new)
        assert answer.answer == tokenizer.decode(new, skip_special_tokens=True)
        assert answer.expected == pairs.answers[index]
        assert answer.right is False


def test_the_end_token_ends_an_answer(model_path: Path, model: PreTrainedModel, pairs: PairDataset) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    (free,) = complete_greedily(model, tokenizer, pairs, [0], max_new_tokens=6, budget=999, check_cancelled=nothing)
    assert free.tokens == 6
    ids = pairs.pair(0).prompt.tolist()
    with torch.no_grad():
        second = model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)[0, -1]
    model.generation_config.eos_token_id = [int(second), tokenizer.eos_token_id]
    (ended,) = complete_greedily(model, tokenizer, pairs, [0], max_new_tokens=6, budget=999, check_cancelled=nothing)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert ended.tokens <= 1


def test_repetition_counts_repeated_four_grams() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([1] * 8) == pytest.approx(4 / 5)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_answer_metrics() -> None:
    given = [
        Completion("", "", "a", True, 4, 0.5),
        Completion("", "", "b", False, 2, 0.0),
        Completion("", "", None, None, 3, 0.1),
    ]
    assert completion_metrics(given) == {"exact_answers": 0.5, "repetition": pytest.approx(0.2), "answer_length": 3.0}
    assert "exact_answers" not in completion_metrics(given[2:])
    assert completion_metrics([]) == {}
