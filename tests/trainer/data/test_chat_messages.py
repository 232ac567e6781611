"""Messages go to the chat template whole: tools, tool calls, reasoning, any other key. What is ignored is told."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.data_cases import (
    CHATML,
    LLAMA,
    chat,
    chat_message,
    data,
    encode,
    good_rows,
    saved,
    tokenizer,
    trl_template,
    write_rows,
)
from trainer.config.trial import FileSource
from trainer.data import BadData, prepare
from trainer.data.formats import InvalidRow, to_preference
from trainer.data.mixing import prompt_key
from trainer.data.sources import read_source

QWEN3 = tokenizer(trl_template("qwen3"))
TOOL = {
    "type": "function",
    "function": {
        "name": "tide_times",
        "description": "High and low water of a harbour",
        "parameters": {"type": "object", "properties": {"harbour": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "tide_times", "arguments": {"harbour": "Cuxhaven"}}}
ASKED = [
    chat_message("user", "When is high water?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "tide_times", "content": "04:10 and 16:35"},
]
WITH_TOOLS: dict[str, Any] = {
    "prompt": ASKED,
    "chosen": [chat_message("assistant", "At 04:10 and 16:35.")],
    "rejected": [chat_message("assistant", "At noon.")],
    "tools": [TOOL],
}


def _thinking(ask: str, *completions: tuple[str, str]) -> dict[str, Any]:
    sides = [[chat_message("assistant", text) | {"reasoning_content": thought}] for thought, text in completions]
    return {"prompt": [chat_message("user", ask)], "chosen": sides[0], "rejected": sides[1]}


def test_tools_and_tool_calls_are_rendered_and_content_may_be_null_beside_them() -> None:
    found = encode(QWEN3, WITH_TOOLS)
    text = QWEN3.decode(found.prompt)
    assert "High and low water of a harbour" in text
    assert '{"name": "tide_times", "arguments": {"harbour": "Cuxhaven"}}' in text
    assert "<tool_response>\n04:10 and 16:35\n</tool_response>" in text
    full = QWEN3.apply_chat_template([*ASKED, *WITH_TOOLS["chosen"]], tools=[TOOL], tokenize=True, return_dict=False)
    assert found.prompt + found.chosen == full


def test_a_tool_call_is_an_answer() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {"prompt": ASKED[:1], "chosen": [call], "rejected": [chat_message("assistant", "At noon.")], "tools": [TOOL]}
    assert '"arguments": {"harbour": "Cuxhaven"}' in QWEN3.decode(encode(QWEN3, row).chosen)
    assert to_preference(row | {"chosen": [{"role": "assistant", "content": None}]}) == InvalidRow(
        "not_text", "chosen: a message whose content is null"
    )


def test_a_template_that_needs_content_gets_an_empty_one_beside_tool_calls() -> None:
    made = tokenizer(CHATML)
    assert "<|im_start|>assistant\n<|im_end|>" in made.decode(encode(made, WITH_TOOLS).prompt)


def test_reasoning_is_trained_on_where_the_template_renders_it() -> None:
    found = encode(QWEN3, _thinking("7 times 8?", ("7 times 8 is 56.", "56"), ("Too hard.", "54")))
    assert QWEN3.decode(found.chosen) == "<think>\n7 times 8 is 56.\n</think>\n\n56<|im_end|>\n"
    assert QWEN3.decode(found.rejected) == "<think>\nToo hard.\n</think>\n\n54<|im_end|>\n"
    assert found.notices == []


def test_answers_that_differ_only_in_reasoning_are_a_pair_unless_the_template_renders_them_alike() -> None:
    row = _thinking("7 times 8?", ("7 times 8 is 56.", "56"), ("A guess.", "56"))
    assert encode(QWEN3, row).notices == []
    assert [kind for kind, _ in encode(tokenizer(CHATML), row).notices] == ["ignored_key", "equal_rendered"]


def test_what_the_template_ignores_is_counted_by_its_name(tmp_path: Path) -> None:
    rows = good_rows(20)
    rows[4] = _thinking("7 times 8?", ("56 it is.", "56"), ("Too hard.", "54"))
    rows[9] = WITH_TOOLS
    rows[11] = chat("a", "b", "c")
    rows[11]["chosen"][0]["weight"] = "2"
    path = write_rows(tmp_path / "a.jsonl", rows)
    found = prepare(data(path), saved(tokenizer(CHATML), tmp_path / "t"), tmp_path / "cache").report
    logged = {f.detail: (f.count, f.rows) for f in found.findings if f.kind == "ignored_key"}
    assert logged == {
        "The key 'reasoning_content' of messages": (1, ((path, 5),)),
        "The key 'tool_calls' of messages": (1, ((path, 10),)),
        "The key 'name' of messages": (1, ((path, 10),)),
        "The tools of a row": (1, ((path, 10),)),
        "The key 'weight' of messages": (1, ((path, 12),)),
    }
    assert any("The key 'weight'" in line and f"{path}: 12" in line for line in found.summary_lines())


def test_thoughts_that_a_template_drops_from_earlier_turns_are_told() -> None:
    row = _thinking("And 7 times 9?", ("One more 7.", "63"), ("Hm.", "64"))
    earlier = chat_message("assistant", "56") | {"reasoning_content": "7 times 8 is 56."}
    row["prompt"] = [chat_message("user", "7 times 8?"), earlier, *row["prompt"]]
    found = encode(QWEN3, row)
    assert "7 times 8 is 56." not in QWEN3.decode(found.prompt)
    assert found.notices == [("ignored_key", "The key 'reasoning_content' of messages before the last")]
    row["prompt"][1] = chat_message("assistant", "<think>7 times 8 is 56.</think>56")
    assert ("content_altered", "The first is of role assistant") in encode(QWEN3, row).notices


def test_tools_may_be_json_text_and_arguments_stay_what_they_are() -> None:
    assert encode(QWEN3, WITH_TOOLS | {"tools": json.dumps([TOOL])}).prompt == encode(QWEN3, WITH_TOOLS).prompt
    call = {"type": "function", "function": {"name": "tide_times", "arguments": '{"harbour": "Cuxhaven"}'}}
    row = WITH_TOOLS | {"prompt": [ASKED[0], chat_message("assistant", "") | {"tool_calls": [call]}, ASKED[2]]}
    found = to_preference(row)
    assert found.prompt[1]["tool_calls"] == [call]  # pyright: ignore[reportArgumentType, reportIndexIssue, reportCallIssue]
    assert '"arguments": {"harbour": "Cuxhaven"}' in QWEN3.decode(encode(QWEN3, row).prompt)


def test_no_tools_are_no_tools() -> None:
    for none in ([], "", "[]", None):
        assert to_preference(WITH_TOOLS | {"tools": none}).tools is None


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("{not json", "text that is not JSON"),
        ({"name": "x"}, "an object, not a list"),
        ([3], "tool 1 is a number"),
        ([TOOL, {}], "tool 2 is an object"),
        ([{"type": "function", "function": {"description": "nameless"}}], "tool 1 has no name"),
    ],
)
def test_tools_that_cannot_be_used_make_a_bad_row(tools: Any, says: str) -> None:
    found = to_preference(WITH_TOOLS | {"tools": tools})
    assert found.kind == "bad_tools"
    assert says in found.detail


def test_a_row_sets_variables_of_its_template() -> None:
    made = tokenizer("{{ style }}\n" + CHATML)
    found = encode(made, chat("a", "b", "c", chat_template_kwargs={"style": "short"}))
    assert made.decode(found.prompt).startswith("short\n<|im_start|>user")
    unknown = encode(made, chat("a", "b", "c", chat_template_kwargs={"tone": "dry"}))
    assert unknown.notices == [("ignored_key", "The value 'tone' of chat_template_kwargs")]
    for wrong, says in ((["x"], "a list"), ({"tokenize": True}, "tokenize cannot be set")):
        bad = to_preference(chat("a", "b", "c", chat_template_kwargs=wrong))
        assert bad.kind == "bad_template_kwargs"
        assert says in bad.detail


def test_parquet_gives_the_same_messages_as_json_lines(tmp_path: Path) -> None:
    """Arrow fills in nulls for the keys that other messages and other tools have."""
    other = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
    }
    rows = [
        WITH_TOOLS,
        _thinking("7 times 8?", ("56 it is.", "56"), ("Too hard.", "54")) | {"tools": [other | {"strict": True}]},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines, table = (read_source(FileSource(path=str(tmp_path / name))) for name in ("a.jsonl", "a.parquet"))
    for left, right in zip(lines, table, strict=True):
        assert left.fields is not None
        assert right.fields is not None
        ours, theirs = encode(QWEN3, left.fields), encode(QWEN3, right.fields)
        assert (ours.prompt, ours.chosen, ours.rejected) == (theirs.prompt, theirs.chosen, theirs.rejected)
        assert ours.notices == theirs.notices


def test_nulls_that_a_json_file_holds_in_arguments_stay(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "tide_times", "arguments": {"harbour": None}}}
    row = WITH_TOOLS | {"prompt": [ASKED[0], chat_message("assistant", "") | {"tool_calls": [call]}, ASKED[2]]}
    read = read_source(FileSource(path=write_rows(tmp_path / "a.jsonl", [row])))
    assert '"arguments": {"harbour": null}' in QWEN3.decode(encode(QWEN3, read[0].fields or {}).prompt)


PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONLY_PARTS = PARTS.replace(
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}", "{% if m['content'] is string %}{% else %}"
)


def test_text_parts_go_to_templates_that_want_them_and_are_joined_for_others() -> None:
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    row = {
        "prompt": [chat_message("user", parts)],
        "chosen": [chat_message("assistant", parts)],
        "rejected": [chat_message("assistant", [parts[0]])],
    }
    for template in (PARTS, ONLY_PARTS, CHATML, trl_template("qwen3")):
        made = tokenizer(template)
        found = encode(made, row)
        assert made.decode(found.prompt) == "<|im_start|>user\nGood day<|im_end|>\n<|im_start|>assistant\n"
        assert made.decode(found.chosen).endswith("Good day<|im_end|>\n")
        assert found.notices == []


@pytest.mark.parametrize("content", ["Good day", [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]])
def test_templates_of_multimodal_models_get_text_as_parts(content: Any) -> None:
    made = tokenizer(trl_template("smolvlm"), eos="<end_of_utterance>", more=["<end_of_utterance>"])
    row = {
        "prompt": [chat_message("user", content)],
        "chosen": [chat_message("assistant", content)],
        "rejected": [chat_message("assistant", "No")],
    }
    found = encode(made, row)
    assert made.decode(found.prompt).endswith("User: Good day<end_of_utterance>\nAssistant:")
    assert made.decode(found.chosen) == " Good day<end_of_utterance>\n"
    assert found.notices == []
    row["chosen"] = [chat_message("assistant", "Good day<end_of_utterance>\n")]
    assert encode(made, row).chosen == found.chosen


def test_prompts_differ_by_their_tool_calls_too() -> None:
    other = [ASKED[0], {"role": "assistant", "tool_calls": []}, ASKED[2]]
    assert prompt_key(ASKED) != prompt_key(other)
    assert prompt_key([chat_message("user", "a  b")]) == prompt_key([chat_message("user", "a b")])


def test_a_template_that_raises_on_a_message_is_told_with_its_reason(tmp_path: Path) -> None:
    strict = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endfor %}" + LLAMA
    path = write_rows(tmp_path / "a.jsonl", [*good_rows(9), WITH_TOOLS])
    with pytest.raises(BadData) as caught:
        prepare(data(path), saved(tokenizer(strict), tmp_path / "t"), tmp_path / "cache")
    assert f"1 row is refused by the chat template ({path}: 10). no tools here" in str(caught.value)
    wrong = "{% for m in messages if m.tool_calls %}{{ m.tool_calls|length + m.role }}{% endfor %}" + LLAMA
    with pytest.raises(BadData, match=r"TypeError: unsupported operand"):
        prepare(data(path), saved(tokenizer(wrong), tmp_path / "u"), tmp_path / "cache")
