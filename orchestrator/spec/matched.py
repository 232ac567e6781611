"""Objectives are compared at matched data and updates: what decides those may not hang on the objective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from orchestrator.spec.place import KIND

_UPDATES = frozenset({"training.pairs_per_update", "training.max_steps", "training.num_train_epochs"})


def unmatched(when: Mapping[str, Sequence[str]], groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Searched leaves of the data or of the updates that are drawn by `loss.kind`, each with a sentence.

    `when`: each leaf's conditions by name. `groups`: the leaves that are zipped.
    """
    problem = "objectives are compared at the same data and updates: this may not depend on loss.kind"
    for group in groups:
        if KIND in group:
            yield from ((path, problem) for path in group if _decides(path))
    for path in when:
        if _decides(path) and _hangs_on_kind(path, when, frozenset()):
            yield path, problem


def _decides(path: str) -> bool:
    return path.startswith("data.") or path in _UPDATES


def _hangs_on_kind(path: str, when: Mapping[str, Sequence[str]], seen: frozenset[str]) -> bool:
    if path in seen:  # a circle is told elsewhere
        return False
    return any(other == KIND or _hangs_on_kind(other, when, seen | {path}) for other in when.get(path, ()))
