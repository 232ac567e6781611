"""`judge:` in a sweep's file: what it takes, what it refuses, and that it is no part of the sweep's identity."""

from pathlib import Path

import jsonschema
import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.judge_config import JudgeConfig, RewardModel
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec, schema, spec_hash
from orchestrator.spec.loading.validation_errors import parse_document
from tests.support.specs import as_json

HEAD = "name: a\nbase: {model: m, data: {train: {generated: instructions}}}\n"
COMPLETE = """judge:
  top: 2
  prompts: 64
  samples: 3
  temperature: 0.9
  reward_model: org/reward
  endpoint: {url: 'https://api.example.org/v1/', model: big, api_key_env: MY_KEY, prompt_price: 2, completion_price: 8}
"""


def test_what_it_takes(tmp_path: Path) -> None:
    plain, logged = load_spec_text(HEAD, tmp_path), load_spec_text(HEAD + COMPLETE, tmp_path)
    assert plain.judge is None
    judge = logged.judge
    assert judge.reward_model == RewardModel(name_or_path="org/reward")
    assert (judge.endpoint.url, judge.endpoint.prompt_price) == ("https://api.example.org/v1", 2.0)
    assert load_spec_text(dump_spec(logged), tmp_path).judge == judge
    assert "judge" not in dump_spec(plain)
    assert spec_hash(plain) == spec_hash(logged)
    assert (plain.models_kept, logged.models_kept) == (1, 2), "what is judged is kept"
    assert load_spec_text(HEAD + "judge: {}", tmp_path).judge == JudgeConfig()
    assert load_spec_text(HEAD + "judge: null", tmp_path).judge is None
    assert load_spec_text(HEAD, tmp_path, ["judge.endpoint={url: 'http://localhost:1/v1', model: m}"]).judge is not None


def test_a_reward_model_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "reward").mkdir()
    found = load_spec_text(HEAD + "judge: {reward_model: ./reward}", tmp_path).judge
    assert found.reward_model.name_or_path == str(tmp_path / "reward")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("judge: {topp: 3}", "judge.topp: unknown key (did you mean top_p?)"),
        ("judge: {top: 0}", "judge.top: must be at least 1"),
        ("judge: {top_p: 0.0}", "judge.top_p: must be greater than 0"),
        ("judge: {reward_model: ./nowhere}", "there is no ./nowhere"),
        ("judge: {reward_model: {name_or_path: m, dtype: int8}}", "must be one of float32, bfloat16"),
        ("judge: {endpoint: {url: 'ftp://x/v1', model: m}}", "must be an http:// or https:// address"),
        ("judge: {endpoint: {url: 'https://me:secret@x/v1', model: m}}", "must not contain a user, password or query"),
        ("judge: {endpoint: {url: 'https://x/v1?key=1', model: m}}", "must not contain a user, password or query"),
        ("judge: {endpoint: {url: 'https://x/v1'}}", "judge.endpoint.model: is required"),
        ("judge: {endpoint: {url: 'https://x', model: m, api_key_env: sk-123}}", "judge.endpoint.api_key_env"),
        ("judge: {endpoint: {url: 'https://x', model: m, prompt_price: 1}}", "give both prompt_price and completion"),
        ("judge: {endpoint: {url: 'https://x', model: m, max_cost: 1}}", "max_cost needs prompt_price"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_spec_text(HEAD + text, tmp_path)
    assert words in str(refused.value)
    assert "sweep.yaml:3" in str(refused.value)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as refused:
        load_spec_text(HEAD + "judge:\n  top: 0\n  samples: -1\n  endpoint: {model: m}\n", tmp_path)
    assert [f.path for f in refused.value.problems] == ["judge.top", "judge.samples", "judge.endpoint.url"]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (COMPLETE, True),
        ("judge: null", True),
        ("judge: {reward_model: {name_or_path: m, label: 1}}", True),
        ("judge: {topp: 1}", False),
        ("judge: {endpoint: {model: m}}", False),
    ],
)
def test_the_json_schema(text: str, fits: bool) -> None:
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(as_json(parse_document(HEAD + text, "f").value)) is fits
