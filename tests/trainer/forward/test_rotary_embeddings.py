"""Models whose rotary frequencies switch by length: each sequence is computed as if alone, whatever its batch."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.support.small_trials import MODEL, finish, trial, without_speed
from tests.support.trl_oracle import Pair, gradients, make_pairs, tiny_model, totals_of, worst
from trainer.config.loss_config import SimpoLoss
from trainer.config.trial import GeneratedModel
from trainer.evaluation.completions import generation_batches
from trainer.evaluation.evaluator import pair_batches
from trainer.forward.packing import packed_lengths
from trainer.forward.pair_model import PairModel
from trainer.forward.rotary_embeddings import RotarySwitch
from trainer.objectives.pair_logps import RequiredStats
from trainer.results import RunStatus
from trainer.synthetic import generate_model
from trainer.training_session import TrainingSession

LIMIT = 30
SEED = 0
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.9 * i for i in range(8)],
    "original_max_position_embeddings": LIMIT,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
PHI = {"original_max_position_embeddings": LIMIT, "max_position_embeddings": 128}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", PHI | {"rope_parameters": LONGROPE}),
    "longrope with scales": (
        "phimoe",
        PHI | MOE | {"rope_parameters": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.4}},
    ),
    "dynamic": ("llama", {"max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC}),
    "dynamic by layer type": (
        "gemma3_text",
        {"max_position_embeddings": LIMIT, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
        | {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default"}}},
    ),
}


def build(case: str) -> PreTrainedModel:
    architecture, options = CASES[case]
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
    return tiny_model(architecture, **(sizes | options | ({"head_dim": 16} if architecture == "gemma3_text" else {})))


def pairs_across_the_limit() -> list[Pair]:
    """Short, long, and with chosen and rejected on different sides."""
    pairs = make_pairs(10, seed=SEED)
    sides = {tuple(len(p.prompt) + len(r) > LIMIT for r in (p.chosen, p.rejected)) for p in pairs}
    assert len(sides) == 4, "all four combinations"
    return pairs


def alone(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Plain transformers over the one row; a copy, since a row changes the frequencies of those that follow."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = deepcopy(model)(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(1, torch.tensor([*response])[:, None]).sum())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ["packed", "separate"])
def test_a_batch_is_the_sum_of_its_rows(case: str, attention: str) -> None:
    model, pairs = build(case), pairs_across_the_limit()
    before = deepcopy(model)
    ours = PairModel(model, attention)  # pyright: ignore[reportArgumentType]
    for _ in range(2):  # nothing of a batch is left for the next
        found = ours.logps(pairs, RequiredStats(prompt=True))
        for index, pair in enumerate(pairs):
            for response, sums in ((pair.chosen, found.chosen), (pair.rejected, found.rejected)):
                assert float(sums[index]) == pytest.approx(alone(before, pair.prompt, response), rel=1e-5)
    torch.testing.assert_close(ours.logps(pairs[:1]).chosen, found.chosen[:1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ["packed", "separate"])
def test_gradients_do_not_hang_on_the_budget(case: str, attention: str) -> None:
    """Of the whole update, for several budgets, against pair by pair; packed pairs keep within the budget."""
    model, pairs = build(case), pairs_across_the_limit()
    ours = PairModel(model, attention)  # pyright: ignore[reportArgumentType]
    totals = totals_of(pairs)
    sizes = [[len(part) for part in (p.prompt, p.chosen, p.rejected)] for p in pairs]
    if attention == "packed":
        costs = packed_lengths(*(list(column) for column in zip(*sizes, strict=True)), ours.rotary.key)
    else:
        costs = [2 * (p + max(c, r) - 1) for p, c, r in sizes]

    def run(budget: int) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for batch in pair_batches(ours, costs, range(len(pairs)), budget):
            before, chosen = ours.counters.tokens, [pairs[i] for i in batch]
            total += float(ours.backward(chosen, SimpoLoss(), None, totals, torch.Tensor.backward).loss)
            assert len(batch) == 1 or ours.counters.tokens - before <= budget
        return total, gradients(model)

    loss, right = run(1)
    for budget in (120, 250, 100_000):
        found, grads = run(budget)
        assert found == pytest.approx(loss, rel=1e-5)
        assert worst(grads, right) < 1e-4


def test_pairs_on_one_side_share_their_prompts() -> None:
    model = build("longrope")
    pairs = [p for p in make_pairs(40) if len({len(p.prompt) + len(r) > LIMIT for r in (p.chosen, p.rejected)}) == 1]
    assert len(pairs) > 10
    ours = PairModel(model, "packed")
    ours.logps(pairs)
    assert ours.counters.tokens == sum(len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in pairs)


def test_models_of_fixed_frequencies_have_no_switch() -> None:
    for name in ("llama", "qwen3", "gemma3_text"):
        assert RotarySwitch.of(tiny_model(name, **({"head_dim": 16} if name != "llama" else {}))) is None
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    assert RotarySwitch.of(tiny_model("llama", rope_parameters=yarn)) is None


def test_what_generation_left_does_not_matter() -> None:
    """Dynamic frequencies grow with a long prompt, and stay for whoever comes next."""
    model, pairs = build("dynamic"), pairs_across_the_limit()
    expected, ours = PairModel(deepcopy(model)).logps(pairs).chosen, PairModel(model)
    with torch.no_grad():
        model(torch.arange(1, 90)[None])
    assert not torch.equal(model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq)
    torch.testing.assert_close(ours.logps(pairs).chosen, expected)


def test_only_answers_that_can_cross_the_switch_are_written_alone() -> None:
    """Order is kept, and the others share batches within the budget."""
    model, lengths = build("longrope"), [5, 6, 25, 7, 8, 9, 26]
    found = generation_batches(model, lengths, range(7), max_new_tokens=6, budget=64)
    assert found == [[0, 1], [2], [3, 4], [5], [6]]
    assert generation_batches(model, lengths[:2], [0, 1], max_new_tokens=6, budget=64) == [[0, 1]]
    fixed = tiny_model("llama")
    assert generation_batches(fixed, lengths, range(7), max_new_tokens=6, budget=64) == [[0, 1], [2, 3], [4, 5], [6]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Phi-3 whose switch lies among the lengths of the generated task."""
    folder = tmp_path_factory.mktemp("phi")
    tokenizer = AutoTokenizer.from_pretrained(generate_model(GeneratedModel(**MODEL["generated"]), folder / "cache"))
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32, "intermediate_size": 32}
    options = {**PHI, **sizes, "num_hidden_layers": 2, "rope_parameters": LONGROPE, "pad_token_id": 0}
    config = AutoConfig.for_model("phi3", vocab_size=320, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def test_a_trial_does_not_hang_on_its_budget(place: str, tmp_path: Path) -> None:
    """Answers of a model that switches while it writes them included."""
    metrics: dict[int, Any] = {}
    completions: dict[int, str] = {}
    for budget in (40, 150, 100_000):
        config = trial(
            model={"name_or_path": place},
            training={"tokens_per_micro_batch": budget, "max_steps": 3, "learning_rate": 1e-3},
            evaluation={"prompts": 5, "max_new_tokens": 12, "samples": 5},
        )
        found, result = finish(TrainingSession(tmp_path / f"cache{budget}").train(config, tmp_path / str(budget)))
        assert result.status is RunStatus.FINISHED
        metrics[budget], completions[budget] = (
            without_speed(found),
            (tmp_path / str(budget) / "samples.jsonl").read_text(),
        )
    for budget in (40, 150):
        assert completions[budget] == completions[100_000]
        for one, other in zip(metrics[budget], metrics[100_000], strict=True):
            assert one[1] == pytest.approx(other[1], rel=1e-4, abs=1e-6)
    assert max([len(json.loads(line)["answer"].split()) for line in completions[40].splitlines()]) > 0
