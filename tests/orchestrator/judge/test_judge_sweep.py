"""A finished sweep is judged: by its rows' answers, by a reward model, by an endpoint; killed and gone on with."""

import json
import shutil
import signal
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from dashboards.sweep_reporter import DashboardReporter
from orchestrator.cli import main
from orchestrator.commands.judge_sweep import judge_sweep
from orchestrator.driver.checkpoint_retention import CheckpointRetention, model_folder
from orchestrator.driver.judge_candidates import make_judge_task
from orchestrator.driver.judge_stage import JudgeResult, NoUsableJudge, judge_after_sweep
from orchestrator.errors import ExitCode, SpecError, SweepHeld
from orchestrator.execution.stop_reasons import SignalHandler, StopKind, StopReason
from orchestrator.folders import SweepFolder
from orchestrator.judge.judgements import Judgement
from orchestrator.spec.judge_config import JudgeConfig
from orchestrator.study.study import Study
from orchestrator.study.trial_records import rank_trials
from tests.support.judge_endpoint import HANG, FakeJudge, longer, serve
from tests.support.processes import LIMIT_SECONDS, orchestrate, wait_until
from tests.support.recorders import SilentView
from trainer.config.trial import GeneratedModel
from trainer.storage.failpoints import FAILPOINT_VARIABLE
from trainer.synthetic import generate_model, is_correct

KEY = "sk-very-secret-0123456789"
Talk = tuple[list[str], Callable[[str], None]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    monkeypatch.setenv("MY_KEY", KEY)
    with serve(FakeJudge(longer)) as server:
        yield server


@pytest.fixture(scope="session")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward")
    source = generate_model(GeneratedModel(vocab_size=320, hidden_size=32, intermediate_size=64), path / "cache")
    config = AutoConfig.from_pretrained(source, num_labels=1)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(path / "rm")
    AutoTokenizer.from_pretrained(source).save_pretrained(path / "rm")
    return path / "rm"


def endpoint_sets(server: FakeJudge) -> list[str]:
    return [
        f"judge.endpoint={{url: '{server.url}', model: big, api_key_env: MY_KEY, prompt_price: 1, completion_price: 2}}"
    ]


def run(runs: Path, overrides: list[str], progress: Talk, *, agree: bool = True) -> JudgeResult:
    return judge_sweep(
        "judged",
        runs,
        overrides,
        set_activity=progress[1],
        log=progress[1],
        confirm_cost=lambda *_: agree,
        reporter=DashboardReporter(),
    )


def by_key(judgements: tuple[Judgement, ...]) -> dict[tuple[int, str], Judgement]:
    return {(v.trial, v.key): v for v in judgements}


def plain(judgements: tuple[Judgement, ...]) -> list[dict[str, Any]]:
    """Without when they fell."""
    return [v.model_dump(exclude={"at"}) for v in judgements]


def test_three_judges_on_the_best_two(runs: Path, server: FakeJudge, reward: Path, log_lines: Talk) -> None:
    overrides = [*endpoint_sets(server), f"judge.reward_model={reward}"]
    found = run(runs, overrides, log_lines)
    assert found.code == ExitCode.DONE
    folder = SweepFolder(runs, "judged")
    with Study.open(folder) as study:
        best = [record.number for record in rank_trials(study.trials(), study.spec.first_objective)[:2]]
    judgements = by_key(found.judgements)
    kinds = [f"{judge}_{how}" for judge in ("checker", "reward", "endpoint") for how in ("greedy", "sampled")]
    assert set(judgements) == {(number, kind) for number in best for kind in kinds}
    for judgement in found.judgements:
        assert judgement.wins + judgement.ties + judgement.losses == judgement.prompts == 8
        assert judgement.left_out == 0
        assert judgement.win_rate.value == pytest.approx((judgement.wins + judgement.ties / 2) / 8)
        assert judgement.lc_win_rate is not None
    _check_calls(server, found)
    _check_answers(runs, found)
    _check_mlflow(runs, found, best)
    messages = "\n".join(log_lines[0])
    assert "at most" in messages
    assert "calls" in messages
    page = folder.report.read_text(encoding="utf-8")
    assert "Judgements" in page
    assert f"Trial {best[0]} wins" in page
    assert "by big, greedy answers" in page

    requested, stored = len(server.asked), _contents(runs / "cache" / "answers")
    again = run(runs, overrides, log_lines)
    assert len(server.asked) == requested, "nothing is asked twice"
    assert _contents(runs / "cache" / "answers") == stored, "nothing is answered twice"
    assert plain(again.judgements) == plain(found.judgements)
    _check_mlflow(runs, again, best)
    for file in runs.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()
    assert KEY not in messages


def test_on_prompts_from_elsewhere(runs: Path, log_lines: Talk, tmp_path: Path) -> None:
    rows = [{"instruction": f"Write {n}.", "answer": str(n), "output": "what somebody wrote"} for n in range(6)]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    source = f"judge.prompts_from={{path: {tmp_path / 'eval.json'}, columns: {{prompt: instruction}}}}"
    found = run(runs, [source, "judge.top=1", "judge.samples=0"], log_lines)
    assert [(v.judge, v.prompts) for v in found.judgements] == [("checker", 6)]
    assert {each.prompt for each in found.judgements[0].examples} <= {row["instruction"] for row in rows}
    assert f"on 6 prompts of {tmp_path / 'eval.json'} (greedy)" in "\n".join(log_lines[0])


def _check_calls(server: FakeJudge, found: JudgeResult) -> None:
    assert set(Counter(server.asked).values()) == {1}
    assert {(s.second, s.first) for s in server.asked} == {(s.first, s.second) for s in server.asked}
    assert set(server.keys) == {f"Bearer {KEY}"}
    judgement = by_key(found.judgements)[found.judgements[0].trial, "endpoint_greedy"]
    assert judgement.usage.calls > 0
    assert judgement.usage.cost == pytest.approx(judgement.usage.calls * (100 + 2 * 5) / 1e6)
    assert judgement.order_agreement in (None, 1.0), "this judge goes by length alone"
    for example in judgement.examples:
        assert (example.preference > 0.5) == (len(example.trial_answer) > len(example.initial_answer))


def _check_answers(runs: Path, found: JudgeResult) -> None:
    """The checker's judgements, from the answers on the disk."""
    files = list((runs / "cache" / "answers").glob("*.jsonl"))
    assert len(files) == 3 * 2, "the start model and two trials, greedy and sampled"
    assert all(len(file.read_text().splitlines()) == 8 for file in files)
    assert is_correct("two.", "two")
    for judgement in found.judgements:
        if judgement.judge == "checker":
            assert judgement.score is not None
            assert judgement.initial_score is not None
            assert 8 * (judgement.score - judgement.initial_score) == pytest.approx(judgement.wins - judgement.losses)


def _check_mlflow(runs: Path, found: JudgeResult, best: list[int]) -> None:
    store = sqlite3.connect(runs / "mlflow.db")
    names = dict(store.execute("select value, run_uuid from tags where key = 'prefsweep.run'"))
    for judgement in found.judgements:
        for run_name in [str(judgement.trial), *(["sweep"] if judgement.trial == best[0] else [])]:
            for name, value in judgement.metrics().items():
                query = "select value from metrics where run_uuid = ? and key = ?"
                rows = store.execute(query, (names[run_name], name)).fetchall()
                assert rows == [(pytest.approx(value),)], f"{run_name} {name} once"
    tags = dict(store.execute("select key, value from tags where run_uuid = ?", (names["sweep"],)))
    assert tags["judge"].startswith(f"trial {best[0]} wins")
    states = dict(store.execute("select run_uuid, status from runs"))
    assert set(states.values()) == {"FINISHED"}, "a judged run stays as it ended"
    assert [n for (n,) in store.execute("select max(step) from metrics where key like 'judge/%'")] == [4]


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.jsonl")}


@pytest.mark.slow
def test_killed_in_the_middle_and_gone_on_with(trained: Path, runs: Path, server: FakeJudge, log_lines: Talk) -> None:
    overrides = [*endpoint_sets(server), "judge.samples=0", "judge.tokens_per_batch=1"]
    judge = ("judge", "judged", "--yes", *flags(overrides))
    # In the middle of the answers: each is a batch of its own here, and the third is not yet on the disk.
    child = orchestrate(runs, *judge, **{FAILPOINT_VARIABLE: "kept.append:3"})
    child.communicate(timeout=LIMIT_SECONDS)
    assert child.returncode == -signal.SIGKILL
    stored = _contents(runs / "cache" / "answers")
    assert sum(text.count(b"\n") for text in stored.values()) == 2
    assert not server.asked

    # In the middle of the questions.
    server.decide = lambda shown, _: longer(shown) if len(server.asked) < 6 else HANG
    child = orchestrate(runs, *judge)
    wait_until(lambda: len(server.asked) >= 6)
    child.kill()
    child.communicate()
    assert all(_contents(runs / "cache" / "answers")[name].startswith(text) for name, text in stored.items())
    voted = sum(file.read_bytes().count(b"\n") for file in (runs / "judged" / "judge").glob("votes-*.jsonl"))
    assert voted <= len(server.asked) <= voted + 4

    server.decide = longer
    done = run(runs, overrides, log_lines)
    assert done.code == ExitCode.DONE
    questions = len(set(server.asked))
    assert len(server.asked) <= questions + 4, "at most what was under way at the death was asked again"
    requested = len(server.asked)
    assert plain(run(runs, overrides, log_lines).judgements) == plain(done.judgements)
    assert len(server.asked) == requested

    calm = runs.parent / "calm"
    subprocess.run(["cp", "-r", str(trained), str(calm)], check=True)
    complete, ignored = run(calm, overrides, log_lines), {"at": True, "asked": True}
    assert [v.model_dump(exclude=ignored) for v in done.judgements] == [
        v.model_dump(exclude=ignored) for v in complete.judgements
    ]


def flags(overrides: list[str]) -> list[str]:
    return [word for one in overrides for word in ("--set", one)]


def test_nobody_is_asked_without_a_yes(
    runs: Path, server: FakeJudge, log_lines: Talk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(runs))
    assert main(["judge", "judged", *flags(endpoint_sets(server))]) == ExitCode.USER
    err = capsys.readouterr().err
    assert "at most 64 calls" in err
    assert "add --yes" in err
    assert not server.asked
    assert not (runs / "cache" / "answers").exists()
    found = run(runs, [*endpoint_sets(server), "judge.samples=0"], log_lines, agree=False)
    assert {v.judge for v in found.judgements} == {"checker"}
    assert "was not called" in found.notices[0]
    assert not server.asked


def test_what_the_command_prints(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(runs))
    words = ["judge", "judged", "--top", "1", "--prompts", "5", "--set", "judge.samples=0"]
    assert main([*words, "--json"]) == ExitCode.DONE
    out, err = capsys.readouterr()
    logged = json.loads(out)
    (judgement,) = (v for trial in logged["trials"].values() for v in trial.values())
    assert (judgement["judge"], judgement["prompts"]) == ("checker", 5)
    assert "5 held-out prompts (greedy)" in err
    assert main(words) == ExitCode.DONE
    out, err = capsys.readouterr()
    assert "win rate (95 %)" in out
    assert "0 answers to generate" in err


def test_questions_left_open_are_said(runs: Path, server: FakeJudge, log_lines: Talk) -> None:
    server.decide = lambda *_: 500
    overrides = [*endpoint_sets(server), "judge.endpoint.retries=0", "judge.samples=0"]
    found = run(runs, overrides, log_lines)
    assert found.code == ExitCode.REFUSED
    assert "still unanswered" in found.notices[0]
    endpoint = [v for v in found.judgements if v.judge == "endpoint"]
    assert all(v.usage is not None and v.usage.unanswered == v.left_out * 2 for v in endpoint)
    server.decide = longer
    assert run(runs, overrides, log_lines).code == ExitCode.DONE


def test_what_is_refused_before_anything_is_done(
    runs: Path, server: FakeJudge, log_lines: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoUsableJudge, match=r"judge\.checker is false"):
        run(runs, ["judge.checker=false"], log_lines)
    with pytest.raises(SpecError, match="only settings of judge"):
        run(runs, ["loss.beta=3"], log_lines)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(SpecError, match="MY_KEY is not set"):
        run(runs, endpoint_sets(server), log_lines)
    assert not (runs / "cache" / "answers").exists()
    from orchestrator import folders

    with folders.sweep_lock(SweepFolder(runs, "judged")), pytest.raises(SweepHeld):
        run(runs, [], log_lines)


def test_after_a_sweep_what_the_file_asks_for(runs: Path) -> None:
    folder, view = SweepFolder(runs, "judged"), SilentView()
    with SignalHandler(lambda: "") as signals:
        judge_after_sweep(
            folder, StopReason(StopKind.INTERRUPTED), view, signals, DashboardReporter(), trust_remote_code=False
        )
        assert not view.said
        judge_after_sweep(
            folder, StopReason(StopKind.FINISHED), view, signals, DashboardReporter(), trust_remote_code=False
        )
    with Study.open(folder) as study:
        assert len(study.judgements()) == 4, "two trials, greedy and sampled, by the rows' own answers"
    assert "Judgements" in folder.report.read_text(encoding="utf-8")


def test_the_weights_that_are_judged_are_kept(runs: Path) -> None:
    folder = SweepFolder(runs, "judged")
    with Study.open(folder) as study:
        assert study.spec.keep_models == 1
        CheckpointRetention(folder, study.spec, study.trials())
    assert len(list(folder.path.glob("trials/*/*/model"))) == 2


def test_what_was_not_kept_is_told_before_anything_is_generated(runs: Path, tmp_path: Path) -> None:
    folder = SweepFolder(runs, "judged")
    with Study.open(folder) as study:
        best, *others = rank_trials(study.trials(), *study.spec.objectives)
        for record in others:
            model = model_folder(folder, record)
            if model is not None:
                model.rename(tmp_path / f"model-{record.number}")
        task = make_judge_task(study, JudgeConfig(top=2))
    assert [trial.number for trial in task.trials] == [best.number]
    (notice,) = task.notices
    assert f"trial {others[0].number} not judged" in notice
    assert "`--top 1` asks for no more" in notice
    assert "keep_models" in notice


def test_a_damaged_model_file_is_named_by_judge_and_export(
    runs: Path, reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(runs))
    monkeypatch.chdir(tmp_path)
    folder = SweepFolder(runs, "judged")
    with Study.open(folder) as study:
        best = model_folder(folder, rank_trials(study.trials(), study.spec.first_objective)[0])
    assert best is not None
    rm = shutil.copytree(reward, tmp_path / "rm")

    def refused(damaged: Path, *command: str) -> None:
        whole = (damaged / WEIGHTS).read_bytes()
        (damaged / WEIGHTS).write_bytes(whole[:60])
        code, said = main(command), "".join(capsys.readouterr())
        assert code == ExitCode.USER, said
        assert WEIGHTS in said
        assert str(damaged) in said
        assert "internal error" not in said
        (damaged / WEIGHTS).write_bytes(whole)

    refused(best, "judge", "judged")
    refused(best, "best", "judged", "--export", "out")
    refused(rm, "judge", "judged", "--set", f"judge.reward_model={rm}")
    assert not (tmp_path / "out").exists()


WEIGHTS = "model.safetensors"
