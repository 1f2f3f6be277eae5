"""A tool of NVIDIA's around a step of ours: where it is, what it is asked, what became of it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.setting import Row, Setting

PLACES = ("/usr/local/cuda*/bin", "/opt/nvidia/nsight-compute/*", "/usr/local/cuda*/compute-sanitizer")


@dataclass(frozen=True)
class Outcome:
    code: int | None
    """None: its time was over."""
    text: str


def find(name: str) -> str | None:
    """On the path, or where CUDA is usually installed."""
    places = [path for place in PLACES for path in sorted(Path("/").glob(place[1:])) if (path / name).is_file()]
    return shutil.which(name) or (str(places[-1] / name) if places else None)


def around(setting: Setting, name: str, arguments: list[str], kind: str) -> Outcome | Row:
    """Run `onestep` under the tool. A row that says so where it is not there; dry, the step runs without it."""
    tool = find(name)
    step = [sys.executable, "-m", "benchmarks.gpu", f"onestep {kind}", "--out", str(setting.out)]
    if setting.is_dry:
        outcome = _run([*step, "--dry"], setting.left)
        would = shlex.join([name, *arguments, "python", *step[1:4]])
        ok = outcome.code == 0
        return {
            "name": kind,
            "ok": ok,
            "would": would,
            "says": f"would run {name}",
            **({} if ok else {"text": outcome.text}),
        }
    if tool is None:
        return {"name": kind, "skipped": f"there is no {name} here"}
    return _run([tool, *arguments, *step], setting.left)


def _run(command: list[str], seconds: float) -> Outcome:
    # A memory checker sees what the driver gave, which torch's allocator would cut up.
    alone = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "memcheck" in command else {})
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(1.0, seconds), errors="replace", check=False, env=alone
        )
    except subprocess.TimeoutExpired as error:
        return Outcome(None, str(error.stdout or "")[-20_000:])
    return Outcome(done.returncode, done.stdout + done.stderr)
