"""display/canvas.py: a canvas that is redrawn in place, with IPython's part played by a scripted module."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sfumato import LLM, Commit, Done, InputError, Options, Usage
from sfumato.display.canvas import CanvasDisplay, is_notebook

PUZZLE = "800560790257001600040000152004050800038607041096348275085906320902704518370285400"


class Screen:
    """What a notebook shows: outputs, each with all that it has shown."""

    def __init__(self) -> None:
        self.outputs: list[list[str]] = []
        self.plain: list[list[str]] = []

    def display(self, frame: dict[str, str], raw: bool, display_id: bool) -> Any:
        assert raw is True and display_id is True
        self.outputs.append([])
        self.plain.append([])
        self.update(frame, raw=True)
        return SimpleNamespace(update=self.update)

    def update(self, frame: dict[str, str], raw: bool) -> None:
        assert raw is True
        self.outputs[-1].append(frame["text/html"])
        self.plain[-1].append(frame["text/plain"])


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    shown = Screen()
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    display.display = shown.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_a_notebook_is_a_shell_with_a_kernel(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_notebook()
    for shell in (None, SimpleNamespace()):  # no shell; a terminal's
        monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda shell=shell: shell)
        assert not is_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not is_notebook()
    with pytest.raises(InputError, match="there is no notebook to draw in; in a program use stream"):
        CanvasDisplay()


def test_an_answer_denoises_in_one_output(screen: Screen) -> None:
    llm, options = LLM.load("nano", ops="fused", progress=False), Options(seed=3, max_tokens=82)
    answer = llm.watch("Solve this Sudoku:\n" + PUZZLE, options=options)
    assert answer.text == llm.chat("Solve this Sudoku:\n" + PUZZLE, options=options).text
    (frames,) = screen.outputs
    drafts = [frame for frame in frames if "<span" in frame]
    assert len(drafts) == answer.usage.steps and "canvas 1 · step 1 · " in drafts[0]
    assert (
        screen.plain[0][-1] == answer.text
        and answer.text in frames[-1]
        and "<span" not in frames[-1]
        and "seed 3" in frames[-1]
    )
    llm.watch("1", options=Options(mode="autoregressive", max_tokens=3, top_k=1))  # without a canvas, no draft
    assert len(screen.outputs) == 2 and not any("<span" in frame for frame in screen.outputs[1])


def test_what_is_committed_stays_before_the_next_canvas(screen: Screen) -> None:
    display = CanvasDisplay()
    display.show(Commit(0, 0, 1, [], text="one <"))
    display.show(Commit(0, 1, 1, [], text=" two"))
    display.show(Done(0, "length", [], Usage(tokens=2, seconds=0.5), 7, "one < two", tool_calls=[{"name": "<f>"}]))
    (frames,) = screen.outputs
    assert ["one &lt; two" in frame for frame in frames] == [False, True, True]
    assert "calls &lt;f&gt; · cut at the length limit" in frames[-1]
