"""The JSON Schema takes what the loader takes, and refuses what it can see is wrong."""

from pathlib import Path

import jsonschema
import pytest

import sweeps
from orchestrator.spec.loading.serialization import schema
from orchestrator.spec.loading.validation_errors import parse_document
from tests.support.specs import as_json

VALIDATOR = jsonschema.Draft202012Validator(schema())
SHIPPED = sorted(Path(sweeps.__file__).parent.glob("*.yaml"))
HEAD = "name: a\nbase: {model: m, data: {train: a}}\n"
FINE = {
    "short": HEAD,
    "lists": "name: a\nbase: {model: m, data: {train: [a, {dataset: x, split: y}], eval: b.csv}, loss: {beta: 2}}",
    "search": HEAD + "search: {loss.beta: [1, 2.5], loss.gamma: {uniform: [0, 1], step: 0.5}}",
    "zip": HEAD + "search: {zip: [{loss.beta: [1], loss.gamma: [2]}]}",
    "when": HEAD + "search: {loss.kind: [simpo, dpo], loss.gamma: {choice: [1], when: {loss.kind: simpo}}}",
    "samplers": HEAD + "sampler: {kind: random, seed: 3}\npruner: none\nbudget: {trials: 3}",
    "guard off": HEAD + "guard: off",
    "guard": HEAD + "guard: {loss: null, repetition: off, grad_norm: {above: null}, chosen_logps: {fall: 3}}",
    "names": HEAD + "sampler: tpe\npruner: hyperband\norder: asap",
    "kinds": HEAD + "sampler: {kind: tpe, seed: 1, n_startup_trials: 8}\npruner: {kind: median, n_warmup_steps: 0.3}",
    "rungs": HEAD + "pruner: {kind: successive_halving, rungs: [10, 40]}\norder: {kind: reproducible, lag: 8}",
    "wrapped": HEAD + "pruner: {kind: patient, wrapped: median}\nwarm_start: other",
    "stages": HEAD + "sampler: {kind: staged, stages: [[training.learning_rate], [loss.beta]]}",
    "goals": HEAD + "maximize: [eval_accuracies/logp, eval_margins/logp]\nminimize: eval_nll_loss",
    "enqueue": HEAD + "enqueue: [{loss.beta: 2.5}, {loss.beta: 10, training.learning_rate: 1e-6}]",
}
WRONG = {
    "no name": ("base: {model: m, data: {train: a}}", "$"),
    "bad name": ("name: ../x\nbase: {model: m, data: {train: a}}", "$.name"),
    "unknown key": ("name: a\nbse: {}\nbase: {model: m, data: {train: a}}", "$"),
    "unknown leaf": ("name: a\nbase: {model: m, data: {train: a}, training: {learning_rat: 1}}", "$.base.training"),
    "text for a number": ("name: a\nbase: {model: m, data: {train: a}, training: {bf16: no}}", "$.base.training.bf16"),
    "unknown search": (HEAD + "search: {loss.bta: [1]}", "$.search"),
    "one value": (HEAD + "search: {loss.beta: 1}", "$.search"),
    "no kind": ("name: a\nbase: {model: m, data: {train: a}, loss: {kind: simpoo}}", "$.base.loss"),
    "sampler": (HEAD + "sampler: tpee", "$.sampler"),
    "pruner": (HEAD + "pruner: hyperbnd", "$.pruner"),
    "rung": (HEAD + "pruner: {kind: successive_halving, rungs: [a]}", "$.pruner"),
    "given": (HEAD + "enqueue: [{loss.bta: 2.5}]", "$.enqueue"),
    "guard": (HEAD + "guard: {loss: {ratio: 1}}", "$.guard"),
    "training metric": (HEAD + "maximize: loss", "$.maximize"),
    "no goal": (HEAD + "maximize: []", "$.maximize"),
    "budget": (HEAD + "budget: {trials: 0}", "$.budget"),
}


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_sweep_fits(file: Path) -> None:
    assert _errors(file.read_text()) == []


@pytest.mark.parametrize("name", FINE)
def test_shorthands_fit(name: str) -> None:
    assert _errors(FINE[name]) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_seen(name: str) -> None:
    text, path = WRONG[name]
    assert path in _errors(text)


def _errors(text: str) -> list[str]:
    return [error.json_path for error in VALIDATOR.iter_errors(as_json(parse_document(text, "f").value))]
