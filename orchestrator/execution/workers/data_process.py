"""`DataProcess`: data preparation in a subprocess, while Ray starts and without torch in the driver.

Requests (configurations) and replies are lines of JSON, in the same order.
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
from orchestrator.execution.stop_reasons import Interrupted, SignalHandler, deaf_to_sigterm
from orchestrator.execution.workers.stage_worker import StageFailed
from orchestrator.redaction import redact
from trainer.config.position_limits import known_positions, refuse_long_answers
from trainer.config.trial import TrialConfig
from trainer.results import TrialError

if TYPE_CHECKING:
    from trainer.data.pair_dataset import PairDataset

_POLL_SECONDS = 0.2
_EXIT_TIMEOUT = 5.0
_TRUST = "--trust-remote-code"


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
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        with deaf_to_sigterm():
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(cache), *([_TRUST] if trust_remote_code else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=os.environ | environment,
                start_new_session=True,  # Ctrl-C must reach only the driver
            )
        self._requested: list[str] = []
        self._answers: dict[str, str] = {}
        self._received = b""
        self._send(first.model_dump_json())

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
        config_json = config.model_dump_json()
        if config_json not in self._answers and config_json not in self._requested:
            self._send(config_json)
        while config_json not in self._answers:
            self._answers[self._requested[0]] = self._next()
            self._requested.pop(0)
        answer = json.loads(self._answers[config_json])
        match answer:
            case {"report": report}:
                return report
            case {"data": text}:
                raise DataError(text)
            case {"disk": text}:
                raise StorageRefused(text)
            case _:
                raise StageFailed(f"preparing the data failed:\n{redact(answer['bug'])}")

    def notices(self, config: TrialConfig) -> list[str]:
        """Return notices about the adapters of a prepared configuration."""
        return list(json.loads(self._answers[config.model_dump_json()]).get("notices", []))

    def _send(self, config: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # reported when the reply is awaited
            self._process.stdin.write(config.encode() + b"\n")
            self._process.stdin.flush()
        self._requested.append(config)

    def _next(self) -> str:
        assert self._process.stdout is not None
        source = self._process.stdout.fileno()
        while b"\n" not in self._received:
            self._on_poll()
            if self._signals.stop_requested:
                raise Interrupted
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


def _serve(cache: Path, requests: IO[str], answers: IO[str], *, trust: bool) -> None:
    """Main loop of the subprocess: answer requests until stdin is closed."""
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    for line in requests:
        answers.write(json.dumps(_prepare(cache, line, trust)) + "\n")
        answers.flush()


def _prepare(cache: Path, config: str, trust: bool) -> dict[str, Any]:
    from trainer.data import prepare

    trial = TrialConfig.model_validate_json(config)
    try:
        found = prepare(trial.data, trial.model, cache, trust_remote_code=trust)
        _check_answers(trial, found.eval)
        notices: list[str] = []
        if trial.lora is not None:
            from trainer.models.adapters import describe_adapters  # imports torch, which data alone does not need

            notices.append(describe_adapters(trial.model, trial.lora, cache, trust_remote_code=trust))
        return {"report": found.report.model_dump_json(), "notices": notices}
    except TrialError as error:
        return {"data": str(error)}
    except OSError as error:
        return {"disk": str(error)} if error.errno is not None else {"bug": traceback.format_exc()}
    except Exception:  # noqa: BLE001 - the traceback is sent to the driver
        return {"bug": traceback.format_exc()}


def _check_answers(trial: TrialConfig, held_out: PairDataset) -> None:
    """Raise ModelError where a held-out prompt with its answer exceeds the model's positions."""
    positions = known_positions(trial.model)
    if positions is None or positions.table is None or not trial.evaluation.prompts:
        return
    from trainer.evaluation.completions import select_prompts  # torch, which data alone does not need

    lengths = [int(held_out.prompt_lengths[i]) for i in select_prompts(held_out, trial.evaluation.prompts)]
    refuse_long_answers(positions, max(lengths, default=0), trial.evaluation.max_new_tokens)


def _exit_with_parent(parent: int) -> None:
    """End this process when the driver is dead."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    # Redirect prints of libraries to stderr, as the driver reads replies from stdout.
    _stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _serve(Path(sys.argv[1]), sys.stdin, _stdout, trust=_TRUST in sys.argv[2:])
