"""One denoise forward of mlx-vlm, for peers.py: it runs in a Python that has mlx-vlm and needs nothing of ours.

    python benchmarks/mlx_peer.py CHECKPOINT INPUTS.npz LOGITS.npy SECONDS DTYPE

INPUTS holds `prompt`, `canvas` and `previous`, the logits of a step before. What is timed is what a step of its own
generate calls, with its mask made beforehand: soft embedding, pass, logits. The first call warms, and is all there is
where it alone takes SECONDS. Prints JSON, and writes the logits to LOGITS.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm.utils import load_model

REPEATS = 30


def main() -> None:
    folder, given, out, limit, dtype = (
        Path(sys.argv[1]),
        np.load(sys.argv[2]),
        sys.argv[3],
        float(sys.argv[4]),
        sys.argv[5],
    )
    kind = {"bf16": mx.bfloat16, "float32": mx.float32}[dtype]
    model = load_model(folder)
    model.set_dtype(kind)
    mx.eval(model.parameters())
    prompt, canvas = mx.array(given["prompt"]), mx.array(given["canvas"])
    previous = mx.array(given["previous"]).astype(kind)
    cache = model.diffusion_prefill_cache(prompt, cache=model.make_cache())
    masks = model.diffusion_decoder_masks(canvas, cache)
    embedding = model.diffusion_prepare_self_conditioning()
    mx.eval(previous, masks, [entry.state for entry in cache])

    def call() -> mx.array:
        soft = model.diffusion_self_conditioning(previous, embedding)
        logits = model.diffusion_decoder_logits(canvas, cache, soft, masks)
        mx.eval(logits)
        return logits

    def timed() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    began = time.perf_counter()
    logits = call()
    times = [time.perf_counter() - began]
    np.save(out, np.array(logits.astype(mx.float32)))
    if times[0] < limit:
        times, until = [], time.perf_counter() + limit
        while not times or (len(times) < REPEATS and time.perf_counter() < until):
            times.append(timed())
    row = {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times), "repeats": len(times)}
    versions = {name: version(name) for name in ("mlx", "mlx-vlm")}
    print(json.dumps({**row, "dtype": dtype, "device": str(mx.default_device()), "versions": versions}))


if __name__ == "__main__":
    main()
