"""Everything that waits for a CUDA machine, in order of worth: `make gpu`.

    python3 scripts/gpu.py [--out runs/gpu] [--minutes 9] [--only check,bench,train,eval]

Needs torch, safetensors, tokenizers and numpy (and jinja2, which torch brings). Works in slices: each call runs for at
most `--minutes`, writes results as it goes (`results.jsonl`, one record a task, with the hardware's name), skips what
is done, and goes on with training where the last slice stopped. Run it again for the next slice; tasks that are done
stay done until `--out` is emptied. Training begins from the weights in the package, so a committed nano is where the
next machine continues.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from sfumato import ops, sudoku, weights  # noqa: E402
from sfumato.cache import KVCache  # noqa: E402
from sfumato.events import Options  # noqa: E402
from sfumato.llm import LLM  # noqa: E402
from sfumato.model import Model  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def hardware() -> dict[str, str]:
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


def check(_: Path, __: float) -> dict:
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


def bench(_: Path, deadline: float) -> dict:
    """Milliseconds a step of the half-billion model in bf16 at batch 1, 4, 16: denoise, read-out, soft embedding."""
    from sfumato.cli.bench import random_config

    model = Model(random_config("mid"), ops.load()).init_(0).to(DEVICE, torch.bfloat16).requires_grad_(False)
    batches = [batch for batch in (1, 4, 16) if time.monotonic() < deadline]
    with torch.inference_mode():
        return {"model": "mid, bf16, prompt 384", "rows": [_step_times(model, batch) for batch in batches]}


def _step_times(model: Model, batch: int) -> dict[str, float]:
    config, embed = model.config, model.embed_tokens.weight
    cache = KVCache.allocate(config, batch, 640, DEVICE, model.dtype)
    model.encode(torch.randint(0, config.vocab_size, (batch, 384), device=DEVICE), cache)
    canvas = torch.randint(0, config.vocab_size, (batch, config.canvas_length), device=DEVICE)
    soft = torch.randn(batch, config.canvas_length, config.hidden_size, device=DEVICE, dtype=model.dtype)
    warm, uniform = torch.full((batch,), 0.8, device=DEVICE), torch.rand(canvas.shape, device=DEVICE)
    hidden = model.denoise(canvas, cache, soft)
    read = model.ops.read_out(hidden, embed, config.softcap, warm, uniform)
    timed = {
        "denoise_ms": lambda: model.denoise(canvas, cache, soft),
        "read_out_ms": lambda: model.ops.read_out(hidden, embed, config.softcap, warm, uniform),
        "soft_ms": lambda: model.ops.soft_embedding(read.logits_BLV, embed, model.embed_scale),
    }
    return {"batch": batch, **{name: round(_median_ms(run), 3) for name, run in timed.items()}}


def _median_ms(run: Callable[[], object], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats + 3):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return sorted(times[3:])[repeats // 2]


def train(out: Path, deadline: float) -> dict:
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


def evaluate(out: Path, _: float) -> dict:
    """Solve rates of the trained weights, if there are any, else of the package's."""
    import nano

    trained = out / "nano" / "checkpoint"
    llm = LLM.load(trained if trained.exists() else "nano", device=DEVICE)
    return {"model": llm.name, "rows": list(nano.rows(llm, 200, 200, 7, ["diffusion", "autoregressive"]))}


TASKS = {"check": check, "bench": bench, "train": train, "eval": evaluate}
"""In order of worth. `train` never counts as done before its last step; `eval` follows every slice of it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(TASKS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    finished = {r["task"] for r in done if r["ok"] and r["task"] in ("check", "bench")}
    finished |= {"train" for r in done if r["task"] == "train" and r["ok"] and r["result"]["is_finished"]}
    deadline = time.monotonic() + 60 * args.minutes - 45  # the last 45 s are for saving and judging
    failed = 0
    print(f"{hardware()}; {args.minutes} minutes; results go to {results}", flush=True)
    for name in args.only.split(","):
        if name not in TASKS:
            print(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}", file=sys.stderr)
            return 2
        if name in finished or (time.monotonic() > deadline and name != "eval"):
            print(f"{name}: {'done before' if name in finished else 'no time left'}", flush=True)
            continue
        began = time.perf_counter()
        try:
            record = {"task": name, "ok": True, "result": TASKS[name](args.out, deadline)}
        except Exception as error:  # a failed task is recorded and must not stop the ones after it
            traceback.print_exc()
            record, failed = {"task": name, "ok": False, "error": f"{type(error).__name__}: {error}"}, failed + 1
        record |= {"seconds": round(time.perf_counter() - began, 1), "when": time.strftime("%F %T"), **hardware()}
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{name}: {json.dumps(record.get('result', record.get('error')))[:400]}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
