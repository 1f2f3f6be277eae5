"""`sfumato chat`: a conversation in the terminal; its text stays encoded from turn to turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from sfumato.cli import flags, loading
from sfumato.cli import options as opt
from sfumato.cli.output import harmless
from sfumato.cli.view import hint, show, visible
from sfumato.errors import InputError, SfumatoError
from sfumato.events import Commit, Done
from sfumato.options import LoadOptions, Options
from sfumato.templates.interface import LanguageModel

HELP = "/new begins again · /seed N fixes the seed · /set NAME=VALUE changes an option · /quit ends"


@flags.takes(
    api=loading.positional(loading.API),
    options=opt.flags_of("max_tokens", "seed", "temperature", "max_steps", "mode", "thinking"),
    load=opt.load_flags_of(),
)
def command(
    *,
    api: loading.ApiFlags,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    options: Options,
    load: LoadOptions,
    delay: opt.Delay = 0.0,
) -> None:
    """Talk to a model; each answer denoises live. Piped, every line of input is a message and every answer is printed.

    Example: sfumato chat google/diffusiongemma-26B-A4B-it --system "Answer in one sentence."

    Example: sfumato chat --api https://models.example.com --api-key-file key.txt
    """
    talk(loading.connect_or_load(api, load), options, system, delay)


def talk(llm: LanguageModel, options: Options, system: str | None, delay: float) -> None:
    """Hold a conversation with a model, until the input ends."""
    console = Console(highlight=False)
    llm.check(options)
    hint(llm, "")
    conversation = Conversation(llm, options, console, delay, system)
    if conversation.is_live:
        console.print(visible(f"{llm.name} · {HELP}", "dim"))
    for line in conversation.lines():
        if not line.startswith("/"):
            conversation.answer(line)
        elif line[1:].partition(" ")[0] in ("quit", "exit"):
            break
        else:
            conversation.obey(line)


class Conversation:
    """The messages so far, and the options of the next answer."""

    def __init__(
        self, llm: LanguageModel, options: Options, console: Console, delay: float, system: str | None = None
    ) -> None:
        self.llm, self.options, self.console, self.delay = llm, options, console, delay
        self.start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = []
        self.is_live = console.is_terminal and sys.stdin.isatty()
        """Whether a person types and watches."""

    def lines(self) -> Iterator[str]:
        """The lines that are typed or piped in, without those that are blank."""
        while True:
            try:
                line = self.console.input("[bold]› [/bold]") if self.is_live else sys.stdin.readline()
            except EOFError:
                return
            if not self.is_live and not line:
                return
            if line := line.strip():
                yield line

    def obey(self, line: str) -> None:
        """Carry out a line that begins with a slash; what is wrong with it is printed, and nothing changes."""
        name, _, value = line[1:].partition(" ")
        try:
            if name == "new":
                self.messages = []
                self.llm.forget()
            elif name in ("seed", "set"):
                options = opt.changed(self.options, value if name == "set" else f"seed={value}")
                self.llm.check(options)
                self.options = options
            else:
                raise InputError(f"there is no command /{name}; {HELP}")
        except InputError as error:
            self.console.print(visible(str(error), "red"))

    def answer(self, line: str) -> None:
        """Answer a message; where that fails, the error is printed and the message is dropped."""
        message = {"role": "user", "content": line}
        has_drafts = self.is_live and self.llm.has_drafts and self.options.mode != "autoregressive"
        try:
            history = [*self.start, *self.messages, message]
            events = self.llm.stream(history, options=self.options, drafts=has_drafts)
            if self.is_live:
                done = show(self.llm, events, self.console, self.delay)
            else:
                for event in events:
                    if isinstance(event, Commit):
                        text = harmless(event.text) if self.console.is_terminal else event.text
                        print(text, end="", flush=True)
                    elif isinstance(event, Done):
                        done = event
                print()
        except SfumatoError as error:
            self.console.print(visible(str(error), "red"))
            return
        self.messages += [message, _history(done)]


def _history(done: Done) -> dict[str, Any]:
    """The message that carries an answer into the next prompt; its thought stays behind."""
    calls = [{"type": "function", "function": call} for call in done.tool_calls]
    return {"role": "assistant", "content": done.text} | ({"tool_calls": calls} if calls else {})
