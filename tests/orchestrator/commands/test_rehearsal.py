import json
from pathlib import Path

import pytest

import sweeps
from orchestrator.commands import rehearsal as rehearsal_module
from orchestrator.commands.local_plan import plan_locally
from orchestrator.commands.rehearsal import MAX_TRIALS, STEPS, rehearse
from orchestrator.spec.loading.loader import load_spec, load_spec_text
from trainer.config.trial import FileSource, GeneratedSource

SHIPPED = sorted(Path(sweeps.__file__).parent.glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "none"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_sweep_can_be_rehearsed(file: Path, tmp_path: Path) -> None:
    spec = load_spec(file)
    small = rehearse(spec, tmp_path).spec
    assert small.name == f"{spec.name}-rehearsal"
    assert small.base.model.generated is not None
    assert (small.base.loss, small.enqueue) == (spec.base.loss, spec.enqueue)
    plan = plan_locally(small, tmp_path, ())
    assert plan.trials is not None
    assert plan.trials <= MAX_TRIALS
    assert plan.updates_per_trial.most == STEPS
    sampled = [small.search.grid_index().params_at(i) for i in range(small.search.size() or 1)]
    assert plan.trials >= len(sampled)
    for path in spec.search.paths:
        listed = spec.search.listed_values(path)
        assert {min(listed), max(listed)} <= {step_metrics[path] for step_metrics in sampled if path in step_metrics}


def test_without_a_hub_the_rows_are_generated_and_it_is_said(tmp_path: Path) -> None:
    rehearsal = rehearse(load_spec(next(file for file in SHIPPED if file.stem == "llama3-8b")), tmp_path)
    assert all(isinstance(source, GeneratedSource) for source in rehearsal.spec.base.data.train)
    assert any(
        "the hub cannot be reached for HuggingFaceH4/ultrafeedback_binarized" in note for note in rehearsal.notices
    )
    assert any("tiny llama" in note for note in rehearsal.notices)


def test_with_a_hub_the_rows_are_the_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal_module, "hub_reachable", lambda: True)
    monkeypatch.setattr(rehearsal_module, "_architecture", lambda name, revision: "mamba")
    spec = load_spec(next(file for file in SHIPPED if file.stem == "llama3-8b"))
    rehearsal = rehearse(spec, tmp_path)
    assert rehearsal.spec.base.data.train == spec.base.data.train
    assert rehearsal.spec.base.data.max_train_rows == rehearsal_module.ROWS
    assert any("is a mamba" in note for note in rehearsal.notices)


def test_local_rows_and_a_local_architecture(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 9)
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    text = """
name: local
base: {model: ./start, data: {train: rows.jsonl, max_length: 64, max_prompt_length: 60}}
search:
  loss.kind: [simpo, dpo]
  loss.gamma: {uniform: [0.0, 1.0], when: {loss.kind: simpo}}
  training.learning_rate: {log_uniform: [1e-6, 1e-4]}
  training.max_steps: [100, 200]
sampler: random
budget: {trials: 30}
"""
    rehearsal = rehearse(load_spec_text(text, tmp_path), tmp_path)
    spec = rehearsal.spec
    assert spec.base.model.generated.architecture == "qwen2"
    assert spec.base.data.train == (FileSource(path=str(tmp_path / "rows.jsonl")),)
    assert spec.base.data.prompt_budget < spec.base.data.max_length == 64
    assert spec.search.size() == 6
    assert rehearsal.notices == ("the rehearsal fixes training.max_steps, so their search is not rehearsed",)


def test_the_first_free_name(tmp_path: Path) -> None:
    spec = load_spec(next(file for file in SHIPPED if file.stem == "quickstart"))
    (tmp_path / "quickstart-rehearsal").mkdir()
    assert rehearse(spec, tmp_path).spec.name == "quickstart-rehearsal-2"


def test_a_rehearsal_leaves_nothing_in_the_mirror(tmp_path: Path) -> None:
    file = next(file for file in SHIPPED if file.stem == "quickstart")
    rehearsal = rehearse(load_spec(file, ["mirror=s3://bucket/prefix"]), tmp_path)
    assert rehearsal.spec.mirror is None
    assert any("copies to s3://bucket/prefix" in notice for notice in rehearsal.notices)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("qwen3-0.6b", "qwen3"), ("learning-rates-13b-30b", "qwen2"), ("gemma2-9b", "gemma2"), ("smollm3-3b", "llama")],
)
def test_the_tiny_model_is_of_the_architecture_in_the_name(name: str, architecture: str, tmp_path: Path) -> None:
    file = next(file for file in SHIPPED if file.stem == name)
    generated = rehearse(load_spec(file), tmp_path).spec.base.model.generated
    assert generated is not None
    assert generated.architecture == architecture
