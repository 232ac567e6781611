"""Every shipped sweep loads, plans, and resolves to the file beside this one. UPDATE_GOLDEN=1 writes them anew."""

import os
import re
from pathlib import Path
from typing import get_args

import pytest

import sweeps
from docs.make_sweeps import MACHINES, PAGE, make_page, plans, sibling
from orchestrator.commands.local_plan import plan_locally, plan_machines
from orchestrator.folders import SweepFolder
from orchestrator.spec.estimates.cost_estimate import GpuAssumptions
from orchestrator.spec.estimates.gpu_table import parse_machine
from orchestrator.spec.loading.loader import load_spec, load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.samplers import GridSampler
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.study.study import Study
from trainer.config.loss_config import DpoLoss, DpoLossType, KtoLoss, SimperLoss, SimpoLoss
from trainer.config.trial import TrialConfig

SHIPPED = sorted(Path(sweeps.__file__).parent.glob("*.yaml"))
QUICK = [file for file in SHIPPED if file.stem.startswith("quickstart")]
"""On a generated task, for a CPU."""
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_resolved_form(file: Path) -> None:
    spec = load_spec(file)
    assert spec.name == file.stem
    golden, resolved = GOLDEN / file.name, dump_spec(spec)
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(resolved)
    assert golden.is_file(), f"no golden file for {file.name}; write it with UPDATE_GOLDEN=1"
    assert resolved == golden.read_text(), f"{file.name} resolves differently; if that is meant, UPDATE_GOLDEN=1"
    assert load_spec_text(resolved, Path("/")) == spec


def test_no_golden_file_without_its_sweep() -> None:
    assert sorted(path.name for path in GOLDEN.glob("*.yaml")) == [file.name for file in SHIPPED]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_plan(file: Path, tmp_path: Path) -> None:
    spec = load_spec(file)
    made = plan_locally(spec, tmp_path, ())
    if isinstance(spec.sampler, GridSampler):
        assert made.trials == made.grid
    assert made.trials
    assert None not in (made.train_pairs, made.eval_pairs)
    assert list(tmp_path.iterdir()) == []


SIMPO = {
    "mistral-7b-base": (2.0, 1.6, 3e-7),
    "mistral-7b-instruct": (2.5, 0.25, 5e-7),
    "llama3-8b": (2.0, 1.0, 6e-7),
    "llama3-8b-instruct": (2.5, 1.375, 1e-6),
    "llama3-8b-instruct-v0.2": (10.0, 3.0, 1e-6),
    "gemma2-9b": (10.0, 5.0, 8e-7),
}
"""The authors' training_configs: beta, gamma (= beta x gamma_beta_ratio), learning rate."""
DPO = {
    "mistral-7b-base": 5e-7,
    "mistral-7b-instruct": 5e-7,
    "llama3-8b": 5e-7,
    "llama3-8b-instruct": 7e-7,
    "llama3-8b-instruct-v0.2": 3e-7,
    "gemma2-9b": 5e-7,
}
"""The authors' README: the best learning rate of DPO, with beta 0.01 everywhere."""


def first(name: str) -> TrialConfig:
    """The trial that runs first."""
    spec = load_spec(Path(sweeps.__file__).parent / f"{name}.yaml")
    return apply_params(spec.base, spec.enqueue[0])


@pytest.mark.parametrize("name", SIMPO)
def test_simpo_starts_at_the_published_best(name: str) -> None:
    trial = first(name)
    assert isinstance(trial.loss, SimpoLoss)
    found = (trial.loss.beta, trial.loss.gamma_value, trial.training.learning_rate)
    assert found == pytest.approx(SIMPO[name])
    assert (trial.loss.cross_entropy_weight, trial.loss.label_smoothing, trial.loss.loss_type) == (0, 0, "sigmoid")
    lengths = (1024, 512) if name == "mistral-7b-base" else (2048, 1800)
    assert (trial.data.max_length, trial.data.max_prompt_length) == lengths
    training = trial.training
    assert (training.pairs_per_update, training.warmup_ratio, training.num_train_epochs) == (128, 0.1, 1.0)


@pytest.mark.parametrize("name", DPO)
def test_dpo_starts_at_the_published_best(name: str) -> None:
    trial = first(f"{name}-dpo")
    assert isinstance(trial.loss, DpoLoss)
    assert (trial.loss.loss_type, trial.loss.beta, trial.training.learning_rate) == ("sigmoid", 0.01, DPO[name])
    assert trial.data == first(name).data
    assert trial.model == first(name).model


def test_only_the_quickstarts_have_no_published_point() -> None:
    assert [file.stem for file in SHIPPED if not load_spec(file).enqueue] == [file.stem for file in QUICK]


@pytest.mark.parametrize("name", ["llama3-8b", "llama3-8b-methods", "llama3-8b-staged"])
def test_given_trials_run_first(name: str, tmp_path: Path) -> None:
    spec = load_spec(Path(sweeps.__file__).parent / f"{name}.yaml")
    study = Study.create(SweepFolder(tmp_path, name), spec)
    for given in spec.enqueue:
        assert study.ask().config.canonical_params() == apply_params(spec.base, given).canonical_params()
    study.dispose()


def test_every_loss_of_dpo_is_tried_once() -> None:
    spec = load_spec(Path(sweeps.__file__).parent / "llama3-8b-dpo-losses.yaml")
    grid = spec.search.grid_index()
    losses = [apply_params(spec.base, grid.params_at(index)).loss for index in range(len(grid))]
    more = [
        DpoLoss(length_alpha=0.01),
        DpoLoss(beta=0.01, odpo_alpha=1.0),
        DpoLoss(beta=0.05, sync_ref_model=True, ref_model_sync_steps=64),
    ]
    assert sorted(str(loss.loss_type) for loss in losses if loss not in more) == sorted(get_args(DpoLossType))
    assert [losses.count(each) for each in more] == [1, 1, 1]


def test_the_methods_are_compared_at_the_first_trials_of_their_own_sweeps() -> None:
    spec = load_spec(Path(sweeps.__file__).parent / "llama3-8b-methods.yaml")
    found = [apply_params(spec.base, given).loss for given in spec.enqueue]
    assert found[-2:] == [SimperLoss(), KtoLoss()]
    assert found[:-2] == [first(f"llama3-8b{name}").loss for name in ("", "-dpo", "-orpo", "-cpo")]


def test_the_missions_grid() -> None:
    spec = load_spec(Path(sweeps.__file__).parent / "llama3-8b.yaml")
    assert spec.search.listed_values("loss.beta") == (2.0, 2.5)
    assert spec.search.listed_values("loss.gamma") == (0.3, 0.5, 1.0, 1.2, 1.4, 1.6)
    assert spec.search.listed_values("training.learning_rate") == (3e-7, 5e-7, 6e-7, 1e-6)
    assert spec.search.size() == 48
    training, data = spec.base.training, spec.base.data
    assert (training.pairs_per_update, training.lr_scheduler_type, training.warmup_ratio) == (128, "cosine", 0.1)
    assert (data.max_length, data.prompt_budget, training.num_train_epochs) == (2048, 1800, 1.0)


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(), "docs/sweeps.md is out of date: `make docs`"


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_file_fits_or_names_one_that_does(file: Path, machine: str) -> None:
    spec, found = plans(file)
    assert found[machine].plan is not None or sibling(spec, machine) is not None


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_sizes_of_every_file_are_known(file: Path) -> None:
    made = plans(file)[1]["8xH100"].plan
    assert made is not None
    assert made.estimate is not None
    assert None not in (made.train_pairs, made.eval_pairs, made.updates_per_trial, made.estimate.gpu_hours)
    if file not in QUICK:
        assert made.published
        assert "every pair at full length" not in made.estimate.assumed


LORA = [file.stem for file in SHIPPED if file.stem.endswith("-lora")]
SMALL = ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "llama3.2-1b", "llama3.2-3b", "gemma3-1b", "gemma3-4b", "smollm3-3b"]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_file_starts_as_shipped_on_8_gpus_of_80_gb(file: Path) -> None:
    assert plans(file)[1]["8xH100"].arrangement is not None


@pytest.mark.parametrize("name", [*LORA, *SMALL])
def test_adapters_and_small_models_fit_one_gpu(name: str, tmp_path: Path) -> None:
    spec = load_spec(Path(sweeps.__file__).parent / f"{name}.yaml")
    machines = [parse_machine(f"1x{gpu}") for gpu in ("RTX4090", "L4", "RTX6000-Ada", "H100")]
    for made in plan_machines(spec, tmp_path, machines, (), GpuAssumptions()):
        assert made.arrangement is not None, f"{name} on {made.machine}"
        assert made.arrangement.gpus_per_trial <= 1


@pytest.mark.parametrize("name", [*LORA, *SMALL])
def test_the_hours_in_the_head_of_a_file_are_the_plans(name: str) -> None:
    file = Path(sweeps.__file__).parent / f"{name}.yaml"
    head = file.read_text(encoding="utf-8").partition("\nname:")[0].replace("\n# ", " ")
    said = {machine: float(hours) for hours, machine in re.findall(r"about ([\d.]+) hours on (\w+)", head)}
    assert "1xRTX4090" in said
    for machine, hours in said.items():
        assert hours == pytest.approx(plans(file)[1][machine].hours, rel=0.06)


@pytest.mark.parametrize(
    ("name", "simpo", "dpo"),
    [
        ("llama3-8b-lora", "llama3-8b", "llama3-8b-dpo"),
        ("llama3-8b-instruct-lora", "llama3-8b-instruct-v0.2", "llama3-8b-instruct-v0.2-dpo"),
        ("mistral-7b-base-lora", "mistral-7b-base", "mistral-7b-base-dpo"),
        ("mistral-7b-instruct-lora", "mistral-7b-instruct", "mistral-7b-instruct-dpo"),
        ("gemma2-9b-lora", "gemma2-9b", "gemma2-9b-dpo"),
    ],
)
def test_adapters_start_at_the_published_points_with_ten_times_their_rates(name: str, simpo: str, dpo: str) -> None:
    spec = load_spec(Path(sweeps.__file__).parent / f"{name}.yaml")
    for given, full in zip(spec.enqueue, (first(simpo), first(dpo)), strict=True):
        trial = apply_params(spec.base, given)
        assert trial.lora is not None
        if isinstance(trial.loss, SimpoLoss) and isinstance(full.loss, SimpoLoss):  # by gamma here, by the ratio there
            assert (trial.loss.beta, trial.loss.gamma_value) == pytest.approx((full.loss.beta, full.loss.gamma_value))
        else:
            assert trial.loss == full.loss
        assert trial.training.learning_rate == pytest.approx(10 * full.training.learning_rate)
        assert (trial.data, trial.model.name_or_path) == (full.data, full.model.name_or_path)
