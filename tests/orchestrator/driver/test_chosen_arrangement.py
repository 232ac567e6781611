"""What the driver does with an arrangement: refused, recorded, given to trials, chosen anew on another machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import gpus
from orchestrator.cli import main
from orchestrator.driver.sft_stage import TrialInputs
from orchestrator.driver.sweep_driver import ARRANGED, arrangement_tags, note_arrangement, slots_within_terms
from orchestrator.execution.slots import Machine, Slots, slots_on
from orchestrator.execution.trial_lifecycle import AttemptLauncher
from orchestrator.folders import SweepFolder
from orchestrator.spec.estimates.arrangement import arranged
from orchestrator.spec.estimates.gpu_layouts import Arrangement, MachineGpus
from orchestrator.spec.estimates.gpu_memory import GB
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.fake_gpus import FakeMachine
from tests.support.recorders import ListSink, SilentView

TEXT = """\
name: big
base:
  model: {name_or_path: princeton-nlp/Llama-3-Base-8B-SFT, dtype: bfloat16}
  data: {train: rows.jsonl, max_length: 2048}
  training: {bf16: true, pairs_per_update: 2, max_steps: 3}
  lora: {r: 16}
search: {training.learning_rate: [1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 6e-6, 7e-6, 8e-6]}
enqueue: [{training.gradient_checkpointing: true}]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 9)
    (tmp_path / "big.yaml").write_text(TEXT)
    return tmp_path / "big.yaml"


@pytest.fixture
def spec(file: Path) -> SweepSpec:
    return load_spec_text(TEXT, file.parent)


@pytest.fixture
def small_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which nvidia-smi reports one GPU of 16 GB."""
    FakeMachine(tmp_path / "machine", monkeypatch).has_nvidia("GPU 0: Card (UUID: GPU-1)\n", memory="16384 MiB")
    yield
    gpus.forget_gpus()


@pytest.mark.usefixtures("small_gpu")
def test_what_fits_no_gpu_here_is_refused_at_its_line_with_the_command_that_fits(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(file), "--set", "training.seed=3"]) == 2
    said = capsys.readouterr().err
    assert f"{file}:3: base.model: by formula one pair of the largest trial takes " in said
    command = f"orchestrate sweep {file} --set training.seed=3 --set base.model.load_in_4bit=true"
    assert command in said
    assert not (tmp_path / "runs").exists(), "no name is taken and nothing was downloaded"
    assert main(["plan", *command.split()[2:]]) == 0
    said = capsys.readouterr().out
    assert "does not fit" not in said
    assert "1 GPU per trial" in said


def on(spec: SweepSpec, gb: int) -> tuple[Arrangement, Slots]:
    machine = MachineGpus((gb * GB,) if gb else (), 16)
    chosen, found = arranged(spec, [machine])
    assert found is not None
    return found, slots_on(chosen, [Machine(16, len(machine.memory))], gpu_memory=gb * GB if gb else None)


def test_a_resume_on_another_machine_chooses_again_and_notes_it(
    spec: SweepSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = SweepFolder(tmp_path / "runs", spec.name)
    notices: list[list[str]] = []
    for number, gb in enumerate((0, 80, 80, 48, 0)):
        found, slots = on(spec, gb)
        with Study.create(folder, spec, slots=slots.count) if number == 0 else Study.open(folder) as study:
            notices.append(note_arrangement(study, found))
            assert study.spec == spec, "the study keeps auto, and no trial's settings depend on the machine"
    folder.spec.write_text(dump_spec(spec))
    assert [len(said) for said in notices] == [0, 1, 0, 1, 1]
    assert notices[1][0].startswith("arrangement: 1 GPU per trial")
    assert notices[3][0].startswith("arrangement chosen anew for this machine: ")
    assert "gradient checkpointing off" in notices[1][0]
    assert "gradient checkpointing on" in notices[3][0]
    assert "no GPU" in notices[4][0]
    assert main(["history", spec.name, "--json"]) == 0
    events = json.loads(capsys.readouterr().out)["events"]
    noted = [event["text"] for event in events if event["kind"] == ARRANGED]
    assert [text in said[0] for text, said in zip(noted, (notices[1], notices[3], notices[4]), strict=True)] == [
        True
    ] * 3


def test_trials_get_the_chosen_values_but_for_their_own(spec: SweepSpec, tmp_path: Path) -> None:
    """In the trial's file and in tracking; the configuration by which the study knows a trial stays the same."""
    found, slots = on(spec, 80)
    assert not found.trials.gradient_checkpointing
    sink = ListSink()
    inputs = TrialInputs(data=None, arrangement=found, auto=spec.auto)  # type: ignore[arg-type]
    with Study.create(SweepFolder(tmp_path / "runs", spec.name), spec, slots=slots.count) as study:
        launcher = AttemptLauncher(study, sink, SilentView(), inputs.apply)
        enqueued, drawn = study.ask(), study.ask()
        assert isinstance(enqueued, Trial)
        assert isinstance(drawn, Trial)
        configs = [json.loads(launcher.start_attempt(trial).task.config)["training"] for trial in (enqueued, drawn)]
        assert [config["gradient_checkpointing"] for config in configs] == [True, False]
        assert {config["tokens_per_micro_batch"] for config in configs} == {found.trials.tokens_per_micro_batch}
        assert found.trials.tokens_per_micro_batch != spec.base.training.tokens_per_micro_batch == 8192
        assert drawn.config.training.tokens_per_micro_batch == 8192
    tags = sink.tags(str(drawn.number))
    assert tags["arrangement.tokens_per_micro_batch"] == str(found.trials.tokens_per_micro_batch)
    assert "arrangement.gradient_checkpointing" not in tags, "as it would be anywhere"
    of_sweep = arrangement_tags(found, slots)
    assert (of_sweep["arrangement.gpus_per_trial"], of_sweep["arrangement.trials_at_a_time"]) == ("1", "1")
    assert of_sweep["arrangement.reasons"].splitlines() == list(found.reasons)


def test_a_larger_machine_runs_no_more_trials_at_a_time_than_the_sweep_was_begun_for(
    spec: SweepSpec, tmp_path: Path
) -> None:
    learning: dict[str, Any] = {"sampler": {"kind": "tpe"}, "budget": {"trials": 9}, "search": {}}
    learning["search"] = {"dimensions": {"training.learning_rate": {"log_uniform": [1e-6, 1e-5]}}}
    tuned = SweepSpec.model_validate(spec.model_dump() | learning)
    explicit = tuned.model_copy(update={"auto": ()})
    for number, (each, most) in enumerate(((tuned, 2), (explicit, 8))):
        with Study.create(SweepFolder(tmp_path / str(number), each.name), each, slots=1) as study:
            assert slots_within_terms(study, Slots(8, 1.0, 1)).count == most
