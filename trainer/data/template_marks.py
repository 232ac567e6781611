"""How prompts look that a chat template has rendered already: what common templates begin with, and ask with."""

from __future__ import annotations

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
