"""cli/__init__.py: what is imported when, what --help shows, and what every kind of failure looks like."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer

from sfumato import __version__, cli
from sfumato.errors import CapacityError, InputError, SfumatoError


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
    process = run("import sys; from sfumato.cli import main; print(main(['--help'])); print(sorted(sys.modules))")
    for name, (module, line) in cli.COMMANDS.items():
        assert name in process.stdout
        assert line.split()[0] in process.stdout
        assert f"'{module}'" not in process.stdout
    assert "'torch'" not in process.stdout
    assert "'numpy'" not in process.stdout
    assert process.stderr == ""


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
    assert "<bool>" not in text
    assert re.search(r"--help +-h +Show", text)
    help_ = inspect.getdoc(importlib.import_module(cli.COMMANDS[name][0]).command) or ""
    words = " ".join(text.split())
    for paragraph in help_.split("\n\n"):  # its words as they stand, square brackets too
        assert " ".join(paragraph.split()) in words


@pytest.mark.parametrize("arguments", [["help", "list"], ["help"]])
def test_help_is_a_word_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert " ".join(["Usage: sfumato", *arguments[1:], "[OPTIONS]"]) in capsys.readouterr().out


def test_what_others_call_a_command_is_answered_with_its_name_here(capsys: pytest.CaptureFixture[str]) -> None:
    for theirs, ours in cli.OTHER_NAMES.items():
        assert theirs not in cli.COMMANDS and ours.split()[0] in (*cli.COMMANDS, "--version")
        assert cli.main([theirs, "x"]) == 2
        assert capsys.readouterr().err == f"sfumato: there is no command {theirs}; it is `sfumato {ours}`\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["--nothing"], "--nothing"),
        (["convert"], "Missing argument"),
        (["info", "nano", "--nothing"], "--nothing"),
        (["info", "nano", "--context", "many"], "--context"),
    ],
)
def test_a_usage_error_is_one_line_with_code_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("sfumato: ")
    assert output.err.count("\n") == 1
    assert part in output.err
    assert "--help" in output.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("top_k is -1;\n  give 0 or more"), 2, "sfumato: top_k is -1; give 0 or more\n"),
        (CapacityError("too long"), 2, "sfumato: too long\n"),
        (SfumatoError("it failed"), 1, "sfumato: it failed\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 1, "sfumato: a.txt: No such file or directory\n"),
        (OSError("disk on fire"), 1, "sfumato: disk on fire\n"),
        (OSError(28, "No space left on device"), 1, "sfumato: No space left on device\n"),
        (OSError(28, "No space left on device", "out"), 1, "sfumato: out: No space left on device\n"),
        (
            InputError("no \x1b[31mred\x9b0m\x7f \ud800 [bold]x[/nope]"),
            2,
            "sfumato: no ␛[31mred�0m␡ � [bold]x[/nope]\n",
        ),
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
    err = capsys.readouterr().err
    assert err.startswith("sfumato: RuntimeError: the first line (at test_cli.py, line ")
    assert err.count("\n") == 1


class PanicException(BaseException):
    """As pyo3 makes it: no Exception."""


def test_a_panic_in_a_library_is_one_line(
    commanding: Callable[[Callable[..., object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    commanding(command)
    assert cli.main(["it"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("sfumato: PanicException: called `Option::unwrap()` on a `None` value (at test_cli.py, line")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["convert", "nano", "--to", "bf16", "-o", ""], "--output"),
        (["convert", "nano", "--to", "gguf-q8_0", "-o", " "], "--output"),
        (["quantize", "nano", "-o", ""], "--output"),
        (["bench", "--size", "tiny", "-o", ""], "--output"),
        (["finetune", ""], "OUT"),
    ],
)
def test_an_empty_place_to_write_to_is_refused_by_name(
    arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To Path it is the current folder."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"sfumato: {name} is empty; give a path to write to\n"
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_says_reaches_no_terminal_as_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of tensors, values of a config and paths: in errors, notices and reports; and none of it is markup."""
    from sfumato.checkpoints.locate import NANO
    from sfumato.checkpoints.shards import stored_tensors, write_tensors

    evil = "\x1b]0;owned\x07[red]\x9b2J[/nope]"
    folder = tmp_path / f"a{evil.replace('/', '')}"
    shutil.copytree(NANO, folder)
    stored = {name: one.read() for name, one in stored_tensors(folder).items()}

    def call(*arguments: str, code: int | None) -> str:
        assert cli.main(arguments) == code or code is None
        output = capsys.readouterr()
        assert not [c for c in output.out + output.err if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]
        return output.out + output.err

    vision = {f"model.encoder.vision_tower.{evil}": torch.zeros(1)}
    write_tensors(folder / "model.safetensors", stored | vision)
    for shown in (
        call("convert", str(folder), "--to", "bf16", "-o", str(tmp_path / f"b{folder.name}"), code=0),
        call("info", str(folder), code=0),
        call("sudoku", "--random", "--clues", "55", "--model", str(folder), "--max-steps", "1", code=None),
        call("generate", "x", "-m", str(folder), "--max-tokens", "2", "-s", "max_steps=1", code=0),
    ):
        assert "␛]0;owned␇[red]�2J[nope]" in "".join(shown.split())
    write_tensors(folder / "model.safetensors", stored | {evil: torch.zeros(1)})
    assert "unexpected tensor " + repr(evil)[1:-1] in call("generate", "x", "-m", str(folder), code=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": evil}}))
    assert "quant_method is " + repr(evil)[1:-1] in call("generate", "x", "-m", str(folder), code=2)


def test_what_a_command_returns_is_the_exit_code(commanding: Callable[[Callable[..., object]], None]) -> None:
    commanding(lambda: 5)
    assert cli.main(["it"]) == 5
    commanding(lambda: "text")
    assert cli.main(["it"]) == 0


def test_only_the_called_command_is_imported(commanding: Callable[[Callable[..., object]], None]) -> None:
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
