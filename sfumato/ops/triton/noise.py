"""The noise of a step: what a position samples with and the token that may take its place, in one kernel.

`diffusion.CountedDice` is the specification: splitmix64 over (seed low, seed high, request, canvas, step), a stream and
a position. It counts with some 240 small operations a step, each of which costs a launch; here a program counts a row.
The words are read where the state of the canvases holds them, so that nothing is gathered first. The bits are the same.

What it lacks: fresh canvases, which are made once each, on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.triton.ahead import Special

SAMPLE, RENOISE = 1, 2
"""The streams of `CountedDice.sample` and `CountedDice.renoise`."""


def noise(words_X4: Tensor, step_X: Tensor, at_B: Tensor, length: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1), float32 [B, length], and tokens, int64 [B, length], of the rows `at_B`: counted from their
    words (seed low, seed high, request, canvas) and their step."""
    rows, device = len(at_B), words_X4.device
    uniform_BL = torch.empty(rows, length, dtype=torch.float32, device=device)
    tokens_BL = torch.empty(rows, length, dtype=torch.int64, device=device)
    if rows:
        _noise[(rows,)](
            words_X4.contiguous(),
            step_X.contiguous(),
            at_B.contiguous(),
            uniform_BL,
            tokens_BL,
            L=length,
            V=vocab_size,
            BLOCK=triton.next_power_of_2(length),
            FIRST=SAMPLE,
            SECOND=RENOISE,
            num_warps=4,
        )
    return uniform_BL, tokens_BL


@triton.jit
def _mix(x):
    """splitmix64's finaliser on int64, where products wrap and shifts must be made logical by hand."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _bits(state_L, l_L, STREAM: tl.constexpr):
    """32 random bits a position, as int64."""
    return _mix(_mix(state_L * 31 + STREAM) + l_L.to(tl.int64) * -7046029254386353131) & 0xFFFFFFFF


@triton.jit
def _noise(
    words_ptr,
    step_ptr,
    at_ptr,
    uniform_ptr,
    tokens_ptr,
    L: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    n = tl.program_id(0)
    row = tl.load(at_ptr + n)
    l_L = tl.arange(0, BLOCK)
    state_L = tl.zeros((BLOCK,), tl.int64)
    for word in tl.static_range(4):
        state_L = _mix(state_L * 31 + tl.load(words_ptr + row * 4 + word))
    state_L = _mix(state_L * 31 + tl.load(step_ptr + row))
    uniform_L = (_bits(state_L, l_L, FIRST) >> 8).to(tl.float32) * 2.0**-24
    token_L = (_bits(state_L, l_L, SECOND) * V) >> 32
    tl.store(uniform_ptr + n.to(tl.int64) * L + l_L, uniform_L, l_L < L)
    tl.store(tokens_ptr + n.to(tl.int64) * L + l_L, token_L, l_L < L)


def ahead(arch: int) -> list[Special]:
    """A canvas of the released model."""
    i = "*i64"
    pointers = {"words_ptr": i, "step_ptr": i, "at_ptr": i, "uniform_ptr": "*fp32", "tokens_ptr": i}
    sizes = {"L": 256, "V": 262_144, "BLOCK": 256, "FIRST": SAMPLE, "SECOND": RENOISE}
    return [Special("noise", _noise, pointers, sizes)]
