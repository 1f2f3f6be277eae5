"""The released model's true size on this machine: quantised, its memory watched, and one canvas run on the CPU.

A random checkpoint of the released config comes into being tensor by tensor, so that its 52 GB never lie anywhere; the
ordinary `convert` quantises it, or it becomes a GGUF as Q4_K_M has it, which is then quantised. Each phase is a process
of its own, whose high-water mark of resident memory is the figure; mapped pages of the file count. What the weights say
is nobody's business here: blocks of normal values, repeated.

    .venv/bin/python benchmarks/full_size.py -o benchmarks/results/full_size.json      (about 50 GB of disk, an hour)
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from sfumato import ops
from sfumato.checkpoints import convert
from sfumato.checkpoints.checkpoint import Checkpoint, Entry
from sfumato.checkpoints.contents import blank
from sfumato.checkpoints.load import load
from sfumato.checkpoints.locate import resolve
from sfumato.checkpoints.names import released_name
from sfumato.engine.run import generate
from sfumato.events import Done, Draft
from sfumato.measure.machine import peak_bytes, resident_bytes
from sfumato.measure.parts import Counted
from sfumato.measure.work import duration, needs, size
from sfumato.options import LoadOptions, Options

GB = 1e9
LIMITS = {"file": 15.5 * GB, "quantise": 6.0 * GB, "generate": 17.5 * GB}
BLOCK = 4_194_301
"""Values that are drawn; a prime, so that rows differ."""


# ---- a checkpoint that lies nowhere ---------------------------------------------------------------------------------


def imagined(layers: int) -> Checkpoint:
    """The released layout in bfloat16, random, made as it is read."""
    config = common.released_config(layers)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    model = blank(config, ops.load("reference"))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def read(shape: tuple[int, ...], first: int, last: int) -> torch.Tensor:
        if len(shape) < 2:
            return torch.ones(last - first, *shape[1:], dtype=torch.bfloat16)
        row = math.prod(shape[1:])
        count, begin = (last - first) * row, first * row % BLOCK
        return block.repeat(-(-(begin + count) // BLOCK))[begin : begin + count].view(last - first, *shape[1:])

    entries = {}
    for own, shape in shapes.items():
        name = released_name(own)
        entries[name] = Entry(name, shape, 2 * math.prod(shape), "BF16", partial(read, shape))
    return Checkpoint(Path("imagined"), "random", config.to_dict(), entries)


def write_gguf(target: Path, layers: int, progress: Any) -> dict[str, float]:
    """Q4_K_M as llama.cpp's quantiser chooses it: Q4_K, with Q6_K for every other value and down projection; rows that
    are no multiple of 256 fall back to Q5_0 and Q8_0. Bytes of one encoded block, repeated. Returns bytes by kind."""
    from sfumato.checkpoints.formats import gguf_names, gguf_writer
    from sfumato.checkpoints.formats.gguf import PlannedBlocks, write_file
    from sfumato.checkpoints.formats.gguf_blocks import KINDS, NUMBERS, encode

    checkpoint = imagined(layers)
    config = common.released_config(layers)
    sample = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)).mul_(0.02)
    bytes_of: dict[str, torch.Tensor] = {}
    sums: dict[str, float] = {}

    def kind_of(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1 or "ffn_gate_inp" in name:
            return "F32"
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        is_more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        is_fine = name.startswith("token_embd") or (is_more and ("attn_v" in name or "ffn_down" in name))
        if shape[-1] % 256:
            return "Q8_0" if is_fine else "Q5_0"
        return "Q6_K" if is_fine else "Q4_K"

    def parts(kind: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        if kind == "F32":  # a router of ones would choose the same experts for every token
            values = torch.ones(shape) if len(shape) == 1 else sample[: math.prod(shape)].view(shape)
            yield values.contiguous().view(torch.uint8)
            return
        if kind not in bytes_of:
            bytes_of[kind] = encoded(kind, sample) if kind == "Q5_0" else encode(kind, sample)
        block = bytes_of[kind].reshape(-1)
        left = math.prod(shape) // KINDS[NUMBERS[kind]].values * KINDS[NUMBERS[kind]].nbytes
        while left:
            yield block[: min(left, len(block))]
            left -= min(left, len(block))

    planned = [
        PlannedBlocks(
            "rope_freqs.weight", "F32", (256,), lambda: iter([gguf_writer.divisors_of(config).view(torch.uint8)])
        )
    ]
    for theirs, _, shape in gguf_names.tensor_table(config):
        kind = kind_of(theirs, shape)
        planned.append(PlannedBlocks(theirs, kind, shape, partial(parts, kind, shape)))
        sums[kind] = sums.get(kind, 0) + planned[-1].nbytes
    metadata = {**gguf_writer.metadata_of(config, "full size"), **gguf_writer.tokenizer_of(config, None)}
    write_file(target, metadata, planned, progress)
    del checkpoint
    return sums


def encoded(kind: str, values: torch.Tensor) -> torch.Tensor:
    """Q5_0, which no writer of ours needs: a half-precision scale, the high bits, then pairs of low halves."""
    groups = values.view(-1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 15).half()
    codes = (groups / scale.float()).round().clamp(-16, 15).add(16).to(torch.uint8)
    high = ((codes >> 4).long() << torch.arange(32)).sum(-1, keepdim=True)
    high_bytes = torch.cat([(high >> 8 * n & 255).to(torch.uint8) for n in range(4)], -1)
    low = codes & 15
    return torch.cat([scale.view(torch.uint8), high_bytes, low[:, :16] | low[:, 16:] << 4], -1)


# ---- phases: each in a process of its own ---------------------------------------------------------------------------


def phase_quantise(arguments: argparse.Namespace) -> dict[str, Any]:
    source = imagined(arguments.layers) if arguments.source == "random" else resolve(arguments.source)
    began = time.perf_counter()
    done = convert.convert(source, arguments.recipe, arguments.target, bar("quantise"))
    return {
        "seconds": time.perf_counter() - began,
        "read_bytes": done.read_bytes,
        "file_bytes": sum(file.stat().st_size for file in Path(arguments.target).iterdir()),
        "peak_bytes": peak_bytes(torch.device("cpu")),
    }


def phase_gguf(arguments: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    kinds = write_gguf(Path(arguments.target), arguments.layers, bar("gguf"))
    return {"seconds": time.perf_counter() - began, "file_bytes": Path(arguments.target).stat().st_size, "kinds": kinds}


def phase_generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """One canvas behind a long prompt, the denoising steps timed one by one."""
    before = resident_bytes(torch.device("cpu"))
    began = time.perf_counter()
    model = load(arguments.source, LoadOptions(device="cpu", dtype="bfloat16"), progress=bar("load"))
    model = common.without_eos(model.eval())
    loaded = time.perf_counter() - began
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(model.config.vocab_size, (arguments.context,), generator=generator).tolist()
    options = Options(max_tokens=model.config.canvas_length, max_steps=arguments.steps, seed=3, drafts=True)
    began = last = time.perf_counter()
    steps: list[float] = []
    done = None
    for event in generate(model, [prompt], options):
        now = time.perf_counter()
        if isinstance(event, Draft):
            steps.append(now - last)
            print(f"full_size: step {len(steps)}: {now - last:.2f} s", file=sys.stderr, flush=True)
        elif isinstance(event, Done):
            done = event
        last = now
    assert done is not None and len(done.tokens) == model.config.canvas_length
    cost = Counted.of(model).step(arguments.context)
    stack: Any = model.layers[0].get_submodule("experts").down_proj
    return {
        "load_seconds": loaded,
        "ops": model.ops.name,
        "experts": f"{stack.kind} by {stack.group}" if hasattr(stack, "group") else str(stack.dtype),
        "context": arguments.context,
        "first_step_seconds": steps[0],
        "step_seconds": statistics.median(steps[1:]),
        "steps_seconds": steps,
        "seconds": last - began,
        "peak_bytes": peak_bytes(torch.device("cpu")),
        "resident_bytes": resident_bytes(torch.device("cpu")),
        "before_bytes": before,
        "step_cost": {"bytes": cost.bytes, "flops": cost.flops},
    }


PHASES = {"quantise": phase_quantise, "gguf": phase_gguf, "generate": phase_generate}


def bar(what: str) -> Any:
    last = [0.0]

    def progress(done: int, total: int) -> None:
        if time.perf_counter() - last[0] > 20 or done == total:
            last[0] = time.perf_counter()
            print(f"full_size: {what}: {done / GB:.1f} of {total / GB:.1f} GB", file=sys.stderr, flush=True)

    return progress


def child(phase: str, arguments: argparse.Namespace, **what: Any) -> dict[str, Any]:
    common.say(f"{phase} {what}")
    command = [sys.executable, __file__, "--phase", phase, "--layers", str(arguments.layers)]
    command += ["--steps", str(arguments.steps), "--context", str(arguments.context), "--recipe", arguments.recipe]
    for name, value in what.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- the record -----------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    from sfumato.measure.work import Work

    most = common.ceiling(arguments)
    record["ceiling_bytes_per_second"] = most["bytes_per_second"]["best"]
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="full-size-") as folder:
        for source in arguments.sources.split(","):
            place: str | Path = "random"
            result: dict[str, Any] = record["sources"].setdefault(source, {})
            if source == "gguf":
                place = Path(folder) / "full-size-Q4_K_M.gguf"
                result["gguf"] = child("gguf", arguments, target=place)
            target = Path(folder) / arguments.recipe
            result["quantise"] = child("quantise", arguments, source=place, target=target)
            if source == "gguf":
                Path(place).unlink()
            result["generate"] = one = child("generate", arguments, source=target)
            cost = Work(**one["step_cost"])
            one["floor_seconds"] = cost.seconds(most)
            one["share_of_ceiling"] = one["floor_seconds"] / one["step_seconds"]
            one["bytes_per_second"] = cost.bytes / one["step_seconds"]
            shutil.rmtree(target)
            if arguments.output:
                common.finish(record, arguments)


def conclude(record: dict[str, Any]) -> None:
    """What follows from the phases: the targets, and how near `sfumato info` comes."""
    config = common.released_config(record["layers"])
    for phases in record["sources"].values():
        quantised, generated = phases["quantise"], phases["generate"]
        promised = needs(config, record["recipe"], generated["context"] + config.canvas_length)
        took = generated["peak_bytes"] - generated["before_bytes"]
        phases["info"] = {
            "file_bytes": promised["file_bytes"],
            "file_off_by": promised["file_bytes"] / quantised["file_bytes"] - 1,
            "total_bytes": promised["total_bytes"],
            "took_bytes": took,
            "total_off_by": promised["total_bytes"] / took - 1,
        }
    record["targets"] = targets(record)


def targets(record: dict[str, Any]) -> dict[str, Any]:
    rows = {}
    for source, phases in record["sources"].items():
        rows[f"{source}: file, bytes"] = common.target(phases["quantise"]["file_bytes"], LIMITS["file"])
        rows[f"{source}: peak while quantising, bytes"] = common.target(
            phases["quantise"]["peak_bytes"], LIMITS["quantise"]
        )
        rows[f"{source}: peak while generating, bytes"] = common.target(
            phases["generate"]["peak_bytes"], LIMITS["generate"]
        )
        for what in ("file", "total"):
            off_by = abs(phases["info"][f"{what}_off_by"])
            rows[f"{source}: {what}, as sfumato info computes it, off by"] = common.target(off_by, 0.03)
    return rows


def lines(record: dict[str, Any]) -> list[list[str]]:
    rows = []
    for source, phases in record["sources"].items():
        quantised, generated = phases["quantise"], phases["generate"]
        rows.append(
            [
                source,
                size(quantised["file_bytes"]),
                size(quantised["peak_bytes"]),
                duration(quantised["seconds"]),
                size(generated["peak_bytes"]),
                duration(generated["step_seconds"]),
                f"{generated['share_of_ceiling']:.0%}",
                f"{size(phases['info']['took_bytes'])}, {size(phases['info']['total_bytes'])}",
            ]
        )
    return rows


HEAD = [
    "from",
    "file",
    "peak quantising",
    "in",
    "peak generating",
    "a step",
    "of the ceiling",
    "beside torch itself, computed",
]


def main() -> None:
    parser = common.argument_parser(__doc__ or "", 5.0)
    parser.add_argument("--sources", default="random,gguf")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--layers", type=int, default=30, help="fewer for a trial run")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--scratch", type=Path, help="a folder with about 50 GB free; default: the system's")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--conclude", type=Path, metavar="RECORD", help="anew from a record's phases, without a run")
    arguments = parser.parse_args()
    if arguments.conclude:
        record = json.loads(arguments.conclude.read_text())
        conclude(record)
        common.write(arguments.conclude, record)
        print(common.table(HEAD, lines(record)))
        return
    if arguments.phase:
        print(json.dumps(PHASES[arguments.phase](arguments)))
        return
    record = {"what": "the true size", "recipe": arguments.recipe, "layers": arguments.layers, "sources": {}}
    run(arguments, record)
    conclude(record)
    print(common.table(HEAD, lines(record)))
    common.finish(record, arguments)


if __name__ == "__main__":
    main()
