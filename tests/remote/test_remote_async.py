"""remote/__init__.py and remote/host.py: answers that are awaited, called off, asked for in lists."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from typing import Any

import pytest
from scripted_host import Scripted, as_json, delta, hello, stream
from wrong_arguments import WRONG, places

from sfumato import Commit, Completion, Done, Infill, InputError, Remote, WorkerError

CHATS = "/chat/completions"


class Patient:
    """A host that begins to answer and then is silent until its client is gone."""

    def __init__(self) -> None:
        self.has_begun, self.is_left = threading.Event(), threading.Event()

    def __call__(self, handler: Any, _: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(b"data: " + json.dumps(delta(content="Hel")).encode() + b"\n\n")
        handler.wfile.flush()
        self.has_begun.set()
        handler.connection.settimeout(20)
        if handler.connection.recv(1) == b"":  # the client has ended the connection
            self.is_left.set()


def test_answers_are_awaited(ours: Scripted) -> None:
    ours.says(CHATS, hello())
    ours.says("/completions", stream({"choices": [{"text": "more", "finish_reason": "stop"}]}))
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    ours.says("/infill", as_json({"text": "abc", "middle": "b", "length": 1, "usage": usage, "seed": 2}))
    remote = Remote(ours.url)

    async def main() -> tuple[list[Completion], Completion, Any, list[Any]]:
        chats = await asyncio.gather(*[remote.achat("Hi", seed=seed) for seed in range(3)])
        infilled = await remote.arun(Infill("a", "c"))
        events = [event async for event in remote.astream("Hi")]
        return chats, await remote.acomplete("no"), infilled, events

    chats, completion, infilled, events = asyncio.run(main())
    assert (
        [str(chat) for chat in chats] == ["Hello"] * 3
        and str(completion) == "more"
        and infilled.values["middle"] == "b"
    )
    assert [type(event) for event in events] == [Commit, Done]
    assert sorted(body["seed"] for path, _, body in ours.requests if path.endswith(CHATS) and "seed" in body) == [
        0,
        1,
        2,
    ]
    assert [str(answer) for answer in remote.chat_many(["Hi", {"role": "user", "content": "Ho"}])] == ["Hello"] * 2


def test_a_list_is_answered_in_its_order_and_the_first_error_ends_it(ours: Scripted) -> None:
    def echo(handler: Any, body: Any) -> None:
        content = body["messages"][0]["content"]
        time.sleep(0.05 * (3 - int(content)))
        data = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        handler.wfile.write(data)

    ours.says(CHATS, echo)
    assert [str(answer) for answer in Remote(ours.url).chat_many(["0", "1", "2"])] == ["0", "1", "2"]
    ours.says(CHATS, as_json({"error": {"message": "too hot"}}, 400))
    with pytest.raises(InputError, match="too hot"):
        Remote(ours.url).chat_many(["0", "1"])


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_is_called_off_ends_the_request_at_the_host(ours: Scripted, is_stream: bool) -> None:
    """At once, though the host is silent: the connection is ended."""
    host = Patient()
    ours.says(CHATS, host)
    remote = Remote(ours.url)

    async def main() -> None:
        if is_stream:
            async for _ in (events := remote.astream("Hi")):
                break
            await events.aclose()  # type: ignore[attr-defined]
            return
        task = asyncio.create_task(remote.achat("Hi"))
        await asyncio.to_thread(host.has_begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert host.is_left.wait(10)


def test_a_closed_connection_refuses_and_ends_what_is_awaited(ours: Scripted) -> None:
    host = Patient()
    ours.says(CHATS, host)
    with Remote(ours.url) as remote:

        async def main() -> None:
            task = asyncio.create_task(remote.achat("Hi"))
            await asyncio.to_thread(host.has_begun.wait, 10)
            remote.close()
            with pytest.raises(InputError, match="was closed while it answered; connect again"):
                await task

        asyncio.run(main())
    assert host.is_left.wait(10)
    for call in (lambda: remote.chat("a"), lambda: remote.chat_many(["a"]), lambda: remote.infill("a", "b")):
        with pytest.raises(InputError, match=r"the connection to http://127\S+ is closed; connect again"):
            call()
    assert repr(remote) == f"<Remote nano at {ours.url}, a Sfumato server, closed>"


def test_an_error_of_the_host_reaches_whoever_awaits(ours: Scripted) -> None:
    ours.says(CHATS, as_json({"error": {"message": "it died"}}, 500))

    async def main() -> None:
        with pytest.raises(WorkerError, match="it died"):
            await Remote(ours.url).achat("Hi")

    asyncio.run(main())


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: type(value).__name__ + str(value)[:8])
def test_what_is_of_another_kind_is_refused_before_it_is_sent(ours: Scripted, wrong: Any) -> None:
    remote = Remote(ours.url)
    sent = len(ours.requests)
    for name, (words, call) in places(remote, wrong).items():
        with pytest.raises(InputError) as caught:
            call()
            pytest.fail(f"{name} took {wrong!r}")
        message = str(caught.value)
        assert re.search(words, message) and "\n" not in message, (name, message)
    assert len(ours.requests) == sent


@pytest.mark.parametrize("wrong", [None, 3, b"http://x", ["a"], True], ids=repr)
def test_what_is_no_place_or_name_is_refused(ours: Scripted, wrong: Any) -> None:
    calls: list[tuple[str, Any]] = [("the URL", lambda: Remote(wrong))]
    if wrong is not None:
        calls += [("the API key", lambda: Remote(ours.url, wrong)), ("model", lambda: Remote(ours.url, model=wrong))]
    for words, call in calls:
        with pytest.raises(InputError, match=words):
            call()
    for timeout in (0, -1, float("nan"), float("inf"), "3", None, True):
        with pytest.raises(InputError, match="timeout is"):
            Remote(ours.url, timeout=timeout)  # type: ignore[arg-type]


def test_a_model_behind_a_url_says_what_it_is(theirs: Scripted) -> None:
    remote = Remote(theirs.url, "secret-key")
    assert repr(remote) == f"<Remote gemma at {theirs.url}, a host with OpenAI's API>" and "secret" not in repr(remote)
    with pytest.raises(InputError, match="no Sfumato server"):
        asyncio.run(remote.arun(Infill("a", "b")))
