"""Notices to a real server on this machine and to a real command; time and views are scripted."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver.notifications import NoticeDelivery, NotifyingView, webhook_url
from orchestrator.errors import SpecError
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec, sweep_identity
from orchestrator.spec.sweep_spec import Notify
from orchestrator.study.trial_records import TrialRecord, TrialState
from tests.support.http_server import SilentHandler, serving
from tests.support.processes import LIMIT_SECONDS, wait_until
from tests.support.recorders import SilentView
from tests.support.scripted_sweep import make_spec
from trainer.results import StepMetrics

SECRET = "T0SECRET/B0SECRET"


@dataclass
class Hook:
    """A webhook that answers as told and keeps what it was sent."""

    answers: list[int] = field(default_factory=list)
    got: list[dict[str, Any]] = field(default_factory=list)
    hang: threading.Event | None = None
    url: str = ""


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()

    class Handler(SilentHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hook.got.append({"type": self.headers["Content-Type"], **json.loads(body)})
            if hook.hang is not None:
                hook.hang.wait(LIMIT_SECONDS)
            self.send_response(hook.answers.pop(0) if hook.answers else 200)
            self.end_headers()

    with serving(Handler) as address:
        hook.url = f"{address}/services/{SECRET}"
        yield hook
        if hook.hang is not None:
            hook.hang.set()


def record(number: int, state: TrialState, **more: Any) -> TrialRecord:
    return TrialRecord(number=number, state=state, params={}, attempts=1, **more)


def test_what_happens_is_told_once_each(hook: Hook, tmp_path: Path) -> None:
    now, config, lines = [0.0], Notify(webhook_env="HOOK", stalled_minutes=10), SilentView()
    spec = make_spec("mine", notify=config)
    logged = NotifyingView(spec, lines, NoticeDelivery(hook.url, None, waits=()), config, lambda: now[0])
    logged.update_trial(record(7, TrialState.PRUNED, reason="diverged: an earlier driver's", diverged=True))
    logged.update_trial(record(0, TrialState.RUNNING))
    logged.update_trial(record(0, TrialState.PRUNED, reason="diverged: loss is nan & <bad>", diverged=True))
    logged.update_trial(record(1, TrialState.RUNNING))
    for now[0] in (599.0, 601.0, 700.0):
        logged.refresh()
    logged.add_metrics(1, [StepMetrics(1, {"loss": 1.0})])
    now[0] = 1400.0
    logged.refresh()
    logged.update_trial(record(1, TrialState.COMPLETE, value=0.75))
    logged.notify_end(StopReason(StopKind.FINISHED), record(1, TrialState.COMPLETE, value=0.75))
    assert [message["text"] for message in hook.got] == [
        "trial 0 of mine diverged: loss is nan &amp; &lt;bad&gt;",
        "mine has stalled: no progress of any worker for 10 minutes",
        "mine has stalled: no progress of any worker for 12 minutes",
        "mine: finished; best is trial 1 with eval_accuracies/logp = 0.75",
    ]
    assert {message["type"] for message in hook.got} == {"application/json"}
    assert (lines.said, lines.points_seen) == ([], 1)


def test_a_refusal_is_tried_again_a_few_times_and_then_said_without_the_address(
    hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    delivery = NoticeDelivery(hook.url, None, waits=(0.0, 0.0))
    hook.answers = [500, 429]
    delivery.send({"event": "finished", "sweep": "s", "trial": None, "text": "first"})
    delivery.send({"event": "stalled", "sweep": "s", "trial": None, "text": "second"})
    wait_until(lambda: len(hook.got) >= 3)
    hook.answers = [500, 500, 503]
    delivery.close(300)
    assert [message["text"] for message in hook.got[:3]] == ["first"] * 3
    logged = delivery.take_failures()
    assert len(hook.got) <= 6
    assert all(SECRET not in line and "127.0.0.1" not in line for line in logged)
    gone = NoticeDelivery(f"http://127.0.0.1:1/{SECRET}", None, waits=(0.0,))
    gone.send({"event": "finished", "sweep": "s", "trial": None, "text": "x"})
    gone.close(300)
    (messages,) = gone.take_failures()
    assert messages.startswith("the webhook did not accept the notice (finished): it cannot be reached")
    assert SECRET not in messages
    assert SECRET not in caplog.text


def test_a_proxy_whose_package_is_missing_is_reported_and_later_notices_are_sent(
    hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    with monkeypatch.context() as proxied:
        proxied.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
        distant = hook.url.replace("127.0.0.1", "0.0.0.0")  # this machine by an address that is not known as such
        delivery = NoticeDelivery(distant, None, waits=())
        delivery.send({"event": "stalled", "sweep": "s", "trial": None, "text": "first"})
        failures: list[str] = []
        wait_until(lambda: failures.extend(delivery.take_failures()) or failures)
    assert "cannot be reached (Using SOCKS proxy" in failures[0]
    delivery.send({"event": "finished", "sweep": "s", "trial": None, "text": "second"})
    delivery.close(300)
    assert [message["text"] for message in hook.got] == ["second"]


def test_an_endpoint_that_hangs_holds_nobody_up(hook: Hook) -> None:
    hook.hang = threading.Event()
    lines, config = SilentView(), Notify(webhook_env="HOOK")
    logged = NotifyingView(make_spec("mine", notify=config), lines, NoticeDelivery(hook.url, None, waits=()), config)
    logged.update_trial(record(0, TrialState.RUNNING))
    logged.update_trial(record(0, TrialState.PRUNED, reason="diverged: x", diverged=True))
    wait_until(lambda: hook.got)
    logged.add_metrics(0, [StepMetrics(1, {"loss": 1.0})])  # while the server has the notice and says nothing
    logged.refresh()
    assert lines.points_seen == 1
    hook.hang.set()
    logged.notify_end(StopReason(StopKind.INTERRUPTED), None)
    assert len(hook.got) == 1  # whoever interrupts a sweep knows it


def test_a_command_reads_the_notice(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code = f"import sys, os; open({str(out)!r}, 'w').write(sys.stdin.read() + os.environ['PREFSWEEP_EVENT'])"
    delivery = NoticeDelivery(None, (sys.executable, "-c", code), waits=())
    delivery.send({"event": "diverged", "sweep": "s", "trial": 3, "text": "t"})
    delivery.close(300)
    assert out.read_text() == '{"event": "diverged", "sweep": "s", "trial": 3, "text": "t"}diverged'
    assert delivery.take_failures() == []
    wrong = {(sys.executable, "-c", "raise SystemExit('no')"): "ended with 1: no", ("/no/such",): "No such file"}
    for command, words in wrong.items():
        failing = NoticeDelivery(None, command, waits=())
        failing.send({"event": "stalled", "sweep": "s", "trial": None, "text": "t"})
        failing.close(300)
        assert words in failing.take_failures()[0]


def test_the_address_comes_from_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec("mine", notify=Notify(webhook_env="MY_HOOK"))
    monkeypatch.delenv("MY_HOOK", raising=False)
    with pytest.raises(SpecError, match="MY_HOOK is not set"):
        webhook_url(spec)
    monkeypatch.setenv("MY_HOOK", f"hooks.example.org/{SECRET}")
    with pytest.raises(SpecError, match="has no http") as refused:
        webhook_url(spec)
    assert SECRET not in str(refused.value)
    monkeypatch.setenv("MY_HOOK", f"https://hooks.example.org/{SECRET}")
    assert webhook_url(spec) == f"https://hooks.example.org/{SECRET}"


def test_the_file_says_it_and_it_is_no_part_of_the_identity(tmp_path: Path) -> None:
    plain = make_spec("mine")
    logged = make_spec("mine", notify=Notify(webhook_env="HOOK", command=("notify-send", "hi"), stalled_minutes=5))
    assert load_spec_text(dump_spec(logged), tmp_path).notify == logged.notify
    assert "notify" not in dump_spec(plain)
    assert sweep_identity(plain) == sweep_identity(logged)
    for wrong, words in (
        ("notify: {}", "needs webhook_env or command"),
        ("notify: {webhook_env: 'https://x'}", "notify.webhook_env"),
        ("notify: {command: [a], on: [finnished]}", "notify.on"),
    ):
        with pytest.raises(SpecError, match=words.replace(".", "\\.")):
            load_spec_text(dump_spec(plain) + wrong + "\n", tmp_path)
