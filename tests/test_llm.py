"""llm.py: text in, text out, on the embedded model: prompts, streams, stop strings, seeds, batches, what is kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wrong_arguments import WRONG, places

from sfumato import LLM, Options
from sfumato.engine.request import Request
from sfumato.engine.run import Run
from sfumato.errors import CapacityError, InputError
from sfumato.evals.sudoku import request, solve
from sfumato.events import Commit, Done, Draft, Edited
from sfumato.ops import cpu
from sfumato.ops.cpu import build
from sfumato.tasks.sudoku import is_solved
from sfumato.templates.requests import Edit

PUZZLE = "800560790257001600040000152004050800038607041096348275085906320902704518370285400"
"""50 clues: nano solves it in a few steps."""
ONE = Options(max_tokens=82, seed=3)

needs_cpu = pytest.mark.skipif(build.obstacle() is not None, reason=f"the library cannot be built: {build.obstacle()}")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


def ask(puzzle: str = PUZZLE) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"Solve this Sudoku:\n{puzzle}"}]


def test_a_chat_answers_with_the_solution(llm: LLM) -> None:
    answer = llm.chat(ask(), options=ONE)
    assert is_solved(answer.text, PUZZLE)
    assert answer.finish_reason == "stop" and answer.tokens[-1] in llm.model.config.eos_ids
    assert answer.usage.tokens == len(answer.tokens) == 82 and answer.usage.prompt_tokens == 95
    assert answer.usage.passes == answer.usage.steps > 0
    assert answer.usage.tokens_per_pass == pytest.approx(82 / answer.usage.steps)
    assert answer.seed == 3 and answer.thought is None and answer.tool_calls == []


def test_a_stream_is_drafts_then_commits_then_done_and_its_texts_join(llm: LLM) -> None:
    events = list(llm.stream(ask(), options=replace(ONE, drafts=True)))
    drafts = [e for e in events if isinstance(e, Draft)]
    commits = [e for e in events if isinstance(e, Commit)]
    assert [d.step for d in drafts] == list(range(1, len(drafts) + 1))
    assert len(commits) == 1 and isinstance(events[-1], Done) and events.index(commits[0]) == len(drafts)
    assert "".join(c.text for c in commits) == events[-1].text == drafts[-1].text
    assert all(len(d.tokens) == len(d.entropies) == len(d.accepted) == 82 for d in drafts)
    assert not any(isinstance(e, Draft) for e in llm.stream(ask(), options=ONE))


def test_an_edit_is_watched_draft_by_draft_and_ends_with_its_result(llm: LLM) -> None:
    options = Options(seed=3, max_steps=3)
    edit = Edit("12345", "1", options=replace(options, drafts=True))
    *drafts, edited = llm.outcomes(edit)
    assert drafts and all(isinstance(draft, Draft) for draft in drafts) and isinstance(edited, Edited)
    steps = [draft.step for draft in drafts if isinstance(draft, Draft)]
    assert steps == [*range(1, edited.usage.steps + 1)]
    watching = llm.outcomes(edit)
    assert isinstance(next(watching), Draft)
    watching.close()  # type: ignore[attr-defined]
    (alone,) = llm.outcomes(replace(edit, options=options))
    assert isinstance(alone, Edited) and alone.text == edited.text == llm.edit("12345", "1", options=options).text


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(llm: LLM) -> None:
    texts = ["Solve this", "Sudoku: 1", "user 53", "7"]
    options = Options(max_tokens=100, seed=11, max_steps=4)
    alone = [llm.complete(text, options=options).tokens for text in texts]
    together = [c.tokens for c in llm.complete(texts, options=options)]
    assert alone == together
    assert alone[0] != llm.complete(texts[0], options=replace(options, seed=12)).tokens


def test_without_a_seed_the_one_used_is_told_and_repeats_the_text(llm: LLM) -> None:
    options = Options(max_tokens=82, max_steps=2)
    first = llm.complete("Solve", options=options)
    assert llm.complete("Solve", options=replace(options, seed=first.seed)).tokens == first.tokens
    assert llm.complete("Solve", options=options).seed != first.seed


@pytest.mark.parametrize("cut", [1, 4, 20, 80])
def test_a_stop_string_ends_the_text_wherever_it_falls(llm: LLM, cut: int) -> None:
    whole = llm.chat(ask(), options=ONE).text
    stop = whole[cut : cut + 3]
    answer = llm.chat(ask(), options=replace(ONE, stop=(stop, "never")))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop" and answer.stop == stop


def test_max_tokens_cuts_and_says_so(llm: LLM) -> None:
    answer = llm.chat(ask(), options=replace(ONE, max_tokens=10))
    assert answer.finish_reason == "length" and len(answer.tokens) == 10 and len(answer.text) == 10


def test_a_second_turn_reuses_what_is_encoded_and_answers_the_same(llm: LLM) -> None:
    first = ask()
    llm.forget()
    answer = llm.chat(first, options=ONE)
    turns = [*first, {"role": "assistant", "content": answer.text}, *ask("0" * 80 + "1")]
    continued = llm.chat(turns, options=ONE)
    assert continued.usage.reused_tokens == 95
    llm.forget()
    fresh = llm.chat(turns, options=ONE)
    assert fresh.usage.reused_tokens == 0 and fresh.tokens == continued.tokens


def test_another_conversation_reuses_only_what_is_the_same(llm: LLM) -> None:
    llm.forget()
    llm.chat(ask(), options=ONE)
    other = llm.chat(ask(PUZZLE[:5] + "1" * 76), options=replace(ONE, max_steps=1))
    assert other.usage.reused_tokens == 9 + 5  # the header and five clues


def test_logprobs_come_with_every_token(llm: LLM) -> None:
    answer = llm.chat(ask(), options=replace(ONE, logprobs=True))
    assert answer.logprobs is not None and len(answer.logprobs) == len(answer.tokens)
    assert all(p <= 0 for p in answer.logprobs)
    assert answer.usage.passes == answer.usage.steps + 1  # the encode pass they come from


def test_autoregressive_mode_takes_a_pass_a_token(llm: LLM) -> None:
    answer = llm.chat(ask(), options=Options(mode="autoregressive", temperature=0, max_tokens=82))
    assert answer.usage.passes == len(answer.tokens)
    assert llm.chat(ask(), options=Options(mode="autoregressive", top_k=1, max_tokens=82)).tokens == answer.tokens


def test_pinned_clues_stand_in_every_draft(llm: LLM) -> None:
    ids, pins = request(llm, PUZZLE)
    for event in llm.events([ids], options=Options(max_tokens=82, seed=1, drafts=True, max_steps=3), pins=[pins]):
        if isinstance(event, Draft):
            assert all(event.tokens[place] == token for place, token in pins.items())
            assert all(event.accepted[place] and event.entropies[place] == 0 for place in pins)
    wrong = {0: llm.tokenizer.encode("9")[0]}  # a pin wins over what the model would write
    done = list(llm.events([ids], options=ONE, pins=[wrong]))[-1]
    assert done.text[0] == "9"


def test_batches_solve_what_single_requests_solve(llm: LLM) -> None:
    puzzles = [PUZZLE, "0" + PUZZLE[1:], PUZZLE[:80] + "0", PUZZLE]
    options = Options(seed=5)
    alone = [s.answer for s in solve(llm, puzzles, options)]
    assert alone == [s.answer for s in solve(llm, puzzles, options, batch=3)]
    assert all(is_solved(answer, PUZZLE) for answer in alone)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.complete("x", options=Options.from_dict({"tmax": 1})), "tmax"),
        (lambda llm: llm.complete([]), "the prompt is an empty list; give a text, or a list of texts"),
        (lambda llm: llm.complete("9" * 5000), "context of 4096"),
        (lambda llm: llm.chat([{"role": "robot", "content": "x"}]), "robot"),
        (lambda llm: llm.complete("x", options=None), "options is None; give an Options, or a dict of them"),
        (
            lambda llm: llm.complete("x", options=Options(min_tokens=2**62)),
            "min_tokens is 4611686018427387904 behind the 2 tok",
        ),
        (lambda llm: list(llm.events([[5]], options=[ONE, ONE])), "1 prompts came with 2 options"),
        (
            lambda llm: list(llm.events([[5]], options=ONE, pins=[{2**62: 5}])),
            "pin 5 at position 4611686018427387904 of prompt 0 do",
        ),
        (
            lambda llm: list(llm.events([[5]], options=ONE, pins=[{1: True}])),
            "pin True at position 1 of prompt 0 does not fit",
        ),
        (lambda llm: LLM.load("nano", dtype="int3"), "int3"),
        (lambda llm: LLM.load("nano", ops="fastest"), "fastest"),
        (lambda llm: LLM.load("no/such/folder"), "no/such/folder"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_value(llm: LLM, call: Callable[[LLM], object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        call(llm)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: type(value).__name__ + str(value)[:8])
def test_what_is_of_another_kind_is_refused_by_name(llm: LLM, wrong: Any) -> None:
    once = Options(seed=1, max_steps=1)
    calls = places(llm, wrong) | {
        "encode": ("the prompt|message 0", lambda: llm.encode(wrong)),
        "events": ("prompt", lambda: list(llm.events(wrong))),
        "events several": ("prompt", lambda: list(llm.events([wrong]))),
        "events options": ("option", lambda: list(llm.events([[5]], options=wrong))),
        "events pins": ("pin", lambda: list(llm.events([[5]], options=once, pins=[{0: wrong}]))),
        "run": ("request", lambda: llm.run(wrong)),
        "load": ("model", lambda: LLM.load(wrong)),
        "load device": ("device", lambda: LLM.load("nano", device=wrong)),
        "load ops": ("ops", lambda: LLM.load("nano", ops=wrong)),
        "open": ("the options", lambda: LLM.open(wrong)),
    }
    if wrong is not None:
        calls |= {
            "load dtype": ("dtype", lambda: LLM.load("nano", dtype=wrong)),
            "load quantize": ("quantize", lambda: LLM.load("nano", quantize=wrong)),
            "load notice": ("notice", lambda: LLM.load("nano", notice=wrong)),
        }
        if not (isinstance(wrong, int) and wrong is not True):
            calls["load memory_limit"] = ("memory_limit", lambda: LLM.load("nano", memory_limit=wrong))
    if isinstance(wrong, Path):  # which is a folder
        del calls["load"]
    for name, (words, call) in calls.items():
        if name == "events options" and wrong == {"a": 1}:
            continue  # a dict of options, of which there is no such
        with pytest.raises(InputError) as caught:
            call()
            pytest.fail(f"{name} took {wrong!r}")
        message = str(caught.value)
        assert re.search(words, message), (name, message)
        assert "\n" not in message and len(message) < 420, name


@pytest.mark.parametrize("ids", [[True], [5, "a"], ["a", 5], [-1], [1.5], [5, None], [10**9], [10**30], (5, False)])
def test_ids_are_whole_numbers_of_the_vocabulary(llm: LLM, ids: list[Any]) -> None:
    bad = next(x for x in ids if x != 5 or x is True)
    for call in (
        lambda: list(llm.stream(ids, options=ONE)),
        lambda: list(llm.events([ids], options=ONE)),
        lambda: run(llm, ids),
    ):
        with pytest.raises(InputError, match=rf"holds token {bad!r}; the vocabulary has ids from 0 to 511"):
            call()


def run(llm: LLM, ids: list[Any]) -> None:
    Run(llm.model, [Request(ids, ONE)])


@pytest.mark.parametrize("temperature", [1e-40, 1e-9, 1e-3])
def test_no_temperature_is_too_low(temperature: float) -> None:
    nano = LLM.load("nano", ops="fused")
    assert nano.complete("1 2 3", options=Options(seed=1, max_tokens=82, min_tokens=5, temperature=temperature)).tokens


# ---- fewer bits -----------------------------------------------------------------------------------------------------


@needs_cpu
def test_nano_in_8_bits_answers_with_the_solution() -> None:
    llm = LLM.load("nano", quantize="int8", ops="cpu")
    weight = llm.model.get_submodule("layers.0.mlp.gate_proj").weight
    assert isinstance(weight, cpu.Panels) and weight.scale is not None
    assert is_solved(llm.chat(ask(), options=ONE).text, PUZZLE)
    assert len(llm.complete("Solve", options=Options(max_tokens=20, seed=1, max_steps=2)).tokens) == 20


@pytest.mark.parametrize(
    ("ops", "quantize", "sentence"),
    [
        ("fused", "int3", "there is no recipe 'int3'; choose one of int8, fp8, int4, int4-fp8, nvfp4, int4-small"),
    ],
)
def test_bits_that_operations_lack_are_refused_with_a_remedy(ops: str, quantize: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        LLM.load("nano", quantize=quantize, ops=ops)
    assert str(caught.value) == sentence


def test_a_text_that_no_context_holds_is_refused_before_it_is_encoded(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was encoded")

    monkeypatch.setattr(llm.tokenizer, "_encode_plain", fail)
    text = "word " * 800_000
    for prompt in (text, [{"role": "user", "content": text}]):
        with pytest.raises(CapacityError, match=r"has 4000000 characters, which are at least \d+ tokens, beyond the"):
            llm.encode(prompt)
