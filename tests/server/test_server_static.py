"""server/http/static.py: the page's files, compressed for whoever takes it, and streams that are not."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend
from starlette.testclient import TestClient

from sfumato.server.app import Settings, create
from sfumato.server.status import UI


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create(FakeBackend(), Settings()), base_url="http://localhost") as client:
        yield client


def raw(client: TestClient, path: str, **headers: str) -> tuple[Any, bytes]:
    """A response, and its bytes as they were sent."""
    with client.stream("GET", path, headers=headers) as response:
        return response, b"".join(response.iter_raw())


@pytest.mark.parametrize("path", ["/", *(f"/ui/{file.name}" for file in sorted(UI.iterdir()))])
def test_a_file_is_compressed_for_whoever_takes_it(client: TestClient, path: str) -> None:
    whole = (UI / ("index.html" if path == "/" else path[4:])).read_bytes()
    plain, body = raw(client, path, **{"accept-encoding": "identity"})
    assert body == whole and "content-encoding" not in plain.headers
    packed, less = raw(client, path, **{"accept-encoding": "br, GZIP;q=0.8"})
    assert packed.headers["content-encoding"] == "gzip" and gzip.decompress(less) == whole
    assert int(packed.headers["content-length"]) == len(less) < len(whole)
    for response in plain, packed:
        assert response.headers["vary"] == "Accept-Encoding"
        assert response.headers["content-type"] == plain.headers["content-type"]
        again, nothing = raw(client, path, **{"accept-encoding": "gzip", "if-none-match": response.headers["etag"]})
        assert again.status_code == 304 and nothing == b""
    assert plain.headers["etag"] != packed.headers["etag"]


@pytest.mark.parametrize("codings", ["gzip;q=0", "br", "", "gzip; q=0, deflate"])
def test_who_takes_no_gzip_gets_none(client: TestClient, codings: str) -> None:
    response, _ = raw(client, "/ui/app.js", **{"accept-encoding": codings})
    assert response.status_code == 200 and "content-encoding" not in response.headers


def test_a_changed_file_is_compressed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.server.status.UI", tmp_path)
    file = tmp_path / "a.js"
    with TestClient(create(FakeBackend(), Settings()), base_url="http://localhost") as client:
        for text in "let one = 1;", "let two = 2;":
            file.write_text(text)
            assert client.get("/ui/a.js").text == text


def test_a_stream_is_sent_as_it_comes(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    response = client.post("/v1/chat/completions", json=body, headers={"accept-encoding": "gzip"})
    assert response.text.startswith("data: ") and "content-encoding" not in response.headers
