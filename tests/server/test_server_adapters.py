"""server/adapters.py: adapters are listed and asked for as models, and come and go where the server allows it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_backend import CARD, FakeBackend
from server_client import MESSAGES, connect
from starlette.testclient import TestClient

from sfumato.model.loaded import AdapterSize
from sfumato.server.app import Settings
from sfumato.templates.requests import CountTokens, LoadAdapter, UnloadAdapter

ADAPTED = replace(CARD, adapters=(AdapterSize("mine", 16, 4096), AdapterSize("own/one", 8, 2048)))
TEXT = {"type": "text", "text": "Hello"}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 20},
    "/v1/infill": {"prefix": "a", "suffix": "b"},
    "/v1/edit": {"text": "abc", "spans": [[0, 1]]},
    "/v1/fill": {"template": ["a", {"name": "b"}]},
    "/v1/decisions": {"prompt": "a", "fields": {"b": ["c", "d"]}},
    "/v1/systemone": {"state": "a", "questions": {"b": {"type": "noul", "instructions": "c"}}},
    "/api/chat": {"messages": MESSAGES, "stream": False},
    "/api/generate": {"prompt": "Hello", "stream": False},
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_dialect_chooses_an_adapter_as_its_model(route: str) -> None:
    backend = FakeBackend(ADAPTED)
    with connect(backend) as client:
        for name in ("mine", "own/one", "fake", "mine"):
            answer = client.post(route, json=ROUTES[route] | {"model": name})
            assert answer.status_code == 200, answer.text
            if not route.startswith("/v1/edit"):
                assert answer.json().get("model", name) == name
        unknown = client.post(route, json=ROUTES[route] | {"model": "other"})
    assert [query.options.adapter for query in backend.queries] == ["mine", "own/one", None, "mine"]
    assert unknown.status_code == 404
    assert "there is no model 'other' here; this server has fake, mine, own/one" in unknown.text


def test_a_stream_says_which_adapter_answers() -> None:
    with connect(FakeBackend(ADAPTED)) as client:
        for route in ("/v1/chat/completions", "/v1/fill"):
            body = ROUTES[route] | {"model": "mine", "stream": True}
            assert '"model": "mine"' in client.post(route, json=body).text.replace('":"', '": "')


def test_tokens_are_counted_for_an_adapter() -> None:
    backend = FakeBackend(ADAPTED)
    with connect(backend) as client:
        body = {"model": "mine", "messages": MESSAGES}
        assert client.post("/v1/messages/count_tokens", json=body).status_code == 200
    assert isinstance(backend.queries[0], CountTokens)


def test_adapters_are_listed_behind_the_model() -> None:
    with connect(FakeBackend(ADAPTED), Settings(name="served", aliases=("mine",))) as client:  # an alias goes first
        page = client.get("/v1/models").json()
        one = client.get("/v1/models/own/one").json()
        tags = [entry["name"] for entry in client.get("/api/tags").json()["models"]]
        shown = client.post("/api/show", json={"model": "own/one:latest"})
    entries = {entry["id"]: entry for entry in page["data"]}
    assert list(entries) == ["served", "fake", "mine", "own/one"] == [page["first_id"], "fake", "mine", page["last_id"]]
    assert [entry["parent"] for entry in page["data"]] == [None, None, None, "served"]
    assert one == entries["own/one"] | {"created": one["created"], "created_at": one["created_at"]}
    assert (one["root"], one["adapter"]) == ("own/one", {"rank": 8, "bytes": 2048})
    assert (entries["mine"]["root"], entries["mine"]["adapter"]) == ("fake", None)
    assert tags == ["served:latest", "fake:latest", "mine:latest", "own/one:latest"] and shown.status_code == 200


def admin(client: TestClient, verb: str, **body: Any) -> Any:
    return client.post(f"/v1/{verb}_lora_adapter", json=body)


def test_adapters_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    backend = FakeBackend()
    with connect(backend, Settings(adapter_folder=str(tmp_path))) as client:
        loaded = admin(client, "load", lora_name="a", lora_path="run/adapter", load_inplace=False)
        assert (loaded.status_code, loaded.json()["id"], loaded.json()["parent"]) == (200, "a", "fake")
        assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["fake", "a"]
        assert admin(client, "load", lora_name="b", lora_path=str(tmp_path / "run")).status_code == 200
        assert client.post("/v1/completions", json={"prompt": "a", "model": "b"}).status_code == 200
        unloaded = admin(client, "unload", lora_name="a", lora_int_id=None)
        assert unloaded.json() == {"id": "a", "object": "model", "deleted": True}
        assert admin(client, "unload", lora_name="a").status_code == 404
        assert client.post("/v1/completions", json={"prompt": "a", "model": "a"}).status_code == 404
    loads = [query for query in backend.queries if isinstance(query, LoadAdapter | UnloadAdapter)]
    assert loads[0] == LoadAdapter("a", str(tmp_path / "run" / "adapter")) and loads[-1] == UnloadAdapter("a")


def test_only_folders_within_the_servers_own_are_read(tmp_path: Path) -> None:
    root, outside = tmp_path / "adapters", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "file").write_text("x")
    (root / "link").symlink_to(outside)
    backend = FakeBackend()
    with connect(backend, Settings(adapter_folder=str(root))) as client:
        refused = ["..", "../outside", str(outside), "/etc", "link", "file", "none", "a\0b", "x" * 5000, "/" * 300]
        for path in refused:
            answer = admin(client, "load", lora_name="a", lora_path=path)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_path", path
        assert "which is no folder in the server's folder of adapters" in answer.text
        for body in ({"lora_name": "a"}, {"lora_name": "", "lora_path": "."}, {"lora_name": 5, "lora_path": "."}):
            assert admin(client, "load", **body).status_code == 400
        own_name = admin(client, "load", lora_name="fake", lora_path=".")
        assert own_name.status_code == 400 and "is the model's own name here" in own_name.text
    assert backend.jobs == []


def test_clients_change_nothing_unless_the_server_says_so() -> None:
    backend = FakeBackend(ADAPTED)
    with connect(backend) as client:
        for verb, body in ("load", {"lora_name": "a", "lora_path": os.sep}), ("unload", {"lora_name": "mine"}):
            answer = admin(client, verb, **body)
            assert answer.status_code == 403 and "--adapter-folder" in answer.text
    with connect(backend, Settings(adapter_folder=os.sep, keys=("key",))) as client:
        assert admin(client, "unload", lora_name="mine").status_code == 401
    assert backend.jobs == []
