"""evals/calibration.py: a known temperature is recovered, figures are those of known distributions, nothing is bent."""

from __future__ import annotations

import math
import random

import pytest

from sfumato.checkpoints.calibration import LEAST, MOST, Calibration
from sfumato.evals.calibration import (
    BINS,
    FEW,
    Bin,
    LabelledRead,
    bins_of,
    calibration_of_reports,
    error_of,
    figures,
    fit,
    judge,
    reliability,
    with_temperature,
)
from sfumato.templates.decisions import tempered


def reads_of(
    count: int, temperature: float, kind: str = "choice", options: int = 4, seed: int = 0
) -> list[LabelledRead]:
    """Labels drawn from true chances; what is read are these chances sharpened, so that `temperature` mends them."""
    generator = random.Random(seed)
    reads = []
    for n in range(count):
        weights = [math.exp(generator.gauss(0, 1.5)) for _ in range(options)]
        (label,) = generator.choices(range(options), weights)
        chances = [weight / sum(weights) for weight in weights]
        reads.append(LabelledRead(kind, tuple(tempered(chances, 1 / temperature)), label, f"state {n // 3}"))
    return reads


@pytest.mark.parametrize(("temperature", "options"), [(0.5, 2), (1.0, 4), (1.7, 2), (3.0, 255)])
def test_a_known_temperature_is_recovered(temperature: float, options: int) -> None:
    best = fit(reads_of(200 if options > 100 else 4000, temperature, options=options))
    assert best.temperature == pytest.approx(temperature, rel=0.05)
    assert abs(best.temperature - temperature) < 4 * best.error
    assert best.error < 0.05 * temperature


def test_no_other_temperature_is_better() -> None:
    reads = reads_of(300, 2.0)
    best = fit(reads).temperature
    losses = [figures(with_temperature(reads, best * factor)).log_loss for factor in (0.9, 0.98, 1, 1.02, 1.1)]
    assert min(losses) == losses[2]


def test_figures_of_probabilities_that_are_known() -> None:
    """Said 0.8 and right 3 of 4 times; said 0.6 and always right."""
    reads = [LabelledRead("noul", (0.8, 0.2), int(n == 0), str(n)) for n in range(4)]
    reads += [LabelledRead("noul", (0.4, 0.6), 1, str(n)) for n in range(4)]
    result = figures(reads)
    assert result.accuracy == 7 / 8
    assert result.log_loss == pytest.approx(-(3 * math.log(0.8) + math.log(0.2) + 4 * math.log(0.6)) / 8)
    assert result.brier == pytest.approx((3 * 0.08 + 1.28 + 4 * 0.32) / 8)
    assert result.ece == pytest.approx((0.05 + 0.4) / 2)
    assert result.ece_true == pytest.approx((0.05 + 0.4) / 2)
    assert result.to_dict().keys() == {
        "accuracy",
        "log_loss",
        "brier",
        "ece",
        "ece_by_chance",
        "ece_equal_count",
        "ece_true",
    }
    assert figures([replace_kind(read, "choice") for read in reads]).ece_true is None
    assert figures([]).log_loss == 0


def replace_kind(read: LabelledRead, kind: str) -> LabelledRead:
    return read._replace(kind=kind)


def test_bins_are_of_equal_width_and_hold_their_edges() -> None:
    bins = bins_of([(0.0, False), (1 / BINS, True), (0.999, True), (1.0, False)])
    assert len(bins) == BINS and [one.count for one in bins] == [1, 1, *[0] * (BINS - 3), 2]
    assert bins[-1] == Bin(pytest.approx(0.9995), 0.5, 2)  # type: ignore[arg-type]
    assert error_of([]) == 0 and error_of(bins_of([])) == 0


def test_true_chances_have_no_error_and_sharp_ones_their_own() -> None:
    """Of labels drawn from what is said the ECE is chance, which is foretold; of sharp ones the mean distance."""
    reads, sharp = reads_of(5000, 1.0), reads_of(5000, 3.0)
    fair, few, unfair = figures(reads), figures(reads[:500]), figures(sharp)
    assert fair.ece == pytest.approx(fair.ece_by_chance, rel=0.5)
    assert few.ece == pytest.approx(few.ece_by_chance, rel=0.5)
    assert fair.ece_by_chance < 0.02 < few.ece_by_chance
    distance = sum(max(read.probabilities) - max(tempered(read.probabilities, 3.0)) for read in sharp) / len(sharp)
    assert unfair.ece == pytest.approx(distance, abs=0.015)
    assert unfair.ece_equal_count == pytest.approx(distance, abs=0.015)
    assert figures(with_temperature(sharp, 3.0)).ece < 0.02


def test_what_is_held_out_becomes_no_worse() -> None:
    """Where probabilities are right already a fit costs no more than noise: about 1/2n nats of n labels."""
    growth = []
    for seed in range(10):
        (report,) = judge(reads_of(FEW + 10, 1.0, options=2 + seed, seed=seed))
        growth.append(report.after.log_loss - report.before.log_loss)
    assert sum(growth) / len(growth) < 0.03
    (report,) = judge(reads_of(2000, 1.0))
    assert report.after.log_loss < report.before.log_loss + 0.002
    (report,) = judge(reads_of(400, 2.5))
    assert report.after.log_loss < report.before.log_loss - 0.1
    assert report.after.ece < report.before.ece - 0.05


def test_after_is_judged_on_labels_that_were_not_fitted() -> None:
    """Labels of one state are in one half, whatever the order; a kind's few labels keep T = 1."""
    reads = reads_of(200, 2.0) + reads_of(FEW - 1, 2.0, "score") + reads_of(90, 1.5, "noul", 2)
    shuffled = random.Random(1).sample(reads, len(reads))
    reports = judge(reads)
    assert [(one.kind, one.labels) for one in reports] == [("noul", 90), ("choice", 200), ("score", FEW - 1)]
    for one, other in zip(reports, judge(shuffled), strict=True):
        assert (one.fit is None) == (other.fit is None)
        assert one.after.log_loss == pytest.approx(other.after.log_loss)
    score = reports[2]
    assert score.fit is None and score.after == score.before
    written = calibration_of_reports(reports, Calibration(model="m", samples=4))
    assert written.temperatures.keys() == {"noul", "choice"} and written.labels["score"] == FEW - 1
    assert (written.model, written.samples) == ("m", 4)
    assert Calibration.of(written.to_dict(), "x") == written


def test_one_state_alone_is_halved_by_its_questions() -> None:
    reads = [read._replace(state="the same") for read in reads_of(300, 2.5)]
    (report,) = judge(reads)
    assert report.after.log_loss < report.before.log_loss


def test_a_second_file_is_judged_with_the_first_ones_temperature() -> None:
    reads, others = reads_of(500, 2.0), reads_of(300, 2.0, seed=1)
    (report,) = judge(reads, others)
    assert report.fit == fit(reads) and report.labels == 500
    assert report.before == figures(others)
    assert report.after == figures(with_temperature(others, fit(reads).temperature))
    assert sum(one.count for one in report.after_bins) == 300


def test_extremes_stay_within_limits() -> None:
    """All right, all wrong, and options that were ruled out: temperatures are finite and do not end in certainty."""
    right = [LabelledRead("noul", (0.9, 0.1), 0, str(n)) for n in range(60)]
    wrong = [read._replace(label=1) for read in right]
    sure_and_right, sure_and_wrong = fit(right), fit(wrong)
    assert 0.2 < sure_and_right.temperature < 1
    assert sure_and_wrong.temperature == pytest.approx(MOST)
    ruled_out = [LabelledRead("choice", (1.0, 0.0, 0.0), 0, str(n)) for n in range(60)]
    assert LEAST <= fit(ruled_out).temperature <= 1
    assert fit([*ruled_out, ruled_out[0]._replace(label=1)]).temperature > fit(ruled_out).temperature
    alone = [LabelledRead("choice", (1.0,), 0, str(n)) for n in range(60)]
    assert fit(alone).temperature == pytest.approx(1)
    assert math.isfinite(figures([*ruled_out, ruled_out[0]._replace(label=2)]).log_loss)


def test_a_temperature_changes_no_choice() -> None:
    reads = reads_of(500, 1.0)
    for temperature in (LEAST, 0.7, MOST):
        after = with_temperature(reads, temperature)
        assert [read.choice for read in after] == [read.choice for read in reads]
        assert all(sum(read.probabilities) == pytest.approx(1) for read in after)
        assert figures(after).accuracy == figures(reads).accuracy
    assert sum(one.count for one in reliability(reads, 10)) == 500
