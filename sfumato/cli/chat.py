"""`sfumato chat`: a conversation in the terminal; its text stays encoded from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.cli import flags, loading
from sfumato.cli import options as opt
from sfumato.cli.lines import LineReader, open_reader, piped_lines
from sfumato.cli.saved import LineHistory, state_folder
from sfumato.cli.session import ChatSession, ChatStart
from sfumato.cli.slash import EndOfChat, completions, obey
from sfumato.cli.view import hint
from sfumato.options import LoadOptions, Options
from sfumato.templates.interface import LanguageModel


@flags.takes(
    api=loading.positional(loading.API),
    start=flags.group_of(ChatStart),
    options=opt.flags_of("max_tokens", "seed", "temperature", "max_steps", "mode", "thinking"),
    load=opt.load_flags_of(),
)
def command(*, api: loading.ApiFlags, start: ChatStart, options: Options, load: LoadOptions) -> None:
    """Talk to a model; each answer denoises live. Piped, every line of input is a message and every answer is printed.

    /help lists what can be typed. Ctrl-C stops an answer; Ctrl-D, or Ctrl-C twice, ends. Conversations are saved.

    Example: sfumato chat google/diffusiongemma-26B-A4B-it --system "Answer in one sentence."

    Example: sfumato chat --continue

    Example: sfumato chat --api https://models.example.com --api-key-file key.txt
    """
    talk(loading.connect_or_load(api, load), options, start)


def talk(llm: LanguageModel, options: Options, start: ChatStart) -> None:
    """Hold a conversation with a model, until the input ends."""
    llm.check(options)
    hint(llm, "")
    session = ChatSession(llm, options, start)
    try:
        if session.is_live:
            _talk_live(session)
        else:
            for line in piped_lines():
                _take(session, line)
    except EndOfChat:
        pass


def _talk_live(session: ChatSession) -> None:
    history = LineHistory(state_folder() / "history.jsonl" if session.is_saved else None)
    reader = open_reader(session.console, history, completions)
    session.say(f"{session.llm.name} · /help · Ctrl-C stops an answer · Ctrl-D ends")
    if not reader.can_edit:
        session.say("pip install prompt_toolkit brings editing of several lines")
    session.show_conversation()
    for line in _typed_lines(session, reader):
        _take(session, line)


def _typed_lines(session: ChatSession, reader: LineReader) -> Iterator[str]:
    """What is typed, until Ctrl-D, or Ctrl-C at an empty prompt twice in a row."""
    was_interrupted = False
    while True:
        try:
            line = reader.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if was_interrupted:
                return
            was_interrupted = True
            session.say("Ctrl-C again, or Ctrl-D, ends")
            continue
        except UnicodeDecodeError:
            session.say("that line is not in the terminal's encoding; it was not taken", "red")
            continue
        was_interrupted = False
        yield line


def _take(session: ChatSession, line: str) -> None:
    """Carry out a line that begins with a slash, and answer any other."""
    if line.startswith("/"):
        obey(session, line)
    elif line.strip():
        session.answer(line.strip())
