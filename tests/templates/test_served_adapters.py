"""templates/adapters.py: rows of several adapters share a batch and give the text of each alone; they come and go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sfumato import LLM, Choice, Options, Slot
from sfumato.checkpoints.adapters import write_adapter
from sfumato.engine.jobs import Jobs
from sfumato.engine.limits import BatchLimits
from sfumato.errors import CapacityError, InputError
from sfumato.events import Completion, Decisions, Done
from sfumato.model.adapters import TARGETS, Adapter, Factors, merge_, new_adapter, targeted
from sfumato.model.network import Model, adaptable
from sfumato.ops.lowrank import LowRank
from sfumato.templates import adapters
from sfumato.templates.requests import (
    Chat,
    Complete,
    Decide,
    Edit,
    Fill,
    Infill,
    Likelihood,
    LoadAdapter,
    QueryFor,
    UnloadAdapter,
)

MESSAGES = [{"role": "user", "content": "Solve this Sudoku:\n" + "8005607902570016" * 5 + "4"}]
QUICK = Options(seed=3, max_steps=3)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def nano() -> LLM:
    llm = LLM.load("nano", ops="fused")
    model = llm.model
    for name, seed in (("first", 1), ("second", 2)):
        llm.adapters.load(name, strong(model, seed))
    apart = dataclasses.replace(strong(model, 3), denoise=strong(model, 4, targets=("attention",), rank=2).factors)
    llm.adapters.load("apart", apart)
    return llm


def strong(model: Model, seed: int, targets: tuple[str, ...] = tuple(TARGETS), rank: int = 3) -> Adapter:
    """An adapter that changes every answer."""
    adapter, draws = new_adapter(model, rank, rank, targets, seed=seed), torch.Generator().manual_seed(seed)
    for factors in adapter.factors.values():
        factors.b.normal_(0.0, 0.05, generator=draws)
    return adapter


def carried_out(jobs: Jobs[Any]) -> dict[str, Any]:
    """What each job has ended with."""
    last: dict[str, Any] = {}
    while not jobs.is_idle:
        last.update(jobs.turn())
    return last


def queries(options: Options) -> list[QueryFor[Any]]:
    """One of every kind, and an answer token by token."""
    fields = {"a": Choice(["1", "2"]), "b": Choice(["3", "45"])}
    return [
        Chat(MESSAGES, options=dataclasses.replace(options, max_tokens=82)),
        Complete("1 2 3", dataclasses.replace(options, max_tokens=6, max_steps=None, mode="autoregressive")),
        Infill("12", "45", 3, options=options),
        Fill(["1 2 ", Slot("x", choices=("3", "4")), " 5 ", Slot("y", length=2), " 6"], MESSAGES, options),
        Edit("123456", spans=[(1, 3)], options=options),
        Decide(MESSAGES, fields, options=dataclasses.replace(options, max_steps=None)),
        Likelihood("1 2 3 4 5 6", options=options),
    ]


def plain(result: Any) -> Any:
    """What a result says, its numbers rounded: rows of a batch are summed in another order."""
    if isinstance(result, Done | Completion):
        return result.tokens
    if isinstance(result, Decisions):
        return {name: [round(p, 3) for p in one.probabilities.values()] for name, one in result.items()}
    if hasattr(result, "values"):
        return result.values
    return [round(one.logprob or 0.0, 3) for one in result.tokens] if hasattr(result, "tokens") else result.text


def test_rows_of_several_adapters_give_the_text_of_each_alone(nano: LLM) -> None:
    names = [None, *nano.adapters.names]
    numbered = [(f"{name} {n}", one) for name in names for n, one in enumerate(queries(options_of(name)))]
    jobs: Jobs[QueryFor[Any]] = Jobs(nano, BatchLimits(rows=len(numbered)))
    for id, query in numbered:
        jobs.begin(id, query)
    together = {id: plain(result) for id, result in carried_out(jobs).items()}
    assert together == {id: plain(nano.run(query)) for id, query in numbered}
    for n in range(len(queries(QUICK))):
        if n != 4:  # two positions of an edit may agree
            assert len({str(together[f"{name} {n}"]) for name in names}) > 1, n
    assert len({str(together[f"{name} 0"]) for name in names}) == len(names)


def tokens_of(end: Any) -> list[int]:
    tokens: list[int] = end.tokens
    return tokens


def options_of(name: str | None, **more: Any) -> Options:
    return dataclasses.replace(QUICK, **{"adapter": name, **more})


def test_an_answer_is_that_of_the_merged_model(nano: LLM) -> None:
    merged = LLM.load("nano", ops="fused")
    merge_(merged.model, strong(merged.model, 2))
    for query, own in zip(queries(options_of("second"))[::3], queries(QUICK)[::3], strict=True):
        assert plain(nano.run(query)) == plain(merged.run(own))


def test_nothing_that_one_adapter_has_encoded_is_another_ones(nano: LLM) -> None:
    options = [options_of(name, max_tokens=82) for name in (None, "first", "second", "first", None)]
    fresh = []
    for one in options:
        nano.forget()
        fresh.append(nano.chat(MESSAGES, options=one).tokens)
    assert [nano.chat(MESSAGES, options=one).tokens for one in options] == fresh
    jobs: Jobs[QueryFor[Any]] = Jobs(nano, BatchLimits(rows=1))  # one after the other, in one seat
    for n, one in enumerate(options):
        jobs.begin(str(n), Chat(MESSAGES, options=one))
    ends = carried_out(jobs)
    assert [ends[str(n)].tokens for n in range(len(options))] == fresh
    assert jobs.figures().prefix_hits == 2  # those that come again


def test_what_is_unloaded_ends_with_its_rows_and_comes_anew() -> None:
    llm = LLM.load("nano", ops="fused")
    model = llm.model
    before = [getattr(owner, leaf) for owner, leaf in adaptable(model)]
    llm.adapters.load("a", strong(model, 1))
    query = Chat(MESSAGES, options=options_of("a", max_tokens=164, max_steps=6, confidence=0.0))
    alone = llm.run(query)
    jobs: Jobs[QueryFor[Any]] = Jobs(llm, BatchLimits(rows=4))
    jobs.begin("old", query)
    for _ in range(3):
        jobs.turn()
    jobs.begin("unload", UnloadAdapter("a"))
    changed: Any = dict(jobs.turn())["unload"]
    assert changed.adapters == () and llm.adapters.names == []
    with pytest.raises(InputError, match="there is no adapter 'a'; loaded are: none is loaded"):
        jobs.begin("late", query)
    llm.adapters.load("a", strong(model, 2))  # the old row keeps its lane
    jobs.begin("new", query)
    ends = carried_out(jobs)
    assert tokens_of(ends["old"]) == alone.tokens
    llm.forget()
    assert tokens_of(ends["new"]) == llm.run(query).tokens != alone.tokens
    jobs.begin("unload", UnloadAdapter("a"))
    carried_out(jobs)
    llm.forget()
    del ends
    llm.bank.settle()
    after = [getattr(owner, leaf) for owner, leaf in adaptable(model)]
    assert not any(isinstance(weight, LowRank) for weight in after) and llm.bank.bytes == 0
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True) if isinstance(pair[0], torch.Tensor))


def test_a_hundred_adapters_on_one_model() -> None:
    llm = LLM.load("nano", ops="fused")
    model, count, rank = llm.model, 100, 16
    for n in range(count):
        listed = llm.adapters.load(f"a{n:02}", small(model, n, rank))
    assert len(listed.adapters) == count and {one.rank for one in listed.adapters} == {rank}
    own = listed.adapters[0].bytes
    assert own == sum(sum(place(model, name)) * rank * 4 for name in targeted(model, ("attention", "dense")))
    assert count * own <= listed.bytes == llm.bank.bytes <= 2 * count * own
    jobs: Jobs[QueryFor[Any]] = Jobs(llm, BatchLimits(rows=16))
    assert (jobs.figures().adapters, jobs.figures().adapter_bytes) == (count, listed.bytes)
    memory = jobs.batch.memory
    names = [f"a{n:02}" for n in range(3, count, 12)]
    for name in names:
        jobs.begin(name, Complete("1 2 3", options_of(name, max_tokens=8, short=True)))
    ends = carried_out(jobs)
    assert len({str(ends[name].tokens) for name in names}) > 1
    for name in names[:2]:
        query = Complete("1 2 3", options_of(name, max_tokens=8, short=True))
        assert llm.run(query).tokens == ends[name].tokens
    for name in llm.adapters.names[1:]:
        llm.bank.unload(name)
    assert llm.bank.growth(small(model, 0, rank)) == 0  # there is room again
    assert jobs.batch.memory == memory  # as long as the room is kept
    jobs.begin("last", UnloadAdapter("a00"))
    carried_out(jobs)
    llm.forget()
    llm.bank.settle()
    jobs.batch.count_adapters(llm.bank)
    assert llm.bank.bytes == 0 and jobs.batch.memory == memory + listed.bytes


def small(model: Model, seed: int, rank: int) -> Adapter:
    """An adapter of attention and dense weights that is quickly made."""
    draws, factors = torch.Generator().manual_seed(seed), {}
    for name in targeted(model, ("attention", "dense")):
        outputs, inputs = place(model, name)
        a = torch.full((rank, inputs), 0.01)
        factors[name] = Factors(a, torch.randn(1, outputs, generator=draws).expand(rank, -1), 0.5)
    return Adapter(factors)


def place(model: Model, name: str) -> tuple[int, int]:
    """Outputs and inputs of a weight."""
    owner, leaf = targeted(model)[name]
    outputs, inputs = getattr(owner, leaf).shape
    return outputs, inputs


def test_folders_are_loaded_with_the_model_and_later(tmp_path: Path) -> None:
    model = LLM.load("nano", ops="fused").model
    for n in (1, 2):
        write_adapter(strong(model, n, ("attention",)), tmp_path / f"run{n}", model, base="nano")
    llm = LLM.load("nano", ops="fused", adapters={"one": tmp_path / "run1"})
    assert llm.adapters.names == ["one"]
    expected = llm.chat(MESSAGES, options=options_of("one", max_tokens=20)).text
    listed = llm.run(LoadAdapter("two", str(tmp_path / "run2")))
    assert [one.name for one in listed.adapters] == llm.adapters.names == ["one", "two"]
    llm.adapters.unload("one")
    llm.adapters.load("again", str(tmp_path / "run1"))
    assert llm.chat(MESSAGES, options=options_of("again", max_tokens=20)).text == expected
    with pytest.raises(InputError, match="there is no adapter 'one'; loaded are: again, two"):
        llm.chat(MESSAGES, adapter="one")
    llm.close()
    with pytest.raises(InputError, match="closed"):
        llm.adapters.load("one", tmp_path / "run1")


def test_what_cannot_be_loaded_is_refused_by_one_sentence(
    nano: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, names = nano.model, nano.adapters.names
    good = strong(model, 9)
    other = strong(tiny.tiny_model(), 1)
    whole = dataclasses.replace(good, whole={"norm.weight": torch.ones(4)})
    cases: list[tuple[str, Any, str]] = [
        ("first", good, "'first' is loaded already; unload it first"),
        ("", good, "called ''; give a name"),
        ("a\nb", good, "give a name of 1 to 256 printable characters"),
        ("x", whole, "replaces whole weights .* sfumato convert MODEL --adapter DIR"),
        ("x", other, "it is for another model"),
        ("x", 5, "the adapter is 5; give a folder"),
        ("x", tmp_path / "none", "none"),
    ]
    for name, adapter, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            nano.adapters.load(name, adapter)
    with pytest.raises(InputError, match="there is no adapter 'x'; loaded are: apart, first, second"):
        nano.adapters.unload("x")
    monkeypatch.setattr(adapters, "free_memory", lambda device: 1000)
    with pytest.raises(
        CapacityError, match=r"of rank 64 needs 0.\d\d GB .* 0.00 are free; unload another one, or merge"
    ):
        nano.adapters.load("x", strong(model, 9, rank=64))
    write_adapter(good, tmp_path / "run", model, base="nano")
    with pytest.raises(CapacityError, match=r"run/adapter_model.safetensors has 0.\d\d GB, and 0.00 are free"):
        nano.adapters.load("x", tmp_path / "run")
    assert nano.adapters.names == names
