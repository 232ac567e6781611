"""Frames of many scripted sweeps, built in memory: hypothesis draws what each trial does, ties included."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from hypothesis import strategies as st

from dashboards.analysis.held_out_pairs import HeldOutPairs
from dashboards.analysis.sweep_frame import SweepFrame, TrialCurves, TrialFrame
from dashboards.formatting import short_names
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.trial_records import TrialRecord
from tests.support.metrics import COMPLETE
from tests.support.scripted_sweep import DIVERGED, FAILED, Script, held_out, make_spec, points

_RATES, _BETAS, _GAMMAS = (1e-7, 3e-7, 1e-6), (2.0, 5.0, 10.0), (0.5, 1.0, 1.5)
_RATE, _BETA, _GAMMA = "training.learning_rate", "loss.beta", "loss.gamma"
_LISTED: tuple[Mapping[str, Sequence[Any]], ...] = (
    {_RATE: _RATES},
    {_RATE: (3e-7,)},
    {_RATE: (3e-7, 1e-6)},
    {_BETA: _BETAS},
    {_RATE: _RATES, _BETA: _BETAS},
    {_BETA: _BETAS, _GAMMA: _GAMMAS},
    {_RATE: _RATES, "training.seed": (1, 2)},
    {_RATE: _RATES, "training.max_steps": (40, 80)},
    {"training.num_train_epochs": (1.0, 2.0, 4.0)},
    {"loss.sft_weight": (0.0, 0.1, 0.3)},
    {"training.warmup_ratio": (0.0, 0.1, 0.2), _RATE: _RATES},
)
_ZIPPED = {_RATE: _RATES, _BETA: _BETAS}
_RANGED = {_RATE: {"log_uniform": [1e-7, 1e-5]}, _BETA: {"uniform": [1.0, 10.0]}}
_GOALS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"goal": {"metric": "eval_margins/logp", "direction": "maximize"}},
    {"goal": {"metric": "eval_loss", "direction": "minimize"}},
)
_LOSSES: tuple[dict[str, Any], ...] = (
    {},
    {"loss": {"kind": "simpo", "beta": 2.0, "gamma": 4.0}},
    {"loss": {"kind": "dpo", "beta": 0.1}},
    {"loss": {"kind": "orpo", "beta": 0.1}},
)


def _through(start: float, middle: float, end: float, at: int = 20) -> Callable[[int], float]:
    """Return a loss of 40 updates, linear from `start` to `middle` at update `at`, then to `end`."""

    def loss(step: int) -> float:
        if step <= at:
            return start + (middle - start) * step / at
        return middle + (end - middle) * (step - at) / (40 - at)

    return loss


CURVES: Mapping[str, Callable[[int], float] | None] = {
    "falls": None,
    "flat": _through(0.6931, 0.6931, 0.6931),
    "rises a little": _through(0.6931, 0.6996, 0.7061),
    "falls a little": _through(0.6931, 0.6916, 0.69),
    "only rises": _through(0.7, 1.7, 2.7),
    "rises again": _through(1.0, 0.6, 0.9),
    "flat later": _through(1.0, 0.5, 0.5, at=10),
}
_TEXTS: tuple[Mapping[str, float], ...] = (
    {},
    {},
    {"eval_exact_answers": 0.1},
    {"eval_repetition": 0.6, "eval_answer_length": 64.0},
)


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """What one trial does; few values, so that trials tie."""
    return Script(
        quality=draw(st.sampled_from([-0.3, 0.0, 0.09, 0.1, 0.11, 0.13, 0.3, 0.5, 0.9])),
        chosen=draw(st.sampled_from([-0.9, -1.0, -1.0, -1.3, -3.0, -12.0])),
        last=draw(st.sampled_from(_TEXTS)),
        outcome=draw(st.sampled_from([COMPLETE, COMPLETE, COMPLETE, COMPLETE, DIVERGED, FAILED])),
        loss=CURVES[draw(st.sampled_from(sorted(CURVES)))],
        every=draw(st.sampled_from([10, 10, 10, 40])),  # 40: a short run, evaluated before and after it
    )


@st.composite
def sweeps(draw: st.DrawFn) -> SweepFrame:
    """A finished sweep: listed, zipped or sampled settings, 4 to 300 held-out pairs, 1 to 9 trials."""
    pairs = draw(st.sampled_from([4, 30, 60, 300]))
    base: dict[str, Any] = {**draw(st.sampled_from(_LOSSES)), "evaluation": {"prompts": 64}}
    more: dict[str, Any] = draw(st.sampled_from(_GOALS))
    kind = draw(st.sampled_from(["listed", "listed", "zipped", "ranged"]))
    if kind == "ranged":
        spec = make_spec(search=_RANGED, base=base, sampler={"kind": "random"}, budget={"trials": 12}, **more)
        rate, beta = st.floats(-7, -5), st.floats(1, 10)
        chosen = [
            {_RATE: float(f"{10 ** draw(rate):.3g}"), _BETA: float(f"{draw(beta):.3g}")}
            for _ in range(draw(st.integers(2, 12)))
        ]
    elif kind == "zipped":
        spec = make_spec(search={}, base=base, **more)
        space = {"dimensions": {}, "zipped": (_ZIPPED,)}
        spec = SweepSpec.model_validate(spec.model_dump() | {"search": space})
        chosen = [dict(zip(_ZIPPED, values, strict=True)) for values in zip(*_ZIPPED.values(), strict=True)]
    else:
        listed = draw(st.sampled_from(_LISTED))
        if base.get("loss", {"kind": "simpo"})["kind"] != "simpo":
            listed = {path: values for path, values in listed.items() if path not in (_GAMMA, "loss.sft_weight")}
        search = {path: {"choice": list(values)} for path, values in listed.items()}
        spec = make_spec(search=search, base=base, **more)
        chosen = [dict(zip(listed, values, strict=True)) for values in product(*listed.values())]
    few = draw(st.lists(scripts(), min_size=1, max_size=4))
    return frame_of_scripts(spec, [(params, draw(st.sampled_from(few))) for params in chosen], pairs)


def frame_of_scripts(spec: SweepSpec, ran: Sequence[tuple[Mapping[str, Any], Script]], pairs: int = 300) -> SweepFrame:
    """Return the frame of these trials, as `load_frame` would load it from a study."""
    trials = tuple(_trial(spec, number, params, plan, pairs) for number, (params, plan) in enumerate(ran))
    return SweepFrame(
        name=spec.name,
        description="",
        objective=spec.first_objective,
        paths=spec.search.paths,
        space=spec.search,
        trials=trials,
        spec=spec,
        state="finished",
        at=0.0,
        planned=len(trials),
        short_names=short_names(spec.search.paths),
    )


def _trial(spec: SweepSpec, number: int, params: Mapping[str, Any], plan: Script, pairs: int) -> TrialFrame:
    config = apply_params(spec.base, params)
    columns = held_out(plan.quality, plan.chosen, pairs)
    done = plan.outcome
    assert done is not None
    record = TrialRecord(number, done.state, params, 1, done.reason, done.failure, done.diverged, step=plan.steps)
    curves = TrialCurves(record)
    curves.add(points(plan, columns, config.loss.beta if config.loss.kind == "simpo" else 1.0))
    if done is COMPLETE:
        value = curves.last(spec.first_objective.metric)
        curves.record = TrialRecord(number, done.state, params, 1, step=plan.steps, value=value)
    return TrialFrame(
        curves=curves,
        config=config,
        label=str(number),
        sweep=spec.name,
        planned_updates=plan.steps,
        held_out_pairs=_pairs(columns) if done is COMPLETE else None,
    )


def _pairs(columns: Mapping[str, np.ndarray]) -> HeldOutPairs:
    names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
    chosen, rejected, chosen_tokens, rejected_tokens = (columns[name].astype(np.float64) for name in names)
    rows = np.stack([columns["source"], columns["row"]], axis=1)
    return HeldOutPairs(
        chosen, rejected, chosen_tokens, rejected_tokens, rows, columns["start_chosen"], columns["start_rejected"]
    )
