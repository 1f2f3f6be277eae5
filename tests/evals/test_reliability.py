"""evals/reliability.py: the diagram is XML whatever the model is called, with a bar for every bin that has answers."""

from __future__ import annotations

import random
from xml.etree import ElementTree

from sfumato.evals.calibration import FEW, KindReport, LabelledRead, judge
from sfumato.evals.reliability import RARE, SIDE, draw

SVG = "{http://www.w3.org/2000/svg}"


def reports() -> list[KindReport]:
    generator = random.Random(0)
    reads = [
        LabelledRead(kind, (p := 0.5 + generator.random() / 2, 1 - p), int(generator.random() > 0.7), str(n))
        for kind, count in (("noul", 2 * FEW), ("choice", FEW - 1))
        for n in range(count)
    ]
    return judge(reads)


def test_every_bin_has_its_bar() -> None:
    results = reports()
    root = ElementTree.fromstring(draw(results, "nano"))
    bars = [one for one in root.iter(f"{SVG}rect") if (one.get("class") or "").startswith("b")]
    bins = [one for report in results for one in (*report.before_bins, *report.after_bins) if one.count]
    assert len(bars) == len(bins) + 1  # and the legend's
    for bar, one in zip(bars, bins, strict=False):
        assert abs(float(bar.get("height", "nan")) - SIDE * one.accuracy) < 0.06
    assert [" r" in bar.get("class", "") for bar in bars[:-1]] == [one.count < RARE for one in bins]
    texts = [one.text for one in root.iter(f"{SVG}text")]
    assert f"noul, {2 * FEW} answers" in texts and "too few labels: T = 1" in texts
    assert texts.count("before") == texts.count("after, held out") == 2
    assert f"ECE {results[0].before.ece:.3f}" in texts
    height = float(root.get("height", "nan"))
    assert all(0 <= float(one.get("y", "0")) <= height for one in root.iter())


def test_a_hostile_name_is_text() -> None:
    name = '</text><script>alert("&")</script>\x00\x1b[31m\ud800' + "long " * 50
    root = ElementTree.fromstring(draw(reports(), name).encode())
    assert not list(root.iter(f"{SVG}script"))
    titles = [one.text or "" for one in root.iter(f"{SVG}text") if one.get("class") == "h"]
    assert titles[0].startswith('</text><script>alert("&")') and len(titles[0]) <= 60
    assert ElementTree.fromstring(draw([], "nothing")).tag == f"{SVG}svg"
