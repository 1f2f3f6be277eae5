"""ops/cpu: operations that compare numbers tell where one is none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sfumato.ops import cpu, fused, reference
from sfumato.quant import formats

DTYPES = (torch.float32, torch.bfloat16)

NEEDS_CPU = pytest.mark.skipif("cpu" not in tiny.OPS, reason="the cpu operations cannot run here")


@NEEDS_CPU
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_says_that_a_row_is_none(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 64)
    for value in math.nan, -math.nan, math.inf:
        x = torch.randn(3, 64, dtype=dtype)
        x[1, 5] = value
        (y,) = cpu.linear(x, cpu.pack(formats.pack(weight, "int8")))
        assert torch.isfinite(y).all(-1).tolist() == [True, False, True]


@NEEDS_CPU
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_router_and_a_read_out_say_it(dtype: torch.dtype) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    proj, embed = random(8, 32), random(600, 32)
    proj[3, 7] = embed[500, 7] = math.nan
    index, weight = cpu.route(random(5, 32), torch.ones(32, dtype=dtype), proj, torch.ones(8, dtype=dtype), 2, 1e-6)
    assert weight.isnan().any(-1).all() and int(index.min()) >= 0 and int(index.max()) < 8
    for ops in cpu, reference:
        read = ops.read_out(random(1, 4, 32), embed, 30.0, torch.ones(1), uniform_BL=torch.rand(1, 4))
        assert read.entropy_BL.isnan().all()
        for tokens in read.sample_BL, read.argmax_BL:
            assert int(tokens.min()) >= 0 and int(tokens.max()) < 600
        soft = ops.soft_embedding(read.logits_BLV, embed, torch.tensor(2.0), read.tiles)
        assert not torch.isfinite(soft).any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ops", [reference, fused, pytest.param(cpu, marks=NEEDS_CPU)])
def test_a_norm_whose_squares_overflow_is_no_row_of_zeros(ops: Any, dtype: torch.dtype) -> None:
    """A layer behind such a norm would add nothing, and a text would go on without it."""
    x = torch.randn(3, 64).to(dtype)
    sound = ops.rms_norm(x, torch.ones(64, dtype=dtype), 1e-6)
    x[1] = 1e30
    with torch.no_grad():
        normed = ops.rms_norm(x, torch.ones(64, dtype=dtype), 1e-6)
        angles = torch.ones(1, 3, 64, dtype=dtype)
        turned = ops.norm_rope(x.view(1, 3, 1, 64), torch.ones(64, dtype=dtype), 1e-6, angles, angles)
    assert torch.isfinite(normed).all(-1).tolist() == [True, False, True]
    assert torch.isfinite(turned[0, :, 0]).all(-1).tolist() == [True, False, True]
    assert torch.allclose(normed[[0, 2]].float(), sound[[0, 2]].float(), atol=1e-5 if dtype == torch.float32 else 0.05)
