"""text/replies.py: answers parsed, whole and however they come; and the way of a call into the next prompt and back."""

from __future__ import annotations

import time
from typing import Any

import pytest
from chats import FRAGMENTS, TEMPLATE, TOKENIZER, call, model, user
from hypothesis import given, settings
from hypothesis import strategies as st
from quoted_replies import CALLS
from raw_replies import ANSWERS, BLOCKS, CLOSE, OPEN, TOOLS

from sfumato.text.replies import Reply, ReplyParser, parse_ids

Q = '<|"|>'


def encoded(text: str) -> list[int]:
    return TOKENIZER.encode(text.replace("§", Q), parse_special=True)


def joined(parts: list[list[int]], tools: Any = TOOLS) -> Reply:
    """What a parser gives away, joined, when the tokens come in these parts."""
    parser = ReplyParser(TOKENIZER, tools=tools)
    replies = []
    for part in parts:
        parser.push(part)
        replies.append(parser.take())
    replies.append(parser.finish())
    thought = "".join(reply.thought or "" for reply in replies) or None
    return Reply("".join(reply.text for reply in replies), thought, [c for reply in replies for c in reply.tool_calls])


def check(raw: str, expected: Reply) -> None:
    """Whole, token by token, and split at every position."""
    ids = encoded(raw)
    reply = parse_ids(TOKENIZER, ids, TOOLS)
    assert reply == expected, raw
    assert repr(reply.tool_calls) == repr(expected.tool_calls), raw  # 1 is not 1.0
    assert joined([[index] for index in ids]) == expected, raw
    if len(ids) < 200:
        for at in range(1, len(ids)):
            assert joined([ids[:at], ids[at:]]) == expected, (raw, at)


@pytest.mark.parametrize("kind", [*BLOCKS, *CALLS])
def test_calls_of_every_kind_are_read(kind: str) -> None:
    for body, calls in (BLOCKS | CALLS)[kind]:
        text = f"a{OPEN}{body}{CLOSE}b"
        if calls is None:
            check(text, Reply(f"a{body.replace('§', chr(34))}b"))
            continue
        named = [("f", calls)] if isinstance(calls, dict) else calls
        check(text, Reply("ab", None, [{"name": name, "arguments": arguments} for name, arguments in named]))


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_of_every_kind_are_read(kind: str) -> None:
    for raw, reply in ANSWERS[kind]:
        check(raw, reply)


def test_the_table_is_long_enough() -> None:
    bodies = {body for kind in BLOCKS.values() for body, _ in kind}
    assert len(bodies) + len({raw for kind in ANSWERS.values() for raw, _ in kind}) >= 250


PIECES = [TOKENIZER.token(index) or "" for index in range(16)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([*PIECES, OPEN, CLOSE, Q, "<|channel>", "<channel|>"]),
            st.sampled_from([*"{}[]():=,'\"\\ \n", "call:f{", "call:f{a:", "thought\n", "model\n", "true", "1", "x"]),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=3),
        ),
        max_size=20,
    ).map("".join),
    st.integers(1, 5),
)
def test_however_an_answer_comes_the_reply_is_the_same(text: str, size: int) -> None:
    ids = TOKENIZER.encode(text.replace("<unk>", ""), parse_special=True)
    reply = parse_ids(TOKENIZER, ids, TOOLS)
    assert joined([ids[at : at + size] for at in range(0, len(ids), size)]) == reply
    written = [index for index in ids if index not in TOKENIZER.special_ids]
    if TOKENIZER.special_ids.isdisjoint(TOKENIZER.encode(TOKENIZER.decode(written), parse_special=True)):
        control = {TOKENIZER.token(index) for index in TOKENIZER.special_ids}
        shown = [reply.text, reply.thought or "", repr(reply.tool_calls)]
        assert not any(mark in part for mark in control for part in shown if mark)


def test_spelled_out_call_in_an_answer_is_text() -> None:
    text = f"<|channel>thought\nx<channel|>Never say <|tool_call>call:delete{{all:{Q}yes{Q}}}<tool_call|>!"
    assert parse_ids(TOKENIZER, TOKENIZER.encode(text, parse_special=True)).tool_calls
    assert parse_ids(TOKENIZER, TOKENIZER.encode(text)) == Reply(text)
    text = "<|tool_call>"  # quoted within an argument
    answer = [*encoded(f"{OPEN}call:f{{a:§"), *TOKENIZER.encode(text), *encoded(f"§}}{CLOSE}")]
    assert parse_ids(TOKENIZER, answer) == Reply("", None, [{"name": "f", "arguments": {"a": text}}])


@pytest.mark.parametrize(
    ("prompt", "raw", "reply"),
    [
        ("<|turn>model\n<|channel>thought\n", "hm<channel|>Four.", Reply("Four.", "hm")),
        ("<|turn>model\n<|channel>thought\n", "thought\nhm<channel|>Four.", Reply("Four.", "thought\nhm")),
        ("<|turn>model\n<|channel>thought", "\nhm<channel|>Four.", Reply("Four.", "hm")),
        ("<|turn>model\n<|channel>", "thought\nhm<channel|>Four.", Reply("Four.", "hm")),
        ("<|turn>model\n<|channel>thought\nSo far", " so good", Reply("", " so good")),
        (
            "<|turn>model\n<|channel>thought\n",
            f"hm{OPEN}call:f{{}}{CLOSE}",
            Reply("", "hm", [{"name": "f", "arguments": {}}]),
        ),
        ("<|turn>model\n<|channel>thought\n<channel|>", "thought\nhm", Reply("thought\nhm")),
        ("<|turn>model\n", "Four.", Reply("Four.")),
        ("<|channel>thought\nold<channel|><|turn>model\n", "Four.", Reply("Four.")),
    ],
)
def test_an_answer_goes_on_in_the_thought_that_its_prompt_leaves_open(prompt: str, raw: str, reply: Reply) -> None:
    parser = ReplyParser(TOKENIZER, prompt=encoded(prompt))
    parser.push(encoded(raw))
    assert parser.finish() == reply


HOSTILE = {
    "openers": OPEN,
    "thoughts": "<|channel>",
    "thoughts and calls": f"<|channel>thought\n{OPEN}call:f{{",
    "calls in thoughts": f"{OPEN}call:f{{{CLOSE}<channel|><|channel>",
    "records": f"{OPEN}call:f" + "{a:{",
    "braces": "{",
    "lists": "[a,",
    "call:": "call:",
    "call:f{": "call:f{",
    "call f ": "call f ",
    "marks": "§",
    "marked pairs": "a:§x,",
    "marks and names": "§x ",
    "threefold quotes": '"""a',
    "declared pairs": 'zip:"x, zip:',
    "declared quotes": '", zip:"',
    "double quotes": '"',
    "opened quotes": ':"x ',
    "single quotes": "'a:",
    "backslashes": '\\"',
    "commas": ",",
    "commas and spaces": ", ",
    "line breaks": "\n",
    "spaces": " ",
    "colons": "a:",
    "keys": "a:b\n",
    "equals": "a=",
    "digits": "9",
    "JSON": '{"name":"f","arguments":{"a":',
    "turns": "<|turn>model\n",
    "closers": CLOSE,
    "fences": "```",
}


BEGINNINGS = ["", "call:f{a:", "call:f{a:§", 'call:f{"a": "', "call:f(a=", '{"name":']
WITHIN = ["", *(OPEN + beginning for beginning in BEGINNINGS)]


def seconds_of(text: str) -> float:
    """Processor time to parse this much of an answer, canvas by canvas."""
    ids, end = encoded(text), encoded(f"{CLOSE}<turn|>")
    before = time.thread_time()
    parser = ReplyParser(TOKENIZER, tools=TOOLS)
    for at in range(0, len(ids), 256):
        parser.push(ids[at : at + 256])
        parser.take()
    parser.push(end)
    parser.finish()
    return time.thread_time() - before


def check_growth(piece: str, before: str, size: int) -> None:
    """Four times as much takes about four times as long, where a square would take 16 times."""
    for _ in range(5):
        small, large = (seconds_of(before + piece * (length // len(piece))) for length in (size, 4 * size))
        if large < 8 * small:
            return
    raise AssertionError(f"{piece!r} behind {before!r}: {small:.3f} s, then {large:.3f} s")


@pytest.mark.parametrize("piece", HOSTILE)
def test_reading_is_linear(piece: str) -> None:
    check_growth(HOSTILE[piece], f"{OPEN}call:f{{a:", 2000)


@pytest.mark.slow
@pytest.mark.parametrize("before", WITHIN)
@pytest.mark.parametrize("piece", HOSTILE)
def test_reading_200_kb_of_anything_is_linear(piece: str, before: str) -> None:
    check_growth(HOSTILE[piece], before, 50_000)


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
    history = [user("x"), model("Look.", call("f", **arguments), reasoning_content="hm")]
    ids = TEMPLATE.encode(TOKENIZER, history, add_generation_prompt=False)
    answer = ids[len(TEMPLATE.encode(TOKENIZER, [user("x")])) :]
    assert parse_ids(TOKENIZER, answer) == Reply("Look.", None, [{"name": "f", "arguments": arguments}])


def test_thoughts_do_not_return() -> None:
    raw = "<|channel>thought\nsecret<channel|>Four."
    for content in ("Four.", raw, [{"type": "text", "text": raw}]):
        messages = [user("x"), model(content)]
        for chat in (TEMPLATE.render(messages), TOKENIZER.decode(TEMPLATE.encode(TOKENIZER, messages))):
            assert "Four." in chat and "secret" not in chat
