"""The command line: a table of commands, each imported only when it is called, and one way to report errors.

A command is a module with a function `command(...)`, annotated for typer, whose docstring is its help. Options that
commands share come as records (`flags`, `options`). A command may raise any error: `main` turns it into one line on
stderr and an exit code, 2 where the input is at fault, 1 where something failed, 130 on Ctrl-C. There is never a
traceback, and no environment variable that brings one back. The shell's completion runs through here too: it asks with
a line of its own, of which only the called command is imported.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from sfumato import __version__
from sfumato.cli.help import NARROW, write_plainly
from sfumato.cli.output import harmless, prepare_streams, speaks_unicode
from sfumato.cli.settings import SettingsError
from sfumato.errors import InputError, SfumatoError
from sfumato.presets import PresetError

COMMANDS = {
    "run": ("sfumato.cli.run", "Talk with a model, or answer one prompt."),
    "generate": ("sfumato.cli.generate", "Continue a text, or answer one prompt."),
    "chat": ("sfumato.cli.chat", "Talk with the model in the terminal."),
    "infill": ("sfumato.cli.infill", "Write what is missing at one place of a file."),
    "edit": ("sfumato.cli.edit", "Rewrite a file, or spans of it; prints the diff."),
    "fill": ("sfumato.cli.fill", "Write the slots of a template, all together."),
    "decide": ("sfumato.cli.decide", "Choose between given answers, with probabilities."),
    "calibrate": ("sfumato.cli.calibrate", "Fit how sure decisions are to labelled answers."),
    "eval": ("sfumato.cli.eval", "Score a model on tasks, or on your own file; compare two."),
    "demo": ("sfumato.cli.demo", "Watch the embedded models at work: Sudoku, edits, molecules, …"),
    "sudoku": ("sfumato.cli.sudoku", "Solve Sudoku on a canvas, and check the answer."),
    "serve": ("sfumato.cli.serve", "Serve the model over HTTP, with a page: OpenAI's routes, and ours."),
    "pull": ("sfumato.cli.pull", "Fetch a model from the hub."),
    "list": ("sfumato.cli.listing", "The models that are here."),
    "rm": ("sfumato.cli.rm", "Remove a model from the hub's cache."),
    "info": ("sfumato.cli.info", "What a model holds, needs, and could reach at best. Works without weights."),
    "bench": ("sfumato.cli.bench", "Time every part of a step, beside what this machine can do at all."),
    "quantize": ("sfumato.cli.quantize", "Write a checkpoint in fewer bits."),
    "convert": ("sfumato.cli.convert", "Write a checkpoint in another format: GGUF, MLX, compressed-tensors, …"),
    "finetune": ("sfumato.cli.finetune", "Train on your own data, or nano from scratch."),
    "config": ("sfumato.cli.config", "Your defaults: which file they stand in, and what applies."),
    "completion": ("sfumato.cli.completion", "Print the script that completes commands in your shell."),
}
"""Command -> (module, one line of help). The order is the order of `sfumato --help`."""

COMPLETE = "_SFUMATO_COMPLETE"
"""The variable in which the shell's script says that it asks for completions."""

HELP_FLAGS = ["-h", "--help"]

OTHER_NAMES = {
    "complete": "generate --raw",
    "delete": "rm",
    "download": "pull",
    "get": "pull",
    "ls": "list",
    "models": "list",
    "remove": "rm",
    "show": "info",
    "train": "finetune",
    "version": "--version",
}
"""What other tools call a command -> what it is here."""

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""click's UsageError, wherever this release of typer keeps its click."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own); returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if words[0] == "help":
        words = [*words[1:2], "--help"]
    flags: dict[str, str] = {}
    prepare_streams()
    try:
        if arguments is None and COMPLETE in os.environ:
            import_module("typer.completion").completion_init()  # its shells, whose lines are read here
            words = _words_to_complete()
        called = _called(words)
        if called in OTHER_NAMES:
            raise InputError(f"there is no command {called}; it is `sfumato {OTHER_NAMES[called]}`")
        group = application(words)
        flags.update(_flags_of(group, called))
        code = group.main(args=words, prog_name="sfumato", complete_var=COMPLETE, standalone_mode=False)
        sys.stdout.flush()  # here, where a closed pipe can still be met quietly
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:  # a panic in a library is no Exception
        text, code = explain(error, flags)
        print("sfumato: " + harmless(" ".join(text.split())), file=sys.stderr)
        return code


def application(arguments: Sequence[str]) -> Any:
    """The click group for this command line: every command by name and help, and the called one with its code."""
    width = shutil.get_terminal_size().columns
    is_plain = width < NARROW or not speaks_unicode()
    app = typer.Typer(
        help="Sfumato, the local engine for DiffusionGemma: text that emerges from noise, a whole canvas at a time.",
        epilog="Each command has its own --help, with an example: sfumato info --help",
        add_completion=False,
        context_settings={"help_option_names": HELP_FLAGS},
        rich_markup_mode=None if is_plain else "rich",  # plain lines, or panels
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None: ...

    called = _called(arguments)
    for name, (module, line) in COMMANDS.items():
        function = import_module(module).command if name == called else _placeholder
        app.command(name, short_help=line, help=_as_it_stands(function, app.rich_markup_mode == "rich"))(function)
    group: Any = typer.main.get_command(app)
    for command in (group, *group.commands.values()):
        _show_flags_as_flags(command)
    if is_plain:
        write_plainly(group, width)
    return group


def explain(error: BaseException, flags: Mapping[str, str] | None = None) -> tuple[str, int]:
    """The line that reports an error, and the exit code; `flags` are the called command's, by the names of options."""
    if isinstance(error, USAGE_ERROR):
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "sfumato"
        return f"{error.format_message()} (see {path} --help)", 2  # type: ignore[attr-defined]
    if isinstance(error, InputError):
        return str(error) if isinstance(error, SettingsError | PresetError) else _in_flags(error, flags or {}), 2
    if isinstance(error, SfumatoError):
        return str(error), 1
    if isinstance(error, OSError):
        return ": ".join(map(str, filter(None, (error.filename, error.strerror or str(error))))), 1
    first = next(iter(str(error).splitlines()), "")
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first} (at {os.path.basename(last.filename)}, line {last.lineno})", 1


def _called(arguments: Sequence[str]) -> str | None:
    """The name of the command that is called."""
    return next((word for word in arguments if not word.startswith("-")), None)


def _words_to_complete() -> list[str]:
    """The command line that the shell asks about, as typer's scripts for bash, zsh and fish send it."""
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    return line.split()[1:]


def _flags_of(group: Any, name: str | None) -> dict[str, str]:
    """The long flags of a command by the names of its options."""
    command = group.commands.get(name)
    if command is None:
        return {}
    options = ((parameter.name, parameter.opts[0]) for parameter in command.params if parameter.opts)
    return {name: flag for name, flag in options if flag.startswith("--")}


def _in_flags(error: InputError, flags: Mapping[str, str]) -> str:
    """What an error says, with options as the flags that they are on the command line."""
    text = str(error)
    if (flag := flags.get(error.option or "")) is not None:
        text = re.sub(rf"^{re.escape(error.option or '')}(?= )", flag, text)
    names = sorted((name for name in flags if "_" in name.strip("_")), key=len, reverse=True)
    if not names:
        return text
    return re.sub(rf"(?<![\w'\"/.-])(?:{'|'.join(names)})(?![\w'\"=])", lambda match: flags[match[0]], text)


def _as_it_stands(function: Any, has_markup: bool) -> str:
    """The help of a command: a line a paragraph, so that any terminal wraps it, and no square bracket is markup."""
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")
    return text.replace("[", r"\[") if has_markup else text


def _show_flags_as_flags(command: Any) -> None:
    """In --help a flag that takes no value shows none; typer would write <bool> behind it."""
    help_option = command.get_help_option(typer.Context(command, help_option_names=HELP_FLAGS))
    for parameter in (*command.params, *filter(None, (help_option,))):
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print(f"sfumato {__version__}")
        raise typer.Exit


def _placeholder() -> None: ...
