"""server/ui/: what the browser kept is checked before the page believes it: the modules of the page, under node."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

UI = Path(__file__).parents[2] / "sfumato" / "server" / "ui"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node; none is on the path")

STORAGE = """
class Storage {
  getItem(name) { return Object.hasOwn(this, name) ? this[name] : null; }
  removeItem(name) { delete this[name]; }
  setItem(name, text) {
    const others = Object.entries(this).filter(([key]) => key !== name);
    const size = others.reduce((sum, [key, held]) => sum + key.length + held.length, 0);
    if (size + name.length + text.length > globalThis.room) throw new Error("QuotaExceededError");
    this[name] = text;
  }
}
"""
"""A browser's storage: its names are its own properties, and it has `room` for so many characters."""

SCRIPT = (
    STORAGE
    + """
globalThis.room = 1e7;
const storage = Object.assign(new Storage(), %s);
for (const name of ["localStorage", "sessionStorage"]) {
  Object.defineProperty(globalThis, name, { get() { if (%s) throw new Error("denied"); return storage; } });
}
const [api, history, settings, store] = await Promise.all(
  ["api", "history", "settings", "store"].map((name) => import(`./${name}.js`)));
history.tidy();
const drafts = settings.showsDrafts();
const titles = history.list().map(history.titleOf);
const request = settings.request({ isTemplate: false });
console.log(JSON.stringify({
  key: api.key(), titles, request, drafts, system: settings.system(), tools: settings.tools(),
  strength: store.load("strength", 0.5), isKept: store.save("typed", "a"),
}));
"""
)
WRONG: list[Any] = [None, 0, 1.5, True, False, "", "x", "\u00fc", "a\nb", [], [None], [1], {}, {"a": 1}, {"length": 3}]
CHAT = {"id": "a", "title": "", "messages": [{"role": "user", "content": "Well then"}]}
MESSAGES: list[Any] = [
    *WRONG,
    {"role": "user"},
    {"role": "user", "content": None},
    {"role": "user", "content": [{"text": "a"}]},
    {"role": "assistant", "content": "", "tool_calls": {}},
    {"role": "assistant", "content": "", "tool_calls": [None]},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]},
]
NAMES = (
    "key",
    "chats",
    "options",
    "settings.system",
    "settings.tools",
    "settings.model",
    "settings.drafts",
    "strength",
)


def run(tmp_path: Path, script: str) -> Any:
    """What a module beside the page's own prints, as JSON."""
    for file in UI.glob("*.js"):
        shutil.copy(file, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "run.js").write_text(script)
    command = [str(NODE), str(tmp_path / "run.js")]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def read(tmp_path: Path, kept: dict[str, str], is_denied: bool = False) -> Any:
    named = {f"sfumato.{name}": text for name, text in kept.items()}
    return run(tmp_path, SCRIPT % (json.dumps(named), json.dumps(is_denied)))


DEFAULTS: dict[str, Any] = {
    **{
        "key": "",
        "titles": [],
        "request": {"stream": True, "drafts": True},
        "drafts": True,
        "system": "",
        "tools": None,
    },
    **{"strength": 0.5, "isKept": True},
}


@pytest.mark.parametrize("value", [*(json.dumps(value) for value in WRONG), "", "{", "undefined", "NaN"])
def test_a_value_of_another_kind_is_as_if_none_were_kept(tmp_path: Path, value: str) -> None:
    kept = read(tmp_path, dict.fromkeys(NAMES, value))
    assert kept["titles"] == [] and kept["isKept"]
    assert kept["request"]["stream"] is True and isinstance(kept["drafts"], bool)
    assert isinstance(kept["system"], str) and isinstance(kept["strength"], int | float)
    assert kept["key"] == ("x" if value == '"x"' else "")
    assert kept["tools"] is None


def test_a_storage_that_may_not_be_looked_at_is_an_empty_one(tmp_path: Path) -> None:
    assert read(tmp_path, {}, is_denied=True) == DEFAULTS | {"isKept": False}
    assert read(tmp_path, {}) == DEFAULTS


def test_of_the_chats_those_that_are_whole_are_shown(tmp_path: Path) -> None:
    broken: list[Any] = [{**CHAT, "messages": [message]} for message in MESSAGES]
    broken += [{**CHAT, "id": 3}, {**CHAT, "title": {}}, {**CHAT, "messages": {}}, *WRONG]
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    whole = {"role": "assistant", "content": "", "thought": "", "tool_calls": [call], "usage": {"steps": 3}}
    kept = [*broken, CHAT, {**CHAT, "title": "named", "messages": [whole]}]
    assert read(tmp_path, {"chats": json.dumps(kept)})["titles"] == ["Well then", "named"]


OPEN = (
    STORAGE
    + """
globalThis.room = %d;
globalThis.localStorage = Object.assign(new Storage(), %s);
const names = ["history", "tree", "transfer"];
const [history, tree, transfer] = await Promise.all(names.map((name) => import(`./${name}.js`)));
"""
)


def opened(tmp_path: Path, kept: dict[str, Any], script: str, room: int = 10_000_000) -> Any:
    named = {f"sfumato.{name}": json.dumps(value) for name, value in kept.items()}
    return run(tmp_path, OPEN % (room, json.dumps(named)) + script)


SHOWN = """console.log(JSON.stringify([
  history.list().map((head) => [...history.find(head.id).messages.values()].map(({ content }) => content)),
  history.isAllSaved(),
  Object.keys(localStorage).sort(),
]));"""


def test_the_chats_of_an_earlier_page_are_taken_over_where_there_is_just_room(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": f"{at}" * 400} for at in range(5)]
    old = [{"id": f"c{at}", "title": "", "updated": at, "messages": messages} for at in range(5)]
    size = len(json.dumps(old)) + 20
    texts, is_saved, names = opened(tmp_path, {"chats": old}, "history.tidy();" + SHOWN, room=size + 2600)
    assert texts == [[message["content"] for message in messages]] * 5
    assert is_saved and "sfumato.chats" not in names and len(names) == 30
    texts, is_saved, names = opened(tmp_path, {"chats": old}, "history.tidy();" + SHOWN, room=size + 10)
    assert texts[0] == [message["content"] for message in messages] and not is_saved
    assert "sfumato.chats" in names  # what was not taken over is still there


def test_what_finds_no_room_is_kept_until_there_is_some(tmp_path: Path) -> None:
    script = """
    const chat = tree.freshChat();
    history.keep(chat, tree.add(chat, { role: "user", content: "x".repeat(900) }));
    const before = [history.isAllSaved(), history.find(chat.id).messages.size];
    room = 5000;
    history.keep(chat, tree.add(chat, { role: "user", content: "y" }));
    console.log(JSON.stringify([...before, history.isAllSaved(), Object.keys(localStorage).length]));
    """
    assert opened(tmp_path, {}, script, room=500) == [False, 1, True, 3]


def message(**fields: Any) -> dict[str, Any]:
    return {"id": "m1", "parent": None, "role": "user", "content": "a", **fields}


HOSTILE: list[Any] = [
    *WRONG,
    {"id": "../x", "title": "", "messages": []},
    {"id": "a.b", "title": "", "messages": []},
    {"id": "a", "title": "", "messages": [message(id="x" * 65)]},
    {"id": "a", "title": "", "messages": [message(parent="m1")]},
    {"id": "a", "title": "", "messages": [message(parent="m2"), message(id="m2", parent="m1")]},
    {"id": "a", "title": "", "messages": [message(), message()]},
    {"id": "a", "title": "", "messages": [message(role="system")]},
    {"id": "a", "title": "", "messages": [message(content={"toString": "x"})]},
    {"id": "a", "title": "", "messages": [message(tool_calls=[{"function": {"name": "f", "arguments": {}}}])]},
    {"id": "a", "title": "", "messages": [message()] * 20_001},
]


def test_of_a_file_only_whole_chats_are_taken(tmp_path: Path) -> None:
    script = f"""
    const refused = {json.dumps(HOSTILE[:-1])}.map(tree.checkedChat).filter(Boolean).length;
    const all = [{json.dumps(CHAT)}, ...{json.dumps(HOSTILE[-2:])}];
    const file = {{ format: "sfumato-chats", version: 1, chats: all }};
    const {{ chats, refused: some }} = transfer.fromJson(JSON.stringify(file));
    const wrong = ["{{", "[]", "3", '{{"chats": []}}', JSON.stringify(Array(5001).fill(0))].map((text) => {{
      try {{ transfer.fromJson(text); return null; }} catch (error) {{ return error.message; }}
    }});
    console.log(JSON.stringify([refused, chats.length, some, wrong]));
    """
    refused, wholes, some, wrong = opened(tmp_path, {}, script)
    assert (refused, wholes, some) == (0, 1, 2)
    assert all(isinstance(words, str) and words.endswith(".") for words in wrong), wrong


def test_of_a_message_only_what_is_known_is_taken(tmp_path: Path) -> None:
    odd = message(
        **{"role": "assistant", "usage": {"steps": 3, "seconds": "x", "__proto__": 1}, "onclick": "x", "at": "y"},
        draft={"pieces": ["a"], "entropies": [0.1], "accepted": [1], "step": "x", "end": 1, "more": 2},
    )
    wrong = message(draft={"pieces": ["a"], "entropies": [], "accepted": [True]}, note=4)
    script = f"console.log(JSON.stringify({json.dumps([odd, wrong])}.map(tree.checkedMessage)));"
    first, second = opened(tmp_path, {}, script)
    draft = {"canvas": 0, "step": 0, "end": 1, "before": 0, "pieces": ["a"], "entropies": [0.1], "accepted": [True]}
    assert first == message(role="assistant", usage={"steps": 3}, at=0, draft=draft)
    assert second == message(at=0)


def test_an_imported_namesake_changes_nothing_that_is_here(tmp_path: Path) -> None:
    script = """
    const chat = (...messages) => tree.checkedChat({ id: "a", title: "", messages });
    const one = { id: "m1", parent: null, role: "user", content: "mine" };
    history.put(chat(one));
    history.put(chat(one, { id: "m2", parent: "m1", role: "assistant", content: "more" }));
    history.put(chat({ ...one, content: "theirs" }));
    const textsOf = ({ id }) => [...history.find(id).messages.values()].map(({ content }) => content);
    console.log(JSON.stringify(history.list().map(textsOf)));
    """
    assert sorted(opened(tmp_path, {}, script)) == [["mine", "more"], ["theirs"]]


def test_stored_messages_that_lead_in_a_circle_are_no_endless_path(tmp_path: Path) -> None:
    kept = {
        "head.a": {"title": "t", "updated": 1, "leaf": "m1"},
        "message.a.m1": message(parent="m2"),
        "message.a.m2": message(id="m2", parent="m1"),
    }
    script = """
    const chat = history.find("a");
    console.log(JSON.stringify([tree.pathTo(chat).length, tree.leafOf(chat, "m1"), history.search("nothing").length]));
    """
    length, leaf, hits = opened(tmp_path, kept, script)
    assert length == 2 and leaf in ("m1", "m2") and hits == 0


def test_every_option_has_a_plain_name() -> None:
    """A new option needs its words in words.js: what a person calls it."""
    from sfumato.options import OPTIONS

    words = (UI / "words.js").read_text()
    assert [name for name in OPTIONS if name != "drafts" and f"\n  {name}: [" not in words] == []
    named = re.findall(r"^  (\w+): \[\"", words, re.MULTILINE)
    assert set(named) <= set(OPTIONS)


def test_options_that_were_kept_do_not_take_what_the_page_decides(tmp_path: Path) -> None:
    kept = {"options": json.dumps({"stream": False, "drafts": "yes", "seed": 3}), "settings.drafts": "false"}
    assert read(tmp_path, kept)["request"] == {"seed": 3, "stream": True}


@pytest.mark.parametrize(
    ("type", "choices", "right", "wrong"),
    [
        ("array", None, [[], ["a"]], [None, "a", {}, [1], 3]),
        ("integer", None, [3], [None, "3", [], {}, True]),
        ("boolean", None, [True, False], [None, "true", 0]),
        ("string", ["a", "b"], ["a"], [None, "c", 3, ["a"]]),
        ("string", None, ["c"], [None, 3, {}]),
        ("object", None, [{}, True], [None]),
    ],
)
def test_an_option_takes_values_of_its_kind(
    tmp_path: Path, type: str, choices: list[str] | None, right: list[Any], wrong: list[Any]
) -> None:
    option = {"type": type, "choices": choices}
    values = f"{json.dumps([*right, *wrong])}.map((value) => isOf({json.dumps(option)}, value))"
    script = f'import {{ isOf }} from "./settings.js";\nconsole.log(JSON.stringify({values}));'
    assert run(tmp_path, script) == [True] * len(right) + [False] * len(wrong)


def test_nothing_a_model_writes_is_read_as_html() -> None:
    """Text goes in as text nodes alone: no module has a way to parse HTML."""
    for file in UI.glob("*.js"):
        text = file.read_text()
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "srcdoc",
        ):
            assert way not in text, (file.name, way)
