"""TRL's own trainers as oracles: the same weights and token ids, its compute_loss and gradients. Models are tiny."""

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trainer.objectives.pair_logps import UpdateTotals

VOCABULARY = 256
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def make_pairs(count: int = 6, seed: int = 0, scale: int = 1, vocabulary: int = VOCABULARY) -> list[Pair]:
    """Random pairs of varied lengths, one-token responses among them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers([3, 1, 1], [30 * scale, 24 * scale, 24 * scale], size=(count, 3))
    lengths[0, 1] = 1
    lengths[-1, 2] = 1
    return [Pair(*(rng.integers(4, vocabulary, size=n).astype(np.int32) for n in row)) for row in lengths]


def tiny_model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A causal LM with random float32 weights, large enough for log-probs that differ."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    sizes |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes |= {"initializer_range": 0.15, "tie_word_embeddings": False}
    if architecture in {"qwen3", "gemma", "gemma2", "gemma3_text"}:
        sizes["head_dim"] = 16
    config = AutoConfig.for_model(architecture, **(sizes | overrides))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def moved(model: PreTrainedModel, seed: int = 7, size: float = 0.02) -> PreTrainedModel:
    """A copy with slightly other weights: a reference that is not the policy."""
    other, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word per id; TRL's trainers ask for a tokenizer, the tests give token ids."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _arguments(folder: Path) -> dict[str, Any]:
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True}
    plain = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "per_device_train_batch_size": 64}
    return {"output_dir": str(folder)} | quiet | plain


def _dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "w5 w6", "chosen": "w7 w8", "rejected": "w9"}] * 2)


def dpo_trainer(model: PreTrainedModel, reference: PreTrainedModel, folder: Path, **options: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(**_arguments(folder), **options)
    return DPOTrainer(model, reference, args=arguments, train_dataset=_dataset(), processing_class=tiny_tokenizer())


def cpo_trainer(model: PreTrainedModel, folder: Path, **options: Any) -> Any:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    arguments = CPOConfig(**_arguments(folder), **options)
    return CPOTrainer(model, args=arguments, train_dataset=_dataset(), processing_class=tiny_tokenizer())


def orpo_trainer(model: PreTrainedModel, folder: Path, **options: Any) -> Any:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    arguments = ORPOConfig(**_arguments(folder), **options)
    return ORPOTrainer(model, args=arguments, train_dataset=_dataset(), processing_class=tiny_tokenizer())


def kto_trainer(model: PreTrainedModel, reference: PreTrainedModel, folder: Path, **options: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    arguments = KTOConfig(**_arguments(folder), train_sampling_strategy="sequential", **options)
    return KTOTrainer(model, reference, args=arguments, train_dataset=_dataset(), processing_class=tiny_tokenizer())


def kto_inputs(pairs: Sequence[Any], mismatched: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What KTOTrainer's collator makes of token ids: all chosen responses, then all rejected ones that there are."""
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    sides = [
        (side, pair, other)
        for side in ("chosen", "rejected")
        for pair, other in zip(pairs, mismatched, strict=True)
        if len(getattr(pair, side))
    ]
    examples = [
        {
            "prompt_ids": pair.prompt.tolist(),
            "completion_ids": getattr(pair, side).tolist(),
            "KL_completion_ids": getattr(other, side).tolist(),
            "label": side == "chosen",
        }
        for side, pair, other in sides
    ]
    return DataCollatorForUnpairedPreference(pad_token_id=0)(examples)


def _padded(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor(np.stack([np.pad(row, (0, longest - len(row)), constant_values=value) for row in rows])).long()


def dpo_inputs(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """What DPOTrainer's collator makes of token ids."""
    rows = [np.concatenate([p.prompt, p.chosen]) for p in pairs] + [
        np.concatenate([p.prompt, p.rejected]) for p in pairs
    ]
    prompts = [len(p.prompt) for p in pairs] * 2
    completion = [(np.arange(len(row)) >= n).astype(np.int64) for row, n in zip(rows, prompts, strict=True)]
    return {
        "input_ids": _padded(rows, 0),
        "attention_mask": _padded([np.ones(len(row), dtype=np.int64) for row in rows], 0),
        "completion_mask": _padded(completion, 0),
    }


def cpo_inputs(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """What the collator of CPOTrainer and ORPOTrainer makes of token ids."""
    inputs: dict[str, torch.Tensor] = {"prompt_input_ids": _padded([p.prompt for p in pairs], 0)}
    for name in ("chosen", "rejected"):
        rows = [np.concatenate([p.prompt, getattr(p, name)]) for p in pairs]
        labels = [np.concatenate([np.full(len(p.prompt), -100), getattr(p, name)]) for p in pairs]
        inputs[f"{name}_input_ids"] = _padded(rows, 0)
        inputs[f"{name}_attention_mask"] = _padded([np.ones(len(row), dtype=np.int64) for row in rows], 0)
        inputs[f"{name}_labels"] = _padded(labels, -100)
    return inputs


def totals_of(pairs: list[Pair]) -> UpdateTotals:
    return UpdateTotals.from_lengths(*([len(getattr(p, name)) for p in pairs] for name in ("prompt", *_SIDES)))


def single_rows(pairs: Sequence[Pair]) -> list[Pair]:
    """Each pair without one of its responses: the chosen one of every third, else the rejected one."""
    return [replace(p, **{_SIDES[i % 3 != 0]: np.zeros(0, np.int32)}) for i, p in enumerate(pairs)]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(trainer: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """TRL's loss at these inputs and the gradient of every parameter."""
    model = trainer.model
    model.zero_grad(set_to_none=True)
    model.train()
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    return float(loss.detach()), gradients(model)


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative L2 difference over the parameters, relative to the parameter's own gradient."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-12)) for n in expected)


def together(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The relative L2 difference of all gradients as one vector."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[n] - expected[n]).double().square().sum()) for n in expected)
    return (apart / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5
