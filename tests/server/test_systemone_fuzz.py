"""server/systemone/: thousands of broken bodies, each from a seed; all get a sentence, and the server goes on."""

from __future__ import annotations

import asyncio
import base64
import copy
import gzip
import json
import random
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fake_backend import FakeBackend
from server_client import connect
from starlette.testclient import TestClient

from sfumato import LLM
from sfumato.events import Event
from sfumato.server.backend import Job, Result

PATH = "/v1/systemone"
JSON = "application/json"
PNG = b"\x89PNG\r\n\x1a\n and so on"
VALID: list[dict[str, Any]] = [
    {"model": "jev-latest", "state": "Hi. Help!", "questions": {"a": {"type": "noul", "instructions": "Is it so?"}}},
    {
        "state": {"mail": ["one", 2, None]},
        "questions": {
            "b": {
                "type": "choice",
                "instructions": ["Whose?"],
                "criteria": {"A": None, "B C": "second", "비": {"x": 1}},
            },
            "c": {"type": "score", "criteria": ["low", {"label": "high"}], "x_depends_on": {"b": "A"}},
        },
        "x_samples": 2,
        "x_steps": 2,
    },
    {
        "state": ["First line.\nSecond line. Third."],
        "questions": {
            "d": {"type": "x_span", "instructions": "Which?", "unit": "line"},
            "e": {"type": "noul", "criteria": {"true": "yes", "false": None}},
        },
        "x_seed": 3,
        "x_threshold": 0.5,
        "x_think": "never",
    },
    {
        "state": "<a>",
        "questions": {"f": {"type": "box", "instructions": "The dog"}},
        "assets": {"<a>": {"type": "image", "format": "png", "data_base64": base64.b64encode(PNG).decode()}},
    },
    {"state": [{"role": "user", "content": "Hello"}], "questions": {"g": {"type": "noul", "instructions": "x"}}},
]
TEXTS = [
    "",
    " ",
    "\n",
    "\x00",
    "\u202e",
    "🙂" * 40,
    "a" * 5000,
    "<turn|>",
    "<bos>",
    "{{ x }}",
    "%s",
    "\ufffe",
    "é\u0301",
]
NUMBERS = [0, -1, 1, 255, 2**31, 2**63, 10**400, -(10**30), 0.5, 1e308, 5e-324, -0.0]
JUNK: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    {"": {}},
    ["a", "a"],
    {"type": "noul"},
    {"true": 1},
    *TEXTS,
    *NUMBERS,
]
NAMES = [
    "",
    "type",
    "criteria",
    "instructions",
    "questions",
    "depends_on",
    "x_depends_on",
    "x_chat",
    "x_adapter",
    "unit",
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every object or list in a value with each of its keys."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    pairs = [(value, key) for key, _ in inner]
    return pairs + [pair for _, one in inner for pair in places(one)] if pairs else []


def changed(body: Any, draw: random.Random) -> Any:
    """A body with one thing in it that is another."""
    container, key = draw.choice(places(body))
    match draw.randrange(8):
        case 0 | 1 | 2:
            container[key] = copy.deepcopy(draw.choice(JUNK))
        case 3:
            del container[key]
        case 4 if isinstance(container, dict):
            container[draw.choice([*NAMES, *TEXTS])] = container.pop(key)
        case 5:
            for _ in range(draw.choice([3, 70, 300])):
                container[key] = draw.choice(([container[key]], {"a": container[key]}))
        case 6:
            size = draw.choice([2, 300, 1500]) if len(places(body)) < 100 else 2
            container[key] = draw.choice(
                ([container[key]] * size, {str(n): container[key] for n in range(size)}, dict.fromkeys(TEXTS))
            )
        case _:
            container[key] = copy.deepcopy(draw.choice(VALID)["questions"])
    return body


def text_of(body: Any, draw: random.Random) -> bytes:
    """A body as JSON, or nearly."""
    text = json.dumps(body, ensure_ascii=draw.random() < 0.5, allow_nan=True)
    data = text.encode("utf-8", "surrogatepass")
    at = draw.randrange(len(data) + 1)
    match draw.randrange(12):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + draw.randbytes(draw.choice([1, 2, 40])) + data[at:]
        case 2:
            odd = draw.choice(
                [b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b'"\\udc00\\ud800"', b"0x1", b"'a'", b"//"]
            )
            return data.replace(b'"', odd, 1) if draw.random() < 0.3 else data.replace(b"null", odd).replace(b"2", odd)
        case 3:
            return data.replace(b'"questions":', b'"questions": {}, "state": 3, "questions":', 1)
        case 4:
            return draw.choice([b"\xef\xbb\xbf" + data, text.encode("utf-16"), gzip.compress(data), b"", data * 2])
        case _:
            return data


def form_of(body: Any, draw: random.Random) -> tuple[bytes, str]:
    """A body as a form, or nearly, and its type."""
    boundary = draw.choice(["b", "0123456789abcdef", "-" * 60])
    body = copy.deepcopy(body)
    if isinstance(body, dict) and isinstance(body.get("assets"), dict) and draw.random() < 0.7:
        body["assets"] = {name: {"type": "image", "part": f"asset-{n}"} for n, name in enumerate(body["assets"])}
    parts = [b'name="request"\r\nContent-Type: application/json\r\n\r\n' + text_of(body, draw)]
    parts += [b'name="asset-%d"; filename="a"\r\n\r\n' % n + PNG for n in range(draw.randrange(3))]
    data = b"".join(b"--%s\r\nContent-Disposition: form-data; %s\r\n" % (boundary.encode(), part) for part in parts)
    data += b"--%s--\r\n" % boundary.encode()
    at = draw.randrange(len(data))
    data = draw.choice([data, data, data[:at], data[:at] + draw.randbytes(3) + data[at:], data.replace(b"\r\n", b"\n")])
    kinds = [f"multipart/form-data; boundary={boundary}"] * 4
    return data, draw.choice(
        [*kinds, f'multipart/form-data; boundary="{boundary}"', "multipart/form-data", "multipart/"]
    )


def sent(seed: int) -> tuple[bytes, str]:
    """The broken request of a seed, and its type."""
    draw = random.Random(f"systemone {seed}")
    body: Any = copy.deepcopy(draw.choice(VALID))
    for _ in range(draw.choice([0, 1, 1, 1, 2, 4])):
        if places(body):
            body = changed(body, draw)
    if draw.random() < 0.25:
        return form_of(body, draw)
    kind = draw.choice([JSON] * 16 + ["", "text/plain", "application/json; charset=utf-16", "application/x-ndjson"])
    return text_of(body, draw), kind


def fuzz(client: TestClient, seeds: range) -> Counter[int]:
    """Send the requests of these seeds; how often each status came."""
    statuses: Counter[int] = Counter()
    for seed in seeds:
        data, kind = sent(seed)
        response = client.post(PATH, content=data, headers={"content-type": kind})
        statuses[response.status_code] += 1
        assert response.status_code < 500, (seed, data[:500], response.text)
        body = json.loads(response.text, parse_constant=pytest.fail)
        if response.status_code == 200:
            assert set(body["answers"]) | {*body.get("x_skipped", [])}, seed
            continue
        assert response.status_code in (404, 413, 415, 422), (seed, response.text)
        detail = body["detail"][0]["msg"] if response.status_code == 422 else body["detail"]["message"]
        assert "\n" not in detail and 0 < len(detail) <= 2001, (seed, detail)
    assert client.post(PATH, json=VALID[0]).status_code == 200
    return statuses


def test_broken_bodies_get_a_sentence() -> None:
    with connect(FakeBackend()) as client:
        statuses = fuzz(client, range(300))
    assert statuses[200] > 30 and statuses[422] > 150


class Served(FakeBackend):
    """Answers with nano."""

    def __init__(self) -> None:
        super().__init__()
        self.llm = LLM.load("nano")

    async def run(self, job: Job) -> AsyncGenerator[Event | Result, None]:
        query: Any = job.query
        yield await asyncio.to_thread(self.llm.run, query)


@pytest.mark.slow
def test_thousands_of_broken_bodies_get_a_sentence_from_a_model() -> None:
    with connect(Served()) as client:
        statuses = fuzz(client, range(2000))
    assert statuses[200] > 200 and statuses[422] > 1000
