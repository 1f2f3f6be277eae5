"""cli/slash.py, session.py, conversation.py and saved.py: the commands of a chat, and what it keeps."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scripted_chat import ScriptedModel

from sfumato.cli import slash
from sfumato.cli.conversation import Conversation, turn_of
from sfumato.cli.saved import ChatFolder, LineHistory, from_text, to_json
from sfumato.cli.session import ChatSession, ChatStart
from sfumato.errors import InputError
from sfumato.events import Done, Usage
from sfumato.options import OPTIONS, Options

UI = Path(__file__).parents[2] / "sfumato" / "server" / "ui"


class Chat:
    """A session without a terminal."""

    def __init__(self) -> None:
        self.screen, self.model = io.StringIO(), ScriptedModel()
        console = Console(file=self.screen, width=200, highlight=False)
        self.session = ChatSession(self.model, Options(seed=3), ChatStart(system="Be short."), console)

    def __call__(self, line: str) -> str:
        """Carry out a command, or answer a message; returns what was printed."""
        start = self.screen.tell()
        if line.startswith("/"):
            slash.obey(self.session, line)
        else:
            self.session.answer(line)
        return self.screen.getvalue()[start:]

    @property
    def texts(self) -> list[str]:
        return [turn["content"] for turn in self.session.conversation.turns]


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return Chat()


def test_help_lists_every_command(chat: Chat) -> None:
    shown = chat("/help")
    assert all(f"/{one.names[0]}" in shown and one.sentence in shown for one in slash.COMMANDS)
    assert chat("/?") == chat("/h") == shown


def test_names_are_unique_and_an_unknown_one_brings_the_nearest(chat: Chat) -> None:
    names = [name for one in slash.COMMANDS for name in one.names]
    assert len(set(names)) == len(names)
    assert "did you mean /regenerate?" in chat("/regenrate")
    shown = chat("/zzzz x")
    assert "/help" in shown and "A space before" in shown and chat.model.prompts == []


def test_system_is_shown_changed_and_taken_away(chat: Chat) -> None:
    assert "Be short." in chat("/system")
    chat("/system Be long.")
    chat("hello")
    assert chat.model.prompts[-1][0] == {"role": "system", "content": "Be long."}
    assert "no system message" in chat("/system off")
    chat("again")
    assert [message["role"] for message in chat.model.prompts[-1]] == ["user", "assistant", "user"]


def test_undo_and_regenerate(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing has been said" in chat("/undo") and "nothing has been said" in chat("/regenerate")
    chat("one")
    chat("two")
    options: list[Options] = []
    stream = chat.model.stream

    def watched(*arguments: Any, **named: Any) -> Any:
        options.append(named["options"])
        return stream(*arguments, **named)

    monkeypatch.setattr(chat.model, "stream", watched)
    chat("/r")
    assert chat.texts == ["one", "one ", "two", "two "] and options[0].seed is None
    assert [message["content"] for message in chat.model.prompts[-1]] == ["Be short.", "one", "one ", "two"]
    assert "taken back: two" in chat("/undo") and chat.texts == ["one", "one "]


def test_an_answer_that_fails_leaves_the_old_one(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat("one")
    before = [*chat.session.conversation.turns]

    def fail(*_: Any, **__: Any) -> Any:
        raise InputError("not today")

    monkeypatch.setattr(chat.model, "stream", fail)
    assert "not today" in chat("/regenerate") and chat.session.conversation.turns == before
    assert "not today" in chat("two") and chat.session.conversation.turns == before


def test_options_are_set_shown_and_unset(chat: Chat) -> None:
    assert "max_tokens = 7" in chat("/set max_tokens=7") and chat.session.options.max_tokens == 7
    assert "max_tokens = 9" in chat("/set max-tokens=9")
    shown = chat("/options")
    assert "max_tokens = 9" in shown and "seed = 3" in shown and "t_max" in shown and chat("/set") == shown
    assert "t_max is 0" in chat("/set t_max=0") and "warmth" in chat("/set warmth=1")
    chat("/unset max-tokens")
    assert chat.session.options == Options(seed=3)
    chat("/seed off")
    assert chat.session.options == Options() and "no option" in chat("/unset warmth")
    chat("/seed 5")
    assert chat.session.options.seed == 5 and "seed" in chat("/seed five")


def test_new_and_clear_begin_again(chat: Chat) -> None:
    for command in ("/new", "/clear"):
        chat("one")
        chat(command)
        assert chat.texts == [] and chat.session.conversation.system == "Be short."


def test_image_says_that_images_are_not_read(chat: Chat) -> None:
    assert "images are not read yet" in chat("/image cat.png") and chat.model.prompts == []


@pytest.mark.parametrize("line", ["/quit", "/exit", "/q", "/bye"])
def test_quit(line: str, chat: Chat) -> None:
    with pytest.raises(slash.EndOfChat):
        chat(line)


def test_completions() -> None:
    assert [line for line, _ in slash.completions("/se")] == ["/set ", "/seed "]
    assert slash.completions("/set max_t")[0][0] == "/set max_tokens="
    assert {line for line, _ in slash.completions("/unset ")} == {
        f"/unset {name}" for name in OPTIONS if name != "drafts"
    }
    assert slash.completions("hello") == slash.completions("") == slash.completions("/set a\nb") == []


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_save_and_load_a_file(chat: Chat) -> None:
    assert "nothing has been said" in chat("/save a.json")
    chat("ein Wort é 漢")
    assert "saved in a.json" in chat("/save a.json")
    assert "is there already" in chat("/save a.json")
    chat("/new")
    chat("/system off")
    assert "› ein Wort é 漢" in chat("/load a.json")
    assert chat.texts == ["ein Wort é 漢", "ein Wort é 漢 "] and chat.session.conversation.system == "Be short."
    assert "cannot read none.json" in chat("/load none.json")


def test_saved_conversations_are_listed_and_opened_by_number(chat: Chat, tmp_path: Path) -> None:
    assert "no saved conversation" in chat("/load") and "there is no saved conversation 1" in chat("/load 1")
    chat("first")
    chat("/save")
    os.utime(next((tmp_path / "state" / "sfumato" / "chats").iterdir()), (1, 1))
    chat("/new")
    chat("second")
    chat("/save")
    (tmp_path / "state" / "sfumato" / "chats" / "20260101-000000-000000.json").write_text("{broken")
    rows = chat("/load").splitlines()
    assert rows[0].split()[:2] == ["1", "second"] and rows[1].split()[:2] == ["2", "first"]
    chat("/load 2")
    assert chat.texts == ["first", "first "] and chat.session.conversation.id
    if sys.platform != "win32":
        path = tmp_path / "state" / "sfumato" / "chats" / f"{chat.session.conversation.id}.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert ChatFolder().newest().title == "second"


def test_a_chat_that_goes_on_without_one_saved_says_so(chat: Chat) -> None:
    with pytest.raises(InputError, match="leave --continue out"):
        ChatSession(chat.model, Options(), ChatStart(goes_on=True), Console(file=io.StringIO()))


def test_a_disk_that_is_full_ends_no_chat(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.session.is_saved = True

    def fail(*_: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chat.session.folder, "save", fail)
    assert "not saved: No space left" in chat("one") and chat.texts == ["one", "one "]
    assert "not saved" not in chat("two")


def test_a_saved_file_has_the_fields_that_the_page_checks() -> None:
    conversation = Conversation("S")
    call = {"name": "f", "arguments": {"x": 1}}
    done = Done(0, "length", [1], Usage(), text="a", tool_calls=[call])
    conversation.add({"role": "user", "content": "Title\nmore"}, turn_of(done))
    value = json.loads(to_json(conversation, "nano"))
    (chat,) = value["chats"]
    assert (value["format"], value["version"], chat["title"], chat["system"]) == ("sfumato-chats", 1, "Title", "S")
    answer = chat["messages"][1]
    assert answer["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'} and "limit" in answer["note"]
    again = from_text(json.dumps(value), "file")
    assert (again.system, again.turns) == ("S", conversation.turns)
    assert "note" not in again.prompt({"role": "user", "content": "x"})[2]


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page's own reader, is not here")
def test_the_page_reads_what_is_saved_and_is_read_in_turn() -> None:
    conversation = Conversation("S")
    conversation.add({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "there", "note": "Stopped."})
    script = (
        f"const page = await import({(UI / 'transfer.js').as_uri()!r});"
        f"const read = page.fromJson({json.dumps(to_json(conversation, 'nano'))});"
        "console.log(page.toJson(read.chats));"
    )
    command = ["node", "--no-warnings", "--experimental-default-type=module", "--input-type=module", "-e", script]
    page = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "bad option" in page.stderr:  # a node that needs no such option
        del command[2]
        page = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert page.returncode == 0, page.stderr
    again = from_text(page.stdout, "the page's")
    assert (again.system, again.turns) == ("S", conversation.turns)


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "b"},
            ]
        },
        {
            "format": "sfumato-chats",
            "version": 1,
            "chats": [
                {
                    "id": "x",
                    "leaf": "2",
                    "messages": [
                        {"id": "1", "parent": None, "role": "user", "content": "a"},
                        {"id": "2", "parent": "1", "role": "assistant", "content": "b"},
                        {"id": "3", "parent": "1", "role": "assistant", "content": "another version"},
                    ],
                }
            ],
        },
    ],
)
def test_what_others_save_is_read(value: object) -> None:
    assert [turn["content"] for turn in from_text(json.dumps(value), "file").turns] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[]", "no conversation"),
        ("7", "no conversation"),
        ("{}", "no list of messages"),
        ('{"messages": []}', "without messages"),
        ('{"messages": [7]}', "message 0 is int"),
        ('[{"role": "robot", "content": "x"}]', "robot"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "image"),
        ('{"chats": [{"messages": []}, {"messages": []}]}', "holds 2 conversations"),
        ('{"messages": [{"id": "1", "parent": "1", "role": "user", "content": "x"}, '
         '{"id": "2", "parent": "1", "role": "user"}]}', "no content"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_conversation_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        from_text(text, "some.json")
    assert "some.json" in str(raised.value)


@given(st.recursive(st.none() | st.text(max_size=3) | st.integers(0, 9), lambda one: st.lists(one, max_size=3) | st.dictionaries(st.sampled_from(["messages", "chats", "role", "content", "id", "parent", "leaf", "system"]), one, max_size=4), max_leaves=20))  # fmt: skip  # noqa: E501
def test_no_file_does_more_than_be_refused(value: object) -> None:
    try:
        conversation = from_text(json.dumps(value), "file")
    except InputError:
        return
    assert all(isinstance(turn["content"], str) for turn in conversation.turns)


def test_a_circle_of_messages_ends() -> None:
    tree = [{"id": "1", "parent": "2", "role": "user", "content": "a"}, {"id": "2", "parent": "1", "role": "user", "content": "b"}]  # fmt: skip  # noqa: E501
    assert len(from_text(json.dumps({"messages": tree}), "file").turns) == 2


def test_the_history_keeps_whole_messages_and_forgets_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "history.jsonl"
    history = LineHistory(path)
    for line in ("one", "one", "two\nlines", "  "):
        history.add(line)
    assert LineHistory(path).lines == ["one", "two\nlines"]
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.write_text("no JSON\n7\n" + "".join(f'"{n}"\n' for n in range(2500)))
    assert LineHistory(path).lines == [str(n) for n in range(1500, 2500)]
    assert len(path.read_text().splitlines()) == 1000
    assert LineHistory(None).lines == [] and LineHistory(tmp_path).lines == []


def test_a_history_that_cannot_be_written_is_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = LineHistory(tmp_path / "file" / "history.jsonl")
    history.add("one")
    assert history.lines == ["one"]
