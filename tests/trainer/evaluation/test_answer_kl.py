"""The distance from the initial model that one module measures, against two models loaded with transformers."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from tests.support.small_trials import MODEL, finish, model_bytes, trial
from trainer.config.trial import GeneratedModel, TrialConfig
from trainer.data import prepare
from trainer.data.pair_dataset import select_prompts
from trainer.evaluation import answer_kl
from trainer.evaluation.answer_kl import TOP_TOKENS
from trainer.forward.pair_model import PairModel
from trainer.metrics import KL, LOG_RATIO_CHOSEN, LOG_RATIO_REJECTED
from trainer.results import RunStatus
from trainer.synthetic import generate_model
from trainer.training_session import TrainingSession

LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}
LIMIT = 6
EVALUATION = {"prompts": 5, "max_new_tokens": LIMIT}
CONFIGS = {
    "full": trial("simpo", evaluation=EVALUATION),
    "adapters": trial("orpo", evaluation=EVALUATION, lora=LORA, training={"tokens_per_micro_batch": 60}),
    "separate": trial("dpo", evaluation=EVALUATION, model=MODEL | {"attention": "separate"}),
    "trl": trial("simpo", evaluation=EVALUATION, engine="trl"),
}


def logits(model: PreTrainedModel, ids: Any, scored: int) -> torch.Tensor:
    """Log-probs of the vocabulary that predict the last `scored` of these tokens."""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids), dtype=torch.long)[None]).logits[0, -scored - 1 : -1].log_softmax(-1)


def two_models(config: TrialConfig, cache: Path, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The initial and the trained model, in float32."""
    path = generate_model(GeneratedModel(**MODEL["generated"]), cache)
    initial, trained = (AutoModelForCausalLM.from_pretrained(path).eval() for _ in range(2))
    if config.lora is None:
        return initial, AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    return initial, PeftModel.from_pretrained(trained, str(folder / "model")).eval()  # pyright: ignore


@pytest.mark.parametrize("name", CONFIGS)
def test_the_distance_is_that_of_two_loaded_models(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[name]
    vocabulary = MODEL["generated"]["vocab_size"]
    found: dict[int, dict[str, float]] = {}
    for top in (TOP_TOKENS, vocabulary):
        monkeypatch.setattr(answer_kl, "TOP_TOKENS", top)
        history, result = finish(TrainingSession(cache).train(config, tmp_path / str(top)))
        assert result.status is RunStatus.FINISHED
        found[top] = dict(history[-1].metrics)
        assert [KL in step.metrics for step in history] == [True, *[False] * 5, True], "at the start and the end"
        assert [history[0].metrics[n] for n in (KL, LOG_RATIO_CHOSEN, LOG_RATIO_REJECTED)] == [0.0, 0.0, 0.0]
    folder = tmp_path / str(vocabulary)
    initial, trained = two_models(config, cache, folder)
    pairs = prepare(config.data, config.model, cache).eval

    for metric, side in ((LOG_RATIO_CHOSEN, "chosen"), (LOG_RATIO_REJECTED, "rejected")):
        ratios: list[float] = []
        for index in range(len(pairs)):
            response = getattr(pairs.pair(index), side)
            ids = np.concatenate([pairs.pair(index).prompt, response])
            tokens = torch.tensor(response, dtype=torch.long)[:, None]
            after, before = (logits(m, ids, len(response)).gather(1, tokens).double().sum() for m in (trained, initial))
            ratios.append(float(after - before) / len(response))
        assert np.mean(ratios) == pytest.approx(found[vocabulary][metric], abs=1e-5)
        assert abs(np.mean(ratios)) > 1e-3

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    full, coarse, rests = list[float](), list[float](), list[float]()
    for index in select_prompts(pairs, 5):
        prompt = pairs.pair(index).prompt.tolist()
        new: list[int] = trained.generate(torch.tensor([prompt]), max_new_tokens=LIMIT, do_sample=False)[0].tolist()  # pyright: ignore
        answer = new[len(prompt) :]
        assert answer[-1] == tokenizer.eos_token_id or len(answer) == LIMIT
        after, before = (logits(model, new, len(answer)).double() for model in (trained, initial))
        for p, q in zip(after, before, strict=True):
            full.append(float((p.exp() * (p - q)).sum()))
            top = p.topk(TOP_TOKENS).indices
            others = torch.ones(len(p), dtype=torch.bool).index_fill(0, top, value=False)
            rest_p, rest_q = p[others].logsumexp(0), q[others].logsumexp(0)
            coarse.append(float((p[top].exp() * (p[top] - q[top])).sum() + rest_p.exp() * (rest_p - rest_q)))
            inside = ((p[others] - rest_p).exp() * ((p[others] - rest_p) - (q[others] - rest_q))).sum()
            rests.append(float(rest_p.exp() * inside))
    assert np.mean(full) > 0.01
    assert found[vocabulary][KL] == pytest.approx(np.mean(full), abs=1e-5), "over the whole vocabulary"
    assert found[TOP_TOKENS][KL] == pytest.approx(np.mean(coarse), abs=1e-5)
    assert np.mean(coarse) + np.mean(rests) == pytest.approx(np.mean(full), abs=1e-9)
    assert 0 < np.mean(coarse) <= np.mean(full), "a lower bound"


def models() -> list[LlamaForCausalLM]:
    """The models that this process has in memory."""
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, LlamaForCausalLM)]


@pytest.mark.parametrize("name", ["full", "adapters"])
def test_it_takes_two_passes_over_the_answers_and_no_second_model(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    plain = PairModel.read_next_token_logps
    others = models()  # that other tests of this process have left

    def counted(self: PairModel, pairs: Any, read: Any) -> None:
        if sum(passes) in (0, 5):  # the first pass under each model
            assert len([found for found in models() if all(found is not other for other in others)]) == 1
        passes.append(len(pairs))
        plain(self, pairs, read)

    monkeypatch.setattr(PairModel, "read_next_token_logps", counted)
    session = TrainingSession(cache)
    finish(session.train(CONFIGS[name], tmp_path))
    assert passes[: len(passes) // 2] == passes[len(passes) // 2 :], "the same batches under both models"
    assert sum(passes) == 2 * 5
    assert (len(passes) > 2) == (name == "adapters"), "its batches hold 60 tokens"
    assert session.counters["model_loaded"] == 1


def test_a_model_that_has_not_changed_has_no_distance(cache: Path, tmp_path: Path) -> None:
    one_update = trial(evaluation=EVALUATION, training={"max_steps": 1})  # of warm-up, at a learning rate of 0
    history, _ = finish(TrainingSession(cache).train(one_update, tmp_path))
    last = history[-1].metrics
    assert [last[name] for name in (KL, LOG_RATIO_CHOSEN, LOG_RATIO_REJECTED)] == [0.0, 0.0, 0.0]


def test_without_prompts_only_the_log_ratios_are_measured(cache: Path, tmp_path: Path) -> None:
    session = TrainingSession(cache)
    without, _ = finish(session.train(trial(evaluation={"prompts": 0}), tmp_path / "0"))
    measured, _ = finish(session.train(trial(evaluation=EVALUATION), tmp_path / "5"))
    assert not any(KL in step.metrics for step in without)
    assert without[-1].metrics[LOG_RATIO_CHOSEN] == measured[-1].metrics[LOG_RATIO_CHOSEN]
    assert model_bytes(tmp_path / "0") == model_bytes(tmp_path / "5"), "the trained weights are saved, not the initial"
    ending = json.loads((tmp_path / "5/ending.json").read_text())
    assert ending["history"][-1]["metrics"][KL] == measured[-1].metrics[KL] > 0
