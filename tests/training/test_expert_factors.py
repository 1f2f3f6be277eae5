"""model/adapters.py, ops/fused.py: factors beside experts learn what dense experts learn when held to that rank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config
from torch import Tensor, nn

from sfumato import ops
from sfumato.model.adapters import Factors
from sfumato.model.network import Experts
from sfumato.model.trainable import TRAINED, AdaptedExperts
from sfumato.ops.lowrank import Lanes, LaneSwitch
from sfumato.ops.packed import Packed
from sfumato.quant.formats import pack

N, D, INNER, E, J, RANK, SCALE, STEPS = 96, 16, 8, 4, 2, 2, 0.5, 60
CONFIG = tiny_config(hidden_size=D, expert_size=INNER, num_experts=E, top_k_experts=J)
LEAVES = ("gate_up_proj", "down_proj")


def draw(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def run(x: Tensor, index: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """All experts on all tokens, the chosen ones counted."""
    gate, up = torch.einsum("nd,efd->nef", x, gate_up).chunk(2, dim=-1)
    every = torch.einsum("nef,edf->ned", F.gelu(gate, approximate="tanh") * up, down)
    return torch.einsum("nj,njd->nd", shares, every.gather(1, index[..., None].expand(-1, -1, D)))


@pytest.mark.parametrize("form", [None, "int8"])
def test_expert_factors_are_dense_training_held_to_their_rank(form: str | None) -> None:
    """A teacher whose experts differ from the base by matrices of rank 2: step by step the same losses and weights as a
    dense matrix that is written as base + scale bᵀ a, until both have learned it."""
    experts = Experts(CONFIG, ops.load("fused"))
    bases: dict[str, Tensor] = {}
    for seed, leaf in enumerate(LEAVES):
        plain = draw(*getattr(experts, leaf).shape, seed=seed, size=0.3)
        packed: Tensor | Packed = plain if form is None else pack(plain, form)
        bases[leaf] = plain if isinstance(packed, Tensor) else packed.dense()
        del experts._parameters[leaf]
        setattr(experts, leaf, packed)
    shapes = {"gate_up_proj": (D, 2 * INNER), "down_proj": (INNER, D)}
    factors = {
        leaf: Factors(draw(E, RANK, rows, seed=5, size=0.3), draw(E, RANK, columns, seed=6, size=0.1), SCALE)
        for leaf, (rows, columns) in shapes.items()
    }
    teacher = [
        bases[leaf] + draw(E, RANK, columns, seed=7, size=0.3).mT @ draw(E, RANK, rows, seed=8, size=0.3)
        for leaf, (rows, columns) in shapes.items()
    ]
    x, index = draw(N, D, seed=9), torch.stack([torch.arange(N) % E, (torch.arange(N) + 1) % E], dim=1)
    shares = torch.rand(N, J, generator=torch.Generator().manual_seed(3))
    target = run(x, index, shares, teacher[0], teacher[1])

    switch = LaneSwitch()
    switch.lanes = Lanes.of([TRAINED], N, 0, "cpu")
    ours = AdaptedExperts(experts, factors, switch)
    dense = {leaf: (nn.Parameter(own.a.clone()), nn.Parameter(own.b.clone())) for leaf, own in factors.items()}
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    optimizers = [
        torch.optim.AdamW(some, lr=0.02) for some in (trained, [part for both in dense.values() for part in both])
    ]
    losses: list[tuple[float, float]] = []
    for _ in range(STEPS):
        weights = [bases[leaf] + SCALE * b.mT @ a for leaf, (a, b) in dense.items()]
        both = [ours(x, index, shares), run(x, index, shares, weights[0], weights[1])]
        values = [F.mse_loss(y, target) for y in both]
        losses.append((values[0].item(), values[1].item()))
        for optimizer, value in zip(optimizers, values, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert all(abs(one - two) <= 1e-4 * one for one, two in losses)
    assert losses[-1][0] < 0.1 * losses[0][0]
    for leaf, (a, b) in dense.items():
        delta = getattr(ours, leaf).dense(torch.float32) - bases[leaf]
        torch.testing.assert_close(delta, SCALE * b.mT @ a, rtol=1e-3, atol=1e-4)
        assert torch.linalg.matrix_rank(delta.detach(), atol=1e-4).eq(RANK).all()
