"""Every page in a real Chromium over a real service: no console error, by keyboard, on a phone, in light and dark."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from docs.chromium import Chromium, Page, browser, installed
from orchestrator.service.access_tokens import Role
from orchestrator.service.hosting.queue_location import queue_url
from orchestrator.service.sweep_queue import SweepQueue
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.accessibility import AXE, MISSING, hindrances
from tests.support.page_service import (
    ENTER,
    ServedPages,
    driving,
    lost_by_keyboard,
    press,
    report,
    serving,
    wait_for,
)
from tests.support.processes import environment, wait_until
from tests.support.scripted_sweep import COMPLETE, DIVERGED, FAILED, PRUNED, Script, make_spec, run_sweep

pytestmark = pytest.mark.browser
DRAWN = "document.documentElement.dataset.drawn"
WIDE = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth"
EMPTY = "[...document.querySelectorAll('.chart')].filter((c) => !c.querySelector('.main-svg')).length"
POINTS = "document.querySelector('#curves .chart').data.map((t) => t.y.length).reduce((a, b) => a + b, 0)"
FINDINGS = "document.getElementById('findings').textContent"
PAGES = {
    "list": ("/", "true"),
    "sweep": ("/sweeps/live", DRAWN),
    "finished sweep": ("/sweeps/done", DRAWN),
    "waiting sweep": ("/sweeps/queued", DRAWN),
    "trial": ("/sweeps/done/trials/7", DRAWN),
    "action": ("/sweeps/live/actions/stop", "true"),
    "deletion": ("/sweeps/done/actions/delete", "true"),
    "new": ("/new", "document.documentElement.dataset.checked"),
    "choice": ("/compare", "true"),
    "comparison": ("/compare?name=done&name=other", DRAWN),
    "error": ("/sweeps/dome", "true"),
}
"""Pages, and when each is ready."""


@dataclass(frozen=True)
class Running:
    """A service, and the study and running trials of the sweep `live`."""

    served: ServedPages
    study: Study
    trials: list[Trial]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    if installed() is None:
        pytest.skip("no Chromium on the PATH")
    with browser() as found:
        yield found


def scripted(trial: Trial) -> Script:
    outcome = {3: PRUNED, 5: DIVERGED, 7: FAILED}.get(trial.number, COMPLETE)
    return Script(quality=0.2 + 0.05 * trial.number, outcome=outcome, samples=("<script>alert(1)</script>", "fine"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service over a finished sweep, another, one that runs, and one that waits."""
    root = tmp_path_factory.mktemp("runs")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in environment(root).items():
            patch.setenv(name, value)
        for name in ("done", "other"):
            run_sweep(root, make_spec(name, description="<b>what</b> it is"), scripted)
        queue = SweepQueue(queue_url(root))
        stack.callback(queue.close)
        queue.submit("queued", dump_spec(make_spec("queued")), root / "queued", owner="ann", priority=3)
        study = stack.enter_context(driving(root, make_spec("live")))
        trials = [trial for _ in range(3) if isinstance(trial := study.ask(), Trial)]
        for number, trial in enumerate(trials):
            for step in (0, 10, 20):
                report(study, trial, step, 0.5 + number / 20 + step / 200)
        yield Running(stack.enter_context(serving(root)), study, trials)


@pytest.fixture
def page(chromium: Chromium, running: Running) -> Iterator[Page]:
    page = chromium.page()
    page.call("Network.clearBrowserCookies")
    yield page
    page.close()


@pytest.mark.parametrize("name", ["login", *PAGES])
def test_a_page_is_readable_and_works_by_keyboard(page: Page, running: Running, name: str) -> None:
    served = running.served
    path, ready = PAGES.get(name, ("/login", "true"))
    if name != "login":
        served.log_in(page)
    expected = ["404"] if name == "error" else []
    for width, dark in ((1280, False), (390, True), (390, False), (1280, True)):
        page.seen.errors.clear()
        page.look(f"{served.base}{path}", width=width, dark=dark, ready=ready)
        errors = [each for each in page.seen.errors if not any(word in each for word in expected)]
        assert errors == [], f"{width} px"
        assert page.run(WIDE) <= 0, f"{name} scrolls sideways at {width} px"
        assert page.run(EMPTY) == 0, "a chart was not drawn"
        page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        if AXE is not None and (width == 1280) is not dark:
            assert hindrances(page) == [], f"{width} px, {'dark' if dark else 'light'}"
        if width == 1280 and not dark:
            assert lost_by_keyboard(page) == ([], [])
    if AXE is None:
        pytest.skip(MISSING)


def test_no_page_has_inline_scripts_or_styles(page: Page, running: Running) -> None:
    served = running.served
    served.log_in(page)
    for path, _ in (("/login", ""), *PAGES.values()):
        answer = page.run(
            f"fetch({path!r}).then(async (a) => [a.headers.get('content-security-policy'), await a.text()])"
        )
        assert "unsafe" not in answer[0]
        assert "script-src 'self'" in answer[0]
        assert re.findall(r"<style|\sstyle=|<script(?![^>]* src=)(?![^>]*application/json)|\son\w+=", answer[1]) == []


def test_a_token_logs_in_and_the_cookie_is_not_for_scripts(page: Page, running: Running) -> None:
    served = running.served
    page.look(f"{served.base}/sweeps/done?best=3", width=1280)
    assert page.run("location.pathname + location.search") == "/login?next=%2Fsweeps%2Fdone%3Fbest%3D3"
    page.run("document.getElementById('token').value = 'ps_wrong'")
    page.run("document.getElementById('token').focus()")
    press(page, ENTER)
    wait_for(page, "document.querySelector('[role=alert]')?.textContent")
    assert "not valid" in page.run("document.querySelector('[role=alert]').textContent")
    page.run(f"document.getElementById('token').value = {served.tokens[Role.VIEWER]!r}")
    page.run("document.getElementById('token').focus()")
    press(page, ENTER)
    wait_for(page, "location.pathname + location.search === '/sweeps/done?best=3'")
    assert page.run("document.cookie") == ""
    assert page.run("document.querySelectorAll('header .buttons a').length") == 0, "a viewer has no buttons"
    page.run("document.querySelector('.who').requestSubmit()")
    wait_for(page, "location.pathname === '/login'")


def test_the_curves_grow_as_points_arrive_and_keep_what_the_reader_chose(page: Page, running: Running) -> None:
    served, study = running.served, running.study
    served.log_in(page, to="/sweeps/live?hide=pruned", ready=DRAWN)
    page.run("window.same = true; document.querySelector('#setup details, #log details, details').open = true")
    before = page.run(POINTS)
    report(study, running.trials[0], 30, 0.9)
    wait_until(lambda: page.run(POINTS) > before)
    assert page.run("window.same"), "the page was loaded again"
    assert page.run("document.querySelector('input[value=pruned]').checked")
    assert page.run("location.search") == "?hide=pruned"
    assert page.seen.errors == []


def test_the_page_of_a_trial_follows_it(page: Page, running: Running) -> None:
    served, study = running.served, running.study
    served.log_in(page, to="/sweeps/live/trials/1", ready=DRAWN)
    page.run("window.same = true; document.querySelector('#log details').open = true")
    before = page.run(POINTS)
    report(study, running.trials[1], 30, 0.7)
    wait_until(lambda: page.run(POINTS) > before)
    assert page.run("window.same && document.querySelector('#log details').open")
    assert page.seen.errors == []


def test_filters_and_one_selection_concern_all_charts(page: Page, running: Running) -> None:
    served = running.served
    served.log_in(page, to="/sweeps/done", ready=DRAWN)
    rows = "[...document.querySelectorAll('table.trials tbody th')].map((c) => c.textContent.trim().split(' ')[0])"
    assert len(page.run(rows)) == 12
    page.run("document.querySelector('input[name=best]').value = 4")
    page.run("document.querySelector('input[name=best]').dispatchEvent(new Event('change', {bubbles: true}))")
    wait_until(lambda: len(page.run(rows)) == 4)
    assert page.run("location.search") == "?best=4"
    chosen = page.run(rows)[1]
    click = (
        "(() => { const c = document.querySelector('#curves .chart');"
        " const k = c.data.findIndex((t) => t.name === 'trial %s');"
        " c.emit('plotly_click', { points: [{ data: c.data[k], pointNumber: 0 }] }); })()"
    )
    page.run(click % chosen)
    wait_until(lambda: "select" in page.run("location.search"))
    wait_until(lambda: page.run(f"document.querySelector('input[name=select][value=\"{chosen}\"]').checked"))
    red = "document.querySelector('%s .chart').%s"
    wait_until(lambda: "selected trials are red" in page.run("document.getElementById('parallel').textContent"))
    assert page.run(red % ("#curves", "data.filter((t) => t.name).length")) == 1, "the others are gray"
    page.run("document.getElementById('clear').click()")
    wait_until(lambda: len(page.run(rows)) == 12 and page.run("location.search") == "")


def test_an_action_tells_its_cost_does_it_for_the_person_and_can_be_undone(page: Page, running: Running) -> None:
    served, study = running.served, running.study
    served.log_in(page, Role.OPERATOR, to="/sweeps/live", ready=DRAWN)
    labels = page.run("[...document.querySelectorAll('header .buttons a')].map((a) => a.textContent)")
    assert labels == ["Pause", "Stop", "Budget", "Add a trial", "End for good", "Copy"]
    page.look(f"{served.base}/sweeps/live/actions/pause", width=1280)
    assert "3 running trials write a checkpoint" in page.run("document.querySelector('.costs').textContent")
    page.run("document.getElementById('field-why').value = 'lunch'")
    page.run("document.querySelector('main form').requestSubmit()")
    wait_for(page, "location.pathname === '/sweeps/live'")
    [request] = study.requests()
    assert request.kind == "pause"
    assert "lunch" in request.text
    assert "operator" in request.text
    assert page.run("document.querySelector('.notices a').textContent") == "Undo: continue"
    # No driver has taken up the pause yet.
    page.look(page.run("document.querySelector('.notices a').href"), width=1280)
    page.run("document.querySelector('main form').requestSubmit()")
    wait_for(page, "location.pathname === '/sweeps/live'")
    assert [request.kind for request in study.requests()] == ["pause", "unpause"]
    for request in study.requests():
        study.complete_request(request.seq)
    page.look(f"{served.base}/sweeps/live/actions/resume", width=1280)
    assert "once its trials have written their checkpoints" in page.run("document.body.textContent")
    assert page.run("document.querySelector('main a').getAttribute('href')") == "/sweeps/live"
    page.look(f"{served.base}/sweeps/done/actions/pause", width=1280)
    assert "done is finished: there is nothing to pause" in page.run("document.body.textContent")
    page.look(f"{served.base}/sweeps/done/actions/delete", width=1280)
    assert "needs the role admin" in page.run("document.body.textContent")


def test_the_editor_shows_mistakes_at_their_lines_completes_and_starts(page: Page, running: Running) -> None:
    served = running.served
    served.log_in(page, to="/new?example=quickstart", ready="document.documentElement.dataset.checked")
    wait_until(lambda: page.run("document.getElementById('findings').textContent.includes('Plan of quickstart')"))
    page.run("document.getElementById('yaml').focus()")
    page.run(
        "(() => { const a = document.getElementById('yaml'), k = a.value.indexOf('  loss:');"
        " a.setSelectionRange(k, k); a.setRangeText('  lo', k, k, 'end'); })()"
    )
    page.call("Input.insertText", text="s")
    page.call("Input.dispatchKeyEvent", type="keyDown", key=" ", code="Space", modifiers=2, windowsVirtualKeyCode=32)
    wait_until(lambda: page.run("!document.getElementById('choices').hidden"))
    assert "loss: " in page.run("document.getElementById('choices').textContent")
    press(page, ENTER)
    assert "  loss:   loss:" in page.run("document.getElementById('yaml').value")
    wait_until(lambda: page.run("document.querySelector('.wrong-line')?.textContent"))
    page.run("document.querySelector('#findings button[data-line]').click()")
    assert page.run("document.activeElement.id") == "yaml"
    page.run(
        "(() => { const a = document.getElementById('yaml'); a.value = a.value.replace('  loss:   loss:', '  loss:')"
        ".replace('name: quickstart', 'name: done'); a.dispatchEvent(new InputEvent('input')); })()"
    )
    wait_until(lambda: "there is a sweep named done (free: done-2)" in page.run(FINDINGS))
    assert page.run("document.querySelector('.wrong-line').textContent").strip() == "4"
    page.run(
        "(() => { const a = document.getElementById('yaml'); a.value = a.value.replace('name: done', 'name: mine');"
        " a.dispatchEvent(new InputEvent('input')); })()"
    )
    wait_until(lambda: page.run("document.getElementById('findings').textContent.includes('Plan of mine')"))
    assert page.run("document.querySelectorAll('.wrong-line').length") == 0
    page.run("document.querySelector('button[value=start]').click()")
    wait_for(page, "location.pathname === '/sweeps/mine'")
    assert "waits in the queue" in page.run("document.querySelector('.notices').textContent")
    queue = SweepQueue(queue_url(served.root))
    assert (queue.find("mine").owner, queue.find("mine").state.value) == ("admin", "waiting")
    queue.close()


def test_the_list_is_filtered_sorted_and_compares(page: Page, running: Running) -> None:
    served = running.served
    served.log_in(page, to="/?sort=name")
    names = "[...document.querySelectorAll('a.name')].map((a) => a.textContent)"
    assert [name for name in page.run(names) if name != "mine"] == ["done", "live", "other", "queued"]
    page.look(f"{served.base}/?q=o&state=finished&sort=name", width=1280)
    assert page.run(names) == ["done", "other"]
    page.look(f"{served.base}/?q=done", width=1280)
    assert page.run("document.querySelector('.wrong').textContent") == "1 trial failed"
    page.look(f"{served.base}/?sort=name", width=1280)
    page.run(
        "document.querySelectorAll('input[value=done], input[value=other]').forEach((box) => { box.checked = true; })"
    )
    page.run("document.querySelector('form[action=\"/compare\"]').requestSubmit()")
    wait_for(page, "location.pathname === '/compare' && !!document.getElementById('ranking')")
    assert page.run("document.title") == "done · other"


def test_the_list_follows_its_sweeps_and_keeps_what_is_marked(page: Page, running: Running) -> None:
    served = running.served
    served.log_in(page, to="/?sort=name")
    page.run("window.same = true; document.querySelector('input[value=done]').checked = true")
    page.run("document.querySelector('input[value=done]').focus()")
    queue = SweepQueue(queue_url(served.root))
    queue.submit("later", dump_spec(make_spec("later")), served.root / "later", owner="ben")
    waiting = "document.getElementById('queue-and-gpus').textContent.includes('later')"
    wait_until(lambda: page.run(waiting))
    assert page.run("[...document.querySelectorAll('a.name')].some((a) => a.textContent === 'later')")
    assert page.run("window.same && document.querySelector('input[value=done]').checked")
    assert page.run("document.activeElement.value") == "done"
    queue.withdraw("later", "")
    queue.forget("later")
    wait_until(lambda: not page.run(waiting))
    assert page.seen.errors == []
    queue.close()


def test_a_trial_shows_what_differs_from_the_winner_and_its_traceback(page: Page, running: Running) -> None:
    served = running.served
    served.log_in(page, to="/sweeps/done/trials/7", ready=DRAWN)
    text = page.run("document.body.innerText")
    assert re.search(r"\d differs? from the best trial", text)
    assert "loss.gamma" in text
    assert "<script>alert('f')</script>" in text
    page.look(f"{served.base}/sweeps/done/trials/2", width=1280, ready=DRAWN)
    assert "initial model" in page.run("document.getElementById('samples').textContent")
    assert page.run("document.querySelectorAll('#curves .chart').length") >= 4
