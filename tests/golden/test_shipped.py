"""Every shipped sweep loads, plans, and resolves to the file beside this one. UPDATE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import sweeps
from orchestrator.commands.planning import plan_here
from orchestrator.spec.dump import dump
from orchestrator.spec.load import load, loads

SHIPPED = sorted(Path(sweeps.__file__).parent.glob("*.yaml"))
GOLDEN = Path(__file__).parent


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_resolved_form(file: Path) -> None:
    spec = load(file)
    assert spec.name == file.stem
    golden = GOLDEN / file.name
    resolved = dump(spec)
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(resolved)
    assert golden.is_file(), f"no golden file for {file.name}; write it with UPDATE_GOLDEN=1"
    assert resolved == golden.read_text(), f"{file.name} resolves differently; if that is meant, UPDATE_GOLDEN=1"
    assert loads(resolved, Path("/")) == spec


def test_no_golden_file_without_its_sweep() -> None:
    assert sorted(path.name for path in GOLDEN.glob("*.yaml")) == [file.name for file in SHIPPED]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_plan(file: Path, tmp_path: Path) -> None:
    plan = plan_here(load(file), tmp_path, ())
    assert plan.trials == plan.grid
    assert list(tmp_path.iterdir()) == []


def test_the_missions_grid() -> None:
    spec = load(Path(sweeps.__file__).parent / "llama3-8b.yaml")
    assert spec.search.listed("loss.beta") == (2.0, 2.5)
    assert spec.search.listed("loss.gamma") == (0.3, 0.5, 1.0, 1.2, 1.4, 1.6)
    assert spec.search.listed("training.learning_rate") == (3e-7, 5e-7, 6e-7, 1e-6)
    assert spec.search.size() == 48
    training, data = spec.base.training, spec.base.data
    assert (training.pairs_per_update, training.lr_scheduler_type, training.warmup_ratio) == (128, "cosine", 0.1)
    assert (data.max_length, data.prompt_budget, training.num_train_epochs) == (2048, 1800, 1.0)
