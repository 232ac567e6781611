"""Models to judge, their prompts and answers: the best trials whose weights exist, and their initial models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.driver.checkpoint_retention import model_folder
from orchestrator.driver.data_stage import load_data_report
from orchestrator.driver.sft_stage import sft_model_folder, with_model
from orchestrator.errors import NoTrialCompleted, OrchestrateError
from orchestrator.judge.answer_pairs import AnswerPair
from orchestrator.spec.judge_config import JudgeConfig, RewardModel
from orchestrator.study.finalists import trial_config
from orchestrator.study.reader import StudyReader
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
    """The weights of all trials to judge were deleted."""


@dataclass(frozen=True, slots=True)
class JudgedModel:
    """A model that generates answers: a trial's weights, or an initial model (`number` None)."""

    number: int | None
    config: TrialConfig
    weights: Path | None
    fingerprint: tuple[object, ...]
    prompts: tuple[JudgePrompt, ...]
    tokenizer: PreTrainedTokenizerBase
    extra_end_tokens: tuple[int, ...]
    """Ids of tokens that end a response."""

    @property
    def name(self) -> str:
        """Name in messages."""
        return "the initial model" if self.number is None else f"trial {self.number}"

    def completions_file(self, cache: Path, decoding: DecodingConfig) -> Path:
        """Return the file of its answers by prompt key."""
        named = digest_of([self.fingerprint, decoding.key()])[:32]
        return cache / "answers" / f"{named}.jsonl"


@dataclass(frozen=True, slots=True)
class JudgeTask:
    """Trials, the initial model of each at the same index, and how answers are decoded."""

    trials: tuple[JudgedModel, ...]
    initial_models: tuple[JudgedModel, ...]
    decodings: tuple[DecodingConfig, ...]
    notices: tuple[str, ...]

    def models(self) -> list[JudgedModel]:
        """Return the distinct models, initial models first."""
        return list({c.fingerprint: c for c in (*self.initial_models, *self.trials)}.values())

    def answer_pairs(self, cache: Path, decodings: Sequence[DecodingConfig]) -> dict[int, list[AnswerPair]]:
        """Return all complete pairs of answers, by trial number."""
        out: dict[int, list[AnswerPair]] = {}
        for trial, initial_model in zip(self.trials, self.initial_models, strict=True):
            assert trial.number is not None
            out[trial.number] = []
            for decoding in decodings:
                trial_answers, initial_answers = (
                    read_jsonl_store(model.completions_file(cache, decoding)) for model in (trial, initial_model)
                )
                out[trial.number] += [
                    _answer_pair(trial.number, p, decoding, trial_answers[p.key], initial_answers[p.key])
                    for p in trial.prompts
                    if p.key in trial_answers and p.key in initial_answers
                ]
        return out

    def missing(self, cache: Path) -> int:
        """Return the number of answers that are still to be generated."""
        return sum(
            sum(p.key not in known for p in model.prompts)
            for model in self.models()
            for decoding in self.decodings
            for known in [read_jsonl_store(model.completions_file(cache, decoding))]
        )


def make_judge_task(study: StudyReader, config: JudgeConfig, *, trust_remote_code: bool = False) -> JudgeTask:
    """Return the models to judge and their prompts. Reads the data; loads no model.

    Raises:
        NoTrialCompleted: no trial is complete.
        WeightsGone: the weights of all trials to judge were deleted.
        ModelError: the model has too few positions for the prompts with their answers.
        StorageRefused: the SFT stage's model is no longer in the cache.
    """
    from trainer.data import prepare
    from trainer.data.tokenization import tokenizer_digest
    from trainer.evaluation.judge_prompts import fixed_prompts
    from trainer.evaluation.text_generation import DecodingConfig
    from trainer.models.model_files import model_fingerprint, resolve_model_path

    folder, spec = study.folder, study.spec
    ranked = [record for record in study.ranked() if record.keeps_requirements][: config.top]
    report = load_data_report(folder)
    if not ranked and study.ranked():
        raise study.no_best()
    if not ranked or report is None:
        raise NoTrialCompleted(f"no trial of {spec.name} has completed yet: there is nothing to judge")
    weights = {record.number: found for record in ranked if (found := model_folder(folder, record)) is not None}
    without_weights = [str(record.number) for record in ranked if record.number not in weights]
    label = f"trial{'s' if len(without_weights) > 1 else ''} {', '.join(without_weights)}"
    if not weights:
        raise WeightsGone(
            f"the weights of {label} are no longer in {folder.path}: there is nothing to judge; "
            f"orchestrate clone {spec.name} {without_weights[0]} trains such a trial again"
        )
    notices = [_removed_weights_notice(study, label, len(weights))] if without_weights else []
    sft_model = sft_model_folder(spec, folder, report, trust_remote_code=trust_remote_code)
    by_data: dict[str, tuple[tuple[JudgePrompt, ...], PreTrainedTokenizerBase, tuple[int, ...]]] = {}
    trials: list[JudgedModel] = []
    initial_models: list[JudgedModel] = []
    for record in (r for r in ranked if r.number in weights):
        trial = trial_config(spec, record)
        # The same arguments as in the data stage, so that the cache is used.
        key = digest_of([trial.data.model_dump(mode="json"), trial.model.model_dump(mode="json")])
        if key not in by_data:
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
            extra_end_tokens = prepare(trial.data, trial.model, folder.cache, tokenizer).report.stop_tokens
            by_data[key] = tuple(found), tokenizer, extra_end_tokens
        prompts, tokenizer, extra_end_tokens = by_data[key]
        initial_config = trial if sft_model is None else with_model(trial, sft_model)
        shared = (tokenizer_digest(tokenizer), trial.training.bf16, extra_end_tokens)
        model = initial_config.model
        start = (model_fingerprint(model, resolve_model_path(model, folder.cache)), model.dtype, model.load_in_4bit)
        trial_key = (study.id, record.number, weights[record.number].parent.name)
        inputs = (prompts, tokenizer, extra_end_tokens)
        initial_models.append(JudgedModel(None, initial_config, None, ("start", *start, *shared), *inputs))
        trials.append(
            JudgedModel(record.number, initial_config, weights[record.number], ("trial", *trial_key, *shared), *inputs)
        )
    greedy = DecodingConfig(config.max_new_tokens)
    sampled = [
        DecodingConfig(config.max_new_tokens, sample, config.temperature, config.top_p, config.seed)
        for sample in range(config.samples)
    ]
    return JudgeTask(tuple(trials), tuple(initial_models), (greedy, *sampled), tuple(notices))


def _removed_weights_notice(study: StudyReader, label: str, kept: int) -> str:
    spec = study.spec
    return (
        f"{label} not judged: the sweep kept the weights of its best {spec.models_kept} only, and removed weights "
        f"cannot be judged; `--top {kept}` asks for no more, and `keep_models` or `judge.top` in the sweep file, set "
        "before its trials end, keeps more"
    )


def generate_missing(
    task: JudgeTask,
    cache: Path,
    budget: int,
    set_activity: LogFn,
    check_cancelled: Callable[[], None],
    *,
    trust_remote_code: bool,
) -> None:
    """Generate the missing answers of every model; each batch is written to disk before the next one starts.

    Args:
        task: models, prompts and decodings.
        cache: the cache folder of the runs folder.
        budget: maximum tokens per batch.
        set_activity: called with the progress.
        check_cancelled: raises to stop between batches.
        trust_remote_code: whether Python code of the model's repository may run.
    """
    from trainer.evaluation.text_generation import TextGenerator

    for model in task.models():
        text_generator: TextGenerator | None = None
        for decoding in task.decodings:
            mode = "greedy" if decoding.sample is None else "sampled"
            with JsonlStore(model.completions_file(cache, decoding)) as store:
                missing = [prompt for prompt in model.prompts if prompt.key not in store.values]
                if not missing:
                    continue
                if text_generator is None:
                    set_activity(f"judge: loading {model.name}")
                    text_generator = TextGenerator.load(
                        model.config,
                        model.weights,
                        model.tokenizer,
                        cache,
                        extra_end_tokens=model.extra_end_tokens,
                        trust_remote_code=trust_remote_code,
                    )
                for batch in text_generator.generate(missing, decoding, budget=budget, check_cancelled=check_cancelled):
                    store.put({key: asdict(written) for key, written in batch.items()})
                    done = sum(prompt.key in store.values for prompt in model.prompts)
                    set_activity(f"judge: {model.name}, {mode} answers: {done} of {len(model.prompts)}")


def reward_scores(
    pairs: Sequence[AnswerPair],
    config: JudgeConfig,
    cache: Path,
    set_activity: LogFn,
    check_cancelled: Callable[[], None],
    *,
    trust_remote_code: bool,
) -> Mapping[str, float]:
    """Return the reward model's score of every answer by its key, computing the missing ones."""
    from trainer.evaluation.reward_model import RewardInput, RewardScorer

    reward_config = config.reward_model
    assert reward_config is not None

    def open_session() -> RewardScorer:
        set_activity(f"judge: loading {reward_config.name_or_path}")
        settings = reward_config.model_dump(exclude={"name_or_path"})
        return RewardScorer(reward_config.name_or_path, **settings, trust_remote_code=trust_remote_code)

    # The commit of a hub model, part of its fingerprint, is known only after loading.
    scorer = None if Path(reward_config.name_or_path).is_dir() else open_session()
    with JsonlStore(reward_scores_file(reward_config, cache)) as store:
        inputs = {d.key: d for m in pairs for d in _reward_inputs(m, RewardInput)}
        missing = [dialogue for key, dialogue in inputs.items() if key not in store.values]
        if missing:
            scorer = scorer or open_session()
            for batch in scorer.score(missing, budget=config.tokens_per_batch, check_cancelled=check_cancelled):
                store.put({key: repr(score) for key, score in batch.items()})
                done = sum(key in store.values for key in inputs)
                set_activity(f"judge: {reward_config.name_or_path} scores answers: {done} of {len(inputs)}")
        return {key: float(store.values[key]) for key in inputs}


def reward_scores_file(config: RewardModel, cache: Path) -> Path:
    """Return the file with this reward model's scores; its name follows from weights and settings, not from places."""
    from trainer.evaluation.reward_model import reward_model_fingerprint

    fingerprint = reward_model_fingerprint(config.name_or_path, config.revision)
    identity = [fingerprint, config.label, config.dtype, config.max_length]
    return cache / "rewards" / f"{digest_of(identity)[:32]}.jsonl"


def _reward_inputs(answer_pair: AnswerPair, make: Callable[[str, str, Any, str], Any]) -> Iterator[Any]:
    from orchestrator.judge.answer_pairs import reward_key

    for answer in (answer_pair.trial_answer, answer_pair.initial_answer):
        yield make(reward_key(answer_pair, answer), answer_pair.text, answer_pair.messages, answer)


def _answer_pair(
    number: int, prompt: JudgePrompt, decoding: DecodingConfig, trial_answer: Any, initial_answer: Any
) -> AnswerPair:
    return AnswerPair(
        trial=number,
        prompt=prompt.key,
        text=prompt.text,
        messages=prompt.messages,
        expected=prompt.expected,
        sample=decoding.sample,
        trial_answer=str(trial_answer["text"]),
        initial_answer=str(initial_answer["text"]),
    )
