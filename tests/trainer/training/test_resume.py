import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.processes import LIMIT_SECONDS
from tests.support.small_trials import MODEL, SPEED, finish, model_bytes, take, trial, without_speed
from trainer.config.trial import TrialConfig
from trainer.forward.pair_model import PairModel
from trainer.results import RunStatus
from trainer.storage import checkpoints
from trainer.training_session import TrainingSession

LORA = {"r": 2, "alpha": 4, "dropout": 0.3}
# Windows of four updates: most interruptions fall into the middle of one.
SETTINGS = {"logging_steps": 4, "eval_steps": 3}


def config(kind: str) -> TrialConfig:
    match kind:
        case "full":
            return trial("dpo", training=SETTINGS)
        case "lora":
            return trial(training=SETTINGS, lora=LORA)
        case _:
            return trial(model=MODEL | {"dtype": "bfloat16"}, training=SETTINGS | {"stochastic_rounding": True})


def test_a_discarded_run_ends_without_a_checkpoint(session: TrainingSession, tmp_path: Path) -> None:
    unsaved = trial("dpo", training=SETTINGS | {"save_steps": 100})
    for name, checkpoint in (("kept", True), ("discarded", False)):
        run = session.train(unsaved, tmp_path / name)
        while next(run).step == 0:
            pass
        session.interrupt(checkpoint=checkpoint)
        assert finish(run)[1].status is RunStatus.STOPPED
        assert (checkpoints.load_newest([tmp_path / name]) is not None) is checkpoint


@pytest.mark.parametrize("kind", ["full", "lora", "bfloat16 rounded by chance"])
def test_interrupted_anywhere_it_ends_where_the_whole_run_does(
    session: TrainingSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    full, _ = finish(session.train(config(kind), tmp_path / "whole"))
    # Scoring calls (start and evaluations) and training calls: an interruption at each of them in turn.
    calls, stop_at = 0, 0
    plain = {name: getattr(PairModel, name) for name in ("backward", "logps", "read_next_token_logps")}

    def counted(name: str) -> object:
        def call(self: PairModel, *args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                session.interrupt()
            return plain[name](self, *args)

        return call

    for name in plain:
        monkeypatch.setattr(PairModel, name, counted(name))
    for stop_at in (1, 3, 4, 7, 8):
        attempts = [tmp_path / f"{stop_at}-{number}" for number in range(9)]
        results = []
        for number, folder in enumerate(attempts):
            calls = 0 if number == 0 else stop_at
            metrics, result = finish(session.train(config(kind), folder, attempts[:number]))
            results.append(result.status)
            if result.status is RunStatus.FINISHED:
                break
        assert results in ([RunStatus.FINISHED], [RunStatus.STOPPED, RunStatus.FINISHED])
        assert without_speed(metrics) == without_speed(full)
        assert model_bytes(folder) == model_bytes(tmp_path / "whole")
    assert stop_at == 8


def test_closed_at_any_point_it_ends_where_the_whole_run_does(cache: Path, tmp_path: Path) -> None:
    settings = trial(training={"save_steps": 2})
    full, _ = finish(TrainingSession(cache).train(settings, tmp_path / "whole"))
    for taken in (1, 3, 4, 6):
        begun = take(TrainingSession(cache).train(settings, tmp_path / f"{taken}-1"), taken)
        assert without_speed(begun) == without_speed(full[:taken])
        fresh = TrainingSession(cache)
        metrics, result = finish(fresh.train(settings, tmp_path / f"{taken}-2", [tmp_path / f"{taken}-1"]))
        assert result.status is RunStatus.FINISHED
        assert without_speed(metrics) == without_speed(full)
        assert model_bytes(tmp_path / f"{taken}-2") == model_bytes(tmp_path / "whole")
        assert not list(tmp_path.glob(f"{taken}-*/checkpoints/*"))


def test_only_the_newest_checkpoint_is_kept(session: TrainingSession, tmp_path: Path) -> None:
    take(session.train(trial(training={"save_steps": 1}), tmp_path / "1"), 4)
    assert [p.name for p in (tmp_path / "1/checkpoints").iterdir()] == ["step-00000002"]
    take(session.train(trial(training={"save_steps": 1}), tmp_path / "2", [tmp_path / "1"]), 5)
    assert [p.name for p in tmp_path.glob("*/checkpoints/*")] == ["step-00000003"]


def test_a_damaged_checkpoint_costs_work_not_the_result(session: TrainingSession, tmp_path: Path) -> None:
    settings = trial(training={"save_steps": 1})
    full, _ = finish(session.train(settings, tmp_path / "whole"))
    take(session.train(settings, tmp_path / "1"), 5)
    (path,) = (tmp_path / "1/checkpoints").iterdir()
    (path / "weights.safetensors").write_bytes(b"rubbish")
    metrics, _ = finish(session.train(settings, tmp_path / "2", [tmp_path / "1"]))
    assert without_speed(metrics) == without_speed(full)
    assert model_bytes(tmp_path / "2") == model_bytes(tmp_path / "whole")


def test_a_finished_run_tells_its_story_again(cache: Path, session: TrainingSession, tmp_path: Path) -> None:
    metrics, result = finish(session.train(trial(), tmp_path))
    before, fresh = model_bytes(tmp_path), TrainingSession(cache)
    assert finish(fresh.train(trial(), tmp_path)) == (metrics, result)
    assert finish(fresh.train(trial(), tmp_path / "next attempt", [tmp_path])) == (metrics, result)
    assert fresh.counters["model_loaded"] == 0
    assert model_bytes(tmp_path) == before


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "trainer", *map(str, arguments)]


def lines(text: str) -> list[dict[str, float]]:
    return [{k: v for k, v in json.loads(line).items() if k not in SPEED} for line in text.splitlines()]


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_sigterm_writes_a_checkpoint_and_the_same_command_goes_on(
    cache: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    settings = trial("dpo", training={"save_steps": 1000, "max_steps": 24, "eval_steps": 12})
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_none=True)))
    full, _ = finish(TrainingSession(cache).train(settings, tmp_path / "whole"))
    call = command(file, "--out", tmp_path / "run", "--cache", cache)
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)  # some ten lines: it waits for its reader before its last update
    with (
        subprocess.Popen(call, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment) as process,
        os.fdopen(reader, "rb", buffering=0) as output,
    ):
        os.close(writer)
        begun = [output.readline() for _ in range(6)]
        process.send_signal(signal.SIGTERM)
        rest = output.readall()
        _, progress = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 143, progress
    messages = lines((b"".join(begun) + rest).decode())
    assert (
        messages
        == [{"step": p.step, **m} for p, (_, m) in zip(full, without_speed(full), strict=True)][: len(messages)]
    )
    assert 5 <= checkpoints.load_newest([tmp_path / "run"]).step < 24
    again = subprocess.run(call, capture_output=True, text=True, env=environment, check=False, timeout=LIMIT_SECONDS)
    assert again.returncode == 0, again.stderr
    assert lines(again.stdout) == [{"step": step, **m} for step, m in without_speed(full)]
    assert model_bytes(tmp_path / "run") == model_bytes(tmp_path / "whole")
