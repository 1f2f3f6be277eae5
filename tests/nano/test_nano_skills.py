"""nano_skills/: the embedded model for edits, gaps in code, molecules and plots does what its card says.

A guard, not the measurement, which is `benchmarks/skills.py`: few items, thresholds below the card's.
"""

from __future__ import annotations

import pytest

from sfumato import LLM, Options
from sfumato.evals.tasks import answers, fresh, rate
from sfumato.system.embedded import EMBEDDED
from sfumato.tasks.task import named

ITEMS = 40
LEAST = {"edits": 0.5, "infill": 0.7, "molecules": 0.45, "families": 0.5}
"""Share of fresh items that are right at least."""


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano-skills")


def test_it_is_small_and_says_how_it_was_made(llm: LLM) -> None:
    folder = EMBEDDED["nano-skills"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    card = (folder / "README.md").read_text()
    assert "finetune" in card and "seed" in card and "@" not in card


@pytest.mark.parametrize("name", LEAST)
def test_it_does_its_skills(llm: LLM, name: str) -> None:
    exercise = fresh(named(name), ITEMS, 11)
    results = list(answers(llm, exercise.task, exercise.items, Options(seed=11)))
    assert rate(results) >= LEAST[name]


def test_the_card_has_an_edit_that_works(llm: LLM) -> None:
    text, instruction = '{"name": "oak", "size": 7}', "Rename size to price."
    assert f".edit('{text}', \"{instruction}\", strength=0)" in (EMBEDDED["nano-skills"] / "README.md").read_text()
    assert llm.edit(text, instruction, strength=0, seed=0).text == '{"name": "oak", "price": 7}'
