"""All cores compile what steps will launch, before they do, and without the GPU.

A recorded step of nothing but shapes (`measure.capture.meta_step`) shows every launch with the arguments that the GPU
will get, and each is compiled into TRITON_CACHE_DIR. Workers are forked, share the work through files that only one of
them can create, end by themselves, and never touch the device. What is missed here is compiled when it is first
launched, one kernel after the other.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.setting import Setting, cores
from sfumato.checkpoints.locate import resolve
from sfumato.measure.capture import Variant, meta_step
from sfumato.model.config import ModelConfig
from sfumato.ops.triton import tuning
from sfumato.sampling.recorded import padded

Chip = tuple[str, int]
"""A GPU's name and architecture."""
H200: Chip = ("NVIDIA H200", 90)


@dataclass(frozen=True)
class ToCompile:
    """A step that will run, and the tile sizes that it is tried with."""

    config: ModelConfig
    variant: Variant
    using: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Operation -> what it takes in place of its own."""

    @property
    def name(self) -> str:
        return f"{self.variant}, {dict(self.using)}" if self.using else str(self.variant)


def of_nano() -> list[ToCompile]:
    config = ModelConfig.from_file(resolve("nano") / "config.json")
    kinds: list[dict[str, Any]] = [
        {},
        {"has_pins": True},
        {"has_early": True, "has_pins": True},
        {"bans": padded(len(config.eos_ids))},
    ]
    return [
        ToCompile(config, Variant(rows=rows, is_encoding=is_encoding, dtype=torch.float32, **more))
        for more in kinds
        for rows in (1, 8)
        for is_encoding in (True, False)
    ]


def of_steps(
    config: ModelConfig, kinds: Sequence[str], batches: Sequence[int] = (1, 16), rank: int = 0
) -> list[ToCompile]:
    return [
        ToCompile(config, Variant(kind.replace("bf16", ""), rows, is_encoding, rank=rank))
        for kind in kinds
        for rows in batches
        for is_encoding in (False, True)
    ]


class Compiling:
    """Workers that compile for this GPU until `until`, or, where `most` is given, so many kernels each."""

    def __init__(self, each: Sequence[ToCompile], chip: Chip, until: float, most: int | None = None) -> None:
        from sfumato.ops.triton import record

        self.each, self.chip, self.until, self.most = list(each), chip, until, most
        self.ops = record()  # triton is imported here, once, not in every worker
        self.folder = Path(tempfile.mkdtemp())
        context = multiprocessing.get_context("fork")
        count = min(cores(), max(1, len(self.each)))
        self.workers = [context.Process(target=self._work, args=(n, count), daemon=True) for n in range(count)]
        for worker in self.workers:
            worker.start()

    def wait(self) -> dict[str, Any]:
        """Until all have ended, or their time is over: what was compiled, what was left, what cannot be."""
        for worker in self.workers:
            worker.join(max(0.1, self.until - time.time() + 1))
            if worker.is_alive():
                worker.kill()
                worker.join()
        rows = [json.loads(line) for path in self.folder.glob("rows-*") for line in path.read_text().splitlines()]
        finished = len(list(self.folder.glob("finished-*")))
        shutil.rmtree(self.folder, ignore_errors=True)
        compiled = [row for row in rows if "seconds" in row]
        result = {
            "compiled": len(compiled),
            "seconds_of_all_workers": round(sum(row["seconds"] for row in compiled), 1),
            "slowest": sorted(compiled, key=lambda row: -row["seconds"])[:5],
            "left_kernels": [row["left"] for row in rows if "left" in row],
            "left_steps": len(self.each) - finished,
        }
        errors = sorted({row["error"] for row in rows if "error" in row})
        return result | ({"errors": errors} if errors else {})

    def _work(self, number: int, count: int) -> None:
        """In a worker: first whole steps that nobody has, then what is left of others' steps."""
        from sfumato.ops.triton.launches import as_if

        self._take_the_table()
        start = number * len(self.each) // count
        order = [(start + n) % len(self.each) for n in range(len(self.each))]
        mine = (index for index in order if self._claim(f"step-{index}"))
        compiled = 0
        with (self.folder / f"rows-{number}").open("a", buffering=1) as rows, as_if(self.chip[1]):
            for index in [*mine, *order]:
                if (self.folder / f"finished-{index}").exists():
                    continue
                try:
                    for row in self._compile(self.each[index], compiled):
                        compiled += "seconds" in row
                        print(json.dumps(row), file=rows)
                except Exception as error:  # this step is not possible, others are
                    print(json.dumps({"error": f"{self.each[index].name}: {_line(error)}"}), file=rows)
                if time.time() > self.until:
                    return
                (self.folder / f"finished-{index}").touch()

    def _compile(self, step: ToCompile, compiled: int) -> Iterator[dict[str, Any]]:
        """A row for each kernel of this step that no other worker has."""
        with ExitStack() as stack:
            for op, values in step.using.items():
                stack.enter_context(tuning.using(op, **values))
            nodes = [node for watched in meta_step(step.config, self.ops, step.variant) for node in watched.nodes]
            for launch in (node.launch for node in nodes if node.is_kernel):
                if time.time() > self.until:
                    return
                if not self._claim(_key(launch)):
                    continue
                if self.most is not None and compiled >= self.most:
                    yield {"left": launch.name}
                    continue
                began, compiled = time.perf_counter(), compiled + 1
                try:
                    _with_its_launcher(launch.compiled())
                    yield {"kernel": launch.name, "seconds": round(time.perf_counter() - began, 2)}
                except Exception as error:
                    yield {"error": f"{launch.name} {launch.sizes}: {_line(error)}"}

    def _claim(self, name: str) -> bool:
        """Whether nobody had it before."""
        try:
            os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _take_the_table(self) -> None:
        """In a worker: what is known of the GPU counts for the tensors that stand for its."""
        if tuning.TABLE.exists():
            table = json.loads(tuning.TABLE.read_text())
            tuning.TABLE = self.folder / f"table-{os.getpid()}.json"
            tuning.TABLE.write_text(json.dumps({"meta": table.get(self.chip[0], {})}))


def _with_its_launcher(kernel: Any) -> None:
    """Triton builds a small C library for each signature, at the first launch; it needs the driver's."""
    if torch.cuda.is_available():
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)


def _key(launch: Any) -> str:
    """The same for launches that are one kernel: sizes, and of each argument what a compiler makes use of."""
    kinds = [
        (str(one.dtype), one.data_ptr() % 16)
        if isinstance(one, torch.Tensor)
        else (one == 1, one % 16 == 0)
        if type(one) is int
        else str(one)
        for one in launch.arguments
    ]
    sizes = sorted((name, str(value)) for name, value in launch.sizes.items())
    return hashlib.sha256(f"{launch.name} {sizes} {kinds}".encode()).hexdigest()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def chip_of(setting: Setting) -> Chip:
    """The GPU that is compiled for."""
    return H200 if setting.is_dry else tuning.chip("cuda:0")
