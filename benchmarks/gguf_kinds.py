"""How fast one core unpacks each kind of GGUF: the file's bytes to our codes, and to float32; and the bits of a weight.

Processor time of this thread, so that other work on the machine counts little. Run: .venv/bin/python
benchmarks/gguf_kinds.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from sfumato.checkpoints.formats.gguf_blocks import KINDS, PLAIN, decode, packed

ROWS, INPUTS, TURNS = 2048, 4096, 5


def seconds(work: Callable[[], object]) -> float:
    """The shortest of some turns."""
    times = []
    for _ in range(TURNS):
        begin = time.thread_time()
        work()
        times.append(time.thread_time() - begin)
    return min(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| kind | as | bits in the file | in memory | to codes, MB/s | to float32, MB/s |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for kind in KINDS.values():
        if kind.name in PLAIN:
            continue
        raw = torch.randint(0, 256, (ROWS, INPUTS // kind.values * kind.nbytes), dtype=torch.uint8)
        weight = packed(kind.name, raw)
        rates = [raw.nbytes / 1e6 / seconds(partial(unpack, kind.name, raw)) for unpack in (packed, decode)]
        print(
            f"| {kind.name} | {weight.kind}, groups of {weight.group} | {8 * kind.nbytes / kind.values:.2f} "
            f"| {8 * weight.nbytes / ROWS / INPUTS:.2f} | {rates[0]:.0f} | {rates[1]:.0f} |"
        )
