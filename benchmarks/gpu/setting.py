"""What every step knows: the device, the sizes, the operations, the time that is left; and what several of them do."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from sfumato.measure.parts import random_config
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model
from sfumato.ops import load
from sfumato.ops.packed import Packed
from sfumato.ops.triton import tuning
from sfumato.quant.apply import samples
from sfumato.sampling.recorded import CudaCapture

Row = dict[str, Any]
FILES = ("linear", "experts", "attention", "norms", "read_out", "soft_embedding")
"""Of benchmarks/ops."""


@dataclass(frozen=True)
class Setting:
    """Where a step runs. `is_dry`: toy sizes on the processor, and whatever operations are there."""

    out: Path
    until: float
    """time.time() at which the step is killed."""
    is_dry: bool
    device: str

    @classmethod
    def of(cls, out: Path, until: float, is_dry: bool) -> Setting:
        """On a GPU unless it is dry; from now on this folder's tile sizes are used, which begin as the package's."""
        setting = cls(out, until, is_dry, "cpu" if is_dry else "cuda")
        table = out / "tuned.json"
        if tuning.TABLE.exists() and not table.exists():
            out.mkdir(parents=True, exist_ok=True)
            table.write_text(tuning.TABLE.read_text())
        tuning.TABLE = table
        return setting

    @property
    def left(self) -> float:
        """Seconds, less two for the end."""
        return self.until - time.time() - 2.0

    def ops(self, dtype: torch.dtype, packed: list[Packed] | tuple[()] = ()) -> str:
        """The name of the operations: triton, or, dry, what auto takes for such weights."""
        return load("auto", self.device, dtype, packed).name if self.is_dry else "triton"

    def config(self, layers: int = 30) -> ModelConfig:
        """The released text stack with so many layers; toy sizes where it is dry."""
        if not self.is_dry:
            return common.released_config(layers)
        wide: dict[str, Any] = {"hidden_size": 128, "expert_size": 64, "intermediate_size": 128, "num_heads": 4}
        return replace(random_config("tiny"), eos_ids=(), **wide)

    def model(self, kind: str, layers: int = 30) -> Model:
        """Random weights in a recipe, or "bf16"; packed for the operations."""
        recipe = "" if kind == "bf16" else kind
        name = self.ops(torch.bfloat16, samples(recipe) if recipe else ())
        return common.random_packed(self.config(layers), self.device, name, recipe)

    def wait(self) -> None:
        common.wait(self.device)

    def recorded(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph, as the engine records its steps; on a processor the call itself."""
        if self.device == "cpu":
            return call
        capture = CudaCapture(torch.device("cuda", 0))
        replay, _ = capture(call)

        def held(reads: Any = (call, capture)) -> None:  # what a graph reads lives as long as it
            replay()

        return held

    def milliseconds(self, call: Callable[[], Any], seconds: float) -> float:
        """Of one call, the median of five groups of calls within so many seconds, after one that does not count."""
        call()
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        many = max(1, min(100, int(seconds / 5 / max(time.perf_counter() - began, 1e-5))))
        setting = []
        for _ in range(5):
            self.wait()
            began = time.perf_counter()
            for _ in range(many):
                call()
            self.wait()
            setting.append(1e3 * (time.perf_counter() - began) / many)
        return sorted(setting)[2]


def tried(name: str, call: Callable[[], Row], **more: Any) -> Row:
    """The row of a call that may fail: then it says how. Out of memory is an answer too."""
    try:
        return {"name": name, "ok": True, **more, **call()}
    except torch.OutOfMemoryError as error:
        common.release()
        return {"name": name, "ok": False, **more, "error": f"out of memory: {str(error)[:200]}"}
    except Exception as error:
        traceback.print_exc()
        return {
            "name": name,
            "ok": False,
            **more,
            "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
        }


def each_within(setting: Setting, names: list[str], row: Callable[[str], Row], least: float = 1.0) -> Iterator[Row]:
    """A row for each name, as long as there is time; what was left out is said."""
    for number, name in enumerate(names):
        if setting.left < least:
            yield {"name": "left out", "ok": False, "error": f"no time for {', '.join(names[number:])}"}
            return
        yield row(name)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ceilings_of(setting: Setting) -> dict[str, Any] | None:
    """What `prepare` measured in this call, if it did."""
    path = setting.out / "results.json"
    steps = json.loads(path.read_text())["steps"] if path.exists() else []
    rows = [row for step in steps if step["step"] == "prepare" for row in step["rows"]]
    return next((row["ceilings"] for row in rows if "ceilings" in row), None)
