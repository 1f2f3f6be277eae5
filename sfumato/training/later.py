"""Passes that come later than the one of L_diff: what `Objective` adds to it is computed from them.

Both begin where sampling goes on: with the soft embedding of the denoise pass. They lack everything else that a step of
sampling may have: temperatures, stops, pins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.options import FALLBACK_DEFAULTS
from sfumato.sampling.rules import accept, leave_one_out_bonus
from sfumato.training.objective import Objective
from sfumato.training.vocabulary import (
    CrossEntropies,
    LossTerms,
    ObservedTokens,
    Teacher,
    cross_entropies,
    read_out,
    soft_embedding,
)


class LaterPass(NamedTuple):
    """What is drawn for later passes."""

    canvas_BL: Tensor
    """The canvases at a lower level: noise at some of the positions that were noise before, the same."""
    level_B: Tensor
    """That level."""
    renoise_BKL: Tensor
    """The noise of K steps of sampling."""


def observed_of(canvas_BL: Tensor, level_B: Tensor, vocab: int) -> ObservedTokens:
    """What `Objective.leave_one_out` adds, for canvases at these levels."""
    bonus_BL = leave_one_out_bonus(1 - level_B, vocab)[:, None].expand_as(canvas_BL)
    return ObservedTokens(canvas_BL.flatten(), bonus_BL.flatten())


def revision_sum(
    model: Model,
    cache: KVCache,
    hidden_BLD: Tensor,
    target_N: Tensor,
    before: CrossEntropies,
    later: LaterPass,
    objective: Objective,
) -> Tensor:
    """The sum of `Objective.revision_penalty`, a scalar in nats, from the denoise pass and its cross-entropies."""
    soft_BLD = soft_embedding(model, hidden_BLD).to(hidden_BLD.dtype)
    later_ND = model.denoise(later.canvas_BL, cache, soft_BLD).flatten(0, 1)
    is_observed = objective.leave_one_out
    observed = observed_of(later.canvas_BL, later.level_B, model.config.vocab_size) if is_observed else None
    floor_N = before.nats_N.masked_fill(~before.is_right_N, torch.inf)
    return cross_entropies(model, later_ND, target_N, LossTerms(observed, floor_N=floor_N)).objective


@torch.no_grad()
def teacher_of(model: Model, cache: KVCache, hidden_BLD: Tensor, later: LaterPass, objective: Objective) -> Teacher:
    """The predictions of `Objective.self_distillation`, as many steps later as there is noise for."""
    rows, length, _ = hidden_BLD.shape
    bound_B = torch.full((rows,), float(FALLBACK_DEFAULTS["entropy_bound"]), device=hidden_BLD.device)
    for noise_BL in later.renoise_BKL.unbind(1):
        read = read_out(model, hidden_BLD.flatten(0, 1))
        is_accepted_BL = accept(read.entropy_N.view(rows, length), bound_B)
        canvas_BL = torch.where(is_accepted_BL, read.argmax_N.view(rows, length), noise_BL)
        hidden_BLD = model.denoise(canvas_BL, cache, read.soft_ND.view(hidden_BLD.shape).to(hidden_BLD.dtype))
    return Teacher(hidden_BLD.flatten(0, 1), objective.self_distillation)
