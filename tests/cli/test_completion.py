"""cli/completion.py, cli/__init__.py: what bash, zsh and fish get when they ask, and what that imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sfumato import cli
from sfumato.checkpoints.targets import TARGETS
from sfumato.quant.recipes import RECIPES
from sfumato.system.embedded import EMBEDDED

ASK = """
import sys
from sfumato.cli import main
code = main()
print({"torch", "numpy", "transformers", "fastapi"} & set(sys.modules), file=sys.stderr)
sys.exit(code)
"""


def ask(shell: str, line: str) -> list[str]:
    """What the shell is offered behind this line; nothing heavy may be imported for it."""
    words = line.split(" ")
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
    variables |= {"_SFUMATO_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    process = subprocess.run(
        [sys.executable, "-c", ASK], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stderr) == (0, "set()\n")
    return process.stdout.split("\n")[:-1] if shell == "bash" else process.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("sfumato gen", ["generate"]),
        ("sfumato generate --max", ["--max-tokens", "--max-steps"]),
        ("sfumato convert nano --to mlx", [name for name in TARGETS if name.startswith("mlx")]),
        ("sfumato quantize nano --to int", [name for name in RECIPES if name.startswith("int")]),
        ("sfumato serve --dtype b", ["bfloat16"]),
        ("sfumato bench --quantize nv", ["nvfp4"]),
        ("sfumato generate -s t_m", ["t_max=", "t_min="]),
        ("sfumato chat na", [*EMBEDDED]),
        ("sfumato run na", [*EMBEDDED]),
        ("sfumato info --gp", ["--gpu"]),
    ],
)
def test_bash_is_offered_commands_flags_values_and_models(line: str, offers: list[str]) -> None:
    assert ask("bash", line) == offers


def test_zsh_and_fish_too() -> None:
    assert [line.strip("()'\"") for line in ask("zsh", "sfumato quantize nano --to nv")] == [
        "_arguments '*: :((\"nvfp4"
    ]
    (line,) = ask("fish", "sfumato serve --dev")
    assert line.startswith("--device\tauto, cpu")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_the_shells(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_SFUMATO_COMPLETE=complete_{shell}" in script and "sfumato" in script
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([program, "-n", str(tmp_path / "script")], check=True)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "csh"]) == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err
