"""Asking an endpoint: a real server on this machine that refuses, stammers, hangs, is busy, and likes the first."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.judge.answer_pairs import AnswerPair, endpoint_preferences, endpoint_questions
from orchestrator.judge.endpoint_batch import EndpointBatch, estimate_usage, total_usage, votes_file
from orchestrator.judge.endpoint_client import (
    EndpointClient,
    EndpointRefused,
    EndpointReply,
    Question,
    parse_reply,
    parse_vote,
)
from orchestrator.judge.win_rates import first_position, win_rate
from orchestrator.spec.judge_config import Endpoint
from tests.support.judge_endpoint import DRIP, HANG, Action, FakeJudge, Raw, Shown, longer, serve
from tests.support.processes import LIMIT_SECONDS, wait_until
from trainer.storage.jsonl_store import JsonlStore, read_jsonl_store

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server() -> Iterator[FakeJudge]:
    with serve(FakeJudge()) as judge:
        yield judge


def endpoint(server: FakeJudge, **more: Any) -> Endpoint:
    given = {"url": server.url, "model": "m", "retries": 3, "timeout": 60.0, "concurrency": 2}
    return Endpoint.model_validate(given | more)


def one(server: FakeJudge, decide: Callable[[Shown, int], Action], **more: Any) -> EndpointReply:
    server.decide = decide
    client = EndpointClient(endpoint(server, **more), KEY, first_wait=0.001)
    try:
        return client.ask(Question("p", "a", "bb"))
    finally:
        client.close()


def match(number: int, ours: str, theirs: str, prompt: str | None = None) -> AnswerPair:
    return AnswerPair(0, prompt or f"p{number}", f"prompt {number}", None, None, None, ours, theirs)


MATCHES = [match(i, "x" * (i + 2), "y" * (10 - i)) for i in range(12)]


def run(server: FakeJudge, folder: Path, pairs: list[AnswerPair], **more: Any) -> tuple[EndpointBatch, dict[str, Any]]:
    config = endpoint(server, **more)
    client = EndpointClient(config, KEY, first_wait=0.001)
    try:
        with JsonlStore(votes_file(folder, config)) as stored:
            batch = EndpointBatch(config, client, stored)
            batch.ask_all(endpoint_questions(pairs), lambda *_: None, lambda: False)
            return batch, dict(stored.values)
    finally:
        client.close()


# --- what an answer means --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("[[A]]", "first"),
        ("Both are fine, but B is shorter. [[B]]", "second"),
        ("At first [[A]], on reflection\n[[ tie ]]", "tie"),
        ("  C.", "tie"),
        ("**B**", "second"),
        ("Answer A", "first"),
        ("A or B", None),
        ("", None),
        ("[[D]]", None),
        ("A fine answer", None),
    ],
)
def test_the_verdict_in_a_text(text: str, vote: str | None) -> None:
    assert parse_vote(text) == vote


def test_refusals_and_cut_answers_are_told_from_noise() -> None:
    assert parse_reply("I'm sorry, but I can't compare these.", "stop", "") == "refused"
    assert parse_reply("", "stop", "I will not") == "refused"
    assert parse_reply("", "content_filter", "") == "refused"
    assert parse_reply("Let me think about", "length", "") == "cut_off"
    assert parse_reply("Both", "stop", "") == "malformed"
    assert parse_reply("I'm sorry to say that A is wrong. [[B]]", "stop", "") == "second"


# --- one question ----------------------------------------------------------------------------------------------------
def test_what_is_sent(server: FakeJudge) -> None:
    reply = one(server, lambda *_: "[[B]]", max_tokens=7)
    assert (reply.vote, reply.calls, reply.prompt_tokens, reply.completion_tokens) == ("second", 1, 100, 5)
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 7, 0.0)
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert server.asked == [Shown("p", "a", "bb")]
    assert server.keys == [f"Bearer {KEY}"]
    one(server, lambda *_: "[[B]]", temperature=None)
    assert "temperature" not in server.bodies[1]


@pytest.mark.parametrize(("first", "kind"), [(429, "rate_limited"), (500, "server_error"), (503, "server_error")])
def test_no_answer_is_tried_again_and_counted(server: FakeJudge, first: Action, kind: str) -> None:
    reply = one(server, lambda _, before: first if before < 2 else "[[A]]")
    assert (reply.vote, reply.calls) == ("first", 3)
    assert reply.tries == Counter({kind: 2})


@pytest.mark.parametrize("silence", [HANG, DRIP])
def test_an_answer_that_takes_too_long_is_tried_again_and_counted(server: FakeJudge, silence: Action) -> None:
    reply = one(server, lambda _, before: silence if before < 2 else "[[A]]", timeout=0.3, retries=20)
    assert reply.vote == "first"
    assert reply.calls >= 3, "more where this machine is too busy to answer in so short a time"
    assert reply.tries == Counter(timed_out=reply.calls - 1)


def test_it_waits_as_long_as_the_endpoint_asks(server: FakeJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, waits, wait = Raw(429, b"", {"Retry-After": "17.5"}), [], threading.Event.wait

    def waited(event: threading.Event, timeout: float | None = None) -> bool:
        waits.append(timeout)
        return wait(event, timeout and 0.0)

    monkeypatch.setattr(threading.Event, "wait", waited)
    assert one(server, lambda _, before: busy if not before else "[[A]]").vote == "first"
    assert 17.5 in waits


def test_after_all_tries_the_question_stays_open(server: FakeJudge) -> None:
    reply = one(server, lambda *_: 503)
    assert reply.is_unanswered
    assert reply.calls == 4, "the first try and three retries"
    assert reply.tries == Counter({"server_error": 4})


def test_nobody_there(server: FakeJudge) -> None:
    server.url = "http://127.0.0.1:9/v1"
    reply = one(server, lambda *_: "[[A]]", retries=1)
    assert reply.is_unanswered
    assert reply.tries == Counter({"unreachable": 2})


@pytest.mark.parametrize(
    "noise", ["Both are nice", Raw(200, b"<html>"), Raw(200, b'{"choices": []}'), Raw(200, b"[1]"), {"message": None}]
)
def test_a_malformed_answer_is_tried_again_then_left(server: FakeJudge, noise: Action) -> None:
    reply = one(server, lambda _, before: noise if not before else "[[A]]")
    assert (reply.vote, reply.tries) == ("first", Counter({"malformed": 1}))
    server.asked.clear()
    reply = one(server, lambda *_: noise)
    assert (reply.vote, reply.failure, reply.calls) == (None, "malformed", 3)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("I'm sorry, I cannot help with that.", "refused"),
        ({"message": {"content": None, "refusal": "no"}}, "refused"),
        (Raw(400, b'{"error": {"code": "content_filter"}}'), "refused"),
        ({"message": {"content": "Let us see"}, "finish_reason": "length"}, "cut_off"),
    ],
)
def test_a_refusal_is_an_answer(server: FakeJudge, answer: Action, kind: str) -> None:
    reply = one(server, lambda *_: answer)
    assert (reply.vote, reply.failure, reply.calls) == (None, kind, 1)


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_where_asking_is_no_use(server: FakeJudge, status: int) -> None:
    elsewhere = {"Location": "http://127.0.0.1:9/elsewhere"}
    with pytest.raises(EndpointRefused, match=str(status)) as refused:
        one(server, lambda *_: Raw(status, b"{}", elsewhere), api_key_env="MY_KEY")
    assert KEY not in str(refused.value)
    assert len(server.asked) == 1, "a redirect is not followed: it could carry the key elsewhere"


# --- many ------------------------------------------------------------------------------------------------------------
def test_both_orders_are_asked_once_each_and_equal_answers_not_at_all(server: FakeJudge, tmp_path: Path) -> None:
    two, first = threading.Barrier(2), iter([True, True])

    def decide(shown: Shown, _: int) -> str:
        if next(first, False):
            two.wait(LIMIT_SECONDS)  # the first answer waits until a second question is there
        return longer(shown)

    server.decide = decide
    pairs = [*MATCHES, match(50, "same", "same"), MATCHES[0]]
    batch, known = run(server, tmp_path, pairs, concurrency=3)
    assert batch.unanswered_reason == ""
    shown = Counter(server.asked)
    assert (len(shown), set(shown.values())) == (24, {1})
    assert {(s.second, s.first) for s in shown} == {(s.first, s.second) for s in shown}
    assert 2 <= server.at_once <= 3
    preferences = endpoint_preferences(pairs, endpoint(server), known)
    expected = [
        1.0
        if len(m.trial_answer) > len(m.initial_answer)
        else 0.0
        if len(m.trial_answer) < len(m.initial_answer)
        else 0.5
        for m in MATCHES
    ]
    assert list(preferences.preferences) == [*expected, 0.5, expected[0]]
    assert first_position(preferences.votes)[1] == 1.0
    run(server, tmp_path, pairs)
    assert len(server.asked) == 24, "nothing is asked twice"


def test_a_judge_that_likes_the_first_answer_is_seen_through(server: FakeJudge, tmp_path: Path) -> None:
    server.decide = lambda *_: "[[A]]"
    _, known = run(server, tmp_path, MATCHES)
    preferences = endpoint_preferences(MATCHES, endpoint(server), known)
    assert set(preferences.preferences) == {0.5}
    first, agree = first_position(preferences.votes)
    assert (first.value, agree) == (1.0, 0.0)
    assert first.is_clear
    rate = win_rate([(m.prompt, p) for m, p in zip(MATCHES, preferences.preferences, strict=True) if p is not None])
    assert rate.value == 0.5


def test_failures_are_counted_and_leave_their_pair_out(server: FakeJudge, tmp_path: Path) -> None:
    def decide(shown: Shown, before: int) -> Action:
        if shown.prompt == "prompt 0":
            return "I'm sorry, no."
        if shown.prompt == "prompt 1" and shown.first.startswith("x"):
            return "no idea"
        if shown.prompt == "prompt 2" and not before:
            return 429
        return longer(shown)

    server.decide = decide
    config = endpoint(server, prompt_price=10.0, completion_price=20.0)
    _, known = run(server, tmp_path, MATCHES, prompt_price=10.0, completion_price=20.0)
    preferences = endpoint_preferences(MATCHES, config, known)
    assert [p is None for p in preferences.preferences] == [True, True] + [False] * 10
    assert preferences.usage.failures == {"refused": 2, "malformed": 3, "rate_limited": 2}
    assert preferences.usage.calls == 24 + 2 + 2
    paid = 28 - 2  # a 429 costs nothing
    assert (preferences.usage.prompt_tokens, preferences.usage.completion_tokens) == (paid * 100, paid * 5)
    assert preferences.usage.cost == pytest.approx(paid * (100 * 10 + 5 * 20) / 1e6)
    assert preferences.usage.unanswered == 0
    again = len(server.asked)
    run(server, tmp_path, MATCHES, prompt_price=10.0, completion_price=20.0)
    assert len(server.asked) == again, "refused and malformed answers are answers"


def test_what_got_no_answer_is_asked_by_the_next_run(server: FakeJudge, tmp_path: Path) -> None:
    server.decide = lambda shown, _: 500 if shown.prompt == "prompt 3" else longer(shown)
    _, known = run(server, tmp_path, MATCHES, retries=1)
    requested = total_usage(endpoint(server), known, endpoint_questions(MATCHES))
    assert (requested.unanswered, requested.failures) == (2, {"server_error": 4})
    server.decide = longer
    before = len(server.asked)
    _, known = run(server, tmp_path, MATCHES, retries=1)
    assert len(server.asked) == before + 2
    requested = total_usage(endpoint(server), known, endpoint_questions(MATCHES))
    assert (requested.unanswered, requested.failures, requested.calls) == (0, {"server_error": 4}, 22 + 4 + 2)


def test_an_endpoint_that_is_down_is_left_alone(server: FakeJudge, tmp_path: Path) -> None:
    server.decide = lambda *_: 503
    batch, known = run(server, tmp_path, MATCHES, retries=0)
    assert "8 questions in a row got no reply (server error" in batch.unanswered_reason
    assert len(server.asked) < 12
    assert total_usage(endpoint(server), known, endpoint_questions(MATCHES)).unanswered == 24


def test_requests_that_do_not_fit_are_not_repeated(server: FakeJudge, tmp_path: Path) -> None:
    server.decide = lambda *_: 400
    batch, _ = run(server, tmp_path, MATCHES)
    assert "does max_tokens or temperature suit the model?" in batch.unanswered_reason
    assert set(Counter(server.asked).values()) == {1}


def test_a_model_that_wants_max_completion_tokens_gets_them(server: FakeJudge, tmp_path: Path) -> None:
    expected = (
        b'{"error": {"message": "Unsupported parameter: \'max_tokens\'. Use \'max_completion_tokens\' instead."}}'
    )
    server.decide = lambda *_: Raw(400, expected) if "max_tokens" in server.bodies[-1] else "[[A]]"
    batch, _ = run(server, tmp_path, MATCHES, concurrency=1)
    assert (batch.unanswered_reason, ["max_tokens" in body for body in server.bodies].count(True)) == ("", 1)
    assert all(body.get("max_completion_tokens", 32) == 32 for body in server.bodies)


def test_no_more_is_spent_than_was_agreed(server: FakeJudge, tmp_path: Path) -> None:
    server.decide = longer
    prices = {"prompt_price": 1000.0, "completion_price": 1000.0, "max_cost": 1.0, "max_tokens": 5}
    batch, known = run(server, tmp_path, MATCHES, **prices)
    requested = total_usage(endpoint(server, **prices), known, endpoint_questions(MATCHES))
    assert requested.cost is not None
    assert 0 < requested.cost <= 1.0
    assert requested.unanswered > 0
    assert "max_cost 1 is spent" in batch.unanswered_reason


def test_malformed_answers_cost_no_more_than_was_agreed_either(server: FakeJudge, tmp_path: Path) -> None:
    server.decide = lambda *_: "no verdict at all"
    prices = {"prompt_price": 1000.0, "completion_price": 1000.0, "max_cost": 1.0, "max_tokens": 5}
    _, known = run(server, tmp_path, MATCHES, **prices)
    requested = total_usage(endpoint(server, **prices), known, endpoint_questions(MATCHES))
    assert requested.cost is not None
    assert 0 < requested.cost <= 1.0
    assert requested.calls == requested.failures["malformed"] > 1


def test_the_estimate_is_an_upper_bound(server: FakeJudge, tmp_path: Path) -> None:
    config = endpoint(server, prompt_price=2.0, completion_price=8.0, max_tokens=32)
    expected = estimate_usage(config, [question.characters for question in endpoint_questions(MATCHES)])
    assert (expected.calls, expected.completion_tokens) == (24, 24 * 32)
    assert expected.cost == pytest.approx((expected.prompt_tokens * 2 + 24 * 32 * 8) / 1e6)
    assert "24 calls" in str(expected)
    assert "no prices are given" in str(estimate_usage(endpoint(server), [400]))


def test_stopped_in_the_middle_it_keeps_what_it_has(server: FakeJudge, tmp_path: Path) -> None:
    server.decide = longer
    config = endpoint(server)
    client = EndpointClient(config, KEY)
    with JsonlStore(votes_file(tmp_path, config)) as stored:
        complete = EndpointBatch(config, client, stored).ask_all(
            endpoint_questions(MATCHES), lambda *_: None, lambda: len(stored.values) >= 5
        )
        assert not complete
        assert len(stored.values) == len(server.asked) < 24
    client.close()
    run(server, tmp_path, MATCHES)
    assert (set(Counter(server.asked).values()), len(server.asked)) == ({1}, 24)


CHILD = """
import sys
from pathlib import Path
from tests.support.judge_endpoint import FakeJudge
from tests.orchestrator.judge.test_endpoint import MATCHES, run
server = FakeJudge()
server.url = sys.argv[1]
run(server, Path(sys.argv[2]), MATCHES)
"""


def test_killed_at_any_moment_it_asks_nothing_twice(server: FakeJudge, tmp_path: Path) -> None:
    path = votes_file(tmp_path, endpoint(server))
    kept_when_killed: list[set[str]] = []
    asked_when_killed: list[int] = []
    for until in (4, 12):
        server.decide = lambda shown, _, until=until: longer(shown) if len(server.asked) < until else HANG
        child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(tmp_path)])
        wait_until(lambda until=until: len(server.asked) >= until)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        kept_when_killed.append(set(read_jsonl_store(path)))
        asked_when_killed.append(len(server.asked))
    server.decide = longer
    run(server, tmp_path, MATCHES)
    assert len(read_jsonl_store(path)) == 24
    for stored, requested in zip(kept_when_killed, asked_when_killed, strict=True):
        after = {Question(s.prompt, s.first, s.second).key for s in server.asked[requested:]}
        assert not stored & after, "what was answered and on the disk is not asked again"
    # At each death at most `concurrency` questions were under way, sent but not recorded.
    assert len(server.asked) <= 24 + 2 * 2


def test_the_key_is_in_no_file(server: FakeJudge, tmp_path: Path) -> None:
    server.decide = lambda shown, before: Raw(429, KEY.encode()) if not before else longer(shown)
    run(server, tmp_path, MATCHES[:2])
    for file in tmp_path.rglob("*"):
        assert KEY.encode() not in file.read_bytes()
