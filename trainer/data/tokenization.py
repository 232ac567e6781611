"""Preferences to token ids, truncated to the configured lengths; and the trial's tokenizer.

The ids are those of TRL 1.16's `DPOTrainer._prepare_dataset`: the whole dialogue is rendered and tokenized, and the
answer starts after the common token prefix of the prompt and both renderings. Three things differ. TRL truncates the
joined sequence; here the prompt loses its oldest tokens first. An answer whose text already ends with the end of a turn
gets no second one, even if white space follows. Content given as text parts is joined for templates that require text.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.model_folder import check_model_files, check_tokenizer_files
from trainer.config.trial import DataConfig, ModelConfig
from trainer.data.chat_messages import Dialogue, content_text
from trainer.data.chat_template import ChatTemplate, TemplateRefused, altered_messages, rendered_mark
from trainer.data.data_findings import FindingKind, RowNotice
from trainer.data.formats import Preference
from trainer.results import TrialError, cannot_load_message, clause
from trainer.storage.atomic_files import digest_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class TokenizerError(TrialError):
    """The tokenizer cannot be loaded, or lacks a feature that preference tuning needs."""


def load_tokenizer(
    model: ModelConfig, data: DataConfig | None, cache: Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer (or `model.tokenizer`), with `data.chat_template` as its template if given.

    `cache` is the folder in which a generated model is created. A missing pad token is set to the end token, which is
    safe because padding is masked by position. A tokenizer class that comes with the model is loaded only with
    `trust_remote_code`.

    Raises:
        TokenizerError: The tokenizer cannot be loaded, is not a fast one, or has no end token.
    """
    tokenizer = _load(*_tokenizer_source(model, cache), trust_remote_code)
    if data is not None and data.chat_template is not None:
        tokenizer.chat_template = template_text(data.chat_template)
    return tokenizer


def _tokenizer_source(model: ModelConfig, cache: Path) -> tuple[str, str | None]:
    if model.tokenizer is not None:
        return model.tokenizer, None
    if model.generated is not None:
        from trainer.synthetic.tiny_models import generate_model

        return str(generate_model(model.generated, cache)), None
    assert model.name_or_path is not None
    return model.name_or_path, model.revision


def _load(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    check_model_files(name, revision)  # a damaged config.json
    check_tokenizer_files(name)
    try:
        # False and not None: with None transformers asks for confirmation on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise TokenizerError(cannot_load_message(f"the tokenizer of {name!r}", error)) from error
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise TokenizerError(
            f"the tokenizer of {name!r} cannot be loaded: {clause(reason)}. "
            "Give a folder or a reachable hub name as model.name_or_path or model.tokenizer."
        ) from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"{name!r} has no fast tokenizer (tokenizer.json); convert it, or give model.tokenizer")
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"the tokenizer of {name!r} has no eos_token: set one, or give model.tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def template_text(template: str) -> str:
    """Return the Jinja text of `data.chat_template`: the value if it contains a Jinja marker, else the content of the
    file.

    Raises TokenizerError if it is neither.
    """
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise TokenizerError(f"data.chat_template is neither Jinja text nor a file: {template!r}")
    return path.read_text(encoding="utf-8")


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TokenizerError if the tokenizer has no chat template, so that dialogues cannot be rendered."""
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise TokenizerError(
            "the data are dialogues (or data.apply_template is true), but the tokenizer has no chat template; "
            "set data.chat_template to Jinja text or to a file"
        ) from error


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hex digest of the vocabulary, merges, special tokens and template of a tokenizer."""
    engine: Tokenizer = tokenizer.backend_tokenizer  # pyright: ignore[reportAssignmentType]
    backend = json.loads(engine.to_str())
    # padding and truncation record earlier calls and do not belong to the tokenizer
    shared = {key: value for key, value in backend.items() if key not in {"padding", "truncation"}}
    described = {
        "backend": shared,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }
    module = type(tokenizer).__module__
    if module.startswith("transformers_modules"):  # a class that comes with the model: its code matters too
        described["code"] = inspect.getsource(sys.modules[module])
    return digest_of(described)


@dataclass(slots=True)
class EncodedPair:
    """Token ids of one pair, empty if the template refused it, and findings about it.

    Of a row with one response the other is empty.
    """

    prompt: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    notices: list[RowNotice] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _RenderedRow:
    """A row as text: the prompt alone, then followed by each answer; `dialogue` is the prompt of a dialogue."""

    prompt: str
    chosen: str
    rejected: str
    dialogue: Dialogue | None


class PairTokenizer:
    """Converts preferences, text or dialogues, to token ids, in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        """`data` gives the lengths, `apply_template` and `max_prompt_length`."""
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._data = data
        self._eos = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
        self._bos: int | None = tokenizer.bos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self.end_token_ids: Counter[int] = Counter()
        """How many responses ended with each special token, before truncation."""
        added = tokenizer.added_tokens_decoder
        self._possible_ends = {*added, self._eos}
        self._special_ids = {i for i, token in added.items() if token.special} | {self._eos}

    def __call__(self, rows: Sequence[Preference]) -> list[EncodedPair]:
        """Return one `EncodedPair` per row, in order. Raises TokenizerError for dialogues without a chat template."""
        if any(not isinstance(row.prompt, str) for row in rows):
            require_template(self._tokenizer)
        out = [EncodedPair(notices=list(row.notices)) for row in rows]
        rendered: list[tuple[int, _RenderedRow]] = []
        rendered_rows = [row.with_both() for row in rows]
        for index, row in enumerate(rendered_rows):
            try:
                texts = (
                    self._render_text(row, out[index])
                    if isinstance(row.prompt, str)
                    else self._render_dialogue(row, out[index])
                )
            except TemplateRefused as error:
                out[index].notices.append(("template_refuses", str(error)))
            else:
                rendered.append((index, texts))
        plain = [(index, texts) for index, texts in rendered if texts.dialogue is None]
        dialogues = [(index, texts) for index, texts in rendered if texts.dialogue is not None]
        # a template writes its own special tokens; plain text gets those that the tokenizer adds
        for group, add in ((plain, True), (dialogues, False)):
            ids = self._tokenize([text for _, one in group for text in (one.prompt, one.chosen, one.rejected)], add)
            for position, (index, texts) in enumerate(group):
                self._assign_ids(
                    out[index], rows[index], texts, ids[3 * position], ids[3 * position + 1], ids[3 * position + 2]
                )
        return out

    def _tokenize(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]  # pyright: ignore[reportReturnType]

    # --- text --------------------------------------------------------------------------------------------------------

    def _render_text(self, row: Preference, out: EncodedPair) -> _RenderedRow:
        prompt, *answers = (str(part) for part in (row.prompt, row.chosen, row.rejected))
        if self._is_rendered(prompt):
            out.notices.append(("already_rendered", ""))
        elif self._data.apply_template is None and self._template.exists:
            out.notices = [notice for notice in out.notices if notice[0] != "needs_template"]  # same decision
            mark = rendered_mark(prompt)
            detail = "" if mark is None else f"The first has {mark!r}, as another chat template writes it"
            out.notices.append(("template_undecided", detail))
        chosen, rejected = (prompt + self._with_eos(answer) for answer in answers)
        return _RenderedRow(prompt, chosen, rejected, None)

    def _is_rendered(self, prompt: str) -> bool:
        """Return whether a plain prompt contains a chat template's markers, or ends with the generation prompt."""
        generation_prompt = self._template.generation_prompt
        if generation_prompt and prompt.rstrip().endswith(generation_prompt):
            return True
        return self._turn_markers is not None and self._turn_markers.search(prompt) is not None

    def _rendered_mark(self, prompt: str) -> str | None:
        """Return the marker of this or another chat template that rendered a plain prompt; None if none did.

        A special token inside the prompt does not count: the prompt may mention it.
        """
        generation_prompt = self._template.generation_prompt
        if generation_prompt and prompt.rstrip().endswith(generation_prompt):
            return generation_prompt
        own = None if self._turn_markers is None else self._turn_markers.match(prompt.lstrip())
        return rendered_mark(prompt) if own is None else own[0]

    def _with_eos(self, answer: str) -> str:
        """Return a plain answer with an end: the end of a turn that it has already, or eos_token."""
        return answer if answer.rstrip().endswith(self._end_texts) else answer + str(self._tokenizer.eos_token)

    @cached_property
    def _end_texts(self) -> tuple[str, ...]:
        """Texts that end an answer: eos_token, other special tokens, and the template's end of a turn if its last token
        is one at which generation can stop.
        """
        tokenizer = self._tokenizer
        others = {i for i in self._special_ids if i not in (self._bos, tokenizer.pad_token_id, tokenizer.unk_token_id)}
        texts = {str(tokenizer.eos_token), *(self._decode(i) for i in others)}
        if self._turn_end and self._tokenize([self._turn_end], False)[0][-1] in self._possible_ends:
            texts.add(self._turn_end)
        return tuple(texts - {""})

    @cached_property
    def _turn_end(self) -> str:
        return self._template.turn_end

    def _render_dialogue(self, row: Preference, out: EncodedPair) -> _RenderedRow:
        prompt, *answers = (
            self._template.with_supported_contents(list(part))  # pyright: ignore[reportArgumentType]
            for part in (row.prompt, row.chosen, row.rejected)
        )
        ended = [self._strip_turn_end(answer) for answer in answers]
        if ended != answers:
            out.notices.append(("already_ended", ""))
        if row.text_prompt is not None and (mark := self._rendered_mark(row.text_prompt)) is not None:
            out.notices.append(("rendered_twice", f"The first has {mark!r}"))
        tools, kwargs = row.tools, row.template_kwargs
        dialogues = [prompt + answer for answer in ended]
        chosen, rejected = (self._template.render(dialogue, tools, kwargs) for dialogue in dialogues)
        prompt_text = self._template.render(prompt, tools, kwargs, ask=True)
        self._check_rendering(row, [(dialogues[0], chosen), (dialogues[1], rejected)], out)
        return _RenderedRow(prompt_text, chosen, rejected, prompt)

    def _strip_turn_end(self, answer: Dialogue) -> Dialogue:
        """Remove an end of turn from the text of assistant messages; the template writes it."""
        ends = tuple({self._turn_end, str(self._tokenizer.eos_token)} - {""})
        if not self._turn_end:
            return answer
        out: Dialogue = []
        for message in answer:
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            text = (parts[-1]["text"] or "").rstrip()
            if message["role"] == "assistant" and text.endswith(ends):
                text = text.removesuffix(next(end for end in sorted(ends, key=len, reverse=True) if text.endswith(end)))
                has_parts = isinstance(content, list)
                message = {**message, "content": [*parts[:-1], {**parts[-1], "text": text}] if has_parts else text}
            out.append(message)
        return out

    def _check_rendering(self, row: Preference, rendered: list[tuple[Dialogue, str]], out: EncodedPair) -> None:
        """Record which parts of the messages the template leaves out or changes."""
        has_keys = any(len(message) > 2 for dialogue, _ in rendered for message in dialogue)
        if row.tools or row.template_kwargs or has_keys:
            names = self._template.ignored_inputs(rendered, row.tools, row.template_kwargs)
            out.notices.extend(("ignored_key", name) for name in names)
        changed = next((message for dialogue, text in rendered for message in altered_messages(dialogue, text)), None)
        if changed is not None:
            out.notices.append(("content_altered", f"The first is of role {changed['role']}"))

    # --- one row -----------------------------------------------------------------------------------------------------

    def _assign_ids(
        self,
        out: EncodedPair,
        row: Preference,
        texts: _RenderedRow,
        prompt: list[int],
        with_chosen: list[int],
        with_rejected: list[int],
    ) -> None:
        shared = min(_common_prefix_length(prompt, with_chosen), _common_prefix_length(prompt, with_rejected))
        if shared < len(prompt):
            if texts.chosen.startswith(texts.prompt) and texts.rejected.startswith(texts.prompt):
                out.notices.append(("boundary_merged", ""))
            else:
                end = self._tokenizer.decode(prompt[shared:])
                kind: FindingKind = "prompt_changes" if self._template.prompt_is_prefix else "prompt_not_prefix"
                out.notices.append((kind, f"The prompt alone continues with {end!r}"))
        out.prompt, out.chosen, out.rejected = prompt[:shared], with_chosen[shared:], with_rejected[shared:]
        if not out.prompt:
            out.notices.append(("empty_prompt", "no token of the prompt is left"))
        if not out.chosen or not out.rejected:
            out.notices.append(("empty_response", "the chat template renders it as nothing"))
        elif out.chosen == out.rejected and not row.is_single:
            out.notices.append(("equal_rendered", ""))
        if self._bos is not None and out.prompt[:2] == [self._bos, self._bos]:
            out.notices.append(("duplicate_bos", ""))
        self._check_ends(out)
        rendered = any(kind in ("already_rendered", "rendered_twice") for kind, _ in out.notices)
        if not rendered and self._special_text and any(self._special_text.search(text) for text in _message_texts(row)):
            out.notices.append(("special_in_text", ""))
        self._truncate(out, row, texts)
        out.chosen, out.rejected = out.chosen if row.chosen else [], out.rejected if row.rejected else []

    def _check_ends(self, out: EncodedPair) -> None:
        """Check that each response has an end: eos_token, or the special token that ends a message."""
        notices: set[RowNotice] = set()
        for response in (out.chosen, out.rejected):
            last = next((i for i in reversed(response) if self._decode(i).strip()), None)
            if last is not None and last in self._possible_ends:
                self.end_token_ids[last] += 1
                if self._eos not in response:
                    notices.add(("other_end", f"They end with {self._decode(last)!r}"))
            elif self._eos not in response:
                notices.add(("missing_eos", ""))
        out.notices.extend(sorted(notices))

    def _decode(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _truncate(self, out: EncodedPair, row: Preference, texts: _RenderedRow) -> None:
        """Remove the oldest prompt tokens (BOS is kept), then truncate answers to what remains of `max_length`.

        With `max_prompt_length`, every longer prompt is cut to it. Without, only rows that exceed `max_length` are cut:
        the prompt as far as needed, but not below `prompt_budget`.
        """
        data, longest = self._data, max(len(out.chosen), len(out.rejected))
        keep = data.max_prompt_length or max(data.prompt_budget, data.max_length - longest)
        length = len(out.prompt)
        if length > keep:
            has_bos = self._bos is not None and out.prompt[0] == self._bos and keep > 1
            head = out.prompt[:1] if has_bos else []
            removed = length - keep + len(head)
            out.prompt = head + out.prompt[removed:]
            out.notices.extend((kind, "") for kind in self._truncation_kinds(row, texts, removed))
        budget = data.max_length - len(out.prompt)
        if longest > budget:
            differed = out.chosen != out.rejected
            out.chosen, out.rejected = out.chosen[:budget], out.rejected[:budget]
            out.notices.append(("response_cut", ""))
            if differed and out.chosen == out.rejected:
                out.notices.append(("equal_after_cut", ""))

    def _truncation_kinds(self, row: Preference, texts: _RenderedRow, removed: int) -> list[FindingKind]:
        """Return what the first `removed` tokens of a prompt contained: system message or tools, earlier turns,
        question.
        """
        if texts.dialogue is None:
            return ["prompt_cut"]
        encoding = self._tokenizer(texts.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoding["offset_mapping"]
        start = int(offsets[removed][0]) if removed < len(offsets) else len(texts.prompt)  # pyright: ignore
        kinds: list[FindingKind] = []
        at = 0
        for tool in row.tools or ():
            name = str(tool.get("function", tool).get("name", ""))
            if 0 <= texts.prompt.find(name) < start:
                kinds.append("system_cut")
        for number, message in enumerate(texts.dialogue, start=1):
            content = content_text(message).strip()
            position = texts.prompt.find(content, at)
            if not content or position < 0 or position >= start:
                continue
            at = position + len(content)
            last = number == len(texts.dialogue)
            kinds.append("system_cut" if message["role"] == "system" else "prompt_cut" if last else "turns_cut")
        return list(dict.fromkeys(kinds)) or ["turns_cut" if len(texts.dialogue) > 1 else "prompt_cut"]

    @cached_property
    def _special_text(self) -> re.Pattern[str] | None:
        return _any_text_pattern({self._decode(i) for i in self._special_ids})

    @cached_property
    def _turn_markers(self) -> re.Pattern[str] | None:
        """Matches special tokens with which a template separates turns; BOS, pad, unk and mask are not among them."""
        tokenizer = self._tokenizer
        usual = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id)
        is_marker = self._decode(self._eos) in self._template.turn_end
        return _any_text_pattern(
            {self._decode(i) for i in self._special_ids if i not in usual and (is_marker or i != self._eos)}
        )


def _common_prefix_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return how many leading tokens are equal, as TRL's function of this name; TRL itself takes a second to load."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _any_text_pattern(texts: set[str]) -> re.Pattern[str] | None:
    listed = sorted(texts - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, listed))) if listed else None


def _message_texts(row: Preference) -> list[str]:
    return [
        text
        for part in (row.prompt, row.chosen, row.rejected)
        for text in ([part] if isinstance(part, str) else [content_text(m) for m in part])
    ]
