"""cli/output.py: a model whose numbers are not finite ends every command with code 1 and one sentence, never a text."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato import LLM, Slot, cli
from sfumato.checkpoints.locate import NANO
from sfumato.errors import NumericError

ROUTER, NORM, SCALE = "layers.0.router.proj.weight", "decoder.norm.weight", "layers.1.experts.down_proj"


def broken(folder: Path, ending: str, value: float) -> str:
    """nano with this value in all of one tensor."""
    shutil.copytree(NANO, folder)
    tensors = load_file(NANO / "model.safetensors")
    [name] = [name for name in tensors if name.endswith(ending)]
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(("ending", "value"), [(ROUTER, math.nan), (NORM, math.inf), (SCALE, 1e38)])
def test_code_1_and_a_sentence(
    ending: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM.load(broken(tmp_path / "model", ending, value), progress=False)
    monkeypatch.setattr("sfumato.cli.loading.load_model", lambda load: llm)
    for command in (
        ["generate", "Solve", "--max-tokens", "4", "--max-steps", "2"],
        ["generate", "Solve", "--mode", "autoregressive", "--max-tokens", "2"],
        ["decide", "Solve", "--field", "sure=yes|no"],
    ):
        assert cli.main(command) == 1, command
        output = capsys.readouterr()
        assert output.out.strip() == "" and "not finite" in output.err and "Traceback" not in output.err, command
    with pytest.raises(NumericError):
        llm.score("Solve")
    with pytest.raises(NumericError):
        llm.edit("Solve this", "Be brief")
    with pytest.raises(NumericError):
        llm.fill(["a", Slot(length=2), Slot(regex="[0-9]+"), "b"])
