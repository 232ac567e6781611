"""An optimizer step of a Llama-3-8B with random weights on one GPU: this product and TRL on the same batch.

`make bench-gpu`, or `python -m benchmarks.gpu [--size 1b] [--case full] [--write]`: step time, peak memory and tokens
per second, SimPO against TRL's CPOTrainer and DPO against its DPOTrainer. Each contestant runs in its own process;
running out of memory is a result. `--size tiny --device cpu` tests the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

SIZES: dict[str, dict[str, int]] = {
    # Llama 3 8B, from its config.json.
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
CASES = ("lora", "full-bf16", "full")
"""Adapters over bfloat16; all weights in bfloat16 (ours with stochastic rounding); float32 weights under autocast."""


def main() -> None:
    """Measure the requested cases one after the other, and print or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--case", choices=CASES, action="append", help="lora and full-bf16 by default.")
    parser.add_argument("--loss", choices=["simpo", "dpo"], action="append", help="Both by default.")
    parser.add_argument("--pairs", type=int, default=4, help="Pairs of the batch.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--write", action="store_true", help="Put the figures into docs/performance.md too.")
    parser.add_argument("--contestant", choices=["trl", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        options.case, options.loss = options.case[0], options.loss[0]
        print(json.dumps(time_steps(options)), flush=True)
        return
    rows = [
        {"size": options.size, "case": case, "loss": loss, "contestant": name, **run(options, case, loss, name)}
        for case in options.case or ["lora", "full-bf16"]
        for loss in options.loss or ["simpo", "dpo"]
        for name in ("trl", "ours")
    ]
    if options.write:
        from benchmarks.results import write

        write("gpu", {"gpu": gpu_name(), "pairs": options.pairs, "rows": rows})


def run(options: argparse.Namespace, case: str, loss: str, name: str) -> dict[str, Any]:
    """Run one contestant in its own process; return its measurements, or why it failed."""
    arguments_of_child = [f"--{key}={getattr(options, key)}" for key in ("size", "pairs", "rounds", "device")]
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments_of_child, f"--case={case}", f"--loss={loss}"]
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run([*command, f"--contestant={name}"], capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        found: dict[str, Any] = json.loads(lines[-1])
    elif "OutOfMemoryError" in done.stderr:
        found = {"failed": "out of memory"}
    else:
        raise RuntimeError(f"{name}, {case}, {loss} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    print(f"{options.size} {case} {loss} {name}: {found}", flush=True)
    return found


def time_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Time optimizer steps; return seconds, peak GiB, and tokens of the batch (without padding) per second."""
    import torch

    model, pairs = make_model(options), make_pairs(options)
    step = (trl_step if options.contestant == "trl" else our_step)(model, pairs, options)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(model, trained, options)
    on_gpu = options.device == "cuda"
    times: list[float] = []
    for _ in range(options.rounds + 2):
        began = time.perf_counter()
        loss = float(step())
        optimizer()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    seconds = median(times[2:])
    tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    return {"seconds": seconds, "peak_gib": peak, "tokens_per_second": tokens / seconds, "loss": loss}


def make_model(options: argparse.Namespace) -> Any:
    """Return a model of the given size with random weights, gradient checkpointing on, and adapters for `lora`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = torch.float32 if options.case == "full" else torch.bfloat16
    config = LlamaConfig(
        **SIZES[options.size], max_position_embeddings=8192, rope_theta=500000.0, dtype=dtype,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(options.device):
        model: Any = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    if options.case == "lora":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_pairs(options: argparse.Namespace) -> list[Any]:
    """Pairs with lengths like UltraFeedback's, up to 2,048 tokens: prompts of 100-900, responses of 150-1,000."""
    from tests.support.trl_oracle import Pair

    rng = np.random.default_rng(0)
    top = SIZES[options.size]["vocab_size"]
    scale = 1 if options.device == "cuda" else 16
    sizes = rng.integers([100, 150, 150], [901, 1001, 1001], size=(options.pairs, 3)) // scale
    return [Pair(*(rng.integers(4, top, n).astype(np.int32) for n in row)) for row in sizes]


def trl_step(model: Any, pairs: list[Any], options: argparse.Namespace) -> Callable[[], Any]:
    """Return TRL's compute_loss under bf16 autocast; DPO with precomputed reference log-probs, the cheaper option."""
    import torch
    from accelerate.utils import send_to_device
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from tests.support import trl_oracle as oracle

    # Checkpointing and dtype are set by the case; TRL's defaults would change both.
    arguments: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "report_to": [], "bf16": False, "gradient_checkpointing": False,
        "use_cpu": options.device == "cpu", "disable_tqdm": True,
    }  # fmt: skip
    rows = Dataset.from_list([{"prompt": "w5 w6", "chosen": "w7 w8", "rejected": "w9"}] * 2)
    parts: dict[str, Any] = {"train_dataset": rows, "processing_class": oracle.tiny_tokenizer()}
    if options.loss == "simpo":
        simpo = CPOConfig(**arguments, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0)
        trainer: Any = CPOTrainer(model, args=simpo, **parts)
        inputs = oracle.cpo_inputs(pairs)
    else:
        trainer = DPOTrainer(model, args=DPOConfig(**arguments, beta=0.1, precompute_ref_log_probs=True), **parts)
        reference = torch.full((len(pairs),), -100.0)
        inputs = oracle.dpo_inputs(pairs) | {"ref_chosen_logps": reference, "ref_rejected_logps": reference}
    inputs = send_to_device(inputs, options.device)

    def step() -> Any:
        with torch.autocast(options.device, torch.bfloat16):
            loss = trainer.compute_loss(model, dict(inputs))
        loss.backward()
        return loss.detach()

    return step


def our_step(model: Any, pairs: list[Any], options: argparse.Namespace) -> Callable[[], Any]:
    """Return the product's forward and backward under bf16 autocast, with the reference cached."""
    import torch

    from trainer.config.loss_config import DpoLoss, SimpoLoss
    from trainer.forward.pair_model import PairModel
    from trainer.objectives.pair_logps import UpdateTotals

    ours = PairModel(model, autocast=torch.bfloat16)
    totals = UpdateTotals.from_lengths([len(p.prompt) for p in pairs], [len(p.chosen) for p in pairs])
    loss = SimpoLoss(beta=2.0, gamma=1.0) if options.loss == "simpo" else DpoLoss(beta=0.1)
    with torch.autocast(options.device, torch.bfloat16):
        reference = None if options.loss == "simpo" else ours.logps(pairs)

    def step() -> Any:
        with torch.autocast(options.device, torch.bfloat16):
            return ours.backward(pairs, loss, reference, totals, torch.Tensor.backward).loss

    return step


def make_optimizer(model: Any, trained: dict[str, Any], options: argparse.Namespace) -> Callable[[], Any]:
    """Return clipping at 1 with fused AdamW; for this product its own optimizer."""
    import torch

    from trainer.config.trial import TrainingConfig
    from trainer.training.optimizer import Optimizer

    if options.contestant == "ours":
        mine = Optimizer(model, trained, TrainingConfig(learning_rate=1e-6))
        return lambda: (mine.clip_gradients(), mine.step(1.0))
    adam = torch.optim.AdamW(trained.values(), lr=1e-6, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def gpu_name() -> str:
    """Return the GPU's name for a result's record; "no GPU" without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    main()
