"""training/optimizers.py: what each optimiser takes, and libraries that are not there."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RaggedSource, model_of
from tiny import tiny_config

from sfumato import ops
from sfumato.errors import InputError
from sfumato.model.network import Model
from sfumato.training.optimizers import optimizers_of
from sfumato.training.recipe import TrainingRecipe
from sfumato.training.train import Trainer


def test_each_parameter_is_taken_once_and_norms_do_not_decay() -> None:
    parameters = dict(model_of("full").named_parameters())
    for name, count in (("adamw", 1), ("muon", 2)):
        optimizers = optimizers_of(parameters, TrainingRecipe(optimizer=name, weight_decay=0.1))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        members = [parameter for group in groups for parameter in group["params"]]
        assert len(optimizers) == count and len(members) == len({id(p) for p in members}) == len(parameters)
        for group in groups:
            assert all((p.ndim >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])


def test_a_library_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return plain(name, *rest)

    plain = importlib.import_module
    monkeypatch.setattr("sfumato.training.optimizers.import_module", missing)
    with pytest.raises(InputError, match=r"optimizer 'paged' is bitsandbytes', which is not installed; pip install"):
        optimizers_of(dict(model_of("lora").named_parameters()), TrainingRecipe(optimizer="paged"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["adamw8bit", "paged"])
def test_states_in_eight_bits_go_on_exactly(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `train` is not installed")
    recipe = TrainingRecipe(steps=4, batch=2, lr=1e-2, warmup=1, optimizer=name)

    def large() -> Model:
        """Its embedding has more than the 4,096 numbers that eight bits begin at."""
        return Model(tiny_config(hidden_size=128), ops.load("fused")).init_(1)

    whole = Trainer(large(), RaggedSource(), recipe, tmp_path / "whole")
    list(whole.run())
    for report in Trainer(large(), RaggedSource(), recipe, tmp_path / "parts").run():
        if report.step == 2:
            break
    again = Trainer(large(), RaggedSource(), recipe, tmp_path / "parts")
    assert again.step == 2
    list(again.run())
    for key, value in again.model.state_dict().items():
        assert value.equal(whole.model.state_dict()[key]), key
    kinds = {v.dtype for s in again.optimizers[0].state.values() for v in s.values() if isinstance(v, torch.Tensor)}
    assert (torch.uint8 in kinds) == (name == "adamw8bit")
