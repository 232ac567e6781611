"""Rewards are the same numbers in training, in evaluation and in the reports that are made from a trial's files."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dashboards.analysis.held_out_pairs import metric_by_pair, read_held_out
from tests.support.objectives import OBJECTIVES, random_logps, update_totals
from trainer.config.loss_config import CpoLoss, DpoLoss
from trainer.evaluation.evaluator import eval_metrics, write_eval_pairs
from trainer.objectives.losses import pair_loss, required_stats
from trainer.objectives.pair_logps import PairLogps

NAME = "eval_rewards/accuracies"
LD = [name for name, loss in OBJECTIVES.items() if isinstance(loss, DpoLoss) and loss.ld_alpha is not None]


class Rows:
    """What the writer of the file reads of a data set."""

    def __init__(self, pairs: int) -> None:
        self.sources, self.rows = np.zeros(pairs, np.int32), np.arange(pairs)


def reported(folder: Path, name: str, logps: PairLogps, start: PairLogps) -> Any:
    """The metric's value of each pair, as the pages compute them from a trial's file."""
    path = folder / "eval_pairs.safetensors"
    write_eval_pairs(path, logps, start, Rows(len(logps)))  # pyright: ignore[reportArgumentType]
    held_out = read_held_out(path)
    assert held_out is not None
    return metric_by_pair(NAME, held_out, OBJECTIVES[name])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in LD])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), pairs=st.integers(1, 12), per_token=st.sampled_from([0.01, 1.0, 30.0]))
def test_reward_accuracy_on_the_page_is_the_one_of_evaluation(
    name: str, seed: int, pairs: int, per_token: float
) -> None:
    loss, found = OBJECTIVES[name], random_logps(pairs, seed, per_token)
    start = found.reference
    assert start is not None
    logps = replace(found, reference=start if required_stats(loss).reference else None)
    evaluated = eval_metrics(loss, logps, [5] * pairs)[NAME]
    with tempfile.TemporaryDirectory() as folder:
        values = reported(Path(folder), name, replace(found, reference=None), start)
    assert values.mean() == pytest.approx(evaluated, abs=1e-12)
    terms = pair_loss(loss, logps, update_totals(logps))
    assert (values > 0).tolist() == (terms.chosen_rewards > terms.rejected_rewards).tolist()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), pairs=st.integers(2, 12), label=st.integers(1, 2**12 - 2))
def test_values_of_labelled_rows_have_the_metric_as_their_mean(seed: int, pairs: int, label: int) -> None:
    """And by the delta method the variance of a difference of means over two groups of rows."""
    desirable = torch.tensor([bool(label >> i & 1) for i in range(pairs)])
    desirable[0], desirable[1] = True, False
    loss, found = OBJECTIVES["kto-apo-zero"], random_logps(pairs, seed)
    assert found.reference is not None

    def of_labels(logps: PairLogps) -> PairLogps:
        columns = {n: c * (desirable if n.startswith("chosen") else ~desirable) for n, c in logps.columns().items()
                   if n.startswith(("chosen", "rejected"))}  # fmt: skip
        return PairLogps.from_columns(columns)

    logps, start = of_labels(found), of_labels(found.reference)
    evaluated = eval_metrics(loss, logps.with_reference(start), [5] * pairs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "eval_pairs.safetensors"
        write_eval_pairs(path, logps, start, Rows(pairs))  # pyright: ignore[reportArgumentType]
        held_out = read_held_out(path)
    assert held_out is not None
    assert not held_out.paired
    for name in ("margins/logp", "logps_per_token/chosen", "logps_per_token/rejected", "rewards/margins"):
        values = metric_by_pair(f"eval_{name}", held_out, loss)
        assert values is not None
        assert values.mean() == pytest.approx(evaluated[f"eval_{name}"], abs=1e-9)
    assert metric_by_pair(NAME, held_out, loss) is None
    assert NAME not in evaluated
    margins = metric_by_pair("eval_margins/logp", held_out, loss)
    assert margins is not None
    groups = [(logps.chosen / logps.chosen_tokens)[desirable], (logps.rejected / logps.rejected_tokens)[~desirable]]
    expected = sum(float(group.var(correction=0)) * pairs / len(group) for group in groups)
    assert float(margins.var()) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_cpo_ipo_compares_averages_and_dpo_sft_compares_no_reference(tmp_path: Path) -> None:
    """A longer chosen response: of lower sum and higher average; and one that the initial model liked better."""
    two = {"chosen_tokens": torch.tensor([10]), "rejected_tokens": torch.tensor([2])}
    logps = PairLogps(chosen=torch.tensor([-9.0]).double(), rejected=torch.tensor([-4.0]).double(), **two)
    start = PairLogps(chosen=torch.tensor([-1.0]).double(), rejected=torch.tensor([-9.0]).double(), **two)
    assert reported(tmp_path, "cpo-ipo", logps, start).tolist() == [1.0]
    assert reported(tmp_path, "cpo", logps, start).tolist() == [0.0]
    even = replace(logps, chosen=torch.tensor([-3.0]).double())
    assert reported(tmp_path, "dpo-sft", even, start).tolist() == [1.0]
    assert reported(tmp_path, "dpo-sigmoid", even, start).tolist() == [0.0]
    assert isinstance(OBJECTIVES["cpo-ipo"], CpoLoss)


@pytest.mark.parametrize("name", LD)
def test_length_desensitised_rewards_are_not_guessed(name: str, tmp_path: Path) -> None:
    """The file has no sums over the shorter response's length of the initial model."""
    found = random_logps(4)
    assert found.reference is not None
    assert reported(tmp_path, name, replace(found, reference=None), found.reference) is None
