"""`python -m tests.faults.storm`: a sweep that is killed again and again ends as the same sweep left alone.

SIGKILL hits, at random instants, the driver, one worker, or every process at once; after each the sweep is resumed. In
the end the tables, every metric at every step, MLflow's rows and the best model's weights must equal, bit for bit,
those of a sweep that nobody touched. A sweep that ends before all kills are spent is followed by another.
"""

import argparse
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.support.processes import orchestrate, wait_until
from tests.support.sweep_record import CLOCKED, count_points, differences, doubled_rows, lost_rows, sweep_record

Say = Callable[[str], None]
NAME = "storm"
TARGETS = {"driver": 4, "worker": 3, "everything": 3, "ray": 1}
"""What a kill hits, and how often of eleven: `ray` is one of Ray's own processes."""
_AT_START = 0.2
"""Share of the kills that fall into the start of a driver, before its trials train."""
_RAYS = ("gcs_server", "raylet/raylet", "Agent")
_RESUMABLE = (1, 130)
"""Exit codes of a driver that lost workers or Ray itself: it may have given up, resumably."""


def sweep_file(trials: int, seed: int) -> dict[str, Any]:
    """A sweep of real trials on a CPU, seconds each: tpe suggests, hyperband prunes."""
    text = f"""
name: {NAME}
base:
  model: {{generated: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
                      num_key_value_heads: 2}}}}
  data:
    train: {{generated: instructions, rows: 400}}
    eval: {{generated: instructions, split: eval, rows: 24}}
    max_length: 128
  loss: {{kind: simpo}}
  training: {{pairs_per_update: 8, max_steps: 80, eval_steps: 10, save_steps: 5, logging_steps: 2,
             learning_rate: 1.0e-3}}
  evaluation: {{prompts: 4, samples: 2, max_new_tokens: 6}}
search:
  loss.beta: {{uniform: [1.0, 10.0]}}
  loss.gamma: {{uniform: [0.2, 1.6]}}
  training.learning_rate: {{log_uniform: [1.0e-4, 3.0e-3]}}
sampler: {{kind: tpe, seed: {seed}, n_startup_trials: 4}}
pruner: hyperband
maximize: eval_accuracies/logp
budget: {{trials: {trials}, concurrency: 2}}
"""
    return yaml.safe_load(text)


@dataclass
class Tally:
    """What happened, for the figure."""

    kills: int = 0
    by_target: dict[str, int] = field(default_factory=dict[str, int])
    at_start: int = 0
    drivers: int = 0
    sweeps: int = 0
    trials: int = 0
    pruned: int = 0
    points: int = 0
    trials_lost: int = 0
    points_lost: int = 0
    points_doubled: int = 0
    differences: list[str] = field(default_factory=list[str])
    seconds: float = 0.0


class Driver:
    """One process of `orchestrate`, with everything it starts."""

    def __init__(self, root: Path, file: Path, log: Path) -> None:
        self.known = (root / NAME / "sweep.yaml").is_file()
        command = ["resume", NAME] if self.known else ["sweep", str(file)]
        self.log = log
        with log.open("wb") as stream:
            self.process = orchestrate(root, *command, stdout=stream, stderr=subprocess.STDOUT)

    def tree(self) -> list[psutil.Process]:
        """The driver and every process below it."""
        try:
            me = psutil.Process(self.process.pid)
            return [me, *me.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self, target: str, chance: random.Random) -> tuple[str, list[psutil.Process]]:
        """SIGKILL what is asked (the driver where there is no worker yet); what was hit, and who was there."""
        tree = self.tree()
        rays = [p for p in tree[1:] if any(name in _title(p) for name in _RAYS)]
        workers = [p for p in tree[1:] if _title(p).startswith("ray::") and p not in rays]
        some = {"worker": workers, "ray": rays}.get(target)
        if some:
            chance.choice(some).kill()
            return target, tree
        hit = tree if target == "everything" else tree[:1]
        for process in hit:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        return ("everything" if target == "everything" else "driver"), tree


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""


def logged_points(root: Path) -> int:
    """How many points the study has so far."""
    database = root / NAME / "study.db"
    if not database.is_file():
        return 0
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=1.0) as store:
            return int(store.execute("select count(*) from prefsweep_point").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def weather(
    root: Path, file: Path, kills: int, chance: random.Random, tally: Tally, say: Callable[[str], None]
) -> None:
    """One sweep to its end under at most `kills` kills."""
    logs = root.parent / f"{root.name}-logs"
    logs.mkdir(parents=True, exist_ok=True)
    seen: dict[int, float] = {}
    driver: Driver | None = None
    left = kills
    while True:
        if driver is None:
            tally.drivers += 1
            driver = Driver(root, file, logs / f"{tally.drivers:03d}.log")
            before, lives_on = logged_points(root), False
        if left:
            initial_completions = not lives_on and chance.random() < _AT_START
            seconds = chance.uniform(0.2, 12.0) if initial_completions else chance.uniform(0.0, 5.0)
            _wait(driver, root, seconds, initial_completions, before)
        else:
            driver.process.wait()
        code = driver.process.poll()
        if code is not None:
            if code == 0:
                break
            if not (lives_on and code in _RESUMABLE):
                raise AssertionError(f"a driver ended with {code}: {driver.log.read_text(errors='replace')[-3000:]}")
            driver = None
            continue
        hit, tree = driver.kill(chance.choices(list(TARGETS), list(TARGETS.values()))[0], chance)
        left -= 1
        tally.kills += 1
        tally.by_target[hit] = tally.by_target.get(hit, 0) + 1
        tally.at_start += initial_completions
        seen |= {p.pid: p.create_time() for p in tree if _alive(p)}
        when = " while starting" if initial_completions else ""
        say(f"kill {tally.kills}: {hit}{when}, {logged_points(root)} points told")
        before = logged_points(root)
        if hit in ("worker", "ray"):
            lives_on = True
        else:
            driver = None
    _none_left(seen)


def _wait(driver: Driver, root: Path, seconds: float, initial_completions: bool, before: int) -> None:
    """To the instant of the next kill: soon after the start, or some time after training went on."""
    until = time.monotonic() + 120
    while (
        not initial_completions
        and time.monotonic() < until
        and driver.process.poll() is None
        and logged_points(root) <= before
    ):
        time.sleep(0.05)
    until = time.monotonic() + seconds
    while time.monotonic() < until and driver.process.poll() is None:
        time.sleep(0.01)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _none_left(seen: dict[int, float]) -> None:
    """No process of a dead driver outlives the sweep."""

    def left() -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for pid, began in seen.items():
            try:
                process = psutil.Process(pid)
                if process.create_time() == began and _alive(process):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    # Ray's agents notice the end of theirs after a minute.
    wait_until(lambda: not left(), lambda: f"orphans: {[_title(p) for p in left()]}")


def storm(
    path: Path, *, kills: int, trials: int, seed: int, say: Say, changes: Any = None, sweeps: int | None = None
) -> Tally:
    """The calm sweep once, then stormy ones until all kills are spent (or so many sweeps are done); what was found.

    A storm in a place where there was one goes on from its tally.
    """
    path.mkdir(parents=True, exist_ok=True)
    file = path / "storm.yaml"
    file.write_text(yaml.safe_dump(_merged(sweep_file(trials, seed), changes or {}), sort_keys=False))
    repository = path / "tally.json"
    tally = Tally(**json.loads(repository.read_text())) if repository.exists() else Tally()
    chance, began = random.Random(f"{seed} {tally.sweeps}"), time.monotonic() - tally.seconds
    calm_root = path / "calm"
    if not (calm_root / NAME).exists():
        weather(calm_root, file, 0, chance, Tally(), say)
    calm = sweep_record(calm_root, NAME)
    say(f"left alone: {len(calm['study'])} trials, {count_points(calm)} points in {time.monotonic() - began:.0f} s")
    until = tally.sweeps + sweeps if sweeps else None
    while tally.kills < kills and tally.sweeps != until:
        root = path / f"stormy-{tally.sweeps + 1}"
        shutil.rmtree(root, ignore_errors=True)
        weather(root, file, kills - tally.kills, chance, tally, say)
        stormy = sweep_record(root, NAME)
        tally.sweeps += 1
        tally.trials += len(stormy["study"])
        tally.pruned += sum(t["state"] == "PRUNED" for t in stormy["study"].values())
        tally.points += count_points(stormy)
        tally.trials_lost += len(calm["study"].keys() - stormy["study"].keys())
        tally.points_lost += lost_rows(calm, stormy)
        tally.points_doubled += doubled_rows(stormy)
        found = differences(calm, stormy)
        tally.differences += found
        say(f"sweep {tally.sweeps} ended after {tally.kills} kills: {len(found)} differences")
        tally.seconds = time.monotonic() - began
        repository.write_text(json.dumps(asdict(tally), indent=1))
    return tally


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = dict(tree)
    for key, value in changes.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = _merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.faults.storm", description=__doc__)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--trials", type=int, default=14)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--sweeps", type=int, help="pause after so many; the same command goes on")
    options.add_argument("--place", type=Path, default=Path("runs/storm"), help="everything is written here")
    options.add_argument("--with", dest="changes", type=yaml.safe_load, default={}, help="YAML merged over the sweep")
    requested, began = options.parse_args(), time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)

    how = {name: getattr(requested, name) for name in ("kills", "trials", "seed", "changes", "sweeps")}
    tally = storm(requested.place.resolve(), say=say, **how)
    for difference in tally.differences[:20]:
        print(difference)
    hit = ", ".join(f"{count} {target}" for target, count in sorted(tally.by_target.items()))
    print(
        f"kills survived {tally.kills} ({hit}; {tally.at_start} while a driver was starting), over {tally.sweeps} "
        f"sweeps of {requested.trials} trials and {tally.points} points in {tally.seconds:.0f} s: trials lost "
        f"{tally.trials_lost}, points lost {tally.points_lost}, points doubled {tally.points_doubled}, differences "
        f"{len(tally.differences)} "
        f"(compared: params, states, reasons, every metric at every step but {', '.join(sorted(CLOCKED))}, MLflow's "
        "rows, params, tags and files, the best model's bytes)"
    )
    return 1 if tally.differences else 0


if __name__ == "__main__":
    sys.exit(main())
