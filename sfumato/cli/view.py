"""What a person sees while a canvas denoises: the draft, each token coloured by how sure the model is of it.

On a terminal the canvas is redrawn in place; piped, only the finished text comes out. The time spent drawing is counted
apart (`spent`), so that the figures are those of the engine alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from sfumato.cli.output import harmless
from sfumato.events import Commit, Done, Draft, Event, Usage
from sfumato.templates.interface import LanguageModel

SMOKE = ("#ffffff", "#e4e0d4", "#c9b58c", "#a9854f", "#7d6a6a", "#5f5a73", "#474457")
"""From certain to undecided: ivory, ochre, smoke."""
CLUE = "#6fb3a7"
"""A clue, which stays: no shade of the scale above."""
WRITTEN = f"bold #1d1a16 on {SMOKE[2]}"
"""Text that the model wrote into a file: a ground of its own shows spaces and empty lines too."""
_LEVELS = (0.005, 0.05, 0.2, 0.6, 1.2, 2.4)


def colour(entropy: float) -> str:
    """The colour of a token whose distribution has this entropy, in nats."""
    return SMOKE[sum(entropy >= level for level in _LEVELS)]


class CanvasView:
    """Draws drafts on a live terminal. `delay` seconds are waited after each frame, so that an eye can follow."""

    def __init__(self, console: Console, delay: float = 0.0) -> None:
        self.console, self.delay, self.spent = console, delay, 0.0
        self._live: Live | None = None

    def show(self, frame: RenderableType) -> None:
        """Draw a frame in the place of the last one."""
        began = time.perf_counter()
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(frame, refresh=True)
        if self.delay:
            time.sleep(self.delay)
        self.spent += time.perf_counter() - began

    def close(self) -> None:
        """Take the canvas off the screen; what is printed next stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def canvas_text(draft: Draft) -> Text:
    """The draft's tokens up to its end of text, coloured."""
    text = Text()
    marks = zip(draft.pieces[: draft.end], draft.entropies, draft.accepted, strict=False)
    for piece, entropy, is_accepted in marks:
        text.append_text(visible(piece, colour(entropy) + ("" if is_accepted else " italic")))
    if draft.end < len(draft.pieces):
        text.append("▪", style=colour(draft.entropies[draft.end]))
    return text


def canvas_frame(draft: Draft, text: Text, height: int) -> RenderableType:
    """The canvas with a line below that says how far it is; cut to the terminal's height."""
    accepted = sum(draft.accepted)
    mean = sum(draft.entropies) / max(1, len(draft.entropies))
    status = Text(
        f"canvas {draft.canvas + 1} · step {draft.step} · {accepted}/{len(draft.accepted)} accepted · "
        f"entropy {mean:.3f} nats",
        style="dim",
    )
    text.truncate(max(200, (height - 3) * 100))
    return Group(text, status)


def show(llm: LanguageModel, events: Iterable[Event], console: Console, delay: float) -> Done:
    """Draw drafts live, print what is committed, end with a line of figures."""
    view = CanvasView(console, delay)
    done = None
    try:
        for event in events:
            if isinstance(event, Draft):
                view.show(canvas_frame(event, canvas_text(event), console.height))
            elif isinstance(event, Commit):
                view.close()
                console.print(visible(event.thought, "dim italic"), end="", soft_wrap=True)
                console.print(visible(event.text), end="", soft_wrap=True)
            else:
                done = event
    finally:
        view.close()
    assert done is not None
    console.print()
    seconds = done.usage.seconds if llm.is_remote else done.usage.seconds - view.spent
    ending = "" if done.finish_reason == "stop" else " · cut at the length limit"
    seed = f" · seed {done.seed}" if done.usage.passes else ""  # a host that counts no passes names no seed
    console.print(Text(summary(done.usage, seconds) + seed + ending, style="dim"))
    return done


def summary(usage: Usage, seconds: float) -> str:
    """One line after an answer. Steps and passes are left out where a host counts none."""
    speed = usage.tokens / seconds if seconds else 0.0
    reused = f", {usage.reused_tokens} of them reused" if usage.reused_tokens else ""
    canvases = f" on {usage.canvases} canvas{'es' if usage.canvases != 1 else ''}" if usage.canvases else ""
    steps = f" in {usage.steps} steps{canvases}" if usage.passes else ""
    each = f"{usage.tokens_per_pass:.1f} tokens per pass, " if usage.passes else ""
    return (
        f"{usage.tokens} tokens{steps}, {seconds:.2f} s, {each}{speed:.0f} tokens/s "
        f"(prompt {usage.prompt_tokens} tokens{reused})"
    )


def hint(llm: LanguageModel, request: str | list[dict[str, Any]]) -> None:
    """A dim line on the terminal where a model that is made for one thing is asked another."""
    console = Console(stderr=True, highlight=False)
    last = request if isinstance(request, str) else str(request[-1]["content"])
    if llm.purpose is not None and console.is_terminal and not llm.purpose.fits(last):
        remedy = "" if llm.is_remote else "; for anything else give a model, -m owner/name"
        console.print(visible(llm.purpose.sentence.rstrip(".") + remedy, "dim"), soft_wrap=True)


def working(word: str) -> AbstractContextManager[object]:
    """A spinner on a terminal's stderr while a command works without drafts; nothing elsewhere."""
    console = Console(stderr=True, highlight=False)
    return console.status(Text(f"{word} …", style="dim")) if console.is_terminal else nullcontext()


# ---- texts on the screen ---------------------------------------------------------------------------------------------

NEAR_LINES, NEAR = 3, 400
"""The most lines and characters that are shown on either side of a text that was written."""


def visible(text: str, style: str = "") -> Text:
    """A text for the screen: `harmless`, and never markup."""
    return Text(harmless(text), style=style)


def around(before: str, middle: str, after: str) -> Text:
    """The text that was written, marked, within a few lines of the text around it."""
    above, below = before.split("\n"), after.split("\n")
    head = "\n".join(above[-NEAR_LINES - 1 :])[-NEAR:]
    tail = "\n".join(below[: NEAR_LINES + 1])[:NEAR]
    text = Text("…\n" if head != before and before.endswith("\n" + head) else "…" if head != before else "", "dim")
    rest = after[len(tail) :]
    end = tail.removesuffix("\r") if rest.startswith("\n") else tail.removesuffix("\n").removesuffix("\r")
    text = Text.assemble(text, visible(head), visible(middle, WRITTEN), visible(end))
    if rest.strip("\r\n"):
        text.append("\n…" if rest.startswith("\n") else "…", style="dim")
    return text


def diff_text(diff: str) -> Text:
    """A unified diff, coloured; it shows a carriage return that comes or goes."""
    text = Text()
    for number, line in enumerate(diff.split("\n")[:-1]):
        if number < 2:  # the two names
            text.append_text(visible(line, "bold"))
        elif line.startswith("@@"):
            text.append_text(visible(line, "cyan"))
        elif line.startswith(("+", "-")):
            text.append_text(visible(line, "green" if line[0] == "+" else "red"))
        else:
            text.append_text(visible(line.removesuffix("\r"), "dim"))
        text.append("\n")
    return text
