"""server/canvas/: what the routes of templates and decisions take, refuse and answer."""

from __future__ import annotations

import server_client
from fake_backend import FakeBackend
from server_client import MESSAGES, events, refused
from starlette.testclient import TestClient

from sfumato.options import Options
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
    fields = {"mood": ["good", "bad"], "size": ["big", "small"]}
    body = client.post("/v1/decisions", json={"prompt": "Hm.", "fields": fields, "steps": 2}).json()
    assert body["decisions"]["mood"] == {"choice": "good", "probabilities": {"good": 0.5, "bad": 0.5}}
    assert backend.queries == [Decide("Hm.", fields, 2, options=Options(seed=0))]
    refused(client.post("/v1/decisions", json={"fields": fields}))
    assert refused(client.post("/v1/decisions", json={"prompt": "x", "fields": {}}))["param"] == "fields"
