"""cli/training_plan.py: the plan of `finetune --plan`, as a table and as JSON, for a model that is not there too."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

Run = Callable[..., tuple[int, str, str]]
FACTORS = ["--lora", "16", "--targets", "attention,dense,experts", "--quantize", "int4", "--precision", "bfloat16"]


def planned(sfumato: Run, *more: str) -> str:
    code, out, error = sfumato("finetune", "--plan", *more)
    assert code == 0, error
    return out


def test_the_released_model_is_planned_without_a_download(sfumato: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    shown = planned(sfumato, "-m", "released")
    lines = {line.split("  ")[0].strip(): line.split() for line in shown.splitlines()}
    assert "int4, LoRA 16 with experts" in lines and lines["int4, LoRA 16"][-1] == "24"
    assert lines["every weight"][-1] == "8x80"
    assert "Computed, not measured" in " ".join(shown.split()) and "guess" in shown


def test_flags_give_one_setup_and_its_parts(sfumato: Run) -> None:
    flags = [*FACTORS, "--optimizer", "adamw8bit", "--checkpointing", "-s", "batch=1", "--gpu", "24", "--json"]
    report = json.loads(planned(sfumato, "-m", "released", *flags))
    row, without = report["setups"]
    assert report["tokens"] == 1024 and row["setup"]["targets"] == ["attention", "dense", "experts"]
    assert row["fits"] == {"24": [1, 2, 8]} and without["fits"] == {"24": []}
    assert row["total"]["1"] == pytest.approx(sum(row["bytes"].values())) and row["total"]["1"] < 23.4e9
    parts = json.loads(
        planned(sfumato, "-m", "nano", "--lora", "4", "--accumulate", "4", "--max-tokens", "64", "--json")
    )
    assert parts["examples"] == 4 and parts["tokens"] == 64
    assert parts["setups"][0]["setup"]["is_accumulated"] and parts["setups"][0]["setup"]["precision"] == "float32"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora", "0"], "the rank of --lora is 0"),
        (["--lora", "4", "--targets", "nose"], "there is no weight 'nose' to adapt"),
        (["--quantize", "int4"], "weights in int4 cannot be trained"),
        (["--lora", "4", "--quantize", "int3"], "int3"),
        (["--gpu", "0"], "--gpu"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(sfumato: Run, flags: list[str], says: str) -> None:
    code, _, error = sfumato("finetune", "--plan", "-m", "nano", *flags)
    assert code and "Traceback" not in error and says in error
