"""How sure decisions are, against what was right: the figures, and the temperatures that mend them.

One temperature for each kind of question divides the logarithms of its probabilities (Guo et al. 2017, "On Calibration
of Modern Neural Networks"). It minimises the log loss of labelled answers, which is convex in 1/T, so that the one
minimum is where the slope is 0. A weak pull towards T = 1 keeps a few labels that are all right from ending in
certainty. Quality "after" come from answers that the temperature was not fitted on: those of one half with the
temperature of the other, both ways, where one state's answers are always in the same half; or those of a second file.

*The* expected calibration error (ECE) here is that of the likeliest option over 15 bins of equal width. Beside it stand
the same over 15 bins of equal count, and for nouls that of "true". It lacks anything but temperatures: no vector
scaling, no isotonic regression, which need many more labels and can change the choice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.checkpoints.calibration import LEAST, MOST, Calibration
from sfumato.questions import KINDS
from sfumato.templates.decisions import tempered

BINS = 15
"""Of the ECE, as in the literature."""
FEW = 50
"""Labels below which a kind keeps the temperature 1."""
FLOOR = 1e-30
"""What a probability counts as at least, so that one answer that was ruled out weighs much but not everything."""
PULL = 1.0
"""How strongly 1/T is pulled towards 1: as half its squared distance, in nats of all labels together."""
_HALVINGS = 60


class LabelledRead(NamedTuple):
    """The probabilities that were read for one question, and which of its options is right."""

    kind: str
    probabilities: tuple[float, ...]
    label: int
    """The place of the right option."""
    state: str
    """What was asked about: answers of one state are in the same half."""

    @property
    def choice(self) -> int:
        """The place of the likeliest option, the first of several."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)


class Fit(NamedTuple):
    """A temperature, and about how far it may be off by chance (one standard error)."""

    temperature: float
    error: float


@dataclass(frozen=True)
class Bin:
    """Answers whose probabilities are alike: the mean probability, the share that is right, and how many they are."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Quality:
    """How good probabilities are."""

    accuracy: float
    """Share of labels that the likeliest option meets."""
    log_loss: float
    """Mean of -log p(label), nats."""
    brier: float
    """Mean of the squared distance from the label, summed over options: from 0 to 2."""
    ece: float
    """Mean distance of confidence and accuracy, over 15 bins of equal width."""
    ece_by_chance: float
    """What it would be on average, with as many labels, were every probability right."""
    ece_equal_count: float
    """The ECE over 15 bins of equal count."""
    ece_true: float | None = None
    """That of the probability of "true" over bins of equal width; of nouls alone."""

    def to_dict(self) -> dict[str, float]:
        """By name, to six places, without what does not apply."""
        return {name: round(value, 6) for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class KindReport:
    """What one kind of question came to."""

    kind: str
    labels: int
    fit: Fit | None
    """None: there are too few labels, and the temperature stays 1."""
    before: Quality
    after: Quality
    before_bins: tuple[Bin, ...]
    after_bins: tuple[Bin, ...]


def fit(reads: Sequence[LabelledRead]) -> Fit:
    """The temperature, within the limits of `checkpoints.calibration`, with the least log loss on these reads."""
    log_p, owner, picked = _flat(reads)

    def moments(b: float) -> tuple[float, float]:
        """Slope and curvature of the loss of all labels, at 1/T = b."""
        top = torch.full((len(reads),), -math.inf, dtype=torch.float64)
        top = top.scatter_reduce(0, owner, log_p * b, "amax")
        weight = (log_p * b - top[owner]).exp()
        weight /= torch.zeros_like(top).index_add(0, owner, weight)[owner]
        mean = torch.zeros_like(top).index_add(0, owner, weight * log_p)
        variance = torch.zeros_like(top).index_add(0, owner, weight * (log_p - mean[owner]) ** 2)
        return float((mean - picked).sum()) + PULL * (b - 1), float(variance.sum()) + PULL

    low, high = math.log(1 / MOST), math.log(1 / LEAST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if moments(math.exp(middle))[0] < 0 else (low, middle)
    b = math.exp((low + high) / 2)
    temperature = min(MOST, max(LEAST, 1 / b))
    return Fit(temperature, temperature**2 / math.sqrt(moments(b)[1]))


def figures(reads: Sequence[LabelledRead]) -> Quality:
    """How good these probabilities are. Of no reads all figures are 0."""
    count = max(1, len(reads))
    confident = [(read.probabilities[read.choice], read.choice == read.label) for read in reads]
    squares = [sum((p - (n == read.label)) ** 2 for n, p in enumerate(read.probabilities)) for read in reads]
    nouls = [(read.probabilities[0], read.label == 0) for read in reads if read.kind == "noul"]
    return Quality(
        accuracy=sum(is_right for _, is_right in confident) / count,
        log_loss=-sum(math.log(max(FLOOR, read.probabilities[read.label])) for read in reads) / count,
        brier=sum(squares) / count,
        ece=error_of(bins_of(confident)),
        ece_by_chance=_chance_of(confident),
        ece_equal_count=error_of(_bins_of_equal_count(confident)),
        ece_true=error_of(bins_of(nouls)) if nouls else None,
    )


def reliability(reads: Sequence[LabelledRead], bins: int = BINS) -> tuple[Bin, ...]:
    """The likeliest options by their probabilities, in bins of equal width from 0 to 1; some may be empty."""
    return bins_of([(read.probabilities[read.choice], read.choice == read.label) for read in reads], bins)


def bins_of(pairs: Iterable[tuple[float, bool]], bins: int = BINS) -> tuple[Bin, ...]:
    """Pairs of a probability and whether it came true, in bins of equal width; the last one holds 1 too."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for p, is_right in pairs:
        members[min(bins - 1, int(p * bins))].append((p, is_right))
    return tuple(map(_bin, members))


def error_of(bins: Sequence[Bin]) -> float:
    """The expected calibration error: the mean distance of confidence and accuracy, each bin with its count."""
    count = sum(one.count for one in bins)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / max(1, count)


def with_temperature(reads: Iterable[LabelledRead], temperature: float) -> list[LabelledRead]:
    """The same reads with tempered probabilities."""
    return [read._replace(probabilities=tuple(tempered(read.probabilities, temperature))) for read in reads]


def judge(reads: Sequence[LabelledRead], held_out: Sequence[LabelledRead] | None = None) -> list[KindReport]:
    """What a temperature for each kind of question does, in the order of the kinds; kinds without labels are left out.

    The fit is on all `reads`. "After" is judged on `held_out`, and so is "before"; without it, on halves of the reads,
    each with the temperature of the other."""
    reports = []
    for kind in KINDS:
        own = [read for read in reads if read.kind == kind]
        others = None if held_out is None else [read for read in held_out if read.kind == kind]
        if not own and not others:
            continue
        best = fit(own) if len(own) >= FEW else None
        before = own if others is None else others
        if best is None:
            after = before
        elif others is None:
            one, other = _halves(own)
            after = with_temperature(other, fit(one).temperature) + with_temperature(one, fit(other).temperature)
        else:
            after = with_temperature(others, best.temperature)
        bins = reliability(before), reliability(after)
        reports.append(KindReport(kind, len(own), best, figures(before), figures(after), *bins))
    return reports


def calibration_of_reports(reports: Sequence[KindReport], base: Calibration) -> Calibration:
    """What is written of these reports; `base` says the rest: the model, steps and samples."""
    return replace(
        base,
        temperatures={one.kind: round(one.fit.temperature, 6) for one in reports if one.fit is not None},
        labels={one.kind: one.labels for one in reports},
        before={one.kind: one.before.to_dict() for one in reports},
        after={one.kind: one.after.to_dict() for one in reports},
    )


# ---- helpers --------------------------------------------------------------------------------------------------------


def _flat(reads: Sequence[LabelledRead]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of all options in one row, whose read each is of, and those of the labels; float64."""
    each = [torch.tensor(read.probabilities, dtype=torch.float64).clamp(min=FLOOR).log() for read in reads]
    counts = torch.tensor([len(one) for one in each])
    picked = torch.stack([one[read.label] for one, read in zip(each, reads, strict=True)])
    return torch.cat(each), torch.arange(len(each)).repeat_interleave(counts), picked


def _bin(members: Sequence[tuple[float, bool]]) -> Bin:
    count = len(members)
    total = sum(p for p, _ in members), sum(is_right for _, is_right in members)
    return Bin(total[0] / max(1, count), total[1] / max(1, count), count)


def _chance_of(pairs: Iterable[tuple[float, bool]]) -> float:
    """The mean ECE of labels drawn from these probabilities, by the normal distribution in each bin."""
    variances, count = [0.0] * BINS, 0
    for p, _ in pairs:
        variances[min(BINS - 1, int(p * BINS))] += p * (1 - p)
        count += 1
    return sum(math.sqrt(2 / math.pi * max(0.0, one)) for one in variances) / max(1, count)


def _bins_of_equal_count(pairs: Sequence[tuple[float, bool]]) -> list[Bin]:
    """Those that follow one another by probability, in bins whose counts differ by one at most."""
    ranked = sorted(pairs)
    edges = [round(n * len(ranked) / BINS) for n in range(BINS + 1)]
    return [_bin(ranked[first:last]) for first, last in pairwise(edges) if last > first]


def _halves(reads: Sequence[LabelledRead]) -> tuple[list[LabelledRead], list[LabelledRead]]:
    """Two halves, which do not depend on the order of the reads; those of one state stay together if there are more."""
    by_state: dict[str, list[LabelledRead]] = {}
    for read in reads:
        by_state.setdefault(read.state, []).append(read)
    groups = [by_state[state] for state in sorted(by_state, key=_digest)]
    if len(groups) < 2:
        groups = [[read] for read in reads]
    halves: tuple[list[LabelledRead], list[LabelledRead]] = [], []
    for group in groups:
        min(halves, key=len).extend(group)
    return halves


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
