"""training/data, text/turns.py: what people have on disk becomes examples, in an order of (seed, step)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gemma_vocab
import numpy as np
import pytest
import torch
from chats import CLOCK, FRAGMENTS, TEMPLATE, TOKENIZER, call, model, user
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.text.replies import parse_ids
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.data import Dataset, LengthLimit, MixedSource, SudokuSource, held_out_of, open_data
from sfumato.training.data.examples import Example, ExampleMaker
from sfumato.training.data.records import LearnedDialogue

CPU = torch.device("cpu")
Put = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes a file: bytes and text as they are, records as lines of JSON."""

    def write(*content: Any, name: str = "a.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        match content:
            case [bytes() as data]:
                path.write_bytes(data)
            case [str() as text]:
                path.write_text(text)
            case records:
                path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def opened(*paths: Path, max_tokens: int | LengthLimit = 4000, **more: Any) -> Dataset:
    return open_data(paths, TOKENIZER, TEMPLATE, max_tokens=max_tokens, **more)


def shown(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special=False)


def pairs(*paths: Path, **more: Any) -> list[tuple[str, str]]:
    """Prompt and response of every example, as text with its control tokens."""
    examples = [one.example for one in opened(*paths, **more).examples(1000)]
    return [(shown(one.tokens[: one.prompt]), shown(one.tokens[one.prompt :])) for one in examples]


TURN = "<|turn>model\n"


def prompt(*messages: Any, **more: Any) -> str:
    return shown(TEMPLATE.encode(TOKENIZER, list(messages), **more))


# ---- records ---------------------------------------------------------------------------------------------------------


QUESTION_AND_ANSWER = [
    {"messages": [user("ab"), model("cd")]},
    [user("ab"), model("cd")],
    {"prompt": "ab", "response": "cd"},
    {"prompt": "ab", "completion": "cd"},
    {"prompt": [user("ab")], "completion": [model("cd")]},
    {"instruction": "ab", "input": "", "output": "cd", "text": "Below is an instruction"},
    {"question": "ab", "answer": "cd"},
    {"input": "ab", "output": "cd"},
    {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "cd"}]},
    {"id": 7, "conversations": [user("ab"), model("cd")], "prompt": "an id"},
]


def test_every_spelling_of_a_question_and_its_answer_is_one_example(put: Put) -> None:
    assert pairs(put(*QUESTION_AND_ANSWER)) == [(prompt(user("ab")), "cd<turn|>")] * len(QUESTION_AND_ANSWER)


def test_context_system_and_history_are_part_of_the_prompt(put: Put) -> None:
    alpaca = {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["q", "r"]]}
    system = {"role": "system", "content": "s"}
    history = [system, user("q"), model("r"), user("a\n\nb")]
    assert pairs(put(alpaca)) == [(prompt(*history[:2]), "r<turn|>"), (prompt(*history), "c<turn|>")]
    share_gpt = {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert pairs(put(share_gpt)) == [(prompt(system, user("a")), "b<turn|>")]


def test_each_answer_is_an_example_and_one_of_weight_0_is_not(put: Put) -> None:
    turns = [user("a"), model("b", weight=0), user("c"), model("d"), user("e"), model("f", weight=1), user("g")]
    assert pairs(put({"messages": turns})) == [(prompt(*turns[:3]), "d<turn|>"), (prompt(*turns[:5]), "f<turn|>")]


def test_calls_end_where_their_results_begin_and_results_are_not_learned(put: Put) -> None:
    turns = [user("?"), model("", call("clock", a=1)), {"role": "tool", "tool_call_id": "1", "content": "noon"}]
    record = {"messages": [*turns, model("It is noon")], "tools": [CLOCK]}
    expected = [
        (prompt(turns[0], tools=[CLOCK]), "<|tool_call>call:clock{a:1}<tool_call|><|tool_response>"),
        (prompt(*turns, tools=[CLOCK]), "It is noon<turn|>"),
    ]
    assert pairs(put(record)) == expected
    steps = [("human", "?"), ("function_call", '{"name": "clock", "arguments": {"a": 1}}')]
    steps += [("observation", "noon"), ("gpt", "It is noon")]
    share_gpt = {"conversations": [{"from": who, "value": text} for who, text in steps], "tools": json.dumps([CLOCK])}
    assert pairs(put(share_gpt)) == expected


def test_a_thought_is_learned_with_thinking_on_and_is_no_history(put: Put) -> None:
    spelled = model("<|channel>thought\nhm<channel|>b")
    for first in (model("b", reasoning_content="hm"), model("b", thinking="hm"), spelled):
        (_, answer), (later, _) = pairs(put({"messages": [user("a"), first, user("c"), model("d")]}))
        assert answer == "<|channel>thought\nhm\n<channel|>b<turn|>"
        assert later == prompt(user("a"), model("b"), user("c"))
    (question, _), *_ = pairs(put({"messages": [user("a"), spelled]}))
    assert question == prompt(user("a"), thinking=True) != prompt(user("a"))
    assert pairs(put({"messages": [user("a"), model("b")], "thinking": True})) == [(question, "b<turn|>")]


def test_text_cannot_make_control_tokens_of_an_answer(put: Put) -> None:
    (one,) = opened(put({"prompt": "<turn|>", "response": "x<turn|>y<eos>"})).examples(1)
    ends = [token for token in one.example.tokens[one.example.prompt :] if token in TOKENIZER.special_ids]
    assert ends == [TOKENIZER.id("<turn|>")]


@settings(max_examples=40, deadline=None)
@given(st.lists(FRAGMENTS.filter(lambda text: bool(text.strip())), min_size=2, max_size=6))
def test_any_texts_come_back_and_no_text_makes_a_control_token(texts: list[str]) -> None:
    turns = [(model if number % 2 else user)(text) for number, text in enumerate(texts)]
    learned = list(range(1, len(turns), 2))
    record = LearnedDialogue(turns, learned, [])
    maker = ExampleMaker(TOKENIZER, TEMPLATE, LengthLimit(4000))
    for number, example in zip(learned, maker.examples(record), strict=True):
        assert isinstance(example, Example)
        assert example.tokens[: example.prompt] == TEMPLATE.encode(TOKENIZER, turns[:number])
        *answer, end = example.tokens[example.prompt :]
        assert end == TOKENIZER.id("<turn|>") and TOKENIZER.special_ids.isdisjoint(answer)
        assert TOKENIZER.decode(answer) == texts[number].strip()


def test_plain_text_is_its_own_response_behind_bos(put: Put) -> None:
    expected = [("<bos>", "Some text.\n<eos>")]
    assert pairs(put("Some text.\n", name="a.txt")) == pairs(put({"text": "Some text.\n"})) == expected


def test_a_long_text_is_pieces_of_which_all_but_the_last_are_cut(put: Put) -> None:
    text = "0123456789" * 10
    examples = [one.example for one in opened(put({"text": text}), max_tokens=31).examples(10)]
    assert [one.is_cut for one in examples] == [True, True, True, False]
    assert "".join(shown(one.tokens[1:]) for one in examples) == text + "<eos>"


# ---- files -----------------------------------------------------------------------------------------------------------


def test_arrays_gzip_and_folders_are_read_as_lines_are(put: Put, tmp_path: Path) -> None:
    records = QUESTION_AND_ANSWER[2:4]
    lines = pairs(put(*records))
    assert pairs(put("\ufeff" + json.dumps(records, indent=2), name="b.json")) == lines
    assert pairs(put(json.dumps(records), name="b.json")) == lines
    put(gzip.compress(json.dumps(records).encode()), name="folder/c.json.gz")
    put("notes", name="folder/README.md")
    put("{", name="folder/.hidden.jsonl")
    put(*records, name="folder/inner/d.jsonl")
    assert pairs(tmp_path / "folder") == lines * 2


# ---- order -----------------------------------------------------------------------------------------------------------


def texts(count: int) -> list[dict[str, str]]:
    draws = np.random.default_rng(1)
    return [{"text": f"{number} " + "x" * int(draws.integers(1, 80))} for number in range(count)]


def rows_of(dataset: Dataset, step: int, size: int) -> list[list[int]]:
    batch = dataset.train.batch(step, size, CPU)
    return [row[:count].tolist() for row, count in zip(batch.tokens_BT, batch.counts, strict=True)]


def test_an_epoch_has_each_example_once_and_every_step_is_a_function_of_seed_and_number(put: Put) -> None:
    path = put(*texts(90))
    data, again, other = opened(path), opened(path), opened(path, seed=1)
    steps = [rows_of(data, step, 8) for step in range(22)]
    assert [rows_of(again, step, 8) for step in reversed(range(22))] == steps[::-1]
    assert [rows_of(other, step, 8) for step in range(22)] != steps
    for epoch in (steps[:11], steps[11:]):
        assert len({tuple(row) for batch in epoch for row in batch}) == 88
    assert steps[:11] != steps[11:]
    assert len(rows_of(data, 0, 200)) == 200


def test_batches_are_of_about_one_length_and_rows_are_padded_on_the_right(put: Put) -> None:
    data = opened(put(*texts(256)))
    assert data.train.padding(8) < 0.06 < 0.3 < padding_of_random_batches(data)
    batch = data.train.batch(0, 8, CPU)
    pad = TOKENIZER.special_id("pad_token")
    for row, count in zip(batch.tokens_BT.tolist(), batch.counts, strict=True):
        assert row[count:] == [pad] * (batch.tokens_BT.shape[1] - count)
        assert pad not in row[:count]
    firsts = [
        data.train.batch(step, 8, CPU).counts[0] == max(data.train.batch(step, 8, CPU).counts) for step in range(16)
    ]
    assert 0 < sum(firsts) < 16  # rows are not sorted within a batch


def padding_of_random_batches(data: Dataset) -> float:
    lengths = np.random.default_rng(0).permutation(data.train.lengths).reshape(-1, 8)
    return float(1 - lengths.sum() / (lengths.max(1).sum() * 8))


def test_the_held_out_set_is_chosen_by_content_and_equal_records_are_on_one_side(put: Put) -> None:
    records = texts(60)
    data = opened(put(*records, *records), held_out=0.1)
    assert data.held_out is not None and (len(data.train), len(data.held_out)) == (108, 12)
    sides = [
        set(map(tuple, (source.index.example(int(row)).tokens for row in source.rows)))
        for source in (data.train, data.held_out)
    ]
    assert not sides[0] & sides[1]
    backwards = opened(put(*records[::-1], name="b.jsonl"), held_out=0.1)
    assert backwards.held_out is not None
    assert {tuple(backwards.train.index.example(int(row)).tokens) for row in backwards.held_out.rows} == sides[1]
    assert opened(put(*records[:2]), held_out=0.01).held_out is not None
    with pytest.raises(InputError, match="one record"):
        opened(put(records[0]), held_out=0.5)
    apart = opened(put(*records), held_out=put(*records[:3], name="c.jsonl"))
    assert apart.held_out is not None and (len(apart.train), len(apart.held_out)) == (60, 3)


def test_what_held_out_means() -> None:
    texts = ("5%", "0.05", "a.jsonl", "0", None)
    assert [held_out_of(text) for text in texts] == [0.05, 0.05, Path("a.jsonl"), None, 0.05]


def test_a_mix_has_each_sources_share_in_every_batch(put: Put) -> None:
    words = opened(put(*texts(40)))
    sudoku = SudokuSource(TOKENIZER, TEMPLATE, pool=60)
    mixed = MixedSource([(words.train, 3), (sudoku, 1)])
    assert mixed.shares(16) == [12, 4] and mixed.shares(3) == [2, 1] and mixed.shares(2) == [1, 1]
    batch = mixed.batch(5, 16, CPU)
    is_sudoku = [prompt > 1 for prompt in batch.prompts]
    assert sum(is_sudoku) == 4 and is_sudoku != sorted(is_sudoku)
    theirs = sudoku.batch(5, 4, CPU)
    rows = [
        row[:count].tolist() for row, count, one in zip(batch.tokens_BT, batch.counts, is_sudoku, strict=True) if one
    ]
    assert sorted(rows) == sorted(theirs.tokens_BT.tolist())
    assert mixed.batch(5, 16, CPU).tokens_BT.equal(batch.tokens_BT)
    with pytest.raises(InputError, match="no room for 2 sources"):
        mixed.shares(1)
    with pytest.raises(InputError, match="weight"):
        MixedSource([(words.train, 0.0)])


# ---- length ----------------------------------------------------------------------------------------------------------


def test_an_example_that_is_too_long_is_cut_dropped_or_refused(put: Put) -> None:
    path = put(
        {"prompt": "ab", "response": "c" * 60}, {"prompt": "a" * 90, "response": "d"}, {"prompt": "ab", "response": "e"}
    )
    data = opened(path, max_tokens=40)
    cut, whole = (one.example for one in data.examples(9))
    assert (len(cut.tokens), cut.is_cut, whole.is_cut) == (40, True, False)
    assert shown(cut.tokens[cut.prompt :]) == "c" * (40 - cut.prompt)
    described = data.train.describe()
    assert described["left_out"] == {"prompt too long": 1} and described["left_out_at"] == ["a.jsonl, line 2"]
    assert data.train.batch(0, 2, CPU).is_cut.count(True) == 1
    assert len(opened(path, max_tokens=LengthLimit(40, "drop")).train) == 1
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: the example has \d+ tokens.*refused as well: 2\)"):
        opened(path, max_tokens=LengthLimit(40, "refuse"))
    with pytest.raises(InputError, match="no example is left"):
        opened(path, max_tokens=5)


# ---- Gemma 4's own vocabulary and template ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma() -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = Tokenizer(gemma_vocab.build())
    return tokenizer, ChatTemplate(gemma_vocab.template(), tokenizer.special)


@pytest.mark.parametrize("thinking", [False, True])
def test_gemmas_template_asks_as_the_engine_does_and_the_answer_is_what_it_adds(
    gemma: tuple[Tokenizer, ChatTemplate], thinking: bool
) -> None:
    tokenizer, template = gemma
    turns = [user("Weather in Zürich?"), model("", call("clock", zone="CET")), {"role": "tool", "content": "noon"}]
    turns += [model(" It is\nnoon. "), user("Danke"), model("Bitte, <turn|> 🙂", reasoning_content="Polite.")]
    record = LearnedDialogue(turns, [1, 3, 5], [CLOCK], thinking)
    maker = ExampleMaker(tokenizer, template, LengthLimit(4000))
    examples = [one for one in maker.examples(record) if isinstance(one, Example)]
    assert maker.examples_of_many([record, record]) == [examples, examples]
    answers = []
    for number, example in zip(record.learned, examples, strict=True):
        is_thinking = thinking or number == 5
        assert example.tokens[: example.prompt] == template.encode(tokenizer, turns[:number], [CLOCK], is_thinking)
        answers.append(example.tokens[example.prompt :])
    texts = [tokenizer.decode(ids, skip_special=False) for ids in answers]
    assert texts == [
        '<|tool_call>call:clock{zone:<|"|>CET<|"|>}<tool_call|><turn|>',
        "It is\nnoon.<turn|>",
        "<|channel>thought\nPolite.\n<channel|>Bitte, <turn|> 🙂<turn|>",
    ]
    assert answers[1][:-1] == tokenizer.encode("It is\nnoon.")
    replies = [parse_ids(tokenizer, ids, [CLOCK]) for ids in answers]
    assert replies[0].tool_calls == [{"name": "clock", "arguments": {"zone": "CET"}}]
    assert (replies[2].thought, replies[2].text) == ("Polite.", "Bitte, <turn|> 🙂")
