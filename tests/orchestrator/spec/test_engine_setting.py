"""`engine` in a sweep: a setting like any other, and TRL's gaps found before anything runs."""

from collections.abc import Callable

from orchestrator.spec.search.space import Grid
from orchestrator.spec.sweep_spec import SweepSpec

TRL = "base: {model: org/model, data: {train: rows.jsonl}, engine: trl%s}\n"


def test_the_engine_can_be_searched_and_scales_no_metric(load_text: Callable[..., SweepSpec]) -> None:
    spec = load_text("search: {engine: [packed, trl], loss.beta: [2.0, 2.5]}\nmaximize: eval_accuracies/logp\n")
    placed = [spec.search.apply(spec.base, point) for point in Grid(spec.search, spec.base)]
    expected = [("packed", 2.0), ("packed", 2.5), ("trl", 2.0), ("trl", 2.5)]
    assert [(config.engine, config.flat_params()["loss.beta"]) for config in placed] == expected
    assert load_text("search: {engine: [packed, trl]}\nminimize: eval_loss\n").search.size() == 2


def test_the_engine_is_set_from_the_command_line(load_text: Callable[..., SweepSpec]) -> None:
    text = "search: {loss.beta: [2.0, 2.5]}\nmaximize: eval_accuracies/logp\n"
    assert load_text(text, "engine=trl").base.engine == "trl"


def test_what_trl_lacks_is_said_at_its_line(findings: Callable[..., list[str]]) -> None:
    rest = "search: {loss.beta: [0.1, 0.2]}\nmaximize: eval_accuracies/logp\n"
    (messages,) = findings(rest + TRL % ", loss: {kind: orpo, nll_scale: 0.5}")
    assert "leave nll_scale at 1 and nll_prompt at true, or use engine packed" in messages
    (messages,) = findings(rest + TRL.replace("trl", "tlr") % "")
    assert "engine" in messages
    assert "packed, trl" in messages


def test_a_searched_loss_that_trl_lacks_is_said(findings: Callable[..., list[str]]) -> None:
    text = "search: {loss.loss_type: [sigmoid, hinge]}\nmaximize: eval_accuracies/logp\n" + TRL % ""
    (messages,) = findings(text)
    assert "search.loss.loss_type" in messages
    assert "no hinge form of SimPO" in messages
