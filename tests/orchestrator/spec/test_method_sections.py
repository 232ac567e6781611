"""Samplers, order, pruners, objectives and manual trials as the file says them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.loading.file_rights import FileRights
from orchestrator.spec.loading.loader import load_spec_text, load_text_with_notices
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.objectives import Objective
from orchestrator.spec.pruners import HyperbandPruner, MedianPruner, NoPruner, PatientPruner, SuccessiveHalvingPruner
from orchestrator.spec.samplers import Asap, Reproducible, StagedSampler, TpeSampler, stage_paths
from orchestrator.spec.sweep_spec import SweepSpec

Load = Callable[..., SweepSpec]
Findings = Callable[..., list[str]]
RANGES = (
    "search: {loss.beta: {uniform: [1, 4]}, training.learning_rate: {log_uniform: [1e-7, 1e-5]}}\nbudget: {trials: 9}\n"
)


def test_names_alone_and_with_their_settings(load_text: Load) -> None:
    spec = load_text(RANGES + "sampler: tpe\npruner: hyperband\norder: asap")
    assert (spec.sampler, spec.pruner, spec.order) == (TpeSampler(), HyperbandPruner(), Asap())
    spec = load_text(
        RANGES + "sampler: {kind: tpe, seed: 1, n_startup_trials: 8}\norder: {kind: reproducible, lag: 8}\n"
        "pruner: {kind: patient, patience: 2, wrapped: median}"
    )
    assert spec.sampler == TpeSampler(seed=1, n_startup_trials=8)
    assert spec.order == Reproducible(lag=8)
    assert spec.pruner == PatientPruner(patience=2, wrapped=MedianPruner())


GRID = f"search: {{training.seed: {list(range(20))}}}\n"


@pytest.mark.parametrize(
    ("text", "pruner"),
    [
        (GRID, MedianPruner()),
        (GRID + "pruner: none", NoPruner()),
        (GRID + "budget: {trials: 19}", NoPruner()),
        (GRID.replace(", 19", "") + "enqueue: [{loss.beta: 3.0}]", MedianPruner()),
        ("search: {loss.beta: [2.0, 2.5]}\nrepeats: 10", MedianPruner()),
        ("search: {loss.beta: [2.0, 2.5]}\nrepeats: 9", NoPruner()),
        (RANGES.replace("trials: 9", "hours: 2") + "sampler: tpe", MedianPruner()),
        (RANGES.replace("trials: 9", "trials: 40") + "sampler: tpe", MedianPruner()),
        (GRID + "maximize: [eval_accuracies/logp, eval_margins/logp]", NoPruner()),
        (
            "base: {model: org/model, data: {train: rows.jsonl}, evaluation: {answer_steps: 0}}\n"
            f"{GRID}minimize: eval_repetition",
            NoPruner(),
        ),
    ],
)
def test_a_large_sweep_has_the_median_pruner_unless_its_file_names_one(
    load_text: Load, text: str, pruner: object
) -> None:
    spec = load_text(text)
    assert spec.pruner == pruner
    for brief in (False, True):
        dumped = dump_spec(spec, brief=brief)
        assert ("pruner:" in dumped) == (not brief or pruner != spec.default_pruner), dumped
        assert load_text(dumped).pruner == pruner


def test_a_default_pruner_is_told_and_a_stored_sweep_without_one_has_none(tmp_path: Path) -> None:
    text = GRID + "name: a\nbase: {model: org/model, data: {train: {generated: instructions}}}"
    loaded = load_text_with_notices(text, FileRights.of_command(tmp_path))
    assert any("`pruner: none` all train to their end" in notice for notice in loaded.notices)
    assert load_spec_text(text, tmp_path, is_new=False).pruner == NoPruner()


def test_rungs_in_updates_or_shares(load_text: Load, findings: Findings) -> None:
    spec = load_text("pruner: {kind: successive_halving, rungs: [0.25, 0.5]}")
    assert spec.pruner == SuccessiveHalvingPruner(rungs=(0.25, 0.5))
    spec = load_text("pruner: {kind: hyperband, min_resource: 20}")
    assert spec.pruner == HyperbandPruner(min_resource=20)
    (messages,) = findings("pruner: {kind: successive_halving, rungs: [0.5, 20]}")
    assert "rungs are all updates or all shares" in messages
    (messages,) = findings("pruner: {kind: hyperband, min_resource: 2.5}")
    assert "2.5 is neither a number of updates (1, 2, ...) nor a share of the training" in messages


def test_a_pruner_may_compare_completions_which_every_evaluation_measures(load_text: Load) -> None:
    assert load_text("pruner: {kind: median, metric: eval_repetition}").pruner == MedianPruner(metric="eval_repetition")


WRONG = {
    "nearest": ("sampler: nsga2", "write sampler: nsgaii"),
    "nearest pruner": ("pruner: medain", "did you mean median?"),
    "setting": ("pruner: {kind: median, n_warmup: 3}", "unknown key (did you mean n_warmup_steps?)"),
    "order": ("order: fast", "order: must be one of reproducible, asap"),
    "scaled": ("pruner: {kind: median, metric: eval_rewards/margins}\n" + RANGES, "is scaled by the search"),
    "late": (
        "base: {model: org/model, data: {train: rows.jsonl}, evaluation: {answer_steps: 0}}\n"
        "pruner: {kind: median, metric: eval_repetition}",
        "with evaluation.answer_steps 0, eval_repetition is measured at the start and the end only, too late to prune",
    ),
    "no completions": (
        "base: {model: org/model, data: {train: rows.jsonl}, evaluation: {prompts: 0}}\n"
        "pruner: {kind: median, metric: eval_repetition}",
        "pruner.metric: eval_repetition is measured on greedy completions, and there are none",
    ),
    "no answers": (
        "pruner: {kind: median, metric: eval_exact_answers}",
        "the held-out rows have no correct answer",
    ),
    "no answers to judge": ("judge: {top: 2}", "judge: the held-out rows have no `answer` for the checker, the only"),
    "no side": ("pruner: {kind: median, metric: eval_lengths/chosen}", "neither better when high nor when low"),
    "which goal": ("maximize: [eval_accuracies/logp, eval_margins/logp]\npruner: median", "name the metric to compare"),
    "endless": ("search: {loss.beta: {uniform: [1, 4]}}\nsampler: tpe", "sampler tpe never ends by itself"),
    "seeds twice": (
        "search: {training.seed: [1, 2]}\nrepeats: 2",
        "repeats: each configuration gets 2 seeds, and search has training.seed too",
    ),
    "no repeats": ("repeats: 0", "repeats"),
    "nothing": ("sampler: gp\nbudget: {trials: 3}", "has nothing to search"),
    "one number": (
        "search: {loss.beta: {uniform: [1, 4]}}\nbudget: {trials: 3}\nsampler: cmaes",
        "sampler cmaes needs at least two settings",
    ),
    "one objective": (
        RANGES + "sampler: cmaes\nmaximize: [eval_accuracies/logp, eval_margins/logp]",
        "sampler cmaes needs a single objective, and this sweep has 2",
    ),
    "twice": ("maximize: eval_accuracies/logp\nminimize: [eval_accuracies/logp]", "minimize"),
    "warm": ("warm_start: other", "sampler grid does not learn from results"),
    "bounds": ("pruner: threshold", "needs lower, upper or both"),
    "no setting": (
        RANGES + "sampler: random\nenqueue: [{loss.bta: 2}]",
        "no such setting in a trial (did you mean loss.beta?)",
    ),
    "shared": (RANGES + "sampler: random\nenqueue: [{model.dtype: bfloat16}]", "is the same for all trials"),
    "illegal": (RANGES + "sampler: random\nenqueue: [{loss.beta: -2}]", "enqueue.0.loss.beta"),
    "equal": (RANGES + "sampler: random\nenqueue: [{loss.beta: 2}, {loss.beta: 2.0}]", "equals entry 0"),
    "stage": (RANGES + "sampler: {kind: staged, stages: [[loss.beta]]}", "missing: training.learning_rate"),
    "paired": ("pruner: {kind: patient, wrapped: wilcoxon}", "cannot be wrapped"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_line(findings: Findings, name: str) -> None:
    text, expected = WRONG[name]
    messages = findings(text)
    assert any(expected in one for one in messages), messages
    assert all(one.startswith("sweep.yaml:") for one in messages)


def test_several_goals_in_both_directions(load_text: Load) -> None:
    spec = load_text("maximize: [eval_accuracies/logp, eval_margins/logp]\nminimize: eval_nll_loss")
    assert spec.objectives == (
        Objective(metric="eval_accuracies/logp", direction="maximize"),
        Objective(metric="eval_margins/logp", direction="maximize"),
        Objective(metric="eval_nll_loss", direction="minimize"),
    )


def test_given_trials_may_lie_outside(load_text: Load) -> None:
    spec = load_text(RANGES + "sampler: random\nenqueue:\n- {loss.beta: 10}\n- {training.learning_rate: 6e-7}")
    assert spec.enqueue == ({"loss.beta": 10}, {"training.learning_rate": 6e-7})


RATED, BETA, RATE = "training.learning_rate", "loss.beta: [2, 10]", "training.learning_rate: [3e-7, 1e-6]"
DECAY, STEPS = "training.weight_decay: [0.0, 0.1]", "training.max_steps: [5, 9]"


@pytest.mark.parametrize(
    ("search", "wanted"),
    [
        (f"{BETA}, loss.gamma_beta_ratio: [0.3, 0.5], {RATE}", ((RATED,), ("loss.gamma_beta_ratio",), ("loss.beta",))),
        (f"{DECAY}, {BETA}, {STEPS}", (("loss.beta",), ("training.weight_decay",), ("training.max_steps",))),
        (f"zip: [{{{BETA}, {RATE}}}], loss.gamma: [1.0, 2.0]", (("loss.beta", RATED), ("loss.gamma",))),
    ],
)
def test_stages_by_what_is_searched(load_text: Load, search: str, wanted: Any) -> None:
    spec = load_text(f"search: {{{search}}}\nsampler: staged")
    assert isinstance(spec.sampler, StagedSampler)
    assert stage_paths(spec.sampler, spec.search) == wanted


def test_storage_is_a_key_of_the_file(load_text: Load) -> None:
    spec = load_text("storage: postgresql+psycopg://user@host/db")
    assert spec.storage == "postgresql+psycopg://user@host/db"
    assert "storage: postgresql+psycopg://user@host/db" in dump_spec(spec)
