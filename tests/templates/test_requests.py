"""templates/requests.py and templates/interface.py: requests are values, and every model offers the same methods."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sfumato import LLM, Options, Slot
from sfumato.errors import InputError
from sfumato.events import Done
from sfumato.model.prompt import Prompt
from sfumato.templates.requests import Chat, Complete, Decide, Edit, Fill, Infill, Query

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
    Decide(USER, {"a": ["1", "2"]}, options=ONE),
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: type(query).__name__)
def test_a_request_crosses_to_another_process_and_cannot_be_changed(query: Query) -> None:
    assert pickle.loads(pickle.dumps(query)) == query
    with pytest.raises(AttributeError):
        query.options = ONE  # type: ignore[misc]


def test_any_request_runs_as_its_method_does(llm: LLM) -> None:
    one, three = QUERIES[0].options, QUERIES[1].options
    assert llm.run(Complete("1 2", one)).text == llm.complete("1 2", one).text
    assert llm.run(Chat(USER, options=three)).text == llm.chat(USER, options=three).text
    assert llm.run(Infill("1", "2", 1, options=ONE)).values == llm.infill("1", "2", 1, ONE).values
    assert llm.run(Edit("123", spans=[(0, 1)], options=ONE)).text == llm.edit("123", spans=[(0, 1)], options=ONE).text
    template: list[str | Slot] = ["1", Slot("x", length=1)]
    assert llm.run(Fill(template, USER, ONE)).text == llm.fill(template, USER, ONE).text
    fields = {"a": ["1", "2"]}
    assert llm.run(Decide(USER, fields, options=ONE)) == llm.decide(USER, fields, options=ONE)


def test_token_ids_and_prompts_are_completed(llm: LLM) -> None:
    ids = llm.tokenizer.encode("1 2", bos=True)
    prompt = llm.encode("1 2")
    assert list(prompt) == ids and len(prompt) == len(ids) and prompt == Prompt.of(ids)
    for same in (ids, prompt, "1 2"):
        done = list(llm.stream(same, QUERIES[0].options))[-1]
        assert isinstance(done, Done) and done.text == llm.run(Complete(ids, QUERIES[0].options)).text


def test_what_is_no_request_is_refused(llm: LLM) -> None:
    with pytest.raises(InputError, match=r"there is no request 'sing'; there are Chat, Complete, Infill, Fill, Edit"):
        llm.run("sing")  # type: ignore[arg-type]


def test_constraints_that_are_not_compiled_make_a_request_slow(llm: LLM) -> None:
    regex = Complete("1", Options(regex="[0-9]{7}", seed=1))
    slot = Fill([Slot(regex="[0-9]{6}")], options=ONE)
    assert llm.must_compile(regex) and llm.must_compile(slot)
    llm.run(regex), llm.run(slot)
    assert not llm.must_compile(regex) and not llm.must_compile(slot)
    assert llm.must_compile(Chat(USER, options=Options(strict=True))) and not llm.must_compile(Complete("1"))


def test_requests_and_the_protocol_import_no_torch() -> None:
    code = "import sys, sfumato.templates.requests, sfumato.templates.interface; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
