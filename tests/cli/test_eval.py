"""cli/eval.py, eval_runs.py and eval_screen.py: tasks and files in, tables, a record and a picture out, as a person
calls it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sfumato import LLM, cli
from sfumato.cli import eval as command
from sfumato.cli.eval_runs import compared, setting_of
from sfumato.cli.loading import ApiFlags
from sfumato.errors import InputError
from sfumato.evals import tasks
from sfumato.options import LoadOptions, Options
from sfumato.tasks.task import TASKS, Task

Command = Callable[..., tuple[int, str, str]]
QUICK = ("--items", "4", "-s", "max_steps=3")


@pytest.fixture
def mine(put: Callable[..., str]) -> str:
    """A file of three items and two lines that are none."""
    records = [
        {"prompt": "3 1 2", "answer": "[0-9]+", "check": "regex", "kind": "digits"},
        {"prompt": "3 1 2", "answer": "never", "kind": "words"},
        {"prompt": "x", "answer": {"a": 1}, "check": "json", "kind": "words"},
    ]
    return put("\n".join([*map(json.dumps, records), "{", '{"prompt": 1}']), "mine.jsonl")


def test_tasks_and_files_are_scored(sfumato: Command, mine: str) -> None:
    output = ("-o", "out.json", "--picture", "out.svg")
    code, out, err = sfumato("eval", "nano", "sudoku", mine, *QUICK, "--check", "exact", *output)
    assert code == 0, err
    assert "mine.jsonl, line 4: it is not JSON" in err and "mine.jsonl, line 5: prompt is 1" in err
    assert "2 lines were left out" in err
    for word in (
        "sudoku",
        "mine",
        "digits",
        "words",
        "95 % interval",
        "ms/item",
        "memory",
        "tokens/pass",
    ):
        assert word in out
    record = json.loads(Path("out.json").read_text())
    [run] = record["runs"]
    rows = {(row["task"], row["kind"]): row for row in run["rows"]}
    assert rows["sudoku", None]["items"] == 4 and rows["mine", None]["items"] == 3
    assert rows["mine", "words"]["items"] == 2 and rows["mine", "words"]["right"] == 0
    assert rows["sudoku", None]["peak_bytes"] > 0 and rows["sudoku", None]["steps"] <= 3
    assert record["seed"] == 7 and run["options"] == {"max_steps": 3} and run["model"] == "nano"
    assert record["environment"]["versions"] and "comparison" not in record
    assert ElementTree.parse("out.svg").getroot().tag.endswith("svg")
    answers = Path("out.answers.jsonl").read_text().splitlines()
    assert len(answers) == 8 and json.loads(answers[1])["task"] == "sudoku"


def test_the_task_of_moses_is_a_task_too(sfumato: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.tasks.moses.generator", lambda: TASKS["molecules"].generate)
    code, out, err = sfumato("eval", "molecules-moses", "--items", "1", "-s", "max_steps=1", "--json")
    assert code == 0 and json.loads(out)["runs"][0]["rows"][0]["task"] == "molecules-moses", err


def test_two_settings_are_compared(sfumato: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = sfumato("eval", "sudoku", *QUICK, "--compare", "max_steps=1", "-o", "out.json")
    assert code == 0, err
    assert "the same items" in out and "better / worse" in out and "first: nano · second: max_steps=1" in out
    record = json.loads(Path("out.json").read_text())
    assert [run["name"] for run in record["runs"]] == ["nano", "max_steps=1"]
    [whole, *kinds] = record["comparison"]
    assert whole["items"] == 4 and sum(row["items"] for row in kinds) == 4
    assert whole["both"] + whole["first_only"] + whole["second_only"] + whole["neither"] == 4
    assert record["runs"][1]["rows"][0]["steps"] == 1.0 and whole["low"] <= whole["difference"] <= whole["high"]


def test_the_same_model_agrees_with_itself(sfumato: Command) -> None:
    """Parity: at another precision or other operations every text would be the same, as here, or the table says so."""
    code, out, err = sfumato(
        "eval", "sorting", "--items", "3", "-s", "max_steps=2", "--compare", "ops=reference", "--json"
    )
    [whole] = json.loads(out)["comparison"]
    assert code == 0 and (whole["same_texts"], whole["agreement"], whole["p"]) == (3, 1.0, 1.0), err


def test_one_token_at_a_time(sfumato: Command) -> None:
    code, out, err = sfumato(
        "eval", "sudoku", "--items", "1", "--mode", "autoregressive", "--max-tokens", "5", "--json"
    )
    [row] = json.loads(out)["runs"][0]["rows"]
    assert code == 0 and (row["passes"], row["tokens_per_pass"], row["right"]) == (5.0, 1.0, 0), err


def test_an_interrupted_run_goes_on(sfumato: Command, put: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    put("", "empty")
    arguments = ("eval", "sorting", *QUICK, "--batch", "2", "-o", "out.json")
    batches: list[int] = []
    original = tasks._here

    def here(llm: LLM, task: Task, items: Sequence[str], options: Options) -> list[tasks.TaskAnswer]:
        batches.append(len(items))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return original(llm, task, items, options)

    monkeypatch.setattr(tasks, "_here", here)
    code, out, err = sfumato(*arguments)
    assert code == 130 and out == "" and not Path("out.json").exists()
    assert "stopped; 2 answers are kept in out.answers.jsonl: run it again and it goes on" in err
    code, _, err = sfumato(*arguments, "-s", "entropy_bound=0.5")
    assert code == 2 and "out.answers.jsonl holds answers of other settings (first changed)" in err
    code, _, err = sfumato(*arguments[:3], "3", *arguments[4:])
    assert code == 2 and "(tasks changed); give another -o, or --force to begin anew" in err
    code, out, err = sfumato(*arguments)
    assert code == 0 and batches == [2, 2, 2], err
    assert json.loads(Path("out.json").read_text())["runs"][0]["rows"][0]["items"] == 4
    code, _, err = sfumato(*arguments)
    assert code == 2 and "out.json is there already" in err
    assert sfumato(*arguments, "--force")[0] == 0 and batches == [2, 2, 2, 2, 2]


def test_a_kind_of_a_task_is_a_task(sfumato: Command) -> None:
    code, out, err = sfumato(
        "eval", "nano", "sudoku/easy", "sudoku/hard", "--items", "2", "-s", "max_steps=1", "--json"
    )
    assert code == 0, err
    rows = [(row["task"], row["kind"]) for row in json.loads(out)["runs"][0]["rows"]]
    assert rows == [("sudoku/easy", None), ("sudoku/hard", None)]


def test_what_a_model_cannot_answer_is_named(sfumato: Command, put: Callable[..., str]) -> None:
    records = [{"prompt": text, "answer": "a"} for text in ("1", "1" * 100_000, "2")]
    file = put("\n".join(map(json.dumps, records)), "long.jsonl")
    code, out, err = sfumato("eval", file, "--check", "exact", "-s", "max_steps=1")
    assert code == 0 and "long" in out
    assert (
        "long: the conversation has 100000 characters" in err
        and "1 could not be answered or checked, which counts as wrong" in err
    )


def test_tasks_of_lm_eval_have_rows_and_are_kept(
    sfumato: Command, put: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put("", "empty")
    calls: list[tuple[Any, ...]] = []

    def harness_answers(llm: LLM, name: str, options: Options, *rest: Any) -> dict[str, list[tasks.TaskAnswer]]:
        calls.append((name, options.seed, *rest))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {one: [tasks.TaskAnswer(str(n), "x", n > 0, 0) for n in range(3)] for one in ("part one", "part two")}

    monkeypatch.setattr("sfumato.evals.harness.check_installed", lambda: None)
    monkeypatch.setattr("sfumato.evals.harness.harness_answers", harness_answers)
    arguments = ("eval", "lm:parts", "--items", "3", "--compare", "max_steps=1", "-o", "out.json")
    assert sfumato(*arguments)[0] == 130
    code, out, err = sfumato(*arguments)
    assert code == 0 and calls == [("parts", 7, 3, 32)] * 3, err
    record = json.loads(Path("out.json").read_text())
    rows = [(row["task"], row["right"], row["items"]) for row in record["runs"][1]["rows"]]
    assert rows == [("lm:part one", 2, 3), ("lm:part two", 2, 3)] and record["comparison"][1]["both"] == 2
    assert "lm:part two" in out and "66.7%" in out


def test_of_a_long_file_some_items_are_drawn_and_that_is_said(sfumato: Command, mine: str) -> None:
    code, out, err = sfumato("eval", mine, "--check", "exact", "--items", "1", "-s", "max_steps=1", "--json")
    assert code == 0 and json.loads(out)["runs"][0]["rows"][0]["items"] == 1
    assert "mine.jsonl: 1 of 3 items are drawn; --items says how many" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no task is named; give sudoku, sorting,"),
        (["nano"], "no task is named"),
        (["nano", "chess"], "there is no task 'chess'; give sudoku, sorting,"),
        (["-m", "nano", "chess"], "there is no task 'chess'"),
        (
            ["nano", "sudoku/odd"],
            "there is no task 'sudoku/odd'; the kinds are: sudoku/easy, sudoku/medium, sudoku/hard",
        ),
        (["none.jsonl"], "cannot read none.jsonl: No such file"),
        (["empty.jsonl"], "empty.jsonl has no item"),
        (["sudoku", "sudoku"], "two tasks are called sudoku; give each file its own name"),
        (["sudoku", "--items", "0"], "--items"),
        (["sudoku", "--compare", ""], "--compare is empty; give a model, or NAME=VALUE"),
        (["sudoku", "--compare", "temperature=1"], "--compare temperature=1 changes nothing"),
        (["sudoku", "--compare", "max_steps=none"], "--max-steps is 'none'"),
        (["sudoku", "--compare", "max_step=8"], "there is no option 'max_step'; did you mean --max-steps?"),
        (["sudoku", "--picture", "a.png"], "--picture is a.png, and the picture is SVG"),
        (["sudoku", "-o", "nowhere/a.json"], "there is no folder nowhere"),
        (["empty.jsonl", "-o", "empty.jsonl", "--force"], "empty.jsonl is read by this command"),
        (["a.answers.jsonl", "-o", "a.json"], "a.answers.jsonl is read by this command"),
        (["sorting", "-o", "b.json"], "b.answers.jsonl holds no answers of an evaluation"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_what_is_wrong_is_said_before_the_work(
    arguments: list[str], sentence: str, put: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    put("", "empty.jsonl")
    put("{}\n", "a.answers.jsonl")
    put("{}\n", "b.answers.jsonl")
    assert cli.main(["eval", *arguments]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_the_first_word_is_a_model_unless_it_is_a_task() -> None:
    def words(*some: str, **flags: Any) -> tuple[str | None, list[str]]:
        return command.model_and_tasks(some, ApiFlags(**flags))

    assert words("nano", "sudoku", "a.jsonl") == ("nano", ["sudoku", "a.jsonl"])
    assert words("sudoku", "sorting") == (None, ["sudoku", "sorting"])
    assert words("a.JSONL") == (None, ["a.JSONL"]) and words("lm:arc_easy") == (None, ["lm:arc_easy"])
    assert words("chess", model="nano") == ("nano", ["chess"])
    assert words("sudoku", api="http://127.0.0.1:9") == (None, ["sudoku"])
    assert "sudoku" in command.known_tasks("su") and "nano" in command.known_tasks("na")


def test_a_comparison_changes_what_it_names() -> None:
    first = setting_of(ApiFlags("nano"), LoadOptions(), Options(seed=7))
    steps = compared(first, ["max-steps=8"])
    assert steps.options == Options(seed=7, max_steps=8) and steps.is_loaded_like(first) and steps.name == "max-steps=8"
    other = compared(first, ["a/folder=1", "quantize=int8", "memory_limit=2", "adapters=mine=run/adapter"])
    assert (other.api.model, other.load.quantize, other.load.memory_limit) == ("a/folder=1", "int8", 2_000_000_000)
    assert other.load.adapters == {"mine": "run/adapter"} and not other.is_loaded_like(first)
    assert compared(first, ["model=other"]).api.model == "other"
    with pytest.raises(InputError, match="--memory-limit is nan GB"):
        compared(first, ["memory_limit=much"])
