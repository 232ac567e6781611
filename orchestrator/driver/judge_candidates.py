"""Models to judge and their prompts: the best trials whose weights exist, their initial model, their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.driver.checkpoint_retention import model_folder
from orchestrator.driver.data_stage import load_report
from orchestrator.driver.sft_stage import sft_model_folder, with_model
from orchestrator.errors import NoTrialCompleted, OrchestrateError
from orchestrator.judge.answer_pairs import AnswerPair
from orchestrator.spec.judge_config import JudgeConfig
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.study.reader import StudyReader
from orchestrator.study.trial_records import rank_trials
from trainer.config.position_limits import known_positions, refuse_long_answers
from trainer.config.trial import TrialConfig
from trainer.storage.atomic_files import digest_of
from trainer.storage.jsonl_store import JsonlStore, read_jsonl_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.evaluation.judge_prompts import JudgePrompt
    from trainer.evaluation.text_generation import DecodingConfig

LogFn = Callable[[str], None]


class WeightsGone(OrchestrateError):
    """No trial that should be judged has kept its weights."""


@dataclass(frozen=True, slots=True)
class JudgedModel:
    """A model that answers: a trial's with its weights, or an initial model (`number` None)."""

    number: int | None
    config: TrialConfig
    weights: Path | None
    fingerprint: tuple[object, ...]
    prompts: tuple[JudgePrompt, ...]
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    """Tokens with which the responses of its data end."""

    @property
    def name(self) -> str:
        """For people."""
        return "the start model" if self.number is None else f"trial {self.number}"

    def completions_file(self, cache: Path, decoding: DecodingConfig) -> Path:
        """Where its answers are kept, by prompt."""
        named = digest_of([self.fingerprint, decoding.key()])[:32]
        return cache / "answers" / f"{named}.jsonl"


@dataclass(frozen=True, slots=True)
class JudgeTask:
    """Trials and, at the same place, the initial model of each; how they answer."""

    trials: tuple[JudgedModel, ...]
    initial_models: tuple[JudgedModel, ...]
    decodings: tuple[DecodingConfig, ...]
    notices: tuple[str, ...]

    def models(self) -> list[JudgedModel]:
        """Every model once, initial models first."""
        return list({c.fingerprint: c for c in (*self.initial_models, *self.trials)}.values())

    def answer_pairs(self, cache: Path, decodings: Sequence[DecodingConfig]) -> dict[int, list[AnswerPair]]:
        """By trial, every pair of answers that is there."""
        out: dict[int, list[AnswerPair]] = {}
        for trial, start in zip(self.trials, self.initial_models, strict=True):
            assert trial.number is not None
            out[trial.number] = []
            for decoding in decodings:
                ours, theirs = (read_jsonl_store(c.completions_file(cache, decoding)) for c in (trial, start))
                out[trial.number] += [
                    _answer_pair(trial.number, p, decoding, ours[p.key], theirs[p.key])
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
            for known in [read_jsonl_store(model.completions_file(cache, decoding))]
        )


def make_judge_task(study: StudyReader, config: JudgeConfig, *, trust_remote_code: bool = False) -> JudgeTask:
    """The contest that the sweep's state and this configuration make. Reads the data; loads no model.

    NoTrialCompleted, WeightsGone; ModelError where the model has too few positions for the prompts with their answers;
    StorageRefused where the initial model of an sft stage is gone.
    """
    from trainer.data import prepare
    from trainer.data.tokenization import tokenizer_digest
    from trainer.evaluation.judge_prompts import fixed_prompts
    from trainer.evaluation.text_generation import DecodingConfig
    from trainer.models.model_files import model_fingerprint, resolve_model_path

    folder, spec = study.folder, study.spec
    ranked = rank_trials(study.trials(), *spec.objectives)[: config.top]
    report = load_report(folder)
    if not ranked or report is None:
        raise NoTrialCompleted(f"no trial of {spec.name} has completed yet: there is nothing to judge")
    weights = {record.number: found for record in ranked if (found := model_folder(folder, record)) is not None}
    gone = [str(record.number) for record in ranked if record.number not in weights]
    if not weights:
        raise WeightsGone(
            f"the weights of trial{'s' if len(gone) > 1 else ''} {', '.join(gone)} are no longer in {folder.path}"
        )
    which = f"trial{'s' if len(gone) > 1 else ''} {', '.join(gone)}"
    notices = [f"{which} not judged, as the weights were not kept (keep_models)"] if gone else []
    made = sft_model_folder(spec, folder, report, trust_remote_code=trust_remote_code)
    read: dict[str, tuple[tuple[JudgePrompt, ...], PreTrainedTokenizerBase, tuple[int, ...]]] = {}
    trials: list[JudgedModel] = []
    starts: list[JudgedModel] = []
    for record in (r for r in ranked if r.number in weights):
        trial = apply_params(spec.base, record.params)
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
            if (positions := known_positions(trial.model)) is not None:  # rather than once the model is loaded
                longest = max((len(prompt.ids) for prompt in found), default=0)
                refuse_long_answers(positions, longest, config.max_new_tokens, "judge.max_new_tokens")
            stops = prepare(trial.data, trial.model, folder.cache, tokenizer).report.stop_tokens
            read[key] = tuple(found), tokenizer, stops
        prompts, tokenizer, stops = read[key]
        begun = trial if made is None else with_model(trial, made)
        shared = (tokenizer_digest(tokenizer), trial.training.bf16, stops)
        model = begun.model
        start = (model_fingerprint(model, resolve_model_path(model, folder.cache)), model.dtype, model.load_in_4bit)
        own = (study.id, record.number, weights[record.number].parent.name)
        inputs = (prompts, tokenizer, stops)
        starts.append(JudgedModel(None, begun, None, ("start", *start, *shared), *inputs))
        trials.append(JudgedModel(record.number, begun, weights[record.number], ("trial", *own, *shared), *inputs))
    greedy = DecodingConfig(config.max_new_tokens)
    sampled = [
        DecodingConfig(config.max_new_tokens, sample, config.temperature, config.top_p, config.seed)
        for sample in range(config.samples)
    ]
    return JudgeTask(tuple(trials), tuple(starts), (greedy, *sampled), tuple(notices))


def generate_missing(
    task: JudgeTask,
    cache: Path,
    budget: int,
    set_stage: LogFn,
    check_cancelled: Callable[[], None],
    *,
    trust_remote_code: bool,
) -> None:
    """Have every model give the answers that are missing; each batch is on the disk before the next begins."""
    from trainer.evaluation.text_generation import TextGenerator

    for model in task.models():
        text_generator: TextGenerator | None = None
        for decoding in task.decodings:
            how = "greedy" if decoding.sample is None else "sampled"
            with JsonlStore(model.completions_file(cache, decoding)) as store:
                left = [prompt for prompt in model.prompts if prompt.key not in store.values]
                if not left:
                    continue
                if text_generator is None:
                    set_stage(f"judge: loading {model.name}")
                    text_generator = TextGenerator.load(
                        model.config,
                        model.weights,
                        model.tokenizer,
                        cache,
                        stops=model.stops,
                        trust_remote_code=trust_remote_code,
                    )
                for batch in text_generator.generate(left, decoding, budget=budget, check_cancelled=check_cancelled):
                    store.put({key: asdict(written) for key, written in batch.items()})
                    done = sum(prompt.key in store.values for prompt in model.prompts)
                    set_stage(f"judge: {model.name}, {how} answers: {done} of {len(model.prompts)}")


def reward_scores(
    pairs: Sequence[AnswerPair],
    config: JudgeConfig,
    cache: Path,
    set_stage: LogFn,
    check_cancelled: Callable[[], None],
    *,
    trust: bool,
) -> Mapping[str, float]:
    """The reward model's score of every answer, computed where it is not kept."""
    from trainer.evaluation.reward_model import RewardInput, RewardScorer, reward_model_fingerprint

    reward_config = config.reward_model
    assert reward_config is not None

    def open_session() -> RewardScorer:
        set_stage(f"judge: loading {reward_config.name_or_path}")
        settings = reward_config.model_dump(exclude={"name_or_path"})
        return RewardScorer(reward_config.name_or_path, **settings, trust_remote_code=trust)

    # Of a hub's model the commit, which names its weights, is known once it was loaded.
    scorer = None if Path(reward_config.name_or_path).is_dir() else open_session()
    identity = [
        reward_model_fingerprint(reward_config.name_or_path, reward_config.revision),
        reward_config.label,
        reward_config.dtype,
        reward_config.max_length,
    ]
    with JsonlStore(cache / "rewards" / f"{digest_of(identity)[:32]}.jsonl") as store:
        inputs = {d.key: d for m in pairs for d in _reward_inputs(m, RewardInput)}
        left = [dialogue for key, dialogue in inputs.items() if key not in store.values]
        if left:
            scorer = scorer or open_session()
            for batch in scorer.score(left, budget=config.tokens_per_batch, check_cancelled=check_cancelled):
                store.put({key: repr(score) for key, score in batch.items()})
                done = sum(key in store.values for key in inputs)
                set_stage(f"judge: {reward_config.name_or_path} scores answers: {done} of {len(inputs)}")
        return {key: float(store.values[key]) for key in inputs}


def _reward_inputs(answer_pair: AnswerPair, make: Callable[[str, str, Any, str], Any]) -> Iterator[Any]:
    from orchestrator.judge.answer_pairs import reward_key

    for answer in (answer_pair.trial_answer, answer_pair.initial_answer):
        yield make(reward_key(answer_pair, answer), answer_pair.text, answer_pair.messages, answer)


def _answer_pair(number: int, prompt: JudgePrompt, decoding: DecodingConfig, ours: Any, theirs: Any) -> AnswerPair:
    return AnswerPair(
        trial=number,
        prompt=prompt.key,
        text=prompt.text,
        messages=prompt.messages,
        expected=prompt.expected,
        sample=decoding.sample,
        trial_answer=str(ours["text"]),
        initial_answer=str(theirs["text"]),
    )
