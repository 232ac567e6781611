"""Inputs shared by all contestants: initial model, tokenizer, rows and their order."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[2] / "shared" / "data"
"""Real preference pairs, if they exist; otherwise rows of similar lengths are generated."""


@dataclass(frozen=True)
class BenchmarkInputs:
    """Paths and sizes of one benchmark's inputs."""

    model: Path
    train: Path
    eval: Path
    max_length: int
    source: str


def prepare(
    folder: Path, *, vocab_size: int, train_rows: int, eval_rows: int, max_length: int = 512
) -> BenchmarkInputs:
    """Write model, train.jsonl and eval.jsonl under `folder`; plain-text rows of at most max_length tokens."""
    from transformers import AutoTokenizer

    real = (SHARED / "preference-train.jsonl").is_file()
    tokenizer_from = SHARED / "tokenizer-bpe4096" if real else _generated_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    tokenizer.bos_token = None  # TRL's CPO would add one before the template's start
    rows = _real_rows() if real else _generated_rows()
    random.Random(0).shuffle(rows)
    remaining: list[dict[str, str]] = []
    seen: set[str] = set()  # prompts of training must not be evaluated
    for row in rows:
        if row["prompt"] in seen:
            continue
        seen.add(row["prompt"])
        longest = max(len(tokenizer(row["prompt"] + row[k])["input_ids"]) for k in ("chosen", "rejected"))
        if 64 <= longest < max_length - 2:
            remaining.append(row)
        if len(remaining) == train_rows + eval_rows:
            break
    model = folder / f"model-{vocab_size}"
    if not model.is_dir():
        _write_model(model, tokenizer, vocab_size)
    for name, part in (("train", remaining[:train_rows]), ("eval", remaining[train_rows:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return BenchmarkInputs(
        model, folder / "train.jsonl", folder / "eval.jsonl", max_length, "real" if real else "generated"
    )


def _real_rows() -> list[dict[str, str]]:
    out: list[dict[str, str]] = []
    for line in (SHARED / "preference-train.jsonl").read_text().splitlines():
        row = json.loads(line)
        turns = "".join(f"<|{m['role']}|>\n{m['content']}\n" for m in row["prompt"])
        texts = [row[k][0]["content"].strip() for k in ("chosen", "rejected")]
        if all(texts) and texts[0] != texts[1]:
            out.append({"prompt": f"{turns}<|assistant|>\n", "chosen": texts[0], "rejected": texts[1]})
    return out


def _generated_rows() -> list[dict[str, str]]:
    rng = random.Random(0)
    words = ["river", "stone", "seven", "answer", "because", "letter", "count", "music", "green", "north", "the", "of"]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    return [
        {"prompt": f"<|user|>\n{text(30, 160)}\n<|assistant|>\n", "chosen": text(20, 120), "rejected": text(20, 120)}
        for _ in range(2000)
    ]


def _generated_tokenizer(folder: Path) -> Path:
    from trainer.config.trial import GeneratedModel
    from trainer.synthetic import generate_model

    return generate_model(GeneratedModel(), folder / "cache")


def _write_model(model: Path, tokenizer: Any, vocab_size: int) -> None:
    """Write the Llama of SPEED.md: hidden size 256, 4 layers; about 7 M parameters with a vocabulary of 8,192."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
