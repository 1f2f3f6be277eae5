"""The command line's frame: what is imported when, what --help shows, and what every kind of failure looks like."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import typer

from sfumato import __version__, cli
from sfumato.events import CapacityError, InputError, SfumatoError


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, in which nothing is imported yet."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def commanding(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Puts a function in the place of every other command, as `sfumato it`."""

    def put(command: Callable[..., object]) -> None:
        module = types.ModuleType("a_command")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "a_command", module)
        monkeypatch.setattr(cli, "COMMANDS", {"it": ("a_command", "Does it."), "other": ("not.there", "Never.")})

    return put


def test_help_lists_all_commands_and_imports_none() -> None:
    found = run("import sys; from sfumato.cli import main; print(main(['--help'])); print(sorted(sys.modules))")
    for name, (module, line) in cli.COMMANDS.items():
        assert name in found.stdout
        assert line.split()[0] in found.stdout
        assert f"'{module}'" not in found.stdout
    assert "'torch'" not in found.stdout
    assert "'numpy'" not in found.stdout
    assert found.stderr == ""


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sfumato {__version__}\n"
    assert cli.main([]) == 0
    assert "Usage: sfumato" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: sfumato {name}" in text
    assert f"Example: sfumato {name}" in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["--nothing"], "--nothing"),
        (["info"], "Missing argument"),
        (["info", "nano", "--nothing"], "--nothing"),
        (["info", "nano", "--context", "many"], "--context"),
    ],
)
def test_a_usage_error_is_one_line_with_code_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("sfumato: ")
    assert told.err.count("\n") == 1
    assert part in told.err
    assert "--help" in told.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("top_k is -1;\n  give 0 or more"), 2, "sfumato: top_k is -1; give 0 or more\n"),
        (CapacityError("too long"), 2, "sfumato: too long\n"),
        (SfumatoError("it failed"), 1, "sfumato: it failed\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 1, "sfumato: a.txt: No such file or directory\n"),
        (OSError("disk on fire"), 1, "sfumato: disk on fire\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(1), 1, ""),
        (typer.Exit(0), 0, ""),
        (SystemExit(3), 3, ""),
    ],
)
def test_an_error_is_one_line_and_its_code(
    error: BaseException,
    code: int,
    line: str,
    commanding: Callable[[Callable[..., object]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command() -> None:
        raise error

    commanding(command)
    assert cli.main(["it"]) == code
    assert capsys.readouterr().err == line


def test_an_unforeseen_error_says_where_and_shows_no_traceback(
    commanding: Callable[[Callable[..., object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise RuntimeError("the first line\nthe second line")

    commanding(command)
    assert cli.main(["it"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("sfumato: RuntimeError: the first line (at test_cli.py, line ")
    assert told.count("\n") == 1


def test_what_a_command_returns_is_the_exit_code(commanding: Callable[[Callable[..., object]], None]) -> None:
    commanding(lambda: 5)
    assert cli.main(["it"]) == 5
    commanding(lambda: "text")
    assert cli.main(["it"]) == 0


def test_only_the_wanted_command_is_imported(commanding: Callable[[Callable[..., object]], None]) -> None:
    commanding(lambda: None)
    assert cli.main(["it"]) == 0  # "other" names a module that does not exist


@pytest.mark.parametrize("text", ["print('x' * 100000)", "[print('x', flush=True) for _ in range(100000)]"])
def test_a_reader_that_goes_away_is_no_error(text: str) -> None:
    code = (
        "import sys, types; from sfumato import cli\n"
        f"def command(): {text}\n"
        "sys.modules['it'] = types.ModuleType('it'); sys.modules['it'].command = command\n"
        "cli.COMMANDS['it'] = ('it', ''); sys.exit(cli.main(['it']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1
    process.stderr.close()
