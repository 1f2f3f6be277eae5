"""templates/requests.py and templates/interface.py: queries are values, and every model offers the same methods."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from sfumato import LLM, Choice, Options, Slot
from sfumato.engine.plan import Plan
from sfumato.errors import InputError
from sfumato.events import Done, TokenCount
from sfumato.model.prompt import Prompt
from sfumato.templates.requests import Chat, Complete, CountTokens, Decide, Edit, Fill, Infill, Query, QueryFor

if TYPE_CHECKING:  # what mypy checks; nothing runs
    from sfumato.remote import Remote
    from sfumato.templates.interface import LanguageModel

    def models(llm: LLM, remote: Remote) -> list[LanguageModel]:
        return [llm, remote]


ONE = Options(seed=1, max_steps=1)
USER = [{"role": "user", "content": "1 2 3"}]
QUERIES: list[Query] = [
    Complete("1 2", Options(seed=1, max_tokens=5)),
    Chat(USER, options=Options(seed=1, max_tokens=5, drafts=True)),
    Infill("1", "2", 1, options=ONE),
    Edit("123", spans=[(0, 1)], options=ONE),
    Fill(["1", Slot("x", length=1)], USER, ONE),
    Decide(USER, {"a": Choice(["1", "2"])}, options=ONE),
    CountTokens(Complete("1 2")),
]


@dataclass(frozen=True)
class Repeat(QueryFor[str]):
    """A further kind of query: a text, so often continued."""

    text: str
    times: int
    options: Options = Options(seed=1, max_tokens=5)  # noqa: RUF009 - frozen


class RepeatPlanner:
    """Plans of the further kind: `LLM.planner.plan`, and one case more."""

    def __init__(self, llm: LLM) -> None:
        self.plain, self.planner = llm.planner.plan, llm.planner

    def plan(self, query: QueryFor[Any]) -> Plan[Any]:
        return self.repeat(query) if isinstance(query, Repeat) else self.plain(query)

    def repeat(self, query: Repeat) -> Plan[str]:
        text = query.text
        for _ in range(query.times):
            completion = yield from self.planner.answer(Complete(text, query.options))
            text += completion.text
        return text


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: type(query).__name__)
def test_a_query_crosses_to_another_process_and_cannot_be_changed(query: Query) -> None:
    assert pickle.loads(pickle.dumps(query)) == query
    with pytest.raises(AttributeError):
        query.options = ONE  # type: ignore[misc]


@pytest.mark.parametrize(
    ("query", "beginning"),
    list(zip(QUERIES, ["1 2", USER, "1", "123", USER, USER, "1 2"], strict=True)),
    ids=lambda value: type(value).__name__,
)
def test_a_query_says_what_the_model_reads_first(query: Query, beginning: object) -> None:
    assert query.beginning == beginning


def test_a_template_alone_and_token_ids_begin_a_query_too() -> None:
    assert Fill(["1", Slot("x")]).beginning == ["1", Slot("x")]
    assert Complete([1, 2]).beginning == Complete(Prompt((1, 2))).beginning == [1, 2]


def test_a_further_kind_of_query_is_its_class_and_its_plan(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.planner, "plan", RepeatPlanner(llm).plan)
    options = Repeat("", 0).options
    once = llm.complete("1 2", options=options).text
    assert llm.run(Repeat("1 2", 0)) == "1 2"
    assert llm.run(Repeat("1 2", 1)) == "1 2" + once
    assert llm.run(Repeat("1 2", 2)) == "1 2" + once + llm.complete("1 2" + once, options=options).text
    assert pickle.loads(pickle.dumps(Repeat("1 2", 2))) == Repeat("1 2", 2)
    assert not llm.must_compile(Repeat("1 2", 2)) and llm.must_compile(Repeat("1", 1, Options(strict=True)))
    assert list(Repeat("1 2", 2).beginning) == []


def test_a_plan_that_asks_for_nothing_is_one_clear_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(query: Any) -> Plan[None]:
        yield []

    monkeypatch.setattr(llm.planner, "plan", empty)
    with pytest.raises(InputError, match="there are 0 prompts to run; give at least one"):
        llm.run(Repeat("1", 1))


def test_any_query_runs_as_its_method_does(llm: LLM) -> None:
    one, three = QUERIES[0].options, QUERIES[1].options
    assert llm.run(Complete("1 2", one)).text == llm.complete("1 2", options=one).text
    assert llm.run(Chat(USER, options=three)).text == llm.chat(USER, options=three).text
    assert llm.run(Infill("1", "2", 1, options=ONE)).values == llm.infill("1", "2", 1, options=ONE).values
    assert llm.run(Edit("123", spans=[(0, 1)], options=ONE)).text == llm.edit("123", spans=[(0, 1)], options=ONE).text
    template: list[str | Slot] = ["1", Slot("x", length=1)]
    assert llm.run(Fill(template, USER, ONE)).text == llm.fill(template, USER, options=ONE).text
    fields = {"a": Choice(["1", "2"], "a")}
    decided = llm.run(Decide(USER, fields, options=Options(seed=1)))
    assert decided.answers == llm.decide(USER, {"a": ["1", "2"]}, seed=1).answers


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
OPENED = [*USER, {"role": "assistant", "content": "1 2"}]


@pytest.mark.parametrize(
    "query",
    [
        Complete("1 2", ONE),
        Complete([2, 5, 7], ONE),
        Chat(USER, options=ONE),
        Chat(USER, [TOOL], replace(ONE, thinking=True)),
        Chat(USER, [TOOL], replace(ONE, must_call=True)),
        Chat(OPENED, None, ONE, is_continued=True),
    ],
)
def test_a_count_is_of_the_prompt_that_is_answered(llm: LLM, query: Complete | Chat) -> None:
    answer = llm.run(replace(query, options=replace(query.options, max_tokens=9)))
    assert llm.run(CountTokens(query)) == TokenCount(answer.usage.prompt_tokens)
    assert not llm.must_compile(CountTokens(query))


def test_a_last_message_of_the_assistant_is_gone_on_from(llm: LLM) -> None:
    encode = llm.planner.prompts.encode
    assert list(encode(OPENED, None, False, True)) == [*encode(USER), *llm.tokenizer.encode("1 2")]
    stray = [*USER, {"role": "assistant", "content": "1 <turn|> 2"}]
    assert list(encode(stray, None, False, True)) == [*encode(USER), *llm.tokenizer.encode("1 <turn|> 2")]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        (Chat(USER, is_continued=True), "is_continued needs a last message of the assistant"),
        (Chat([*USER, {"role": "assistant", "content": ""}], is_continued=True), "is_continued needs"),
        (Chat(OPENED, None, Options(thinking=True), True), "thinking cannot go with an answer that has begun"),
        (Chat(OPENED, [TOOL], Options(must_call=True), True), "must_call cannot go with an answer that has begun"),
        (CountTokens(Infill("1", "2")), "the query is"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_continued_or_counted_is_refused(llm: LLM, query: QueryFor[Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        llm.run(query)


def test_token_ids_and_prompts_are_completed(llm: LLM) -> None:
    ids = llm.tokenizer.encode("1 2", bos=True)
    prompt = llm.encode("1 2")
    assert list(prompt) == ids and len(prompt) == len(ids) and prompt == Prompt.of(ids)
    options = QUERIES[0].options
    streams = [llm.stream(same, options=options) for same in (ids, prompt)] + [llm.stream(Complete("1 2", options))]
    for stream in streams:
        done = list(stream)[-1]
        assert isinstance(done, Done) and done.text == llm.run(Complete(ids, options)).text


def test_what_is_no_query_is_refused(llm: LLM) -> None:
    with pytest.raises(
        InputError,
        match=r"there is no request 'sing'; there are Chat, .*, Edit, Decide, Likelihood, CountTokens",
    ):
        llm.run("sing")  # type: ignore[arg-type]


def test_constraints_that_are_not_compiled_make_a_query_slow(llm: LLM) -> None:
    regex = Complete("1", Options(regex="[0-9]{7}", seed=1))
    slot = Fill([Slot(regex="[0-9]{6}")], options=ONE)
    assert llm.must_compile(regex) and llm.must_compile(slot)
    llm.run(regex), llm.run(slot)
    assert not llm.must_compile(regex) and not llm.must_compile(slot)
    assert llm.must_compile(Chat(USER, options=Options(strict=True))) and not llm.must_compile(Complete("1"))
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}]
    calls = Chat(USER, tools, Options(strict=True, seed=1, max_tokens=20))
    assert llm.must_compile(calls) and not llm.must_compile(Chat(USER, tools))
    llm.run(calls)
    assert not llm.must_compile(calls)


def test_queries_and_the_protocol_import_no_torch() -> None:
    code = "import sys, sfumato.templates.requests, sfumato.templates.interface; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("state", "is_conversation"),
    [
        (USER, True),
        (USER[0], True),
        ([{"role": "assistant", "tool_calls": []}], True),
        ([{"role": "user"}], True),  # a message that lacks its text, which is said
        ({"role": "engineer", "name": "Ann"}, False),
        ([{"role": "admin", "name": "Ann"}, USER[0]], False),
        ([{"role": ["user"]}], False),
    ],
)
def test_a_record_with_a_role_is_a_message_only_if_it_looks_like_one(state: Any, is_conversation: bool) -> None:
    assert (Decide(state, {"a": ["1", "2"]}).conversation is not None) is is_conversation  # type: ignore[dict-item]
