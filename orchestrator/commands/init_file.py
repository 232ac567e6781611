"""`orchestrate init`: writes a sweep file from model, data, GPUs and loss, each validated by the loader."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from orchestrator.commands import model_sizing
from orchestrator.commands.model_sizing import Facts, ValueWithReason
from orchestrator.errors import DataError, SpecError, closest_match
from orchestrator.spec.advice.published_values import LOSS_NAMES, SEARCHED, WEIGHT_RATIO, LossName
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.right_forms import loss_form
from orchestrator.spec.loading.variables import escape
from trainer.config.loss_config import LossConfig
from trainer.results import TrialError

LOSSES: dict[str, LossName] = {name: name for name in LOSS_NAMES}
DEFAULT_MODEL = "princeton-nlp/Llama-3-Base-8B-SFT"
DEFAULT_DATA = "HuggingFaceH4/ultrafeedback_binarized"
_FILES = (".jsonl", ".json", ".parquet", ".csv")
_COMMENTS_AT = 51


@dataclass(frozen=True, slots=True)
class InitAnswers:
    """The user's answers. `gpus`: number of GPUs, 0 for the CPU; `lora`: train adapters instead of all weights."""

    model: str
    data: str
    gpus: int
    loss: LossName
    lora: bool = False


def check_answer(question: str, answer: str) -> str | None:
    """Return the loader's error for one answer; None where it is valid."""
    fields = {"model": DEFAULT_MODEL, "data": DEFAULT_DATA, "gpus": "1", "objective": "simpo"} | {question: answer}
    if not answer.strip():
        return "an answer is needed"
    if not fields["gpus"].isdigit():
        return f"a whole number of GPUs, 0 or more; not {fields['gpus']!r}"
    if fields["objective"] not in LOSSES:
        form = loss_form(fields["objective"])
        hint = f"; {form} in the written file" if form else ""
        return f"one of {', '.join(LOSSES)}; not {fields['objective']!r}{hint}"
    loss = LOSSES[fields["objective"]]
    if question == "data" and answer.endswith(_FILES) and not Path(answer).is_file():
        names = sorted(file.name for file in Path(answer).parent.glob("*")) if Path(answer).parent.is_dir() else []
        near = closest_match(Path(answer).name, names)
        return f"there is no file {answer}{f' (did you mean {Path(answer).with_name(near)}?)' if near else ''}"
    try:
        answers = InitAnswers(fields["model"], fields["data"], int(fields["gpus"]), loss)
        load_spec_text(write_sweep_file("check", answers, Facts()), Path.cwd())
    except SpecError as error:
        return "; ".join(f"{found.problem}{f' ({found.hint})' if found.hint else ''}" for found in error.problems)
    return None


def find_facts(answers: InitAnswers) -> Facts:
    """Return sizes and lengths read from the model's folder and a file of pairs.

    Raises:
        DataError: a sweep would refuse the rows.
    """
    is_file = answers.data.endswith(_FILES)
    data = str(Path(answers.data).resolve()) if is_file else answers.data
    facts = model_sizing.find_facts(_model(answers.model), data, is_file=is_file)
    if facts.labels is not None:
        from trainer.data.pair_dataset import check_counts  # slow import

        loss: LossConfig = TypeAdapter[LossConfig](LossConfig).validate_python({"kind": answers.loss})
        # A sample of a sorted file may have one label.
        labels = facts.labels if facts.all_rows_read else (max(1, n) for n in facts.labels)
        try:
            check_counts(loss, sum(facts.labels), *labels, several_prompts=True)
        except TrialError as error:
            raise DataError(f"no file is written, as a sweep would refuse it: {error}") from error
    return facts


def write_sweep_file(name: str, answers: InitAnswers, facts: Facts) -> str:
    """Return the sweep file as YAML, with values sized for the model and the data."""
    text, line = json.dumps, _line  # a JSON string is a YAML string
    cpu, is_staged = answers.gpus == 0, answers.loss == "simpo"
    lines = [
        "# Written by `orchestrate init`; other settings have their defaults (`orchestrate schema`).",
        "# Next: `orchestrate plan FILE`, then `orchestrate sweep FILE --rehearse`, then `orchestrate sweep FILE`.",
        f"name: {text(name)}",
        f"description: {text(f'{answers.loss} from {answers.model}')}",
        "",
        line("base:", "one complete trial; the search changes some of its settings"),
        line("  model:", "a model after supervised fine-tuning; a base model needs an `sft:` stage"),
        line(f"    name_or_path: {text(_model(answers.model))}", facts.size),
        line("    dtype: float32", "as in the papers; bfloat16 needs other learning rates"),
        "  data:",
        *_data(answers.data, facts),
        *(_value_line(f"    {key}", choice) for key, choice in model_sizing.longest(facts)),
        "  loss:",
        f"    kind: {answers.loss}",
        *(
            line(f"    {path.removeprefix('loss.')}: {value}", _IN_BASE[is_staged])
            for path, value, *_ in SEARCHED[answers.loss]
        ),
        *_weights(facts),
        "  training:",
        line(
            f"    learning_rate: {model_sizing.base_rate(answers.loss, facts, lora=answers.lora)}",
            _IN_BASE[is_staged],
        ),
        _value_line("    pairs_per_update", model_sizing.per_update(facts, lora=answers.lora)),
        *(
            _value_line(f"    {key}", choice)
            for key, choice in model_sizing.duration(facts, cpu=cpu, lora=answers.lora)
        ),
        "    lr_scheduler_type: cosine",
        "    warmup_ratio: 0.1",
        line(
            f"    bf16: {'false' if cpu else 'true'}",
            "no autocast on a CPU" if cpu else "autocast; the weights stay in model.dtype",
        ),
        line("    gradient_checkpointing: auto", "recomputes activations where GPU memory does not hold them"),
        *_evaluation(facts),
        line("  lora: {}", "adapters instead of all weights: far less memory")
        if answers.lora
        else line("  # lora: {}", "adapters instead of all weights: far less memory, ten times the learning rates"),
        "",
        "search:",
        *(line(f"  {path}: {values}", reason) for path, _, values, reason in SEARCHED[answers.loss]),
        _value_line("  training.learning_rate", model_sizing.rates(answers.loss, facts, lora=answers.lora)),
        "",
        line("sampler: staged", "learning rate, then gamma / beta, then beta") if is_staged else "sampler: grid",
        line("maximize: eval_accuracies/logp", "a held-out metric that no searched setting scales")
        if facts.labels is None
        else line("maximize: eval_margins/logp", "desirable minus undesirable; no searched setting scales it"),
        line("# finalists: {top: 3, seeds: 4}", "trains the best again, on held-out rows that the search has not seen"),
        line("resources: {gpus_per_trial: 0}", "trials on this machine's CPU")
        if cpu
        else line("resources: {gpus_per_trial: auto}", "the fewest that hold a trial, or a share of one"),
    ]
    return "\n".join(lines) + "\n"


def _model(name: str) -> str:
    """Return a folder as absolute path, since the sweep file may be moved; a hub name unchanged."""
    return escape(str(Path(name).resolve())) if Path(name).is_dir() else name


def _line(text: str, comment: str) -> str:
    return f"{text:<{_COMMENTS_AT - 1}} # {comment}" if len(text) < _COMMENTS_AT else f"{text}    # {comment}"


def _value_line(key: str, value: ValueWithReason) -> str:
    return _line(f"{key}: {value.value}", value.reason)


def _evaluation(facts: Facts) -> list[str]:
    chosen = model_sizing.answers(facts)
    return [] if chosen is None else ["  evaluation:", _value_line("    max_new_tokens", chosen)]


def _data(name: str, facts: Facts) -> list[str]:
    share = _value_line("    eval_share", model_sizing.held_out(facts))
    if name.endswith(_FILES):
        return [f"    train: {json.dumps(escape(str(Path(name).resolve())))}", share, *_template(facts)]
    if name == DEFAULT_DATA:
        return [f"    {side}: {{dataset: {name}, split: {split}_prefs}}" for side, split in _SPLITS]
    return [f"    train: {{dataset: {json.dumps(name)}, split: train}}", share]


def _weights(facts: Facts) -> list[str]:
    """Return the weight of the rarer label's responses where the summed weights would not be 1 to 1.5 to 1."""
    desirable, undesirable = facts.labels or (1, 1)
    if not desirable or not undesirable or WEIGHT_RATIO[0] <= desirable / undesirable <= WEIGHT_RATIO[1]:
        return []
    name = "desirable" if desirable < undesirable else "undesirable"
    weight = max(desirable, undesirable) / min(desirable, undesirable)
    reason = f"{desirable:,} desirable and {undesirable:,} undesirable responses weigh alike in sum; the KTO paper"
    return [_line(f"    {name}_weight: {weight:.3g}", reason)]


def _template(facts: Facts) -> list[str]:
    """Return the `apply_template` line for plain-text rows and a tokenizer with a chat template."""
    if facts.apply_template is None:
        return []
    effect = "prompts become user messages" if facts.apply_template else "plain text is used unchanged"
    return [_line(f"    apply_template: {json.dumps(facts.apply_template)}", f"{effect}; the tokenizer has a template")]


_IN_BASE = {
    False: "of trials from `enqueue` that do not set it; the search has its own",
    True: "where the search starts",
}
"""Comment on a searched setting in `base`, by whether the search is staged."""
_SPLITS = (("train", "train"), ("eval", "test"))
