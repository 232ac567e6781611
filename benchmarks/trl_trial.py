"""One trial as a script over TRL's trainer. `python -m benchmarks.trl_trial TRIAL.json`.

Float32, no gradient checkpointing, data in the given order; prints the parts of its time and writes result.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()


def train(trial: dict[str, Any]) -> dict[str, Any]:
    """Train one configuration; return the final evaluation and the seconds of each part."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(trial["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(trial["model"])

    class Clock(TrainerCallback):
        """Records when training began and ended, and the first step's gradients."""

        def __init__(self) -> None:
            self.began = self.ended = 0.0
            self.first: dict[str, torch.Tensor] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.began = time.perf_counter()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
            if state.global_step == 0 and trial.get("gradients"):
                self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.ended = time.perf_counter()

    clock = Clock()
    common: dict[str, Any] = {
        "output_dir": trial["out"],
        "per_device_train_batch_size": trial["pairs_per_update"],
        "per_device_eval_batch_size": trial["pairs_per_update"],
        "max_steps": trial["max_steps"],
        "learning_rate": trial["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": trial["max_length"],
        "beta": trial["beta"],
        "seed": 42,
    }
    train_set = Dataset.from_json(str(trial["train"]), cache_dir=trial["out"] + "/data")
    eval_set = Dataset.from_json(str(trial["eval"]), cache_dir=trial["out"] + "/data")
    parts: dict[str, Any] = {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": train_set,
        "eval_dataset": eval_set,
        "callbacks": [clock],
    }
    if trial["method"] == "simpo":
        config = CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=trial["gamma"])
        trainer: Any = CPOTrainer(args=config, **parts)
    else:
        trainer = DPOTrainer(args=DPOConfig(**common), **parts)
    trainer.train()
    metrics = trainer.evaluate()
    evaluated = time.perf_counter()
    if clock.first:
        from safetensors.torch import save_file

        save_file({n: t.contiguous() for n, t in clock.first.items()}, trial["out"] + "/gradients.safetensors")
    return {
        "metrics": {k: v for k, v in metrics.items() if isinstance(v, float)},
        "seconds": {
            "imports": imported - BEGAN,
            "data and start": clock.began - imported,
            "steps": clock.ended - clock.began,
            "evaluation": evaluated - clock.ended,
        },
    }


def main() -> None:
    """Train one trial from its JSON file."""
    trial = json.loads(Path(sys.argv[1]).read_text())
    Path(trial["out"]).mkdir(parents=True, exist_ok=True)
    result = train(trial)
    (Path(trial["out"]) / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result["seconds"]))


if __name__ == "__main__":
    main()
