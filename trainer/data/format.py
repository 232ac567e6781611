"""Rows of TRL's preference formats to one form: conversational or plain, prompt explicit, or implied by what both
responses begin with. What cannot be trained on is named instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.check import Kind

Message = dict[str, str]
Dialogue = list[Message]

_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True, slots=True)
class Preference:
    """One preference in one form: all three are text, or all three are lists of messages."""

    prompt: str | Dialogue
    chosen: str | Dialogue
    rejected: str | Dialogue
    answer: str | None


@dataclass(frozen=True, slots=True)
class Bad:
    """Why a row cannot be trained on."""

    kind: Kind
    detail: str = ""


def to_preference(fields: Mapping[str, Any]) -> Preference | Bad:
    """A row under our names to one form, or what is wrong with it. `fields` is not changed."""
    for name in ("chosen", "rejected"):
        if name not in fields:
            return Bad("missing_field", f"no {name}")
    parts: dict[str, str | Dialogue] = {}
    for name in ("prompt", "chosen", "rejected"):
        if name not in fields or (name == "prompt" and fields[name] is None and _holds_dialogue(fields)):
            continue
        part = _part(fields[name])
        if isinstance(part, Bad):
            return Bad(part.kind, f"{name}: {part.detail}")
        parts[name] = part
    encoding = _encoding_trouble(parts)
    if encoding is not None:
        return encoding
    return _in_one_form(parts, _answer(fields.get("answer")))


def _holds_dialogue(fields: Mapping[str, Any]) -> bool:
    return isinstance(fields["chosen"], list) and isinstance(fields["rejected"], list)


def _answer(value: Any) -> str | None:
    return None if value is None else str(value)


# --- one value -------------------------------------------------------------------------------------------------------


def _part(value: Any) -> str | Dialogue | Bad:
    """Text stays text; a message or a list of messages becomes a dialogue of role and content alone."""
    if isinstance(value, str):
        if _MESSAGES_AS_TEXT.match(value):
            return Bad("not_text", "messages written as text; give them as lists (JSONL, JSON or Parquet)")
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(m, dict) for m in value):
        return Bad("not_text", f"{_type_name(value)} instead of text or messages")
    dialogue: Dialogue = []
    for message in value:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        text = _content(content)
        if not isinstance(role, str) or text is None:
            return Bad("not_text", f"a message whose content is {_type_name(content)}")
        dialogue.append({"role": _ROLES.get(role, role), "content": text})
    return dialogue


def _content(content: Any) -> str | None:
    """Text, or text parts joined; None for anything else (an image, a number)."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        texts = [p.get("text") for p in content]
        return "".join(texts) if all(isinstance(t, str) for t in texts) else None
    return None


def _type_name(value: Any) -> str:
    names: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _encoding_trouble(parts: Mapping[str, str | Dialogue]) -> Bad | None:
    for name, part in parts.items():
        for text in [part] if isinstance(part, str) else [t for m in part for t in (m["role"], m["content"])]:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                half = ord(text[error.start])
                kind: Kind = "not_utf8" if 0xDC80 <= half <= 0xDCFF else "lone_surrogate"
                return Bad(kind, f"{name}, character {error.start + 1}")
    return None


# --- one form --------------------------------------------------------------------------------------------------------


def _in_one_form(parts: dict[str, str | Dialogue], answer: str | None) -> Preference | Bad:
    chosen, rejected = parts["chosen"], parts["rejected"]
    if any(not part if isinstance(part, list) else not part.strip() for part in (chosen, rejected)):
        return Bad("empty_response")
    prompt = parts.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        return _plain(prompt, chosen, rejected, answer)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
    good, bad = (_dialogue(part) for part in (chosen, rejected))
    if len(good) > 1 or len(bad) > 1:
        return _whole_dialogues(prompt, good, bad, answer)
    if prompt is None:
        return Bad("empty_prompt", "no prompt column, and the responses are single messages")
    return _dialogue_checked(prompt, good, bad, answer)


def _dialogue(part: str | Dialogue) -> Dialogue:
    return [{"role": "assistant", "content": part}] if isinstance(part, str) else part


def _plain(prompt: str | None, chosen: str, rejected: str, answer: str | None) -> Preference | Bad:
    if chosen == rejected:
        return Bad("equal_responses")
    if prompt is None:
        if chosen.startswith(rejected) or rejected.startswith(chosen):
            return Bad("empty_response", "one response is the beginning of the other")
        from trl.data_utils import extract_prompt

        found = extract_prompt({"chosen": chosen, "rejected": rejected})
        prompt, chosen, rejected = (str(found[name]) for name in ("prompt", "chosen", "rejected"))
    if not prompt.strip():
        return Bad("empty_prompt")
    if not chosen.strip() or not rejected.strip():
        return Bad("empty_response")
    if chosen == rejected:
        return Bad("equal_responses")
    return Preference(prompt, chosen, rejected, answer)


def _whole_dialogues(
    prompt: Dialogue | None, chosen: Dialogue, rejected: Dialogue, answer: str | None
) -> Preference | Bad:
    """Dialogues that repeat the prompt in both responses; an explicit prompt must be what they begin with."""
    if prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        return _dialogue_checked(prompt, chosen[len(prompt) :], rejected[len(prompt) :], answer)
    if chosen == rejected:
        return Bad("equal_responses")
    from trl.data_utils import extract_prompt

    found = extract_prompt({"chosen": chosen, "rejected": rejected})
    shared = len(found["prompt"])
    return _dialogue_checked(chosen[:shared], chosen[shared:], rejected[shared:], answer)


def _dialogue_checked(prompt: Dialogue, chosen: Dialogue, rejected: Dialogue, answer: str | None) -> Preference | Bad:
    """Two answers to one prompt: single assistant's messages, not empty, not equal, after somebody else's turn."""
    if not prompt or not any(m["content"].strip() for m in prompt):
        return Bad("empty_prompt")
    for answered in (chosen, rejected):
        if len(answered) != 1 or answered[0]["role"] != "assistant":
            roles = ", ".join(m["role"] for m in answered)
            return Bad("not_one_answer", f"messages of {roles or 'nobody'} where one assistant's is wanted")
        if not answered[0]["content"].strip():
            return Bad("empty_response")
    if prompt[-1]["role"] == "assistant":
        return Bad("not_one_answer", "the prompt ends with an assistant's message")
    if chosen == rejected:
        return Bad("equal_responses")
    return Preference(prompt, chosen, rejected, answer)
