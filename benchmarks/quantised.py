"""What weights in fewer bits cost: every recipe on nano and on a random model of half a billion weights.

    .venv/bin/python benchmarks/quantised.py           # quality; the machine may be busy
    .venv/bin/python benchmarks/quantised.py --time    # ms a step, into the same record; nothing else may run
    .venv/bin/python benchmarks/quantised.py --quick   # 50 puzzles a band, no half a billion; writes nothing
    .venv/bin/python benchmarks/quantised.py --docs    # the record's tables into docs/quantisation.md

Error, divergence and agreement are read on the canvases that the full-precision model meets on its own way, with its
soft embeddings: both models see the same, pass by pass, and what is pinned does not count. Solve rates are free runs,
each model on its own way. "Calibrated" weights are rounded by what sample puzzles, of another seed, send through them;
"weighed" ones have their scales searched by the mean squares of that alone, and are compared but not run.
Half a billion random weights are compared with float32 arithmetic on the same bf16 weights. The record is written row
by row, and a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.nano import BANDS, puzzles
from sfumato import LLM, Options, ops
from sfumato.checkpoints.load import PLAIN
from sfumato.checkpoints.load import load as load_model
from sfumato.evals.statistics import PairedCounts
from sfumato.evals.sudoku import request, solve
from sfumato.measure.machine import ROOT, environment
from sfumato.measure.parts import engine_step, random_config, random_model
from sfumato.measure.plan import BenchPlan
from sfumato.measure.work import size
from sfumato.model.cache import KVCache
from sfumato.model.network import Model, products
from sfumato.model.passes import Pass
from sfumato.ops.packed import CODES
from sfumato.quant import recipes
from sfumato.quant.apply import quantize_
from sfumato.quant.calibrate import correlation_of, importance_of
from sfumato.quant.recipes import named
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.noise import CountedNoise
from sfumato.sampling.rules import Rules
from sfumato.sampling.step import StepInput, step_
from sfumato.tasks import sudoku

Record = dict[str, Any]
Calibration = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Correlations, and mean squares."""
OUTPUT, DOCS = ROOT / "benchmarks" / "results" / "quantised.json", ROOT / "docs" / "quantisation.md"
BEGIN, END = "<!-- quantised -->", "<!-- /quantised -->"
CALIBRATED, WEIGHED = ", calibrated", ", weighed"
RECIPES = tuple(recipes.RECIPES)
ROWS = (
    *("float32", "bf16", *RECIPES),
    *(f"{name}{CALIBRATED}" for name in RECIPES),
    # 8 bits have no search that could weigh.
    *(f"{name}{WEIGHED}" for name in RECIPES if any(CODES[kind].bits < 8 for kind in named(name).kinds)),
)
"""What is measured on nano. The half a billion has no float32 row, and random weights no text to learn from."""
SEED, BATCH = 7, 50
FOLLOWED = 24
"""Puzzles a band that are followed pass by pass."""
SAMPLES = 64
"""Puzzles that recipes are calibrated on."""
TARGETS = {"int8": (0.005, 0.02), "fp8": (0.005, 0.02), "int4": (0.02, 0.05)}
"""At most so much less of the puzzles solved, in any band, and so much more steps."""


# ---- the same canvases for two models --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """What a model met on its way through some canvases, and what it said there."""

    prompt_BT: Tensor
    passes: list[tuple[list[int], Tensor, Tensor | None]]
    """Rows, canvases, soft embeddings."""
    free_XL: Tensor
    """Positions that are not pinned, by row."""
    logits: list[Tensor]
    """float32 [free positions, V], a pass."""


def follow(model: Model, prompt_BT: Tensor, pin_BL: Tensor, rules: Rules) -> Way:
    """The way of this model, until every canvas has stopped."""
    batch, rows = len(prompt_BT), list(range(len(prompt_BT)))
    cache = encoded(model, prompt_BT)
    seeds = [SEED] * batch
    state = Canvases.allocate(model, [rules] * batch, seeds, rows, has_pins=True)
    noise = CountedNoise(seeds, rows, pin_BL.shape[1], model.config.vocab_size)
    state.begin_(rows, noise.canvas(rows, [0] * batch), pin_BL, [0] * batch)
    passes: list[tuple[list[int], Tensor, Tensor | None]] = []
    while rows:
        passes.append((rows, state.canvas_XL[rows], state.soft_XLD[rows] if passes else None))
        run = Pass(model, cache, rows, [0] * len(rows), 0, pin_BL.shape[1])
        step_(model, cache, state, StepInput(torch.tensor(rows), run, is_first=len(passes) == 1))
        rows = [row for row in rows if not state.is_done_X[row]]
    way = Way(prompt_BT, passes, pin_BL < 0, [])
    way.logits.extend(logits_of(model, way))
    return way


def logits_of(model: Model, way: Way) -> Iterator[Tensor]:
    """What a model says at the free positions of every pass of a way, behind a cache of its own."""
    cache = encoded(model, way.prompt_BT)
    for rows, canvas_BL, soft_BLD in way.passes:
        soft_BLD = None if soft_BLD is None else soft_BLD.to(model.dtype)
        yield model.logits(model.denoise(canvas_BL, cache, soft_BLD, rows))[way.free_XL[rows]]


def encoded(model: Model, prompt_BT: Tensor) -> KVCache:
    room = prompt_BT.shape[1] + model.config.canvas_length
    cache = KVCache.allocate(model.config, len(prompt_BT), room, model.device, model.dtype)
    model.encode(prompt_BT, cache)
    return cache


@torch.inference_mode()
def compare(model: Model, ways: Sequence[Way]) -> Record:
    """Relative error of the logits, divergence in nats a position, share of positions with the same argmax."""
    error = total = divergence = same = count = 0.0
    for way in ways:
        for exact, computed in zip(way.logits, logits_of(model, way), strict=True):
            error += float((computed - exact).double().square().sum())
            total += float(exact.double().square().sum())
            log_p, log_q = exact.log_softmax(-1), computed.log_softmax(-1)
            divergence += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            same += float((exact.argmax(-1) == computed.argmax(-1)).sum())
            count += len(exact)
    return {
        "logit_error": math.sqrt(error / total),
        "divergence": divergence / count,
        "agreement": same / count,
        "positions": int(count),
    }


def released_bytes(row: str) -> int:
    """Of the released model's text stack in bf16 or with this recipe: counted, not measured."""
    with torch.device("meta"):
        model = Model(common.released_config(), ops.load("reference"))
    total = 0
    for name, tensor in model.state_dict().items():
        form = named(row).format_of(name) if row in RECIPES else None
        parts = form.parts(tuple(tensor.shape)).values() if form else [(torch.bfloat16, tensor.shape)]
        total += sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts)
    return total


def weight_bytes(model: Model) -> int:
    """Of all weights, as they lie in memory."""
    packed = [weight for owner, leaf in products(model) if not isinstance(weight := getattr(owner, leaf), Tensor)]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *packed])


# ---- nano ------------------------------------------------------------------------------------------------------------


def nano(row: str, calibration: Calibration | None = None) -> LLM:
    """As a user gets it; `calibration` is for the calibrated and weighed rows."""
    recipe, _, how = row.partition(", ")
    dtype = "bfloat16" if row == "bf16" else None
    llm = LLM.load("nano", device="cpu", dtype=dtype, quantize=row if row in RECIPES else None)
    if how:
        assert calibration is not None
        correlations, importance = calibration
        model = load_model("nano", PLAIN)
        is_weighed = row.endswith(WEIGHED)
        llm.model = laid_out(quantize_(model, recipe, importance if is_weighed else correlations))
    return llm


def laid_out(model: Model) -> Model:
    """For the fastest operations that take its weights."""
    packed = [weight for owner, leaf in products(model) if not isinstance(weight := getattr(owner, leaf), Tensor)]
    return model.use_(ops.load("auto", "cpu", model.dtype, packed)).pack_()


@torch.inference_mode()
def nano_ways(count: int) -> list[Way]:
    """Of full precision, a band each."""
    llm, ways = LLM.load("nano", device="cpu"), []
    for band in BANDS:
        ids, pins = zip(*(request(llm, puzzle) for puzzle in puzzles(band, count, SEED)), strict=True)
        pin_BL = torch.full((count, llm.model.config.canvas_length), -1)
        for row, pinned in enumerate(pins):
            pin_BL[row, list(pinned)] = torch.tensor(list(pinned.values()))
        rules = Rules.of(Options().with_defaults(llm.defaults))
        ways.append(follow(llm.model, torch.tensor(ids), pin_BL, rules))
    return ways


def sample_text(llm: LLM, count: int) -> list[list[int]]:
    """Puzzles with their solutions, as nano was trained on them; none of a benchmark's."""
    arguments = [puzzle for band in BANDS for puzzle in puzzles(band, -(-count // len(BANDS)), SEED + 1)][:count]
    texts = [request(llm, puzzle)[0] + llm.tokenizer.encode(sudoku.solve(puzzle) or "") for puzzle in arguments]
    return [[*text, *filter(None, [llm.tokenizer.id("<turn|>")])] for text in texts]


def solved(llm: LLM, band: str, count: int) -> Record:
    """Of `count` puzzles: outcomes as a string of 0 and 1, steps as a list."""
    options = Options(seed=SEED, temperature=0.0)
    results = list(solve(llm, puzzles(band, count, SEED), options, batch=min(BATCH, count)))
    steps = [one.steps for one in results]
    outcomes = "".join(str(int(one.solved)) for one in results)
    return {"solved": outcomes.count("1") / count, "mean_steps": statistics.mean(steps), "outcomes": outcomes}


# ---- half a billion random weights -----------------------------------------------------------------------------------


def mid(name: str, row: str) -> Model:
    """The same bf16 weights in every row; attention and routing about as decisive as trained ones. As they are drawn,
    the one is so sharp and the other so even that bf16 alone changes all logits."""
    model = random_model(random_config(name), torch.bfloat16, "cpu", "fused")
    for own, parameter in model.named_parameters():
        if own.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.fill_(0.3)
        elif own.endswith("router.scale"):
            parameter.fill_(50.0)
    if row == "float32":
        return model.float()
    if row in RECIPES:
        quantize_(model, row)
    return laid_out(model)


@torch.inference_mode()
def mid_ways(name: str) -> list[Way]:
    """Of float32, four passes over two canvases: random weights never settle."""
    model = mid(name, "float32")
    config, generator = model.config, torch.Generator().manual_seed(SEED)
    prompt_BT = torch.randint(config.vocab_size, (2, 128), generator=generator)
    pin_BL = torch.full((2, config.canvas_length), -1)
    return [follow(model, prompt_BT, pin_BL, Rules.of(Options(max_steps=4, temperature_steps=48)))]


# ---- the record ------------------------------------------------------------------------------------------------------


def quality(record: Record, arguments: argparse.Namespace) -> Iterator[None]:
    """Fill in what the record lacks; yields whenever there is more to write."""
    record["released_bytes"] = {row: released_bytes(row) for row in ("bf16", *RECIPES)}
    rows = [row for row in arguments.rows if not complete(row, record["nano"].get(row, {}), arguments)]
    if rows:
        common.say("nano, the way of full precision")
        ways = nano_ways(min(FOLLOWED, arguments.count))
        calibration = None
        if any(", " in row for row in rows):
            common.say("nano, calibration")
            llm = LLM.load("nano", device="cpu", ops="fused")
            text = sample_text(llm, SAMPLES)
            calibration = correlation_of(llm.model, text), importance_of(llm.model, text)
        for row in rows:
            llm = nano(row, calibration)
            result = record["nano"].setdefault(row, {})
            if "divergence" not in result:
                common.say(f"nano, {row}")
                result |= {"ops": llm.model.ops.name, "bytes": weight_bytes(llm.model), **compare(llm.model, ways)}
                yield
            for band in bands_of(row, arguments):
                if band not in result.setdefault("bands", {}):
                    common.say(f"nano, {row}, {band}")
                    result["bands"][band] = solved(llm, band, arguments.count)
                    yield
    rows = [row for row in arguments.rows if row != "float32" and ", " not in row]
    rows = [row for row in rows if arguments.size and "divergence" not in record["mid"].get(row, {})]
    if rows:
        common.say(f"{arguments.size}, the way of full precision")
        ways = mid_ways(arguments.size)
        for row in rows:
            common.release()
            common.say(f"{arguments.size}, {row}")
            model = mid(arguments.size, row)
            result = {"ops": model.ops.name, "bytes": weight_bytes(model), **compare(model, ways)}
            record["mid"].setdefault(row, {}).update(result)
            del model
            yield


def bands_of(row: str, arguments: argparse.Namespace) -> list[str]:
    return [] if row.endswith(WEIGHED) else arguments.bands


def complete(row: str, result: Record, arguments: argparse.Namespace) -> bool:
    return "divergence" in result and all(band in result.get("bands", {}) for band in bands_of(row, arguments))


def times(record: Record, arguments: argparse.Namespace) -> Iterator[None]:
    """A step of one canvas, in the engine's own loop; what is calibrated takes what its recipe takes."""
    plan = BenchPlan(seconds=arguments.seconds)
    for row in arguments.rows:
        if ", " in row:
            continue
        common.say(f"nano, {row}")
        record["nano"].setdefault(row, {})["step"] = asdict(engine_step(nano(row).model, plan))
        yield
        if arguments.size and row != "float32":
            common.release()
            common.say(f"{arguments.size}, {row}")
            record["mid"].setdefault(row, {})["step"] = asdict(engine_step(mid(arguments.size, row), plan))
            yield


# ---- tables ----------------------------------------------------------------------------------------------------------


def flips(base: str, other: str) -> tuple[int, int, float]:
    """Puzzles lost and won, and how likely a difference at least so large is if a flip goes either way alike."""
    counts = PairedCounts.of([one == "1" for one in base], [one == "1" for one in other])
    return counts.first_only, counts.second_only, counts.p


def verdict(row: Record, base: Record, recipe: str) -> str:
    """Of the targets: reached, or missed by puzzles or steps, and whether chance alone may have done it."""
    if recipe not in TARGETS or not row.get("bands"):
        return "–"
    most_lost, most_steps = TARGETS[recipe]
    missed = []
    for band, result in row["bands"].items():
        first = base["bands"][band]
        if first["solved"] - result["solved"] > most_lost + 1e-9:
            chance = flips(first["outcomes"], result["outcomes"])[2]
            missed.append(f"{band}: {first['solved'] - result['solved']:.1%} fewer (p = {chance:.2f})")
        if result["mean_steps"] > first["mean_steps"] * (1 + most_steps):
            missed.append(f"{band}: {result['mean_steps'] / first['mean_steps'] - 1:.1%} more steps")
    return "; ".join(missed) or "reached"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def common_cells(row: Record) -> list[str]:
    def cell(key: str, form: str) -> str:
        return format(row[key], form) if key in row else "–"

    step = row.get("step", {}).get("median")
    return [
        size(row["bytes"]) if "bytes" in row else "–",
        cell("logit_error", ".2%"),
        cell("divergence", ".5f"),
        cell("agreement", ".2%"),
        "–" if step is None else f"{step * 1e3:.1f}{' (unpacking)' if unpacks(row) else ''}",
    ]


def unpacks(row: Record) -> bool:
    """Whether every product unpacks its weight first: its ms are those of unpacking."""
    return row.get("ops") == "fused"


def page(record: Record) -> str:
    """The tables, as markdown."""
    blocks = []
    bands: dict[str, str] = record["bands"]
    if record["nano"]:
        base = record["nano"].get("float32", {})
        head = ["nano", "ops", "bytes", "logit error", "KL, nats", "agreement", "ms a step"]
        head += [f"solved, {band} ({clues})" for band, clues in bands.items()] + [f"steps, {band}" for band in bands]
        lines, pairs = [], []
        for name, row in record["nano"].items():
            result = row.get("bands", {})
            rates = [f"{result[band]['solved']:.1%}" if band in result else "–" for band in bands]
            steps = [f"{result[band]['mean_steps']:.2f}" if band in result else "–" for band in bands]
            lines.append([name, row.get("ops", "–"), *common_cells(row), *rates, *steps])
            if name != "float32" and result and base.get("bands"):
                cells = []
                for band in bands:
                    if band not in result or band not in base["bands"]:
                        cells.append("–")
                        continue
                    losses, won, chance = flips(base["bands"][band]["outcomes"], result[band]["outcomes"])
                    cells.append(f"-{losses} +{won} (p = {chance:.2f})")
                pairs.append([name, *cells, verdict(row, base, name.partition(", ")[0])])
        blocks.append(markdown(head, lines))
        count = record["puzzles"]
        blocks.append(
            f"The same {count} puzzles a band beside float32, lost and won; p: as large a difference by chance."
        )
        blocks.append(markdown(["nano", *bands, "target"], pairs))
    if record["mid"]:
        head = [record["size"], "ops", "bytes", "logit error", "KL, nats", "agreement", "ms a step"]
        lines = [[name, row.get("ops", "–"), *common_cells(row)] for name, row in record["mid"].items()]
        blocks.append(markdown(head, lines))
    if record.get("released_bytes"):
        base = record["released_bytes"]["bf16"]
        lines = [[row, size(total), f"{total / base:.0%}"] for row, total in record["released_bytes"].items()]
        blocks.append(markdown(["released, text only", "bytes, counted", "of bf16"], lines))
    return "\n\n".join(blocks)


def load(path: Path | None, arguments: argparse.Namespace) -> Record:
    """What an earlier run of the same puzzles left there; else an empty record."""
    bands = {band: f"{BANDS[band][0]}–{BANDS[band][1]} clues" for band in arguments.bands}
    fresh = {"what": "quantised", "seed": SEED, "puzzles": arguments.count, "bands": bands, "size": arguments.size}
    if path is not None and path.exists():
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        if all(record.get(key) == value for key, value in fresh.items()):
            return record
        common.say(f"{path.name} is of other settings; all is measured anew")
    return {**fresh, "nano": {}, "mid": {}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--count", type=int, default=500, help="puzzles a band")
    parser.add_argument("--bands", type=lambda text: text.split(","), default=list(BANDS))
    parser.add_argument("--rows", type=lambda text: text.split(";"), default=list(ROWS), help="separated by ;")
    parser.add_argument("--size", default="mid", help="the random model; empty: none")
    parser.add_argument("--quick", action="store_true", help="50 puzzles a band, no random model")
    parser.add_argument("--time", action="store_true", help="measure ms a step, and nothing else")
    parser.add_argument("--docs", action="store_true", help="write the tables into the page, and measure nothing")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long each timing may take")
    parser.add_argument("-o", "--output", type=Path, help="default: benchmarks/results/quantised.json, unless --quick")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.count, arguments.size = 50, ""
    path = arguments.output or (None if arguments.quick else OUTPUT)
    if arguments.docs:
        before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
        tables = page(json.loads((path or OUTPUT).read_text(encoding="utf-8")))
        DOCS.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
        return
    record = load(path, arguments)
    for _ in times(record, arguments) if arguments.time else quality(record, arguments):
        record["time_environment" if arguments.time else "environment"] = environment()
        if path:
            common.write(path, record)
    print(page(record))


if __name__ == "__main__":
    main()
