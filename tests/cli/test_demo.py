"""cli/demo.py, cli/demo_skills.py: the skills on nano and nano-decide, and how right and wrong texts are shown."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from sfumato import cli
from sfumato.cli import view
from sfumato.cli.demo_skills import SKILLS, Stage, item_of, skill_of
from sfumato.errors import InputError
from sfumato.events import Completion, Draft, Edited, Usage
from sfumato.llm import LLM
from sfumato.options import LoadOptions, Options
from sfumato.system.embedded import EMBEDDED
from sfumato.tasks import decisions, edits, graphs, sudoku
from sfumato.tasks.task import is_held_out
from sfumato.templates.requests import Chat, Edit

ROOT = Path(__file__).parents[2]
TEXTS = ("edits", "infill", "molecules", "graphs")
"""The skills that answer with a text."""
QUICK = ("--delay", "0", "--pause", "0")
needs_skills = pytest.mark.skipif(
    not (EMBEDDED["nano-skills"] / "model.safetensors").exists(), reason="nano-skills has no weights here"
)

Demo = Callable[..., tuple[int, str]]


@pytest.fixture
def demo(nano: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Demo:
    """Runs the command with nano loaded once: (code, what is printed)."""
    models = {"nano": nano}

    def load(options: LoadOptions) -> LLM:
        name = str(options.model)
        return models.setdefault(name, models.get(name) or LLM.load(name))

    monkeypatch.setattr("sfumato.cli.loading.load_model", load)

    def call(*arguments: str) -> tuple[int, str]:
        code = cli.main(["demo", *arguments])
        output = capsys.readouterr()
        return code, output.out + output.err

    return call


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Makes the command believe in a terminal with colours."""
    shown = io.StringIO()
    options = {"file": shown, "force_terminal": True, "color_system": "truecolor", "width": 100, "height": 40}
    monkeypatch.setattr("sfumato.cli.demo.Console", lambda **more: Console(**cast(Any, options | more)))
    yield shown


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_list_names_every_skill_and_loads_nothing(no_model: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["sudoku", *TEXTS, "decisions"]


def test_an_unknown_skill_is_refused_before_a_model_is_loaded(no_model: None, demo: Demo) -> None:
    code, shown = demo("sudoku", "chess")
    assert code == 2 and "there is no skill 'chess'" in shown and "sudoku, edits, infill" in shown


def test_piped_the_facts_are_plain_text(demo: Demo) -> None:
    code, shown = demo("sudoku", "decisions", "--seed", "3", *QUICK)
    assert code == 0 and "\x1b" not in shown and "accepted" not in shown
    puzzle, one = item_of(skill_of("sudoku"), 3), decisions.read(item_of(skill_of("decisions"), 3))
    assert sudoku.render(puzzle) in shown and sudoku.render(puzzle, sudoku.solve(puzzle)) in shown
    assert "right: every row" in shown and re.search(r"\d+ steps?, [\d.]+ tokens per pass, \d+ ms\n", shown)
    assert one.state in shown and one.question.text() in shown and re.search(r"\n1 pass, \d+ ms\n", shown)
    assert f"true answer is {one.words[one.likeliest]}; its chance is {max(one.chances):.0%}" in shown
    assert shown.rstrip().endswith("sfumato demo sudoku decisions --seed 3")


def test_an_item_is_new_each_time_and_the_seed_repeats_it(demo: Demo) -> None:
    first, second = (demo("sudoku", *QUICK)[1] for _ in range(2))
    assert first.splitlines()[1:14] != second.splitlines()[1:14]
    seed = first.split()[-1]
    again = demo("sudoku", "--seed", seed, *QUICK)[1]
    assert re.sub(r"\d+ ms", "", again) == re.sub(r"\d+ ms", "", first)


@pytest.mark.parametrize("name", SKILLS)
def test_no_item_is_one_of_training(name: str) -> None:
    skill = skill_of(name)
    items = {item_of(skill, seed) for seed in range(3)}
    assert len(items) == 3 and all(map(is_held_out, items))


def test_on_a_terminal_every_step_is_drawn(demo: Demo, terminal: io.StringIO) -> None:
    code, _ = demo("sudoku", "--seed", "3", *QUICK)
    shown = terminal.getvalue()
    (steps,) = re.findall(r"(\d+) steps?, ", shown)
    assert code == 0 and "noise" in shown and shown.count("/81 accepted") >= int(steps) > 0
    assert "right" in shown and shown.count("\x1b[?7l") == shown.count("\x1b[?7h") == 1


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_without_colours_nothing_moves(
    variables: dict[str, str], demo: Demo, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _ = demo("sudoku", "--seed", "3", *QUICK)
    assert code == 0 and "accepted" not in terminal.getvalue() and "\x1b[?25l" not in terminal.getvalue()


def test_ctrl_c_leaves_the_terminal_as_it_was(
    demo: Demo, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[object] = []
    show = view.CanvasView.show

    def interrupted(self: view.CanvasView, frame: Any) -> None:
        show(self, frame)
        frames.append(frame)
        if len(frames) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(view.CanvasView, "show", interrupted)
    code, printed = demo("sudoku", "--seed", "3", *QUICK)
    assert code == 130 and "Traceback" not in printed and len(frames) == 2
    shown = terminal.getvalue()
    assert shown.rindex("\x1b[?7h") > shown.rindex("\x1b[?7l") and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_bare_install_without_a_network_is_enough() -> None:
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n\n")[0]
    names = {name.replace("-", "_").lower() for name in re.findall(r'"([A-Za-z][\w-]*)', extras)} - {"sfumato"}
    assert {"fastapi", "llguidance", "pytest"} <= names
    code = (
        "import socket, sys\n"
        f"for name in {sorted(names)!r}: sys.modules[name] = None\n"
        "def refuse(*_): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "from sfumato.cli import main\n"
        "sys.exit(main(['demo', 'sudoku', 'decisions', '--seed', '3']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert process.returncode == 0 and process.stdout.count("right: ") == 2, process.stderr


# ---- skills that answer with a text ----------------------------------------------------------------------------------


class WritingModel:
    """A model that writes one text, with one draft before it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.queries: list[Chat | Edit] = []
        self.model = SimpleNamespace(config=SimpleNamespace(canvas_length=96))

    def outcomes(self, query: Chat | Edit) -> Iterator[Draft | Completion | Edited]:
        self.queries.append(query)
        pieces = [*self.text, *[""] * 5]
        if query.options.drafts:
            count = len(pieces)
            yield Draft(0, 0, 1, [0] * count, [0.1] * count, [True] * count, self.text, pieces, len(self.text))
        usage = Usage(tokens=len(self.text), steps=3, passes=4)
        if isinstance(query, Edit):
            yield Edited(self.text, query.text, usage, 1)
        else:
            yield Completion(self.text, [], "stop", usage)


def shown_of(name: str, text: str, seed: int = 1, is_live: bool = False) -> tuple[str, Chat | Edit]:
    """What is shown where a model writes this text, and what it was asked."""
    file = io.StringIO()
    console = Console(file=file, width=100, height=40, force_terminal=is_live, highlight=False)
    model = WritingModel(text)
    skill = skill_of(name)
    skill.show(Stage(console, Options(seed=5), is_live), cast(LLM, model), item_of(skill, seed))
    return file.getvalue(), model.queries[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", TEXTS)
def test_a_right_text_is_called_right(name: str, seed: int) -> None:
    task = skill_of(name).task
    item = item_of(skill_of(name), seed)
    shown, query = shown_of(name, task.answer(item), seed)
    assert "\nright: " in shown and "wrong" not in shown and query.options.seed == 5 and not query.options.drafts
    assert "3 steps, " in shown


@pytest.mark.parametrize("text", ["", "\n\n", "C", "***\n", "[bold]x\x1b[2J"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_wrong_text_is_called_wrong_and_the_right_one_is_shown(name: str, text: str) -> None:
    skill = skill_of(name)
    shown, _ = shown_of(name, text)
    assert "\nwrong: " in shown and "\nright" not in shown and "\x1b" not in shown
    if name != "graphs":
        assert skill.task.answer(item_of(skill, 1)) in shown


def test_a_plot_shows_its_cells_and_counts_those_that_are_right() -> None:
    skill = skill_of("graphs")
    item = item_of(skill, 1)
    lines = skill.task.answer(item).split("\n")
    shown, _ = shown_of("graphs", "\n".join(lines))
    assert all(f" {' '.join(line)}\n" in shown for line in lines) and "right: 81 of 81 cells" in shown
    top, left = item.split("y ")[-1].split()[1], item.split("x ")[-1].split()[0]
    assert re.search(rf"^ *{top} {re.escape(' ' + ' '.join(lines[0]))}$", shown, re.M) and f" {left} " in shown
    wrong = graphs.EMPTY * 9
    line = next(number for number, line in enumerate(lines) if line != wrong)
    count = 81 - lines[line].count(graphs.MARK)
    shown, _ = shown_of("graphs", "\n".join([*lines[:line], wrong, *lines[line + 1 :]]))
    assert f"wrong: {count} of 81 cells" in shown


def test_an_edit_starts_from_its_document_in_place() -> None:
    edit = edits.read(item_of(skill_of("edits"), 1))
    shown, query = shown_of("edits", edit.edited, is_live=True)
    assert isinstance(query, Edit) and (query.text, query.instruction) == (edit.text, edit.instruction)
    assert query.options.drafts and "accepted" in shown


@pytest.mark.parametrize("name", ["infill", "molecules", "graphs"])
def test_the_others_are_asked_as_in_training(name: str) -> None:
    skill = skill_of(name)
    item = item_of(skill, 1)
    shown, query = shown_of(name, skill.task.answer(item), is_live=True)
    assert isinstance(query, Chat) and query.messages == [{"role": "user", "content": skill.task.prompt(item)}]
    assert query.options.max_tokens == 96 and query.options.drafts and "accepted" in shown


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(InputError, match="there is no skill 'x' to show; the skills are: sudoku"):
        skill_of("x")


@needs_skills
def test_nano_skills_shows_its_four(demo: Demo, terminal: io.StringIO) -> None:
    code, _ = demo(*TEXTS, "--seed", "3", *QUICK)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert code == 0 and len(re.findall(r"^(right|wrong): ", shown, re.M)) == 4
    assert json.loads(item_of(skill_of("edits"), 3))[1] in shown and shown.count(" accepted") >= 8
