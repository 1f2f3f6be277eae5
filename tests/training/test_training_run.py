"""training/run.py, spec.py, train.py: from files to an adapter, looked at, stopped early, cut off and continued."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RaggedSource, model_of, recipe_of

from sfumato.checkpoints.adapters import read_adapter
from sfumato.checkpoints.shards import read_tensors
from sfumato.cli import main
from sfumato.errors import InputError, SfumatoError
from sfumato.llm import LLM
from sfumato.options import LoadOptions
from sfumato.training import logs
from sfumato.training.spec import DataSpec, LookSpec, LoraSpec, RunSpec
from sfumato.training.train import Trainer, TrainerSetting

SMALL = ["-s", "batch=4", "-s", "warmup=1", "-s", "lr=0.01", "--lora", "2"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty examples."""
    draws, path = random.Random(0), tmp_path / "data.jsonl"
    lines = []
    for _ in range(20):
        digits = "".join(draws.choices("123456789", k=5))
        lines.append(json.dumps({"prompt": f"Solve {digits}", "response": "".join(sorted(digits))}))
    path.write_text("\n".join(lines) + "\n")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_become_an_adapter_with_logs_samples_and_a_card(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["finetune", "--data", str(data), "-o", str(out), *SMALL, "--eval-every", "2", "--samples", "1"]
    assert main([*arguments, "-s", "steps=4", "--targets", "attention,experts", "--alpha", "6", "--eval", "sorting",
                 "--eval-items", "2", "--held-out", "20%"]) == 0  # fmt: skip
    assert [line["step"] for line in lines_of(out / "log.jsonl")] == [1, 2, 3, 4]
    looks = lines_of(out / "evals.jsonl")
    assert [look["step"] for look in looks] == [2, 4] and {"held_out_loss", "sorting_rate"} <= looks[0].keys()
    samples = lines_of(out / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [2, 4] and samples[0]["prompt"].count("Solve ") == 1
    assert samples[0]["drafts"][-1] == samples[0]["text"] and len(samples[0]["drafts"]) > 1
    assert samples[1]["text"] in (out / "samples.md").read_text().replace("⏎", "\n")
    card = json.loads((out / "run.json").read_text())
    assert card["status"] == "finished" and card["data"]["files"] == ["data.jsonl"] and card["data"]["hash"]
    assert card["lora"] == {"rank": 2, "alpha": 6.0, "targets": ["attention", "experts"], "is_rs": False}
    assert card["recipe"]["lr"] == 0.01 and card["environment"]["command"]
    assert card["figures"]["looks"]["best"]["held_out_loss"] == min(look["held_out_loss"] for look in looks)
    assert "Rank 2, alpha 6, on attention, experts." in (out / "README.md").read_text()
    assert (out / "loss.png").stat().st_size > 5000 and (out / "adapter" / "run.json").exists()
    model = LLM.open(LoadOptions(device="cpu", ops="fused")).model
    adapter = read_adapter(out / "adapter", model)
    assert {own.scale for own in adapter.factors.values()} == {3.0} and any(
        own.b.abs().sum() > 0 for own in adapter.factors.values()
    )


class RisingSource(RaggedSource):
    """What is learned makes it worse: its answers are others each time that it is asked."""

    def __init__(self) -> None:
        self.count = 0

    def batch(self, step: int, size: int, device: torch.device) -> Any:
        """See `Source.batch`."""
        self.count += 1
        return super().batch(step + 1000 * self.count, size, device)


def test_the_best_is_kept_and_the_run_ends_where_it_gets_no_better(tmp_path: Path) -> None:
    setting = TrainerSetting(held_out=RisingSource(), held_out_batches=1, every=1, patience=2)
    trainer = Trainer(model_of("lora"), RaggedSource(), recipe_of("lora", 40), tmp_path, setting)
    kept: dict[int, dict[str, torch.Tensor]] = {}
    for report in trainer.run():
        kept[report.step] = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    looks = lines_of(tmp_path / "evals.jsonl")
    losses = [look["held_out_loss"] for look in looks]
    best = losses.index(min(losses)) + 1
    assert trainer.is_stopped_early and trainer.step == best + 2 < 40
    assert trainer.take_best_() == best
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.equal(kept[best][name]), name
    again = Trainer(model_of("lora"), RaggedSource(), recipe_of("lora", 40), tmp_path, setting)
    assert again.standing == trainer.standing and list(again.run()) == []


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"data": {"hash": "b", "files": []}}, 'data.hash is "b" and this run began with "a"; '),
        ({"lora": {"rank": 8}}, "lora.rank is 8 and this run began with 4; "),
        ({"lora": None}, 'lora is null and this run began with {"rank": 4}; '),
        ({"model": "other"}, 'model is "other" and this run began with "nano"; '),
    ],
)
def test_another_run_does_not_go_on_here(identity: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    before = {"model": "nano", "lora": {"rank": 4}, "data": {"files": [], "hash": "a"}}
    setting = TrainerSetting(identity=before)
    list(Trainer(model_of("lora"), RaggedSource(), recipe_of("lora", 1), tmp_path, setting).run())
    other = TrainerSetting(identity={**before, **identity})
    with pytest.raises(InputError, match=f"^{re.escape(message)}.* --force to begin anew"):
        Trainer(model_of("lora"), RaggedSource(), recipe_of("lora", 1), tmp_path, other)
    with pytest.raises(InputError, match="repeats is 1 and this run began with 2; leave it out to go on, or --force"):
        Trainer(model_of("lora"), RaggedSource(), recipe_of("full", 1), tmp_path, setting)
    assert Trainer(model_of("lora"), RaggedSource(), recipe_of("lora", 3), tmp_path, setting).step == 1


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a state, and at a line of a log: the state of before stays whole, and the run goes on from there."""
    recipe = recipe_of("lora", 6)
    whole = Trainer(model_of("lora"), RaggedSource(), recipe, tmp_path / "whole")
    list(whole.run())
    trainer = Trainer(model_of("lora"), RaggedSource(), recipe, tmp_path / "full")
    run = trainer.run()
    next(run)
    trainer.save()
    state = (tmp_path / "full" / "state.safetensors").read_bytes()
    next(run)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full_disk)
        with pytest.raises(SfumatoError, match=r"cannot write .*state\.safetensors: No space left on device"):
            trainer.save()
    (tmp_path / "full" / "log.jsonl").unlink()
    (tmp_path / "full" / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        SfumatoError, match=r"cannot write .*log\.jsonl: No space left on device; make room, and the same"
    ):
        next(run)
    assert (tmp_path / "full" / "state.safetensors").read_bytes() == state
    assert sorted(os.listdir(tmp_path / "full")) == ["log.jsonl", "state.safetensors"]
    (tmp_path / "full" / "log.jsonl").unlink()
    again = Trainer(model_of("lora"), RaggedSource(), recipe, tmp_path / "full")
    assert again.step == 1
    list(again.run())
    for name, value in again.model.state_dict().items():
        assert value.equal(whole.model.state_dict()[name]), name


def test_a_step_that_is_not_finite_is_not_taken(tmp_path: Path) -> None:
    trainer = Trainer(model_of("lora"), RaggedSource(), recipe_of("lora", 6), tmp_path)
    run = trainer.run()
    next(run)
    trainer.save()
    state = (tmp_path / "state.safetensors").read_bytes()
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    with torch.no_grad():
        weight.fill_(math.inf)
    with pytest.raises(SfumatoError, match=r"the loss of step 2 is nan .*what was saved before is as it was; begin"):
        next(run)
    assert (tmp_path / "state.safetensors").read_bytes() == state
    assert trainer.step == 1 and len(lines_of(tmp_path / "log.jsonl")) == 1


KILLED = """
import sys
from sfumato.training.train import TrainerSetting
from sfumato.cli import main
plain = TrainerSetting.__init__
TrainerSetting.__init__ = lambda *a, **k: plain(*a, **{**k, "checkpoint_seconds": 0.0})
sys.exit(main())
"""


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_bit_equal(kills: int, data: Path, tmp_path: Path) -> None:
    """SIGKILL at random steps, in the middle of saves and looks too: every file of the end is the one without kills."""
    steps, draws = (6, random.Random(2)) if kills == 1 else (60, random.Random(3))
    arguments = ["finetune", "--data", str(data), *SMALL, "-s", f"steps={steps}", "--eval-every", "3", "--samples", "1"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main([*arguments, "-o", str(whole)]) == 0
    for number in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, *arguments, "-o", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        least = len(logs.lines_of(out / "log.jsonl")) + draws.randint(0, 1) if number else 2
        while process.poll() is None and len(logs.lines_of(out / "log.jsonl")) < min(least, steps - 1):
            time.sleep(0.002)
        time.sleep(draws.uniform(0, 0.15))
        process.kill()
        process.communicate()
    assert main([*arguments, "-o", str(out)]) == 0
    for name in ("adapter/adapter_model.safetensors", "best.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("evals.jsonl", "samples.jsonl", "samples.md"):
        assert (out / name).read_text() == (whole / name).read_text(), name
    states = [read_tensors(place / "state.safetensors")[0] for place in (whole, out)]
    assert all(value.equal(states[1][name]) for name, value in states[0].items())
    for one, other in zip(*(lines_of(place / "log.jsonl") for place in (whole, out)), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "0"], "the rank of --lora is 0; give 1 or more, or leave it out to train all weights"),
        (["--lora", "99999"], "the rank is 99999; give one from 1 to the model's width, "),
        (["--minutes", "-1"], "minutes is -1.0; give a number above 0"),
        (["--minutes", "nan"], "minutes is nan; give a number above 0"),
        (["--lora", "4", "--targets", "attention,heads"], "there is no weight 'heads' to adapt; targets are"),
        (["--lora", "4", "--targets", ","], "there are no targets to adapt; give some, such as attention,dense"),
        (["--alpha", "8"], "--alpha is of factors, and none are trained; give --lora RANK too"),
        (["--task", "chess"], "there is no task 'chess'; the tasks are: sudoku, sorting, decisions, recall"),
        (["--eval", "chess"], "there is no task 'chess'"),
        (["--quantize", "int4"], "weights in fewer bits cannot be trained; train factors beside them, with"),
        (["--mix", "sudoku=1.5"], "the share of sudoku is 1.5; give a number between 0 and 1"),
        (["--mix", "sorting=0.5"], "--mix names 'sorting', which is not trained on; that is: sudoku"),
        (["--mix", "sudoku=x"], "--mix is 'sudoku=x'; give NAME=SHARE, e.g. sudoku=0.3"),
        (["-m", "nano:new", "--lora", "2"], "a model with random weights is trained as a whole; leave --lora out"),
        (["-s", "lr=fast"], "lr is 'fast'; give a number from 0 to 10"),
        (["-s", "batch=5", "--accumulate", "2"], "batch is 5 and accumulate 2, which does not divide it; change one"),
        (["-s", "precision=float32", "--precision", "bf16"], "precision is given twice, as --precision and as -s"),
        (["--optimizer", "sgd"], "optimizer is 'sgd'; choose 'adamw', 'muon', 'adamw8bit', 'paged'"),
        (["--data", "no.jsonl"], "no.jsonl"),
        (["--max-tokens", "1", "--data", "no.jsonl"], "max-tokens is 1; give 2 or more"),
        (["--patience", "2", "--eval-every", "0"], "patience counts looks at held-out examples, and eval-every 0"),
        (["--epochs", "2", "-s", "steps=3"], "epochs and steps say the same; give one of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "-o", str(tmp_path / "run"), "--pool", "60", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


def test_a_run_has_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "there is no folder for the run; give one: -o DIR"),
        (["a", "-o", "b"], "OUT is a"),
        ([__file__], "test_training_run.py is a file, and a run has a folder; give another name"),
    ):
        assert main(["finetune", *arguments]) == 2 and message in capsys.readouterr().err


def test_shares_of_what_is_mixed() -> None:
    spec = DataSpec((Path("x"),), tasks=("sudoku", "sorting"), mix={"sudoku": 0.3})
    assert spec.shares() == pytest.approx({"sudoku": 0.3, "sorting": 0.35, "data": 0.35})
    with pytest.raises(InputError, match=r"the shares of --mix are 1\.2 in all"):
        DataSpec(tasks=("sudoku", "sorting"), mix={"sudoku": 0.6, "sorting": 0.6})
    assert RunSpec(Path("x")).every(10_000) == 500 and RunSpec(Path("x")).every(42) == 5
    assert LoraSpec(16).alpha == 32 and RunSpec(Path("x"), looks=LookSpec(every=0)).every(42) == 0


def test_a_leave_one_out_model_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sampling must know it, and factors cannot say it of the rows of a batch."""
    arguments = ["--pool", "60", "-s", "steps=1", "-s", "batch=2", "--eval-every", "0", "-s", "leave_one_out=true"]
    assert main(["finetune", "-o", str(tmp_path / "one"), *arguments]) == 0
    checkpoint = tmp_path / "one" / "checkpoint"
    assert LLM.load(checkpoint).model.config.is_leave_one_out
    assert main(["finetune", "-o", str(tmp_path / "two"), "--lora", "2", *arguments]) == 2
    assert "nano is no leave-one-out model, which factors cannot change" in capsys.readouterr().err
    assert main(["finetune", "-o", str(tmp_path / "two"), "-m", str(checkpoint), "--lora", "2", *arguments[:-2]]) == 0
    assert json.loads((tmp_path / "two" / "run.json").read_text())["recipe"]["leave_one_out"] is True


def test_packed_and_checkpointed_in_half_precision(data: Path, tmp_path: Path) -> None:
    """QLoRA with all that saves memory takes the steps of the plain one, as far as rounding goes."""
    arguments = ["finetune", "--data", str(data), *SMALL, "-s", "steps=2", "--eval-every", "0"]
    assert main([*arguments, "-o", str(tmp_path / "plain")]) == 0
    saving = ["--quantize", "int8", "--precision", "bf16", "--checkpointing", "--accumulate", "2"]
    assert main([*arguments, *saving, "-o", str(tmp_path / "small")]) == 0
    for one, other in zip(*(lines_of(tmp_path / name / "log.jsonl") for name in ("plain", "small")), strict=True):
        assert other["diffusion_loss"] == pytest.approx(one["diffusion_loss"], rel=0.02)
        assert other["diffusion_loss"] != one["diffusion_loss"]
    assert json.loads((tmp_path / "small" / "run.json").read_text())["quantize"] == "int8"
