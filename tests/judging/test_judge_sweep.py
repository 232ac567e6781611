"""A finished sweep is judged: by its rows' answers, by a reward model, by an endpoint; killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from dashboards.sweep_reporter import DashboardReporter
from orchestrator.cli import main
from orchestrator.commands.judge_sweep import Outcome, judge
from orchestrator.driver.checkpoint_retention import Retention
from orchestrator.driver.judge_stage import NobodyJudges, judge_after
from orchestrator.errors import ExitCode, SpecError, SweepHeld
from orchestrator.execution.stop_reasons import Interrupt, Stop, StopKind
from orchestrator.folders import SweepFolder
from orchestrator.judge.judgements import Verdict
from orchestrator.study.study import Study
from orchestrator.study.trial_records import ranking
from tests.engine.scripted import SilentView
from tests.judging.endpoint_server import FakeJudge, Shown, longer, serve
from trainer.config.trial import GeneratedModel
from trainer.storage.atomic_files import VARIABLE
from trainer.synthetic import generated_model, is_right

KEY = "sk-very-secret-0123456789"
Talk = tuple[list[str], Callable[[str], None]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    monkeypatch.setenv("MY_KEY", KEY)
    with serve(FakeJudge(longer)) as server:
        yield server


@pytest.fixture(scope="session")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reward")
    source = generated_model(GeneratedModel(vocab_size=320, hidden_size=32, intermediate_size=64), place / "cache")
    config = AutoConfig.from_pretrained(source, num_labels=1)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(place / "rm")
    AutoTokenizer.from_pretrained(source).save_pretrained(place / "rm")
    return place / "rm"


def asking(server: FakeJudge) -> list[str]:
    return [
        f"judge.endpoint={{url: '{server.url}', model: big, api_key_env: MY_KEY, prompt_price: 1, completion_price: 2}}"
    ]


def run(runs: Path, sets: list[str], talk: Talk, *, agree: bool = True) -> Outcome:
    return judge("judged", runs, sets, stage=talk[1], say=talk[1], agree=lambda *_: agree, reporter=DashboardReporter())


def by_key(verdicts: tuple[Verdict, ...]) -> dict[tuple[int, str], Verdict]:
    return {(v.trial, v.key): v for v in verdicts}


def plain(verdicts: tuple[Verdict, ...]) -> list[dict[str, Any]]:
    """Without when they fell."""
    return [v.model_dump(exclude={"at"}) for v in verdicts]


def test_three_judges_on_the_best_two(runs: Path, server: FakeJudge, reward: Path, talk: Talk) -> None:
    sets = [*asking(server), f"judge.reward_model={reward}"]
    found = run(runs, sets, talk)
    assert found.code == ExitCode.DONE
    folder = SweepFolder(runs, "judged")
    with Study.open(folder) as study:
        best = [record.number for record in ranking(study.trials(), study.spec.goal)[:2]]
    verdicts = by_key(found.verdicts)
    kinds = [f"{judge}_{how}" for judge in ("checker", "reward", "endpoint") for how in ("greedy", "sampled")]
    assert set(verdicts) == {(number, kind) for number in best for kind in kinds}
    for verdict in found.verdicts:
        assert verdict.wins + verdict.ties + verdict.losses == verdict.prompts == 8
        assert verdict.left_out == 0
        assert verdict.win_rate is not None
        assert verdict.win_rate.value == pytest.approx((verdict.wins + verdict.ties / 2) / 8)
        assert verdict.lc_win_rate is not None
    _check_calls(server, found)
    _check_answers(runs, found)
    _check_mlflow(runs, found, best)
    said = "\n".join(talk[0])
    assert "at most" in said
    assert "calls" in said
    page = folder.report.read_text(encoding="utf-8")
    assert "What a judge says" in page
    assert f"Trial {best[0]} wins" in page
    assert "by big, greedy answers" in page

    asked, kept = len(server.asked), _contents(runs / "cache" / "answers")
    again = run(runs, sets, talk)
    assert len(server.asked) == asked, "nothing is asked twice"
    assert _contents(runs / "cache" / "answers") == kept, "nothing is answered twice"
    assert plain(again.verdicts) == plain(found.verdicts)
    _check_mlflow(runs, again, best)
    for file in runs.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()
    assert KEY not in said


def test_on_prompts_from_elsewhere(runs: Path, talk: Talk, tmp_path: Path) -> None:
    rows = [{"instruction": f"Write {n}.", "answer": str(n), "output": "what somebody wrote"} for n in range(6)]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    source = f"judge.prompts_from={{path: {tmp_path / 'eval.json'}, columns: {{prompt: instruction}}}}"
    found = run(runs, [source, "judge.top=1", "judge.samples=0"], talk)
    assert [(v.judge, v.prompts) for v in found.verdicts] == [("checker", 6)]
    assert {each.prompt for each in found.verdicts[0].examples} <= {row["instruction"] for row in rows}
    assert f"on 6 prompts of {tmp_path / 'eval.json'} (greedy)" in "\n".join(talk[0])


def _check_calls(server: FakeJudge, found: Outcome) -> None:
    assert set(Counter(server.asked).values()) == {1}
    assert {(s.second, s.first) for s in server.asked} == {(s.first, s.second) for s in server.asked}
    assert set(server.keys) == {f"Bearer {KEY}"}
    verdict = by_key(found.verdicts)[found.verdicts[0].trial, "endpoint_greedy"]
    assert verdict.asked is not None
    assert verdict.asked.calls > 0
    assert verdict.asked.cost == pytest.approx(verdict.asked.calls * (100 + 2 * 5) / 1e6)
    assert verdict.agree in (None, 1.0), "this judge goes by length alone"
    for example in verdict.examples:
        assert (example.preference > 0.5) == (len(example.ours) > len(example.theirs))


def _check_answers(runs: Path, found: Outcome) -> None:
    """The checker's verdicts, from the answers on the disk."""
    files = list((runs / "cache" / "answers").glob("*.jsonl"))
    assert len(files) == 3 * 2, "the start model and two trials, greedy and sampled"
    assert all(len(file.read_text().splitlines()) == 8 for file in files)
    assert is_right("two.", "two")
    for verdict in found.verdicts:
        if verdict.judge == "checker":
            assert verdict.score is not None
            assert verdict.start_score is not None
            assert 8 * (verdict.score - verdict.start_score) == pytest.approx(verdict.wins - verdict.losses)


def _check_mlflow(runs: Path, found: Outcome, best: list[int]) -> None:
    store = sqlite3.connect(runs / "mlflow.db")
    names = dict(store.execute("select value, run_uuid from tags where key = 'prefsweep.run'"))
    for verdict in found.verdicts:
        for run_name in [str(verdict.trial), *(["sweep"] if verdict.trial == best[0] else [])]:
            for name, value in verdict.metrics().items():
                query = "select value from metrics where run_uuid = ? and key = ?"
                rows = store.execute(query, (names[run_name], name)).fetchall()
                assert rows == [(pytest.approx(value),)], f"{run_name} {name} once"
    tags = dict(store.execute("select key, value from tags where run_uuid = ?", (names["sweep"],)))
    assert tags["judge"].startswith(f"trial {best[0]} wins")
    states = dict(store.execute("select run_uuid, status from runs"))
    assert set(states.values()) == {"FINISHED"}, "a judged run stays as it ended"
    steps = [n for (n,) in store.execute("select max(step) from metrics where key like 'judge/%'")]
    assert steps == [4]


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.jsonl")}


# --- killed, stopped, refused ----------------------------------------------------------------------------------------


def command(runs: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    env = os.environ | {"ORCHESTRATE_HOME": str(runs)} | environment
    words = [sys.executable, "-m", "orchestrator.cli", "judge", "judged", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_killed_in_the_middle_and_gone_on_with(trained: Path, runs: Path, server: FakeJudge, talk: Talk) -> None:
    sets = [*asking(server), "judge.samples=0", "judge.tokens_per_batch=1"]
    # In the middle of the answers: each is a batch of its own here, and the third is not yet on the disk.
    child = command(runs, "--yes", *flags(sets), **{VARIABLE: "kept.append:3"})
    child.communicate(timeout=200)
    assert child.returncode == -signal.SIGKILL
    kept = _contents(runs / "cache" / "answers")
    assert sum(text.count(b"\n") for text in kept.values()) == 2
    assert not server.asked

    # In the middle of the questions.
    def slow(shown: Shown, _: int) -> str:
        time.sleep(0.1)
        return longer(shown)

    server.decide = slow
    child = command(runs, "--yes", *flags(sets))
    while len(server.asked) < 6 and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    child.communicate()
    assert all(_contents(runs / "cache" / "answers")[name].startswith(text) for name, text in kept.items())
    voted = sum(file.read_bytes().count(b"\n") for file in (runs / "judged" / "judge").glob("votes-*.jsonl"))
    killed = len(server.asked)
    assert voted <= killed <= voted + 4

    server.decide = longer
    done = run(runs, sets, talk)
    assert done.code == ExitCode.DONE
    questions = len(set(server.asked))
    assert len(server.asked) <= questions + 4, "at most what was under way at the death was asked again"
    asked = len(server.asked)
    assert plain(run(runs, sets, talk).verdicts) == plain(done.verdicts)
    assert len(server.asked) == asked

    calm = runs.parent / "calm"
    subprocess.run(["cp", "-r", str(trained), str(calm)], check=True)
    whole = run(calm, sets, talk)
    ignored = {"at": True, "asked": True}
    assert [v.model_dump(exclude=ignored) for v in done.verdicts] == [
        v.model_dump(exclude=ignored) for v in whole.verdicts
    ]


def flags(sets: list[str]) -> list[str]:
    return [word for one in sets for word in ("--set", one)]


def test_nobody_is_asked_without_a_yes(
    runs: Path, server: FakeJudge, talk: Talk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(runs))
    assert main(["judge", "judged", *flags(asking(server))]) == ExitCode.USER
    err = capsys.readouterr().err
    assert "at most 64 calls" in err
    assert "add --yes" in err
    assert not server.asked
    assert not (runs / "cache" / "answers").exists()
    found = run(runs, [*asking(server), "judge.samples=0"], talk, agree=False)
    assert {v.judge for v in found.verdicts} == {"checker"}
    assert "was not asked" in found.notices[0]
    assert not server.asked


def test_what_the_command_prints(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(runs))
    words = ["judge", "judged", "--top", "1", "--prompts", "5", "--set", "judge.samples=0"]
    assert main([*words, "--json"]) == ExitCode.DONE
    out, err = capsys.readouterr()
    told = json.loads(out)
    (verdict,) = (v for trial in told["trials"].values() for v in trial.values())
    assert (verdict["judge"], verdict["prompts"]) == ("checker", 5)
    assert "5 held-out prompts (greedy)" in err
    assert main(words) == ExitCode.DONE
    out, err = capsys.readouterr()
    assert "win rate (95 %)" in out
    assert "0 answers are to be generated" in err


def test_questions_left_open_are_said(runs: Path, server: FakeJudge, talk: Talk) -> None:
    server.decide = lambda *_: 500
    sets = [*asking(server), "judge.endpoint.retries=0", "judge.samples=0"]
    found = run(runs, sets, talk)
    assert found.code == ExitCode.REFUSED
    assert "still open" in found.notices[0]
    endpoint = [v for v in found.verdicts if v.judge == "endpoint"]
    assert all(v.asked is not None and v.asked.unanswered == v.left_out * 2 for v in endpoint)
    server.decide = longer
    assert run(runs, sets, talk).code == ExitCode.DONE


def test_what_is_refused_before_anything_is_done(
    runs: Path, server: FakeJudge, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NobodyJudges, match=r"judge\.checker is false"):
        run(runs, ["judge.checker=false"], talk)
    with pytest.raises(SpecError, match="only leaves of judge"):
        run(runs, ["loss.beta=3"], talk)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(SpecError, match="MY_KEY is not set"):
        run(runs, asking(server), talk)
    assert not (runs / "cache" / "answers").exists()
    from orchestrator import folders

    with folders.hold(SweepFolder(runs, "judged")), pytest.raises(SweepHeld):
        run(runs, [], talk)


# --- after a sweep ---------------------------------------------------------------------------------------------------


def test_after_a_sweep_what_the_file_asks_for(runs: Path) -> None:
    folder, view = SweepFolder(runs, "judged"), SilentView()
    with Interrupt(lambda: "") as interrupt:
        judge_after(folder, Stop(StopKind.INTERRUPTED), view, interrupt, DashboardReporter(), trust_remote_code=False)
        assert not view.said
        judge_after(folder, Stop(StopKind.FINISHED), view, interrupt, DashboardReporter(), trust_remote_code=False)
    with Study.open(folder) as study:
        assert len(study.judged()) == 4, "two trials, greedy and sampled, by the rows' own answers"
    assert "What a judge says" in folder.report.read_text(encoding="utf-8")


def test_the_weights_that_are_judged_are_kept(runs: Path) -> None:
    folder = SweepFolder(runs, "judged")
    with Study.open(folder) as study:
        assert study.spec.keep_models == 1
        Retention(folder, study.spec, study.trials())
    assert len(list(folder.path.glob("trials/*/*/model"))) == 2
