"""training/loss.py, ops/frozen.py: a step over packed weights, in bfloat16, checkpointed, and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import Tensor

from sfumato.model.adapters import new_adapter
from sfumato.model.network import Model, products, replace_
from sfumato.model.trainable import trainable_
from sfumato.ops.packed import Packed
from sfumato.quant.apply import quantize_
from sfumato.training.checkpointing import checkpoint_
from sfumato.training.loss import Corruption, Examples, LossSums, loss_sums, problem
from sfumato.training.objective import Objective

CONFIG = tiny_config(hidden_size=32, intermediate_size=64, expert_size=32)
TARGETS = ("attention", "dense", "experts", "router", "self_conditioning")
BATCH = problem(
    Examples(
        torch.randint(6, 61, (2, 30), generator=torch.Generator().manual_seed(1)), [30, 25], [7, 4], [False, True]
    ),
    Corruption.draw(2, 8, 61, torch.Generator().manual_seed(2), steps=1),
    8,
    eos=1,
)


def unpack_(model: Model) -> None:
    """Put the plain weight that the codes stand for in the place of each."""
    for owner, name in list(products(model)):
        weight = getattr(owner, name)
        if isinstance(weight, Packed):
            replace_(owner, name, weight.dense())


def with_factors(model: Model) -> Model:
    trainable_(model, new_adapter(model, 3, 6.0, TARGETS, seed=1))
    for name, parameter in model.named_parameters():
        if name.endswith("b") and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


LEAVE_ONE_OUT = Objective(leave_one_out=True)


def gradients(
    model: Model,
    run: Callable[..., LossSums] = loss_sums,
    autocast: bool = False,
    objective: Objective = LEAVE_ONE_OUT,
) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        both = run(model, BATCH, objective).means()
    torch.autograd.backward(both)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_factors_over_packed_weights_learn_what_they_learn_over_the_unpacked_ones() -> None:
    packed = tiny_model(CONFIG, name="fused")
    quantize_(packed, "int4-small")
    plain = tiny_model(CONFIG, name="fused")
    quantize_(plain, "int4-small")
    unpack_(plain)
    ours, expected = gradients(checkpoint_(with_factors(packed))), gradients(with_factors(plain))
    assert ours.keys() == expected.keys()
    assert len(ours) == 2 * len(new_adapter(plain, 1, 1.0, TARGETS).factors)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", ["autocast", "weights", "weights in 4 bits"])
def test_in_bfloat16_factors_stay_float32_and_gradients_point_the_same_way(way: str) -> None:
    low, plain = (tiny_model(CONFIG, name="fused") for _ in range(2))
    if way == "weights in 4 bits":
        quantize_(low, "int4-small")
        quantize_(plain, "int4-small")
        unpack_(plain)
    expected = gradients(with_factors(plain))
    ours = gradients(with_factors(low if way == "autocast" else low.bfloat16()), autocast=way == "autocast")
    assert ours.keys() == expected.keys()
    assert all(grad.dtype == torch.float32 for grad in ours.values())
    both = [torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (ours, expected)]
    assert torch.nn.functional.cosine_similarity(both[0], both[1], dim=0) > 0.95


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("objective", [LEAVE_ONE_OUT, Objective(revision_penalty=1.0, self_distillation=0.5)])
def test_a_compiled_step_has_the_same_gradients(objective: Objective) -> None:
    """Minutes, nearly all of them the compiler's."""
    model = with_factors(tiny_model(CONFIG, name="fused"))
    expected = {name: grad.clone() for name, grad in gradients(model, objective=objective).items()}
    model.zero_grad()
    actual = gradients(model, torch.compile(loss_sums, dynamic=False), objective=objective)
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)
