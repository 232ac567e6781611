"""`python -m trainer.probe trial.yaml`: measure a few updates and an evaluation; writes nothing but the cache.

The first process writes one JSON object to stdout: seconds (the fastest update; the first is skipped as warm-up), work
done, seconds of an evaluation, and peak memory (GPU: allocated by torch; CPU: resident memory above that at start).
Exit codes: 0; 2 the configuration, the data or the model cannot be used; 3 out of memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import load_trial
from trainer.memory_limits import is_out_of_memory
from trainer.results import TrialError

if TYPE_CHECKING:
    from trainer.data.pair_dataset import PairDataset
    from trainer.evaluation.evaluator import Evaluator
    from trainer.objectives.pair_logps import PairLogps

DONE, UNUSABLE, OUT_OF_MEMORY = 0, 2, 3
_UPDATES = 3
_SCORED_PAIRS = 32
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class UpdateMeasurement:
    """One update, and an evaluation.

    `tokens`: positions computed by all processes; `peak_bytes`: of this process; `scoring_seconds`: log-probs of one
    held-out pair; `answer_seconds`: all completions of one evaluation.
    """

    device: str
    processes: int
    pairs: int
    tokens: int
    seconds: float
    peak_bytes: int
    scoring_seconds: float
    answer_seconds: float
    train_pairs: int
    eval_pairs: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the trial named on the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.probe", description="Measure a few updates of a trial.")
    parser.add_argument("trial", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--gpu-share", type=float, default=1.0, help="Share of the GPU's memory.")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args(arguments)

    def work() -> None:
        config, trust_remote_code = load_trial(options.trial), options.trust_remote_code
        found = measure(config, options.cache, gpu_share=options.gpu_share, trust_remote_code=trust_remote_code)
        if found is not None:
            sys.stdout.write(json.dumps(asdict(found)) + "\n")

    return exit_code_of(work)


def exit_code_of(work: Callable[[], None]) -> int:
    """Return DONE after the work of a child process; UNUSABLE or OUT_OF_MEMORY with the reason on stderr."""
    try:
        work()
    except TrialError as error:
        sys.stderr.write(f"{error}\n")
        return UNUSABLE
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write(f"out of memory: {str(error).partition(chr(10))[0]}\n")
        return OUT_OF_MEMORY
    return DONE


def measure(
    config: TrialConfig, cache: Path, *, gpu_share: float = 1.0, trust_remote_code: bool = False
) -> UpdateMeasurement | None:
    """Return the measurement in the first process, None in the others."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from trainer.data import check_rows, score_gaps
    from trainer.distributed.processes import CancelToken, ProcessGroup, limit_gpu_memory
    from trainer.resource_cache import ResourceCache, check_positions, check_vocabulary, make_evaluator
    from trainer.training.engine import TrainingInputs
    from trainer.training_session import create_engine

    disable_progress_bar()
    limit_gpu_memory(gpu_share)
    process_group = ProcessGroup()
    cancel_token, before = CancelToken(process_group, lambda: False), _kilobytes("VmRSS")
    config = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": _UPDATES})})
    resources = ResourceCache(cache, process_group, trust_remote_code=trust_remote_code)
    prepared, tokenizer = resources.load_data(config.data, config.model)
    check_rows(config.loss, prepared.train, prepared.eval)
    sharded = process_group.shards_model(config.training)
    policy = resources.load_model(config.model, will_shard=sharded)
    check_vocabulary(policy, prepared)
    check_positions(policy, prepared)
    if sharded:
        policy.prepare_for_trial(config.lora, config.training, single_use=True)
        policy.shard(process_group.device)
    reference = _reference(
        config, make_evaluator(config, policy, prepared, tokenizer, process_group, cancel_token), prepared.train
    )
    if not sharded:
        policy.prepare_for_trial(config.lora, config.training)
    evaluator = make_evaluator(config, policy, prepared, tokenizer, process_group, cancel_token)
    gaps = score_gaps(config.data, prepared, cache).train if config.loss.needs_scores else None
    inputs = TrainingInputs(
        policy,
        evaluator.pair_model,
        prepared.train,
        reference,
        process_group,
        cancel_token,
        None if gaps is None else torch.from_numpy(gaps),
    )
    seconds, sums = list[float](), dict[str, tuple[float, float]]()
    with tempfile.TemporaryDirectory() as folder:
        engine = create_engine(config, inputs, tokenizer, Path(folder))
        for step in range(1, _UPDATES + 1):
            began = perf_counter()
            sums = engine.step(step)
            seconds.append(perf_counter() - began)
        engine.close()
    scoring_seconds, answer_seconds = _evaluation_seconds(config, evaluator)
    cuda = process_group.device.type == "cuda"
    if not process_group.is_main:
        return None
    tokens, _ = sums["tokens_per_second"]  # numerator and denominator: the tokens and seconds of the last update
    return UpdateMeasurement(
        device=torch.cuda.get_device_name(process_group.device) if cuda else "CPU",
        processes=process_group.size,
        pairs=config.training.pairs_per_update,
        tokens=round(tokens),
        seconds=min(seconds[1:]),
        peak_bytes=torch.cuda.max_memory_allocated(process_group.device)
        if cuda
        else 1024 * max(0, _kilobytes("VmHWM") - before),
        scoring_seconds=scoring_seconds,
        answer_seconds=answer_seconds,
        train_pairs=len(prepared.train),
        eval_pairs=len(prepared.eval),
    )


def _evaluation_seconds(config: TrialConfig, evaluator: Evaluator) -> tuple[float, float]:
    """Return the seconds of one held-out pair, over up to 32 pairs from all parts of the data, and of all completions.

    Of each two measurements the faster one, as the first warms up.
    """
    pairs = evaluator.pairs
    indexes = range(0, len(pairs), max(1, len(pairs) // _SCORED_PAIRS))[:_SCORED_PAIRS]
    scoring = _fastest(lambda: evaluator.logps(pairs, indexes)) / len(indexes)
    return scoring, _fastest(evaluator.completions) if config.evaluation.prompts else 0.0


def _fastest(call: Callable[[], object]) -> float:
    seconds = list[float]()
    for _ in range(2):
        began = perf_counter()
        call()
        seconds.append(perf_counter() - began)
    return min(seconds)


def _reference(config: TrialConfig, evaluator: Evaluator, pairs: PairDataset) -> PairLogps | None:
    """Return the initial model's log-probs of the pairs that are trained on, and zeros for the others."""
    from trainer.objectives.losses import required_stats
    from trainer.objectives.pair_logps import PairLogps
    from trainer.training.schedule import DataOrder

    required, training = required_stats(config.loss), config.training
    if not required.reference or config.loss.moves_reference:
        return None
    order = DataOrder(len(pairs), training.pairs_per_update, training.seed)
    used = sorted({index for step in range(1, _UPDATES + 1) for index in order.pairs_of(step)})
    found = evaluator.logps(pairs, used)
    full = {name: column.new_zeros(len(pairs)) for name, column in found.columns().items()}
    return PairLogps.from_columns(full).replace_pairs(used, found)


def _kilobytes(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines() if _STATUS.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


if __name__ == "__main__":
    sys.exit(main())
