"""A sweep's way through the API: planned, submitted, listed, watched, stopped, resumed; and what is refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from orchestrator.commands.runs_folder.archive_records import ArchivedSweep, remove_record, write_record
from orchestrator.commands.runs_folder.sweep_list import list_sweeps
from orchestrator.commands.status import status
from orchestrator.folders import SweepFolder, create_sweep_folder, disk_usage, sweep_lock
from orchestrator.service.access_tokens import Role
from orchestrator.service.driver_supervisor import DriverSupervisor, ServiceRuns
from orchestrator.service.http_app import Service
from orchestrator.service.request_guard import COOKIE
from orchestrator.service.sweep_queue import QueueState
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.database.study_database import store_study_url
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialState
from tests.support.local_driver import forked
from tests.support.metrics import COMPLETE, evaluated
from tests.support.processes import called, json_of
from tests.support.service_caller import Caller, begin, root
from tests.support.specs import make_spec
from tests.support.storage_faults import counted_queries


def test_a_submitted_sweep_waits_in_its_place_once_for_each_key(caller: Caller) -> None:
    first = caller.submit("a", key="k")
    assert (first["name"], first["queue"]["state"], first["queue"]["owner"]) == ("a", "waiting", "admin")
    assert caller.submit("a", code=200, key="k")["queue"] == first["queue"]
    assert "used for another request" in caller.submit("b", code=409, key="k")["detail"]
    assert "a sweep named 'a' exists" in caller.submit("a", code=409)["detail"]
    caller.submit("b", name="c", priority=3)
    caller.submit("b", overrides=["loss.beta=3.0"])
    assert "beta: 3.0" in caller.service.queue.find("b").spec
    caller.call("POST", "/sweeps/b/priority", Role.OPERATOR, json={"priority": 9})
    assert [entry["name"] for entry in caller.call("GET", "/queue", Role.VIEWER)["queue"]] == ["b", "c", "a"]
    assert caller.call("GET", "/sweeps/b", Role.VIEWER)["state"] == "waiting"
    caller.call("POST", "/sweeps/b/stop", Role.OPERATOR, json={"why": "too large"})
    found = caller.service.queue.find("b")
    assert (found.state, found.why) == (QueueState.WITHDRAWN, "too large (by operator through the service)")
    assert caller.call("POST", "/sweeps/b/resume", Role.OPERATOR)["queue"]["state"] == "waiting"
    assert caller.call("POST", "/sweeps/b/resume", Role.OPERATOR, code=409)["detail"] == "b is waiting already"


def test_a_name_that_no_sweep_has_is_answered_with_those_of_the_queue_too(caller: Caller) -> None:
    begin("begun")
    caller.submit("waits")
    detail = caller.get("/sweeps/wait", code=404)["detail"]
    assert detail.endswith("(its sweeps: begun, waits); did you mean 'waits'?")
    for number in range(30):
        (root() / f"s{number:02}").mkdir()
        (root() / f"s{number:02}" / "sweep.yaml").write_text("name: s\n")
    assert ", s18 and 12 more)" in caller.get("/sweeps/other", code=404)["detail"]


def test_a_history_names_the_person_of_every_action(caller: Caller) -> None:
    caller.submit("a", priority=3)
    caller.call("POST", "/sweeps/a/priority", Role.OPERATOR, json={"priority": 9})
    caller.call("POST", "/sweeps/a/stop", Role.OPERATOR, json={"why": "too large"})
    caller.call("POST", "/sweeps/a/resume", Role.ADMIN)
    actions = caller.call("GET", "/sweeps/a/history", Role.VIEWER)["queue"]
    assert [(each["person"], each["action"]) for each in actions] == [
        ("admin", "submitted with priority 3"),
        ("operator", "priority 9"),
        ("operator", "withdrawn: too large (by operator through the service)"),
        ("admin", "resumed"),
    ]
    here = called(root(), "history", "a")[0]
    assert "submitted with priority 3 (by admin)" in " ".join(here.split()), "the command shows it before it has begun"
    assert json_of(root(), "history", "a") == {"name": "a", "events": [], "specs": [], "given": [], "queue": actions}
    with sweep_lock(begin("s")):
        caller.call("POST", "/sweeps/s/pause", Role.OPERATOR, json={"why": "lunch"})
    events = caller.call("GET", "/sweeps/s/history", Role.VIEWER)["events"]
    assert any("pause: lunch (by operator through " in each["text"] for each in events), events


def test_lists_come_in_pages(caller: Caller) -> None:
    for name in ("a", "c", "e"):
        caller.submit(name)
    for name in ("b", "d"):
        create_sweep_folder(SweepFolder(root(), name), dump_spec(make_spec(2, name=name)))
    seen, after = list[str](), ""
    while after is not None:
        page = caller.call("GET", f"/sweeps?limit=2&after={after}", Role.VIEWER)
        assert len(page["sweeps"]) <= 2
        seen += [sweep["name"] for sweep in page["sweeps"]]
        after = page["next"]
    assert seen == ["a", "b", "c", "d", "e"]
    assert caller.call("GET", "/sweeps?limit=5001", Role.VIEWER, code=422)["problems"][0]["path"] == "limit"
    begin("studied")
    page = caller.call("GET", "/sweeps/studied/trials?limit=2", Role.VIEWER)
    assert ([trial["number"] for trial in page["trials"]], page["next"]) == ([0, 1], 1)
    page = caller.call("GET", "/sweeps/studied/trials?after=1", Role.VIEWER)
    assert ([trial["number"] for trial in page["trials"]], page["next"]) == ([2], None)


def test_a_sweep_of_a_command_is_shown_as_the_command_does(caller: Caller) -> None:
    begin("s")
    assert caller.call("GET", "/sweeps/s", Role.VIEWER) == {**status("s", root()), "queue": None, "judging": None}
    assert caller.call("GET", "/sweeps/s/history", Role.VIEWER)["events"][0]["kind"] == "created"
    refused = caller.call("POST", "/sweeps/s/pause", Role.OPERATOR, code=409, json={})
    assert refused["detail"].startswith("s is not running")
    for path in ("/sweeps/t", "/sweeps/t/history", "/sweeps/..%2f..%2fetc"):
        assert caller.call("GET", path, Role.VIEWER, code=404)["status"] == 404


def test_the_list_is_filtered_and_sorted_and_says_how_far_each_sweep_is(caller: Caller) -> None:
    for name, value in (("low", 0.5), ("high", 0.9)):
        with Study.open(begin(name, trials=0)) as study:
            trial = study.ask()
            study.report(trial, [evaluated(1, value)])
            study.tell(trial, COMPLETE)
    caller.submit("next", priority=4)

    def names(query: str) -> list[str]:
        return [sweep["name"] for sweep in caller.get(f"/sweeps?{query}")["sweeps"]]

    assert names("sort=-value") == ["high", "low", "next"]
    assert names("sort=-priority&limit=1") == ["next"]
    assert names("sort=-value&after=high") == ["low", "next"]
    assert names("state=interrupted&text=LO") == ["low"]
    assert names("owner=admin") == names("state=waiting") == ["next"]
    assert "is no longer in this list" in caller.get("/sweeps?sort=-value&after=gone", code=409)["detail"]
    entry = caller.get("/sweeps?text=low&with_disk=true")["sweeps"][0]
    assert (entry["finished"], entry["planned"], entry["states"]) == (1, 3, {"COMPLETE": 1})
    assert (entry["best"], entry["queue"]) == ({"trial": 0, "value": 0.5}, None)
    assert entry["disk"] == caller.get("/sweeps?text=low")["sweeps"][0]["disk"] == disk_usage(root() / "low")
    assert caller.get("/sweeps?text=high")["sweeps"][0]["disk"] is None


def test_the_list_reads_no_study_whose_files_have_not_changed(caller: Caller) -> None:
    folders = [begin(f"s{number}", trials=1) for number in range(6)]

    def states() -> tuple[list[str], int]:
        """And how much was asked for them."""
        with counted_queries() as queries:
            found = [sweep["state"] for sweep in caller.get("/sweeps")["sweeps"]]
        return found, sum("service_" not in query and query != "BEGIN" for query in queries)  # of the queue

    assert states()[0] == ["interrupted"] * 6
    assert states() == (["interrupted"] * 6, 0)
    with sweep_lock(folders[2]):
        found, changed = states()
        assert (found[2], changed > 0) == ("running", True)
        with Study.open(folders[2]) as study:
            study.add_event("paused", "by hand")
        assert states()[0][2] == "paused", "while its driver runs it is read again too"
    assert states()[0] == ["interrupted"] * 6


def at_rest(root: Path) -> None:
    """Let every file be as old as those of a sweep that ended yesterday, to which times of files are certain."""
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, (1e9, 1e9))


def archived(folder: SweepFolder) -> None:
    write_record(folder.root, ArchivedSweep(folder.name, "s3://b", "id", 1.0, 2.0, 3, ""))
    shutil.rmtree(folder.path)


def test_whatever_another_process_changes_shows_in_the_next_list(caller: Caller) -> None:
    folder = begin("s", trials=1)
    begin("other", trials=0)

    def entry() -> dict[str, Any]:
        return next((each for each in caller.get("/sweeps")["sweeps"] if each["name"] == "s"), {})

    def after(change: Callable[[Study], object]) -> dict[str, Any]:
        """The entry after a change of the sweep, which was listed until nothing of it was looked at any more."""
        for _ in range(3):  # reading a database changes the times of its folder
            entry()
            at_rest(root())
        before = entry()
        assert entry() == before
        files = caller.service.context.entries._summaries._files  # pyright: ignore[reportPrivateUsage]
        assert [name for name, each in files.items() if each.resting] == ["other", "s"]

        def make() -> None:
            with Study.open(folder) as study:
                change(study)

        assert forked(make) == 0
        found = entry()
        assert found != before
        return found

    assert after(lambda study: study.enqueue({"loss.beta": 3.0}, "by hand", kind="enqueued"))["planned"] == 4
    more = make_spec(3, name="s", budget={"trials": 2})
    assert after(lambda study: study.amend(more))["planned"] == 3
    pruned = Outcome(TrialState.PRUNED, "by hand")
    assert after(lambda study: study.end_without_worker(0, pruned))["states"] == {"PRUNED": 1}

    def complete(study: Study) -> None:
        trial = study.ask()
        assert isinstance(trial, Trial)
        study.report(trial, [evaluated(1, 0.7)])
        study.tell(trial, COMPLETE)

    assert after(complete)["best"] == {"trial": 1, "value": 0.7}
    at_rest(root())
    entry()
    with sweep_lock(folder), Study.open(folder) as study:  # resumed
        assert entry()["state"] == "running"
        study.pause_sweep("lunch")
        assert entry()["state"] == "paused"
    assert entry()["state"] == "interrupted"
    assert after(lambda _: archived(folder))["state"] == "archived"
    remove_record(root(), "s")
    assert entry() == {}


def test_of_a_sweep_that_runs_the_list_reads_no_study_for_its_metrics(caller: Caller) -> None:
    folder = begin("s", trials=0)
    with sweep_lock(folder), Study.open(folder) as study:
        trial = study.ask()
        assert isinstance(trial, Trial)
        before = caller.get("/sweeps")
        study.report(trial, [evaluated(1, 0.7)])
        with counted_queries() as queries:
            assert caller.get("/sweeps") == before
        assert not any("trial" in query for query in queries), queries
        study.tell(trial, COMPLETE)
        assert caller.get("/sweeps")["sweeps"][0]["best"] == {"trial": 0, "value": 0.7}


def test_sweeps_in_one_database_are_listed_with_one_query_until_one_changes(
    caller: Caller, new_postgresql: Callable[[], str]
) -> None:
    url, names = new_postgresql(), ["a", "b", "c"]
    for name in names:
        spec = make_spec(3, name=name, storage=url)
        create_sweep_folder(SweepFolder(root(), name), dump_spec(spec))
        store_study_url(SweepFolder(root(), name), url)
        Study.create(SweepFolder(root(), name), spec, url).dispose()
    at_rest(root())

    def listed() -> tuple[list[tuple[str, int]], int]:
        """State and planned trials of each, and the number of queries to the studies."""
        with counted_queries() as queries:
            found = [(sweep["state"], sweep["planned"]) for sweep in caller.get("/sweeps")["sweeps"]]
        return found, sum("prefsweep_" in query or "trials" in query for query in queries)

    first, of_all = listed()
    assert first == [("interrupted", 3)] * 3
    assert of_all > 3
    assert listed() == (first, 1)
    with Study.open(SweepFolder(root(), "b")) as study:
        study.enqueue({"loss.beta": 3.0}, "by hand", kind="enqueued")
    changed, of_one = listed()
    assert changed == [("interrupted", 3), ("interrupted", 4), ("interrupted", 3)]
    assert 1 < of_one < of_all
    assert listed() == (changed, 1)
    list_sweeps(root())
    with counted_queries() as queries:
        assert [sweep["planned"] for sweep in list_sweeps(root())["sweeps"]] == [3, 4, 3]
    assert sum("prefsweep_" in query for query in queries) == 1, "another process keeps them too"
    store_study_url(SweepFolder(root(), "b"), "postgresql+psycopg://ann@127.0.0.1:1/gone")
    found = caller.get("/sweeps")["sweeps"]
    assert [sweep["state"] for sweep in found] == ["interrupted", "unreadable", "interrupted"]
    assert "/gone refused: connection failed" in found[1]["why"]


def test_a_plan_has_the_findings_of_the_command_with_their_lines(caller: Caller) -> None:
    text = dump_spec(make_spec(2, name="a"))
    assert caller.call("POST", "/plan", json={"yaml": text})["name"] == "a"
    wrong = text.replace("pairs_per_update", "pairs_per_updat")
    line = 1 + next(n for n, each in enumerate(wrong.splitlines()) if "pairs_per_updat:" in each)
    for path in ("/plan", "/sweeps"):
        refused = caller.call("POST", path, code=422, json={"yaml": wrong})
        assert refused["exit_code"] == 2
        assert refused["problems"][0]["where"] == f"sweep.yaml:{line}"
        assert "did you mean pairs_per_update?" in refused["problems"][0]["hint"]
    assert caller.service.queue.sweeps() == []
    assert (
        caller.call("POST", "/sweeps", code=422, json={"yaml": text, "priorty": 1})["problems"][0]["path"] == "priorty"
    )


@pytest.mark.parametrize("role", [Role.VIEWER, Role.OPERATOR])
def test_a_role_does_no_more_than_it_may(caller: Caller, role: Role) -> None:
    caller.submit("a")
    changes = [f"/sweeps/a/{change}" for change in ("stop", "pause", "unpause", "resume", "priority")]
    for path in ["/sweeps", "/plan", *changes] if role is Role.VIEWER else []:
        body = {"priority": 1} if path.endswith("priority") else {"yaml": "x"} if "a/" not in path else {}
        assert "needs the role" in caller.call("POST", path, role, code=403, json=body)["detail"]
    assert caller.call("GET", "/me", role)["role"] == role.name.lower()
    assert caller.service.queue.find("a").state is QueueState.WAITING


def test_a_browser_logs_in_by_the_printed_code_and_out(caller: Caller) -> None:
    client, code = caller.client, caller.service.sessions.new_code()
    begun = client.post("/api/v1/login", json={"code": code})
    cookie = begun.headers["set-cookie"]
    assert all(word in cookie for word in (COOKIE, "HttpOnly", "SameSite=strict")), cookie
    assert client.get("/api/v1/me").json()["name"] == "local"
    assert client.post("/api/v1/logout").status_code == 403, "not without the token of its forms"
    csrf = {"x-csrf-token": begun.json()["csrf"], "origin": "http://localhost:8787"}
    assert client.post("/api/v1/logout", headers=csrf).status_code == 204
    assert client.get("/api/v1/me").status_code == 401
    codes = [client.post("/api/v1/login", json={"code": code}).status_code for _ in range(11)]
    assert codes == [401] * 10 + [429]


def test_a_service_that_runs_starts_drivers_and_says_what_keeps_it(
    fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.processes import wait_until

    steps: list[int] = []

    def step(_: DriverSupervisor) -> None:
        steps.append(1)
        if len(steps) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(DriverSupervisor, "step", step)
    monkeypatch.setattr("orchestrator.service.http_app.STEP_SECONDS", 0.01)
    service = Service(fast_tmp_path)
    with pytest.raises(ServiceRuns):
        Service(fast_tmp_path)
    with TestClient(service.app, base_url="http://localhost") as client:
        wait_until(lambda: len(steps) > 2 and client.get("/healthz").status_code == 200)
    seen = len(steps)
    Service(fast_tmp_path).close()
    assert len(steps) == seen, "it has ended"
