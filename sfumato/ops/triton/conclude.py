"""The end of a step in two kernels: accept, renoise, stop, and the state written where it lies.

`step.conclude_` is the specification; it takes some seventy small operations, each a launch. Here the first kernel has
a program a position: it puts the soft embedding in its place, a pin's own embedding where there is a pin, and asks
whether the position's numbers are finite. The second has a program a row, which holds all its positions and decides.

Nothing is sorted. A position is accepted where the entropies that stand before it, in the order of (entropy, index),
sum to at most the bound; so each position sums those below its own. Sums are float32 as the specification's, in another
order: where they decide, near a bound of 0.1 nats, both are right to about 1e-8.

The scratch row, the state's last, stays as it is: a recorded batch may hold it several times.

What it lacks: grammars, whose steps are concluded by the specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.contract import CanvasState, ReadOut
from sfumato.ops.triton.ahead import Special
from sfumato.ops.triton.dependent import enter, overlap

CHUNK = 32
"""Positions that are compared with all others at a time."""


def conclude_(
    state: CanvasState,
    at_B: Tensor,
    read: ReadOut,
    noise_BL: Tensor,
    hidden_BLD: Tensor,
    soft_BLD: Tensor,
    embedding: tuple[Tensor, Tensor],
) -> None:
    """As `contract.Conclude`."""
    at_B = at_B.contiguous()
    if len(at_B):
        entropy_BL, finite_BL = _place_(state, at_B, read.entropy_BL, hidden_BLD, soft_BLD, embedding)
        _conclude_(state, at_B, read, noise_BL, entropy_BL, finite_BL)


def _place_(
    state: CanvasState,
    at_B: Tensor,
    entropy_BL: Tensor,
    hidden_BLD: Tensor,
    soft_BLD: Tensor,
    embedding: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Soft embeddings into the state; entropies with pins in place, and which positions are finite."""
    (batch, length, width), has_pins = hidden_BLD.shape, bool(state.has_pins)
    embed_VD, scale = embedding
    entropy_out_BL = torch.empty(batch, length, dtype=torch.float32, device=at_B.device)
    finite_BL = torch.empty(batch, length, dtype=torch.uint8, device=at_B.device)
    _place[(batch * length,)](
        at_B,
        state.pin_XL,
        entropy_BL.contiguous(),
        hidden_BLD.contiguous(),
        soft_BLD.contiguous(),
        embed_VD.contiguous() if has_pins else None,
        scale if has_pins else None,
        entropy_out_BL,
        finite_BL,
        state.soft_XLD,
        len(state.step_X) - 1,
        L=length,
        D=width,
        PINS=has_pins,
        BLOCK=min(1024, triton.next_power_of_2(width)),
        num_warps=4,
        **overlap(at_B.device),
    )
    return entropy_out_BL, finite_BL


def _conclude_(
    state: CanvasState, at_B: Tensor, read: ReadOut, noise_BL: Tensor, entropy_BL: Tensor, finite_BL: Tensor
) -> None:
    batch, length = entropy_BL.shape
    _conclude[(batch,)](
        at_B,
        entropy_BL,
        finite_BL,
        read.sample_BL.contiguous(),
        read.argmax_BL.contiguous(),
        noise_BL.contiguous(),
        state.canvas_XL,
        state.pin_XL,
        state.argmax_XL,
        state.still_XL,
        state.entropy_XL,
        state.accepted_XL.view(torch.uint8),
        state.step_X,
        state.is_done_X.view(torch.uint8),
        state.is_finite_X.view(torch.uint8),
        state.rules.entropy_bound_X,
        state.rules.stability_X,
        state.rules.confidence_X,
        state.rules.max_steps_X,
        state.room_X,
        state.early_X.view(torch.uint8),
        state.settled_X,
        state.eos_E,
        len(state.step_X) - 1,
        L=length,
        E=len(state.eos_E),
        PINS=bool(state.has_pins),
        EARLY=bool(state.has_early),
        BLOCK=triton.next_power_of_2(length),
        CHUNK=min(CHUNK, triton.next_power_of_2(length)),
        num_warps=8,
        **overlap(at_B.device),
    )


# Not specialised on: a state of 17 rows and one of 16 are the same kernel.
@triton.jit(do_not_specialize=["scratch"])
def _place(
    at_ptr,
    pin_ptr,
    entropy_ptr,
    hidden_ptr,
    soft_ptr,
    embed_ptr,
    scale_ptr,
    entropy_out_ptr,
    finite_ptr,
    state_ptr,
    scratch,
    L: tl.constexpr,
    D: tl.constexpr,
    PINS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One position: its soft embedding, its entropy with pins in place, and whether all its numbers are finite."""
    enter(PDL)
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(at_ptr + n // L)
    entropy = tl.load(entropy_ptr + n)
    unfit_D = tl.zeros((BLOCK,), tl.int32) + (~(tl.abs(entropy) < float("inf"))).to(tl.int32)
    if PINS:
        pin = tl.load(pin_ptr + row * L + n % L)
        entropy = tl.where(pin >= 0, 0.0, entropy)
        scale = tl.load(scale_ptr).to(tl.float32)
    for start in range(0, D, BLOCK):
        d_D = start + tl.arange(0, BLOCK)
        is_live_D = d_D < D
        hidden_D = tl.load(hidden_ptr + n * D + d_D, is_live_D, 0.0).to(tl.float32)
        soft_D = tl.load(soft_ptr + n * D + d_D, is_live_D, 0.0)
        if PINS:
            token = tl.maximum(pin, 0)
            pinned_D = tl.load(embed_ptr + token * D + d_D, is_live_D & (pin >= 0), 0.0).to(tl.float32) * scale
            soft_D = tl.where(pin >= 0, pinned_D.to(soft_D.dtype), soft_D)
        is_fit_D = (tl.abs(hidden_D) < float("inf")) & (tl.abs(soft_D.to(tl.float32)) < float("inf"))
        unfit_D |= (~is_fit_D).to(tl.int32)
        tl.store(state_ptr + (row * L + n % L) * D + d_D, soft_D, is_live_D & (row != scratch))
    tl.store(entropy_out_ptr + n, entropy)
    tl.store(finite_ptr + n, (tl.max(unfit_D, 0) == 0).to(tl.uint8))


@triton.jit(do_not_specialize=["scratch"])
def _conclude(
    at_ptr,
    entropy_ptr,
    finite_ptr,
    sample_ptr,
    argmax_ptr,
    noise_ptr,
    canvas_ptr,
    pin_ptr,
    last_ptr,
    still_ptr,
    entropy_out_ptr,
    accepted_ptr,
    step_ptr,
    is_done_ptr,
    is_finite_ptr,
    bound_ptr,
    stability_ptr,
    confidence_ptr,
    max_steps_ptr,
    room_ptr,
    early_ptr,
    settled_ptr,
    eos_ptr,
    scratch,
    L: tl.constexpr,
    E: tl.constexpr,
    PINS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: all its positions."""
    enter(PDL)
    b = tl.program_id(0).to(tl.int64)
    row = tl.load(at_ptr + b)
    if row != scratch:
        l_L = tl.arange(0, BLOCK)
        is_live_L = l_L < L
        here_L, there_L = b * L + l_L, row * L + l_L
        entropy_L = tl.load(entropy_ptr + here_L, is_live_L, 0.0)
        sample_L = tl.load(sample_ptr + here_L, is_live_L, 0)
        argmax_L = tl.load(argmax_ptr + here_L, is_live_L, 0)
        noise_L = tl.load(noise_ptr + here_L, is_live_L, 0)
        is_fit = tl.min(tl.load(finite_ptr + here_L, is_live_L, 1).to(tl.int32), 0) > 0
        last_L = tl.load(last_ptr + there_L, is_live_L, 0)
        still_L = tl.load(still_ptr + there_L, is_live_L, 0)
        pin_L = tl.load(pin_ptr + there_L, is_live_L, -1) if PINS else tl.full((BLOCK,), -1, tl.int64)
        step, was_done = tl.load(step_ptr + row), tl.load(is_done_ptr + row) != 0

        # Accept the surest positions, renoise the rest. What is not a number stands before nobody and is not accepted.
        before_L = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, L, CHUNK):
            l_J = start + tl.arange(0, CHUNK)
            entropy_J = tl.load(entropy_ptr + b * L + l_J, l_J < L, float("inf"))
            is_before = (entropy_J[None, :] == entropy_L[:, None]) & (l_J[None, :] < l_L[:, None])
            is_before |= entropy_J[None, :] < entropy_L[:, None]
            before_L += tl.sum(tl.where(is_before, entropy_J[None, :], 0.0), 1)
        is_accepted_L = (before_L <= tl.load(bound_ptr + row)) & (entropy_L == entropy_L)
        if PINS:
            sample_L = tl.where(pin_L >= 0, pin_L, sample_L)
            argmax_L = tl.where(pin_L >= 0, pin_L, argmax_L)
            is_accepted_L |= pin_L >= 0
        next_L = tl.where(is_accepted_L, sample_L, noise_L)

        # Stop where the canvas stands still and is sure, or at the cap.
        still_L = tl.where(argmax_L == last_L, still_L + 1, 0)
        is_still_L = still_L >= tl.load(stability_ptr + row)
        confidence = tl.load(confidence_ptr + row)
        counts_L = is_live_L
        if EARLY:  # all up to the first end, and no more than the row's room
            is_early = tl.load(early_ptr + row) != 0
            is_end_L = tl.zeros((BLOCK,), tl.int32)
            for e in tl.static_range(E):
                is_end_L |= (argmax_L == tl.load(eos_ptr + e)).to(tl.int32)
            end = tl.min(tl.where((is_end_L != 0) & is_live_L, l_L, L), 0)
            is_within_L = (l_L <= end) & (l_L < tl.load(room_ptr + row))
            counts_L = is_live_L & (is_within_L | ~is_early)
        count = tl.sum(counts_L.to(tl.int32), 0)
        mean = tl.sum(tl.where(counts_L, entropy_L, 0.0), 0) / tl.maximum(count, 1).to(tl.float32)
        is_settled = (tl.min((is_still_L | ~counts_L).to(tl.int32), 0) > 0) & (mean < confidence) & (count > 0)
        is_done = was_done | is_settled | (step + 1 >= tl.load(max_steps_ptr + row)) | ~is_fit
        was_finite = tl.load(is_finite_ptr + row) != 0

        tl.debug_barrier()  # all is read before anything is written
        # A row that had stopped before stays as it was; of its other numbers nobody asks.
        is_open_L = is_live_L & ~was_done
        tl.store(canvas_ptr + there_L, next_L, is_open_L)
        tl.store(last_ptr + there_L, argmax_L, is_open_L)
        tl.store(entropy_out_ptr + there_L, entropy_L, is_open_L)
        tl.store(accepted_ptr + there_L, is_accepted_L.to(tl.uint8), is_open_L)
        tl.store(still_ptr + there_L, still_L, is_live_L)
        if EARLY:  # the leading positions that stand still, each of them sure, are pinned from now on
            is_sure_L = is_still_L & (entropy_L < confidence) & counts_L & is_early
            settled = tl.min(tl.where(is_sure_L, L, l_L), 0)
            tl.store(settled_ptr + row, settled.to(tl.int64))
            tl.store(pin_ptr + there_L, argmax_L, is_live_L & (l_L < settled))
        tl.store(step_ptr + row, tl.where(was_done, step, step + 1))
        tl.store(is_done_ptr + row, is_done.to(tl.uint8))
        tl.store(is_finite_ptr + row, (was_finite & (was_done | is_fit)).to(tl.uint8))


def ahead(arch: int) -> list[Special]:
    """A canvas of the released model, with all that a request may ask for and without."""
    p, f, i, u = "*bf16", "*fp32", "*i64", "*u8"
    place = {"at_ptr": i, "pin_ptr": i, "entropy_ptr": f, "hidden_ptr": p, "soft_ptr": p, "embed_ptr": p}
    place |= {"scale_ptr": p, "entropy_out_ptr": f, "finite_ptr": u, "state_ptr": p, "scratch": "i32"}
    names = ("at", "sample", "argmax", "noise", "canvas", "pin", "last", "still", "step", "stability", "max_steps")
    conclude = {f"{name}_ptr": i for name in (*names, "room", "settled", "eos")}
    conclude |= {f"{name}_ptr": f for name in ("entropy", "entropy_out", "bound", "confidence")}
    conclude |= {f"{name}_ptr": u for name in ("finite", "accepted", "is_done", "is_finite", "early")}
    specials = []
    for what, flag in (("", False), (" pins early", True)):
        sizes = {"L": 256, "D": 2816, "PINS": flag, "BLOCK": 1024}
        nothing = {} if flag else {"embed_ptr": None, "scale_ptr": None}
        pointers = {name: kind for name, kind in place.items() if name not in nothing}
        specials.append(Special(f"place{what}", _place, pointers, {**sizes, **nothing}))
        sizes = {"L": 256, "E": 3, "PINS": flag, "EARLY": flag, "BLOCK": 256, "CHUNK": CHUNK}
        specials.append(Special(f"conclude{what}", _conclude, {**conclude, "scratch": "i32"}, sizes, 8))
    return specials
