"""`orchestrate advise`: a tiny model and real runs; its cache is the sweep's; what it writes into a file."""

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.commands.advice.advise_sweep import SweepAdvice
from orchestrator.commands.advice.advised_file import write_advice
from orchestrator.commands.advice.near_duplicates import jaccard, repetition_of, shingles, similarity
from orchestrator.spec.advice.advice_lines import AdviceLine
from orchestrator.spec.loading.loader import load_spec
from tests.support.processes import call, called, json_of
from tests.support.without_ray import without_ray
from trainer.data.pair_dataset import PairDataset, TokenizedPair, write_pairs

SHARED = Path(__file__).parents[4] / "shared" / "data"
BASE = """
name: advised   # tiny
base:
  model: {generated: {vocab_size: 320, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}}
  data:
    train: {generated: instructions, rows: 64}
    eval: {generated: instructions, split: eval, rows: 24}
    max_length: 96
"""
SIMPO = f"""{BASE}
  loss: {{kind: simpo}}
  training: {{pairs_per_update: 8, max_steps: 2}}
  evaluation: {{prompts: 2, max_new_tokens: 4}}
sft:
  training: {{learning_rate: 1e-3, pairs_per_update: 8, max_steps: 2}}
search:
  # both are published
  loss.beta: [2.0, 10.0]       # mine
  loss.gamma_beta_ratio: [0.5]
  training.learning_rate:
    - 1e-7
    - 1e-6
maximize: eval_accuracies/logp
budget: {{trials: 1, concurrency: 1}}
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A runs folder in which the file was advised on, the file, and what was advised."""
    folder = tmp_path_factory.mktemp("advise")
    file = folder / "tiny.yaml"
    file.write_text(SIMPO)
    return folder / "runs", file, json_of(folder / "runs", "advise", str(file))


def test_the_sweep_finds_what_advise_has_computed_and_the_other_way_round(
    scored: tuple[Path, Path, dict[str, Any]],
) -> None:
    runs, file, made = scored
    counters = made["computed"]
    assert (counters["start_computed"], counters["trials"]) == (2, 1), "of the sft stage, and of its result"
    assert (made["pairs"]["scored"], made["pairs"]["split"], made["pairs"]["train_pairs"]) == (24, "eval", 64)

    def computed() -> dict[str, int]:
        found = [
            *(runs / "cache" / "reference").glob("*.safetensors"),
            *(runs / "cache" / "sft").rglob("*.safetensors"),
        ]
        return {str(path): path.stat().st_mtime_ns for path in found}

    before = computed()
    assert len(before) == 4, "log-probs of two models; of the stage its model and its held-out pairs"
    with without_ray():
        called(runs, "sweep", str(file))
    assert computed() == before
    history = json_of(runs, "status", "advised")["initial"]
    assert history["eval_margins/logp"] == pytest.approx(made["pairs"]["gaps"]["mean"], abs=1e-6)
    assert history["eval_accuracies/logp"] == pytest.approx(made["pairs"]["right"])

    again = json_of(runs, "advise", str(file))
    assert again["computed"] == {}, "the scores were kept"
    for kept in (runs / "cache" / "advice").iterdir():
        kept.unlink()
    reread = json_of(runs, "advise", str(file), "--rows", "5")
    assert reread["computed"]["start_loaded"] == 1
    assert "start_computed" not in reread["computed"]
    assert all(reread[key] == made[key] for key in ("pairs", "margins", "advice"))


def test_plan_shows_the_advice_that_costs_nothing_and_what_was_scored(
    scored: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    runs, file, made = scored
    fresh = json_of(tmp_path / "runs", "plan", str(file))["advice"]
    assert [line["topic"] for line in fresh] == ["learning rate", "duration"]
    assert not (tmp_path / "runs" / "cache").exists(), "no model was run"
    called(runs, "advise", str(file))
    known = json_of(runs, "plan", str(file))["advice"]
    assert [line["text"] for line in known] == [line["text"] for line in made["advice"]]
    text = called(runs, "plan", str(file))[0]
    assert "change: learning rate" in text
    assert "scores the pairs" not in text
    assert "scores the pairs" in called(tmp_path / "runs", "plan", str(file))[0]


def test_what_is_written_is_advised_no_more_and_nothing_else_changes(
    scored: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    runs, original, made = scored
    target = tmp_path / "mine.yaml"
    target.write_bytes(original.read_bytes())
    target.chmod(0o640)
    file = tmp_path / "link.yaml"
    file.symlink_to(target)
    (tmp_path / "mine.yaml.bak").write_text("an older one")
    changes = [line for line in made["advice"] if line["value"] is not None]
    assert "training.learning_rate" in str(changes)
    _, err = called(runs, "advise", str(file), "--write")
    assert "mine.yaml.bak-2" in err
    assert (tmp_path / "mine.yaml.bak").read_text() == "an older one"
    assert (tmp_path / "mine.yaml.bak-2").read_bytes() == original.read_bytes()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert file.is_symlink()
    lines = target.read_text().splitlines()
    kept = [line for line in lines if not line.lstrip().startswith("# advise: ")]
    assert any("# both are published" in line for line in kept)
    assert [line for line in SIMPO.splitlines() if line not in kept][-2:] == ["    - 1e-7", "    - 1e-6"]
    before, after = load_spec(original), load_spec(target)
    assert after.search.listed_values("training.learning_rate") == (1e-4, 3e-4, 1e-3)
    assert after.base == before.base.model_copy(update={"training": after.base.training})
    again = json_of(runs, "advise", str(file), "--write")
    assert again["written"] == {"settings": [], "refused": {}}
    assert target.read_text().splitlines() == lines


def test_the_first_stages_of_a_staged_search_get_an_advised_value_too(
    scored: tuple[Path, Path, dict[str, Any]],
) -> None:
    runs, file, made = scored
    assert not any(line["setting"] == "base.loss.beta" for line in made["advice"]), "a grid never trains the base's"
    staged = file.with_name("staged.yaml")
    loss = "  loss: {kind: simpo}\n"
    text = SIMPO.replace("name: advised", "name: staged").replace("[2.0, 10.0]", "[2.0e3, 1.0e4]")
    assert loss in text
    staged.write_text(text.replace(loss, "  loss:\n    kind: simpo\n    beta: 2000.0\n") + "sampler: staged\n")
    advised = json_of(runs, "advise", str(staged), "--write")
    written = dict(line.split(": ", 1) for line in advised["written"]["settings"])
    after = load_spec(staged)
    assert "base.loss.beta" in written
    assert after.base.loss.beta in after.search.listed_values("loss.beta")
    again = json_of(runs, "advise", str(staged), "--write")
    assert again["written"]["settings"] == []


def test_losses_that_differ_on_a_shared_setting_write_nothing_there() -> None:
    def line(value: str | None) -> AdviceLine:
        return AdviceLine("beta", "change", "", "", (), "search.loss.beta", "[1]", value)

    rate = AdviceLine("learning rate", "change", "", "", (), "search.training.learning_rate", "[1]", "[2]")
    differing, agreeing = (
        SweepAdvice("s", (line("[2]"), line(other), rate), None, (), (), {}) for other in (None, "[2]")
    )
    assert differing.disputed == {"search.loss.beta"}
    assert differing.to_write == (rate,)
    assert agreeing.to_write == (line("[2]"), line("[2]"), rate)


def test_shared_values_are_refused_with_the_line_and_the_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "shared.yaml"
    text = SIMPO.replace("[2.0, 10.0]", "&b [2.0, 10.0]") + "x-unused: *b\n"
    file.write_text(text)
    line = AdviceLine("beta", "change", "", "a reason", (), "search.loss.beta", "[2, 10]", "[3.0]")
    illegal = AdviceLine("beta", "change", "", "", (), "search.training.learning_rate", "", "[-1.0]")
    done = write_advice(file, [line, illegal])
    assert done.backup is None
    assert "has an anchor" in done.refused["search.loss.beta"]
    assert "would be refused" in done.refused["search.training.learning_rate"]
    assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (SIMPO, ["--write", "--set", "loss.beta=2"], "leave out one of the two"),
        (SIMPO, ["--rows", "0"], "--rows"),
        (SIMPO.replace("kind: simpo", "kind: simpoo"), [], "did you mean simpo"),
        (SIMPO.replace("max_length: 96", "max_length: 4"), [], "max_length"),
        (SIMPO.replace("{generated: instructions, rows: 64}", "gone.jsonl"), [], "gone.jsonl"),
    ],
)
def test_mistakes_are_messages_with_exit_code_2_and_write_nothing(
    text: str, options: list[str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    code, out, err = call(tmp_path / "runs", "advise", str(file), *options)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert file.read_text() == text
    assert not (tmp_path / "runs" / "advised").exists()


# --- near-duplicates -------------------------------------------------------------------------------------------------


def dataset(folder: Path, rows: list[tuple[list[int], list[int], list[int]]]) -> PairDataset:
    pairs = [TokenizedPair(*(np.array(part, dtype=np.int32) for part in row), 0, k, None) for k, row in enumerate(rows)]
    folder.mkdir()
    write_pairs(folder, "train", pairs)
    return PairDataset.open(folder, "train")


def test_near_duplicates_are_found_behind_a_template(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    begin, end = list(range(1000, 1040)), list(range(2000, 2010))

    def prompt(body: Any) -> list[int]:
        return [*begin, *map(int, body), *end]

    bodies = [random.integers(0, 500, 60) for _ in range(40)]
    near = bodies[3].copy()
    near[30] = 501  # three of 58 shingles differ: Jaccard 55 / 61
    far = bodies[4].copy()
    far[::6] = 502
    train = [(prompt(body), [1, 2, 3], [4, 5, 6]) for body in (*bodies, bodies[0], near, far)]
    train[0] = (train[0][0], [*range(20)], [*range(10), 99, *range(11, 20)])  # 19 of 20 tokens are common
    held_out = [(prompt(bodies[7]), [1], [2]), (prompt(random.integers(0, 500, 60)), [1], [2])]
    found = repetition_of(dataset(tmp_path / "train", train), dataset(tmp_path / "eval", held_out))
    assert (found.prompts, found.held_out, found.compared_prompts) == (2 / 43, 1 / 2, 43)
    assert found.answers == 1 / 43
    assert jaccard(shingles(bodies[3]), shingles(near)) == pytest.approx(55 / 61)
    assert similarity(np.array([1, 2, 3]), np.array([1, 2, 3, 4])) == 3 / 4
    assert similarity(np.array([1, 1]), np.array([1, 1, 1])) == 2 / 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the project: real pairs are not shipped")
def test_advice_on_real_pairs(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    from trainer.synthetic.tiny_models import write_random_model

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizer-bpe4096")
    tokenizer.save_pretrained(tmp_path / "model")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_random_model(LlamaConfig(vocab_size=len(tokenizer), **size, **heads, **ends), 0, tmp_path / "model")
    rows = SHARED / "preference-train.jsonl"
    text = SIMPO.replace(
        BASE.split("base:")[1], f"\n  model: {tmp_path / 'model'}\n  data: {{train: {rows}, max_length: 256}}\n"
    )
    text = text[: text.index("sft:")] + text[text.index("search:") :]
    (tmp_path / "real.yaml").write_text(text)
    out, err = called(tmp_path / "runs", "advise", str(tmp_path / "real.yaml"), "--rows", "40", "--json")
    made = json.loads(out)
    assert "of a sample, evenly spread" in err
    assert made["pairs"]["scored"] == 40
    # 2,119 distinct prompts in 4,580 rows; held out by prompt, so that none of the held-out ones is trained on.
    assert 0.45 < made["pairs"]["near_duplicates"]["prompts"] < 0.65
    assert made["pairs"]["near_duplicates"]["held_out"] < 0.1
    assert any(line["level"] == "warning" and "near-duplicates" in line["text"] for line in made["advice"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["cache"]
