"""`sfumato demo`: each skill of the embedded models on an item of its own, its canvas denoising before your eyes."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from sfumato.cli import flags, loading
from sfumato.cli import options as opt
from sfumato.cli.demo_skills import SKILLS, Stage, item_of, skill_of
from sfumato.cli.view import no_echo, visible
from sfumato.options import LoadOptions, Options

if TYPE_CHECKING:
    from sfumato.llm import LLM


def known_skills(incomplete: str) -> list[str]:
    """The skills that the shell offers."""
    return [name for name in SKILLS if name.startswith(incomplete)]


@flags.takes(options=opt.flags_of("seed", is_template=True, usual=()), load=opt.load_flags_of(without=("adapters",)))
def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Skills, in this order; none: all.", autocompletion=known_skills),
    ] = None,
    *,
    listing: Annotated[bool, typer.Option("--list", help="Name the skills, and show nothing.")] = False,
    options: Options,
    load: LoadOptions,
    delay: opt.Delay = 0.25,
    pause: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds that an answer stays before the next item.")
    ] = 2.0,
) -> None:
    """Watch the embedded models at work: Sudoku, edits, infilling, molecules, graphs, decisions.

    Each skill gets a random item that its model has not been trained on. What comes out is checked exactly, and a wrong
    answer is shown as one. --seed brings the same items again.

    Example: sfumato demo edits graphs

    Example: sfumato demo --seed 7 --delay 0.5
    """
    console = Console(highlight=False)
    skills = [skill_of(name) for name in names or SKILLS]
    if listing:
        for skill in skills:
            line = Text.assemble((f"{skill.name:<11}", "bold"), f"{skill.sentence} ({skill.model})")
            console.print(line, soft_wrap=True)
        return
    seed = secrets.randbits(32) if options.seed is None else options.seed
    is_live = console.is_terminal and not console.is_dumb_terminal and not console.no_color
    stage = Stage(console, replace(options, seed=seed), is_live, delay)
    models: dict[str, LLM] = {}
    with no_echo():
        for number, skill in enumerate(skills):
            if number and is_live:
                time.sleep(pause)
            if skill.model not in models:
                models[skill.model] = loading.load_model(replace(load, model=skill.model))
            console.print(visible(f"{skill.name} · {skill.model}", "bold"))
            skill.show(stage, models[skill.model], item_of(skill, seed))
            console.print()
    words = " ".join(["sfumato demo", *(names or ()), f"--seed {seed}"])
    console.print(visible(f"the same again: {words}", "dim"), soft_wrap=True)
