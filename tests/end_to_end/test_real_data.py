"""A sweep on real preference pairs with a real tokenizer: SFT, then SimPO trials that end measurably different."""

import json
from pathlib import Path

import pytest

from tests.support.processes import called, json_of
from tests.support.without_ray import without_ray

SHARED = Path(__file__).parents[3] / "shared" / "data"
SWEEP = """
name: real
base:
  model: {model}
  data: {{train: {train}, eval_share: 0.2, max_length: 192}}
  loss: {{kind: simpo}}
  training: {{pairs_per_update: 8, max_steps: 8, eval_steps: 8}}
  evaluation: {{prompts: 2, samples: 1, max_new_tokens: 8}}
sft:
  training: {{learning_rate: 2e-3, pairs_per_update: 8, max_steps: 12}}
search:
  loss.gamma: [0.5, 1.6]
  training.learning_rate: [1e-4, 1e-3]
maximize: eval_accuracies/logp
budget: {{concurrency: 1}}
"""


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the project: real pairs are not shipped")
def test_a_sweep_on_real_pairs(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    from trainer.synthetic.tiny_models import write_random_model

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizer-bpe4096")
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_random_model(LlamaConfig(vocab_size=len(tokenizer), **size, **heads, **ends), 0, model)
    lines = (SHARED / "preference-train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines[::20]) + "\n", encoding="utf-8")
    (tmp_path / "real.yaml").write_text(SWEEP.format(model=model, train="pairs.jsonl"), encoding="utf-8")
    with without_ray():
        called(tmp_path / "runs", "sweep", str(tmp_path / "real.yaml"))
    trials = json_of(tmp_path / "runs", "status", "real")["trials"]
    assert [t["state"] for t in trials] == ["COMPLETE"] * 4
    margins = [t["metrics"]["eval_margins/logp"] for t in trials]
    assert len(set(margins)) == 4, "four configurations, four different models"
    report = json.loads((tmp_path / "runs" / "real" / "data.json").read_text())
    assert report["train_rows"] + report["eval_rows"] > 150
