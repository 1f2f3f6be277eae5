"""remote/host.py: what goes wrong between a client and a host is one sentence, and streams are read as they come."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_host import (
    DRAFT,
    KEY,
    USER,
    Reply,
    Scripted,
    as_json,
    delta,
    hello,
    refused,
    stream,
)

from sfumato.errors import BusyError, CapacityError, InputError, NumericError, SfumatoError, WorkerError
from sfumato.events import Commit
from sfumato.remote import Remote, host
from sfumato.remote.host import events_of

# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (refused("unknown field 'x'", 400, "invalid_request_error"), InputError, "refuses the request (400): unknown"),
        (refused("too long", 400, code="context_length_exceeded"), CapacityError, "too long"),
        (refused("no", 404, code="model_not_found"), InputError, "has no such model: no; name another: nano"),
        (
            as_json({"object": "error", "message": "The model `x` does not exist."}, 404),
            InputError,
            "has no such model",
        ),
        (as_json({"detail": "Not Found"}, 404), InputError, "has no /v1/chat/completions"),
        (refused("later", 429), BusyError, "is busy (429): later"),
        (refused("dead", 500, "worker_error"), WorkerError, "failed (500): dead"),
        (Reply(b"<html>Bad gateway</html>", 502), WorkerError, "failed (502); send"),
        (Reply(b"", 301, headers={"Location": "https://elsewhere.example/v1"}), InputError, "elsewhere.example"),
        (Reply(b"<html>welcome</html>", kind="text/html"), InputError, "no JSON object"),
        (stream({"choices": "none"}), InputError, "another shape"),
        (stream(delta(content=7)), InputError, "another shape"),
        (stream({"choices": [], "draft": DRAFT | {"end": 9}}), InputError, "another shape"),
        (
            stream(delta(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]), delta("stop")),
            SfumatoError,
            "'f'",
        ),
        (Reply([b"data: {nonsense\n\n"], kind="text/event-stream"), InputError, "no JSON object"),
        (stream({"error": {"message": "it died", "type": "worker_error"}}, end=b""), WorkerError, "failed: it died"),
        (
            stream({"error": {"message": "bad", "type": "invalid_request_error"}}),
            InputError,
            "refuses the request: bad",
        ),
        (refused("not finite", 500, "server_error", "numeric_error"), NumericError, "failed (500): not finite"),
        (stream(delta(content="Hel")), WorkerError, "in the middle"),
        (stream(delta(content="Hel"), end=b""), WorkerError, "in the middle"),
        (stream(delta(content="Hel"), end=b"", is_cut=True), WorkerError, "broke off"),
    ],
)
def test_an_error_is_one_sentence_of_its_kind(
    ours: Scripted, reply: Reply, error: type[SfumatoError], words: str
) -> None:
    ours.says("/chat/completions", reply)
    remote = Remote(ours.url)
    with pytest.raises(SfumatoError) as caught:
        remote.chat(USER)
    assert isinstance(caught.value, error) and isinstance(caught.value, InputError) == issubclass(error, InputError)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_came_before_a_cut_was_given(ours: Scripted) -> None:
    ours.says("/chat/completions", stream(delta(content="Hel"), end=b"", is_cut=True))
    events = Remote(ours.url).stream(USER)
    first = next(events)
    assert isinstance(first, Commit) and first.text == "Hel"
    with pytest.raises(WorkerError, match="broke off"):
        next(events)


def test_a_wrong_key_is_never_repeated(server: Scripted) -> None:
    server.says("/models", refused(f"Incorrect API key provided: {KEY}\x1b[2J.", 401, "authentication_error"))
    with pytest.raises(InputError, match=r"refuses this API key \(401\): Incorrect .*; give another") as caught:
        Remote(server.url, KEY)
    assert KEY not in str(caught.value) and "\x1b" not in str(caught.value)
    with pytest.raises(InputError, match="wants an API key"):
        Remote(server.url)
    with pytest.raises(InputError, match="API key") as caught:
        Remote(server.url, KEY + "\n")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://h/",
        "http://",
        "http://h:99999",
        "http://h/?q",
        "http://h/a b",
        "http://h\n/",
        "http://[::",
    ],
)
def test_a_url_that_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"^the URL .*; (give|write)"):
        Remote(url)


def test_a_password_in_a_url_is_not_repeated() -> None:
    with pytest.raises(InputError, match="user name or password") as caught:
        Remote(f"http://me:{KEY}@localhost:1")
    assert KEY not in str(caught.value)


def test_a_busy_host_is_asked_again_when_it_says(ours: Scripted, naps: list[float]) -> None:
    busy = refused("queue full", 503, "overloaded_error", Retry_After="3")
    ours.says("/chat/completions", busy, Reply(b"", 503), hello())
    remote = Remote(ours.url)
    assert remote.chat(USER).text == "Hello" and naps == [3.0, 0.5]
    ours.says("/chat/completions", busy)
    with pytest.raises(BusyError, match=r"is busy \(503\): queue full"):
        remote.chat(USER)
    assert naps[2:] == [3.0, 3.0]
    ours.says("/chat/completions", refused("closed", 503, "worker_error", Retry_After="3600"))
    with pytest.raises(WorkerError, match="closed"):
        remote.chat(USER)
    assert len(naps) == 4


def test_a_stream_that_has_begun_is_not_asked_for_again(ours: Scripted, naps: list[float]) -> None:
    ours.says("/chat/completions", stream({"error": {"message": "full", "type": "overloaded_error"}}), hello())
    with pytest.raises(BusyError):
        Remote(ours.url).chat(USER)
    assert naps == []


def test_nobody_there_is_tried_three_times(naps: list[float]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound, but not listening
        with pytest.raises(WorkerError, match=r"no server at http://127.0.0.1:\d+ \(connection refused\)"):
            Remote(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert naps == [0.25, 0.5]


def test_silence_has_an_end(ours: Scripted) -> None:
    is_over = threading.Event()
    ours.says("/chat/completions", lambda *_: is_over.wait(20))
    try:
        with pytest.raises(WorkerError, match=r"was silent for 0.2 s"):
            Remote(ours.url, timeout=0.2).chat(USER)
    finally:
        is_over.set()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 413 No\r\ncontent-length: 22\r\n\r\n" + b'{"detail":"send less"}', r"\(413\): send less"),
        (b"", r"broke off while a request of \d+ bytes was sent; send less"),
    ],
)
def test_an_answer_that_comes_before_all_is_sent_is_the_answer(ours: Scripted, answer: bytes, words: str) -> None:
    remote = Remote(ours.url)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)
                time.sleep(0.3)  # and goes, with most of the request unread

        thread = threading.Thread(target=refuse)
        thread.start()
        remote._host = host.Host(f"http://127.0.0.1:{listener.getsockname()[1]}", None, 20)
        with pytest.raises(SfumatoError, match=words):
            remote.complete("a" * (32 << 20))
        thread.join()


def test_who_speaks_no_tls_is_told_so(ours: Scripted) -> None:
    with pytest.raises(SfumatoError, match="check the URL"):
        Remote(ours.url.replace("http:", "https:"))


@pytest.mark.parametrize(
    ("url", "is_exposed"),
    [
        *[("http://127.0.0.1", 0), ("http://10.1.2.3", 0), ("http://localhost", 0), ("https://h.example", 0)],
        *[("http://h.example", 1), ("http://8.8.8.8", 1), ("http://[::1]", 0)],
    ],
)
def test_a_key_in_the_clear_is_noticed(url: str, is_exposed: int) -> None:
    assert host.Host(url, KEY, 1.0).is_key_exposed is bool(is_exposed)
    assert not host.Host(url, None, 1.0).is_key_exposed


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (["hello"], "message 0 is 'hello'; give a record"),
        ([{"role": "user"}], r"message 0 \('user'\) has no content; give text"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "tool call 0 of message 0"),
        ([{"role": "user", "content": {1, 2}}], r"the content of message 0 is \{1, 2\}; give text"),
        ([{"role": "user", "content": "a", "x": {1, 2}}], "cannot be written as JSON"),
        ([{"role": "user", "content": "a", "x": float("nan")}], "cannot be written as JSON"),
    ],
)
def test_a_conversation_that_cannot_be_sent_is_an_input_error(ours: Scripted, messages: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Remote(ours.url).chat(messages)
    assert len(ours.requests) == 1


# ---- server-sent events ---------------------------------------------------------------------------------------------

STREAM = "\ufeff: hi\n\ndata: Grün 🎨\r\n\r\nevent: x\rdata:two\rdata:  lines\r\rid: 1\n\ndata\n\ndata: cut".encode()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, len(STREAM)])
def test_events_are_the_same_wherever_the_bytes_are_split(size: int) -> None:
    chunks = [STREAM[n : n + size] for n in range(0, len(STREAM), size)]
    assert list(events_of(chunks)) == ["Grün 🎨", "two\n lines", ""]


def test_bytes_that_are_no_text_do_not_stop_a_stream() -> None:
    assert list(events_of([b"data: a\xffb\n", b"", b"\n"])) == ["a\ufffdb"]


@pytest.mark.parametrize("piece", [b"x" * 65536, b"data: " + b"x" * 65530 + b"\n"])
def test_an_event_has_a_bound(piece: bytes) -> None:
    size = 0

    def endless() -> Iterator[bytes]:
        nonlocal size
        yield b"data: "
        while True:
            size += len(piece)
            yield piece

    assert list(events_of(endless())) == [None]
    assert size <= host.LIMIT + 2 * len(piece)


def test_a_stream_may_be_longer_than_the_bound_of_an_event() -> None:
    piece = b": " + b"x" * 65533 + b"\n" + b"data: y\n\n"
    assert sum(event == "y" for event in events_of(piece for _ in range(300))) == 300


def test_an_answer_has_a_bound(ours: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote(ours.url)
    monkeypatch.setattr(host, "LIMIT", 1 << 20)
    ours.says("/infill", Reply(b'"' + b"x" * (1 << 20) + b'"'))
    ours.says("/chat/completions", Reply([b"data: ", *[b"x" * 65536] * 17], kind="text/event-stream"))
    with pytest.raises(InputError, match="larger than 1 MiB"):
        remote.infill("a", "b")
    with pytest.raises(InputError, match="larger than 1 MiB"):
        remote.chat(USER)


def test_split_bytes_through_http(ours: Scripted) -> None:
    data = b"".join(stream(delta(content="Grün 🎨"), delta("stop")).body)  # type: ignore[arg-type]
    ours.says("/chat/completions", Reply([data[n : n + 1] for n in range(len(data))], kind="text/event-stream"))
    assert Remote(ours.url).chat(USER).text == "Grün 🎨"
