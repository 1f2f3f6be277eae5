"""server/systemone/: the public conformance suite, TypeSafe's own clients and transformers' requests, on nano.

The options that the suite asks about are longer than nano's context: it is nano's checkpoint with a longer one.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend, serving

from sfumato import LLM, nano
from sfumato.errors import BusyError
from sfumato.events import Event
from sfumato.server.app import Settings, create
from sfumato.server.backend import Job, Result

jevcompat = pytest.importorskip("jevcompat.runner", reason="needs the package jevcompat")
typesafe = pytest.importorskip("typesafe_sdk", reason="needs the package typesafe-sdk")

KEY = "test-key"
STATE = "I was charged twice for my March invoice. Please refund one of them today."
CONTEXT = 16384

RECORDS: dict[str, Any] = {
    "refund": {"type": "noul", "instructions": "Is a refund requested?"},
    "calm": {"type": "noul", "criteria": {"true": "The writer is calm", "false": {"signals": ["threats"]}}},
    "team 🙂": {"type": "choice", "instructions": "Whose?", "criteria": {"Billing": "Invoices", "기술": None}},
    "anger": {"type": "score", "criteria": ["Calm", {"label": "Frustrated"}, ["Very", "angry"]]},
}


class Served(FakeBackend):
    """Answers with a model of this process."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm

    async def run(self, job: Job) -> AsyncGenerator[Event | Result, None]:
        query: Any = job.query
        self.jobs.append(job)
        yield await asyncio.to_thread(self.llm.run, query)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("nano") / "long"
    shutil.copytree(Path(nano.__path__[0]), folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = folder / "config.json"
    values = json.loads(config.read_text())
    values.get("text_config", values)["max_position_embeddings"] = CONTEXT
    config.write_text(json.dumps(values))
    return LLM.load(folder)


@contextmanager
def served(backend: FakeBackend, key: str | None = None) -> Iterator[str]:
    with serving(create(backend, Settings(keys=(key,) if key else ()))) as one:
        yield one.url


# ---- jevcompat -------------------------------------------------------------------------------------------------------


def check(report: Any, skipped: set[str]) -> None:
    """Every requirement passes but these, which do not apply."""
    failures = [f"{one.id}: {fault.message}" for one in report.results for fault in one.findings]
    assert failures == [] and report.case_errors == [] and report.inconclusive == [] and report.aborted is None
    assert report.verdict == "conformant" and {one.id for one in report.results if one.status == "skip"} == skipped
    assert len(report.results) == 48 and report.info["limits"]["choice options accepted up to"] == 255


def test_the_conformance_suite_passes_without_a_key(llm: LLM) -> None:
    with served(Served(llm)) as url:
        report = jevcompat.run(url)
    check(report, {"auth.bearer", "auth.missing", "auth.invalid"})  # no key is needed here


def test_the_conformance_suite_passes_with_a_key() -> None:
    """Over a backend without a model: what it judges of answers is judged above."""
    with served(FakeBackend(), KEY) as url:
        report = jevcompat.run(url, key=KEY)
    check(report, {"auth.ignored-when-off"})  # a key is needed here


# ---- typesafe-sdk ----------------------------------------------------------------------------------------------------

QUESTIONS: dict[str, Any] = {
    "refund": typesafe.Noul(instructions="Is a refund requested?"),
    "calm": RECORDS["calm"],
    "team 🙂": typesafe.Choice(instructions="Whose?", criteria={"Billing": "Invoices", "기술": None}),
    "anger": typesafe.Score(criteria=["Calm", {"label": "Frustrated"}, ["Very", "angry"]]),
    "where": {"type": "x_span", "instructions": "Where is the invoice named?"},
}


def check_answers(result: Any, llm: LLM) -> None:
    local = llm.decide(STATE, RECORDS, seed=0)
    assert result.model == "fake" and result.usage.input_tokens > 0
    assert set(result.nouls) == {"refund", "calm"} and set(result.choices) == {"team 🙂"}
    assert result.nouls["calm"].noul == pytest.approx(local["calm"].probability, abs=1e-5)
    team, anger = result.choices["team 🙂"], result.scores["anger"]
    assert team.choice == local["team 🙂"].choice
    assert team.probabilities == pytest.approx(local["team 🙂"].probabilities, abs=1e-5)
    assert anger.legend == dict(enumerate(RECORDS["anger"]["criteria"]))
    assert anger.score == pytest.approx(local["anger"].score, abs=1e-5)
    assert anger.confidence == pytest.approx(local["anger"].confidence, abs=1e-5)
    raw = result.raw_http_response.json()["answers"]["where"]  # which the SDK does not know
    assert raw["passage"] == STATE[raw["start"] : raw["end"]] in raw["probabilities"]


def test_typesafes_client_asks_every_kind_of_question(llm: LLM) -> None:
    with (
        served(Served(llm), KEY) as url,
        typesafe.TypeSafeClient(api_key=KEY, base_url=url, timeout=60) as client,
    ):
        check_answers(client.system_one(state=STATE, questions=QUESTIONS), llm)
        assert [model.name for model in client.models.list().models] == ["fake", "jev-latest", "jev-preview"]
        several = client.system_one(state={"mail": [STATE]}, questions={"a": QUESTIONS["refund"]}, model="jev-preview")
        assert 0 <= several.nouls["a"].noul <= 1


def test_typesafes_awaited_client_does_too(llm: LLM) -> None:
    async def ask(url: str) -> None:
        async with typesafe.AsyncTypeSafeClient(api_key=KEY, base_url=url, timeout=60) as client:
            check_answers(await client.system_one(state=STATE, questions=QUESTIONS), llm)
            assert (await client.models.list()).models[0].name == "fake"

    with served(Served(llm), KEY) as url:
        asyncio.run(ask(url))


def test_typesafes_client_knows_the_errors(tmp_path: Path) -> None:
    image = typesafe.Image(b"\x89PNG\r\n\x1a\nand so on")
    with served(FakeBackend(), KEY) as url, typesafe.TypeSafeClient(api_key=KEY, base_url=url) as client:
        with pytest.raises(typesafe.TypeSafeUnprocessableEntityError, match="reads no images") as refusal:
            client.system_one(state=image, questions={"dog": typesafe.Noul(instructions="Is there a dog?")})
        assert refusal.value.request_id.startswith("req_")
        with pytest.raises(typesafe.TypeSafeUnprocessableEntityError, match="reads no images"):
            client.system_one(state="x", questions={"dog": typesafe.Box(instructions="The dog")})
        with pytest.raises(typesafe.TypeSafeUnprocessableEntityError, match=r"questions\.q\.choice\.criteria: there"):
            client.system_one(state="x", questions={"q": typesafe.Choice(criteria={str(n): None for n in range(1025)})})
        with pytest.raises(typesafe.TypeSafeNotFoundError, match="there is no model 'gpt-5'"):
            client.system_one(state="x", questions={"q": RECORDS["refund"]}, model="gpt-5")
        stranger = typesafe.TypeSafeClient(api_key="no", base_url=url)
        with pytest.raises(typesafe.TypeSafeAuthenticationError, match="API key"):
            stranger.system_one(state="x", questions={"q": RECORDS["refund"]})
        with pytest.raises(typesafe.TypeSafeAuthenticationError, match="API key"), stranger:
            stranger.models.list()


def test_typesafes_client_comes_again_where_too_many_wait() -> None:
    backend = FakeBackend(error=BusyError("too many wait"))
    retry = typesafe.RetryPolicy(max_retries=1, respect_retry_after=False, backoff_initial=0)
    with served(backend) as url, typesafe.TypeSafeClient(api_key="x", base_url=url, retry=retry) as client:
        with pytest.raises(typesafe.TypeSafeInternalServerError, match="too many wait") as busy:
            client.system_one(state="x", questions={"q": RECORDS["refund"]})
        assert busy.value.status == 503 and len(backend.jobs) == 2


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_requests_of_transformers_have_answers_of_the_same_shape(llm: LLM) -> None:
    from transformers.decision import DecisionConfig
    from transformers.decision.template_utils import parse_questions

    request = {"state": {"mail": STATE}, "questions": RECORDS, "assets": None}
    with served(Served(llm)) as url:
        answers = httpx.post(f"{url}/v1/systemone", json=request, timeout=60).json()["answers"]
    for question in parse_questions(RECORDS, DecisionConfig()):
        ours = {name: value for name, value in answers[question.name].items() if not name.startswith("x_")}
        p_true = ours.get("noul")
        by_option = ours.get("probabilities", {"true": p_true, "false": None if p_true is None else 1 - p_true})
        theirs = question.answer([by_option[option] for option in question.options])
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert ours[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), name
