"""What is trained is what the file says: variables of the environment change no weight."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from click.testing import CliRunner

import sweeps
from orchestrator.cli.command_line import cli
from tests.support.small_trials import finish, model_bytes, trial, without_speed
from trainer.config.loss_config import OrpoLoss
from trainer.config.trial import TrialConfig
from trainer.data.tokenization import load_tokenizer
from trainer.distributed import processes
from trainer.distributed.processes import ProcessGroup
from trainer.environment import (
    HARMLESS,
    choose_float32_products,
    computes_float32,
    remove_foreign_settings,
    report_ignored,
)
from trainer.evaluation.reward_model import RewardScorer
from trainer.evaluation.text_generation import TextGenerator
from trainer.models.model_files import resolve_model_path
from trainer.results import ModelError, TrialError
from trainer.training_session import TrainingSession
from trainer.trl_engine.trl_inputs import common_arguments, on_one_device, orpo_arguments

SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_GRADIENT_CLIPPING": "0.001",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "DNNL_DEFAULT_FPMATH_MODE": "BF16",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "NVIDIA_TF32_OVERRIDE": "1",
}
SMALL = {"tokens_per_micro_batch": 400, "num_train_epochs": 1}
"""Four micro-batches an update."""
CONFIGS = {
    "packed": trial(training=SMALL),
    "packed, autocast": trial(training=SMALL | {"bf16": True}),
    "trl": trial(training=SMALL, engine="trl"),
    "trl, autocast": trial(training=SMALL | {"bf16": True}, engine="trl"),
}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: accelerate has not read the environment yet."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
    GradientState._reset_state()  # pyright: ignore[reportPrivateUsage]


@pytest.fixture(scope="module")
def plain(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, bytes], object]]:
    """Of each configuration the weights and metrics without any variable."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: trained(config, cache, folder / name) for name, config in CONFIGS.items()}


def trained(config: TrialConfig, cache: Path, folder: Path) -> tuple[dict[str, bytes], object]:
    _forget()
    metrics, _ = finish(TrainingSession(cache).train(config, folder))
    return model_bytes(folder), without_speed(metrics)


@pytest.mark.parametrize("config", ["packed", "trl"])
@pytest.mark.parametrize("name", SETTINGS)
def test_no_variable_of_the_environment_changes_what_is_trained(
    name: str,
    config: str,
    plain: dict[str, tuple[dict[str, bytes], object]],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, SETTINGS[name])
    assert trained(CONFIGS[config], cache, tmp_path) == plain[config]


@pytest.mark.parametrize("config", CONFIGS)
def test_all_of_them_together_change_nothing_either(
    config: str,
    plain: dict[str, tuple[dict[str, bytes], object]],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    assert trained(CONFIGS[config], cache, tmp_path) == plain[config]


def test_a_variable_set_after_the_first_trial_changes_nothing_either(
    plain: dict[str, tuple[dict[str, bytes], object]], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = TrainingSession(cache)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for name in ("trl", "packed"):
        metrics, _ = finish(session.train(CONFIGS[name], tmp_path / name))
        assert (model_bytes(tmp_path / name), without_speed(metrics)) == plain[name]


def test_a_process_of_its_own_with_every_variable_that_accelerate_reads_trains_the_same(
    plain: dict[str, tuple[dict[str, bytes], object]], cache: Path, tmp_path: Path
) -> None:
    """Also what is read while libraries are imported."""
    sources = Path(accelerate.__file__).parent.rglob("*.py")
    read = {name for file in sources for name in re.findall(r"ACCELERATE_[A-Z0-9_]*[A-Z0-9]", file.read_text())}
    expected = dict.fromkeys(read - HARMLESS, "4") | SETTINGS
    assert len(expected) > 30
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(CONFIGS["packed"].model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, "-m", "trainer", str(file), "--out", str(tmp_path / "run"), "--cache", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | expected, check=False)
    assert done.returncode == 0, done.stderr
    assert model_bytes(tmp_path / "run") == plain["packed"][0]
    assert json.loads(done.stdout.splitlines()[0])["step"] == 0
    assert "ACCELERATE_MIXED_PRECISION=fp16" in done.stderr
    assert "ignored in the environment" in done.stderr


def test_what_asks_for_something_is_named_once_and_what_asks_for_nothing_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_USE_CPU": "true",
        "NVIDIA_TF32_OVERRIDE": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING, "trainer.environment"):
        ProcessGroup()
        ProcessGroup()
    (record,) = caplog.records
    assert record.getMessage().endswith(": ACCELERATE_MIXED_PRECISION=bf16")
    assert os.environ["ACCELERATE_USE_CPU"] == "true", "where a process computes stays"
    assert [name for name in os.environ if name.startswith("ACCELERATE_")] == ["ACCELERATE_USE_CPU"]


def test_a_plan_names_what_its_trials_will_ignore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    file = Path(sweeps.__file__).parent / "quickstart.yaml"
    notices = json.loads(CliRunner().invoke(cli, ["plan", str(file), "--json"]).stdout)["notices"]
    assert [n for n in notices if "ignored in the environment" in n and n.endswith(": ACCELERATE_MIXED_PRECISION=fp16")]
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "fp16", "a plan changes nothing"


def test_float32_that_stays_narrow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert computes_float32(cpu)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    ignored = remove_foreign_settings()
    report_ignored(ignored, cpu)  # removed in time
    real: Any = torch.Tensor.to

    def in_narrow_format(tensor: torch.Tensor, *given: object, **more: object) -> torch.Tensor:
        """As where the library has read the variable: 10 bits of mantissa, as TF32 has."""
        moved: torch.Tensor = real(tensor, *given, **more)
        return moved.half().float() if given == (cpu,) else moved

    monkeypatch.setattr(torch.Tensor, "to", in_narrow_format)
    with pytest.raises(TrialError, match=r"NVIDIA_TF32_OVERRIDE=1 narrows float32 products on cpu; unset it"):
        report_ignored(ignored, cpu)


def test_onednn_multiplies_only_where_it_keeps_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, product = torch.device("cpu"), torch.Tensor.__matmul__
    chosen = choose_float32_products(cpu)
    assert torch.get_float32_matmul_precision() == ("medium" if chosen else "highest")
    assert computes_float32(cpu)
    assert not choose_float32_products(torch.device("cuda")), "there the same setting narrows products"

    def with_amx(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype is torch.float32 and torch.get_float32_matmul_precision() == "medium":
            return product(left.bfloat16(), right.bfloat16()).float()
        return product(left, right)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", with_amx)
        assert not choose_float32_products(cpu)
        assert torch.get_float32_matmul_precision() == "highest"
    assert choose_float32_products(cpu) == chosen


def test_a_trial_is_the_same_with_either_products_and_they_share_no_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, onednn: bool) -> tuple[list[tuple[int, dict[str, float]]], int]:
        def choose(_: object) -> bool:
            torch.set_float32_matmul_precision("medium" if onednn and chosen else "highest")
            return onednn

        monkeypatch.setattr(processes, "choose_float32_products", choose)
        session = TrainingSession(tmp_path / "cache")
        history, _ = finish(session.train(trial("dpo"), tmp_path / name))
        return without_speed(history), session.counters["reference_computed"]

    chosen = choose_float32_products(torch.device("cpu"))
    (ours, computed), (plain, computed_again) = run("onednn", onednn=True), run("plain", onednn=False)
    choose_float32_products(torch.device("cpu"))
    assert (computed, computed_again) == (1, 1)
    for (step, found), (_, expected) in zip(ours[:2], plain[:2], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), step


def test_a_judge_computes_float32_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["packed"]
    tokenizer = load_tokenizer(config.model, config.data, cache)
    folder = str(resolve_model_path(config.model, cache))

    def reward() -> None:
        with pytest.raises(ModelError, match="not a reward model"):
            RewardScorer(folder)

    for opened in (lambda: TextGenerator.load(config, None, tokenizer, cache), reward):
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
        torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE does at the start
        opened()
        assert "NVIDIA_TF32_OVERRIDE" not in os.environ
        assert torch.get_float32_matmul_precision() == "highest"


def test_trl_trains_on_one_gpu_however_many_it_sees(tmp_path: Path) -> None:
    config = trial("orpo", engine="trl", training=SMALL)
    assert isinstance(config.loss, OrpoLoss)
    made = orpo_arguments(config.loss, common_arguments(config, 1, 1, tmp_path, cpu=True), 96)
    assert made.n_gpu == 0
    made._n_gpu = 4  # pyright: ignore[reportPrivateUsage]
    assert made.train_batch_size == 4 * made.per_device_train_batch_size
    assert on_one_device(made).train_batch_size == made.per_device_train_batch_size
