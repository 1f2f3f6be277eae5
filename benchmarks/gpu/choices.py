"""Prepared choices against what the package does by itself, each in a captured graph, its bits beside the default's.

Every operation of a pass is timed with its own tile sizes and with each of `ALTERNATIVES`, on weights that no cache
holds. What is at least 2 % faster for one canvas, not slower for sixteen, and right, goes into tuned.json. Then whole
steps of six layers: with the table before and after, and with what can only be judged there (`WHOLE`).
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, ops
from benchmarks.gpu.alternatives import ALTERNATIVES, WHOLE, Config, Entry, entries
from benchmarks.gpu.compile import Compiling, Wanted, chip_of
from benchmarks.gpu.kernels import packed
from benchmarks.gpu.setting import Row, Setting, tried
from benchmarks.step import Steps
from sfumato.config import ModelConfig
from sfumato.measure.capture import Variant
from sfumato.model import Model
from sfumato.ops import load
from sfumato.ops.packed import Packed
from sfumato.ops.triton import tuning

FASTER, NO_SLOWER, RIGHT = 0.98, 1.03, 0.02
COLD = 200 * 2**20
"""Bytes of weights that a graph goes through: four times an H200's L2 cache."""


def run(setting: Setting, kind: str) -> Iterator[Row]:
    config, tried_ = setting.config(2), {op: each[:1] if setting.is_dry else each for op, each in ALTERNATIVES.items()}
    each = list(dict.fromkeys(entries(config, kind)))
    yield _compiled(setting, config, kind, {entry.op: tried_[entry.op] for entry in each})
    before = json.loads(tuning.TABLE.read_text()) if tuning.TABLE.exists() else {}
    won, until = 0, setting.left
    for entry in each:
        if setting.left < 0.3 * until:
            yield {"name": f"{entry.name}", "skipped": "no time; whole steps come first"}
            continue
        row = tried(entry.name, lambda entry=entry: _best(setting, entry, tried_[entry.op]))  # type: ignore[misc]
        won += bool(row.get("chosen"))
        yield row
        common.release()
    yield {"name": "tiles", "says": f"{kind}: {won} of {len(each)} tile sizes changed"}
    yield from whole(setting, kind, before)


def _compiled(setting: Setting, config: ModelConfig, kind: str, each: dict[str, tuple[Config, ...]]) -> Row:
    """All cores compile what is tried, as `prepare` does."""
    if find_spec("triton") is None:
        return {"name": "compile", "skipped": "triton is not installed"}
    one = Variant(kind.replace("bf16", ""))
    wanted = [Wanted(config, one, {op: values}) for op, some in each.items() for values in some]
    wanted += [Wanted(config, one, values) for values in WHOLE.values()]
    wanted, most = (wanted[:2], 0) if setting.is_dry else (wanted, None)
    found = Compiling(wanted, chip_of(setting), time.time() + 0.3 * setting.left, most).wait()
    says = f"{found['compiled']} compiled"  # a choice that cannot be compiled is none, not a fault
    return {"name": "compile", "says": says, **found}


# ---- one operation ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _best(setting: Setting, entry: Entry, each: tuple[Config, ...]) -> dict[str, Any]:
    """Microseconds of the default and of each alternative; the best that is allowed goes into the table."""
    call, count = call_of(setting, entry, 256)
    default, out = _timed(setting, call, count)
    rows: list[dict[str, Any]] = []
    for values in each:
        row: dict[str, Any] = {"values": values}
        try:
            with tuning.using(entry.op, **values):
                row["us"], got = _timed(setting, call, count)
            row["same_bits"], row["difference"] = bool(torch.equal(got, out)), ops.relative(got, out)
        except Exception as error:  # it does not fit this GPU, or the operation does not know it
            row["cannot"] = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        rows.append(row)
    fast = [row for row in rows if row.get("us", math.inf) < FASTER * default and row["difference"] <= RIGHT]
    chosen = next((row for row in sorted(fast, key=lambda row: row["us"]) if _is_fine(setting, entry, row)), None)
    found: dict[str, Any] = {"default_us": default, "tried": rows, "chosen": chosen and chosen["values"]}
    if chosen is not None:
        _note(setting, entry, chosen)
        found["gain"] = default / chosen["us"] - 1
    return found


def _timed(setting: Setting, call: Callable[[], Tensor], count: int) -> tuple[float, Tensor]:
    """Microseconds of one of the `count` products that a call is; what the last of them gave."""
    out = call().clone()
    return 1e3 * setting.milliseconds(setting.recorded(call), 0.05) / count, out


def _is_fine(setting: Setting, entry: Entry, row: dict[str, Any]) -> bool:
    """Whether sixteen canvases are not slower either."""
    if setting.is_dry or entry.op in ("attention", "read_out", "read_out_walk", "soft_embedding"):
        return True
    call, count = call_of(setting, entry, 4096)
    default, _ = _timed(setting, call, count)
    with tuning.using(entry.op, **row["values"]):
        row["of_default_at_16"] = _timed(setting, call, count)[0] / default
    return bool(row["of_default_at_16"] <= NO_SLOWER)


def _note(setting: Setting, entry: Entry, row: dict[str, Any]) -> None:
    """Into the table, by `tuning.tune` with what was measured already."""
    if find_spec("triton") is not None:
        measured = [row["values"]]
        tuning.tune(
            entry.op,
            entry.shape,
            entry.dtype,
            setting.device,
            lambda: None,
            measured,
            tuning.TABLE,
            lambda _: row["us"],
        )


def call_of(setting: Setting, entry: Entry, rows: int) -> tuple[Callable[[], Tensor], int]:
    """The operation that looks this entry up, over enough sets of weights that none stays in a cache; and how many."""
    if setting.is_dry:
        rows = 8
    if entry.op in ("attention", "read_out", "read_out_walk", "soft_embedding"):
        return _case(setting, entry), 1
    values = math.prod(entry.shape) * (3 if entry.op == "gate_up" else 1)
    count = 1 if setting.is_dry else max(1, min(16, round(COLD / (values * (0.5 if entry.form == "int4" else 1)))))
    weight = lambda *shape, seed=0: packed(  # noqa: E731
        ops.exactly(*shape, seed=seed, scale=0.05, device=setting.device), entry.form
    )
    x = lambda width: ops.exactly(rows, width, device=setting.device).bfloat16()  # noqa: E731
    shape = entry.shape
    sets: list[tuple[Any, ...]]
    if entry.op == "linear":
        sets = [(weight(*shape, seed=n),) for n in range(count)]
    elif entry.op == "gate_up":
        sets = [tuple(weight(*at, seed=n) for at in (shape, shape, shape[::-1])) for n in range(count)]  # type: ignore[misc]
    else:
        experts, width, inner = (shape[0], shape[2], shape[1] // 2) if entry.op == "experts_gate_up" else shape
        sets = [
            (weight(experts, 2 * inner, width, seed=n), weight(experts, width, inner, seed=n)) for n in range(count)
        ]
    some = [one for one in sets[0] if isinstance(one, Packed)]
    record = load(setting.ops(torch.bfloat16, some), setting.device, torch.bfloat16)
    ready = [tuple(record.pack(one) for one in each) for each in sets]
    del sets
    if entry.op == "linear":
        x_NI = x(shape[1])
        return lambda: [record.linear(x_NI, *each)[0] for each in ready][-1], count
    if entry.op == "gate_up":
        x_ND = x(shape[1])
        return lambda: [record.feed_forward(x_ND, *each) for each in ready][-1], count
    x_ND, top = x(width), 2 if setting.is_dry else 8
    score = torch.rand(rows, experts, generator=torch.Generator(setting.device).manual_seed(0), device=setting.device)
    index = score.topk(top)[1]
    each_NJ = torch.full((rows, top), 1 / top, device=setting.device)
    return lambda: [record.experts(x_ND, index, each_NJ, *each) for each in ready][-1], count


def _case(setting: Setting, entry: Entry) -> Callable[[], Tensor]:
    file = entry.op.removesuffix("_walk")
    record = load(setting.ops(torch.bfloat16), setting.device, torch.bfloat16)
    for case in importlib.import_module(f"benchmarks.ops.{file}").cases(
        "tiny" if setting.is_dry else "released", setting.device
    ):
        if file != "attention" or (case.inputs["q"].shape[-1] == entry.shape[0] and "denoise" in case.name):
            return case.ready(record, torch.bfloat16)
    raise ValueError(f"no case of {entry.name}")


# ---- whole steps -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def whole(setting: Setting, kind: str, before: dict[str, Any]) -> Iterator[Row]:
    """Steps of six layers, of one canvas and of sixteen: as they were, with the new table, with each of `WHOLE`."""
    if setting.left < 3:
        yield {"name": "whole steps", "ok": False, "error": "no time"}
        return
    model, several = setting.model(kind, 6), dict([*WHOLE.items()][:1]) if setting.is_dry else WHOLE
    after, is_slower = tuning.TABLE, False
    old = after.with_name("before.json")
    old.write_text(json.dumps(before))
    try:
        for batch in (1, 2) if setting.is_dry else (1, 16):
            tuning.TABLE = old
            base = tried(f"{kind} batch {batch}: as it was", lambda batch=batch: _steps(setting, model, batch, {}))  # type: ignore[misc]
            tuning.TABLE = after
            shown = base.pop("state", None)
            yield base
            for name, values in {"the new table": {}, **several}.items():
                if setting.left < 2:
                    yield {"name": f"{kind} batch {batch}: {name}", "skipped": "no time"}
                    continue
                row = tried(
                    f"{kind} batch {batch}: {name}",
                    lambda batch=batch, values=values: _steps(setting, model, batch, values),  # type: ignore[misc]
                )
                state = row.pop("state", None)
                if state is not None and shown is not None:
                    row["of_base"] = row["ms"] / base["ms"]
                    row["same_bits"] = all(torch.equal(a, b) for a, b in zip(state, shown, strict=True))
                    row["entropy_difference"] = ops.relative(state[1], shown[1])
                    row["says"] = f"batch {batch} {name} {row['of_base'] - 1:+.0%}"
                    is_slower |= batch == 1 and name == "the new table" and row["of_base"] > 1.01
                row["ok"] = None  # what does not fit this GPU is no fault
                yield row
                common.release()
    finally:
        if is_slower and not setting.is_dry:  # each is faster by itself and the step is not: nothing of it is kept
            after.write_text(json.dumps(before))
            yield {"name": "tuned.json", "says": f"{kind}: put back, the step was slower"}
        old.unlink(missing_ok=True)


def _steps(setting: Setting, model: Model, batch: int, using: dict[str, Config]) -> dict[str, Any]:
    """Milliseconds of a captured step, and what the first one shows: argmax, entropies, soft embedding."""
    torch.manual_seed(0)
    with ExitStack() as stack:
        for op, values in using.items():
            stack.enter_context(tuning.using(op, **values))
        steps = Steps(model, 16 if setting.is_dry else 1024, batch)
        steps()
        state = [x[:batch].clone() for x in (steps.state.argmax_XL, steps.state.entropy_XL, steps.state.soft_XLD)]
        ms = setting.milliseconds(setting.recorded(steps), 0.02 if setting.is_dry else 0.3)
    return {"ms": ms, "state": state}
