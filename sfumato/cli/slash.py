"""The commands of a chat: lines that begin with a slash. One table; help, completion and suggestions come from it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from rich.table import Table

from sfumato.cli import files
from sfumato.cli import options as opt
from sfumato.cli.conversation import Conversation
from sfumato.cli.saved import to_json
from sfumato.cli.session import ChatSession
from sfumato.cli.tables import FittingTable
from sfumato.cli.view import visible
from sfumato.errors import InputError, SfumatoError
from sfumato.options import OPTIONS, Options

Act = Callable[[ChatSession, str], None]


class EndOfChat(Exception):
    """The person has said that the chat is over."""


@dataclass(frozen=True)
class SlashCommand:
    """A command: its names, the first of them the usual one, what stands behind it, what it does."""

    names: tuple[str, ...]
    argument: str
    sentence: str
    act: Act


def obey(session: ChatSession, line: str) -> None:
    """Carry out a line that begins with a slash; what is wrong with it is printed, and nothing changes.

    EndOfChat for the command that ends."""
    name, _, argument = line[1:].partition(" ")
    try:
        command(name).act(session, argument.strip())
    except OSError as error:
        session.say(f"{error.filename}: {error.strerror}" if error.filename else str(error), "red")
    except SfumatoError as error:
        session.say(str(error), "red")


def command(name: str) -> SlashCommand:
    """The command of this name; InputError, with the nearest name, where there is none."""
    if (known := _BY_NAME.get(name.lower())) is not None:
        return known
    near = difflib.get_close_matches(name.lower(), _BY_NAME, 1)
    hint = f"did you mean /{near[0]}?" if near else "/help lists those there are."
    raise InputError(f"there is no command /{name}; {hint} A space before the slash makes it a message.")


def completions(line: str) -> list[tuple[str, str]]:
    """The lines that this one can become, with a word about each: names of commands, and of options behind /set."""
    if not line.startswith("/") or "\n" in line:
        return []
    name, is_complete, rest = line[1:].partition(" ")
    if not is_complete:
        ones = ((f"/{one.names[0]}{' ' * bool(one.argument)}", one.sentence) for one in COMMANDS)
        return [(text, sentence) for text, sentence in ones if text.startswith(line)]
    if name in ("set", "unset"):
        names = [one for one in OPTIONS if one != "drafts" and one.startswith(rest)]
        return [(f"/{name} {one}{'=' * (name == 'set')}", OPTIONS[one].brief) for one in names]
    return []


# ---- what each does --------------------------------------------------------------------------------------------------


def _help(session: ChatSession, _: str) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for one in COMMANDS:
        table.add_row(visible(f"/{one.names[0]} {one.argument}".strip(), "bold"), visible(one.sentence))
    session.console.print(FittingTable(table))
    session.say(
        'Several lines: end a line with \\, or write between """ and """ (or Alt-Enter, with prompt_toolkit). Ctrl-C '
        "stops an answer and keeps what there is; at an empty prompt, twice, it ends, as Ctrl-D does. Tab completes."
    )


def _new(session: ChatSession, _: str) -> None:
    session.begin(Conversation(session.conversation.system))
    session.say("a new conversation")


def _clear(session: ChatSession, _: str) -> None:
    session.begin(Conversation(session.conversation.system))
    session.console.clear()


def _system(session: ChatSession, text: str) -> None:
    if text:
        session.conversation.system = None if text.lower() in ("off", "none") else text
    system = session.conversation.system
    session.say(f"system message: {system}" if system else "no system message; /system TEXT gives one")


def _save(session: ChatSession, name: str) -> None:
    if not session.conversation.turns:
        raise InputError("nothing has been said yet, so there is nothing to save")
    if name:
        target = files.new_path(name, force=False, name="/save")
        assert target is not None
        target.write(to_json(session.conversation, session.llm.name))
        session.say(f"saved in {target.path}")
    else:
        session.say(f"saved in {session.folder.save(session.conversation, session.llm.name)}")


def _load(session: ChatSession, name: str) -> None:
    if not name:
        _list(session)
        return
    session.begin(session.folder.open(name))
    session.show_conversation()


def _list(session: ChatSession) -> None:
    chats = session.folder.chats()
    if not chats:
        session.say(f"no saved conversation in {session.folder.folder}")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    table.add_column(no_wrap=True)
    for number, chat in enumerate(chats, 1):
        day = datetime.fromtimestamp(chat.updated).strftime("%Y-%m-%d %H:%M")
        cells = str(number), chat.title or "(no title)", day
        table.add_row(*(visible(cell, style) for cell, style in zip(cells, ("bold", "", "dim"), strict=True)))
    session.console.print(FittingTable(table))
    session.say("/load NUMBER goes on with one of them")


def _undo(session: ChatSession, _: str) -> None:
    message = session.conversation.undo()
    session.save()
    session.say(f"taken back: {' '.join(str(message['content']).split())[:60]}")


def _set(session: ChatSession, pair: str) -> None:
    if not pair:
        _options(session, "")
        return
    session.set_options(opt.changed(session.options, pair))
    name = pair.partition("=")[0].strip().replace("-", "_")
    session.say(f"{name} = {getattr(session.options, name)}")


def _unset(session: ChatSession, name: str) -> None:
    name = name.replace("-", "_")
    if name not in OPTIONS:
        raise InputError(f"there is no option {name!r}; /options lists those that are set")
    values = {one: getattr(session.options, one) for one in OPTIONS if one != name}
    session.set_options(Options.from_dict(values))
    session.say(f"{name} is as the model and the defaults have it")


def _seed(session: ChatSession, text: str) -> None:
    if text.lower() in ("", "off", "none", "random"):
        _unset(session, "seed")
    else:
        _set(session, f"seed={text}")


def _options(session: ChatSession, _: str) -> None:
    values = {name: getattr(session.options, name) for name in OPTIONS if name != "drafts"}
    changed = {name: value for name, value in values.items() if value != OPTIONS[name].default}
    for name, value in changed.items():
        session.say(f"{name} = {value}", "")
    names = ", ".join(name for name in values if name not in changed)
    session.say(f"as the model and the defaults have them: {names}. /set NAME=VALUE changes one, /unset NAME undoes it")


def _image(session: ChatSession, _: str) -> None:
    session.say("images are not read yet: Sfumato takes text alone; describe the picture in words", "red")


def _quit(session: ChatSession, _: str) -> None:
    raise EndOfChat


COMMANDS = (
    SlashCommand(("help", "h", "?"), "", "these commands", _help),
    SlashCommand(("new", "reset"), "", "begin a new conversation; this one stays saved", _new),
    SlashCommand(("clear",), "", "the same, on an empty screen", _clear),
    SlashCommand(
        ("regenerate", "retry", "r"),
        "",
        "answer the last message again, with a fresh seed",
        lambda session, _: session.answer_again(),
    ),
    SlashCommand(("undo",), "", "take back the last message and its answer", _undo),
    SlashCommand(("system",), "[TEXT|off]", "show or change the system message", _system),
    SlashCommand(("load", "open"), "[NUMBER|FILE]", "list saved conversations, or go on with one", _load),
    SlashCommand(("save",), "[FILE]", "save the conversation now, or to a file", _save),
    SlashCommand(("set",), "NAME=VALUE", "change an option of generating", _set),
    SlashCommand(("unset",), "NAME", "have an option as it was by default", _unset),
    SlashCommand(("seed",), "N|off", "fix the seed, or have a fresh one for each answer", _seed),
    SlashCommand(("options",), "", "the options that are set", _options),
    SlashCommand(("image",), "FILE", "images are not read yet", _image),
    SlashCommand(("quit", "exit", "bye", "q"), "", "end", _quit),
)
"""In the order of /help."""
_BY_NAME = {name: one for one in COMMANDS for name in one.names}
