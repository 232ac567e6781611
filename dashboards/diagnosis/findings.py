"""`DiagnosisFinding`, `Advice` and `FindingLevel`: one statement of a diagnosis, what it advises, and its severity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

LEARNING_RATE = "training.learning_rate"
NO_DIAGNOSIS = "A rehearsal shows that the sweep runs; its figures say nothing about the settings."


SHORT_TITLES = {
    "worse_than_start": "no trial better",
    "objective_lost": "worse than before",
    "gain_not_clear": "gain not clear",
    "gain_not_confirmed": "gain not confirmed",
    "chosen_falling": "chosen responses fall",
    "margin_below_gamma": "margin below gamma",
    "answers_lost": "right answers lost",
    "answers_fall_with_distance": "right answers fall",
    "unlikely_text": "log-probs very low",
    "impossible_logps": "impossible log-probs",
    "degenerate_text": "answers degenerate",
    "length_bias": "length preferred",
    "requirements": "requirement broken",
    "diverging_region": "trials diverge",
    "failures": "trials fail",
    "at_the_edge": "best at boundary",
    "not_told_apart": "effect not clear",
    "varied_together": "settings varied together",
    "too_few_pairs": "too few pairs",
    "few_pairs": "too few pairs",
    "coin_toss": "accuracy at chance",
    "ties": "pairs are ties",
    "loss_plateau": "loss is flat",
    "overfitting": "overfitting",
}
"""Rule of a finding -> what is wrong, in at most three words."""


class FindingLevel(StrEnum):
    """serious: do not use the result; warning: act on it; note: for information."""

    SERIOUS = "serious"
    WARNING = "warning"
    NOTE = "note"


LEVELS = tuple(FindingLevel)


class Direction(StrEnum):
    """Where a step moves its setting. fix: stop searching it; exclude: not the values with which trials diverged."""

    RAISE = "raise"
    LOWER = "lower"
    FIX = "fix"
    EXCLUDE = "exclude"


@dataclass(frozen=True, slots=True)
class Advice:
    """One of the alternatives that a finding advises: a clause, and the setting that it moves, "" for none."""

    text: str
    setting: str = ""
    """Dotted path."""
    direction: Direction | None = None
    values: tuple[float, ...] = ()
    """Values to try, where the step names any."""
    uses_model: bool = False
    """Whether the step is to use a trial's model."""


@dataclass(frozen=True, slots=True)
class DiagnosisFinding:
    """One statement of the diagnosis: title, evidence with numbers, and next step."""

    rule: str
    """Stable id of the rule, for programs that read `--json`; the function of the rule may have another name."""
    level: FindingLevel
    title: str
    evidence: str
    remark: str = ""
    """Advice that moves no setting, after the steps."""
    trials: tuple[str, ...] = ()
    """Labels of the trials concerned."""
    setting: str = ""
    """Dotted path of the setting that the finding is about."""
    steps: tuple[Advice, ...] = ()
    """Alternatives, the best first."""
    lead: str = ""
    """Words before the steps: a sentence, or the beginning of theirs."""

    @property
    def next_step(self) -> str:
        """The advice as text: lead, steps, remark."""
        clauses = [step.text for step in self.steps]
        listed = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} or {clauses[-1]}" if clauses else ""
        if listed and (not self.lead or self.lead.endswith(".")):
            listed = listed[:1].upper() + listed[1:]
        lead = self.lead if listed or self.lead.endswith(".") else ""
        return " ".join(part for part in (lead, f"{listed}." if listed else "", self.remark) if part)

    def as_json(self) -> dict[str, Any]:
        """Return the finding as printed by `report --json`."""
        return {
            "rule": self.rule,
            "level": self.level,
            "title": self.title,
            "evidence": self.evidence,
            "next_step": self.next_step,
            "trials": self.trials,
            "leaf": self.setting,
            "moves": [
                {"setting": step.setting, "direction": step.direction, "values": step.values}
                for step in self.steps
                if step.setting
            ],
        }


def by_level(findings: Iterable[DiagnosisFinding]) -> list[DiagnosisFinding]:
    """Return the findings sorted by level, most serious first."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def decided_steps(findings: Iterable[DiagnosisFinding]) -> dict[str, tuple[DiagnosisFinding, Advice]]:
    """Return the step of each setting that findings without conflicts move, with its finding."""
    return {step.setting: (finding, step) for finding in findings for step in finding.steps if step.setting}


def reasons_not_to_use(findings: Iterable[DiagnosisFinding], label: str) -> list[str]:
    """Return the titles of the serious findings about a trial or about the whole sweep, in lower case."""
    return [
        lower_first(finding.title)
        for finding in findings
        if finding.level is FindingLevel.SERIOUS and (not finding.trials or label in finding.trials)
    ]


def lower_first(title: str) -> str:
    """Return the title as the continuation of a sentence."""
    return title[:1].lower() + title[1:]


def round_count(count: int) -> str:
    """Format a count with two significant digits."""
    if count < 100:
        return str(count)
    return f"{round(count, 2 - len(str(count))):,}"
