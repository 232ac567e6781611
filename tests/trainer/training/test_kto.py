"""KTO on pairs: its estimate of the KL divergence from responses after the prompts of other pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.device_waits import evaluator_of, packed_engine
from tests.support.small_trials import DATA, MODEL, finish, model_bytes, take, trial, without_speed
from tests.support.trl_oracle import Pair
from trainer.data.pair_dataset import MismatchedPairs, PairDataset, TokenizedPair, write_pairs
from trainer.forward.pair_model import PairModel
from trainer.results import RunStatus, TrialError
from trainer.training_session import TrainingSession

LORA = {"r": 2, "alpha": 4, "dropout": 0.3}


def dataset(folder: Path, rows: list[tuple[list[int], list[int], list[int]]]) -> PairDataset:
    def ids(given: list[int]) -> np.ndarray:
        return np.array(given, dtype=np.int32)

    write_pairs(folder, "train", [TokenizedPair(*map(ids, row), 0, n, None) for n, row in enumerate(rows, start=1)])
    return PairDataset.open(folder, "train")


def test_responses_come_from_the_nearest_pair_before_with_another_prompt(tmp_path: Path) -> None:
    rows = [([1, 2], [n, 3], [n, 4, 5]) for n in (10, 11)] + [([6], [12], [12, 7, 8, 9]), ([1, 2], [13], [13])]
    found = MismatchedPairs(dataset(tmp_path, rows))
    assert [(int(p.chosen[0]), int(p.rejected[0])) for p in map(found.pair, range(4))] == [
        (12, 12), (12, 12), (11, 11), (12, 12),
    ]  # fmt: skip
    # The longest sequence of the data has 5 tokens: a prompt of 2 leaves 3 of the response's 4.
    assert found.pair(0).rejected.tolist() == [12, 7, 8]
    assert [len(found.pair(i).prompt) for i in range(4)] == found.prompt_lengths.tolist() == [2, 2, 1, 2]
    assert [len(found.pair(i).chosen) for i in range(4)] == found.chosen_lengths.tolist()
    assert [len(found.pair(i).rejected) for i in range(4)] == found.rejected_lengths.tolist()


def test_data_of_one_prompt_have_no_mismatched_responses(session: TrainingSession, tmp_path: Path) -> None:
    rows = [([1, 2], [3], [4]), ([1, 2], [5], [6])]
    with pytest.raises(ValueError, match="all pairs have the same prompt"):
        MismatchedPairs(dataset(tmp_path, rows))
    file = tmp_path / "pairs.jsonl"
    answers = [{"prompt": "Say a number.", "chosen": f"{n} it is", "rejected": f"no {n}"} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    given = {"data": DATA | {"train": str(file), "apply_template": False}, "training": {"max_steps": 1}}
    with pytest.raises(TrialError, match=r"the same prompt.*loss_type apo_zero_unpaired"):
        finish(session.train(trial("kto", **given), tmp_path / "kto"))
    apo = trial({"kind": "kto", "loss_type": "apo_zero_unpaired"}, **given)
    assert finish(session.train(apo, tmp_path / "apo"))[1].status is RunStatus.FINISHED


def test_the_kl_of_an_update_is_over_all_of_its_micro_batches(cache: Path) -> None:
    config = trial("kto", training={"tokens_per_micro_batch": 100, "learning_rate": 2e-2, "warmup_ratio": 0.0})
    engine, policy = packed_engine(config, cache)
    inputs = engine._inputs  # pyright: ignore[reportPrivateUsage]
    first = engine.step(1)
    assert first["kl"] == (0.0, 8.0)
    number, found = 2, []
    while number <= 6 and not found:
        indexes, pairs = engine.plan.order.pairs_of(number), MismatchedPairs(inputs.train)
        sums = 0.0
        for index in indexes:
            pair = pairs.pair(index)
            now = PairModel(policy.base.eval()).logps([Pair(pair.prompt, pair.chosen, pair.rejected)])
            assert inputs.reference is not None
            assert inputs.reference.mismatched_chosen is not None
            assert inputs.reference.mismatched_rejected is not None
            sums += float(now.chosen[0] - inputs.reference.mismatched_chosen[index])
            sums += float(now.rejected[0] - inputs.reference.mismatched_rejected[index])
        policy.base.train()
        value, weight = engine.step(number)["kl"]
        assert value / weight == pytest.approx(max(0.0, sums / 16), rel=1e-4, abs=1e-5)
        found += [sums] if sums > 0.1 else []
        number += 1
    assert found, "the estimate was 0 in every update"


def test_micro_batches_and_layouts_change_nothing(session: TrainingSession, tmp_path: Path) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    for name, budget, more in (
        ("small", 60, {}),
        ("one", 10_000, {}),
        ("padded", 200, {"model": MODEL | {"attention": "separate"}}),
    ):
        config = trial("kto", training={"learning_rate": 1e-3, "tokens_per_micro_batch": budget}, **more)
        finish(session.train(config, tmp_path / name))
        (file,) = (tmp_path / name / "model").glob("*.safetensors")
        weights.append(load_file(file))
    for other in weights[1:]:
        assert max(float((weights[0][name] - other[name]).abs().max()) for name in other) < 2e-5


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "adapters"])
def test_a_resumed_run_is_the_same_to_the_bit(cache: Path, tmp_path: Path, lora: dict[str, Any] | None) -> None:
    config = trial("kto", training={"save_steps": 1, "logging_steps": 1}, lora=lora)
    full, _ = finish(TrainingSession(cache).train(config, tmp_path / "whole"))
    for taken in (2, 5):
        begun = take(TrainingSession(cache).train(config, tmp_path / f"{taken}-1"), taken)
        assert without_speed(begun) == without_speed(full[:taken])
        found, result = finish(TrainingSession(cache).train(config, tmp_path / f"{taken}-2", [tmp_path / f"{taken}-1"]))
        assert result.status is RunStatus.FINISHED
        assert without_speed(found) == without_speed(full)
        assert model_bytes(tmp_path / f"{taken}-2") == model_bytes(tmp_path / "whole")


def test_log_probs_of_the_initial_model_are_computed_once(tmp_path: Path) -> None:
    """apo_zero_unpaired needs none of mismatched responses and takes those of DPO."""
    session, seed = TrainingSession(tmp_path / "cache"), {"seed": 7, "pairs_per_update": 6}
    kinds: list[Any] = [({"kind": "kto"}, {}), ({"kind": "kto", "beta": 0.5}, seed), ({"kind": "dpo"}, {})]
    kinds.append(({"kind": "kto", "loss_type": "apo_zero_unpaired"}, {}))
    counts: list[int] = []
    for number, (loss, training) in enumerate(kinds):
        history, _ = finish(session.train(trial(loss, training=training), tmp_path / str(number)))
        counts.append(session.counters["reference_computed"])
        assert ("eval_kl" in history[-1].metrics) == (loss["kind"] == "kto")
    assert counts == [1, 1, 2, 2]


def test_parts_have_the_bits_of_the_whole(cache: Path) -> None:
    """So that processes may share the work."""
    evaluator, pairs = evaluator_of(trial("kto", training={"tokens_per_micro_batch": 150}), cache)
    whole = evaluator.logps(pairs)
    parts = evaluator.parts(pairs, 4)
    assert len(parts) > 2
    for part in parts:
        found = evaluator.logps(pairs, part)
        for name, column in found.columns().items():
            assert torch.equal(column, whole.columns()[name][part]), name
    assert whole.mismatched_chosen is not None
    assert not torch.equal(whole.mismatched_chosen, whole.chosen)
