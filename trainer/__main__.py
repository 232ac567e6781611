"""`python -m trainer trial.yaml`: train one configuration alone; points as JSON lines on stdout, talk on stderr.

Exit codes: 0 finished, 2 the configuration, the data, the model or the folder cannot be used, 3 diverged, 130 and 143
interrupted by Ctrl-C or SIGTERM with a checkpoint written: the same command goes on. Anything else is a bug.
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
from trainer.config.yaml_files import BadTrial, load_trial
from trainer.results import Ending, EndKind, JsonLinesReporter, Point, Reporter, TrialError

log = logging.getLogger("trainer")

DONE, UNUSABLE, DIVERGED = 0, 2, 3


def main(arguments: list[str] | None = None) -> int:
    """Train what the command line names and return the exit code."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        config = load_trial(options.trial)
        check_lengths(config, options.trial)
        return _train(config, options)
    except TrialError as why:
        sys.stderr.write(f"{why}\n")
        return UNUSABLE


def check_lengths(config: TrialConfig, file: Path) -> None:
    """Warn of lengths that the start model was not trained for; BadTrial where it has no positions for them."""
    positions = known_positions(config.model)
    found = [] if positions is None else list(length_findings(positions, config))
    for warned in (each for each in found if not each.refused):
        log.warning("%s: %s: %s (%s)", file, warned.path, warned.problem, warned.hint)
    if refused := [f"{each.path}: {each.problem} ({each.hint})" for each in found if each.refused]:
        raise BadTrial(file, refused)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Train one configuration alone.")
    parser.add_argument("trial", type=Path, help="YAML with model, data, loss, training, lora, evaluation")
    parser.add_argument("--out", type=Path, help="folder of the run; by default runs/alone/<name of the file>")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="shared by all runs")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the model's folder run its own Python; only if you trust it",
    )
    return parser.parse_args(arguments)


def _train(config: TrialConfig, options: argparse.Namespace) -> int:
    # Late: a mistake in the file is told before seconds of imports.
    from trainer.training_session import Workshop

    folder: Path = options.out or Path("runs/alone") / options.trial.stem
    workshop = Workshop(options.cache, trust_remote_code=options.trust_remote_code, tell=log.info)
    run = workshop.train(config, folder)  # nothing is computed yet: a signal from here on is this run's
    signals = _listen(workshop.interrupt)
    reporter = JsonLinesReporter(sys.stdout) if workshop.is_main else None
    ending = _drive(run, reporter)
    log.info("%s: %s", ending.kind.value, ending.reason)
    match ending.kind:
        case EndKind.FINISHED:
            log.info("model: %s", ending.folder)
            return DONE
        case EndKind.DIVERGED:
            return DIVERGED
        case EndKind.STOPPED:
            return 128 + signals[0] if signals else DONE


def _listen(interrupt: Callable[[], None]) -> list[int]:
    """A first SIGTERM or SIGINT asks for a checkpoint, a second ends the process; the list holds what came so far."""
    got: list[int] = []

    def heard(number: int, _: FrameType | None) -> None:
        got.append(number)
        interrupt()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)
    return got


def _drive(run: Generator[Point, None, Ending], reporter: Reporter | None) -> Ending:
    while True:
        try:
            point = next(run)
        except StopIteration as end:
            return end.value
        if reporter is not None and (verdict := reporter.report(point)).stop:
            run.close()
            return Ending(EndKind.STOPPED, verdict.reason, point.step)


if __name__ == "__main__":
    sys.exit(main())
