"""`python -m trainer trial.yaml`: train one configuration; metrics as JSON lines on stdout, log on stderr.

Exit codes: 0 finished; 2 the configuration, the data, the model or the folder cannot be used; 3 diverged; 130 and 143
interrupted by Ctrl-C or SIGTERM with a checkpoint written, from which the same command continues. Others are bugs.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType

from trainer.config.position_limits import known_positions, length_findings
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import InvalidTrialFile, load_trial
from trainer.results import JsonLinesReporter, RunResult, RunStatus, StepMetrics, TrialError

log = logging.getLogger("trainer")

DONE, UNUSABLE, DIVERGED = 0, 2, 3


def main(arguments: list[str] | None = None) -> int:
    """Train the trial named on the command line and return the exit code."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        config = load_trial(options.trial)
        check_lengths(config, options.trial)
        return _train(config, options)
    except TrialError as error:
        sys.stderr.write(f"{error}\n")
        return UNUSABLE


def check_lengths(config: TrialConfig, file: Path) -> None:
    """Warn about lengths that the initial model was not trained for.

    Raises InvalidTrialFile if the model has no positions for them.
    """
    positions = known_positions(config.model)
    found = [] if positions is None else list(length_findings(positions, config))
    for warning in (each for each in found if not each.refused):
        log.warning("%s: %s: %s (%s)", file, warning.path, warning.problem, warning.hint)
    if refused := [f"{each.path}: {each.problem} ({each.hint})" for each in found if each.refused]:
        raise InvalidTrialFile(file, refused)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Train one configuration.")
    parser.add_argument("trial", type=Path, help="YAML with model, data, loss, training, lora, evaluation")
    parser.add_argument("--out", type=Path, help="folder of the run; default: runs/alone/<name of the file>")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="shared by all runs")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the model's folder run its own Python; only if you trust it",
    )
    return parser.parse_args(arguments)


def _train(config: TrialConfig, options: argparse.Namespace) -> int:
    # Imported late, so that errors in the file are reported before seconds of imports.
    from trainer.training_session import TrainingSession

    folder: Path = options.out or Path("runs/alone") / options.trial.stem
    session = TrainingSession(options.cache, trust_remote_code=options.trust_remote_code, log_line=log.info)
    run = session.train(config, folder)  # a generator: signals from here on interrupt this run
    signals = _install_signal_handlers(session.interrupt)
    reporter = JsonLinesReporter(sys.stdout) if session.is_main else None
    result = _drive(run, reporter)
    log.info("%s: %s", result.status.value, result.reason)
    match result.status:
        case RunStatus.FINISHED:
            log.info("model: %s", result.folder)
            return DONE
        case RunStatus.DIVERGED:
            return DIVERGED
        case RunStatus.STOPPED:
            return 128 + signals[0] if signals else DONE


def _install_signal_handlers(interrupt: Callable[[], None]) -> list[int]:
    """Install handlers: the first SIGTERM or SIGINT requests a checkpoint, the second ends the process.

    Returns a list to which received signals are added.
    """
    received: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        received.append(number)
        interrupt()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return received


def _drive(run: Generator[StepMetrics, None, RunResult], reporter: JsonLinesReporter | None) -> RunResult:
    while True:
        try:
            step_metrics = next(run)
        except StopIteration as end:
            return end.value
        if reporter is not None:
            reporter.report(step_metrics)


if __name__ == "__main__":
    sys.exit(main())
