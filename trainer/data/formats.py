"""Normalize rows of TRL's preference formats to `Preference`: dialogues or plain text, prompt separate from answers.

A row with one response and a label (TRL's unpaired preference) becomes a preference without the other response.

A `prompt` column is never discarded. Where the answers repeat it, or its last messages, the repetition is removed from
the answers and a notice is recorded. Without a `prompt` column the prompt is the common prefix of both answers: in
dialogues the shared messages, as in TRL's `extract_prompt`; in plain text the result of `split_implicit_prompt`. Plain
prompts and answers are joined as given; no white space is added or dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trainer.data.chat_messages import (
    ChatMessage,
    Dialogue,
    InvalidRow,
    Tools,
    as_pair,
    content_text,
    find_encoding_error,
    hh_dialogue,
    hh_question,
    is_empty,
    parse_part,
    to_template_kwargs,
    to_tools,
)
from trainer.data.data_findings import RowNotice

_HH_MARKER = re.compile(r"\n\nAssistant:")
"""HH-RLHF's marker before an answer."""
_ANSWER_MARKERS = (
    _HH_MARKER,
    # markers that chat templates write before an assistant's message
    re.compile(
        r"<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<start_of_turn>model\n"
        r"|<\|turn>model\n|<\|assistant\|>\n?|<\|Assistant\|>|<｜Assistant｜>|<\|start\|>assistant|\[/INST\]"
    ),
    # markers of instruction formats
    re.compile(r"(?:^|\n)#{2,3} *(?:Response|Assistant|Answer|Output)\b *:?\n?"),
    re.compile(r"(?:^|\n)(?:ASSISTANT|Assistant|Answer|A|Response|Output|Bot|AI|GPT|Model) ?:"),
)
"""Markers before an answer, by priority. The prompt ends after the last occurrence, in the common prefix of both texts,
of the first pattern that occurs there.
"""
_SENTENCE_END = re.compile(r"[.?!]\s+\S|[。？！]\s*\S|\n\s*\S")
_EAST_ASIAN = 0x2E80
"""Code point from which on scripts do not separate words by spaces."""


@dataclass(frozen=True, slots=True)
class PromptSplit:
    """Prompt and answers of plain text. `marked`: a marker ends the prompt; `turns`: an answer contains the marker
    again.
    """

    prompt: str
    chosen: str
    rejected: str
    has_marker: bool
    has_turns: bool


def split_implicit_prompt(chosen: str, rejected: str) -> PromptSplit | InvalidRow:
    """Split two texts into their common prompt and the two answers.

    The prompt ends after the last answer marker in the common prefix (HH-RLHF's `\\n\\nAssistant:`, a chat template's
    marker, `Answer:` at the start of a line). Without a marker the prompt is the common prefix up to whole words,
    provided that it is at most one sentence; a space after it belongs to the answers, as in TRL's `extract_prompt`, a
    line break to the prompt. No character is dropped or added.
    """
    shared = _common_prefix(chosen, rejected)
    for marker in _ANSWER_MARKERS:
        ends = [found.end() for found in marker.finditer(shared)]
        if ends:
            end = ends[-1]
            good, bad = chosen[end:], rejected[end:]
            return PromptSplit(chosen[:end], good, bad, True, any(marker.search(text) for text in (good, bad)))
    if len(shared) in (len(chosen), len(rejected)):
        return InvalidRow("one_begins_other")
    words = _whole_words(shared, chosen[len(shared)], rejected[len(shared)])
    if not words.strip():
        return InvalidRow("no_prompt")
    if _SENTENCE_END.search(words.rstrip()):
        return InvalidRow("prompt_undecided")
    end = len(words) - words.endswith(" ")
    return PromptSplit(chosen[:end], chosen[end:], rejected[end:], False, False)


def _common_prefix(left: str, right: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[:length]


def _whole_words(shared: str, *following: str) -> str:
    """Return the common prefix without a last word that continues in one of the texts that follow."""
    if shared and _is_word_character(shared[-1]) and any(_is_word_character(character) for character in following):
        return shared[: max((i + 1 for i, c in enumerate(shared) if c.isspace()), default=0)]
    return shared


def _is_word_character(character: str) -> bool:
    return character.isalnum() and ord(character) < _EAST_ASIAN


def count_words(text: str) -> int:
    """Count words; in scripts without spaces between words, every two characters count as one."""
    return len(text.split()) + sum(character.isalnum() and ord(character) >= _EAST_ASIAN for character in text) // 2


def repeats_prompt(prompt: str, chosen: str, rejected: str) -> bool:
    """Return whether both answers begin with the whole prompt (without trailing white space) and then a new word."""
    head = prompt.rstrip()
    if not head or not (chosen.startswith(head) and rejected.startswith(head)):
        return False
    return not any(
        _is_word_character(head[-1]) and _is_word_character(text[len(head)])
        for text in (chosen, rejected)
        if len(text) > len(head)
    )


Score = Literal["all", "last"]

_MIN_PROMPT_WORDS = 3
"""Words. An answer may begin with a prompt of fewer words by chance ("Hello"), so such a prompt is not removed."""


@dataclass(frozen=True, slots=True)
class Preference:
    """One normalized preference: prompt and answers are all text, or all lists of messages.

    `tools` and `template_kwargs` are passed to the chat template; `notices` are findings about the row; `text_prompt`
    is the plain text of which `data.apply_template` made the prompt's message. Of a row with one response and a label,
    `rejected` is empty where the label is true, else `chosen`.
    """

    prompt: str | Dialogue
    chosen: str | Dialogue
    rejected: str | Dialogue
    answer: str | None
    tools: Tools | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    notices: tuple[RowNotice, ...] = field(default=(), compare=False)
    text_prompt: str | None = field(default=None, compare=False)

    @property
    def is_single(self) -> bool:
        """Whether the row has one response."""
        return not self.chosen or not self.rejected

    def with_both(self) -> Preference:
        """Return the preference with its one response, if it has one, on both sides."""
        return replace(self, chosen=self.chosen or self.rejected, rejected=self.rejected or self.chosen)


def to_preference(
    fields: Mapping[str, Any],
    *,
    score: Score = "all",
    apply_template: bool | None = None,
    row_notices: Sequence[RowNotice] = (),
) -> Preference | InvalidRow:
    """Normalize a row, or return the reason why it cannot be used. `fields` is not changed.

    Args:
        fields: Cells by standard field name (`FIELDS` of `trainer.data.columns`).
        score: `data.score`.
        apply_template: `data.apply_template`; True turns plain text into a dialogue.
        row_notices: Findings from reading the row; they precede the findings of this function.
    """
    label: bool | None = None
    if "completion" in fields or "label" in fields:
        pair = as_pair(fields)
        if isinstance(pair, InvalidRow):
            return pair
        fields, label = pair
    for name in ("chosen", "rejected"):
        if name not in fields:
            return InvalidRow("missing_field", f"no {name}")
    if fields.get("images"):
        return InvalidRow("images", "the column of images is not empty")
    parts: dict[str, str | Dialogue] = {}
    for name in ("prompt", "chosen", "rejected"):
        if name not in fields or (name == "prompt" and fields[name] is None and _contains_dialogue(fields)):
            continue
        part = parse_part(fields[name])
        if isinstance(part, InvalidRow):
            return InvalidRow(part.kind, f"{name}: {part.detail}")
        parts[name] = part
    system = fields.get("system")
    if system is not None and not isinstance(system, str):
        return InvalidRow("not_text", "system: not text")
    tools, kwargs = to_tools(fields.get("tools")), to_template_kwargs(fields.get("chat_template_kwargs"))
    for result in (tools, kwargs):
        if isinstance(result, InvalidRow):
            return result
    for name, value in (*parts.items(), ("system", system), ("tools", tools), ("chat_template_kwargs", kwargs)):
        if error := find_encoding_error(name, value):
            return error
    found = _normalize(parts, system if system and system.strip() else None, score, apply_template)
    if isinstance(found, InvalidRow):
        return found
    if label is not None:
        found = replace(found, **{"rejected" if label else "chosen": "" if isinstance(found.prompt, str) else []})
    if tools and isinstance(found.prompt, str):
        found = replace(found, notices=(*found.notices, ("needs_template", "Tools")))
    return replace(
        found,
        answer=None if fields.get("answer") is None else str(fields["answer"]),
        tools=tools if isinstance(tools, list) else None,
        template_kwargs=kwargs if isinstance(kwargs, dict) else {},
        notices=(*row_notices, *_check_scores(fields), *found.notices),
    )


def _contains_dialogue(fields: Mapping[str, Any]) -> bool:
    return isinstance(fields["chosen"], list) and isinstance(fields["rejected"], list)


def _check_scores(fields: Mapping[str, Any]) -> list[RowNotice]:
    """Return a notice if the two scores of a row are equal or contradict its order of chosen and rejected."""
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
            return _text_to_dialogue(prompt, chosen, rejected, system, score)
        found = _text_preference(prompt, chosen, rejected, score)
        if system is None or isinstance(found, InvalidRow):
            return found
        return replace(found, notices=(*found.notices, ("needs_template", "A system text")))
    good, bad = (_to_answer(part) for part in (chosen, rejected))
    return _dialogue_preference(prompt, good, bad, system, score)


def _to_answer(part: str | Dialogue) -> Dialogue:
    return [{"role": "assistant", "content": part}] if isinstance(part, str) else part


# --- plain text ------------------------------------------------------------------------------------------------------


def _text_preference(prompt: str | None, chosen: str, rejected: str, score: Score) -> Preference | InvalidRow:
    if chosen == rejected:
        return InvalidRow("equal_responses")
    notices: list[RowNotice] = []
    if prompt is None:
        split = split_implicit_prompt(chosen, rejected)
        if isinstance(split, InvalidRow):
            return split
        if split.has_turns and score == "last":
            return InvalidRow("turns_differ")
        if split.has_turns:
            notices.append(("several_turns", ""))
        if not split.has_marker:
            notices.append(("implied_prompt", ""))
        prompt, chosen, rejected = split.prompt, split.chosen, split.rejected
    elif repeats_prompt(prompt, chosen, rejected):
        if count_words(prompt) < _MIN_PROMPT_WORDS:
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


def _text_to_dialogue(
    prompt: str | None, chosen: str, rejected: str, system: str | None, score: Score
) -> Preference | InvalidRow:
    """Turn plain text into a dialogue: HH-RLHF's turns become messages, any other prompt one user message."""
    before = "" if prompt is None or repeats_prompt(prompt, chosen, rejected) else hh_question(prompt)
    good, bad = (None, None) if before is None else (hh_dialogue(before + text) for text in (chosen, rejected))
    if good is not None and bad is not None:
        if any(side[-1]["role"] != "assistant" for side in (good, bad)):
            return InvalidRow("empty_response")
        result = _dialogue_preference(None, good, bad, system, score)
        if isinstance(result, InvalidRow):
            return result
        return replace(result, notices=(("text_turns", ""), *result.notices))
    found = _text_preference(prompt, chosen, rejected, score)
    if isinstance(found, InvalidRow):
        return found
    was_split = prompt is None or any(kind == "prompt_repeated" for kind, _ in found.notices)
    texts = [str(part).lstrip() if was_split else str(part) for part in (found.chosen, found.rejected)]
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    text = str(found.prompt)
    result = _dialogue_preference([{"role": "user", "content": text}], answers[0], answers[1], system, score)
    if isinstance(result, InvalidRow):
        return result
    return replace(result, notices=(*found.notices, *result.notices), text_prompt=text)


# --- dialogues -------------------------------------------------------------------------------------------------------


def _dialogue_preference(
    prompt: str | Dialogue | None, chosen: Dialogue, rejected: Dialogue, system: str | None, score: Score
) -> Preference | InvalidRow:
    notices: list[RowNotice] = []
    if isinstance(prompt, str):
        found = _resolve_text_prompt(prompt, chosen, rejected)
        if isinstance(found, InvalidRow):
            return found
        prompt, repeated = found
        if repeated:
            notices.append(("prompt_repeated", ""))
    if prompt is None or (not prompt and max(len(chosen), len(rejected)) > 1):
        shared = _count_shared_messages(chosen, rejected)
        if chosen == rejected:
            return InvalidRow("equal_responses")
        if shared == min(len(chosen), len(rejected)):
            return InvalidRow("one_begins_other")
        if not shared and chosen[0]["role"] == rejected[0]["role"] == "assistant":
            return InvalidRow("no_prompt", "there is no column for it, and both dialogues begin with an answer")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        before = len(chosen), len(rejected)
        prompt, chosen, rejected = _without_repeats(prompt, chosen, rejected)
        if before != (len(chosen), len(rejected)):
            notices.append(("prompt_repeated", ""))
    moved = _count_leading_questions(chosen, rejected)
    if moved:
        notices.append(("context_moved", ""))
        prompt, chosen, rejected = prompt + chosen[:moved], chosen[moved:], rejected[moved:]
    if score == "last" and max(len(chosen), len(rejected)) > 1:
        if chosen[:-1] != rejected[:-1]:
            return InvalidRow("turns_differ")
        prompt, chosen, rejected = prompt + chosen[:-1], chosen[-1:], rejected[-1:]
    return _validate_preference(prompt, chosen, rejected, system, notices)


def _count_shared_messages(left: Dialogue, right: Dialogue) -> int:
    """Return the number of leading messages that are equal, all keys included, in two dialogues."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _resolve_text_prompt(
    prompt: str, chosen: Dialogue, rejected: Dialogue
) -> tuple[Dialogue | None, bool] | InvalidRow:
    """Resolve a text prompt given together with dialogues.

    Returns the prompt as a user message, or None if the dialogues contain the prompt; and whether they contain it.
    """
    single = len(chosen) == len(rejected) == 1
    if not prompt.strip():
        return ([] if single else None), False
    if single or "assistant" in (chosen[0]["role"], rejected[0]["role"]):
        return [{"role": "user", "content": prompt}], False
    texts = [_normalize_space(content_text(m)) for m in chosen[: _count_shared_messages(chosen, rejected)]]
    wanted = _normalize_space(prompt)
    if any(wanted in text for text in texts) or (texts and all(text in wanted for text in texts)):
        return None, True
    return InvalidRow("prompt_not_in_dialogue")


def _normalize_space(text: str) -> str:
    return " ".join(text.split())


def _without_repeats(prompt: Dialogue, *answers: Dialogue) -> tuple[Dialogue, Dialogue, Dialogue]:
    """Return the prompt, and both answers without the part of the prompt that they repeat.

    An answer may repeat the whole prompt, possibly after other messages (which then become part of the prompt), or the
    last messages of the prompt. White space is ignored in the comparison. An answer that begins with an assistant
    message repeats nothing.
    """
    chosen, rejected = answers
    shared = chosen[: _count_shared_messages(chosen, rejected)]
    if prompt and shared and shared[0]["role"] != "assistant":
        for start in range(len(shared) - len(prompt) + 1):
            if _equal_texts(shared[start : start + len(prompt)], prompt):
                end = start + len(prompt)
                return shared[:end], chosen[end:], rejected[end:]
    remainders: list[Dialogue] = []
    for side in answers:
        longest = 0 if side[0]["role"] == "assistant" else len(prompt)
        remainders.append(side[next((k for k in range(longest, 0, -1) if _equal_texts(side[:k], prompt[-k:])), 0) :])
    return prompt, remainders[0], remainders[1]


def _equal_texts(left: Dialogue, right: Dialogue) -> bool:
    """Return whether two dialogues are equal up to white space in their texts."""
    return [_with_normalized_space(message) for message in left] == [
        _with_normalized_space(message) for message in right
    ]


def _with_normalized_space(message: ChatMessage) -> ChatMessage:
    return {**message, "content": _normalize_space(content_text(message))}


def _count_leading_questions(chosen: Dialogue, rejected: Dialogue) -> int:
    """Return how many equal messages before the first assistant message both answers begin with."""
    shared = chosen[: _count_shared_messages(chosen, rejected)]
    return next((i for i, message in enumerate(shared) if message["role"] == "assistant"), len(shared))


def _validate_preference(
    prompt: Dialogue, chosen: Dialogue, rejected: Dialogue, system: str | None, notices: list[RowNotice]
) -> Preference | InvalidRow:
    """Check two answers to one prompt: each must begin and end with an assistant message that is not empty."""
    sides = (chosen, rejected)
    if all(side and side[0]["role"] != "assistant" for side in sides) and chosen[0] != rejected[0]:
        return InvalidRow("questions_differ")
    if not any(not is_empty(message) for message in prompt):
        return InvalidRow("empty_prompt")
    for side in sides:
        if not side or side[0]["role"] != "assistant" or side[-1]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in side)
            return InvalidRow("not_one_answer", f"roles {roles or 'none'}, not an assistant's first and last")
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
        elif _normalize_space(content_text(prompt[0])) != _normalize_space(system):
            return InvalidRow("system_conflict")
    return Preference(prompt, chosen, rejected, None, notices=tuple(notices))
