"""Calibration: statistics of the inputs of a model's weights, from sample text, and rounding that uses them.

Rounding a weight costs what its error does to a product, and that depends on the inputs. There are two statistics:

    importance_of(model, texts)              the mean square of each input: small, for a model of any size
    correlation_of(model, texts)             the mean products of all pairs of inputs, [I, I]: large, and better
    calibration_of(model, recipe, texts)     the second as far as it fits in memory, else the first

Any of them is what `apply.quantize_` and the loaders and converters of `checkpoints` take. `texts` are token ids of
text as the model will read it, answers included; some dozens do. Each is read in both ways: encoded, and its last
canvas, with noise, denoised behind the rest, without and with a soft embedding. Each expert has statistics of its own.
It lacks the search for better scales (`formats.pack` has it) and other layouts of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import InputError
from sfumato.model.cache import KVCache
from sfumato.model.network import Model, products
from sfumato.ops import load as load_ops
from sfumato.ops.contract import Matrix, Ops
from sfumato.ops.packed import Packed, paired
from sfumato.quant.formats import Format, pack
from sfumato.quant.recipes import Recipe

PRIOR = 16
"""Tokens' worth of all experts' inputs that are added to those of each expert: some get hardly any."""
DAMP = 0.01
"""Share of the mean square that is added to that of every input: other text may use what sample text did not."""
ROOM = 4 << 30
"""Bytes of correlations that `calibration_of` keeps."""
_BLOCK = 128
"""Inputs whose errors are passed on to all later ones together."""

Progress = Callable[[int, int], None]
Note = Callable[[tuple[str, ...], int | None, int, Tensor], None]
"""Called with every product: names of the weights, which expert of how many, inputs [N, I]."""


# ---- statistics of inputs --------------------------------------------------------------------------------------------


def importance_of(
    model: Model, texts: Sequence[Sequence[int]], seed: int = 0, progress: Progress | None = None
) -> dict[str, Tensor]:
    """A weight's own name -> the mean square of each of its inputs, float32 on the CPU: [I], or [E, I] for a stack.

    Noise is drawn from `seed`; `progress(done, all)` counts texts. InputError for a model with packed weights, or for
    no text."""
    return _means(model, texts, lambda x_NI: x_NI.square().sum(0), ("*",), seed, progress)


def correlation_of(
    model: Model,
    texts: Sequence[Sequence[int]],
    patterns: Sequence[str] = ("*",),
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """A weight's own name -> the mean product of each two of its inputs, float32 on the CPU: [I, I], or [E, I, I].

    Only of weights whose name fits one of the `patterns` (a shell's), as all of a large model's would fill the memory;
    weights with the same inputs share a tensor. Otherwise as `importance_of`."""
    return _means(model, texts, lambda x_NI: x_NI.T @ x_NI, patterns, seed, progress)


def calibration_of(
    model: Model,
    recipe: Recipe,
    texts: Sequence[Sequence[int]],
    room: int = ROOM,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The statistics that `quantize_` by this recipe can use.

    Correlations of as many weights as fit into `room` bytes, the smallest first, and the mean squares of the others."""
    sizes: dict[str, int] = {}
    modules = {module: name for name, module in model.named_modules()}
    for owner, leaf in products(model):
        name, weight = f"{modules[owner]}.{leaf}", getattr(owner, leaf)
        if recipe.format_of(name) is not None:
            count = weight.shape[0] if len(weight.shape) == 3 else 1
            sizes[name] = 4 * count * weight.shape[-1] ** 2
    chosen = []
    for name, size in sorted(sizes.items(), key=lambda pair: pair[1]):
        room -= size
        if room >= 0:
            chosen.append(name)
    total = 2 * len(texts) if len(chosen) < len(sizes) else len(texts)
    report = None if progress is None else lambda done, _: progress(done, total)
    correlations = correlation_of(model, texts, chosen, progress=report) if chosen else {}
    if len(chosen) == len(sizes):
        return correlations
    report = None if progress is None else lambda done, _: progress(len(texts) + done, total)
    return {**importance_of(model, texts, progress=report), **correlations}


def _means(
    model: Model,
    texts: Sequence[Sequence[int]],
    measure: Callable[[Tensor], Tensor],
    patterns: Sequence[str],
    seed: int,
    progress: Progress | None,
) -> dict[str, Tensor]:
    totals: dict[tuple[str, ...], Tensor] = {}
    counts: dict[tuple[str, ...], Tensor] = {}

    def note(names: tuple[str, ...], expert: int | None, of: int, x_NI: Tensor) -> None:
        names = tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
        if not names:
            return
        measured = measure(x_NI.float())
        if names not in totals:
            stack = () if expert is None else (of,)
            totals[names] = measured.new_zeros(*stack, *measured.shape)
            counts[names] = measured.new_zeros(*stack, *[1] * measured.dim())
        place = () if expert is None else expert
        totals[names][place] += measured
        counts[names][place] += len(x_NI)

    _read(model, texts, note, seed, progress)
    means: dict[str, Tensor] = {}
    for names, total in totals.items():
        count = counts[names]
        if count.numel() > 1:
            total, count = total + PRIOR * total.sum(0) / count.sum(0), count + PRIOR
        means |= dict.fromkeys(names, (total / count).cpu())
    return means


@torch.inference_mode()
def _read(model: Model, texts: Sequence[Sequence[int]], note: Note, seed: int, progress: Progress | None) -> None:
    texts = [list(ids) for ids in texts if len(ids)]
    if not texts:
        raise InputError("there is no text to calibrate on; give some prompts, best with their answers")
    config, before, generator = model.config, model.ops, torch.Generator().manual_seed(seed)
    model.use_(_noting(model, note))
    try:
        for number, ids in enumerate(texts):
            canvas = min(config.canvas_length, len(ids) - 1) if config.is_diffusion else 0
            tokens_BT = torch.tensor([ids], device=model.device)
            cache = KVCache.allocate(config, 1, len(ids) + config.canvas_length, model.device, model.dtype)
            model.encode(tokens_BT, cache)
            if canvas > 0:
                cache.truncate_(0, len(ids) - canvas)
                noise_BL = torch.randint(config.vocab_size, (1, canvas), generator=generator)
                is_noise_BL = torch.rand(1, canvas, generator=generator) < torch.rand(1, generator=generator)
                canvas_BL = tokens_BT[:, -canvas:].cpu().where(~is_noise_BL, noise_BL).to(model.device)
                logits_BLV = model.logits(model.denoise(canvas_BL, cache)).to(model.dtype)
                embed_VD = model.embed_tokens.weight
                model.denoise(canvas_BL, cache, before.soft_embedding(logits_BLV, embed_VD, model.embed_scale))
            if progress:
                progress(number + 1, len(texts))
    finally:
        model.use_(before)


def _noting(model: Model, note: Note) -> Ops:
    """The fused operations, which call `note` with every product."""
    ops, modules, names = load_ops("fused"), {m: name for name, m in model.named_modules()}, dict[int, str]()
    for owner, leaf in products(model):
        name, weight = f"{modules[owner]}.{leaf}", getattr(owner, leaf)
        if not isinstance(weight, Tensor):
            raise InputError(f"{name} is packed; calibrate the checkpoint `in_full`, loaded with ops='fused'")
        names[id(weight)] = name

    def linear(x: Tensor, /, *weights: Matrix) -> tuple[Tensor, ...]:
        note(tuple(names[id(weight)] for weight in weights), None, 1, x.reshape(-1, x.shape[-1]))
        return ops.linear(x, *weights)

    def feed_forward(x: Tensor, gate_FD: Matrix, up_FD: Matrix, down_DF: Matrix) -> Tensor:
        gate, up = linear(x, gate_FD, up_FD)
        return linear(F.gelu(gate, approximate="tanh") * up, down_DF)[0]

    def experts(x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up_EFD: Matrix, down_EDF: Matrix) -> Tensor:
        for expert in torch.unique(index_NJ).tolist():
            token, choice = torch.where(index_NJ == expert)
            x_MD, share_M1 = x_ND[token], weight_NJ[token, choice, None].to(x_ND.dtype)
            gate, up = ops.linear(x_MD, gate_up_EFD[expert])[0].chunk(2, dim=-1)
            # An expert's error reaches the residual by its share, so its inputs count by that.
            note((names[id(gate_up_EFD)],), expert, gate_up_EFD.shape[0], x_MD * share_M1)
            inner_MF = F.gelu(gate, approximate="tanh") * up * share_M1
            note((names[id(down_EDF)],), expert, down_EDF.shape[0], inner_MF)
        return ops.experts(x_ND, index_NJ, weight_NJ, gate_up_EFD, down_EDF)

    return replace(ops, linear=linear, feed_forward=feed_forward, experts=experts)


# ---- rounding --------------------------------------------------------------------------------------------------------


def fitted(weight: Tensor, form: str | Format, calibration: Tensor | None = None) -> Packed:
    """A weight [O, I] or a stack [E, O, I] in this format, as well as the statistics of its inputs allow.

    `calibration` is correlations, by which it is `rounded`, or mean squares, by which alone its scales are searched;
    or None."""
    if calibration is not None and calibration.dim() == weight.dim():
        return rounded(weight.float(), form, calibration)
    return pack(weight, form, calibration)


def rounded(weight: Tensor, form: str | Format, correlation: Tensor) -> Packed:
    """A weight [O, I] or a stack [E, O, I] in this format, each code chosen knowing the errors of those before it.

    Input after input, the largest first, is rounded, and its error passed on to the inputs not yet rounded, as far as
    they are correlated with it (GPTQ, arXiv 2210.17323); scales are those of `pack`. `correlation` is [I, I] or
    [E, I, I], symmetric, without negative eigenvalues. InputError as `pack`."""
    if weight.dim() == 3:
        parts = [rounded(one, form, own) for one, own in zip(weight, correlation, strict=True)]
        tensors = {name: torch.stack([part.parts[name] for part in parts]) for name in parts[0].parts}
        shape = tuple(weight.shape)
        return Packed(parts[0].kind, shape, tensors.pop("data"), group=parts[0].group, **tensors)
    correlation = correlation.to(weight.device, torch.float64)
    square = correlation.diagonal()
    mean = float(square.mean())
    if mean <= 0:
        return pack(weight, form)
    packed = pack(weight, form, (square / mean + DAMP).float())
    grid = packed.code.grid(packed)
    value, start = grid.values, _filled(packed, grid.zero).dense()
    step = _filled(packed, grid.one).dense() - start
    order = square.argsort(descending=True)
    damped = correlation[order][:, order] / mean
    damped.diagonal().add_(DAMP)
    # Row i of the upper factor of the inverse: how an error of input i is shared among the inputs behind it.
    shares = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    shares = shares / shares.diagonal()[:, None]
    start, step, rest = start[:, order], step[:, order], weight.float()[:, order]
    by = torch.where(step != 0, step, 1.0)  # a group of zeros has scale 0
    middles, chosen = (value[1:] + value[:-1]) / 2, torch.empty(weight.shape, dtype=torch.long, device=weight.device)
    for first in range(0, len(order), _BLOCK):
        last = min(first + _BLOCK, len(order))
        errors = torch.empty_like(rest[:, first:last])
        for i in range(first, last):
            at = torch.bucketize((rest[:, i] - start[:, i]) / by[:, i], middles)
            errors[:, i - first] = rest[:, i] - (value[at] * step[:, i] + start[:, i])
            rest[:, i:last] -= errors[:, i - first, None] * shares[i, i:last]
            chosen[:, order[i]] = at
        rest[:, last:] -= errors @ shares[first:last, last:]
    codes = grid.codes[chosen]
    if packed.data.shape[-1] != codes.shape[-1]:
        codes = paired(codes)
    return replace(packed, data=codes.view(packed.data.dtype))


def _filled(packed: Packed, byte: int) -> Packed:
    return replace(packed, data=torch.full_like(packed.data.view(torch.uint8), byte).view(packed.data.dtype))
