"""What pages say and offer of sweeps in every state, read without a browser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from orchestrator.commands.budget_control import set_budget
from orchestrator.errors import JUDGING
from orchestrator.folders import SweepFolder, sweep_lock
from orchestrator.service import judge_processes
from orchestrator.service.event_sources import SweepSource
from orchestrator.service.http_app import Service
from orchestrator.service.judge_processes import begin_judging
from orchestrator.service.page import listed_sweeps, sweep_views
from orchestrator.service.request_guard import COOKIE
from orchestrator.service.sweep_queue import MOST_DEATHS, QueueState
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.objectives import Objective
from orchestrator.spec.requirements import Requirement
from orchestrator.spec.sweep_spec import Finalists
from orchestrator.study.study import Study
from orchestrator.study.trial_records import STOPPING, Trial
from tests.support.metrics import COMPLETE
from tests.support.page_service import driving
from tests.support.scripted_sweep import DIVERGED, FAILED, PRUNED, Script, make_spec, run_sweep
from tests.support.service_caller import Caller
from trainer.metrics import CHOSEN


class Reader:
    """The machine's owner in a browser without scripts."""

    def __init__(self, root: Path, service: Service) -> None:
        self.root, self.service = root, service
        self._client = TestClient(self.service.app, base_url="http://localhost:8787")
        begun = self.service.sessions.log_in(self.service.tokens.machine_token())
        assert begun is not None
        self._client.cookies.set(COOKIE, begun[0])
        self._csrf = begun[1]

    def page(self, path: str, code: int = 200) -> str:
        answer = self._client.get(path)
        assert answer.status_code == code, answer.text
        return answer.text

    def text(self, path: str, code: int = 200) -> str:
        """The page without its tags."""
        return " ".join(re.sub(r"<script.*?</script>|<[^>]+>", " ", self.page(path, code), flags=re.DOTALL).split())

    def buttons(self, name: str) -> list[str]:
        header = self.page(f"/sweeps/{name}").partition("<header>")[2].partition("</header>")[0]
        return re.findall(r'class="button[^"]*" href="[^"]*">([^<]*)<', header)

    def file_of(self, query: str) -> str:
        """What the editor has."""
        found = re.search(r"<textarea id=\"yaml\".*?>\n(.*?)</textarea>", self.page(f"/new?{query}"), re.DOTALL)
        assert found is not None
        return found[1]

    def post(self, path: str, **fields: Any) -> str:
        answer = self._client.post(path, data={"csrf": self._csrf, **fields})
        assert answer.status_code == 200, answer.text
        return answer.text


@pytest.fixture
def reader(caller: Caller, fast_tmp_path: Path) -> Reader:
    return Reader(fast_tmp_path, caller.service)


def ran(reader: Reader, name: str, trials: int = 12, script: Script | None = None) -> SweepFolder:
    return run_sweep(reader.root, make_spec(name), lambda _: script or Script(), trials=trials)


def submitted(reader: Reader, *names: str) -> None:
    for name in names:
        spec = dump_spec(make_spec(name, description=f"that of {name}"))
        reader.service.queue.submit(name, spec, reader.root / name, owner="ann")


def test_a_sweep_is_a_template_of_the_next_one(reader: Reader) -> None:
    ran(reader, "a")
    ran(reader, "a-2", trials=0)
    submitted(reader, "b")
    assert reader.buttons("a")[-2:] == ["Copy", "Follow-up"]
    assert reader.buttons("b")[-1:] == ["Copy"]
    copy = reader.file_of("like=a")
    assert copy.startswith("# As a, ")
    assert "\nname: a-3\n" in copy, "the next free name"
    assert "max_steps: 40" in copy
    assert "weight_decay" not in copy, "a default value"
    assert "description: that of b" in reader.file_of("like=b"), "also of a sweep that waits"
    assert re.search(r"# Starts from trial \d+ of a.*\nname: a-3\n", reader.file_of("after=a"), re.DOTALL)
    assert "no sweep named &#39;c&#39;" in reader.page("/new?like=c", 404)


def test_what_keeps_sweeps_from_starting_is_on_the_list(reader: Reader) -> None:
    assert "No sweep is started" not in reader.page("/")
    reader.service._problem = "the disk is full"
    assert "No sweep is started at the moment: the disk is full" in reader.text("/")
    assert "the disk is full" in reader.text("/list")


def test_a_waiting_sweep_has_its_place_and_what_is_before_it(reader: Reader) -> None:
    submitted(reader, "a", "b", "c")
    reader.service.queue.begin_launch("a", "boot")
    assert "Its driver is starting" in reader.text("/sweeps/a")
    assert reader.buttons("a")[0] == "Stop"
    assert "Place 2 of 2 in the queue, after b. Started: a." in reader.text("/sweeps/c")
    assert "a is just starting; it has no trials yet" in reader.text("/compare?name=a&name=b", 409)


def test_a_waiting_sweep_names_a_paused_one_that_keeps_its_gpus(reader: Reader) -> None:
    submitted(reader, "a", "b")
    reader.service.queue.begin_launch("a", "boot")
    with driving(reader.root, make_spec("a")) as study:
        study.pause_sweep("by ann")
        assert "in the queue. Started: a (paused, keeps its GPUs)." in reader.text("/sweeps/b")
        study.unpause_sweep("by ann")
        assert "no sweep that waits starts instead. Stop gives them free." in reader.text("/sweeps/a/actions/pause")


def test_a_sweep_whose_driver_refused_it_shows_the_output_and_can_be_removed(reader: Reader) -> None:
    submitted(reader, "a")
    reader.service.queue.begin_launch("a", "boot")
    log = SweepFolder(reader.root, "a").log
    log.parent.mkdir()
    log.write_text("reading rows\n<no> such file\n")
    reader.service.queue.end("a", QueueState.FAILED, "<no> such file")
    assert "reading rows &lt;no&gt; such file" in reader.text("/sweeps/a")
    assert reader.buttons("a") == ["Resume", "Delete", "Copy"]
    assert "It has not begun" in reader.text("/sweeps/a/actions/delete")
    assert "a is out of the queue&#39;s records" in reader.post("/sweeps/a/actions/delete")
    assert "no sweep named" in reader.page("/sweeps/a", 404)


def test_only_a_fault_stands_in_the_red_box(reader: Reader) -> None:
    queue = reader.service.queue
    for name, state, why in (
        ("stopped", QueueState.STOPPED, "stopped: too slow (by ann through the service)"),
        ("spent", QueueState.FINISHED, "out of budget: 2 hours"),
        ("refused", QueueState.FAILED, "no such data"),
    ):
        ran(reader, name, 2, Script(outcome=None))
        queue.adopt(name, owner="ann", gpus=0)
        queue.begin_launch(name, "boot")
        if name == "stopped":  # after a driver that died and was followed by another
            assert queue.record_death(name, 1, "the driver was killed", MOST_DEATHS).has_fault
            queue.begin_launch(name, "boot")
        queue.end(name, state, why)
    ran(reader, "lost", 2, Script(outcome=None))
    queue.adopt("lost", owner="ann", gpus=0)
    for launch in range(1, MOST_DEATHS + 2):
        queue.begin_launch("lost", "boot")
        queue.record_death("lost", launch, "the driver was killed", MOST_DEATHS)
    boxes = {
        name: 'class="problem"' in reader.page(f"/sweeps/{name}") for name in ("stopped", "spent", "refused", "lost")
    }
    assert boxes == {"stopped": False, "spent": False, "refused": True, "lost": True}
    assert "too slow (by ann through the service)" in reader.text("/sweeps/stopped")
    wrong = dict(re.findall(r'href="/sweeps/(\w+)">.*?<span class="wrong \w+">([^<]*)<', reader.page("/"), re.DOTALL))
    assert "stopped" not in wrong
    assert (wrong["refused"], wrong["lost"]) == ("was refused", "drivers died")


def test_a_sweep_that_a_command_stopped_is_no_fault_and_one_whose_driver_died_is(reader: Reader) -> None:
    for name in ("stopped", "died"):
        folder = ran(reader, name, 1, Script(outcome=None, samples=None))
        with Study.open(folder) as study:
            study.start_driving()
            if name == "stopped":
                study.add_event(STOPPING, "stopped: enough (by ann on gpu1)")
    rows = dict(
        re.findall(r'class="name" href="/sweeps/(\w+)">(.*?)</tr>', reader.page("/?state=interrupted"), re.DOTALL)
    )
    assert "was interrupted" in rows["died"]
    assert "was interrupted" not in rows["stopped"]
    assert "enough (by ann on gpu1)" in rows["stopped"]


def test_each_sweep_and_each_trial_is_in_one_state_of_the_filters(reader: Reader) -> None:
    outcomes = {0: COMPLETE, 1: PRUNED, 2: DIVERGED, 3: FAILED}
    run_sweep(reader.root, make_spec("a"), lambda t: Script(outcome=outcomes.get(t.number)), trials=6)
    ran(reader, "b")
    submitted(reader, "c", "d")
    reader.service.queue.begin_launch("c", "boot")

    def hideable() -> dict[str, str]:
        return dict(re.findall(r'data-state="(\w+)">(\d+)<', reader.page("/sweeps/a")))

    assert {word: count for word, count in hideable().items() if count != "0"} == {
        "complete": "1", "pruned": "1", "diverged": "1", "failed": "1", "interrupted": "2",
    }  # fmt: skip
    shown = json.loads(reader.page("/sweeps/a/panels?hide=running"))
    assert shown["states"] == {word: int(count) for word, count in hideable().items()}
    table = next(panel["html"] for panel in shown["panels"] if panel["key"] == "live")
    assert table.count('class="state interrupted"') == 2, "an interrupted trial does not run"
    hidden = json.loads(reader.page("/sweeps/a/panels?hide=interrupted"))
    assert "2 trials hidden by the filters" in next(p["html"] for p in hidden["panels"] if p["key"] == "live")
    with sweep_lock(SweepFolder(reader.root, "a")):
        assert "there is nothing to retry" in reader.text("/sweeps/a/trials/4/actions/retry", 409)

    def states(query: str = "") -> list[str]:
        select = reader.page(f"/{query}").partition('name="state"')[2].partition("</select>")[0]
        return re.findall(r"<option[^>]*>(\w+ \(\d+\))", select)

    assert states() == ["finished (1)", "interrupted (1)", "starting (1)", "waiting (1)"]
    assert states("?q=a&state=waiting") == ["finished (0)", "interrupted (1)", "starting (0)", "waiting (0)"]
    assert states("list?owner=ann") == ["finished (0)", "interrupted (0)", "starting (1)", "waiting (1)"]
    assert "2 sweeps" not in reader.text("/?state=starting")
    assert re.findall(r'class="name" href="/sweeps/(\w)"', reader.page("/?state=starting")) == ["c"]


def test_sweeps_to_compare_are_found_among_many_and_stay_chosen(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listed_sweeps, "_ON_A_PAGE", 3)
    for number in range(4):
        ran(reader, f"a{number}", 12 if number < 2 else 1)
    ran(reader, "b")
    submitted(reader, "waits")

    def choices(query: str, which: str) -> list[str]:
        part = reader.page(f"/compare{query}").partition(f'id="{which}"')[2].partition("</div>")[0]
        return re.findall(r'name="name" value="(\w+)"', part)

    assert choices("", "others") == ["b", "a3", "a2"], "the newest first, without one that has not begun"
    assert choices("?page=2", "others") == ["a1", "a0"]
    assert "page 1 of 2, 5 sweeps" in reader.text("/compare")
    assert choices("?q=B", "others") == ["b"]
    assert choices("?state=interrupted", "others") == ["a3", "a2"]
    query = "?name=a0&name=a1&q=b&page=1"
    assert (choices(query, "chosen"), choices(query, "others")) == (["a0", "a1"], ["b"])
    assert 'id="ranking"' not in reader.page(f"/compare{query}"), "they are still being chosen"
    assert 'id="ranking"' in reader.page("/compare?name=a0&name=a1&q=b")


def test_a_finished_sweep_is_resumed_after_its_budget_grew(reader: Reader) -> None:
    ran(reader, "a")
    assert "Resume" not in reader.buttons("a")
    set_budget("a", reader.root, ["budget.trials=20"])
    assert reader.buttons("a")[0] == "Resume"


def test_a_page_that_got_panels_from_before_a_change_is_told_to_ask_again(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran(reader, "a")
    monkeypatch.setattr(sweep_views, "_LEAST_SECONDS", 3600.0)  # a view stays as it is, whatever its sweep does
    for path in ("/sweeps/a/panels", "/sweeps/a/trials/0/panels"):
        reader.page(path)
    set_budget("a", reader.root, ["budget.trials=20"])
    for path in ("/sweeps/a/panels", "/sweeps/a/trials/0/panels"):
        found = json.loads(reader.page(path))
        assert found["again"], path
        assert found["rest"] > 0


def test_a_sweep_that_is_judged_offers_to_end_that(reader: Reader) -> None:
    folder = ran(reader, "a")
    with sweep_lock(folder, JUDGING):
        assert "its answers are being judged" in reader.text("/sweeps/a")
        assert reader.buttons("a") == ["Stop", "Budget", "Add a trial", "Copy", "Follow-up"]
        assert "Its judge ends" in reader.text("/sweeps/a/actions/stop")


def test_a_judge_that_failed_is_on_the_page_and_in_its_events(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, program = ran(reader, "a"), tmp_path / "judge"
    source = SweepSource(reader.service.context, "a")
    source.read()
    program.write_text("#!/bin/sh\necho '<no> credit'\nexit 5\n")
    program.chmod(0o700)
    monkeypatch.setattr(judge_processes.sys, "executable", str(program))
    begin_judging(folder, []).wait()
    assert "Judging failed: &lt;no&gt; credit" in reader.text("/sweeps/a")
    assert "Judge" in reader.buttons("a")
    events = dict(source.read())
    assert (events["judging"]["state"], events["judging"]["why"]) == ("failed", "<no> credit")
    assert not source.read()
    source.close()


def test_a_trial_that_no_driver_trains_is_interrupted_and_none_is_best_without_a_result(reader: Reader) -> None:
    ran(reader, "a", 2, Script(outcome=None))
    for path in ("/sweeps/a", "/sweeps/a/trials/0"):
        assert re.findall(r'class="state (running|interrupted)', reader.page(path))[-1] == "interrupted", path
    assert "2 interrupted" in reader.text("/sweeps/a")
    assert "There is no best trial yet" in reader.text("/sweeps/a/trials/0")
    folder = ran(reader, "b", 1, Script(outcome=PRUNED))
    with sweep_lock(folder):
        assert "best trial so far" not in reader.text("/sweeps/b/trials/0")


RATES = {"training.learning_rate": {"choice": [1e-6, 3e-6, 1e-5]}}


def trading(trial: Trial) -> Script:
    """Each trial has a better objective and less likely chosen responses than the one before."""
    return Script(quality=0.2 + 0.2 * trial.number, chosen=-2.0 - trial.number / 10)


@pytest.mark.parametrize("also", [(), (Objective(metric="eval_exact_answers", direction="maximize"),)])
def test_where_no_trial_keeps_the_requirements_the_page_says_so_and_marks_none(
    also: tuple[Objective, ...], reader: Reader
) -> None:
    bound = (Requirement.parse(CHOSEN, ">= initial - 0.5"),)
    run_sweep(reader.root, make_spec("bounded", RATES, require=bound, also=also), trading)
    text = reader.text("/sweeps/bounded")
    none = "one of the 3 complete trials keeps every requirement, so none is the best; nearest is trial 0"
    assert none in text
    assert "breaks eval_logps_per_token/chosen -2" in text
    assert "★" not in text
    assert "There is no best trial yet to compare them with." in reader.text("/sweeps/bounded/trials/2")


def test_one_trial_and_several_objectives_have_their_answers_on_the_page(reader: Reader) -> None:
    run_sweep(reader.root, make_spec("one", {}), lambda _: Script(quality=0.5))
    assert "Only one trial completed: it can only be compared with the initial model." in reader.text("/sweeps/one")
    also = (Objective(metric=CHOSEN, direction="maximize"),)
    run_sweep(reader.root, make_spec("front", RATES, also=also), trading)
    text = reader.text("/sweeps/front")
    assert "Pareto front, which no other trial equals or beats in every objective: 2, 1, 0" in text


def test_a_finalist_stands_beside_the_initial_model_on_its_own_rows(reader: Reader) -> None:
    data = {"train": [{"generated": "instructions"}], "confirm_share": 0.5}
    spec = make_spec("finals", RATES, base={"data": data}, finalists=Finalists(top=1, seeds=2))
    folder = run_sweep(reader.root, spec, lambda trial: Script(quality=0.2 + 0.1 * trial.number))
    with Study.open(folder) as study:
        (first, *_) = [record.number for record in study.trials() if record.finalist_of is not None]
    text = reader.text(f"/sweeps/finals/trials/{first}")
    assert "before training" in text
    assert "; the best, trial" not in text, "that was measured on the rows of the search"
