"""The records of benchmarks/results as sections of RESULTS.md: one function a kind of record, known by its "what".

`results.py` puts them on the page. Nothing is measured here, and no figure is written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sfumato.measure.work import duration, number, size

Record = dict[str, Any]


# ---- pieces ---------------------------------------------------------------------------------------------------------


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def source(name: str, record: Record) -> str:
    """Where a record comes from: hardware, versions, date, file and command."""
    result = record.get("environment", {})
    hardware, versions = result.get("hardware", {}), result.get("versions", {})
    if hardware:
        where = hardware.get("gpu") or f"{hardware.get('cpu')}, {hardware.get('threads')} threads"
    else:
        where = str(record.get("device", "unknown hardware"))
    parts = [where, *(f"{key} {value}" for key, value in versions.items() if key != "python")]
    parts += [f"commit {str(result.get('commit'))[:9]}", str(result.get("date", ""))[:10]]
    return f"*{', '.join(filter(None, parts))}; [{name}](benchmarks/results/{name}); `{result.get('command', '–')}`*"


def verdict(target: Record) -> str:
    if target["reached"] is None:
        return "not measured"
    return "reached" if target["reached"] else "**not reached**"


def targets(result: Record, record: Record, name: str) -> Iterator[list[str]]:
    """The rows of the table of targets, from every "targets" in a record."""
    for what, target in result.items():
        sign = "≤" if target["is_at_most"] else "≥"
        value = "–" if target["value"] is None else f"{target['value']:.3g}"
        where = hardware(record)
        yield [
            what,
            value,
            f"{sign} {target['target']:g}",
            verdict(target),
            where,
            f"[{name}](benchmarks/results/{name})",
        ]


def hardware(record: Record) -> str:
    result = record.get("environment", {}).get("hardware", {})
    return result.get("gpu") or (f"{result['cpu']}, {result['threads']} threads" if result.get("cpu") else "–")


def all_targets(record: Record, prefix: str = "") -> dict[str, Record]:
    """Every target in a record, wherever it stands, under a name that says where."""
    result: dict[str, Record] = {}
    for key, value in record.items():
        if key == "targets":
            result |= {f"{prefix}{name}": target for name, target in value.items()}
        elif isinstance(value, dict):
            result |= all_targets(value, f"{prefix}{key}: ")
    return result


# ---- one section a kind of record ------------------------------------------------------------------------------------


def step(record: Record) -> str:
    texts = []
    for kind, one in record["mid"].items():
        if "failed" in one:
            texts.append(f"{kind}: {one['failed']}")
            continue
        head = [
            f"{one['size']}, {kind}, {one['ops']} operations, after {one['prompt']} tokens",
            "time",
            "floor",
            "of ceiling",
        ]
        texts.append(table(head, parts(one["parts"])))
    if "slice" in record:
        one = record["slice"]
        head = [f"true-size slice ({', '.join(one['layers'])}), bf16", "time", "floor", "of ceiling"]
        lines = parts(one["parts"])
        for side, means in one["products"].items():
            for name, seconds in means.items():
                lines.append([f"{side} alone, {name}", duration(seconds), "–", "–"])
        texts.append(table(head, lines))
        if one["peak_beyond_bytes"] is not None:
            texts.append(
                f"Peak memory beyond weights and cache: {size(one['peak_beyond_bytes'])}; one bf16 logits buffer is "
                f"{size(one['logits_buffer_bytes'])}."
            )
    return "\n\n".join([*texts, ceiling(record["ceilings"])])


def parts(result: Record) -> list[list[str]]:
    return [
        [name, duration(row["seconds"]), duration(row["floor_seconds"]), share(row["share_of_ceiling"])]
        for name, row in result.items()
    ]


def ceiling(most: Record) -> str:
    bandwidth, rates = most["bytes_per_second"], most["flops_per_second"]
    reads = ", ".join(f"{name} {size(value)}/s" for name, value in bandwidth.items() if name != "best")
    text = f"The ceiling: {reads}."
    for kind, result in rates.items():
        means = [
            f"{name} {number(max(value.values()), 'FLOP')}/s"
            for name, value in result.items()
            if isinstance(value, dict)
        ]
        text += f" {kind}: {', '.join(means)}."
    return text


def adapters(record: Record) -> str:
    head = [f"{record['size']}, rank {record['rank']} on everything, after {record['prompt']} tokens"]
    head += ["median", "cost", "fastest", "cost of the fastest"]
    lines = []
    for kind, one in record["kinds"].items():
        for rows in ("one row", "sixteen rows"):
            for name, row in one[rows].items():
                times = [duration(row["seconds"]), f"{row['cost']:+.1%}"]
                times += [duration(row["fastest_seconds"]), f"{row['cost_of_fastest']:+.1%}"]
                lines.append([f"{kind}, {one['ops']} operations, {rows}, {name}", *times])
    return table(head, lines)


def request(record: Record) -> str:
    texts, lines = [], []
    for kind, one in record["answers"].items():
        for mode in ("diffusion", "autoregressive"):
            if mode not in one:
                continue
            row = one[mode]
            steps = f", {row['steps_per_canvas']} steps" if "steps_per_canvas" in row else ""
            passes = f"{row['passes_per_canvas']:.2f}" if "passes_per_canvas" in row else "–"
            times = [duration(row["seconds"]), duration(row["first_tokens_seconds"])]
            lines.append(
                [
                    f"{one['size']}, {kind}, {mode}{steps}",
                    str(row["tokens"]),
                    *times,
                    f"{row['tokens_per_second']:.3g}",
                    passes,
                ]
            )
    if lines:
        texts.append(table(["answer", "tokens", "time", "first tokens", "tokens/s", "passes a canvas"], lines))
    if "sudoku" in record:
        one = record["sudoku"]
        lines = [
            [name, str(row["batch"]), duration(row["seconds"]), f"{row['solved']:.1%}", f"{row['mean_steps']:.2f}"]
            for name, rows in one["engines"].items()
            for row in rows
        ]
        texts.append(table([f"nano, {one['puzzles']} puzzles", "batch", "time", "solved", "steps"], lines))
        ratios = ", ".join(f"{value:.2f} at batch {batch}" for batch, value in one["ratios_at_the_same_batch"].items())
        texts.append(f"Times faster than transformers: {one['ratio_of_the_best']:.2f}, best batch of each; {ratios}.")
    return "\n\n".join(texts)


def peers(record: Record) -> str:
    names = list(next(iter(record["parts"].values())))
    lines = []
    for part, rows in record["parts"].items():
        shares = record["ratios"][part]
        lines.append(
            [part, *(duration(rows[n]["seconds"]) + (f" (×{shares[n]:.2f})" if n in shares else "") for n in names)]
        )
    lines.append(
        ["logits, error against float32", *(f"{record['logits'][n]['error_against_float32']:.1e}" for n in names)]
    )
    head = [
        f"{record['model']}, {record['dtype']}, prompt {record['prompt']}, {record['steps']} steps a canvas",
        *names,
    ]
    texts = [table(head, lines)]
    ways = record["ways of transformers"] | record.get("compiled", {})
    sentences = []
    for name, one in ways.items():
        part = next((one[p] for p in ("denoise forward", "whole step") if p in one), one)
        sentences.append(f"{name}: {duration(part['seconds']) if 'seconds' in part else one.get('failed')}")
    texts.append("In brackets: times the best that transformers reached, compiled or not, where it can be compiled.")
    texts.append(f"transformers takes turns as {record['best way']}. Its ways, tried before: {'; '.join(sentences)}.")
    differences = [
        f"{name} {one['largest_difference_from_transformers']:.3g} (same argmax: {one['argmax_as_transformers']:.1%})"
        for name, one in record["logits"].items()
        if "largest_difference_from_transformers" in one
    ]
    texts.append(f"Largest logit difference from transformers: {', '.join(differences)}. mlx-vlm: {record['mlx-vlm']}.")
    return "\n\n".join(texts)


def ops(record: Record) -> str:
    lines = []
    for row in record["rows"]:
        name = f"{row['size']}: {row['case']}"
        if "failed" in row:
            lines.append([name, row["ops"], row["kind"], "failed", "–", "–", "–"])
            continue
        errors = f"{row['error']:.1e}", f"{row['error_of_plain_bf16']:.1e}"
        lines.append([name, row["ops"], row["kind"], duration(row["seconds"]), share(row["share_of_ceiling"]), *errors])
    return table([record["op"], "operations", "weights", "time", "of ceiling", "error", "plain bf16's error"], lines)


def nano(record: Record) -> str:
    lines = [
        [
            f"{row['clues'][0]}–{row['clues'][1]} clues, {row['mode']}",
            str(row["puzzles"]),
            f"{row['solved']:.1%}",
            f"{row['mean_steps']:.2f}",
            f"{row['tokens_per_pass']:.1f}",
        ]
        for row in record["rows"]
    ]
    return table([f"nano, {record.get('weights', 'float32')}", "puzzles", "solved", "steps", "tokens per pass"], lines)


def skills(record: Record) -> str:
    """Every skill as a whole; kinds are in the record."""
    lines = []
    for row in record["rows"]:
        if row["kind"] is None:
            measures = row["measures"] | ({"valid by RDKit": row["valid_by_rdkit"]} if "valid_by_rdkit" in row else {})
            figures = [f"{row['share']:.1%}", f"{row['low']:.1%}–{row['high']:.1%}", f"{row['steps']:.1f}"]
            figures += [f"{row['tokens_per_pass']:.1f}", f"{row['milliseconds']:.1f}"]
            also = ", ".join(f"{name} {value:.1%}" for name, value in measures.items())
            lines.append([f"{row['task']}, {row['setting']}", str(row["items"]), *figures, also])
    head = ["nano-skills", "items", "right", "95 % interval", "steps", "tokens per pass", "ms an item", "also"]
    return table(head, lines)


def predicted(record: Record) -> str:
    """Predictions, apart from all that was measured: what a count says of a target is no verdict."""
    before, lines = record.get("before_ms", {}), []
    for row in record["rows"]:
        name, most = f"{row['kind']}, batch {row['batch']}", row.get("targets", {}).get("ms a step", {}).get("target")
        figures = [
            f"{row['floor_ms']:.2f}",
            f"{before[name]:.1f}" if name in before else "–",
            f"{row['predicted_ms']:.1f}",
        ]
        lines.append([name, *figures, "–" if most is None else f"{most:g}", str(row["nodes"])])
        lines[-1].append(f"{row['tokens_per_second']:.0f}")
    head = [
        "released size on an H200, 1K context",
        "floor, ms",
        "before, ms",
        "predicted, ms",
        "aim, ms",
        "nodes",
        "tokens/s",
    ]
    text = (
        f"**Nothing of this was run.** Predicted from counts, ± {record['within']:.0%} (`benchmarks/predict.py`).\n\n"
    )
    text += table(head, lines)
    aims = [
        f"{name}: {target['value']:.2f} (aim {'at most' if target['is_at_most'] else 'at least'} {target['target']:g})"
        for name, target in record["targets"].items()
    ]
    text += "\n\nBy this count: " + "; ".join(aims) + "."
    for row in record["rows"]:
        if row["batch"] == 1:
            most = [f"{k['kernel']} {k['ms']:.2f} ms ({k['launches']} ×, {k['bound']})" for k in row["kernels"][:6]]
            text += f"\n\n{row['kind']}, the longest: " + ", ".join(most) + "."
    return text


def kernels(record: Record) -> str:
    """Nodes a step, and what the compiler made of each kernel."""
    before = {(row["kind"], row["rows"], row["encodes"]): row["nodes"] for row in record.get("steps_before", [])}
    lines = [
        [
            f"{row['kind']}, {row['rows']} row{'s' * (row['rows'] > 1)}"
            + (", with tokens to encode" if row["encodes"] else ""),
            str(before.get((row["kind"], row["rows"], row["encodes"]), "–")),
            str(row["nodes"]),
            str(sum(row["kernels"].values())),
            str(sum(row["torch"].values())),
        ]
        for row in record["steps"]
    ]
    text = table(
        ["a recorded step of the released size", "nodes before", "nodes", "kernels", "operations of torch"], lines
    )
    older = {
        (row["kind"], row["kernel"], row["tiles"]): row for row in record.get("rows_before", []) if row["arch"] == 90
    }
    head = ["sm_90, batch 1", "weights", "times", "CTAs", "registers", "spills", "shared", "loop", "loop before"]
    lines = []
    for row in record["rows"]:
        if row["arch"] == 90:
            was = older.get((row["kind"], row["kernel"], row["tiles"]))
            name = f"{row['kernel'].strip('_')} {row['tiles']}".strip()
            values = [row["launches"], row["ctas"], row["registers"], row["spills"], row["shared"]]
            loops = [one["loop"] if one and one["loop_matrix"] else "–" for one in (row, was)]
            lines.append([name, row["kind"], *map(str, (*values, *loops))])
    text += "\n\n" + table(head, lines)
    worst = []
    for arch in sorted({row["arch"] for row in record["rows"]}):
        mine = [row for row in record["rows"] if row["arch"] == arch]
        spilt = [f"{row['kernel'].strip('_')} ({row['kind']}) {row['spills']} B" for row in mine if row["spills"] > 16]
        worst.append(
            [f"sm_{arch}", str(len(mine)), str(max(row["registers"] for row in mine)), ", ".join(spilt) or "none"]
        )
    return text + "\n\n" + table(["architecture", "kernels", "most registers", "spills above 16 bytes"], worst)


def gpu(record: Record) -> str:
    """The cells of scripts/gpu.py, and what became of every step."""
    lines, others = [], []
    for row in record["tasks"]:
        result = row.get("result", {})
        if "step_ms" in result:
            times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in result["step_ms"].items())
            others.append(f"{row['task'].removeprefix('full/')}: a step {times}")
        elif "first_step_ms" in result:
            others.append(f"{row['task'].removeprefix('full/')}: {result['first_step_ms']:.1f} ms")
        elif "ms_a_pass" not in result:
            others.append(f"{row['task']}: {'ok' if row['ok'] else row.get('error', 'failed')}")
        if "ms_a_pass" not in result:
            continue
        peak, busy = (result.get(key) for key in ("peak_bytes", "busy_ms_a_step"))
        lines.append(
            [
                row["task"].removeprefix("full/"),
                f"{result['ms_a_pass']:.2f}",
                "–" if busy is None else f"{busy:.2f}",
                f"{result.get('kernels_a_step', 0):.0f}",
                f"{result['tokens_per_second']:.0f}",
                share(result.get("share_of_ceiling")),
                size(peak) if peak else "–",
            ]
        )
    texts = []
    if lines:
        head = ["ms a pass", "kernels, ms", "kernels", "tokens/s", "of ceiling", "peak"]
        texts.append(table(["released size, random weights", *head], lines))
    if others:
        texts.append("Steps: " + "; ".join(others) + ".")
    return "\n\n".join(texts)


def sampling_rules(record: Record) -> str:
    from benchmarks.sampling_rules import HEAD, TEXT_HEAD, lines, text_lines

    bands, texts = record["bands"], record["texts"]
    counts = " / ".join(f"{next(iter(rows.values()))['puzzles']} {band}" for band, rows in bands.items())
    return "\n\n".join(
        [
            f"nano, Sudokus with their clues pinned: {counts}. Behind a colon stands a way that was not taken.",
            table(HEAD, lines(bands)),
            f"{texts['texts']} texts of {texts['tokens']} tokens, a random model of 512 words:",
            table(TEXT_HEAD, text_lines(texts)),
        ]
    )


def early(record: Record) -> str:
    from benchmarks.early import HEAD, lines

    text = table(HEAD, lines(record))
    return text + "\n\nRight: of whole puzzles, those that are solved; of budgets below a canvas, the cells."


def pins(record: Record) -> str:
    lines = [
        [f"{row['holes']} holes in solved grids", str(row["grids"]), f"{row['solved']:.1%}", f"{row['steps']:.2f}"]
        for row in record["holes"]
    ]
    for band, row in record["beside"].items():
        lines += [
            [
                f"{band} puzzles, through {name}",
                str(row["puzzles"]),
                f"{row[f'{way}_solved']:.1%}",
                f"{row[f'{way}_steps']:.2f}",
            ]
            for way, name in (("template", "a template"), ("command", "`sfumato sudoku`"))
        ]
    return table(["nano, what is not a hole is pinned", "grids", "solved", "steps"], lines)


def constrain(record: Record) -> str:
    head = [f"a grammar beside {record['positions']} positions, {record['vocabulary']:,} words", "mean a step"]
    lines = [
        [name, duration(row["ms_mean"] / 1e3), duration(row["ms_worst"] / 1e3), f"{row['masks_mean']:.1f}"]
        for name, row in record["rows"].items()
    ]
    text = table([*head, "worst", "masks a step"], lines)
    return text + f'\n\nA text of {record["tokens"]} tokens; "naive" takes a mask for each of its positions.'


def quantised(record: Record) -> str:
    from benchmarks.quantised import page as tables  # only now: it imports the engine

    return tables(record)


def full_size(record: Record) -> str:
    head = [f"{record['recipe']}, {record['layers']} layers, from", "file", "peak quantising", "in"]
    head += ["peak generating", "a step", "of ceiling", "beside torch itself", "as `info` computes it"]
    lines = []
    for source, phases in record["sources"].items():
        quantised, ran, info = phases["quantise"], phases["generate"], phases["info"]
        lines.append(
            [
                {"random": "52 GB of bf16, made as they are read", "gguf": "a GGUF like Q4_K_M"}.get(source, source),
                *(size(quantised["file_bytes"]), size(quantised["peak_bytes"]), duration(quantised["seconds"])),
                *(size(ran["peak_bytes"]), duration(ran["step_seconds"]), share(ran["share_of_ceiling"])),
                *(size(info["took_bytes"]), f"{size(info['total_bytes'])} ({info['total_off_by']:+.1%})"),
            ]
        )
    ran = next(iter(record["sources"].values()))["generate"]
    text = (
        f"\n\nOne canvas behind {ran['context']:,} tokens on the CPU, experts in a mapped file; a step is the median."
    )
    return table(head, lines) + text


def parts_of(record: Record, parts: dict[str, Callable[..., str]]) -> list[str]:
    return [
        f"{text(record[part], table)}\n\n`{record[part]['environment'].get('command', '–')}`"
        for part, text in parts.items()
        if part in record
    ]


def attacks(record: Record) -> str:
    from benchmarks.serve_page import ATTACKS  # only now: it imports the engine

    return "\n\n".join(parts_of(record, ATTACKS))


def serve(record: Record) -> str:
    from benchmarks.serve_page import PARTS  # only now: it imports the engine

    texts = parts_of(record, PARTS)
    pictures = {
        "throughput": "![Latency and throughput by clients](docs/serve.png)",
        "soak": "![The soak](docs/soak.png)",
    }
    return "\n\n".join([*texts, *(text for part, text in pictures.items() if part in record)])


def decisions(record: Record) -> str:
    from benchmarks.decisions import page as tables  # only now: it imports the engine

    return tables(record, table)


def neighbours(record: Record) -> str:
    """The record of benchmarks/neighbours.py."""
    labels = list(record["rows"][0]["times"])
    lines = [
        [
            str(row["neighbours"]),
            row["title"],
            *(
                f"{duration(row['times'][label]['median'])} ({duration(row['times'][label]['slowest_tenth'])})"
                for label in labels
            ),
        ]
        for row in record["rows"]
    ]
    head = ["busy processes beside", "the middle one (where the slowest tenth begins) of", *labels]
    return table(head, lines)


def curve(record: Record) -> str:
    """The settings on a front, and what the choice says."""
    best = {name for names in record["fronts"].values() for name in names} | {record["choice"]["chosen"]}
    points = [point for point in record["points"] if point["setting"] in best or not point["options"] | point["load"]]
    tasks = [*points[0]["tasks"]]
    lines = []
    for point in sorted(points, key=lambda one: -one["passes_ratio"]):
        right = [f"{point['tasks'][task]['share']:.1%}" for task in tasks]
        work = [share(point[f"{kind}_ratio"]) for kind in ("steps", "passes", "milliseconds")]
        loss = f"{-point['loss']:+.1f} ({-point['high']:+.1f} to {-point['low']:+.1f})"
        lines.append([f"`{point['setting']}`", str(point["items"]), *right, loss, *work])
    head = [record["name"], "items", *tasks, "points", "steps", "passes", "time"]
    end = "" if record["is_complete"] else " The time was over before all was tried."
    return f"{table(head, lines)}\n\n{record['choice']['sentence']}.{end}"


def finishing(record: Record) -> str:
    """Refused canvases that begin again, or are finished one token after another, beside the plain canvas."""
    lines = [
        [
            row["task"],
            row["setting"],
            f"{row['share']:.1%}",
            f"{row['passes']:.1f}",
            f"{row['milliseconds']:.1f}",
            f"+{row['gained']} −{row['lost']}",
            f"{row['p']:.1g}",
        ]
        for row in record["rows"]
    ]
    head = [record["model"], "setting", "right", "passes", "ms an item", "beside a canvas", "p"]
    return table(head, lines)


SECTIONS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "peers": ("Beside transformers", peers),
    "step": ("A step", step),
    "adapters": ("The cost of an adapter", adapters),
    "request": ("Whole answers", request),
    "nano": ("nano", nano),
    "skills": ("nano-skills", skills),
    "finishing": ("Refused canvases, finished", finishing),
    "curve": ("Quality against steps", curve),
    "pins": ("The more is given, the fewer steps", pins),
    "sampling rules": ("Top-p, top-k, min-p and penalties", sampling_rules),
    "early answers": ("Answers that arrive early", early),
    "constrain": ("Grammars", constrain),
    "quantised": ("Fewer bits", quantised),
    "the true size": ("The true size", full_size),
    "serve": ("Serving", serve),
    "decisions": ("Decisions", decisions),
    "under attack": ("Under attack", attacks),
    "neighbours": ("Beside busy processes", neighbours),
    "ops": ("Operations", ops),
    "gpu": ("On a GPU", gpu),
    "kernels": ("Kernels of a step, compiled", kernels),
    "predicted": ("Predictions, not run", predicted),
}
"""In the order of the page."""
