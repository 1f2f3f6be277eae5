"""One call on a CUDA machine that tells all: `make gpu`, 480 seconds at most; `make gpu-more`, 240, tells the rest.

    python3 scripts/gpu.py [--more] [--out runs/gpu] [--seconds 480] [--only nano,kernels] [--dry] [--record FILE]

Needs torch, triton, safetensors, tokenizers and numpy (and jinja2, which torch brings), and no network; transformers
for the step `peer` alone. The steps are those of benchmarks/gpu/plan.py. Each is a child process that is killed when
its time or that of the call is over, so none can take the others along. What a step finds is in `--out` before the next
begins:

    results.json   every step and what became of it        tuned.json   tile sizes that were faster
    profile.json   kernels by count, time and grid         log.txt      what the steps printed

A table that is worth keeping is copied to sfumato/ops/triton/tuned.json; then every engine on such a GPU reads it.
`--dry` is the same on any machine, at toy sizes on the processor: to see that the script itself works. `--record FILE`
writes what is in `--out` as one record for RESULTS.md, and runs nothing. Exit codes: 0 all was right, 1 something was
not, 2 nothing could run, 3 stopped early.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.plan import PLANS, SECONDS, Step  # noqa: E402

LOG_BYTES = 64 * 1024
"""Of what a step prints, so much of its end is kept."""
SLOWER = 3
"""Times the plan's seconds that a processor may take where others want it too; alone it takes two minutes for both."""
TURN = 0.1
"""Seconds between two looks at a child."""

Command = Callable[[Step, Path, float], Sequence[str]]
"""(step, file for its rows, time.time() at which it is killed) -> what to start."""


class Call:
    """One call: its steps one after the other, and what was found, written as it comes."""

    def __init__(self, out: Path, seconds: float, about: dict[str, Any]) -> None:
        self.out, self.began, self.seconds = out, time.time(), seconds
        self.record: dict[str, Any] = {"what": "gpu", **about, "state": "running", "steps": []}
        self.profiles: dict[str, Any] = {}
        self.cache = ROOT / "runs" / "triton"
        out.mkdir(parents=True, exist_ok=True)
        for old in ("results.json", "profile.json", "tuned.json", "log.txt"):
            (out / old).unlink(missing_ok=True)

    @property
    def passed(self) -> float:
        return time.time() - self.began

    def run(self, plan: Sequence[Step], command: Command, scale: float = 1.0) -> int:
        """Every step of the plan, with so many times the time that it says; the exit code."""
        stopped = ""
        for step in plan:
            until = min(step.until * scale, self.seconds)
            one: dict[str, Any] = {"step": step.name, "outcome": "running", "ok": None, "rows": []}
            self.record["steps"].append(one)
            if stopped:
                one |= {"outcome": "not run", "says": "stopped before"}
            elif until - self.passed < step.least * scale:
                one |= {"outcome": "no time", "ok": False, "says": f"to be over at {until:.0f} s"}
            else:
                stopped = self._step(step, one, self.began + until, command)
            self._write()
            print(f"{step.name:<16}{one['outcome']:<9}{one.get('seconds', 0):6.1f} s  {one['says']}", flush=True)
        bad = [one for one in self.record["steps"] if one["ok"] is False]
        self.record["state"] = f"stopped: {stopped}" if stopped else "done"
        self._write()
        print(f"{self.record['state']}, {self.passed:.0f} s, {len(bad)} of {len(plan)} steps not right", flush=True)
        return 2 if stopped.startswith("cannot run") else 3 if stopped else 1 if bad else 0

    def _step(self, step: Step, one: dict[str, Any], until: float, command: Command) -> str:
        """Run it to its end, or kill it. Why the call should stop here, if it should."""
        began, compiled = time.time(), self._compiled()
        with tempfile.TemporaryDirectory() as folder:
            rows, printed = Path(folder, "rows"), Path(folder, "log")
            try:
                one["outcome"], one["exit"] = self._child(command(step, rows, until), rows, printed, until, one)
            finally:
                self._log(step, printed)
            self._take(rows, one)
        one["seconds"], one["compiled"] = round(time.time() - began, 1), self._compiled() - compiled
        wrong = [row["name"] for row in one["rows"] if row.get("ok") is False]
        one["ok"] = one["outcome"] == "done" and not wrong
        one["says"] = _sentence(one["outcome"], one["rows"], wrong)
        if stops := [str(row["stop"]) for row in one["rows"] if row.get("stop")]:
            return "; ".join(stops)
        is_only_slow = one["outcome"] == "killed" and not wrong and any(row.get("ok") for row in one["rows"])
        is_shut = step.is_gate and one["outcome"] != "done" and not is_only_slow
        return f"{step.name}: {one['says']}" if is_shut else ""

    def _child(
        self, command: Sequence[str], rows: Path, printed: Path, until: float, one: dict[str, Any]
    ) -> tuple[str, int | None]:
        """What became of it: done, failed, crashed, killed; and its exit code."""
        self.cache.mkdir(parents=True, exist_ok=True)
        surroundings = os.environ | {"TRITON_CACHE_DIR": str(self.cache), "PYTHONUNBUFFERED": "1"}
        with printed.open("wb") as log:
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=surroundings,
                start_new_session=True,
            )  # fmt: skip
        is_over = False
        try:
            while not (is_over := _has_ended(child.pid)) and time.time() < until:
                time.sleep(TURN)
                if self._take(rows, one):
                    self._write()
        finally:  # its whole group, while it still has its number: what it started must not run on beside the next
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if not is_over:
            return "killed", None
        code = child.returncode
        return "done" if code == 0 else "crashed" if code < 0 else "failed", code

    def _take(self, rows: Path, one: dict[str, Any]) -> bool:
        """Rows that have come since; a line that is not whole yet is left for later. Kernels go into the profile."""
        lines = rows.read_text().split("\n")[:-1] if rows.exists() else []
        new = lines[len(one["rows"]) :]
        for line in new:
            row = json.loads(line)
            if "environment" in row:
                self.record["environment"] = row.pop("environment")
            if "kernels" in row:
                self.profiles[f"{one['step']}: {row['name']}"] = row.pop("kernels")
            one["rows"].append(row)
        return bool(new)

    def _log(self, step: Step, printed: Path) -> None:
        text = printed.read_bytes() if printed.exists() else b""
        with (self.out / "log.txt").open("ab") as log:
            log.write(f"---- {step.name}, {len(text)} bytes\n".encode() + text[-LOG_BYTES:] + b"\n")

    def _write(self) -> None:
        self.record["seconds"] = round(self.passed, 1)
        whole = {"results.json": self.record, **({"profile.json": self.profiles} if self.profiles else {})}
        for name, content in whole.items():
            beside = self.out / f".{name}.part"
            beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, self.out / name)

    def _compiled(self) -> int:
        """Kernels in the cache: what a step adds to it, `prepare` has missed."""
        return len(list(self.cache.iterdir())) if self.cache.exists() else 0


def _has_ended(pid: int) -> bool:
    """Without taking its exit code, so that its number is still its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _sentence(outcome: str, rows: list[dict[str, Any]], wrong: list[str]) -> str:
    """What a step found, on one line."""
    texts = [str(row["says"]) for row in rows if row.get("says")]
    texts += [f"{row['name']} cannot run: {row['skipped']}" for row in rows if row.get("skipped")]
    if wrong:
        texts.insert(0, f"{len(wrong)} of {len(rows)} not right: {', '.join(wrong)}")
    if outcome != "done":
        texts.insert(0, f"after {len(rows)} rows, see log.txt")
    text = "; ".join(texts) or f"{len(rows)} rows"
    return text if len(text) <= 240 else text[:237] + "…"


def command_of(out: Path, is_dry: bool) -> Command:
    """The steps of benchmarks/gpu."""

    def command(step: Step, rows: Path, until: float) -> list[str]:
        text = [sys.executable, "-m", "benchmarks.gpu", step.name, "--rows", str(rows), "--out", str(out.resolve())]
        return [*text, "--until", f"{until:.1f}", *(["--dry"] if is_dry else [])]

    return command


def _interrupted(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--more", action="store_true", help="the second call: long contexts, memory checker, counters")
    parser.add_argument("--out", type=Path, help="default: runs/gpu, runs/gpu-more; with -dry behind it for --dry")
    parser.add_argument("--seconds", type=float, help="for all of it: 480, or 240 for --more")
    parser.add_argument("--only", default="", help="these steps, separated by commas: cells, or 'cells int4'")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the processor of any machine")
    parser.add_argument("--record", type=Path, help="write what is in --out as one record, and run nothing")
    arguments = parser.parse_args()
    name = "more" if arguments.more else "first"
    usual = ("gpu-more" if arguments.more else "gpu") + ("-dry" if arguments.dry else "")
    out = arguments.out or Path("runs", usual)
    if arguments.record:
        from benchmarks.gpu.record import write  # only now: it imports torch

        return write(out, arguments.record)
    only = [one.strip() for one in arguments.only.split(",") if one.strip()]
    plan = [step for step in PLANS[name] if not only or step.name in only or step.name.split()[0] in only]
    if unknown := [one for one in only if not any(one in (step.name, step.name.split()[0]) for step in plan)]:
        known = ", ".join(step.name for step in PLANS[name])
        print(f"there is no step {unknown[0]!r}; the steps are {known}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupted)
    seconds = arguments.seconds or SECONDS[name] * (SLOWER if arguments.dry else 1)
    call = Call(out, seconds, {"plan": name, "is_dry": arguments.dry})
    print(f"{len(plan)} steps, {call.seconds:.0f} seconds at most; results go to {out}", flush=True)
    try:
        return call.run(plan, command_of(out, arguments.dry), seconds / SECONDS[name])
    finally:
        if call.record["state"] == "running":
            call.record["state"] = "interrupted"
            call._write()


if __name__ == "__main__":
    sys.exit(main())
