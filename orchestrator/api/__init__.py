"""Sweeps from Python: load, plan, run and resume them, look at them as data frames, and change them while they run.

    from orchestrator.api import load, plan, run

    loaded = load("sweep.yaml", {"budget.trials": 8})
    print(plan(loaded).as_json()["trials"])
    sweep = run(loaded)
    sweep.trials().sort_values("value")

The command line calls the same functions. Errors are those of `orchestrator.errors`, each with the exit code of the
command as `code`. Importing this package loads neither torch nor Ray; a call loads what it needs.
"""

from orchestrator.api.local_sweep import Sweep, list_sweeps, open_sweep, unarchive
from orchestrator.api.remote_sweep import RemoteSweep, Server, connect
from orchestrator.api.sweep_files import LoadedSweep, load, plan
from orchestrator.api.sweep_handle import Report, SweepHandle
from orchestrator.api.sweep_runs import resume, run
from orchestrator.errors import ExitCode, OrchestrateError, SweepIncomplete

__all__ = [
    "ExitCode",
    "LoadedSweep",
    "OrchestrateError",
    "RemoteSweep",
    "Report",
    "Server",
    "Sweep",
    "SweepHandle",
    "SweepIncomplete",
    "connect",
    "list_sweeps",
    "load",
    "open_sweep",
    "plan",
    "resume",
    "run",
    "unarchive",
]
