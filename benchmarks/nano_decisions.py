"""How well nano-decide answers typed questions whose chances are known: accuracy, log loss, and how sure it is.

    .venv/bin/python benchmarks/nano_decisions.py -o benchmarks/results/nano_decisions.json

Questions come from `tasks/decisions.py`, those that no run trains on. Beside each figure stands the best there is: the
mean of the largest chance for accuracy, the entropy of the chances for log loss. "After" is with a temperature for each
type of question, fitted on one half of the questions and judged on the other, both ways. Prints tables, and writes JSON
with hardware, versions, commit and command, and a picture of confidence and accuracy beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.evals.calibration import LabelledRead, figures, fit, reliability, with_temperature
from sfumato.llm import LLM
from sfumato.tasks import decisions
from sfumato.tasks.decisions import LabelledQuestion
from sfumato.tasks.task import named
from sfumato.templates.requests import Decide
from sfumato.training.task_source import TaskSource

SAMPLES, STEPS = (1, 4, 16), (1, 2, 4)
BATCH = 64
"""Questions that are asked at the same time."""


def read(llm: LLM, items: Sequence[LabelledQuestion], samples: int, steps: int) -> list[list[float]]:
    """The probability of each option of each question, without a calibration."""

    async def ask(item: LabelledQuestion) -> list[float]:
        query = Decide(item.state, {"q": item.question}, steps=steps, samples=samples, calibrated=False)
        return [*(await llm.arun(query))["q"].probabilities.values()]

    async def ask_all() -> list[list[float]]:
        results: list[list[float]] = []
        for start in range(0, len(items), BATCH):
            results += await asyncio.gather(*map(ask, items[start : start + BATCH]))
        return results

    return asyncio.run(ask_all())


def labelled(items: Iterable[LabelledQuestion], read: Iterable[Sequence[float]]) -> list[LabelledRead]:
    """As `evals.calibration` takes them: the label is what was drawn."""
    return [
        LabelledRead(item.question.kind, tuple(p), item.label, item.text()) for item, p in zip(items, read, strict=True)
    ]


def against_chances(items: Sequence[LabelledQuestion], reads: Sequence[LabelledRead]) -> dict[str, float]:
    """What needs no labels: figures that the known chances give, and the best there are."""
    rows = []
    for item, own in zip(items, reads, strict=True):
        pairs = [(chance, max(p, 1e-9)) for chance, p in zip(item.chances, own.probabilities, strict=True)]
        loss = -sum(chance * math.log(p) for chance, p in pairs)
        floor = -sum(chance * math.log(chance) for chance, _ in pairs if chance > 0)
        distance = sum(abs(chance - p) for chance, p in pairs) / 2
        rows.append((own.choice == item.likeliest, item.chances[own.choice], max(item.chances), loss, floor, distance))
    names = ("likeliest_found", "expected_accuracy", "ceiling", "expected_log_loss", "entropy", "distance")
    return {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def tempered_by_halves(reads: Sequence[LabelledRead]) -> tuple[list[LabelledRead], dict[str, float]]:
    """Reads with the temperature of the other half's fit, in the same order; and the temperatures of all."""
    after = list(reads)
    temperatures = {}
    for kind in dict.fromkeys(read.kind for read in reads):
        places = [place for place, read in enumerate(reads) if read.kind == kind]
        temperatures[kind] = fit([reads[place] for place in places]).temperature
        for own, other in ((places[::2], places[1::2]), (places[1::2], places[::2])):
            temperature = fit([reads[place] for place in other]).temperature
            changed = with_temperature([reads[place] for place in own], temperature)
            for place, tempered in zip(own, changed, strict=True):
                after[place] = tempered
    return after, temperatures


def by_kind(items: Sequence[LabelledQuestion], reads: Sequence[LabelledRead]) -> dict[str, dict[str, Any]]:
    """Figures of each kind of the generator before and after calibration, and of all."""
    after, temperatures = tempered_by_halves(reads)
    groups = {"all": [*range(len(items))]}
    groups |= {kind: [n for n, item in enumerate(items) if item.kind == kind] for kind in decisions.KINDS}
    records: dict[str, dict[str, Any]] = {}
    for kind, places in groups.items():
        own = [items[place] for place in places]
        some = {"before": [reads[place] for place in places], "after": [after[place] for place in places]}
        records[kind] = {"questions": len(own)} | {
            name: figures(values).to_dict() | against_chances(own, values) for name, values in some.items()
        }
    return records | {"temperatures": temperatures}


def print_kinds(records: Mapping[str, Mapping[str, Any]]) -> None:
    columns = ("questions", "accuracy", "ceiling", "log loss", "entropy", "Brier", "ECE", "calibrated")
    print(f"{'kind':10}" + "".join(f"{name:>11}" for name in columns))
    for kind in ("all", *decisions.KINDS):
        before, after = records[kind]["before"], records[kind]["after"]
        print(
            f"{kind:10}{records[kind]['questions']:11}{before['expected_accuracy']:11.1%}{before['ceiling']:11.1%}"
            f"{before['expected_log_loss']:11.3f}{before['entropy']:11.3f}{before['brier']:11.3f}{before['ece']:11.3f}"
            f"{after['ece']:11.3f}"
        )


def table(llm: LLM, items: Sequence[LabelledQuestion]) -> list[dict[str, float]]:
    """Accuracy, log loss and time by draws of noise and steps."""
    rows = []
    print(f"\n{'draws':>6}{'steps':>6}{'accuracy':>10}{'log loss':>10}{'ms':>8}")
    for samples in SAMPLES:
        for steps in STEPS:
            began = time.perf_counter()
            reads = labelled(items, read(llm, items, samples, steps))
            ms = (time.perf_counter() - began) / len(items) * 1000
            row = {"samples": samples, "steps": steps, "ms": ms} | against_chances(items, reads)
            rows.append(row)
            accuracy, loss = row["expected_accuracy"], row["expected_log_loss"]
            print(f"{samples:6}{steps:6}{accuracy:10.1%}{loss:10.3f}{ms:8.1f}", flush=True)
    return rows


def picture(reads: Sequence[LabelledRead], path: Path) -> None:
    """Confidence and accuracy in bins, before and after calibration side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    both, _ = tempered_by_halves(reads)
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 4), sharey=True)
    for axis, title, some in zip(axes, ("as read", "calibrated"), (reads, both), strict=True):
        bins = [one for one in reliability(some) if one.count]
        axis.plot([0, 1], [0, 1], color="#c9c3ba", linewidth=1)
        sizes = [4 + 200 * one.count / len(reads) for one in bins]
        axis.scatter([b.confidence for b in bins], [b.accuracy for b in bins], sizes, color="#2f6f6a", alpha=0.85)
        axis.set_title(f"{title}: ECE {figures(some).ece:.3f}", fontsize=10)
        axis.set_xlabel("probability of the choice")
        axis.set_xlim(0, 1.02)
        axis.set_ylim(0, 1.02)
    axes[0].set_ylabel("share that is right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano-decide")
    parser.add_argument("--items", type=int, default=3000)
    parser.add_argument("--table-items", type=int, default=500, help="questions of the table of draws and steps")
    parser.add_argument("--samples", type=int, default=1, help="draws of noise of the first table")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--ops", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    llm = LLM.load(arguments.model, dtype=arguments.dtype, ops=arguments.ops)
    assert llm.template is not None
    source = TaskSource(named("decisions"), llm.tokenizer, llm.template, seed=arguments.seed, is_held_out=True)
    items = [decisions.read(item) for item in source.items(arguments.items, 0)]
    reads = labelled(items, read(llm, items, arguments.samples, 1))
    kinds = by_kind(items, reads)
    print_kinds(kinds)
    rows = table(llm, items[: arguments.table_items])
    if arguments.out is None:
        return
    from sfumato.measure.machine import environment

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture(reads, arguments.out.with_suffix(".png"))
    whole = {"what": "typed questions with known chances", "model": arguments.model, "ops": llm.model.ops.name}
    whole |= {"seed": arguments.seed, "samples": arguments.samples, "kinds": kinds, "table": rows}
    arguments.out.write_text(json.dumps(whole | {"environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
