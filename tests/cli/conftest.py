"""What the tests of commands share: nano, loaded once, command lines on it, and an empty folder."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sfumato import cli
from sfumato.llm import LLM


@pytest.fixture(scope="session")
def nano() -> LLM:
    return LLM.load("nano")


@pytest.fixture
def sfumato(
    nano: LLM, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line on nano, loaded once: (code, standard output, standard error)."""
    monkeypatch.setattr("sfumato.cli.loading.load_model", lambda load: nano)

    def call(*arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = cli.main(arguments)
        output = capsysbinary.readouterr()
        return code, output.out.decode(), output.err.decode()

    return call


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loading a failure: what is wrong with the input has to be said before."""
    monkeypatch.setattr("sfumato.cli.loading.load_model", lambda load: pytest.fail("a model was loaded"))


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a file in an empty current folder; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes, name: str = "a.txt") -> str:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write
