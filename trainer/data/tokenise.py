"""Preferences to token ids: the template's own rendering, cut at the lengths asked for, with what was noticed.

The ids are those of TRL's DPOTrainer 1.16 (`_prepare_dataset`): the whole dialogue is rendered and tokenised, and the
response is what follows the tokens that the prompt alone has in common with both renderings. Cutting is our own: TRL
cuts the joined sequence, here the prompt loses its oldest tokens first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from trainer.data.check import Kind
from trainer.data.format import Dialogue, Preference
from trainer.data.tokenizer import require_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Notice = tuple[Kind, str]
"""A kind of finding, and the case in words."""


@dataclass(slots=True)
class Tokens:
    """Ids of one pair, empty where the template refused it, and what was noticed about it."""

    prompt: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)


class Tokeniser:
    """Turns preferences of either form into token ids, in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, prompt_budget: int) -> None:
        """`max_length` and `prompt_budget` in tokens, prompt_budget < max_length."""
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._prompt_budget = prompt_budget
        self._eos = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
        self._bos: int | None = tokenizer.bos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self.ends: Counter[int] = Counter()
        """Special tokens with which responses ended before they were cut."""
        added = tokenizer.added_tokens_decoder
        self._closing = {*added, self._eos}
        self._specials = {i for i, token in added.items() if token.special} | {self._eos}

    def __call__(self, rows: Sequence[Preference]) -> list[Tokens]:
        """One `Tokens` per row, in their order. TokenizerError for dialogues without a chat template."""
        if any(not isinstance(row.prompt, str) for row in rows):
            require_template(self._tokenizer)
        out = [Tokens() for _ in rows]
        rendered: list[tuple[int, tuple[str, str, str]]] = []
        for i, row in enumerate(rows):
            found = self._render(row)
            if isinstance(found, str):
                out[i].notices.append(("template_refuses", found))
            else:
                rendered.append((i, found))
        plain = [(i, texts) for i, texts in rendered if isinstance(rows[i].prompt, str)]
        dialogues = [(i, texts) for i, texts in rendered if not isinstance(rows[i].prompt, str)]
        # a template writes its own special tokens; plain text gets those that the tokenizer adds
        for group, add in ((plain, True), (dialogues, False)):
            ids = self._ids([text for _, texts in group for text in texts], add)
            for n, (i, texts) in enumerate(group):
                self._fill(out[i], rows[i], texts, ids[3 * n], ids[3 * n + 1], ids[3 * n + 2])
        return out

    def _ids(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]  # pyright: ignore[reportReturnType]

    def _render(self, row: Preference) -> tuple[str, str, str] | str:
        """Prompt, prompt and chosen, prompt and rejected as text; or the template's refusal."""
        if isinstance(row.prompt, str):
            return (row.prompt, *(row.prompt + self._ended(str(part)) for part in (row.chosen, row.rejected)))  # pyright: ignore[reportReturnType]
        from jinja2 import TemplateError

        try:
            return (
                self._template(row.prompt, prompt=True),
                self._template(row.prompt + list(row.chosen)),  # pyright: ignore[reportArgumentType]
                self._template(row.prompt + list(row.rejected)),  # pyright: ignore[reportArgumentType]
            )
        except TemplateError as error:
            return str(error)

    def _template(self, dialogue: Dialogue, prompt: bool = False) -> str:
        return str(self._tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=prompt))

    def _ended(self, response: str) -> str:
        eos = str(self._tokenizer.eos_token)
        return response if response.endswith(eos) else response + eos

    # --- one row -----------------------------------------------------------------------------------------------------

    def _fill(
        self,
        out: Tokens,
        row: Preference,
        texts: tuple[str, str, str],
        prompt: list[int],
        with_chosen: list[int],
        with_rejected: list[int],
    ) -> None:
        from trl.data_utils import common_prefix_length

        kept = min(common_prefix_length(prompt, with_chosen), common_prefix_length(prompt, with_rejected))
        if kept < len(prompt):
            if all(text.startswith(texts[0]) for text in texts[1:]):
                out.notices.append(("boundary_merged", ""))
            else:
                end = self._tokenizer.decode(prompt[kept:])
                out.notices.append(("prompt_not_prefix", f"The prompt alone goes on with {end!r}"))
        out.prompt, out.chosen, out.rejected = prompt[:kept], with_chosen[kept:], with_rejected[kept:]
        if not out.prompt:
            out.notices.append(("empty_prompt", "no token of the prompt is left"))
        if self._bos is not None and out.prompt[:2] == [self._bos, self._bos]:
            out.notices.append(("duplicate_bos", ""))
        self._look_at_ends(out)
        if self._special_text is not None and any(self._special_text.search(text) for text in _own_texts(row)):
            out.notices.append(("special_in_text", ""))
        self._cut(out)

    def _look_at_ends(self, out: Tokens) -> None:
        """A response must hold an end: eos_token, or the special token with which the template closes a message."""
        noticed: set[Notice] = set()
        for response in (out.chosen, out.rejected):
            last = next((i for i in reversed(response) if self._text(i).strip()), None)
            if last is not None and last in self._closing:
                self.ends[last] += 1
                if self._eos not in response:
                    noticed.add(("other_end", f"They end with {self._text(last)!r}"))
            elif self._eos not in response:
                noticed.add(("missing_eos", ""))
        out.notices.extend(sorted(noticed))

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _cut(self, out: Tokens) -> None:
        """Prompts lose their oldest tokens, BOS kept; responses are cut to what remains of `max_length`."""
        if len(out.prompt) > self._prompt_budget:
            has_bos = self._bos is not None and out.prompt[0] == self._bos and self._prompt_budget > 1
            head = out.prompt[:1] if has_bos else []
            out.prompt = head + out.prompt[len(out.prompt) - self._prompt_budget + len(head) :]
            out.notices.append(("prompt_cut", ""))
        room = self._max_length - len(out.prompt)
        if max(len(out.chosen), len(out.rejected)) > room:
            differed = out.chosen != out.rejected
            out.chosen, out.rejected = out.chosen[:room], out.rejected[:room]
            out.notices.append(("response_cut", ""))
            if differed and out.chosen == out.rejected:
                out.notices.append(("equal_after_cut", ""))

    @cached_property
    def _special_text(self) -> re.Pattern[str] | None:
        texts = sorted({self._text(i) for i in self._specials} - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None


def _own_texts(row: Preference) -> list[str]:
    return [
        text
        for part in (row.prompt, row.chosen, row.rejected)
        for text in ([part] if isinstance(part, str) else [m["content"] for m in part])
    ]
