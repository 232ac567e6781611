"""Who is judged on what: the best trials whose weights are there, their start model, the prompts, their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.driver.checkpoint_retention import model_of
from orchestrator.driver.data_stage import load_report
from orchestrator.driver.sft_stage import made_start_model, with_model
from orchestrator.errors import NoTrialCompleted, OrchestrateError
from orchestrator.judge.answer_pairs import Match
from orchestrator.spec.judge_config import JudgeConfig
from orchestrator.spec.search.trial_params import place
from orchestrator.study.reader import StudyReader
from orchestrator.study.trial_records import ranking
from trainer.config.trial import TrialConfig
from trainer.storage.atomic_files import digest_of
from trainer.storage.jsonl_store import Kept, peek

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.evaluation.judge_prompts import Prompt
    from trainer.evaluation.text_generation import Decoding

Tell = Callable[[str], None]


class WeightsGone(OrchestrateError):
    """No trial that should be judged has kept its weights."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model that answers: a trial's with its weights, or a start model (`number` None)."""

    number: int | None
    config: TrialConfig
    weights: Path | None
    identity: tuple[object, ...]
    prompts: tuple[Prompt, ...]
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    """Tokens with which the responses of its data end."""

    @property
    def name(self) -> str:
        """For people."""
        return "the start model" if self.number is None else f"trial {self.number}"

    def file(self, cache: Path, decoding: Decoding) -> Path:
        """Where its answers are kept, by prompt."""
        named = digest_of([self.identity, decoding.key()])[:32]
        return cache / "answers" / f"{named}.jsonl"


@dataclass(frozen=True, slots=True)
class Contest:
    """Trials and, at the same place, the start model of each; how they answer."""

    trials: tuple[Contestant, ...]
    starts: tuple[Contestant, ...]
    decodings: tuple[Decoding, ...]
    notices: tuple[str, ...]

    def models(self) -> list[Contestant]:
        """Every model once, start models first."""
        return list({c.identity: c for c in (*self.starts, *self.trials)}.values())

    def matches(self, cache: Path, decodings: Sequence[Decoding]) -> dict[int, list[Match]]:
        """By trial, every pair of answers that is there."""
        out: dict[int, list[Match]] = {}
        for trial, start in zip(self.trials, self.starts, strict=True):
            assert trial.number is not None
            out[trial.number] = []
            for decoding in decodings:
                ours, theirs = (peek(c.file(cache, decoding)) for c in (trial, start))
                out[trial.number] += [
                    _match(trial.number, p, decoding, ours[p.key], theirs[p.key])
                    for p in trial.prompts
                    if p.key in ours and p.key in theirs
                ]
        return out

    def missing(self, cache: Path) -> int:
        """Answers that are still to be generated."""
        return sum(
            sum(p.key not in known for p in model.prompts)
            for model in self.models()
            for decoding in self.decodings
            for known in [peek(model.file(cache, decoding))]
        )


def set_up(study: StudyReader, config: JudgeConfig, *, trust_remote_code: bool = False) -> Contest:
    """The contest that the sweep's state and this configuration make. Reads the data; loads no model.

    NoTrialCompleted, WeightsGone; StorageRefused where the start model of an sft stage is gone.
    """
    from trainer.data import prepare
    from trainer.data.tokenization import tokenizer_digest
    from trainer.evaluation.judge_prompts import fixed_prompts
    from trainer.evaluation.text_generation import Decoding
    from trainer.models.model_files import locate, model_identity

    folder, spec = study.folder, study.spec
    ranked = ranking(study.trials(), *spec.goals)[: config.top]
    report = load_report(folder)
    if not ranked or report is None:
        raise NoTrialCompleted(f"no trial of {spec.name} has completed yet: there is nothing to judge")
    weights = {record.number: found for record in ranked if (found := model_of(folder, record)) is not None}
    gone = [str(record.number) for record in ranked if record.number not in weights]
    if not weights:
        raise WeightsGone(
            f"the weights of trial{'s' if len(gone) > 1 else ''} {', '.join(gone)} are no longer in {folder.path}"
        )
    which = f"trial{'s' if len(gone) > 1 else ''} {', '.join(gone)}"
    notices = [f"{which} not judged, as the weights were not kept (keep_models)"] if gone else []
    made = made_start_model(spec, folder, report, trust_remote_code=trust_remote_code)
    read: dict[str, tuple[tuple[Prompt, ...], PreTrainedTokenizerBase, tuple[int, ...]]] = {}
    trials: list[Contestant] = []
    starts: list[Contestant] = []
    for record in (r for r in ranked if r.number in weights):
        trial = place(spec.base, record.params)
        # Read as the sweep's data check read them, so that the cache knows them.
        key = digest_of([trial.data.model_dump(mode="json"), trial.model.model_dump(mode="json")])
        if key not in read:
            found, tokenizer = fixed_prompts(
                trial.data,
                trial.model,
                folder.cache,
                config.prompts,
                config.prompts_from,
                trust_remote_code=trust_remote_code,
            )
            stops = prepare(trial.data, trial.model, folder.cache, tokenizer).report.stop_tokens
            read[key] = tuple(found), tokenizer, stops
        prompts, tokenizer, stops = read[key]
        begun = trial if made is None else with_model(trial, made)
        shared = (tokenizer_digest(tokenizer), trial.training.bf16, stops)
        model = begun.model
        start = (model_identity(model, locate(model, folder.cache)), model.dtype, model.load_in_4bit)
        own = (study.id, record.number, weights[record.number].parent.name)
        asked = (prompts, tokenizer, stops)
        starts.append(Contestant(None, begun, None, ("start", *start, *shared), *asked))
        trials.append(Contestant(record.number, begun, weights[record.number], ("trial", *own, *shared), *asked))
    greedy = Decoding(config.max_new_tokens)
    sampled = [
        Decoding(config.max_new_tokens, sample, config.temperature, config.top_p, config.seed)
        for sample in range(config.samples)
    ]
    return Contest(tuple(trials), tuple(starts), (greedy, *sampled), tuple(notices))


def answer_all(
    contest: Contest, cache: Path, budget: int, stage: Tell, pause: Callable[[], None], *, trust_remote_code: bool
) -> None:
    """Have every model give the answers that are missing; each batch is on the disk before the next begins."""
    from trainer.evaluation.text_generation import Answerer

    for model in contest.models():
        answerer: Answerer | None = None
        for decoding in contest.decodings:
            how = "greedy" if decoding.sample is None else "sampled"
            with Kept(model.file(cache, decoding)) as kept:
                left = [prompt for prompt in model.prompts if prompt.key not in kept.values]
                if not left:
                    continue
                if answerer is None:
                    stage(f"judge: loading {model.name}")
                    answerer = Answerer.open(
                        model.config,
                        model.weights,
                        model.tokenizer,
                        cache,
                        stops=model.stops,
                        trust_remote_code=trust_remote_code,
                    )
                for batch in answerer.answers(left, decoding, budget=budget, pause=pause):
                    kept.put({key: asdict(written) for key, written in batch.items()})
                    done = sum(prompt.key in kept.values for prompt in model.prompts)
                    stage(f"judge: {model.name}, {how} answers: {done} of {len(model.prompts)}")


def score_all(
    matches: Sequence[Match], config: JudgeConfig, cache: Path, stage: Tell, pause: Callable[[], None], *, trust: bool
) -> Mapping[str, float]:
    """The reward model's score of every answer, computed where it is not kept."""
    from trainer.evaluation.reward_model import Dialogued, RewardScorer, reward_identity

    wanted = config.reward_model
    assert wanted is not None

    def opened() -> RewardScorer:
        stage(f"judge: loading {wanted.name_or_path}")
        settings = wanted.model_dump(exclude={"name_or_path"})
        return RewardScorer(wanted.name_or_path, **settings, trust_remote_code=trust)

    # Of a hub's model the commit, which names its weights, is known once it was loaded.
    scorer = None if Path(wanted.name_or_path).is_dir() else opened()
    identity = [reward_identity(wanted.name_or_path, wanted.revision), wanted.label, wanted.dtype, wanted.max_length]
    with Kept(cache / "rewards" / f"{digest_of(identity)[:32]}.jsonl") as kept:
        asked = {d.key: d for m in matches for d in _dialogues(m, Dialogued)}
        left = [dialogue for key, dialogue in asked.items() if key not in kept.values]
        if left:
            scorer = scorer or opened()
            for batch in scorer.scores(left, budget=config.tokens_per_batch, pause=pause):
                kept.put({key: repr(score) for key, score in batch.items()})
                done = sum(key in kept.values for key in asked)
                stage(f"judge: {wanted.name_or_path} scores answers: {done} of {len(asked)}")
        return {key: float(kept.values[key]) for key in asked}


def _dialogues(match: Match, make: Callable[[str, str, Any, str], Any]) -> Iterator[Any]:
    from orchestrator.judge.answer_pairs import scored

    for answer in (match.ours, match.theirs):
        yield make(scored(match, answer), match.text, match.messages, answer)


def _match(number: int, prompt: Prompt, decoding: Decoding, ours: Any, theirs: Any) -> Match:
    return Match(
        trial=number,
        prompt=prompt.key,
        text=prompt.text,
        messages=prompt.messages,
        expected=prompt.expected,
        sample=decoding.sample,
        ours=str(ours["text"]),
        theirs=str(theirs["text"]),
    )
