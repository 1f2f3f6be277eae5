"""Everything that waits for a CUDA machine, in order of worth: `make gpu`.

    python3 scripts/gpu.py [--out runs/gpu] [--minutes 9] [--only check,tune,ops,full,peers,mid,train,eval] [--list]

Needs torch, triton, safetensors, tokenizers and numpy (and jinja2, which torch brings); transformers for `peers` alone.
Works in slices: each call runs for at most `--minutes` and does the tasks that are not done yet, one after the other.
Every task is bounded and its result is written at once, one line of `results.jsonl`; so is its beginning, so that a
task in which a machine was lost, or which fails, is tried once more and then left. Run it again for the next slice;
tasks that are done stay done until `--out` is emptied. `--record FILE` writes what is there as one record for
RESULTS.md and runs nothing.

    check    every kernel against the reference, at odd and released sizes; a row alone and in a batch; recorded graphs
    tune     tile sizes at the released sizes; the table is `--out`/tuned.json, and later tasks use it
    ops      each operation beside the roofline
    full     the released size, random weights: bf16, int4, fp8; batch 1, 4, 16; context 1K, 8K, 32K; both modes
    peers    transformers on the same weights in the same run
    mid      the half-billion model
    train    nano's training, from where the last slice stopped (from the weights in the package at first)
    eval     what the trained weights solve
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks import common, ops
from sfumato import sudoku, weights
from sfumato.cache import KVCache
from sfumato.config import ModelConfig
from sfumato.events import Commit, Done, Draft, Options
from sfumato.llm import LLM
from sfumato.measure.machine import environment, forget_peak, peak_bytes
from sfumato.measure.parts import random_config
from sfumato.model import Model
from sfumato.ops import load
from sfumato.ops.packed import Packed, dense
from sfumato.quant import formats
from sfumato.run import Run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = "triton" if DEVICE == "cuda" else "cpu"
TINY = False
"""Everything at toy sizes: to see on any machine that it runs."""
SAVING = 45.0
"""Seconds at the end of a slice that are for saving and judging."""


@dataclass(frozen=True)
class Task:
    """Something to do: `run(out, deadline)` returns what goes into the results. `needs` are the seconds without which
    it is not begun; `limit` those after which it is cut off."""

    name: str
    run: Callable[[Path, float], dict[str, Any]]
    needs: float = 20.0
    limit: float = 240.0


def hardware() -> dict[str, str]:
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


# ---- check ----------------------------------------------------------------------------------------------------------

EXACT_ENOUGH = {"fp8": 0.08, "int8": 0.06}
"""Relative error where what is multiplied is rounded to 8 bits too; else twice that of plain PyTorch."""
TOGETHER = {"nvfp4": 16, "mxfp4": 32}
"""Inputs that these kinds pack together: odd sizes do without them."""
FILES = ("linear", "experts", "attention", "norms", "read_out", "soft_embedding")


def check_op(op: str, size: str) -> dict[str, Any]:
    """Each case of an operation, by kind of weights: its error against float32 on the very weights that are packed, and
    whether the first row gives the same bits alone. AssertionError names what is off, after all were tried."""
    reference, found, wrong = load("reference"), [], []
    kinds = [(torch.bfloat16, ""), (torch.float32, "")]
    quantised = ("int4", "int4-asym", "fp8", "nvfp4", "mxfp4") if OPS == "triton" else ("int8",)
    with torch.inference_mode():
        for case in importlib.import_module(f"benchmarks.ops.{op}").cases(size, DEVICE):
            for dtype, kind in kinds + [(torch.bfloat16, k) for k in quantised if case.quantised and case.weights]:
                if size == "released" and dtype == torch.float32:
                    continue
                if any(w.shape[-1] % TOGETHER.get(kind, 1) for w in case.weights.values()):
                    continue
                record = load(OPS, DEVICE, dtype)
                codes = {name: codes_of(w.to(dtype), kind) for name, w in case.weights.items()}
                packed = {name: record.pack(code) for name, code in codes.items()}
                got = case.prepare(record, case.cast(dtype), packed)()
                kept = {name: dense(code, torch.float32) for name, code in codes.items()} if kind else case.weights
                exact = case.prepare(reference, case.cast(torch.float32), kept)()
                bf16 = {name: w.bfloat16() for name, w in kept.items()}
                plain = ops.relative(case.prepare(reference, case.cast(torch.bfloat16), bf16)(), exact)
                least = 2e-3 if op == "soft_embedding" else 2e-6  # tiles that it may leave out: eps / 4
                bound = EXACT_ENOUGH.get(kind, 1e-5 if dtype == torch.float32 else max(2 * plain, least))
                error = ops.relative(got, exact)
                row = {"case": case.name, "kind": ops.kind_of(dtype, kind), "error": error, "bound": bound}
                if case.rows is not None:
                    alone = case.prepare(record, case.cast(dtype, case.rows(case.inputs)), packed)()
                    same = got[:1] if len(got) > len(alone) or got.shape == alone.shape else got[:, :1]
                    row["first_row_same_bits"] = bool(torch.equal(alone, same))
                found.append(row)
                if not (error <= bound and row.get("first_row_same_bits", True)):
                    wrong.append(row)
            common.release()
    assert not wrong, f"{len(wrong)} of {len(found)} are off: {json.dumps(wrong)[:1500]}"
    return {"cases": len(found), "rows": found}


def codes_of(weight: torch.Tensor, kind: str) -> torch.Tensor | Packed:
    with torch.inference_mode():
        return formats.pack(weight, kind) if kind else weight


def check_device(_: Path, __: float) -> dict[str, Any]:
    """The device gives what the CPU gives: logits of encode and denoise, and the same Sudoku answers."""
    torch.backends.cuda.matmul.allow_tf32 = False
    there, here = (weights.load("nano", device=d, dtype="float32", ops="fused") for d in (DEVICE, "cpu"))
    dice = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 512, (2, 150), generator=dice)
    canvas = torch.randint(0, 512, (2, here.config.canvas_length), generator=dice)
    found = []
    with torch.inference_mode():
        for model in (there, here):
            cache = KVCache.allocate(model.config, 2, 256, model.device, model.dtype)
            hidden = model.encode(tokens.to(model.device), cache)
            found.append(
                (model.logits(hidden).cpu(), model.logits(model.denoise(canvas.to(model.device), cache)).cpu())
            )
    worst = [float((a - b).abs().max()) for a, b in zip(*found, strict=True)]
    assert max(worst) < 2e-3, f"logits differ by {worst}"
    from sfumato.evals.sudoku import solve

    puzzles = [sudoku.generate(38, np.random.default_rng(i)) for i in range(40)]
    answers = [
        [s.answer for s in solve(LLM.load("nano", device=d), puzzles, Options(seed=1), batch=40)]
        for d in (DEVICE, "cpu")
    ]
    same = sum(a == b for a, b in zip(*answers, strict=True))
    return {"encode_error": worst[0], "denoise_error": worst[1], "same_answers": same, "of": 40}


def check_engine(_: Path, __: float) -> dict[str, Any]:
    """Tokens of nano in float32: recorded graphs with stop flags read a step late, the eager loop, and fused
    operations, all under the same dice. At batch 1 and 8, with early answers and without."""
    torch.backends.cuda.matmul.allow_tf32 = False
    result: dict[str, Any] = {}
    for early in (False, True):
        found = tokens_by_way(Options(seed=3, early=early))
        base, alone, eager = found["fused"], found["recorded, lag 1"], found["eager, lag 0"]
        half, name = len(base) // 2, "early: " if early else ""
        result |= {
            f"{name}recorded_as_eager": sum(a == b for a, b in zip(alone, eager, strict=True)),
            f"{name}as_fused": sum(a == b for a, b in zip(eager, base, strict=True)),
            f"{name}alone_as_in_a_batch": 2 * sum(a == b for a, b in zip(eager[:half], eager[half:], strict=True)),
            "of": len(base),
        }
    assert all(count == result["of"] for count in result.values()), result
    return result


def check_offload(_: Path, __: float) -> dict[str, Any]:
    """Layers streamed from the host give the tokens that resident ones give, and at what rate they come."""
    from sfumato import offload

    options = Options(max_tokens=82, max_steps=4, seed=1)
    prompt = [{"role": "user", "content": "Solve this Sudoku:\n" + "530070000" * 9}]
    whole = LLM.load("nano", device=DEVICE, ops=OPS, quantize="int4")
    wanted, heard = whole.chat(prompt, options=options).tokens, []
    limited = LLM.load("nano", device=DEVICE, ops=OPS, quantize="int4", memory_limit=1_000_000, notice=heard.append)
    assert offload.is_streamed(limited.model) and limited.chat(prompt, options=options).tokens == wanted
    return {"said": heard, "bytes_per_second": offload.bandwidth(torch.device(DEVICE))}


def check_batch(_: Path, __: float) -> dict[str, Any]:
    """Requests that come one after the other, while others run, get the tokens that they get alone."""
    from sfumato.jobs import Jobs

    llm = LLM.load("nano", device=DEVICE, dtype="float32", ops=OPS)
    puzzles = [sudoku.generate(40, np.random.default_rng(i)) for i in range(3 if TINY else 24)]
    asked = [[{"role": "user", "content": sudoku.prompt(puzzle)}] for puzzle in puzzles]
    options = [Options(seed=n, max_tokens=82, max_steps=16) for n in range(len(asked))]
    jobs, found, began = Jobs(llm), {}, time.perf_counter()
    left = list(enumerate(zip(asked, options, strict=True)))
    while left or not jobs.is_idle:
        for number, (messages, each) in left[:2]:
            jobs.begin(number, "chat", {"messages": messages}, each)
        left = left[2:]
        found |= {number: told.tokens for number, told in jobs.turn() if isinstance(told, Done)}
    seconds = time.perf_counter() - began
    wanted = [llm.chat(messages, options=each).tokens for messages, each in zip(asked, options, strict=True)]
    same = sum(found[number] == tokens for number, tokens in enumerate(wanted))
    assert same == len(wanted), f"{len(wanted) - same} of {len(wanted)} answers depend on who else was there"
    return {"answers": same, "seconds": seconds}


def tokens_by_way(options: Options) -> dict[str, list[list[int]]]:
    """Way of running -> tokens of some puzzles, one after the other, then all at once."""
    from sfumato.evals.sudoku import request

    puzzles = [sudoku.generate(40, np.random.default_rng(i)) for i in range(2 if TINY else 8)]
    ways = {"recorded, lag 1": (OPS, True, 1), "eager, lag 0": (OPS, False, 0), "fused": ("fused", False, 0)}
    answers: dict[str, list[list[int]]] = {}
    for way, (name, record, lag) in ways.items():
        llm = LLM.load("nano", device=DEVICE, dtype="float32", ops=name)
        ids, pins = zip(*(request(llm, puzzle) for puzzle in puzzles), strict=True)
        full = llm._complete_options(replace(options, max_tokens=llm.model.config.canvas_length))
        answers[way] = []
        for rows in ([[i] for i in range(len(ids))], [list(range(len(ids)))]):
            for some in rows:
                run = Run(llm.model, [ids[i] for i in some], full, pins=[pins[i] for i in some], record=record, lag=lag)
                done = {event.row: event.tokens for event in run if isinstance(event, Done)}
                answers[way] += [done[n] for n in range(len(some))]
    return answers


# ---- tune -----------------------------------------------------------------------------------------------------------


def use_table(out: Path) -> None:
    """From now on this folder's table of tile sizes, which begins as the package's."""
    from sfumato.ops.triton import tuning

    table = out / "tuned.json"
    if not table.exists() and tuning.TABLE.exists():
        table.write_text(tuning.TABLE.read_text())
    tuning.TABLE = table


@dataclass(frozen=True)
class Tuning:
    op: str
    kind: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"tune/{self.op} {'x'.join(map(str, self.shape))} {self.kind or 'bf16'}"


def tunings(config: ModelConfig) -> list[Tuning]:
    """What a pass of this model looks up, the most expensive first."""
    width, inner, words = config.hidden_size, config.intermediate_size, config.vocab_size
    count, hidden = config.num_experts, config.expert_size
    products = []
    for layer in {layer.head_dim: layer for layer in config.layers}.values():
        queries, keys = config.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
        products += [(queries + keys * (2 if layer.is_sliding else 1), width), (width, queries)]
    found = [Tuning(op, "", (words, width)) for op in ("read_out", "soft_embedding", "read_out_walk")]
    for kind in ("", "int4", "fp8"):
        found.append(Tuning("experts_gate_up", kind, (count, 2 * hidden, width)))
        found.append(Tuning("experts_down", kind, (count, width, hidden)))
        found.append(Tuning("gate_up", kind, (inner, width)))
        found += [Tuning("linear", kind, shape) for shape in [*products, (width, inner)]]
    return found + [Tuning("attention", "", (layer.head_dim,)) for layer in config.layers[4:6]]


def tune(one: Tuning, out: Path, seconds: float) -> dict[str, Any]:
    """Time configurations until the seconds are over; the default is the first, so that the table is never worse."""
    from triton.testing import do_bench

    from sfumato.ops.triton import attention, experts, linear, read_out, soft_embedding, tuning

    use_table(out)
    dtype = torch.bfloat16
    named = f"{one.kind} bfloat16" if one.kind else "bfloat16"
    form = one.kind or "plain"
    if one.op in ("linear", "gate_up"):
        default, choices = linear.DEFAULTS[one.op][form], linear.CHOICES
    elif one.op.startswith("experts"):
        default, choices = experts.KINDS[one.op][form], experts.CHOICES
    elif one.op == "attention":
        default, choices = attention.tiles(one.shape[0], dtype, DEVICE), attention.CHOICES
    elif one.op == "soft_embedding":
        default, choices = soft_embedding.DEFAULTS[one.op], soft_embedding.CHOICES[one.op]
    else:
        default, choices = read_out.DEFAULTS[one.op], read_out.CHOICES[one.op]
    if one.op == "experts_down":  # gate and up cut the rows for both
        choices = {name: values for name, values in choices.items() if name != "BLOCK_M"}
    configs = tuning.candidates(default, choices)
    rest = configs[1:]
    np.random.default_rng(0).shuffle(rest)  # type: ignore[arg-type]
    run, until, tried = call_of(one), time.monotonic() + seconds, 0

    def milliseconds(call: Callable[[], object]) -> float:
        nonlocal tried
        if time.monotonic() > until:
            return math.inf
        tried += 1
        return float(do_bench(call, warmup=5, rep=30, return_mode="median"))

    with torch.inference_mode():
        measured = tuning.tune(
            one.op, one.shape, named, DEVICE, run, [configs[0], *rest], tuning.TABLE, milliseconds=milliseconds
        )
    first = next((ms for ms, chosen in measured if chosen == configs[0]), None)
    return {
        "fastest_ms": measured[0][0],
        "default_ms": first,
        "chosen": measured[0][1],
        "tried": tried,
        "of": len(configs),
    }


def call_of(one: Tuning) -> Callable[[], object]:
    """The operation that looks this entry up, at a canvas's 256 rows."""
    record, rows = load(OPS, DEVICE), 256

    def weight(*shape: int) -> Any:
        return record.pack(codes_of(ops.exactly(*shape, scale=0.05, device=DEVICE).bfloat16(), one.kind))

    if one.op == "linear":
        x, w = ops.exactly(rows, one.shape[1], device=DEVICE).bfloat16(), weight(*one.shape)
        return lambda: record.linear(x, w)
    if one.op == "gate_up":
        inner, width = one.shape
        x, three = ops.exactly(rows, width, device=DEVICE).bfloat16(), (weight(inner, width), weight(inner, width))
        down = weight(width, inner)
        return lambda: record.feed_forward(x, *three, down)
    if one.op.startswith("experts"):
        count = one.shape[0]
        width, inner = (one.shape[2], one.shape[1] // 2) if one.op == "experts_gate_up" else one.shape[1:]
        x, index = ops.exactly(rows, width, device=DEVICE).bfloat16(), torch.rand(rows, count, device=DEVICE).topk(8)[1]
        each, stacks = (
            torch.full((rows, 8), 0.125, device=DEVICE),
            (weight(count, 2 * inner, width), weight(count, width, inner)),
        )
        return lambda: record.experts(x, index, each, *stacks)
    file = "attention" if one.op == "attention" else one.op.removesuffix("_walk")
    for case in importlib.import_module(f"benchmarks.ops.{file}").cases("released", DEVICE):
        if one.op != "attention" or (case.inputs["q"].shape[-1] == one.shape[0] and "denoise" in case.name):
            return case.ready(record, torch.bfloat16)
    raise ValueError(f"no case of {one.op} with heads of {one.shape}")


# ---- operations beside the roofline ---------------------------------------------------------------------------------


def most_of(out: Path) -> dict[str, Any]:
    """The ceiling, measured once."""
    options = ["--device", DEVICE, "--seconds", "0.05" if TINY else "1", "--ceilings", str(out / "ceilings.json")]
    options += ["--streamed", str(2**22 if TINY else 2**32)]
    return common.ceiling(common.arguments("", 1.0).parse_args(options))


def time_op(op: str, out: Path) -> dict[str, Any]:
    most, found = most_of(out), []
    for case in importlib.import_module(f"benchmarks.ops.{op}").cases("tiny" if TINY else "released", DEVICE):
        found += list(ops.rows(op, case, DEVICE, 0.02 if TINY else 1.0, most))
        common.release()
    return {"op": op, "rows": found}


# ---- the released size ----------------------------------------------------------------------------------------------

_HELD: dict[str, Model] = {}
"""The last model: the next cell mostly wants the same."""


def config_of(name: str) -> ModelConfig:
    if TINY or name != "full":
        return common.without_eos(Model(random_config("tiny" if TINY else "mid"), load("fused"))).config
    return common.released_config()


def model_of(name: str, kind: str) -> Model:
    """Random weights of this size, packed as this kind; made anew where the last task wanted another."""
    key = f"{name} {kind}"
    if key not in _HELD:
        _HELD.clear()
        common.release()
        _HELD[key] = common.random_packed(config_of(name), DEVICE, OPS, "" if kind == "bf16" else kind)
    return _HELD[key]


def cell(name: str, kind: str, batch: int, context: int, mode: str, lag: int, out: Path) -> dict[str, Any]:
    """Milliseconds a pass and tokens a second behind a filled cache: of canvases after the first, in which everything
    is compiled and recorded; 16 steps each. Out of memory is a result too."""
    try:
        return _cell(name, kind, batch, context, mode, lag, out)
    except torch.OutOfMemoryError as error:
        _HELD.clear()
        common.release()
        return {"skipped": f"out of memory: {str(error)[:150]}"}


@torch.inference_mode()
def _cell(name: str, kind: str, batch: int, context: int, mode: str, lag: int, out: Path) -> dict[str, Any]:
    model, steps = model_of(name, kind), 3 if TINY else 16
    config, is_diffusion = model.config, mode == "diffusion"
    tokens = (3 if is_diffusion else 1) * config.canvas_length if is_diffusion or not TINY else 8
    tokens = tokens if is_diffusion else min(tokens, 48)
    cache = KVCache.allocate(config, batch, context + 1 + 3 * config.canvas_length, DEVICE, model.dtype)
    for held in (*cache.k, *cache.v):
        held.normal_()
    cache.advance(list(range(batch)), [context] * batch)
    prompts = torch.randint(config.vocab_size, (batch, context + 1)).tolist()
    options = Options(max_tokens=tokens, seed=1, mode=mode, max_steps=steps, confidence=0.0, temperature=0.0)  # type: ignore[arg-type]
    forget_peak(torch.device(DEVICE))
    moments, last = [], -1
    run = Run(model, prompts, options, cache=cache, lag=lag)
    for event in run:
        if isinstance(event, Commit) and event.row == 0:
            moments.append(time.perf_counter())
            last = len(event.tokens)
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    seconds = median(gaps)
    passes = steps if is_diffusion else 1
    floor = common.step_cost(config, kind, batch, context, not is_diffusion).seconds(most_of(out))
    return {
        "kind": kind,
        "batch": batch,
        "context": context,
        "mode": mode,
        "lag": lag,
        "steps_per_canvas": steps if is_diffusion else None,
        "ms_a_pass": 1e3 * seconds / passes,
        "tokens_per_second": batch * last / seconds,
        "floor_ms": 1e3 * floor,
        "share_of_ceiling": floor * passes / seconds,
        "peak_bytes": peak_bytes(torch.device(DEVICE)),
        "samples": len(gaps),
    }


@torch.inference_mode()
def first_step(name: str, kind: str, prompt: int) -> dict[str, Any]:
    """From a prompt to the first draft; the second time on, when everything is compiled."""
    model = model_of(name, kind)
    ids = torch.randint(model.config.vocab_size, (prompt,)).tolist()
    options = Options(max_tokens=model.config.canvas_length, seed=1, max_steps=1, drafts=True)
    found = []
    for _ in range(6):
        common.wait(DEVICE)
        began = time.perf_counter()
        for event in Run(model, [ids], options):
            if isinstance(event, Draft):
                found.append(time.perf_counter() - began)
                break
    return {"kind": kind, "prompt": prompt, "first_step_ms": 1e3 * median(found[1:]), "samples": len(found) - 1}


def cells(out: Path) -> Iterator[Task]:
    """The cells of the released size, the most valuable first; cells of one kind of weights stand together."""
    one, eight, more = (16, 32, 64) if TINY else (1024, 8192, 32768)
    kinds = ("bf16", "int8") if OPS == "cpu" else ("bf16", "int4", "fp8")
    rounds = [
        [(1, one, "diffusion", 1), (1, one, "autoregressive", 0), (16, one, "diffusion", 1), (1, one, "diffusion", 0)],
        [
            (4, one, "diffusion", 1),
            (1, eight, "diffusion", 1),
            (1, more, "diffusion", 1),
            (16, one, "autoregressive", 0),
        ],
        [
            (4, eight, "diffusion", 1),
            (16, eight, "diffusion", 1),
            (4, more, "diffusion", 1),
            (16, more, "diffusion", 1),
        ],
        [
            (b, c, "autoregressive", 0)
            for b in (1, 4, 16)
            for c in (one, eight, more)
            if (b, c) not in ((1, one), (16, one))
        ],
    ]
    for number, these in enumerate(rounds):
        for kind in kinds:
            for batch, context, mode, lag in these:
                name = f"full/{kind} batch {batch} context {context} {mode} lag {lag}"
                arguments = "full", kind, batch, context, mode, lag
                yield Task(name, lambda out, _, a=arguments: cell(*a, out), 60 if TINY else 100)
            if number == 0:
                name = f"full/{kind} first step after {one} tokens"
                yield Task(name, lambda out, _, kind=kind: first_step("full", kind, one), 60 if TINY else 100)


def beside(_: Path, deadline: float) -> dict[str, Any]:
    """transformers around the very tensors of our bf16 model, taking turns: a forward with logits, and whole steps."""
    import peers

    from sfumato.measure.parts import Plan

    model = model_of("full", "bf16")
    plan = Plan(16 if TINY else 1024, model.config.canvas_length, 6, 5.0)
    theirs = peers.twin(model)
    theirs.set_attn_implementation("sdpa")
    with torch.inference_mode():
        calls = {"transformers": peers.forward_of_theirs(theirs, model, plan), "sfumato": peers.forward_of(model, plan)}
        logits = {name: call().float() for name, call in calls.items()}
        most = float((logits["transformers"] - logits["sfumato"]).abs().max())
        same = float((logits["transformers"].argmax(-1) == logits["sfumato"].argmax(-1)).float().mean())
        del logits
        forward = common.alternate(calls, 20.0, DEVICE)
        runs = {
            "transformers": lambda: peers.steps_of_theirs(theirs, model, plan, 5),
            "sfumato": lambda: peers.steps_of(model, plan, 5),
        }
        for run in runs.values():
            run()
        steps = peers.pooled(runs, 20.0)
    return {
        "prompt": plan.prompt,
        "forward_ms": {name: 1e3 * timing.median for name, timing in forward.items()},
        "step_ms": {name: 1e3 * timing.median for name, timing in steps.items()},
        "largest_logit_difference": most,
        "same_argmax": same,
    }


# ---- training and evaluation -----------------------------------------------------------------------------------------


def train(out: Path, deadline: float) -> dict[str, Any]:
    """A slice of nano's training, continued from the last one; leaves the weights beside the log."""
    from sfumato.chat import ChatTemplate
    from sfumato.finetune.data import SudokuSource
    from sfumato.finetune.train import Recipe, Trainer
    from sfumato.tokenizer import Tokenizer

    folder = weights.resolve("nano")
    tokenizer = Tokenizer.from_folder(folder)
    source = SudokuSource(tokenizer, ChatTemplate.from_folder(folder, tokenizer.special), seed=20261122)
    model = weights.load(folder, device=DEVICE, dtype="float32", ops="fused")
    recipe = Recipe(
        steps=20_000, hold=10_000, batch=512, repeats=2, lr=1e-3, warmup=200, floor=0.02, optimizer="muon",
        encode_response_every=4, precision="bfloat16" if DEVICE == "cuda" else "float32",
    )  # fmt: skip
    trainer = Trainer(model, source, recipe, out / "nano")
    last = None
    for progress in trainer.run(until=deadline):
        last = progress
        if progress.step % 50 == 0:
            print(f"step {progress.step}: {progress.diffusion_loss:.4f} nats, {progress.seconds:.3f} s", flush=True)
    weights.save(model, out / "nano" / "checkpoint", tokenizer_from=folder)
    record = {
        "step": trainer.step,
        "is_finished": trainer.step >= recipe.steps,
        "checkpoint": str(out / "nano/checkpoint"),
    }
    return record | ({"diffusion_loss": last.diffusion_loss} if last else {})


def evaluate(out: Path, _: float) -> dict[str, Any]:
    """Solve rates of the trained weights, if there are any, else of the package's."""
    import nano

    trained = out / "nano" / "checkpoint"
    llm = LLM.load(trained if trained.exists() else "nano", device=DEVICE)
    return {"model": llm.name, "rows": list(nano.rows(llm, 200, 200, 7, ["diffusion", "autoregressive"]))}


# ---- slices ---------------------------------------------------------------------------------------------------------


def tasks(out: Path) -> Iterator[Task]:
    """Everything, in order of worth. int4's own kernel is checked first, through linear; recorded graphs before
    anything is timed."""
    sizes = ("odd",) if TINY else ("odd", "released")
    for size in sizes:
        for op in FILES:
            yield Task(f"check/{op} {size}", lambda _, __, op=op, size=size: check_op(op, size), 45)
    yield Task("check/engine", check_engine, 60)
    yield Task("check/device", check_device, 60)
    yield Task("check/batch", check_batch, 60)
    yield Task("check/offload", check_offload, 60)
    every = list(cells(out))
    yield every[0]
    if OPS == "triton":
        for one in tunings(config_of("full")):
            yield Task(one.name, lambda out, _, one=one: tune(one, out, 25.0), 45)
        for op in FILES:  # tuned tiles have to give the same answers
            yield Task(f"check/{op} released tuned", lambda _, __, op=op: check_op(op, "released"), 45)
    for op in FILES:
        yield Task(f"ops/{op}", lambda out, _, op=op: time_op(op, out), 45)
    # The first cell again, with tuned tiles, and all others.
    first = every[0]
    yield Task(first.name + " tuned", first.run, first.needs)
    yield from every[1:]
    if OPS == "triton":  # elsewhere weights are packed, and benchmarks/peers.py is for that
        yield Task("peers/transformers", beside, 120)
    for batch in (1, 4, 16):
        arguments = "mid", "bf16", batch, 16 if TINY else 384, "diffusion", 1
        yield Task(f"mid/bf16 batch {batch}", lambda out, _, a=arguments: cell(*a, out), 45)
    yield Task("train", train, 30, math.inf)
    yield Task("eval", evaluate, 0, math.inf)


def read(results: Path) -> list[dict[str, Any]]:
    """What is written so far; a last line that was cut off is left out."""
    found = []
    for line in results.read_text().splitlines() if results.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def is_over(name: str, done: list[dict[str, Any]]) -> bool:
    """Done, or begun twice without success. Training is over at its last step, evaluation never."""
    mine = [row for row in done if row["task"] == name]
    if name == "eval":
        return False
    if name == "train":
        return any(row.get("ok") and row["result"]["is_finished"] for row in mine)
    return any(row.get("ok") for row in mine) or sum("began" in row for row in mine) >= 2


def perform(task: Task, out: Path, deadline: float) -> dict[str, Any]:
    """The task's record, whatever becomes of it."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"cut off after {seconds:.0f} s")

    seconds = min(task.limit, max(1.0, deadline + SAVING / 2 - time.monotonic()))
    before, began = signal.signal(signal.SIGALRM, stop), time.perf_counter()
    if task.limit < math.inf:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        record = {"task": task.name, "ok": True, "result": task.run(out, deadline)}
    except Exception as error:  # a failed task is recorded and must not stop the ones after it
        traceback.print_exc()
        record = {"task": task.name, "ok": False, "error": f"{type(error).__name__}: {str(error)[:2000]}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return record | {"seconds": round(time.perf_counter() - began, 1), "when": time.strftime("%F %T"), **hardware()}


def slice_of(out: Path, minutes: float, only: list[str], each: list[Task]) -> int:
    """One slice; the number of tasks that failed in it."""
    out.mkdir(parents=True, exist_ok=True)
    results, failed = out / "results.jsonl", 0
    deadline = time.monotonic() + 60 * minutes - min(SAVING, 30 * minutes)
    if OPS == "triton":
        use_table(out)

    def append(record: dict[str, Any]) -> None:
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")

    text = results.read_text() if results.exists() else ""
    if text and not text.endswith("\n"):
        with results.open("a") as file:
            file.write("\n")  # the line that a lost machine did not finish
    for task in each:
        if only and not any(task.name == name or task.name.startswith(name + "/") for name in only):
            continue
        if is_over(task.name, read(results)):
            continue
        if time.monotonic() + task.needs > deadline and task.needs:
            print(f"{task.name}: no time left in this slice", flush=True)
            continue
        append({"task": task.name, "began": time.strftime("%F %T")})
        record = perform(task, out, deadline)
        append(record)
        failed += not record["ok"]
        print(f"{task.name}: {json.dumps(record.get('result', record.get('error')))[:300]}", flush=True)
    return failed


def as_record(out: Path) -> dict[str, Any]:
    """All that has ended so far, the last result of each task, as one record for RESULTS.md, with the issue's targets;
    single cases of checks stay in results.jsonl."""
    last = {row["task"]: row for row in read(out / "results.jsonl") if "ok" in row}
    for row in last.values():
        if row["task"].startswith(("check/", "eval")):
            row.get("result", {}).pop("rows", None)
    found = {
        "what": "gpu",
        "tasks": list(last.values()),
        "targets": targets_of(last),
        "environment": environment(DEVICE),
    }
    if last:
        found["environment"]["hardware"]["gpu"] = next(reversed(last.values()))["device"]
    return found


def targets_of(last: dict[str, dict[str, Any]]) -> dict[str, Any]:
    def figure(kind: str, batch: int, key: str, mode: str = "diffusion lag 1") -> float | None:
        name = f"full/{kind} batch {batch} context 1024 {mode}"
        row = last.get(f"{name} tuned", last.get(name, {}))
        return row.get("result", {}).get(key)

    found = {}
    for kind, most in (("bf16", 15.0), ("fp8", 8.5), ("int4", 6.0)):
        found[f"{kind}, batch 1, 1K context: ms a pass"] = common.target(figure(kind, 1, "ms_a_pass"), most)
        one, many = figure(kind, 1, "tokens_per_second"), figure(kind, 16, "tokens_per_second")
        gain = many / one if one and many else None
        found[f"{kind}, batch 16: times the tokens of batch 1"] = common.target(gain, 4.0, at_most=False)
        first = last.get(f"full/{kind} first step after 1024 tokens", {}).get("result", {}).get("first_step_ms")
        found[f"{kind}, first step after a 1K prompt: ms"] = common.target(first, 60.0)
    fast = figure("int4", 1, "tokens_per_second")
    found["int4, 16 steps a canvas: tokens a second"] = common.target(fast, 2500.0, at_most=False)
    return found


def main() -> int:
    global TINY
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default="", help="these groups or tasks, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any machine")
    parser.add_argument("--list", action="store_true", help="name the tasks and what became of them")
    parser.add_argument("--record", type=Path, help="write what is done as one record, and run nothing")
    given = parser.parse_args()
    TINY = given.tiny
    each, only = list(tasks(given.out)), [name for name in given.only.split(",") if name]
    groups = {task.name.split("/")[0] for task in each} | {task.name for task in each}
    if unknown := [name for name in only if name not in groups]:
        known = ", ".join(dict.fromkeys(task.name.split("/")[0] for task in each))
        print(f"there is no task {unknown[0]!r}; the groups are {known}", file=sys.stderr)
        return 2
    if given.record:
        common.write(given.record, as_record(given.out))
        return 0
    if given.list:
        done = read(given.out / "results.jsonl")
        for task in each:
            print(f"{'done' if is_over(task.name, done) else 'waits'}  {task.name}")
        return 0
    if DEVICE == "cpu" and not TINY and not set(only) & {"train", "eval"}:
        print("there is no CUDA device; --tiny shows on any machine that the tasks run", file=sys.stderr)
        return 2
    print(f"{hardware()}; {given.minutes} minutes; results go to {given.out / 'results.jsonl'}", flush=True)
    return 1 if slice_of(given.out, given.minutes, only, each) else 0


if __name__ == "__main__":
    sys.exit(main())
