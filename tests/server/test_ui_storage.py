"""server/ui/: what the browser kept is checked before the page believes it: the modules of the page, under node."""

from __future__ import annotations

import json
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

SCRIPT = STORAGE + """
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
