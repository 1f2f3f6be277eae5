"""mlx-vlm beside ours, for peers.py: the same weights from a checkpoint, in a Python that has it.

`mlx_peer.py` is what that Python runs. It takes no turns with ours: it does one denoise forward after the rest.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import common
from sfumato.checkpoints.save import save
from sfumato.measure.work import duration
from sfumato.model.network import Model

PATIENCE = 300
"""Seconds that mlx-vlm has in each number format: to load, read the prompt, warm and be timed."""
FORWARD = "denoise forward"


@dataclass(frozen=True)
class MlxCase:
    """What one forward gets, the same for everyone, and the logits that ours gives in float32."""

    prompt: npt.NDArray[Any]
    canvas: npt.NDArray[Any]
    previous: npt.NDArray[Any]
    """Logits of a step before."""
    exact: torch.Tensor


def ways_of_mlx(command: str, plain: Model, case: MlxCase, seconds: float) -> dict[str, Any]:
    """Its denoise forward in each number format, in a process of its own; its logits beside our float32 ones."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(plain, folder / "model")
        config = folder / "model" / "config.json"  # with a vision tower it would want the tower's weights
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vision_config": None}))
        np.savez(folder / "inputs.npz", prompt=case.prompt, canvas=case.canvas, previous=case.previous)
        line = [*shlex.split(command), *map(str, (Path(__file__).with_name("mlx_peer.py"), folder, seconds))]
        for dtype in dict.fromkeys(("float32" if plain.dtype == torch.float32 else "bf16", "float32")):
            common.say(f"mlx-vlm: {FORWARD}, {dtype} (at most {PATIENCE} s)")
            try:
                done = subprocess.run([*line, dtype], capture_output=True, text=True, timeout=PATIENCE)
                if done.returncode:
                    raise RuntimeError(done.stderr.strip().rpartition("\n")[2][:200].rstrip("."))
                results[dtype] = json.loads(done.stdout.strip().rpartition("\n")[2])
                there = torch.from_numpy(np.load(folder / "logits.npy"))
                results[dtype]["largest_difference_from_our_float32"] = float((there - case.exact).abs().max())
            except subprocess.TimeoutExpired:
                results[dtype] = {"failed": f"not done within {PATIENCE} s"}
            except (OSError, RuntimeError, ValueError) as error:
                results[dtype] = {"failed": str(error) or type(error).__name__}
    return results


def sentence(results: dict[str, Any]) -> str:
    """What came of it, by number format: versions, time and logits, or why there are none."""
    texts = []
    for dtype, one in results.items():
        if "failed" in one:
            texts.append(f"{dtype}: {one['failed']}")
            continue
        used = ", ".join([*(f"{name} {version}" for name, version in one["versions"].items()), *one["preloaded"]])
        most = one["largest_difference_from_our_float32"]
        texts.append(f"{dtype} ({used}; {one['device']}): {duration(one['seconds'])} a {FORWARD}, logits differ from ")
        texts[-1] += f"our float32 ones by at most {most:.2g}"
    return "; ".join(texts)
