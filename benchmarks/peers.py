"""Sfumato beside what a user would pick instead: the same weights, prompt and steps, in one run, taking turns.

    .venv/bin/python benchmarks/peers.py --seconds 15 -o runs/bench/peers.json

transformers holds the very tensors that ours are packed from, and the logits of both are compared, with each other and
with float32, before anything is timed. First its own ways are tried one after the other: sdpa or eager attention, each
of its expert implementations, dynamic cache; the fastest is the one that stands beside ours. With --compile-seconds its
compiled ways are tried too: torch.compile around its forward, and `generate` with a static cache, which is wrong once
the encoded tokens reach the window and therefore only takes part where they do not. Then, in turns, theirs and ours:
"denoise forward" (soft embedding, pass, logits), "whole step" (from one draft to the next in a running answer: all that
a step does) and a whole answer. Medians of those turns; the record is written after each part.

mlx-vlm takes no turns: `--mlx` names a Python that has it (a virtual environment of its own), which reads the same
weights from a checkpoint and does one denoise forward after the rest, for time and logits. Its wheel for Linux brings
the reference BLAS; fair is a faster one before it: --mlx "env LD_PRELOAD=/path/to/libopenblas.so.0 /path/to/python".
"""

from __future__ import annotations

import itertools
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.mlx_ways import FORWARD, MlxCase, sentence, ways_of_mlx
from benchmarks.peer_models import inputs, model_of, packed, twin
from sfumato.engine.run import Run
from sfumato.events import Done, Draft
from sfumato.measure.machine import Timing, environment, measure
from sfumato.measure.parts import prompt_ids
from sfumato.measure.plan import BenchPlan
from sfumato.measure.work import duration
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.options import Options

STEP, ANSWER = "whole step", "whole answer"
STATIC = "compiled generate, static cache"
EXPERTS = ("grouped_mm", "eager", "batched_mm")
HOPELESS = 10
"""Times slower than the fastest way: then the same experts are not tried with the other attention."""
THEIRS = "transformers"
LIMITS = {"bf16": 0.25, "int8": 0.15}
"""What the issue asks for: our time over theirs, for the step and, in bf16, for the answer."""


# ---- one forward -----------------------------------------------------------------------------------------------------


def forward_of(model: Model, plan: BenchPlan) -> Callable[[], torch.Tensor]:
    """The work of transformers' forward on our model: soft embedding, pass, float32 logits."""
    prompt_BT, canvas_BL, logits_BLV = inputs(model, plan)
    cache = KVCache.allocate(model.config, 1, plan.prompt + model.config.canvas_length, model.device, model.dtype)
    model.encode(prompt_BT, cache)

    def call() -> torch.Tensor:
        soft_BLD = model.ops.soft_embedding(logits_BLV, model.embed_tokens.weight, model.embed_scale)
        return model.logits(model.denoise(canvas_BL, cache, soft_BLD))

    return call


def forward_of_theirs(
    theirs: Any, model: Model, plan: BenchPlan, forward: Callable[..., Any] | None = None
) -> Callable[[], torch.Tensor]:
    from transformers import DynamicCache

    prompt_BT, canvas_BL, logits_BLV = inputs(model, plan)
    cache = DynamicCache(config=theirs.config.text_config)
    theirs.model.encoder(input_ids=prompt_BT, past_key_values=cache)
    run = forward or theirs.forward
    arguments = {"decoder_input_ids": canvas_BL, "self_conditioning_logits": logits_BLV, "past_key_values": cache}
    return lambda: run(**arguments).logits


def difference(theirs: Any, model: Model, plan: BenchPlan) -> float:
    """Largest difference of the two engines' logits for the same canvas, after the same prompt."""
    return float((forward_of_theirs(theirs, model, plan)() - forward_of(model, plan)()).abs().max())


def logits_beside(theirs: Any, plain: Model, each: dict[str, Model], plan: BenchPlan) -> dict[str, Any]:
    """Logits of everyone against float32 on the same weights, and against each other."""
    exact_model = packed(plain, "", "fused").float()
    exact = forward_of(exact_model, plan)().float()
    del exact_model
    common.release()
    there = forward_of_theirs(theirs, plain, plan)().float()
    size = exact.norm()
    results: dict[str, Any] = {
        "transformers": {"error_against_float32": float((there - exact).norm() / size)},
    }
    for name, model in each.items():
        here = forward_of(model, plan)().float()
        results[name] = {
            "error_against_float32": float((here - exact).norm() / size),
            "largest_difference_from_transformers": float((here - there).abs().max()),
            "argmax_as_transformers": float((here.argmax(-1) == there.argmax(-1)).float().mean()),
            "argmax_as_float32": float((here.argmax(-1) == exact.argmax(-1)).float().mean()),
        }
    return results


# ---- steps and answers -----------------------------------------------------------------------------------------------


class Clock:
    """A streamer for transformers' generate that notes when each draft comes: what `Draft` events are to ours."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Any) -> None: ...

    def put_draft(self, value: Any) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None: ...


def steps_of(model: Model, plan: BenchPlan, steps: int) -> list[float]:
    """Seconds from one draft to the next in our engine, without the first step, which has no soft embedding."""
    options = Options(
        max_tokens=model.config.canvas_length, seed=plan.seed, max_steps=steps, confidence=0.0, drafts=True
    )
    run = Run(model, [prompt_ids(model.config, plan)], options)
    return _gaps([time.perf_counter() for event in run if isinstance(event, Draft)])


def steps_of_theirs(theirs: Any, model: Model, plan: BenchPlan, steps: int, cache: str = "dynamic") -> list[float]:
    clock = Clock()
    generate(theirs, model, plan, model.config.canvas_length, steps, cache, clock)
    return _gaps(clock.moments)


def _gaps(moments: list[float]) -> list[float]:
    return [later - before for before, later in itertools.pairwise(moments)]


def generate(
    theirs: Any, model: Model, plan: BenchPlan, tokens: int, steps: int, cache: str = "dynamic", streamer: Any = None
) -> int:
    """Their own generate with exactly so many steps a canvas; the number of new tokens."""
    prompt_BT = torch.tensor([prompt_ids(model.config, plan)], device=model.device)
    fixed = {"confidence_threshold": 1e-30, "cache_implementation": cache, "streamer": streamer}
    out = theirs.generate(prompt_BT, max_new_tokens=tokens, max_denoising_steps=steps, **fixed)
    common.wait(model.device)
    return int(out.sequences.shape[1]) - plan.prompt


def answer(model: Model, plan: BenchPlan) -> int:
    options = Options(max_tokens=plan.tokens, seed=plan.seed, max_steps=plan.steps, confidence=0.0)
    events = Run(model, [prompt_ids(model.config, plan)], options)
    return next(len(event.tokens) for event in events if isinstance(event, Done))


# ---- transformers' ways ----------------------------------------------------------------------------------------------


def ways(theirs: Any, model: Model, plan: BenchPlan, seconds: float) -> dict[str, Any]:
    """Its forward in each way that it has on this machine; an implementation that fails says why."""
    results: dict[str, Any] = {}
    for attention in ("sdpa", "eager"):
        for experts in EXPERTS:
            name = f"{attention}, {experts} experts"
            known = [one["seconds"] for one in results.values() if "seconds" in one]
            if (before := results.get(f"sdpa, {experts} experts", {}).get("seconds", 0.0)) > HOPELESS * min(
                known, default=1
            ):
                results[name] = {"failed": f"not tried: {before:.0f} s with sdpa"}
                continue
            common.say(f"transformers: {name}")
            try:
                choose(theirs, attention, experts)
                call = forward_of_theirs(theirs, model, plan)
                results[name] = row(measure(call, seconds, model.device, repeats=5))
                results[name] |= {"attention": attention, "experts": experts}
            except Exception as error:
                results[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            common.release()
    return results


def choose(theirs: Any, attention: str, experts: str) -> None:
    theirs.set_attn_implementation(attention)
    theirs.set_experts_implementation(experts)


def compiled(theirs: Any, model: Model, plan: BenchPlan, limit: int, steps: int) -> dict[str, Any]:
    """Its compiled ways, given up after `limit` seconds each: that, or a compiler that fails, is a finding."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not compiled within {limit} s")

    def forward() -> tuple[str, Timing]:
        call = forward_of_theirs(theirs, model, plan, torch.compile(theirs.forward))
        call()
        return FORWARD, measure(call, plan.seconds, model.device)

    def static() -> tuple[str, Timing]:
        window = model.config.window or 10**9
        if plan.prompt >= window:
            raise ValueError(
                f"a prompt of {plan.prompt} reaches the window of {window}: its static cache is wrong there"
            )
        steps_of_theirs(theirs, model, plan, 3, "static")
        return STEP, Timing.of(steps_of_theirs(theirs, model, plan, steps, "static"))

    results: dict[str, Any] = {}
    for name, run in {"compiled forward, dynamic cache": forward, STATIC: static}.items():
        common.say(f"transformers: {name} (at most {limit} s)")
        before, began = signal.signal(signal.SIGALRM, stop), time.perf_counter()
        signal.alarm(limit)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler, about their code
                part, timing = run()
            results[name] = {part: row(timing)}
        except Exception as error:
            results[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        results[name]["seconds_with_compiling"] = time.perf_counter() - began
    return results


# ---- the comparison --------------------------------------------------------------------------------------------------


def row(timing: Timing) -> dict[str, Any]:
    return {
        "seconds": timing.median,
        "fastest": timing.fastest,
        "slowest": timing.slowest,
        "repeats": timing.repeats,
    }


def pooled(runs: dict[str, Callable[[], list[float]]], seconds: float, rounds: int = 12) -> dict[str, Timing]:
    """Runs that give several times each, in turns; the median of all that each gave."""
    results: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + seconds
    for _ in range(rounds):
        for name, run in runs.items():
            results[name] += run()
        if time.perf_counter() > until:
            break
    return {name: Timing.of(times) for name, times in results.items()}


@dataclass(frozen=True)
class Choice:
    """What is compared, and how long it may take."""

    name: str
    kinds: list[str]
    """Recipes of ours, beside the dtype of the plain model."""
    ops: str
    compile_seconds: int = 0
    """The limit for each compiled way of transformers; 0 leaves them out."""
    mlx: str = ""
    """A Python that has mlx-vlm, to time it too."""


class Comparison:
    """A plain model of ours, transformers' twin of it, and ours by recipe, with the record of what was measured."""

    def __init__(self, plain: Model, plan: BenchPlan, choice: Choice) -> None:
        import transformers

        common.without_eos(plain)
        self.plain, self.plan = plain, plan
        self.theirs = twin(plain)
        self.base = "float32" if plain.dtype == torch.float32 else "bf16"
        self.each: dict[str, Model] = {}
        for kind in (self.base, *choice.kinds):
            try:
                self.each[f"sfumato {kind}"] = packed(plain, "" if kind == self.base else kind, choice.ops)
            except Exception as error:
                common.say(f"sfumato {kind}: left out: {error}")
        where = environment(plain.device)
        where["versions"]["transformers"] = transformers.__version__
        self.results: dict[str, Any] = {
            "what": "peers",
            "model": choice.name,
            "dtype": self.base,
            "ops": next(iter(self.each.values())).ops.name,
            "prompt": plan.prompt,
            "steps": plan.steps,
            "mlx-vlm": "not timed; --mlx PYTHON names a Python that has it",
            "environment": where,
        }

    def logits(self) -> None:
        common.say("logits")
        self.results["logits"] = logits_beside(self.theirs, self.plain, self.each, self.plan)

    def fastest_way(self) -> None:
        """Time transformers' ways, and let it take the fastest."""
        each = ways(self.theirs, self.plain, self.plan, self.plan.seconds / 4)
        fastest = min((way for way in each.values() if "seconds" in way), key=lambda way: way["seconds"])
        choose(self.theirs, fastest["attention"], fastest["experts"])
        self.results["ways of transformers"] = each
        self.results["best way"] = f"{fastest['attention']}, {fastest['experts']} experts"

    def forward(self) -> None:
        common.say(f"in turns: {FORWARD}")
        calls = {THEIRS: forward_of_theirs(self.theirs, self.plain, self.plan)}
        calls |= {own: forward_of(model, self.plan) for own, model in self.each.items()}
        timed = common.alternate(calls, self.plan.seconds, self.plain.device)
        self.results["parts"] = {FORWARD: {k: row(t) for k, t in timed.items()}}

    def step(self) -> None:
        common.say(f"in turns: {STEP}")
        few = 5
        runs: dict[str, Callable[[], list[float]]]
        runs = {THEIRS: partial(steps_of_theirs, self.theirs, self.plain, self.plan, few)}
        runs |= {own: partial(steps_of, model, self.plan, few) for own, model in self.each.items()}
        static = self.results.get("compiled", {}).get(STATIC, {})
        if STEP in static:
            runs[STATIC] = partial(steps_of_theirs, self.theirs, self.plain, self.plan, few, "static")
        for run in list(runs.values())[1:]:
            run()
        times = {k: row(t) for k, t in pooled(runs, self.plan.seconds).items()}
        if STEP in static:
            static[STEP] = times.pop(STATIC)
        self.results["parts"][STEP] = times

    def answer(self) -> None:
        common.say(f"in turns: {ANSWER}")
        plan = self.plan
        calls: dict[str, Callable[[], int]]
        calls = {THEIRS: partial(generate, self.theirs, self.plain, plan, plan.tokens, plan.steps)}
        calls |= {own: partial(answer, model, plan) for own, model in self.each.items()}
        tokens = {own: calls[own]() for own in self.each}
        if len(set(tokens.values())) != 1 or plan.tokens % self.plain.config.canvas_length:
            common.say(f"answers differ in length: {tokens}")
        self.results["tokens"] = plan.tokens
        timed = common.alternate(calls, 2 * plan.seconds, self.plain.device, warm=0)
        self.results["parts"][ANSWER] = {k: row(t) for k, t in timed.items()}


@torch.inference_mode()
def compare(plain: Model, plan: BenchPlan, choice: Choice, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything, part by part; `write` gets the record as far as it is after each."""
    comparison = Comparison(plain, plan, choice)
    results = comparison.results
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers', about its own code
        comparison.logits()
        write(results)
        comparison.fastest_way()
        write(results)
        if choice.compile_seconds:
            results["compiled"] = compiled(comparison.theirs, plain, plan, choice.compile_seconds, 6)
            write(results)
        comparison.forward()
        write(results)
        comparison.step()
        write(results)
        comparison.answer()
    results["ratios"], results["targets"] = ratios(results, comparison.base)
    write(results)
    if choice.mlx:
        results["ways of mlx-vlm"] = ways_of_mlx(choice.mlx, plain, mlx_case(plain, plan), plan.seconds)
        results["mlx-vlm"] = sentence(results["ways of mlx-vlm"])
        write(results)
    return results


def ratios(results: dict[str, Any], base: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our median over the best that transformers reached, compiled or not, for each part; and the issue's targets."""
    best = {part: rows["transformers"]["seconds"] for part, rows in results["parts"].items()}
    for way in results.get("compiled", {}).values():
        for part in best:
            if part in way:
                best[part] = min(best[part], way[part]["seconds"])
    shares = {
        part: {own: timing["seconds"] / best[part] for own, timing in rows.items() if own != "transformers"}
        for part, rows in results["parts"].items()
    }
    targets = {}
    for kind, most in LIMITS.items():
        if f"sfumato {kind}" in shares[STEP]:
            targets[f"{STEP}, {kind}, over transformers' best"] = common.target(shares[STEP][f"sfumato {kind}"], most)
    if base == "bf16":
        targets[f"{ANSWER}, bf16, over transformers' best"] = common.target(
            shares[ANSWER]["sfumato bf16"], LIMITS["bf16"]
        )
    return shares, targets


def mlx_case(plain: Model, plan: BenchPlan) -> MlxCase:
    """The same forward for mlx-vlm, with our float32 logits to compare."""
    exact_model = packed(plain, "", "fused").float()
    prompt, canvas, previous = (tensor.cpu().numpy() for tensor in inputs(exact_model, plan))
    exact = forward_of(exact_model, plan)().cpu()
    del exact_model
    common.release()
    return MlxCase(prompt, canvas, previous, exact)


def table(results: dict[str, Any]) -> str:
    """What took turns: seconds, and in brackets our share of transformers' time."""
    names = list(next(iter(results["parts"].values())))
    lines = []
    for part, rows in results["parts"].items():
        base = rows["transformers"]["seconds"]
        lines.append([part, *(f"{duration(rows[n]['seconds'])} (×{rows[n]['seconds'] / base:.3f})" for n in names)])
    errors = [f"{results['logits'].get(n, {}).get('error_against_float32', float('nan')):.1e}" for n in names]
    lines.append(["logits against float32", *errors])
    text = common.table(["", *names], lines)
    for name, one in (results["ways of transformers"] | results.get("compiled", {})).items():
        part = next((one[p] for p in (FORWARD, STEP) if p in one), one)
        text += f"\n{name}: {duration(part['seconds']) if 'seconds' in part else one.get('failed')}"
    for name, one in results["logits"].items():
        if "largest_difference_from_transformers" in one:
            most = one["largest_difference_from_transformers"]
            text += f"\n{name}: logits differ from transformers' by at most {most:.3g}"
            text += f", the same argmax at {one['argmax_as_transformers']:.1%} of positions"
    for name, one in results["targets"].items():
        text += f"\n{name}: {one['value']:.3f} (target {one['target']})"
    return text + f"\nmlx-vlm: {results['mlx-vlm']}"


def main() -> None:
    parser = common.argument_parser(__doc__, 15.0)
    parser.add_argument("--size", default="mid", choices=["mid", "tiny"])
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "float32"])
    parser.add_argument("--kinds", default="int8", help="recipes of ours beside --dtype; may be empty")
    parser.add_argument("--ops", default="auto")
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compile-seconds", type=int, default=0, help="limit for each compiled way; 0 leaves them out")
    parser.add_argument("--mlx", default="", metavar="PYTHON", help="a Python that has mlx-vlm, to time it too")
    arguments = parser.parse_args()
    plan = BenchPlan(arguments.prompt, arguments.tokens, arguments.steps, arguments.seconds)
    plain, _ = model_of(arguments.size, arguments.dtype, arguments.device)
    kinds = [kind for kind in arguments.kinds.split(",") if kind]
    choice = Choice(
        f"{arguments.size} (random weights)", kinds, arguments.ops, arguments.compile_seconds, arguments.mlx
    )
    results = compare(plain, plan, choice, lambda record: common.finish(record, arguments))
    print(table(results))


if __name__ == "__main__":
    main()
