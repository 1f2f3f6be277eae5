"""One chat in the terminal: the model, the options of the next answer, the conversation, and how answers are shown."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from rich.console import Console

from sfumato.cli import options as opt
from sfumato.cli.conversation import Conversation, turn_of
from sfumato.cli.output import encodable, harmless
from sfumato.cli.saved import ChatFolder
from sfumato.cli.view import PartialAnswer, show, visible
from sfumato.errors import SfumatoError
from sfumato.events import Commit, Done, Event
from sfumato.options import Options
from sfumato.templates.interface import LanguageModel
from sfumato.text.messages import without_thoughts

STOPPED = "Stopped; the draft was taken as it stood."


@dataclass(frozen=True)
class ChatStart:
    """How a chat begins, and what it leaves behind."""

    system: opt.System = None
    goes_on: Annotated[bool, typer.Option("--continue", "-c", help="Go on with the newest saved conversation.")] = False
    is_saved: Annotated[
        bool, typer.Option("--save/--no-save", help="Keep the conversation, and the lines typed, for later sessions.")
    ] = True
    delay: opt.Delay = 0.0


class ChatSession:
    """What a chat consists of; the commands of `slash` change it."""

    def __init__(self, llm: LanguageModel, options: Options, start: ChatStart, console: Console | None = None) -> None:
        self.llm, self.options, self.delay = llm, options, start.delay
        self.console = Console(highlight=False) if console is None else console
        self.is_live = self.console.is_terminal and sys.stdin.isatty()
        """Whether a person types and watches."""
        self.folder = ChatFolder()
        self.is_saved = start.is_saved and (self.is_live or start.goes_on)
        self.conversation = self.folder.newest() if start.goes_on else Conversation()
        if start.system is not None:
            self.conversation.system = start.system

    def say(self, text: str, style: str = "dim") -> None:
        """Print a line that is not the model's."""
        self.console.print(visible(text, style))

    def begin(self, conversation: Conversation) -> None:
        """Let this conversation be the one that goes on."""
        self.conversation = conversation
        self.llm.forget()

    def set_options(self, options: Options) -> None:
        """Take these options from the next answer on; InputError for those that the model refuses."""
        self.llm.check(options)
        self.options = options

    def answer(self, text: str) -> None:
        """Answer a message and keep both.

        Ctrl-C keeps what there is; where that is nothing, or an error came, neither is kept."""
        self._answer({"role": "user", "content": text}, self.options)

    def answer_again(self) -> None:
        """Answer the last message once more, with a fresh seed; InputError where nothing was said."""
        turns = [*self.conversation.turns]
        message = self.conversation.undo()
        if not self._answer(message, replace(self.options, seed=None)):
            self.conversation.turns = turns

    def save(self) -> None:
        """Save the conversation, if it is to be saved; where that fails once, it is tried no more."""
        if self.is_saved and self.conversation.turns:
            try:
                self.folder.save(self.conversation, self.llm.name)
            except OSError as error:
                self.is_saved = False
                self.say(
                    f"the conversation is not saved: {error.strerror or error}; /save FILE writes it elsewhere", "red"
                )

    def _answer(self, message: dict[str, Any], options: Options) -> bool:
        """Whether there is an answer, which then is kept."""
        has_drafts = self.is_live and self.llm.has_drafts and options.mode != "autoregressive"
        written, turn = PartialAnswer(), None
        try:
            events = self.llm.stream(self.conversation.prompt(message), options=options, drafts=has_drafts)
            if self.is_live:
                turn = turn_of(show(self.llm, events, self.console, self.delay, written))
            else:
                turn = turn_of(self._print(events))
        except KeyboardInterrupt:
            if not self.is_live:
                raise
            if text := without_thoughts(written.text).strip():
                turn = {"role": "assistant", "content": text, "note": STOPPED}
            else:
                self.say("nothing was written; the message is taken back")
        except SfumatoError as error:
            self.say(str(error), "red")
        if turn is not None:
            self.conversation.add(message, turn)
            self.save()
        return turn is not None

    def _print(self, events: Iterable[Event]) -> Done:
        """Print what is committed, for whoever reads the pipe; returns the end."""
        done: Done | None = None
        for event in events:
            if isinstance(event, Commit):
                text = encodable(harmless(event.text)) if self.console.is_terminal else event.text
                print(text, end="", flush=True)
            elif isinstance(event, Done):
                done = event
        print()
        assert done is not None
        return done

    def show_conversation(self) -> None:
        """Print the turns so far, as after they were read from a file."""
        for turn in self.conversation.turns:
            if turn["role"] == "user":
                self.console.print(visible(f"› {turn['content']}", "bold"))
            elif turn["content"]:
                self.console.print(visible(turn["content"]), soft_wrap=True)
            with suppress(KeyError):
                self.say(turn["note"])
