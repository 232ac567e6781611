"""Many questions to an endpoint: several at a time, none twice once its answer is on the disk, none beyond the cost."""

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
    Client,
    Question,
    Reply,
)
from orchestrator.judge.judgements import Asked
from orchestrator.spec.judge_config import Endpoint
from trainer.storage.atomic_files import digest_of
from trainer.storage.jsonl_store import Kept

_POLL_SECONDS = 0.2
_IN_A_ROW = 8
"""Questions without an answer after which asking is no use for now."""
_MILLION = 1_000_000
_OPEN = "open/"
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


def place_of_votes(folder: Path, config: Endpoint) -> Path:
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


def answered(known: Mapping[str, Any], question: Question) -> Reply | None:
    """What is known of this question; None while it is open."""
    told = known.get(question.key)
    return None if told is None else Reply.from_json(told)


def taken(config: Endpoint, known: Mapping[str, Any], questions: Iterable[Question]) -> Asked:
    """What these questions have taken so far, over all runs."""
    tries: Counter[str] = Counter()
    calls = read = written = still_open = 0
    for key in dict.fromkeys(question.key for question in questions):
        still_open += key not in known
        for told in (known.get(key), known.get(_OPEN + key)):
            if told is not None:
                reply = Reply.from_json(told)
                tries += reply.tries
                calls, read = calls + reply.calls, read + reply.prompt_tokens
                written += reply.completion_tokens
    cost = price(config, read, written)
    return Asked(
        calls=calls,
        prompt_tokens=read,
        completion_tokens=written,
        cost=cost,
        failures=dict(tries),
        unanswered=still_open,
    )


class Asking:
    """Asks what is open. `trouble` says afterwards why some questions still are, empty where none is."""

    def __init__(self, config: Endpoint, client: Client, kept: Kept) -> None:
        self._config, self._client, self._kept = config, client, kept
        self.trouble = ""
        self._in_a_row = 0
        self._failures: Counter[str] = Counter()
        known = [Reply.from_json(told) for told in kept.values.values()]
        self._read = sum(reply.prompt_tokens for reply in known)
        self._written = sum(reply.completion_tokens for reply in known)

    def ask_all(
        self, questions: Sequence[Question], tell: Callable[[int, int], None], stopped: Callable[[], bool]
    ) -> bool:
        """Ask those without an answer; `tell` hears how many of how many are done. False where `stopped` ended it.

        EndpointRefused where the endpoint will not serve us.
        """
        asked = {question.key: question for question in questions}
        left = [question for key, question in asked.items() if key not in self._kept.values]
        left.reverse()
        done, count = len(asked) - len(left), len(asked)
        tell(done, count)
        running: dict[Future[Reply], Question] = {}
        with ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="judge") as pool:
            try:
                while (left or running) and not stopped():
                    while left and len(running) < self._config.concurrency and not self._enough(running, left[-1]):
                        question = left.pop()
                        running[pool.submit(self._client.ask, question)] = question
                    if not running:
                        break
                    for future in wait(running, _POLL_SECONDS, FIRST_COMPLETED).done:
                        done += self._keep(running.pop(future), future.result())
                        tell(done, count)
            finally:
                # What is under way was sent, and may be paid for: its answers are waited for and kept.
                self._client.stop()
                for future in wait(running).done:
                    if future.exception() is None:
                        self._keep(running[future], future.result())
        return not stopped()

    def _enough(self, running: Mapping[Future[Reply], Question], following: Question) -> bool:
        if self._in_a_row >= _IN_A_ROW:
            self.trouble = f"{_IN_A_ROW} questions in a row got no answer ({self._why()})"
        elif self._too_dear([*running.values(), following]):
            self.trouble = f"judge.endpoint.max_cost {self._config.max_cost:g} is spent"
        return bool(self.trouble)

    def _too_dear(self, coming: Sequence[Question]) -> bool:
        if self._config.max_cost is None:
            return False
        spent = price(self._config, self._read, self._written)
        sizes = [question.characters for question in coming] * MALFORMED_TRIES  # each may be paid for so often
        more = estimate(self._config, sizes).cost
        return (spent or 0.0) + (more or 0.0) > self._config.max_cost

    def _keep(self, question: Question, reply: Reply) -> bool:
        """Put it on the disk; whether the question has its answer."""
        self._failures += reply.tries
        self._read += reply.prompt_tokens
        self._written += reply.completion_tokens
        if not reply.open:
            self._in_a_row = 0
            self._kept.put({question.key: reply.as_json()})
            return True
        self._in_a_row += 1
        before = self._kept.values.get(_OPEN + question.key)
        if before is not None:
            earlier = Reply.from_json(before)
            reply.tries, reply.calls = reply.tries + earlier.tries, reply.calls + earlier.calls
            reply.prompt_tokens += earlier.prompt_tokens
            reply.completion_tokens += earlier.completion_tokens
        self._kept.put({_OPEN + question.key: reply.as_json()})
        return False

    def _why(self) -> str:
        told = ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in self._failures.most_common())
        hint = "; does max_tokens or temperature suit the model?" if self._failures[REJECTED] else ""
        return f"{told}{hint}"
