"""compute-sanitizer on one eager step of nano: reads and writes beside what was allocated."""

from __future__ import annotations

import re
from collections.abc import Iterator

from benchmarks.gpu.setting import Row, Setting
from benchmarks.gpu.tools import around

ERROR = 9
"""The exit code that it is asked for."""


def run(setting: Setting, _: str) -> Iterator[Row]:
    arguments = ["--tool", "memcheck", "--error-exitcode", str(ERROR), "--print-limit", "20"]
    result = around(setting, "compute-sanitizer", arguments, "nano")
    if isinstance(result, dict):
        yield result
        return
    summary = re.findall(r"ERROR SUMMARY: .*", result.text)
    says = summary[-1] if summary else "no summary: " + " ".join(result.text.split())[-200:]
    says = "its time was over" if result.code is None else says
    yield {"name": "nano", "ok": result.code == 0, "says": says, "text": result.text[-8000:]}
