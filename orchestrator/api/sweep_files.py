"""`load` and `plan`: a sweep file, or the same as a mapping, with its errors at their lines; what it would do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from orchestrator.api.sweep_handle import Settings, as_overrides, plain_value
from orchestrator.errors import OrchestrateError
from orchestrator.folders import runs_folder

if TYPE_CHECKING:
    from orchestrator.spec.estimates.arrangement import DoesNotFit
    from orchestrator.spec.estimates.cost_estimate import GpuAssumptions
    from orchestrator.spec.estimates.sweep_plan import SweepPlan
    from orchestrator.spec.sweep_spec import SweepSpec
    from trainer.config.yaml_files import Document


class ServicePlanDiffers(OrchestrateError):
    """A service of another version answered a plan that this one cannot show."""


Source = str | os.PathLike[str] | Mapping[str, Any]
"""A sweep file's path, or its content as a mapping."""


@dataclass(frozen=True, slots=True)
class LoadedSweep:
    """A sweep file that was read and checked.

    Attributes:
        spec: what it means, with all defaults.
        notices: what was changed or may be meant otherwise.
        document: values as written, each with its line.
        source: path of the file; None for a mapping.
        overrides: changes as PATH=VALUE.
        name: name given instead of the file's.
        is_rehearsal: whether `spec` is the small copy of `--rehearse`.
        mapping: what was given instead of a file.
    """

    spec: SweepSpec
    notices: tuple[str, ...]
    document: Document
    source: Path | None
    overrides: tuple[str, ...] = ()
    name: str | None = None
    is_rehearsal: bool = False
    mapping: Mapping[str, Any] | None = None

    def command(self) -> str:
        """Return the command that starts this sweep, for a shell; of a mapping with `FILE` for its file."""
        import shlex

        options = [part for one in self.overrides for part in ("--set", one)]
        options += ["--name", self.name] if self.name else []
        return shlex.join(["orchestrate", "sweep", str(self.source or "FILE"), *options])

    def with_line(self, error: DoesNotFit) -> DoesNotFit:
        """Return the error of a sweep that does not fit the machine, with the line of the setting and a way out."""
        where = self.document.location(tuple(error.found.path.split(".")))
        return type(error)(error.found, where, error.found.hint(self.command()))


def load(
    source: Source,
    overrides: Settings = (),
    *,
    name: str | None = None,
    rehearse: bool = False,
    runs: Path | None = None,
) -> LoadedSweep:
    """Read a sweep file and check it.

    Args:
        source: path of the file, or its content as a mapping; file names in a mapping are relative to the working
            directory.
        overrides: changes of settings.
        name: name of the sweep instead of the file's.
        rehearse: return a small copy of the sweep: tiny random model, few rows, steps and trials.
        runs: the runs folder; default $ORCHESTRATE_HOME, or ./runs.

    Raises:
        SpecError: with all errors of the file, each with its line and what is valid there.
    """
    from orchestrator.commands.data_preview import check_rows
    from orchestrator.spec.loading.file_rights import FileRights
    from orchestrator.spec.loading.loader import load_text_with_notices, load_with_notices
    from orchestrator.spec.loading.position_checks import check_lengths
    from trainer.environment import foreign_settings, ignored_message

    changes = as_overrides(overrides)
    if isinstance(source, Mapping):
        path = None
        rights = FileRights.of_command(Path.cwd())
        read = load_text_with_notices(as_yaml(source), rights, changes, source="mapping", name=name)
    else:
        path = Path(source)
        read = load_with_notices(path, changes, name=name)
    lengths = check_lengths(read.spec, read.document)
    check_rows(read.spec, read.document)
    notices = (*read.notices, *lengths)
    if foreign := foreign_settings():
        notices = (*notices, ignored_message(foreign))
    spec = read.spec
    if rehearse:
        from orchestrator.commands.rehearsal import rehearse as make_rehearsal

        rehearsal = make_rehearsal(spec, runs or runs_folder())
        spec, notices = rehearsal.spec, (*notices, *rehearsal.notices)
    return LoadedSweep(
        spec, notices, read.document, path, changes, name, rehearse, source if isinstance(source, Mapping) else None
    )


def loaded(sweep: LoadedSweep | Source, runs: Path) -> LoadedSweep:
    """Return the sweep itself if it was loaded, else load it."""
    return sweep if isinstance(sweep, LoadedSweep) else load(sweep, runs=runs)


def plan(
    sweep: LoadedSweep | Source,
    *,
    assumptions: GpuAssumptions | None = None,
    probe: bool = False,
    trust_remote_code: bool = False,
    runs: Path | None = None,
) -> SweepPlan:
    """Return what a sweep would do, without running a trial: trials, updates, tokens, memory, GPU-hours, files.

    Args:
        sweep: the sweep, or its file.
        assumptions: about the GPU, the prices and the data; what it leaves out is read from this machine.
        probe: measure an update of the most expensive trial on this machine.
        trust_remote_code: whether Python code of the model's repository may run in the probe.
        runs: the runs folder; default $ORCHESTRATE_HOME, or ./runs.

    Raises:
        SpecError: the file has errors, or MLflow refuses the tracking store; with `probe`, no trial fits.
        ProbeFailed, ModelError: the probe failed; a file of a model is damaged.
    """
    from orchestrator.commands.local_plan import plan_locally

    root = runs or runs_folder()
    read = loaded(sweep, root)
    return plan_locally(
        read.spec,
        root,
        read.notices,
        assumptions,
        probe=probe,
        trust_remote_code=trust_remote_code,
        command=read.command(),
    )


def plan_from_json(values: Mapping[str, Any]) -> SweepPlan:
    """Return the plan whose `as_json` this is, as a service answers it. Raises ServicePlanDiffers."""
    from pydantic import TypeAdapter, ValidationError

    from orchestrator.spec.advice.advice_lines import AdviceLine
    from orchestrator.spec.estimates.sweep_plan import JSON_NAMES, SweepPlan

    names = {new: old for old, new in JSON_NAMES.items()} | {"identity": "sweep_identity"}

    def renamed(given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {names.get(name, name): renamed(value) for name, value in cast(Mapping[str, Any], given).items()}

    # Only the plan itself and its estimate have such fields; names in other mappings are settings.
    fields = {names.get(name, name): renamed(value) if name == "estimate" else value for name, value in values.items()}
    plans = TypeAdapter(SweepPlan)
    plans.rebuild(_types_namespace={"AdviceLine": AdviceLine})
    try:
        return plans.validate_python(fields)
    except ValidationError as error:
        raise ServicePlanDiffers(
            f"the service's plan has another form than this version prints ({error.error_count()} differences): "
            "--json prints it as it is"
        ) from error


def as_yaml(source: Mapping[str, Any]) -> str:
    """Return a mapping as the text of a sweep file: JSON, which is YAML and leaves no doubt what is text."""
    return json.dumps(source, indent=2, ensure_ascii=False, default=plain_value)
