"""A trial's name: the same for equal configurations, also after an upgrade that knows more settings."""

import json
from itertools import combinations
from typing import Any

import pytest

from tests.support.objectives import OBJECTIVES
from trainer.config.trial import TrainingConfig, TrialConfig, config_fingerprint
from trainer.training_session import result_digest

BASE: dict[str, Any] = {"model": "m", "data": {"train": "t.jsonl"}}


def trial(**more: Any) -> TrialConfig:
    return TrialConfig.model_validate(BASE | more)


class LaterTraining(TrainingConfig):
    """What a later version may know beside all of this one's leaves."""

    muon: bool = False


class LaterTrial(TrialConfig):
    training: LaterTraining = LaterTraining()
    distil: str | None = None


@pytest.mark.parametrize(
    "written", [{}, {"training": {"learning_rate": 3e-7}}, {"lora": {"r": 8}}, {"loss": {"kind": "dpo", "beta": 0.01}}]
)
def test_a_leaf_that_an_upgrade_adds_changes_no_name(written: dict[str, Any]) -> None:
    before = trial(**written)
    later = LaterTrial.model_validate(BASE | written | {"training": LaterTraining(**written.get("training", {}))})
    assert "training.muon" in later.flat_params()
    assert config_fingerprint(later) == config_fingerprint(before)
    assert result_digest(later) == result_digest(before)
    used = LaterTrial.model_validate(BASE | written | {"training": LaterTraining(muon=True)})
    assert config_fingerprint(used) != config_fingerprint(before)


def test_a_default_written_out_is_no_other_trial() -> None:
    full = json.loads(trial().model_dump_json())
    assert config_fingerprint(TrialConfig.model_validate(full)) == config_fingerprint(trial())


def test_what_differs_has_another_name() -> None:
    different = [
        trial(),
        trial(lora={}),
        trial(model={"generated": {}}),
        trial(model={"generated": {"hidden_size": 96}}),
        trial(engine="trl", loss={"kind": "dpo"}),
        trial(data={"train": ["t.jsonl", "u.jsonl"]}),
        trial(data={"train": "t.jsonl", "eval": "e.jsonl"}),
        trial(training={"seed": 1}),
        *(trial(loss={"kind": kind}) for kind in ("dpo", "cpo", "orpo")),
        trial(loss={"kind": "simpo", "beta": 3}),
    ]
    for one, other in combinations(different, 2):
        assert config_fingerprint(one) != config_fingerprint(other)
        assert result_digest(one) != result_digest(other)


def test_every_objective_has_its_own_name() -> None:
    assert len({config_fingerprint(trial(loss=loss)) for loss in OBJECTIVES.values()}) == len(OBJECTIVES)
