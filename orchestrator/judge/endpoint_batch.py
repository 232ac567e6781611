"""`EndpointBatch`: sends several requests at a time, within the cost limit; stored replies are not requested again."""

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
    REQUEST_REJECTED,
    VERSION,
    EndpointClient,
    EndpointReply,
    Question,
)
from orchestrator.judge.judgements import EndpointUsage
from orchestrator.spec.judge_config import Endpoint
from trainer.storage.atomic_files import digest_of
from trainer.storage.jsonl_store import JsonlStore

_POLL_SECONDS = 0.2
_MAX_CONSECUTIVE_FAILURES = 8
"""Consecutive failed questions after which the batch stops."""
_MILLION = 1_000_000
_UNANSWERED_PREFIX = "open/"
"""Prefix of the key of an unanswered question: its tries, calls and tokens so far."""


@dataclass(frozen=True, slots=True)
class UsageEstimate:
    """Upper estimate of a batch without malformed replies: calls, tokens (four characters each), cost."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens:,} prompt tokens and {self.completion_tokens:,} completion tokens"
        price = "no prices are given" if self.cost is None else f"{self.cost:,.2f} at the prices given"
        retries = f"a malformed reply is requested up to {MALFORMED_TRIES - 1} more times"
        return f"at most {self.calls:,} calls, about {tokens}: {price}; {retries}"


def votes_file(folder: Path, config: Endpoint) -> Path:
    """Return the file of one judge's votes. Another model, URL, prompt version or decoding is another judge."""
    identity = [VERSION, config.url, config.model, config.max_tokens, config.temperature]
    return folder / f"votes-{digest_of(identity)[:16]}.jsonl"


def price(config: Endpoint, prompt_tokens: int, completion_tokens: int) -> float | None:
    """Return the cost of this many tokens, in the currency of the prices; None without prices."""
    if config.prompt_price is None or config.completion_price is None:
        return None
    return (prompt_tokens * config.prompt_price + completion_tokens * config.completion_price) / _MILLION


def estimate_usage(config: Endpoint, characters: Sequence[int]) -> UsageEstimate:
    """Return the upper estimate for questions of these lengths in characters."""
    read = sum(-(-count // CHARACTERS_PER_TOKEN) for count in characters)
    written = len(characters) * config.max_tokens
    return UsageEstimate(len(characters), read, written, price(config, read, written))


def known_reply(known: Mapping[str, Any], question: Question) -> EndpointReply | None:
    """Return the stored reply to a question; None if it is unanswered."""
    stored = known.get(question.key)
    return None if stored is None else EndpointReply.from_json(stored)


def total_usage(config: Endpoint, known: Mapping[str, Any], questions: Iterable[Question]) -> EndpointUsage:
    """Return the usage of these questions so far, over all runs."""
    tries: Counter[str] = Counter()
    calls = read = written = unanswered = 0
    for key in dict.fromkeys(question.key for question in questions):
        unanswered += key not in known
        for stored in (known.get(key), known.get(_UNANSWERED_PREFIX + key)):
            if stored is not None:
                reply = EndpointReply.from_json(stored)
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
        unanswered=unanswered,
    )


class EndpointBatch:
    """Sends unanswered questions. `unanswered_reason`: afterwards, why some are still unanswered; "" if none is."""

    def __init__(self, config: Endpoint, client: EndpointClient, store: JsonlStore) -> None:
        self._config, self._client, self._store = config, client, store
        self.unanswered_reason = ""
        self._consecutive_failures = 0
        self._failures: Counter[str] = Counter()
        known = [EndpointReply.from_json(stored) for stored in store.values.values()]
        self._read = sum(reply.prompt_tokens for reply in known)
        self._written = sum(reply.completion_tokens for reply in known)

    def ask_all(
        self, questions: Sequence[Question], on_progress: Callable[[int, int], None], stopped: Callable[[], bool]
    ) -> bool:
        """Send the questions without a stored reply; return False if `stopped` ended the batch.

        `on_progress` is called with the number of questions done and their total. Raises EndpointRefused where the
        endpoint refuses to serve requests.
        """
        by_key = {question.key: question for question in questions}
        remaining = [question for key, question in by_key.items() if key not in self._store.values]
        remaining.reverse()
        done, count = len(by_key) - len(remaining), len(by_key)
        on_progress(done, count)
        running: dict[Future[EndpointReply], Question] = {}
        with ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="judge") as pool:
            try:
                while (remaining or running) and not stopped():
                    while (
                        remaining
                        and len(running) < self._config.concurrency
                        and not self._should_stop(running, remaining[-1])
                    ):
                        question = remaining.pop()
                        running[pool.submit(self._client.ask, question)] = question
                    if not running:
                        break
                    for future in wait(running, _POLL_SECONDS, FIRST_COMPLETED).done:
                        done += self._save_reply(running.pop(future), future.result())
                        on_progress(done, count)
            finally:
                # Requests in flight may be billed: wait for their replies and store them.
                self._client.stop()
                for future in wait(running).done:
                    if future.exception() is None:
                        self._save_reply(running[future], future.result())
        return not stopped()

    def _should_stop(self, running: Mapping[Future[EndpointReply], Question], following: Question) -> bool:
        if self._consecutive_failures >= _MAX_CONSECUTIVE_FAILURES:
            self.unanswered_reason = (
                f"{_MAX_CONSECUTIVE_FAILURES} questions in a row got no reply ({self._failures_text()})"
            )
        elif self._exceeds_cost_limit([*running.values(), following]):
            self.unanswered_reason = f"judge.endpoint.max_cost {self._config.max_cost:g} is spent"
        return bool(self.unanswered_reason)

    def _exceeds_cost_limit(self, coming: Sequence[Question]) -> bool:
        if self._config.max_cost is None:
            return False
        usage = price(self._config, self._read, self._written)
        sizes = [question.characters for question in coming] * MALFORMED_TRIES  # each try may be billed
        more = estimate_usage(self._config, sizes).cost
        return (usage or 0.0) + (more or 0.0) > self._config.max_cost

    def _save_reply(self, question: Question, reply: EndpointReply) -> bool:
        """Store a reply on disk; return whether the question is answered."""
        self._failures += reply.tries
        self._read += reply.prompt_tokens
        self._written += reply.completion_tokens
        if not reply.is_unanswered:
            self._consecutive_failures = 0
            self._store.put({question.key: reply.as_json()})
            return True
        self._consecutive_failures += 1
        before = self._store.values.get(_UNANSWERED_PREFIX + question.key)
        if before is not None:
            earlier = EndpointReply.from_json(before)
            reply.tries, reply.calls = reply.tries + earlier.tries, reply.calls + earlier.calls
            reply.prompt_tokens += earlier.prompt_tokens
            reply.completion_tokens += earlier.completion_tokens
        self._store.put({_UNANSWERED_PREFIX + question.key: reply.as_json()})
        return False

    def _failures_text(self) -> str:
        stored = ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in self._failures.most_common())
        hint = "; does max_tokens or temperature suit the model?" if self._failures[REQUEST_REJECTED] else ""
        return f"{stored}{hint}"
