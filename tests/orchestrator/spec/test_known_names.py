"""Names of Trainer, TRL, peft, W&B, Ray, Optuna and LLaMA-Factory, each answered with the form to write here."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from peft import LoraConfig
from ray import tune
from transformers import TrainingArguments
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

from orchestrator.spec.loading import known_names, right_forms
from orchestrator.spec.loading.loader import load_with_notices
from orchestrator.spec.loading.method_sections import PRUNERS, SAMPLERS
from orchestrator.spec.loading.range_forms import is_whole_number
from orchestrator.spec.loading.serialization import schema
from orchestrator.spec.loading.validation_errors import parse_document
from orchestrator.spec.search.trial_params import config_paths
from orchestrator.spec.sweep_spec import SECTION_ORDER, SweepSpec
from trainer.config.trial import TrainingConfig

Load = Callable[..., SweepSpec]
Refused = Callable[..., list[str]]
CONFIGS = (
    TrainingArguments, DPOConfig, CPOConfig, ORPOConfig, SFTConfig, ModelConfig, ScriptArguments, LoraConfig,
)  # fmt: skip
CALLS = (tune.TuneConfig, tune.RunConfig, optuna.create_study, optuna.Study.optimize)
WANDB = """
program method metric parameters early_terminate command project entity run_cap distribution values value min max goal
count sweep_name
"""
LLAMA_FACTORY = """
model_name_or_path adapter_name_or_path quantization_bit quantization_method double_quantization stage do_train
finetuning_type lora_rank lora_alpha lora_dropout lora_target additional_target pref_beta pref_loss pref_ftx
simpo_gamma dpo_label_smoothing ref_model dataset dataset_dir eval_dataset template cutoff_len max_samples
overwrite_cache preprocessing_num_workers train_on_prompt mask_history packing neat_packing streaming val_size
flash_attn rope_scaling use_unsloth plot_loss output_dir pure_bf16 ddp_timeout report_to cache_dir
"""
OTHERS = "lr batch_size epochs steps warmup seeds wandb_project dataloader_num_workers hub_model_id push_to_hub"
IN_A_RANGE = {"distribution", "values", "value", "min", "max"}
"""W&B's keys of one parameter, which stand in `search`."""


def names() -> list[str]:
    found = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    found |= {name for call in CALLS for name in inspect.signature(call).parameters} - {"self"}
    return sorted((found | set(f"{WANDB} {LLAMA_FACTORY} {OTHERS}".split())) - {*SECTION_ORDER} - IN_A_RANGE)


def test_every_name_of_the_other_tools_is_answered_at_the_top_and_under_training(findings: Refused) -> None:
    assert len(names()) > 250
    unanswered: list[str] = []
    top = findings("".join(f"{name}: 1\n" for name in names()))
    below = findings(
        "base:\n  model: m/m\n  data: {train: rows.jsonl}\n  training:\n"
        + "".join(f"    {name}: 1\n" for name in names() if name not in TrainingConfig.model_fields)
    )
    for found in (top, below):
        for one in found:
            assert ": unknown key (" in one, one
            if re.search(r"\((did you mean|valid:)", one):
                unanswered.append(one)
    assert not unanswered
    assert len(top) == len(names())


def known_paths() -> set[str]:
    properties = schema()["properties"]
    sections: set[str] = set()
    for section in SECTION_ORDER:
        sections.add(section)
        for branch in (properties[section], *properties[section].get("anyOf", ())):
            model = schema()["$defs"].get(branch.get("$ref", "").rpartition("/")[2], {})
            sections |= {f"{section}.{key}" for key in model.get("properties", ())}
    return sections | {*config_paths(), "data.train", "data.eval", "model", "sft.training"}


def test_the_table_names_only_settings_methods_and_losses_that_exist(load_text: Load) -> None:
    paths = known_paths()
    assert {path for path in known_names.SETTINGS.values() if path not in paths} == set()
    assert {kind for kind in known_names.METHODS.values() if kind not in SAMPLERS | PRUNERS} == set()
    for form in known_names.LOSS_NAMES.values():
        load_text(f"base: {{model: m/m, data: {{train: rows.jsonl}}, loss: {form.replace(': A}', ': 0.5}')}}}")
    for path, values in known_names.VALUES.items():
        for value in set(values.values()):
            load_text("base: {model: m/m, data: {train: rows.jsonl}, lora: {}}", f"{path}={value}")
    sections = "base|data|model|loss|training|lora|evaluation|budget|resources|tracking|judge|notify|sft"
    for name, sentence in known_names.SENTENCES.items():
        for path in re.findall(rf"\b(?:{sections})\.[a-z_0-9]+", sentence):
            assert path in paths, (name, path)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("dpop", "write loss: {kind: dpo, loss_type: dpop}"),
        ("DPO-Positive", "write loss: {kind: dpo, loss_type: dpop}"),
        ("chipo", "write loss: {kind: dpo, loss_type: chipo}"),
        ("chi-PO", "write loss: {kind: dpo, loss_type: chipo}"),
        ("odpo", "write loss: {kind: dpo, odpo_alpha: 1.0}"),
        ("TR-DPO", "write loss: {kind: dpo, sync_ref_model: true}"),
        ("r-dpo", "write loss: {kind: dpo, length_alpha: 0.01}"),
        ("rdpo", "{kind: dpo, loss_type: robust, label_smoothing: 0.1} for robust DPO"),
    ],
)
def test_a_papers_name_of_a_loss_is_answered(name: str, answer: str) -> None:
    assert answer in right_forms.loss_form(name)


def test_the_form_that_an_answer_writes_out_is_a_place_of_the_file() -> None:
    paths = known_paths()
    for name, target in known_names.SETTINGS.items():
        form = right_forms.right_form((name,), 1).removeprefix("write ")
        written = list(leaves(parse_document(form, "f").value))
        assert written == [target if target.partition(".")[0] in SECTION_ORDER else f"base.{target}"], name
        assert target in paths


def leaves(tree: Any, path: str = "") -> Iterator[str]:
    if not isinstance(tree, dict):
        yield path
        return
    for key, value in tree.items():
        yield from leaves(value, f"{path}.{key}" if path else key)


BASE = "base: {model: m/m, data: {train: rows.jsonl}"
ANSWERS = {
    "lora: {r: 8}": "lora: unknown key (write base: {lora: {r: 8}})",
    "training: {lr: 1e-5}": "training: unknown key (write base: {training: {learning_rate: 1e-05}})",
    "lr: 1e-5": "(write base: {training: {learning_rate: 1e-05}})",
    "learning_rate: 1e-5": "(write base: {training: {learning_rate: 1e-05}})",
    "seeds: [1, 2]": "(write search: {training.seed: [1, 2]})",
    "seeds: 3": "seeds: unknown key (write repeats: 3)",
    "judge: {kind: reward_model}": "judge.kind: unknown key (write judge: {reward_model: MODEL}, or judge: {endpoint:",
    "judge: {model: org/rm}": "(write judge: {reward_model: org/rm}, or judge: {endpoint: {url: URL, model: org/rm}}",
    "base: {model: m/m, data: {train: rows.jsonl, columns: {prompt: q}}}": "train: {path: FILE, columns: {prompt: q}})",
    "base: {model: m/m, data: {train: org/pairs}}": "of the hub: write train: {dataset: org/pairs, split: train})",
    "resources: {gpus: 2}": "(write gpus_per_trial: 2)",
    f"{BASE}, loss: {{kind: ipo, beta: 0.2}}}}": "(write loss: {kind: dpo, loss_type: ipo, beta: 0.2})",
    f"{BASE}, loss: ipo}}": "(write loss: {kind: dpo, loss_type: ipo})",
    f"{BASE}, loss: dpo}}": "(write loss: {kind: dpo})",
    "search: {loss.kind: [simpo, ipo]}": "write loss: {kind: dpo, loss_type: ipo} under base, or search loss.loss_type",
    f"{BASE}, loss: {{kind: dpo, gamma_beta_ratio: 0.5}}}}": "belongs to SimPO",
    f"{BASE}, loss: {{kind: dpo}}}}\nsearch: {{loss.gamma_beta_ratio: [1]}}": "belongs to SimPO",
    f"{BASE}, budget: {{trials: 3}}}}": "goes to the top of the file, not under base: write budget: {trials: 3}",
    f"{BASE}, lora: 16}}": "(write lora: {r: 16})",
    f"{BASE}, lora: true}}": "(write lora: {})",
    f"{BASE}, lora: false}}": "(leave lora out)",
    f"{BASE}, lora: {{target_modules: 'q_proj,v_proj'}}}}": "(write target_modules: [q_proj, v_proj])",
    f"{BASE}, training: {{distributed: deepspeed}}}}": "(write distributed: fsdp2)",
    f"{BASE}, training: {{bf16: yes}}}}": "(write true)",
    "budget: 20": "budget: must be a mapping, not 20 (write budget: {trials: 20})",
    "run_cap: 20": "(write budget: {trials: 20})",
    "time_budget_s: 7200": "(write budget: {hours: 2})",
    "sft: true": "(write sft: {training: {learning_rate: 2e-05, num_train_epochs: 1}})",
    "sft: {steps: 300}": "(write sft: {training: {max_steps: 300}})",
    "metric: {name: eval_loss, goal: minimize}": "(write minimize: eval_loss)",
    "method: bayes": "(write sampler: tpe)",
    "early_terminate: {type: hyperband}": "(write pruner: hyperband)",
    "sampler: bayes": "(write sampler: tpe)",
    "sampler: TPESampler": "(write sampler: tpe)",
    "sampler: {type: tpe}": "(write sampler: tpe)",
    "sampler: hyperband": "hyperband is a pruner: write pruner: hyperband",
    "pruner: asha": "(write pruner: successive_halving)",
    "pruner: MedianPruner": "(write pruner: median)",
    "search: {lr: [1e-5]}": "search.lr: there is no such setting in a trial (write training.learning_rate)",
    "search: {base.loss.beta: [1]}": "(write loss.beta: paths begin below base)",
    "search: {n_trials: [3]}": "budget.trials is not a trial's setting; write it outside search",
}


@pytest.mark.parametrize("text", ANSWERS)
def test_what_people_type_is_answered_with_the_form_to_write(findings: Refused, text: str) -> None:
    found = findings(text)
    assert any(ANSWERS[text] in one for one in found), found
    assert all(one.startswith("sweep.yaml:") for one in found)


OPTIONS = {
    "lr=1e-5": "(write --set training.learning_rate=1e-5)",
    "training.lr=1e-5": "(write --set training.learning_rate=1e-05)",
    "beta=3": "(write --set loss.beta=3)",
    "trials=3": "(write --set budget.trials=3)",
    "output_dir=x": "files go under $ORCHESTRATE_HOME",
    "lora=None": "(write --set lora=null)",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_answered_with_an_option(findings: Refused, option: str) -> None:
    (found,) = findings("", option)
    assert found.startswith(f"--set {option}: ")
    assert OPTIONS[option] in found


RANGES = {
    "training.learning_rate: {min: 1e-6, max: 1e-4}": "{uniform: [1e-06, 0.0001]}",
    "training.learning_rate: {min: 1e-6, max: 1e-4, distribution: log_uniform_values}": "{log_uniform: [1e-06, 0.0001]}",  # noqa: E501
    "training.learning_rate: {min: -13.8155, max: -9.2103, distribution: log_uniform}": "{log_uniform: [1e-06, 0.0001]}",  # noqa: E501
    "training.learning_rate: {loguniform: [1e-6, 1e-4]}": "{log_uniform: [1e-06, 0.0001]}",
    "training.learning_rate: tune.loguniform(1e-6, 1e-4)": "{log_uniform: [1e-06, 0.0001]}",
    "training.learning_rate: {type: float, low: 1e-6, high: 1e-4, log: true}": "{log_uniform: [1e-06, 0.0001]}",
    "training.learning_rate: {uniform_: {lower: 1, upper: 2}}": "{uniform: [1, 2]}",
    "loss.beta: {quniform: [1, 3, 0.5]}": "{uniform: [1, 3], step: 0.5}",
    "loss.beta: {min: 1.0, max: 3.0, q: 0.5}": "{uniform: [1, 3], step: 0.5}",
    "loss.beta: {values: [1.0, 2.0]}": "[1, 2]",
    "loss.beta: {grid_search: [1.0, 2.0]}": "[1, 2]",
    "loss.beta: tune.choice([1.0, 2.5])": "[1, 2.5]",
    "training.pairs_per_update: {min: 8, max: 64}": "{int_uniform: [8, 64]}",
    "training.pairs_per_update: {randint: [8, 65]}": "{int_uniform: [8, 64]}",
    "training.pairs_per_update: {lograndint: [8, 65]}": "{int_uniform: [8, 64], log: true}",
    "training.pairs_per_update: {suggest_int: {low: 8, high: 64, step: 8}}": "{int_uniform: [8, 64], step: 8}",
    "training.pairs_per_update: {log_uniform: [8, 64]}": "{int_uniform: [8, 64], log: true}",
    "training.pairs_per_update: {uniform: [8, 64]}": "{int_uniform: [8, 64]}",
    "training.pairs_per_update: {uniform: [8, 9], step: 0.5}": "{int_uniform: [8, 9]}",
}


@pytest.mark.parametrize("line", RANGES)
def test_ranges_of_other_tools_are_answered_with_ranges_that_load(
    findings: Refused, load_text: Load, line: str
) -> None:
    ending = "sampler: random\nbudget: {trials: 3}\n"
    (found,) = findings(f"search:\n  {line}\n{ending}")
    path = line.partition(":")[0]
    assert found.startswith(f"sweep.yaml:2: search.{path}")
    assert f"write {path}: {RANGES[line]}" in found
    form = found[found.index(f"write {path}") + len("write ") :].rpartition(")")[0]
    assert load_text(f"search:\n  {form}\n{ending}").search.paths == (path,)


def whole_number_settings() -> list[str]:
    """By the JSON Schema, which is what an editor knows of a setting's type."""
    definitions = schema()["$defs"]

    def types(node: dict[str, Any]) -> set[str]:
        inner = (each for branch in node.get("anyOf", ()) for each in types(branch))
        return {*inner, *([node["type"]] if isinstance(node.get("type"), str) else [])}

    found: list[str] = []
    for path in config_paths():
        *groups, name = path.split(".")
        models = [model for model in definitions.values() if name in model.get("properties", {})]
        kinds = [types(model["properties"][name]) for model in models if groups]
        if kinds and all("integer" in kind and "number" not in kind for kind in kinds):
            found.append(path)
    return found


def test_a_continuous_range_of_any_whole_number_setting_is_refused_with_the_form_to_write(findings: Refused) -> None:
    settings = [path for path in config_paths() if is_whole_number(path)]
    assert set(settings) >= set(whole_number_settings())
    assert {"training.pairs_per_update", "training.seed", "lora.r", "data.max_length"} <= set(settings)
    for kind in ("uniform", "log_uniform"):
        text = "".join(f"  {path}:\n    {kind}: [8, 64]\n" for path in settings)
        found = findings(f"search:\n{text}sampler: tpe\nbudget: {{trials: 3}}\n")
        form = "{int_uniform: [8, 64], log: true}" if kind == "log_uniform" else "{int_uniform: [8, 64]}"
        for i, path in enumerate(settings):
            said = f"takes whole numbers, and {kind} draws others too (write {path}: {form})"
            assert f"sweep.yaml:{2 + 2 * i}: search.{path}: {said}" in found


def test_a_hub_name_that_is_nearly_a_folder_here_is_said(findings: Refused, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    file = tmp_path / "s.yaml"
    file.write_text("name: a\nbase: {model: models/tiny-lama, data: {train: rows.jsonl}}\n")
    near = "models/tiny-llama"  # as the file writes it
    said = "there is no folder models/tiny-lama, so it is a name on the hub"
    assert f"base.model: {said}; did you mean {near}?" in load_with_notices(file).notices
    file.write_text("name: a\nbase: {model: modles/tiny-llama, data: {train: rows.jsonl}}\n")
    assert any(f"did you mean {near}?" in notice for notice in load_with_notices(file).notices)
    file.write_text("name: a\nbase: {model: org/other, data: {train: rows.jsonl}}\n")
    assert load_with_notices(file).notices == ()
    (found,) = findings("base: {model: ./models/tiny-lama, data: {train: rows.jsonl}}")
    assert f"did you mean ./{near}?" in found
    (found,) = findings(f"base: {{model: {tmp_path}/models/tiny-lama, data: {{train: rows.jsonl}}}}")
    assert f"did you mean {tmp_path}/{near}?" in found


MANY = """\
name: a
base:
  model: {name_or_path: m/m, revision: None}
  data: {train: rows.jsonl, bad_rows: None}
  training: {bf16: yes, learning_rate: None}
  lora: None
search:
  training.stochastic_rounding: [yes, no]
  lora.r: [8, None]
keep_modles: 2
tracking: {experiment: 'None'}
"""


def test_yes_no_and_none_are_found_in_the_same_pass_as_the_other_errors(findings: Refused) -> None:
    assert findings(MANY) == [
        "sweep.yaml:3: base.model.revision: None is text in YAML (write null, or 'None' in quotes for the text)",
        "sweep.yaml:4: base.data.bad_rows: must be one of refuse, skip; not the text 'None'",
        "sweep.yaml:5: base.training.learning_rate: must be a number, not the text 'None' (write null)",
        "sweep.yaml:5: base.training.bf16: must be true or false, not the text 'yes' (write true)",
        "sweep.yaml:6: base.lora: must be a mapping, not the text 'None' (leave lora out)",
        "sweep.yaml:8: search.training.stochastic_rounding.0: must be true or false, not the text 'yes' (write true)",
        "sweep.yaml:8: search.training.stochastic_rounding.1: must be true or false, not the text 'no' (write false)",
        "sweep.yaml:9: search.lora.r.1: must be a whole number, not the text 'None' (write null)",
        "sweep.yaml:10: keep_modles: unknown key (did you mean keep_models?)",
    ]
