"""cli/calibrate.py and calibrate_screen.py: labelled lines in, figures and a file out, which decisions then use."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sfumato import LLM
from sfumato.checkpoints.calibration import FILE, read_calibration
from sfumato.checkpoints.locate import NANO
from sfumato.cli import calibrate, main
from sfumato.evals.calibration import FEW
from sfumato.templates.decisions import tempered

Command = Callable[..., tuple[int, str, str]]
QUESTIONS: dict[str, dict[str, Any]] = {
    "odd": {"type": "noul", "instructions": "Is it odd?"},
    "level": {"type": "score", "criteria": ["low", "high"]},
}


@pytest.fixture
def labels(put: Callable[..., str]) -> str:
    """Enough labels of one kind, a few of another, and two lines that are wrong."""
    generator = random.Random(0)
    lines = []
    for n in range(FEW + 2):
        answers: dict[str, Any] = {"odd": generator.random() < 0.7} | ({"level": "high"} if n < 3 else {})
        lines.append(json.dumps({"state": f"{n} {n}", "questions": QUESTIONS, "answers": answers}))
    lines[7:7] = ["{", json.dumps({"state": "x", "questions": QUESTIONS, "answers": {"odd": 5}})]
    return put("\n".join(lines), "labels.jsonl")


def test_labels_become_a_file(sfumato: Command, labels: str, nano: LLM) -> None:
    code, out, err = sfumato("calibrate", "nano", "--data", labels, "-o", "mine.json", "--plot", "plot.svg")
    assert code == 0, err
    assert "labels.jsonl, line 8: it is not JSON" in err and "line 9: the answer of 'odd' is 5" in err
    assert "2 lines were left out" in err
    assert "score has 3 labels, fewer than 50" in out and "mine.json: load it with --calibration" in out
    assert "noul" in out and "by chance" in out and "ECE" in out
    calibration = read_calibration(Path("mine.json"))
    assert calibration.temperatures.keys() == {"noul"} and calibration.labels == {"noul": FEW + 2, "score": 3}
    assert (calibration.model, calibration.steps, calibration.samples) == ("nano", 1, 1)
    assert calibration.after["noul"]["log_loss"] < calibration.before["noul"]["log_loss"]
    assert ElementTree.parse("plot.svg").getroot().tag.endswith("svg")
    assert not list(Path().glob(".mine*"))  # the reads are not needed any more
    code, out, err = sfumato("calibrate", "nano", "--data", labels, "-o", "mine.json", "--json")
    assert code == 2 and "mine.json is there already" in err
    code, out, err = sfumato("calibrate", "nano", "--data", labels, "-o", "mine.json", "--force", "--json")
    record = json.loads(out)
    assert code == 0 and record["temperature"]["noul"] == pytest.approx(calibration.temperatures["noul"])
    assert sum(count for _, _, count in record["bins"]["noul"]["before"]) == FEW + 2
    assert len(record["left_out"]) == 2 and record["skipped"] == 0


def test_decisions_use_the_file_beside_the_model(put: Callable[..., str], labels: str, tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "model")
    assert main(["calibrate", str(tmp_path / "model"), "--data", labels]) == 0
    assert read_calibration(tmp_path / "model" / FILE).model == "model"
    llm = LLM.load(tmp_path / "model")
    temperature = read_calibration(tmp_path / "model" / FILE).temperatures["noul"]
    assert llm.planner.calibration.temperatures == {"noul": temperature}
    plain, sure = (llm.decide("11", {"odd": QUESTIONS["odd"]}, calibrated=one, seed=1) for one in (False, True))
    expected = tempered([*plain["odd"].probabilities.values()], temperature)
    assert [*sure["odd"].probabilities.values()] == pytest.approx(expected, abs=1e-6)


def test_info_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(NANO, tmp_path / "model")
    content = {"temperature": {"noul": 1.5, "span": 2}, "labels": {"noul": 1234}}
    figures = {name: {"noul": {"ece": ece}} for name, ece in (("before", 0.1), ("after", 0.01))}
    (tmp_path / "model" / FILE).write_text(json.dumps(content | figures))
    assert main(["info", "model"]) == 0
    expected = "temperatures noul 1.50 (ECE 0.100 → 0.010), span 2.00, of 1,234 labels"
    assert expected in " ".join(capsys.readouterr().out.split())
    assert main(["info", "model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"]["calibration"]["temperature"] == content["temperature"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nano"], "nano is not in a folder of yours that can be written; give -o FILE, and load the model"),
        (["--api", "http://127.0.0.1:9"], "the model is at http://127.0.0.1:9, where no file can be written; give -o"),
        (["nano", "-o", "nowhere/a.json"], "there is no folder nowhere"),
        (["nano", "-o", "a.json", "--adapter", "a=b", "--adapter", "c=d"], "several adapters are given"),
        (["nano", "-o", "a.json", "--held-out", "none.jsonl"], "cannot read none.jsonl: No such file"),
        (["nano", "-o", "a.json", "--held-out", "empty"], "empty has no labelled question"),
        (["nano", "-o", "./labels.jsonl", "--force"], "labels.jsonl is read by this command"),
        (
            ["nano", "-o", "a.json", "--held-out", "empty", "--plot", "empty", "--force"],
            "empty is read by this command",
        ),
        (["nano", "-o", "a.json", "--steps", "0"], "--steps"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_what_is_wrong_is_said_before_the_work(
    arguments: list[str], sentence: str, labels: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").touch()
    assert main(["calibrate", *arguments, "--data", labels]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_too_few_labels_write_nothing(sfumato: Command, put: Callable[..., str]) -> None:
    line = json.dumps({"state": "1", "questions": QUESTIONS, "answers": {"odd": True, "level": 1}})
    labels = put(f"{line}\n", "few.jsonl")
    code, out, err = sfumato("calibrate", "nano", "--data", labels, "-o", "a.json")
    assert code == 2 and "few.jsonl has at most 1 label of one kind, and a temperature needs 50" in err
    assert "noul" in out and not Path("a.json").exists()
    assert Path(".a.json.reads").exists()  # so that only what is added is read


def test_a_model_is_yours_where_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert not calibrate.is_named(NANO, "nano")
    assert not calibrate.is_named(tmp_path / "cache" / "snapshot", "owner/name")
    assert calibrate.is_named(tmp_path / "nano", "./nano") and calibrate.is_named(tmp_path / "nano", str(tmp_path))
    assert calibrate.is_named(tmp_path / "nano" / "a-Q4.gguf", "nano:Q4")
