"""training/data/readers.py, records.py, index.py: what is wrong with a file is one sentence with its line."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from chats import TEMPLATE, TOKENIZER, call, model, user

from sfumato.errors import InputError, SfumatoError
from sfumato.training.data import Dataset, index, open_data, readers
from sfumato.training.data.records import read_record

GOOD = b'{"prompt": "a", "response": "b"}\n'
RESULT = {"role": "tool", "content": "noon"}


def broken(arguments: str) -> dict[str, Any]:
    """A call whose arguments are this text."""
    return model("", {"function": {"name": "f", "arguments": arguments}})


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def opened(*paths: Path, **more: Any) -> Dataset:
    return open_data(paths, TOKENIZER, TEMPLATE, max_tokens=4000, **more)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "is not JSON"),
        (b"not json", "is not JSON"),
        (b'{"prompt": "\xff", "response": "b"}', r"byte 12 of the line \(0xff\) is not UTF-8"),
        (b"[" * 100_000, "nests too deeply"),
        (b"7", "the record is a number; expected is"),
        (b"null", "the record is null"),
        (b"{}", "has the keys none; expected is"),
        (b'{"question": "a"}', "has the keys 'question'; expected is"),
        (b'{"prompt": 7, "response": "b"}', "'prompt' is a number; give text"),
        (b'{"prompt": "a", "response": 7}', "'response' is a number; give text"),
        (b'{"prompt": "a", "response": ""}', r"message 1 \(assistant\) is an answer of no tokens"),
        (b'{"prompt": "a", "response": "\\ud800"}', "lone surrogate"),
        (b'{"text": ["a"]}', "'text' is a list; give text"),
        (b'{"text": ""}', "the text has no tokens"),
        (b'{"messages": "a"}', "no messages, or no list of them"),
        (b'{"messages": []}', "no messages, or no list of them"),
        (b'{"messages": ["a"]}', "message 0 is str; give a record"),
        (b'{"messages": [{"role": "wizard", "content": "a"}]}', "has the role 'wizard'"),
        (b'{"messages": [{"role": "user", "content": 7}]}', "message 0 has content of type int"),
        (b'{"conversations": [{"from": "wizard", "value": "a"}]}', "turn 0 is from 'wizard'"),
        (b'{"conversations": [{"from": "human", "value": 7}]}', r"turn 0 \(human\) has a value of a number"),
        (b'{"conversations": [{"from": "function_call", "value": "{"}]}', "turn 0 is a call that is not JSON"),
        (b'{"conversations": 7}', "'conversations' is a number"),
        (b'{"prompt": "a", "response": "b", "tools": "{"}', "'tools' is text that is not JSON"),
        (b'{"prompt": "a", "response": "b", "tools": [7]}', "tool 0 is not"),
        (b'{"prompt": "a", "response": "b", "thinking": "yes"}', "'thinking' is text; give true or false"),
        (b'{"instruction": "a", "output": "b", "history": ["c"]}', "'history' is no list of"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_with_what_was_expected(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(InputError, match=rf"a\.jsonl, line 3: .*{why}"):
        opened(path)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([user("a"), model("b"), {"role": "system", "content": "c"}], "message 2 .*a system message is the first one"),
        ([model("b")], "message 0 .*an answer follows a user's message"),
        ([user("a"), model("b"), model("c")], "message 2 .*an answer follows a user's message or a tool's result"),
        ([user("a"), RESULT, model("c")], "message 1 .*a result follows the assistant's tool call"),
        ([user("a"), model("b"), RESULT], "message 2 .*a result follows the assistant's tool call"),
        ([user("a"), model("", call("f")), user("b"), model("c")], "message 2 .*has no result"),
        ([user("a"), broken("{a: 1"), RESULT, model("b")], r"message 1 calls 'f' with .* '\{a: 1', which are"),
        ([user("a"), model("b"), user("c"), broken("[1]")], "message 3 calls 'f' .*no record of JSON; give one"),
        ([user("a")], "has no answer to learn"),
        ([user("a"), model("b", weight=0)], "has no answer to learn"),
        ([user("a"), model("b", weight=0.5)], "message 1 has the weight 0.5; give 0 or 1"),
        ([user("a"), model("b", weight=[])], "message 1 has the weight"),
    ],
)
def test_roles_out_of_order_and_conversations_without_an_answer_are_refused(messages: list[Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        read_record({"messages": messages})


def test_all_bad_lines_are_named_up_to_a_number(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(GOOD + b"{\n" + GOOD + b"7\n8\n")
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: .*\(refused as well: 4, 5\)$"):
        opened(path)
    other.write_bytes(b"{\n" * 50)
    with pytest.raises(
        InputError, match=r"refused as well: a\.jsonl:4, a\.jsonl:5, b\.jsonl:1, .*, and perhaps more\)$"
    ):
        opened(path, other)


def test_a_huge_line_is_refused_without_being_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST", 1 << 16)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b'"' + b"x" * (5 << 16) + b"\n" + b"{\n")
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: the line is longer than .*\(refused as well: 3\)$"):
        opened(path)
    path.write_text('[{"text": "' + "x" * (1 << 21) + '"}]')
    with pytest.raises(InputError, match=r"a\.jsonl, record 1: the record is not JSON, or longer than"):
        opened(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'[{"text": "a"}, {"text": "b"}', "record 3: the record is not JSON, or the array does not end"),
        (b'[{"text": "a"}, {"text" "b"}]', "record 2: the record is not JSON"),
        (b'[{"text": "a"}, 7]', "record 2: the record is a number"),
        (b'[{"text": "a"}, ' + b"[" * 100_000, "record 2: the JSON nests too deeply"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "is not UTF-8"),
    ],
)
def test_a_bad_record_of_an_array_is_refused_by_its_number(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=why):
        opened(path)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", b"", "holds no records"),
        ("a.jsonl", b"\n\n  \n", "holds no records"),
        ("a.json", b"[]", "holds no records"),
        ("a.txt", b" \n", "holds no records"),
        ("a.txt", b"caf\xe9", "0xe9 is not UTF-8"),
        ("a.csv", b"prompt,response\na,b\n", "is a table; write it as JSON"),
        ("a.bin", b"\x80\x04\x95\0\0\0pickle", "is no text: it holds NUL bytes"),
        ("a.jsonl.gz", gzip.compress(GOOD * 1000, mtime=0)[:-9], "is damaged: its gzip data"),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 40, "is damaged: its gzip data"),
    ],
)
def test_a_file_that_holds_no_data_is_refused(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=why):
        opened(path)


def test_places_without_data_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for paths, why in [
        ((), "no data is named"),
        ((tmp_path / "none.jsonl",), "there is no .*none.jsonl"),
        ((tmp_path / "pipe",), "is no regular file"),
        ((tmp_path,), "holds no data; files end with"),
    ]:
        with pytest.raises(InputError, match=why):
            opened(*paths)


def test_a_full_disk_leaves_nothing_behind_and_the_same_command_works_afterwards(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(index._IndexWriter, "_flush", full)
        with pytest.raises(SfumatoError, match=r"cannot be kept in .*: No space left on device; make room there"):
            opened(path)
    assert not [file for file in cache.rglob("*") if file.is_file()]
    assert len(opened(path).train) == 1


def test_an_index_is_kept_until_what_its_tokens_depend_on_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    first = opened(path).train.describe()
    monkeypatch.setattr(index, "read", lambda file: pytest.fail("the file is read again"))
    assert opened(path).train.describe() == first
    path.rename(path.with_name("b.jsonl"))
    assert opened(path.with_name("b.jsonl")).train.describe()["hash"] == first["hash"]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path.write_bytes(GOOD * 2)
    assert opened(path).train.describe()["hash"] != first["hash"]
    open_data([path], TOKENIZER, TEMPLATE, max_tokens=99)
    assert len(list((cache / "sfumato" / "data").iterdir())) == 3


def test_progress_counts_bytes_to_the_end(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_bytes(GOOD * 3)
    reports: list[tuple[int, int]] = []
    opened(*paths, progress=lambda done, total: reports.append((done, total)))
    assert reports == sorted(reports) and reports[-1] == (2 * 3 * len(GOOD),) * 2


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_to_hold_out_is_above_0_and_below_1(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    with pytest.raises(InputError, match="held-out is"):
        opened(path, held_out=share)


def test_tables_are_read_as_lines_are_and_their_nulls_are_left_out(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    records = [
        {"messages": [user("a"), model("b")], "tools": None},
        {
            "messages": [user("?"), model("", call("f", x=1)), {**RESULT, "tool_call_id": "1"}, model("c")],
            "tools": None,
        },
    ]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    table = pyarrow.Table.from_pylist(records)
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    with ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    expected = [one.example for one in opened(lines).examples(9)]
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        data = opened(tmp_path / name)
        assert [one.example for one in data.examples(9)] == expected
        assert data.examples(1)[0].place == f"{name}, record 1"
    damaged = tmp_path / "b.parquet"
    damaged.write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read as a table"):
        opened(damaged)


def test_tables_without_their_library_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" * 4)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pyarrow is not installed; it comes with the extra data"):
        opened(path)
