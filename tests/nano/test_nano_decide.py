"""nano_decide/: the embedded model for typed questions answers fresh ones nearly as well as can be, and says how sure.

A guard, not the measurement, which is `benchmarks/nano_decisions.py`: few questions, thresholds below the card's.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from sfumato import LLM
from sfumato.questions import Choice, Noul, Score
from sfumato.system.embedded import EMBEDDED
from sfumato.tasks import decisions
from sfumato.tasks.decisions import LabelledQuestion
from sfumato.tasks.task import named
from sfumato.templates.requests import Decide
from sfumato.training.task_source import TaskSource

COUNT = 200


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano-decide")


@pytest.fixture(scope="module")
def items(llm: LLM) -> list[LabelledQuestion]:
    assert llm.template is not None
    source = TaskSource(named("decisions"), llm.tokenizer, llm.template, seed=11, is_held_out=True)
    return [decisions.read(item) for item in source.items(COUNT, 0)]


@pytest.fixture(scope="module")
def read(llm: LLM, items: list[LabelledQuestion]) -> list[list[float]]:
    async def every() -> list[list[float]]:
        queries = [Decide(item.state, {"q": item.question}, calibrated=False) for item in items]
        return [[*one["q"].probabilities.values()] for one in await asyncio.gather(*map(llm.arun, queries))]

    return asyncio.run(every())


def test_it_is_small_and_says_how_it_was_made(llm: LLM) -> None:
    folder = EMBEDDED["nano-decide"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6
    card = (folder / "README.md").read_text()
    assert "finetune" in card and "seed" in card and "@" not in card


def test_it_is_nearly_as_right_as_can_be(items: list[LabelledQuestion], read: list[list[float]]) -> None:
    chosen = [int(np.argmax(p)) for p in read]
    ceiling = np.mean([max(item.chances) for item in items])
    assert np.mean([item.chances[choice] for item, choice in zip(items, chosen, strict=True)]) >= ceiling - 0.05


def test_its_probabilities_are_the_known_chances(items: list[LabelledQuestion], read: list[list[float]]) -> None:
    distances = [np.abs(np.array(item.chances) - p).sum() / 2 for item, p in zip(items, read, strict=True)]
    assert np.mean(distances) < 0.08
    for trust in (6, 10):  # what the document says is read off it
        sure = [max(p) for item, p in zip(items, read, strict=True) if item.state.startswith(f"trust {trust} ")]
        assert len(sure) > 10 and abs(np.mean(sure) - trust / 10) < 0.08


def test_it_answers_each_type_of_question(llm: LLM) -> None:
    answers = llm.decide(
        "trust 10 of 10\nann red\nbob red\ndan blue",
        {
            "red": Noul("Is there red?"),
            "pink": Noul("Is there pink?"),
            "desk": Choice({"blue desk": "blue lines", "gold": "gold lines"}, "Which takes this?"),
            "count": Score(["none", "one", "two", "three", "four"], "How many are red?"),
        },
    )
    assert [answers[id].choice for id in ("red", "pink", "desk", "count")] == ["true", "false", "blue desk", "2"]
    assert answers["count"].score == pytest.approx(2, abs=0.4)
