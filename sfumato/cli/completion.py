"""`sfumato completion`: the shell's script; typer's own, which asks `sfumato` itself at every key."""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from typing import Annotated

import typer

from sfumato.cli import COMPLETE


class Shell(StrEnum):
    """A shell that is known."""

    BASH, ZSH, FISH = "bash", "zsh", "fish"


def command(shell: Annotated[Shell, typer.Argument(help="Which shell.")]) -> None:
    """Print a script that completes commands, flags, their values, and the models in the hub's cache.

    bash: add  eval "$(sfumato completion bash)"  to ~/.bashrc; zsh: the same with zsh in ~/.zshrc, behind compinit;
    fish:  sfumato completion fish > ~/.config/fish/completions/sfumato.fish

    Example: sfumato completion bash
    """
    script = import_module("typer.completion").get_completion_script
    print(script(prog_name="sfumato", complete_var=COMPLETE, shell=shell.value))
