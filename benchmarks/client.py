"""What the load scripts share: a light HTTP client, the server they start, what /proc says of it, percentiles.

The client takes its share of the very cores that the server computes on, so it is raw asyncio streams under the least
of HTTP/1.1 (content-length, chunked, keep-alive) and of server-sent events: no library's models, pools or redirects. A
`Connection` carries one request at a time, as one user would. It lacks on purpose: TLS, compression, retries; a lost
answer is a finding here.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sfumato.measure.machine import ROOT

END = "[DONE]"
PAGE = os.sysconf("SC_PAGE_SIZE")
STALE = 3.0
"""Seconds after which a connection is not used again: the server may close an idle one just then."""


class Failed(Exception):
    """The connection ended before the answer did."""


class HungUp(Exception):
    """Raised by whoever watches a stream, to leave it."""


# ---- answers --------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """Times are those of `time.monotonic`."""

    status: int
    headers: dict[str, str]
    began: float
    body: bytes = b""
    events: list[tuple[float, Any]] = field(default_factory=list)
    """Of a stream: when each came, and what; the last is `END`."""
    ended: float = 0.0
    has_stray: bool = False
    """Bytes followed the answer that belong to no request."""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def first_seconds(self) -> float | None:
        """To the first committed text."""
        return next((at - self.began for at, event in self.events if has_text(event)), None)

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    def json(self) -> dict[str, Any]:
        """The body, or {} where that is no JSON object."""
        try:
            body = json.loads(self.body)
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}

    def error(self) -> dict[str, Any] | None:
        """OpenAI's error object, of a refused request or of a stream that broke off."""
        if self.status >= 400:
            details = self.json().get("error")
            return details if isinstance(details, dict) else {"message": self.body[:200].decode(errors="replace")}
        return next((event["error"] for _, event in self.events if isinstance(event, dict) and "error" in event), None)

    def usage(self) -> dict[str, Any]:
        if not self.is_stream:
            return self.json().get("usage") or {}
        return next((e["usage"] for _, e in reversed(self.events) if isinstance(e, dict) and e.get("usage")), {})

    def text(self) -> str:
        """Of a stream's choices, joined."""
        return "".join(
            (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            for _, event in self.events
            if isinstance(event, dict)
            for choice in event.get("choices", ())
        )


def has_text(event: Any) -> bool:
    """Whether this chunk of a stream adds something final."""
    if not isinstance(event, dict):
        return False
    parts = [{**choice, **(choice.get("delta") or {})} for choice in event.get("choices", ())]
    return any(part.get(name) for part in parts for name in ("content", "text", "reasoning_content", "tool_calls"))


class Events:
    """Server-sent events out of bytes that come in any pieces; comments are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for line in (line.removesuffix(b"\r").decode() for line in lines):
            if line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data = []
        return events


def parsed(data: str) -> Any:
    return data if data == END else json.loads(data)


# ---- one user's connection ------------------------------------------------------------------------------------------


class Connection:
    """One request at a time. Whatever goes wrong, a watcher's HungUp and a cancellation too, closes it."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._fixed = f"host: {self._host}:{self._port}\r\ncontent-type: application/json\r\n"
        if key:
            self._fixed += f"authorization: Bearer {key}\r\n"
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._held = b""
        self._used = 0.0

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        request: str = "",
        watch: Callable[[Any], None] | None = None,
        promised: int | None = None,
    ) -> Answer:
        """The answer, whole. `body` is JSON, or bytes as they are; `watch` sees each event of a stream as it comes;
        `promised` is a content-length other than the body's."""
        try:
            answer = await self._ask(method, path, body, request, watch, promised)
        except BaseException as error:
            self.close()
            if isinstance(error, ConnectionError):
                raise Failed(f"{type(error).__name__}: {error}") from None
            raise
        self._used = answer.ended
        if promised is not None or answer.headers.get("connection") == "close":
            self.close()
        return answer

    async def send_part(self, path: str, body: Any, share: float) -> None:
        """Open, send this share of a request, and go."""
        self.close()
        data = self._message("POST", path, json.dumps(body).encode(), "", None)
        try:
            _, writer = await asyncio.open_connection(self._host, self._port)
            writer.write(data[: int(share * len(data))])
            await writer.drain()
        except ConnectionError as error:
            raise Failed(f"{type(error).__name__}: {error}") from None
        writer.transport.abort()

    def _message(self, method: str, path: str, data: bytes, request: str, promised: int | None) -> bytes:
        length = len(data) if promised is None else promised
        named = f"x-request-id: {request}\r\n" if request else ""
        return f"{method} {path} HTTP/1.1\r\n{self._fixed}{named}content-length: {length}\r\n\r\n".encode() + data

    async def _ask(
        self, method: str, path: str, body: Any, request: str, watch: Callable[[Any], None] | None, promised: int | None
    ) -> Answer:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        began = time.monotonic()
        if self._reader is None or self._reader.at_eof() or began - self._used > STALE:
            self.close()
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
            self._held = b""
        assert self._writer is not None
        self._writer.write(self._message(method, path, data, request, promised))
        with suppress(ConnectionError):  # refused in the middle of the body: the answer may be there all the same
            await self._writer.drain()
        status, headers = await self._head()
        answer = Answer(status, headers, began)
        events, pieces = Events(), []
        async for piece in self._body(headers):
            if not answer.is_stream:
                pieces.append(piece)
                continue
            for text in events.feed(piece):
                answer.events.append((time.monotonic(), parsed(text)))
                if watch is not None:
                    watch(answer.events[-1][1])
        answer.body, answer.ended, answer.has_stray = b"".join(pieces), time.monotonic(), bool(self._held)
        return answer

    async def _head(self) -> tuple[int, dict[str, str]]:
        status = 100
        while status < 200:  # 100 Continue says nothing
            status = int((await self._line()).split()[1])
            headers: dict[str, str] = {}
            while line := await self._line():
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
        return status, headers

    async def _body(self, headers: dict[str, str]) -> Any:
        if headers.get("transfer-encoding") == "chunked":
            while size := int((await self._line()).partition(";")[0], 16):
                yield await self._exactly(size)
                await self._line()
            while await self._line():
                pass
        else:
            yield await self._exactly(int(headers.get("content-length", 0)))

    async def _more(self) -> None:
        assert self._reader is not None
        piece = await self._reader.read(1 << 16)
        if not piece:
            raise Failed("the connection was closed before the answer's end")
        self._held += piece

    async def _line(self) -> str:
        while (end := self._held.find(b"\n")) < 0:
            await self._more()
        line, self._held = self._held[:end], self._held[end + 1 :]
        return line.removesuffix(b"\r").decode("latin-1")

    async def _exactly(self, count: int) -> bytes:
        while len(self._held) < count:
            await self._more()
        data, self._held = self._held[:count], self._held[count:]
        return data


# ---- the server -----------------------------------------------------------------------------------------------------


class Server:
    """`sfumato serve` as a process of its own, ended with the block; or one that runs (`url`, perhaps `pid`)."""

    def __init__(self, flags: Sequence[str], log: Path, url: str | None = None, pid: int | None = None) -> None:
        self._flags, self.log, self.url, self.pid = list(flags), log, url or "", pid
        self._process: subprocess.Popen[bytes] | None = None
        self.exit_code: int | None = None

    async def __aenter__(self) -> Server:
        if not self.url:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            command = [str(Path(sys.executable).with_name("sfumato")), "serve", "--port", "0", *self._flags]
            say(f"starting sfumato serve {shlex.join(command[2:])}")
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            self.pid = self._process.pid
        try:
            await self._until_ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _until_ready(self, seconds: float = 600.0) -> None:
        began = reported = time.monotonic()
        while time.monotonic() < began + seconds:
            if self._process is not None and self._process.poll() is not None:
                raise SystemExit(f"the server ended: {self.log.read_text(errors='replace')[-2000:]}")
            if not self.url and (address := re.search(r"http://(127\.0\.0\.1|localhost):\d+", self.log.read_text())):
                self.url = address[0]
            if self.url:
                with suppress(Failed, OSError):
                    if (await get(self.url, "/ready")).status == 200:
                        say(f"{self.url} is ready after {time.monotonic() - began:.1f} s")
                        return
            if time.monotonic() > reported + 10:
                reported = time.monotonic()
                say(f"waiting for the server, {reported - began:.0f} s")
            await asyncio.sleep(0.1)
        raise SystemExit(f"the server was not ready within {seconds:.0f} s; its log is {self.log}")

    async def __aexit__(self, *_: object) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, 60)
        with suppress(ProcessLookupError):  # its group: nothing of it is left behind
            os.killpg(self._process.pid, signal.SIGKILL)
        self.exit_code = self._process.wait()

    def worker(self) -> int | None:
        """The process that runs the model: of the server's children the one that holds most memory."""
        bytes_by_pid = {pid: resident_bytes(pid) or 0 for pid in children(self.pid)} if self.pid else {}
        return max(bytes_by_pid, key=lambda pid: bytes_by_pid[pid]) if any(bytes_by_pid.values()) else None


async def get(url: str, path: str, key: str | None = None) -> Answer:
    with Connection(url, key) as connection:
        try:
            return await asyncio.wait_for(connection.ask("GET", path), 10)
        except TimeoutError:
            raise Failed(f"GET {path} took more than 10 s") from None


async def card(url: str, key: str | None = None) -> dict[str, Any]:
    """The loaded model, as GET /v1/models describes it."""
    model: dict[str, Any] = (await get(url, "/v1/models", key)).json()["data"][0]
    return model


async def metric(url: str, name: str, key: str | None = None) -> float:
    return metric_in((await get(url, "/metrics", key)).body.decode(), name)


def metric_in(page: str, name: str) -> float:
    """The sum of a metric's values over its labels; 0 where there is none."""
    return sum(float(line.split()[-1]) for line in page.splitlines() if re.match(rf"{name}[ {{]", line))


async def until_idle(url: str, key: str | None = None, seconds: float = 30.0) -> float | None:
    """Seconds until no row is taken and no job waits; None: not within `seconds`."""
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        page = (await get(url, "/metrics", key)).body.decode()
        if metric_in(page, "sfumato_rows") + metric_in(page, "sfumato_queue_jobs") == 0:
            return time.monotonic() - began
        await asyncio.sleep(0.2)
    return None


def children(pid: int) -> list[int]:
    """The processes that this one started; multiprocessing's own helper left out."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # gone meanwhile
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                    pids.append(int(entry.name))
    return pids


def resident_bytes(pid: int) -> int | None:
    """None for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE or None
    except (OSError, IndexError):
        return None


# ---- figures --------------------------------------------------------------------------------------------------------


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that this share of all does not exceed (nearest rank); NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{p}": percentile(values, p / 100) if values else None for p in (50, 95, 99)}


def say(text: str) -> None:
    print(f"{Path(sys.argv[0]).stem}: {text}", file=sys.stderr, flush=True)
