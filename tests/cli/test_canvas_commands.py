"""cli/infill.py, edit.py, fill.py, and generate.py under a constraint: on nano, as a person or a program
calls them."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sfumato.cli import files
from sfumato.errors import SfumatoError
from sfumato.events import Edited, Filled, Usage
from sfumato.llm import LLM

Call = Callable[..., tuple[int, str, str]]
Put = Callable[..., str]

QUICK = ("--seed", "1", "-s", "max_steps=1")
NASTY = "\ufeffone <FILL>\r\n\ttwo\u2028 ⟨é🙂⟩\rthree\n\n<eos>four"
"""A byte order mark, line ends of three kinds, wide and special characters, no newline at the end."""


def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Makes the commands believe in a terminal."""
    shown = io.StringIO()
    console = lambda **_: Console(file=shown, force_terminal=True, color_system="truecolor", width=200)  # noqa: E731
    for command in ("infill", "edit", "fill"):
        monkeypatch.setattr(f"sfumato.cli.{command}.Console", console)
    return shown


# ---- infill ----------------------------------------------------------------------------------------------------------


def test_infill_prints_the_whole_text_byte_for_byte(sfumato: Call, put: Put) -> None:
    before, after = NASTY.split("<FILL>")
    code, out, err = sfumato("infill", put(NASTY), "--length", "3", *QUICK)
    assert code == 0 and err == ""
    assert out.startswith(before) and out.endswith(after) and len(out) > len(before) + len(after)
    assert Path("a.txt").read_bytes() == NASTY.encode()
    middle = out[len(before) : len(out) - len(after)]
    assert sfumato("infill", "a.txt", "--length", "3", "--only", *QUICK)[1] == middle


def test_infill_json_and_standard_input(sfumato: Call) -> None:
    code, out, _ = sfumato("infill", "-", "--at", "2:2", "--length", "2", "--json", *QUICK, stdin=b"ab\r\ncd")
    record = json.loads(out)
    assert code == 0 and set(record) == {"text", "middle", "length", "seed", "usage", "tokens_per_pass"}
    assert record["text"] == f"ab\r\nc{record['middle']}d" and record["length"] <= 2 and record["seed"] == 1
    assert record["usage"]["steps"] == 1


def test_infill_finds_a_length(sfumato: Call) -> None:
    record = json.loads(sfumato("infill", "-", "--at-most", "2", "--json", *QUICK, stdin=b"a<FILL>b")[1])
    assert record["length"] in (1, 2)


def test_infill_writes_the_file_only_when_asked_and_leaves_nothing_beside(sfumato: Call, put: Put) -> None:
    name = put("a\r\n@@b", "a file")
    os.chmod(name, 0o640)
    os.symlink(name, "link")
    code, out, err = sfumato("infill", "link", "--marker", "@@", "--length", "2", "--write", *QUICK)
    content = Path(name).read_bytes()
    assert (code, out, err) == (0, "", "")
    assert content.startswith(b"a\r\n") and content.endswith(b"b") and b"@@" not in content
    assert stat.S_IMODE(os.stat(name).st_mode) == 0o640 and os.path.islink("link")
    assert sorted(os.listdir()) == ["a file", "link"]


def test_infill_write_goes_with_only_and_json(sfumato: Call, put: Put) -> None:
    put("<FILL>\n")
    assert sfumato("infill", "a.txt", "--length", "1", "--write", "--only", *QUICK)[1] == Path("a.txt").read_text()[:-1]
    put("<FILL>\n")
    record = json.loads(sfumato("infill", "a.txt", "--length", "1", "--write", "--json", *QUICK)[1])
    assert record["text"] == Path("a.txt").read_text()


def test_infill_on_a_terminal_marks_what_was_written(sfumato: Call, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = screen(monkeypatch)
    lines = [f"line {n}\x1b[31m" for n in range(1, 12)]
    lines[5] = "here <FILL>."
    code, out, _ = sfumato("infill", put("\n".join(lines)), "--length", "2", *QUICK)
    drawn = shown.getvalue()
    assert code == 0 and out == ""
    assert "line 3" in drawn and "line 2" not in drawn and "line 9" in drawn and "line 10" not in drawn
    assert "\x1b[31m" not in drawn and "␛[31m" in drawn  # a file does not command the terminal
    assert "48;2;201;181;140m" in drawn and "tokens per pass" in drawn and "seed 1" in drawn


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ("ab", [], "does not hold the marker '<FILL>'; put it where to write, or give --at"),
        ("<FILL>\n<FILL>", [], "more than once (lines 1 and 2)"),
        ("aaa", ["--marker", "aa"], "more than once (lines 1 and 1)"),
        ("ab", ["--marker", ""], "--marker is empty"),
        ("ab", ["--marker", "b", "--at", "1:1"], "--at and --marker are given together"),
        ("ab", ["--at", "1"], "--at is '1'; give LINE:COL"),
        ("ab", ["--at", "one:1"], "give LINE:COL"),
        ("ab", ["--at", "1:" + "9" * 5000], "give LINE:COL"),
        ("ab\ncd", ["--at", "3:1"], "--at names line 3; the text has the lines 1 to 2"),
        ("ab\ncd", ["--at", "0:1"], "line 0; the text has the lines 1 to 2"),
        ("ab\r\ncd", ["--at", "1:4"], "--at names column 4; line 1 has the columns 1 to 3"),
        ("ab", ["--at", "1:0"], "column 0"),
        ("ab", ["--at", "1:1", "--length", "2", "--at-most", "2"], "--length and --at-most are given together"),
        ("ab", ["--at", "1:1", "--length", "0"], "--length"),
        ("ab", ["--at", "1:1", "-s", "regex=x"], "regex is an option of generate"),
        ("ab", ["--at", "1:1", "-s", "warmth=1"], "warmth"),
        ("a\0b", ["--at", "1:1"], "a.txt is not a text file: byte 1 is NUL"),
        (b"ab\xff", ["--at", "1:1"], "a.txt is not a text file: byte 2 (0xff) is not UTF-8"),
        ("é\n".encode("utf-16"), ["--at", "1:1"], "not a text file"),
        (b" " * (files.LIMIT + 1), ["--at", "1:1"], "a.txt is larger than 16 MiB"),
    ],
)
def test_bad_infill_input_is_one_line_and_code_2(
    sfumato: Call, no_model: None, put: Put, content: str | bytes, arguments: list[str], words: str
) -> None:
    code, out, err = sfumato("infill", put(content), *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("command", ["infill", "edit"])
def test_files_that_cannot_be_read_or_written(
    sfumato: Call, no_model: None, put: Put, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    more = ("--span", "1:1-1:2") if command == "edit" else ("--at", "1:1")

    def refused(*arguments: str, stdin: bytes | None = None) -> str:
        code, out, err = sfumato(command, *arguments, *more, stdin=stdin)
        assert code == 2 and out == "" and err.count("\n") == 1
        return err

    put("ab")
    assert "cannot read nothing.txt: No such file" in refused("nothing.txt")
    assert "cannot read .: Is a directory" in refused(".")
    assert "NUL" in refused("-", stdin=b"\0")
    assert "standard input cannot be written" in refused("-", "--write", stdin=b"ab")
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith("a.txt"))  # root may write anything
    assert "a.txt is read-only" in refused("a.txt", "--write")
    monkeypatch.setattr(os, "access", lambda path, _: str(path).endswith("a.txt"))
    assert "its folder is read-only" in refused("a.txt", "--write")
    monkeypatch.setattr(os.path, "isfile", lambda _: False)
    assert "is not a regular file" in refused("a.txt", "--write")
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "there is no text on standard input" in refused("-")


@pytest.mark.parametrize("command", ["infill", "edit"])
def test_a_pipe_is_not_written_and_not_waited_for(
    sfumato: Call, no_model: None, put: Put, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Opened to be read, it would wait for its other end."""
    put("ab")
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    more = ("--span", "1:1-1:2") if command == "edit" else ("--at", "1:1")
    for name in ("pipe", "link", "/dev/null"):
        code, out, err = sfumato(command, name, "--write", *more)
        assert code == 2 and out == "" and f"{name} is not a regular file" in err and err.count("\n") == 1
    os.unlink("a.txt")
    os.rename("pipe", "a.txt")  # in the meantime
    with pytest.raises(SfumatoError, match="has changed since it was read"):
        files.write("a.txt", "ab", "new")
    assert stat.S_ISFIFO(os.stat("a.txt").st_mode)


# ---- edit ------------------------------------------------------------------------------------------------------------


def test_edit_prints_a_diff_and_leaves_the_file(sfumato: Call, put: Put) -> None:
    old = "\ufeff12345678\r\nkeep\n12"
    code, out, err = sfumato("edit", put(old), "--span", "1:1-1:5", "--strength", "1", *QUICK)
    lines = out.split("\n")
    assert code == 0 and err == ""
    assert lines[:3] == ["--- a/a.txt", "+++ b/a.txt", "@@ -1,3 +1,3 @@"]
    assert lines[3] == "-\ufeff12345678\r" and lines[4].startswith("+\ufeff") and lines[4].endswith("5678\r")
    assert lines[5:] == [" keep", " 12", "\\ No newline at end of file", ""]
    assert Path("a.txt").read_bytes() == old.encode()


def test_edit_writes_when_asked_and_json_says_the_same(sfumato: Call, put: Put) -> None:
    put("12345678\r\nkeep")
    os.chmod("a.txt", 0o604)
    arguments = ("edit", "a.txt", "--span", "2:4-2:5", "--span", "1:1-1:3", "--strength", "1", "--json", *QUICK)
    record = json.loads(sfumato(*arguments)[1])
    assert set(record) == {"text", "diff", "seed", "usage", "tokens_per_pass"}
    assert "345678\r\nkee" in record["text"] and Path("a.txt").read_bytes() == b"12345678\r\nkeep"
    assert json.loads(sfumato(*arguments, "--write")[1])["text"].encode() == Path("a.txt").read_bytes()
    assert stat.S_IMODE(os.stat("a.txt").st_mode) == 0o604 and os.listdir() == ["a.txt"]


def test_edit_by_instruction(sfumato: Call, put: Put) -> None:
    record = json.loads(sfumato("edit", put("12345678"), "--instruction", "Count down.", "--json", *QUICK)[1])
    assert record["seed"] == 1 and (record["diff"] == "") == (record["text"] == "12345678")


def test_edit_that_changes_nothing_says_so(sfumato: Call, put: Put, nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "edit", lambda old, *_, **__: Edited(old, old, Usage(), 1), raising=False)
    put("ab")
    before = os.stat("a.txt")
    assert sfumato("edit", "a.txt", "-i", "x", "--write") == (0, "", "sfumato: nothing changed\n")
    assert os.stat("a.txt").st_ino == before.st_ino
    assert json.loads(sfumato("edit", "-", "-i", "x", "--json", stdin=b"ab")[1])["diff"] == ""


def test_edit_on_a_terminal_colours_the_diff(
    sfumato: Call, put: Put, nano: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        nano,
        "edit",
        lambda old, *_, **__: Edited(old.replace("-- b", "++ [b]c"), old, Usage(tokens=3, passes=1), 1),
        raising=False,
    )
    shown = screen(monkeypatch)
    assert sfumato("edit", put("a\r\n-- b\r\n\x1b[31m\n"), "-i", "x")[0] == 0
    drawn = shown.getvalue()
    assert "\x1b[31m--- b␍" in drawn and "\x1b[32m+++ [b]c␍" in drawn and "\x1b[2m a\x1b" in drawn
    assert "␛[31m" in drawn and "tokens per pass" in drawn


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ("ab", [], "neither an --instruction nor a --span"),
        ("ab", ["-i", ""], "neither an --instruction nor a --span"),
        ("", ["-i", "x"], "a.txt is empty"),
        ("ab", ["--span", "1:1"], "--span is '1:1'; give LINE:COL-LINE:COL"),
        ("ab", ["--span", "1:1-2"], "--span 1:1-2 is '2'; give LINE:COL"),
        ("ab", ["--span", "1:1-1:1"], "--span 1:1-1:1 holds no character"),
        ("ab", ["--span", "1:3-1:1"], "its second place must stand behind its first"),
        ("ab", ["--span", "1:1-1:9"], "column 9; line 1 has the columns 1 to 3"),
        ("ab", ["--span", "1:2-2:1"], "names line 2; the text has the lines 1 to 1"),
        ("abc", ["--span", "1:2-1:4", "--span", "1:1-1:3"], "--span 1:1-1:3 and --span 1:2-1:4 overlap"),
        ("ab", ["-i", "x", "--strength", "1.5"], "--strength"),
    ],
)
def test_bad_edit_input_is_one_line_and_code_2(
    sfumato: Call, no_model: None, put: Put, content: str, arguments: list[str], words: str
) -> None:
    code, out, err = sfumato("edit", put(content), *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err


# ---- fill ------------------------------------------------------------------------------------------------------------

FORM = json.dumps(["\ufeffa\r\n", {"length": 2}, " é<eos>", {"name": "digit", "choices": ["1", "22"]}, ""])


def test_fill_writes_slots_and_keeps_the_rest(sfumato: Call, put: Put) -> None:
    code, out, err = sfumato("fill", put(FORM), *QUICK)
    assert code == 0 and err == ""
    record = json.loads(sfumato("fill", "a.txt", "--json", *QUICK)[1])
    assert set(record) == {"text", "values", "lengths", "seed", "usage", "tokens_per_pass"}
    assert set(record["values"]) == set(record["lengths"]) == {"1", "digit"}
    assert out == record["text"] == f"\ufeffa\r\n{record['values']['1']} é<eos>{record['values']['digit']}"
    assert record["values"]["digit"] in ("1", "22")


def test_fill_takes_a_prompt_as_a_message_or_as_it_is(
    sfumato: Call, nano: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Any] = []
    fill = nano.fill

    def noted(*arguments: Any, **options: Any) -> Filled:
        prompts.append(arguments[1])
        return fill(*arguments, **options)

    monkeypatch.setattr(nano, "fill", noted, raising=False)
    form = b'\xef\xbb\xbf["a", {"length": 1}]'
    for arguments in ((), ("--prompt", "x"), ("--prompt", "x", "--raw")):
        assert sfumato("fill", "-", *arguments, *QUICK, stdin=form)[0] == 0
    assert prompts == [None, [{"role": "user", "content": "x"}], "x"]


def test_fill_on_a_terminal_marks_the_slots(sfumato: Call, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = screen(monkeypatch)
    assert sfumato("fill", put('["[b]a ", {"choices": ["y", "n"]}, "."]'), *QUICK)[0] == 0
    drawn = shown.getvalue()
    assert "[b]a " in drawn and "48;2;201;181;140m" in drawn and "tokens per pass" in drawn


@pytest.mark.parametrize(
    ("form", "arguments", "words"),
    [
        ("[", [], "not JSON"),
        ("{}", [], "a list of texts and slots"),
        ('["a"]', [], "no slot"),
        ('[{"name": "a"}, {"name": "a"}]', [], "two slots are named 'a'"),
        ('[{"size": 3}]', [], "'size'"),
        ("[3]", [], "piece 1"),
        ('[{"length": 0}]', [], "length"),
        ("[{}]", ["--raw"], "--prompt is empty or missing"),
        ("[{}]", ["--prompt", ""], "--prompt is empty or missing"),
    ],
)
def test_bad_fill_input_is_one_line_and_code_2(
    sfumato: Call, no_model: None, put: Put, form: str, arguments: list[str], words: str
) -> None:
    code, out, err = sfumato("fill", put(form), *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err


def test_fill_refuses_a_schema_that_cannot_be(sfumato: Call, put: Put) -> None:
    code, out, err = sfumato("fill", put('[{"schema": {"type": "wish"}}]'), *QUICK)
    assert code == 2 and out == "" and err.count("\n") == 1 and "schema" in err


# ---- generate --------------------------------------------------------------------------------------------------------


def test_generate_obeys_choice_regex_and_schema(sfumato: Call, put: Put) -> None:
    assert sfumato("generate", "x", "--choice", "yes", "--choice", "no", "--thinking", *QUICK)[1] in ("yes\n", "no\n")
    code, out, err = sfumato("generate", "x", "--regex", "[0-9]{3}", "--early", *QUICK)
    assert code == 0 and err == "" and len(out) == 4 and out[:3].isdigit()
    schema = (
        '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'
    )
    first = sfumato("generate", "x", "--schema", schema, *QUICK)[1]
    assert json.loads(first)["a"] in (1, 2)
    assert sfumato("generate", "x", "--schema", put(schema, "s.json"), *QUICK)[1] == first
    assert sfumato("generate", "x", "-s", "schema=s.json", *QUICK)[1] == first
    json.loads(sfumato("generate", "x", "--schema", "true", *QUICK)[1])  # any JSON


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--schema", "{"], "--schema is not JSON"),
        (["--schema", ""], "schema is empty"),
        (["--schema", "s.json"], "s.json holds [1]; a schema is an object"),
        (["--schema", "none.json"], "cannot read none.json"),
        (["--schema", "{}", "--regex", "a"], "schema and regex are given together"),
        (["--choice", "a", "--mode", "autoregressive"], "--choice needs mode 'diffusion'"),
    ],
)
def test_bad_constraints_are_one_line_and_code_2(
    sfumato: Call, no_model: None, put: Put, arguments: list[str], words: str
) -> None:
    put("[1]", "s.json")
    code, out, err = sfumato("generate", "x", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err


def test_a_regex_that_is_none_is_one_line_and_code_2(sfumato: Call) -> None:
    code, _, err = sfumato("generate", "x", "--regex", "(", *QUICK)
    assert code == 2 and err.count("\n") == 1 and "regex" in err
