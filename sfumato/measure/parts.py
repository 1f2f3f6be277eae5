"""How long each part of the work takes, beside what this machine can do at all: what `sfumato bench` prints.

Every figure is the median of repeats after a warm-up, bounded in seconds, and stands beside its floor: the bytes and
operations of `work` at the memory bandwidth and the rates of matrix products that `machine` measures in the same run.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sfumato.engine.engine import PREFILL_CHUNK
from sfumato.engine.run import Run
from sfumato.errors import InputError
from sfumato.events import Commit, Done, Draft
from sfumato.measure.machine import Timing, ceilings, environment, forget_peak, measure, peak_bytes
from sfumato.measure.plan import BenchPlan
from sfumato.measure.work import (
    GROUPS,
    Kept,
    Parameters,
    Precision,
    Work,
    group_of,
    pass_work,
    step_work,
    vocabulary_work,
)
from sfumato.model.cache import KVCache
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.model.network import Model, products, replace_
from sfumato.ops import load as load_ops
from sfumato.ops.contract import Matrix
from sfumato.ops.packed import Packed
from sfumato.options import Options
from sfumato.quant.apply import samples
from sfumato.quant.formats import Format, pack
from sfumato.quant.recipes import Recipe, named
from sfumato.sampling.noise import CountedNoise
from sfumato.sampling.rules import accept, count_still, is_confident, is_stable

Announce = Callable[[str], None]
"""Gets the name of each measurement as it begins."""


def _quietly(name: str) -> None:
    """Announce nothing."""


# ---- models ---------------------------------------------------------------------------------------------------------


def random_config(name: str) -> ModelConfig:
    """A made-up model: "mid", about half a billion parameters, or "tiny", for seeing that everything runs."""
    if name == "mid":
        sliding = LayerConfig(128, 4, 512, Rope(10_000.0))
        full = LayerConfig(256, 2, None, Rope(1_000_000.0, 0.25, 1.0, True))
        layers = (*[sliding] * 5, full) * 2
        return ModelConfig(32768, 1024, 768, 8, 32, 4, 384, layers, 256, 32768)
    if name == "tiny":
        sliding = LayerConfig(16, 2, 32, Rope(10_000.0))
        full = LayerConfig(32, 1, None, Rope(1_000_000.0, 0.25, 1.0, True))
        return ModelConfig(512, 64, 96, 4, 8, 2, 32, (sliding, full), 32, 4096)
    raise InputError(f"size is {name!r}; choose mid or tiny")


def random_model(
    config: ModelConfig, dtype: torch.dtype, device: str, ops: str, seed: int = 0, quantize: str | None = None
) -> Model:
    """A model of random weights; `quantize` names a recipe (`quant.recipes`), applied by `quantize_some_`."""
    recipe = named(quantize) if quantize else None
    model = Model(config, load_ops(ops, device, dtype, samples(recipe) if recipe else [])).init_(seed)
    model = model.to(device=device, dtype=dtype).requires_grad_(False).eval()
    if recipe is not None:
        quantize_some_(model, recipe)
    return model.pack_()


_ROWS = 61
"""Of a random weight, those that are really packed."""


def quantize_some_(part: nn.Module, recipe: Recipe, prefix: str = "") -> None:
    """Quantize random weights in place, quickly: the first rows of each are packed and stand for all others.

    Nothing depends on what such weights say, and this takes seconds where packing all rows takes minutes."""
    names = {module: name for name, module in part.named_modules()}
    for owner, leaf in list(products(part)):
        form = recipe.format_of(".".join(filter(None, (prefix, names[owner], leaf))))
        if form is not None:
            replace_(owner, leaf, _repeated(getattr(owner, leaf).detach(), form))


def _repeated(weight: torch.Tensor, form: Format) -> Packed:
    rows, lead = weight.view(-1, weight.shape[-1])[:_ROWS], weight.shape[:-1]
    place = (torch.arange(math.prod(lead), device=weight.device) % len(rows)).view(lead)

    def all_rows(part: torch.Tensor) -> torch.Tensor:
        if part.dtype == torch.float8_e4m3fn:  # which cannot be looked up everywhere
            return part.view(torch.uint8)[place].view(part.dtype)
        return part[place]

    return pack(rows, form).each(all_rows, tuple(weight.shape))


# ---- measuring ------------------------------------------------------------------------------------------------------


def parts(model: Model, plan: BenchPlan, announce: Announce = _quietly) -> Iterator[tuple[str, Timing, Work | None]]:
    """(name, time, least work) of every part of a request, at the context that the prompt leaves."""
    config, ops, device = model.config, model.ops, model.device
    embed_VD, length, counted = model.embed_tokens.weight, config.canvas_length, Counted.of(model)
    noise = CountedNoise([plan.seed], [0], length, config.vocab_size, device)
    prompt_BT = torch.tensor([prompt_ids(config, plan)], device=device)
    canvas_BL, temperature_B = noise.canvas([0], [0]), torch.tensor([0.8], device=device)

    def prefill() -> KVCache:
        cache = KVCache.allocate(config, 1, plan.prompt + length, device, model.dtype)
        for chunk_BT in prompt_BT.split(PREFILL_CHUNK, dim=1):
            model.encode(chunk_BT, cache)
        return cache

    def read_out() -> Any:
        uniform_BL = noise.sample([0], [0], [0])["uniform_BL"]
        return ops.read_out(hidden_BLD, model.head_VD, config.softcap, temperature_B, uniform_BL=uniform_BL)

    def decide() -> None:
        accepted_BL = accept(read.entropy_BL, torch.tensor([0.1], device=device))
        torch.where(accepted_BL, read.sample_BL, noise.renoise([0], [0], [0]))
        is_stable(count_still(read.argmax_BL, read.argmax_BL, still_BL), torch.tensor([1], device=device))
        is_confident(read.entropy_BL, torch.tensor([0.005], device=device))

    def commit() -> None:
        cache.truncate_(0, plan.prompt)
        model.encode(canvas_BL, cache)

    def commit_and_step() -> None:
        cache.truncate_(0, plan.prompt)
        model.encode_and_denoise(canvas_BL, [length], canvas_BL, cache)

    def timed(name: str, function: Callable[[], Any], cost: Work | None) -> tuple[str, Timing, Work | None]:
        announce(name)
        return name, measure(function, plan.seconds, device), cost

    vocabulary = counted.vocabulary(length)
    yield timed("prefill", prefill, counted.one_pass(plan.prompt, 0, is_encode=True))
    cache = prefill()
    hidden_BLD = model.denoise(canvas_BL, cache)
    read = read_out()
    still_BL = torch.zeros_like(read.argmax_BL)
    soft_BLD = ops.soft_embedding(read.logits_BLV, embed_VD, model.embed_scale)
    yield timed(
        "denoise pass",
        lambda: model.denoise(canvas_BL, cache, soft_BLD),
        counted.one_pass(length, plan.prompt),
    )
    yield timed("read-out", read_out, vocabulary)
    embed = lambda: ops.soft_embedding(read.logits_BLV, embed_VD, model.embed_scale, read.tiles)  # noqa: E731
    yield timed("soft embedding", embed, vocabulary)
    yield timed("accept, renoise, stop", decide, None)
    yield timed("commit", commit, counted.one_pass(length, plan.prompt, is_encode=True))
    both = counted.one_pass(length, plan.prompt) + counted.one_pass(length, plan.prompt, is_encode=True)
    yield timed("commit and first pass", commit_and_step, replace(both, bytes=both.bytes / 2))
    announce("whole step")
    yield "whole step", engine_step(model, plan), counted.step(plan.prompt)


def engine_step(model: Model, plan: BenchPlan) -> Timing:
    """One step in the engine's own loop: from one Draft to the next, which is after everything a step does."""
    until, times, last = time.perf_counter() + plan.seconds, [], 0.0
    for event in Run(model, [prompt_ids(model.config, plan)], _fixed(plan, model.config.canvas_length, drafts=True)):
        now = time.perf_counter()
        if isinstance(event, Draft) and event.step > 1:  # the first one has no soft embedding
            times.append(now - last)
        last = time.perf_counter()
        if times and now > until:
            break
    return Timing.of(times)


def requests(
    model: Model, plan: BenchPlan, announce: Announce = _quietly, step: float = 0.0
) -> dict[str, dict[str, Any]]:
    """A whole answer in both modes, within three times plan.seconds each.

    `step` is what a step takes: from it follows how many of the canvases, and if need be of the steps, there is time
    for; the record says what was done."""
    length, prompt, seconds = model.config.canvas_length, prompt_ids(model.config, plan), 3 * plan.seconds
    canvases = -(-plan.tokens // length)
    if step * (plan.steps + 1) * canvases > seconds:
        canvases = max(1, int(seconds / (step * (plan.steps + 1))))
        plan = replace(plan, steps=min(plan.steps, max(1, int(seconds / step) - 1)))
    announce("request, diffusion")
    done = next(
        event for event in Run(model, [prompt], _fixed(plan, canvases * length)) if isinstance(event, Done)
    ).usage
    diffusion = {
        "tokens": done.tokens,
        "steps_per_canvas": plan.steps,
        "passes": done.passes,
        "passes_per_canvas": done.passes / canvases,
        "seconds": done.seconds,
        "first_tokens_seconds": done.first_commit_seconds,
        "tokens_per_second": done.tokens / done.seconds,
        "tokens_per_pass": done.tokens_per_pass,
    }
    announce("request, autoregressive")
    began, moments = time.perf_counter(), []
    options = Options(max_tokens=max(2, plan.tokens), mode="autoregressive", temperature=0.0)
    for event in Run(model, [prompt], options):
        if isinstance(event, Commit):
            moments.append(time.perf_counter() - began)
            if len(moments) > 1 and moments[-1] > seconds:
                break
    autoregressive = {
        "tokens": len(moments),
        "seconds": moments[-1],
        "first_tokens_seconds": moments[0],
        "tokens_per_second": len(moments) / moments[-1],
        "tokens_per_second_after_first": (len(moments) - 1) / (moments[-1] - moments[0]),
        "tokens_per_pass": 1.0,
    }
    return {"diffusion": diffusion, "autoregressive": autoregressive}


def _fixed(plan: BenchPlan, tokens: int, drafts: bool = False) -> Options:
    """Always plan.steps steps a canvas: a confidence of 0 is never reached."""
    steps = max(4, plan.steps) if drafts else plan.steps
    return Options(max_tokens=tokens, seed=plan.seed, max_steps=steps, confidence=0.0, drafts=drafts)


def prompt_ids(config: ModelConfig, plan: BenchPlan) -> list[int]:
    """Random tokens, the same for the same plan."""
    generator = torch.Generator().manual_seed(plan.seed)
    return torch.randint(config.vocab_size, (plan.prompt,), generator=generator).tolist()


def shapes(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """The matrix products of a step that differ in kind, as (rows, input width, output width)."""
    width, canvas = config.hidden_size, config.canvas_length
    return {
        "vocabulary": (canvas, width, min(config.vocab_size, 65536)),
        "queries": (canvas, width, config.num_heads * config.layers[0].head_dim),
        "dense": (canvas, width, config.intermediate_size),
        "one expert": (-(-canvas * config.top_k_experts // config.num_experts), width, 2 * config.expert_size),
    }


@dataclass(frozen=True)
class Counted:
    """What a pass, a read-out and a step of this model cost at least, with its weights as they are stored."""

    config: ModelConfig
    weights: Precision

    @classmethod
    def of(cls, model: Model) -> Counted:
        """Experts, the other layers and self-conditioning each with their own bits and kind of product."""
        plain = Kept(8.0 * model.dtype.itemsize, "float32" if model.dtype == torch.float32 else "bf16")
        names = {module: name for name, module in model.named_modules()}
        stored, counts = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0)
        kinds: dict[str, Counter[tuple[str, str]]] = {group: Counter() for group in GROUPS}
        for owner, leaf in products(model):
            weight, group = getattr(owner, leaf), group_of(f"{names[owner]}.{leaf}")
            count = math.prod(weight.shape)
            counts[group] += count
            stored[group] += min(weight.nbytes, count * model.dtype.itemsize)  # padding of panels is no work
            kinds[group][_stored_as(weight, plain.product)] += count
        kept: dict[str, Kept] = {}
        labels: dict[str, None] = {}
        for group in GROUPS[:-1]:
            label, product = kinds[group].most_common(1)[0][0] if counts[group] else (plain.product, plain.product)
            kept[group] = Kept(8 * stored[group] / counts[group], product) if counts[group] else plain
            labels[label] = None
        return cls(model.config, Precision(" and ".join(labels), **kept, plain=plain))

    def one_pass(self, tokens: int, context: int, is_encode: bool = False) -> Work:
        """See `work.pass_work`."""
        return pass_work(self.config, self.weights, tokens, context, is_encode)

    def vocabulary(self, tokens: int) -> Work:
        """See `work.vocabulary_work`."""
        return vocabulary_work(self.config, self.weights, tokens)

    def step(self, context: int) -> Work:
        """See `work.step_work`."""
        return step_work(self.config, self.weights, context)


def _stored_as(weight: Matrix, plain: str) -> tuple[str, str]:
    """(how a weight lies there, what it is multiplied as), whatever form the operations gave it."""
    if isinstance(weight, torch.Tensor):
        return plain, plain
    return weight.stored or plain, weight.product or plain


# ---- the record -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def record(
    model: Model, plan: BenchPlan, name: str, announce: Announce = _quietly, most: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything, as JSON would hold it: seconds, bytes, operations a second, shares of the ceiling from 0 to 1.

    `most` are ceilings that were measured on this machine before."""
    config = model.config = replace(model.config, eos_ids=())  # answers of a known length
    need = plan.prompt + -(-plan.tokens // config.canvas_length) * config.canvas_length
    if need > config.max_position:
        raise InputError(f"prompt and answer need {need} tokens of context; the model has {config.max_position}")
    forget_peak(model.device)
    rows = list(parts(model, plan, announce))
    answers = requests(model, plan, announce, step=rows[-1][1].median)
    peak = peak_bytes(model.device)
    if most is None:
        announce("ceilings")
        most = ceilings(shapes(config), min(plan.seconds, 3.0), model.device, plan.streamed)
    table = {part: part_row(timing, cost, most) for part, timing, cost in rows}
    counted = Counted.of(model)
    token = (counted.one_pass(1, plan.prompt, is_encode=True) + counted.vocabulary(1)).seconds(most)
    share = answers["autoregressive"]["tokens_per_second_after_first"] * token
    answers["autoregressive"]["share_of_ceiling"] = share
    parameters = Parameters.of(config)
    return {
        "what": "sfumato bench",
        "model": {
            "name": name,
            "parameters": parameters.total,
            "active": parameters.active,
            "hidden_size": config.hidden_size,
            "layers": len(config.layers),
            "experts": [config.num_experts, config.top_k_experts],
            "vocab_size": config.vocab_size,
            "canvas_length": config.canvas_length,
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": Counted.of(model).weights.name,
        "ops": model.ops.name,
        "prompt": plan.prompt,
        "parts": table,
        "requests": answers,
        "ceilings": most,
        "peak_bytes": peak,
        "environment": environment(model.device),
    }


def part_row(timing: Timing, cost: Work | None, most: dict[str, Any]) -> dict[str, Any]:
    """One part as JSON, with its floor under these ceilings and the share of it that was reached."""
    floor = cost.seconds(most) if cost else None
    return {
        "seconds": timing.median,
        "fastest": timing.fastest,
        "slowest": timing.slowest,
        "repeats": timing.repeats,
        "flops": cost and sum(cost.flops.values()),
        "bytes": cost and cost.bytes,
        "floor_seconds": floor,
        "share_of_ceiling": floor / timing.median if floor else None,
    }
