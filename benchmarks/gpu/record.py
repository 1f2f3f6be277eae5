"""What a call left in its folder, as one record for RESULTS.md: cells by name, every other step in a sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import common
from sfumato.measure.machine import environment

KEPT = 12
"""Kernels of each profile."""
MOST_MS = {"int4": 6.5, "int4-fp8": 6.5, "fp8": 8.5, "bf16": 15.5}
"""Of a pass at one canvas, behind 1,024 tokens."""
TIMES = 3.0
"""The tokens of sixteen canvases together, in those of one, in fp8."""


def write(out: Path, target: Path) -> int:
    results = out / "results.json"
    if not results.exists():
        print(f"{results} is not there; run the call first", file=sys.stderr)
        return 2
    profile = out / "profile.json"
    kernels = json.loads(profile.read_text()) if profile.exists() else {}
    common.write(target, record(json.loads(results.read_text()), kernels))
    return 0


def record(run: dict[str, Any], kernels: dict[str, Any]) -> dict[str, Any]:
    tasks = [task for step in run["steps"] for task in tasks_of(step)]
    results = {task["task"]: task.get("result", {}) for task in tasks}
    place = run.get("environment") or environment()
    place["command"] = "python scripts/gpu.py" + (" --more" if run["plan"] == "more" else "")
    return {
        "what": "gpu",
        "plan": run["plan"],
        "state": run["state"],
        "seconds": run["seconds"],
        "tasks": tasks,
        "targets": targets(results) if run["plan"] == "first" else {},
        "kernels": {name: rows[:KEPT] for name, rows in kernels.items()},
        "environment": place,
    }


def tasks_of(step: dict[str, Any]) -> list[dict[str, Any]]:
    """A task for each row that has a figure of its own, and one for the step."""
    tasks = []
    for row in step["rows"]:
        if row.keys() & {"ms_a_pass", "first_step_ms", "step_ms"}:
            more = " tuned" if row.get("is_tuned") else ""
            result = {key: value for key, value in row.items() if key not in ("says", "ok", "name")}
            tasks.append({"task": f"full/{row['name']}{more}", "ok": row.get("ok", True), "result": result})
    wrong = [{"name": row["name"], "error": row.get("error")} for row in step["rows"] if row.get("ok") is False]
    one = {"task": step["step"], "ok": bool(step["ok"]), "outcome": step["outcome"], "seconds": step.get("seconds")}
    one["says"] = step["says"]
    if not step["ok"]:
        one["error"] = f"{step['outcome']}: {step['says']}"
    return [*tasks, one | ({"wrong": wrong} if wrong else {})]


def targets(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The issue's figures; of two runs of a cell that with the better tile sizes."""

    def figure(kind: str, batch: int, key: str) -> float | None:
        name = f"full/{kind} batch {batch} context 1024"
        return results.get(f"{name} tuned", results.get(name, {})).get(key)

    figures = {
        f"{kind}, batch 1, 1K context: ms a pass": common.target(figure(kind, 1, "ms_a_pass"), most)
        for kind, most in MOST_MS.items()
    }
    one, many = (figure("fp8", batch, "tokens_per_second") for batch in (1, 16))
    gain = many / one if one and many else None
    figures["fp8, batch 16: times the tokens of batch 1"] = common.target(gain, TIMES, at_most=False)
    return figures
