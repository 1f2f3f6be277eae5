"""server/canvas/: what the routes of templates and decisions take, refuse and answer."""

from __future__ import annotations

import json
from typing import Any

import server_client
from fake_backend import FakeBackend
from server_client import MESSAGES, events, refused
from starlette.testclient import TestClient

from sfumato.options import Options
from sfumato.questions import Choice, Noul, Question, Score
from sfumato.templates.requests import Decide, Edit, Fill, Infill
from sfumato.templates.slots import Slot

backend, client = server_client.backend, server_client.client


def test_infill(client: TestClient, backend: FakeBackend) -> None:
    body = client.post("/v1/infill", json={"prefix": "a", "suffix": "b", "length": 4, "seed": 3, "max_steps": 5}).json()
    assert body["object"] == "infill" and body["text"] == "a middle b" and body["middle"] == " middle "
    assert body["length"] == 2 and body["seed"] == 3 and body["usage"]["canvases"] == 2
    assert backend.queries == [Infill("a", "b", 4, None, Options(seed=3, max_steps=5))]
    refused(client.post("/v1/infill", json={"prefix": "a", "suffix": "b", "length": 4, "at_most": 5}))
    assert refused(client.post("/v1/infill", json={"prefix": "a"}))["param"] == "suffix"
    more = {"prefix": "a", "suffix": "b", "max_tokens": 3}
    assert refused(client.post("/v1/infill", json=more))["param"] == "max_tokens"


def test_edit_streams_drafts_and_then_the_whole(client: TestClient, backend: FakeBackend) -> None:
    body = {"text": "ab", "spans": [[0, 1]], "instruction": "shout", "stream": True, "drafts": True, "seed": 1}
    *drafts, last = events(client.post("/v1/edit", json=body))
    assert len(drafts) == 3 and all(set(one) == {"object", "draft"} for one in drafts)
    assert last["object"] == "edit" and last["text"] == "AB" and "+AB" in last["diff"]
    assert backend.queries == [Edit("ab", "shout", [(0, 1)], None, Options(seed=1, drafts=True))]
    assert refused(client.post("/v1/edit", json={"text": "a", "spans": [[1]]}))["param"] == "spans[0]"
    body = {"text": "ab", "instruction": "shout", "stream": True}
    assert len(events(client.post("/v1/edit", json=body))) == 1


def test_fill(client: TestClient, backend: FakeBackend) -> None:
    template = [
        "Name: ",
        {"name": "who"},
        ", ",
        {"choices": ["yes", "no"]},
        {"name": "n", "schema": {"type": "integer"}},
    ]
    body = client.post("/v1/fill", json={"template": template, "messages": MESSAGES}).json()
    assert body["text"] == "Name: <who>, yes<n>" and body["values"]["who"] == "<who>" and body["lengths"]["n"] == 1
    [query] = backend.queries
    assert isinstance(query, Fill) and query.prompt == MESSAGES
    slots = [Slot("who"), Slot(choices=("yes", "no")), Slot("n", schema={"type": "integer"})]
    assert query.template == ["Name: ", slots[0], ", ", slots[1], slots[2]]
    assert refused(client.post("/v1/fill", json={"template": [{"colour": 1}]}))["param"] == "template[0].colour"
    refused(client.post("/v1/fill", json={"template": template, "messages": MESSAGES, "prompt": "x"}))


def test_decisions(client: TestClient, backend: FakeBackend) -> None:
    fields: Any = {"mood": ["good", "bad"], "size": ["big", "small"]}
    body = client.post("/v1/decisions", json={"prompt": "Hm.", "fields": fields, "steps": 2}).json()
    assert body["decisions"]["mood"] == {"choice": "good", "probabilities": {"good": 0.5, "bad": 0.5}}
    assert backend.queries == [Decide("Hm.", fields, 2, options=Options(seed=0))]
    refused(client.post("/v1/decisions", json={"fields": fields}))
    assert refused(client.post("/v1/decisions", json={"prompt": "x"}))["param"] == "fields"
    assert refused(client.post("/v1/decisions", json={"prompt": "x", "fields": {}}))["param"] == "fields"


def test_decisions_on_questions_as_mlx_vlm_has_them(client: TestClient, backend: FakeBackend) -> None:
    questions = {
        "good": {"type": "bool", "instructions": "Is it good?", "criteria": {"true": "nice"}},
        "size": {"criteria": ["big", "small"]},
        "level": {"type": "score", "criteria": ["low", "high"]},
    }
    state = [{"role": "nurse"}]
    body = client.post("/v1/decisions", json={"state": state, "questions": questions, "images": []}).json()
    half, usage = {"big": 0.5, "small": 0.5}, {"input_tokens": 5, "output_tokens": 6}
    assert body["model"] == "fake" and body["usage"] == usage and set(body) == {"model", "answers", "usage"}
    assert body["answers"] == {
        "good": {"type": "bool", "value": True, "probability": 0.5},
        "size": {"type": "choice", "value": "big", "probabilities": half, "metadata": {"confidence": 0.5}},
        "level": {
            **{"type": "score", "value": 0.5, "probabilities": {"0": 0.5, "1": 0.5}},
            "metadata": {"confidence": 0.5, "legend": {"0": "low", "1": "high"}},
        },
    }
    kinds: dict[str, Question] = {
        "good": Noul("Is it good?", {"true": "nice"}),
        "size": Choice(["big", "small"]),
        "level": Score(["low", "high"]),
    }
    assert backend.queries == [Decide(json.dumps(state), kinds, options=Options(seed=0))]
    for more, param in (
        ({"questions": {"q": {"type": "multi_label", "criteria": ["a"]}}}, "questions.q.type"),
        ({"questions": {"q": {"type": "x_span", "instructions": "x"}}}, "questions.q.type"),
        ({"questions": {"q": {"criteria": []}}}, "questions.q.criteria"),
        ({"questions": {"q": 3}}, "questions.q"),
        ({"state": None}, "state"),
        ({"prompt": "x"}, "questions"),
        ({"images": ["a.png"]}, "images"),
    ):
        response = client.post("/v1/decisions", json={"state": "x", "questions": questions, **more})
        assert refused(response)["param"] == param, more
