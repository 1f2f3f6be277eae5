"""cli/generate.py, run.py, sudoku.py, files.py, view.py, __main__.py: what a new user does first, on nano."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sfumato import cli
from sfumato.cli import files, generate, loading
from sfumato.cli.generate import extracted
from sfumato.errors import InputError
from sfumato.events import Commit, Done, Usage
from sfumato.llm import LLM
from sfumato.model.purpose import Purpose
from sfumato.templates.requests import Chat

Call = Callable[..., tuple[int, str, str]]
Put = Callable[..., str]
PUZZLE = "800560790257001600040000152004050800038607041096348275085906320902704518370285400"
"""50 clues: nano solves it."""
QUICK = ("--seed", "1", "--max-steps", "1", "--max-tokens", "4")


@pytest.fixture
def requests(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The conversations that reach `LLM.stream`, which answers them."""
    kept: list[Any] = []
    stream = nano.stream

    def noted(request: Chat, **more: Any) -> Any:
        kept.append(request.messages)
        return stream(request, **more)

    monkeypatch.setattr(nano, "stream", noted)
    return kept


def test_python_m_sfumato_is_the_command_line() -> None:
    process = subprocess.run([sys.executable, "-m", "sfumato", "--version"], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "") and process.stdout.startswith("sfumato ")


# ---- the prompt, and files behind it ---------------------------------------------------------------------------------


def test_files_follow_the_prompt_each_in_a_fence_under_its_name(put: Put) -> None:
    put("print(1)\n", "a.py")
    put("\ufeffuse ``` here", "b c.md")
    text = generate.prompt_of("What is this?", ["a.py", "b c.md"])
    assert text == "What is this?\n\na.py:\n```\nprint(1)\n```\n\nb c.md:\n````\nuse ``` here\n````"


def test_standard_input_can_be_the_prompt_or_a_file(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put("x", "a.txt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    assert generate.prompt_of("Q", ["-"]) == "Q\n\nstandard input:\n```\npiped\n```"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    assert generate.prompt_of("-", ["a.txt"]) == "piped\n\na.txt:\n```\nx\n```"
    for prompt, names in ((None, ["-"]), ("-", ["-"]), ("Q", ["-", "-"])):
        with pytest.raises(InputError, match="named twice"):
            generate.prompt_of(prompt, names)


def test_a_file_that_is_no_text_or_too_large_is_refused(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put(b"\x7fELF\0\1", "program")
    with pytest.raises(InputError, match="program is not a text file"):
        generate.prompt_of("Q", ["program"])
    with pytest.raises(InputError, match="cannot read none"):
        generate.prompt_of("Q", ["none"])
    put("12345678", "a.txt")
    monkeypatch.setattr(files, "LIMIT", 12)
    with pytest.raises(InputError, match="the files together are larger"):
        generate.prompt_of("Q", ["a.txt", "a.txt"])


def test_system_and_files_reach_the_conversation(sfumato: Call, put: Put, requests: list[Any]) -> None:
    assert sfumato("generate", "Q", put("x"), "--system", "Be short.", *QUICK)[0] == 0
    assert requests == [
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Q\n\na.txt:\n```\nx\n```"}]
    ]
    code, _, err = sfumato("generate", "Q", "--raw", "--system", "x")
    assert code == 2 and "--raw" in err


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("So:\n```python\na = 1\n```\nand\n```\nb\n```\n", "a = 1\n"),
        ("~~~\n```\nx\n```\n~~~\n", "```\nx\n```\n"),
        ("````\n```\nx\n````\n", "```\nx\n"),
        ("  ```sh\nls\n  ```", "ls\n"),
        ("cut off\n```\na\nb", "a\nb"),
        ("```\n```\n", ""),
        ("none ```here``` \n", "none ```here``` \n"),
    ],
)
def test_the_first_fenced_block_is_extracted(
    text: str, block: str, sfumato: Call, put: Put, nano: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extracted(text) == block
    events = [Commit(0, 0, 1, [], text=text), Done(0, "stop", [], Usage(), text=text)]
    monkeypatch.setattr(nano, "stream", lambda query: iter(events))
    put("")
    assert sfumato("generate", "Q", "-x")[:2] == (0, block.removesuffix("\n") + "\n")
    assert sfumato("generate", "Q", "-x", "-o", "out.py")[:2] == (0, "")
    assert Path("out.py").read_text() == block.removesuffix("\n") + "\n"
    assert json.loads(sfumato("generate", "Q", "-x", "--json")[1])["text"] == block


# ---- files that are written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "x", *QUICK),
        ("infill", "in.txt", "--length", "1", "--seed", "1"),
        ("edit", "in.txt", "-i", "x", "--seed", "1", "--max-steps", "1"),
        ("fill", "form.json", "--seed", "1"),
    ],
)
def test_a_text_is_written_whole_and_replaces_nothing_unasked(
    arguments: tuple[str, ...], sfumato: Call, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("12<FILL>34", "in.txt")
    put('["a", {"name": "x", "length": 1}]', "form.json")
    code, out, err = sfumato(*arguments, "-o", "out.txt")
    assert (code, err) == (0, "") and (out == "" or arguments[0] == "edit")
    assert Path("out.txt").read_text()
    assert stat.S_IMODE(os.stat("out.txt").st_mode) & 0o600 == 0o600
    assert sorted(os.listdir()) == ["form.json", "in.txt", "out.txt"]
    Path("out.txt").write_text("mine")
    monkeypatch.setattr(loading, "load_model", lambda load: pytest.fail("a model was loaded"))
    code, _, err = sfumato(*arguments, "-o", "out.txt")
    assert code == 2 and err == "sfumato: out.txt is there already; give another name, or --force to replace it\n"
    assert Path("out.txt").read_text() == "mine"


def test_force_replaces_and_keeps_the_mode(sfumato: Call, put: Put) -> None:
    os.chmod(put("mine", "out.txt"), 0o640)
    assert sfumato("generate", "x", *QUICK, "-o", "out.txt", "--force")[0] == 0
    assert Path("out.txt").read_text() != "mine" and stat.S_IMODE(os.stat("out.txt").st_mode) == 0o640
    assert sfumato("generate", "x", *QUICK, "-o", "again.txt", "--json")[1].startswith('{"text"')


def test_what_came_meanwhile_is_not_replaced(put: Put) -> None:
    put("")
    target = files.new_path("out.txt", force=False)
    assert target is not None
    Path("out.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        target.write("ours")
    assert Path("out.txt").read_text() == "mine" and sorted(os.listdir()) == ["a.txt", "out.txt"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("", "--output is empty"),
        ("-", "--output is -"),
        (".", "is a folder"),
        ("none/a", "there is no folder none"),
        ("dangling", "is there already"),
    ],
)
def test_a_place_that_cannot_be_is_said_before_the_work(
    name: str, part: str, sfumato: Call, no_model: None, put: Put
) -> None:
    put("")
    os.symlink("nowhere", "dangling")
    code, _, err = sfumato("generate", "x", "-o", name)
    assert code == 2 and part in err and err.count("\n") == 1
    assert sorted(os.listdir()) == ["a.txt", "dangling"]


def test_bench_replaces_no_record(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    put("{}", "out.json")
    assert cli.main(["bench", "--size", "tiny", "-o", "out.json"]) == 2
    assert "is there already" in capsys.readouterr().err and Path("out.json").read_text() == "{}"


# ---- run, sudoku -----------------------------------------------------------------------------------------------------


def test_run_answers_a_prompt_and_what_is_piped(sfumato: Call, requests: list[Any]) -> None:
    assert sfumato("run", "nano", "Q", *QUICK, stdin=b"")[0] == 0
    assert sfumato("run", "nano", "Q", "--system", "S", *QUICK, stdin=b"piped\n")[0] == 0
    assert sfumato("run", "nano", *QUICK, stdin=b"piped\n")[0] == 0
    texts = [[message["content"] for message in request] for request in requests]
    assert texts == [["Q"], ["S", "Q\n\npiped"], ["piped"]]


def test_run_without_a_prompt_is_a_conversation(sfumato: Call, monkeypatch: Any) -> None:
    held: list[Any] = []
    monkeypatch.setattr("sfumato.cli.run.talk", lambda *arguments: held.append(arguments))
    assert sfumato("run", "nano", "--system", "S", stdin=b"")[0] == 0
    assert held[0][2].system == "S"
    code, _, err = sfumato("run", "nano", "-m", "other", stdin=b"")
    assert code == 2 and "MODEL is nano and --model is other" in err


@pytest.mark.parametrize("command", ["chat", "serve", "bench", "info"])
def test_a_model_is_an_argument_too(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "a/b", "--model", "c/d"]) == 2
    assert capsys.readouterr().err == "sfumato: MODEL is a/b and --model is c/d; give one of them\n"


def test_a_random_sudoku_differs_each_time_and_its_seed_repeats_it(sfumato: Call) -> None:
    arguments = ("sudoku", "--random", "--clues", "55", "--json")
    first, second = (json.loads(sfumato(*arguments)[1]) for _ in range(2))
    assert first["puzzle"] != second["puzzle"] and first["seed"] != second["seed"]
    again = json.loads(sfumato(*arguments, "--seed", str(first["seed"]))[1])
    assert (again["puzzle"], again["answer"]) == (first["puzzle"], first["answer"])
    out = sfumato("sudoku", "--random", "--clues", "55")[1]
    assert "(seed " in out


class Host:
    """nano as if behind a URL."""

    is_remote, is_key_exposed = True, False

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llm, name)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "x", *QUICK),
        ("infill", "in.txt", "--length", "1", "--seed", "1"),
        ("edit", "in.txt", "-i", "x", "--seed", "1", "--max-steps", "1", "--temperature", "0.5"),
        ("fill", "form.json", "--seed", "1"),
        ("decide", "x", "--field", "a=1|2"),
        ("run", "nano", "x", *QUICK),
        ("sudoku", PUZZLE, "--seed", "1"),
        ("sudoku", PUZZLE, "--seed", "1", "--no-pins"),
    ],
)
def test_what_a_server_can_do_can_be_asked_of_one(
    arguments: tuple[str, ...], sfumato: Call, nano: LLM, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("12<FILL>34", "in.txt")
    put('["a", {"name": "x", "length": 1}]', "form.json")
    monkeypatch.setattr(loading, "Remote", lambda url, key, name: Host(nano))
    monkeypatch.setattr(loading, "load_model", lambda load: pytest.fail("a model was loaded"))
    code, out, err = sfumato(*arguments, "--api", "http://localhost:1", stdin=b"")
    assert (code, err) == (0, "") and out
    code, _, err = sfumato(*arguments, "--api", "http://localhost:1", "--device", "cuda", stdin=b"")
    assert code == 2 and err == "sfumato: --device is for a model loaded here; leave it out with --api\n"


# ---- what nano is for ------------------------------------------------------------------------------------------------


def test_nano_says_what_it_is_and_stops_after_a_canvas(nano: LLM) -> None:
    assert nano.purpose is not None and "Sudoku" in nano.purpose.sentence
    assert not nano.purpose.fits("Hello") and nano.purpose.fits("Solve this Sudoku:\n123")
    assert nano.defaults["max_tokens"] == 82
    completion = nano.chat([{"role": "user", "content": "Hello"}])
    assert completion.usage.tokens <= 82


@pytest.mark.parametrize(("prompt", "is_told"), [("Hello", True), ("Solve this Sudoku:\n12", False)])
def test_a_hint_is_one_line_on_a_terminal(
    prompt: str, is_told: bool, sfumato: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()

    def console(**options: Any) -> Console:
        return Console(file=shown, force_terminal=True, **{"stderr": False} | options | {"stderr": False})

    monkeypatch.setattr("sfumato.cli.view.Console", console)
    assert sfumato("generate", prompt, *QUICK)[0] == 0
    line = "knows nothing else; for anything else give a model, -m owner/name"
    assert (line in shown.getvalue()) is is_told and shown.getvalue().count("\n") == is_told


def test_nothing_is_said_where_nobody_looks(sfumato: Call) -> None:
    assert sfumato("generate", "Hello", *QUICK)[2] == ""


def test_no_purpose_no_hint() -> None:
    assert Purpose("x").fits("anything")
