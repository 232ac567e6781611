"""A first sweep file from four answers: model, data, GPUs, objective. Each is checked by the loader itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from orchestrator.errors import SpecError
from orchestrator.spec.load import loads

ObjectiveName = Literal["simpo", "dpo", "orpo", "cpo"]
OBJECTIVES: dict[str, ObjectiveName] = {name: name for name in get_args(ObjectiveName)}
DEFAULT_MODEL = "princeton-nlp/Llama-3-Base-8B-SFT"
DEFAULT_DATA = "HuggingFaceH4/ultrafeedback_binarized"
_FILES = (".jsonl", ".json", ".parquet", ".csv")

_SEARCH: dict[ObjectiveName, str] = {
    "simpo": """  loss.beta: [2.0, 2.5, 10.0]                      # the SimPO paper; 10 is its authors' later advice
  loss.gamma_beta_ratio: [0.3, 0.5]                # gamma / beta; the authors start with 0.5
  training.learning_rate: [3e-7, 5e-7, 8e-7, 1e-6] # the authors' README: what matters most, so it comes first
""",
    "dpo": """  loss.beta: [0.01, 0.05, 0.1]                     # 0.01 is the best for every model in SimPO's README
  training.learning_rate: [3e-7, 5e-7, 7e-7]       # the best of its models
""",
    "orpo": """  loss.beta: [0.1, 0.2]                            # the ORPO paper's lambda, fairseq2's guide
  training.learning_rate: [5e-6, 8e-6]             # the same two
""",
    "cpo": """  loss.beta: [0.1, 1.0]                            # the CPO paper, fairseq2's default
  loss.nll_scale: [0.0, 1.0]                       # fairseq2's guide, the CPO paper
  training.learning_rate: [5e-7, 1e-6]             # SimPO's README, fairseq2's guide
""",
}


@dataclass(frozen=True, slots=True)
class Answers:
    """What a person said."""

    model: str
    data: str
    gpus: int
    objective: ObjectiveName


def check(question: str, answer: str) -> str | None:
    """What is wrong with one answer, in the loader's words; None where nothing is."""
    given = {"model": DEFAULT_MODEL, "data": DEFAULT_DATA, "gpus": "1", "objective": "simpo"} | {question: answer}
    if not answer.strip():
        return "an answer is needed"
    if not given["gpus"].isdigit():
        return f"a whole number of GPUs, 0 or more; not {given['gpus']!r}"
    if given["objective"] not in OBJECTIVES:
        return f"one of {', '.join(OBJECTIVES)}; not {given['objective']!r}"
    objective = OBJECTIVES[given["objective"]]
    if question == "data" and answer.endswith(_FILES) and not Path(answer).is_file():
        return f"there is no file {answer}"
    try:
        loads(write("check", Answers(given["model"], given["data"], int(given["gpus"]), objective)), Path.cwd())
    except SpecError as error:
        return "; ".join(finding.problem for finding in error.findings)
    return None


def write(name: str, answers: Answers) -> str:
    """The file's text."""
    text = json.dumps  # a JSON string is a YAML string
    cpu = answers.gpus == 0
    resources = "{gpus_per_trial: 0}        # trials on this machine's processor" if cpu else "{gpus_per_trial: 1}"
    concurrency = "" if cpu else f"budget: {{concurrency: {answers.gpus}}}      # one trial on each GPU\n"
    staged = answers.objective == "simpo"
    sampler = "staged    # learning rate, then gamma / beta, then beta" if staged else "grid"
    return f"""# Written by `orchestrate init`; what is not here has its default (`orchestrate schema`).
# Next: `orchestrate plan FILE`, then `orchestrate sweep FILE --rehearse`, then `orchestrate sweep FILE`.
name: {text(name)}
description: {text(f"{answers.objective} from {answers.model}")}

base:                                              # one complete trial; the search changes some of its leaves
  model:
    name_or_path: {text(answers.model)}    # one after supervised training, or add an `sft:` stage
    dtype: float32                                 # as in the papers; bfloat16 wants other learning rates
  data:
{_data(answers.data)}    max_length: 2048                               # tokens of prompt and response together
    max_prompt_length: 1800
  loss:
    kind: {answers.objective}
  training:
    pairs_per_update: 128                          # exact, whatever fits the GPU at once
    num_train_epochs: 1
    lr_scheduler_type: cosine
    warmup_ratio: 0.1
    bf16: {"false" if cpu else "true "}                                    # autocast; the weights stay in model.dtype
    gradient_checkpointing: true
  # lora: {{}}                                       # adapters instead of all weights: far less memory

search:
{_SEARCH[answers.objective]}
sampler: {sampler}
maximize: eval_accuracies/logp                     # a held-out metric that the search does not scale
resources: {resources}
{concurrency}"""


def _data(name: str) -> str:
    share = "    eval_share: 0.1                                # held out by prompt\n"
    if name.endswith(_FILES):
        return f"    train: {json.dumps(str(Path(name).resolve()))}\n{share}"
    if name == DEFAULT_DATA:
        return f"    train: {{dataset: {name}, split: train_prefs}}\n    eval: {{dataset: {name}, split: test_prefs}}\n"
    return f"    train: {{dataset: {json.dumps(name)}, split: train}}\n{share}"
