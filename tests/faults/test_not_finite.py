"""Case 15: what is no number ends its trial as diverged, which is never the best; the sweep goes on."""

import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ExitCode
from orchestrator.execution.stop_reasons import StopKind
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState
from orchestrator.tracking.mlflow_client import connect
from tests.support.fake_session import FakeSession, run_study, write_script
from tests.support.recorders import ListSink
from tests.support.specs import METRIC, TINY_MODEL, make_spec, sweep_folder
from tests.support.without_ray import without_ray
from trainer.config.trial import TrialConfig
from trainer.results import StepMetrics

STRANGE: list[tuple[str, Any]] = [
    ("loss", math.nan),
    ("grad_norm", math.inf),
    (METRIC, math.nan),
    (METRIC, -math.inf),
    ("loss", None),
    (METRIC, "0.9"),
]


class StrangeSession(FakeSession):
    """Trial n reports the n-th strange value at step 2."""

    def on_update(self, config: TrialConfig, folder: Path, metrics: StepMetrics) -> StepMetrics:
        number = int(folder.parent.name)
        if number >= len(STRANGE) or metrics.step != 2:
            return metrics
        name, value = STRANGE[number]
        return StepMetrics(2, {**metrics.metrics, name: value})


ABSURD = """
name: absurd
base:
  model: {generated: TINY_MODEL}
  data:
    train: {generated: instructions, rows: 400}
    eval: {generated: instructions, split: eval, rows: 16}
    max_length: 128
  loss: {kind: simpo, beta: 2.0, gamma: 1.6}
  training: {pairs_per_update: 8, max_steps: 40, eval_steps: 8}
  evaluation: {prompts: 2, samples: 1, max_new_tokens: 8}
sft:
  training: {learning_rate: 3e-3, pairs_per_update: 8, max_steps: 40}
search:
  training.learning_rate: [1e-3, 0.1]
maximize: eval_accuracies/logp
budget: {concurrency: 1}
""".replace("TINY_MODEL", TINY_MODEL)


def test_a_learning_rate_that_kills_the_model_without_a_nan(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real sweep: seen in the study, in MLflow and in the table."""
    from orchestrator.cli.composition import start
    from orchestrator.folders import SweepFolder
    from orchestrator.spec.loading.loader import load_spec_text

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "runs"
    with without_ray():
        assert start(load_spec_text(ABSURD, tmp_path), root) is ExitCode.DONE
    with Study.open(SweepFolder(root, "absurd")) as study:
        sound, dead = study.trials()
        known = study.id
    assert sound.state is TrialState.COMPLETE
    assert (dead.state, dead.diverged) == (TrialState.PRUNED, True)
    assert "chosen log-prob fell from" in dead.reason
    assert dead.step < 40
    assert all(math.isfinite(value) for value in dead.metrics.values()), "no NaN gave it away"
    client = connect(root, f"sqlite:///{root.resolve() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("prefsweep")
    expected = f"tags.`prefsweep.sweep_id` = '{known}' and tags.`prefsweep.run` = '1'"
    run = client.search_runs([experiment.experiment_id], expected)[0]
    assert (run.data.tags["diverged"], run.data.tags["reason"]) == ("true", dead.reason)
    table = capfd.readouterr().out
    assert "DIVERGED" in table
    assert "log-prob fell from" in table


def test_values_that_are_no_numbers(tmp_path: Path, ray_cluster: None) -> None:
    write_script(tmp_path)
    sink, sound = ListSink(), len(STRANGE)
    with Study.create(sweep_folder(tmp_path), make_spec(sound + 1)) as study:
        stop = run_study(study, sink, open_session=StrangeSession)
        records, best = study.trials(), study.best()
        last = [study.metric_history(n)[-1] for n in range(sound)]
    assert stop.kind is StopKind.FINISHED
    assert best.number == sound
    for record, (name, _) in zip(records, STRANGE, strict=False):
        assert (record.state, record.diverged, record.value) == (TrialState.PRUNED, True, None)
        assert record.reason.startswith("diverged: ")
        assert name in record.reason
        assert "at step 2" in record.reason
        assert sink.tags(str(record.number))["reason"] == record.reason
    assert all(
        step_metrics.step == 2 and not math.isfinite(step_metrics.metrics[n])
        for step_metrics, (n, _) in zip(last, STRANGE, strict=True)
    )
    assert records[sound].state is TrialState.COMPLETE
