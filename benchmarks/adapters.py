"""Adapter trials sequentially, interleaved over one base, or in separate processes: `python -m benchmarks.adapters`.

Whole trials with the real trainer, of 1 pair and of more pairs per update. Time is per trial and update; memory is the
proportional set size (PSS) of all processes halfway, on a GPU its reserved memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from statistics import median
from typing import Any

AFTER, IN_TURN, EACH = "one after another", "in turn over one base", "a process each"


def main() -> None:
    """Measure every arrangement of 2 and more trials in rounds, so that load of the machine affects all alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="A folder or hub name instead of the generated model.")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--trials", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="Put the figures into docs/performance.md too.")
    options = parser.parse_args()
    if options.child is not None:
        child(json.loads(options.child))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare_arrangements(options, Path(folder))
    for row in found:
        print(f"{row['trials']} trials of {row['pairs']} pairs, {row['how']}: {row_text(row)}", flush=True)
    if options.write:
        from benchmarks.results import write

        settings = {
            "hidden": options.hidden,
            "layers": options.layers,
            "model": options.model,
            "rounds": options.rounds,
        }
        write("adapters", {**settings, "rows": found})


def row_text(row: dict[str, Any]) -> str:
    """Return the text of a row."""
    return f"{row['ms']:.0f} ms wall-clock, {row['cpu_ms']:.0f} ms of CPU per trial and update; {row['mb']:.0f} MB"


def compare_arrangements(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure all arrangements; return the median of the rounds."""
    arrangements = [(AFTER, 1), *((how, trials) for trials in options.trials for how in (IN_TURN, EACH))]
    seen: dict[tuple[str, int], list[list[dict[str, float]]]] = {each: [] for each in arrangements}
    for _ in range(options.rounds):
        for each in arrangements:
            seen[each].append(measure(options, folder, *each))
    rows: list[dict[str, Any]] = []
    for number, pairs in enumerate(options.pairs):
        for (how, trials), rounds in seen.items():
            runs = [figures[number] for figures in rounds]
            figures = {name: median(run[name] for run in runs) for name in runs[0]}
            rows.append({"pairs": pairs, "how": how, "trials": trials, **figures})
    return rows


def measure(options: argparse.Namespace, folder: Path, how: str, trials: int) -> list[dict[str, float]]:
    """Measure one arrangement once; return figures for each number of pairs per update."""
    settings = {
        "hidden": options.hidden,
        "layers": options.layers,
        "model": options.model,
        "cache": str(folder / "cache"),
    }
    settings |= {"pairs": options.pairs, "trials": 1 if how == EACH else trials}
    children = [start(settings) for _ in range(trials if how == EACH else 1)]
    out: list[dict[str, float]] = []
    for pairs in options.pairs:
        for process in children:
            read_figures(process)
        began = time.perf_counter()
        for process in children:
            resume_process(process)
        # All processes pause halfway, so that memory is measured while every trial is loaded.
        halfway = [read_figures(process)["mb"] for process in children]
        for process in children:
            resume_process(process)
        cpu = sum(read_figures(process)["cpu"] for process in children)
        took, each = time.perf_counter() - began, trials * updates_of(pairs)
        out.append({"ms": 1e3 * took / each, "cpu_ms": 1e3 * cpu / each, "mb": sum(halfway)})
    for process in children:
        process.communicate("")
    return out


def updates_of(pairs: int) -> int:
    """Return the number of updates of a trial with this many pairs in each."""
    return 12 if pairs < 4 else 4


def start(settings: dict[str, Any]) -> subprocess.Popen[str]:
    """Start a process that loads, warms up with a short training, and waits."""
    from orchestrator.execution.local_cluster import worker_environment

    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.adapters", "--child", json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | worker_environment(1),
        text=True,
    )


def resume_process(process: subprocess.Popen[str]) -> None:
    """Let a waiting process continue."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def read_figures(process: subprocess.Popen[str]) -> dict[str, float]:
    """Return a process's next line of figures."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError("a process ended early; run it with --child to see why")


# --- inside a process ------------------------------------------------------------------------------------------------


def child(settings: dict[str, Any]) -> None:
    """Run interleaved trials for each number of pairs, pausing halfway; write figures as JSON lines to stdout."""
    from trainer.training_session import TrainingSession

    first_session = TrainingSession(Path(settings["cache"]))
    sessions = (
        [first_session.sibling() for _ in range(settings["trials"])] if settings["trials"] > 1 else [first_session]
    )
    for pairs in settings["pairs"]:
        updates = updates_of(pairs)
        with tempfile.TemporaryDirectory() as folder:
            for number, session in enumerate(sessions):  # warm-up
                interleave([session.train(trial(settings, pairs, number, 1), Path(folder) / f"warm-{number}")])
            write_figures({})
            sys.stdin.readline()
            before = cpu_seconds()
            runs = [
                session.train(trial(settings, pairs, number, updates), Path(folder) / str(number))
                for number, session in enumerate(sessions)
            ]
            for _ in range(updates // 2):
                for run in runs:
                    next(run)
            write_figures({"mb": memory()})
            sys.stdin.readline()
            interleave(runs)
            write_figures({"cpu": cpu_seconds() - before})


def trial(settings: dict[str, Any], pairs: int, number: int, updates: int) -> Any:
    """Return a trial with its own seed and learning rate; few evaluations, so that updates are measured."""
    from trainer.config.trial import TrialConfig

    hidden = settings["hidden"]
    shape = {
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": settings["layers"],
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 256,
    }
    return TrialConfig.model_validate(
        {
            "model": {"name_or_path": settings["model"]} if settings["model"] else {"generated": shape},
            "data": {
                "train": {"generated": "instructions", "rows": 64},
                "eval": {"generated": "instructions", "split": "eval", "rows": 2},
                "max_length": 192,
            },
            "loss": {"kind": "simpo"},
            "lora": {"r": 16, "target_modules": "all-linear"},
            "training": {
                "learning_rate": 1e-4 * (1 + number),
                "seed": number,
                "pairs_per_update": pairs,
                "max_steps": updates,
                "eval_steps": updates,
                "save_steps": updates,
            },
            "evaluation": {"prompts": 0},
        }
    )


def interleave(runs: list[Generator[Any, None, Any]]) -> None:
    """Advance the trials in turn until all have ended."""
    while runs:
        for run in list(runs):
            if next(run, None) is None:
                runs.remove(run)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def memory() -> float:
    """Return the MB of this process: reserved GPU memory if there is a GPU, else PSS of main memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_reserved() / 1e6
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("this system does not report the PSS of a process")


def write_figures(figures: dict[str, float]) -> None:
    """Write a line of figures for the parent process."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
