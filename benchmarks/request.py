"""Whole answers: by diffusion and one token at a time, in bf16 and int8; and, with --sudoku, nano beside transformers.

    .venv/bin/python benchmarks/request.py --seconds 10 -o runs/bench/request.json
    .venv/bin/python benchmarks/request.py --kinds "" --sudoku 100 -o runs/bench/sudoku.json

An answer takes the same number of steps for every canvas, whatever the random model says. Sudoku: `sfumato sudoku`'s
own path and transformers' `generate` on the embedded checkpoint with its own settings, in turns, at several batch
sizes; solved and mean steps stand beside the seconds. transformers cannot pin the clues, so ours runs both ways, and
what is compared is the way without pins.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from sfumato import LLM, Options
from sfumato.checkpoints.locate import NANO
from sfumato.evals.sudoku import request, solve
from sfumato.measure import parts
from sfumato.measure.parts import random_config, random_model
from sfumato.measure.plan import BenchPlan
from sfumato.measure.work import duration
from sfumato.tasks import sudoku

SEED = 11


def announced(kind: str, part: str) -> None:
    common.say(f"{kind}: {part}")


def answers(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in filter(None, arguments.kinds.split(",")):
        config = random_config(arguments.size)
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        packed = kind if kind not in ("bf16", "float32") else None
        try:
            model = random_model(config, dtype, arguments.device, arguments.ops, quantize=packed)
        except Exception as error:
            results[kind] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        common.without_eos(model)
        plan = BenchPlan(arguments.prompt, arguments.tokens, arguments.steps, arguments.seconds)
        step = parts.engine_step(model, BenchPlan(arguments.prompt, config.canvas_length, 2, 0.0)).median
        each = parts.requests(model, plan, partial(announced, kind), step)
        excess = each["diffusion"]["passes_per_canvas"] / each["diffusion"]["steps_per_canvas"]
        results[kind] = {
            "size": arguments.size,
            "ops": model.ops.name,
            "prompt": arguments.prompt,
            **each,
            "targets": {"passes per canvas, in steps per canvas": common.target(excess, 1.0)},
        }
        del model
        common.release()
    return results


# ---- Sudoku beside transformers --------------------------------------------------------------------------------------


def sudoku_ours(llm: LLM, puzzles: list[str], batch: int, pinned: bool) -> dict[str, float]:
    began = time.perf_counter()
    results = list(solve(llm, puzzles, Options(seed=SEED), pinned, batch))
    seconds = time.perf_counter() - began
    steps = statistics.mean(s.steps for s in results)
    return {"seconds": seconds, "solved": statistics.mean(s.solved for s in results), "mean_steps": steps}


def sudoku_theirs(theirs: Any, llm: LLM, puzzles: list[str], batch: int) -> dict[str, float]:
    """Their generate, with the settings that from_pretrained reads beside the weights."""
    torch.manual_seed(SEED)
    began, solved, steps = time.perf_counter(), 0, []
    for start in range(0, len(puzzles), batch):
        some = puzzles[start : start + batch]
        ids = torch.tensor([request(llm, puzzle)[0] for puzzle in some])
        out = theirs.generate(ids, max_new_tokens=llm.model.config.canvas_length)
        for puzzle, tokens in zip(some, out.sequences[:, ids.shape[1] :].tolist(), strict=True):
            answer = "".join(llm.tokenizer.decode(tokens).split())[:81]
            solved += sudoku.is_solved(answer, puzzle)
        lengths = (out.sequences[:, ids.shape[1] :] != theirs.generation_config.pad_token_id).sum(-1)
        steps += (lengths / out.tokens_per_forward).tolist()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "solved": solved / len(puzzles), "mean_steps": statistics.mean(steps)}


def beside_transformers(count: int, batches: list[int], rounds: int) -> dict[str, Any]:
    """Medians of alternating runs; at each batch size the engines take turns."""
    import transformers

    rng = np.random.default_rng(SEED)
    puzzles = [sudoku.generate(int(clues), rng) for clues in rng.integers(30, 56, count)]
    llm = LLM.load("nano", device="cpu")
    theirs = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(NANO, dtype=torch.float32).eval()
    ours, other, pinned = "sfumato", "transformers", "sfumato, clues pinned"
    results: dict[str, list[dict[str, Any]]] = {ours: [], other: [], pinned: []}
    for batch in batches:
        runs: dict[str, Callable[..., dict[str, float]]] = {
            other: partial(sudoku_theirs, theirs, llm, batch=batch),
            ours: partial(sudoku_ours, llm, batch=batch, pinned=False),
            pinned: partial(sudoku_ours, llm, batch=batch, pinned=True),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        rows: dict[str, dict[str, Any]] = {}
        for run in runs.values():
            run(puzzles[:batch][:2])  # to warm up
        for number in range(rounds):
            for name, run in runs.items():
                common.say(f"sudoku, batch {batch}, round {number + 1}: {name}")
                rows[name] = run(puzzles)
                times[name].append(rows[name]["seconds"])
        for name, row in rows.items():
            results[name].append({"batch": batch, **row, "seconds": statistics.median(times[name]), "rounds": rounds})
    best = {name: min(row["seconds"] for row in rows) for name, rows in results.items()}
    same = {
        str(row["batch"]): row["seconds"] / mine["seconds"]
        for row, mine in zip(results[other], results[ours], strict=True)
    }
    return {
        "puzzles": count,
        "engines": results,
        "ratios_at_the_same_batch": same,
        "ratio_of_the_best": best[other] / best[ours],
        "ratio_of_the_best_with_pins": best[other] / best[pinned],
        "transformers": transformers.__version__,
        "ops": llm.model.ops.name,
        "targets": {
            "times faster than transformers, best batch size of each": common.target(
                best[other] / best[ours], 4.0, at_most=False
            )
        },
    }


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = common.argument_parser(__doc__, 10.0)
    parser.add_argument("--size", default="mid", choices=["mid", "tiny"])
    parser.add_argument(
        "--kinds", default="bf16,int8", help="of weights: bf16, float32, or recipes; empty leaves random models out"
    )
    parser.add_argument("--ops", default="auto")
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sudoku", type=int, default=0, help="puzzles to solve beside transformers")
    parser.add_argument("--batches", default="1,50", help="batch sizes of the puzzles")
    parser.add_argument("--rounds", type=int, default=2, help="of the puzzles")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"what": "request"}
    with torch.inference_mode():
        results["answers"] = answers(arguments)
        common.finish(results, arguments)
        if arguments.sudoku:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # transformers', about its own code
                batches = [int(batch) for batch in arguments.batches.split(",")]
                results["sudoku"] = beside_transformers(arguments.sudoku, batches, arguments.rounds)
            common.finish(results, arguments)
    print(show(results))


def show(results: dict[str, Any]) -> str:
    lines = []
    for kind, one in results["answers"].items():
        for mode in ("diffusion", "autoregressive"):
            row = one.get(mode)
            if row is None:
                continue
            passes = f"{row['passes_per_canvas']:.2f}" if "passes_per_canvas" in row else "–"
            lines.append(
                [
                    f"{mode}, {kind}",
                    str(row["tokens"]),
                    duration(row["seconds"]),
                    duration(row["first_tokens_seconds"]),
                    f"{row['tokens_per_second']:.3g}",
                    passes,
                ]
            )
    texts = []
    if lines:
        texts.append(common.table(["answer", "tokens", "time", "first", "per second", "passes a canvas"], lines))
    if "sudoku" in results:
        one = results["sudoku"]
        lines = [
            [
                f"{name}, batch {row['batch']}",
                duration(row["seconds"]),
                f"{row['solved']:.1%}",
                f"{row['mean_steps']:.2f}",
            ]
            for name, rows in one["engines"].items()
            for row in rows
        ]
        texts.append(common.table([f"{one['puzzles']} puzzles", "time", "solved", "steps"], lines))
        ratios = ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in one["ratios_at_the_same_batch"].items())
        texts.append(f"times faster: {one['ratio_of_the_best']:.2f} best of each (target 4); {ratios}")
    return "\n\n".join(texts)


if __name__ == "__main__":
    main()
