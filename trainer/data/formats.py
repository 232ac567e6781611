"""Rows of TRL's preference formats to one form: dialogues or plain text, with the prompt separate from the answers.

A column `prompt` is never discarded. Where the answers repeat it, or its last messages, it is kept once, with a notice.
Without such a column the prompt is what both answers begin with: in dialogues the messages that they share, as TRL's
`extract_prompt` decides; in plain text what `split_implied` finds. Plain prompts and answers are joined as they stand;
no white space is added or dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trainer.data.chat_messages import (
    Dialogue,
    InvalidRow,
    Message,
    Tools,
    content_text,
    encoding_trouble,
    is_empty,
    to_part,
    to_template_kwargs,
    to_tools,
)
from trainer.data.validation import Notice

_HH = re.compile(r"\n\nAssistant:")
"""HH-RLHF's mark of an answer."""
_MARKS = (
    _HH,
    # what chat templates write before an assistant's message
    re.compile(
        r"<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<start_of_turn>model\n"
        r"|<\|turn>model\n|<\|assistant\|>\n?|<\|Assistant\|>|<｜Assistant｜>|<\|start\|>assistant|\[/INST\]"
    ),
    # what instruction formats write
    re.compile(r"(?:^|\n)#{2,3} *(?:Response|Assistant|Answer|Output)\b *:?\n?"),
    re.compile(r"(?:^|\n)(?:ASSISTANT|Assistant|Answer|A|Response|Output|Bot|AI|GPT|Model) ?:"),
)
"""The first kind that occurs in what both texts begin with decides; its last place there is the prompt's end."""
_SENTENCE_END = re.compile(r"[.?!]\s+\S|[。？！]\s*\S|\n\s*\S")
_EAST_ASIAN = 0x2E80
"""From this character on, scripts put no blanks between words."""
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Split:
    """Prompt and answers of plain text. `marked`: a mark says where the prompt ends; `turns`: an answer has more."""

    prompt: str
    chosen: str
    rejected: str
    marked: bool
    turns: bool


def split_implied(chosen: str, rejected: str) -> Split | InvalidRow:
    """Part two texts into their common prompt and the answers.

    The prompt ends after the last mark of an answer that both texts share up to there (HH-RLHF's `\\n\\nAssistant:`,
    a chat template's, `Answer:` at the start of a line). Without a mark it is the whole words that both begin with, as
    long as these are no more than one sentence; a blank after them belongs to the answers, as in TRL's
    `extract_prompt`, a line break to the prompt. No character is dropped or added.
    """
    shared = _common_beginning(chosen, rejected)
    for mark in _MARKS:
        paths = [found.end() for found in mark.finditer(shared)]
        if paths:
            end = paths[-1]
            good, bad = chosen[end:], rejected[end:]
            return Split(chosen[:end], good, bad, True, any(mark.search(text) for text in (good, bad)))
    if len(shared) in (len(chosen), len(rejected)):
        return InvalidRow("one_begins_other")
    words = _whole_words(shared, chosen[len(shared)], rejected[len(shared)])
    if not words.strip():
        return InvalidRow("no_prompt")
    if _SENTENCE_END.search(words.rstrip()):
        return InvalidRow("prompt_undecided")
    end = len(words) - words.endswith(" ")
    return Split(chosen[:end], chosen[end:], rejected[end:], False, False)


def _common_beginning(left: str, right: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[:length]


def _whole_words(shared: str, *following: str) -> str:
    """The common beginning without a word that goes on after it."""
    if shared and _in_word(shared[-1]) and any(_in_word(character) for character in following):
        return shared[: max((i + 1 for i, c in enumerate(shared) if c.isspace()), default=0)]
    return shared


def _in_word(character: str) -> bool:
    return character.isalnum() and ord(character) < _EAST_ASIAN


def count_words(text: str) -> int:
    """Words between blanks, and one for every two characters of scripts that put none between words."""
    return len(text.split()) + sum(character.isalnum() and ord(character) >= _EAST_ASIAN for character in text) // 2


def repeats_prompt(prompt: str, chosen: str, rejected: str) -> bool:
    """Whether both answers begin with the whole prompt, blanks at its end aside, and a new word follows."""
    head = prompt.rstrip()
    if not head or not (chosen.startswith(head) and rejected.startswith(head)):
        return False
    return not any(
        _in_word(head[-1]) and _in_word(text[len(head)]) for text in (chosen, rejected) if len(text) > len(head)
    )


def hh_dialogue(text: str) -> Dialogue | None:
    """HH-RLHF's text form as messages, without the blanks around each, an empty last answer left out; None where the
    text is not of that form.
    """
    head, *turns = _TURN.split(f"\n\n{text.lstrip()}")
    if head or len(turns) < 2 or turns[0] != "Human":
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    out: Dialogue = [
        {"role": roles[label], "content": message.strip()}
        for label, message in zip(turns[::2], turns[1::2], strict=True)
    ]
    return out[:-1] if out[-1] == {"role": "assistant", "content": ""} else out


def hh_question(prompt: str) -> str | None:
    """A prompt of HH-RLHF's form up to the mark of its answer, which is added where it lacks; None for another form."""
    turns = hh_dialogue(prompt)
    if turns is None:
        return None
    return prompt if prompt.rstrip().endswith("\n\nAssistant:") else f"{prompt.rstrip()}\n\nAssistant: "


Score = Literal["all", "last"]

_FEW_WORDS = 3
"""Words. A text answer that begins with a prompt of fewer may do so by chance ("Hello")."""


@dataclass(frozen=True, slots=True)
class Preference:
    """One preference in one form: prompt and answers are text, or all three are lists of messages.

    `tools` and `template_kwargs` are for the chat template; `notices` are what was found on the way; `text_prompt` is
    the plain text of which `data.apply_template` made the prompt's message.
    """

    prompt: str | Dialogue
    chosen: str | Dialogue
    rejected: str | Dialogue
    answer: str | None
    tools: Tools | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    notices: tuple[Notice, ...] = field(default=(), compare=False)
    text_prompt: str | None = field(default=None, compare=False)


def to_preference(
    fields: Mapping[str, Any],
    *,
    score: Score = "all",
    apply_template: bool | None = None,
    noticed: Sequence[Notice] = (),
) -> Preference | InvalidRow:
    """Bring a row under our names into one form, or say what is wrong with it. `fields` is not changed.

    Args:
        fields: Cells by our names (`FIELDS` of `trainer.data.columns`).
        score: `data.score`.
        apply_template: `data.apply_template`: True makes plain text a dialogue.
        noticed: What reading found about this row; it is kept in front of the notices.
    """
    for name in ("chosen", "rejected"):
        if name not in fields:
            return InvalidRow("missing_field", f"no {name}")
    if fields.get("images"):
        return InvalidRow("images", "the column of images is not empty")
    parts: dict[str, str | Dialogue] = {}
    for name in ("prompt", "chosen", "rejected"):
        if name not in fields or (name == "prompt" and fields[name] is None and _contains_dialogue(fields)):
            continue
        part = to_part(fields[name])
        if isinstance(part, InvalidRow):
            return InvalidRow(part.kind, f"{name}: {part.detail}")
        parts[name] = part
    system = fields.get("system")
    if system is not None and not isinstance(system, str):
        return InvalidRow("not_text", "system: no text")
    tools, kwargs = to_tools(fields.get("tools")), to_template_kwargs(fields.get("chat_template_kwargs"))
    for made in (tools, kwargs):
        if isinstance(made, InvalidRow):
            return made
    for name, value in (*parts.items(), ("system", system), ("tools", tools), ("chat_template_kwargs", kwargs)):
        if error := encoding_trouble(name, value):
            return error
    found = _normalize(parts, system if system and system.strip() else None, score, apply_template)
    if isinstance(found, InvalidRow):
        return found
    if tools and isinstance(found.prompt, str):
        found = replace(found, notices=(*found.notices, ("needs_template", "Tools")))
    return replace(
        found,
        answer=None if fields.get("answer") is None else str(fields["answer"]),
        tools=tools if isinstance(tools, list) else None,
        template_kwargs=kwargs if isinstance(kwargs, dict) else {},
        notices=(*noticed, *_scores(fields), *found.notices),
    )


def _contains_dialogue(fields: Mapping[str, Any]) -> bool:
    return isinstance(fields["chosen"], list) and isinstance(fields["rejected"], list)


def _scores(fields: Mapping[str, Any]) -> list[Notice]:
    """Whether the scores of a row, where it has both, agree with what it calls chosen."""
    good, bad = fields.get("score_chosen"), fields.get("score_rejected")
    if not isinstance(good, (int, float)) or not isinstance(bad, (int, float)):
        return []
    if good == bad:
        return [("score_tie", "")]
    return [("score_contradicts", f"{good:g} for chosen, {bad:g} for rejected")] if good < bad else []


def _normalize(
    parts: Mapping[str, str | Dialogue], system: str | None, score: Score, apply_template: bool | None
) -> Preference | InvalidRow:
    prompt, chosen, rejected = parts.get("prompt"), parts["chosen"], parts["rejected"]
    if any(not part if isinstance(part, list) else not part.strip() for part in (chosen, rejected)):
        return InvalidRow("empty_response")
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        if apply_template:
            return _applied(prompt, chosen, rejected, system, score)
        found = _text_preference(prompt, chosen, rejected, score)
        if system is None or isinstance(found, InvalidRow):
            return found
        return replace(found, notices=(*found.notices, ("needs_template", "A system text")))
    good, bad = (_as_answer(part) for part in (chosen, rejected))
    return _dialogues(prompt, good, bad, system, score)


def _as_answer(part: str | Dialogue) -> Dialogue:
    return [{"role": "assistant", "content": part}] if isinstance(part, str) else part


# --- plain text ------------------------------------------------------------------------------------------------------


def _text_preference(prompt: str | None, chosen: str, rejected: str, score: Score) -> Preference | InvalidRow:
    if chosen == rejected:
        return InvalidRow("equal_responses")
    notices: list[Notice] = []
    if prompt is None:
        split = split_implied(chosen, rejected)
        if isinstance(split, InvalidRow):
            return split
        if split.turns and score == "last":
            return InvalidRow("turns_differ")
        if split.turns:
            notices.append(("several_turns", ""))
        if not split.marked:
            notices.append(("implied_prompt", ""))
        prompt, chosen, rejected = split.prompt, split.chosen, split.rejected
    elif repeats_prompt(prompt, chosen, rejected):
        if count_words(prompt) < _FEW_WORDS:
            notices.append(("prompt_echoed", ""))
        else:
            exact = chosen.startswith(prompt) and rejected.startswith(prompt)
            prompt = prompt if exact else prompt.rstrip()
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            notices.append(("prompt_repeated", ""))
    elif any(repeats_prompt(prompt, text, text) for text in (chosen, rejected)):
        notices.append(("prompt_echoed", ""))
    if not prompt.strip():
        return InvalidRow("empty_prompt")
    if not chosen.strip() or not rejected.strip():
        return InvalidRow("empty_response")
    return Preference(prompt, chosen, rejected, None, notices=tuple(notices))


def _applied(
    prompt: str | None, chosen: str, rejected: str, system: str | None, score: Score
) -> Preference | InvalidRow:
    """Plain text as a dialogue: HH-RLHF's turns become messages, any other prompt a user's message."""
    before = "" if prompt is None or repeats_prompt(prompt, chosen, rejected) else hh_question(prompt)
    good, bad = (None, None) if before is None else (hh_dialogue(before + text) for text in (chosen, rejected))
    if good is not None and bad is not None:
        if any(side[-1]["role"] != "assistant" for side in (good, bad)):
            return InvalidRow("empty_response")
        made = _dialogues(None, good, bad, system, score)
        return made if isinstance(made, InvalidRow) else replace(made, notices=(("text_turns", ""), *made.notices))
    found = _text_preference(prompt, chosen, rejected, score)
    if isinstance(found, InvalidRow):
        return found
    cut = prompt is None or any(kind == "prompt_repeated" for kind, _ in found.notices)
    texts = [str(part).lstrip() if cut else str(part) for part in (found.chosen, found.rejected)]
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    text = str(found.prompt)
    made = _dialogues([{"role": "user", "content": text}], answers[0], answers[1], system, score)
    if isinstance(made, InvalidRow):
        return made
    return replace(made, notices=(*found.notices, *made.notices), text_prompt=text)


# --- dialogues -------------------------------------------------------------------------------------------------------


def _dialogues(
    prompt: str | Dialogue | None, chosen: Dialogue, rejected: Dialogue, system: str | None, score: Score
) -> Preference | InvalidRow:
    notices: list[Notice] = []
    if isinstance(prompt, str):
        found = _text_prompt(prompt, chosen, rejected)
        if isinstance(found, InvalidRow):
            return found
        prompt, repeated = found
        if repeated:
            notices.append(("prompt_repeated", ""))
    if prompt is None or (not prompt and max(len(chosen), len(rejected)) > 1):
        shared = _shared(chosen, rejected)
        if chosen == rejected:
            return InvalidRow("equal_responses")
        if shared == min(len(chosen), len(rejected)):
            return InvalidRow("one_begins_other")
        if not shared and chosen[0]["role"] == rejected[0]["role"] == "assistant":
            return InvalidRow("no_prompt", "no column holds one, and both dialogues begin with an answer")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        before = len(chosen), len(rejected)
        prompt, chosen, rejected = _without_repeats(prompt, chosen, rejected)
        if before != (len(chosen), len(rejected)):
            notices.append(("prompt_repeated", ""))
    moved = _leading_questions(chosen, rejected)
    if moved:
        notices.append(("context_moved", ""))
        prompt, chosen, rejected = prompt + chosen[:moved], chosen[moved:], rejected[moved:]
    if score == "last" and max(len(chosen), len(rejected)) > 1:
        if chosen[:-1] != rejected[:-1]:
            return InvalidRow("turns_differ")
        prompt, chosen, rejected = prompt + chosen[:-1], chosen[-1:], rejected[-1:]
    return _checked(prompt, chosen, rejected, system, notices)


def _shared(left: Dialogue, right: Dialogue) -> int:
    """Messages at the head that two dialogues have in common, all keys equal."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _text_prompt(prompt: str, chosen: Dialogue, rejected: Dialogue) -> tuple[Dialogue | None, bool] | InvalidRow:
    """A text prompt beside dialogues: None where they hold it (and whether they do), else a user's message."""
    single = len(chosen) == len(rejected) == 1
    if not prompt.strip():
        return ([] if single else None), False
    if single or "assistant" in (chosen[0]["role"], rejected[0]["role"]):
        return [{"role": "user", "content": prompt}], False
    texts = [_plain_words(content_text(m)) for m in chosen[: _shared(chosen, rejected)]]
    requested = _plain_words(prompt)
    if any(requested in text for text in texts) or (texts and all(text in requested for text in texts)):
        return None, True
    return InvalidRow("prompt_not_in_dialogue")


def _plain_words(text: str) -> str:
    return " ".join(text.split())


def _without_repeats(prompt: Dialogue, *answers: Dialogue) -> tuple[Dialogue, Dialogue, Dialogue]:
    """The prompt, and both answers without what they repeat of it.

    Repeated is the whole prompt, perhaps after other messages of the dialogue (which then belong to the prompt), or
    the last messages of the prompt at the head of an answer; blanks do not matter. What begins with an assistant's
    message repeats nothing.
    """
    chosen, rejected = answers
    shared = chosen[: _shared(chosen, rejected)]
    if prompt and shared and shared[0]["role"] != "assistant":
        for start in range(len(shared) - len(prompt) + 1):
            if _alike(shared[start : start + len(prompt)], prompt):
                end = start + len(prompt)
                return shared[:end], chosen[end:], rejected[end:]
    sides: list[Dialogue] = []
    for side in answers:
        most = 0 if side[0]["role"] == "assistant" else len(prompt)
        sides.append(side[next((k for k in range(most, 0, -1) if _alike(side[:k], prompt[-k:])), 0) :])
    return prompt, sides[0], sides[1]


def _alike(left: Dialogue, right: Dialogue) -> bool:
    """Whether two dialogues are equal but for blanks in their texts."""
    return [_without_blanks(message) for message in left] == [_without_blanks(message) for message in right]


def _without_blanks(message: Message) -> Message:
    return {**message, "content": _plain_words(content_text(message))}


def _leading_questions(chosen: Dialogue, rejected: Dialogue) -> int:
    """Messages of others than the assistant with which both answers begin alike."""
    shared = chosen[: _shared(chosen, rejected)]
    return next((i for i, message in enumerate(shared) if message["role"] == "assistant"), len(shared))


def _checked(
    prompt: Dialogue, chosen: Dialogue, rejected: Dialogue, system: str | None, notices: list[Notice]
) -> Preference | InvalidRow:
    """Two answers to one prompt: each begins and ends with an assistant's message that says something."""
    sides = (chosen, rejected)
    if all(side and side[0]["role"] != "assistant" for side in sides) and chosen[0] != rejected[0]:
        return InvalidRow("questions_differ")
    if not any(not is_empty(message) for message in prompt):
        return InvalidRow("empty_prompt")
    for side in sides:
        if not side or side[0]["role"] != "assistant" or side[-1]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in side)
            return InvalidRow("not_one_answer", f"messages of {roles or 'nobody'} where an assistant's are wanted")
        if is_empty(side[-1]):
            return InvalidRow("empty_response")
    if prompt[-1]["role"] == "assistant":
        return InvalidRow("not_one_answer", "the prompt ends with an assistant's message")
    if chosen == rejected:
        return InvalidRow("equal_responses")
    if any(len(side) > 1 for side in sides):
        notices.append(("several_turns", ""))
    if system is not None:
        if prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
        elif _plain_words(content_text(prompt[0])) != _plain_words(system):
            return InvalidRow("system_conflict")
    return Preference(prompt, chosen, rejected, None, notices=tuple(notices))
