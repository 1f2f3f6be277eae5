"""What a person sees while a canvas denoises: the draft, each token coloured by how sure the model is of it.

On a terminal the canvas is redrawn in place; piped, only the finished text comes out. Figures count the time in which
events were waited for (`TimedEvents`), that of the engine alone. What is certain has the terminal's own colour, and
every colour can be read on black and on white.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from sfumato.cli.flow import TextFlow
from sfumato.cli.output import encodable, harmless, speaks_unicode
from sfumato.events import Commit, Done, Draft, Event, Usage
from sfumato.templates.interface import LanguageModel

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

SMOKE = ("", "#a8742a", "#b3622f", "#b05050", "#b04a6e", "#a04cb0", "#7a66d8")
"""From certain to undecided: the terminal's own colour, ochre, rust, rose, violet. Each is about as far from black as
from white, in 24 bits and in 256 colours."""
CLUE = "#00858f"
"""A clue, which stays: no shade of the scale above."""
WRITTEN = "bold #1d1a16 on #c9b58c"
"""Text that the model wrote into a file: a ground of its own shows spaces and empty lines too."""
_LEVELS = (0.005, 0.05, 0.2, 0.6, 1.2, 2.4)
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"
AnyEvent = TypeVar("AnyEvent")


def colour(entropy: float) -> str:
    """The colour of a token whose distribution has this entropy, in nats; "" is the terminal's own."""
    return SMOKE[sum(entropy >= level for level in _LEVELS)]


class CanvasView:
    """Draws drafts on a live terminal. `delay` seconds are waited after each frame, so that an eye can follow.

    Meanwhile the terminal neither shows what is typed nor wraps lines: one that it takes for wider than it was laid out
    (an emoji of several characters, say) is cut there, and the next frame finds the place of the last one."""

    def __init__(self, console: Console, delay: float = 0.0) -> None:
        self.console, self.delay = console, delay
        self._live: Live | None = None

    def show(self, frame: RenderableType) -> None:
        """Draw a frame in the place of the last one."""
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._write(_NO_WRAP)
            self._live.start()
        self._live.update(frame, refresh=True)
        if self.delay:
            time.sleep(self.delay)

    def close(self) -> None:
        """Take the canvas off the screen; what is printed next stays."""
        if (live := self._live) is not None:
            self._live = None
            live.stop()
            self._write(_WRAP)

    def _write(self, code: str) -> None:
        console = self.console
        if console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows:
            console.file.write(code)


class TimedEvents(Generic[AnyEvent]):
    """Events, and the `seconds` in which they were waited for: what is done with them in between does not count."""

    def __init__(self, events: Iterable[AnyEvent]) -> None:
        self._events, self.seconds = events, 0.0

    def __iter__(self) -> Generator[AnyEvent, None, None]:
        iterator = iter(self._events)
        try:
            while True:
                began = time.perf_counter()
                event = next(iterator, None)
                self.seconds += time.perf_counter() - began
                if event is None:
                    return
                yield event
        finally:  # the answer ends with whoever reads it
            close = getattr(iterator, "close", None)
            if close is not None:
                close()


@contextmanager
def no_echo() -> Iterator[None]:
    """Within the block a terminal does not show what is typed, which would stand within the canvas; it is kept."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def canvas_text(draft: Draft, has_mark: bool = True) -> Text:
    """The draft's tokens up to its end of text, which a mark shows, coloured."""
    text = Text()
    marks = zip(draft.pieces[: draft.end], draft.entropies, draft.accepted, strict=False)
    for piece, entropy, is_accepted in marks:
        text.append_text(visible(piece, f"{colour(entropy)}{'' if is_accepted else ' italic'}".strip()))
    if has_mark and draft.end < len(draft.pieces):
        text.append(encodable("▪"), style=colour(draft.entropies[draft.end]))
    return text


def canvas_frame(draft: Draft, text: Text, console: Console) -> RenderableType:
    """The canvas, as far as it fits on the screen, with a line below that says how far it is."""
    accepted = sum(draft.accepted)
    mean = sum(draft.entropies) / max(1, len(draft.entropies))
    long = f"canvas {draft.canvas + 1} · step {draft.step} · {accepted}/{len(draft.accepted)} accepted"
    short = f"{draft.step}: {accepted}/{len(draft.accepted)}"
    status = next(
        (one for one in (f"{long} · entropy {mean:.3f} nats", long) if len(one) <= console.width),
        short,
    )
    lines, room = text.wrap(console, console.width), max(1, console.height - 2)
    rest = Text(encodable("…"), style="dim")
    shown = lines if len(lines) <= room else [*lines[: room - 1], rest]
    return Group(*shown, Text(status, style="dim", no_wrap=True))


@dataclass
class PartialAnswer:
    """What there is of an answer so far; all of it when `done` is there."""

    committed: str = ""
    draft: Draft | None = None
    """The canvas that was under way."""
    done: Done | None = None

    @property
    def text(self) -> str:
        """What is committed, and the draft as it stands."""
        return self.committed + (self.draft.text if self.draft is not None else "")


def show(
    llm: LanguageModel, events: Iterable[Event], console: Console, delay: float, written: PartialAnswer | None = None
) -> Done:
    """Draw drafts live, print what is committed, end with a line of figures.

    KeyboardInterrupt: the draft stays on the screen, marked, and `written` holds what there is of the answer."""
    written = PartialAnswer() if written is None else written
    view, flow, timed = CanvasView(console, delay), TextFlow(console), TimedEvents(events)
    try:
        with no_echo():
            _follow(timed, view, flow, written)
    except BaseException as error:
        with suppress(KeyboardInterrupt):  # a second one, of an impatient hand
            _leave(flow, written, "stopped" if isinstance(error, KeyboardInterrupt) else "broken off")
        raise
    done = written.done
    assert done is not None
    flow.end()
    seconds = done.usage.seconds if llm.is_remote else timed.seconds
    ending = "" if done.finish_reason == "stop" else " · cut at the length limit"
    seed = f" · seed {done.seed}" if done.usage.passes else ""  # a host that counts no passes names no seed
    console.print(Text(summary(done.usage, seconds) + seed + ending, style="dim"))
    return done


def _follow(events: TimedEvents[Event], view: CanvasView, flow: TextFlow, written: PartialAnswer) -> None:
    """Draw and print events as they come."""
    before, has_drafts = Text(), False  # the line in which the next canvas goes on
    with closing(iter(events)) as each:
        try:
            for event in each:
                if isinstance(event, Draft):
                    written.draft, has_drafts = event, True
                    view.show(canvas_frame(event, before + canvas_text(event), view.console))
                elif isinstance(event, Commit):
                    view.close()
                    text = before + visible(event.thought, "dim italic") + visible(event.text)
                    before = flow.print(text, is_last=event.is_last or not has_drafts)
                    written.committed, written.draft = written.committed + event.text, None
                    if before:
                        view.show(before)
                else:
                    written.done = event
        finally:
            view.close()
            flow.print(before)


def _leave(flow: TextFlow, written: PartialAnswer, word: str) -> None:
    """Print the draft that was under way, and that it was not finished."""
    if written.draft is not None:
        flow.print(canvas_text(written.draft, has_mark=False))
    flow.end()
    note = f"{word}; its end is a draft" if written.draft is not None else word
    flow.console.print(Text(note, style="dim"))


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
    if not console.is_terminal:
        return nullcontext()
    return console.status(Text(encodable(f"{word} …"), style="dim"), spinner=spinner())


def spinner() -> str:
    """The name of a spinner that standard error can show."""
    return "dots" if speaks_unicode() else "line"


# ---- texts on the screen ---------------------------------------------------------------------------------------------

NEAR_LINES, NEAR = 3, 400
"""The most lines and characters that are shown on either side of a text that was written."""


def visible(text: str, style: str = "") -> Text:
    """A text for the screen: `harmless`, in characters that it has, and never markup."""
    return Text(encodable(harmless(text)), style=style)


def around(before: str, middle: str, after: str) -> Text:
    """The text that was written, marked, within a few lines of the text around it."""
    above, below = before.split("\n"), after.split("\n")
    head = "\n".join(above[-NEAR_LINES - 1 :])[-NEAR:]
    tail = "\n".join(below[: NEAR_LINES + 1])[:NEAR]
    text = visible("…\n" if head != before and before.endswith("\n" + head) else "…" if head != before else "", "dim")
    rest = after[len(tail) :]
    end = tail.removesuffix("\r") if rest.startswith("\n") else tail.removesuffix("\n").removesuffix("\r")
    text = Text.assemble(text, visible(head), visible(middle, WRITTEN), visible(end))
    if rest.strip("\r\n"):
        text.append_text(visible("\n…" if rest.startswith("\n") else "…", "dim"))
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
