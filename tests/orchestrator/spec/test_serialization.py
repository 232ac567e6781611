"""What `dump` writes is what `load` reads, and other readers of YAML read the same."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec, sweep_identity
from orchestrator.spec.loading.validation_errors import parse_document
from orchestrator.spec.sweep_spec import SweepSpec
from tests.support.specs import as_json

TEXT = st.one_of(
    st.sampled_from(
        ["no", "on", "6e-7", "0o17", "~", "null", "1_000", "2001-01-01", "a: b", "- x", "#", "'", "é", " x ", ""]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
RATES = st.floats(1e-12, 1.0, allow_subnormal=False)
BETAS = st.floats(1e-6, 1e6)
DIMENSIONS = st.fixed_dictionaries(
    {},
    optional={
        "loss.beta": st.builds(lambda v: {"choice": v}, st.lists(BETAS, min_size=1, max_size=3)),
        "loss.gamma": st.builds(lambda low, more: {"uniform": (low, low + more)}, st.floats(0, 9), st.floats(0.5, 9)),
        "training.learning_rate": st.builds(lambda low: {"log_uniform": (low, 2 * low)}, RATES),
        "training.seed": st.builds(
            lambda low, n, s: {"int_uniform": (low, low + n * s), "step": s}, *[st.integers(1, 99)] * 3
        ),
        "training.bf16": st.just({"choice": (True, False)}),
    },
)
SAMPLERS = st.one_of(
    st.builds(lambda seed: {"kind": "random", "seed": seed}, st.integers(0, 2**40)),
    st.builds(lambda seed: {"kind": "tpe", "seed": seed, "n_startup_trials": 3}, st.integers(0, 9)),
    st.sampled_from([{"kind": "qmc"}, {"kind": "nsgaii", "population_size": 4}]),
)
PRUNERS = st.sampled_from(
    [
        {"kind": "none"},
        {"kind": "hyperband", "min_resource": 7, "metric": "eval_accuracies/logp"},
        {"kind": "successive_halving", "rungs": (0.25, 0.5), "metric": "eval_accuracies/logp"},
        {"kind": "patient", "wrapped": {"kind": "median"}, "metric": "eval_nll_loss"},
    ]
)


@st.composite
def specs(draw: st.DrawFn) -> SweepSpec:
    base: dict[str, Any] = {
        "model": {
            "name_or_path": "org/" + draw(st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)),
            "revision": draw(TEXT),
        },
        "data": {"train": ({"dataset": draw(TEXT.filter(bool)), "split": "train", "columns": {"prompt": draw(TEXT)}},)},
        "loss": draw(
            st.one_of(
                st.builds(lambda b: {"kind": "simpo", "beta": b}, BETAS),
                st.builds(lambda g: {"kind": "simpo", "gamma_beta_ratio": g}, st.floats(0, 5)),
            )
        ),
        "training": {"learning_rate": draw(RATES), "max_steps": draw(st.none() | st.integers(1, 10**9))},
        "lora": draw(
            st.none() | st.builds(lambda m: {"target_modules": m}, st.sampled_from(["all-linear", ("no", "q_proj")]))
        ),
    }
    dimensions = draw(DIMENSIONS)
    zipped = draw(st.sampled_from([(), ({"training.warmup_ratio": (0.0, 0.1), "training.max_grad_norm": (1.0, 0.0)},)]))
    return SweepSpec.model_validate(
        {
            "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
            "description": draw(TEXT),
            "base": base,
            "search": {"dimensions": dimensions, "zipped": zipped},
            "sampler": draw(SAMPLERS) if dimensions or zipped else {"kind": "random"},
            "order": draw(st.sampled_from([{"kind": "asap"}, {"kind": "reproducible", "lag": 7}])),
            "pruner": draw(PRUNERS),
            "also": draw(st.sampled_from([(), ({"metric": "eval_nll_loss", "direction": "minimize"},)])),
            "goal": {"metric": "eval_accuracies/logp", "direction": "maximize"},
            "budget": {"trials": draw(st.integers(1, 99)), "hours": draw(st.none() | st.floats(1e-3, 1e3))},
            "keep_models": draw(st.integers(1, 9)),
        }
    )


@given(specs())
@settings(max_examples=40, deadline=None)
def test_a_sweep_survives_its_file(spec: SweepSpec) -> None:
    text = dump_spec(spec)
    again = load_spec_text(text, Path("/"))
    assert again == spec
    assert sweep_identity(again) == sweep_identity(spec)
    assert dump_spec(again) == text
    # YAML 1.1's readers, PyYAML among them, see the same values.
    assert as_json(parse_document(text, "f").value) == yaml.safe_load(text)


def test_the_hash_is_of_the_meaning(load_text: Any) -> None:
    one = load_text("search: {loss.beta: [2, 2.5]}")
    same = load_text("# a comment\nsearch:\n  loss.beta: {choice: [2.0, 2.5]}\n")
    other = load_text("search: {loss.beta: [2, 2.6]}")
    assert sweep_identity(one) == sweep_identity(same) != sweep_identity(other)
