"""Where the prompt ends in plain text that has none of its own: chosen and rejected begin with it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainer.data.messages import Bad, Dialogue

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
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Split:
    """Prompt and answers of plain text. `marked`: a mark says where the prompt ends; `turns`: an answer has more."""

    prompt: str
    chosen: str
    rejected: str
    marked: bool
    turns: bool


def split_implied(chosen: str, rejected: str) -> Split | Bad:
    """Part two texts into their common prompt and the answers.

    The prompt ends after the last mark of an answer that both texts share up to there (HH-RLHF's `\\n\\nAssistant:`,
    a chat template's, `Answer:` at the start of a line). Without a mark it is the whole words that both begin with, as
    long as these are no more than one sentence; a blank after them belongs to the answers, as in TRL's
    `extract_prompt`, a line break to the prompt. No character is dropped or added.
    """
    shared = _common_beginning(chosen, rejected)
    for mark in _MARKS:
        places = [found.end() for found in mark.finditer(shared)]
        if places:
            end = places[-1]
            good, bad = chosen[end:], rejected[end:]
            return Split(chosen[:end], good, bad, True, any(mark.search(text) for text in (good, bad)))
    if len(shared) in (len(chosen), len(rejected)):
        return Bad("one_begins_other")
    words = _whole_words(shared, chosen[len(shared)], rejected[len(shared)])
    if not words.strip():
        return Bad("no_prompt")
    if _SENTENCE_END.search(words.rstrip()):
        return Bad("prompt_undecided")
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
    return character.isalnum() and ord(character) < 0x2E80  # East Asian scripts put no blanks between words


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
        {"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)
    ]
    return out[:-1] if out[-1] == {"role": "assistant", "content": ""} else out


def hh_question(prompt: str) -> str | None:
    """A prompt of HH-RLHF's form up to the mark of its answer, which is added where it lacks; None for another form."""
    turns = hh_dialogue(prompt)
    if turns is None:
        return None
    return prompt if prompt.rstrip().endswith("\n\nAssistant:") else f"{prompt.rstrip()}\n\nAssistant: "
