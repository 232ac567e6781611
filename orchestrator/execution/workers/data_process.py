"""`DataProcess`: data preparation in a subprocess, while Ray starts and without torch in the driver.

Requests (configurations) and replies are lines of JSON, in the same order. Tokenizers need no torch, with which
transformers takes four times as long to load: the subprocess hides it. Where a configuration needs torch (a generated
model, adapters, a tokenizer's own code), or a tokenizer cannot be loaded or a bug appears without it, a subprocess that
has torch takes its place, and only its reply counts.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError, StorageRefused
from orchestrator.execution.stop_reasons import SignalHandler, StageInterrupted, termination_blocked
from orchestrator.execution.workers import data_preparation
from orchestrator.execution.workers.data_preparation import HIDE_TORCH_OPTION, NEEDS_TORCH, TRUST_OPTION, needs_torch
from orchestrator.execution.workers.stage_worker import StageFailed
from orchestrator.redaction import redact
from orchestrator.spec.judge_config import JudgeConfig
from trainer.config.trial import TrialConfig

_POLL_SECONDS = 0.2
_EXIT_TIMEOUT = 5.0


class DataProcess:
    """The driver's handle of the subprocess, which starts with the `first` configuration at once."""

    def __init__(
        self,
        cache: Path,
        first: TrialConfig,
        environment: Mapping[str, str],
        signals: SignalHandler,
        on_poll: Callable[[], None],
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self._signals, self._on_poll = signals, on_poll
        self._arguments = [str(cache), *([TRUST_OPTION] if trust_remote_code else [])]
        self._environment = os.environ | environment
        self._requested: list[str] = []
        self._answers: dict[str, str] = {}
        self._start(hide_torch=not (trust_remote_code or needs_torch(first)))
        self._send(_request(first))

    def _start(self, *, hide_torch: bool) -> None:
        hidden = [HIDE_TORCH_OPTION] if hide_torch else []
        self._received = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        with termination_blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-m", data_preparation.__name__, *self._arguments, *hidden],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=self._environment,
                start_new_session=True,  # Ctrl-C must reach only the driver
            )

    def __enter__(self) -> DataProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.shut_down()

    def shut_down(self) -> None:
        """Kill the subprocess; repeated calls have no effect."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self._process.wait(_EXIT_TIMEOUT)

    def prepare(self, config: TrialConfig) -> str:
        """Check and tokenize the data of this configuration; return its DataReport as JSON.

        Raises:
            DataError: the data is refused.
            StorageRefused: disk error.
            StageFailed: bug, or the subprocess died.
            Interrupted: after a stop signal.
        """
        return self._answer(_request(config))["report"]

    def notices(self, config: TrialConfig) -> list[str]:
        """Return notices about the adapters of a prepared configuration."""
        return list(json.loads(self._answers[_request(config)]).get("notices", []))

    def score_notice(self, config: TrialConfig) -> str:
        """Return how many pairs of a prepared configuration have no positive gap of scores; "" if all do, or if its
        loss reads none.
        """
        return str(json.loads(self._answers[_request(config)]).get("scores", ""))

    def check_judge(self, config: TrialConfig, judge: JudgeConfig, *, checked: bool = False) -> None:
        """Check that a trial of this configuration can answer the judge's prompts; raises as `prepare` does.

        `checked`: the checker of known answers is the only judge, so that a prompt needs one.
        """
        self._answer(_request(config, judge, checked=checked))

    def _answer(self, request: str) -> dict[str, Any]:
        """Return the reply to a request; sends it if it was not sent yet."""
        if request not in self._answers and request not in self._requested:
            self._send(request)
        while request not in self._answers:
            reply = self._next()
            if json.loads(reply) == NEEDS_TORCH:
                self._start_again_with_torch()
            else:
                self._answers[self._requested.pop(0)] = reply
        answer = json.loads(self._answers[request])
        match answer:
            case {"data": text}:
                raise DataError(text)
            case {"disk": text}:
                raise StorageRefused(text)
            case {"bug": text}:
                raise StageFailed(f"preparing the data failed:\n{redact(text)}")
            case _:
                return answer

    def _start_again_with_torch(self) -> None:
        """Give all that is not answered to another subprocess; what this one has prepared is in the cache."""
        self.shut_down()
        self._start(hide_torch=False)
        unanswered, self._requested = self._requested, []
        for request in unanswered:
            self._send(request)

    def _send(self, request: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # reported when the reply is awaited
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        self._requested.append(request)

    def _next(self) -> str:
        assert self._process.stdout is not None
        source = self._process.stdout.fileno()
        while b"\n" not in self._received:
            self._on_poll()
            if self._signals.received:
                raise StageInterrupted
            if select.select([source], [], [], _POLL_SECONDS)[0]:
                piece = os.read(source, 1 << 16)
                if not piece:
                    raise StageFailed(f"the data process died:\n{self._stderr_tail()}")
                self._received += piece
        line, self._received = self._received.split(b"\n", 1)
        return line.decode()

    def _stderr_tail(self) -> str:
        self._process.wait(_EXIT_TIMEOUT)
        self._errors.seek(0)
        stderr = self._errors.read().decode(errors="replace").strip()
        return redact(stderr[-2000:]) or f"exit code {self._process.returncode} without output"


def _request(config: TrialConfig, judge: JudgeConfig | None = None, *, checked: bool = False) -> str:
    """Return the request for this configuration's data, or with `judge` for a check of the judge's prompts."""
    requested: dict[str, Any] = {"config": config.model_dump(mode="json")}
    if judge is not None:
        requested |= {"judge": judge.model_dump(mode="json"), "checked": checked}
    return json.dumps(requested)
