"""The chat template of a tokenizer: rendering, and what probing it tells about how it writes a dialogue."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from trainer.data.chat_messages import Dialogue, Message, Tools, content_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASK, _SAY = "qzvprobe", "zqwprobe"
"""Words that no template writes by itself."""


class Refused(Exception):
    """The template raised an error on a dialogue; the text says which."""


class ChatTemplate:
    """Renders dialogues with the tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def exists(self) -> bool:
        """Whether the tokenizer has a template at all."""
        try:
            self._tokenizer.get_chat_template()
        except ValueError:
            return False
        return True

    def render(
        self, dialogue: Dialogue, tools: Tools | None = None, kwargs: dict[str, Any] | None = None, *, ask: bool = False
    ) -> str:
        """A dialogue as text; `ask` adds the beginning of an assistant's message. Refused where the template raises.

        Where a template needs a content in every message, a message without one (beside tool calls) has an empty one.
        """
        try:
            return self._render(dialogue, tools, kwargs, ask)
        except Refused:
            if all("content" in message for message in dialogue):
                raise
            return self._render([{**m, "content": m.get("content", "")} for m in dialogue], tools, kwargs, ask)

    def _render(self, dialogue: Dialogue, tools: Tools | None, kwargs: dict[str, Any] | None, ask: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    dialogue,
                    tools=tools,  # pyright: ignore[reportArgumentType]
                    tokenize=False,
                    add_generation_prompt=ask,
                    **(kwargs or {}),
                )
            )
        except TemplateError as error:
            raise Refused(str(error)) from error
        except (
            TypeError,
            ValueError,
            AttributeError,
            KeyError,
        ) as error:  # raised by filters and methods in a template
            raise Refused(f"{type(error).__name__}: {error}") from error

    def as_wanted(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with contents of the form that the template renders.

        Text parts are joined unless the template renders lists of parts itself. Text becomes a part where the template
        renders nothing else, as TRL's `prepare_multimodal_messages` does for processors.
        """
        renders_parts, needs_parts = self._forms
        if needs_parts:
            return [
                {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
                for m in dialogue
            ]
        if renders_parts or not any(isinstance(message.get("content"), list) for message in dialogue):
            return dialogue
        return [{**m, "content": content_text(m)} if isinstance(m.get("content"), list) else m for m in dialogue]

    @cached_property
    def _forms(self) -> tuple[bool, bool]:
        """Whether lists of text parts are rendered, and whether text that is no list is not."""
        parts = self._probe([{"role": "user", "content": [{"type": "text", "text": _ASK}]}])
        text = self._probe([{"role": "user", "content": _ASK}])
        if text is not None and _ASK in text:
            return parts == text, False
        needed = parts is not None and _ASK in parts and not any(mark in parts for mark in ("'text'", '"text"'))
        return needed, needed

    @cached_property
    def asks(self) -> str:
        """What follows a user's words up to the place of the answer, blanks around it aside; "" where unknown."""
        text = self._simple([{"role": "user", "content": _ASK}], ask=True)
        return text.rpartition(_ASK)[2].strip() if text else ""

    @cached_property
    def ends(self) -> str:
        """What follows an assistant's words at the end of a dialogue, blanks around it aside; "" where unknown."""
        text = self._simple([{"role": "user", "content": _ASK}, {"role": "assistant", "content": _SAY}])
        return text.rpartition(_SAY)[2].strip() if text and _SAY in text else ""

    @cached_property
    def prompt_comes_first(self) -> bool:
        """Whether a simple prompt, rendered alone, is the beginning of its rendering with an answer."""
        ask: Dialogue = [{"role": "user", "content": _ASK}]
        alone, complete = self._simple(ask, ask=True), self._simple([*ask, {"role": "assistant", "content": _SAY}])
        return alone is not None and complete is not None and complete.startswith(alone)

    def _simple(self, dialogue: Dialogue, ask: bool = False) -> str | None:
        return self._probe(self.as_wanted(dialogue), ask)

    def _probe(self, dialogue: Dialogue, ask: bool = False) -> str | None:
        if not self.exists:
            return None
        try:
            return self.render(dialogue, ask=ask)
        except Refused:
            return None

    # --- what is not rendered ----------------------------------------------------------------------------------------

    def ignored(self, inputs: list[tuple[Dialogue, str]], tools: Tools | None, kwargs: dict[str, Any]) -> list[str]:
        """Names of what makes no difference in any of the renderings: keys of messages, tools, template variables.

        `inputs` are the whole dialogues of a row, each with its rendering.
        """
        keys = dict.fromkeys(
            key
            for progress, _ in inputs
            for m in progress
            for key, value in m.items()
            if key not in ("role", "content") and value
        )
        out: list[str] = []
        for key in keys:
            if self._same_without(key, inputs, tools, kwargs, complete=True):
                out.append(f"The key {key!r} of messages")
            elif self._same_without(key, inputs, tools, kwargs, complete=False):
                out.append(f"The key {key!r} of messages before the last")
        if tools and all(self._same(progress, None, kwargs, text) for progress, text in inputs):
            out.append("The tools of a row")
        source = str(self._tokenizer.get_chat_template(tools=tools))  # pyright: ignore[reportArgumentType]
        out += [f"The value {name!r} of chat_template_kwargs" for name in kwargs if name not in source]
        return out

    def _same_without(
        self, key: str, inputs: list[tuple[Dialogue, str]], tools: Tools | None, kwargs: dict[str, Any], complete: bool
    ) -> bool:
        """Whether no rendering changes without a key, in all messages or in those before the last."""
        changed = False
        for progress, text in inputs:
            end = len(progress) if complete else len(progress) - 1
            if not any(message.get(key) for message in progress[:end]):
                continue
            changed = True
            without = [{k: v for k, v in m.items() if k != key} if i < end else m for i, m in enumerate(progress)]
            if not self._same(without, tools, kwargs, text):
                return False
        return changed

    def _same(self, dialogue: Dialogue, tools: Tools | None, kwargs: dict[str, Any], text: str) -> bool:
        try:
            return self.render(dialogue, tools, kwargs) == text
        except Refused:
            return False


def altered(dialogue: Dialogue, text: str) -> list[Message]:
    """Messages whose content is not in the rendering as it stands, blanks around it aside."""
    at, out = 0, list[Message]()
    for message in dialogue:
        said = content_text(message).strip()
        path = text.find(said, at)
        if path < 0:
            out.append(message)
        else:
            at = path + len(said)
    return out


# --- prompts that are rendered already -------------------------------------------------------------------------------

_BEGINNINGS = (
    "<|im_start|>",  # ChatML: Qwen, Yi, SmolLM, Hermes
    "<|begin_of_text|><|start_header_id|>",  # Llama 3
    "<|start_header_id|>",
    "<s>[INST]",  # Llama 2, Mistral
    "[INST]",
    "<bos><start_of_turn>",  # Gemma
    "<start_of_turn>",
    "<|system|>",  # Phi 3, Zephyr, TinyLlama
    "<|user|>",
    "<|prompter|>",  # OpenAssistant
    "<|start_of_role|>",  # Granite
    "<|START_OF_TURN_TOKEN|>",  # Command R
    "<｜begin▁of▁sentence｜>",  # DeepSeek
    "<｜User｜>",
    "<|start|>",  # gpt-oss
    "Below is an instruction that describes a task",  # Alpaca
    "### Instruction:",
    "### Human:",
    "GPT4 Correct User:",  # OpenChat
)
_ENDS = (
    "<|im_start|>assistant",
    "<|start_header_id|>assistant<|end_header_id|>",
    "[/INST]",
    "<start_of_turn>model",
    "<|assistant|>",
    "<|start_of_role|>assistant<|end_of_role|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "<｜Assistant｜>",
    "<|start|>assistant",
    "### Response:",
    "### Assistant:",
    "ASSISTANT:",  # Vicuna
    "GPT4 Correct Assistant:",
)


def rendered_mark(prompt: str) -> str | None:
    """The mark of a common chat template with which a prompt begins, or ends before the answer; None without one."""
    begun, asked = prompt.lstrip(), prompt.rstrip()
    return next(
        (mark for mark in _BEGINNINGS if begun.startswith(mark)),
        next((mark for mark in _ENDS if asked.endswith(mark)), None),
    )
