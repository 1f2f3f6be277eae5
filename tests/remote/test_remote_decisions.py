"""remote/decisions.py: typed questions to a Sfumato server, and to any other that speaks System One."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted_host import KEY, Reply, Scripted, as_json

from sfumato import Choice, Decide, Noul, Score, Span
from sfumato.errors import BusyError, CapacityError, InputError, NumericError, SfumatoError
from sfumato.options import Options
from sfumato.questions import Dependency, Question
from sfumato.remote import Remote

YES = {"type": "noul", "noul": 0.75}
SURE: dict[str, Question] = {"sure": Noul("Sure?")}


def answered(**answers: Any) -> Reply:
    return as_json({"model": "m", "answers": answers, "usage": {"input_tokens": 7, "output_tokens": 0}})


def served(server: Scripted, *names: str) -> None:
    """Lists models as a System One server does."""
    cards = [{"name": name, "description": "a model", "release_date": "2026-09-24"} for name in names]
    server.says("/models", as_json({"models": cards}))


# ---- a Sfumato server -----------------------------------------------------------------------------------------------


def test_a_sfumato_server_is_asked_once_whatever_depends_on_what(ours: Scripted) -> None:
    span = {
        "type": "x_span",
        "passage": "Today!",
        "start": 5,
        "end": 11,
        "probabilities": {"Now.": 0.25, "Today!": 0.75},
    }
    body = {"answers": {"sure": YES, "when": span}, "x_usage": {"passes": 4}, "x_skipped": ["mood"], "x_seed": 3}
    ours.says("/systemone", as_json(body))
    questions = SURE | {"mood": Choice(["good", "bad"], depends_on=Dependency("sure", "false")), "when": Span("When?")}
    decisions = Remote(ours.url).decide("Now. Today!", questions, samples=4, think="always", seed=5, adapter="mine")
    assert decisions["sure"].probability == 0.75 and decisions["when"].place == (5, 11)
    assert (decisions.skipped, decisions.seed, decisions.usage.passes) == (("mood",), 3, 4)
    sent = ours.body
    assert sent.pop("questions") == {
        "sure": {"type": "noul", "instructions": "Sure?"},
        "mood": {"type": "choice", "criteria": {"good": None, "bad": None}, "x_depends_on": {"sure": "false"}},
        "when": {"type": "x_span", "instructions": "When?", "unit": "sentence"},
    }
    assert sent == {"model": "mine", "state": "Now. Today!", "x_samples": 4, "x_think": "always", "x_seed": 5}


def test_decisions_that_are_awaited_are_asked_for_together(ours: Scripted) -> None:
    ours.says("/systemone", answered(sure=YES))
    remote = Remote(ours.url)

    async def both() -> list[Any]:
        return await asyncio.gather(*(remote.arun(Decide(state, SURE)) for state in ("a", {"b": 1})))

    assert [one["sure"].choice for one in asyncio.run(both())] == ["true", "true"]
    remote.decide([{"role": "user", "content": "Hi"}], SURE)
    assert ours.body["x_chat"] is True and ours.requests.pop()
    assert sorted(str(body["state"]) for path, _, body in ours.requests if path == "/v1/systemone") == ["a", "{'b': 1}"]


# ---- any other ------------------------------------------------------------------------------------------------------


def test_another_server_is_asked_in_waves_and_told_what_was_answered(server: Scripted) -> None:
    served(server, "mock", "jev-latest")
    score = {"type": "score", "score": 2.0, "probabilities": {"0": 0, "1": 1}, "legend": {}, "confidence": 1}
    server.says("/systemone", answered(sure=YES), answered(how=score, task=YES), answered(last=YES))
    questions = {
        "last": Noul("Last?", depends_on=Dependency("how", "1")),
        "how": Score(["a", "b"], "How?", depends_on=Dependency("sure", "true")),
        "never": Noul("Never?", depends_on=Dependency("sure", "false")),
        "task": Noul({"task": 1}, depends_on=Dependency("sure", "true")),
        **SURE,
    }
    remote = Remote(server.url)
    decisions = remote.decide("x", questions)
    assert remote.name == "jev-latest" and not remote.is_sfumato  # the name that the API's own clients use
    assert [*decisions] == ["last", "how", "task", "sure"] and decisions.skipped == ("never",)
    assert decisions["how"].score == 1.0  # whatever the server says: the expectation of its probabilities
    assert decisions.usage.prompt_tokens == 21
    first, second, third = (body["questions"] for path, _, body in server.requests if path == "/v1/systemone")
    lead = "Sure?\nAnswer Yes or No only.\nThe answer was: Yes\n"
    assert first == {"sure": {"type": "noul", "instructions": "Sure?"}}
    assert second["how"] == {"type": "score", "criteria": ["a", "b"], "instructions": f"{lead}How?"}
    assert second["task"] == {"type": "noul", "instructions": [lead, {"task": 1}]} and len(second) == 2
    assert third["last"]["instructions"].endswith("The answer was: 1\nLast?") and len(third) == 1


def test_a_server_of_several_models_needs_a_name(server: Scripted) -> None:
    served(server, "one", "two")
    with pytest.raises(InputError, match="offers 2 models; name one: one, two"):
        Remote(server.url)
    server.says("/systemone", answered(sure=YES))
    Remote(server.url, model="two").decide("x", SURE)
    assert server.body == {
        "model": "two",
        "state": "x",
        "questions": {"sure": {"type": "noul", "instructions": "Sure?"}},
    }


def test_options_of_generating_and_questions_that_are_none_are_refused_before_anything_is_sent(
    theirs: Scripted,
) -> None:
    remote = Remote(theirs.url)
    with pytest.raises(InputError, match=r"^max_tokens cannot be said with /v1/systemone"):
        remote.decide("x", SURE, options=Options(max_tokens=3))
    with pytest.raises(InputError, match="depends on 'no'"):
        remote.decide("x", {"a": Noul("A?", depends_on=Dependency("no", "true"))})
    assert len(theirs.requests) == 1


def fault(*loc: str | int, msg: str = "Field required") -> dict[str, Any]:
    return {"loc": ["body", *loc], "msg": msg, "type": "missing"}


def detail(kind: str, message: str, status: int, **headers: str) -> Reply:
    return as_json({"detail": {"error_type": kind, "message": message}}, status, **headers)


@pytest.mark.parametrize(
    ("reply", "key", "error", "words"),
    [
        (
            as_json({"detail": [fault("questions", "a", "score", "criteria", 0), fault("state")]}, 422),
            *(
                None,
                InputError,
                "refuses the request (422): questions.a.score.criteria.0: Field required; state: Field",
            ),
        ),
        (
            as_json({"detail": [{"msg": 3}, 7, None, fault()]}, 422),
            None,
            InputError,
            'request (422): {"msg": 3}; 7; null',
        ),
        (
            as_json(
                {"detail": [{"loc": ["body", "state"], "msg": "too long", "type": "context_length_exceeded"}]}, 422
            ),
            *(None, CapacityError, "refuses the request (422): state: too long"),
        ),
        (detail("numeric_error", "not finite", 500), None, NumericError, "failed (500): not finite"),
        (detail("overloaded_error", "full", 503, Retry_After="99"), None, BusyError, "is busy (503): full"),
        (detail("api_usage_error", "Unknown model: x", 400), None, InputError, "has no such model: Unknown model: x"),
        (detail("not_found", "Model not served: x", 404), None, InputError, "has no such model: Model not served"),
        (detail("authentication_error", "Must supply a key!", 403), None, InputError, "wants an API key (403)"),
        (detail("authentication_error", "Cannot authenticate.", 401), KEY, InputError, "refuses this API key (401)"),
        (detail("rate_limit_error", "slow down", 429, Retry_After="0"), None, BusyError, "is busy (429): slow down"),
        (as_json({"detail": "Not Found"}, 404), None, InputError, "connect to a server that answers typed questions"),
        (answered(), None, InputError, "does not answer as a System One server does: question 'sure' has no answer"),
        (answered(sure={"type": "box"}), None, InputError, "is a 'box', and a noul was asked; check the URL"),
        (Reply(b'{"answers": {"sure": {"type": "noul", "noul": NaN}}}'), None, InputError, "the probability nan"),
        (as_json({"answers": {"sure": {"type": "\x1b[2J" + KEY}}}), KEY, InputError, "is a '\\x1b[2J…'"),
        (as_json({"decisions": {}}), None, InputError, 'it holds no "answers"'),
        (as_json([]), None, InputError, "no JSON object"),
    ],
)
def test_what_goes_wrong_is_one_sentence_of_its_kind(
    ours: Scripted, reply: Reply, key: str | None, error: type[SfumatoError], words: str
) -> None:
    ours.says("/systemone", reply)
    with pytest.raises(error) as refused:
        Remote(ours.url, key).decide("x", SURE)
    sentence = str(refused.value)
    assert type(refused.value) is error or "has no /v1" in sentence
    assert words in sentence and "\n" not in sentence and KEY not in sentence and sentence.isprintable()


def test_a_server_that_starts_is_asked_again(ours: Scripted, naps: list[float]) -> None:
    ours.says("/systemone", detail("unavailable", "loading", 503, Retry_After="2"), answered(sure=YES))
    assert Remote(ours.url).decide("x", SURE)["sure"].choice == "true" and naps == [2.0]


# ---- the reference server of the conformance suite ------------------------------------------------------------------


def test_the_conformance_suites_own_server_answers_every_question() -> None:
    mock = pytest.importorskip("jevcompat.mock", reason="needs jevcompat (the extra test)")
    with mock.Running(mock.MockConfig(key=KEY)) as running:
        remote = Remote(running.url, KEY)
        questions: dict[str, Question] = {
            "q 🙂": Noul(criteria={"true": {"means": ["yes"]}}),
            "": Noul("A question with an empty id is refused here"),
        }
        with pytest.raises(InputError, match="question ''"):
            remote.decide("x", questions)
        del questions[""]
        questions |= {
            "queue": Choice({f"Queue {number:03}": None for number in range(255)}),
            "level": Score([{"at": 1}, ["b"], "c"], "How far?"),
            "then": Choice(["a", "b"], depends_on=Dependency("level", "1")),
            "else": Choice(["a", "b"], depends_on=Dependency("q 🙂", "true")),
            "or": Choice(["a", "b"], depends_on=Dependency("q 🙂", "false")),
        }
        decisions = remote.decide({"message": ["Grüße", None]}, questions, samples=2)
        assert len(decisions["queue"].probabilities) == 255 and decisions.usage.prompt_tokens > 0
        assert 0 <= decisions["level"].score <= 2 and decisions["level"].legend == {
            "0": {"at": 1},
            "1": ["b"],
            "2": "c",
        }
        assert len({"else", "or"} & set(decisions)) == 1 and {*decisions, *decisions.skipped} == set(questions)
        again = remote.decide({"message": ["Grüße", None]}, {"renamed": questions["queue"]})
        assert again["renamed"].probabilities == decisions["queue"].probabilities
        with pytest.raises(InputError, match=r"refuses the request \(422\): questions\.s: .*'x_span'"):
            remote.decide("A. B.", {"s": Span("Which?")})
        with pytest.raises(InputError, match=r"questions\.many\.choice\.criteria: .* at most 255"):
            remote.decide("x", {"many": Choice([str(number) for number in range(256)])})
        with pytest.raises(InputError, match="has no such model: Unknown model: other; name another: jev-latest, mock"):
            Remote(running.url, KEY, "other").decide("x", {"level": questions["level"]})
    faulty, likelier = mock.MockConfig(faults=frozenset(["choice-second"])), "is likelier; check the URL"
    with mock.Running(faulty) as running, pytest.raises(InputError, match=likelier):
        Remote(running.url).decide("x", {"queue": questions["queue"]})
