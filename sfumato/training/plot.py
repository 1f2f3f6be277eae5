"""The run as a picture: losses and what the looks at the model gave, over steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sfumato.training import logs

COLOURS = {"diffusion_loss": "#a9854f", "encode_loss": "#7d6a6a"}
RATES = ("#2f6f6a", "#5b5f97", "#8f3f5f", "#3f6f2f")


def plot(folder: Path) -> str:
    """Draw `loss.png` from log.jsonl and evals.jsonl; returns a sentence that says what was drawn or is missing."""
    try:
        import matplotlib
    except ImportError:
        return "for a picture of the loss: pip install '.[plot]' in Sfumato's checkout"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    log, looks = (logs.lines_of(folder / name) for name in ("log.jsonl", "evals.jsonl"))
    if not log:
        return "there is nothing to draw yet"
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, colour in COLOURS.items():
        values = [line[name] for line in log]
        axes.plot([line["step"] for line in log], _smooth(values), color=colour, label=_label(name))
        held = [(line["step"], line[name]) for line in looks if name in line]
        if held:
            axes.plot(*zip(*held, strict=True), "x--", color=colour, label=f"{_label(name)}, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.set_yscale("log")
    rates = dict.fromkeys(name for line in looks for name in line if name.endswith("_rate"))
    if rates:
        _draw_rates(axes, looks, list(rates))
    axes.legend(loc="upper right", frameon=False)
    figure.tight_layout()
    beside = folder / ".loss.png.part"
    figure.savefig(beside, dpi=120, format="png")
    os.replace(beside, folder / "loss.png")
    pyplot.close(figure)
    return f"{folder / 'loss.png'} shows the run"


def _draw_rates(axes: Any, looks: list[dict[str, Any]], names: list[str]) -> None:
    right = axes.twinx()
    for name, colour in zip(names, RATES * len(names), strict=False):
        points = [(line["step"], line[name]) for line in looks if name in line]
        right.plot(*zip(*points, strict=True), "o-", color=colour, label=f"{name.removesuffix('_rate')} right")
    right.set_ylim(0, 1)
    right.set_ylabel("share of held-out items")
    right.legend(loc="lower left", frameon=False)


def _label(name: str) -> str:
    return {"diffusion_loss": "denoise", "encode_loss": "encode"}[name]


def _smooth(values: list[float]) -> list[float]:
    """Each with the mean of the 200th part of the run before it."""
    span = max(1, len(values) // 200)
    return [sum(values[max(0, i - span) : i + 1]) / len(values[max(0, i - span) : i + 1]) for i in range(len(values))]
