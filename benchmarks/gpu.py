"""An update of a Llama-3-8B with random weights on one GPU: this product and TRL, each in its best arrangement.

`make bench-gpu`, or `python -m benchmarks.gpu [--size 1b] [--case full] [--write]`: SimPO against TRL's CPOTrainer, DPO
against its DPOTrainer with the reference log-probs computed beforehand. Both with and without gradient checkpointing
and liger-kernel's layers (where installed), each with the largest micro-batch that fits. Every figure is printed as
soon as it is known; running out of memory is a result. `--size tiny --device cpu` tests the script without a GPU.

The share of the peak counts the FLOPs that the batch needs (prompt once, no padding, nothing computed again), for both.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np

from orchestrator.spec.estimates.gpu_table import GPUS

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


PROMPT, RESPONSE = 185, 305
"""Mean tokens of UltraFeedback's prompts and responses (Cui et al. 2024), from memory and not looked up again.
Their log-normal spread is assumed."""


def main() -> None:
    """Measure the requested cases one after the other, and print or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--case", choices=CASES, action="append", help="lora and full-bf16 by default.")
    parser.add_argument("--loss", choices=["simpo", "dpo"], action="append", help="Both by default.")
    parser.add_argument("--pairs", type=int, default=16, help="Pairs of an update.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak", type=float, help="Dense bfloat16 TFLOP/s of the card; by default by its name.")
    parser.add_argument("--checkpointing", choices=["on", "off"], help="Both by default.")
    parser.add_argument("--kernels", choices=["none", "liger"], help="Both by default, where installed.")
    parser.add_argument("--write", action="store_true", help="Put the figures into docs/performance.md too.")
    parser.add_argument("--contestant", choices=["trl", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        options.case, options.loss = options.case[0], options.loss[0]
        for found in measure(options):
            print(json.dumps(found), flush=True)
        return
    installed = ["none", "liger"] if find_spec("liger_kernel") is not None and options.device == "cuda" else ["none"]
    layers = [options.kernels] if options.kernels else installed
    rows = [
        row
        for case in options.case or ["lora", "full-bf16"]
        for loss in options.loss or ["simpo", "dpo"]
        for kernels in layers
        for name in ("trl", "ours")
        for row in run(options, case, loss, name, kernels)
    ]
    for line in summary(rows):
        print(line, flush=True)
    if options.write:
        from benchmarks.results import write

        write("gpu", {"gpu": gpu_name(), "pairs": options.pairs, "rows": rows})


def run(options: argparse.Namespace, case: str, loss: str, name: str, kernels: str) -> list[dict[str, Any]]:
    """Run one contestant in its own process, printing its measurements as they come; return them."""
    given = ("size", "pairs", "rounds", "device", "peak", "checkpointing")
    command = [sys.executable, "-m", "benchmarks.gpu", f"--case={case}", f"--loss={loss}", f"--kernels={kernels}"]
    command += [f"--{key}={value}" for key in given if (value := getattr(options, key)) is not None]
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    what = {"size": options.size, "case": case, "loss": loss, "contestant": name, "kernels": kernels}
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [*command, f"--contestant={name}"], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                rows.append(what | json.loads(line))
                print(json.dumps(rows[-1]), flush=True)
        code = child.wait()
        errors.seek(0)
        message = errors.read()
    if not rows:
        if "OutOfMemoryError" not in message:
            raise RuntimeError(f"{name}, {case}, {loss}, {kernels} ended with {code}:\n{message[-3000:]}")
        rows.append(what | {"failed": "out of memory"})
        print(json.dumps(rows[-1]), flush=True)
    elif code != 0:
        print(f"{what} ended with {code} after these figures:\n{message[-2000:]}", flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield how much faster our fastest arrangement is than TRL's, for each case and loss."""
    for case, loss in dict.fromkeys((row["case"], row["loss"]) for row in rows):
        best: dict[str, dict[str, Any]] = {}
        for row in rows:
            if (row["case"], row["loss"]) == (case, loss) and "seconds" in row:
                fastest = best.setdefault(row["contestant"], row)
                best[row["contestant"]] = min(fastest, row, key=lambda each: each["seconds"])
        if best.keys() == {"trl", "ours"}:
            ours, trl = best["ours"], best["trl"]
            share = f", {100 * ours['body_share']:.0f} % of the peak in the body" if ours.get("body_share") else ""
            yield (
                f"{case} {loss}: {trl['seconds'] / ours['seconds']:.2f} times TRL's best, "
                f"{ours['peak_gib'] or 0:.1f} GiB for {trl['peak_gib'] or 0:.1f}{share}"
            )


@dataclass(frozen=True)
class Competitor:
    """`update(k)` adds the gradients of all pairs, k at a time, and returns the loss; `optimize` takes the step."""

    update: Callable[[int], float]
    optimize: Callable[[], object]
    body: Callable[[int], None] | None
    """Forward and backward pass of the layers alone, k pairs at a time."""


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each arrangement of one contestant: without, then with gradient checkpointing."""
    model, pairs = make_model(options), make_pairs(options)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    contestant = (trl if options.contestant == "trl" else ours)(model, pairs, trained, options)
    work = needed_flops(model, pairs, options)
    for checkpointing in [options.checkpointing] if options.checkpointing else ["off", "on"]:
        if checkpointing == "on":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found: dict[str, Any] = {"checkpointing": checkpointing}
        size = largest(contestant, options)
        if size is None:
            yield found | {"failed": "out of memory"}
            continue
        reset_peak(options)
        seconds, loss = timed(lambda k=size: contestant.update(k), contestant.optimize, options)
        found |= {"micro_batch": size, "seconds": seconds, "value": loss, "pairs_per_second": len(pairs) / seconds}
        found |= {"peak_gib": peak_gib(options), "share": share(work["all"], seconds, options)}
        if contestant.body is not None:
            body = contestant.body
            took, _ = timed(lambda k=size, body=body: body(k), lambda: None, options)
            found |= {"body_seconds": took, "body_share": share(work["body"], took, options)}
        yield found


def largest(contestant: Competitor, options: argparse.Namespace) -> int | None:
    """Return the largest micro-batch, in pairs, that fits: all pairs, half of them, and so on; None if one does not."""
    import gc

    import torch

    size = options.pairs
    while size:
        try:
            contestant.update(size)
            contestant.optimize()
            return size
        except torch.OutOfMemoryError:
            pass
        gc.collect()
        torch.cuda.empty_cache()
        size //= 2
    return None


def timed(
    update: Callable[[], float | None], optimize: Callable[[], object], options: argparse.Namespace
) -> tuple[float, float | None]:
    """Return the median seconds of updates after one more, and the first one's loss."""
    import torch

    times: list[float] = []
    losses: list[float | None] = []
    for _ in range(options.rounds + 1):
        began = time.perf_counter()
        losses.append(update())
        optimize()
        if options.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:]), losses[0]


def reset_peak(options: argparse.Namespace) -> None:
    import torch

    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(options: argparse.Namespace) -> float | None:
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None


def share(flops: float, seconds: float, options: argparse.Namespace) -> float | None:
    """Return the share of the card's peak; None where that is not known."""
    peak = options.peak or peak_of(gpu_name())
    return None if peak is None else flops / seconds / (1e12 * peak)


def peak_of(device: str) -> float | None:
    """Return the dense bfloat16 TFLOP/s of the card that CUDA calls `device`; None if the table has none like it.

    >>> peak_of("NVIDIA H100 80GB HBM3"), peak_of("NVIDIA A100-SXM4-80GB"), peak_of("Card")
    (989, 312, None)
    """
    words = set(re.split(r"[\s_-]+", device.lower()))
    names = {frozenset(gpu.name.lower().split("-")): gpu.tflops for gpu in GPUS}
    return max(((len(name), tflops) for name, tflops in names.items() if name <= words), default=(0, None))[1]


def needed_flops(model: Any, pairs: list[Any], options: argparse.Namespace) -> dict[str, float]:
    """Return the FLOPs of forward and backward pass on tokens without padding and repetition: of the body, of all."""
    size = SIZES[options.size]
    head = size["vocab_size"] * size["hidden_size"]
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    body = sum(p.numel() for p in model.parameters()) - 2 * head - adapters
    frozen = options.case == "lora"
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in pairs)
    lengths = [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]
    scores = sum((n + chosen) ** 2 / 2 + rejected * (n + rejected / 2) for n, chosen, rejected in lengths)
    # Scores and values, forward, and twice as much backward.
    attention = 3 * 4 * scores * size["hidden_size"] * size["num_hidden_layers"]
    layers = ((4 if frozen else 6) * body + 6 * adapters) * tokens + attention
    rows = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    return {"body": layers, "all": layers + (4 if frozen else 6) * head * rows}


def make_model(options: argparse.Namespace) -> Any:
    """Return a model of the given size with random weights, liger-kernel's layers if asked, adapters for `lora`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = torch.float32 if options.case == "full" else torch.bfloat16
    config = LlamaConfig(
        **SIZES[options.size], max_position_embeddings=8192, rope_theta=500000.0, dtype=dtype, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(options.device):
        model: Any = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    if options.kernels == "liger" and options.contestant == "ours":
        from trainer.config.trial import ModelConfig
        from trainer.models.layer_kernels import fuse_layers

        fuse_layers(model, ModelConfig(name_or_path="any", kernels="liger"), torch.device(options.device))
    elif options.kernels == "liger":
        from transformers.integrations.liger import apply_liger_kernel

        # As use_liger_kernel does; TRL computes the output layer by its own kernels.
        apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    if options.case == "lora":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        model.enable_input_require_grads()
    return model.train()


def make_pairs(options: argparse.Namespace) -> list[Any]:
    """Return pairs with lengths like UltraFeedback's: up to 1,000 tokens for the prompt and for each response."""
    from tests.support.trl_oracle import Pair

    rng = np.random.default_rng(0)
    top = SIZES[options.size]["vocab_size"]
    scale = 1 if options.device == "cuda" else 16
    means, spread = np.array([PROMPT, RESPONSE, RESPONSE]), np.array([1.0, 0.75, 0.75])
    drawn = rng.lognormal(np.log(means) - spread**2 / 2, spread, size=(options.pairs, 3))
    sizes = (np.clip(drawn, 16, 1000) // scale).astype(int).clip(2)
    return [Pair(*(rng.integers(4, top, n).astype(np.int32) for n in row)) for row in sizes]


def trl(model: Any, pairs: list[Any], trained: dict[str, Any], options: argparse.Namespace) -> Competitor:
    """Return TRL's compute_loss under bf16 autocast with fused AdamW; DPO with precomputed reference log-probs."""
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
    else:
        trainer = DPOTrainer(model, args=DPOConfig(**arguments, beta=0.1, precompute_ref_log_probs=True), **parts)

    def inputs(batch: list[Any]) -> dict[str, Any]:
        if options.loss == "simpo":
            return oracle.cpo_inputs(batch)
        reference = torch.full((len(batch),), -100.0)
        return oracle.dpo_inputs(batch) | {"ref_chosen_logps": reference, "ref_rejected_logps": reference}

    def update(k: int) -> float:
        """Return the loss of one update in micro-batches of `k` pairs."""
        model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=options.device)
        for first in range(0, len(pairs), k):
            batch = pairs[first : first + k]
            with torch.autocast(options.device, torch.bfloat16):
                loss = trainer.compute_loss(model, send_to_device(inputs(batch), options.device))
            loss = loss * (len(batch) / len(pairs))
            loss.backward()
            total += loss.detach()
        return float(total)

    adam = torch.optim.AdamW(trained.values(), lr=1e-6, fused=True)

    def optimize() -> None:
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return Competitor(update, optimize, None)


def ours(model: Any, pairs: list[Any], trained: dict[str, Any], options: argparse.Namespace) -> Competitor:
    """Return the product's update under bf16 autocast, with the reference cached, and its optimizer."""
    import torch

    from trainer.config.loss_config import DpoLoss, SimpoLoss
    from trainer.config.trial import TrainingConfig
    from trainer.forward.architecture import core_model, hidden_states, use_attention
    from trainer.forward.packing import pack_pairs
    from trainer.forward.pair_model import PairModel
    from trainer.objectives.pair_logps import PairLogps, UpdateTotals
    from trainer.training.optimizer import Optimizer

    pair_model = PairModel(model, "packed", autocast=torch.bfloat16)
    core, device = core_model(model), torch.device(options.device)
    totals = UpdateTotals.from_lengths([len(p.prompt) for p in pairs], [len(p.chosen) for p in pairs])
    loss = SimpoLoss(beta=2.0, gamma=1.0) if options.loss == "simpo" else DpoLoss(beta=0.1)
    with torch.autocast(options.device, torch.bfloat16):
        reference = None
        if options.loss == "dpo":
            reference = PairLogps.concatenate([pair_model.logps([pair]).to("cpu") for pair in pairs])

    def update(k: int) -> float:
        """Return the loss of one update in micro-batches of `k` pairs."""
        model.zero_grad(set_to_none=True)
        losses: list[torch.Tensor] = []
        for first in range(0, len(pairs), k):
            part = slice(first, first + k)
            logps = None if reference is None else reference.select(part)
            with torch.autocast(options.device, torch.bfloat16):
                losses.append(pair_model.backward(pairs[part], loss, logps, totals, torch.Tensor.backward).loss)
        return float(sum(losses))

    def body(k: int) -> None:
        model.zero_grad(set_to_none=True)
        for first in range(0, len(pairs), k):
            batch = pack_pairs(pairs[first : first + k]).to(device)
            with torch.autocast(options.device, torch.bfloat16), use_attention(core, batch):
                states = hidden_states(model, core, batch)
                states.backward(torch.ones_like(states))

    optimizer = Optimizer(model, trained, TrainingConfig(learning_rate=1e-6))
    return Competitor(update, lambda: (optimizer.clip_gradients(), optimizer.step(1.0)), body)


def gpu_name() -> str:
    """Return the GPU's name for a result's record; "no GPU" without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    main()
