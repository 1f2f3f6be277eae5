"""The rules of sampling: when a token is accepted, what takes its place if not, and when a canvas stops.

Small frozen objects over pure tensor functions; no model, no state kept on self. Where the random numbers come from is
`noise`. Source of the rules: transformers `generation_diffusion_gemma.py`; the entropy bound is from arXiv 2505.24857.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.options import FALLBACK_DEFAULTS, LEAST, Options


@dataclass(frozen=True)
class Schedule:
    """Temperature falls linearly from t_max to t_min over `steps` steps, whatever the cap on steps is."""

    t_min: float
    """The temperature at the end of the schedule."""
    t_max: float
    """The temperature of the first step."""
    steps: int
    """Its length in steps."""

    def temperature(self, step: int) -> float:
        """Of a step counted from 0. Past the end of the schedule the last temperature stays."""
        remaining = max(self.steps - step, 1)
        return self.t_min + (self.t_max - self.t_min) * (remaining / self.steps)


@dataclass(frozen=True)
class Rules:
    """All the rules of one request.

    Those without a default are the reference's; the compiled ends of a step know them. A further rule has the default
    that turns it off: where a row turns it on, the step takes its plain end (`step.conclude_`)."""

    schedule: Schedule
    max_steps: int
    entropy_bound: float
    stability: int
    confidence: float
    repeats: int = 0

    @property
    def has_further(self) -> bool:
        """Whether a rule beyond the reference's is on."""
        return any(field.default not in (MISSING, getattr(self, field.name)) for field in fields(self))

    @classmethod
    def of(cls, options: Options) -> Rules:
        """From options; what they leave open takes the released model's values."""
        full = options.with_defaults(FALLBACK_DEFAULTS)
        steps = full.temperature_steps or full.max_steps
        assert full.t_min is not None and full.t_max is not None and steps is not None and full.max_steps is not None
        assert full.entropy_bound is not None and full.stability is not None and full.confidence is not None
        scale = full.temperature or 1.0  # 0 asks for the same answer every time, which the seed gives already
        # Logits over a temperature below LEAST are no longer finite.
        low, high = (max(t * scale, LEAST) for t in (full.t_min, full.t_max))
        schedule = Schedule(low, high, steps)
        return cls(schedule, full.max_steps, full.entropy_bound, full.stability, full.confidence, full.repeats)


@dataclass
class RowRules:
    """The rules of X rows as tensors: the number of each rule that has one for each row, under its name in `Rules`."""

    max_steps_X: Tensor
    entropy_bound_X: Tensor
    stability_X: Tensor
    confidence_X: Tensor
    repeats_X: Tensor

    @classmethod
    def of(cls, rules: Sequence[Rules], device: torch.device | str = "cpu") -> RowRules:
        """A row for each of these."""
        return cls(
            **{
                field.name: torch.tensor([getattr(own, field.name.removesuffix("_X")) for own in rules], device=device)
                for field in fields(cls)
            }
        )

    @property
    def columns(self) -> list[Tensor]:
        """Its tensors, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def at(self, at_B: Tensor) -> RowRules:
        """The rules of some rows."""
        return RowRules(*(column_X[at_B] for column_X in self.columns))


class RuleView(NamedTuple):
    """What the rules of a step look at: of each position the argmax token, its entropy, and how long it stood still.

    The rest is what further rules look at."""

    argmax_BL: Tensor
    entropy_BL: Tensor
    still_BL: Tensor
    """See `count_still`."""
    repeats_BL: Tensor | None = None
    """See `count_repeats`. None: no row has a further rule."""
    counts_BL: Tensor | None = None
    """Positions that count for stopping, those of a row with early answers that can become its answer. None: all."""


def accepts(view: RuleView, own: RowRules) -> Tensor:
    """True where a position is accepted, [B, L]. A further rule of acceptance joins here."""
    return accept(view.entropy_BL, own.entropy_bound_X)


def is_settled(view: RuleView, own: RowRules) -> Tensor:
    """True where a canvas stands still and is sure, [B]: the reference's rule of stopping."""
    return is_stable(view.still_BL, own.stability_X) & is_confident(view.entropy_BL, own.confidence_X)


def stops(is_settled_B: Tensor, view: RuleView, own: RowRules) -> Tensor:
    """True where a canvas stops before the cap on steps, [B]: where it is settled, or repeats itself.

    A further rule of stopping joins here. Of a row with early answers a canvas is settled when what can become its
    answer is."""
    return is_settled_B if view.repeats_BL is None else is_settled_B | is_repeated(view, own.repeats_X)


def accept(entropy_BL: Tensor, bound_B: Tensor) -> Tensor:
    """True where a position is accepted.

    From the lowest entropy upwards, while the entropies before it sum to at most the bound. The lowest of all is always
    accepted; of equal ones the first position comes first, on every device."""
    ordered_BL, order_BL = entropy_BL.sort(dim=-1, stable=True)
    is_within_BL = ordered_BL.cumsum(-1) - ordered_BL <= bound_B[:, None]
    return torch.zeros_like(is_within_BL).scatter(-1, order_BL, is_within_BL)


def count_still(argmax_BL: Tensor, last_BL: Tensor, still_BL: Tensor) -> Tensor:
    """For how many steps before this one each position had the token that it has now.

    From the last step's tokens (-1 for none) and their counts at that step."""
    return torch.where(argmax_BL == last_BL, still_BL + 1, 0)


def count_repeats(argmax_BL: Tensor, recent_BWL: Tensor, step_B: Tensor) -> Tensor:
    """At how many of the last W steps, this one among them, each position had the token that it has now, [B, L].

    `recent_BWL` has the tokens of the steps before this one (`step_B`, counted from 0 on a canvas), step n at place
    n mod W. Places that this canvas has not written yet do not count, nor does the one that this step will write."""
    place_W = torch.arange(recent_BWL.shape[1], device=step_B.device)
    is_of_canvas_BW = (place_W < step_B[:, None]) & (place_W != step_B[:, None] % recent_BWL.shape[1])
    return 1 + ((recent_BWL == argmax_BL[:, None]) & is_of_canvas_BW[..., None]).sum(1)


def is_repeated(view: RuleView, repeats_B: Tensor) -> Tensor:
    """True where each position that counts has had its token at `repeats` of the last W steps at least (0: never)."""
    assert view.repeats_BL is not None
    is_repeat_BL = view.repeats_BL >= repeats_B[:, None]
    if view.counts_BL is not None:
        is_repeat_BL = is_repeat_BL | ~view.counts_BL
    return is_repeat_BL.all(-1) & (repeats_B > 0)


def is_stable(still_BL: Tensor, stability_B: Tensor) -> Tensor:
    """True where the argmax canvas equals each of the last `stability` ones."""
    return (still_BL >= stability_B[:, None]).all(-1)


def is_confident(entropy_BL: Tensor, confidence_B: Tensor) -> Tensor:
    """True where the mean entropy of the canvas is below the threshold (0: never)."""
    return entropy_BL.sum(-1) / entropy_BL.shape[-1] < confidence_B


LEAST_NOISE = 1e-4
"""The least share of noise that a canvas is trained with, which bounds the correction of a leave-one-out model."""


def leave_one_out_bonus(kept: Tensor, vocab_size: int) -> Tensor:
    """log(1 + V a / (1 - a)), what the logit of an observed token gains where a share a of a canvas is kept.

    A leave-one-out model says what a position is, judged by all the others. Bayes' rule adds what its own token says:
    that it is V a / (1 - a) + 1 times as likely where it is right as where it is wrong (arXiv 2605.22765)."""
    kept = kept.clamp(max=1 - LEAST_NOISE)
    return torch.log1p(vocab_size * kept / (1 - kept))


def pick_token(logits_V: Tensor, options: Options, uniform: Tensor) -> int:
    """One token by temperature, top-k, top-p and min-p, from a uniform number in [0, 1); temperature 0 is greedy.

    Penalties and biases have moved the logits before (`distribution.RowSampler.next_logits`)."""
    if options.temperature < LEAST:  # logits over less overflow float32, and are greedy anyway
        return int(logits_V.argmax())
    p_V, order_V = torch.softmax(logits_V / options.temperature, -1).sort(descending=True, stable=True)
    if options.top_k > 0:
        p_V = p_V[: options.top_k]
    before_V = p_V.cumsum(-1) - p_V
    is_kept_V = (before_V < options.top_p * p_V.sum()) & (p_V >= options.min_p * p_V[0])
    is_kept_V[0] = True
    p_V = p_V * is_kept_V
    chosen = int(torch.searchsorted(p_V.cumsum(-1), uniform * p_V.sum(), right=True))
    return int(order_V[min(chosen, int((p_V > 0).sum()) - 1)])
