"""The report of `sfumato info` for a person, in a hundred columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sfumato.cli.info_report import KINDS, FileReport, Operations, RecipeRow, Report, StoredKind
from sfumato.cli.tables import RULE, FittingTable
from sfumato.cli.view import visible
from sfumato.measure.work import GPUS, number, size, three, tokens

_KINDS = 4
"""That are named of a file's."""


def show(report: Report) -> None:
    """The report for a person, in a hundred columns."""
    console = Console(highlight=False)
    console.print(Text.assemble("\n", visible(report["model"], "bold"), "\n"))
    console.print(FittingTable(_facts(report)))
    console.print("\nMemory in use, with so many tokens of context")
    console.print(FittingTable(_memory(report)))
    possible = [row for row in report["recipes"][1:] if "impossible" not in row]
    notes = [
        "A recipe's weights take as much in its files. In use: weights, KV cache, one canvas of logits, a prompt's"
    ]
    notes.append("activations; beside them comes what a process or a GPU's driver takes without a model.")
    if (gpu := report["gpu"]) is None:
        groups = _groups(possible)
        console.print("Longest context that fits, by the memory of a GPU")
        console.print(FittingTable(_fits(possible, groups)))
        for memory, names in groups.items():
            console.print(f"  {_memory_name(memory, groups)}: {', '.join(names)}", style="dim")
        notes.append("For the floor under a step, name a GPU: --gpu NAME.")
    else:
        console.print(f"On {_described(gpu)}, a step behind {report['context']:,} tokens")
        console.print(FittingTable(_on_gpu(possible, gpu)))
        if gpu["bandwidth"]:
            notes.append(_floor_note(gpu, report["step"]))
        else:
            notes.append(f"No published figures for {gpu['name']}: sfumato bench measures its ceiling.")
    if "operations" in report:
        console.print(f"\nOperations on this machine, device {report['operations']['device']}")
        console.print(FittingTable(_operations(report["operations"])))
    console.print(("" if "operations" in report else "\n") + " ".join(notes) + "\n", style="dim")


def show_adapter(name: str, facts: dict[str, Any]) -> None:
    """What an adapter is, in a few lines."""
    ranks = ", ".join(map(str, facts["ranks"])) or "0"
    base = f" for {facts['base']}" if facts["base"] else ""
    changes = [f"{kind} {count}" for kind, count in facts["targets"].items()]
    changes += [f"{facts['whole']} replaced"] if facts["whole"] else []
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("what", visible(f"adapter (LoRA) of rank {ranks}{base}"))
    table.add_row("weights", ", ".join(changes))
    table.add_row("passes", facts["passes"])
    table.add_row("file", f"{size(facts['nbytes'])}, {number(facts['parameters'])} numbers")
    if facts["calibration"] is not None:
        table.add_row("decisions", visible(_calibrated(facts["calibration"])))
    if facts["aside"]:
        table.add_row("left aside", f"{facts['aside']} tensors for vision")
    console = Console(highlight=False)
    console.print(Text.assemble("\n", visible(name, "bold"), "\n"))
    console.print(FittingTable(table))


def _facts(report: Report) -> Table:
    parameters, config, cache, step = report["parameters"], report["config"], report["cache_bf16"], report["step"]
    facts = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    if "file" in report:
        facts.add_row("file", visible(_stored(report["file"])))
        facts.add_row("in memory", visible(_held(report["file"])))
        if (calibration := report["file"]["calibration"]) is not None:
            facts.add_row("decisions", visible(_calibrated(calibration)))
    facts.add_row(
        "parameters", f"[bold]{number(parameters['total'])}[/], {number(parameters['active'])} active for each token"
    )
    facts.add_row(
        "experts",
        f"{config['layers']} × {config['experts']}, {config['experts_per_token']} for each token; "
        f"together {number(parameters['experts'])} of the parameters",
    )
    full = config["layers"] - config["sliding_layers"]
    facts.add_row("layers", f"{config['sliding_layers']} sliding (window {config['window']:,}), {full} full")
    if config["canvas_length"]:
        facts.add_row(
            "canvas",
            f"{config['canvas_length']} tokens of {config['vocabulary']:,} ({size(report['logits_bf16_bytes'])} of "
            f"logits in bf16); context to {config['max_context']:,}",
        )
    else:
        facts.add_row("canvas", f"none: one token after another; context to {config['max_context']:,}")
    facts.add_row(
        "KV cache",
        f"{cache['bytes_per_token'] / 1024:.4g} KiB a token and {size(cache['fixed_bytes'])} fixed; "
        f"{size(cache['bytes_at_max_context'])} at {config['max_context']:,} (bf16)",
    )
    facts.add_row(
        "a step",
        f"{number(step['flops'], 'FLOP')}, {step['vocabulary_flops'] / step['flops']:.0%} with the vocabulary; "
        f"wakes {step['distinct_experts']:.0%} of the experts",
    )
    return facts


def _stored(file: FileReport) -> str:
    """Format, size and what most of it is stored as; kinds below a hundredth are not counted out."""
    return f"{file['format']}, {size(file['bytes'])} in {file['tensors']:,} tensors: {_shares(file['kinds'])}"


def _held(file: FileReport) -> str:
    """What the weights take as they are, without a recipe."""
    if file["obstacle"] is not None:
        return f"cannot be loaded: {file['obstacle']}"
    return f"{size(sum(one['bytes'] for one in file['held']))} without a recipe: {_shares(file['held'])}"


def _calibrated(calibration: dict[str, Any]) -> str:
    """The temperature of each kind of question, and what its calibration error was and is."""
    each = []
    for kind, temperature in calibration["temperature"].items():
        errors = [calibration[name].get(kind, {}).get("ece") for name in ("before", "after")]
        ece = "" if None in errors else f" (ECE {errors[0]:.3f} → {errors[1]:.3f})"
        each.append(f"{kind} {temperature:.2f}{ece}")
    return f"temperatures {', '.join(each)}, of {sum(calibration['labels'].values()):,} labels"


def _shares(kinds: list[StoredKind]) -> str:
    total = sum(one["bytes"] for one in kinds)
    shares = [(one["kind"], one["bytes"] / max(1, total)) for one in kinds]
    large = [f"{kind} {share:.0%}" for kind, share in shares if share >= 0.01][:_KINDS]
    rest = len(shares) - len(large)
    return "; ".join(large) + (f"; {rest} more" if rest else "")


def _memory(report: Report) -> Table:
    table = _table("recipe", "weights", *(f"{at:,}" if at % 1024 else tokens(at) for at in report["contexts"]))
    table.add_column("", style="dim")
    for row in report["recipes"][1:]:
        if "impossible" in row:
            table.add_row(row["recipe"], *["–"] * (1 + len(report["contexts"])), row["impossible"])
            continue
        sizes = [size(one["total_bytes"]) for one in row["needs"]]
        table.add_row(row["recipe"], size(row["weight_bytes"]), *sizes, row["summary"])
    return table


def _operations(operations: Operations) -> Table:
    """A row for each implementation, with the obstacles in its way."""
    table = _table("operations", *KINDS)
    table.add_column("", style="dim")
    for name, obstacles in operations["obstacles"].items():
        table.add_row(
            name,
            *("–" if obstacles[kind] else "auto" if operations["auto"][kind] == name else "yes" for kind in KINDS),
            _reasons(obstacles),
        )
    return table


def _reasons(obstacles: dict[str, str | None]) -> str:
    """Each reason once, behind the kinds that it is for unless it is for all."""
    kinds: dict[str, list[str]] = {}
    for kind, reason in obstacles.items():
        if reason:
            kinds.setdefault(reason, []).append(kind)
    return "; ".join(
        reason if len(some) == len(obstacles) else f"{', '.join(some)}: {reason}" for reason, some in kinds.items()
    )


def _groups(rows: list[RecipeRow]) -> dict[float, list[str]]:
    """The names of GPUs by memory; a size is left out where no more fits than in the next smaller one."""
    groups: dict[float, list[str]] = {}
    last: list[int] | None = None
    for gpu in sorted(GPUS, key=lambda gpu: gpu.memory):
        longest = [row["longest_context"][gpu.name] for row in rows]
        memory = gpu.memory if longest != last else max(groups)
        groups.setdefault(memory, []).append(gpu.name)
        last = longest
    return groups


def _memory_name(memory: float, groups: dict[float, list[str]]) -> str:
    return f"{memory:g} GB" + (" and more" if memory == max(groups) else "")


def _fits(rows: list[RecipeRow], groups: dict[float, list[str]]) -> Table:
    table = _table("recipe", *(_memory_name(memory, groups) for memory in groups))
    for row in rows:
        table.add_row(row["recipe"], *(_longest(row["longest_context"][names[0]]) for names in groups.values()))
    return table


def _longest(count: int) -> str:
    return f"[green]{tokens(count)}[/]" if count else "[red]–[/]"


def _on_gpu(rows: list[RecipeRow], gpu: dict[str, Any]) -> Table:
    has_floor = gpu["bandwidth"] is not None
    table = _table("recipe", "fits", "longest context", *(["step floor"] if has_floor else []))
    if has_floor:
        table.add_column("set by", no_wrap=True)
    for row in rows:
        cells = [row["recipe"], "[green]yes[/]" if row["fits"] else "[red]no[/]", _longest(row["longest_context_here"])]
        if has_floor:
            is_memory = row["memory_ms"] >= (row["arithmetic_ms"] or 0)
            cells += [f"{three(row['floor_ms'])} ms", "memory" if is_memory else "arithmetic"]
        table.add_row(*cells)
    return table


def _floor_note(gpu: dict[str, Any], step: dict[str, Any]) -> str:
    text = (
        "The floor: a step reads the KV cache in view and every weight it needs once, at the maker's published "
        "bandwidth, of which machines reach about nine tenths."
    )
    if step["second_embedding_read_bytes"]:
        again = step["second_embedding_read_bytes"] / gpu["bandwidth"] / 1e6
        text += (
            " The embedding counts once too; read for the logits and again for the soft embedding, it adds "
            f"{again:.2f} ms."
        )
    return text + ("" if gpu["bf16"] else " Arithmetic is left out: no published figures.")


def _table(first: str, *others: str) -> Table:
    table = Table(box=RULE, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _described(gpu: dict[str, Any]) -> str:
    figures = [f"{gpu['memory']:.0f} GB"]
    figures += [f"{gpu['bandwidth'] / 1e3:.3g} TB/s"] if gpu["bandwidth"] else []
    figures += [f"{gpu['bf16']:.0f} TFLOP/s bf16"] if gpu["bf16"] else []
    return f"{gpu['name']} ({', '.join(figures)})"
