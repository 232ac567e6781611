"""Four rows of each public data set in its published columns, written for these tests, with cells that are unusual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


def user(text: str | None) -> Row:
    return {"content": text, "role": "user"}


def assistant(text: str | None) -> Row:
    return {"content": text, "role": "assistant"}


@dataclass(frozen=True, slots=True)
class PublicSet:
    """A data set, the settings that it needs, and what becomes of it.

    `kinds` are what is noticed about each row, by its number; `left_out` are the rows that are not trained on.
    `converted` is how many pairs the answered program makes of rows that are no pairs.
    """

    name: str
    said: str
    """What the product makes of it, in the words of docs/data.md."""
    rows: list[Row]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    columns: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    kinds: Mapping[int, set[str]] = field(default_factory=dict[int, set[str]])
    left_out: frozenset[int] = frozenset()
    converted: int | None = None


TEMPLATE = {"apply_template": True}


def _ultrafeedback(number: int, ask: str, chosen: str | None, rejected: str | None, scores: tuple[Any, Any]) -> Row:
    return {
        "prompt": ask,
        "prompt_id": f"{number:064x}",
        "chosen": [user(ask), assistant(chosen)],
        "rejected": [user(ask), assistant(rejected)],
        "messages": [user(ask), assistant(chosen)],
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


H4 = PublicSet(
    "HuggingFaceH4/ultrafeedback_binarized",
    "Read as it is. `prompt` stands in both dialogues and is kept once; equal scores are a notice.",
    [
        _ultrafeedback(1, "Name a colour of the rainbow.", "Violet.", "Brown.", (8.5, 4.0)),
        _ultrafeedback(2, "Which planet is nearest to the sun?", "Mercury is.", "", (7.0, 1.0)),
        _ultrafeedback(3, "Say hello in Dutch.\n", "Hallo!", "Bonjour!", (6.0, 6.0)),
        _ultrafeedback(4, "Count to two.", "One, two.", "One, two.", (5.0, 5.0)),
    ],
    kinds={
        1: {"prompt_repeated"},
        2: {"empty_response"},
        3: {"prompt_repeated", "score_tie"},
        4: {"equal_responses"},
    },
    left_out=frozenset({2, 4}),
)


def _on_policy(number: int, ask: str, chosen: str | None, rejected: str | None) -> Row:
    return {
        "prompt_id": f"{number:064x}",
        "prompt": ask,
        "all_generated_responses": [chosen or "", rejected or "", "Another one."],
        "all_rm_scores": [0.17, 0.05, 0.11],
        "chosen": [user(ask), assistant(chosen)],
        "rejected": [user(ask), assistant(rejected)],
    }


ON_POLICY = [
    PublicSet(
        f"princeton-nlp/{name}",
        "Read as it is, as above. Columns with all answers and their scores are left alone.",
        [
            _on_policy(1, "Name a fruit that is red.", "A cherry.", "A banana."),
            _on_policy(2, "Name a fruit that is green.\n\nOne word.", "Lime.", "Cherry."),
            _on_policy(3, "Name a fruit that is blue.", "Same.", "Same."),
            _on_policy(4, "Name a fruit that is black.", None, "A lemon."),
        ],
        kinds={n: {"prompt_repeated"} for n in (1, 2)} | {3: {"equal_responses"}, 4: {"not_text"}},
        left_out=frozenset({3, 4}),
    )
    for name in (
        "llama3-ultrafeedback",
        "llama3-ultrafeedback-armorm",
        "mistral-instruct-ultrafeedback",
        "gemma2-ultrafeedback-armorm",
    )
]


def _argilla(ask: str, chosen: str, rejected: str, ratings: tuple[float | None, float | None]) -> Row:
    return {
        "source": "evol_instruct",
        "prompt": ask,
        "chosen": [user(ask), assistant(chosen)],
        "chosen-rating": ratings[0],
        "chosen-model": "wizardlm-7b",
        "rejected": [user(ask), assistant(rejected)],
        "rejected-rating": ratings[1],
        "rejected-model": "bard",
    }


ARGILLA = PublicSet(
    "argilla/ultrafeedback-binarized-preferences-cleaned",
    "Read as it is, as above. Ratings and models are left alone.",
    [
        _argilla("What is the capital of Norway?", "Oslo.", "Bergen.", (5.0, 2.25)),
        _argilla("What is the capital of Chad?\n\n", "N'Djamena.", "Chad has none.", (4.75, None)),
        _argilla("What is the capital of Peru?", "Lima.", "  ", (4.0, 1.0)),
        _argilla("", "Tell me more.", "What?", (3.0, 1.0)),
    ],
    kinds={n: {"prompt_repeated"} for n in (1, 2)} | {3: {"empty_response"}, 4: {"empty_prompt"}},
    left_out=frozenset({3, 4}),
)


def _hh(head: str, chosen: str, rejected: str) -> Row:
    return {"chosen": head + chosen, "rejected": head + rejected}


HH = PublicSet(
    "Anthropic/hh-rlhf",
    "Turns become messages; the prompt ends at the last `Assistant:` that both texts share.",
    [
        _hh("\n\nHuman: How do I boil rice?\n\nAssistant:", " In twice as much water.", " In an oven."),
        _hh(
            "\n\nHuman: Hi\n\nAssistant: Hello, how can I help?\n\nHuman: Name a river.\n\nAssistant:",
            " The Danube.",
            " The Alps.",
        ),
        _hh("\n\nHuman: Is the moon a star?\n\nAssistant:", " No, it is not.", ""),
        _hh(
            "\n\nHuman: Name a bird.\n\nAssistant: ",
            "A wren.\n\nHuman: Another?\n\nAssistant: A rook.",
            "A cow.\n\nHuman: Is it?\n\nAssistant: No.",
        ),
    ],
    settings=TEMPLATE,
    kinds={1: {"text_turns"}, 2: {"text_turns"}, 3: {"empty_response"}, 4: {"text_turns", "several_turns"}},
    left_out=frozenset({3}),
)

ORCA = PublicSet(
    "Intel/orca_dpo_pairs",
    "`question` is taken for the prompt, with a notice, and `system` for the system message.",
    [
        {
            "system": "You teach children.",
            "question": "Why do cats purr?",
            "chosen": "To be calm.",
            "rejected": "Fuel.",
        },
        {"system": "", "question": "Add 2 and 3.", "chosen": "5", "rejected": "23"},
        {"system": "You translate.", "question": "Good day, in French", "chosen": "Bonjour", "rejected": ""},
        {"system": None, "question": "Name a metal.", "chosen": "Iron", "rejected": "Wood"},
    ],
    settings=TEMPLATE,
    kinds={n: {"recognised_column"} for n in (1, 2, 4)} | {3: {"empty_response"}},
    left_out=frozenset({3}),
)


def _distilabel_orca(system: str, ask: str, chosen: str, rejected: str, rating: list[float] | None, status: str) -> Row:
    return {
        "system": system,
        "input": ask,
        "chosen": chosen,
        "rejected": rejected,
        "generations": [rejected, chosen],
        "order": ["rejected", "chosen"],
        "labelling_model": "gpt-4-1106-preview",
        "labelling_prompt": [user("Rate these."), {"content": "You are a rater.", "role": "system"}],
        "raw_labelling_response": None if rating is None else "5\n8",
        "rating": rating,
        "rationale": None if rating is None else "The second is right.",
        "status": status,
        "original_chosen": chosen,
        "original_rejected": rejected,
        "chosen_score": None if rating is None else max(rating),
        "in_gsm8k_train": False,
    }


DISTILABEL_ORCA = PublicSet(
    "argilla/distilabel-intel-orca-dpo-pairs",
    "As above. Ties are not left out by themselves: the unused `rating` is a notice.",
    [
        _distilabel_orca("Be brief.", "What do bees make?", "Honey.", "Milk.", [2.0, 9.0], "unchanged"),
        _distilabel_orca("", "How many legs has a spider?", "Eight.", "Six.", [3.0, 8.0], "swapped"),
        _distilabel_orca("Be brief.", "What do hens lay?", "Eggs.", "Bricks.", [7.0, 7.0], "tie"),
        _distilabel_orca("Be brief.", "What do cows eat?", "Grass.", "Grass.", None, "tie"),
    ],
    settings=TEMPLATE,
    columns={"prompt": "input"},
    kinds={n: {"unused_column", "recognised_column"} for n in (1, 2, 3)} | {4: {"equal_responses"}},
    left_out=frozenset({4}),
)


def _capybara(turns: list[str], chosen: str, rejected: str) -> Row:
    requested = turns[-1]
    head = [(user if i % 2 == 0 else assistant)(text) for i, text in enumerate(turns)]
    return {
        "source": "Airoboros",
        "conversation": [{"input": requested, "output": chosen}],
        "original_response": chosen,
        "generation_prompt": ["<s>[INST] " + requested + " [/INST]"],
        "raw_generation_responses": [rejected],
        "new_generations": [rejected],
        "prompt": requested,
        "chosen": [*head, assistant(chosen)],
        "rejected": [*head, assistant(rejected)],
        "rating_chosen": 5,
        "rating_rejected": 2,
        "chosen_model": "original",
        "rejected_model": "mistral",
    }


CAPYBARA = PublicSet(
    "argilla/distilabel-capybara-dpo-7k-binarized",
    "Read as it is. Earlier turns, which both dialogues share, are the prompt.",
    [
        _capybara(["Name a sea."], "The Baltic.", "The Sahara."),
        _capybara(["Name a lake.", "Lake Garda.", "And a larger one?"], "Lake Victoria.", "A pond."),
        _capybara(["Name a hill.", "", "One word."], "Hill.", "Hole."),
        _capybara(["Name a cape."], "Cape Horn.", ""),
    ],
    kinds={n: {"prompt_repeated"} for n in (1, 2, 3)} | {4: {"empty_response"}},
    left_out=frozenset({4}),
)

TRL_ULTRAFEEDBACK = PublicSet(
    "trl-lib/ultrafeedback_binarized",
    "Read as it is. A lower score for chosen than for rejected is a notice.",
    [
        {
            "chosen": [user(ask), assistant(good)],
            "rejected": [user(ask), assistant(bad)],
            "score_chosen": score[0],
            "score_rejected": score[1],
        }
        for ask, good, bad, score in (
            ("Name a tree.", "An oak.", "A rose.", (9.0, 3.0)),
            ("Name a weed.", "A nettle.", "A table.", (2.0, 7.0)),
            ("Name a herb.", "Thyme.", "", (None, None)),
            ("Name a nut.", "Hazel.", "Bolt.", (5.0, 5.0)),
        )
    ],
    kinds={2: {"score_contradicts"}, 3: {"empty_response"}, 4: {"score_tie"}},
    left_out=frozenset({3}),
)


def _math(metadata: str | None, ask: str, chosen: str, rejected: str, ratings: tuple[Any, Any]) -> Row:
    return {
        "metadata": metadata,
        "instruction": ask,
        "chosen_response": chosen,
        "chosen_rating": ratings[0],
        "rejected_response": rejected,
        "rejected_rating": ratings[1],
    }


MATH = PublicSet(
    "argilla/distilabel-math-preference-dpo",
    "Read by the mapped columns; ratings are recognised and compared.",
    [
        _math('{"length": 12}', "What is 6 times 7?", "6 times 7 is 42.", "67", (9.0, 2.0)),
        _math(None, "Solve x + 1 = 3 for $x$.", "x = 2", "x = 4", (8.0, None)),
        _math("{}", "What is 1 + 1?", "2", "2", (5.0, 5.0)),
        _math("{}", "What is 9 - 9?", "0", "", (7.0, 1.0)),
    ],
    settings=TEMPLATE,
    columns={"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    kinds={n: {"recognised_column"} for n in (1, 2)} | {3: {"equal_responses"}, 4: {"empty_response"}},
    left_out=frozenset({3, 4}),
)


def _ranked(*texts: str, ranks: tuple[float, ...] | None = None) -> list[Row]:
    paths = ranks or tuple(float(i) for i in range(1, len(texts) + 1))
    return [{"answer": text, "model": "gpt-4", "rank": rank} for text, rank in zip(texts, paths, strict=True)]


NECTAR = PublicSet(
    "berkeley-nest/Nectar",
    "Refused with a program that makes pairs of the best and the worst answer.",
    [
        {
            "prompt": f"\n\nHuman: {ask}\n\nAssistant: ",
            "answers": answers,
            "turns": 1,
            "num_responses": len(answers),
            "source": ["sharegpt"],
            "good_natured": True,
        }
        for ask, answers in (
            ("Name a card game.", _ranked("Bridge.", "Chess.", "Football.")),
            ("Name a dance.\n\nAssistant: The waltz.\n\nHuman: Another", _ranked("Tango.", "A chair.")),
            ("Name a song.", _ranked("Mist.", "Hymn.", ranks=(2.0, 1.0))),
            ("Name a play.", _ranked("Faust.", "Hamlet.", ranks=(1.0, 1.0))),
        )
    ],
    settings=TEMPLATE,
    kinds={n: {"text_turns"} for n in (1, 2, 3)},
    converted=3,
)


def _helpsteer2(ask: str, one: str, two: str, strength: int) -> Row:
    return {
        "split": "train",
        "prompt": ask,
        "response_1": one,
        "response_2": two,
        "preference_strength": strength,
        "preference_statement": None if strength == 0 else "One is better.",
        "preference_elaboration": None if strength == 0 else "It is right.",
        "three_most_similar_preferences": [{"statement": None, "elaboration": None, "strength": strength}],
        "all_preferences_unprocessed": [],
    }


HELPSTEER2 = PublicSet(
    "nvidia/HelpSteer2 (preference)",
    "Refused with a program that makes pairs by the sign of `preference_strength`, without ties, turns as messages.",
    [
        _helpsteer2("What is ice?", "Frozen water.", "Hot air.", -3),
        _helpsteer2(
            "What is fog?\n<extra_id_1>Assistant\nA cloud.\n<extra_id_1>User\nAnd rain?", "Stones.", "Drops.", 2
        ),
        _helpsteer2("What is hail?", "Ice.", "Ice too.", 0),
        _helpsteer2("What is dew?", "Water at dawn.", "Money.", -1),
    ],
    settings=TEMPLATE,
    converted=3,
)


def _helpsteer3(context: list[Row], one: str, two: str, preference: int) -> Row:
    return {
        "domain": "general",
        "language": "english",
        "context": context,
        "response1": one,
        "response2": two,
        "overall_preference": preference,
        "individual_preference": [
            {"score": preference, "reasoning": "Because.", "feedback1": "Good.", "feedback2": None}
        ],
    }


HELPSTEER3 = PublicSet(
    "nvidia/HelpSteer3 (preference)",
    "Refused with a program that makes pairs by the sign of `overall_preference`, without ties.",
    [
        _helpsteer3([user("Write a haiku's last line.")], "The old pond is still.", "No.", -2),
        _helpsteer3([user("Fix: x = = 1"), assistant("Which language?"), user("Python")], "x == = 1", "x = 1", 3),
        _helpsteer3([user("Is it late?")], "Yes.", "Yes.", 0),
        _helpsteer3([user("Spell 'cat'.")], "K-A-T", "C-A-T", 1),
    ],
    converted=3,
)


def _pku(ask: str, one: str, two: str, better: int, safer: int) -> Row:
    sides = {
        f"{name}_response_{i}_{what}".removeprefix("_"): value
        for i in (0, 1)
        for name, what, value in (("is", "safe", i == safer), ("", "severity_level", 0), ("", "sha256", f"{i:064x}"))
    }
    return {
        "prompt": ask,
        "response_0": one,
        "response_1": two,
        "prompt_source": "Alpaca3-8B",
        "response_0_source": "Alpaca3-8B",
        "response_1_source": "Alpaca3-8B",
        **sides,
        "response_0_harm_category": {"Violence": False, "Privacy Violation": False},
        "response_1_harm_category": {"Violence": False, "Privacy Violation": False},
        "better_response_id": better,
        "safer_response_id": safer,
    }


PKU = PublicSet(
    "PKU-Alignment/PKU-SafeRLHF",
    "Refused with a program that makes pairs by `better_response_id`.",
    [
        _pku("How do I open a jar?", "Turn its lid.", "Throw it.", 0, 0),
        _pku("How do I clean a knife?", "Lick it.", "With soap and a sponge.", 1, 1),
        _pku("How do I carry an axe?", "With its blade down.", "By the blade.", 0, 0),
        _pku("How do I light a stove?", "With a match.", "", 0, 1),
    ],
    settings=TEMPLATE,
    kinds={4: {"empty_response"}},
    left_out=frozenset({4}),
    converted=4,
)


def _shp(history: str, one: str, two: str, label: int) -> Row:
    return {
        "post_id": "qpoq2b",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": history,
        "c_root_id_A": "hjukoaq",
        "c_root_id_B": "hjtnd9g",
        "created_at_utc_A": 1636428365,
        "created_at_utc_B": 1636413204,
        "score_A": 12,
        "score_B": 4,
        "human_ref_A": one,
        "human_ref_B": two,
        "labels": label,
        "seconds_difference": 15161.0,
        "score_ratio": 3.0,
    }


SHP = PublicSet(
    "stanfordnlp/SHP",
    "Refused with a program that makes pairs by `labels`.",
    [
        _shp("How long does a stock simmer?", "Four hours.", "A week.", 1),
        _shp("Can I freeze soup?\n\nIt is with cream.", "Never.", "Yes, it may split.", 0),
        _shp("Is this pan clean? [deleted]", "It is.", "It looks so.", 1),
        _shp("Which salt?", "Any.", "Any.", 0),
    ],
    settings=TEMPLATE,
    kinds={4: {"equal_responses"}},
    left_out=frozenset({4}),
    converted=4,
)

PUBLIC_SETS = [
    *(H4, *ON_POLICY, TRL_ULTRAFEEDBACK, ARGILLA, HH, ORCA, DISTILABEL_ORCA, CAPYBARA, MATH),
    *(NECTAR, HELPSTEER2, HELPSTEER3, PKU, SHP),
]
"""Those named in sweeps/ first."""
