"""Threads per slot: a SimPO step as 1 process x 1 thread, 1 x 2, 2 x 1; `python -m benchmarks.threads`."""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from benchmarks.step import read_result, start, start_step

ARRANGEMENTS = ((1, 1), (1, 2), (2, 1))
"""(parallel processes, threads of each)."""


def main() -> None:
    """Measure the arrangements one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="Put the figures into docs/performance.md too.")
    options = parser.parse_args()
    rows = [measure(options, *each) for each in ARRANGEMENTS]
    for row in rows:
        print(f"{row['processes']} x {row['threads']} threads: {row['ms']:.0f} ms per trial-step", flush=True)
    if options.write:
        from benchmarks.results import write

        write("threads", {"vocabulary": options.vocabulary, "rows": rows})


def measure(options: argparse.Namespace, processes: int, threads: int) -> dict[str, Any]:
    """Return wall-clock milliseconds per step of one trial; parallel processes are averaged."""
    case = argparse.Namespace(
        loss="simpo", vocabulary=options.vocabulary, threads=threads, same_allocator=False, bf16=False
    )
    found = [start("ours", case) for _ in range(processes)]
    took: list[float] = []
    for _ in range(options.rounds + 1):
        began = time.perf_counter()
        for process in found:
            start_step(process)
        for process in found:
            read_result(process)
        took.append(1e3 * (time.perf_counter() - began) / processes)
    for process in found:
        process.communicate("")
    return {"processes": processes, "threads": threads, "ms": median(took[1:])}


if __name__ == "__main__":
    main()
