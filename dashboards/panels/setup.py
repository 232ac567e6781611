"""What was run on what: enough to know whether two reports may be compared."""

from __future__ import annotations

from dashboards.blocks import Block, Panel, Table, Words
from dashboards.frame import show
from dashboards.insight import Insight
from orchestrator.spec.dump import spec_hash
from trainer.data.summary import DataReport


def panel(seen: Insight) -> Panel | None:
    """Model, data, training, search."""
    frame = seen.frame
    if frame.sweeps:
        return None
    base, spec = frame.spec.base, frame.spec
    generated = base.model.generated
    model = base.model.name_or_path or (f"a generated {generated.architecture}" if generated else "?")
    rows: list[tuple[str, str]] = [
        ("start model", f"{model}{' after the sft stage' if spec.sft else ''}, {base.model.dtype}"),
        ("weights trained", "LoRA" if base.lora else "all"),
    ]
    if frame.data is not None:
        rows.append(("pairs", f"{frame.data.train_rows:,} to train on, {frame.data.eval_rows:,} held out"))
        rows.append(("data", ", ".join(dict.fromkeys(source.name for source in frame.data.sources))))
        rows.append(("data fingerprint", frame.data.fingerprint))
        left = f"{frame.data.bad_rows:,} bad, {frame.data.dropped_rows:,} for other reasons"
        rows.append(("rows left out", f"{left} (see below)" if frame.data.findings else left))
    steps = {case.steps for case in frame.trials if case.steps is not None}
    rows += [
        ("updates a trial", ", ".join(map(str, sorted(steps))) or "not known yet"),
        ("pairs per update", str(base.training.pairs_per_update)),
        ("objective", base.loss.kind),
        ("goal", f"{frame.goal.direction} {frame.goal.metric}"),
        ("sampler", spec.sampler.kind),
    ]
    rows += [(path, ", ".join(show(v) for v in frame.space.listed(path))) for path in frame.paths]
    rows.append(("identity of the sweep", spec_hash(spec)[:12]))
    blocks: list[Block] = [Table(("", ""), tuple(rows)), *_found(frame.data)]
    blocks += [Words(notice) for notice in frame.notices]
    return Panel("setup", "What was run", "", blocks)


def _found(data: DataReport | None) -> list[Block]:
    """What was found in the rows, by kind."""
    if data is None or not data.findings:
        return []
    rows = tuple((f.kind, f.severity.replace("_", " "), f"{f.count:,}", str(f)) for f in data.findings)
    head = Words("What was found in the data, counted by row:")
    return [head, Table(("kind", "weight", "rows", "what"), rows, numeric=frozenset({2}))]
