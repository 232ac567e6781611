import math

import pytest
import torch
from transformers import get_scheduler

from trainer.config.trial import TrainingConfig
from trainer.results import TrialError
from trainer.training.schedule import DataOrder, interval, lr_lambda, total_updates


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("total", "ratio"), [(1, 0.1), (7, 0.1), (20, 0.0), (33, 0.25), (10, 1.0)])
def test_rates_equal_those_of_transformers(kind: str, total: int, ratio: float) -> None:
    training = TrainingConfig(lr_scheduler_type=kind, warmup_ratio=ratio, learning_rate=3e-7)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-7)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=math.ceil(total * ratio), num_training_steps=total)
    ours = lr_lambda(training, total)
    for step in range(1, total + 1):
        assert 3e-7 * ours(step) == theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()


def test_updates_are_counted_exactly() -> None:
    assert total_updates(TrainingConfig(pairs_per_update=128), 61135) == 477
    assert total_updates(TrainingConfig(pairs_per_update=5, num_train_epochs=3), 10) == 6
    assert total_updates(TrainingConfig(pairs_per_update=10, num_train_epochs=0.3), 100) == 3
    assert total_updates(TrainingConfig(max_steps=4, pairs_per_update=8), 10) == 4


def test_less_than_one_update_says_the_numbers() -> None:
    with pytest.raises(TrialError, match="12 training pairs are fewer than one update of pairs_per_update 128"):
        total_updates(TrainingConfig(), 12)
    with pytest.raises(TrialError, match=r"0\.5 epochs of 20 training pairs are less than one update"):
        total_updates(TrainingConfig(num_train_epochs=0.5, pairs_per_update=16), 20)


def test_order_takes_each_pair_once_per_epoch_and_is_stateless() -> None:
    order = DataOrder(10, 4, seed=1)
    stream = [i for step in range(1, 6) for i in order.pairs_of(step)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert DataOrder(10, 4, seed=1).pairs_of(3) == stream[8:12]
    assert DataOrder(10, 4, seed=2).pairs_of(1) != stream[:4]


def test_intervals() -> None:
    assert (interval(None, 100), interval(None, 5), interval(7, 100)) == (10, 1, 7)
