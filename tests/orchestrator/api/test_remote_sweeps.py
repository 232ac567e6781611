"""Sweeps of a service, over HTTP: the answers, errors, tables and commands of the same sweeps on this machine."""

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pandas
import pytest
import yaml

from orchestrator import api
from orchestrator.api.service_client import InvalidServer, ServiceClient, ServiceRefused, ServiceUnreachable
from orchestrator.commands.request_commands import NoSuchTrial, RequestRefused
from orchestrator.errors import NameTaken, NoSuchSweep, NoTrialCompleted, SpecChanged, SpecError
from orchestrator.folders import sweep_lock
from orchestrator.service.access_tokens import Role
from orchestrator.service.http_app import Service
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.processes import LIMIT_SECONDS, call, called, json_of, orchestrate
from tests.support.scripted_sweep import DIVERGED, FAILED, PRUNED, Script, make_spec, run_sweep
from tests.support.service_http import listening
from tests.support.specs import TINY_MODEL
from trainer.config.trial import GeneratedModel
from trainer.synthetic.tiny_models import generate_model

OUTCOMES = {3: PRUNED, 5: DIVERGED, 7: FAILED}


def script(trial: Trial) -> Script:
    ended = {"outcome": OUTCOMES[trial.number]} if trial.number in OUTCOMES else {}
    return Script(quality=0.2 + 0.01 * trial.number, **ended)


class Served:
    """A runs folder, its service and an administrator's token."""

    def __init__(self, root: Path, service: Service, url: str) -> None:
        self.root, self.service, self.url = root, service, url
        self.token = service.tokens.create("ada", Role.ADMIN)
        self.server = api.connect(url, self.token)

    def command(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """What a command on another machine prints: it has no runs folder, and the token in its environment."""
        variables = {"ORCHESTRATE_SERVER": self.url, "ORCHESTRATE_TOKEN": self.token}
        return called(self.root.parent / "nothing", *arguments, code=code, **variables)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served") / "runs"
    root.mkdir()
    run_sweep(root, make_spec(), script)
    run_sweep(root, make_spec("other"), lambda _: Script(quality=0.3), trials=4)
    service = Service(root)
    with listening(service) as url:
        yield Served(root, service, url)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """With two trials of a sweep that a test changes."""
    root = tmp_path / "runs"
    root.mkdir()
    run_sweep(root, make_spec(), lambda _: Script(), trials=2)
    service = Service(root)
    with listening(service) as url:
        yield Served(root, service, url)


def test_a_services_sweep_answers_as_the_sweep_here(finished: Served, tmp_path: Path) -> None:
    here, there = api.open_sweep("s", finished.root), finished.server.open_sweep("s")
    assert there.status() == {**here.status(), "queue": None, "judging": None}
    assert there.history() == here.history()
    assert there.best() == here.best()
    assert there.suggest() == here.suggest()
    assert there.log(7) == here.log(7)
    assert list(there.follow(7)) == [here.log(7)]
    pandas.testing.assert_frame_equal(there.trials(), here.trials())
    pandas.testing.assert_frame_equal(there.metrics(), here.metrics(), check_like=True)
    chosen = {"trials": [2, 4], "since": 10}
    pandas.testing.assert_frame_equal(there.metrics(["loss"], **chosen), here.metrics(["loss"], **chosen))
    assert there.wait(check=False) == here.wait(check=False) == api.ExitCode.TRIALS_FAILED
    report = there.report(tmp_path / "page.html")
    assert "Result" in report.page == (tmp_path / "page.html").read_text(encoding="utf-8")
    assert report.conclusions["best"] == here.report(tmp_path / "here.html").conclusions["best"]
    listed = finished.server.list_sweeps()
    assert (set(listed.index), listed.loc["s", "value"]) == ({"s", "other"}, here.best()["value"])
    assert finished.server.compare("s", "other")["sweeps"]


def test_commands_with_a_server_print_what_they_print_there(finished: Served, tmp_path: Path) -> None:
    for arguments in (
        ("status", "s", "--json"), ("history", "s", "--json"), ("best", "s", "--json"), ("best", "s", "--metrics"),
        ("history", "s"), ("suggest", "s"), ("logs", "s", "7", "--tail", "0"), ("logs", "s", "--tail", "5"),
        ("compare", "s", "other", "--json"), ("compare", "s", "other"),
    ):  # fmt: skip
        there, here = finished.command(*arguments)[0], called(finished.root, *arguments)[0]
        assert there.replace(',\n  "queue": null,\n  "judging": null', "") == here, arguments
    assert finished.command("attach", "s")[0] == called(finished.root, "attach", "s")[0]
    assert finished.command("status", "s")[0] == called(finished.root, "status", "s")[0]
    assert finished.url in finished.command("list")[0]
    token = {"ORCHESTRATE_TOKEN": finished.token}
    assert finished.url in called(tmp_path, "list", "--server", finished.url, **token)[0], "also after the command"
    file = tmp_path / "planned.yaml"
    file.write_text(TINY)
    assert finished.command("plan", str(file))[0] == called(finished.root, "plan", str(file))[0]
    assert "plan of tiny" in finished.command("plan", str(file))[0]
    finished.command("report", "s", "--output", str(tmp_path / "page.html"))
    assert "Result" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not (finished.root.parent / "nothing").exists()


def test_verbs_reach_the_study_with_the_persons_name(served: Served) -> None:
    sweep = served.server.open_sweep("s")
    assert "needs --server" in called(served.root, "set", "s", "priority=5", code=2)[1]
    assert "-1000 to 1000" in served.command("set", "s", "priority=high", code=2)[1]
    assert "loss.beta=3.0" in sweep.enqueue({"loss.beta": 3.0})[0]
    assert "trial 1" in sweep.clone(1, ["loss.beta=4"], why="wider")[0]
    assert "budget.hours" in sweep.set_budget({"budget.hours": 2})[0]
    assert "enqueued" in served.command("enqueue", "s", "--set", "loss.beta=5")[1]
    with sweep_lock(api.open_sweep("s", served.root).folder):
        assert "requested a pause" in sweep.pause(why="lunch")[0]
        assert "requested a stop of s" in served.command("stop", "s")[1]
        assert sweep.is_driven()
    with Study.open(api.open_sweep("s", served.root).folder) as study:
        assert [waiting.settings["loss.beta"] for waiting in study.enqueued_trials()] == [3.0, 4.0, 5.0]
        requests = {request.kind: request.text for request in study.requests()}
    assert list(requests) == ["set", "pause", "stop"]
    assert all("ada" in text for text in requests.values())
    assert sweep.resume()[-1].startswith("s waits in the queue")
    assert "priority 0, submitted by ada" in served.command("status", "s")[0]
    assert "s waits with priority -5" in served.command("set", "s", "priority=-5")[1]
    assert "priority -5, submitted by ada" in served.command("status", "s")[0]


def test_a_sweep_is_resumed_with_other_settings(served: Served) -> None:
    sweep = served.server.open_sweep("s")
    with pytest.raises(SpecChanged, match="what its trials have in common"):
        sweep.resume({"training.max_steps": 9})
    with pytest.raises(SpecError, match=r"--set budget\.trils=9"):
        sweep.resume(["budget.trils=9"])
    err = served.command("resume", "s", "--set", "budget.trials=9", "--detach")[1]
    assert "changed budget.trials: null -> 9" in err
    assert "s waits in the queue" in err
    with Study.open(api.open_sweep("s", served.root).folder, read_only=True) as study:
        assert study.spec.budget.trials == 9


def test_a_services_errors_are_the_exceptions_of_the_sweep_here(served: Served) -> None:
    with pytest.raises(NoSuchSweep, match="no sweep named 'ss'"):
        served.server.open_sweep("ss")
    sweep = served.server.open_sweep("s")
    with pytest.raises(RequestRefused, match="there is nothing to stop") as refused:
        sweep.stop()
    assert refused.value.code == api.ExitCode.USER
    with pytest.raises(NoSuchTrial, match="s has no trial 99"):
        sweep.prune(99, why="x")
    with pytest.raises(SpecError) as wrong:
        sweep.enqueue({"loss.bta": 1, "training.learing_rate": 1e-6})
    assert [problem.path for problem in wrong.value.problems] == ["loss.bta", "training.learing_rate"]
    run_sweep(served.root, make_spec("failed"), lambda _: Script(outcome=FAILED), trials=1)
    with pytest.raises(NoTrialCompleted) as none:
        served.server.open_sweep("failed").best()
    assert none.value.code == api.ExitCode.NO_TRIAL_COMPLETED
    assert "did you mean 's'" in served.command("status", "ss", code=2)[1]


def test_a_submitted_file_waits_and_its_mistakes_have_their_lines(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nbase:\n  loss: {kind: simpo, bta: 2}\nbudget: {trials: -1}\n")
    with pytest.raises(SpecError) as wrong:
        served.server.submit(file)
    places = {problem.path: problem.where for problem in wrong.value.problems}
    assert places["base.loss.bta"] == f"{file}:3"
    assert places["budget.trials"] == f"{file}:4"
    assert f"{file}:3: base.loss.bta" in served.command("sweep", str(file), code=2)[1]
    assert f"{file}:3: base.loss.bta" in served.command("plan", str(file), "--json", code=2)[1]
    file.write_text(dump_spec(make_spec("mine")))
    err = served.command("sweep", str(file), "--detach", "--priority", "3")[1]
    assert f"mine waits in the queue of {served.url}" in err
    assert "orchestrate attach mine" in err
    (waiting,) = served.server.queue()
    assert (waiting["name"], waiting["priority"], waiting["owner"]) == ("mine", 3, "ada")
    with pytest.raises(NameTaken):
        served.server.submit(file)
    assert served.server.open_sweep("mine").is_driven()
    with pytest.raises(SpecError, match="there is no such file"):
        served.server.submit(tmp_path / "nothing.yaml")


def test_a_request_whose_answer_is_lost_is_made_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, sent, send = served.server.open_sweep("s"), list[str](), httpx2.Client.send

    def lose_the_first(client: httpx2.Client, request: httpx2.Request, **more: Any) -> httpx2.Response:
        answer = send(client, request, **more)
        sent.append(request.headers["idempotency-key"])
        if len(sent) == 1:
            raise httpx2.ReadError("the connection was reset")
        return answer

    monkeypatch.setattr(httpx2.Client, "send", lose_the_first)
    monkeypatch.setattr("orchestrator.api.service_client._WAITS", (0.0,))
    assert "enqueued" in sweep.enqueue({"loss.beta": 3.0})[0]
    assert len(sent) == 2
    assert len(set(sent)) == 1
    with Study.open(api.open_sweep("s", served.root).folder) as study:
        assert len(study.enqueued_trials()) == 1


def test_ctrl_c_leaves_the_sweep_and_says_how_to_come_back(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(dump_spec(make_spec("mine")))
    process = orchestrate(
        tmp_path / "nothing", "--server", served.url, "sweep", str(file), ORCHESTRATE_TOKEN=served.token
    )
    assert process.stderr is not None
    shown = ""
    for line in process.stderr:
        shown += line
        if "waits in the queue" in line:
            break
    command_line = Path(f"/proc/{process.pid}/cmdline").read_text()
    assert served.url in command_line
    assert served.token not in command_line
    process.send_signal(signal.SIGINT)
    shown += process.communicate(timeout=LIMIT_SECONDS)[1]
    assert process.returncode == 0, shown
    assert f"mine continues\n  orchestrate --server {served.url} attach mine" in shown
    assert served.service.queue.find("mine").state == "waiting"


def test_the_token_is_sent_to_no_other_place(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, reason in (
        ("http://gpu-1:8787", "unencrypted"), ("ftp://localhost", "no URL of a service"), ("https://[::1", "no URL"),
        ("https://me:pw@host", "no user"), ("https://host/?a=b", "query"),
    ):  # fmt: skip
        with pytest.raises(InvalidServer, match=reason):
            ServiceClient(url, "ps_x")
    with pytest.raises(ServiceRefused, match="does not accept the token") as refused:
        api.connect(served.url, "ps_wrong")
    assert refused.value.status == 401
    monkeypatch.setattr("orchestrator.api.service_client._WAITS", ())
    with pytest.raises(ServiceUnreachable, match="is `orchestrate serve` running there") as lost:
        api.connect("http://127.0.0.1:9", "ps_x")
    assert lost.value.code == api.ExitCode.REFUSED
    assert "ps_" not in repr(ServiceClient("https://host", "ps_x"))
    monkeypatch.delenv("ORCHESTRATE_TOKEN", raising=False)
    code, _, err = call(tmp_path / "nothing", "--server", served.url, "list")
    assert (code, "ORCHESTRATE_TOKEN_FILE" in err) == (2, True)
    file = tmp_path / "token"
    file.write_text(f"{served.token}\n")
    assert "s" in called(tmp_path / "nothing", "--server", served.url, "list", ORCHESTRATE_TOKEN_FILE=str(file))[0]
    assert "s" in called(served.root, "--server", served.url, "list")[0], "the machine's own token, beside the runs"


def test_what_a_service_does_not_take_is_refused_before_anything_is_sent(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(dump_spec(make_spec("mine")))
    for arguments, reason in (
        (("sweep", str(file), "--address", "auto", "--rehearse"), "--rehearse, --address: on this machine only"),
        (("resume", "s", "--mirror", "file:///tmp"), "--mirror: on this machine only"),
        (("plan", str(file), "--rehearse"), "--rehearse: on this machine only"),
        (("best", "s", "--export", str(tmp_path / "model")), "--export: on this machine only"),
        (("report", "s"), "add --output"),
    ):
        assert reason in " ".join(served.command(*arguments, code=2)[1].split()), arguments
    code, _, err = call(tmp_path / "nothing", "--server", served.url, "doctor")
    assert (code, "doctor works on this machine only" in err) == (2, True)
    assert served.server.queue() == []
    assert "larger ones start first" in called(tmp_path, "sweep", "--help")[0]
    assert "they need --server" in call(tmp_path / "nothing", "sweep", str(file), "--priority", "2")[2]


TINY = f"""
name: tiny
base:
  model: {{generated: {TINY_MODEL}}}
  data:
    train: {{generated: instructions, rows: 200}}
    eval: {{generated: instructions, split: eval, rows: 16}}
    max_length: 128
  loss: {{kind: simpo}}
  training: {{pairs_per_update: 8, max_steps: 4, eval_steps: 2, learning_rate: 1e-3}}
  evaluation: {{prompts: 2, samples: 1, max_new_tokens: 4}}
search:
  loss.beta: [2.0, 5.0]
maximize: eval_accuracies/logp
budget: {{concurrency: 1}}
"""


def test_a_sweep_with_its_model_is_submitted_followed_to_its_end_and_deleted(tmp_path: Path) -> None:
    root, file = tmp_path / "runs", tmp_path / "tiny.yaml"
    root.mkdir()
    shape = GeneratedModel.model_validate(yaml.safe_load(TINY_MODEL))
    shutil.copytree(generate_model(shape, tmp_path / "cache"), tmp_path / "model")
    file.write_text(TINY.replace(f"{{generated: {TINY_MODEL}}}", "./model"))
    service = Service(root)
    with listening(service, supervises=True) as url:
        served = Served(root, service, url)
        ann = service.tokens.create("ann", Role.OPERATOR)
        variables = {"ORCHESTRATE_SERVER": url, "ORCHESTRATE_TOKEN": ann}
        out, err = called(tmp_path / "nothing", "sweep", str(file), "--upload", **variables)
        assert re.search(r"trial 1 COMPLETE", err), err
        assert "Best: trial" in out
        assert [trial["state"] for trial in json_of(root, "status", "tiny")["trials"]] == ["COMPLETE"] * 2
        assert "service/files/ann/" in (root / "tiny" / "sweep.yaml").read_text()
        assert served.server.open_sweep("tiny").wait() == api.ExitCode.DONE
        err = served.command("delete", "tiny", "--yes")[1]
        assert "cannot be undone" in err
        assert not (root / "tiny").exists()
