"""System One's records, which is how typed questions and their answers are written as JSON: both ways.

A server and the command line read a request (`decide_of`) and write its answers (`answers_of`); a client writes the
request (`body_of`) and reads the answers (`decisions_of`). What is ours alone has a name that begins with `x_`, which
other servers and clients pass over. Nothing here knows HTTP or imports torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sfumato.errors import InputError
from sfumato.events import Decision, Decisions, Usage
from sfumato.options import Options
from sfumato.questions import OWN, TYPES, Choice, Noul, Question, Score, Span, record_of, state_text
from sfumato.templates.decisions import decision_of
from sfumato.templates.requests import Decide

JEV = ("jev-latest", "jev-preview")
"""Names that TypeSafe's clients ask for by default; the model is meant where nothing else here is called so."""

READING = ("steps", "samples", "canvas", "think", "threshold", "calibrated")
"""Fields of `Decide` that a request may have, each behind `x_`."""

DEFAULT_SEED = 0
"""The seed of a request that names none: the same request has the same answer."""

SLACK = 0.02
"""How far from 1 the probabilities of another's answer may add up: they may be rounded."""

_COST = {"cached_tokens": "reused_tokens", "canvases": "canvases", "steps": "steps", "passes": "passes"}
"""What a request took besides, by its name in the answer."""


# ---- a request ------------------------------------------------------------------------------------------------------


def decide_of(body: Any, **reading: Any) -> Decide:
    """The query of a request's body, whose fields win over those of `Decide` in `reading`.

    A state that is no text is data, unless `x_chat` says that it is a conversation. Other fields than `state`,
    `questions`, `assets` and ours are passed over, `model` too. InputError names the field or the question that is
    wrong; what the fields may hold, the checks of `Decide` say."""
    if not isinstance(body, Mapping):
        raise InputError(f"the request is {reprlib.repr(body)}; give an object with state and questions")
    for name in ("state", "questions"):
        if name not in body:
            raise InputError(f"{name} is missing; give an object with state and questions", option=name)
    if body.get("assets"):
        raise InputError("assets are given, and images are not read yet; say in words what they show", option="assets")
    if not isinstance(body["questions"], Mapping):
        what = reprlib.repr(body["questions"])
        raise InputError(f"questions is {what}; give a record of ids and questions", option="questions")
    fields = reading | {name: body[f"{OWN}{name}"] for name in READING if body.get(f"{OWN}{name}") is not None}
    options = fields.pop("options", Options())
    if options.seed is None or body.get("x_seed") is not None:
        seed = body.get("x_seed")
        options = options.with_changes({"seed": DEFAULT_SEED if seed is None else seed})
    if body.get("x_adapter") is not None:
        options = options.with_changes({"adapter": body["x_adapter"]})
    state = body["state"]
    if not isinstance(state, str | Mapping | list):
        raise InputError(f"state is {reprlib.repr(state)}; give a text, an object or a list", option="state")
    is_chat = body.get("x_chat")
    if not isinstance(is_chat, bool | None):
        raise InputError(f"x_chat is {reprlib.repr(is_chat)}; give true or false", option="x_chat")
    return query_about(state, bool(is_chat), body["questions"], options=options, **fields)


def query_about(state: Any, is_chat: bool, questions: Mapping[str, Any], **more: Any) -> Decide:
    """The query about a state, which is data unless it is said to be a conversation; `more` as `Decide` has it.

    InputError where it is none."""
    query = Decide(state if is_chat else state_text(state), questions, **more)
    if is_chat and query.conversation is None:
        message = "x_chat is true, and the state is no list of messages, each with a role; leave x_chat out"
        raise InputError(message, option="x_chat")
    return query


def body_of(query: Decide, is_sfumato: bool) -> dict[str, Any]:
    """The body that asks a server for this query's decisions, without the model. Ours stands in it only where used.

    To another server than Sfumato's a conversation is data like any other."""
    usual = Decide("", {})
    body: dict[str, Any] = {"state": query.state}
    if is_sfumato and query.conversation is not None:
        body["x_chat"] = True
    body["questions"] = {id: record_of(question) for id, question in query.questions.items()}
    names = [name for name in READING if getattr(query, name) != getattr(usual, name)]
    body |= {f"{OWN}{name}": getattr(query, name) for name in names if name != "threshold" or query.think == "auto"}
    if query.options.seed is not None:
        body["x_seed"] = query.options.seed
    return body


# ---- answers --------------------------------------------------------------------------------------------------------


def answers_of(decisions: Decisions, model: str) -> dict[str, Any]:
    """The body that answers a request: an answer to each question that was asked, by its id."""
    usage = decisions.usage
    cost = {name: getattr(usage, ours) for name, ours in _COST.items()}
    body: dict[str, Any] = {
        "model": model,
        "answers": {id: answer_of(decision) for id, decision in decisions.items()},
        "usage": {"input_tokens": usage.prompt_tokens, "output_tokens": usage.tokens},
        "x_usage": cost | {"seconds": round(usage.seconds, 6)},
        "x_seed": decisions.seed,
    }
    if decisions.skipped:
        body["x_skipped"] = list(decisions.skipped)
    return body


def answer_of(decision: Decision) -> dict[str, Any]:
    """The answer to one question."""
    probabilities, confidence = dict(decision.probabilities), decision.confidence
    answer: dict[str, Any]
    match decision.kind:
        case "noul":
            answer = {"type": "noul", "noul": probabilities["true"], "x_confidence": confidence}
        case "score":
            answer = {"type": "score", "score": decision.score, "legend": dict(decision.legend or {})}
            answer |= {"probabilities": probabilities, "confidence": confidence}
        case "span":
            start, end = decision.place or (0, 0)
            answer = {"type": "x_span", "passage": decision.choice, "start": start, "end": end}
            answer |= {"probabilities": probabilities, "confidence": confidence}
        case _:
            answer = {"type": "choice", "choice": decision.choice}
            answer |= {"probabilities": probabilities, "confidence": confidence}
    return answer if decision.thought is None else answer | {"x_thought": decision.thought}


def decisions_of(query: Decide, body: Any, seconds: float) -> Decisions:
    """The decisions that a server's body holds for this query, which took so many seconds here.

    Nothing in the body is believed: ValueError says in a few words what is missing, or cannot be. The choice must be
    the likeliest option; the expectation and the confidence are computed from the probabilities, whatever the server
    says of them. Other questions' answers and unknown fields are passed over."""
    answers = body.get("answers") if isinstance(body, Mapping) else None
    if not isinstance(answers, Mapping):
        raise ValueError('it holds no "answers"')
    named = body.get("x_skipped")
    skipped = [id for id in query.questions if id in named] if isinstance(named, list) else []
    decisions: dict[str, Decision] = {}
    for id, question in query.questions.items():
        if id in answers:
            decisions[id] = _decision(id, question, answers[id], query)
        elif question.depends_on is None or id not in skipped:
            raise ValueError(f"question {reprlib.repr(id)} has no answer")
    seed = body.get("x_seed")
    is_seed = isinstance(seed, int) and not isinstance(seed, bool)
    return Decisions(
        decisions,
        _usage(body.get("usage"), body.get("x_usage"), seconds),
        seed if is_seed else query.options.seed or 0,
        tuple(id for id in skipped if id not in decisions),
    )


def _decision(id: str, question: Question, answer: Any, query: Decide) -> Decision:
    """One answer, checked against its question."""
    what, kind = f"the answer to {reprlib.repr(id)}", question.kind
    if not isinstance(answer, Mapping):
        raise ValueError(f"{what} is {reprlib.repr(answer)}")
    if answer.get("type") != TYPES[kind]:
        raise ValueError(f"{what} is a {reprlib.repr(answer.get('type'))}, and a {kind} was asked")
    match question:
        case Noul():
            p = _probability(answer.get("noul"), f"{what} has the probability")
            decision = decision_of(question, question.options, [p, 1 - p])
        case Score():
            probabilities = _probabilities(what, answer.get("probabilities"), question.options)
            decision = decision_of(question, question.options, [*probabilities.values()])
        case Choice():
            probabilities = _probabilities(what, answer.get("probabilities"), question.options)
            decision = Decision(_likeliest(what, answer.get("choice"), probabilities, "options"), probabilities, kind)
        case Span():
            decision = _passage(what, question, answer, query)
    thought = answer.get("x_thought")
    return replace(decision, thought=thought) if isinstance(thought, str) else decision


def _passage(what: str, question: Span, answer: Mapping[str, Any], query: Decide) -> Decision:
    """A passage, which stands in the text where the answer says; where a conversation's stands, its server knows."""
    listed = answer.get("probabilities")
    probabilities = _probabilities(what, listed, [*listed] if isinstance(listed, Mapping) else [])
    text = state_text(query.state) if query.conversation is None else None
    for name in probabilities:
        if not isinstance(name, str) or (text is not None and name not in text):
            raise ValueError(f"{what} has a probability of {reprlib.repr(name)}, which is no passage of the text")
    choice = _likeliest(what, answer.get("passage"), probabilities, "passages")
    start, end = answer.get("start"), answer.get("end")
    if type(start) is int and type(end) is int and 0 <= start <= end and (text is None or text[start:end] == choice):
        return Decision(choice, probabilities, question.kind, place=(start, end))
    raise ValueError(f"{what} does not stand at {reprlib.repr(start)} to {reprlib.repr(end)}")


def _likeliest(what: str, choice: Any, probabilities: Mapping[str, float], kind: str) -> str:
    """The choice, which is to be the likeliest, or as likely as that."""
    if not isinstance(choice, str) or choice not in probabilities:
        raise ValueError(f"{what} is {reprlib.repr(choice)}, which is none of the {kind}")
    best = max(probabilities, key=probabilities.__getitem__)
    if probabilities[choice] < probabilities[best] - 1e-6:
        raise ValueError(f"{what} is {reprlib.repr(choice)}, and {reprlib.repr(best)} is likelier")
    return choice


def _probabilities(what: str, value: Any, options: Sequence[str]) -> dict[str, float]:
    """A probability for each of the options, in their order; they add up to 1 exactly, whatever was rounded."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} has no probabilities")
    known = set(options)
    for name in value:
        if name not in known:
            raise ValueError(f"{what} has a probability of {reprlib.repr(name)}, which was no option")
    for name in options:
        if name not in value:
            raise ValueError(f"{what} has no probability of {reprlib.repr(name)}")
    each = {
        name: _probability(value[name], f"{what} has, of {reprlib.repr(name)}, the probability") for name in options
    }
    total = sum(each.values())
    if abs(total - 1) > SLACK:
        raise ValueError(f"{what} has probabilities that add up to {total:.3g}")
    return {name: p / total for name, p in each.items()}


def _probability(value: Any, what: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not -1e-6 <= value <= 1 + 1e-6:  # NaN is in no range
        raise ValueError(f"{what} {reprlib.repr(value)}")
    return min(1.0, max(0.0, float(value)))


def _usage(tokens: Any, cost: Any, seconds: float) -> Usage:
    """What an answer took; figures that are missing, or are none, are 0."""

    def number(record: Any, name: str) -> Any:
        value: Any = record.get(name) if isinstance(record, Mapping) else None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number and 0 <= value < 1e15 else 0

    counts = {ours: int(number(cost, name)) for name, ours in _COST.items()}
    return Usage(
        prompt_tokens=int(number(tokens, "input_tokens")),
        tokens=int(number(tokens, "output_tokens")),
        seconds=float(number(cost, "seconds")) or seconds,
        **counts,
    )
