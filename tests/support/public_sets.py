"""Public data sets: settings, and what becomes of four rows in their published columns, with cells that are unusual."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class PublicSet:
    """A data set, the settings that it needs, and what becomes of it.

    `kinds` are what is noticed about each row, by its number; `left_out` are the rows that are not trained on.
    `converted` is how many pairs the answered program makes of rows that are no pairs.
    """

    name: str
    said: str
    """What the product makes of it, in the words of docs/data.md."""
    rows: list[dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    columns: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    kinds: Mapping[int, set[str]] = field(default_factory=dict[int, set[str]])
    left_out: frozenset[int] = frozenset()
    converted: int | None = None


def _rows(name: str) -> list[dict[str, Any]]:
    """Written for these tests; one file serves sets of the same columns."""
    text = Path(__file__).with_name("public_rows").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _kinds(*of_rows: str) -> dict[int, set[str]]:
    """What is noticed about the first row, the second and so on, in words with blanks between them."""
    return {number: set(kinds.split()) for number, kinds in enumerate(of_rows, 1) if kinds}


TEMPLATE = {"apply_template": True}
_PRINCETON = (
    "llama3-ultrafeedback",
    "llama3-ultrafeedback-armorm",
    "mistral-instruct-ultrafeedback",
    "gemma2-ultrafeedback-armorm",
)
PUBLIC_SETS = [
    PublicSet(
        "HuggingFaceH4/ultrafeedback_binarized",
        "Read as it is. `prompt` stands in both dialogues and is kept once; equal scores are a notice.",
        _rows("HuggingFaceH4_ultrafeedback_binarized"),
        kinds=_kinds("prompt_repeated", "empty_response", "prompt_repeated score_tie", "equal_responses"),
        left_out=frozenset({2, 4}),
    ),
    *(
        PublicSet(
            f"princeton-nlp/{name}",
            "Read as it is, as above. Columns with all answers and their scores are left alone.",
            _rows("princeton-nlp"),
            kinds=_kinds("prompt_repeated", "prompt_repeated", "equal_responses", "not_text"),
            left_out=frozenset({3, 4}),
        )
        for name in _PRINCETON
    ),
    PublicSet(
        "trl-lib/ultrafeedback_binarized",
        "Read as it is. A lower score for chosen than for rejected is a notice.",
        _rows("trl-lib_ultrafeedback_binarized"),
        kinds=_kinds("", "score_contradicts", "empty_response", "score_tie"),
        left_out=frozenset({3}),
    ),
    PublicSet(
        "argilla/ultrafeedback-binarized-preferences-cleaned",
        "Read as it is, as above. Ratings and models are left alone.",
        _rows("argilla_ultrafeedback-binarized-preferences-cleaned"),
        kinds=_kinds("prompt_repeated", "prompt_repeated", "empty_response", "empty_prompt"),
        left_out=frozenset({3, 4}),
    ),
    PublicSet(
        "Anthropic/hh-rlhf",
        "Turns become messages; the prompt ends at the last `Assistant:` that both texts share.",
        _rows("Anthropic_hh-rlhf"),
        TEMPLATE,
        kinds=_kinds("text_turns", "text_turns", "empty_response", "several_turns text_turns"),
        left_out=frozenset({3}),
    ),
    PublicSet(
        "Intel/orca_dpo_pairs",
        "`question` is taken for the prompt, with a notice, and `system` for the system message.",
        _rows("Intel_orca_dpo_pairs"),
        TEMPLATE,
        kinds=_kinds("recognised_column", "recognised_column", "empty_response", "recognised_column"),
        left_out=frozenset({3}),
    ),
    PublicSet(
        "argilla/distilabel-intel-orca-dpo-pairs",
        "As above. Ties are not left out by themselves: the unused `rating` is a notice.",
        _rows("argilla_distilabel-intel-orca-dpo-pairs"),
        TEMPLATE,
        columns={"prompt": "input"},
        kinds=_kinds(
            "recognised_column unused_column",
            "recognised_column unused_column",
            "recognised_column unused_column",
            "equal_responses",
        ),
        left_out=frozenset({4}),
    ),
    PublicSet(
        "argilla/distilabel-capybara-dpo-7k-binarized",
        "Read as it is. Earlier turns, which both dialogues share, are the prompt.",
        _rows("argilla_distilabel-capybara-dpo-7k-binarized"),
        kinds=_kinds("prompt_repeated", "prompt_repeated", "prompt_repeated", "empty_response"),
        left_out=frozenset({4}),
    ),
    PublicSet(
        "argilla/distilabel-math-preference-dpo",
        "Read by the mapped columns; ratings are recognized and compared.",
        _rows("argilla_distilabel-math-preference-dpo"),
        TEMPLATE,
        columns={"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
        kinds=_kinds("recognised_column", "recognised_column", "equal_responses", "empty_response"),
        left_out=frozenset({3, 4}),
    ),
    PublicSet(
        "berkeley-nest/Nectar",
        "Refused with a program that makes pairs of the best and the worst answer.",
        _rows("berkeley-nest_Nectar"),
        TEMPLATE,
        kinds=_kinds("text_turns", "text_turns", "text_turns"),
        converted=3,
    ),
    PublicSet(
        "nvidia/HelpSteer2 (preference)",
        "Refused with a program that makes pairs by the sign of `preference_strength`, without ties, turns as "
        "messages.",
        _rows("nvidia_HelpSteer2_preference"),
        TEMPLATE,
        converted=3,
    ),
    PublicSet(
        "nvidia/HelpSteer3 (preference)",
        "Refused with a program that makes pairs by the sign of `overall_preference`, without ties.",
        _rows("nvidia_HelpSteer3_preference"),
        converted=3,
    ),
    PublicSet(
        "PKU-Alignment/PKU-SafeRLHF",
        "Refused with a program that makes pairs by `better_response_id`.",
        _rows("PKU-Alignment_PKU-SafeRLHF"),
        TEMPLATE,
        kinds=_kinds("", "", "", "empty_response"),
        left_out=frozenset({4}),
        converted=4,
    ),
    PublicSet(
        "stanfordnlp/SHP",
        "Refused with a program that makes pairs by `labels`.",
        _rows("stanfordnlp_SHP"),
        TEMPLATE,
        kinds=_kinds("", "", "", "equal_responses"),
        left_out=frozenset({4}),
        converted=4,
    ),
]
"""Those named in sweeps/ first."""
