"""Decisions from any server that speaks System One: ours in one request, whatever its questions depend on.

Another's server knows no `x_depends_on`. It is asked in waves, and told in a question what the answer before it was.
"""

from __future__ import annotations

import time
from dataclasses import replace

from sfumato.errors import InputError
from sfumato.events import Decision, Decisions, Usage
from sfumato.questions import Question
from sfumato.remote.bodies import DECISIONS
from sfumato.remote.host import Host
from sfumato.templates.requests import Decide
from sfumato.templates.systemone import body_of, decisions_of
from sfumato.templates.waves import Waves, answer_sentence


def decide(host: Host, model: str, query: Decide, is_sfumato: bool) -> Decisions:
    """The decisions of a query; InputError for an answer that no server of System One gives."""
    has_dependencies = any(question.depends_on is not None for question in query.questions.values())
    is_one = is_sfumato or not has_dependencies
    return _decide(host, model, query, is_sfumato) if is_one else _in_waves(host, model, query)


def _decide(host: Host, model: str, query: Decide, is_sfumato: bool) -> Decisions:
    """One request."""
    body, began = {"model": query.options.adapter or model} | body_of(query, is_sfumato), time.perf_counter()
    answer = host.json("POST", DECISIONS, body)
    try:
        return decisions_of(query, answer, time.perf_counter() - began)
    except InputError:
        raise
    except ValueError as error:
        raise host.unlike("a System One server", str(error)) from None


def _in_waves(host: Host, model: str, query: Decide) -> Decisions:
    """A request for the questions that depend on nothing, then one for those that depend on these, and so on."""
    waves, usages, seed = Waves(query.questions), list[Usage](), query.options.seed or 0
    while wave := waves.next():
        questions = {id: _with_answer(question, query, waves.answers) for id, question in wave.items()}
        decisions = _decide(host, model, replace(query, questions=questions), False)
        waves.answers |= decisions.answers
        usages.append(decisions.usage)
        seed = decisions.seed
    return waves.decisions(usages, seed)


def _with_answer(question: Question, query: Decide, answers: dict[str, Decision]) -> Question:
    """The question without what it depends on, which its instructions say instead."""
    above = question.depends_on
    if above is None:
        return question
    lead = answer_sentence(query.questions[above.id], answers[above.id])
    own = question.instructions
    instructions = f"{lead}{own}" if isinstance(own, str) else lead if own is None else [lead, own]
    return replace(question, instructions=instructions, depends_on=None)
