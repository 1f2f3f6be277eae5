"""One denoise forward of mlx-vlm, for mlx_ways.py: it runs in a Python that has mlx-vlm and needs nothing of ours.

    python benchmarks/mlx_peer.py FOLDER SECONDS DTYPE

FOLDER holds the checkpoint `model` and `inputs.npz`: prompt, canvas and `previous`, the logits of a step before. Timed
is what a step of its own generate calls, with its mask made beforehand: soft embedding, pass, logits. The first call
warms, and is all there is where it alone takes SECONDS. Prints JSON, and writes FOLDER/logits.npy.
"""

from __future__ import annotations

import json
import os
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
    folder, limit, kind = Path(sys.argv[1]), float(sys.argv[2]), {"bf16": mx.bfloat16}.get(sys.argv[3], mx.float32)
    inputs = np.load(folder / "inputs.npz")
    model = load_model(folder / "model")  # strict: a weight without a value is an error
    model.set_dtype(kind)
    mx.eval(model.parameters())
    prompt, canvas = mx.array(inputs["prompt"]), mx.array(inputs["canvas"])
    previous = mx.array(inputs["previous"]).astype(kind)
    cache = model.diffusion_prefill_cache(prompt, cache=model.make_cache())
    masks = model.diffusion_decoder_masks(canvas, cache)
    embedding = model.diffusion_prepare_self_conditioning()
    mx.eval(previous, masks, [entry.state for entry in cache])

    def call() -> tuple[float, mx.array]:
        began = time.perf_counter()
        soft = model.diffusion_self_conditioning(previous, embedding)
        logits = model.diffusion_decoder_logits(canvas, cache, soft, masks)
        mx.eval(logits)
        return time.perf_counter() - began, logits

    first, logits = call()
    np.save(folder / "logits.npy", np.array(logits.astype(mx.float32)))
    times: list[float] = []
    until = time.perf_counter() + limit
    while first < limit and len(times) < REPEATS and (not times or time.perf_counter() < until):
        times.append(call()[0])
    times = times or [first]
    row = {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times), "repeats": len(times)}
    versions = {name: version(name) for name in ("mlx", "mlx-vlm")}
    preloaded = [Path(one).name for one in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    used = {"device": str(mx.default_device()), "preloaded": preloaded, "versions": versions}
    print(json.dumps({**row, **used}))


if __name__ == "__main__":
    main()
