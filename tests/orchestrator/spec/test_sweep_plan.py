import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import DataError
from orchestrator.spec.estimates.disk_space import disk_need
from orchestrator.spec.estimates.input_sizes import RowCounts, count_rows
from orchestrator.spec.estimates.sweep_plan import IntRange, SweepPlan, make_plan, total_trials
from orchestrator.spec.sweep_spec import SweepSpec
from tests.support.specs import BASE, make_spec
from trainer.config.trial import DataConfig

Load = Callable[..., SweepSpec]
KNOWN = RowCounts(1000, 100, exact=True)


def planned(spec: SweepSpec, rows: RowCounts = KNOWN, concurrency: int | None = 4) -> SweepPlan:
    return make_plan(spec, Path("runs"), rows, concurrency=concurrency, tracking="sqlite:///runs/mlflow.db")


def test_numbers(load_text: Load) -> None:
    found = planned(load_text("search: {loss.beta: [2.0, 2.5], training.num_train_epochs: [1, 2, 3]}"))
    assert (found.trials, found.grid, found.concurrency) == (6, 6, 4)
    assert found.updates_per_trial == IntRange(7, 23)
    assert found.pairs_per_trial == IntRange(7 * 128, 23 * 128)
    assert found.tokens_per_trial_at_most == 23 * 128 * 2 * 1024
    assert (found.tokens_at_most, len(found.corners)) == (found.tokens_per_trial_at_most * 6, 4)
    json.dumps(found.as_json())


def test_every_objective_is_named(load_text: Load) -> None:
    found = planned(load_text("search: {loss.beta: [2.0, 2.5]}\nminimize: eval_nll_loss"))
    assert found.goal == "minimize eval_nll_loss"
    both = "search: {loss.beta: [2.0, 2.5]}\nmaximize: eval_accuracies/logp\nminimize: eval_nll_loss"
    assert planned(load_text(both)).goal == "maximize eval_accuracies/logp, minimize eval_nll_loss"


def test_equal_points_and_a_budget_above_the_grid_are_told(load_text: Load) -> None:
    found = planned(load_text("search: {loss.beta: [2, 2.0, 2.5]}\nbudget: {trials: 9}"))
    assert (found.trials, found.grid) == (2, 2)
    assert found.equal_points == [{"dropped": {"loss.beta": 2.0}, "equal_to": {"loss.beta": 2.0}}]
    assert [note for note in found.notices if "equal another" in note]
    assert [note for note in found.notices if "above the grid's 2 points" in note]


def test_the_plan_says_which_part_of_a_grid_its_budget_tries(load_text: Load) -> None:
    grid = "search: {loss.beta: [1.0, 2.0, 3.0], training.learning_rate: [1e-6, 2e-6, 3e-6, 4e-6]}\n"
    grid += "budget: {trials: 6}\n"
    shuffled = planned(load_text(grid))
    assert shuffled.grid_part is not None
    assert (shuffled.grid_part.seed, shuffled.grid_part.trials, shuffled.grid_part.points) == (0, 6, 12)
    assert [count for _, count in shuffled.grid_part.values["loss.beta"]] == [3, 1, 2]
    (said,) = [note for note in shuffled.notices if "of the grid's" in note]
    begins = (
        "budget.trials has 6 of the grid's 12 points, shuffled with sampler.seed 0: loss.beta 1 (3x), 2 (1x), 3 (2x); "
    )
    assert said.startswith(begins)
    in_order = planned(load_text(grid + "sampler: {kind: grid, order: file}\n"))
    (said,) = [note for note in in_order.notices if "of the grid's" in note]
    assert "the first ones in the file's order: loss.beta 1 (4x), 2 (2x), 3 (never)" in said
    assert json.loads(json.dumps(in_order.as_json()))["grid_part"]["tried"][5] == {
        "loss.beta": 2.0,
        "training.learning_rate": 2e-6,
    }
    assert planned(load_text(grid, "budget.trials=12")).grid_part is None


def test_points_of_a_grid_that_are_no_trial_are_told() -> None:
    dimensions = {"loss.loss_type": {"choice": ["sigmoid", "hinge"]}, "loss.label_smoothing": {"choice": [0.0, 0.1]}}
    found = planned(make_spec(dimensions))
    assert (found.trials, found.grid) == (3, 3)
    said = "1 of the grid's points are no valid trial and are left out, first loss.loss_type=hinge"
    assert f"{said}, loss.label_smoothing=0.1" in found.notices


def test_total_trials(load_text: Load) -> None:
    grid = "search: {loss.beta: [2, 2.0, 2.5]}\n"
    totals = {
        budget: total_trials(load_text(f"{grid}budget: {budget}")) for budget in ("{}", "{trials: 1}", "{trials: 9}")
    }
    assert totals == {"{}": 2, "{trials: 1}": 1, "{trials: 9}": 2}
    endless = "search: {loss.beta: {uniform: [1, 4]}}\nsampler: random\n"
    assert total_trials(load_text(f"{endless}budget: {{hours: 1}}")) is None
    finite = "search: {loss.beta: [2, 2.5]}\nsampler: tpe\n"
    assert [total_trials(load_text(finite + more)) for more in ("", "budget: {trials: 9}", "repeats: 3")] == [2, 2, 6]


def test_repeats_are_counted_and_told(load_text: Load) -> None:
    found = planned(load_text("search: {loss.beta: [2, 2.5]}\nsampler: tpe\nrepeats: 3\nbudget: {trials: 5}"))
    assert (found.trials, found.concurrency) == (5, 4)
    told = " ".join(found.notices)
    assert "each configuration is trained with 3 seeds (training.seed 42 to 44); budget.trials counts each" in told
    assert "5 trials are no multiple of repeats 3: the last configuration gets fewer seeds" in told
    found = planned(load_text("search: {loss.beta: [2, 2.5]}\nrepeats: 3\nbudget: {trials: 9}"))
    assert (found.trials, found.grid) == (6, 2)
    assert not [note for note in found.notices if "no multiple" in note]
    assert [note for note in found.notices if "the grid's 2 points with 3 seeds each; 6 trials will run" in note]


def test_unknown_rows(load_text: Load) -> None:
    unknown = RowCounts(None, None, exact=True)
    assert planned(load_text(""), unknown).updates_per_trial is None
    assert planned(load_text("", "training.max_steps=5"), unknown).updates_per_trial == IntRange(5, 5)


def test_too_few_pairs(load_text: Load) -> None:
    with pytest.raises(DataError, match="fewer than one update"):
        planned(load_text(""), RowCounts(100, 10, exact=True))


def test_everything_written_lies_under_the_root(load_text: Load) -> None:
    paths = [path.path for path in planned(load_text("")).writes]
    assert all(path.startswith(("runs/", "sqlite:///runs/")) for path in paths)


def test_rows_are_counted_without_reading_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    (tmp_path / "a.csv").write_text('a,b\n1,"x\ny"\n2,z\n')
    (tmp_path / "a.json").write_text("[{}, {}]")
    counts = {name: count_rows(_data(tmp_path / name)).train for name in ("a.jsonl", "a.csv", "a.json", "a.xyz")}
    assert counts == {"a.jsonl": 3, "a.csv": 2, "a.json": 2, "a.xyz": None}


def test_rows_of_mixes_and_splits() -> None:
    generated = {"generated": "instructions", "rows": 100}
    split = count_rows(DataConfig.model_validate({"train": [generated], "max_train_rows": 50}))
    assert split == RowCounts(50, 10, exact=False)
    mixed = [generated | {"weight": 1.0}, generated | {"seed": 1, "weight": 3.0}]
    assert count_rows(DataConfig.model_validate({"train": mixed, "eval": [generated]})) == RowCounts(
        133, 100, exact=True
    )


def test_rows_of_a_downloaded_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    data = DataConfig.model_validate({"train": [{"dataset": "Org/Pairs", "split": "train"}], "eval_share": 0.5})
    assert count_rows(data).train is None
    folder = tmp_path / "Org___pairs" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"splits": {"train": {"num_examples": 10}}}')
    assert count_rows(data).train == 5


def _data(path: Path) -> DataConfig:
    return DataConfig.model_validate({"train": [{"path": str(path)}], "eval": [{"path": str(path)}]})


@pytest.mark.parametrize(
    ("lora", "cost"),
    [
        (None, "about 33% more FLOPs, with a second set of weights in memory"),
        ({"r": 4}, "about 50% more FLOPs, with a second set of adapters in memory"),
    ],
)
def test_a_reference_that_moves_is_told_with_its_cost_and_where_it_never_does(lora: object, cost: str) -> None:
    def notices(steps: list[int]) -> list[str]:
        base = BASE | {"loss": {"kind": "dpo", "sync_ref_model": True}, "lora": lora}
        spec = make_spec({"loss.ref_model_sync_steps": {"choice": steps}}, base=base)
        return [note for note in planned(spec).notices if "ref_model" in note]

    (said,) = notices([2, 4])  # of 7 updates
    assert "log-probs are not cached but computed in every update" in said
    assert cost in said
    assert "B) and in each checkpoint" in said
    told, still = notices([2, 512])
    assert told == said
    assert "ref_model_sync_steps 512: the reference does not move in 7 updates" in still
    plain = make_spec({"loss.beta": {"choice": [0.1, 0.2]}}, base=BASE | {"loss": {"kind": "dpo"}, "lora": lora})
    assert not [note for note in planned(plain).notices if "ref_model" in note]
    searched = make_spec({"loss.sync_ref_model": {"choice": [False, True]}}, base=plain.base.model_dump())
    still, moving = (disk_need(spec, 1) for spec in (plain, searched))
    assert still is not None
    assert moving is not None
    assert 3 * moving.checkpoint == 4 * still.checkpoint


@pytest.mark.parametrize(
    ("every", "said"),
    [("50", ""), ("400", "pruning saves at most 16% of a training; set 47"), ("477", "no trial is pruned; set 47")],
)
def test_evaluations_that_come_too_late_for_the_pruner_are_told(load_text: Load, every: str, said: str) -> None:
    text = (
        "base: {model: org/model, data: {train: rows.jsonl}, training: {max_steps: 477, eval_steps: EVERY}}\n"
        "search: {loss.beta: [2.0, 2.5]}\npruner: PRUNER"
    )
    for pruner in ("median", "none"):
        spec = load_text(text.replace("EVERY", every).replace("PRUNER", pruner))
        told = [
            notice for notice in planned(spec, RowCounts(61_000, 100, exact=True)).notices if "eval_steps" in notice
        ]
        assert told == [] if pruner == "none" or not said else said in told[0]


def test_fewer_kept_than_judged_models_are_told(load_text: Load) -> None:
    grid = "search: {loss.beta: [2, 2.5]}\njudge: {top: 2, reward_model: Org/Reward}\n"
    assert [n for n in planned(load_text(f"{grid}keep_models: 1")).notices if "judge.top 2 is above keep_models 1" in n]
    for text in (grid, f"{grid}keep_models: 2"):
        assert not [note for note in planned(load_text(text)).notices if "keep_models" in note]
