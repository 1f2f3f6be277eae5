"""What is minimised, as numbers: the objective of block diffusion, and two terms that aim at fewer steps."""

from __future__ import annotations

from typing import NamedTuple


class Objective(NamedTuple):
    """L_diff + a R + b S, beside L_enc. R and S are means over the targets of the denoise pass, as L_diff is, in nats.

    Write x for the targets and p for the distributions of the denoise pass at noise level t, whose cross-entropy to x
    is L_diff. No gradient flows from R or S into what a later pass is made of: into the p that it begins from, or into
    the later distributions that p is drawn towards."""

    leave_one_out: bool = False
    """log(1 + V a/(1 - a)), a = 1 - t, is added to the logit of the observed token (arXiv 2605.22765)."""
    revision_penalty: float = 0.0
    """a. R is the log-probability that a later pass takes away from targets that were right already.

    The later pass sees the soft embedding of p, and the canvas at a lower level u t, u uniform in [0, 1): the same
    noise, at fewer of the positions. With q for its distributions, R is the mean over targets of
    [x is the likeliest token of p] max(0, log p(x) - log q(x)). It costs one denoise pass with gradients. This is
    our own definition of a penalty on revisions, named after that of CTR-Reg (arXiv 2610.01275), whose text we did
    not have."""
    self_distillation: float = 0.0
    """b. S is the cross-entropy of p to the distributions of the same model some steps of its own sampler later.

    A step takes the likeliest token where the entropy is lowest, up to a bound of 0.1 nats a canvas (the released
    model's), draws all other positions anew, and sees the soft embedding of the step before. With q for the
    distributions after the last of them, S is the mean over targets of -sum_v q(v) log p(v). It costs a denoise pass
    without gradients for each step. Not with `leave_one_out`, whose correction needs a noise level, and a canvas that
    the sampler has written has none."""
    distillation_steps: int = 1
    """How many steps later."""


PLAIN = Objective()
