"""What the API changes: each as the command does it, once for each key, with its person in the history."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.status import history, status
from orchestrator.folders import SweepFolder, create_sweep_folder, known_sweeps, lock_holder, sweep_lock
from orchestrator.service import judge_processes
from orchestrator.service.access_tokens import Role
from orchestrator.service.driver_supervisor import DriverSupervisor, orchestrate_command
from orchestrator.service.sweep_queue import QueueState, SweepQueue
from orchestrator.spec.loading.loader import load_spec, load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import REQUESTED_EVENT
from tests.support.metrics import COMPLETE
from tests.support.processes import call, wait_until
from tests.support.scripted_sweep import FAILED, Script, make_spec, run_sweep
from tests.support.service_caller import Caller, begin, root
from tests.support.service_process import driver_command, holder

RATES = {"training.learning_rate": {"choice": [3e-7, 1e-6]}}


def ended(name: str = "a") -> SweepFolder:
    """A sweep whose trial 0 is complete and whose trial 1 has failed."""
    return run_sweep(root(), make_spec(name, RATES), lambda trial: Script(outcome=FAILED if trial.number else COMPLETE))


def requests(name: str = "a") -> list[tuple[str, int | None]]:
    with Study.open(SweepFolder(root(), name), read_only=True) as study:
        return [(request.kind, request.trial) for request in study.requests()]


@contextmanager
def driven(name: str = "a") -> Iterator[None]:
    """As if a driver ran."""
    with sweep_lock(SweepFolder(root(), name)):
        yield


def test_a_running_sweep_and_its_trials_get_requests_with_their_person(caller: Caller) -> None:
    begin("a")
    with driven():
        notices = caller.post("/sweeps/a/pause", why="lunch")["notices"]
        assert notices[0].startswith("requested a pause of a: 3 running trials")
        caller.post("/sweeps/a/stop")
        caller.post("/sweeps/a/trials/1/pause", why="lunch")
        caller.post("/sweeps/a/trials/2/prune", why="too slow")
        caller.post("/sweeps/a/trials/0/stop")
        assert "give `why`" in caller.post("/sweeps/a/trials/2/prune", code=409)["detail"]
        assert "is not paused" in caller.post("/sweeps/a/trials/0/unpause", code=409)["detail"]
        assert caller.post("/sweeps/a/trials/9/stop", code=404)["detail"] == "a has no trial 9 (it has 0 to 2)"
        caller.post("/sweeps/a/budget", settings=["budget.hours=9"])
    assert requests() == [("pause", None), ("stop", None), ("pause", 1), ("prune", 2), ("stop", 0), ("set", None)]
    asked = [event["text"] for event in history("a", root())["events"] if event["kind"] == REQUESTED_EVENT]
    assert asked[0].startswith("pause: lunch (by operator through ")
    assert all("operator through " in text for text in asked)
    assert "what can: budget.trials" in caller.post("/sweeps/a/budget", code=422, settings=["loss.beta=3"])["detail"]


def test_a_pause_that_no_driver_has_taken_up_is_taken_back(caller: Caller) -> None:
    begin("a")
    with driven():
        assert caller.post("/sweeps/a/unpause", code=409)["detail"] == "a is not paused"
        caller.post("/sweeps/a/pause")
        assert caller.post("/sweeps/a/pause", code=409)["detail"] == "a is being paused already"
        caller.post("/sweeps/a/unpause")
        assert caller.post("/sweeps/a/unpause", code=409)["detail"] == "a is not paused"
        caller.post("/sweeps/a/pause")
        caller.post("/sweeps/a/trials/1/pause")
        caller.post("/sweeps/a/trials/1/unpause")
        assert "is not paused" in caller.post("/sweeps/a/trials/1/unpause", code=409)["detail"]
    expected = [("pause", None), ("unpause", None), ("pause", None), ("pause", 1), ("unpause", 1)]
    assert requests() == expected


def test_odd_names_and_texts_are_mistakes_and_no_bugs(caller: Caller) -> None:
    begin("a")
    headers = {"authorization": f"Bearer {caller.as_role[Role.OPERATOR]}", "content-type": "application/json"}
    for name in ("x" * 300, "..%2f..", "a%00"):
        for verb in ("stop", "pause", "resume", "withdraw", "judge"):
            answer = caller.client.post(f"/api/v1/sweeps/{name}/{verb}", headers=headers)
            assert answer.status_code in (404, 409, 422), f"{verb} {name}"
    half = b'{"overrides": ["loss.beta=\\ud800"]}'
    answer = caller.client.post("/api/v1/sweeps/a/trials", headers=headers, content=half)
    assert answer.status_code == 422
    assert "loss.beta=\ud800" in answer.json()["detail"]


def test_what_creates_a_trial_does_so_once_for_each_key(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ended()

    def waiting() -> int:
        with Study.open(folder, read_only=True) as study:
            return sum(enqueued.by_command for enqueued in study.enqueued_trials())

    first = caller.post("/sweeps/a/trials", code=201, key="k", overrides=["loss.beta=3.0"])
    assert caller.post("/sweeps/a/trials", code=201, key="k", overrides=["loss.beta=3.0"]) == first
    assert waiting() == 1
    other = caller.post("/sweeps/a/trials", code=409, key="k", overrides=["loss.beta=4.0"])
    assert "was used for another request" in other["detail"]
    assert (
        "these settings and this seed already"
        in caller.post("/sweeps/a/trials", code=409, key="l", overrides=["loss.beta=3.0"])["detail"]
    )
    # A refused request leaves its key free.
    caller.post("/sweeps/a/trials", code=201, key="l", overrides=["loss.beta=5.0"])
    caller.post("/sweeps/a/trials/0/clone", code=201, key="c", overrides=["loss.gamma=0.7"], why="try")
    refused = caller.post("/sweeps/a/trials/0/clone", code=409, overrides=["loss.gamma=0.8"], from_checkpoint=True)
    assert "checkpoints of finished trials are removed" in refused["detail"]
    assert waiting() == 3
    assert "enqueued by operator through " in history("a", root())["given"][0]["origin"]

    def killed(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(SweepQueue, "store_answer", killed)
        with pytest.raises(OSError, match="killed"):
            caller.post("/sweeps/a/trials", key="m", overrides=["loss.beta=6.0"])
    assert waiting() == 4
    again = caller.post("/sweeps/a/trials", code=409, key="m", overrides=["loss.beta=6.0"])
    assert "the history of a says whether it had an effect" in again["detail"]
    assert waiting() == 4, "nothing is doubled"


def test_settings_with_files_of_the_machine_are_for_admins(caller: Caller) -> None:
    ended()
    for setting in ("model.name_or_path=/etc", "data.chat_template=/etc/passwd", "loss.gamma=${HOME}"):
        for path in ("/sweeps/a/trials", "/sweeps/a/trials/0/clone"):
            found = caller.post(path, code=422, overrides=["loss.beta=3.0", setting])
            assert [problem["where"] for problem in found["problems"]] == [f"--set {setting}"]
    assert history("a", root())["given"] == []


def test_failed_trials_are_retried_with_and_without_the_queue(caller: Caller) -> None:
    ended()
    assert "only failed trials are retried" in caller.post("/sweeps/a/retry", code=409, trials=[0])["detail"]
    notices = caller.post("/sweeps/a/retry", trials=[1])["notices"]
    assert notices[0].startswith("requested a retry of 1 of a")
    ended("b")
    found = caller.post("/sweeps/b/resume", retry_failed=True)
    assert found["notices"][0].startswith("requested a retry of 1 of b")
    assert (found["queue"]["state"], found["queue"]["owner"]) == ("waiting", "operator")


def test_settings_are_changed_with_a_resumption_as_by_the_command(caller: Caller) -> None:
    folder = ended()
    for override in (
        "training.max_steps=9",
        "search.training.learning_rate=[3e-7]",
        "budget.trials=1",
        "budget.trils=9",
    ):
        here = call(root(), "resume", "a", "--set", override)
        assert here[0] == 2
        there = caller.post("/sweeps/a/resume", code=409 if "max_steps" in override else 422, overrides=[override])
        assert there["detail"].replace("sweep.yaml", str(folder.spec)) == here[2].strip(), override
    assert there["problems"][0]["where"] == "--set budget.trils=9"
    assert caller.service.queue.sweeps() == []
    found = caller.post("/sweeps/a/resume", overrides=["budget.trials=9", "description=wider"])
    assert found["notices"] == ["changed budget.trials: null -> 9", 'changed description: "" -> "wider"']
    assert found["queue"]["state"] == "waiting"
    with Study.open(folder, read_only=True) as study:
        assert (study.spec.budget.trials, study.spec.description) == (9, "wider")
    assert load_spec(folder.spec, is_new=False).budget.trials == 9
    done = caller.service.queue.actions("a")[-1]
    assert (done.person, done.action.startswith("resumed with budget.trials=9, description=wider")) == (
        "operator",
        True,
    )
    caller.post("/sweeps/a/withdraw")
    again = caller.post("/sweeps/a/resume", overrides=["budget.trials=9"])
    assert again["notices"] == ["a has these values already: nothing is changed"]


def test_changes_of_a_resumption_name_no_more_than_a_submitted_file_may(caller: Caller) -> None:
    folder = run_sweep(root(), make_spec("a", RATES, notify={"command": ("true",)}), lambda _: Script())
    before = folder.spec.read_text()
    for override in (
        "tracking.uri=http://elsewhere.example", "mirror=s3://bucket/x", "notify.command=[reboot]", "notify=null",
        "judge={endpoint: {url: http://elsewhere.example, model: m}}", "base.data.train=/etc/passwd",
        "judge.prompts_from=/etc/passwd", "model.tokenizer=/etc", "data.chat_template=/etc/passwd",
        "data.chat_template=${HOME}",
    ):  # fmt: skip
        refused = caller.post("/sweeps/a/resume", code=422, overrides=[override])
        assert [problem["where"] for problem in refused["problems"]] == [f"--set {override}"], refused
    assert folder.spec.read_text() == before
    assert caller.service.queue.sweeps() == []
    caller.post("/sweeps/a/resume", overrides=["budget.trials=9"])  # what an administrator had set stays
    caller.post("/sweeps/a/withdraw")
    caller.post("/sweeps/a/resume", role=Role.ADMIN, overrides=["notify.command=[date]"])
    with Study.open(folder, read_only=True) as study:
        assert study.spec.notify is not None
        assert (study.spec.notify.command, study.spec.budget.trials) == (("date",), 9)


def test_settings_of_a_sweep_without_a_trial_are_changed_too(caller: Caller) -> None:
    caller.submit("a")
    caller.post("/sweeps/a/withdraw")
    found = caller.post("/sweeps/a/resume", overrides=["budget.trials=1", "loss.beta=3.0"])
    assert "changed base.loss.beta: 2.0 -> 3.0" in found["notices"]
    spec = load_spec_text(caller.service.queue.find("a").spec, root())
    assert (spec.budget.trials, spec.base.loss.model_dump()["beta"]) == (1, 3.0)
    folder = SweepFolder(root(), "b")
    create_sweep_folder(folder, dump_spec(make_spec("b")))
    caller.post("/sweeps/b/resume", overrides=["budget.trials=1"])
    assert load_spec(folder.spec).budget.trials == 1


def test_a_sweep_of_a_command_comes_into_the_queue_and_is_finished(caller: Caller) -> None:
    begin("a", trials=0)
    with driven():
        assert "is being driven by" in caller.post("/sweeps/a/resume", code=409)["detail"]
    caller.post("/sweeps/a/resume")
    assert caller.post("/sweeps/a/resume", code=409)["detail"] == "a is waiting already"
    caller.service._supervisor.close()
    queue = caller.service.queue
    commands: list[list[str]] = []

    def command(file: Path) -> list[str]:
        commands.append(orchestrate_command(file))
        return driver_command(file)

    (root() / "enough").write_text("a")
    supervisor = DriverSupervisor(root(), queue, at_once=1, command=command)

    def finished() -> bool:
        supervisor.step()
        return queue.find("a").state is QueueState.FINISHED

    wait_until(finished)
    supervisor.close()
    assert [each[-3:] for each in commands] == [["resume", "--", "a"]]
    assert status("a", root())["state"] == "finished"


def test_a_request_without_a_body_is_one_and_a_body_that_is_no_object_is_named(caller: Caller) -> None:
    begin("a")
    with driven():
        assert "requested a pause" in caller.call("POST", "/sweeps/a/pause")["notices"][0]
    yaml = b"name: a\nbase: {}"
    for content, words in (
        (b'{"yaml": ', "is no JSON: Expecting value at character 10"),
        (yaml, "to be a JSON object"),
    ):
        headers = {"content-type": "application/json"} if content is not yaml else {}
        refused = caller.call("POST", "/sweeps", code=422, content=content, headers=headers)
        assert words in refused["detail"]
        assert refused["exit_code"] == 2


def test_a_sweep_is_stopped_before_its_first_trial_and_begins_again(caller: Caller) -> None:
    (root() / "a.prepares").touch()
    caller.submit("a")
    caller.service._supervisor.close()
    queue = caller.service.queue
    supervisor = DriverSupervisor(root(), queue, at_once=1, command=driver_command)

    def has(state: QueueState) -> bool:
        supervisor.step()
        return queue.find("a").state is state

    wait_until(lambda: has(QueueState.DRIVEN) and holder(root(), "a"))
    assert caller.get("/sweeps/a")["state"] == "preparing"
    assert "starting" in caller.post("/sweeps/a/stop", why="other data")["notices"][0]
    wait_until(lambda: has(QueueState.STOPPED))
    assert queue.find("a").why == "stopped before its first trial"
    actions = [action.action for action in queue.actions("a")]
    assert "stopped while it was starting: other data (by operator through the service)" in actions
    (root() / "a.prepares").unlink()
    (root() / "enough").write_text("a")
    caller.post("/sweeps/a/resume")
    wait_until(lambda: has(QueueState.FINISHED))
    supervisor.close()


def test_what_has_not_begun_and_what_is_archived_say_so(caller: Caller, tmp_path: Path) -> None:
    caller.submit("a")
    for path in ("report", "best", "metrics", "trials/0", "log?trial=0"):
        detail = caller.get(f"/sweeps/a/{path}", code=409)["detail"]
        assert detail == "a waits in the queue; it has no trials yet", path
    assert "has a driver already" not in caller.post("/sweeps/a/pause", code=409)["detail"]
    log = SweepFolder(root(), "a").log
    log.parent.mkdir()
    log.write_text("no such data\n")
    assert caller.get("/sweeps/a/log")["lines"] == ["no such data"]
    caller.post("/sweeps/a/withdraw")
    assert "has not begun: " in caller.call("GET", "/sweeps/a/deletion")["lines"][0]
    caller.call("DELETE", "/sweeps/a")
    assert "no sweep named 'a'" in caller.get("/sweeps/a", code=404)["detail"]

    ended("b")
    caller.service.queue.adopt("b", owner="ann", gpus=0)
    caller.service.queue.withdraw("b", "not now")
    caller.call("POST", "/sweeps/b/archive", json={"url": f"file://{tmp_path}"})
    assert caller.get("/sweeps/b")["state"] == "archived"
    assert "b is archived at file://" in caller.get("/sweeps/b/report", code=409)["detail"]


def test_a_judge_is_no_driver_and_is_ended_by_stop(caller: Caller) -> None:
    folder = ended()
    program = (
        "import signal; from pathlib import Path; from orchestrator.errors import JUDGING\n"
        "from orchestrator.folders import SweepFolder, sweep_lock\n"
        f"with sweep_lock(SweepFolder(Path({str(root())!r}), 'a'), JUDGING): print('holds', flush=True); signal.pause()"
    )
    judge = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert judge.stdout is not None
    assert judge.stdout.readline() == "holds\n"
    assert caller.get("/sweeps/a")["state"] == "finished"
    assert "there is nothing to pause" in caller.post("/sweeps/a/pause", code=409)["detail"]
    assert "takes effect at" in caller.post("/sweeps/a/budget", settings=["budget.trials=9"])["notices"][-1]
    assert "is being judged by pid" in caller.post("/sweeps/a/resume", code=409)["detail"]
    assert caller.post("/sweeps/a/stop")["notices"][0].startswith("judging a ends")
    assert "KeyboardInterrupt" in judge.communicate()[1]
    assert lock_holder(folder) is None
    assert caller.service.queue.actions("a")[-1].person == "operator"


def test_a_sweep_is_ended_for_good_without_a_driver(caller: Caller) -> None:
    begin("a")
    notices = caller.post("/sweeps/a/stop", abandon=True, why="no use")["notices"]
    assert notices[-1].startswith("a is abandoned: 3 unfinished trials ended as PRUNED")
    found = status("a", root())
    assert found["state"] == "abandoned"
    assert "no use (by operator through " in found["why"]


def test_a_deletion_says_what_it_frees_and_spares_what_runs(caller: Caller) -> None:
    folder = ended()
    caller.post("/sweeps/a/resume")
    refused = caller.call("DELETE", "/sweeps/a", code=409)
    assert refused["detail"] == "a is waiting: withdraw it first"
    caller.post("/sweeps/a/withdraw")
    with driven():
        assert "is being driven by" in caller.call("DELETE", "/sweeps/a", code=409)["detail"]
    planned = caller.call("GET", "/sweeps/a/deletion")
    assert planned["frees"] > 0
    assert planned["lines"][0].startswith("a (finished, 2 trials done)")
    assert folder.path.is_dir()
    deleted = caller.call("DELETE", "/sweeps/a")
    assert deleted["notices"][-1].startswith("a is deleted; ")
    assert (known_sweeps(root()), caller.service.queue.sweeps()) == ([], [])
    assert caller.get("/sweeps")["sweeps"] == []
    assert caller.call("DELETE", "/sweeps/a", code=404)["status"] == 404


def test_an_archived_sweep_is_listed_and_comes_back(caller: Caller, tmp_path: Path) -> None:
    ended()
    before = status("a", root())
    assert "give the `url`" in caller.post("/sweeps/a/archive", code=409, role=Role.ADMIN)["detail"]
    url = f"file://{tmp_path}/far"
    caller.post("/sweeps/a/archive", role=Role.ADMIN, url=url)
    entry = caller.get("/sweeps?state=archived")["sweeps"][0]
    assert entry["why"] == f"at {url}; `orchestrate unarchive a` brings it back"
    assert caller.post("/sweeps/a/unarchive", role=Role.ADMIN)["notices"][-1].startswith("a is back in ")
    assert status("a", root()) == before


def test_judging_is_checked_first_and_then_runs_as_the_command(caller: Caller) -> None:
    begin("a")
    assert "no trial of a has completed yet" in caller.post("/sweeps/a/judge", code=409)["detail"]
    ended("b")
    with driven("b"):
        assert "is being driven by" in caller.post("/sweeps/b/judge", code=409)["detail"]
    assert caller.post("/sweeps/b/judge", code=422, top=0)["problems"][0]["path"] == "top"
    caller.post("/sweeps/b/judge", code=202, top=1)
    # Its trials have left no models, which the command says.
    log = SweepFolder(root(), "b").log
    wait_until(lambda: log.is_file() and log.read_text())
    assert log.read_text() == "no trial of b has completed yet: there is nothing to judge\n"
    wait_until(lambda: caller.get("/sweeps/b")["judging"]["state"] != "running")
    assert caller.get("/sweeps/b")["judging"]["why"] == "no trial of b has completed yet: there is nothing to judge"


def test_a_judge_that_fails_is_shown_until_another_begins_or_succeeds(
    caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fifo, program = ended(), tmp_path / "fifo", tmp_path / "judge"
    os.mkfifo(fifo)
    program.write_text(f"#!/bin/sh\necho trial 0\nread code < {fifo}\necho no credit, $code >&2\nexit $code\n")
    program.chmod(0o700)
    monkeypatch.setattr(judge_processes.sys, "executable", str(program))

    def judging() -> dict[str, Any]:
        return caller.get("/sweeps/a")["judging"] or {"state": ""}

    def begin_judge() -> None:
        caller.post("/sweeps/a/judge", code=202, top=1)
        assert judging()["state"] == "running"

    def judge(code: int) -> dict[str, Any]:
        begin_judge()
        assert caller.post("/sweeps/a/judge", code=409)["detail"] == "a is being judged already"
        fifo.write_text(f"{code}\n")  # which waits for the judge
        wait_until(lambda: judging()["state"] != "running")
        return judging()

    assert judging() == {"state": ""}
    failed = judge(5)
    assert (failed["state"], failed["why"]) == ("failed", "trial 0\nno credit, 5")
    folder.log.write_text(folder.log.read_text() + "of a driver\n")
    assert judging() == failed, "its own words"
    assert judge(0) == {"state": ""}, "it succeeded"
    judge(137)
    assert judging()["why"] == "trial 0\nno credit, 137\nthe judge was ended by signal 9"
    assert judge(130) == {"state": ""}, "it was stopped"

    begin_judge()
    group = folder.path / "judge" / "process.began"
    wait_until(lambda: group.is_file() and group.read_text())
    os.killpg(int(group.read_text()), signal.SIGKILL)
    wait_until(lambda: judging()["state"] == "failed")
    assert judging()["why"] == "the judge was killed"
    results = folder.path / "judge" / "judge.json"
    results.write_text("{}")  # of a judge that a command began
    os.utime(results, (time.time() + 9, time.time() + 9))
    assert judging() == {"state": ""}


def test_a_judge_is_stopped_while_it_starts(caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, program = ended(), tmp_path / "judge"
    program.write_text("#!/bin/sh\ntrap 'exit 130' INT\necho starts\nwhile :; do sleep 0.1; done\n")
    program.chmod(0o700)
    monkeypatch.setattr(judge_processes.sys, "executable", str(program))
    caller.post("/sweeps/a/judge", code=202)
    wait_until(lambda: folder.log.is_file() and "starts" in folder.log.read_text())
    assert caller.post("/sweeps/a/stop")["notices"][0].startswith("judging a ends")
    wait_until(lambda: caller.get("/sweeps/a")["judging"] is None)
