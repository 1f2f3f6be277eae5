"""Every operation at the released size, by kind of weights, against the reference: all that it returns, not one of it.

The measure is float32 on the very weights that are packed. Nothing may be more than twice as far from it as plain
PyTorch in bfloat16 is, but where x too is rounded to 8 bits; and the first row has the same bits alone.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, ops
from benchmarks.gpu.interpreted import in_a_child
from benchmarks.gpu.setting import FILES, Row, Setting, each_within, tried
from benchmarks.ops.norms import SIZES as NORMS
from sfumato.ops import load
from sfumato.ops.contract import NEVER, Ops
from sfumato.ops.packed import Packed, dense
from sfumato.quant import formats

USED, RARE = ("", "int4", "int8", "fp8"), ("nvfp4", "mxfp4", "int4-asym")
EXACT_ENOUGH = {"fp8": 0.08, "int8": 0.06}
"""Relative error where what is multiplied is rounded to 8 bits too."""
LEAST = {"soft_embedding": 2e-3}
"""Of the error that is allowed: eps / 4 for tiles that may be left out."""
TOGETHER = {"nvfp4": 16, "mxfp4": 32, "int4": 2, "int4-asym": 2}
"""Inputs that these kinds pack together."""
SOFTCAP, BORDER = 30.0, 2e-3
"""How far a sample's place in the distribution may be off, in bfloat16 over the whole vocabulary."""

ROWS = 1021
Outputs = dict[str, Tensor]


def run(setting: Setting, _: str) -> Iterator[Row]:
    """What the recipes use first."""
    size = "tiny" if setting.is_dry else "released"
    count, worst = 0, (0.0, "")
    for row in _rows(setting, size):
        for part, one in row.get("errors", {}).items():
            count, worst = count + 1, max(worst, (one["error"] / one["bound"], f"{row['name']} {part}".strip()))
        yield row
    if setting.is_dry:
        yield in_a_child(setting)
    yield {"name": "worst", "says": f"{count} outputs; {worst[1]} takes {worst[0]:.0%} of its bound"}


def _rows(setting: Setting, size: str) -> Iterator[Row]:
    for kinds in (USED, RARE):
        for op in FILES:
            if op == "read_out":
                if kinds is USED:
                    yield tried("read_out", lambda: read_out(setting, size))
                continue
            for case in importlib.import_module(f"benchmarks.ops.{op}").cases(size, setting.device):
                named = {f"{op}: {case.name}, {kind or 'bf16'}": kind for kind in kinds if _takes(case, kind)}
                row = lambda name, op=op, case=case, named=named: tried(  # noqa: E731
                    name, lambda: check(setting, op, case, named[name], NORMS[size][-1])
                )
                yield from each_within(setting, list(named), row)
                del case
            common.release()


def _takes(case: ops.Case, kind: str) -> bool:
    is_other = not kind or (case.quantised and bool(case.weights))
    return is_other and all(w.shape[-1] % TOGETHER.get(kind, 1) == 0 for w in case.weights.values())


def outputs(op: str, case: ops.Case, implementation: Ops, x: dict[str, Any], w: dict[str, Any], top: int) -> Outputs:
    """All that this operation returns, by name. What a router chose becomes a matrix of weights by expert."""
    if op == "linear" and "gate" not in w:
        return dict(zip(w, implementation.linear(x["x"], *w.values()), strict=True))
    if case.name == "route":
        index, weight = implementation.route(x["x"], x["a"], x["router"], x["each"], top, 1e-6)
        chosen = torch.zeros(len(index), len(x["router"]), device=weight.device)
        return {"experts": chosen.scatter_(1, index.long(), weight.float())}
    return {"": case.prepare(implementation, x, w)()}


def packed(weight: Tensor, kind: str) -> Tensor | Packed:
    """In this format. Of a stack so many rows are really packed and stand for the others: the search for good scales
    is no part of what is checked."""
    weight = weight.bfloat16()
    if not kind or weight.dim() == 2:
        return formats.pack(weight, kind) if kind else weight
    rows, lead = weight.flatten(0, 1)[:ROWS], weight.shape[:-1]
    place = (torch.arange(math.prod(lead), device=weight.device) % len(rows)).view(lead)

    def repeated(part: Tensor) -> Tensor:
        if part.dtype == torch.float8_e4m3fn:  # which cannot be looked up everywhere
            return part.view(torch.uint8)[place].view(part.dtype)
        return part[place]

    return formats.pack(rows, kind).each(repeated, tuple(weight.shape))


@torch.inference_mode()
def check(setting: Setting, op: str, case: ops.Case, kind: str, top: int) -> dict[str, Any]:
    dtype, reference = torch.bfloat16, load("reference")
    codes = {name: packed(w, kind) for name, w in case.weights.items()}
    name = setting.ops(dtype, [code for code in codes.values() if isinstance(code, Packed)])
    record = load(name, setting.device, dtype)
    kept = {part: dense(code, torch.float32).float() for part, code in codes.items()}
    exact = outputs(op, case, reference, case.cast(torch.float32), kept, top)
    kept = {part: w.to(dtype) for part, w in kept.items()}
    plain = outputs(op, case, reference, case.cast(dtype), kept, top)
    del kept
    ready = {part: record.pack(code) for part, code in codes.items()}
    got = outputs(op, case, record, case.cast(dtype), ready, top)
    alone = {} if case.rows is None else outputs(op, case, record, case.cast(dtype, case.rows(case.inputs)), ready, top)
    row: dict[str, Any] = {"ops": name, "ok": True, "errors": {}}
    for part, out in got.items():
        error, allowed = ops.relative(out, exact[part]), ops.relative(plain[part], exact[part])
        bound = EXACT_ENOUGH.get(kind, max(2 * allowed, LEAST.get(op, 2e-6)))
        row["errors"][part] = {"error": error, "bound": bound}
        row["ok"] &= math.isfinite(error) and error <= bound
        if part in alone:
            one = alone[part]
            same = out[:1] if len(out) > len(one) or out.shape == one.shape else out[:, :1]
            row["first_row_same_bits"] = bool(torch.equal(one, same)) and row.get("first_row_same_bits", True)
            row["ok"] &= row["first_row_same_bits"]
    return row


# ---- the read-out ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def read_out(setting: Setting, size: str) -> dict[str, Any]:
    """Logits, entropy, argmax and sample; with bans and without; a row alone."""
    from benchmarks.ops.read_out import cases

    case, dtype, reference = next(iter(cases(size, setting.device))), torch.bfloat16, load("reference")
    name = setting.ops(dtype)
    record, x = load(name, setting.device, dtype), case.cast(dtype)
    wide = case.cast(torch.float32)
    words, length = x["embed"].shape[0], x["uniform"].shape[1]
    position_L = torch.arange(length, device=setting.device)
    banned = (
        (position_L[None] % 3 == 0).expand(x["uniform"].shape),
        torch.tensor([0, 7, words - 1], device=setting.device),
    )

    def read(implementation: Ops, x: dict[str, Any], banned: tuple[Tensor, Tensor] | None = None, rows: int = 9) -> Any:
        hidden, temperature, uniform = (x[name][:rows] for name in ("hidden", "temperature", "uniform"))
        banned = banned and (banned[0][:rows], banned[1])
        return implementation.read_out(hidden, x["embed"], SOFTCAP, temperature, uniform_BL=uniform, banned=banned)

    wrong: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for what, bans in ("plain", None), ("banned", banned):
        exact, fast, rough = read(reference, wide, bans), read(record, x, bans), read(reference, x, bans)
        logits = exact.logits_BLV
        live = logits > NEVER / 2
        for part, limit in ("logits_BLV", 0.0), ("entropy_BL", 2e-6):
            values = [getattr(each, part).float() for each in (fast, rough, exact)]
            if part == "logits_BLV":
                values = [torch.where(live, value, 0.0) for value in values]
            error, allowed = ops.relative(values[0], values[2]), ops.relative(values[1], values[2])
            errors[f"{what} {part}"] = {"error": error, "bound": max(2 * allowed, limit)}
            if not error <= max(2 * allowed, limit):
                wrong[f"{what} {part}"] = error
        wrong |= _places(what, fast, logits, x["uniform"], bans)
        if not torch.equal(read(record, x, bans, 1).logits_BLV, fast.logits_BLV[:1]):
            wrong[f"{what}, first row alone"] = "other bits"
        if bans is None:
            free = fast.logits_BLV[:, position_L % 3 != 0]
        elif not torch.equal(free, fast.logits_BLV[:, position_L % 3 != 0]):
            wrong["positions without bans"] = "other bits than with nothing banned"
    return {"ops": name, "ok": not wrong, "errors": errors} | ({"wrong": wrong} if wrong else {})


def _places(
    what: str, fast: Any, logits_BLV: Tensor, uniform_BL: Tensor, bans: tuple[Tensor, Tensor] | None
) -> dict[str, Any]:
    """Whether argmax and sample are where the exact distribution has them, as near as bfloat16's logits can tell."""
    wrong: dict[str, Any] = {}
    spread = (fast.logits_BLV.float() - logits_BLV).abs().masked_fill(logits_BLV < NEVER / 2, 0).amax(-1)
    chosen = logits_BLV.gather(-1, fast.argmax_BL[..., None])[..., 0]
    if bool((chosen < logits_BLV.amax(-1) - 2 * spread).any()):
        wrong[f"{what} argmax"] = float((logits_BLV.amax(-1) - chosen).max())
    cdf = logits_BLV.double().softmax(-1).cumsum(-1)
    after = cdf.gather(-1, fast.sample_BL[..., None])[..., 0]
    before = cdf.gather(-1, (fast.sample_BL - 1).clamp_min(0)[..., None])[..., 0].where(fast.sample_BL > 0, 0.0)
    off = torch.maximum(before - uniform_BL, uniform_BL - after).amax()
    if not float(off) <= BORDER:
        wrong[f"{what} sample"] = float(off)
    if bans is not None:
        where_BL, ids = bans
        for part in ("sample_BL", "argmax_BL"):
            if bool((torch.isin(getattr(fast, part), ids) & where_BL).any()):
                wrong[f"{what} {part}"] = "a banned word"
    return wrong
