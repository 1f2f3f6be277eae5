"""The run as a picture: losses and solve rate over steps."""

from __future__ import annotations

import json
from pathlib import Path


def plot(folder: Path) -> str:
    """Draw `loss.png` from log.jsonl and evals.jsonl; returns a sentence that says what was drawn or is missing."""
    try:
        import matplotlib
    except ImportError:
        return "for a picture of the loss: pip install '.[plot]' in Sfumato's checkout"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    log, checks = (
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for path in (folder / "log.jsonl", folder / "evals.jsonl")
    )
    if not log:
        return "there is nothing to draw yet"
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, colour in (("diffusion_loss", "#a9854f"), ("encode_loss", "#7d6a6a")):
        values = [line[name] for line in log]
        span = max(1, len(values) // 200)
        smooth = [
            sum(values[max(0, i - span) : i + 1]) / len(values[max(0, i - span) : i + 1]) for i in range(len(values))
        ]
        axes.plot([line["step"] for line in log], smooth, color=colour, label=name.replace("_", " "))
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.set_yscale("log")
    if checks:
        right = axes.twinx()
        right.plot([c["step"] for c in checks], [c["solve_rate"] for c in checks], "o-", color="#2f6f6a")
        right.set_ylim(0, 1)
        right.set_ylabel("solved (35 clues)")
    axes.legend(loc="upper right", frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
    return f"{folder / 'loss.png'} shows the run"
