"""`require`: bounds that a winner must keep, as they are written, refused and measured."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec, sweep_identity
from orchestrator.spec.requirements import DEFAULT_BOUNDS, Requirement, describe_break, find_violations
from orchestrator.spec.sweep_spec import SweepSpec

Load = Callable[..., SweepSpec]
Refused = Callable[..., list[str]]
REPETITION, ANSWERS, CHOSEN = "eval_repetition", "eval_exact_answers", "eval_logps_per_token/chosen"
LENGTH = "eval_answer_length"


@pytest.mark.parametrize(
    ("written", "comparison", "bound", "is_relative", "text"),
    [
        (">= initial", ">=", 0.0, True, ">= initial"),
        (">=initial-0.2", ">=", -0.2, True, ">= initial - 0.2"),
        (" <= initial + 5 ", "<=", 5.0, True, "<= initial + 5.0"),
        ("<= 0.1", "<=", 0.1, False, "<= 0.1"),
        (">= -1.5e-1", ">=", -0.15, False, ">= -0.15"),
        ("<= 2*initial", "<=", 0.0, True, "<= 2 * initial"),
        ("<= 1.5 * initial + 1", "<=", 1.0, True, "<= 1.5 * initial + 1.0"),
    ],
)
def test_a_bound_is_read_and_written_back(
    written: str, comparison: str, bound: float, is_relative: bool, text: str
) -> None:
    made = Requirement.parse(REPETITION, written)
    assert (made.comparison, made.bound, made.relative_to_initial) == (comparison, bound, is_relative)
    assert made.bound_text == text
    assert Requirement.parse(REPETITION, made.bound_text) == made


def test_the_file_comes_back_with_what_is_off(load_text: Load, folder: Path) -> None:
    spec = load_text(f'require: {{{CHOSEN}: [">= initial - 0.2", "<= 0"], {REPETITION}: "<= 0.1", {LENGTH}: off}}\n')
    assert [requirement.name for requirement in spec.require] == [
        f"{CHOSEN} >= initial - 0.2",
        f"{CHOSEN} <= 0.0",
        f"{REPETITION} <= 0.1",
    ]
    for brief in (False, True):
        assert load_spec_text(dump_spec(spec, brief=brief), folder).require == spec.require
    assert load_text("", f"require.{REPETITION}=<= 0.1").require[0] == spec.require[2]


def test_a_default_set_guards_what_a_sweep_measures(load_text: Load, folder: Path) -> None:
    (folder / "answered.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "answer": "b"}\n')
    rows = "base: {model: org/model, data: {train: rows.jsonl}}\n"
    answered = rows.replace("rows.jsonl", "answered.jsonl")
    unread = "base: {model: org/model, data: {train: {dataset: org/rows, split: train}}}\n"
    silent = "base: {model: org/model, data: {train: answered.jsonl}, evaluation: {prompts: 0}}\n"
    without_answers = {metric: bound for metric, bound in DEFAULT_BOUNDS.items() if metric != ANSWERS}
    for text, expected in (
        (rows, without_answers),
        (unread, without_answers),
        (answered, DEFAULT_BOUNDS),
        (silent, {CHOSEN: DEFAULT_BOUNDS[CHOSEN]}),
    ):
        spec = load_text(text)
        assert spec.require == tuple(Requirement.parse(*each) for each in expected.items()), text
        assert spec == load_text(f"{text}require: {{}}\n") == load_text(f"{text}require:\n")
        assert "require" not in dump_spec(spec, brief=True)
        assert load_spec_text(dump_spec(spec), folder) == spec
    one = load_text(f"{answered}require: {{{REPETITION}: off, {ANSWERS}: '>= initial'}}\n")
    assert [r.name for r in one.require] == [
        f"{ANSWERS} >= initial",
        f"{CHOSEN} >= initial - 0.7",
        f"{LENGTH} <= 2 * initial",
    ]


@pytest.mark.parametrize("off", ["off", "none", "false"])
def test_all_of_them_are_turned_off_and_stored_sweeps_have_none(off: str, load_text: Load, folder: Path) -> None:
    spec, guarded = load_text(f"require: {off}\n"), load_text("")
    assert spec.require == ()
    assert guarded.require != ()
    assert sweep_identity(spec) != sweep_identity(guarded)
    for brief in (False, True):
        assert load_spec_text(dump_spec(spec, brief=brief), folder) == spec
    stored = "\n".join(line for line in dump_spec(guarded).splitlines() if not line.startswith(("require", "  eval_")))
    assert "require" not in stored
    assert load_spec_text(stored, folder, is_new=False) == spec, "as earlier versions wrote it"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ('{eval_exact_answer: ">= initial"}', "did you mean eval_exact_answers?"),
        ('{rewards/accuracies: ">= 0.5"}', "use eval_rewards/accuracies, on held-out pairs"),
        (f"{{{REPETITION}: 0.1}}", 'write "<= 0.1"'),
        (f'{{{REPETITION}: "< 0.1"}}', 'write "<= 0.1"'),
        (f"{{{CHOSEN}: initial - 0.2}}", 'write ">= initial - 0.2"'),
        (f'{{{CHOSEN}: "= initial"}}', 'write ">= initial"'),
        (f'{{{CHOSEN}: "about the same"}}', 'write ">= initial", ">= initial - 0.2", "<= 2 * initial" or "<= 0.1"'),
        (f"{{{CHOSEN}: []}}", "the list is empty"),
        (f'{{{CHOSEN}: [">= 0", ">= 0.0"]}}', "is required twice"),
        (f'{{{ANSWERS}: ">= initial"}}', "have no correct answer"),
        ('{eval_rewards/margins: ">= initial"}', "is scaled by the search (loss.beta)"),
        ('{eval_log_odds_ratio: ">= initial"}', "with loss.kind orpo only"),
        (f"[{CHOSEN}]", "must be a mapping of metrics to bounds"),
    ],
)
def test_what_cannot_be_required(findings: Refused, section: str, said: str) -> None:
    (found,) = findings(f"search: {{loss.beta: [1, 2]}}\nrequire: {section}\n")
    assert said in found
    assert found.startswith("sweep.yaml:2")


@pytest.mark.parametrize(
    "section", [f"\n  {REPETITION}: >= initial - 0.2\n", f"\n  {{{REPETITION}: >= initial - 0.2}}\n"]
)
def test_a_bound_without_quotes_is_explained(findings: Refused, section: str) -> None:
    (found,) = findings(f"require:{section}")
    assert found.startswith("sweep.yaml:2")
    assert found.endswith('write ">= initial - 0.2"')


def test_a_metric_of_answers_needs_answers_to_be_generated(findings: Refused) -> None:
    base = "base: {model: org/model, data: {train: rows.jsonl}, evaluation: {prompts: 0}}\n"
    (found,) = findings(f'{base}require:\n  {REPETITION}: "<= 0.1"\n')
    assert found.startswith("sweep.yaml:3")
    assert "set base.evaluation.prompts above 0" in found


def test_a_violation_is_the_amount_that_is_missing_in_the_metrics_units() -> None:
    bounds = {ANSWERS: ">= initial", CHOSEN: ">= initial - 0.2", REPETITION: "<= 0.1"}
    required = [Requirement.parse(metric, bound) for metric, bound in bounds.items()]
    metrics = {ANSWERS: 0.25, CHOSEN: -1.1, REPETITION: 0.05}
    found = find_violations(required, metrics, {ANSWERS: 0.39, CHOSEN: -1.0})
    assert found == pytest.approx(dict(zip((r.name for r in required), (0.14, -0.1, -0.05), strict=True)))
    assert describe_break(required[0].name, found[required[0].name], metrics) == "eval_exact_answers 0.25 < 0.39"
    longer = Requirement.parse(LENGTH, "<= 2 * initial + 1")
    assert longer.violation({LENGTH: 12.0}, {LENGTH: 5.0}) == 1.0
    too_high = required[2].violation({REPETITION: 0.3}, {})
    assert describe_break(required[2].name, too_high, {REPETITION: 0.3}) == "eval_repetition 0.3 > 0.1"
    close = required[0].violation({ANSWERS: 0.35361}, {ANSWERS: 0.35363})
    assert describe_break(required[0].name, close, {ANSWERS: 0.35361}) == "eval_exact_answers 0.35361 < 0.35363"


@pytest.mark.parametrize("right", range(20))
def test_a_value_at_its_bound_keeps_it_whatever_the_rounding(right: int) -> None:
    """One prompt of 20 less, a difference that binary fractions do not give: 0.4 - 0.05 > 0.35."""
    required = Requirement.parse(ANSWERS, ">= initial - 0.05")
    assert required.violation({ANSWERS: right / 20}, {ANSWERS: (right + 1) / 20}) <= 0
    above = Requirement.parse(REPETITION, "<= initial + 0.05")
    assert above.violation({REPETITION: (right + 1) / 20}, {REPETITION: right / 20}) <= 0
    assert required.violation({ANSWERS: right / 20}, {ANSWERS: (right + 2) / 20}) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("metrics", "initial"), [({}, {ANSWERS: 0.4}), ({ANSWERS: 0.4}, {}), ({ANSWERS: math.nan}, {})]
)
def test_what_was_not_measured_is_broken(metrics: dict[str, float], initial: dict[str, float]) -> None:
    required = Requirement.parse(ANSWERS, ">= initial")
    assert required.violation(metrics, initial) == math.inf
    assert describe_break(required.name, math.inf, metrics) == "eval_exact_answers was not measured"
