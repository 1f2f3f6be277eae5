"""checkpoints/calibration.py: the file of temperatures: hostile ones are refused, and it goes wherever weights go."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapter_files import random_adapter

from sfumato import LLM, Options
from sfumato.checkpoints.adapters import write_adapter
from sfumato.checkpoints.calibration import FILE, Calibration, beside, calibration_beside, read_calibration
from sfumato.checkpoints.contents import calibration_of
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.locate import NANO
from sfumato.checkpoints.save import save
from sfumato.cli import main
from sfumato.errors import CheckpointError, SfumatoError
from sfumato.events import Decisions
from sfumato.questions import Choice, Noul, Question
from sfumato.templates.decisions import tempered
from sfumato.templates.requests import Decide

MILD = Calibration({"noul": 1.5, "choice": 3.0}, {"noul": 70, "choice": 50}, {"noul": {"ece": 0.1}}, model="nano")
QUESTIONS: dict[str, Question] = {"any": Noul("Is there any?"), "which": Choice(["1", "2", "3"])}
SEED: dict[str, Any] = {"seed": 3}


def calibrated_nano(folder: Path, calibration: Calibration = MILD) -> Path:
    shutil.copytree(NANO, folder)
    calibration.write(folder / FILE)
    return folder


def values(decisions: Decisions) -> list[float]:
    return [p for one in decisions.values() for p in one.probabilities.values()]


def test_a_file_says_what_was_written(tmp_path: Path) -> None:
    MILD.write(tmp_path / FILE)
    assert read_calibration(tmp_path / FILE) == MILD == calibration_beside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert Calibration.of({"temperature": {"score": 1}, "note": "of a later version"}, "x").temperatures == {"score": 1}
    with pytest.raises(SfumatoError, match=r"cannot write .*nowhere"):
        MILD.write(tmp_path / "nowhere" / FILE)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({}, "temperature is None; give a record by kind"),
        ({"temperature": [1]}, "temperature is .* give a record"),
        ({"temperature": {"nouls": 1.0}}, "temperature has 'nouls'; the kinds are noul, choice, score, span"),
        *(
            ({"temperature": {"noul": value}}, "the temperature of noul is .*; give one from 0.05 to 20")
            for value in (0, -1, 0.04, 21, 10**400, float("nan"), float("inf"), True, "1", None, [1.0])
        ),
        ({"temperature": {}, "labels": {"noul": -1}}, "noul is -1; give a whole number"),
        ({"temperature": {}, "steps": 1.5}, "steps is 1.5; give a whole number"),
        ({"temperature": {}, "samples": True}, "samples is True"),
        ({"temperature": {}, "model": 5}, "model must be a text"),
        ({"temperature": {}, "model": "a" * 501}, "model must be a text of 500 characters at most"),
        ({"temperature": {}, "before": {"noul": {"ece": float("nan")}}}, "before of noul is .*; give numbers by name"),
        ({"temperature": {}, "after": {"noul": 0.1}}, "after of noul is 0.1; give numbers by name"),
        ({"temperature": {}, "after": {"noul": {str(n): 1 for n in range(21)}}}, "after of noul is"),
    ],
)
def test_a_hostile_file_is_named(raw: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=sentence) as error:
        read_calibration(path)
    assert str(path) in str(error.value)


def test_a_checkpoint_with_a_broken_file_does_not_load(tmp_path: Path) -> None:
    folder = calibrated_nano(tmp_path / "nano")
    (folder / FILE).write_text('{"temperature": {"noul": 0}}')
    with pytest.raises(CheckpointError, match="the temperature of noul is 0"):
        LLM.load(folder)
    (folder / FILE).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=FILE):
        LLM.load(folder)
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    with pytest.raises(CheckpointError, match="it is not a file"):
        LLM.load(folder)


def test_decisions_are_divided_by_it(tmp_path: Path) -> None:
    """Each answer's probabilities are those read, tempered; the choice is the same."""
    llm = LLM.load(calibrated_nano(tmp_path / "nano"))
    assert llm.planner.calibration == MILD
    plain = llm.decide("123", QUESTIONS, calibrated=False, options=SEED)
    sure = llm.decide("123", QUESTIONS, options=SEED)
    for id, question in QUESTIONS.items():
        expected = tempered([*plain[id].probabilities.values()], MILD.temperatures[question.kind])
        assert [*sure[id].probabilities.values()] == pytest.approx(expected, abs=1e-6)
        assert sum(sure[id].probabilities.values()) == pytest.approx(1)
        assert sure[id].choice == plain[id].choice
        assert max(sure[id].probabilities.values()) < max(plain[id].probabilities.values())
    batched = asyncio.run(llm.arun(Decide("123", QUESTIONS, options=Options(**SEED))))  # as the server's worker does
    assert values(batched) == pytest.approx(values(sure), abs=1e-5)
    llm.planner.calibration = Calibration()
    assert values(llm.decide("123", QUESTIONS, options=SEED)) == pytest.approx(values(plain), abs=1e-6)


def test_a_file_elsewhere_is_loaded_by_name(tmp_path: Path) -> None:
    MILD.write(tmp_path / "mine.json")
    assert LLM.load("nano", calibration=tmp_path / "mine.json").planner.calibration == MILD
    with pytest.raises(CheckpointError, match=r"cannot read .*none.json"):
        LLM.load("nano", calibration=tmp_path / "none.json")


def test_an_adapter_has_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's temperatures are not those of an adapter, whose folder may have a file."""
    llm = LLM.load(calibrated_nano(tmp_path / "nano"))
    folder = tmp_path / "adapter"
    write_adapter(random_adapter(llm.model, size=0.02), folder, llm.model, base="nano")
    llm.adapters.load("without", folder)
    Calibration({"choice": 0.5}).write(folder / FILE)
    llm.adapters.load("with", folder)
    plain = llm.decide("123", QUESTIONS, calibrated=False, adapter="without", options=SEED)
    again = llm.decide("123", QUESTIONS, adapter="without", options=SEED)
    assert values(again) == pytest.approx(values(plain), abs=1e-6)
    sure = llm.decide("123", QUESTIONS, adapter="with", options=SEED)
    assert sure["any"].probabilities == pytest.approx(plain["any"].probabilities, abs=1e-6)
    expected = tempered([*plain["which"].probabilities.values()], 0.5)
    assert [*sure["which"].probabilities.values()] == pytest.approx(expected, abs=1e-6)
    assert main(["info", str(folder)]) == 0 and "temperatures choice 0.50" in capsys.readouterr().out
    write_adapter(random_adapter(llm.model, size=0.02), folder, llm.model, base="nano")
    assert not (folder / FILE).exists()  # other factors


def test_it_goes_into_every_format_and_out_again(tmp_path: Path) -> None:
    folder = calibrated_nano(tmp_path / "nano")
    convert(folder, "int8", tmp_path / "int8")
    assert calibration_beside(tmp_path / "int8") == MILD
    convert(folder, "gguf-q8_0", tmp_path / "a.gguf")
    assert beside(tmp_path / "a.gguf") == tmp_path / f"a.{FILE}"
    assert calibration_of(open_checkpoint(tmp_path / "a.gguf")) == MILD
    convert(tmp_path / "a.gguf", "bf16", tmp_path / "back")
    assert calibration_beside(tmp_path / "back") == MILD


def test_other_weights_have_none(tmp_path: Path) -> None:
    """What is written over a calibrated checkpoint, and what an adapter is merged into, is another model."""
    folder = calibrated_nano(tmp_path / "nano")
    llm = LLM.load(folder, ops="fused", dtype="float32")
    adapter = tmp_path / "adapter"
    write_adapter(random_adapter(llm.model, size=0.02), adapter, llm.model, base="nano")
    convert(folder, "bf16", tmp_path / "merged", adapter=adapter)
    assert calibration_beside(tmp_path / "merged") == Calibration()
    Calibration({"noul": 2.0}).write(adapter / FILE)
    convert(folder, "bf16", tmp_path / "merged", adapter=adapter, force=True)
    assert calibration_beside(tmp_path / "merged") == Calibration({"noul": 2.0})
    save(llm.model, folder, tokenizer_from=NANO)
    assert calibration_beside(folder) == Calibration()
    convert(NANO, "gguf-q8_0", tmp_path / "a.gguf")
    MILD.write(beside(tmp_path / "a.gguf"))
    convert(NANO, "gguf-q8_0", tmp_path / "a.gguf", force=True)
    assert not beside(tmp_path / "a.gguf").exists()
