"""The SFT stage is made again where its weights would be others, and for nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution.sft_cache_key import settings_of_weights, stage_key
from trainer.config.trial import TrialConfig
from trainer.data import prepare
from trainer.models.model_files import model_fingerprint, resolve_model_path
from trainer.storage.atomic_files import digest_of
from trainer.training_session import config_digest

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
OTHERS: dict[str, tuple[Any, bool]] = {
    # By the digests of weights and rows, below.
    "model.name_or_path": ("other", False),
    "model.generated": (None, False),
    "model.revision": ("v2", False),
    "data.train": (["u.jsonl"], False),
    "data.eval": (["e.jsonl"], False),
    "data.eval_share": (0.2, False),
    "data.max_train_rows": (5, False),
    "data.max_eval_rows": (5, False),
    "data.max_length": (512, False),
    "data.max_prompt_length": (100, False),
    "data.bad_rows": ("refuse", False),
    "data.apply_template": (True, False),  # the tokens say what came of it
    "data.score": ("last", False),
    "data.max_bad_share": (0.5, False),
    # The tokenizer is saved with the model.
    "model.tokenizer": ("other", True),
    "data.chat_template": ("{{ messages }}", True),
    "model.dtype": ("bfloat16", True),
    "model.attention": ("separate", True),
    "model.load_in_4bit": (True, True),
    "loss.kind": ("orpo", True),
    "training.learning_rate": (1e-3, True),
    "training.pairs_per_update": (64, True),
    "training.num_train_epochs": (2.0, True),
    "training.max_steps": (10, True),
    "training.lr_scheduler_type": ("linear", True),
    "training.warmup_ratio": (0.2, True),
    "training.weight_decay": (0.1, True),
    "training.adam_beta1": (0.8, True),
    "training.adam_beta2": (0.99, True),
    "training.adam_epsilon": (1e-6, True),
    "training.max_grad_norm": (0.5, True),
    "training.bf16": (True, True),
    "training.seed": (1, True),
    "training.stochastic_rounding": (False, False),  # of float32 weights
    "training.tokens_per_micro_batch": (256, False),
    "training.gradient_checkpointing": (True, False),
    "training.distributed": ("fsdp2", False),
    "training.logging_steps": (7, False),
    "training.eval_steps": (7, False),
    "training.save_steps": (7, False),
    "lora.r": (8, True),
    "lora.alpha": (8.0, True),
    "lora.dropout": (0.1, True),
    "lora.target_modules": (["q_proj"], True),
    "evaluation.prompts": (9, False),
    "evaluation.answer_steps": (9, False),
    "evaluation.samples": (3, False),
    "evaluation.max_new_tokens": (9, False),
    "engine": ("trl", True),
}
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
    assert config_digest(changed) != config_digest(config()) or not matters
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
    earlier = digest_of([config_digest(made), fingerprint, start])[:32]
    assert stage_key(made, fingerprint, cache) != earlier
    (cache / "sft" / earlier / "run").mkdir(parents=True)
    assert stage_key(made, fingerprint, cache) == earlier
