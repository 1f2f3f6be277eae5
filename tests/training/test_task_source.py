"""training/task_source.py: prompts as the engine sends them, what is learned of them, and what is held out."""

from __future__ import annotations

import pytest
import torch

from sfumato.llm import LLM
from sfumato.tasks import decisions
from sfumato.tasks.task import is_held_out, named
from sfumato.training.data.mixed import MixedSource
from sfumato.training.task_source import TaskSource


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


def source(llm: LLM, name: str, held_out: bool = False) -> TaskSource:
    assert llm.template is not None
    return TaskSource(named(name), llm.tokenizer, llm.template, 3, held_out)


def test_a_questions_prompt_is_what_decide_encodes(llm: LLM) -> None:
    decided = source(llm, "decisions")
    batch = decided.batch(0, 4, torch.device("cpu"))
    for row, item in enumerate(decided.items(4, 0)):
        one = decisions.read(item)
        ids = llm.encode([{"role": "user", "content": f"{one.state}\n\n{one.question.text()}"}])
        assert batch.tokens_BT[row, : batch.prompts[row]].tolist() == list(ids)


def test_items_that_are_held_out_are_never_trained_on(llm: LLM) -> None:
    kept = [source(llm, "decisions", held).items(60, 0) for held in (False, True)]
    assert not {*kept[0]} & {*kept[1]}
    assert not any(map(is_held_out, kept[0])) and all(map(is_held_out, kept[1]))


def test_a_kind_beside_its_task_has_items_of_its_own(llm: LLM) -> None:
    whole, kind = source(llm, "edits"), source(llm, "edits/sort")
    sorts = [item for step in range(3) for item in whole.items(40, step) if item.startswith('["sort"')]
    own = [item for step in range(3) for item in kind.items(8, step)]
    assert len(sorts) > 10 and len(own) == 24 and not {*sorts} & {*own}
    assert own[:8] == kind.items(8, 0)


@pytest.mark.parametrize("name", ["decisions", "recall"])
def test_the_models_turns_alone_are_learned(llm: LLM, name: str) -> None:
    some = source(llm, name)
    batch = some.batch(1, 6, torch.device("cpu"))
    assert batch.is_learned_BT is not None
    for row, item in enumerate(some.items(6, 1)):
        turns = named(name).earlier
        answers = [reply for _, reply in turns(item)] if turns else []
        text = llm.tokenizer.decode(batch.tokens_BT[row][batch.is_learned_BT[row]].tolist(), skip_special=False)
        assert text == "".join(f"{answer}<turn|>" for answer in [*answers, named(name).answer(item)])


def test_what_is_learned_survives_a_mixture(llm: LLM) -> None:
    mixed = MixedSource([(source(llm, "decisions"), 0.5), (source(llm, "sorting"), 0.5)], 0, llm.tokenizer.pad_id)
    batch = mixed.batch(0, 8, torch.device("cpu"))
    assert batch.is_learned_BT is not None and batch.is_learned_BT.shape == batch.tokens_BT.shape
    shares = [int(batch.is_learned_BT[row, :count].sum()) / count for row, count in enumerate(batch.counts)]
    assert sorted(share == 1 for share in shares) == [False] * 4 + [True] * 4
    assert source(llm, "sorting").batch(0, 2, torch.device("cpu")).is_learned_BT is None
