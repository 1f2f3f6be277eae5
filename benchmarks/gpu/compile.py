"""All cores compile what steps will launch, before they do, and without the GPU.

A step runs on meta tensors that stand for the GPU's: every launch is seen with the very arguments that the GPU will
get, and is compiled into TRITON_CACHE_DIR instead of run. Workers are forked, share the work through files that only
one of them can create, end by themselves, and never touch the device. What is missed here is compiled when it is first
launched, one kernel after the other.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
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
from sfumato import weights
from sfumato.cache import KVCache
from sfumato.config import ModelConfig
from sfumato.diffusion import Rules
from sfumato.events import Options
from sfumato.model import Model, Pass, pack_, products, replace_
from sfumato.ops.packed import Packed
from sfumato.quant.formats import FORMATS, Format
from sfumato.quant.recipes import RECIPES, Recipe, named
from sfumato.step import Canvases, step_

Chip = tuple[str, int]
"""A GPU's name and architecture: ("NVIDIA H200", 90)."""
H200: Chip = ("NVIDIA H200", 90)


@dataclass(frozen=True)
class Wanted:
    """A step that will run: its model, its size, and the tile sizes it is tried with."""

    config: ModelConfig
    kind: str = "bf16"
    """A dtype, a recipe, or a format for every product."""
    batch: int = 1
    is_encode: bool = False
    has_bans: bool = False
    is_early: bool = False
    has_pins: bool = False
    using: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Operation -> what it takes in place of its own."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.kind == "float32" else torch.bfloat16


def of_nano() -> list[Wanted]:
    config = ModelConfig.from_file(weights.resolve("nano") / "config.json")
    kinds = [{}, {"has_pins": True}, {"is_early": True, "has_pins": True}, {"has_bans": True}]
    return [
        Wanted(config, "float32", batch, is_encode, **more)  # type: ignore[arg-type]
        for more in kinds
        for batch in (1, 8)
        for is_encode in (True, False)
    ]


def of_steps(config: ModelConfig, kinds: Sequence[str], batches: Sequence[int] = (1, 16)) -> list[Wanted]:
    return [Wanted(config, kind, batch, has) for kind in kinds for batch in batches for has in (False, True)]


# ---- a step on meta tensors ------------------------------------------------------------------------------------------


@torch.inference_mode()
def run_on_meta(wanted: Wanted) -> None:
    """The step, with nothing behind its tensors."""
    from sfumato.ops import triton as operations
    from sfumato.ops.triton import tuning

    model, config, batch = meta_model(wanted.config, wanted.kind, operations.record()), wanted.config, wanted.batch
    length = config.canvas_length
    cache = KVCache.allocate(config, batch, 2048, "meta", model.dtype)
    early = [wanted.is_early] * batch
    nothing = [0] * batch
    state = Canvases.allocate(model, [Rules.of(Options())] * batch, nothing, nothing, length, early, wanted.has_pins)
    at_B = torch.full((batch,), batch, device="meta")
    places = tuple(torch.zeros_like(at_B) for _ in range(3))
    encode = length if wanted.is_encode else 0
    tokens_BT = torch.zeros(batch, encode, dtype=torch.long, device="meta") if encode else None
    bans = torch.zeros(3, dtype=torch.long, device="meta") if wanted.has_bans else None
    with ExitStack() as stack:
        for op, values in wanted.using.items():
            stack.enter_context(tuning.using(op, **values))
        run = Pass(model, cache, nothing, [encode] * batch, encode, length, places)  # type: ignore[arg-type]
        step_(model, cache, state, at_B, run, tokens_BT, bans=bans)


def meta_model(config: ModelConfig, kind: str, ops: Any) -> Model:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    with torch.device("meta"):
        model = Model(config, ops).to(dtype)
    if kind in (*RECIPES, *FORMATS):
        recipe = named(kind) if kind in RECIPES else Recipe(kind, (("*", kind),))
        names = {module: name for name, module in model.named_modules()}
        for owner, leaf in list(products(model)):
            if form := recipe.format_of(f"{names[owner]}.{leaf}"):
                replace_(owner, leaf, _nothing_in(form, tuple(getattr(owner, leaf).shape)))
    pack_(model, ops)
    return model.requires_grad_(False).eval()


def _nothing_in(form: Format, shape: tuple[int, ...]) -> Packed:
    parts = {name: torch.empty(size, dtype=dtype, device="meta") for name, (dtype, size) in form.parts(shape).items()}
    group = form.group or (128 if form.scales == "block" else shape[-1])
    return Packed(form.kind, shape, parts["data"], parts["scale"], group, parts.get("bias"), parts.get("factor"))


# ---- workers ---------------------------------------------------------------------------------------------------------


class Compiling:
    """Workers that compile for this GPU until `until`, or, where `most` is given, so many kernels each."""

    def __init__(self, each: Sequence[Wanted], chip: Chip, until: float, most: int | None = None) -> None:
        self.each, self.chip, self.until, self.most = list(each), chip, until, most
        self.folder = Path(tempfile.mkdtemp())
        import sfumato.ops.triton as operations

        list(_modules(operations))  # here, once, not in every worker
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
        shutil.rmtree(self.folder, ignore_errors=True)
        made = [row for row in rows if "seconds" in row]
        done = {row["finished"] for row in rows if "finished" in row}
        found = {
            "compiled": len(made),
            "seconds_of_all_workers": round(sum(row["seconds"] for row in made), 1),
            "slowest": sorted(made, key=lambda row: -row["seconds"])[:5],
            "left_kernels": [row["left"] for row in rows if "left" in row],
            "left_steps": len(self.each) - len(done),
        }
        errors = {row["error"] for row in rows if "error" in row}
        return found | ({"errors": sorted(errors)} if errors else {})

    def _work(self, number: int, count: int) -> None:
        """In a worker: first whole steps that nobody has, then what is left of others' steps."""
        with (self.folder / f"rows-{number}").open("a", buffering=1) as rows:
            _stand_in(self.chip)
            _compile_instead(self, rows)
            start = number * len(self.each) // count
            order = [(start + n) % len(self.each) for n in range(len(self.each))]
            mine = (index for index in order if self.claim(f"step-{index}"))
            for index in [*mine, *order]:
                if time.time() > self.until:
                    break
                if (self.folder / f"finished-{index}").exists():
                    continue
                try:
                    run_on_meta(self.each[index])
                    (self.folder / f"finished-{index}").touch()
                    print(json.dumps({"finished": index}), file=rows)
                except TimeoutError:
                    break
                except Exception as error:  # this step is not possible, others are
                    (self.folder / f"finished-{index}").touch()
                    print(json.dumps({"error": _line(self.each[index], error), "finished": index}), file=rows)

    def claim(self, name: str) -> bool:
        """Whether nobody had it before."""
        try:
            os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def _line(wanted: Wanted, error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{wanted.kind}, batch {wanted.batch}, {dict(wanted.using)}: {type(error).__name__}: {text[:200]}"


def _stand_in(chip: Chip) -> None:
    """In this process: triton compiles for that GPU, and operations take meta tensors for tensors on it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    import sfumato.ops.triton as operations

    class NoDevice:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", chip[1], 32)

    driver.set_active(NoDevice())
    for module in _modules(operations):
        if hasattr(module, "chip"):
            module.chip = lambda device: chip  # type: ignore[attr-defined]
        if hasattr(module, "has_fp8"):
            module.has_fp8 = lambda device: chip[1] >= 89  # type: ignore[attr-defined]


def _modules(package: Any) -> Iterator[Any]:
    for one in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{one.name}")


def _compile_instead(shared: Compiling, rows: Any) -> None:
    """In this process: a launch compiles, if no other worker has it, and runs nothing."""
    from triton.runtime import jit

    run, count = jit.JITFunction.run, 0

    def compile_(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **more: Any) -> None:
        nonlocal count
        if time.time() > shared.until:
            raise TimeoutError
        _, specialization, options = self.device_caches[0][-1](*args, **more)
        name = self.fn.__name__
        key = hashlib.sha256(f"{self.fn.__module__}.{name} {specialization} {options}".encode()).hexdigest()
        if not shared.claim(key):
            return
        if shared.most is not None and count >= shared.most:
            print(json.dumps({"left": name}), file=rows)
            return
        began, count = time.perf_counter(), count + 1
        try:
            run(self, *args, grid=grid, warmup=True, **more)
            print(json.dumps({"kernel": name, "seconds": round(time.perf_counter() - began, 2)}), file=rows)
        except Exception as error:
            print(json.dumps({"error": f"{name}: {' '.join(str(error).split())[-300:]}"}), file=rows)

    jit.JITFunction.run = compile_


def chip_of(setting: Setting) -> Chip:
    """The GPU that is compiled for."""
    from sfumato.ops.triton import tuning

    return H200 if setting.is_dry else tuning.chip("cuda:0")
