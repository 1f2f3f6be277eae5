"""The objective of block diffusion, L = L_diff + L_enc: denoise one canvas of the example, and predict its next tokens.

L_diff is the mean cross-entropy over all positions of a canvas of which each position is noise with probability t, t
uniform in (0, 1), with no weight by t. L_enc is the next-token cross-entropy of a causal language model.

The encode pass over prompt and response gives the next-token loss and fills a cache; cut back to what stands before
the chosen canvas, that cache is what the denoise passes read, gradients included. What an `Objective` may add to
L_diff is in `later`. Nothing here knows about tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.training.later import LaterPass, observed_of, revision_sum, teacher_of
from sfumato.training.objective import PLAIN, Objective
from sfumato.training.vocabulary import LossTerms, cross_entropies, cross_entropy_sum, soft_embedding

IGNORE = -100


@dataclass(frozen=True)
class Examples:
    """Examples on their way into the model. Tokens are padded on the right with the pad id."""

    tokens_BT: Tensor
    """Prompt and response (the response up to its eos)."""
    counts: list[int]
    """Real tokens of each row of tokens_BT."""
    prompts: list[int]
    """Prompt tokens of each row."""
    is_cut: list[bool]
    """The length limit cut this example: what would follow is unknown, so no eos fill is supervised."""
    is_learned_BT: Tensor | None = None
    """Which tokens the next-token loss covers; None: all that are real."""
    canvases: list[int] | None = None
    """Positions of each row's canvas, 0 for the model's; None: all have that."""
    drafts: list[list[int]] | None = None
    """What stands in the first canvas of a row where it is not clean, in the place of noise; [], or None: noise."""

    def part(self, rank: int, ranks: int) -> Examples:
        """Every `ranks`-th example from `rank` on: what this rank takes of a batch, whose size `ranks` divides."""
        return self.of(range(rank, len(self.counts), ranks))

    def of(self, rows: Sequence[int]) -> Examples:
        """Some of the examples."""
        at = torch.tensor(rows, device=self.tokens_BT.device)
        counts, prompts, is_cut = ([column[row] for row in rows] for column in (self.counts, self.prompts, self.is_cut))
        learned = None if self.is_learned_BT is None else self.is_learned_BT[at]
        canvases = None if self.canvases is None else [self.canvases[row] for row in rows]
        drafts = None if self.drafts is None else [self.drafts[row] for row in rows]
        return Examples(self.tokens_BT[at], counts, prompts, is_cut, learned, canvases, drafts)  # type: ignore[arg-type]

    def unclean(self, noise_BL: Tensor, rows: Sequence[int], starts: Sequence[int], eos: int) -> Tensor:
        """What takes the place of clean tokens in these rows' canvases: noise, or a draft with its end and fill."""
        if self.drafts is None:
            return noise_BL
        unclean_BL, length = noise_BL.clone(), noise_BL.shape[1]
        for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
            if self.drafts[row] and start == self.prompts[row]:
                own = (self.drafts[row] + [eos] * length)[:length]
                unclean_BL[number] = torch.tensor(own, device=noise_BL.device)
        return unclean_BL

    def by_canvas(self, length: int) -> dict[int, list[int]]:
        """Rows by the length of their canvas, where `length` is the model's."""
        own = [one or length for one in self.canvases or [0] * len(self.counts)]
        return {size: [row for row, one in enumerate(own) if one == size] for size in sorted({*own})}


@dataclass(frozen=True)
class Corruption:
    """The random numbers of one training step, so that a resumed run draws the same ones."""

    canvas_B: Tensor
    """Which canvas of the row, as a uniform number in [0, 1)."""
    level_B: Tensor
    """t in (0, 1): the share of positions that become noise."""
    keep_BL: Tensor
    """Uniform numbers: a position keeps its token where this is at least t."""
    noise_BL: Tensor
    conditioned: int
    """This many rows, the first ones, see the soft embedding of a first pass: the share as nearly as whole rows give
    it, not a coin a row."""
    has_first_pass: bool
    """Some row of the whole batch does: then every rank takes a first pass, since ranks that share weights must take
    the same passes."""
    later_B: Tensor
    """The level of a later pass, as a share of t."""
    renoise_BKL: Tensor
    """The noise of K steps of sampling."""

    @classmethod
    def draw(
        cls, batch: int, length: int, vocab: int, generator: torch.Generator, share: float = 0.5, steps: int = 0
    ) -> Corruption:
        """Random numbers for `batch` canvases; `share` of them see the soft embedding of a first pass.

        `steps`: so many steps of sampling may follow, and have noise of their own; no other number depends on them.

        Where that is no whole number of canvases, one of its neighbours is drawn, so that the mean over steps is right:
        a single canvas sees it on every other step at a share of a half."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=generator.device)

        canvas_B, level_B, keep_BL = uniform(batch), uniform(batch) * (1 - 2e-4) + 1e-4, uniform(batch, length)
        noise_BL = torch.randint(vocab, (batch, length), generator=generator, device=generator.device)
        whole, rest = divmod(batch * share, 1)
        conditioned = int(whole) + (rest > 0 and float(uniform(1)) < rest)
        later_B = uniform(batch)
        renoise_BKL = torch.randint(vocab, (batch, steps, length), generator=generator, device=generator.device)
        return cls(canvas_B, level_B, keep_BL, noise_BL, conditioned, conditioned > 0, later_B, renoise_BKL)

    def part(self, rank: int, ranks: int) -> Corruption:
        """The numbers of the canvases of `Examples.part`, as the whole batch has them."""
        return self.of(range(rank, len(self.level_B), ranks))

    def of(self, rows: Sequence[int], length: int | None = None) -> Corruption:
        """The numbers of some canvases, in rising order, and of so many of their positions."""
        at = torch.tensor(rows, device=self.level_B.device)
        return Corruption(
            self.canvas_B[at],
            self.level_B[at],
            self.keep_BL[at, :length],
            self.noise_BL[at, :length],
            sum(row < self.conditioned for row in rows),
            self.has_first_pass,
            self.later_B[at],
            self.renoise_BKL[at, :, :length],
        )


@dataclass(frozen=True)
class Problem:
    """A batch with its random numbers applied: all that the two losses need, with every size known to the host."""

    tokens_BT: Tensor
    next_BT: Tensor
    """Next-token targets of the encode pass, [B, T - 1], IGNORE where there is none."""
    counts: list[int]
    rows: list[int]
    """Which row of tokens_BT each canvas belongs to: with `repeats` above 1, a row has several canvases."""
    starts: list[int]
    """Tokens before each chosen canvas."""
    canvas_BL: Tensor
    """The noisy canvases."""
    target_BL: Tensor
    level_B: Tensor
    conditioned: int
    has_first_pass: bool
    diffusion_count: int
    """Targets of the denoise pass."""
    encode_count: int
    """Targets of the encode pass."""
    later: LaterPass


class LossSums(NamedTuple):
    """Sums over targets, nats: sums and counts of parts add up to those of a batch.

    `denoise` and `encode` are what is minimised; `diffusion`, `revision` and `distillation` are what `denoise` is the
    weighted sum of, without gradients, 0 where the objective lacks them."""

    denoise: Tensor
    encode: Tensor
    diffusion: Tensor
    revision: Tensor
    distillation: Tensor
    diffusion_count: int
    encode_count: int

    def means(self) -> tuple[Tensor, Tensor]:
        """(L_diff with what is added to it, L_enc), nats a token; 0 where there is no target."""
        return self.denoise / max(1, self.diffusion_count), self.encode / max(1, self.encode_count)


def problem(batch: Examples, corruption: Corruption, length: int, eos: int, encode_response: bool = True) -> Problem:
    """Choose a canvas of each row, fill it with eos, and noise it; IGNORE is the target where the text was cut.

    `encode_response=False` leaves everything from the chosen canvas on out of the encode pass: cheaper, and the
    next-token loss then covers what stands before it alone. `corruption` may hold a multiple of the batch: each row is
    then encoded once and denoised that many times."""
    tokens_BT, device = batch.tokens_BT, batch.tokens_BT.device
    size = len(batch.counts)
    rows = [i % size for i in range(len(corruption.level_B))]
    clean_rows, target_rows, starts, diffusion_count = [], [], [], 0
    for i, row in enumerate(rows):
        count, prompt = batch.counts[row], batch.prompts[row]
        number = max(1, -(-(count - prompt) // length))
        start = prompt + length * min(int(corruption.canvas_B[i] * number), number - 1)
        clean = torch.full((length,), eos, dtype=torch.long, device=device)
        known = min(count - start, length)
        clean[:known] = tokens_BT[row, start : start + known]
        target = clean.clone()
        if batch.is_cut[row]:
            target[known:] = IGNORE
        diffusion_count += known if batch.is_cut[row] else length
        clean_rows.append(clean)
        target_rows.append(target)
        starts.append(start)
    before = [max(start for start, r in zip(starts, rows, strict=True) if r == row) for row in range(size)]
    counts = batch.counts if encode_response else before
    tokens_BT = tokens_BT[:, : max(counts)]
    is_past_BT = torch.arange(1, max(counts), device=device)[None] >= torch.tensor(counts, device=device)[:, None]
    next_BT = tokens_BT[:, 1:].masked_fill(is_past_BT, IGNORE)
    encode_count = sum(max(0, count - 1) for count in counts)
    if batch.is_learned_BT is not None:
        is_learned_BT = batch.is_learned_BT[:, 1 : max(counts)]
        next_BT = next_BT.masked_fill(~is_learned_BT, IGNORE)
        encode_count = int((is_learned_BT & ~is_past_BT).sum())
    clean_BL, unclean_BL = torch.stack(clean_rows), batch.unclean(corruption.noise_BL, rows, starts, eos)

    def noised(level_B: Tensor) -> Tensor:
        return torch.where(corruption.keep_BL < level_B[:, None], unclean_BL, clean_BL)

    later_B = corruption.level_B * corruption.later_B
    return Problem(
        tokens_BT=tokens_BT,
        next_BT=next_BT,
        counts=counts,
        rows=rows,
        starts=starts,
        canvas_BL=noised(corruption.level_B),
        target_BL=torch.stack(target_rows),
        level_B=corruption.level_B,
        conditioned=corruption.conditioned,
        has_first_pass=corruption.has_first_pass,
        diffusion_count=diffusion_count,
        encode_count=encode_count,
        later=LaterPass(noised(later_B), later_B, corruption.renoise_BKL),
    )


def losses(model: Model, problem: Problem, objective: Objective = PLAIN) -> tuple[Tensor, Tensor]:
    """(L_diff with what is added to it, L_enc), two scalars whose sum is minimised. See `loss_sums`."""
    return loss_sums(model, problem, objective).means()


def loss_sums(model: Model, problem: Problem, objective: Objective = PLAIN) -> LossSums:
    """Both losses as sums. Weights with trainable factors beside them take part in all passes."""
    config, width = model.config, problem.tokens_BT.shape[1]
    cache = KVCache.allocate(config, len(problem.counts), width, model.device, model.dtype, slack=width)
    hidden_BTD = model.encode(problem.tokens_BT, cache, counts=problem.counts)
    encode_sum = cross_entropy_sum(model, hidden_BTD[:, :-1].flatten(0, 1), problem.next_BT.flatten())
    if len(problem.rows) > cache.batch:
        cache = cache.fork(problem.rows)
    for row, start in enumerate(problem.starts):
        cache.truncate_(row, start)

    canvas_BL = problem.canvas_BL
    soft_BLD = torch.zeros(*canvas_BL.shape, config.hidden_size, device=model.device, dtype=model.dtype)
    if problem.has_first_pass:
        some = list(range(max(1, problem.conditioned)))
        with torch.no_grad():
            first_BLD = model.denoise(canvas_BL[: len(some)], cache, None, rows=some)
        soft = soft_embedding(model, first_BLD)
        soft_BLD = torch.cat([soft[: problem.conditioned].to(soft_BLD.dtype), soft_BLD[problem.conditioned :]])
    hidden_BLD = model.denoise(canvas_BL, cache, soft_BLD)
    observed = observed_of(canvas_BL, problem.level_B, config.vocab_size) if objective.leave_one_out else None
    teacher = teacher_of(model, cache, hidden_BLD, problem.later, objective) if objective.self_distillation else None
    target_N = problem.target_BL.flatten()
    main = cross_entropies(model, hidden_BLD.flatten(0, 1), target_N, LossTerms(observed, teacher))
    denoise_sum, revision = main.objective, torch.zeros_like(main.targets)
    if objective.revision_penalty:
        penalty = revision_sum(model, cache, hidden_BLD, target_N, main, problem.later, objective)
        denoise_sum, revision = denoise_sum + objective.revision_penalty * penalty, penalty.detach()
    counts = problem.diffusion_count, problem.encode_count
    return LossSums(denoise_sum, encode_sum, main.targets, revision, main.teachers, *counts)
