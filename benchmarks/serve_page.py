"""The record of benchmarks/serve.py and benchmarks/soak.py as tables and as pictures. Nothing is measured here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from sfumato.measure.work import duration, size

Record = dict[str, Any]
Table = Callable[[list[str], list[list[str]]], str]
BLUE, BROWN, WINE, GREY = "#2a6f97", "#b5651d", "#7d2a4d", "#888888"


# ---- tables ---------------------------------------------------------------------------------------------------------


THROUGHPUTS = {
    "throughput": "nano",
    "throughput-bf16": "nano in bfloat16",
    "throughput-tokens": "nano in bfloat16, one token after another",
}


def times(row: Record) -> list[str]:
    return ["–" if value is None else duration(value) for value in row.values()]


def throughput(one: Record, table: Table, name: str) -> str:
    head = [f"{name}, {one['requests']} puzzles, {one['rounds']} rounds", "tokens/s", "p50", "p95", "p99"]
    head += ["first text p50", "p95", "p99", "solved", "errors"]
    rows = [
        [
            f"{row['clients']} client{'s' * (row['clients'] > 1)}",
            f"{row['tokens_per_second']:.0f}",
            *times(row["latency_seconds"]),
            *times(row["first_text_seconds"]),
            f"{row['solved']:.1%}",
            str(row["errors"]),
        ]
        for row in one["levels"]
    ]
    return table(head, rows)


def first(one: Record, table: Table) -> str:
    names = {"idle": "on an idle server", "beside": f"beside {one['others']} long answers"}
    rows = [
        [name, duration(one[where]["median"]), duration(one[where]["p95"]), str(len(one[where]["seconds"]))]
        for where, name in names.items()
    ]
    options = ", ".join(f"{name} {value}" for name, value in one["short"].items())
    return table([f"mid, a short request's first text ({options})", "median", "p95", "requests"], rows)


def same(one: Record, table: Table) -> str:
    head = ["nano, reference operations, float32", "requests", "same text as alone", "alone", "at once"]
    row = [f"all at once, among {one['others']} others", str(one["requests"]), f"{one['identical']:.1%}"]
    return table(head, [[*row, duration(one["alone_seconds"]), duration(one["at_once_seconds"])]])


def soak(one: Record, table: Table) -> str:
    counts = one["outcomes"]
    head = [f"{one['minutes']:g} minutes of mixed traffic, {one['clients']} clients", ""]
    rows = [["requests", f"{one['requests']:,}"]]
    rows += [[name, f"{counts[name]:,}"] for name in sorted(counts)]
    rows += [["errors that no kill explains", str(len(one["unprovoked"]))]]
    rows += [["answers that are not as asked", str(sum(len(row) for row in one["unexpected"].values()))]]
    rows += [["answered twice, cut short or mixed up", str(sum(one["faults"].values()))]]
    for number, kill in enumerate(one["kills"], 1):
        back = "never" if kill["next_success_seconds"] is None else duration(kill["next_success_seconds"])
        slowest = f" within {duration(kill['slowest_error_seconds'])}" if kill["errors"] else ""
        summary = f"{kill['errors']} errors{slowest}, {kill['answered']} answered, next success after {back}"
        rows.append([f"kill {number}: {kill['in_flight']} in flight", summary])
    for name, each in (("server", one["growth"]["server"]), ("worker", one["growth"]["worker"])):
        summary = ", ".join(f"{size(life['late_bytes'])} ({life['growth']:+.1%})" for life in each)
        rows.append([f"memory of the {name}, growth after warm-up", summary or "–"])
    return table(head, rows)


def attacks(one: Record, table: Table) -> str:
    head = ["attack", "answers", "took", "bystander's requests", "failed", "median", "worst", "times idle"]
    alone = one["idle"]
    rows = [["none (idle)", "–", "–", str(alone["requests"]), str(len(alone["failures"]))]]
    rows[0] += [duration(alone["median"]), duration(alone["worst"]), f"{alone['worst'] / alone['median']:.1f}"]
    for row in one["attacks"]:
        statuses = ", ".join(str(status) for status in row["statuses"])
        cells = [row["attack"], statuses, duration(row["seconds"]), str(row["requests"]), str(len(row["failures"]))]
        cells += [duration(row["median"]), duration(row["worst"]), f"{row['worst'] / alone['median']:.1f}"]
        rows.append(cells)
    return table(head, rows)


def grammars(one: Record, table: Table) -> str:
    """A row for each family of hostile grammars: the slowest of everything in it."""
    alone, memory = one["idle"], one["memory"]
    rows = [["none (idle)", "–", "–", duration(alone["median"]), duration(alone["worst"])]]
    for family in dict.fromkeys(row["family"] for row in one["grammars"]):
        some = [row for row in one["grammars"] if row["family"] == family]
        counts = Counter(row["status"] for row in some)
        statuses = ", ".join(f"{count} × {status}" for status, count in sorted(counts.items()))
        rows.append(
            [family, statuses, *(duration(max(row[name] for row in some)) for name in ("seconds", "median", "worst"))]
        )
    head = ["hostile grammars", "answers", "took at most", "bystander's median at most", "its slowest request"]
    note = f"memory of the worker before, after: {size(memory['before'])}, {size(memory['after'])}"
    return f"{table(head, rows)}\n\n{note}"


def fuzz(one: Record, table: Table) -> str:
    statuses = ", ".join(f"{count} × {status}" for status, count in one["statuses"].items())
    beside, alone, memory = one["bystander"], one["idle"], one["memory"]
    rows = [
        ["answers", f"{statuses} in {duration(one['seconds'])}"],
        ["bystander's requests, failed", f"{beside['requests']}, {len(beside['failures'])}"],
        ["its p50, p95, p99, worst", ", ".join(duration(beside[name]) for name in ("p50", "p95", "p99", "worst"))],
        ["on the idle server: median, worst", f"{duration(alone['median'])}, {duration(alone['worst'])}"],
        ["memory of the worker before, after", f"{size(memory['before'])}, {size(memory['after'])}"],
    ]
    return table([f"{one['patterns']} patterns and {one['grammars']} grammars, {one['clients']} at a time", ""], rows)


PARTS: dict[str, Callable[[Record, Table], str]] = {
    **{part: partial(throughput, name=name) for part, name in THROUGHPUTS.items()},
    "first": first,
    "same": same,
    "soak": soak,
}
ATTACKS: dict[str, Callable[[Record, Table], str]] = {"attacks": attacks, "grammars": grammars, "fuzz": fuzz}


def show(record: Record, part: str) -> None:
    print((PARTS | ATTACKS)[part](record[part], common.table))
    for name, goal in record[part]["targets"].items():
        value = "not measured" if goal["value"] is None else f"{goal['value']:.3g}"
        print(f"{name}: {value} (target {'≤' if goal['is_at_most'] else '≥'} {goal['target']:g})")


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw(record: Record, folder: Path) -> None:
    """serve.png and soak.png, of the parts that are there."""
    import matplotlib

    matplotlib.use("agg")
    if "throughput" in record:
        draw_throughput(record, folder / "serve.png")
    if "soak" in record:
        draw_soak(record["soak"], folder / "soak.png")


def from_zero(axes: Any) -> None:
    axes.set_ylim(0, 1.1 * axes.dataLim.y1 or 1)


def draw_throughput(record: Record, path: Path) -> None:
    from matplotlib import pyplot

    rows = record["throughput"]["levels"]
    clients = [row["clients"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
    for name, colour in (("p50", BLUE), ("p95", BROWN), ("p99", WINE)):
        left.plot(clients, [row["latency_seconds"][name] for row in rows], "o-", color=colour, label=name)
    left.set(xlabel="clients at once", ylabel="seconds to the whole answer")
    left.set_title("nano", fontsize=9)
    left.legend()
    levels = []
    for (part, name), colour in zip(THROUGHPUTS.items(), (BLUE, BROWN, GREY), strict=True):
        if part not in record:
            continue
        levels += (these := record[part]["levels"])
        at = [row["clients"] for row in these]
        right.plot(at, [row["tokens_per_second"] for row in these], "o-", color=colour, label=name)
        for row in these:
            rounds = row["tokens_per_second_of_rounds"]
            right.plot([row["clients"]] * len(rounds), rounds, ".", color=colour, alpha=0.35)
    right.legend(fontsize=8)
    errors = sum(row["errors"] for row in levels)
    right.set(xlabel="clients at once", ylabel="tokens a second")
    right.set_title(f"{errors} errors in {errors + sum(row['answered'] for row in levels):,} requests", fontsize=9)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(clients, [str(count) for count in clients])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        from_zero(axes)
    figure.suptitle("nano's Sudokus over HTTP", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_soak(one: Record, path: Path) -> None:
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9.2, 5.2), sharex=True, layout="constrained")
    lives: dict[int | None, list[Sequence[Any]]] = {}
    for sample in one["memory"]:
        lives.setdefault(sample[3], []).append(sample)
    for pid, samples in lives.items():
        if pid is not None:
            upper.plot([s[0] / 60 for s in samples], [s[2] / 1e6 for s in samples], color=BLUE)
    served = [sample for sample in one["memory"] if sample[1]]
    upper.plot([s[0] / 60 for s in served], [s[1] / 1e6 for s in served], color=BROWN)
    upper.plot([], [], color=BLUE, label="worker")
    upper.plot([], [], color=BROWN, label="server")
    upper.set(ylabel="resident memory, MB")
    at = [window["from"] / 60 for window in one["windows"]]
    for name, colour in (("p50", BLUE), ("p95", BROWN)):
        lower.plot(at, [window[name] for window in one["windows"]], color=colour, label=name)
    lower.plot([], [], color=WINE, label="errors (right)")
    lower.set(ylabel="seconds to a whole answer", xlabel="minutes")
    right = lower.twinx()
    width = one["window_seconds"] / 60
    right.bar(at, [window["errors"] for window in one["windows"]], width, align="edge", color=WINE)
    right.set(ylabel="errors")
    from_zero(right)
    for axes in (upper, lower):
        from_zero(axes)
        for kill in one["kills"]:
            axes.axvline(kill["at"] / 60, color=GREY, linestyle=":", linewidth=1)
        axes.legend(loc="upper right")
        axes.grid(alpha=0.25)
    figure.suptitle(f"{one['requests']:,} requests; the worker is killed at each dotted line", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
