"""One optimizer step of this product and of TRL in turn: `python -m benchmarks.step [--loss dpo] [--vocabulary 32768]`.

Each contestant runs in its own process with its own model: TRL with default settings, ours with the allocator settings
and the float32 products of the product's workers. Same weights, same pairs, float32, fused AdamW, clipping at 1.
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
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

PAIRS = 8
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def main() -> None:
    """Run the requested comparisons one after the other; as a contestant, take steps on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", choices=["simpo", "dpo"], action="append", help="Both by default.")
    parser.add_argument("--vocabulary", type=int, action="append", help="8192 and 32768 by default.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, action="append", help="1 by default.")
    parser.add_argument("--bf16", action="store_true", help="Autocast to bfloat16 for both.")
    parser.add_argument("--same-allocator", action="store_true", help="Give TRL our allocator settings too.")
    parser.add_argument("--write", action="store_true", help="Put the figures into docs/performance.md too.")
    parser.add_argument("--contestant", choices=["trl", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [
        argparse.Namespace(**{**vars(options), "loss": loss, "vocabulary": vocabulary, "threads": threads})
        for loss in options.loss or ["simpo", "dpo"]
        for vocabulary in options.vocabulary or [8192, 32768]
        for threads in options.threads or [1]
    ]
    if options.contestant:
        run_step_server(cases[0])
        return
    rows = [compare_steps(case) for case in cases]
    if options.write:
        from benchmarks.results import write

        write("steps", {"rows": rows})


def compare_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Run both contestants in turn, after a warm-up round."""
    found = [start(name, options) for name in ("trl", "ours")]
    rounds = [[take_step(process) for process in found] for _ in range(options.rounds + 1)]
    for process in found:
        process.communicate("")
    first, measured = rounds[0], rounds[1:]
    difference = abs(first[0]["loss"] / first[1]["loss"] - 1)
    if difference > (5e-2 if options.bf16 else 1e-5):
        raise RuntimeError(f"not the same step: the first losses differ by {difference:.1e}")
    row: dict[str, Any] = {"loss": options.loss, "vocabulary": options.vocabulary, "threads": options.threads}
    for clock in ("wall", "cpu"):
        times = [[round_[i][clock] for round_ in measured] for i in (0, 1)]
        ratio = median(theirs / ours for theirs, ours in zip(*times, strict=True))
        print(
            f"{options.loss}, vocabulary {options.vocabulary}, {options.threads} threads, "
            f"{'bfloat16' if options.bf16 else 'float32'}, {clock}: "
            f"trl {median(times[0]):.0f} ms, ours {median(times[1]):.0f} ms, median of ratios {ratio:.2f}",
            flush=True,
        )
        if clock == "wall":
            row |= {"trl": median(times[0]), "ours": median(times[1]), "ratio": ratio}
    return row


def start(name: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """Start a contestant's process, which waits for `step` on its standard input."""
    arguments = [f"--{key}={getattr(options, key)}" for key in ("loss", "vocabulary", "threads")]
    arguments += ["--bf16"] if options.bf16 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    if name == "ours" or options.same_allocator:
        environment |= ALLOCATOR
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.step", f"--contestant={name}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )


def take_step(process: subprocess.Popen[str]) -> dict[str, float]:
    """Run one step of a contestant; return its loss and milliseconds."""
    start_step(process)
    return read_result(process)


def start_step(process: subprocess.Popen[str]) -> None:
    """Make a contestant start a step."""
    if process.stdin is None:
        raise RuntimeError("the contestant has no pipes")
    process.stdin.write("step\n")
    process.stdin.flush()


def read_result(process: subprocess.Popen[str]) -> dict[str, float]:
    """Wait for a contestant's loss and milliseconds."""
    if process.stdout is None:
        raise RuntimeError("the contestant has no pipes")
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError("a contestant ended early; run it with --contestant to see why")


def run_step_server(options: argparse.Namespace) -> None:
    """Take a step per line of standard input; write its loss and milliseconds as JSON to standard output."""
    import torch

    from trainer.environment import choose_float32_products

    torch.set_num_threads(options.threads)
    if options.contestant == "ours":
        choose_float32_products(torch.device("cpu"))
    model = llama(options.vocabulary, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    step = (trl_step if options.contestant == "trl" else our_step)(model, options)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            loss = step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        usage = {"wall": 1e3 * (time.perf_counter() - wall), "cpu": 1e3 * (time.process_time() - cpu)}
        print(json.dumps({"loss": float(loss), **usage}), flush=True)


def llama(vocabulary: int, seed: int) -> Any:
    """Return the Llama of SPEED.md; the same seed gives the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).train()


def make_pairs(vocabulary: int) -> list[Any]:
    """Return pairs with prompts of 60-300 tokens and responses of 40-250."""
    from tests.support.trl_oracle import Pair

    rng = np.random.default_rng(0)
    sizes = rng.integers([60, 40, 40], [301, 251, 251], size=(PAIRS, 3))
    return [Pair(*(rng.integers(4, vocabulary, n).astype(np.int32) for n in row)) for row in sizes]


def trl_step(model: Any, options: argparse.Namespace) -> Callable[[], Any]:
    """Return a function that computes TRL's loss and gradients on the pairs."""
    from tests.support import trl_oracle as oracle

    folder, pairs = Path(tempfile.mkdtemp()), make_pairs(options.vocabulary)
    if options.loss == "simpo":
        trainer = oracle.cpo_trainer(model, folder, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0)
        inputs = oracle.cpo_inputs(pairs)
    else:
        trainer = oracle.dpo_trainer(model, llama(options.vocabulary, seed=1), folder, beta=0.1)
        inputs = oracle.dpo_inputs(pairs)

    def step() -> Any:
        loss = trainer.compute_loss(model, dict(inputs))
        loss.backward()
        return loss.detach()

    return step


def our_step(model: Any, options: argparse.Namespace) -> Callable[[], Any]:
    """Return a function that computes the same with `PairModel`; reference log-probs are computed once before."""
    import torch

    from trainer.config.loss_config import DpoLoss, SimpoLoss
    from trainer.forward.pair_model import PairModel
    from trainer.objectives.pair_logps import UpdateTotals

    pairs = make_pairs(options.vocabulary)
    totals = UpdateTotals.from_lengths([len(p.prompt) for p in pairs], [len(p.chosen) for p in pairs])
    reference = None if options.loss == "simpo" else PairModel(llama(options.vocabulary, seed=1)).logps(pairs)
    loss = SimpoLoss(beta=2.0, gamma=1.0) if options.loss == "simpo" else DpoLoss(beta=0.1)
    ours = PairModel(model)
    return lambda: ours.backward(pairs, loss, reference, totals, torch.Tensor.backward).loss


if __name__ == "__main__":
    main()
