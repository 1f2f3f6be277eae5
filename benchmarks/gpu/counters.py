"""Hardware counters of four kernels of a step in int4: how near to the memory's and the arithmetic's limit they are."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.setting import Row, Setting
from benchmarks.gpu.tools import around

KERNELS = ("_experts_gate_up", "_experts_down", "_linear", "_multiply")
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.sum",
    "smsp__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


def run(setting: Setting, _: str) -> Iterator[Row]:
    chosen = f"regex:^({'|'.join(KERNELS)})$"
    # The clocks of the machine are not ours to lock.
    arguments = [
        "--csv",
        "--clock-control",
        "none",
        "--target-processes",
        "all",
        "--kernel-name",
        chosen,
        "--launch-count",
        "24",
    ]
    output = around(setting, "ncu", [*arguments, "--metrics", ",".join(METRICS)], "int4")
    if isinstance(output, dict):
        yield output
        return
    rows = table(output.text)
    if not rows:
        why = "the counters are not ours to read" if "ERR_NVGPUCTRPERM" in output.text else output.text[-300:]
        yield {"name": "int4", "skipped": f"ncu counted nothing: {' '.join(why.split())}"}
        return
    yield {"name": "int4", "ok": True, "says": f"{len(rows)} launches counted", "launches": rows}


def table(text: str) -> list[dict[str, Any]]:
    """Of what ncu prints: one entry a launch, its kernel, its grid and the metrics."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        one = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"], "grid": row.get("Grid Size", "")})
        one[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(launches.values())
