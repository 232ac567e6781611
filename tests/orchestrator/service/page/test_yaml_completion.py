"""Completion of sweep files by the schema, at the places where people type."""

import pytest

from orchestrator.service.page.yaml_completion import complete


def texts(yaml: str) -> list[str]:
    """What may stand at the cursor, which is `|` in the text."""
    before, _, after = yaml.partition("|")
    lines = before.split("\n")
    return [each.text for each in complete(before + after, len(lines) - 1, len(lines[-1])).candidates]


@pytest.mark.parametrize(
    ("yaml", "first"),
    [
        ("na|", "name: "),
        ("name: x\nbase:\n  mod|", "model: "),
        ("base:\n  # a comment\n\n  loss:\n    kind: simpo\n    gamma_b|", "gamma_beta_ratio: "),
        ("base:\n  loss:\n    kind: simp|", "simpo"),
        ("base: {loss: {kind: simp|", "simpo"),
        ("base:\n  training: {lr_sch|", "lr_scheduler_type: "),
        ("base:\n  training: {max_steps: 10, lr_sch|", "lr_scheduler_type: "),
        ("base:\n  data:\n    train:\n      - pa|", "path: "),
        ("base:\n  data:\n    train:\n    - path: x\n      weig|", "weight: "),
        ("search:\n  loss.bet|", "loss.beta: "),
        ("sampler: gr|", "grid"),
        ("pruner:\n  kind: med|", "median"),
        ("maximize: [eval_acc|", "eval_accuracies/logp"),
        ("base:\n  training:\n    max_steps: 3\nbud|", "budget: "),
    ],
)
def test_the_schema_completes(yaml: str, first: str) -> None:
    assert first in texts(yaml)[:6], texts(yaml)


def test_comments_and_unknown_places_are_not_completed() -> None:
    assert texts("# na|") == []
    assert texts("nothing:\n  na|") == []


def test_a_setting_comes_with_its_meaning_and_its_default() -> None:
    [found] = [each for each in complete("base:\n  loss:\n    bet", 2, 7).candidates if each.text == "beta: "]
    assert "By default" in found.about
