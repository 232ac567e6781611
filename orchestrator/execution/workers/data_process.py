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
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from orchestrator.errors import DataError, StorageRefused
from orchestrator.execution.stop_reasons import SignalHandler, StageInterrupted, termination_blocked
from orchestrator.execution.workers.stage_worker import StageFailed
from orchestrator.redaction import redact
from orchestrator.spec.judge_config import JudgeConfig, no_answer_for_checker
from trainer.config.loss_config import DpoLoss
from trainer.config.position_limits import known_positions, refuse_long_answers
from trainer.config.trial import TrialConfig
from trainer.data.data_findings import UnreadableData
from trainer.environment import collect_garbage_rarely
from trainer.results import TrialError

if TYPE_CHECKING:
    from trainer.data.pair_dataset import PairDataset

_POLL_SECONDS = 0.2
_EXIT_TIMEOUT = 5.0
_TRUST = "--trust-remote-code"
_HIDE_TORCH = "--hide-torch"
_NEEDS_TORCH = {"needs": "torch"}
"""Reply of a subprocess without torch to what it cannot decide."""


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
        self._arguments = [str(cache), *([_TRUST] if trust_remote_code else [])]
        self._environment = os.environ | environment
        self._requested: list[str] = []
        self._answers: dict[str, str] = {}
        self._start(hide_torch=not (trust_remote_code or _needs_torch(first)))
        self._send(_request(first))

    def _start(self, *, hide_torch: bool) -> None:
        self._received = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        with termination_blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *self._arguments, *([_HIDE_TORCH] if hide_torch else [])],
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
            if json.loads(reply) == _NEEDS_TORCH:
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


def _serve(cache: Path, requests: IO[str], answers: IO[str], *, trust_remote_code: bool) -> None:
    """Main loop of the subprocess: answer requests until stdin is closed."""
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    for line in requests:
        answers.write(json.dumps(_prepare(cache, line, trust_remote_code)) + "\n")
        answers.flush()


def _request(config: TrialConfig, judge: JudgeConfig | None = None, *, checked: bool = False) -> str:
    """Return the request for this configuration's data, or with `judge` for a check of the judge's prompts."""
    requested: dict[str, Any] = {"config": config.model_dump(mode="json")}
    if judge is not None:
        requested |= {"judge": judge.model_dump(mode="json"), "checked": checked}
    return json.dumps(requested)


def _needs_torch(config: TrialConfig) -> bool:
    return config.lora is not None or config.model.generated is not None


def _is_torch_hidden() -> bool:
    return sys.modules.get("torch", sys) is None


def _prepare(cache: Path, request: str, trust_remote_code: bool) -> dict[str, Any]:
    from trainer.data import TokenizerError, check_rows, prepare, score_gaps

    fields = json.loads(request)
    trial = TrialConfig.model_validate(fields["config"])
    if _is_torch_hidden() and _needs_torch(trial):
        return _NEEDS_TORCH
    try:
        if "judge" in fields:
            judge = JudgeConfig.model_validate(fields["judge"])
            _check_judge(trial, judge, cache, trust_remote_code, checked=fields["checked"])
            return {}
        found = prepare(trial.data, trial.model, cache, trust_remote_code=trust_remote_code)
        check_rows(trial.loss, found.train, found.eval)
        _check_answers(trial, found.eval)
        notices: list[str] = []
        scores = ""
        if isinstance(trial.loss, DpoLoss) and trial.loss.needs_scores:
            scores = score_gaps(trial.data, found, cache).notice(trial.loss.odpo_scale)
        if trial.lora is not None:
            from trainer.models.adapters import describe_adapters  # loads torch

            notices.append(describe_adapters(trial.model, trial.lora, cache, trust_remote_code=trust_remote_code))
        return {"report": found.report.model_dump_json(), "notices": notices, "scores": scores}
    except TrialError as error:
        return _NEEDS_TORCH if _is_torch_hidden() and isinstance(error, TokenizerError) else {"data": str(error)}
    except OSError as error:
        return {"disk": str(error)} if error.errno is not None else _bug()
    except Exception:  # noqa: BLE001 - the traceback is sent to the driver
        return _bug()


def _bug() -> dict[str, str]:
    return _NEEDS_TORCH if _is_torch_hidden() else {"bug": traceback.format_exc()}


def _check_answers(trial: TrialConfig, held_out: PairDataset) -> None:
    """Raise ModelError where a held-out prompt with its answer exceeds the model's positions."""
    positions = known_positions(trial.model)
    if positions is None or positions.table is None or not trial.evaluation.prompts:
        return
    from trainer.data.pair_dataset import select_prompts

    lengths = [int(held_out.prompt_lengths[i]) for i in select_prompts(held_out, trial.evaluation.prompts)]
    new = trial.evaluation.max_new_tokens
    refuse_long_answers(positions, max(lengths, default=0), new, "evaluation.max_new_tokens")


def _check_judge(
    trial: TrialConfig, judge: JudgeConfig, cache: Path, trust_remote_code: bool, *, checked: bool
) -> None:
    """Raise UnreadableData or ModelError if a trained trial could not answer the judge's prompts or be judged."""
    positions = known_positions(trial.model)
    if judge.prompts_from is None and (positions is None or positions.table is None) and not checked:
        return  # held-out prompts were checked with the data, and the model has no limit of positions
    from trainer.evaluation.judge_prompts import fixed_prompts

    prompts = fixed_prompts(
        trial.data, trial.model, cache, judge.prompts, judge.prompts_from, trust_remote_code=trust_remote_code
    )[0]
    if checked and all(prompt.expected is None for prompt in prompts):
        raise UnreadableData(no_answer_for_checker(len(prompts)))
    if positions is not None:
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        refuse_long_answers(positions, longest, judge.max_new_tokens, "judge.max_new_tokens")


def _exit_with_parent(parent: int) -> None:
    """End this process when the driver is dead."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    # Redirect prints of libraries to stderr, as the driver reads replies from stdout.
    _stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    collect_garbage_rarely()
    if _HIDE_TORCH in sys.argv[2:]:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  as if it were not installed
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # "PyTorch was not found"
    _serve(Path(sys.argv[1]), sys.stdin, _stdout, trust_remote_code=_TRUST in sys.argv[2:])
