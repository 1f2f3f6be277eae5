"""text/messages.py: what passes the check has the shape templates expect; what does not is named."""

from __future__ import annotations

from typing import Any

import pytest
from chats import CLOCK, TEMPLATE, TOKENIZER, Message, call, model, user

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


def test_keys_that_no_template_knows_are_left_out() -> None:
    odd: Message = {"refusal": None, "audio": object(), "annotations": [], "metadata": {"a": 1}, "images": []}
    answer: Message = {"role": "assistant", "content": None, "reasoning": "hm", "reasoning_details": [{"text": "hm"}]}
    assert check_messages([user("x") | odd, answer | odd]) == [
        user("x"),
        {"role": "assistant", "content": "", "reasoning": "hm", "reasoning_content": "hm"},
    ]
    for key in ("reasoning_content", "reasoning", "thinking"):
        assert check_messages([model("x", **{key: "hm"})])[0]["reasoning_content"] == "hm"
        assert "reasoning_content" not in check_messages([model("x", **{key: None})])[0]
        assert check_messages([user("x") | {key: "hm"}]) == [user("x")]
    parts = [{"type": "text", "text": "a", "cache_control": {}}, {"type": "refusal", "refusal": "b"}]
    assert check_messages([user(parts)]) == [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]


def results(calls: list[tuple[str | None, str]], *answers: Message) -> list[tuple[Any, Any, Any]]:
    """Of each result the content, its name, and the name of the call whose id it has."""
    named = [{"function": {"name": name, "arguments": {}}} | ({"id": id} if id else {}) for id, name in calls]
    _, request, *rest = check_messages([user("x"), model("", *named), *({"role": "tool"} | one for one in answers)])
    names = {one.get("id"): one["function"]["name"] for one in request["tool_calls"]}
    assert len({one.get("id") for one in request["tool_calls"]} - {None}) == sum(
        "id" in c for c in request["tool_calls"]
    )
    return [(one["content"], one.get("name"), names.get(one.get("tool_call_id"))) for one in rest]


def test_results_go_to_their_calls_however_ids_are_lost() -> None:
    one, two = {"content": "1"}, {"content": "2"}
    both = [("1", "f", "f"), ("2", "g", "g")]
    assert results([(None, "f"), (None, "g")], one, two) == both
    assert results([(None, "g"), (None, "f")], one | {"name": "f"}, two | {"name": "g"}) == both
    assert results([("b", "g"), ("a", "f")], one | {"tool_call_id": "a"}, two | {"tool_call_id": "b"}) == both
    assert results([("a", "f"), ("a", "g")], one | {"tool_call_id": "a"}, two | {"tool_call_id": "a"}) == both
    assert results([("a", "f")], one | {"tool_call_id": "lost"}) == [("1", "f", "f")]
    assert results([("a", "f"), ("b", "g")], one | {"tool_call_id": "lost"}) == [("1", None, None)]


def test_thoughts_in_parts_of_an_answer_are_thoughts() -> None:
    for part in (
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "reasoning", "text": "hm"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
    ):
        [message] = check_messages([model([part, {"type": "text", "text": "x"}])])
        assert (message["content"], message["reasoning"]) == ([{"type": "text", "text": "x"}], "hm")
    assert "reasoning" not in check_messages([model([{"type": "redacted_thinking", "data": "x"}])])[0]
    with pytest.raises(InputError, match="only text parts"):
        check_messages([user([{"type": "thinking", "thinking": "hm"}])])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        (None, {}),
        ("{}", {}),
        ('"{\\"a\\": 1}"', {"a": 1}),
        ("{", "{"),
        ('{"a": 1', '{"a": 1'),
        ("a: 1", "a: 1"),
        ("[1]", "[1]"),
        ("5", "5"),
        ("null", "null"),
        ("[" * 10_000, "[" * 10_000),
    ],
)
def test_arguments_that_are_no_record_are_passed_as_text(arguments: Any, expected: Any) -> None:
    history = [user("?"), model("", {"function": {"name": "f", "arguments": arguments}}), tool("done"), user("!")]
    assert check_messages(history)[1]["tool_calls"][0]["function"]["arguments"] == expected
    assert "call:f{" + (expected if isinstance(expected, str) else "") in TEMPLATE.render(history)
    assert TEMPLATE.encode(TOKENIZER, history)


def tool(content: Any, **more: Any) -> Message:
    return {"role": "tool", "content": content, **more}


def links(messages: list[Message]) -> list[tuple[Any, Any]]:
    """The id and the name of each result."""
    checked = check_messages(messages)
    return [(message.get("tool_call_id"), message.get("name")) for message in checked if message["role"] == "tool"]


def test_a_result_without_an_id_answers_the_open_call() -> None:
    bare = {"name": "clock", "arguments": {}}
    f, g = call("f", "a"), call("g", "b")
    assert links([user("?"), model("", f), tool("1")]) == [("a", "f")]
    assert links([user("?"), model("", f), tool("1", tool_call_id="")]) == [("a", "f")]
    assert links([user("?"), model("", f), tool("1", tool_call_id="a", name="other")]) == [("a", "other")]
    assert links([user("?"), model("", bare), tool("1")]) == [("call_2", "clock")]
    assert links([user("?"), model("", f, g), tool("1", tool_call_id="b"), tool("2")]) == [("b", "g"), ("a", "f")]
    assert links([user("?"), model("", f, g), tool("1"), tool("2")]) == [("a", "f"), ("b", "g")]
    assert links([user("?"), model("", f, g), tool("1", name="g"), tool("2")]) == [("b", "g"), ("a", "f")]
    assert links([user("?"), model("", f, g), tool("1", tool_name="g")]) == [("b", "g")]
    assert links([user("?"), model("", f), tool("1"), model("", g), tool("2")]) == [("a", "f"), ("b", "g")]
    assert links([user("?"), model("", f), user("!"), tool("1")]) == [(None, None)]
    assert links([user("?"), model("", f), tool("1", tool_call_id="z")]) == [("a", "f")]
    old = [user("?"), model(None, function_call=bare | {"arguments": "{}"}), {"role": "function", "content": "1"}]
    assert links(old) == [("call_2", "clock")]
    rendered = TEMPLATE.render([user("?"), model("", bare), tool("noon")])
    assert rendered.endswith('<|tool_response>response:clock{value:<|"|>noon<|"|>}<tool_response|>')
    assert TEMPLATE.render([user("?"), model("", call("clock")), tool(None, tool_call_id="1")])


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
        ([{1: 2}], "role None"),
        ([user("x") | {"content": None}], "message 0 (user) has no content"),
        ([user("x") | {"images": ["iVBO"]}], "holds images; Sfumato reads text only"),
        ([user("x") | {"tool_calls": []}], "only an assistant calls tools"),
        ([model("x") | {"tool_calls": {}}], "tool_calls of type dict"),
        ([model("x") | {"tool_calls": ["f"]}], "tool call 0 of message 0"),
        ([model("x") | {"tool_calls": [{"function": {"arguments": {}}}]}], "tool call 0 of message 0"),
        ([model("x") | {"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}], "type list"),
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
