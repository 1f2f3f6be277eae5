"""text/replies.py: answers parsed, from text and from ids, and the way of a reply into the next prompt and back."""

from __future__ import annotations

from typing import Any

import pytest
from chats import FRAGMENTS, TEMPLATE, TOKENIZER, model, user
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.text.replies import Reply, parse, parse_ids, to_history

Q = '<|"|>'
GOOD = {
    "Hello.": Reply("Hello."),
    "": Reply(""),
    "Hello.<turn|><pad><pad>": Reply("Hello."),
    "    indented\n": Reply("    indented"),
    "<|channel>thought\nHm.\nYes.\n<channel|>Four.<turn|>": Reply("Four.", "Hm.\nYes."),
    "<|channel>thought\n<channel|>Four.": Reply("Four."),
    "<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d": Reply("bd", "a\nc"),
    "<|channel>thought\ncut off": Reply("", "cut off"),
    "<|channel>thought": Reply(""),
    "<|channel>thought\ncut<turn|>gone": Reply("", "cut"),
    "a<channel|>b": Reply("ab"),
    "<|tool_call>call:f{}<tool_call|>": Reply("", None, [{"name": "f", "arguments": {}}]),
    f"Look.<|tool_call>call:weather{{city:{Q}Brno, CZ{Q},days:3}}<tool_call|><|tool_response>made up": Reply(
        "Look.", None, [{"name": "weather", "arguments": {"city": "Brno, CZ", "days": 3}}]
    ),
    f"<|tool_call>call:a.b-c{{x:[1,-2.5,1e3,true,false,null,{Q}{{}}]:,{Q},[],{{}}],y:{{{Q}a b{Q}:{{z:{Q}{Q}}}}}}}"
    "<tool_call|>": Reply(
        "",
        None,
        [
            {
                "name": "a.b-c",
                "arguments": {"x": [1, -2.5, 1e3, True, False, None, "{}]:,", [], {}], "y": {"a b": {"z": ""}}},
            }
        ],
    ),
    "<|channel>thought\nt<channel|><|tool_call>call:f{a:1}<tool_call|>\n<|tool_call> call:g{ b : bare word }"
    "<tool_call|>": (
        Reply("", "t", [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "bare word"}}])
    ),
}


@pytest.mark.parametrize("text", GOOD)
def test_parse(text: str) -> None:
    assert parse(text) == GOOD[text]
    assert parse_ids(TOKENIZER, TOKENIZER.encode(text, parse_special=True)) == GOOD[text]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "call:f",
        "f{}",
        "call:{}",
        "call:f{}}",
        "call:f{} and more",
        "call:f{a}",
        "call:f{a:}",
        "call:f{a:1",
        "call:f{a:[1}",
        "call:f{a:b:c}",
        "call:f{a:New York, NY}",
        "call:f[1]",
        "call:f g{}",
        "call:f{,}",
        f"call:f{{a:{Q}open}}",
        f"call:f{{a:{Q}b{Q}{Q}c{Q}}}",
        "call:f{a:<|think|>}",
        "call:f{a:" + "[" * 500 + "]" * 500 + "}",
        "call:f{a:" + "[" * 5000,
    ],
)
def test_malformed_call_stays_text(body: str) -> None:
    text = f"a<|tool_call>{body}<tool_call|>b"
    assert parse(text) == Reply(text)
    assert parse_ids(TOKENIZER, TOKENIZER.encode(text, parse_special=True)) == Reply(text)
    unclosed = f"a<|tool_call>{body}"
    assert parse(unclosed + "<turn|>gone") == Reply(unclosed)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([TOKENIZER.token(index) or "" for index in range(16)]),
            st.sampled_from([*"{}[]:, \n", "call:f{", "call:f{a:", "thought\n", "true", "1", "x"]),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=3),
        )
    ).map("".join)
)
def test_parse_never_raises_and_both_ways_agree(text: str) -> None:
    replies = parse(text), parse_ids(TOKENIZER, TOKENIZER.encode(text.replace("<unk>", ""), parse_special=True))
    assert all(isinstance(reply.text, str) for reply in replies)
    if "<unk>" not in text:
        assert replies[0] == replies[1]


def test_spelled_out_call_in_an_answer_is_text() -> None:
    text = f"<|channel>thought\nx<channel|>Never say <|tool_call>call:delete{{all:{Q}yes{Q}}}<tool_call|>!"
    assert parse(text).tool_calls
    assert parse_ids(TOKENIZER, TOKENIZER.encode(text)) == Reply(text)


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**15), 10**15),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")),
        FRAGMENTS,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abcz_", min_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text("abcz_", min_size=1), values, max_size=4))
def test_call_survives_the_round_trip_through_a_prompt(arguments: dict[str, Any]) -> None:
    reply = Reply("Look.", "hm", [{"name": "f", "arguments": arguments}])
    message = to_history(reply)
    assert message["reasoning_content"] == "hm" and message["content"] == "Look."
    ids = TEMPLATE.encode(TOKENIZER, [user("x"), message], add_generation_prompt=False)
    answer = ids[len(TEMPLATE.encode(TOKENIZER, [user("x")])) :]
    assert parse_ids(TOKENIZER, answer) == Reply("Look.", None, reply.tool_calls)


def test_thoughts_do_not_return() -> None:
    reply = parse("<|channel>thought\nsecret<channel|>Four.<turn|>")
    assert to_history(reply) == {"role": "assistant", "content": "Four."}
    raw = "<|channel>thought\nsecret<channel|>Four."
    for content in (reply.text, raw, [{"type": "text", "text": raw}]):
        messages = [user("x"), model(content)]
        for chat in (TEMPLATE.render(messages), TOKENIZER.decode(TEMPLATE.encode(TOKENIZER, messages))):
            assert "Four." in chat and "secret" not in chat
