"""text/messages.py: what passes the check has the shape templates expect; what does not is named."""

from __future__ import annotations

from typing import Any

import pytest
from chats import CLOCK, TEMPLATE, TOKENIZER, model, user

from sfumato.errors import InputError
from sfumato.text.messages import check_messages, check_tools


def test_checked_messages_are_the_shape_templates_expect() -> None:
    string = {"function": {"name": "f", "arguments": '{"a": [1, "x"]}'}}
    empty = {"function": {"name": "g", "arguments": ""}}
    two = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    checked = check_messages(
        [{"role": "developer", "content": two}, {"role": "assistant", "tool_calls": [string, empty]}, user(two)]
    )
    assert checked[0] == {"role": "system", "content": "a\nb"}
    assert [one["function"]["arguments"] for one in checked[1]["tool_calls"]] == [{"a": [1, "x"]}, {}]
    assert checked[1]["content"] == "" and checked[2]["content"] == two
    assert string["function"]["arguments"] == '{"a": [1, "x"]}'
    assert check_tools(None) == []


DEEP: Any = []
for _ in range(100):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "at least one"),
        ("hello", "at least one"),
        ({"role": "user"}, "at least one"),
        (["hello"], "message 0 is str"),
        ([user("a"), {"content": "x"}], "message 1 has the role None; the roles are system, user, assistant, tool"),
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([{"role": ["user"], "content": "x"}], "role"),
        ([user(7)], "message 0 has content of type int"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "'image_url'; Sfumato reads text only"),
        ([user([{"type": "image"}])], "message 0 holds a part of type 'image'"),
        ([user([{"type": "input_audio"}])], "'input_audio'"),
        ([user([{"type": "text"}])], "only text parts"),
        ([user(["x"])], "only text parts"),
        ([user(DEEP)], "nests more than"),
        ([user(object())], "holds a object"),
        ([{1: 2}], "the key 1"),
        ([user("x") | {"tool_calls": []}], "only an assistant calls tools"),
        ([model("x") | {"tool_calls": {}}], "tool_calls of type dict"),
        ([model("x") | {"tool_calls": ["f"]}], "tool call 0 of message 0"),
        ([model("x") | {"tool_calls": [{"function": {"arguments": {}}}]}], "tool call 0 of message 0"),
        ([model("x") | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "no JSON: '{'"),
        ([model("x") | {"tool_calls": [{"function": {"name": "f", "arguments": "[" * 10_000}}]}], "no JSON"),
        ([model("x") | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}], "type list"),
    ],
)
def test_bad_messages(messages: Any, why: str) -> None:
    for attempt in (TEMPLATE.render, lambda messages: TEMPLATE.encode(TOKENIZER, messages)):
        with pytest.raises(InputError) as caught:
            attempt(messages)
        assert why in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "why"),
    [
        ({"name": "f"}, "must be a list"),
        ([7], "tool 0 is not"),
        ([{"type": "function"}], "tool 0 is not"),
        ([CLOCK, {"function": {"name": ""}}], "tool 1 is not"),
        ([{"name": "f", "parameters": "none"}], r"tool 0 \(f\) has parameters"),
    ],
)
def test_bad_tools(tools: Any, why: str) -> None:
    with pytest.raises(InputError, match=why):
        TEMPLATE.render([user("x")], tools)
