"""cli/sweep.py and sweep_screen.py: from one's own items to a preset that commands take, as a person calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sfumato import LLM, LoadOptions, Options, cli
from sfumato.cli.sweep import SweepFlags, axes_of
from sfumato.errors import InputError
from sfumato.evals.sweep import Sweep
from sfumato.presets import Preset

Command = Callable[..., tuple[int, str, str]]
SWEEP = ("--sweep", "--axis", "max_steps=2,1", "--lose", "80", "-s", "max_steps=4", "-s", "confidence=0")


@pytest.fixture
def mine(put: Callable[..., str]) -> str:
    """Four items of which any answer is right."""
    lines = [json.dumps({"prompt": f"{n}", "answer": "(?s).*", "check": "regex"}) for n in range(4)]
    return put("\n".join(lines), "mine.jsonl")


def test_from_items_to_a_preset_that_commands_take(sfumato: Command, mine: str) -> None:
    files = ("-o", "out.json", "--picture", "out.svg", "--preset-to", "fast.json")
    code, out, err = sfumato("eval", "nano", mine, *SWEEP, *files)
    assert code == 0, err
    assert "max_steps=1: +0.0 points, " in err and "of the passes, on 2 items" in err
    for word in ("reference", "chosen", "points", "held-out items", "fast.json: give it to any command"):
        assert word in out
    record = json.loads(Path("out.json").read_text())
    assert (record["what"], record["seed"], record["model"], record["axes"]) == ("curve", 7, "nano", ["max_steps=2,1"])
    assert [point["setting"] for point in record["points"]] == ["reference", "max_steps=2", "max_steps=1"]
    assert record["choice"]["chosen"] == "max_steps=1" and record["is_complete"]
    assert record["points"][2]["tasks"]["mine"]["steps"] == 1.0 and record["environment"]["versions"]
    assert ElementTree.parse("out.svg").getroot().tag.endswith("svg")
    preset = Preset.read("fast.json")
    assert preset.options == {"max_steps": 1, "confidence": 0}
    assert preset.evidence["model"] == "nano" and preset.evidence["tasks"]["mine"]["items"] == 2
    assert preset.evidence["choice"]["confirming"][-1]["tasks"]["mine"]["paired"]["both"] == 2
    code, out, err = sfumato("generate", "1", "-m", "nano", "--preset", "fast.json", "--json")
    assert code == 0 and json.loads(out)["usage"]["steps"] == 1, err


def test_a_sweep_goes_on_where_it_stood(sfumato: Command, mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, *_ = sfumato("eval", "nano", mine, *SWEEP, "-o", "out.json")
    assert code == 0
    kept = Path("out.answers.jsonl").read_text()
    first = json.loads(Path("out.json").read_text())
    monkeypatch.setattr("sfumato.evals.evaluation.answers", lambda *rest: pytest.fail("answered again"))
    code, _, err = sfumato("eval", "nano", mine, *SWEEP, "-o", "out.json")
    assert code == 0, err
    assert Path("out.answers.jsonl").read_text() == kept
    assert json.loads(Path("out.json").read_text())["points"] == first["points"]
    code, _, err = sfumato("eval", "nano", mine, *SWEEP[:-2], "-o", "out.json")
    assert code == 2 and "holds answers of other settings (first changed)" in err


def test_what_is_not_confirmed_is_no_preset(sfumato: Command, mine: str) -> None:
    code, out, err = sfumato("eval", "nano", mine, *SWEEP, "--lose", "1", "--preset-to", "fast.json")
    assert code == 1 and "fast.json is not written, as no setting is confirmed" in err
    assert "these items do not suffice to say less than 1, about 498 would" in out
    assert not Path("fast.json").exists()


def test_a_precision_is_an_axis_and_its_model_is_loaded(
    sfumato: Command, nano: LLM, mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load_model(load: LoadOptions) -> LLM:
        loaded.append(load.ops)
        return nano

    monkeypatch.setattr("sfumato.cli.loading.load_model", load_model)

    def run(sweep: Sweep) -> Any:
        for axis in sweep.axes:
            for setting in axis.settings:
                sweep.llm_of(setting)
        assert sweep.cost == "milliseconds"
        raise KeyboardInterrupt

    monkeypatch.setattr(Sweep, "run", run)
    axes = ("--axis", "ops=reference,fused", "--axis", "max_steps=3")
    code, _, err = sfumato("eval", "nano", mine, "--sweep", *axes, "-o", "out.json")
    assert code == 130 and loaded == ["auto", "reference", "fused", "auto"]
    assert "stopped; 0 answers are kept in out.answers.jsonl: run it again" in err


def test_the_usual_axes_are_the_models_own(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = {axis.names[0]: axis.values for axis in axes_of(nano, Options(max_steps=6), SweepFlags(sweep=True))}
    assert axes["max_steps"] == ((3,), (2,), (1,)) and "entropy_bound" in axes
    both = axes_of(nano, Options(), SweepFlags(sweep=True, axis=["ops=fused", "usual"]))
    assert both[-1].label == "ops=fused" and both[:-1] == axes_of(nano, Options(), SweepFlags(sweep=True))
    for name, value, flags, part in (
        ("is_remote", True, SweepFlags(sweep=True, axis=["ops=cpu"]), "--axis ops is of a model loaded here"),
        ("has_drafts", False, SweepFlags(sweep=True), "has no canvas"),
    ):
        with monkeypatch.context() as context, pytest.raises(InputError, match=part):
            context.setattr(nano, name, value)
            axes_of(nano, Options(), flags)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--axis", "max_steps=3"), "--axis is of a sweep; give --sweep too"),
        (("--preset-to", "x.json"), "--preset-to is of a sweep"),
        (("--sweep", "--axis", "max_steps"), "--axis is 'max_steps'; give NAME=VALUE,VALUE"),
        (("--sweep", "--axis", "max_stops=3"), "max_stops is no axis of a sweep"),
        (("--sweep", "--axis", "max_steps=x"), "--max-steps is 'x'; give a whole number"),
        (("--sweep", "--axis", "t_min+t_max=0.1"), "the axis t_min+t_max has a value of 1 parts"),
        (("--sweep", "--lose", "0"), "--lose is 0; give points above 0"),
        (("--sweep", "--budget", "nan"), "--budget is nan; give minutes above 0"),
        (("--sweep", "--by", "tokens"), "--by is 'tokens'; give steps, passes, milliseconds"),
        (("--sweep", "--compare", "max_steps=3"), "--sweep and --compare are given together"),
    ],
)
def test_wrong_flags_are_one_sentence(
    arguments: tuple[str, ...], part: str, mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "nano", mine, *arguments]) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1
