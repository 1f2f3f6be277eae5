"""Prepared choices against what the package does by itself, in whole captured steps, their bits beside the default's.

Six layers of the released size with the whole vocabulary, one canvas, recorded as the engine records them: no kernel
finds its weights in a cache that it would not find there in earnest. Entry by entry of the table, each alternative
takes turns with the best so far. What is faster for one canvas, not slower for sixteen, and right, is kept, and
tuned.json is written at once. Then the choices that are no number of the table: told, not kept.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, ops
from benchmarks.gpu.alternatives import ALTERNATIVES, APART, WITHOUT, Config, Entry, entries, standing
from benchmarks.gpu.compile import Compiling, Step, chip_of
from benchmarks.gpu.setting import Row, Setting, tried
from benchmarks.step import Steps
from sfumato.measure.capture import Variant
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model
from sfumato.ops.triton import tuning

FASTER, NO_SLOWER, RIGHT = 0.997, 1.005, 0.02
"""Of the time of a whole step; and of its entropies, relatively."""
MANY = 16
"""Canvases that may not be slower."""
Table = dict[str, dict[str, Config]]
"""Operation -> shape and dtype as `tuning.key` spells them -> values."""
Recorded = tuple[Callable[[], Any], list[Tensor]]
"""A step to replay; argmax, entropies and soft embedding of the first."""


def run(setting: Setting, kind: str) -> Iterator[Row]:
    config, short = setting.config(2), 1 if setting.is_dry else None
    each = {entry: ALTERNATIVES[entry.op][:short] for entry in entries(config, kind)}
    yield _compiled(setting, config, kind, {entry.op: values for entry, values in each.items()})
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(setting, setting.model(kind, 6), Path(folder))
        share, kept = setting.left, 0
        for entry, values in each.items():
            if setting.left < 0.3 * share:  # whole steps of other kinds come first
                yield {"name": entry.name, "skipped": "no time"}
                continue
            row = tried(entry.name, lambda entry=entry, values=values: trial.best(entry, values))  # type: ignore[misc]
            kept += bool(row.get("chosen"))
            yield row
        yield {"name": "tiles", "says": f"{kind}: {kept} of {len(each)} tile sizes changed"}
        for batch in (1, 2 if setting.is_dry else MANY):
            yield tried(f"{kind} batch {batch}: the new table", lambda batch=batch: trial.table(batch))  # type: ignore[misc]
            for name in (*APART, *WITHOUT):
                if setting.left < 2:
                    yield {"name": f"{kind} batch {batch}: {name}", "skipped": "no time"}
                    continue
                row = tried(f"{kind} batch {batch}: {name}", lambda batch=batch, name=name: trial.apart(name, batch))  # type: ignore[misc]
                yield row if "skipped" not in row else {"name": row["name"], "skipped": row["skipped"]}


def _compiled(setting: Setting, config: ModelConfig, kind: str, each: dict[str, tuple[Config, ...]]) -> Row:
    """All cores compile what is tried, as `prepare` does."""
    if find_spec("triton") is None:
        return {"name": "compile", "skipped": "triton is not installed"}
    one = Variant(kind.replace("bf16", ""))
    steps = [Step(config, one, {op: values}) for op, some in each.items() for values in some]
    steps, most = (steps[:2], 0) if setting.is_dry else (steps, None)
    result = Compiling(steps, chip_of(setting), time.time() + 0.3 * setting.left, most).wait()
    says = f"{result['compiled']} compiled"  # a choice that cannot be compiled is none, not a fault
    return {"name": "compile", "says": says, **result}


class Trial:
    """Steps of one model under one table after another. `known` is the table so far."""

    def __init__(self, setting: Setting, model: Model, folder: Path) -> None:
        self.setting, self.model, self.folder = setting, model, folder
        self.target = tuning.TABLE
        self.chip = tuning.chip("cpu" if setting.device == "cpu" else "cuda:0")[0]
        self.whole: dict[str, Table] = json.loads(self.target.read_text()) if self.target.exists() else {}
        self.before, self.known = (json.loads(json.dumps(self.whole.get(self.chip, {}))) for _ in range(2))
        self.count = itertools.count()
        self._base: Recorded | None = None

    def best(self, entry: Entry, each: tuple[Config, ...]) -> dict[str, Any]:
        """Each alternative in turns with what is known; the fastest that is right becomes known, and is written."""
        base = self._base = self._base or self.recorded(self.known, 1)
        rows: list[dict[str, Any]] = []
        for values in each:
            row: dict[str, Any] = {"values": values}
            try:
                other = self.recorded(self._with(entry, values), 1)
                row |= self.beside(base, other)
                del other
            except Exception as error:  # it does not fit this GPU
                row["cannot"] = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            rows.append(row)
            common.release()
        fast = [row for row in rows if row.get("of_base", math.inf) < FASTER and row["entropy_difference"] <= RIGHT]
        chosen = next((row for row in sorted(fast, key=lambda row: row["of_base"]) if self._is_fine(entry, row)), None)
        if chosen is not None:
            self.known, self._base = self._with(entry, chosen["values"]), None
            self.write()
        return {"tried": rows, "chosen": chosen and chosen["values"], "of_base": chosen and chosen["of_base"]}

    def _is_fine(self, entry: Entry, row: dict[str, Any]) -> bool:
        """Whether it is as fast again, and sixteen canvases are not slower."""
        if self.setting.is_dry:
            return True
        values = self._with(entry, row["values"])
        for batch, limit in (1, FASTER), (MANY, NO_SLOWER):
            result = self.beside(self.recorded(self.known, batch), self.recorded(values, batch))
            row[f"again at {batch}"] = result["of_base"]
            common.release()
            if result["of_base"] > limit:
                return False
        return True

    def table(self, batch: int) -> dict[str, Any]:
        """The table of before beside that of now. If all of it together is slower, nothing of it is kept."""
        result = self.beside(self.recorded(self.before, batch), self.recorded(self.known, batch))
        common.release()
        says = f"batch {batch} the new table {result['of_base'] - 1:+.1%}"
        if batch == 1 and result["of_base"] > 1 / FASTER:
            self.known, says = self.before, f"{says}, put back"
            self.write()
        return result | {"says": says}

    def apart(self, name: str, batch: int) -> dict[str, Any]:
        """With a choice that is no number of the table, beside without it."""
        base = self.recorded(self.known, batch)
        with standing(name, self.model) as is_there:
            if not is_there:
                return {"skipped": "there is nothing to choose here"}
            result = self.beside(base, self.recorded(self.known, batch))
        common.release()
        return result | {"says": f"batch {batch} {name} {result['of_base'] - 1:+.1%}"}

    @torch.inference_mode()
    def recorded(self, table: Table, batch: int) -> Recorded:
        """A captured step under this table."""
        tuning.TABLE = self._file(table)
        try:
            torch.manual_seed(0)
            steps = Steps(self.model, 16 if self.setting.is_dry else 1024, batch)
            steps()
            state = [x[:batch].clone() for x in (steps.state.argmax_XL, steps.state.entropy_XL, steps.state.soft_XLD)]
            return self.setting.recorded(steps), state
        finally:
            tuning.TABLE = self.target

    @torch.inference_mode()
    def beside(self, base: Recorded, other: Recorded) -> dict[str, Any]:
        """Times in turns, and whether the first step's bits are the same."""
        times: tuple[list[float], list[float]] = ([], [])
        many = 1 if self.setting.is_dry else 6
        for _ in range(2 if self.setting.is_dry else 5):
            for (replay, _), result in zip((base, other), times, strict=True):
                self.setting.wait()
                began = time.perf_counter()
                for _ in range(many):
                    replay()
                self.setting.wait()
                result.append(1e3 * (time.perf_counter() - began) / many)
        before, after = (median(result) for result in times)
        return {
            "ms": after,
            "of_base": after / before,
            "same_bits": all(torch.equal(a, b) for a, b in zip(base[1], other[1], strict=True)),
            "entropy_difference": ops.relative(other[1][1], base[1][1]),
            "soft_difference": ops.relative(other[1][2], base[1][2]),
        }

    def write(self) -> None:
        common.write(self.target, {**self.whole, self.chip: self.known})

    def _with(self, entry: Entry, values: Config) -> Table:
        place, own = tuning.key(entry.shape, entry.dtype), self.known.get(entry.op, {})
        return {**self.known, entry.op: {**own, place: {**own.get(place, {}), **values}}}

    def _file(self, table: Table) -> Path:
        """A name of its own each time: `tuning` reads a file once."""
        path = self.folder / f"{next(self.count)}.json"
        path.write_text(json.dumps({self.chip: table}))
        return path
