"""What a chat keeps between sessions: conversations, one file each, and the lines that were typed.

They are in the user's state folder, in files that nobody else can read. A conversation's file is what the page exports
and imports: {"format": "sfumato-chats", "version": 1, "chats": [{"id", "title", "system", "updated", "messages"}]}.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sfumato.cli import files
from sfumato.cli.conversation import Conversation
from sfumato.errors import InputError

FORMAT = "sfumato-chats"
MOST_LINES = 1000
"""Lines of the history that are kept."""
MOST_LISTED = 20
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")


def state_folder() -> Path:
    """Where the user keeps what programs remember: by XDG_STATE_HOME, else by the platform's rule."""
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "sfumato"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "sfumato"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "sfumato"
    return Path.home() / ".local" / "state" / "sfumato"


@dataclass(frozen=True)
class SavedChat:
    """A conversation on disk."""

    path: Path
    title: str
    updated: float
    """Seconds since 1970."""
    messages: int


class ChatFolder:
    """The saved conversations. Nothing is made on disk before something is saved."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = state_folder() / "chats" if folder is None else folder

    def save(self, conversation: Conversation, model: str) -> Path:
        """Write a conversation, whole or not at all; OSError where that fails."""
        if not conversation.id:
            conversation.id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        path = self.folder / f"{conversation.id}.json"
        _private_folder(self.folder)
        beside = self.folder / f".{conversation.id}.{secrets.token_hex(4)}"
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(to_json(conversation, model))
            os.replace(beside, path)
        finally:
            with suppress(FileNotFoundError):
                beside.unlink()
        return path

    def chats(self, most: int = MOST_LISTED) -> list[SavedChat]:
        """The newest conversations, newest first; files that are none are left out."""
        with suppress(OSError):
            paths = [path for path in self.folder.iterdir() if _ID.fullmatch(path.stem) and path.suffix == ".json"]
            dated = sorted(((path.stat().st_mtime, path) for path in paths), reverse=True)
            return [*islice((chat for _, path in dated for chat in _summaries(path)), most)]
        return []

    def open(self, name: str) -> Conversation:
        """The conversation of a number in `chats`, an id, or a file; InputError where there is none."""
        place, _, which = name.strip().partition(" ")
        if place.isdecimal() and len(place) < 4:
            chats = self.chats()
            if not 1 <= int(place) <= len(chats):
                raise InputError(f"there is no saved conversation {place}; there are {len(chats)}, /load lists them")
            return _read(chats[int(place) - 1].path)
        if _ID.fullmatch(place) and (self.folder / f"{place}.json").is_file():
            return _read(self.folder / f"{place}.json")
        path = Path(name.strip()).expanduser()
        if not path.is_file() and which.isdecimal():
            return from_text(files.read(os.path.expanduser(place)), place, int(which))
        conversation = from_text(files.read(str(path)), str(path))
        conversation.id = ""  # a file elsewhere is not written to
        return conversation

    def newest(self) -> Conversation:
        """The conversation that was saved last; InputError where there is none."""
        if not (chats := self.chats(1)):
            raise InputError(f"there is no saved conversation in {self.folder}; leave --continue out to begin one")
        return _read(chats[0].path)


def to_json(conversation: Conversation, model: str) -> str:
    """The text of a conversation's file."""
    record: dict[str, Any] = {
        "id": conversation.id or "chat",
        "title": conversation.title,
        "system": conversation.system,
    }
    record |= {"updated": round(time.time() * 1000), "model": model, "messages": conversation.turns}
    return json.dumps({"format": FORMAT, "version": 1, "chats": [record]}, ensure_ascii=False, indent=1) + "\n"


def from_text(text: str, name: str, which: int | None = None) -> Conversation:
    """The conversation in a file's text: this module's, the page's export, or a list of messages as OpenAI has them.

    `which` chooses, from 1, where a file holds several. InputError, which names the file, for what is none."""
    value = files.parse_json(text, name)
    if isinstance(value, dict) and isinstance(value.get("chats"), list):
        value = value["chats"]
    elif isinstance(value, dict) or (isinstance(value, list) and value and "role" in _record(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InputError(f"{name} holds no conversation; give a list of messages, or what chat or the page has saved")
    if which is None and len(value) > 1:
        raise InputError(f"{name} holds {len(value)} conversations; say which: /load {name} 1 to {len(value)}")
    if which is not None and not 1 <= which <= len(value):
        raise InputError(f"{name} holds {len(value)} conversations; there is no number {which}")
    return Conversation.of(value[(which or 1) - 1], name)


def _record(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> Conversation:
    conversation = from_text(files.read(str(path)), str(path))
    conversation.id = path.stem
    return conversation


def _summaries(path: Path) -> Iterator[SavedChat]:
    """What is known of a file's conversation; nothing where it holds none."""
    with suppress(InputError, OSError):
        conversation = _read(path)
        yield SavedChat(path, conversation.title, path.stat().st_mtime, len(conversation.turns))


def _private_folder(folder: Path) -> None:
    """Make a folder, and those above it in the state folder, that only the user can read."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


class LineHistory:
    """The lines that were typed, oldest first; a file of JSON texts, one a line. Without a path they are not kept."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.lines = path, self._read(path)

    def add(self, line: str) -> None:
        """Remember a line, here and in the file; one like the last is no new line."""
        if not line.strip() or (self.lines and self.lines[-1] == line):
            return
        self.lines.append(line)
        if self.path is not None:
            with suppress(OSError):  # a full or read-only disk ends no chat
                _private_folder(self.path.parent)
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                with open(descriptor, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

    @staticmethod
    def _read(path: Path | None) -> list[str]:
        """The last lines of the file, which is cut to them where it has become twice as long."""
        if path is None:
            return []
        try:
            rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        lines = []
        for row in rows[-MOST_LINES:]:
            with suppress(ValueError):
                value = json.loads(row)
                if isinstance(value, str):
                    lines.append(value)
        if len(rows) > 2 * MOST_LINES:
            with suppress(OSError):
                files.NewFile(path, force=True).write("".join(json.dumps(line) + "\n" for line in lines))
        return lines
