"""Trials with adapters: one after another, in turn over one base, or a process each: `python -m benchmarks.adapters`.

Whole trials with the real trainer, of 1 pair and of more pairs per update. Time is per trial and update; memory is the
proportional share (PSS) of all processes halfway, on a GPU what is taken of it.
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
    """Every arrangement of 2 and more trials, in rounds, so that a busy moment hits all alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="A folder or hub name instead of the generated model.")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--trials", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="Put the figures into docs/performance.md too.")
    options = parser.parse_args()
    if options.child is not None:
        child(json.loads(options.child))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = contest(options, Path(folder))
    for row in found:
        print(f"{row['trials']} trials of {row['pairs']} pairs, {row['how']}: {told(row)}", flush=True)
    if options.write:
        from benchmarks.results import write

        given = {"hidden": options.hidden, "layers": options.layers, "model": options.model, "rounds": options.rounds}
        write("adapters", {**given, "rows": found})


def told(row: dict[str, Any]) -> str:
    """A row in words."""
    return f"{row['ms']:.0f} ms wall-clock, {row['cpu_ms']:.0f} ms of CPU per trial and update; {row['mb']:.0f} MB"


def contest(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All arrangements; the median of the rounds."""
    rows: list[dict[str, Any]] = []
    for pairs in options.pairs:
        arrangements = [
            (AFTER, 1, 1),
            *((how, k, threads) for k in options.trials for how, threads in ((IN_TURN, 1), (IN_TURN, 2), (EACH, 1))),
        ]
        seen: dict[tuple[str, int, int], list[dict[str, float]]] = {each: [] for each in arrangements}
        for _ in range(options.rounds):
            for each in arrangements:
                seen[each].append(measure(options, folder, pairs, *each))
        for (how, trials, threads), runs in seen.items():
            figures = {name: median(run[name] for run in runs) for name in runs[0]}
            rows.append({"pairs": pairs, "how": how, "trials": trials, "threads": threads, **figures})
    return rows


def measure(
    options: argparse.Namespace, folder: Path, pairs: int, how: str, trials: int, threads: int
) -> dict[str, float]:
    """One arrangement, once."""
    updates = 24 if pairs == 1 else 4
    given = {"hidden": options.hidden, "layers": options.layers, "model": options.model, "cache": str(folder / "cache")}
    given |= {"pairs": pairs, "updates": updates, "trials": 1 if how == EACH else trials, "threads": threads}
    children = [start(given, threads) for _ in range(trials if how == EACH else 1)]
    for process in children:
        answer(process)
    began = time.perf_counter()
    for process in children:
        tell(process)
    halfway = [answer(process)["mb"] for process in children]
    # All wait halfway, so that memory is looked at while every trial is there.
    for process in children:
        tell(process)
    cpu = sum(answer(process)["cpu"] for process in children)
    took = time.perf_counter() - began
    for process in children:
        process.communicate("")
    each = trials * updates
    return {"ms": 1e3 * took / each, "cpu_ms": 1e3 * cpu / each, "mb": sum(halfway)}


def start(given: dict[str, Any], threads: int) -> subprocess.Popen[str]:
    """A process that loads, trains a little to be warm, and waits."""
    from orchestrator.engine.cluster import worker_environment

    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.adapters", "--child", json.dumps(given)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | worker_environment(threads),
        text=True,
    )


def tell(process: subprocess.Popen[str]) -> None:
    """Let it go on."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    """Its next line of figures."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError("a process ended early; run it alone with --child to see why")


# --- inside a process ------------------------------------------------------------------------------------------------


def child(given: dict[str, Any]) -> None:
    """Warm, then `trials` trials in turn, halted halfway; figures as JSON on standard output, a line for each."""
    from trainer.run import Workshop

    hall = Workshop(Path(given["cache"]))
    shops = [hall.beside() for _ in range(given["trials"])] if given["trials"] > 1 else [hall]
    with tempfile.TemporaryDirectory() as folder:
        for number, shop in enumerate(shops):
            in_turn([shop.train(trial(given, number, 1), Path(folder) / f"warm-{number}")])
        say({})
        sys.stdin.readline()
        before = spent()
        courses = [
            shop.train(trial(given, number, given["updates"]), Path(folder) / str(number))
            for number, shop in enumerate(shops)
        ]
        for _ in range(given["updates"] // 2):
            for course in courses:
                next(course)
        say({"mb": memory()})
        sys.stdin.readline()
        in_turn(courses)
        say({"cpu": spent() - before})


def trial(given: dict[str, Any], number: int, updates: int) -> Any:
    """A trial of its own seed and rate; hardly evaluated, so that updates are what is measured."""
    from trainer.config import TrialConfig

    hidden = given["hidden"]
    shape = {
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": given["layers"],
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 256,
    }
    return TrialConfig.model_validate(
        {
            "model": {"name_or_path": given["model"]} if given["model"] else {"generated": shape},
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
                "pairs_per_update": given["pairs"],
                "max_steps": updates,
                "eval_steps": updates,
                "save_steps": updates,
            },
            "evaluation": {"prompts": 0},
        }
    )


def in_turn(courses: list[Generator[Any, None, Any]]) -> None:
    """A point of each, again and again, until all have ended."""
    while courses:
        for course in list(courses):
            if next(course, None) is None:
                courses.remove(course)


def spent() -> float:
    """Seconds of CPU of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def memory() -> float:
    """MB of this process: of the GPU where it has one, else its share of main memory, shared pages by their users."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_reserved() / 1e6
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("this system does not tell a process's memory")


def say(figures: dict[str, float]) -> None:
    """A line for the parent."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
