"""evals/scoring.py and score_picture.py: rows by task and kind, pairs of runs on the same items, and their bars."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from sfumato.errors import InputError
from sfumato.evals.score_picture import WIDTH, draw
from sfumato.evals.scoring import TaskScore, comparisons_of, scores_of
from sfumato.evals.tasks import TaskAnswer

SVG = "{http://www.w3.org/2000/svg}"


def answer(item: str, is_right: bool, kind: str = "", text: str = "x", **more: float) -> TaskAnswer:
    measures = {name: value for name, value in more.items() if name not in ("steps", "cost_seconds")}
    steps = int(more.get("steps", 4))
    return TaskAnswer(item, text, is_right, steps, 2 * steps, 80, kind=kind, measures=measures, cost_seconds=0.01)


FIRST = [
    answer("1", True, "easy", cells=1.0),
    answer("2", True, "hard", cells=0.5),
    answer("3", False, "hard", steps=10, cells=0.0),
    answer("4", True, "easy", cells=1.0),
]
SECOND = [
    answer("1", True, "easy"),
    answer("2", False, "hard", text="y"),
    answer("3", False, "hard"),
    answer("4", False, "easy", text="z"),
]


def test_a_task_and_each_of_its_kinds_have_a_row() -> None:
    whole, easy, hard = scores_of("plots", FIRST)
    assert [(row.kind, row.items, row.right) for row in (whole, easy, hard)] == [
        ("", 4, 3),
        ("easy", 2, 2),
        ("hard", 2, 1),
    ]
    assert whole.measures == {"cells": 0.625} and (whole.share, easy.share, hard.share) == (0.75, 1.0, 0.5)
    assert (whole.steps, whole.passes, whole.tokens) == (5.5, 11.0, 80.0)
    assert whole.tokens_per_pass == pytest.approx(80 / 11) and whole.milliseconds == pytest.approx(10.0)
    assert whole.interval == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert scores_of("a", [answer("1", True, "one")]) == [TaskScore.of("a", "", [answer("1", True, "one")])]
    assert [row.kind for row in scores_of("a", [answer("1", True), answer("2", True, "b")])] == ["", "other", "b"]
    assert scores_of("none", [])[0].to_dict()["share"] == 0.0


def test_a_row_is_a_record() -> None:
    record = json.loads(json.dumps(scores_of("plots", FIRST)[0].to_dict()))
    assert record["task"] == "plots" and record["kind"] is None and (record["items"], record["right"]) == (4, 3)
    assert (record["share"], record["low"], record["high"]) == (0.75, 0.300642, 0.954413)
    assert record["measures"] == {"cells": 0.625} and "errors" not in record
    failed = TaskAnswer("1", "", False, 0, error="the prompt is too long")
    assert TaskScore.of("a", "", [failed]).to_dict()["errors"] == 1


def test_two_runs_are_compared_item_by_item() -> None:
    whole, easy, hard = comparisons_of("plots", FIRST, SECOND)
    assert (whole.counts.both, whole.counts.first_only, whole.counts.second_only, whole.counts.neither) == (1, 2, 0, 1)
    assert (whole.same_texts, whole.agreement, whole.counts.difference) == (2, 0.5, -0.5)
    assert (easy.counts.count, hard.counts.count, easy.same_texts) == (2, 2, 1)
    record = whole.to_dict()
    assert (record["difference"], record["p"], record["agreement"], record["same_texts"]) == (-0.5, 0.5, 0.5, 2)
    assert record["low"] < -0.5 < record["high"] and record["first_only"] == 2
    with pytest.raises(InputError, match="the answers to compare are to different items of plots"):
        comparisons_of("plots", FIRST, SECOND[::-1])


def test_every_row_has_its_bar_and_interval() -> None:
    runs = [scores_of("plots <&", FIRST), scores_of("plots <&", SECOND)]
    root = ElementTree.fromstring(draw(runs, ["nano", "max_steps=4"], "nano\n<title>"))
    for style, rows in zip("ab", runs, strict=True):
        bars = [one for one in root.iter(f"{SVG}rect") if one.get("class") == style][1:]  # the legend's first
        assert [float(bar.get("width", "nan")) for bar in bars] == pytest.approx([WIDTH * row.share for row in rows])
    lines = [one for one in root.iter(f"{SVG}line") if one.get("class") == "w"]
    assert len(lines) == 3 * 6
    across = [one for one in lines if one.get("y1") == one.get("y2")]
    expected = [WIDTH * (row.interval.high - row.interval.low) for pair in zip(*runs, strict=True) for row in pair]
    lengths = [float(one.get("x2", "nan")) - float(one.get("x1", "nan")) for one in across]
    assert lengths == pytest.approx(expected, abs=0.11)
    texts = [one.text for one in root.iter(f"{SVG}text")]
    assert "plots <&" in texts and "nano <title>" in texts and "75.0% of 4, 5.5 steps, 10 ms" in texts
    height, width = float(root.get("height", "nan")), float(root.get("width", "nan"))
    assert all(
        0 <= float(one.get("y", "0")) <= height and 0 <= float(one.get("x", "0")) <= width for one in root.iter()
    )
    alone = ElementTree.fromstring(draw(runs[:1], ["nano"], "nano"))
    assert "share of items that are right, with its 95 % interval" in [one.text for one in alone.iter(f"{SVG}text")]
