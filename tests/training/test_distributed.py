"""training/distributed.py and state.py: several processes take the same steps as one, and go on from one another."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RaggedSource, RunPart, carry_out, model_of, recipe_of, runs_of

from sfumato.errors import CheckpointError, InputError
from sfumato.training.distributed import Ranks
from sfumato.training.state import latest, note_of
from sfumato.training.train import Trainer, TrainerSetting

SCRIPT = Path(__file__).parents[1] / "ranks.py"


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def start_two(folder: Path, steps: int) -> None:
    """The script as two ranks, until both have ended."""
    port = str(free_port())
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    common |= {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1])]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(steps)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def lines_of(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module", params=[8, pytest.param(50, marks=pytest.mark.slow)])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Runs of two ranks; a single process has been before one of them, and goes on with another."""
    torch.set_num_threads(1)
    folder, steps = tmp_path_factory.mktemp("ranks"), int(request.param)
    carry_out(RunPart("lora", "lora-one-then-two", steps, is_half=True), folder)
    start_two(folder, steps)
    carry_out(RunPart("full", "full-two-then-one", steps), folder)
    return folder, steps


RESUMED = {"lora": "lora-one-then-two", "full": "full-two-then-one"}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_ranks_take_the_steps_of_one(kind: str, both: tuple[Path, int], tmp_path: Path) -> None:
    """Weights sharded over both, the tied embedding too, of which encode, denoise and the head all have a part."""
    folder, steps = both
    alone = carry_out(RunPart(kind, kind, steps), tmp_path)
    assert [report.step for report in alone] == list(range(1, steps + 1))
    for name in (kind, RESUMED[kind]):
        for report, line in zip(alone, lines_of(folder / name), strict=True):
            for loss in ("diffusion_loss", "encode_loss"):
                assert line[loss] == pytest.approx(getattr(report, loss), rel=0, abs=1e-5), (name, report.step)
    looks = [lines_of(place / kind, "evals.jsonl") for place in (tmp_path, folder)]
    assert len(looks[0]) == steps // 20 + 1 and all(line.keys() == looks[0][0].keys() for line in looks[1])
    for one, other in zip(*looks, strict=True):
        assert other["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=0, abs=2e-5)


def test_packed_weights_are_whole_in_every_rank(both: tuple[Path, int], tmp_path: Path) -> None:
    alone = carry_out(RunPart("packed", "packed", 4), tmp_path)
    for report, line in zip(alone, lines_of(both[0] / "packed"), strict=True):
        assert line["encode_loss"] == pytest.approx(report.encode_loss, rel=0, abs=1e-5)


def test_later_passes_are_taken_by_every_rank(both: tuple[Path, int], tmp_path: Path) -> None:
    alone = carry_out(RunPart("later", "later", 3), tmp_path)
    for report, line in zip(alone, lines_of(both[0] / "later"), strict=True):
        for loss in ("diffusion_loss", "encode_loss", "revision_loss", "distillation_loss"):
            assert line[loss] == pytest.approx(getattr(report, loss), rel=0, abs=1e-5), (loss, report.step)
        assert line["grad_norm"] == pytest.approx(report.grad_norm, rel=1e-4)


def test_a_state_is_a_share_of_each_and_no_pickle(both: tuple[Path, int]) -> None:
    folder, steps = both
    for part in runs_of(steps):
        path = latest(folder / part.name)
        assert path is not None and note_of(path)["step"] == str(part.steps)
        assert [file.name for file in (folder / part.name).iterdir() if "state" in file.name] == [path.name]
        assert path.is_dir() != (part.name == "full-two-then-one")
        if path.is_dir():
            assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
            sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
            assert len(sizes) == 2 and max(sizes) < 2 * min(sizes)
    with pytest.raises(CheckpointError, match="another model"):
        Trainer(model_of("full"), RaggedSource(), recipe_of("lora", steps), folder / "lora")


def test_what_several_ranks_cannot_do_is_one_sentence(tmp_path: Path) -> None:
    two = TrainerSetting(ranks=Ranks(0, 4))
    with pytest.raises(
        InputError, match="batch is 6, which 4 processes of 1 parts each do not divide; give a multiple"
    ):
        Trainer(model_of("lora"), RaggedSource(), recipe_of("lora", 9), tmp_path, two)


@pytest.mark.parametrize("text", ["[1]", '{"step": "x"}', "{", '{"step": 1}'])
def test_a_folder_that_is_no_state_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "state-3").mkdir()
    (tmp_path / "state-3" / "note.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not the state of a run; choose another folder or remove it"):
        Trainer(model_of("lora"), RaggedSource(), recipe_of("lora", 9), tmp_path)
