"""`EndpointBatch`: several requests at a time, within the cost limit; an answered question is not asked again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.judge.endpoint_client import (
    CHARACTERS_PER_TOKEN,
    MALFORMED_TRIES,
    REJECTED,
    VERSION,
    EndpointClient,
    Question,
    Reply,
)
from orchestrator.judge.judgements import EndpointUsage
from orchestrator.spec.judge_config import Endpoint
from trainer.storage.atomic_files import digest_of
from trainer.storage.jsonl_store import JsonlStore

_POLL_SECONDS = 0.2
_MAX_CONSECUTIVE_FAILURES = 8
"""Questions without an answer after which asking is no use for now."""
_MILLION = 1_000_000
_OPEN_PREFIX = "open/"
"""Before the key of a question that was given up: what trying it took."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What asking would take at most where no answer is malformed: calls, tokens by four characters each, the price."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens:,} tokens read and {self.completion_tokens:,} written"
        price = "no prices are given" if self.cost is None else f"{self.cost:,.2f} at the prices given"
        again = f"a malformed answer is asked for {MALFORMED_TRIES - 1} times again"
        return f"at most {self.calls:,} calls, about {tokens}: {price}; {again}"


def votes_file(folder: Path, config: Endpoint) -> Path:
    """The file of one judge's votes: another model, address or way of asking is another judge."""
    identity = [VERSION, config.url, config.model, config.max_tokens, config.temperature]
    return folder / f"votes-{digest_of(identity)[:16]}.jsonl"


def price(config: Endpoint, prompt_tokens: int, completion_tokens: int) -> float | None:
    """What so many tokens cost; None without prices."""
    if config.prompt_price is None or config.completion_price is None:
        return None
    return (prompt_tokens * config.prompt_price + completion_tokens * config.completion_price) / _MILLION


def estimate(config: Endpoint, characters: Sequence[int]) -> Estimate:
    """What so many questions of so many characters take at most."""
    read = sum(-(-count // CHARACTERS_PER_TOKEN) for count in characters)
    written = len(characters) * config.max_tokens
    return Estimate(len(characters), read, written, price(config, read, written))


def known_reply(known: Mapping[str, Any], question: Question) -> Reply | None:
    """What is known of this question; None while it is open."""
    stored = known.get(question.key)
    return None if stored is None else Reply.from_json(stored)


def total_usage(config: Endpoint, known: Mapping[str, Any], questions: Iterable[Question]) -> EndpointUsage:
    """What these questions have taken so far, over all runs."""
    tries: Counter[str] = Counter()
    calls = read = written = still_open = 0
    for key in dict.fromkeys(question.key for question in questions):
        still_open += key not in known
        for stored in (known.get(key), known.get(_OPEN_PREFIX + key)):
            if stored is not None:
                reply = Reply.from_json(stored)
                tries += reply.tries
                calls, read = calls + reply.calls, read + reply.prompt_tokens
                written += reply.completion_tokens
    cost = price(config, read, written)
    return EndpointUsage(
        calls=calls,
        prompt_tokens=read,
        completion_tokens=written,
        cost=cost,
        failures=dict(tries),
        unanswered=still_open,
    )


class EndpointBatch:
    """Asks what is open. `open_reason` says afterwards why some questions still are, empty where none is."""

    def __init__(self, config: Endpoint, client: EndpointClient, store: JsonlStore) -> None:
        self._config, self._client, self._store = config, client, store
        self.open_reason = ""
        self._in_a_row = 0
        self._failures: Counter[str] = Counter()
        known = [Reply.from_json(stored) for stored in store.values.values()]
        self._read = sum(reply.prompt_tokens for reply in known)
        self._written = sum(reply.completion_tokens for reply in known)

    def ask_all(
        self, questions: Sequence[Question], on_progress: Callable[[int, int], None], stopped: Callable[[], bool]
    ) -> bool:
        """Ask the questions that have no answer yet; return False if `stopped` ended the batch.

        `on_progress` is called with the number of questions done and their total. Raises EndpointRefused where the
        endpoint refuses to serve requests.
        """
        by_key = {question.key: question for question in questions}
        left = [question for key, question in by_key.items() if key not in self._store.values]
        left.reverse()
        done, count = len(by_key) - len(left), len(by_key)
        on_progress(done, count)
        running: dict[Future[Reply], Question] = {}
        with ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="judge") as pool:
            try:
                while (left or running) and not stopped():
                    while left and len(running) < self._config.concurrency and not self._should_stop(running, left[-1]):
                        question = left.pop()
                        running[pool.submit(self._client.ask, question)] = question
                    if not running:
                        break
                    for future in wait(running, _POLL_SECONDS, FIRST_COMPLETED).done:
                        done += self._save_reply(running.pop(future), future.result())
                        on_progress(done, count)
            finally:
                # What is under way was sent, and may be paid for: its answers are waited for and kept.
                self._client.stop()
                for future in wait(running).done:
                    if future.exception() is None:
                        self._save_reply(running[future], future.result())
        return not stopped()

    def _should_stop(self, running: Mapping[Future[Reply], Question], following: Question) -> bool:
        if self._in_a_row >= _MAX_CONSECUTIVE_FAILURES:
            self.open_reason = f"{_MAX_CONSECUTIVE_FAILURES} questions in a row got no answer ({self._open_reason()})"
        elif self._exceeds_cost_limit([*running.values(), following]):
            self.open_reason = f"judge.endpoint.max_cost {self._config.max_cost:g} is spent"
        return bool(self.open_reason)

    def _exceeds_cost_limit(self, coming: Sequence[Question]) -> bool:
        if self._config.max_cost is None:
            return False
        usage = price(self._config, self._read, self._written)
        sizes = [question.characters for question in coming] * MALFORMED_TRIES  # each may be paid for so often
        more = estimate(self._config, sizes).cost
        return (usage or 0.0) + (more or 0.0) > self._config.max_cost

    def _save_reply(self, question: Question, reply: Reply) -> bool:
        """Put it on the disk; whether the question has its answer."""
        self._failures += reply.tries
        self._read += reply.prompt_tokens
        self._written += reply.completion_tokens
        if not reply.is_open:
            self._in_a_row = 0
            self._store.put({question.key: reply.as_json()})
            return True
        self._in_a_row += 1
        before = self._store.values.get(_OPEN_PREFIX + question.key)
        if before is not None:
            earlier = Reply.from_json(before)
            reply.tries, reply.calls = reply.tries + earlier.tries, reply.calls + earlier.calls
            reply.prompt_tokens += earlier.prompt_tokens
            reply.completion_tokens += earlier.completion_tokens
        self._store.put({_OPEN_PREFIX + question.key: reply.as_json()})
        return False

    def _open_reason(self) -> str:
        stored = ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in self._failures.most_common())
        hint = "; does max_tokens or temperature suit the model?" if self._failures[REJECTED] else ""
        return f"{stored}{hint}"
