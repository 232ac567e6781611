"""The subprocess of `DataProcess`: prepares and checks the data of one configuration after another.

Run as a script with the cache folder. Imports only what it uses, since no trial starts before it has answered.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from orchestrator.spec.judge_config import JudgeConfig, no_answer_for_checker
from trainer.config.loss_config import DpoLoss
from trainer.config.position_limits import known_positions, refuse_long_answers
from trainer.config.trial import TrialConfig
from trainer.data.data_findings import UnreadableData
from trainer.environment import collect_garbage_rarely
from trainer.results import TrialError

if TYPE_CHECKING:
    from trainer.data.pair_dataset import PairDataset

TRUST_OPTION = "--trust-remote-code"
HIDE_TORCH_OPTION = "--hide-torch"
NEEDS_TORCH = {"needs": "torch"}
"""Reply of a process without torch to what it cannot decide."""
_POLL_SECONDS = 0.2


def serve(cache: Path, requests: IO[str], answers: IO[str], *, trust_remote_code: bool) -> None:
    """Answer requests until stdin is closed."""
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    for line in requests:
        answers.write(json.dumps(prepare_data(cache, line, trust_remote_code)) + "\n")
        answers.flush()


def needs_torch(config: TrialConfig) -> bool:
    """Return whether a generated model is written or adapters are looked at, for which torch is loaded."""
    return config.lora is not None or config.model.generated is not None


def _is_torch_hidden() -> bool:
    return not sys.modules.get("torch", sys)


def prepare_data(cache: Path, request: str, trust_remote_code: bool) -> dict[str, Any]:
    """Return the reply to a request: the data report with notices, or what is wrong."""
    from trainer.data import TokenizerError, check_rows, prepare, score_gaps

    fields = json.loads(request)
    trial = TrialConfig.model_validate(fields["config"])
    if _is_torch_hidden() and needs_torch(trial):
        return NEEDS_TORCH
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
        return NEEDS_TORCH if _is_torch_hidden() and isinstance(error, TokenizerError) else {"data": str(error)}
    except OSError as error:
        return {"disk": str(error)} if error.errno is not None else _bug()
    except Exception:  # noqa: BLE001 - the traceback is sent to the driver
        return _bug()


def _bug() -> dict[str, str]:
    return NEEDS_TORCH if _is_torch_hidden() else {"bug": traceback.format_exc()}


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
    if HIDE_TORCH_OPTION in sys.argv[2:]:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  as if it were not installed
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # "PyTorch was not found"
    serve(Path(sys.argv[1]), sys.stdin, _stdout, trust_remote_code=TRUST_OPTION in sys.argv[2:])
