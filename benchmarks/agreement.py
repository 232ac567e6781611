"""Check that two contestants trained the same: gradients of the first update, and final held-out metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMPARED = ("eval_rewards/margins", "eval_rewards/accuracies", "eval_rewards/chosen", "eval_rewards/rejected")


def final_metrics_difference(theirs: list[dict[str, float]], mine: list[dict[str, float]]) -> float:
    """Return the largest difference of the final evaluations, relative for values above 1."""
    pairs = [(x[name], y[name]) for x, y in zip(theirs, mine, strict=True) for name in COMPARED]
    return max(abs(p - q) / max(1.0, abs(p)) for p, q in pairs)


def first_gradients_difference(sweep: dict[str, Any], theirs: Path, cache: Path) -> float:
    """Return the relative L2 difference, over all parameters, of the clipped gradients of the first update."""
    import torch
    import yaml
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from orchestrator.spec.loading.loader import load_spec_text
    from trainer.data import prepare
    from trainer.forward.pair_model import PairModel
    from trainer.objectives.losses import required_stats
    from trainer.objectives.pair_logps import UpdateTotals
    from trainer.training.schedule import DataOrder

    spec = load_spec_text(yaml.safe_dump(sweep), Path.cwd())
    config = spec.search.apply(spec.base, spec.search.corners().params_at(0))
    train = prepare(config.data, config.model, cache).train
    first = DataOrder(len(train), config.training.pairs_per_update, config.training.seed).pairs_of(1)
    pairs = [train.pair(i) for i in first]
    model = AutoModelForCausalLM.from_pretrained(sweep["base"]["model"], dtype=torch.float32).train()
    mine = PairModel(model)
    reference = mine.logps(pairs) if required_stats(config.loss).reference else None
    totals = UpdateTotals.from_lengths([len(p.prompt) for p in pairs], [len(p.chosen) for p in pairs])
    mine.backward(pairs, config.loss, reference, totals, torch.Tensor.backward)
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.max_grad_norm)
    expected = load_file(theirs)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if found.keys() != expected.keys():
        raise RuntimeError(f"gradients of different parameters: {sorted(found.keys() ^ expected.keys())[:3]}")
    difference = sum(float((found[n] - expected[n]).double().square().sum()) for n in expected)
    return (difference / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5
