"""The held-out pairs and prompts under the model as it is now, and what of it is kept as files."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import TrialConfig
from trainer.data.pairs import PairSet
from trainer.evaluation.answers import Answer, answer_greedily, answer_metrics, chosen_prompts
from trainer.evaluation.scoring import eval_metrics, score
from trainer.forward.pair_model import PairModel
from trainer.metrics import EVAL
from trainer.models.ends import end_tokens
from trainer.objectives.losses import needs
from trainer.objectives.pair_logps import PairLogps
from trainer.sharding import let_go
from trainer.storage.durable import write_file
from trainer.world import Patience, World


@dataclass(frozen=True, slots=True)
class Examiner:
    """Looks at one model with one trial's settings: log-probs of the held-out pairs, answers to fixed prompts."""

    config: TrialConfig
    live: PreTrainedModel
    model: PairModel
    tokenizer: PreTrainedTokenizerBase
    pairs: PairSet
    world: World
    patience: Patience
    stops: tuple[int, ...] = ()
    """Tokens with which the data's responses end."""

    def logps(self, pairs: PairSet, indexes: Sequence[int] | None = None) -> PairLogps:
        """Log-probs of these pairs (by default all), on the CPU."""
        training = self.config.training
        with _at_rest(self.live), self.world.autocast(training.bf16, keep=not self.model.sharded):
            return score(
                self.model,
                pairs,
                # The held-out metrics compare both responses, whatever the objective itself reads.
                replace(needs(self.config.loss), rejected=True),
                training.tokens_per_micro_batch,
                self.world,
                self.patience.pause,
                indexes,
            )

    def answers(self) -> list[Answer]:
        """Greedy answers to the first `evaluation.prompts` distinct held-out prompts; every process returns all of the
        first one's.
        """
        evaluation, training = self.config.evaluation, self.config.training
        with _at_rest(self.live), self.world.autocast(training.bf16, keep=not self.model.sharded):
            found = answer_greedily(
                self.live,
                self.tokenizer,
                self.pairs,
                chosen_prompts(self.pairs, evaluation.prompts),
                max_new_tokens=evaluation.max_new_tokens,
                budget=training.tokens_per_micro_batch,
                pause=self.patience.pause,
                stops=self.stops,
            )
        if self.world.size == 1:
            return found
        return [Answer(**json.loads(one)) for one in self.world.agree([json.dumps(asdict(one)) for one in found])]

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        return end_tokens(self.live, self.tokenizer, self.stops)

    def metrics(self, logps: PairLogps, reference: PairLogps, answers: Sequence[Answer]) -> dict[str, float]:
        """All `eval_` metrics; `reference` are the start model's log-probs of the same pairs."""
        against = logps.against(reference) if needs(self.config.loss).reference else logps
        held_out = eval_metrics(self.config.loss, against, [int(n) for n in self.pairs.prompt_lengths])
        return held_out | self.of_answers(answers)

    @staticmethod
    def of_answers(answers: Sequence[Answer]) -> dict[str, float]:
        """The `eval_` metrics that follow from answers alone."""
        return {f"{EVAL}{name}": value for name, value in answer_metrics(answers).items()}


@contextmanager
def _at_rest(model: PreTrainedModel) -> Generator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        let_go(model)
        model.train(before)


def write_eval_pairs(path: Path, logps: PairLogps, start: PairLogps, pairs: PairSet) -> None:
    """The log-probs of every held-out pair, [N] each, with its `source` and `row`: what paired tests compare.

    `start_chosen` and `start_rejected` are the start model's of the same pairs.
    """
    columns = logps.columns() | {
        "start_chosen": start.chosen,
        "start_rejected": start.rejected,
        "source": torch.as_tensor(pairs.sources).clone(),
        "row": torch.as_tensor(pairs.rows).clone(),
    }
    write_file(path, lambda aside: save_file(columns, aside))
