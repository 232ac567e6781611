"""The SFT stage is made again where its weights would be others, and for nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.execution.sft_cache_key import settings_of_weights, stage_key
from trainer.config.trial import TrialConfig
from trainer.data import prepare
from trainer.models.model_files import model_fingerprint, resolve_model_path
from trainer.storage.atomic_files import digest_of
from trainer.training_session import result_digest

TINY = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
BASE: dict[str, Any] = {
    "model": {"name_or_path": "m"},
    "data": {"train": ["t.jsonl"]},
    "loss": {"kind": "sft"},
    "lora": {},
}
NOT_IN_THE_KEY = """
# By the digests of weights and rows, below; of apply_template the tokens say what came of it.
model: {name_or_path: other, generated: null, revision: v2, kernels: none, compile: true}
data: {train: [u.jsonl], eval: [e.jsonl], eval_share: 0.2, max_train_rows: 5, max_eval_rows: 5, max_length: 512,
       max_prompt_length: 100, bad_rows: refuse, apply_template: true, score: last, max_bad_share: 0.5}
training: {stochastic_rounding: false, tokens_per_micro_batch: 256, gradient_checkpointing: true, distributed: fsdp2,
           logging_steps: 7, eval_steps: 7, save_steps: 7}  # stochastic_rounding of float32 weights
evaluation: {prompts: 9, answer_steps: 9, samples: 3, max_new_tokens: 9}
"""
IN_THE_KEY = """
model: {tokenizer: other, dtype: bfloat16, attention: separate, load_in_4bit: true}  # the tokenizer is saved with it
data: {chat_template: "{{ messages }}"}
loss: {kind: orpo}
training: {learning_rate: 1.0e-3, pairs_per_update: 64, num_train_epochs: 2.0, max_steps: 10, lr_scheduler_type: linear,
           warmup_ratio: 0.2, weight_decay: 0.1, adam_beta1: 0.8, adam_beta2: 0.99, adam_epsilon: 1.0e-6,
           max_grad_norm: 0.5, bf16: true, seed: 1}
lora: {r: 8, alpha: 8.0, dropout: 0.1, target_modules: [q_proj]}
engine: trl
"""


def others(text: str, matters: bool) -> dict[str, tuple[Any, bool]]:
    """Another value of each setting, by its path, and whether the key differs with it."""
    found: dict[str, tuple[Any, bool]] = {}
    for group, values in yaml.safe_load(text).items():
        inner = (
            {f"{group}.{leaf}": value for leaf, value in values.items()}
            if isinstance(values, dict)
            else {group: values}
        )
        found |= {path: (value, matters) for path, value in inner.items()}
    return found


OTHERS = others(NOT_IN_THE_KEY, False) | others(IN_THE_KEY, True)
FIXED = ("model.generated", "loss.kind", "engine")
"""The stage has no other, or (the initial model) another one beside it."""


def config(changes: dict[str, Any] | None = None) -> TrialConfig:
    tree: dict[str, Any] = json.loads(json.dumps(BASE))
    for path, value in (changes or {}).items():
        *groups, leaf = path.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    return TrialConfig.model_validate(tree)


def test_every_setting_is_decided() -> None:
    """A setting that is added later is in the key until somebody decides otherwise, here and in the table."""
    assert OTHERS.keys() == config().flat_params().keys()


@pytest.mark.parametrize("path", [path for path in OTHERS if path not in FIXED])
def test_a_setting_is_in_the_key_where_it_changes_the_weights(path: str) -> None:
    value, matters = OTHERS[path]
    extra = {"data.eval_share": 0.1} if path == "data.eval" else {}
    changed = config({path: value} | extra)
    assert result_digest(changed) != result_digest(config()) or not matters
    assert (settings_of_weights(changed) != settings_of_weights(config())) is matters


def test_what_other_settings_make_meaningless_is_not_in_the_key() -> None:
    steps = {"training.max_steps": 9}
    assert settings_of_weights(config(steps)) == settings_of_weights(config(steps | {"training.num_train_epochs": 3}))
    flat = {"training.lr_scheduler_type": "constant"}
    assert settings_of_weights(config(flat)) == settings_of_weights(config(flat | {"training.warmup_ratio": 0.3}))
    narrow = {"model.dtype": "bfloat16", "lora": None}
    off = narrow | {"training.stochastic_rounding": False}
    assert settings_of_weights(config(narrow)) != settings_of_weights(config(off))


def rows(path: Path, answers: str, first: int = 0, rejected: str = "no") -> str:
    logged = [
        {"prompt": f"question {k}", "chosen": f"{answers} {k}", "rejected": f"{rejected} {k}"}
        for k in range(first, first + 12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in logged))
    return str(path)


def key(cache: Path, data: dict[str, Any], model: dict[str, Any] | None = None, **training: Any) -> str:
    made = TrialConfig.model_validate(
        {"model": {"generated": model or TINY}, "data": data, "loss": {"kind": "sft"}, "training": training}
    )
    return stage_key(made, prepare(made.data, made.model, cache).fingerprint, cache)


def test_the_rows_that_are_learned_decide_and_not_how_they_are_written_down(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = {"train": rows(tmp_path / "a.jsonl", "yes"), "eval": rows(tmp_path / "e.jsonl", "yes", 50)}
    data |= {"apply_template": False}
    first = key(cache, data)
    same = [
        data | {"train": rows(tmp_path / "copy.jsonl", "yes")},
        data | {"train": rows(tmp_path / "others_lose.jsonl", "yes", rejected="never")},
        data | {"eval": rows(tmp_path / "f.jsonl", "of course", 70)},
        data | {"max_length": 512},
        data | {"bad_rows": "refuse"},
    ]
    assert {key(cache, each) for each in same} == {first}
    others = [
        data | {"train": rows(tmp_path / "b.jsonl", "surely")},
        data | {"max_train_rows": 8},
        data | {"max_length": 9, "max_prompt_length": 4},
        {"train": data["train"], "eval_share": 0.3, "apply_template": False},
    ]
    assert len({first, *(key(cache, each) for each in others)}) == 5
    assert key(cache, data, TINY | {"seed": 3}) != first, "other start weights"


def test_a_run_that_an_earlier_version_began_keeps_its_name(tmp_path: Path) -> None:
    made = TrialConfig.model_validate(
        {
            "model": {"generated": TINY},
            "data": {
                "train": rows(tmp_path / "a.jsonl", "yes"),
                "eval": rows(tmp_path / "e.jsonl", "yes", 50),
                "apply_template": False,
            },
            "loss": {"kind": "sft"},
        }
    )
    cache = tmp_path / "cache"
    fingerprint = prepare(made.data, made.model, cache).fingerprint
    start = model_fingerprint(made.model, resolve_model_path(made.model, cache))
    earlier = digest_of([result_digest(made), fingerprint, start])[:32]
    assert stage_key(made, fingerprint, cache) != earlier
    (cache / "sft" / earlier / "run").mkdir(parents=True)
    assert stage_key(made, fingerprint, cache) == earlier
