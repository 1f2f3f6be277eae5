"""display/loading.py: the bar of a model that loads: on a terminal and in a notebook, and nowhere else."""

from __future__ import annotations

import io
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sfumato import LLM, LoadOptions
from sfumato.display import loading
from sfumato.display.loading import LoadingBar, bar_of, loading_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """An impatient bar's stderr."""
    stream = Terminal()
    monkeypatch.setattr(loading, "sys", SimpleNamespace(stderr=stream))  # pytest puts its own back before the test
    monkeypatch.setattr(loading, "PATIENCE", 0.0)
    monkeypatch.setattr(loading, "INTERVAL", 0.0)
    return stream


def test_the_bar_in_words() -> None:
    assert bar_of(38 * 10**8, 152 * 10**8, 4.0) == (
        "loading [######------------------]  25%  3.8 of 15.2 GB   12 s left"
    )
    assert bar_of(5, 5, 1.0) == "loading [########################] 100%  0.0 of 0.0 GB"
    assert bar_of(0, 0, 1.0).startswith("loading [----") and bar_of(9, 5, 1.0).count("#") == 24
    assert bar_of(1, 3, 1.0).isascii()


def test_a_bar_comes_late_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("sfumato.display.loading.time.monotonic", lambda: clock[0])
    drawn: list[str] = []
    bar = LoadingBar(drawn.append, lambda: drawn.append("gone"))
    for seconds, count in ((0.1, 0), (0.5, 1), (0.55, 1), (0.7, 2), (0.71, 2)):
        clock[0] = seconds
        bar(int(100 * seconds), 100)
        assert len(drawn) == count
    bar(100, 100)  # the end is drawn at once
    bar.close()
    assert len(drawn) == 4 and drawn[-1] == "gone"
    quick = LoadingBar(drawn.append, lambda: drawn.append("gone"))
    quick(1, 2)
    quick.close()
    assert len(drawn) == 4


def test_a_terminal_shows_a_bar_while_a_model_loads(terminal: Terminal) -> None:
    LLM.load("nano", ops="fused")
    assert "\rloading [" in terminal.getvalue() and "100%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[2K")


def test_no_bar_where_none_is_to_be(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[tuple[int, int]] = []
    LLM.load("nano", ops="fused", progress=False)
    LLM.open(LoadOptions("nano", ops="fused"))
    LLM.load("nano", ops="fused", progress=lambda loaded, total: counts.append((loaded, total)))
    assert terminal.getvalue() == "" and counts and counts[-1][0] == counts[-1][1]
    assert loading_bar(io.StringIO()) is None  # a pipe
    monkeypatch.setattr(loading, "sys", SimpleNamespace(stderr=None))
    assert loading_bar() is None


def test_a_notebook_shows_it_in_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[str] = []

    def show(frame: dict[str, str], raw: bool, display_id: bool = True) -> Any:
        frames.append(frame["text/html"])
        return SimpleNamespace(update=show)

    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    display.display = show  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(loading, "PATIENCE", -1.0)
    bar = loading_bar()
    assert bar is not None
    bar(1, 2)
    bar.close()
    assert "loading [############------------]  50%" in frames[0] and frames[-1] == ""
