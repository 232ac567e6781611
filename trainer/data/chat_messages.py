"""Parse the cells of a row: text or a dialogue (a list of messages), tools, scores, labels.

Every key of a message is preserved.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.data_findings import FindingKind

ChatMessage = dict[str, Any]
"""`role`, `content` (text or a list of parts; may be absent if there are tool calls), and further template variables.
"""
Dialogue = list[ChatMessage]
Tools = list[dict[str, Any]]

_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")
_TURN = re.compile(r"\n\n(Human|Assistant):")
"""HH-RLHF's marker of a turn."""
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_LABEL_KEYS = frozenset({"role", "content", "name", "id"})
"""Keys without content of their own: a message that has only these is empty."""
_MEDIA = frozenset({"image", "image_url", "input_image", "video", "video_url", "audio", "input_audio", "audio_url"})
_RESERVED = frozenset(
    (
        *("conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"),
        *("return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs"),
        *("chat_template", "documents", "sanitize_control_tokens"),
    )
)
"""Arguments of `apply_chat_template` that a row cannot set."""


@dataclass(frozen=True, slots=True)
class InvalidRow:
    """The reason why a row cannot be trained on."""

    kind: FindingKind
    detail: str = ""


def parse_part(value: Any) -> str | Dialogue | InvalidRow:
    """Return text unchanged; turn a message or a list of messages into a dialogue.

    Keys that are null are removed, as in transformers' `apply_chat_template`. ShareGPT's `from` and `value` are read as
    `role` and `content`.
    """
    if isinstance(value, str):
        if _MESSAGES_AS_TEXT.match(value):
            return InvalidRow("not_text", "messages stored as text; store them as lists (JSONL, JSON or Parquet)")
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(m, dict) for m in value):
        return InvalidRow("not_text", f"{type_name(value)} instead of text or messages")
    dialogue: Dialogue = []
    for one in value:
        message = _parse_message(one)
        if isinstance(message, InvalidRow):
            return message
        dialogue.append(message)
    return dialogue


def _parse_message(raw: Mapping[str, Any]) -> ChatMessage | InvalidRow:
    out: ChatMessage = {str(key): value for key, value in raw.items() if value is not None}
    for standard, alternative in (("role", "from"), ("content", "value")):
        if standard not in out and alternative in out:
            out = {standard if key == alternative else key: value for key, value in out.items()}
    role, content = out.get("role"), out.get("content")
    if not isinstance(role, str):
        return InvalidRow("not_text", "a message without a role")
    out["role"] = _ROLES.get(role, role)
    if isinstance(content, str) or (content is None and _has_other_content(out)):
        return out
    parts: list[Any] = content if isinstance(content, list) else []
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    if parts and all(
        kind == "text" and isinstance(part.get("text"), str) for kind, part in zip(kinds, parts, strict=True)
    ):
        return out
    if any(kind in _MEDIA for kind in kinds):
        return InvalidRow("images", f"a message with a part of type {next(kind for kind in kinds if kind in _MEDIA)}")
    return InvalidRow("not_text", f"a message whose content is {type_name(content)}")


def _has_other_content(message: ChatMessage) -> bool:
    """Return whether a message has content under another key than `content`: tool calls, reasoning."""
    return any(
        key not in _LABEL_KEYS and isinstance(value, (str, list, dict)) and value for key, value in message.items()
    )


def content_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message's content: text parts joined; "" if there is none."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def is_empty(message: ChatMessage) -> bool:
    """Return whether a message has nothing to train on: no text, tool calls, reasoning or the like."""
    return not content_text(message).strip() and not _has_other_content(message)


def hh_dialogue(text: str) -> Dialogue | None:
    """Parse HH-RLHF's text form into messages, with white space around each stripped and an empty last answer dropped.
    Returns None if the text does not have this form.
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
    """Return a prompt of HH-RLHF's form, ending with the marker of its answer; None for another form."""
    turns = hh_dialogue(prompt)
    if turns is None:
        return None
    return prompt if prompt.rstrip().endswith("\n\nAssistant:") else f"{prompt.rstrip()}\n\nAssistant: "


def to_tools(value: Any) -> Tools | InvalidRow | None:
    """Return tool definitions as `apply_chat_template(tools=...)` takes them; JSON text is parsed, as in TRL.

    An empty list becomes None: Llama's template writes about tools whenever a list is given.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            return InvalidRow("bad_tools", f"tools is text that is not JSON: {error}")
    if value is None:
        return None
    if not isinstance(value, list):
        return InvalidRow("bad_tools", f"tools is {type_name(value)}, not a list of definitions")
    for number, tool in enumerate(value, start=1):
        if not isinstance(tool, dict) or not tool:
            return InvalidRow("bad_tools", f"tool {number} is {type_name(tool)}, not a definition")
        function = tool.get("function", tool) if tool.get("type", "function") == "function" else {"name": tool["type"]}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            return InvalidRow("bad_tools", f"tool {number} has no name")
    return value or None


def to_template_kwargs(value: Any) -> dict[str, Any] | InvalidRow:
    """Return the template variables of a row (`chat_template_kwargs`), as TRL reads them."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        return InvalidRow("bad_template_kwargs", f"chat_template_kwargs is {type_name(value)}, not an object")
    out = {str(key): each for key, each in value.items() if each is not None}
    reserved = sorted(out.keys() & _RESERVED)
    return InvalidRow("bad_template_kwargs", f"{', '.join(reserved)} cannot be set per row") if reserved else out


def to_label(value: Any) -> bool | None:
    """Return the label of a row with one response: true or false, 1 or 0, also as text; None for another value."""
    named = value.strip().lower() if isinstance(value, str) else value
    known: dict[object, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    return known.get(named) if isinstance(named, (bool, int, float, str)) else None


def as_pair(fields: Mapping[str, Any]) -> tuple[dict[str, Any], bool] | InvalidRow:
    """Return a row with `completion` and `label` as a pair, so that the rules for pairs apply to it, and its label.

    The response is on both sides, with one more character on the other: `Preference` has it on one.
    """
    for name in ("completion", "label"):
        if name not in fields:
            return InvalidRow("missing_field", f"no {name}")
    label = to_label(fields["label"])
    if label is None:
        return InvalidRow("bad_label", f"label is {type_name(fields['label'])}")
    response = parse_part(fields["completion"])
    if isinstance(response, InvalidRow):
        return InvalidRow(response.kind, f"completion: {response.detail}")
    other: str | Dialogue = f"{response}."
    if isinstance(response, list):
        last = response[-1:]
        other = response[:-1] + [message | {"content": f"{content_text(message)}."} for message in last]
    rest = {name: value for name, value in fields.items() if name not in ("completion", "label")}
    sides = ("chosen", "rejected") if label else ("rejected", "chosen")
    return rest | dict(zip(sides, (response, other), strict=True)), label


def to_score(value: Any) -> float | None:
    """Return a score as a finite number; None if it is none. Text is parsed, as every cell of a CSV file is text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def type_name(value: Any) -> str:
    """Return a readable name of the type of a JSON value."""
    names: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    if isinstance(value, str):
        return "text"
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def find_encoding_error(name: str, value: Any) -> InvalidRow | None:
    """Return an InvalidRow if any text of a cell had invalid UTF-8 bytes or contains half of a surrogate pair."""
    for text in _texts(value):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ord(text[error.start])
            kind: FindingKind = "not_utf8" if 0xDC80 <= half <= 0xDCFF else "lone_surrogate"
            return InvalidRow(kind, f"{name}, character {error.start + 1}")
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(key)
            yield from _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)
