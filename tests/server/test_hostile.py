"""server/worker/: a live server under attack (benchmarks/hostile.py); attackers and bystanders get their answers.

How long a bystander waits is measured by the benchmark, on a machine at rest; here it is only held that nothing waits
for an attack to end.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra constrain")

import hostile_grammars

from benchmarks import client, hostile, serve
from benchmarks.client import Server

PATIENCE = 10.0
"""Seconds that a bystander may wait on two cores with other tests on them; the attacks of old took minutes."""


@contextmanager
def serving(log: Path) -> Iterator[tuple[asyncio.AbstractEventLoop, Server]]:
    loop, server = asyncio.new_event_loop(), Server(["-m", "nano"], log)
    try:
        loop.run_until_complete(server.__aenter__())
        yield loop, server
        loop.run_until_complete(server.__aexit__())
        assert server.exit_code == 0
    finally:
        loop.run_until_complete(server.__aexit__())
        loop.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.AbstractEventLoop, Server]]:
    with serving(tmp_path_factory.mktemp("hostile") / "log") as both:
        yield both


async def attacked(url: str, attack: hostile.Attack) -> tuple[list[tuple[int, str]], hostile.Bystander]:
    async with hostile.bystander(url) as one:
        answers = await asyncio.gather(
            *(hostile.send(url, path, hostile.encoded(body)) for path, body in attack.requests)
        )
        await asyncio.sleep(0.1)
    return answers, one


def case(attack: hostile.Attack) -> Any:
    """Five patterns of many paths are written beside each other for more than a minute."""
    marks = [pytest.mark.slow] if attack.name == "five new slow patterns" else []
    return pytest.param(attack, marks=marks, id=attack.name.replace(" ", "-"))


@pytest.mark.parametrize("attack", [case(attack) for attack in hostile.attacks()])
def test_an_attack_ends_itself_alone(served: Any, attack: hostile.Attack) -> None:
    loop, server = served
    answers, bystander = loop.run_until_complete(attacked(server.url, attack))
    for status, text in answers:
        assert 400 <= status < 500 if attack.is_refused else 200 <= status < 500, text
        if status >= 400:
            assert text.startswith('{"error":{"message":"') and "fault of the server" not in text
    assert bystander.failures == [] and bystander.seconds and max(bystander.seconds) < PATIENCE
    assert loop.run_until_complete(client.metric(server.url, "sfumato_worker_restarts_total")) == 0
    assert loop.run_until_complete(client.get(server.url, "/ready")).status == 200


def test_generated_patterns_and_grammars_are_most_of_them_valid() -> None:
    """So that the fuzz reaches what it is for; the same seed gives the same."""
    requests = list(hostile.generated(60, 20))
    assert requests == list(hostile.generated(60, 20)) and len(requests) == 80
    assert sum("grammar" in body for _, body in requests) == 20


@pytest.mark.slow
def test_fuzz_leaves_the_worker_and_the_bystander_alone(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as (loop, server):
        arguments = argparse.Namespace(patterns=500, grammars=200, clients=4, seed=2, seconds=2.0, key=None)
        record = loop.run_until_complete(hostile.measure_fuzz(server, arguments))
    assert sum(record["statuses"].values()) == 700 and record["statuses"]["200"] > 150
    for name, target in record["targets"].items():
        assert target["reached"], (name, target, record["bad"])


SAME = """
import sys, torch
from sfumato import LLM, Options
torch.set_num_threads(int(sys.argv[2]))
llm = LLM.load("nano", ops=sys.argv[1])
puzzle = "020008000908045603450391800301409270507082000204703901710500438045837090832010000"
print(llm.chat([{"role": "user", "content": "Solve this Sudoku:\\n" + puzzle}], options=Options(seed=3)).text)
for options in (Options(seed=1, max_tokens=82), Options(seed=2, regex="[0-9]{3}(-[a-z]{2,9}){2,5}"),
                Options(seed=4, schema={"enum": ["a", "b", {"c": [1, 2]}]})):
    print(repr(llm.complete("1 2 3", options=options).text))
print(repr(llm.infill("12", "45", options=Options(seed=5)).text))
"""


@pytest.mark.slow
def test_a_seed_gives_the_same_text_whatever_the_threads() -> None:
    """And the Sudoku, of which the model is sure, with any operations."""
    texts = {}
    for ops, threads in itertools.product(("reference", "fused", "cpu"), (1, 2)):
        child = subprocess.run(
            [sys.executable, "-c", SAME, ops, str(threads)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=True,
        )
        texts[ops, threads] = child.stdout.splitlines()
    for ops in ("reference", "fused", "cpu"):
        assert texts[ops, 1] == texts[ops, 2], ops
    assert len({lines[0] for lines in texts.values()}) == 1


@pytest.mark.slow
def test_a_seed_gives_the_same_text_after_a_restart(tmp_path: Path) -> None:
    async def texts_of(url: str) -> list[str]:
        bodies = [
            serve.chat(f"Solve this Sudoku:\n{hostile.PUZZLE}", seed=3),
            serve.chat("hello", seed=4, max_tokens=82),
        ]
        bodies += [serve.chat("hello", seed=5, max_tokens=82, regex="[0-9]{3}(-[a-z]{2,9}){2,5}")]
        with client.Connection(url) as connection:
            answers = [await connection.ask("POST", "/v1/chat/completions", body) for body in bodies]
        return [answer.json()["choices"][0]["message"]["content"] for answer in answers]

    with serving(tmp_path / "log") as (loop, server):
        before = loop.run_until_complete(texts_of(server.url))
        worker = server.worker()
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.5)
        loop.run_until_complete(server._until_ready(60))
        assert loop.run_until_complete(texts_of(server.url)) == before


@pytest.mark.slow
def test_a_hundred_hostile_grammars_leave_a_bystander_alone(tmp_path: Path) -> None:
    """Each is answered or refused by a sentence; how long a bystander waits meanwhile is in docs/LOG.md."""
    with serving(tmp_path / "log") as (loop, server):
        alone = loop.run_until_complete(hostile.idle(server.url, 5.0)).summary()
        before = client.resident_bytes(server.worker() or 0) or 0
        for family, kind, value in hostile_grammars.attacks():
            schema = {"name": "a", "schema": value if isinstance(value, dict) else {"x": value}}
            part = {"response_format": {"type": "json_schema", "json_schema": schema}} if kind == "schema" else {}
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000, "seed": 1}
            request = "/v1/chat/completions", body | (part or {kind: value})
            attack = hostile.Attack(f"{family} {str(value)[:40]}", [request])
            ((status, text),), bystander = loop.run_until_complete(attacked(server.url, attack))
            assert status in (200, 400), (attack.name, text)
            assert status == 200 or text.startswith('{"error":{"message":"'), (attack.name, text)
            assert bystander.failures == [] and max(bystander.seconds) < PATIENCE, attack.name
            assert bystander.summary()["median"] < 3 * alone["median"] + 0.05, attack.name
        assert (client.resident_bytes(server.worker() or 0) or 0) < 1.5 * before
        assert loop.run_until_complete(client.metric(server.url, "sfumato_worker_restarts_total")) == 0
