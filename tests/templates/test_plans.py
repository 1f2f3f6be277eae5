"""templates/plans.py, on nano: fixed text stays byte for byte, slots are written, and what is wrong is refused."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfumato import LLM, Options, Slot
from sfumato.errors import CapacityError, InputError
from sfumato.evals.sudoku import solve
from sfumato.events import Commit
from sfumato.options import SHAPING
from sfumato.tasks import sudoku
from sfumato.templates.requests import Chat
from sfumato.templates.slots import pieces_of, read_template
from sfumato.text.template import ChatTemplate

ONE = Options(seed=1, max_steps=1)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


def ask(puzzle: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": sudoku.prompt(puzzle)}]


def cells(puzzle: str) -> list[str | Slot]:
    return [cell if cell != "0" else Slot(length=1) for cell in puzzle]


# ---- sampling options ------------------------------------------------------------------------------------------------


def test_a_grammar_takes_what_bias_leaves(llm: LLM) -> None:
    """In a slot and in a whole answer; where the grammar has nothing else, it has the last word."""
    one, two = (llm.tokenizer.encode(digit)[0] for digit in "12")
    for token, left in ((one, "2"), (two, "1")):
        options = Options(seed=1, logit_bias={token: -100})
        slots: list[str | Slot] = [Slot("a", choices=("1", "2")), "\n", Slot("b", regex="[12]{3}")]
        assert llm.fill(slots, options=options).values == {"a": left, "b": left * 3}
        assert llm.chat("12", options=options.with_changes({"choices": ("1", "2")})).text == left
    assert llm.chat("12", choices=("1",), logit_bias={one: -100}, seed=1).text == "1"
    assert llm.fill(["11", Slot(regex="1")], options=Options(seed=1, logit_bias={one: -100})).text == "111"


@pytest.mark.parametrize(
    ("name", "value"),
    [*zip(SHAPING, (3, 0.5, 0.1, 1, 1, 2, {5: 1}), strict=True)],
)
def test_decisions_read_the_models_own_distribution(llm: LLM, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} is .*; a decision reads the model's own probabilities") as refused:
        llm.decide("12", {"a": ["1", "2"]}, options={name: value})
    assert refused.value.option == name


# ---- byte for byte ---------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=120)


@st.composite
def texts_and_spans(draw: st.DrawFn) -> tuple[str, list[tuple[int, int]]]:
    text = draw(
        texts
        | st.lists(
            st.sampled_from(["\r\n", "\n", "\t", " ", "  ", "ﬁ", "é", "e\u0301", "👩‍👩‍👧", "\ufeff", "\x00", "ab"]),
            min_size=1,
            max_size=40,
        ).map("".join)
    )
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=6)))
    if len(cuts) < 2 or not text:
        cuts = [0, len(text)]
    return text, [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts_and_spans())
def test_outside_the_spans_every_byte_stays(llm: LLM, case: tuple[str, list[tuple[int, int]]]) -> None:
    text, spans = case
    edited = llm.edit(text, spans=spans, strength=1.0, options=ONE).text.encode()
    kept, end = [], 0
    for start, stop in spans:
        kept.append(text[end:start].encode())
        end = stop
    kept.append(text[end:].encode())
    pattern = b"(?s)" + b".*".join(map(re.escape, kept))
    assert re.fullmatch(pattern, edited)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts, texts)
def test_an_infill_keeps_both_sides(llm: LLM, before: str, after: str) -> None:
    text = llm.infill(before, after, length=3, options=ONE).text
    assert text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)


def test_text_longer_than_a_canvas_keeps_its_bytes_and_its_order(llm: LLM) -> None:
    before, after = "The beginning.\r\n" * 30, "\tthe end … " * 40
    template: list[str | Slot] = [before, Slot("one", length=5), " and ", Slot("two", length=90), after]
    filled = llm.fill(template, options=ONE)
    assert filled.text == before + filled.values["one"] + " and " + filled.values["two"] + after
    assert filled.usage.canvases == 2 and filled.lengths == {"one": 5, "two": 90}


# ---- Sudoku through templates ----------------------------------------------------------------------------------------


def test_pinned_clues_through_a_template_solve_as_the_sudoku_command_does(llm: LLM) -> None:
    rng = np.random.default_rng(5)
    puzzles = [sudoku.generate(42, rng) for _ in range(30)]
    theirs = [s.answer for s in solve(llm, puzzles, Options(seed=7))]
    ours = [llm.fill(cells(p), ask(p), options=Options(seed=7)).text for p in puzzles]
    solved = [sum(sudoku.is_solved(a, p) for a, p in zip(some, puzzles, strict=True)) for some in (ours, theirs)]
    assert solved[0] >= solved[1] - 1 and solved[1] >= 27
    assert (
        sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 28
    )  # where the end is pinned too, a step may differ


def test_any_twenty_cells_of_a_solved_grid_are_filled_in(llm: LLM) -> None:
    rng, hole_rng = np.random.default_rng(6), random.Random(6)
    right = 0
    for _ in range(25):
        grid = sudoku.random_grid(rng)
        holes = set(hole_rng.sample(range(81), 20))
        puzzle = "".join("0" if n in holes else cell for n, cell in enumerate(grid))
        right += sudoku.is_solved(llm.fill(cells(puzzle), ask(puzzle), options=Options(seed=1)).text, puzzle)
    assert right >= 24


def test_a_warm_canvas_with_little_noise_keeps_a_right_answer(llm: LLM) -> None:
    grid = sudoku.random_grid(np.random.default_rng(9))
    puzzle = "".join(cell if n % 2 else "0" for n, cell in enumerate(grid))
    slot = Slot("board", text=grid, strength=0.1)
    filled = llm.fill([slot], ask(puzzle), options=Options(seed=1))
    assert filled.text == grid and filled.usage.steps <= 3


def test_an_edit_by_instruction_comes_back_as_text_and_diff(llm: LLM) -> None:
    grid = sudoku.random_grid(np.random.default_rng(10))
    edited = llm.edit(grid, instruction="Solve this Sudoku:", strength=0.1, options=Options(seed=1))
    assert sum(a == b for a, b in zip(edited.text, grid, strict=True)) > 70
    assert (edited.diff() == "") == (edited.text == grid)
    other = llm.edit("a\r\nb\nc", spans=[(3, 4)], strength=1.0, options=ONE)
    assert other.text.startswith("a\r\n") and other.text.endswith("\nc")
    assert other.diff("x").startswith("--- a/x\n+++ b/x\n@@ -1,3 +1,") and " a\r\n" in other.diff("x")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda llm: llm.fill(["only text"]), "has no slot"),
        (lambda llm: llm.fill([Slot("a"), Slot("a")]), "two slots are named 'a'"),
        (lambda llm: llm.fill([3, Slot("a")]), "piece 1 of the template is 3; give a text or a slot"),
        (lambda llm: Slot(length=0), "length of slot '' is 0"),
        (lambda llm: Slot(length=3, at_most=4), "has a length and at_most"),
        (lambda llm: Slot(regex="a", choices=("a",)), "has regex and choices"),
        (lambda llm: Slot(regex="a", length=3), "bound its length with at_most"),
        (lambda llm: Slot(text="a", strength=1.5), "strength of slot '' is 1.5"),
        (lambda llm: llm.edit("", "x"), "the text is empty"),
        (lambda llm: llm.edit("abc"), "neither an instruction nor spans"),
        (lambda llm: llm.edit("abc", spans=[(1, 5)]), "the span 1–5 is not in the text of 3 characters"),
        (lambda llm: llm.edit("abc", spans=[(2, 2)]), "or is empty"),
        (
            lambda llm: llm.edit("abcdef", spans=[(1, 4), (3, 5)]),
            "the span 3–5 overlaps the one before, which ends at 4",
        ),
        (lambda llm: llm.edit("a\ud800b", spans=[(0, 1)]), "lone surrogate"),
        (lambda llm: llm.decide("x", {}), "questions is {}; give a record"),
        (lambda llm: llm.decide("x", {"a": ["b", "b"]}), "names an option twice"),
        (lambda llm: llm.decide("x", {"a": []}), "there are no options"),
        (lambda llm: llm.decide("x", {"a": ["b"]}, temperature=0.5), "temperature is 0.5; a decision reads"),
        (lambda llm: llm.decide("x", {"a": ["b"]}, images=[b""]), "images came with the state"),
        (lambda llm: llm.decide("x", {"a": [f"{n} and more" for n in range(900)]}), "question 'a' has"),
        (lambda llm: llm.decide("x " * 5000, {"a": ["b", "c"]}), "tokens behind a state of 10"),
        (lambda llm: llm.decide("x", {"a": "yes"}), "question 'a'"),
        (
            lambda llm: llm.fill([Slot(length=1)], options=Options(max_tokens=5)),
            "max_tokens does not apply to a template",
        ),
        (lambda llm: llm.edit("a", "b", options=Options(stop=("x",))), "stop does not apply to a template"),
        (lambda llm: llm.fill([Slot(length=1)], options=Options(schema={})), "schema does not apply to a template"),
        (lambda llm: llm.fill([Slot(regex="[0-9]{40}", at_most=3)]), "room"),
        (lambda llm: llm.fill(["1" * 5000, Slot(length=1)]), "beyond the context of 4096; shorten"),
        (lambda llm: llm.fill([Slot(length=5000), "x"]), "the template takes"),
        (lambda llm: llm.fill(["a", Slot("x", at_most=10**9, regex="a*")]), "slot 'x' (of 1000000000), beyond the con"),
        (lambda llm: llm.fill([Slot("x", length=2**62)]), "beyond the context of 4096; shorten its slots"),
        (
            lambda llm: llm.fill([Slot(length=3000), Slot(length=3000)]),
            "takes 6000 positions up to the end of slot '2'",
        ),
        (lambda llm: llm.fill(["a", Slot(), Slot("y", length=2 * 10**8)]), "beyond the context"),
        (lambda llm: llm.infill("a", "b", 2 * 10**8), "beyond the context of 4096; shorten"),
        (lambda llm: llm.edit("1" * 5000, spans=[(0, 1), (4500, 4501)]), "beyond the context"),
        (lambda llm: llm.edit("1" * 5000, "x"), "beyond the context of 4096; shorten"),
        (lambda llm: llm.edit("1" * 4050, "x"), "beyond the context of 4096; shorten"),
        (
            lambda llm: llm.edit("a" * 5000, spans=[(n, n + 1) for n in range(0, 3000, 2)]),
            "1500 spans, more than the 1024",
        ),
        (lambda llm: llm.fill([Slot(length=1)] * 1025), "1025 slots, more than the 1024 allowed; fill it in parts"),
        (lambda llm: llm.fill([Slot()] * 65), "65 slots without a length, more than the 64 allowed; give the others"),
        (lambda llm: llm.fill(["a"] * 5000), "5000 pieces, more than the 4096 allowed; join texts"),
        (lambda llm: pieces_of([0] * 10**6), "1000000 pieces, more than the 4096 allowed"),
        (lambda llm: pieces_of([["a" * 10**6]]), "piece 1 of the template is ['aaa"),
        (
            lambda llm: llm.decide("x", {"a": [str(n) for n in range(10001)]}),
            "there are more than 10000 options; give from 1 to 10000",
        ),
        (lambda llm: llm.decide("x", {"a": ["b"] * 10**5}), "there are more than 10000 options"),
        (lambda llm: llm.decide("x", {"": ["b", "c"]}), "question ''"),
        (lambda llm: llm.decide("x", {"a": ["b", "c"]}, steps=0), "steps is 0; give a whole number from 1 to 4096"),
        (lambda llm: Slot(text=""), "the text of slot '' is empty"),
        (lambda llm: read_template("[" + "9" * 5000 + "]"), "the template is not JSON"),
        (lambda llm: read_template("{}"), "a list of texts and slots"),
        (lambda llm: read_template("["), "not JSON"),
        (lambda llm: read_template('[{"size": 3}]'), "piece 1 of the template has 'size'; a slot has"),
        (lambda llm: read_template("[3]"), "piece 1 of the template is 3"),
        (lambda llm: Options(schema={}, regex="a"), "schema and regex are given together"),
        (lambda llm: Options(regex="a", mode="autoregressive"), "needs mode 'diffusion'"),
    ],
)
def test_bad_input_is_one_sentence(llm: LLM, call: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)) as caught:
        call(llm)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_too_small_a_budget_is_reported_before_any_work(llm: LLM) -> None:
    with pytest.raises(CapacityError, match="4"):
        llm.complete("x", options=Options(schema={"type": "string", "minLength": 60}, max_tokens=4))


def test_a_slot_is_text_and_never_a_control_token(llm: LLM) -> None:
    for seed in range(6):
        filled = llm.fill(["a", Slot("x", length=6), "b"], options=Options(seed=seed, max_steps=2))
        assert filled.lengths["x"] == 6 and len(filled.values["x"]) >= 1


def test_text_behind_a_template_may_be_longer_than_the_context(llm: LLM) -> None:
    tail = "b" * 3000
    filled = llm.fill([Slot("x", length=2), tail], "a text that goes on", options=ONE)
    assert filled.text == filled.values["x"] + tail


def test_a_hint_at_what_lies_beyond_joins_content_in_parts(llm: LLM) -> None:
    for content in "Write.", [{"type": "text", "text": "Write."}]:
        assert (
            llm.fill([Slot(length=1), "1" * 300], [{"role": "user", "content": content}], options=ONE).text[1:]
            == "1" * 300
        )


# ---- chats -----------------------------------------------------------------------------------------------------------


def first_commit(llm: LLM, query: Chat, answer: str) -> Commit:
    """What a chat's reader makes of an answer."""
    tokens = llm.tokenizer.encode(answer, parse_special=True)
    event = llm.planner.ask_answer(query).reader.with_text(Commit(0, 0, 1, tokens, is_last=True))
    assert isinstance(event, Commit)
    return event


def test_arguments_follow_the_tools_of_the_chat(llm: LLM) -> None:
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"zip": {"type": "string"}}}}
    answer = "<|tool_call>call:f{zip:12345}<tool_call|>"
    assert first_commit(llm, Chat("?", [tool]), answer).tool_calls == [{"name": "f", "arguments": {"zip": "12345"}}]
    assert first_commit(llm, Chat("?"), answer).tool_calls == [{"name": "f", "arguments": {"zip": 12345}}]


def test_a_chat_goes_on_in_the_thought_that_its_prompt_leaves_open(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    own = llm.planner.prompts.template
    assert own is not None
    source = own.source + "{{- '<|channel>thought\n' if enable_thinking -}}"
    monkeypatch.setattr(llm.planner.prompts, "template", ChatTemplate(source, own.special))
    for thinking, thought, text in ((True, "hm", "Four."), (False, "", "hmFour.")):
        commit = first_commit(llm, Chat("?", options=Options(thinking=thinking)), "hm<channel|>Four.")
        assert (commit.thought, commit.text) == (thought, text)
