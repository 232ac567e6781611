"""`python -m trainer.probe trial.yaml`: a few updates of one trial, measured; nothing is kept but the cache.

On stdout one JSON object, from the first process where several train together: seconds of an update (the fastest but
the first, which also fills caches), what it computed, and the most memory that this process took: on a GPU what torch
had allocated, else resident memory beyond what the program itself takes. Exit codes: 0, 2 the configuration, the data
or the model cannot be used, 3 out of memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import load_trial
from trainer.results import TrialError

if TYPE_CHECKING:
    from trainer.data.pair_dataset import PairSet
    from trainer.evaluation.evaluator import Examiner
    from trainer.objectives.pair_logps import PairLogps

DONE, UNUSABLE, OUT_OF_MEMORY = 0, 2, 3
_UPDATES = 3
_STATUS = Path("/proc/self/status")
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True, slots=True)
class Measured:
    """One update. `tokens` are positions that the model's body computed, of all processes; `peak_bytes` of this one."""

    device: str
    processes: int
    pairs: int
    tokens: int
    seconds: float
    peak_bytes: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m trainer.probe", description="Measure a few updates of a trial.")
    parser.add_argument("trial", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--gpu-share", type=float, default=1.0, help="Of the GPU's memory.")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args(arguments)
    try:
        config, trust = load_trial(options.trial), options.trust_remote_code
        found = measure(config, options.cache, gpu_share=options.gpu_share, trust_remote_code=trust)
    except TrialError as why:
        sys.stderr.write(f"{why}\n")
        return UNUSABLE
    except (MemoryError, RuntimeError) as why:
        if isinstance(why, RuntimeError) and not any(words in str(why) for words in _MEMORY_WORDS):
            raise
        sys.stderr.write(f"out of memory: {str(why).partition(chr(10))[0]}\n")
        return OUT_OF_MEMORY
    if found is not None:
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
    return DONE


def measure(
    config: TrialConfig, cache: Path, *, gpu_share: float = 1.0, trust_remote_code: bool = False
) -> Measured | None:
    """The measurement in the first process, None in the others."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from trainer.distributed.processes import Patience, World, keep_to_share
    from trainer.resource_cache import Stock, check_positions, check_vocabulary, examiner
    from trainer.training.engine import Material
    from trainer.training_session import engine_for

    disable_progress_bar()
    keep_to_share(gpu_share)
    world = World()
    patience, before = Patience(world, lambda: False), _kilobytes("VmRSS")
    config = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": _UPDATES})})
    stock = Stock(cache, world, trust_remote_code=trust_remote_code)
    prepared, tokenizer = stock.prepared(config.data, config.model)
    cut = world.cuts(config.training)
    live = stock.live(config.model, to_cut=cut)
    check_vocabulary(live, prepared)
    check_positions(live, prepared)
    if cut:
        live.begin(config.lora, config.training, once=True)
        live.shard(config.training, world.device)
    reference = _reference(config, examiner(config, live, prepared, tokenizer, world, patience), prepared.train)
    if not cut:
        live.begin(config.lora, config.training)
    looking = examiner(config, live, prepared, tokenizer, world, patience)
    material = Material(live, looking.model, prepared.train, reference, world, patience)
    seconds, totals = list[float](), dict[str, tuple[float, float]]()
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_for(config, material, tokenizer, Path(folder))
        for step in range(1, _UPDATES + 1):
            began = perf_counter()
            totals = engine.update(step)
            seconds.append(perf_counter() - began)
        engine.close()
    cuda = world.device.type == "cuda"
    if not world.is_main:
        return None
    return Measured(
        device=torch.cuda.get_device_name(world.device) if cuda else "CPU",
        processes=world.size,
        pairs=config.training.pairs_per_update,
        tokens=round(totals["tokens_per_second"][0]),
        seconds=min(seconds[1:]),
        peak_bytes=torch.cuda.max_memory_allocated(world.device)
        if cuda
        else 1024 * max(0, _kilobytes("VmHWM") - before),
    )


def _reference(config: TrialConfig, at_rest: Examiner, pairs: PairSet) -> PairLogps | None:
    """The start model's log-probs of the pairs that will be trained on, and zeros elsewhere."""
    from trainer.objectives.losses import needs
    from trainer.objectives.pair_logps import PairLogps
    from trainer.training.schedule import Order

    wanted, training = needs(config.loss), config.training
    if not wanted.reference:
        return None
    order = Order(len(pairs), training.pairs_per_update, training.seed)
    used = sorted({index for step in range(1, _UPDATES + 1) for index in order.update(step)})
    found = at_rest.logps(pairs, used)
    whole = {name: column.new_zeros(len(pairs)) for name, column in found.columns().items()}
    return PairLogps.from_columns(whole).with_rows(used, found)


def _kilobytes(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines() if _STATUS.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


if __name__ == "__main__":
    sys.exit(main())
