"""Lines that a person types: editing, history, completion, and messages of several lines.

With prompt_toolkit (the extra `chat`) a message is edited as a whole; else readline, where Python has it, edits its
lines. Several lines are one message where a line ends in a backslash, between two marks of three quotes, behind
Alt-Enter (prompt_toolkit), and when they are pasted into a terminal that says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Protocol

from rich.console import Console

from sfumato.cli.output import encodable, readable
from sfumato.cli.saved import LineHistory

Completions = Callable[[str], list[tuple[str, str]]]
"""The whole lines that a line can become, each with a word about it."""
QUOTES = '"""'
PROMPT, MORE = "› ", "… "


class LineReader(Protocol):
    """Where messages come from: `read` returns the next.

    EOFError at the end of input; KeyboardInterrupt for Ctrl-C where nothing is typed."""

    can_edit: bool
    """Whether a message of several lines can be edited as a whole."""

    def read(self) -> str:
        """The next message."""
        ...


def open_reader(console: Console, history: LineHistory, completions: Completions) -> LineReader:
    """The best reader for this terminal."""
    if console.is_dumb_terminal:
        return PlainReader(console)
    try:
        return EditingReader(history, completions)
    except ImportError:
        pass
    try:
        return ReadlineReader(history, completions)
    except ImportError:
        return PlainReader(console)


def is_open(text: str) -> bool:
    """Whether a message goes on: its last line ends in a backslash, or its quotes are open."""
    if text.lstrip().startswith(QUOTES):
        return text.count(QUOTES) < 2
    return text.endswith("\\") and not text.endswith("\\\\")


def unwrapped(text: str) -> str:
    """A message without the marks that joined its lines."""
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text.replace("\\\n", "\n")


def read_lines(next_line: Callable[[str], str]) -> str:
    """A message of one or more lines; `next_line` gets the prompt."""
    text = next_line(PROMPT)
    while is_open(text):
        try:
            text += "\n" + next_line(MORE)
        except EOFError:
            break
    return text


class PlainReader:
    """Lines as the terminal itself gives them."""

    can_edit = False

    def __init__(self, console: Console) -> None:
        self.console = console

    def read(self) -> str:
        """The next message."""
        try:
            return unwrapped(readable(read_lines(lambda prompt: self.console.input(f"[bold]{encodable(prompt)}[/]"))))
        except (KeyboardInterrupt, EOFError):
            print()
            raise


class ReadlineReader:
    """Lines edited by Python's readline, be it GNU's or libedit."""

    can_edit = False

    def __init__(self, history: LineHistory, completions: Completions) -> None:
        self._readline: Any = import_module("readline")
        self.history, self._completions = history, completions
        readline = self._readline
        is_gnu = "libedit" not in (readline.__doc__ or "")
        readline.parse_and_bind("tab: complete" if is_gnu else "bind ^I rl_complete")
        if is_gnu:
            readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_completer(self._complete)
        readline.set_completer_delims("")
        readline.set_auto_history(False)
        for line in history.lines:
            readline.add_history(line)

    def read(self) -> str:
        """The next message."""
        while True:
            try:
                text = readable(read_lines(self._line))
            except (KeyboardInterrupt, EOFError) as error:
                print()
                if isinstance(error, EOFError) or not self._readline.get_line_buffer():
                    raise
                continue
            self.history.add(text)
            if text.strip():
                self._readline.add_history(text)
            return unwrapped(text)

    def _line(self, prompt: str) -> str:
        return input(f"\001\033[1m\002{encodable(prompt)}\001\033[0m\002")

    def _complete(self, text: str, number: int) -> str | None:
        lines = [line for line, _ in self._completions(text)]
        return lines[number] if number < len(lines) else None


class EditingReader:
    """Messages edited by prompt_toolkit, as a whole. ImportError where it is not installed."""

    can_edit = True

    def __init__(self, history: LineHistory, completions: Completions) -> None:
        toolkit: Any = import_module("prompt_toolkit")
        keys: Any = import_module("prompt_toolkit.key_binding").KeyBindings()
        keys.add("enter")(_enter)
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        keys.add("tab")(self._complete)
        keys.add("c-c")(_interrupt)
        completion: Any = import_module("prompt_toolkit.completion")
        self.history, self._completions = history, completions
        self._session: Any = toolkit.PromptSession(
            [("bold", encodable(PROMPT))],
            multiline=True,
            prompt_continuation=encodable(MORE),
            key_bindings=keys,
            history=import_module("prompt_toolkit.history").InMemoryHistory(history.lines),
            completer=completion.DynamicCompleter(lambda: self._completer(completion)),
            complete_while_typing=True,
            reserve_space_for_menu=4,
        )

    def read(self) -> str:
        """The next message."""
        text = str(self._session.prompt())
        self.history.add(text)
        return unwrapped(text)

    def _complete(self, event: Any) -> None:
        """Tab: what all completions begin with, else the next of them. At once: they take no time to find."""
        buffer = event.current_buffer
        text = buffer.document.text_before_cursor
        lines = [line for line, _ in self._completions(text)]
        if lines and (start := _common_start(lines)) != text:
            buffer.insert_text(start.removeprefix(text))
        elif buffer.complete_state:
            buffer.complete_next()
        elif len(lines) > 1:
            buffer.start_completion()

    def _completer(self, completion: Any) -> Any:
        lines = self._completions(self._session.default_buffer.document.text_before_cursor)
        return completion.WordCompleter([line for line, _ in lines], meta_dict=dict(lines), sentence=True)


def _common_start(lines: list[str]) -> str:
    """What all of them begin with."""
    start = lines[0]
    while not all(line.startswith(start) for line in lines):
        start = start[:-1]
    return start


def _enter(event: Any) -> None:
    """Send the message, or begin its next line."""
    buffer = event.current_buffer
    if is_open(buffer.text):
        buffer.insert_text("\n")
    else:
        buffer.validate_and_handle()


def _interrupt(event: Any) -> None:
    """Ctrl-C: throw away what is typed; where nothing is, KeyboardInterrupt."""
    if event.current_buffer.text:
        event.current_buffer.reset()
    else:
        event.app.exit(exception=KeyboardInterrupt, style="class:aborting")


def piped_lines() -> Iterator[str]:
    """The lines of standard input that are not blank."""
    for line in iter(sys.stdin.readline, ""):
        if text := readable(line).strip():
            yield text
