"""server/systemone/: what /v1/systemone takes, answers and refuses, each fault at its place."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import server_client
from fake_backend import CARD, FakeBackend
from server_client import connect
from starlette.testclient import TestClient

from sfumato.errors import BusyError, CapacityError, InputError, NumericError
from sfumato.events import Decision, Decisions
from sfumato.model.loaded import AdapterSize
from sfumato.options import Options
from sfumato.questions import Choice, Dependency, Noul, Question, Score, Span
from sfumato.server.app import Limits, Settings
from sfumato.server.systemone.multipart import parts_of
from sfumato.templates.requests import Decide
from sfumato.templates.systemone import answer_of

backend, client = server_client.backend, server_client.client

PATH = "/v1/systemone"
STATE = "I was charged twice. Please help!"
NOUL = {"type": "noul", "instructions": "Is a refund requested?"}
CHOICE = {"type": "choice", "criteria": {"Billing": "Payments", "환불 🙂": None}}
SCORE = {"type": "score", "instructions": {"rate": "anger"}, "criteria": ["Calm", {"label": "Very angry"}]}
SPAN = {"type": "x_span", "instructions": "Where is help asked for?"}
PNG = b"\x89PNG\r\n\x1a\n and so on"


@pytest.fixture(scope="module")
def shared() -> Iterator[TestClient]:
    """For what never reaches a backend."""
    with connect(FakeBackend()) as one:
        yield one


def ask(client: TestClient, questions: Any, **more: Any) -> Any:
    return client.post(PATH, json={"model": "jev-latest", "state": STATE, "questions": questions, **more})


def fault(response: Any) -> tuple[list[Any], str, str]:
    """The one fault of a refused body: its place, its sentence and its kind."""
    assert response.status_code == 422, response.text
    body = response.json()
    [one] = body["detail"]
    assert set(body) == {"detail"} and set(one) == {"loc", "msg", "type"} and one["loc"][0] == "body"
    assert "\n" not in one["msg"]
    return one["loc"][1:], one["msg"], one["type"]


def failure(response: Any, status: int) -> tuple[str, str]:
    """The kind of another error, and its sentence."""
    assert response.status_code == status, response.text
    detail = response.json()["detail"]
    assert set(detail) == {"error_type", "message"}
    return detail["error_type"], detail["message"]


def test_each_kind_is_answered_in_the_published_shape(client: TestClient, backend: FakeBackend) -> None:
    body = ask(client, {"r": NOUL, "팀": CHOICE, "x.y": SCORE, "where": SPAN}, x_seed=5).json()
    assert set(body) == {"model", "answers", "usage", "x_usage", "x_seed"}
    assert body["model"] == "fake" and body["usage"] == {"input_tokens": 5, "output_tokens": 6} and body["x_seed"] == 5
    half = {"probabilities": {"Billing": 0.5, "환불 🙂": 0.5}, "confidence": 0.0}
    levels = {"legend": {"0": "Calm", "1": {"label": "Very angry"}}, "probabilities": {"0": 0.5, "1": 0.5}}
    assert body["answers"] == {
        "r": {"type": "noul", "noul": 0.5, "x_confidence": 0.0},
        "팀": {"type": "choice", "choice": "Billing", **half},
        "x.y": {"type": "score", "score": 0.5, **levels, "confidence": 0.0},
        "where": {
            **{"type": "x_span", "passage": "passage", "start": 0, "end": 7},
            **{"probabilities": {"passage": 1.0}, "confidence": 1.0},
        },
    }
    questions: dict[str, Question] = {
        "r": Noul("Is a refund requested?"),
        "팀": Choice({"Billing": "Payments", "환불 🙂": None}),
        "x.y": Score(["Calm", {"label": "Very angry"}], {"rate": "anger"}),
        "where": Span("Where is help asked for?"),
    }
    assert backend.queries == [Decide(STATE, questions, options=Options(seed=5))]


def test_a_thought_and_a_doubt_are_ours() -> None:
    thoughtful = Decision("true", {"true": 0.75, "false": 0.25}, "noul", thought="Hm.")
    assert answer_of(thoughtful) == {"type": "noul", "noul": 0.75, "x_confidence": 0.5, "x_thought": "Hm."}


def test_our_own_fields_reach_the_query(client: TestClient, backend: FakeBackend) -> None:
    own: dict[str, Any] = {
        **{"x_samples": 4, "x_steps": 2, "x_canvas": 16, "x_think": "auto", "x_threshold": 1, "x_calibrated": False},
    }
    below = {**CHOICE, "x_depends_on": {"r": True}}
    assert ask(client, {"r": NOUL, "team": below}, **own).status_code == 200
    [query] = backend.queries
    assert query.questions["team"].depends_on == Dependency("r", "true")
    values = {name.removeprefix("x_"): value for name, value in own.items()}
    assert query == Decide(STATE, query.questions, **values, options=Options(seed=0))


@pytest.mark.parametrize(
    "state", [{"role": "nurse", "age": 3}, [{"role": "user", "content": "Hi"}], [1, None], {}, [], "", " "]
)
def test_a_state_is_data_unless_it_is_said_to_be_a_conversation(
    client: TestClient, backend: FakeBackend, state: Any
) -> None:
    assert ask(client, {"r": NOUL}, state=state).status_code == 200
    text = state if isinstance(state, str) else json.dumps(state, ensure_ascii=False)
    assert backend.queries[0].state == text and backend.queries[0].conversation is None
    response = ask(client, {"r": NOUL}, state=state, x_chat=True)
    if isinstance(state, list) and "role" in str(state):  # a record with a role alone is data
        assert response.status_code == 200 and backend.queries[1].conversation is not None
    else:
        assert fault(response)[0] == ["x_chat"]


def test_what_is_skipped_is_listed() -> None:
    class Skipping(FakeBackend):
        async def run(self, job: Any) -> Any:
            async for event in super().run(job):
                assert isinstance(event, Decisions)
                yield replace(event, answers={"r": event["r"]}, skipped=("team",))

    with connect(Skipping()) as client:
        body = ask(client, {"r": NOUL, "team": {**CHOICE, "x_depends_on": {"r": False}}}).json()
    assert set(body["answers"]) == {"r"} and body["x_skipped"] == ["team"]


LONG_IDS = {
    f"{'a' * 40}{id}{'b' * 40}": {**NOUL, **more} for id, more in (("x", {}), ("y", {"x_depends_on": {"q": True}}))
}
BAD: list[tuple[Any, list[Any], str]] = [
    ({}, ["questions"], "too_short"),
    ([], ["questions"], "value_error"),
    (None, ["questions"], "value_error"),
    ({"": NOUL}, ["questions", ""], "string_too_short"),
    ({"q.1": 3}, ["questions", "q.1"], "model_type"),
    ({"q": {}}, ["questions", "q", "type"], "missing"),
    ({"q": {**NOUL, "type": "boolean"}}, ["questions", "q", "type"], "union_tag_invalid"),
    ({"q": {**NOUL, "type": "span"}}, ["questions", "q", "type"], "union_tag_invalid"),
    ({"q": {**NOUL, "type": ["noul"]}}, ["questions", "q", "type"], "union_tag_invalid"),
    ({"q": {"type": "noul"}}, ["questions", "q", "noul", "instructions"], "value_error"),
    ({"q": {**NOUL, "instructions": 3}}, ["questions", "q", "noul", "instructions"], "value_error"),
    ({"q": {**NOUL, "criteria": {"maybe": "x"}}}, ["questions", "q", "noul", "criteria"], "value_error"),
    ({"q": {**NOUL, "criteria": {"true": 1}}}, ["questions", "q", "noul", "criteria"], "value_error"),
    ({"q": {"type": "choice"}}, ["questions", "q", "choice", "criteria"], "value_error"),
    ({"q": {"type": "choice", "criteria": {}}}, ["questions", "q", "choice", "criteria"], "value_error"),
    ({"q": {"type": "choice", "criteria": ["a", "b"]}}, ["questions", "q", "choice", "criteria"], "dict_type"),
    ({"q": {"type": "choice", "criteria": {"a": 1}}}, ["questions", "q", "choice", "criteria"], "value_error"),
    ({"q": {**SCORE, "criteria": {"0": "a"}}}, ["questions", "q", "score", "criteria"], "value_error"),
    ({"q": {**SCORE, "criteria": ["a", None]}}, ["questions", "q", "score", "criteria"], "value_error"),
    ({"q": {**SCORE, "criteria": "ab"}}, ["questions", "q", "score", "criteria"], "value_error"),
    ({"q": {**SPAN, "unit": "word"}}, ["questions", "q", "x_span", "unit"], "value_error"),
    ({"q": {"type": "x_span"}}, ["questions", "q", "x_span", "instructions"], "value_error"),
    ({"q": {**NOUL, "depends_on": {"q": True}}}, ["questions", "q", "noul", "depends_on"], "value_error"),
    ({"q": {**NOUL, "x_depends_on": 7}}, ["questions", "q", "noul", "x_depends_on"], "value_error"),
    ({"q": {**NOUL, "x_depends_on": {"q": True}}}, ["questions", "q"], "value_error"),
    ({"q": {**NOUL, "x_depends_on": {"r": True}}}, ["questions", "q"], "value_error"),
    ({"q": NOUL, "o": {**NOUL, "x_depends_on": {"q": "maybe"}}}, ["questions", "o"], "value_error"),
    (LONG_IDS, ["questions", [*LONG_IDS][1]], "value_error"),
    ({"q": {"type": "box", "instructions": 3}}, ["questions", "q", "box", "instructions"], "value_error"),
    ({"q": {"type": "box", "instructions": "A dog"}}, ["questions", "q"], "images_not_supported"),
]


@pytest.mark.parametrize(("questions", "place", "kind"), BAD, ids=lambda value: json.dumps(value)[:60])
def test_a_wrong_question_is_refused_at_its_place(
    shared: TestClient, questions: Any, place: list[Any], kind: str
) -> None:
    loc, _, code = fault(ask(shared, questions))
    assert (loc, code) == (place, kind)


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"state": None}, ["state"]),
        ({"state": 3}, ["state"]),
        ({"model": 3}, ["model"]),
        *(({"x_samples": value}, ["x_samples"]) for value in (0, 257, 1.5, "4", True, 10**30)),
        *(({name: 0}, [name]) for name in ("x_steps", "x_canvas")),
        ({"x_threshold": 1.5}, ["x_threshold"]),
        ({"x_think": "sometimes"}, ["x_think"]),
        ({"x_calibrated": 1}, ["x_calibrated"]),
        ({"x_seed": -1}, ["x_seed"]),
        ({"x_adapter": "none"}, ["x_adapter"]),
        ({"assets": {}}, ["assets"]),
    ],
    ids=str,
)
def test_another_wrong_field_is_refused_at_its_place(shared: TestClient, more: Any, place: list[Any]) -> None:
    assert fault(ask(shared, {"q": NOUL}, **more))[0] == place


def test_what_is_missing_or_no_json_is_a_fault_of_the_body(client: TestClient) -> None:
    assert fault(client.post(PATH, json={"state": "x"}))[0::2] == (["questions"], "missing")
    assert fault(client.post(PATH, json={"questions": {"q": NOUL}}))[0::2] == (["state"], "missing")
    for body in (b"", b"{", b"[]", b'"a"', b"\xff", b'{"state": "\\ud800"}', b'{"state": NaN}', b"[" * 100_000):
        loc, _, _ = fault(client.post(PATH, content=body, headers={"content-type": "application/json"}))
        assert loc == []


def test_unknown_fields_are_left_out_and_named(client: TestClient, backend: FakeBackend) -> None:
    response = ask(client, {"q": {**NOUL, "weight": 3}}, seed=7, trace="x")
    assert response.status_code == 200 and backend.queries[0].options.seed == 0
    assert set(response.headers["x-sfumato-ignored"].split(", ")) == {"seed", "trace", "questions[].weight"}
    with connect(FakeBackend(), Settings(strict_params=True)) as strict:
        assert fault(ask(strict, {"q": NOUL}, seed=7))[0] == ["seed"]
        assert fault(ask(strict, {"q": {**NOUL, "weight": 3}}))[0] == ["questions", "q", "noul", "weight"]


def test_the_sizes_of_requests_are_bounded(client: TestClient) -> None:
    wide = {"type": "choice", "criteria": dict.fromkeys(map(str, range(255)))}
    assert ask(client, {"q": wide}).status_code == 200
    many = {str(number): NOUL for number in range(2000)}
    loc, sentence, _ = fault(ask(client, many))
    assert loc == ["questions"] and "2000 questions, more than the 1024 allowed" in sentence
    wide["criteria"] = dict.fromkeys(map(str, range(1025)))
    assert fault(ask(client, {"q": wide}))[0] == ["questions", "q", "choice", "criteria"]
    assert "passages" in fault(ask(client, {"q": SPAN}, state="Yes. " * 1025))[1]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Yes. " * 1000}]},
        {"role": "user", "content": "No. " * 25},
    ]
    assert "1025 passages" in fault(ask(client, {"q": SPAN}, state=messages, x_chat=True))[1]
    assert fault(ask(client, {"q": SPAN}, state=" "))[0] == ["questions", "q", "x_span", "unit"]
    narrow = Settings(limits=Limits(max_questions=2, max_options=3, max_all_options=4))
    with connect(FakeBackend(), narrow) as other:
        assert "more than the 2 allowed" in fault(ask(other, {"a": NOUL, "b": NOUL, "c": NOUL}))[1]
        assert "more than the 3 allowed" in fault(ask(other, {"a": {**SCORE, "criteria": ["a", "b", "c", "d"]}}))[1]
        three = {**SCORE, "criteria": ["a", "b", "c"]}
        assert fault(ask(other, {"a": three, "b": three}))[0] == ["questions"]


@pytest.mark.parametrize("unit", ["sentence", "line", "paragraph"])
@pytest.mark.parametrize("text", [" ", "\n", "\n ", ".", '."', "a\n", "a. ", "\t\r\n"])
def test_a_state_is_divided_in_time_that_grows_with_it_alone(shared: TestClient, unit: str, text: str) -> None:
    began = time.perf_counter()
    state = "a." + text * (400_000 // len(text)) + "."
    response = ask(shared, {str(number): {**SPAN, "unit": unit} for number in range(50)}, state=state)
    assert response.status_code in (200, 422) and time.perf_counter() - began < 30


def test_what_the_plan_refuses_has_its_place_too() -> None:
    cases: list[tuple[Exception, list[Any], str]] = [
        (
            InputError("question 'q.1': the options 'a' and 'b' are the same tokens", option="questions", item="q.1"),
            ["q.1"],
            "",
        ),
        (InputError("canvas is 3; these questions need 5 positions", option="canvas"), ["x_canvas"], "value_error"),
        (InputError("odd", option="questions"), ["questions"], "value_error"),
        (CapacityError("the state has too many tokens"), ["state"], "context_length_exceeded"),
    ]
    for error, place, kind in cases:
        with connect(FakeBackend(error=error)) as client:
            loc, sentence, code = fault(ask(client, {"q": NOUL, "q.1": NOUL}))
        assert loc == (["questions", "q.1"] if place == ["q.1"] else place) and code == (kind or "value_error")
        assert sentence == str(error)


# ---- errors that come before the route, and models -------------------------------------------------------------------


def test_every_other_error_has_its_form() -> None:
    with connect(FakeBackend(), Settings(keys=("k",), limits=Limits(max_body=2000))) as client:
        assert failure(ask(client, {"q": NOUL}), 401)[0] == "authentication_error"
        assert failure(client.post(PATH, headers={"authorization": "Bearer no"}), 401)[0] == "authentication_error"
        client.headers["authorization"] = "Bearer k"
        assert failure(client.get(PATH), 405)[0] == "method_not_allowed"
        assert failure(client.post(f"{PATH}/more"), 404)[0] == "not_found"
        assert "model 'other'" in failure(ask(client, {"q": NOUL}, model="other"), 404)[1]
        assert failure(ask(client, {"q": NOUL}, state="a" * 3000), 413)[0] == "request_too_large"
        plain = client.post(PATH, content=b"{}", headers={"content-type": "text/plain"})
        assert failure(plain, 415)[0] == "invalid_request_error"
        assert plain.headers["x-typesafe-request-id"] == plain.headers["x-request-id"]
        evil = client.post(PATH, json={}, headers={"origin": "https://evil.example"})
        assert failure(evil, 403)[0] == "permission_error"
    with connect(FakeBackend(error=BusyError("too many wait"))) as client:
        busy = ask(client, {"q": NOUL})
    assert failure(busy, 503)[0] == "overloaded_error" and busy.headers["retry-after"] == "1"
    for error, kind in ((ZeroDivisionError(), "internal_error"), (NumericError("not finite"), "numeric_error")):
        with connect(FakeBackend(error=error)) as client:
            assert failure(ask(client, {"q": NOUL}), 500)[0] == kind


ADAPTED = replace(CARD, adapters=(AdapterSize("own", 4, 1000), AdapterSize("jev-preview", 4, 1000)))


def test_names_of_models_and_adapters() -> None:
    backend = FakeBackend(ADAPTED)
    with connect(backend, Settings(aliases=("mine",))) as client:
        for model, own, expected in (
            (None, None, None),
            ("jev-latest", None, None),
            ("mine", None, None),
            ("jev-preview", None, "jev-preview"),
            ("own", None, "own"),
            ("jev-latest", "own", "own"),
            ("own", "own", "own"),
        ):
            assert ask(client, {"q": NOUL}, model=model, x_adapter=own).status_code == 200
            assert backend.queries[-1].options.adapter == expected, (model, own)
        assert fault(ask(client, {"q": NOUL}, model="own", x_adapter="jev-preview"))[0] == ["x_adapter"]
        assert fault(ask(client, {"q": NOUL}, x_adapter="mine"))[0] == ["x_adapter"]
        assert failure(ask(client, {"q": NOUL}, model="jev-1"), 404)[0] == "not_found"
        listed = client.get("/v1/models").json()
        assert [one["name"] for one in listed["models"]] == ["fake", "mine", "own", "jev-preview", "jev-latest"]
        assert [one["id"] for one in listed["data"]] == ["fake", "mine", "own", "jev-preview"]
        assert (
            client.post(
                "/v1/chat/completions", json={"model": "jev-latest", "messages": server_client.MESSAGES}
            ).status_code
            == 404
        )


def test_it_is_counted_under_its_route(client: TestClient) -> None:
    ask(client, {"q": NOUL})
    assert 'sfumato_requests_total{route="/v1/systemone",status="200"} 1.0' in client.get("/metrics").text


# ---- images ----------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"type": "image", "format": "png", "data_base64": base64.b64encode(PNG).decode()}


@pytest.mark.parametrize(
    ("assets", "place"),
    [
        ({"<a>": GOOD}, ["assets"]),
        ({"<a>": {**GOOD, "format": None}}, ["assets", "<a>", "format"]),
        ({"<a>": {**GOOD, "format": "gif"}}, ["assets", "<a>", "format"]),
        ({"<a>": {**GOOD, "type": "sound"}}, ["assets", "<a>", "type"]),
        ({"<a>": {**GOOD, "data_base64": "%%"}}, ["assets", "<a>", "data_base64"]),
        ({"<a>": {**GOOD, "data_base64": "é"}}, ["assets", "<a>", "data_base64"]),
        ({"<a>": {**GOOD, "data_base64": "aGk="}}, ["assets", "<a>"]),
        ({"<a>": {"type": "image"}}, ["assets", "<a>", "data_base64"]),
        ({"<a>": {"part": "a"}}, ["assets", "<a>", "part"]),
        ({" ": GOOD}, ["assets", " "]),
        ({"<a>": 3}, ["assets", "<a>"]),
    ],
    ids=str,
)
def test_assets_are_checked_and_refused(shared: TestClient, assets: Any, place: list[Any]) -> None:
    assert fault(ask(shared, {"q": NOUL}, assets=assets))[0] == place


def form(client: TestClient, assets: Any, *parts: tuple[str, bytes]) -> Any:
    body = {"state": "<a>", "questions": {"q": NOUL}} | ({} if assets is None else {"assets": assets})
    files: list[Any] = [("request", ("r", json.dumps(body).encode(), "application/json"))]
    return client.post(PATH, files=[*files, *((name, (name, data, "image/png")) for name, data in parts)])


def test_a_form_brings_each_image_as_a_part(client: TestClient, backend: FakeBackend) -> None:
    assert form(client, None).status_code == 200 and len(backend.queries) == 1
    assert fault(form(client, {"<a>": {"part": "a"}}, ("a", PNG)))[2] == "images_not_supported"
    for assets, parts, kind in (
        ({"<a>": {"part": "a"}}, [], "part_missing"),
        (None, [("a", PNG)], "part_unclaimed"),
        ({"<a>": {"part": "a"}, "<b>": {"part": "a"}}, [("a", PNG)], "part_claimed"),
        ({"<a>": {"part": "a"}}, [("a", PNG), ("a", PNG)], "multipart_invalid"),
        ({"<a>": {"part": "a"}}, [("a", b"")], "image_format"),
    ):
        assert fault(form(client, assets, *parts))[2] == kind, kind
    assert fault(client.post(PATH, files={"other": ("o", b"{}", "application/json")}))[2] == "missing"
    assert fault(client.post(PATH, files={"request": ("r", b"{}", "image/png")}))[2] == "missing"
    assert len(backend.queries) == 1


def test_broken_forms_are_refused_by_a_sentence(client: TestClient) -> None:
    good = b'--b\r\nContent-Disposition: form-data; name="request"\r\n\r\n{"state": "x"}\r\n--b--\r\n'
    assert parts_of("multipart/form-data; boundary=b", good, 9)["request"].data == b'{"state": "x"}'
    assert parts_of('multipart/form-data; charset=x; boundary="b"', b"preamble\r\n" + good + b"after", 9)
    for media, data in (
        ("multipart/form-data", good),
        ("multipart/form-data; boundary=", good),
        ("multipart/form-data; boundary=" + "b" * 71, good),
        ("multipart/form-data; boundary=c", good),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", good[:-8]),
        ("multipart/form-data; boundary=b", good.replace(b"\r\n\r\n", b"\r\n")),
        ("multipart/form-data; boundary=b", good.replace(b'; name="request"', b"")),
        ("multipart/form-data; boundary=b", good.replace(b"form-data; name", b"attachment; name")),
        ("multipart/form-data; boundary=b", good.replace(b"--b\r\n", b"--bc\r\n")),
        ("multipart/form-data; boundary=b", good.replace(b"Content-D", b"Nothing\r\nContent-D")),
        ("multipart/form-data; boundary=b", good.replace(b"Content-D", b"X: " + b"y" * 9000 + b"\r\nContent-D")),
        ("multipart/form-data; boundary=b", b"--b\r\n" * 3000),
    ):
        loc, sentence, _ = fault(client.post(PATH, content=data, headers={"content-type": media}))
        assert loc == [] and sentence.startswith("the body "), sentence
