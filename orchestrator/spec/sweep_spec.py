"""`SweepSpec`: a sweep's YAML as a frozen value, with budget, resources, tracking, SFT stage and notifications.

Its hash identifies the sweep. Folders on other machines are URLs of fsspec and MLflow: s3://bucket/prefix, gs://,
file:///shared.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from orchestrator.spec.guard_config import GuardConfig
from orchestrator.spec.judge_config import JudgeConfig
from orchestrator.spec.objectives import Objective, unmeasured_reason
from orchestrator.spec.pruners import PRUNED_FROM, MedianPruner, NoPruner, Pruner
from orchestrator.spec.requirements import Requirement
from orchestrator.spec.samplers import GridSampler, Order, Reproducible, Sampler, StagedSampler, max_trials
from orchestrator.spec.search.dimensions import Scalar
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import SEED
from trainer.config.base import FrozenModel, LaterFields, NonEmptyStr, NonNegativeFloat, PositiveFloat, PositiveInt
from trainer.config.trial import STORED, DataConfig, TrainingConfig, TrialConfig

_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+")
_EXAMPLES = "s3://bucket/prefix, gs://bucket/prefix or file:///shared/folder"


def _check_url(url: str) -> str:
    if not _URL.fullmatch(url):
        raise ValueError(f"must be a URL such as {_EXAMPLES}")
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("contains a user name or a password; credentials come from the environment")
    if parts.query or parts.fragment:
        raise ValueError(f"must be a plain URL such as {_EXAMPLES}, without ? and #")
    if parts.scheme == "memory":
        raise ValueError("memory:// does not outlive its process")
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ValueError("a folder of this machine has three slashes: file:///shared/folder")
    if ".." in parts.path.split("/"):
        raise ValueError("must not contain ..")
    return url.rstrip("/")


StorageUrl = Annotated[str, AfterValidator(_check_url)]
"""A URL without credentials and without a trailing slash."""


NotificationKind = Literal["finished", "diverged", "stalled"]
"""Events that can be notified of."""


class Notify(FrozenModel):
    """Notifications by webhook, command or both. The webhook's URL is a secret: the file names the variable with it."""

    webhook_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        default=None,
        description="Environment variable with the webhook's URL, which receives Slack's JSON {text: ...}.",
    )
    command: tuple[NonEmptyStr, ...] | None = Field(
        default=None, min_length=1, description="Program and arguments; reads the notification as JSON from stdin."
    )
    on: tuple[NotificationKind, ...] = Field(
        default=get_args(NotificationKind), description="Events that are notified of."
    )
    stalled_minutes: PositiveFloat = Field(
        default=30.0, description="Minutes without metrics or any other report of a worker."
    )

    @model_validator(mode="after")
    def _check_receiver(self) -> Notify:
        if self.webhook_env is None and self.command is None:
            raise ValueError("needs webhook_env or command, else no notification is sent")
        return self


SECTION_ORDER = (
    "name",
    "description",
    "base",
    "search",
    "enqueue",
    "sampler",
    "repeats",
    "warm_start",
    "order",
    "maximize",
    "minimize",
    "require",
    "pruner",
    "guard",
    "finalists",
    "budget",
    "resources",
    "tracking",
    "notify",
    "judge",
    "sft",
    "keep_models",
    "storage",
    "mirror",
)
"""The keys of the file, in the order in which they are written."""


CONFIRM_SHARE = 0.5
"""`base.data.confirm_share` of a new sweep with finalists that does not say another."""


class Finalists(FrozenModel):
    """After the search its best configurations are trained again and compared on held-out rows that it has not seen."""

    top: PositiveInt = Field(
        default=3, description="Configurations: the best of the search that keep every requirement."
    )
    seeds: Annotated[int, Field(ge=2)] = Field(
        default=4,
        description="Trainings of each, with seeds that the search has not used, on top of budget.trials.",
    )

    @property
    def trials(self) -> int:
        """Trainings of all finalists."""
        return self.top * self.seeds

    def plan_text(self, share: float) -> str:
        """Return what `plan` says of finalists; `share`: of the held-out prompts, kept for them."""
        return (
            f"after the search its best {self.top} configurations are trained again with {self.seeds} fresh seeds each "
            f"and evaluated on {share:.0%} of the held-out prompts, which the search does not see: {self.trials} "
            "trials on top of budget.trials, counted in the time; of budget.hours and gpu_hours the search leaves them "
            "theirs"
        )


class Budget(FrozenModel):
    """Limits on the whole sweep, all its drivers together."""

    trials: PositiveInt | None = Field(
        default=None, description="Total trials, each repeat counted, without finalists. By default all points."
    )
    hours: PositiveFloat | None = Field(
        default=None,
        description="Wall-clock hours of the sweep's drivers, summed over them. The search leaves finalists their "
        "time, at most half.",
    )
    gpu_hours: PositiveFloat | None = Field(
        default=None, description="GPUs of a trial's slot times its hours, all attempts; without GPUs, slot-hours."
    )
    target: float | None = Field(
        default=None, description="The sweep ends once a trial completes with an objective at least this good."
    )
    concurrency: PositiveInt | None = Field(
        default=None, description="Trials at a time; by default what resources allow."
    )

    @property
    def has_time_limit(self) -> bool:
        """Whether hours or GPU-hours are limited."""
        return self.hours is not None or self.gpu_hours is not None


class Resources(FrozenModel):
    """GPUs, CPUs and processes of one trial. With a fraction, trials share a device."""

    gpus_per_trial: NonNegativeFloat | None = Field(
        default=None,
        description="auto: the fewest that hold a trial, a share of one for small models, 0 without GPUs. null: 1 if "
        "there are GPUs, else 0. Above 1: a whole number, with a process on each GPU.",
    )
    cpus_per_trial: PositiveFloat = Field(
        default=1.0, description="CPU cores that a trial takes, at least one for each of its processes."
    )
    processes_per_trial: PositiveInt | None = Field(
        default=None,
        description="Processes that train one trial on one machine; by default one on each of its GPUs. "
        "training.distributed sets how they share the model.",
    )
    trials_per_process: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="Trials that train adapters in turn in one process over one frozen model. auto: several if by "
        "formula the GPU's memory cannot hold a copy of the model for each trial that shares it; else 1.",
    )

    @property
    def processes(self) -> int:
        """Processes that train one trial."""
        return self.processes_per_trial or max(1, int(self.gpus_per_trial or 1))

    @model_validator(mode="after")
    def _check_gpus(self) -> Self:
        gpus, processes = self.gpus_per_trial, self.processes_per_trial
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus_per_trial {gpus:g}: above 1 it must be a whole number")
        if gpus and processes is not None and processes != max(1, int(gpus)):
            raise ValueError(f"processes_per_trial {processes} and gpus_per_trial {gpus:g}: each process has one GPU")
        together = self.trials_per_process
        if together != "auto" and together > 1:
            if self.processes > 1:
                raise ValueError(f"trials_per_process {together}: a trial of several processes cannot share them")
            if gpus and gpus * together > 1 + 1e-9:
                raise ValueError(
                    f"trials_per_process {together} of gpus_per_trial {gpus:g}: a process has one GPU; write "
                    f"gpus_per_trial {math.floor(1e4 / together) / 1e4:g}, or leave it out"
                )
        return self


class Tracking(FrozenModel):
    """MLflow's tracking URI, by default $MLFLOW_TRACKING_URI, else runs/mlflow.db, and its experiment."""

    uri: NonEmptyStr | None = Field(default=None, description="MLflow tracking URI.")
    experiment: NonEmptyStr = Field(default="prefsweep", description="Name of the MLflow experiment.")
    artifacts: StorageUrl | None = Field(
        default=None,
        description="Artifact location of a new experiment: a URL such as s3://bucket/prefix. By default "
        "runs/artifacts, or the tracking server's own.",
    )


class SftStage(FrozenModel):
    """Supervised fine-tuning of the initial model on chosen responses, once before the trials, cached by content."""

    training: TrainingConfig = Field(description="As base.training, for this stage.")
    data: DataConfig | None = Field(default=None, description="By default base.data.")


MODEL_SOURCES = ("model.name_or_path", "model.generated", "model.revision")
"""Beginnings of the settings that name the initial model, of which an SFT stage trains only one."""
SFT_WITH_SEARCHED_MODEL = (
    "the sft stage trains one initial model for all trials, so the initial model cannot be searched"
)
AUTO = "auto"
"""The word for a setting that is chosen for the machines at hand."""
GPUS_PER_TRIAL = "resources.gpus_per_trial"
DISTRIBUTED, CHECKPOINTING, MICRO_BATCH = AUTO_TRAINING = (
    "training.distributed",
    "training.gradient_checkpointing",
    "training.tokens_per_micro_batch",
)
"""Settings of `base` and `sft` that may be `auto`, as may `resources.gpus_per_trial`."""


class SweepSpec(LaterFields):
    """A sweep. `keep_models`: how many of the best trials' final weights stay on disk; see `models_kept`."""

    later: ClassVar[tuple[str, ...]] = ("auto", "finalists")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    auto: tuple[str, ...] = Field(
        default=(),
        description="Paths of the file that are left to `auto`, such as base.training.distributed. They have their "
        "defaults in this spec; spec/estimates/arrangement chooses their values for the machines at hand.",
    )
    description: str = ""
    base: TrialConfig
    search: SearchSpace = SearchSpace()
    sampler: Sampler = GridSampler()
    enqueue: tuple[dict[str, Scalar], ...] = ()
    repeats: Annotated[int, Field(ge=1)] = Field(
        default=1,
        description="Trainings of each configuration, each with another training.seed; samplers and ranking use the "
        "mean. budget.trials counts trainings.",
    )
    warm_start: NonEmptyStr | None = None
    order: Order = Reproducible()
    goal: Objective
    guard: GuardConfig = GuardConfig()
    also: tuple[Objective, ...] = ()
    require: tuple[Requirement, ...] = ()
    pruner: Pruner = NoPruner()
    finalists: Finalists | None = None
    budget: Budget = Budget()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    notify: Notify | None = None
    judge: JudgeConfig | None = None
    sft: SftStage | None = None
    keep_models: PositiveInt = 1
    storage: NonEmptyStr | None = Field(
        default=None,
        description="The study's database: an SQLAlchemy URL without password; by default SQLite in its folder.",
    )
    mirror: StorageUrl | None = Field(
        default=None,
        description="Where checkpoints and final models are copied to, so that they outlive a machine: a URL such as "
        "s3://bucket/prefix, gs://bucket/prefix or file:///shared/folder. Credentials come from the environment.",
    )

    @classmethod
    def from_stored(cls, text: str) -> Self:
        """Return the sweep that a study stores as JSON; values that were removed since are read as they are."""
        return cls.model_validate_json(text, context=STORED)

    def written(self) -> dict[str, Any]:
        """Return the spec as JSON values, in which settings that are left to `auto` have this word as their value."""
        tree = self.model_dump(mode="json")
        for path in tree.pop("auto", ()):
            *groups, name = path.split(".")
            section = tree
            for group in groups:
                section = section[group]
            section[name] = AUTO
        return tree

    @property
    def models_kept(self) -> int:
        """How many of the best trials' weights stay on disk: the largest of `keep_models`, `judge.top` and
        `finalists.top`.
        """
        judged = 0 if self.judge is None else self.judge.top
        return max(self.keep_models, judged, 0 if self.finalists is None else self.finalists.top)

    @property
    def seeds_per_configuration(self) -> int:
        """How many trials a configuration has at the end: `repeats`, or the seeds of a grid that lists them."""
        listed = self.search.choices(SEED)
        if listed is None or not isinstance(self.sampler, GridSampler):
            return self.repeats
        return len(set(listed))

    @property
    def trials_at_most(self) -> int | None:
        """How many trials the search may have, by its space and `budget.trials`; None if only time limits it."""
        points = self.search.size()
        if isinstance(self.sampler, StagedSampler):
            points = max_trials(self.sampler, self.search)
        in_space = None if points is None else points * self.repeats + len(self.enqueue)
        return min((limit for limit in (in_space, self.budget.trials) if limit is not None), default=None)

    @property
    def default_pruner(self) -> Pruner:
        """The pruner of a new sweep whose file names none: the median of the other trials, or none.

        None where there are too few trials to compare, several objectives, or an objective that is measured at the end
        only. What it saves and costs on recorded learning curves: `make replay`, docs/search.md.
        """
        most = self.trials_at_most
        few = most is not None and most < PRUNED_FROM
        late = unmeasured_reason(self.goal.metric, self.base.evaluation) is not None
        return NoPruner() if few or self.also or late else MedianPruner()

    @property
    def first_objective(self) -> Objective:
        """The objective that chooses the best trial."""
        return self.goal

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """All objectives, `first_objective` first."""
        return (self.goal, *self.also)
