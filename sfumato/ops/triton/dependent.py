"""Programmatic dependent launch, as a choice: a kernel is brought to the processors while the one before it still runs.

A step is a chain of some 350 kernels of microseconds each, and about one microsecond of each is the gap between two.
From sm_90 on, a kernel may be launched once every program of its predecessor has said so or ended; what must not come
before the predecessor's end, it waits with by itself. In a CUDA graph such a launch becomes a programmatic edge.

Here every kernel begins with `enter`: it waits, for its predecessors to end and for their stores to arrive, and only
then lets its successors come. Nothing is loaded or stored before that, so order stays what it was:

- Memory that a predecessor still reads is not overwritten early, and what it writes is not read early.
- To wait for the predecessor is to wait for all before it, since it waited for its own: this holds only as long as
  every kernel does. A launch without these keywords, such as torch's, waits whole, as it always did.
- A kernel with two predecessors, where two streams meet, waits for both; two that follow one, where streams part,
  each wait for it.
- A program that waits takes no place that its predecessor needs, since the last of the predecessor's programs has
  begun by then: nothing waits for ever. It may take one that the other stream could use. Two kernels of a stream at
  most are there at one time, as none is let in before its predecessor's own wait ends.

So it saves the launch and the ramp, not more. Off by default: nothing has measured it. What this lacks: loads of
weights, which no kernel writes, before the wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

from sfumato.ops.triton.tuning import Config, chip, config

DEFAULTS: dict[str, Config] = {"pdl": {"ON": 0}}
LEAST = 90
"""The architecture from which on there is such a launch."""


def overlap(device: torch.device | str) -> dict[str, bool]:
    """The two keywords of a launch on this device: whether the kernel waits by itself, and is launched so."""
    is_wanted = is_on(device)
    return {"PDL": is_wanted, "launch_pdl": is_wanted}


def is_on(device: torch.device | str) -> bool:
    """Whether the table asks for it and the architecture has it.

    The interpreter, which runs one kernel after the other, has not."""
    if knobs.runtime.interpret or chip(str(device))[1] < LEAST:
        return False
    # One entry for all kernels, spelled as the table spells the others: "1 bfloat16".
    return bool(config("pdl", (1,), torch.bfloat16, device, DEFAULTS["pdl"])["ON"])


@triton.jit
def enter(PDL: tl.constexpr):
    """The first statement of every kernel. All programs wait before any lets the next kernel come."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
