import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import ExitCode, SpecError
from orchestrator.spec.guard_config import GuardConfig
from orchestrator.spec.loading.loader import load_spec, load_spec_text, load_with_notices
from orchestrator.spec.loading.serialization import dump_spec, sweep_identity
from orchestrator.spec.samplers import RandomSampler
from orchestrator.spec.search.manual_trials import resolve_params
from orchestrator.spec.search.space import Grid
from orchestrator.spec.sweep_spec import Budget, Finalists, GridSampler, Objective, SweepSpec
from orchestrator.study.sweep_terms import allowed_changes
from trainer.config.loss_config import DpoLoss, SimpoLoss
from trainer.config.trial import FileSource, GeneratedSource, HubSource, TrialConfig
from trainer.metrics import COMPARISON_METRIC

Load = Callable[..., SweepSpec]
Refused = Callable[..., list[str]]
WRONG = """\
name: ../x
base:
  model: foo/bar
  data:
    train:
      - path: b.jsonl
      - {dataset: x, splt: y}
      - {datset: x}
    bad_rows: no
  loss: {kind: simpoo, beta: 2}
  training:
    learning_rat: 1e-6
    bf16: no
    max_steps: 1.5
    seed: "3"
  lora: {r: 0}
search:
  loss.bta: [2, 2.5]
  loss.gamma: [0.3, 0.5]
  loss.gamma_beta_ratio: [1]
  training.learning_rate:
    log_uniform: [3e-7]
  zip:
    - {training.seed: [1, 2], loss.beta: 1}
sampler: tpee
budget: {trials: 0, houres: 3}
maximize: eval_loss
keep_models: 0
pruner: hyperbnd
trials: 4
"""
SAID = """\
f:1: name: the text '../x' must be 1 to 64
f:6: base.data.train.0.path: there is no file b.jsonl
f:7: base.data.train.1.split: is required
f:7: base.data.train.1.splt: unknown key (did you mean split?)
f:8: base.data.train.2: needs exactly one of path, dataset, generated; it has datset (did you mean dataset?)
f:9: base.data.bad_rows: must be one of refuse, skip; not the text 'no'
f:10: base.loss: must be one of simpo, dpo,
f:12: base.training.learning_rat: unknown key (did you mean learning_rate?)
f:13: base.training.bf16: must be true or false, not the text 'no'
f:14: base.training.max_steps: must be a whole number, not 1.5
f:15: base.training.seed: must be a whole number, not the text '3'
f:16: base.lora.r: must be at least 1, not 0
f:18: search.loss.bta: there is no such setting in a trial (did you mean loss.beta?)
f:20: search.loss.gamma_beta_ratio: is the same margin as loss.gamma
f:22: search.training.learning_rate.log_uniform.1: is missing
f:24: search.zip.0.loss.beta: must be a list of values, not 1
f:25: sampler: must be one of grid, random, qmc, tpe, gp, cmaes, nsgaii, staged; not the text 'tpee' (did you mean tpe?)
f:26: budget.trials: must be at least 1, not 0
f:26: budget.houres: unknown key (did you mean hours?)
f:27: maximize: eval_loss is scaled by the search
f:28: keep_models: must be at least 1, not 0
f:29: pruner: must be one of none, hyperband, successive_halving, median, percentile, threshold, wilcoxon, patient
f:30: trials: unknown key"""


def test_everything_wrong_is_said_at_once_each_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec_text(WRONG, tmp_path, source="f")
    assert caught.value.code is ExitCode.USER
    messages = [str(finding) for finding in caught.value.problems]
    expected = SAID.splitlines()
    for line, (one, start) in enumerate(zip(messages, expected, strict=False)):
        assert one.startswith(start), (line, one)
    assert len(messages) == len(expected)


def test_the_shortest_sweep(load_text: Load, folder: Path) -> None:
    spec = load_text("")
    assert spec.base.data.train == (FileSource(path=str(folder / "rows.jsonl")),)
    assert spec.base.model.name_or_path == "org/model"
    assert spec.goal == Objective(metric=COMPARISON_METRIC, direction="maximize")
    assert spec.sampler == GridSampler()
    assert spec.search.size() == 1


def test_shorthands(load_text: Load) -> None:
    long = """
base:
  model: {name_or_path: org/model}
  data: {train: [{path: rows.jsonl}], eval: [{path: rows.jsonl}]}
  loss: {kind: simpo, beta: 2.0}
search: {loss.beta: {choice: [2.0, 2.5]}}
sampler: {kind: random}
pruner: {kind: none}
budget: {trials: 3}
"""
    short = """
base: {model: org/model, data: {train: rows.jsonl, eval: rows.jsonl}, loss: {beta: 2}}
search: {loss.beta: [2, 2.5]}
sampler: random
pruner: none
budget: {trials: 3}
"""
    assert load_text(long) == load_text(short)
    assert load_text(short).sampler == RandomSampler()


def test_the_guard_is_on_and_each_rule_can_be_turned_off(load_text: Load, findings: Refused) -> None:
    assert load_text("search: {loss.beta: [1]}").guard == GuardConfig()
    off = load_text("guard: off").guard
    assert off == load_text("guard: false").guard
    assert all(getattr(off, rule) is None for rule in GuardConfig.model_fields)
    some = load_text("guard: {loss: off, repetition: null, chosen_logps: {fall: 3}}").guard
    assert (some.loss, some.repetition, some.grad_norm) == (None, None, GuardConfig().grad_norm)
    assert (some.chosen_logps.fall, some.chosen_logps.lowest) == (3.0, -10.0)
    assert findings("guard: of") == [
        "sweep.yaml:1: guard: must be off, or a mapping of loss, grad_norm, chosen_logps, repetition, answer_length"
    ]
    assert findings("guard: {los: null, loss: {ratio: 0.5}}") == [
        "sweep.yaml:1: guard.loss.ratio: must be greater than 1, not 0.5",
        "sweep.yaml:1: guard.los: unknown key (did you mean loss?)",
    ]


def test_sources_of_every_kind(load_text: Load) -> None:
    spec = load_text("""
base:
  model: org/model
  data:
    train:
      - rows.jsonl
      - {dataset: org/pairs, split: train, columns: {prompt: question}}
      - {generated: instructions, rows: 10}
""")
    assert [type(source) for source in spec.base.data.train] == [FileSource, HubSource, GeneratedSource]


def test_the_papers_gamma_goes_through_every_door(load_text: Load) -> None:
    spec = load_text("search: {loss.beta: [3.14159], loss.gamma: [1.0]}")
    params = spec.search.grid_index().params_at(0)
    config = TrialConfig.model_validate_json(spec.search.apply(spec.base, params).model_dump_json())
    assert isinstance(config.loss, SimpoLoss)
    assert config.loss.beta == 3.14159
    assert config.flat_params()["loss.beta"] == 3.14159
    assert config.flat_params()["loss.gamma_beta_ratio"] == 1.0 / 3.14159


# --- files -----------------------------------------------------------------------------------------------------------
def test_files_are_found_from_the_sweeps_folder_then_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
        (folder / "both.jsonl").write_text("{}")
    (here / "only.jsonl").write_text("{}")
    (there / "s.yaml").write_text("name: a\nbase: {model: m/m, data: {train: both.jsonl, eval: only.jsonl}}\n")
    monkeypatch.chdir(here)
    data = load_spec(there / "s.yaml").base.data
    assert data.train == (FileSource(path=str(there / "both.jsonl")),)
    assert data.eval == (FileSource(path=str(here / "only.jsonl")),)
    # A name typed on the command line means the folder it is typed in.
    data = load_spec(there / "s.yaml", ["data.train=both.jsonl"]).base.data
    assert data.train == (FileSource(path=str(here / "both.jsonl")),)


def test_a_missing_file_names_its_neighbour(findings: Refused) -> None:
    (messages,) = findings("name: a\nbase:\n  model: m/m\n  data: {train: rows.json}\n")
    assert messages.startswith("sweep.yaml:4: base.data.train: there is no file rows.json (did you mean rows.jsonl?)")


def test_errors_name_settings_as_the_file_writes_them(findings: Refused, folder: Path) -> None:
    """Short forms are no other settings, and a single source has no position in a list."""
    found = findings(
        "base:\n  model: ./nowhere\n  data:\n    train:\n      path: rows.jsonl\n      wieght: 2\n"
        "    eval: [rows.jsonl, none.jsonl]\nsft:\n  data: {train: none.jsonl}\njudge:\n  reward_model: ./nothing\n"
    )
    at = [": ".join(each.split(": ")[:2]) for each in found]
    assert at == [
        "sweep.yaml:2: base.model",
        "sweep.yaml:6: base.data.train.wieght",
        "sweep.yaml:7: base.data.eval.1",
        "sweep.yaml:9: sft.data.train",
        "sweep.yaml:11: judge.reward_model",
    ]
    given = ("model=./nowhere", "data.train=none.jsonl", "data.eval=[none.jsonl]", "data.eval.0.weight=-1")
    file = folder / "s.yaml"
    file.write_text("name: a\nbase: {model: m/m, data: {train: [rows.jsonl, rows.jsonl]}}\n")
    with pytest.raises(SpecError) as refused:
        load_spec(file, given)
    paths = {problem.where: problem.path for problem in refused.value.problems}
    assert paths == {
        f"--set {one}": f"base.{path}"
        for one, path in zip(given, ("model", "data.train", "data.eval.0", "data.eval.0.weight"), strict=True)
    }


@pytest.mark.parametrize("name", ['"a\\0b"', "x" * 5000, "~nobody-here/x", "/", "/proc/self/mem/x"])
def test_names_that_no_file_has(findings: Refused, name: str) -> None:
    (messages,) = findings(f"base: {{model: m/m, data: {{train: {name}}}}}")
    assert "there is no file" in messages
    (messages, *_) = findings(f"base: {{model: {name}, data: {{train: nothing}}}}")
    assert messages.startswith("sweep.yaml:1: ")


def test_a_model_is_a_folder_where_there_is_one(load_text: Load, findings: Refused, folder: Path) -> None:
    (folder / "org").mkdir()
    (folder / "org" / "model").mkdir()
    assert load_text("").base.model.name_or_path == str(folder / "org" / "model")
    (messages,) = findings("base: {model: ./nothing, data: {train: rows.jsonl}}")
    assert "there is no ./nothing" in messages


# --- objectives -----------------------------------------------------------------------------------------------------
SEEDS, KINDS, SHARED = "training.seed: [1, 2]", "loss.kind: [simpo, dpo]", COMPARISON_METRIC


@pytest.mark.parametrize(
    ("search", "goal", "said"),
    [
        ("loss.beta: [1, 2]", "maximize: eval_rewards/margins", "0.69 to 2.75"),
        ("loss.beta: [1, 2]", "minimize: eval_loss", f"use eval_rewards/accuracies, eval_margins/logp, {SHARED}"),
        ("loss.gamma_beta_ratio: [1, 2]", "maximize: eval_rewards/chosen", "is scaled by the search"),
        (KINDS, "maximize: eval_rewards/accuracies", f"use a comparison metric that all kinds share: {SHARED}"),
        ("loss.kind: [simpo, orpo]", "maximize: eval_log_odds_chosen", "is measured with loss.kind orpo only"),
        (SEEDS, "maximize: eval_log_odds_ratio", "orpo only"),
        (SEEDS, "maximize: rewards/margins", "use eval_rewards/margins, on held-out pairs"),
        (SEEDS, "maximize: eval_accuracy/logp", "did you mean eval_accuracies/logp?"),
        (SEEDS, "maximize: grad_norm", "there is no metric"),
        (SEEDS, "maximize: eval_nll_loss", "better when low (write minimize:)"),
        (SEEDS, "maximize: 3", "must be the name of a metric"),
        (SEEDS, "maximize: eval_exact_answers", "have no correct answer"),
        (SEEDS, f"maximize: {SHARED}\nminimize: {SHARED}", "is an objective already"),
    ],
)
def test_goals_that_cannot_rank(findings: Refused, search: str, goal: str, said: str) -> None:
    (found,) = findings(f"search: {{{search}}}\n{goal}\n")
    assert said in found
    assert found.startswith("sweep.yaml:" + ("3" if "minimize" in goal and "maximize" in goal else "2"))


@pytest.mark.parametrize(
    ("search", "goal"),
    [
        ("training.learning_rate: [1e-6, 1e-5]", "minimize: eval_loss"),
        ("loss.beta: [1, 2]", "maximize: eval_margins/logp"),
        ("loss.kind: [simpo, dpo]", f"maximize: {COMPARISON_METRIC}"),
    ],
)
def test_goals_that_can(load_text: Load, search: str, goal: str) -> None:
    assert goal.endswith(load_text(f"search: {{{search}}}\n{goal}\n").goal.metric)


@pytest.mark.parametrize(
    "leaf",
    [
        "data.max_length: [128, 256]",
        "evaluation.prompts: [2, 4]",
        "data.eval_share: [0.1]",
        "data.confirm_share: [0.1]",
    ],
)
def test_what_is_held_out_cannot_be_searched(findings: Refused, leaf: str) -> None:
    (found,) = findings(f"search: {{{leaf}}}\n")
    assert "cannot be ranked" in found
    assert found.startswith("sweep.yaml:1")


def test_answers_need_prompts(findings: Refused, load_text: Load) -> None:
    text = "base: {{model: m/m, data: {{train: {{generated: instructions}}}}, evaluation: {{prompts: {}}}}}\n"
    objective = "maximize: eval_exact_answers\n"
    (messages,) = findings(text.format(0) + objective)
    assert "set base.evaluation.prompts above 0" in messages
    assert load_text(text.format(2) + objective).goal.metric == "eval_exact_answers"


# --- finalists ------------------------------------------------------------------------------------------------------
def test_finalists_keep_half_of_the_held_out_prompts_unless_the_file_says_otherwise(load_text: Load) -> None:
    base = "base: {{model: m/m, data: {{train: {{generated: instructions}}{}}}}}\n"
    spec = load_text("finalists: {top: 2}\n" + base.format(""))
    assert (spec.finalists, spec.base.data.confirm_share) == (Finalists(top=2, seeds=4), 0.5)
    assert load_text(dump_spec(spec)) == spec
    assert load_text("finalists: {}\n" + base.format(", confirm_share: 0.2")).base.data.confirm_share == 0.2
    without = load_text(base.format(""))
    assert (without.finalists, without.base.data.confirm_share) == (None, None)
    written = dump_spec(without) + without.model_dump_json()
    assert "confirm" not in written, "as before there were finalists"
    assert "finalists" not in written


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("finalists: {tops: 3}\n", "did you mean top?"),
        ("finalists: {seeds: 1}\n", "2"),
        ("finalists: 3\n", "mapping"),
        ("base: {model: m/m, data: {train: {generated: instructions}, confirm_share: 1.0}}\n", "must be less than 1"),
        (
            "base: {model: m/m, data: {train: {generated: instructions}, confirm_share: 0.5, eval_on: confirm}}\n",
            "the held-out rows that are kept for finalists (leave it out)",
        ),
    ],
)
def test_what_is_wrong_about_finalists_is_said_with_its_line(findings: Refused, text: str, said: str) -> None:
    (found,) = findings(text)
    assert found.startswith("sweep.yaml:1")
    assert said in found


# --- samplers, budget ------------------------------------------------------------------------------------------------
def test_a_grid_needs_an_end(findings: Refused, load_text: Load) -> None:
    rate = "search:\n  training.learning_rate: {log_uniform: [1e-7, 1e-5]}\n"
    (messages,) = findings(rate)
    assert messages.startswith("sweep.yaml:2: search.training.learning_rate: the grid sampler needs a list")
    (messages,) = findings(rate + "sampler: random\n")
    assert "give budget.trials, budget.hours or budget.gpu_hours" in messages
    assert load_text(rate + "sampler: random\nbudget: {hours: 2}\n").search.size() is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("loss.beta: 2.0", "must be a list of values or a range, not 2.0 (for one value: [2.0])"),
        ("loss.beta: []", "the list is empty"),
        ("loss.beta: [[1]]", "search.loss.beta.0: a searched value is a number, text, true, false or null"),
        ("loss.beta: {uniform: [1, 2], choice: [1]}", "needs exactly one of choice, uniform, log_uniform, int_uniform"),
        ("loss.beta: {unifrom: [1, 2]}", "needs exactly one of"),
        ("loss: [1]", "is a group of settings"),
        ("lora.r: [8]", "lora is null (give base.lora first)"),
        ("data.train: [a]", "is a list, which cannot be searched"),
        ("loss.beta: [2.0, -1.0]", "search.loss.beta.1: must be greater than 0, not -1.0"),
        ("loss.beta: ['2.0']", "write 2.0"),
        ("loss.gamma: {choice: [1], when: {loss.kind: simpo}}", "which is not searched"),
    ],
)
def test_searches_refused(findings: Refused, line: str, said: str) -> None:
    (found,) = findings(f"search:\n  {line}\n")
    assert said in found
    assert found.startswith("sweep.yaml:2: ")


def test_the_line_of_a_bad_value(findings: Refused) -> None:
    (found,) = findings("search:\n  loss.beta:\n    - 2.0\n    - -1.0\n")
    assert found.startswith("sweep.yaml:4: ")


# --- --set -----------------------------------------------------------------------------------------------------------
def test_set_reaches_every_leaf(load_text: Load) -> None:
    spec = load_text(
        "search: {loss.gamma: [1.0]}",
        *("loss.beta=3.14159", "training.max_steps=3", "budget.trials=4", "search.training.seed=[1,2]"),
        *("search.loss.gamma=null", "data.train.0.weight=2", "lora.r=8", "minimize=eval_nll_loss"),
    )
    assert isinstance(spec.base.loss, SimpoLoss)
    assert spec.base.loss.beta == 3.14159
    assert (spec.base.training.max_steps, spec.budget.trials) == (3, 4)
    assert spec.search.paths == ("training.seed",)
    assert (spec.base.data.train[0].weight, spec.base.lora.r) == (2.0, 8)
    assert spec.goal == Objective(metric="eval_nll_loss", direction="minimize")


def test_set_fixes_what_was_searched(folder: Path) -> None:
    file = folder / "s.yaml"
    file.write_text(
        "name: a\nbase: {model: m/m, data: {train: rows.jsonl}, loss: {gamma_beta_ratio: 0.5, beta: 3}}\n"
        "search:\n  loss.kind: [simpo, dpo]\n  loss.label_smoothing: {choice: [0.1], when: {loss.kind: simpo}}\n"
    )
    loaded = load_with_notices(file, ["loss.kind=dpo"])
    assert loaded.spec.base.loss == DpoLoss()
    assert loaded.spec.search.paths == ()
    assert any("was searched and is now fixed" in notice for notice in loaded.notices)
    loaded = load_with_notices(file, ["loss.kind=simpo", "loss.gamma=1.2"])
    assert loaded.spec.base.loss == SimpoLoss(beta=3.0, gamma=1.2)
    assert loaded.spec.search.paths == ("loss.label_smoothing",)
    assert any("replaces loss.gamma_beta_ratio" in notice for notice in loaded.notices)


def test_a_shorthand_that_is_set_can_be_set_further(load_text: Load, folder: Path) -> None:
    spec = load_text("", "model=org/other", "model.dtype=bfloat16", "data.train=rows.jsonl", "data.train.0.weight=2.0")
    assert (spec.base.model.name_or_path, spec.base.model.dtype) == ("org/other", "bfloat16")
    assert spec.base.data.train == (FileSource(path=str(folder / "rows.jsonl"), weight=2.0),)
    spec = load_text(
        "judge: {reward_model: org/judge}", "judge.reward_model=org/other", "judge.reward_model.dtype=bfloat16"
    )
    assert spec.judge is not None
    assert spec.judge.reward_model is not None
    assert (spec.judge.reward_model.name_or_path, spec.judge.reward_model.dtype) == ("org/other", "bfloat16")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("loss.bta=1", "base.loss.bta: unknown key (did you mean beta?)"),
        ("los.beta=1", "unknown key (did you mean loss?)"),
        ("loss.beta", "must be PATH=VALUE"),
        ("=3", "must be PATH=VALUE"),
        ("loss.beta=[1", "while parsing"),
        ("loss.beta=no", "must be a number, not the text 'no'"),
        ("loss.beta=.inf", "not a finite number"),
        ("budget.tials=4", "did you mean trials?"),
        ("search.loss.beta=[-1]", "must be greater than 0"),
        ("data.train.7.weight=1", "a list of 1 has no entry 7"),
        ("maximize=eval_lss", "did you mean eval_loss?"),
    ],
)
def test_set_is_blamed_for_its_own(findings: Refused, flag: str, said: str) -> None:
    (found,) = findings("", flag)
    assert found.startswith(f"--set {flag}: ")
    assert said in found


def test_both_margins_in_one_file(findings: Refused) -> None:
    (messages,) = findings("base: {model: m/m, data: {train: rows.jsonl}, loss: {gamma: 1.0, gamma_beta_ratio: 0.5}}")
    assert "give one of them" in messages


# --- shared anchors, lists as values, the grid's order ---------------------------------------------------------------
def test_blocks_that_begin_with_x_hold_shared_anchors_and_are_no_part_of_the_sweep(
    load_text: Load, findings: Refused
) -> None:
    spec = load_text("""
x-training: &training {learning_rate: 1e-5, max_steps: 20}
x-notes: [anything, {at: all}]
base:
  model: org/model
  data: {train: rows.jsonl}
  training: {<<: *training, seed: 3}
sft: {training: *training}
""")
    assert (spec.base.training.learning_rate, spec.base.training.seed) == (1e-5, 3)
    assert spec.sft is not None
    assert (spec.sft.training.learning_rate, spec.sft.training.max_steps) == (1e-5, 20)
    text = dump_spec(spec)
    assert "x-" not in text
    (found,) = findings("x-a: &a\n  bf16: 3\nbase:\n  model: m/m\n  data: {train: rows.jsonl}\n  training: {<<: *a}\n")
    assert found.startswith("sweep.yaml:2: base.training.bf16: must be true or false")
    (found,) = findings("base: {model: m/m, data: {train: rows.jsonl}, x-a: 1}")
    assert "base.x-a: unknown key" in found


LISTS = """
base: {model: org/model, data: {train: rows.jsonl}, lora: {}, loss: {kind: dpo}}
search:
  lora.target_modules: [[q_proj, v_proj], all-linear, ["7", k.proj]]
  loss.loss_type: {choice: [[sigmoid, sft], ipo]}
enqueue: [{lora.target_modules: [o_proj]}]
"""


def test_settings_that_are_lists_can_be_searched_and_enqueued(load_text: Load, folder: Path) -> None:
    spec = load_text(LISTS)
    modules = ("[q_proj, v_proj]", "all-linear", '["7", "k.proj"]')
    assert spec.search.choices("lora.target_modules") == modules
    tried = [spec.search.apply(spec.base, point) for point in Grid(spec.search, spec.base)]
    assert len(tried) == 6
    expected = [("q_proj", "v_proj"), "all-linear", ("7", "k.proj")]
    assert [config.lora and config.lora.target_modules for config in tried[::2]] == expected
    assert isinstance(tried[0].loss, DpoLoss)
    assert tried[0].loss.loss_type == ("sigmoid", "sft")
    (given,) = spec.enqueue
    assert resolve_params(spec.base, spec.search, given)["lora.target_modules"] == "[o_proj]"
    written = dump_spec(spec)
    assert "  - [q_proj, v_proj]\n" in written
    assert load_spec_text(written, folder) == spec


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lora.target_modules: [q_proj, v_proj]", "for lists write [[q_proj, v_proj]]"),
        ("lora.target_modules: [[q_proj, [x]]]", "a searched value is a number, text, true, false or null, not a list"),
        ("lora.target_modules: [[1]]", "search.lora.target_modules.0: "),
        ("lora.r: [[8]]", "a searched value is a number, text, true, false or null, not a list"),
    ],
)
def test_values_that_are_no_list_of_the_setting(findings: Refused, line: str, said: str) -> None:
    base = "base: {model: org/model, data: {train: rows.jsonl}, lora: {}}"
    found = findings(f"search:\n  {line}\n{base}\n")
    assert all(one.startswith("sweep.yaml:2: ") for one in found)
    assert any(said in one for one in found), found


WIDE = "search: {loss.beta: [1, 2, 3, 4], training.seed: [1, 2]}\n"


def test_a_grid_that_its_budget_ends_early_is_shuffled_unless_the_file_says_its_order(load_text: Load) -> None:
    def order(text: str) -> str | None:
        sampler = load_text(WIDE + text).sampler
        assert isinstance(sampler, GridSampler)
        return sampler.order

    assert order("budget: {trials: 4}") == "shuffled"
    assert order("budget: {trials: 4}\nsampler: {kind: grid, seed: 7}") == "shuffled"
    assert order("budget: {trials: 8}\nenqueue: [{loss.beta: 9}]") == "shuffled"
    for whole in (
        "",
        "budget: {trials: 8}",
        "budget: {hours: 1}",
        "budget: {trials: 8}\nenqueue: [{loss.beta: 4, training.seed: 1}]",
    ):
        assert order(whole) is None
    assert order("budget: {trials: 4}\nsampler: {kind: grid, order: file}") == "file"
    assert order("sampler: {kind: grid, order: shuffled}") == "shuffled"


def test_a_begun_sweep_keeps_its_order_whatever_its_budget_becomes(load_text: Load, folder: Path) -> None:
    for trials in (None, 3):
        begun = load_text(WIDE).model_copy(update={"budget": Budget(trials=trials)})
        resumed = load_spec_text(dump_spec(begun), folder, ["budget.trials=2"])
        assert allowed_changes(begun, resumed)
        assert resumed.sampler == GridSampler()
    shuffled = load_text(WIDE + "budget: {trials: 4}")
    resumed = load_spec_text(dump_spec(shuffled), folder, ["budget.trials=100"])
    assert resumed.sampler == GridSampler(order="shuffled")
    old = SweepSpec.from_stored(without_order(shuffled))
    assert old.sampler == GridSampler()
    assert (
        sweep_identity(old)
        == sweep_identity(old.model_copy(update={"sampler": GridSampler()}))
        != sweep_identity(shuffled)
    )


def without_order(spec: SweepSpec) -> str:
    """The spec as versions without `sampler.order` stored it."""
    return json.dumps(json.loads(spec.model_dump_json()) | {"sampler": {"kind": "grid"}})
