"""Preferences to token ids: the chat template's rendering, cut at the configured lengths; and the trial's tokenizer.

The ids are those of TRL's DPOTrainer 1.16 (`_prepare_dataset`): the whole dialogue is rendered and tokenized, and the
answer is what follows the tokens that the prompt alone has in common with both renderings. Three things differ. TRL
cuts the joined sequence, here the prompt loses its oldest tokens first. An answer whose text ends with the end of a
turn gets no second one, even where white space follows. Content given as text parts is joined for templates that want
text.
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

from trainer.config.trial import DataConfig, ModelConfig
from trainer.data.chat_messages import Dialogue, content_text
from trainer.data.chat_template import ChatTemplate, Refused, altered, rendered_mark
from trainer.data.formats import Preference
from trainer.data.validation import FindingKind, Notice
from trainer.results import TrialError, cannot_load
from trainer.storage.atomic_files import digest_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class TokenizerError(TrialError):
    """The tokenizer cannot be loaded, or lacks what preference tuning needs."""


def load_tokenizer(
    model: ModelConfig, data: DataConfig | None, cache: Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer (or `model.tokenizer`), with `data.chat_template` in place of its own where given.

    `cache` is where a generated model is made. A missing pad token becomes the end token: padding is masked by
    position everywhere. TokenizerError when it cannot be loaded, is not a fast one, or has no end token. A tokenizer
    whose class comes with the model is loaded only with `trust_remote_code`.
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

    try:
        # False and not None: transformers would ask the terminal, or read an answer from a process's input.
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise TokenizerError(cannot_load(f"the tokenizer of {name!r}", error)) from error
        reason = str(error).strip().splitlines()[0]
        raise TokenizerError(
            f"the tokenizer of {name!r} cannot be loaded: {reason}. "
            "Give a folder or a reachable hub name as model.name_or_path or model.tokenizer."
        ) from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"{name!r} has no fast tokenizer (tokenizer.json); convert it, or give model.tokenizer")
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"the tokenizer of {name!r} has no eos_token: a response could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def template_text(template: str) -> str:
    """The Jinja text of `data.chat_template`: the text itself where it holds a Jinja mark, else the file's.

    TokenizerError where it is neither.
    """
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise TokenizerError(f"data.chat_template is neither Jinja text nor a file: {template!r}")
    return path.read_text(encoding="utf-8")


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """TokenizerError where dialogues cannot be rendered for want of a chat template."""
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise TokenizerError(
            "the data are dialogues (or data.apply_template is true) and the tokenizer has no chat template for them: "
            "give data.chat_template, as Jinja text or as a file with it"
        ) from error


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of all that decides how text becomes tokens: vocabulary, merges, special tokens, template."""
    engine: Tokenizer = tokenizer.backend_tokenizer  # pyright: ignore[reportAssignmentType]
    backend = json.loads(engine.to_str())
    # padding and truncation are the traces of earlier calls, not the tokenizer's own
    shared = {key: value for key, value in backend.items() if key not in {"padding", "truncation"}}
    described = {
        "backend": shared,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }
    module = type(tokenizer).__module__
    if module.startswith("transformers_modules"):  # a class of the model's own code: its methods decide too
        described["code"] = inspect.getsource(sys.modules[module])
    return digest_of(described)


@dataclass(slots=True)
class EncodedPair:
    """Ids of one pair, empty where the template refused it, and what was noticed about it."""

    prompt: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Texts:
    """A row as text: the prompt alone, then with each answer; of a dialogue the prompt as it was rendered too."""

    prompt: str
    chosen: str
    rejected: str
    dialogue: Dialogue | None


class PairTokenizer:
    """Turns preferences of either form into token ids, in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        """Of `data` the lengths and `apply_template` count."""
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._data = data
        self._eos = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
        self._bos: int | None = tokenizer.bos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self.end_token_ids: Counter[int] = Counter()
        """Special tokens with which responses ended before they were cut."""
        added = tokenizer.added_tokens_decoder
        self._closing = {*added, self._eos}
        self._specials = {i for i, token in added.items() if token.special} | {self._eos}

    def __call__(self, rows: Sequence[Preference]) -> list[EncodedPair]:
        """One `EncodedPair` per row, in their order. TokenizerError for dialogues without a chat template."""
        if any(not isinstance(row.prompt, str) for row in rows):
            require_template(self._tokenizer)
        out = [EncodedPair(notices=list(row.notices)) for row in rows]
        rendered: list[tuple[int, _Texts]] = []
        for i, row in enumerate(rows):
            try:
                texts = self._plain(row, out[i]) if isinstance(row.prompt, str) else self._dialogue(row, out[i])
            except Refused as error:
                out[i].notices.append(("template_refuses", str(error)))
            else:
                rendered.append((i, texts))
        plain = [(i, texts) for i, texts in rendered if texts.dialogue is None]
        inputs = [(i, texts) for i, texts in rendered if texts.dialogue is not None]
        # a template writes its own special tokens; plain text gets those that the tokenizer adds
        for group, add in ((plain, True), (inputs, False)):
            ids = self._ids([text for _, t in group for text in (t.prompt, t.chosen, t.rejected)], add)
            for n, (i, texts) in enumerate(group):
                self._assign_ids(out[i], rows[i], texts, ids[3 * n], ids[3 * n + 1], ids[3 * n + 2])
        return out

    def _ids(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]  # pyright: ignore[reportReturnType]

    # --- text --------------------------------------------------------------------------------------------------------

    def _plain(self, row: Preference, out: EncodedPair) -> _Texts:
        prompt, *answers = (str(part) for part in (row.prompt, row.chosen, row.rejected))
        if self._is_rendered(prompt):
            out.notices.append(("already_rendered", ""))
        elif self._data.apply_template is None and self._template.exists:
            out.notices = [notice for notice in out.notices if notice[0] != "needs_template"]  # the same question
            mark = rendered_mark(prompt)
            told = "" if mark is None else f"The first has {mark!r}, as another chat template writes it"
            out.notices.append(("template_undecided", told))
        chosen, rejected = (prompt + self._with_eos(answer) for answer in answers)
        return _Texts(prompt, chosen, rejected, None)

    def _is_rendered(self, prompt: str) -> bool:
        """Whether a plain prompt holds a chat template's marks, or ends as this one's does before an answer."""
        asks = self._template.asks
        if asks and prompt.rstrip().endswith(asks):
            return True
        return self._marks is not None and self._marks.search(prompt) is not None

    def _rendered_mark(self, prompt: str) -> str | None:
        """The mark by which a plain prompt was rendered by this or another chat template; None where it was not.

        A special token within it is none: a prompt may speak of one.
        """
        asks = self._template.asks
        if asks and prompt.rstrip().endswith(asks):
            return asks
        own = None if self._marks is None else self._marks.match(prompt.lstrip())
        return rendered_mark(prompt) if own is None else own[0]

    def _with_eos(self, answer: str) -> str:
        """An answer of plain text with its end: the end of a turn that it has already, or eos_token."""
        return answer if answer.rstrip().endswith(self._end_texts) else answer + str(self._tokenizer.eos_token)

    @cached_property
    def _end_texts(self) -> tuple[str, ...]:
        """Texts that end an answer: eos_token, other special tokens that may, and the template's end of a turn where
        generation can stop at it, which takes a token of its own.
        """
        tokenizer = self._tokenizer
        others = {i for i in self._specials if i not in (self._bos, tokenizer.pad_token_id, tokenizer.unk_token_id)}
        texts = {str(tokenizer.eos_token), *(self._text(i) for i in others)}
        if self._turn_end and self._ids([self._turn_end], False)[0][-1] in self._closing:
            texts.add(self._turn_end)
        return tuple(texts - {""})

    @cached_property
    def _turn_end(self) -> str:
        return self._template.ends

    def _dialogue(self, row: Preference, out: EncodedPair) -> _Texts:
        prompt, *answers = (self._template.as_wanted(list(part)) for part in (row.prompt, row.chosen, row.rejected))  # pyright: ignore[reportArgumentType]
        ended = [self._without_end(answer) for answer in answers]
        if ended != answers:
            out.notices.append(("already_ended", ""))
        if row.text_prompt is not None and (mark := self._rendered_mark(row.text_prompt)) is not None:
            out.notices.append(("rendered_twice", f"The first has {mark!r}"))
        tools, kwargs = row.tools, row.template_kwargs
        talks = [prompt + answer for answer in ended]
        chosen, rejected = (self._template.render(progress, tools, kwargs) for progress in talks)
        alone = self._template.render(prompt, tools, kwargs, ask=True)
        self._look_at_rendering(row, [(talks[0], chosen), (talks[1], rejected)], out)
        return _Texts(alone, chosen, rejected, prompt)

    def _without_end(self, answer: Dialogue) -> Dialogue:
        """Assistant's messages without an end of turn in their text, which the template writes by itself."""
        ends = tuple({self._turn_end, str(self._tokenizer.eos_token)} - {""})
        if not self._turn_end:
            return answer
        out: Dialogue = []
        for message in answer:
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            said = (parts[-1]["text"] or "").rstrip()
            if message["role"] == "assistant" and said.endswith(ends):
                said = said.removesuffix(next(end for end in sorted(ends, key=len, reverse=True) if said.endswith(end)))
                complete = isinstance(content, list)
                message = {**message, "content": [*parts[:-1], {**parts[-1], "text": said}] if complete else said}
            out.append(message)
        return out

    def _look_at_rendering(self, row: Preference, talks: list[tuple[Dialogue, str]], out: EncodedPair) -> None:
        """Notice what of the messages the template leaves out or changes."""
        if row.tools or row.template_kwargs or any(len(message) > 2 for progress, _ in talks for message in progress):
            names = self._template.ignored(talks, row.tools, row.template_kwargs)
            out.notices.extend(("ignored_key", name) for name in names)
        lost = next((message for progress, text in talks for message in altered(progress, text)), None)
        if lost is not None:
            out.notices.append(("content_altered", f"The first is of role {lost['role']}"))

    # --- one row -----------------------------------------------------------------------------------------------------

    def _assign_ids(
        self,
        out: EncodedPair,
        row: Preference,
        texts: _Texts,
        prompt: list[int],
        with_chosen: list[int],
        with_rejected: list[int],
    ) -> None:
        from trl.data_utils import common_prefix_length

        shared = min(common_prefix_length(prompt, with_chosen), common_prefix_length(prompt, with_rejected))
        if shared < len(prompt):
            if texts.chosen.startswith(texts.prompt) and texts.rejected.startswith(texts.prompt):
                out.notices.append(("boundary_merged", ""))
            else:
                end = self._tokenizer.decode(prompt[shared:])
                kind: FindingKind = "prompt_changes" if self._template.prompt_comes_first else "prompt_not_prefix"
                out.notices.append((kind, f"The prompt alone goes on with {end!r}"))
        out.prompt, out.chosen, out.rejected = prompt[:shared], with_chosen[shared:], with_rejected[shared:]
        if not out.prompt:
            out.notices.append(("empty_prompt", "no token of the prompt is left"))
        if not out.chosen or not out.rejected:
            out.notices.append(("empty_response", "the chat template writes nothing for it"))
        elif out.chosen == out.rejected:
            out.notices.append(("equal_rendered", ""))
        if self._bos is not None and out.prompt[:2] == [self._bos, self._bos]:
            out.notices.append(("duplicate_bos", ""))
        self._check_ends(out)
        rendered = any(kind in ("already_rendered", "rendered_twice") for kind, _ in out.notices)
        if not rendered and self._special_text and any(self._special_text.search(text) for text in _message_texts(row)):
            out.notices.append(("special_in_text", ""))
        self._truncate(out, row, texts)

    def _check_ends(self, out: EncodedPair) -> None:
        """A response must hold an end: eos_token, or the special token with which the template closes a message."""
        noticed: set[Notice] = set()
        for response in (out.chosen, out.rejected):
            last = next((i for i in reversed(response) if self._text(i).strip()), None)
            if last is not None and last in self._closing:
                self.end_token_ids[last] += 1
                if self._eos not in response:
                    noticed.add(("other_end", f"They end with {self._text(last)!r}"))
            elif self._eos not in response:
                noticed.add(("missing_eos", ""))
        out.notices.extend(sorted(noticed))

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _truncate(self, out: EncodedPair, row: Preference, texts: _Texts) -> None:
        """Prompts lose their oldest tokens, BOS kept; answers are cut to what remains of `max_length`.

        With `max_prompt_length`, every longer prompt is cut to it. Without, only rows that do not fit are cut: the
        prompt as far as needed, but not below `prompt_budget`.
        """
        data, longest = self._data, max(len(out.chosen), len(out.rejected))
        keep = data.max_prompt_length or max(data.prompt_budget, data.max_length - longest)
        complete = len(out.prompt)
        if complete > keep:
            has_bos = self._bos is not None and out.prompt[0] == self._bos and keep > 1
            head = out.prompt[:1] if has_bos else []
            lost = complete - keep + len(head)
            out.prompt = head + out.prompt[lost:]
            out.notices.extend((kind, "") for kind in self._kinds_cut(row, texts, lost))
        budget = data.max_length - len(out.prompt)
        if longest > budget:
            differed = out.chosen != out.rejected
            out.chosen, out.rejected = out.chosen[:budget], out.rejected[:budget]
            out.notices.append(("response_cut", ""))
            if differed and out.chosen == out.rejected:
                out.notices.append(("equal_after_cut", ""))

    def _kinds_cut(self, row: Preference, texts: _Texts, lost: int) -> list[FindingKind]:
        """What of a prompt is among its first `lost` tokens: system message or tools, earlier turns, the question."""
        if texts.dialogue is None:
            return ["prompt_cut"]
        paths = self._tokenizer(texts.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        start = int(paths["offset_mapping"][lost][0]) if lost < len(paths["input_ids"]) else len(texts.prompt)  # pyright: ignore
        kinds: list[FindingKind] = []
        at = 0
        for tool in row.tools or ():
            name = str(tool.get("function", tool).get("name", ""))
            if 0 <= texts.prompt.find(name) < start:
                kinds.append("system_cut")
        for number, message in enumerate(texts.dialogue, start=1):
            said = content_text(message).strip()
            position = texts.prompt.find(said, at)
            if not said or position < 0 or position >= start:
                continue
            at = position + len(said)
            last = number == len(texts.dialogue)
            kinds.append("system_cut" if message["role"] == "system" else "prompt_cut" if last else "turns_cut")
        return list(dict.fromkeys(kinds)) or ["turns_cut" if len(texts.dialogue) > 1 else "prompt_cut"]

    @cached_property
    def _special_text(self) -> re.Pattern[str] | None:
        return _any_of({self._text(i) for i in self._specials})

    @cached_property
    def _marks(self) -> re.Pattern[str] | None:
        """Special tokens with which a template parts turns: none of those that every tokenizer has."""
        tokenizer = self._tokenizer
        usual = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id)
        is_mark = self._text(self._eos) in self._template.ends
        return _any_of({self._text(i) for i in self._specials if i not in usual and (is_mark or i != self._eos)})


def _any_of(texts: set[str]) -> re.Pattern[str] | None:
    listed = sorted(texts - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, listed))) if listed else None


def _message_texts(row: Preference) -> list[str]:
    return [
        text
        for part in (row.prompt, row.chosen, row.rejected)
        for text in ([part] if isinstance(part, str) else [content_text(m) for m in part])
    ]
