"""Plan of a sweep on this machine, from row counts and slots; uses no GPU and no network.

`--probe` measures a few updates of the most expensive trial in a subprocess.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from orchestrator.commands.data_preview import has_labels
from orchestrator.errors import DataError, SpecError, StorageRefused
from orchestrator.execution.local_cluster import worker_environment
from orchestrator.execution.slots import Slots, gpu_memory, machine_gpus, plan_slots
from orchestrator.folders import SweepFolder
from orchestrator.gpu_locks import gpu_holders, holders_text, reserved_gpus
from orchestrator.gpus import hidden_gpus, visible_devices
from orchestrator.redaction import without_credentials
from orchestrator.spec.estimates.arrangement import DoesNotFit, arranged
from orchestrator.spec.estimates.cost_estimate import GpuAssumptions, check_share, gpu_share, largest_config
from orchestrator.spec.estimates.gpu_layouts import Arrangement
from orchestrator.spec.estimates.gpu_table import PlannedMachine
from orchestrator.spec.estimates.input_checks import check_judge_prompts, check_pair_counts, read_small_files
from orchestrator.spec.estimates.input_sizes import (
    RowCounts,
    check_models,
    count_rows,
    model_shape,
    published_tokens,
)
from orchestrator.spec.estimates.machine_plans import MachinePlan, plan_on
from orchestrator.spec.estimates.measured_update import MeasuredUpdate, compare_with_formula, wall_clock
from orchestrator.spec.estimates.published_sizes import NOT_COUNTED
from orchestrator.spec.estimates.sweep_plan import SweepPlan, make_plan
from orchestrator.spec.search.corners import corner_configs
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.tracking.mlflow_client import tracking_uri
from orchestrator.tracking.tracking_store import check_tracking_store
from trainer.config.trial import TrialConfig

CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
_LEAST_HIDDEN_SIZE = 256
"""Hidden size from which updates are 1.4 times faster; 1.3 times at 96."""


def _bfloat16_offer(spec: SweepSpec, cpu_info: Path) -> list[str]:
    """Return a notice where float32 training leaves this processor's bfloat16 products unused."""
    shape = model_shape(spec.base.model)
    configs = corner_configs(spec.search, spec.base)
    if shape is None or shape.hidden < _LEAST_HIDDEN_SIZE or not cpu_info.is_file():
        return []
    if any(config.training.bf16 or config.model.dtype != "float32" for config in configs):
        return []
    if not _BFLOAT16_FLAGS & set(cpu_info.read_text(encoding="utf-8", errors="replace").split()):
        return []
    return [
        "this processor multiplies in bfloat16: `--set base.training.bf16=true` made updates 1.4 times faster on one "
        "like it (docs/performance.md), in another precision, so that results differ from float32's"
    ]


def plan_locally(
    spec: SweepSpec,
    root: Path,
    notices: Sequence[str],
    assumptions: GpuAssumptions | None = None,
    *,
    probe: bool = False,
    trust_remote_code: bool = False,
    command: str = "",
) -> SweepPlan:
    """Return the plan with this machine's slots.

    A machine too small for one trial is only a notice, as the sweep may run on another machine.

    Args:
        spec: the sweep.
        root: the runs folder.
        notices: notices to include.
        assumptions: assumptions about the GPU; unknown values are read from this machine.
        probe: measure an update of the most expensive trial in a subprocess.
        trust_remote_code: whether Python code of the model's repository may run in the probe.
        command: the command that starts the sweep, to which changes that make it fit are added.

    Raises:
        ProbeFailed: the probe failed.
        ModelError: a file of a model is damaged.
        DataError: the data has fewer pairs than one update, or the judge's prompts cannot be read.
        SpecError: MLflow refuses the tracking store; with `probe`, no trial fits this machine.
    """
    check_tracking_store(tracking_uri(root, spec.tracking.uri), spec.tracking.uri)
    check_models(spec)
    check_judge_prompts(spec)
    all_notices = list(notices)
    assumptions = assumptions or GpuAssumptions()
    chosen, found = _arrange(spec, assumptions, command)
    if isinstance(found, DoesNotFit):
        if probe:
            raise found
        all_notices += [str(replace(problem, where="", path="")) for problem in found.problems]
    try:
        slots: Slots | None = plan_slots(chosen if machine_gpus().memory else spec)
    except SpecError as error:
        if probe:
            raise
        slots = None
        all_notices += [finding.problem for finding in error.problems]
    if spec.resources.gpus_per_trial is None and (message := hidden_gpus()):
        all_notices.append(message)
    all_notices += [] if slots is None or not slots.gpus else _gpus_in_use()
    if spec.warm_start is not None:
        from orchestrator.study.sampling.warm_start import (
            warm_start,  # imports the study's libraries, which other plans do not need
        )

        all_notices += warm_start(spec, root).notices
    device = None if slots is None else "GPU" if slots.gpus else "CPU"
    about_gpus = device != "CPU" or assumptions.has_gpu
    if assumptions.gpu_memory is None:
        assumptions = replace(assumptions, gpu_memory=gpu_memory())
    check_share(chosen, assumptions.gpu_memory)
    assumptions = replace(gpu_share(chosen, assumptions.gpu_memory, assumptions), processes=chosen.resources.processes)
    rows, assumptions = _sizes_of_data(spec, assumptions, all_notices)
    if (root / spec.name).exists():
        all_notices.append(f"a sweep named {spec.name} exists already; use another --name to start this one")
    if device == "CPU" and not probe:
        all_notices.append("the time on this machine is not measured; `plan --probe` measures it")
    if device == "CPU":
        all_notices += _bfloat16_offer(spec, CPU_INFO)
    made = make_plan(
        spec,
        root,
        rows,
        concurrency=None if slots is None else slots.count,
        tracking=without_credentials(tracking_uri(root, spec.tracking.uri)),
        notices=all_notices,
        assumptions=assumptions,
        chosen=None if isinstance(found, DoesNotFit) else chosen,
        arrangement=found if isinstance(found, Arrangement) else None,
        device=device,
        about_gpus=about_gpus,
    )
    from orchestrator.commands.advice.advise_sweep import free_advice  # numpy: not for a file with errors

    made = replace(made, advice=free_advice(spec, root, rows.train).lines)
    if not probe or slots is None:
        return made

    configs, shape = corner_configs(chosen.search, chosen.base), model_shape(chosen.base.model)
    config = configs[0] if shape is None else largest_config(configs, shape, assumptions)
    from orchestrator.driver.sft_stage import sft_config  # imports the study's libraries

    cache = SweepFolder(root, spec.name).cache
    sft = sft_config(chosen)
    with _gpus_of_probe(spec.name, slots):
        measured = measure_update(config, cache, slots, trust_remote_code=trust_remote_code)
        of_sft = None if sft is None else measure_update(sft, cache, slots, trust_remote_code=trust_remote_code)
    return replace(
        made,
        probe=compare_with_formula(measured, config, shape, assumptions, made.estimate),
        wall_clock=wall_clock(
            configs,
            measured,
            None if sft is None or of_sft is None else (sft, of_sft),
            trials=made.trainings,
            slots=slots.count,
        ),
    )


def _gpus_in_use() -> list[str]:
    devices = visible_devices()
    try:
        holders = gpu_holders(devices)
    except StorageRefused as error:
        return [str(error)]
    if not holders:
        return []
    effect = "takes the others" if len(holders) < len(devices) else "waits for them (--no-wait refuses)"
    return [f"{holders_text(devices, holders)}; a sweep that starts now {effect}"]


def _gpus_of_probe(name: str, slots: Slots) -> AbstractContextManager[object]:
    """Reserve the GPUs of one trial; while it waits for them, say so once on stderr."""
    least, _ = slots.gpus_needed
    shown: set[str] = set()

    def show(sentence: str) -> None:
        if sentence not in shown:
            shown.add(sentence)
            sys.stderr.write(f"{sentence}\n")

    return reserved_gpus(f"{name} (plan --probe)", least, least, waits=True, on_wait=show)


def _sizes_of_data(
    spec: SweepSpec, assumptions: GpuAssumptions, notices: list[str]
) -> tuple[RowCounts, GpuAssumptions]:
    """Return rows and tokens per pair: those given, else counted here, else published; adds notices about them."""
    rows, tokens = count_rows(spec.base.data, use_published=True), published_tokens(spec.base.data)
    published = set(rows.published)
    if assumptions.train_pairs is not None:
        rows = replace(rows, train=assumptions.train_pairs, exact=False, published=())
    elif (exact := check_pair_counts(spec)) is not None:
        rows = replace(rows, train=exact)
    elif (read := read_small_files(spec.base.data)) is not None:
        rows = read
    elif rows.train is None:
        notices.append("the number of training pairs is unknown until the data is downloaded")
    if assumptions.tokens_per_pair is None and tokens is not None:
        assumptions = replace(assumptions, tokens_per_pair=tokens.per_pair)
        published |= set(tokens.sources)
    elif assumptions.tokens_per_pair is None and has_labels(spec.base.data):
        assumptions = replace(assumptions, tokens_per_pair=spec.base.data.max_length)
        notices.append("rows with one response and a label: the estimate counts data.max_length tokens a row")
    if published:
        notices.append(f"{NOT_COUNTED}: {'; '.join(sorted(published))}")
    return rows, assumptions


def plan_machines(
    spec: SweepSpec,
    root: Path,
    machines: Sequence[PlannedMachine],
    notices: Sequence[str],
    assumptions: GpuAssumptions,
) -> list[MachinePlan]:
    """Return the plan of the sweep on each of these machines; uses nothing of this one but its files.

    Raises:
        ModelError: a file of a model is damaged.
        DataError: the data has fewer pairs than one update.
    """
    check_models(spec)
    all_notices = list(notices)
    rows, assumptions = _sizes_of_data(spec, assumptions, all_notices)
    tracking = without_credentials(tracking_uri(root, spec.tracking.uri))
    return [
        plan_on(spec, machine, root, rows, tracking=tracking, notices=all_notices, assumptions=assumptions)
        for machine in machines
    ]


def _arrange(
    spec: SweepSpec, assumptions: GpuAssumptions, command: str
) -> tuple[SweepSpec, Arrangement | DoesNotFit | None]:
    """Return the sweep with the values chosen for this machine's GPUs, or for one of the assumed memory."""
    machine = machine_gpus()
    if assumptions.gpu_memory is not None:
        machine = replace(machine, memory=(assumptions.gpu_memory,) * max(1, len(machine.memory)))
    try:
        return arranged(spec, [machine])
    except DoesNotFit as error:
        return spec, DoesNotFit(error.found, "", error.found.hint(command))


_UNUSABLE, _OUT_OF_MEMORY = 2, 3
"""Exit codes of trainer/probe.py."""


class ProbeFailed(DataError):
    """The trainer could not run an update of this sweep's trials on this machine."""


def measure_update(
    config: TrialConfig, cache: Path, slots: Slots, *, trust_remote_code: bool = False
) -> MeasuredUpdate:
    """Measure an update on this machine; the micro-batch is halved while it is out of memory, down to one pair.

    Raises:
        ProbeFailed: the update fails for another reason, or with one pair; with the trainer's error message.
    """
    pair = 2 * config.data.max_length
    while True:
        tokens = config.training.tokens_per_micro_batch
        done = _run(config, cache, slots, trust_remote_code)
        if done.returncode == 0:
            return MeasuredUpdate(**json.loads(done.stdout.splitlines()[-1]), tokens_per_micro_batch=tokens)
        errors = done.stderr.strip().splitlines()
        if done.returncode != _OUT_OF_MEMORY or tokens <= pair:
            message = "\n".join(errors if done.returncode == _UNUSABLE else errors[-3:])
            raise ProbeFailed(f"the probe failed to run an update (exit {done.returncode}): {message}")
        smaller = {"tokens_per_micro_batch": max(tokens // 2, pair)}
        config = config.model_copy(update={"training": config.training.model_copy(update=smaller)})


def _run(config: TrialConfig, cache: Path, slots: Slots, trust_remote_code: bool) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable]
    if slots.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={slots.processes}"]
    environment = os.environ | worker_environment(slots.threads)
    if not slots.gpus:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.yaml"
        file.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
        command = [*launch, "-m", "trainer.probe", str(file), "--cache", str(cache)]
        if slots.gpu_fraction is not None:
            command += ["--gpu-share", str(slots.gpu_fraction)]
        if trust_remote_code:
            command.append("--trust-remote-code")
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, env=environment
        )
