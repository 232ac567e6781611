"""What a sweep has left behind, as plain values: two sweeps that went the same way have equal stories."""

import hashlib
import json
import re
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.commands.status import best
from orchestrator.folders import SweepFolder
from orchestrator.study.study import Study

CLOCKED = frozenset({"tokens_per_second", "pairs_per_second"})
"""Metrics that the clock decides. Everything else has to be equal to the last bit."""
_OWN_TAGS = ("attempt", "worker.", "prefsweep.sweep_id", "mlflow.parentRunId", "env.", "git.", "mlflow.source.")
_OWN_FILES = frozenset({"environment.json", "report.html", "cost.html", "timeline.html"})
_WHEN = re.compile(r'<p class="when">.*?</p>')
"""The date in the head of every figure's page."""
_RUN_ID = re.compile(r"\b[0-9a-f]{32}\b")


def sweep_record(root: Path, name: str) -> dict[str, Any]:
    """Study, MLflow's store and the best model of one finished sweep."""
    return {
        "study": study_record(root, name),
        "mlflow": mlflow_record(root, name),
        "best model": best_model(root, name),
    }


def study_record(root: Path, name: str) -> dict[str, Any]:
    """Every trial: params, state, reason, and every metric at every step as its exact bits."""
    logged: dict[str, Any] = {}
    with Study.open(SweepFolder(root, name)) as study:
        for record in study.trials():
            metrics = {
                p.step: {n: v.hex() for n, v in _reproducible_metrics(p.metrics)}
                for p in study.metric_history(record.number)
            }
            logged[str(record.number)] = {
                "params": dict(record.params),
                "state": record.state.value,
                "reason": record.reason,
                "failure": record.failure and record.failure.value,
                "diverged": record.diverged,
                "value": record.value,
                "step": record.step,
                "last": {n: v.hex() for n, v in _reproducible_metrics(record.metrics)},
                "points": metrics,
            }
    return logged


def mlflow_record(root: Path, name: str) -> dict[str, Any]:
    """Every run: status, params, tags, every row of metrics (a doubled one is there twice), files by their digest."""
    logged: dict[str, Any] = {}
    with sqlite3.connect(f"file:{root / 'mlflow.db'}?mode=ro", uri=True) as store:
        runs = store.execute(
            "select r.run_uuid, t.value, r.status, r.name, r.artifact_uri, r.end_time - r.start_time from runs r "
            "join tags t on t.run_uuid = r.run_uuid and t.key = 'prefsweep.run' "
            "join tags s on s.run_uuid = r.run_uuid and s.key = 'prefsweep.sweep' where s.value = ?",
            (name,),
        ).fetchall()
        for run_id, run, status, title, path, lasted in runs:
            rows = store.execute("select key, step, value, is_nan from metrics where run_uuid = ?", (run_id,))
            tags = store.execute("select key, value from tags where run_uuid = ?", (run_id,))
            params = store.execute("select key, value from params where run_uuid = ?", (run_id,))
            key = run if run not in logged else f"{run} (doubled as {run_id})"
            logged[key] = {
                "status": status,
                "name": title,
                "negative duration": lasted is not None and lasted < 0,
                "metrics": sorted([n, s, float(v).hex(), bool(nan)] for n, s, v, nan in rows if n not in CLOCKED),
                "tags": {
                    k: _without_run_ids(k, _placeless(v, root)) for k, v in sorted(tags) if not k.startswith(_OWN_TAGS)
                },
                "params": {k: _placeless(v, root) for k, v in sorted(params)},
                "files": _files(Path(unquote(urlsplit(path).path)), root),
            }
    return logged


def best_model(root: Path, name: str) -> dict[str, str]:
    """The winner's weights, by their digest."""
    path = Path(best(name, root)["model"])
    return {file.name: _digest(file.read_bytes()) for file in sorted(path.glob("*.safetensors"))}


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """The places where two stories differ, each with both values."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = sorted({*left, *right}, key=str)
        return [d for k in keys for d in differences(left.get(k), right.get(k), f"{where}/{k}")]
    if left == right:
        return []
    if isinstance(left, list) and isinstance(right, list):
        lost = [row for row in left if row not in right]
        more = [row for row in right if row not in left]
        return [f"{where}: {len(left)} against {len(right)} rows; only left {lost[:3]}; only right {more[:3]}"]
    return [f"{where}: {left!r:.200} against {right!r:.200}"]


def count_points(logged: dict[str, Any]) -> int:
    """Points of all trials in the study."""
    return sum(len(trial["points"]) for trial in logged["study"].values())


def doubled_rows(logged: dict[str, Any]) -> int:
    """Rows of MLflow's metrics that are there more than once by run, metric and step."""
    out = 0
    for run in logged["mlflow"].values():
        paths = [(name, step) for name, step, *_ in run["metrics"]]
        out += len(paths) - len(set(paths))
    return out


def lost_rows(calm: dict[str, Any], stormy: dict[str, Any]) -> int:
    """Points of the calm sweep's study and rows of its MLflow runs that the other one has not."""
    lost = 0
    for number, trial in calm["study"].items():
        lost += len(trial["points"].keys() - stormy["study"].get(number, {"points": {}})["points"].keys())
    for run, logged in calm["mlflow"].items():
        theirs = {(name, step) for name, step, *_ in stormy["mlflow"].get(run, {"metrics": []})["metrics"]}
        lost += len({(name, step) for name, step, *_ in logged["metrics"]} - theirs)
    return lost


def _reproducible_metrics(metrics: Any) -> list[tuple[str, float]]:
    return [(name, float(value)) for name, value in sorted(metrics.items()) if name not in CLOCKED]


def _placeless(text: str, root: Path) -> str:
    return text.replace(str(root), "ROOT")


def _files(path: Path, root: Path) -> dict[str, str]:
    files = {str(f.relative_to(path)): f for f in sorted(path.rglob("*")) if f.is_file() and f.name not in _OWN_FILES}
    texts = {name: _placeless(f.read_text(encoding="utf-8"), root) for name, f in files.items()}
    return {name: _digest(_WHEN.sub("", text).encode()) for name, text in texts.items()}


def _without_run_ids(key: str, text: str) -> str:
    """A tag without the names that MLflow gave to runs."""
    return _RUN_ID.sub("RUN", text) if key == "mlflow.note.content" else text


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    import sys

    print(json.dumps(sweep_record(Path(sys.argv[1]), sys.argv[2]), indent=1, sort_keys=True))
