"""What the models say: the fixed prompts answered by the start model, by the best trial and by the worst."""

from __future__ import annotations

import re

from dashboards.blocks import Block, Panel, Replies, Reply
from dashboards.insight import Insight
from dashboards.sweep_frame import Sample, TrialCase

_LONGEST = 4000
_PROMPTS = 12
_MARKS = re.compile(
    r"<\|start_header_id\|>\w+<\|end_header_id\|>|<\|im_start\|>\w+\n|<start_of_turn>\w+\n|<end_of_turn>"
    r"|<\|\w+\|>|</?s>|<bos>|\[/?INST\]"
)
"""Of Llama 3, ChatML, Gemma, Zephyr and Mistral."""


def panel(seen: Insight) -> Panel | None:
    """One block a prompt."""
    frame = seen.frame
    told = [case for case in frame.ranked if _after(case)]
    anybody = next((case for case in frame.trials if case.samples), None)
    if anybody is None:
        return None
    chosen: list[tuple[str, list[Sample]]] = []
    if told:
        chosen.append((f"best, trial {told[0].label}", _after(told[0])))
        if len(told) > 1:
            chosen.append((f"worst that completed, trial {told[-1].label}", _after(told[-1])))
    before = [sample for sample in (told[0] if told else anybody).samples if sample.step == 0]
    prompts = list(dict.fromkeys(s.prompt for _, samples in [("", before), *chosen] for s in samples))
    blocks: list[Block] = []
    for prompt in prompts[:_PROMPTS]:
        replies = [_reply("start model", before, prompt), *(_reply(who, samples, prompt) for who, samples in chosen)]
        expected = next((s.expected for s in before if s.prompt == prompt and s.expected is not None), None)
        blocks.append(Replies(_cut(_as_said(prompt)), expected, tuple(r for r in replies if r is not None)))
    lead = "Greedy answers to fixed held-out prompts." + (" ✓ and ✗: checked by a program." if _checked(before) else "")
    return Panel("samples", "What the models say", lead, blocks) if blocks else None


def _as_said(prompt: str) -> str:
    """The prompt without the chat template's own marks."""
    return _MARKS.sub("", prompt).strip() or prompt


def _after(case: TrialCase) -> list[Sample]:
    last = max((sample.step for sample in case.samples), default=0)
    return [sample for sample in case.samples if sample.step == last and last > 0]


def _checked(samples: list[Sample]) -> bool:
    return any(sample.right is not None for sample in samples)


def _reply(who: str, samples: list[Sample], prompt: str) -> Reply | None:
    found = next((sample for sample in samples if sample.prompt == prompt), None)
    return None if found is None else Reply(who, _cut(found.answer), found.right)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … [{len(text) - _LONGEST:,} more characters]"
