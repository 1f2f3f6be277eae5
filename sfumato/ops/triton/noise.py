"""The noise of a step, in one kernel: what a position samples with, and the token that may take its place.

The temperature of the step, which lies in the same places, comes with it. `sampling.noise.CountedNoise` is the
specification: splitmix64 over (seed low, seed high, request, canvas, step), a stream and a position. It counts with
some 240 small operations a step, each of which costs a launch; here a program counts a row. The words are read where
the state of the canvases holds them, so that nothing is gathered first. The bits are the same.

What it lacks: fresh canvases, which are made once each, on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.triton.ahead import Special
from sfumato.ops.triton.dependent import enter, overlap

SAMPLE, RENOISE = 1, 2
"""The streams of `CountedNoise.sample` and `CountedNoise.renoise`."""


def noise(
    rng_counter_X4: Tensor, step_X: Tensor, temperature_XS: Tensor, at_B: Tensor, length: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `contract.DrawNoise`.

    Numbers and tokens [B, length] of the rows `at_B` are counted from their words (seed low, seed high, request,
    canvas) and their step."""
    rows, device = len(at_B), rng_counter_X4.device
    uniform_BL = torch.empty(rows, length, dtype=torch.float32, device=device)
    tokens_BL = torch.empty(rows, length, dtype=torch.int64, device=device)
    temperature_B = torch.empty(rows, dtype=torch.float32, device=device)
    if rows:
        _noise[(rows,)](
            rng_counter_X4.contiguous(),
            step_X.contiguous(),
            temperature_XS.contiguous(),
            at_B.contiguous(),
            uniform_BL,
            tokens_BL,
            temperature_B,
            temperature_XS.shape[1],
            L=length,
            V=vocab_size,
            BLOCK=triton.next_power_of_2(length),
            FIRST=SAMPLE,
            SECOND=RENOISE,
            num_warps=4,
            **overlap(device),
        )
    return uniform_BL, tokens_BL, temperature_B


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


@triton.jit(do_not_specialize=["steps"])
def _noise(
    words_ptr,
    step_ptr,
    temperature_ptr,
    at_ptr,
    uniform_ptr,
    tokens_ptr,
    temperature_out_ptr,
    steps,
    L: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    n = tl.program_id(0)
    row = tl.load(at_ptr + n)
    l_L = tl.arange(0, BLOCK)
    state_L = tl.zeros((BLOCK,), tl.int64)
    for word in tl.static_range(4):
        state_L = _mix(state_L * 31 + tl.load(words_ptr + row * 4 + word))
    step = tl.load(step_ptr + row)
    state_L = _mix(state_L * 31 + step)
    tl.store(temperature_out_ptr + n, tl.load(temperature_ptr + row * steps + step))
    uniform_L = (_bits(state_L, l_L, FIRST) >> 8).to(tl.float32) * 2.0**-24
    token_L = (_bits(state_L, l_L, SECOND) * V) >> 32
    tl.store(uniform_ptr + n.to(tl.int64) * L + l_L, uniform_L, l_L < L)
    tl.store(tokens_ptr + n.to(tl.int64) * L + l_L, token_L, l_L < L)


def ahead(arch: int) -> list[Special]:
    """A canvas of the released model."""
    i = "*i64"
    f = "*fp32"
    pointers = {"words_ptr": i, "step_ptr": i, "temperature_ptr": f, "at_ptr": i, "uniform_ptr": f, "tokens_ptr": i}
    pointers |= {"temperature_out_ptr": f, "steps": "i32"}
    sizes = {"L": 256, "V": 262_144, "BLOCK": 256, "FIRST": SAMPLE, "SECOND": RENOISE}
    return [Special("noise", _noise, pointers, sizes)]
