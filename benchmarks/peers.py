"""Sfumato beside transformers: the same weights, prompt and number of steps, in one run on one machine.

    .venv/bin/python benchmarks/peers.py --size mid --dtype bf16 -o benchmarks/results/peers.json

Both models hold the very same tensors in memory, and their logits are compared before anything is timed. transformers
runs with its dynamic cache (its static one is wrong past the window): sdpa, eager, and sdpa under torch.compile. A
"denoise forward" is what its forward does: soft embedding, pass, logits. Prints a table and writes JSON after each
engine, so that nothing is lost if a later one fails or is stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sfumato import weights
from sfumato.cache import KVCache
from sfumato.cli.bench import DTYPES, Plan, duration, prompt_ids, random_config, random_model, record
from sfumato.cli.machine import Timing, measure
from sfumato.model import Model

FORWARD, PREFILL, COMMIT = "denoise forward", "prefill", "commit"


def say(name: str) -> None:
    print(f"peers: {name}", file=sys.stderr, flush=True)


def twin(model: Model) -> Any:
    """transformers' model of the same config, around the same tensors: nothing is copied."""
    import transformers

    config = transformers.DiffusionGemmaConfig(**model.config.to_dict())
    with torch.device("meta"):
        theirs = transformers.DiffusionGemmaForBlockDiffusion(config)
    own = model.state_dict()
    shared = {}
    for name in theirs.state_dict():
        if "vision" not in name:
            source = "embed_tokens.weight" if name == "lm_head.weight" else weights.own_name(name)
            source = source or weights.own_name(name.replace("encoder.language_model.", "decoder."))
            shared[name] = own[source or name]
    theirs.load_state_dict(shared, strict=False, assign=True)
    for module in list(theirs.modules()):  # what no checkpoint holds, and meta therefore lost
        for child_name, child in list(module.named_children()):
            if type(child).__name__.endswith("TextRotaryEmbedding"):
                setattr(module, child_name, type(child)(child.config, model.device))
            elif hasattr(child, "scalar_embed_scale"):
                child.embed_scale = torch.tensor(child.scalar_embed_scale, device=model.device)
    theirs.model.encoder.vision_tower.to_empty(device=model.device)
    theirs.model.encoder.embed_vision.to_empty(device=model.device)
    left = [name for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()] if tensor.is_meta]
    assert not left, f"without values: {left}"
    return theirs.requires_grad_(False).eval()


def ours(model: Model, plan: Plan) -> dict[str, Timing]:
    """The one figure that `bench` does not have: the work of transformers' forward, on our model."""
    prompt_BT, canvas_BL, logits_BLV = inputs(model, plan)
    cache = KVCache.allocate(model.config, 1, plan.prompt + model.config.canvas_length, model.device, model.dtype)
    model.encode(prompt_BT, cache)
    forward = lambda: denoise(model, canvas_BL, cache, logits_BLV)  # noqa: E731
    return {FORWARD: measure(forward, plan.seconds, model.device)}


def denoise(model: Model, canvas_BL: torch.Tensor, cache: KVCache, logits_BLV: torch.Tensor) -> torch.Tensor:
    soft_BLD = model.ops.soft_embedding(logits_BLV, model.embed_tokens.weight, model.embed_scale)
    return model.logits(model.denoise(canvas_BL, cache, soft_BLD))


def theirs_timed(theirs: Any, model: Model, plan: Plan, forward: Callable[..., Any]) -> dict[str, Timing]:
    from transformers import DynamicCache

    prompt_BT, canvas_BL, logits_BLV = inputs(model, plan)
    encoder, text = theirs.model.encoder, theirs.config.text_config

    def prefill() -> Any:
        cache = DynamicCache(config=text)
        encoder(input_ids=prompt_BT, past_key_values=cache)
        return cache

    def denoise_forward() -> None:
        forward(decoder_input_ids=canvas_BL, self_conditioning_logits=logits_BLV, past_key_values=cache)

    cache = prefill()
    denoise_forward()  # a compiled one compiles here, outside the time that measuring may take
    found = {FORWARD: measure(denoise_forward, plan.seconds, model.device)}
    if forward == theirs.forward:
        found[PREFILL] = measure(prefill, plan.seconds, model.device)
        again = lambda cache: encoder(input_ids=canvas_BL, past_key_values=cache)  # noqa: E731
        found[COMMIT] = measure(again, plan.seconds, model.device, setup=lambda: copy.deepcopy(cache))
    return found


def answer(theirs: Any, model: Model, plan: Plan, tokens: int) -> dict[str, Any]:
    """A whole answer of transformers' own `generate`, with exactly plan.steps steps for each canvas."""
    prompt_BT, _, _ = inputs(model, plan)
    fixed = {"confidence_threshold": 1e-30, "cache_implementation": "dynamic"}
    theirs.generate(prompt_BT, max_new_tokens=1, max_denoising_steps=1, **fixed)  # to warm up
    began = time.perf_counter()
    out = theirs.generate(prompt_BT, max_new_tokens=tokens, max_denoising_steps=plan.steps, **fixed)
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    seconds = time.perf_counter() - began
    made = out.sequences.shape[1] - plan.prompt
    return {"tokens": made, "steps_per_canvas": plan.steps, "seconds": seconds, "tokens_per_second": made / seconds}


def inputs(model: Model, plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompt, canvas, and the logits of a step before: the same for everyone."""
    config, generator = model.config, torch.Generator().manual_seed(plan.seed)
    canvas_BL = torch.randint(config.vocab_size, (1, config.canvas_length), generator=generator)
    logits_BLV = torch.randn(1, config.canvas_length, config.vocab_size, generator=generator)
    prompt_BT = torch.tensor([prompt_ids(config, plan)])
    return prompt_BT.to(model.device), canvas_BL.to(model.device), logits_BLV.to(model.device, model.dtype)


def difference(theirs: Any, model: Model, plan: Plan) -> float:
    """Largest difference of the two engines' logits for the same canvas, after the same prompt."""
    from transformers import DynamicCache

    prompt_BT, canvas_BL, logits_BLV = inputs(model, plan)
    cache = KVCache.allocate(model.config, 1, plan.prompt, model.device, model.dtype)
    model.encode(prompt_BT, cache)
    here = denoise(model, canvas_BL, cache, logits_BLV)
    past = DynamicCache(config=theirs.config.text_config)
    theirs.model.encoder(input_ids=prompt_BT, past_key_values=past)
    there = theirs(decoder_input_ids=canvas_BL, self_conditioning_logits=logits_BLV, past_key_values=past).logits
    return float((here - there).abs().max())


@torch.inference_mode()
def compare(model: Model, plan: Plan, name: str, compile_seconds: int, write: Callable[[dict[str, Any]], None]) -> None:
    """All engines, one after the other; `write` gets the record as far as it is after each."""
    import transformers

    model.config = replace(model.config, eos_ids=())
    found = record(model, plan, name, lambda part: say(f"sfumato: {part}"))
    found["what"] = "sfumato beside transformers"
    found["environment"]["versions"]["transformers"] = transformers.__version__
    diffusion = found["requests"]["diffusion"]
    say("sfumato: denoise forward")
    found["parts"] |= {part: as_row(timing) for part, timing in ours(model, plan).items()}
    say("transformers: building on the same tensors")
    theirs = twin(model)
    found["largest_logit_difference"] = difference(theirs, model, plan)
    found["peers"] = {}
    write(found)
    plan = replace(plan, steps=diffusion["steps_per_canvas"])  # what there was time for
    for attention in ("sdpa", "eager"):
        theirs.set_attn_implementation(attention)
        say(f"transformers, {attention}: parts")
        parts = theirs_timed(theirs, model, plan, theirs.forward)
        say(f"transformers, {attention}: answer")
        found["peers"][f"transformers {attention}"] = {
            "parts": {part: as_row(timing) for part, timing in parts.items()},
            "requests": {"diffusion": answer(theirs, model, plan, diffusion["tokens"])},
        }
        write(found)
    if compile_seconds:
        theirs.set_attn_implementation("sdpa")
        say(f"transformers, compiled: denoise forward (at most {compile_seconds} s)")
        found["peers"]["transformers compiled"] = compiled(theirs, model, plan, compile_seconds)
        write(found)


def compiled(theirs: Any, model: Model, plan: Plan, limit: int) -> dict[str, Any]:
    """Its forward under torch.compile, given up after `limit` seconds: that, or a compiler that fails, is a finding."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not compiled within {limit} s")

    before, began = signal.signal(signal.SIGALRM, stop), time.perf_counter()
    signal.alarm(limit)
    row: dict[str, Any] = {"parts": {}, "requests": {}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about their code
            parts = theirs_timed(theirs, model, plan, torch.compile(theirs.forward))
        row["parts"] = {part: as_row(timing) for part, timing in parts.items()}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return {**row, "seconds_with_compiling": time.perf_counter() - began}


def as_row(timing: Timing) -> dict[str, Any]:
    row = asdict(timing)
    return {"seconds": row.pop("median"), **row}


def table(found: dict[str, Any]) -> str:
    """The parts that all engines have, as aligned text; in brackets how many times longer than ours."""
    engines = {"sfumato": found, **found["peers"]}
    lines = [["", *engines]]
    for part in (FORWARD, PREFILL, COMMIT):
        own = found["parts"][part]["seconds"]
        cells = [engine["parts"].get(part, {}).get("seconds") for engine in engines.values()]
        lines.append([part, *("–" if c is None else f"{duration(c)} (×{c / own:.2f})" for c in cells)])
    rates = [engine["requests"].get("diffusion", {}).get("tokens_per_second") for engine in engines.values()]
    steps = found["requests"]["diffusion"]["steps_per_canvas"]
    lines.append([f"answer, {steps} steps", *("–" if rate is None else f"{rate:.3g} tokens/s" for rate in rates)])
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Sfumato beside transformers on the same weights.")
    parser.add_argument("model", nargs="?", help="checkpoint folder, hub id or nano; default: random weights")
    parser.add_argument("--size", default="mid", choices=["mid", "tiny"], help="of the random weights")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--ops", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long each measurement may take")
    parser.add_argument("--compile-seconds", type=int, default=600, help="limit for torch.compile; 0 leaves it out")
    parser.add_argument("--json", action="store_true", help="print the record instead of the table")
    parser.add_argument("-o", "--output", type=Path, help="write the record to this file")
    given = parser.parse_args()
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
    plan = Plan(given.prompt, given.tokens, given.steps, given.seconds)
    dtype = DTYPES[given.dtype]
    if given.model is None:
        model = random_model(random_config(given.size), dtype, given.device, given.ops)
    else:
        model = weights.load(given.model, given.device, dtype, given.ops).eval()
    last: dict[str, Any] = {}

    def write(found: dict[str, Any]) -> None:
        last.update(found)
        if given.output:
            given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    compare(model, plan, given.model or f"{given.size} (random weights)", given.compile_seconds, write)
    print(json.dumps(last, indent=2) if given.json else table(last))


if __name__ == "__main__":
    main()
