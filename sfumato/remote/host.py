"""Requests to one host, and what comes back: JSON, streams of it, and errors in one sentence.

Everything from outside is bounded and checked, and a host's own words in an error are cleaned of the key and of what a
terminal would obey. It deliberately lacks proxies, and redirects, because the key goes to one host alone.
"""

from __future__ import annotations

import codecs
import http.client
import ipaddress
import json
import re
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from sfumato.engine.arguments import check_kind
from sfumato.errors import BusyError, CapacityError, InputError, NumericError, SfumatoError, WorkerError
from sfumato.system import cancelling

LIMIT = 16 << 20
"""Bytes of one event of a stream, or of one whole answer."""
ERROR_LIMIT = 64 << 10
"""Bytes that are read of an error."""
RETRIES = 2
"""Times that a request is sent again: where nobody listened, or the host answered 503 with nothing begun."""
LONGEST_WAIT = 30.0
"""Seconds that a host may ask to wait before that; one that asks for more is not asked again."""
LONGEST_SILENCE = 1e6
"""Seconds of the longest timeout; the system's clocks have limits."""
CONNECT_SECONDS = 10.0
"""A connection takes so long at most."""


_MOST_FAULTS = 3
"""Values that are named, of those that are wrong with a request."""
_REMEDIES = {
    "/completions": "it may offer chat only, so give messages",
    "/systemone": "connect to a server that answers typed questions",
}


class NoSuchRoute(InputError):
    """The host has no such route."""


class _NoListener(WorkerError):
    """Nobody listens, so nothing was sent."""


class Host:
    """A host with OpenAI's API at `url` ("/v1" at its end or not); `timeout` is the longest silence, in seconds.

    Each request has a connection of its own, so that several threads may ask at once."""

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        check_kind("the URL", url, str, "one such as http://localhost:8000")
        check_kind("the API key", api_key, (str, type(None)), "text")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= LONGEST_SILENCE:
            raise InputError(f"timeout is {timeout!r}; give seconds above 0, at most {LONGEST_SILENCE:g}")
        self._is_secure, self._name, self._port, self._path = split_url(url)
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            raise InputError(
                "the API key is empty or holds a space or a character beyond ASCII; give it as it was made"
            )
        self._key, self.timeout = api_key, timeout
        self.models: list[str] = []
        """What it offers, as far as that is known."""

    @property
    def is_key_exposed(self) -> bool:
        """Whether the key crosses a network in the clear, beyond this machine and private networks."""
        if self._key is None or self._is_secure or self._name == "localhost" or self._name.endswith(".localhost"):
            return False
        try:
            return not ipaddress.ip_address(self._name).is_private
        except ValueError:
            return True

    def payloads(self, response: http.client.HTTPResponse) -> Iterator[Any]:
        """The JSON objects of a stream, or the one of a host that does not stream."""
        if response.headers.get_content_type() != "text/event-stream":
            yield self._parse(self._read(response))
            return
        for data in events_of(self._chunks(response)):
            if data is None:
                raise self.unlike_openai(f"one event is larger than {LIMIT >> 20} MiB")
            if data.strip() == "[DONE]":
                return
            yield self._parse(data)

    def _chunks(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        while True:
            with self._connection():
                chunk = response.read1(1 << 16)
            if not chunk:
                return
            yield chunk

    def json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that a route answers."""
        with self.request(method, path, body) as response:
            return self._parse(self._read(response))

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        with self._connection():
            data = response.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise self.unlike_openai(f"the answer is larger than {LIMIT >> 20} MiB")
        return data

    def _parse(self, data: str | bytes) -> dict[str, Any]:
        try:
            payload = json.loads(data)
        except (ValueError, RecursionError):
            payload = None
        if not isinstance(payload, dict):
            start = data[:60] if isinstance(data, str) else data[:60].decode(errors="replace")
            raise self.unlike_openai(f"{self.clean(start)!r} is no JSON object")
        return payload

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        """A response whose status is 200; everything else is raised."""
        try:
            data = None if body is None else json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the request cannot be written as JSON: {error}") from None
        for tries_left in range(RETRIES, -1, -1):
            wait = 0.25 * 2 ** (RETRIES - tries_left)
            try:
                with self._connection():
                    response = self._send(method, path, data)
            except _NoListener:
                if not tries_left:
                    raise
            else:
                if response.status == 200:
                    return response
                with response:
                    pause = response.headers.get("Retry-After", "")
                    wait = float(pause) if re.fullmatch("[0-9]{1,6}", pause) else wait
                    if response.status != 503 or not tries_left or wait > LONGEST_WAIT:
                        raise self.refusal(response.status, self._error(response), path)
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _send(self, method: str, path: str, data: bytes | None) -> http.client.HTTPResponse:
        seconds = min(CONNECT_SECONDS, self.timeout)
        connection = (
            http.client.HTTPSConnection(self._name, self._port, timeout=seconds, context=ssl.create_default_context())
            if self._is_secure
            else http.client.HTTPConnection(self._name, self._port, timeout=seconds)
        )
        headers = {"User-Agent": "sfumato", "Accept": "application/json, text/event-stream", "Connection": "close"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            try:
                connection.connect()
            except TimeoutError:
                raise WorkerError(f"{self.url} was not reached within {seconds:g} s; check the URL") from None
            connection.sock.settimeout(self.timeout)
            if (cancellation := cancelling.current.get()) is not None:
                cancellation.then(partial(_end, connection.sock))
            response = self._answer(connection, method, self._path + path, data, headers)
            if connection.sock is not None:
                connection.sock.close()  # the response holds it too, and so ends the connection when it is closed
            return response
        except BaseException:
            connection.close()
            raise

    def _answer(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        data: bytes | None,
        headers: dict[str, str],
    ) -> http.client.HTTPResponse:
        """The response; also that of a host that answers, and reads no more, before all is sent."""
        try:
            connection.request(method, path, data, headers)
        except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError):
            try:
                return connection.getresponse()
            except (OSError, http.client.HTTPException):
                size = f"{len(data or b'')} bytes"
                raise WorkerError(
                    f"{self.url} broke off while a request of {size} was sent; send less, or try again"
                ) from None
        return connection.getresponse()

    @contextmanager
    def _connection(self) -> Iterator[None]:
        """What goes wrong with a connection, in one sentence."""
        try:
            yield
        except TimeoutError:
            raise WorkerError(f"{self.url} was silent for {self.timeout:g} s; send the request again") from None
        except ConnectionRefusedError:
            raise _NoListener(
                f"there is no server at {self.url} (connection refused); start it, or check the URL"
            ) from None
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason or "TLS failed"
            raise SfumatoError(f"no safe connection to {self.url} ({why}); check the URL, http or https") from None
        except OSError as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise WorkerError(f"the connection to {self.url} failed ({why}); check the URL, or try again") from None
        except http.client.HTTPException as error:
            why = type(error).__name__
            raise WorkerError(f"{self.url} broke off, or does not speak HTTP ({why}); try again") from None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What is missing in an answer, or of another type than it should be, is the host's fault."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
            raise self.unlike_openai("its answer has another shape") from None

    def unlike_openai(self, what: str) -> InputError:
        """The error for an answer that no OpenAI-compatible host gives."""
        return self.unlike("an OpenAI-compatible host", what)

    def unlike(self, kind: str, what: str) -> InputError:
        """The error for an answer that no host of this kind gives."""
        return InputError(f"{self.url} does not answer as {kind} does: {self.clean(what)}; check the URL")

    def _error(self, response: http.client.HTTPResponse) -> Any:
        """The body of an error, parsed where it is JSON; where a redirect points."""
        if 300 <= response.status < 400:
            return {"message": response.headers.get("Location", "")}
        try:
            return json.loads(response.read(ERROR_LIMIT))
        except (OSError, http.client.HTTPException, ValueError, RecursionError):
            return None  # the status has come, and says most

    def refusal(self, status: int | None, body: Any, path: str) -> SfumatoError:
        """The error that a host's answer stands for. `status` None: it came within a stream."""
        message, kind, code = _words_of(body)
        message = self.clean(message).rstrip(".")
        words = f": {message}" if message else ""
        what = f" ({status})" if status else ""
        if self._key is None and (status == 401 or (status == 403 and kind == "authentication_error")):
            return InputError(f"{self.url} wants an API key{what}{words}; give one")
        if status == 401 or (status == 403 and self._key is not None):
            return InputError(f"{self.url} refuses this API key{what}{words}; give another")
        is_unknown = status == 404 and (code == "model_not_found" or "model" in message.lower())
        if path != "/models" and (is_unknown or message.lower().startswith("unknown model")):
            return InputError(f"{self.url} has no such model{words}; name another{self.choice()}")
        if status in (404, 405):
            return NoSuchRoute(f"{self.url} has no /v1{path}{what}{words}; {_REMEDIES.get(path, 'check the URL')}")
        if status and 300 <= status < 400:
            return InputError(f"{self.url} sends requests elsewhere{what}{words}; give that URL")
        if "numeric_error" in (kind, code):
            return NumericError(f"{self.url} failed{what}{words}")
        if code == "context_length_exceeded":
            return CapacityError(f"{self.url} refuses the request{what}{words}")
        if status == 429 or kind in ("overloaded_error", "rate_limit_error"):
            return BusyError(f"{self.url} is busy{what}{words}; send the request again in a while")
        if (status and status < 500) or kind == "invalid_request_error":
            return InputError(f"{self.url} refuses the request{what}{words}")
        return WorkerError(f"{self.url} failed{what}{words}; send the request again")

    def choice(self) -> str:
        """The models it offers, to end a sentence with."""
        if not self.models:
            return ""
        more = len(self.models) - 5
        return f": {self.clean(', '.join(self.models[:5]))}{f' and {more} more' if more > 0 else ''}"

    def clean(self, text: str) -> str:
        """A host's words, short, and without the key or what a terminal would obey."""
        if self._key is not None:
            text = text.replace(self._key, "…")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= 300 else text[:299] + "…"


def _words_of(body: Any) -> tuple[str, Any, Any]:
    """The message of an error's body, its type and its code, in the shape of any API.

    OpenAI's has them in "error", System One's in "detail", which is a list where the request's shape is wrong; others'
    are flat, or only a text."""
    inner = body.get("error", body) if isinstance(body, dict) else {}
    if isinstance(inner, dict) and isinstance(inner.get("detail"), dict):
        inner = inner["detail"]
    inner = inner if isinstance(inner, dict) else {"message": inner}
    message = inner.get("message") or inner.get("detail") or ""
    kind, code = inner.get("type") or inner.get("error_type"), inner.get("code")
    if isinstance(message, list) and message:
        code = message[0].get("type") if isinstance(message[0], dict) else code
        message = "; ".join(map(_fault_of, message[:_MOST_FAULTS]))
    return message if isinstance(message, str) else json.dumps(message), kind, code


def _fault_of(fault: Any) -> str:
    """What is wrong with one value of a request, behind its place: `questions.team.criteria: Field required`."""
    if not isinstance(fault, dict) or not isinstance(fault.get("msg"), str):
        return json.dumps(fault)
    loc = fault.get("loc")
    place = [str(part) for part in loc if isinstance(part, (str, int))] if isinstance(loc, list) else []
    path = ".".join(place[1:] if place[:1] == ["body"] else place)
    return f"{path}: {fault['msg']}" if path else fault["msg"]


def events_of(chunks: Iterable[bytes]) -> Iterator[str | None]:
    """The data of server-sent events, from bytes split anywhere; None, and no more, for one larger than LIMIT.

    Lines end with LF, CR or CRLF; comments and fields other than data are passed over; an event that the end of the
    stream cuts off is none."""
    data: list[bytes] = []
    rest: list[bytes] = []
    size, has_begun, was_return = 0, False, False
    for chunk in chunks:
        if was_return and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            was_return = False
        if not chunk:
            continue
        was_return = chunk.endswith(b"\r")
        *ended, last = re.split(b"\r\n|\r|\n", chunk)
        for end in ended:
            line = b"".join([*rest, end])
            rest, size = [], size + len(end)
            if not has_begun:
                line, has_begun = line.removeprefix(codecs.BOM_UTF8), True
            name, _, value = line.partition(b":")
            if not line:
                if data:
                    yield b"\n".join(data).decode(errors="replace")
                data, size = [], 0
            elif name == b"data":
                data.append(value.removeprefix(b" "))
            else:
                size -= len(line)
            if size > LIMIT:
                yield None
                return
        rest.append(last)
        size += len(last)
        if size > LIMIT:
            yield None
            return


def _end(connected: socket.socket) -> None:
    """End a connection that another thread reads from, which then hears its end at once."""
    with suppress(OSError):  # it has ended already
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # of a TLS socket too, whose own would tear its state down


def split_url(url: str) -> tuple[bool, str, int | None, str]:
    """Whether a server's URL is https, its host, port, and path before a route; InputError for what is none.

    A password in it is never repeated."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
        host.encode("idna")
    except ValueError:
        raise InputError("the URL has a host or port that cannot be; give one such as http://localhost:8000") from None
    if parts.username is not None or parts.password is not None:
        raise InputError("the URL holds a user name or password; give the key as api_key, and the URL without them")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or not url.isprintable():
        raise InputError(f"the URL is {url!r}; give http://HOST:PORT or https://HOST, with or without /v1")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"
    if not re.fullmatch(r"[!-~]+", path):
        raise InputError(f"the URL is {url!r}; write spaces and letters beyond ASCII in its path as %XX")
    return parts.scheme == "https", host, port, path
