"""The chat template of a tokenizer: render dialogues, and probe how the template writes prompts and answers."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from trainer.data.chat_messages import ChatMessage, Dialogue, Tools, content_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE_PROMPT, _PROBE_ANSWER = "qzvprobe", "zqwprobe"
"""Words that no template writes by itself."""


class TemplateRefused(Exception):
    """The template raised an error on a dialogue; the text is the error's."""


class ChatTemplate:
    """Renders dialogues with the tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def exists(self) -> bool:
        """Whether the tokenizer has a chat template."""
        try:
            self._tokenizer.get_chat_template()
        except ValueError:
            return False
        return True

    def render(
        self, dialogue: Dialogue, tools: Tools | None = None, kwargs: dict[str, Any] | None = None, *, ask: bool = False
    ) -> str:
        """Render a dialogue as text; `ask` adds the generation prompt. Raises TemplateRefused if the template raises.

        If the template requires a content in every message, messages without one (tool calls) get an empty content.
        """
        try:
            return self._render(dialogue, tools, kwargs, ask)
        except TemplateRefused:
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
            raise TemplateRefused(str(error)) from error
        except (
            TypeError,
            ValueError,
            AttributeError,
            KeyError,
        ) as error:  # raised by filters and methods in a template
            raise TemplateRefused(f"{type(error).__name__}: {error}") from error

    def with_supported_contents(self, dialogue: Dialogue) -> Dialogue:
        """Convert message contents to the form that the template renders.

        Text parts are joined unless the template renders lists of parts. Text becomes a part if the template renders
        only parts, as in TRL's `prepare_multimodal_messages` for processors.
        """
        renders_parts, needs_parts = self._content_forms
        if needs_parts:
            return [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message.get("content"), str)
                else message
                for message in dialogue
            ]
        if renders_parts or not any(isinstance(message.get("content"), list) for message in dialogue):
            return dialogue
        return [
            {**message, "content": content_text(message)} if isinstance(message.get("content"), list) else message
            for message in dialogue
        ]

    @cached_property
    def _content_forms(self) -> tuple[bool, bool]:
        """Whether the template renders lists of text parts, and whether it renders only these."""
        parts = self._probe([{"role": "user", "content": [{"type": "text", "text": _PROBE_PROMPT}]}])
        text = self._probe([{"role": "user", "content": _PROBE_PROMPT}])
        if text is not None and _PROBE_PROMPT in text:
            return parts == text, False
        needed = parts is not None and _PROBE_PROMPT in parts and not any(m in parts for m in ("'text'", '"text"'))
        return needed, needed

    @cached_property
    def generation_prompt(self) -> str:
        """Text between a user message and the answer, stripped; "" if unknown."""
        text = self._render_simple([{"role": "user", "content": _PROBE_PROMPT}], ask=True)
        return text.rpartition(_PROBE_PROMPT)[2].strip() if text else ""

    @cached_property
    def turn_end(self) -> str:
        """Text after an assistant message at the end of a dialogue, stripped; "" if unknown."""
        text = self._render_simple(
            [{"role": "user", "content": _PROBE_PROMPT}, {"role": "assistant", "content": _PROBE_ANSWER}]
        )
        return text.rpartition(_PROBE_ANSWER)[2].strip() if text and _PROBE_ANSWER in text else ""

    @cached_property
    def prompt_is_prefix(self) -> bool:
        """Whether a simple prompt, rendered alone, is a prefix of its rendering with an answer."""
        prompt: Dialogue = [{"role": "user", "content": _PROBE_PROMPT}]
        alone = self._render_simple(prompt, ask=True)
        complete = self._render_simple([*prompt, {"role": "assistant", "content": _PROBE_ANSWER}])
        return alone is not None and complete is not None and complete.startswith(alone)

    def _render_simple(self, dialogue: Dialogue, ask: bool = False) -> str | None:
        return self._probe(self.with_supported_contents(dialogue), ask)

    def _probe(self, dialogue: Dialogue, ask: bool = False) -> str | None:
        if not self.exists:
            return None
        try:
            return self.render(dialogue, ask=ask)
        except TemplateRefused:
            return None

    # --- content that is not rendered --------------------------------------------------------------------------------

    def ignored_inputs(
        self, inputs: list[tuple[Dialogue, str]], tools: Tools | None, kwargs: dict[str, Any]
    ) -> list[str]:
        """Return names of inputs that change none of the renderings: keys of messages, tools, template variables.

        `inputs` are the whole dialogues of a row, each with its rendering.
        """
        keys = dict.fromkeys(
            key
            for dialogue, _ in inputs
            for message in dialogue
            for key, value in message.items()
            if key not in ("role", "content") and value
        )
        out: list[str] = []
        for key in keys:
            if self._renders_same_without(key, inputs, tools, kwargs, complete=True):
                out.append(f"The key {key!r} of messages")
            elif self._renders_same_without(key, inputs, tools, kwargs, complete=False):
                out.append(f"The key {key!r} of messages before the last")
        if tools and all(self._renders_same(dialogue, None, kwargs, text) for dialogue, text in inputs):
            out.append("The tools of a row")
        source = str(self._tokenizer.get_chat_template(tools=tools))  # pyright: ignore[reportArgumentType]
        out += [f"The value {name!r} of chat_template_kwargs" for name in kwargs if name not in source]
        return out

    def _renders_same_without(
        self, key: str, inputs: list[tuple[Dialogue, str]], tools: Tools | None, kwargs: dict[str, Any], complete: bool
    ) -> bool:
        """Return whether no rendering changes without a key, in all messages (`complete`) or all but the last."""
        changed = False
        for dialogue, text in inputs:
            end = len(dialogue) if complete else len(dialogue) - 1
            if not any(message.get(key) for message in dialogue[:end]):
                continue
            changed = True
            without = [{k: v for k, v in m.items() if k != key} if i < end else m for i, m in enumerate(dialogue)]
            if not self._renders_same(without, tools, kwargs, text):
                return False
        return changed

    def _renders_same(self, dialogue: Dialogue, tools: Tools | None, kwargs: dict[str, Any], text: str) -> bool:
        try:
            return self.render(dialogue, tools, kwargs) == text
        except TemplateRefused:
            return False


def altered_messages(dialogue: Dialogue, text: str) -> list[ChatMessage]:
    """Return the messages whose content (stripped) does not occur unchanged in the rendering."""
    start, out = 0, list[ChatMessage]()
    for message in dialogue:
        content = content_text(message).strip()
        position = text.find(content, start)
        if position < 0:
            out.append(message)
        else:
            start = position + len(content)
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
    """Return the marker of a common chat template with which a prompt begins or ends; None without one."""
    begun, asked = prompt.lstrip(), prompt.rstrip()
    return next(
        (mark for mark in _BEGINNINGS if begun.startswith(mark)),
        next((mark for mark in _ENDS if asked.endswith(mark)), None),
    )
