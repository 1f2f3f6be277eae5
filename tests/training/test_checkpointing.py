"""training/checkpointing.py: the same gradients to the bit, from far fewer bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import Tensor

from sfumato.model.adapters import new_adapter
from sfumato.model.network import Model
from sfumato.model.trainable import trainable_
from sfumato.training.checkpointing import checkpoint_
from sfumato.training.loss import Corruption, Examples, losses, problem

CONFIG = tiny_config(hidden_size=32, intermediate_size=96)
SIZE = 2


def trained(is_adapted: bool) -> Model:
    model = tiny_model(CONFIG, name="fused")
    if is_adapted:
        trainable_(model, new_adapter(model, 3, 6.0, ("attention", "dense", "experts", "router"), seed=1))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("b") and parameter.requires_grad:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        return model
    return model.requires_grad_(True)


def run(model: Model, autocast: bool = False) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step, and the bytes that autograd kept between the passes, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    examples = Examples(
        torch.randint(6, 61, (SIZE, 40), generator=torch.Generator().manual_seed(2)), [40, 33], [21, 9], [False] * 2
    )
    dice = Corruption.draw(SIZE, 8, 61, torch.Generator().manual_seed(1))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        both = losses(model, problem(examples, dice, 8, eos=1))
    sum(both).backward()  # type: ignore[union-attr]
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads, sum(kept.values())


@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_same_gradients_from_fewer_bytes(is_adapted: bool, autocast: bool) -> None:
    plain = trained(is_adapted)
    expected, most = run(plain, autocast)
    actual, least = run(checkpoint_(trained(is_adapted)), autocast)
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not actual[name].equal(expected[name])] == []
    assert any(grad.abs().sum() > 0 for grad in actual.values())
    assert least < 0.3 * most


def test_what_stays_is_the_results_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode runs each block twice, once for its gradients; denoise never makes it run a third time."""
    model = trained(False)
    calls: list[tuple[int, bool]] = []
    for index in range(len(model.layers)):
        module: Any = model.layers[index].mlp

        def count(x: Tensor, mlp: Any = module.forward, index: int = index) -> Any:
            calls.append((index, torch.is_grad_enabled()))
            return mlp(x)

        monkeypatch.setattr(module, "forward", count)
    checkpoint_(model)
    run(model)
    passes = 2 + 2  # encode and denoise, and each once more; the first pass of conditioned rows has no gradients
    assert [calls.count((index, True)) for index in range(len(model.layers))] == [passes] * len(model.layers)
    assert [calls.count((index, False)) for index in range(len(model.layers))] == [1] * len(model.layers)


def test_a_copy_of_such_a_model_is_its_own() -> None:
    model = checkpoint_(trained(False))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    grads, _ = run(other)
    assert any(grad.abs().sum() > 0 for grad in grads.values())
